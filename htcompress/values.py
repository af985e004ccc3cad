"""Values that go into models and come out of them: tensors in tuples, lists, dicts, dataclasses, objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

P = ParamSpec("P")
R = TypeVar("R")

_DEPTH = 16
"""Levels of nesting that are looked into; what is deeper is a structure of its own, not an output."""


class Arguments(tuple[Any, ...]):
    """What a model is called with: its positional arguments, and `named` ones."""

    named: Mapping[str, Any]

    def __new__(cls, positional: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> Arguments:
        made = super().__new__(cls, positional)
        made.named = dict(named or {})
        return made


def call(model: nn.Module, arguments: Sequence[Any]) -> Any:
    """The model's output; `arguments` may have `named` ones. Whether gradients are recorded is afterwards as before."""
    recording = torch.is_grad_enabled()
    try:
        return model(*arguments, **getattr(arguments, "named", {}))
    finally:
        torch.set_grad_enabled(recording)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The value with a function applied to every tensor in tuples, lists, dicts, dataclasses and packed sequences."""
    if isinstance(value, Arguments):
        return Arguments([mapped(part, function) for part in value], mapped(dict(value.named), function))
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence):
        # Sizes stay on the CPU, where torch wants them.
        order, back = (None if t is None else function(t) for t in value[2:])
        return PackedSequence(function(value.data), value.batch_sizes, order, back)
    if isinstance(value, Mapping):
        parts = {key: mapped(part, function) for key, part in value.items()}
        try:
            return type(value)(parts)  # type: ignore[call-arg]
        except Exception:
            return parts
    if isinstance(value, tuple | list):
        made = [mapped(part, function) for part in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: mapped(getattr(value, f.name), function) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changed)
    return value


def fresh(value: Any) -> Any:
    """The value with tensors of its own, which record no gradients and may be written to."""
    with torch.inference_mode(False):
        return mapped(value, lambda tensor: tensor.detach().clone())


def leaves(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value, in order: also in dataclasses, distributions and other objects; each once."""
    yield from _leaves(value, set(), 0)


def _leaves(value: Any, seen: set[int], depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if value is None or isinstance(value, str | bytes | int | float | type | ModuleType | nn.Module) or callable(value):
        return
    if id(value) in seen or depth > _DEPTH:
        return
    seen.add(id(value))
    if isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part, seen, depth + 1)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part, seen, depth + 1)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name, None), seen, depth + 1)
    elif hasattr(value, "__dict__"):
        for part in vars(value).values():
            yield from _leaves(part, seen, depth + 1)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a model's output; see `leaves`."""
    return (tensor for tensor in leaves(value) if tensor.is_floating_point())


def answers_in(value: Any) -> list[Tensor]:
    """The tensors of a model's output that two models are compared by; complex ones as pairs of real numbers.

    Single numbers, which stand for a whole batch (a penalty, the share of a part of a loss), are none beside others.
    """
    found = [
        torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        for tensor in leaves(value)
        if tensor.is_floating_point() or tensor.is_complex()
    ]
    return [tensor for tensor in found if tensor.ndim] or found


# ---- mixed precision ----------------------------------------------------------------------------------------


def mixed_precision(device: torch.device) -> torch.dtype | None:
    """What torch computes in on a device where mixed precision is on now (`torch.autocast`); None where it is off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """A function that computes in the precision of what it is given, whether or not mixed precision is on around it."""

    @wraps(function)
    def within(*arguments: P.args, **named: P.kwargs) -> R:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return within(*arguments, **named)
        return function(*arguments, **named)

    return within


# ---- comparing ----------------------------------------------------------------------------------------------


def precision_of(model: nn.Module, autocast: Collection[torch.dtype] = ()) -> float:
    """The relative difference up to which two computations of a model's outputs count as the same.

    Of the coarsest floating-point numbers among its parameters: 7e-5 in float32, 4e-10 in float64, 0.05 in bfloat16,
    0.016 in float16. A sum in another order differs by their epsilon, which steps through time may enlarge.

    Args:
        autocast: what else it computes in, by itself.
    """
    kinds = {p.dtype for p in model.parameters() if p.dtype.is_floating_point} or {torch.float32}
    kinds |= set(autocast)
    return float(max(torch.finfo(kind).eps for kind in kinds) ** 0.6)


_FILLED = 1e3, 1e2
"""How large a number is at least that is put in the place of infinity again and again; and in units of all others."""

_INFINITE = 1e8, 1e4
"""The same for one that may occur once."""


def answered(tensor: Tensor) -> Tensor:
    """Which numbers of an output are answers: no infinities, and nothing that models put in their place.

    What is masked is often filled with -1e9, the least number of its precision or -10000: the least or the largest
    number of all, by far, and always the same. Beside it the answers themselves would not count in any mean or
    variance. What such a number is added to, or what comes of it in a softmax, is not recognised.

    >>> answered(torch.tensor([0.5, -1e9, 2.0, -1e9, float("inf")])).tolist()
    [True, False, True, False, False]
    """
    tensor = tensor.detach()
    known = torch.isfinite(tensor)
    if not tensor.numel():
        return known
    for extreme in torch.aminmax(torch.where(known, tensor, 0.0)):
        size = abs(float(extreme))
        if size < _FILLED[0]:
            continue
        rest = known & (tensor != extreme)
        others = tensor[rest]
        if others.numel() < 2 or bool((others == others[0]).all()):
            continue
        enough, beyond = _FILLED if int(known.sum() - rest.sum()) > 1 else _INFINITE
        if size >= enough and size >= beyond * float(others.abs().max()):
            known = rest
    return known


def difference(found: Any, wanted: Any) -> float:
    """The largest relative difference of any tensor in two values; infinite where their structures differ."""
    a, b = list(leaves(found)), list(leaves(wanted))
    if len(a) != len(b):
        return float("inf")
    return max((_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def _difference(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if found.numel() == 0:
        return 0.0
    if not (found.is_floating_point() or found.is_complex()):
        # Symbols may turn where two were as good as level: a few of very many are no difference.
        return float((found != wanted).double().mean()) / 10
    kind = torch.complex128 if found.is_complex() else torch.float64
    a, b = found.detach().to("cpu", kind), wanted.detach().to("cpu", kind)
    # What is infinite or no number in both is the same.
    alike = (a == b) | (torch.isnan(a) & torch.isnan(b))
    a, b = (torch.where(alike, torch.zeros_like(t), t) for t in (a, b))
    lost = float(torch.linalg.vector_norm(a - b))
    if lost == 0.0:
        return 0.0
    whole = wanted.detach().to("cpu", kind)
    known = torch.isfinite(whole.abs()) if whole.is_complex() else answered(whole)
    scale = float(torch.linalg.vector_norm(torch.where(known, whole, torch.zeros_like(whole))))
    return lost / scale if scale > 0 else float("inf")
