"""The config.json of an output directory, held against what the rest of the package takes for granted.

It is looked at before anything is built of it: sizes that no file holds, trees that are none and cores that are not
there are told in words, and cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any, TypeVar

import torch
from msgspec import structs
from torch import Tensor

from htcompress.directory.config import (
    MOST_LEAVES,
    MOST_PADDING,
    MOST_UNITS,
    DirectionConfig,
    LayerConfig,
    MatrixConfig,
)
from htcompress.errors import CheckpointError
from htcompress.forms.form import MisfitError
from htcompress.forms.registry import form_named, stored_names
from htcompress.matrix.layout import Layout
from htcompress.nn.activations import ACTIVATIONS
from htcompress.nn.recurrence import recurrence_of
from htcompress.nn.settings import RecurrentSettings
from htcompress.report.schema import converted, shown
from htcompress.storage import codec_of
from htcompress.tensor import DimensionTree

Made = TypeVar("Made")

MOST_NUMBERS = 1 << 36
"""The numbers of a matrix, written out."""

MOST_ORDERED = 1 << 16
"""The units whose order is stored: what it takes to decode it grows with their square."""

_MOST_LAYERS = 10_000
_DEEPEST = 100
_MATRICES = ("joint", "ih", "hh", "hr")
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
        layers = _typed(config.get("layers"), dict[str, Any], "layers")
        if len(layers) > _MOST_LAYERS:
            raise _WrongError(f"has {len(layers)} layers; expected at most {_MOST_LAYERS}")
        for name, layer in layers.items():
            where = f" layer {name[:80]!r}"
            shapes = _layer(layer)
            if known is not None:
                _held(f"{name}." if name else "", shapes, known, gates)
    except (_WrongError, RecursionError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{source}{':' + where if where else ''} {why}. Convert the model again.") from error


def stored_shapes(config: Mapping[str, Any]) -> Shapes:
    """The shapes of the cores and biases of all layers by their names in the state, before they were encoded."""
    found: Shapes = {}
    for first, layer in config["layers"].items():
        shapes = _layer(layer, coded=False)
        for name in [first, *layer.get("also", [])]:
            found |= {f"{name}.{key}" if name else key: shape for key, shape in shapes.items()}
    return found


def _known(config: dict[str, Any], tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The tensors by all of their names, once aliases and extra state are what they should be."""
    aliases = _typed(config.get("aliases", {}), dict[str, str], "aliases")
    for name, target in aliases.items():
        if tensors is not None and (target not in tensors or name in tensors):
            raise _WrongError(f"has the alias {name[:80]!r} of {target[:80]!r}, which is not beside it in the file")
    _shallow(_typed(config.get("extra", {}), dict[str, Any], "extra"))
    _typed(config.get("shared", []), tuple[tuple[str, ...], ...], "shared")
    if tensors is None:
        return None
    return {**tensors, **{name: tensors[target] for name, target in aliases.items()}}


def _layer(found: Any, *, coded: bool = True) -> Shapes:
    """The tensors that a layer stores, by their names in it; without `coded`, the numbers that they stand for."""
    weights = _typed(_typed(found, dict[str, Any], "").get("weights"), dict[str, Any], "weights")
    for name, direction in weights.items():
        _typed(direction, DirectionConfig, f"weights.{name[:80]}")
    known = _typed(found["settings"], dict[str, Any], "settings") if "settings" in found else {}
    if unknown := [key for key in known if key not in RecurrentSettings.__dataclass_fields__]:
        raise _WrongError(f"has an unknown setting {unknown[0][:80]!r}")
    layer = _typed(found, LayerConfig, "")
    settings = _settings(layer.settings)
    for name, order in layer.units.items():
        _permutation(order, settings.hidden_size, name)
    names = settings.direction_names
    if list(layer.weights) != names:
        raise _WrongError(
            f"has weights for {', '.join(weights)[:80] or 'nothing'}; its settings have {', '.join(names[:8])}, in "
            f"that order"
        )
    shapes: Shapes = {}
    for (number, _, _), name in zip(settings.directions(), names, strict=True):
        direction = layer.weights[name] if coded else structs.replace(layer.weights[name], codecs={})
        stored = _direction(direction, settings, number, name)
        shapes |= {f"gates.{name}.{key}": shape for key, shape in stored.items()}
    return shapes


