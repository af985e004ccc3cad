"""The recurrent layers in a state_dict, recognised by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from htcompress.errors import CheckpointError
from htcompress.nn.dense import DenseLayer, DenseSlot
from htcompress.nn.replace import recurrent_modules
from htcompress.nn.settings import Kind, RecurrentSettings

_NAME = re.compile(r"^(?:(?P<layer>.+)\.)?weight_[ih]h(?:_l(?P<number>\d+)(?P<reverse>_reverse)?)?$")
_CHUNK = 1 << 20
_KINDS = {4: Kind.LSTM, 3: Kind.GRU, 1: Kind.RNN_TANH}


def inventory(tensors: Mapping[str, Tensor], *, source: str = "The checkpoint") -> list[DenseLayer]:
    """The recurrent layers of a state_dict; a layer held twice, by the same memory, is one layer.

    What a state_dict does not tell is left at torch's default: `batch_first`, `dropout`, the
    nonlinearity of an RNN.

    Raises:
        CheckpointError: there is none, a layer lacks a tensor, shapes contradict each other, or weights
            are not finite.
    """
    groups: dict[str, list[re.Match[str]]] = {}
    for name in tensors:
        if match := _NAME.match(name):
            groups.setdefault(match["layer"] or "", []).append(match)
    if not groups:
        names = list(tensors)
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise CheckpointError(
            f"{source} has no recurrent layers: none of its {len(names)} tensors ({shown}) is named like "
            f"weight_hh_l0 of torch.nn.LSTM, GRU or RNN. htcompress compresses those layers."
        )
    found: list[DenseLayer] = []
    for name, matches in groups.items():
        if not any(name in names_of(layer, tensors) for layer in found):
            found.append(_layer(name, _settings(name, matches, tensors, source), tensors, source))
    return found


def inventory_of_model(model: nn.Module, *, source: str = "The model") -> list[DenseLayer]:
    """The recurrent layers of a module, with all of their settings; a layer held twice is one layer."""
    found = []
    for name, module in recurrent_modules(model).items():
        tensors = {f"{name}.{key}" if name else key: value for key, value in module.named_parameters()}
        found.append(_layer(name, RecurrentSettings.of(module), tensors, source))
    if not found:
        raise CheckpointError(
            f"{source} has no recurrent layers: it holds no torch.nn.LSTM, GRU or RNN and none of their cells. "
            f"htcompress compresses those layers."
        )
    return found


def names_of(layer: DenseLayer, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names under which a state_dict holds a layer: its own first, then those of modules tied to it."""
    keys = list(_shapes(layer.settings))
    last = keys[-1]
    ends = [name.removesuffix(last) for name in tensors if name == last or name.endswith("." + last)]
    names = [end.removesuffix(".") for end in ends]
    return [layer.name] + [
        name
        for name in names
        if name != layer.name
        and all(same_memory(tensors.get(_join(name, key)), tensors.get(_join(layer.name, key))) for key in keys)
    ]


def tensor_names(layer: DenseLayer, name: str | None = None) -> list[str]:
    """The tensors of a layer in a state_dict, under its own name or another."""
    return [_join(layer.name if name is None else name, key) for key in _shapes(layer.settings)]


def same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are one: the same numbers at the same place."""
    if a is None or b is None:
        return False
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _settings(name: str, matches: list[re.Match[str]], tensors: Mapping[str, Tensor], source: str) -> RecurrentSettings:
    cell = all(match["number"] is None for match in matches)
    reverse = any(match["reverse"] for match in matches)
    layers = 1 if cell else max(int(match["number"]) for match in matches if match["number"] is not None) + 1
    shown = name or "(top level)"
    first = "" if cell else "_l0"
    # Any of them says that there are biases: one that is missing is then missed.
    suffixes = [match.string.rpartition("weight_")[2][2:] for match in matches]
    biased = any(_join(name, f"bias_{part}{suffix}") in tensors for part in ("ih", "hh") for suffix in suffixes)
    hh, ih = (_tensor(tensors, name, f"weight_{part}{first}", source) for part in ("hh", "ih"))
    projection = tensors.get(_join(name, f"weight_hr{first}"))
    flat = [t for t in (hh, ih, projection) if t is not None and t.ndim != 2]
    if flat or len(hh) != len(ih):
        raise CheckpointError(
            f"{source}: layer {shown} has weights of shapes {tuple(ih.shape)} and {tuple(hh.shape)}; expected two "
            f"matrices of equally many rows. Is it a torch.nn recurrent layer?"
        )
    hidden = hh.shape[1] if projection is None else projection.shape[1]
    kind = _KINDS.get(len(hh) // hidden) if hidden and len(hh) % hidden == 0 else None
    if kind is None:
        raise CheckpointError(
            f"{source}: layer {shown} has weight_hh{first} of shape {tuple(hh.shape)}; its rows are 4, 3 or 1 times "
            f"the hidden size in an LSTM, GRU or RNN. It cannot be recognised; exclude it with --layers."
        )
    return RecurrentSettings(
        kind,
        ih.shape[1],
        hidden,
        num_layers=layers,
        bias=biased,
        bidirectional=reverse,
        proj_size=0 if projection is None else projection.shape[0],
        cell=cell,
    )


def _layer(name: str, settings: RecurrentSettings, tensors: Mapping[str, Tensor], source: str) -> DenseLayer:
    for key, shape in _shapes(settings).items():
        tensor = _tensor(tensors, name, key, source)
        full = _join(name, key)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{source}: {full} has shape {tuple(tensor.shape)}; expected {shape}, to go with the layer's other "
                f"weights. Was it changed after training?"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{source}: {full} holds {tensor.dtype}; expected floating-point weights. Convert the model before it "
                f"is quantised."
            )
        bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.reshape(-1).split(_CHUNK))
        if bad:
            raise CheckpointError(
                f"{source}: {full} has {bad} of {tensor.numel()} values that are NaN or infinite. Training has "
                f"diverged; take an earlier checkpoint."
            )
    prefix = f"{name}." if name else ""
    slots = {}
    for (layer, _, suffix), slot in zip(settings.slots(), settings.slot_names, strict=True):
        slots[slot] = DenseSlot.read(
            settings,
            layer,
            suffix,
            lambda key, prefix=prefix: tensors[prefix + key],  # type: ignore[misc]
        )
    return DenseLayer(name, settings, slots)


def _shapes(settings: RecurrentSettings) -> dict[str, tuple[int, ...]]:
    """The tensors that torch stores for a layer, by their names in it."""
    found: dict[str, tuple[int, ...]] = {}
    rows = settings.rows
    for layer, _, suffix in settings.slots():
        found["weight_ih" + suffix] = (rows, settings.layer_input(layer))
        found["weight_hh" + suffix] = (rows, settings.state_size)
        if settings.bias:
            found |= {"bias_ih" + suffix: (rows,), "bias_hh" + suffix: (rows,)}
        if settings.proj_size:
            found["weight_hr" + suffix] = (settings.proj_size, settings.hidden_size)
    return found


def _tensor(tensors: Mapping[str, Tensor], name: str, key: str, source: str) -> Tensor:
    full = _join(name, key)
    if full not in tensors:
        raise CheckpointError(
            f"{source} lacks {full}, which layer {name or '(top level)'} needs beside its other weights. Was the "
            f"state_dict saved whole?"
        )
    return tensors[full]


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
