"""`export --to c`: a stack of recurrent layers as C99, its cores as they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from htcompress.directory.read import read_modules, read_state
from htcompress.errors import RequestError
from htcompress.exporting import c_source
from htcompress.exporting.assumed import told_apart, unknown_settings
from htcompress.exporting.export import Exported, Wish
from htcompress.files import replacing
from htcompress.matrix.layout import Layout
from htcompress.matrix.network import Network
from htcompress.nn.gates import GateWeights
from htcompress.nn.recurrent import HTRecurrent
from htcompress.observer import Observer
from htcompress.report import read_report, words
from htcompress.storage import Codec
from htcompress.storage.half import Half
from htcompress.storage.integer import Integer, column
from htcompress.tensor import DimensionTree
from htcompress.vocabulary import Kind

_KINDS = {Kind.LSTM: "LSTM", Kind.GRU: "GRU", Kind.RNN_TANH: "TANH", Kind.RNN_RELU: "RELU"}
_STEPS = 5
"""Of the sequence that the test runs."""


def export_as(wish: Wish, observer: Observer) -> Exported:
    """Write the folder; see `htcompress.export`."""
    if wish.task is not None:
        raise RequestError("--to c writes the recurrent layers alone; leave out --task.")
    modules = read_modules(wish.place, read_state(wish.place))
    modules = told_apart(
        modules, unknown_settings(wish.config, read_report(wish.place)), wish.nonlinearity, wish.place, observer
    )
    files: list[Path] = []
    texts: dict[Path, str] = {}
    notes: list[str] = []
    source = read_report(wish.place).source.get("file") or "a model"
    for (name, *_), module in modules:
        observer.stage(f"writing {name or 'the recurrent layer'}")
        folder = wish.file if len(modules) == 1 else wish.file / (name.replace(".", "_") or "recurrent")
        made, said = c_files(module.float().eval(), name, str(source))
        texts |= {folder / file: text for file, text in made.items()}
        notes.append(f"{name or 'the layer'}: {said}")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
        files.append(path)
    return Exported(tuple(files), notes=tuple(notes))


def c_files(module: HTRecurrent, layer: str, source: str, *, name: str = "rnn") -> tuple[dict[str, str], str]:
    """The files of a module (header, source, a program that tests them), and what they take, in words.

    Args:
        layer: what the module is called, for the first line.
        source: the file it came from.
        name: before every symbol that others see.

    Raises `RequestError` where C is not written for it.
    """
    s = module.settings
    if s.proj_size or s.cell or not s.recurrence.native:
        what = f"a projection (proj_size={s.proj_size})" if s.proj_size else "one step: it is a cell"
        if not s.recurrence.native:
            what = s.recurrence.said
        raise RequestError(f"Layer {layer or '(top level)'} has {what}, which is not written in C. Use --to onnx.")
    made = _Tables()
    for gates in module.directions().values():
        made.add(gates)
    guard, width = name.upper(), s.num_directions * s.hidden_size
    rows = s.rows
    scratch = made.work + 2 * rows
    head = c_source.HEADER.format(
        title=f"{s.mode} {s.input_size} to {s.hidden_size}, {s.num_layers} layers, {s.num_directions} directions",
        source="".join(c for c in source if c.isprintable()).replace("*/", ""),
        guard=guard,
        name=name,
        inputs=s.input_size,
        outputs=width,
        state=s.num_layers * s.num_directions * s.hidden_size,
        numbers=made.numbers,
        scratch=scratch,
        per_step=2 * width,
        step="" if s.bidirectional else c_source.STEP.format(name=name),
    )
    defines = {
        "LSTM": 0,
        "GRU": 1,
        "TANH": 2,
        "RELU": 3,
        "KIND": _KINDS[s.kind],
        "UNITS": s.hidden_size,
        "GATES": s.gates,
        "LAYERS": s.num_layers,
        "DIRECTIONS": s.num_directions,
        "WIDTH": width,
        "GATED": made.work,
        "SCRATCH": scratch,
        "CORES": len(made.cores),
        "LOOPS": made.loops,
    }
    body = "".join(
        (
            c_source.TYPES.format(name=name),
            "".join(f"#define {key} {value}\n" for key, value in defines.items()),
            "\n",
            made.data(),
            c_source.RUNTIME,
            made.directions(),
            c_source.BODY.replace("NAME", name),
            "" if s.bidirectional else c_source.ONE_STEP.replace("NAME", name),
        )
    )
    floats = scratch + 2 * width + (1 + (s.recurrence.states > 1)) * s.num_layers * width
    said = f"constants {words.size(made.bytes)}; memory for one step {words.size(4 * floats)}, states included"
    return {f"{name}.h": head, f"{name}.c": body, "test.c": _test(module, name, guard)}, said


def _test(module: HTRecurrent, name: str, guard: str) -> str:
    s = module.settings
    x = torch.randn(_STEPS, 1, s.input_size, generator=torch.Generator().manual_seed(0))
    # What enters the gates is about 1: far beyond that, float32 itself is off by more than what is looked for.
    norms = [gates.written_out().ih for gates in module.directions().values()]
    x /= max(1.0, *(float(ih.detach().norm(dim=1).max()) for ih in norms if ih is not None))
    with torch.no_grad():
        wanted, _ = module(x.transpose(0, 1) if s.batch_first else x)
    return c_source.TEST.format(
        name=name, guard=guard, steps=_STEPS, x=_floats(x.flatten()), wanted=_floats(wanted.flatten())
    )


def _floats(values: Tensor) -> str:
    return ", ".join(f"{value:.9g}" for value in values.tolist())


_BYTES = {"int8_t": 1, "uint8_t": 1, "uint16_t": 2, "int32_t": 4, "float": 4, "product_t": 32}
"""Of the types of the tables, on a machine with pointers of 32 bits or a little more."""


class _Tables:
    """The constants of a module.

    Attributes:
        cores: one line of C for each.
        work: floats that products need, the vector among them.
        loops: of the deepest product.
        numbers: of all cores.
        bytes: of all arrays.
    """

    def __init__(self) -> None:
        self.cores: list[str] = []
        self.work, self.loops, self.numbers = 0, 1, 0
        self.bytes = 0
        self._arrays: list[str] = []
        self._matrices: list[str] = []
        self._directions: list[str] = []

    def data(self) -> str:
        """The arrays, and the tables of cores and matrices."""
        cores = ",\n".join(self.cores)
        matrices = ",\n".join(self._matrices)
        return (
            "".join(self._arrays)
            + f"static const core_t cores[] = {{\n{cores}}};\n"
            + f"static const matrix_t matrices[] = {{\n{matrices}}};\n\n"
        )

    def directions(self) -> str:
        """The table of directions."""
        lines = ",\n".join(self._directions)
        return f"\nstatic const direction_t directions[] = {{\n{lines}}};\n"

    def add(self, gates: GateWeights) -> None:
        """A direction."""
        found = {name: self._matrix(gates, name) for name in gates.weights()}
        biases = {
            name: -1 if getattr(gates, name) is None else self._core(*gates.stored(name))
            for name in ("bias", "bias_hn")
        }
        order = "0"
        places = gates.places()
        if places is not None:
            order = f"order{len(self._directions)}"
            self._array("uint16_t", order, places[1].tolist())
        exponents = "0"
        if gates.input_exponents is not None:
            exponents = f"exponents{len(self._directions)}"
            self._array("int8_t", exponents, gates.input_exponents.tolist())
        joint = gates.joint
        extra = 0 if joint is None else joint.shape[1] - gates.input_size - gates.settings.hidden_size
        matrices = (found.get(name, -1) for name in ("ih", "hh", "joint"))
        fields = [*matrices, *biases.values(), gates.input_size, extra, order, exponents]
        self._directions.append(f"{{{', '.join(map(str, fields))}}}")

    def _array(self, kind: str, name: str, values: Sequence[object]) -> None:
        parts = [", ".join(map(str, values[k : k + 24])) for k in range(0, len(values), 24)]
        joined = ",\n".join(parts)
        self._arrays.append(f"static const {kind} {name}[] = {{{joined}}};\n")
        self.bytes += _BYTES[kind] * len(values)

    def _core(self, core: Tensor, codec: Codec, scales: Tensor | None) -> int:
        """The index of a core with its numbers."""
        index, flat = len(self.cores), core.detach().float().reshape(-1)
        name, row, steps = f"core{index}", flat.numel(), "0"
        if isinstance(codec, Integer):
            parts = codec.encode(core.detach(), scales)
            # A code may end in the next byte, which is read along.
            self._array("uint8_t", name, [*parts[""].tolist(), 0])
            steps = f"{name}_scales"
            kept = codec.scales(core) if scales is None else scales
            self._array("float", steps, [f"{_literal(v)}f" for v in column(kept, core).flatten().tolist()])
            row, bits = flat.numel() // len(kept), codec.width
        elif isinstance(codec, Half):
            bits = 16
            self._array("uint16_t", name, (flat.half().view(torch.int16).int() & 0xFFFF).tolist())
        else:
            bits = 32
            self._array("float", name, [f"{v}f" for v in map(_literal, flat.tolist())])
        self.cores.append(f"{{{name}, {steps}, {row}, {flat.numel()}, {self.numbers}, {bits}}}")
        self.numbers += flat.numel()
        return index

    def _matrix(self, gates: GateWeights, which: str) -> int:
        """The index of a matrix, with its cores and products."""
        matrix = gates.weights()[which].matrix()
        network = matrix.network or _whole(matrix.shape)
        operands: list[_Operand] = []
        identities: list[_Operand] = []
        for own, core, legs, shape in zip(matrix.core_names, matrix.cores, network.legs, network.shapes, strict=True):
            if isinstance(core, Tensor):
                operands.append(_Operand(self._core(*gates.stored(f"{which}.{own}")), legs, shape))
            else:
                identities.append(_Operand(0, legs, shape))
        return self._planned(network, _joined(operands, identities))

    def _planned(self, network: Network, operands: list[_Operand]) -> int:
        """The index of a matrix: the vector meets one core after the other, first those that leave least of it."""
        layout = network.layout
        columns, out = prod(layout.col_modes), tuple(f"m{k}" for k in range(layout.tree.order))
        vector = _Operand(0, tuple(f"n{k}" for k in range(layout.tree.order)), tuple(layout.col_modes))
        sizes = {leg: n for operand in [vector, *operands] for leg, n in zip(operand.legs, operand.shape, strict=True)}
        sizes |= {f"m{k}": n for k, n in enumerate(layout.row_modes)}
        free, products, index = columns, list[str](), len(self._matrices)
        while operands:
            near = [k for k, core in enumerate(operands) if set(core.legs) & set(vector.legs)] or [0]
            kept = [_kept(vector, operands, k, out) for k in range(len(operands))]
            chosen = min(near, key=lambda k, kept=kept: prod(sizes[leg] for leg in kept[k]))  # type: ignore[misc]
            core, made = operands.pop(chosen), kept[chosen]
            made = made if operands else out
            # A number of the core is decoded once for all that it is multiplied with.
            every = dict.fromkeys((*core.legs, *made))
            loops = [
                number
                for leg in every
                if sizes[leg] > 1
                for number in (sizes[leg], *(_stride(leg, axes, sizes) for axes in (vector.legs, core.legs, made)))
            ] or [1, 0, 0, 0]
            shape = tuple(sizes[leg] for leg in made)
            table = f"loops{index}_{len(products)}"
            self._array("int32_t", table, loops)
            products.append(f"{{{vector.place}, {core.place}, {free}, {prod(shape)}, {table}, {len(loops) // 4}}}")
            self.loops = max(self.loops, len(loops) // 4)
            vector = _Operand(free, made, shape)
            free += prod(shape)
        self.work = max(self.work, free)
        self._array("product_t", f"products{index}", products)
        self._matrices.append(f"{{products{index}, {len(products)}, {columns}, {vector.place}}}")
        return index


@dataclass(frozen=True)
class _Operand:
    """What meets in a product: a core, of which `place` is the index, or what lies at `place` in the working memory."""

    place: int
    legs: tuple[str, ...]
    shape: tuple[int, ...]


def _kept(vector: _Operand, operands: Sequence[_Operand], k: int, out: tuple[str, ...]) -> tuple[str, ...]:
    """The axes that are left once a vector has met one of the operands."""
    wanted = {leg for j, other in enumerate(operands) if j != k for leg in other.legs} | set(out)
    return tuple(leg for leg in dict.fromkeys((*vector.legs, *operands[k].legs)) if leg in wanted)


def _joined(operands: list[_Operand], identities: list[_Operand]) -> list[_Operand]:
    """The operands without identities between them: what one joins is one axis, or several, of the next core."""
    left = list(identities)
    while left:
        identity = left.pop()
        # It is an identity of its first axes against the last: against one axis, where those of size 1 are left out.
        axes = [(leg, n) for leg, n in zip(identity.legs, identity.shape, strict=True) if n > 1]
        if not axes:
            continue
        *inner, (bond, _) = axes
        legs, shape = tuple(leg for leg, _ in inner), tuple(n for _, n in inner)
        operands = [_split(operand, bond, legs, shape) for operand in operands]
        left = [_split(other, bond, legs, shape) for other in left]
    return operands


def _split(operand: _Operand, bond: str, inner: tuple[str, ...], sizes: tuple[int, ...]) -> _Operand:
    if bond not in operand.legs:
        return operand
    at = operand.legs.index(bond)
    legs = (*operand.legs[:at], *inner, *operand.legs[at + 1 :])
    return _Operand(operand.place, legs, (*operand.shape[:at], *sizes, *operand.shape[at + 1 :]))


def _whole(shape: tuple[int, int]) -> Network:
    """A dense matrix as a network of one core."""
    layout = Layout(shape[0], shape[1], (shape[0], 1), (1, shape[1]), DimensionTree.balanced(2))
    return Network(layout, (("m0", "m1", "n0", "n1"),), ((shape[0], 1, 1, shape[1]),))


def _stride(leg: str, axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    return prod(sizes[other] for other in axes[list(axes).index(leg) + 1 :]) if leg in axes else 0


def _literal(value: float) -> str:
    """A float as C writes it, with a point or an exponent."""
    text = f"{value:.9g}"
    return text if any(mark in text for mark in ".en") else f"{text}.0"