def _settings(settings: RecurrentSettings) -> RecurrentSettings:
    """The same, once they are within bounds and fit together."""
    least = {"input_size": 0, "hidden_size": 1, "num_layers": 1, "proj_size": 0}
    for key, bound in least.items():
        _whole(getattr(settings, key), key, bound, _MOST_LAYERS if key == "num_layers" else MOST_UNITS)
    if not 0 <= settings.dropout <= 1:
        raise _WrongError(f"has dropout {shown(settings.dropout)}; expected a number between 0 and 1")
    if unknown := [word for word in settings.words if word not in ACTIVATIONS]:
        raise _WrongError(f"has the activation {unknown[0][:80]!r}; expected one of {', '.join(ACTIVATIONS)}")
    if len(settings.words) not in (0, 1 if recurrence_of(settings.kind).gates == 1 else 2):
        raise _WrongError(f"has {len(settings.words)} activations, which is not what a {settings.kind} has")
    if settings.resets_before and not recurrence_of(settings.kind).has_reset:
        raise _WrongError(f"resets its state before the matrix, and is a {settings.kind}, which has no reset gate")
    if not settings.recurrence.native and (settings.cell or settings.proj_size or settings.dropout):
        raise _WrongError("is a cell, or has a projection or dropout, and other activations than torch's")
    if settings.cell and (settings.num_layers > 1 or settings.bidirectional or settings.proj_size):
        raise _WrongError("is a cell with several layers, directions or a projection; a cell has none of them")
    if settings.proj_size and (not settings.recurrence.projects or settings.proj_size >= settings.hidden_size):
        raise _WrongError(
            f"has a projection to {settings.proj_size} of {settings.hidden_size} units; only an LSTM has one, to fewer"
        )
    return settings


def _direction(direction: DirectionConfig, settings: RecurrentSettings, layer: int, name: str) -> Shapes:
    rows, inputs, state = settings.rows, settings.layer_input(layer), settings.state_size
    matrices = {key: matrix for key in _MATRICES if (matrix := getattr(direction, key)) is not None}
    whole = ["joint"] if "joint" in matrices else ["ih", "hh"]
    needed = [*whole, *(["hr"] if settings.proj_size else [])]
    if list(matrices) != needed:
        raise _WrongError(f"has the matrices {', '.join(matrices) or 'none'} in {name}; expected {', '.join(needed)}")
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
    for key, matrix in matrices.items():
        stored, width = _matrix(matrix, *sizes[key], f"{name}.{key}")
        beside += width - inputs - state if key == "joint" else 0
        shapes |= {f"{key}.{core}": shape for core, shape in stored.items()}
    biases = direction.biases
    if list(biases) != sorted(set(biases)):
        raise _WrongError(f"has the biases {shown(biases)} in {name}; expected bias and bias_hn, each once")
    at_most = {"bias": settings.bias and beside == 0, "bias_hn": settings.bias and gru and beside < 2}
    if surplus := [bias for bias in biases if not at_most[bias]]:
        raise _WrongError(f"has a {surplus[0]} in {name} that its settings or its joint matrix leave no place for")
    shapes |= {bias: (rows if bias == "bias" else settings.hidden_size,) for bias in biases}
    shapes = _coded(shapes, direction, name)
    if direction.order is not None:
        # log2(n!) < n log2(n); how many words exactly is known to who decodes them.
        if settings.hidden_size > MOST_ORDERED:
            raise _WrongError(
                f"has an order of {settings.hidden_size} units in {name}; expected {MOST_ORDERED} at most"
            )
        bound = settings.hidden_size * settings.hidden_size.bit_length() // 32 + 1
        shapes["order"] = (_whole(direction.order, f"order in {name}", 0, bound),)
    if direction.input_exponents:
        shapes["input_exponents"] = (inputs,)
    return shapes


def _coded(shapes: Shapes, direction: DirectionConfig, name: str) -> Shapes:
    """The tensors that are stored where some cores are not stored as they are."""
    found = dict(shapes)
    for tensor, coded in direction.codecs.items():
        try:
            codec = codec_of(structs.asdict(coded))
            shape = found.pop(tensor)
        except KeyError:
            raise _WrongError(
                f"has the codec {shown(coded.name)} for {tensor[:80]!r} in {name}; expected one that is known"
            ) from None
        found |= {f"{tensor}_{part}" if part else tensor: own for part, own in codec.parts(shape).items()}
    return found


