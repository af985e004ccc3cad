"""The recurrent layers in a state_dict, recognised by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from htcompress.errors import CheckpointError
from htcompress.model.reparametrised import reparametrised
from htcompress.model.replace import recurrent_modules
from htcompress.nn.dense import DenseDirection, DenseLayer
from htcompress.nn.recurrence import with_gates
from htcompress.nn.settings import RecurrentSettings

_NAME = re.compile(r"^(?:(?P<layer>.+)\.)?weight_[ih]h(?:_l(?P<number>[0-9]{1,6})(?P<reverse>_reverse)?)?$")
_CHUNK = 1 << 20
"""Numbers that are looked at at a time for one that is not finite."""


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _LeftError(Exception):
    """A layer that cannot be compressed, and why; `of_source`: it is the end of a sentence about the checkpoint."""

    def __init__(self, why: str, *, of_source: bool = False) -> None:
        super().__init__(why)
        self.of_source = of_source

    def told(self, source: str) -> CheckpointError:
        """The error where nothing else can be compressed."""
        return CheckpointError(f"{source}{' ' if self.of_source else ': '}{self}")


def inventory(
    tensors: Mapping[str, Tensor],
    *,
    source: str = "The checkpoint",
    on_left: Callable[[str, str], None] | None = None,
) -> list[DenseLayer]:
    """The recurrent layers of a state_dict; a layer held twice, by the same memory, is one layer.

    What a state_dict does not tell is left at torch's default: `batch_first`, `dropout`, the
    nonlinearity of an RNN.

    Args:
        tensors: the state_dict.
        source: what messages call it.
        on_left: told the name of each layer that is left out, and why: one that lacks a tensor, contradicts itself
            in shape, is quantised, or is computed of other tensors (pruned, normed, dropped weights).

    Raises:
        CheckpointError: there is no layer, or none but such as would be left out; or weights are not finite.
    """
    odd = reparametrised(tensors)
    groups: dict[str, list[re.Match[str]]] = {}
    for name in tensors:
        if match := _NAME.match(name):
            groups.setdefault(match["layer"] or "", []).append(match)
    if not groups and not odd:
        names = list(tensors)
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise CheckpointError(
            f"{source} has no recurrent layers: none of its {len(names)} tensors ({shown}) is named like "
            f"weight_hh_l0 of torch.nn.LSTM, GRU or RNN. htcompress compresses those layers."
        )
    found: dict[tuple[object, ...], DenseLayer] = {}
    left: dict[str, _LeftError] = {}
    for name in dict.fromkeys((*groups, *odd)):
        try:
            if name in odd:
                raise _LeftError(odd[name])
            settings = _settings(name, groups[name], tensors)
            _check_cell(name, settings, tensors)
            identity = tuple(place_of(tensors.get(_join(name, key))) for key in _shapes(settings))
            if identity not in found:
                found[identity] = _layer(name, settings, tensors, source)
        except _LeftError as error:
            left[name] = error
    if not found:
        raise next(iter(left.values())).told(source)
    for name, why in left.items():
        if on_left is not None:
            on_left(name, str(why))
    return list(found.values())


def inventory_of_model(
    model: nn.Module, *, names: Collection[str] | None = None, source: str = "The model"
) -> list[DenseLayer]:
    """The recurrent layers of a module, with all of their settings; a layer held twice is one layer.

    Args:
        names: which recurrent modules to look at (all if None).
    """
    found = []
    for name, module in recurrent_modules(model).items():
        if names is None or name in names:
            own = module.named_parameters(recurse=False, remove_duplicate=False)
            tensors = {_join(name, key): value for key, value in own}
            odd = reparametrised(_join(name, key) for key in module.state_dict())
            try:
                if name in odd:
                    raise _LeftError(odd[name])
                found.append(_layer(name, RecurrentSettings.of(module), tensors, source))
            except _LeftError as error:
                raise error.told(source) from error
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
    place = place_of(a)
    return place is not None and place == place_of(b)


def place_of(tensor: Tensor | None) -> tuple[object, ...] | None:
    """Where a tensor's numbers lie and how; None where it has none, or they lie nowhere in particular."""
    if tensor is None or tensor.layout is not torch.strided or tensor.is_meta:
        return None
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _settings(name: str, matches: list[re.Match[str]], tensors: Mapping[str, Tensor]) -> RecurrentSettings:
    numbers = {int(match["number"]) for match in matches if match["number"] is not None}
    cell, reverse = not numbers, any(match["reverse"] for match in matches)
    layers = max(numbers, default=0) + 1
    gap = next(number for number in count() if number not in numbers)
    if not cell and gap < layers:
        raise _lacking(name, f"weight_ih_l{gap}")
    shown = name or "(top level)"
    first = "" if cell else "_l0"
    # Any of them says that there are biases: one that is missing is then missed.
    suffixes = [match.string.rpartition("weight_")[2][2:] for match in matches]
    biased = any(_join(name, f"bias_{part}{suffix}") in tensors for part in ("ih", "hh") for suffix in suffixes)
    hh, ih = (_tensor(tensors, name, f"weight_{part}{first}") for part in ("hh", "ih"))
    projection = tensors.get(_join(name, f"weight_hr{first}"))
    flat = [t for t in (hh, ih, projection) if t is not None and t.ndim != 2]
    if flat or len(hh) != len(ih):
        raise _LeftError(
            f"layer {shown} has weights of shapes {tuple(ih.shape)} and {tuple(hh.shape)}; expected two "
            f"matrices of equally many rows. Is it a torch.nn recurrent layer?"
        )
    hidden = hh.shape[1] if projection is None else projection.shape[1]
    recurrence = with_gates(len(hh) // hidden) if hidden and len(hh) % hidden == 0 else None
    if recurrence is None:
        raise _LeftError(
            f"layer {shown} has weight_hh{first} of shape {tuple(hh.shape)}; its rows are 4, 3 or 1 times "
            f"the hidden size in an LSTM, GRU or RNN. It cannot be recognised; exclude it with --layers."
        )
    return RecurrentSettings(
        recurrence.kind,
        ih.shape[1],
        hidden,
        num_layers=layers,
        bias=biased,
        bidirectional=reverse,
        proj_size=0 if projection is None else projection.shape[0],
        cell=cell,
    )


def _check_cell(name: str, settings: RecurrentSettings, tensors: Mapping[str, Tensor]) -> None:
    """Raise `_LeftError` where what is named like a cell of torch's holds what these do not."""
    own = {_join(name, key) for key in _shapes(settings)}
    others = [other for other in tensors if name and other.startswith(f"{name}.") and other not in own]
    if settings.cell and others:
        raise _LeftError(
            f"{name} also holds {', '.join(others[:2])}, which torch's cells do not: it may be a class of your own, "
            f"and only a task shows what that computes. Give one with --task."
        )


def _layer(name: str, settings: RecurrentSettings, tensors: Mapping[str, Tensor], source: str) -> DenseLayer:
    for key, shape in _shapes(settings).items():
        tensor = _tensor(tensors, name, key)
        full = _join(name, key)
        if tuple(tensor.shape) != shape:
            raise _LeftError(
                f"{full} has shape {tuple(tensor.shape)}; expected {shape}, to go with the layer's other weights. Was "
                f"it changed after training?"
            )
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise _LeftError(
                f"{full} is {'without numbers (of the meta device)' if tensor.is_meta else 'sparse'}; expected dense "
                f"weights. Save the model with them."
            )
        if tensor.dtype not in _FLOATS:
            raise _LeftError(
                f"{full} holds {tensor.dtype}; expected floating-point weights. Convert the model before it is "
                f"quantised."
            )
        bad = _not_finite(tensor)
        if bad:
            raise _diverged(source, full, bad, tensor)
    prefix = f"{name}." if name else ""
    directions = {}
    for (layer, _, suffix), direction in zip(settings.directions(), settings.direction_names, strict=True):
        directions[direction] = DenseDirection.read(
            settings,
            layer,
            suffix,
            lambda key, prefix=prefix: tensors[prefix + key],  # type: ignore[misc]
        )
    dtype = _tensor(tensors, name, f"weight_ih{next(settings.directions())[2]}").dtype
    return DenseLayer(name, settings, {name: direction.on_cpu() for name, direction in directions.items()}, dtype)


def check_parameters(model: nn.Module, source: str) -> None:
    """Raise `CheckpointError` where a parameter of a model is not finite, or a buffer no number.

    It is asked where what the model gives is not finite.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or not tensor.is_floating_point():
            continue
        values = torch.atleast_1d(tensor.detach())
        # Buffers may hold infinities as masks.
        bad = _not_finite(values) if isinstance(tensor, nn.Parameter) else int(torch.isnan(values).sum())
        if bad:
            raise _diverged(source, name, bad, tensor)


def _diverged(source: str, name: str, bad: int, tensor: Tensor) -> CheckpointError:
    return CheckpointError(
        f"{source}: {name} has {bad} of {tensor.numel()} values that are NaN or infinite. Training has diverged; take "
        f"an earlier checkpoint."
    )


def _shapes(settings: RecurrentSettings) -> dict[str, tuple[int, ...]]:
    """The tensors that torch stores for a layer, by their names in it."""
    found: dict[str, tuple[int, ...]] = {}
    rows = settings.rows
    for layer, _, suffix in settings.directions():
        found["weight_ih" + suffix] = (rows, settings.layer_input(layer))
        found["weight_hh" + suffix] = (rows, settings.state_size)
        if settings.bias:
            found |= {"bias_ih" + suffix: (rows,), "bias_hh" + suffix: (rows,)}
        if settings.proj_size:
            found["weight_hr" + suffix] = (settings.proj_size, settings.hidden_size)
    return found


def _not_finite(tensor: Tensor) -> int:
    """How many values of a matrix or a vector are NaN or infinite; what is not contiguous is not copied whole."""
    rows = max(1, _CHUNK // max(1, tensor.numel() // max(1, len(tensor))))
    return sum(int((~torch.isfinite(part)).sum()) for part in tensor.split(rows)) if tensor.numel() else 0


def _tensor(tensors: Mapping[str, Tensor], name: str, key: str) -> Tensor:
    full = _join(name, key)
    if full not in tensors:
        raise _lacking(name, key)
    return tensors[full]


def _lacking(name: str, key: str) -> _LeftError:
    return _LeftError(
        f"lacks {_join(name, key)}, which layer {name or '(top level)'} needs beside its other weights. Was the "
        f"state_dict saved whole?",
        of_source=True,
    )


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
