"""Recurrent cells that an exporter has unrolled: found in an ONNX graph, and what a node of ONNX makes of each."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import TensorProto

from htcompress.graphs.affine import Affine, Affines, NotAffineError
from htcompress.graphs.branches import every_graph
from htcompress.graphs.cores import Core, cores
from htcompress.graphs.gru_cells import gates_of_gru, is_reset
from htcompress.graphs.left_cells import (
    LeftCell,
    NoCellError,
    NotACellError,
    leaves_of,
    name_of,
    origin_of,
    size_of,
    states_multiplied,
)
from htcompress.graphs.node import Place
from htcompress.graphs.nodes import are_apart
from htcompress.graphs.values import Shape, Values


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell as a node of ONNX.

    Attributes:
        operator: LSTM, GRU or RNN.
        relu: whether an RNN has Relu in the place of Tanh.
        resets_before: whether a GRU resets its state before the candidate's matrix.
        name: what it is called.
        x: the values that enter it beside each other, (..., width) each, with as many rows as the states.
        states: h, and c of an LSTM, (..., hidden).
        results: h, and c, that it puts out.
        equal: other values of the graph that hold the same as one of x or states, and which.
        axes: of x and states, all but the last; None where one is open.
        shapes: of the results, for Reshape.
        weights: W (1, gates * hidden, inputs), R (1, gates * hidden, hidden), and B (1, 2 * gates * hidden) where it
            has biases.
        place: of the graph that it is in.
        inner: the indices of the nodes that it stands for.
        sources: the numbers of the file that its matrices are made of: where they stand, and their names.
        numbers: how many these are.
        stock: the name of the cell under which its matrices stand, where steps of a sequence have the same; its own if
            empty.
    """

    operator: str
    relu: bool
    resets_before: bool
    name: str
    x: tuple[tuple[str, int], ...]
    states: tuple[str, ...]
    results: tuple[str, ...]
    equal: Mapping[str, str]
    axes: Mapping[str, tuple[int | None, ...]]
    shapes: tuple[tuple[int, ...], ...]
    weights: Mapping[str, np.ndarray]
    place: Place
    inner: frozenset[int]
    sources: frozenset[tuple[Place, str]]
    numbers: int
    stock: str = ""

    @property
    def hidden(self) -> int:
        """How many units it has."""
        return int(self.weights["R"].shape[2])


def cells_of(model: onnx.ModelProto) -> tuple[list[Cell], list[LeftCell]]:
    """The cells of a model that are unrolled, and what looks like one and is not understood."""
    operators = {node.op_type for _, graph in every_graph(model.graph) for node in graph.node}
    given = {value.name for value in model.graph.input} - {i.name for i in model.graph.initializer}
    states = len(given) > 1 and operators & {"Sigmoid", "Tanh", "Relu", "HardSigmoid"}
    if not states and not operators >= {"Sigmoid", "Tanh", "Mul"}:
        return [], []
    every = list(Values.every(model))
    found: list[Cell] = []
    left: list[LeftCell] = []
    for values, refused in every:
        affines = Affines(values)
        taken: set[int] = set()
        for core in [*cores(affines), *_simple(affines)]:
            inner, sources, numbers = _inside(affines, core)
            name = name_of(values, core.results[0], inner, sources)
            if taken & inner:
                continue
            try:
                cell = _understood(affines, core, name, inner, sources, numbers)
                if refused:
                    raise NotACellError(refused)
                found.append(cell)
            except NoCellError:
                continue
            except (NotAffineError, NotACellError) as error:
                left.append(LeftCell(core.operator, name, str(error), numbers))
            taken |= inner
        known = [state for cell in found if cell.place == values.place for state in cell.states]
        left += [] if values.place else list(states_multiplied(values, taken, known))
    found, repeated = _once([values for values, _ in every], found)
    return found, left + repeated


def _once(every: Sequence[Values], cells: Sequence[Cell]) -> tuple[list[Cell], list[LeftCell]]:
    """The cells whose matrices nobody but such cells reads, and of each of the others one.

    Cells in branches of which never two are run may have the same, and so may the steps of a sequence.
    """
    once: list[Cell] = []
    left: list[LeftCell] = []
    seen: set[tuple[Place, str]] = set()
    readers = _readers(every, {source for cell in cells for source in cell.sources})
    own = {(cell.place, index) for cell in cells for index in cell.inner}
    for cell in cells:
        others = [other for other in cells if other is not cell and cell.sources & other.sources]
        beside = [other for other in others if not are_apart(cell.place, other.place)]
        read = any(readers[source] - own for source in cell.sources)
        if not read and all(same_matrices(cell, other) for other in beside):
            once.append(cell)
        elif not cell.sources & seen:
            why = "has matrices that others read, too" if read else "has matrices that other cells turn otherwise"
            left.append(LeftCell(cell.operator, cell.name, why, cell.numbers))
        seen |= cell.sources
    return once, left