def _matrix(matrix: MatrixConfig, rows: int, columns: range, name: str) -> tuple[Shapes, int]:
    """The cores of a matrix, by name, and its columns."""
    wanted = f"expected {rows} x {' or '.join(map(str, columns))}"
    if matrix.form == "dense":
        if matrix.shape is None or matrix.shape[0] != rows or matrix.shape[1] not in columns:
            raise _WrongError(f"has a dense {name} of shape {shown(matrix.shape)}; {wanted}")
        cols = matrix.shape[1]
        _bounded(rows, cols, name)
        return {"weight": (rows, cols)}, cols
    if matrix.form not in (names := stored_names()):
        raise _WrongError(f"has {name} in the form {shown(matrix.form)}; expected one of {', '.join(names)}")
    layout, ranks = matrix.layout, matrix.ranks
    shapes = form_named(matrix.form).shapes
    if layout is None or ranks is None or shapes is None:
        raise _WrongError(f"has no layout and ranks of {name} in the form {shown(matrix.form)}")
    cols = layout.cols
    if layout.rows != rows or cols not in columns:
        raise _WrongError(f"has {name} as {layout.rows} x {cols}; {wanted}")
    _bounded(rows, cols, name)
    _modes(layout.row_modes, rows, f"row_modes of {name}")
    _modes(layout.col_modes, cols, f"col_modes of {name}")
    tree = _tree(layout.tree, name)
    if not len(layout.row_modes) == len(layout.col_modes) == tree.order:
        raise _WrongError(
            f"has {len(layout.row_modes)} row modes and {len(layout.col_modes)} column modes in {name} for "
            f"{tree.order} leaves"
        )
    try:
        found = shapes(Layout(rows, cols, layout.row_modes, layout.col_modes, tree), list(ranks))
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
        if name.endswith(".input_exponents") and tensor.dtype != torch.int8:
            raise _WrongError(f"needs {full} as bytes with a sign; model.safetensors has {tensor.dtype}")
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
        if depth > MOST_LEAVES or len(leaves) + len(stack) > MOST_LEAVES:
            raise _WrongError(f"has a tree of more than {MOST_LEAVES} leaves in {name}")
    if sorted(leaves) != list(range(len(leaves))):
        raise _WrongError(f"has a tree over the leaves {_shown(leaves)} in {name}; expected 0 to d-1, each once")

    def nested(part: Any) -> Any:
        return part if type(part) is int else (nested(part[0]), nested(part[1]))

    return DimensionTree(nested(value))


def _modes(modes: tuple[int, ...], size: int, name: str) -> None:
    if not size <= prod(modes) <= MOST_PADDING * max(size, 1):
        raise _WrongError(f"has the {name} {shown(modes)}, which hold {prod(modes)}; the matrix has {size}")


def _permutation(order: tuple[int, ...], units: int, direction: str) -> None:
    if len(order) != units:
        raise _WrongError(f"has an order of {len(order)} of its {units} units for {direction[:80]!r}")
    if sorted(order) != list(range(units)):
        raise _WrongError(f"has an order of units for {direction[:80]!r} in which some are missing or repeated")


def _cored(shapes: tuple[tuple[int, ...], ...], name: str) -> None:
    if sum(map(prod, shapes)) > MOST_NUMBERS:
        raise _WrongError(f"has cores of {sum(map(prod, shapes))} numbers in {name}; expected at most {MOST_NUMBERS}")


def _bounded(rows: int, cols: int, name: str) -> None:
    if rows * cols > MOST_NUMBERS:
        raise _WrongError(f"has {name} of {rows} x {cols}; expected at most {MOST_NUMBERS} numbers")


def _whole(value: int, name: str, least: int, most: int) -> int:
    if not least <= value <= most:
        raise _WrongError(f"has {name} {_shown(value)}; expected a whole number from {least} to {most}")
    return value


def _typed(value: Any, cls: type[Made], name: str) -> Made:
    """A JSON value as one of the types of `config.py`."""
    try:
        return converted(cls, value)
    except ValueError as error:
        place, _, what = str(error).rpartition(": ")
        where = f"{name}.{place}".strip(".").replace(".[", "[")
        raise _WrongError(f"does not fit: {where}{': ' if where else ''}{what}") from error


def _shallow(value: Any) -> None:
    stack = [(value, 0)]
    while stack:
        part, depth = stack.pop()
        if depth > _DEEPEST:
            raise _WrongError(f"has extra state nested deeper than {_DEEPEST}")
        if isinstance(part, dict | list):
            stack += [(inner, depth + 1) for inner in (part.values() if isinstance(part, dict) else part)]


def _shown(value: Any) -> str:
    """A JSON value in a message; a large one by its kind."""
    if isinstance(value, dict | list) and (len(value) > 8 or any(isinstance(v, dict | list) for v in value)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:80] + "..."
