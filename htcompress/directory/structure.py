"""The config.json of an output directory, held against what the rest of the package takes for granted.

It is looked at before anything is built of it: sizes that no file holds, trees that are none and cores that are not
there are told in words, and cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from htcompress.errors import CheckpointError
from htcompress.forms.form import MisfitError
from htcompress.forms.registry import form_named, stored_names
from htcompress.matrix.layout import Layout
from htcompress.nn.settings import RecurrentSettings
from htcompress.storage.registry import CODECS_BY_NAME
from htcompress.tensor import DimensionTree
from htcompress.vocabulary import Kind

MOST_UNITS = 1 << 24
"""The units, inputs, rows or columns that a matrix may have."""

MOST_NUMBERS = 1 << 36
"""The numbers of a matrix, written out."""

MOST_ORDERED = 1 << 16
"""The units whose order is stored: what it takes to decode it grows with their square."""

_MOST_LEAVES = 64
_MOST_LAYERS = 10_000
_MOST_PADDING = 16  # times the rows or the columns
_DEEPEST = 100
_MATRICES = ("joint", "ih", "hh", "hr")
_BIASES = ("bias", "bias_hn")
_DENSE_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")

Shapes = dict[str, tuple[int, ...]]


class _WrongError(Exception):
    """What does not hold, as the end of a sentence about a layer."""


def check_config(config: Any, source: str, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Raise `CheckpointError` where a `config.json` is not one that the tensors beside it belong to.

    Keys that are not known are passed over, except among a layer's settings.

    Args:
        config: the parsed file.
        source: its name, for messages.
        tensors: those of `model.safetensors` by name; None to look at the structure alone.
    """
    where = ""
    try:
        if not isinstance(config, dict):
            raise _WrongError(f"is {_shown(config)}; expected an object")
        known = _known(config, tensors)
        gates = _gates(known or {})
        layers = _object(config.get("layers"), "layers")
        if len(layers) > _MOST_LAYERS:
            raise _WrongError(f"has {len(layers)} layers; expected at most {_MOST_LAYERS}")
        for name, layer in layers.items():
            where = f" layer {name[:80]!r}"
            shapes = _layer(_object(layer, "it"))
            if known is not None:
                _held(f"{name}." if name else "", shapes, known, gates)
    except (_WrongError, RecursionError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{source}{':' + where if where else ''} {why}. Convert the model again.") from error


def _known(config: dict[str, Any], tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The tensors by all of their names, once aliases and extra state are what they should be."""
    aliases = _object(config.get("aliases", {}), "aliases")
    for name, target in aliases.items():
        if not isinstance(target, str):
            raise _WrongError(f"has {_shown(target)} for the alias {name[:80]!r}; expected the name of a tensor")
        if tensors is not None and (target not in tensors or name in tensors):
            raise _WrongError(f"has the alias {name[:80]!r} of {target[:80]!r}, which is not beside it in the file")
    _shallow(_object(config.get("extra", {}), "extra"))
    if tensors is None:
        return None
    return {**tensors, **{name: tensors[target] for name, target in aliases.items()}}


def _layer(layer: dict[str, Any]) -> Shapes:
    """The tensors that a layer stores, by their names in it."""
    settings = _settings(_object(layer.get("settings"), "settings"))
    for key in ("also", "assumed"):
        names = layer.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _WrongError(f"has {_shown(names)} for {key}; expected a list of names")
    for slot, order in _object(layer.get("units", {}), "units").items():
        _permutation(order, settings.hidden_size, slot)
    weights = _object(layer.get("weights"), "weights")
    names = settings.slot_names
    if list(weights) != names:
        raise _WrongError(
            f"has weights for {', '.join(weights)[:80] or 'nothing'}; its settings have {', '.join(names[:8])}, in "
            f"that order"
        )
    shapes: Shapes = {}
    for (number, _, _), name in zip(settings.slots(), names, strict=True):
        found = _slot(_object(weights[name], name), settings, number, name)
        shapes |= {f"gates.{name}.{key}": shape for key, shape in found.items()}
    return shapes


def _settings(config: dict[str, Any]) -> RecurrentSettings:
    fields = RecurrentSettings.__dataclass_fields__
    unknown = [key for key in config if key not in fields]
    lacking = [key for key in ("kind", "input_size", "hidden_size") if key not in config]
    if unknown or lacking:
        raise _WrongError(f"has no setting {lacking[0]}" if lacking else f"has an unknown setting {unknown[0][:80]!r}")
    if config["kind"] not in [kind.value for kind in Kind]:
        raise _WrongError(f"is of kind {_shown(config['kind'])}; expected one of {', '.join(Kind)}")
    least = {"input_size": 0, "hidden_size": 1, "num_layers": 1, "proj_size": 0}
    for key, value in config.items():
        if key in least:
            _whole(value, key, least[key], _MOST_LAYERS if key == "num_layers" else MOST_UNITS)
        elif key == "dropout" and (type(value) not in (int, float) or not 0 <= value <= 1):
            raise _WrongError(f"has dropout {_shown(value)}; expected a number between 0 and 1")
        elif key not in ("kind", "dropout") and not isinstance(value, bool):
            raise _WrongError(f"has {key} {_shown(value)}; expected true or false")
    settings = RecurrentSettings.from_config(config)
    if settings.cell and (settings.num_layers > 1 or settings.bidirectional or settings.proj_size):
        raise _WrongError("is a cell with several layers, directions or a projection; a cell has none of them")
    if settings.proj_size and (not settings.recurrence.projects or settings.proj_size >= settings.hidden_size):
        raise _WrongError(
            f"has a projection to {settings.proj_size} of {settings.hidden_size} units; only an LSTM has one, to fewer"
        )
    return settings


def _slot(slot: dict[str, Any], settings: RecurrentSettings, layer: int, name: str) -> Shapes:
    rows, inputs, state = settings.rows, settings.layer_input(layer), settings.state_size
    present = [key for key in _MATRICES if key in slot]
    whole = ["joint"] if "joint" in slot else ["ih", "hh"]
    needed = [*whole, *(["hr"] if settings.proj_size else [])]
    if present != needed:
        raise _WrongError(f"has the matrices {', '.join(present) or 'none'} in {name}; expected {', '.join(needed)}")
    gru = settings.recurrence.keeps_candidate_bias
    columns = range(inputs + state, inputs + state + 1 + (settings.bias * (2 if gru else 1)))
    sizes = {
        "joint": (rows, columns),
        "ih": (rows, range(inputs, inputs + 1)),
        "hh": (rows, range(state, state + 1)),
        "hr": (settings.proj_size, range(settings.hidden_size, settings.hidden_size + 1)),
    }
    shapes: Shapes = {}
    beside = 0
    for key in needed:
        stored, width = _matrix(_object(slot[key], f"{name}.{key}"), *sizes[key], f"{name}.{key}")
        beside += width - inputs - state if key == "joint" else 0
        shapes |= {f"{key}.{core}": shape for core, shape in stored.items()}
    biases = slot.get("biases")
    if not isinstance(biases, list) or biases != [bias for bias in _BIASES if bias in biases]:
        raise _WrongError(f"has the biases {_shown(biases)} in {name}; expected a list of bias and bias_hn")
    at_most = {"bias": settings.bias and beside == 0, "bias_hn": settings.bias and gru and beside < 2}
    if surplus := [bias for bias in biases if not at_most[bias]]:
        raise _WrongError(f"has a {surplus[0]} in {name} that its settings or its joint matrix leave no place for")
    shapes |= {bias: (rows if bias == "bias" else settings.hidden_size,) for bias in biases}
    shapes = _coded(shapes, _object(slot.get("codecs", {}), f"the codecs of {name}"), name)
    if "order" in slot:
        # log2(n!) < n log2(n); how many words exactly is known to who decodes them.
        if settings.hidden_size > MOST_ORDERED:
            raise _WrongError(
                f"has an order of {settings.hidden_size} units in {name}; expected {MOST_ORDERED} at most"
            )
        bound = settings.hidden_size * settings.hidden_size.bit_length() // 32 + 1
        shapes["order"] = (_whole(slot["order"], f"order in {name}", 0, bound),)
    return shapes


def _coded(shapes: Shapes, codecs: dict[str, Any], name: str) -> Shapes:
    """The tensors that are stored where some cores are not stored as they are."""
    found = dict(shapes)
    for tensor, coded in codecs.items():
        codec = CODECS_BY_NAME.get(str(_object(coded, f"a codec of {name}").get("name")))
        if tensor not in shapes or codec is None:
            raise _WrongError(
                f"has the codec {_shown(coded)} for {tensor[:80]!r} in {name}; expected one that is known"
            )
        shape = found.pop(tensor)
        found |= {f"{tensor}.{part}" if part else tensor: own for part, own in codec.parts(shape).items()}
    return found


def _matrix(config: dict[str, Any], rows: int, columns: range, name: str) -> tuple[Shapes, int]:
    """The cores of a matrix, by name, and its columns."""
    form = config.get("form")
    if form == "dense":
        shape = config.get("shape")
        if not (isinstance(shape, list) and len(shape) == 2 and _is(shape[0], rows) and _is(shape[1], *columns)):
            raise _WrongError(f"has a dense {name} of shape {_shown(shape)}; expected {rows} x {_either(columns)}")
        _bounded(rows, shape[1], name)
        return {"weight": (rows, shape[1])}, shape[1]
    if form not in (names := stored_names()):
        raise _WrongError(f"has {name} in the form {_shown(form)}; expected one of {', '.join(names)}")
    layout = _object(config.get("layout"), f"the layout of {name}")
    cols: Any = layout.get("cols")
    if not (_is(layout.get("rows"), rows) and _is(cols, *columns)):
        raise _WrongError(
            f"has {name} as {_shown(layout.get('rows'))} x {_shown(cols)}; expected {rows} x {_either(columns)}"
        )
    _bounded(rows, cols, name)
    modes = [
        _modes(layout.get(key), size, f"{key} of {name}") for key, size in (("row_modes", rows), ("col_modes", cols))
    ]
    tree = _tree(layout.get("tree"), name)
    if not len(modes[0]) == len(modes[1]) == tree.order:
        raise _WrongError(
            f"has {len(modes[0])} row modes and {len(modes[1])} column modes in {name} for {tree.order} leaves"
        )
    ranks = config.get("ranks")
    if not isinstance(ranks, list):
        raise _WrongError(f"has {_shown(ranks)} for the ranks of {name}; expected a list")
    for rank in ranks:
        _whole(rank, f"a rank of {name}", 1, MOST_NUMBERS)
    shapes = form_named(str(form)).shapes
    if shapes is None:
        raise _WrongError(f"has {name} in the form {_shown(form)}, which has no layout")
    try:
        found = shapes(Layout(rows, cols, tuple(modes[0]), tuple(modes[1]), tree), ranks)
    except MisfitError as error:
        raise _WrongError(f"has {error} in {name}") from error
    _cored(tuple(found.values()), name)
    return found, cols


def _gates(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of tensors that are a compressed layer's, by what stands before `gates.` in them."""
    found: dict[str, list[str]] = {}
    for name in tensors:
        at = name.find("gates.")
        while at >= 0:
            if at == 0 or name[at - 1] == ".":
                found.setdefault(name[:at], []).append(name)
            at = name.find("gates.", at + 1)
    return found


def _held(prefix: str, shapes: Shapes, tensors: Mapping[str, Tensor], gates: Mapping[str, list[str]]) -> None:
    """Raise `_WrongError` where a core is missing, of another shape or type, not finite, or not known."""
    for name, shape in shapes.items():
        tensor = tensors.get(prefix + name)
        full = (prefix + name)[-200:]
        if tensor is None:
            raise _WrongError(f"needs {full} of shape {shape}, which model.safetensors lacks")
        if tuple(tensor.shape) != shape:
            raise _WrongError(f"needs {full} of shape {shape}; model.safetensors has {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _WrongError(f"has values in {full} that are NaN or infinite")
        if name.endswith(".order") and tensor.dtype != torch.int32:
            raise _WrongError(f"needs {full} as 32-bit words; model.safetensors has {tensor.dtype}")
    dense = [f"{prefix}{key}{end}" for key in _DENSE_NAMES for end in ("_l0", "")]
    surplus = [name for name in gates.get(prefix, []) if name.removeprefix(prefix) not in shapes]
    if surplus := [*surplus, *(name for name in dense if name in tensors)]:
        raise _WrongError(f"has no place for {surplus[0][:200]}, which model.safetensors holds")


def _tree(value: Any, name: str) -> DimensionTree:
    """The dimension tree; anything that is no binary tree over 0 .. d-1 is refused without following it far."""
    leaves: list[int] = []
    stack = [(value, 0)]
    while stack:
        part, depth = stack.pop()
        if type(part) is int:
            leaves.append(part)
        elif isinstance(part, list) and len(part) == 2:
            stack += [(inner, depth + 1) for inner in part]
        else:
            raise _WrongError(f"has {_shown(part)} in the tree of {name}; expected pairs and numbers of leaves")
        if depth > _MOST_LEAVES or len(leaves) + len(stack) > _MOST_LEAVES:
            raise _WrongError(f"has a tree of more than {_MOST_LEAVES} leaves in {name}")
    if sorted(leaves) != list(range(len(leaves))):
        raise _WrongError(f"has a tree over the leaves {_shown(leaves)} in {name}; expected 0 to d-1, each once")

    def nested(part: Any) -> Any:
        return part if type(part) is int else (nested(part[0]), nested(part[1]))

    return DimensionTree(nested(value))


def _modes(value: Any, size: int, name: str) -> list[int]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_LEAVES:
        raise _WrongError(f"has {_shown(value)} for the {name}; expected a list of at most {_MOST_LEAVES} numbers")
    for mode in value:
        _whole(mode, f"a mode in the {name}", 1, MOST_UNITS * _MOST_PADDING)
    if not size <= prod(value) <= _MOST_PADDING * max(size, 1):
        raise _WrongError(f"has the {name} {_shown(value)}, which hold {prod(value)}; the matrix has {size}")
    return value


def _permutation(order: Any, units: int, slot: str) -> None:
    if not isinstance(order, list) or len(order) != units or any(type(unit) is not int for unit in order):
        raise _WrongError(f"has no order of its {units} units for {slot[:80]!r}")
    if sorted(order) != list(range(units)):
        raise _WrongError(f"has an order of units for {slot[:80]!r} in which some are missing or repeated")


def _cored(shapes: tuple[tuple[int, ...], ...], name: str) -> None:
    if sum(map(prod, shapes)) > MOST_NUMBERS:
        raise _WrongError(f"has cores of {sum(map(prod, shapes))} numbers in {name}; expected at most {MOST_NUMBERS}")


def _bounded(rows: int, cols: int, name: str) -> None:
    if rows * cols > MOST_NUMBERS:
        raise _WrongError(f"has {name} of {rows} x {cols}; expected at most {MOST_NUMBERS} numbers")


def _whole(value: Any, name: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _WrongError(f"has {name} {_shown(value)}; expected a whole number from {least} to {most}")
    return value


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _WrongError(f"has {_shown(value)} for {name}; expected an object")
    return value


def _shallow(value: Any) -> None:
    stack = [(value, 0)]
    while stack:
        part, depth = stack.pop()
        if depth > _DEEPEST:
            raise _WrongError(f"has extra state nested deeper than {_DEEPEST}")
        if isinstance(part, dict | list):
            stack += [(inner, depth + 1) for inner in (part.values() if isinstance(part, dict) else part)]


def _is(value: Any, *expected: int) -> bool:
    """Whether a JSON value is one of these whole numbers, and neither 1.0 nor true for 1."""
    return type(value) is int and value in expected


def _either(columns: range) -> str:
    return " or ".join(map(str, columns))


def _shown(value: Any) -> str:
    """A JSON value in a message; a large one by its kind."""
    if isinstance(value, dict | list) and (len(value) > 8 or any(isinstance(v, dict | list) for v in value)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:80] + "..."