def same_matrices(one: Cell, other: Cell) -> bool:
    """Whether they are steps of one sequence, or might be."""
    return (
        one.place == other.place
        and one.weights.keys() == other.weights.keys()
        and all(np.array_equal(array, other.weights[name]) for name, array in one.weights.items())
    )


def _readers(
    every: Sequence[Values], sources: Collection[tuple[Place, str]]
) -> dict[tuple[Place, str], set[tuple[Place, int]]]:
    """The nodes that read what is stored, or what is computed of it alone: where they stand, and their indices."""
    found: dict[tuple[Place, str], set[tuple[Place, int]]] = {source: set() for source in sources}
    made = {name for _, name in sources}
    for values in every:  # graphs come before those in their nodes
        for index, node in enumerate(values.graph.node):
            constants = [name for name in node.input if name in made and values.constants(name) is not None]
            if constants and values.constants(node.output[0]) is not None:
                made |= set(node.output)
                continue
            for name in constants:
                for source in values.constants.sources(name) & found.keys():
                    found[source].add((values.place, index))
    return found


def _simple(affines: Affines) -> Iterator[Core]:
    """h' = tanh(affine) or relu(affine), where h' is put out and h is an input of its shape."""
    values = affines.values
    ends = {values.base(output.name): output.name for output in values.graph.output}
    for node in values.graph.node:
        if node.op_type not in ("Tanh", "Relu") or values.base(node.output[0]) not in ends:
            continue
        try:
            made = affines(node.output[0])
        except NotAffineError:
            continue
        end = ends[values.base(node.output[0])]
        shape, hidden = values.shapes.get(end), made.own[-1]
        states = [
            leaf
            for leaf, matrix in made.parts.items()
            if leaf in values.inputs and len(matrix) == hidden and shape and values.shapes.get(leaf) == shape
        ]
        if states and len(made.parts) > 1:
            state = max(states, key=lambda leaf: (_named_alike(leaf, end), states.index(leaf)))
            yield Core("RNN", {"i": node.output[0]}, (state,), (node.output[0],))


def _named_alike(one: str, other: str) -> bool:
    return one in other or other in one


def _understood(
    affines: Affines, core: Core, name: str, inner: frozenset[int], sources: frozenset[tuple[Place, str]], numbers: int
) -> Cell:
    values = affines.values
    for result in core.results:
        if values.kinds.get(result) not in (None, TensorProto.FLOAT):
            raise NotACellError("does not compute in float32")
    before = False
    if core.operator == "GRU":
        h, x, gates, before = gates_of_gru(affines, core)
    else:
        gates = {letter: affines(gate) for letter, gate in core.gates.items()}
        leaves = leaves_of(gates.values())
        hidden = next(iter(gates.values())).own[-1]
        h = core.states[0] if core.operator == "RNN" else _hidden(values, core, leaves, hidden)
        x = {leaf: width for leaf, width in leaves.items() if leaf != h}
    if not x:
        raise NotACellError("multiplies nothing but its state")
    hidden = max(prod(gate.own) for gate in gates.values())
    if any(prod(gate.own) != hidden for gate in gates.values()):
        raise NotACellError("has gates of unlike sizes")
    _check_alone(values, core, inner)
    shapes = tuple(_shape(values, result, hidden) for result in core.results)
    _check_rows(values, [*x, h, *core.states], core.results[0])
    return Cell(
        core.operator,
        next(iter(gates.values())).activation == "Relu",
        before,
        name,
        tuple(x.items()),
        (h, *core.states) if core.operator == "LSTM" else (h,),  # h and c may begin as one value
        core.results,
        {other: name for name in {*x, h, *core.states} for other in values.equal_to(name)},
        {name: _axes(values, name) for name in (*x, h, *core.states)},
        shapes,
        _weights(core, gates, x, h, hidden),
        values.place,
        inner,
        sources,
        numbers,
    )


def _hidden(values: Values, core: Core, leaves: Mapping[str, int], hidden: int) -> str:
    """Which of the values that an LSTM multiplies is its state h: one of its size, preferably held beside c."""
    fitting = [leaf for leaf, width in leaves.items() if width == hidden]
    if not fitting:
        raise NotACellError(f"multiplies no state of {hidden} numbers, as one with a projection would not")
    begin = origin_of(values, core.states[0])
    ends = [o.name for o in values.graph.output if values.base(o.name) == values.base(core.results[0])]

    def likely(leaf: str) -> tuple[bool, ...]:
        origin = origin_of(values, leaf)
        given = origin in values.inputs
        shape = values.shapes.get(origin)
        return (
            given and origin == begin,
            given and shape is not None and shape == values.shapes.get(begin),
            given,
            any(_named_alike(origin, end) for end in ends),
        )

    return max(reversed(fitting), key=likely)


_LETTERS = {"LSTM": "iofc", "GRU": "zrh", "RNN": "i"}
"""The gates of ONNX's operators, in its order."""


def _weights(
    core: Core, gates: Mapping[str, Affine], x: Mapping[str, int], h: str, hidden: int
) -> dict[str, np.ndarray]:
    """W, R and B of the node."""
    letters = _LETTERS[core.operator]

    def rows(gate: Affine, leaf: str) -> np.ndarray:
        return gate.parts[leaf].reshape(-1, hidden).T

    def constant(gate: Affine) -> np.ndarray:
        return gate.constant.reshape(hidden)

    w = np.concatenate([np.concatenate([rows(gates[g], leaf) for leaf in x], 1) for g in letters])
    # What the reset gate of a GRU multiplies has a matrix and a bias of its own.
    state = {**gates, "h": gates["b"]} if core.operator == "GRU" else gates
    r = np.concatenate([rows(state[g], h) for g in letters])
    b = np.zeros((2, len(letters), hidden), np.float32)
    for k, g in enumerate(letters):
        b[0, k] = constant(gates[g])
    if core.operator == "GRU":
        b[1, 2] = constant(gates["b"])
    found = {"W": w[None], "R": r[None]}
    if b.any():
        found["B"] = b.reshape(1, -1)
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in found.items()}


def _inside(affines: Affines, core: Core) -> tuple[frozenset[int], frozenset[tuple[Place, str]], int]:
    """The nodes between a cell's matrices and its results, the constants its matrices are made of, and their size."""
    values = affines.values
    inner: set[int] = set()
    stored: set[tuple[Place, str]] = set()
    ends = {values.base(name) for name in core.states}
    waiting = list(core.results)
    while waiting:
        name = waiting.pop()
        place = values.places.get(name)
        if place is None or place in inner or values.base(name) in ends or values.constants(name) is not None:
            continue
        inner.add(place)
        node = values.graph.node[place]
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            matrices = [given for given in node.input[:2] if values.constants(given) is not None]
            stored |= {source for given in matrices for source in values.constants.sources(given)}
            waiting += node.input[2:]  # what Gemm adds
            if core.operator == "GRU":
                given = values.makers.get(values.base(node.input[0]))
                beside = given if given is not None and given.op_type == "Concat" else None
                parts = [node.input[0]] if beside is None else beside.input
                # A state that is reset before the matrix is inside, too, and so is what puts it beside what enters.
                resets = [name for name in parts if is_reset(affines, values.base(name), core.states[0])]
                if beside is not None and resets:
                    inner.add(values.places[beside.output[0]])
                waiting += resets
        else:
            waiting += node.input
    sources = frozenset(source for source in stored if size_of(values, source[1]))
    return frozenset(inner), sources, sum(size_of(values, name) for _, name in sources)


def _check_alone(values: Values, core: Core, inner: frozenset[int]) -> None:
    """Raise `NotACellError` where somebody else reads what is inside a cell."""
    for place in inner:
        for name in values.graph.node[place].output:
            if name not in core.results and values.readers.get(name, set()) - inner:
                raise NotACellError(f"has an inner value, {name}, that is read elsewhere")


def _check_rows(values: Values, given: Sequence[str], result: str) -> None:
    """Raise `NotACellError` where what enters a cell is known to have other rows than what it puts out."""
    wanted = _rows(values.shapes.get(result))
    for name in given:
        own = _rows(values.shapes.get(name))
        if wanted is not None and own is not None and own != wanted:
            raise NotACellError(f"spreads {name} over {wanted} rows")


def _rows(shape: Shape | None) -> int | None:
    known = [n for n in shape[:-1] if isinstance(n, int)] if shape else []
    return prod(known) if shape and len(known) == len(shape) - 1 else None


def _axes(values: Values, name: str) -> tuple[int | None, ...]:
    shape = values.shapes.get(name) or (None, None)
    return tuple(n if isinstance(n, int) else None for n in shape[:-1])


def _shape(values: Values, name: str, hidden: int) -> tuple[int, ...]:
    """The shape of a result as Reshape takes it."""
    shape = values.shapes.get(name)
    if not shape or shape[-1] not in (hidden, None) or sum(not isinstance(n, int) for n in shape[:-1]) > 1:
        raise NotACellError(f"puts out {name} in a shape that is not known")
    return (*(n if isinstance(n, int) else -1 for n in shape[:-1]), hidden)
