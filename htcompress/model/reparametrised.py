"""Recurrent weights that are computed of others: pruned, normed or dropped ones. Their values are taken, or named."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm

from htcompress.model.replace import recurrent_modules
from htcompress.nn.recurrence import TORCH_CLASSES

_WEIGHT = r"(?:weight|bias)_(?:ih|hh|hr)(?:_l[0-9]+(?:_reverse)?)?"
_OLD = re.compile(rf"^(?:(?P<layer>.+)\.)?(?P<weight>{_WEIGHT})_(?P<part>orig|mask|g|v|u|raw)$")
_NEW = re.compile(rf"^(?:(?P<layer>.+)\.)?parametrizations\.(?P<weight>{_WEIGHT})\.(?P<part>original[0-9]*)$")

_UNDONE: tuple[tuple[frozenset[str], str, str], ...] = (
    (frozenset({"orig", "mask"}), "pruned", 'torch.nn.utils.prune.remove({module}, "{weight}")'),
    (frozenset({"orig", "u"}), "under spectral_norm", 'torch.nn.utils.remove_spectral_norm({module}, "{weight}")'),
    (frozenset({"g", "v"}), "under weight_norm", 'torch.nn.utils.remove_weight_norm({module}, "{weight}")'),
    (
        frozenset({"raw"}),
        "under weight drop",
        "{module}.{weight} = torch.nn.Parameter({module}.{weight}_raw), with the wrapper taken off",
    ),
    (
        frozenset({"original"}),
        "parametrised",
        'torch.nn.utils.parametrize.remove_parametrizations({module}, "{weight}")',
    ),
)


def _without_spectral_norm(module: nn.Module, weight: str) -> None:
    remove_spectral_norm(module, weight)
    # What torch registers to load it is wrapped, and not found again by torch.
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        own: Any = getattr(hook, "hook", hook)
        if type(own).__name__.startswith("SpectralNorm") and own.fn.name == weight:
            del hooks[key]


def _without_parametrizations(module: nn.Module, weight: str) -> None:
    # Copies of a module have its class, which loses what computes the weight.
    cls = type(module)
    own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, own)
    parametrize.remove_parametrizations(module, weight)


_REMOVED: dict[str, Callable[[nn.Module, str], object]] = {
    "pruned": prune.remove,
    "under spectral_norm": _without_spectral_norm,
    "under weight_norm": remove_weight_norm,
    "parametrised": _without_parametrizations,
}
"""What makes a module's weight a parameter of its own."""


def reparametrised(names: Iterable[str]) -> dict[str, str]:
    """The recurrent layers that lack weights because they are computed of others: by name, the reason and the remedy.

    >>> print(reparametrised(["rnn.weight_hh_l0_g", "rnn.weight_hh_l0_v", "rnn.weight_ih_l0"])["rnn"])
    rnn.weight_hh_l0 is under weight_norm (weight_hh_l0_g, weight_hh_l0_v), not stored itself. Call \
torch.nn.utils.remove_weight_norm(model.rnn, "weight_hh_l0"), and so for the layer's other weights that are, then \
save the state_dict again.

    Args:
        names: of all tensors of a state_dict.
    """
    given = dict.fromkeys(names)
    parts: dict[tuple[str, str], set[str]] = {}
    for name in given:
        match = _OLD.match(name) or _NEW.match(name)
        if match is None:
            continue
        layer, weight, part = match["layer"] or "", match["weight"], match["part"]
        if (f"{layer}.{weight}" if layer else weight) not in given:
            parts.setdefault((layer, weight), set()).add(part)
    found: dict[str, str] = {}
    for (layer, weight), own in parts.items():
        for needed, state, call in _UNDONE:
            if needed <= {part.rstrip("0123456789") for part in own} and layer not in found:
                new = "original" in needed
                shown = ", ".join(part if new else f"{weight}_{part}" for part in sorted(own))
                module = f"model.{layer}" if layer else "model"
                found[layer] = (
                    f"{layer + '.' if layer else ''}{weight} is {state} ({shown}), not stored itself. Call "
                    f"{call.format(module=module, weight=weight)}, and so for the layer's other weights that are, "
                    f"then save the state_dict again."
                )
    return found


def has_computed(names: Iterable[str]) -> bool:
    """Whether any name is that of a part of which a recurrent weight is computed."""
    return any(_OLD.match(name) or _NEW.match(name) for name in names)


def with_plain_weights(model: nn.Module, kept: Container[str] = ()) -> list[str]:
    """Make recurrent weights that are computed of others parameters with the values that they have now, in place.

    What wraps a layer in order to drop some of its weights in training is taken off: the layer stands in its place.

    Args:
        kept: tensors, by their names in the model, that weights go on being computed of.

    Returns:
        what was done, one sentence for each layer.
    """
    done: list[str] = []
    if not has_computed(model.state_dict()):
        return done
    for name, module in recurrent_modules(model).items():
        own = [key for key in module.state_dict() if (f"{name}.{key}" if name else key) not in kept]
        matches = [match for key in own if (match := _OLD.match(key) or _NEW.match(key))]
        for weight in dict.fromkeys(match["weight"] for match in matches if not match["layer"]):
            state = _state_of(weight, matches)
            if state is not None:
                _REMOVED[state](module, weight)
                done.append(f"{name}.{weight} is {state}: it is taken as it is computed now, and stored as that.")
    return done + _without_drop(model)


def _state_of(weight: str, matches: Iterable[re.Match[str]]) -> str | None:
    """By what a weight is computed, by the names of what a module holds for it."""
    parts = {match["part"].rstrip("0123456789") for match in matches if match["weight"] == weight}
    return next((state for needed, state, _ in _UNDONE if needed <= parts and state in _REMOVED), None)


def _without_drop(model: nn.Module) -> list[str]:
    done = []
    for name, wrapper in list(model.named_modules()):
        inner = list(wrapper.children())
        if len(inner) != 1 or type(inner[0]) not in TORCH_CLASSES:
            continue
        raw = {
            key.removesuffix("_raw"): parameter
            for holder in (wrapper, inner[0])
            for key, parameter in holder.named_parameters(recurse=False)
            if key.endswith("_raw") and _OLD.match(key)
        }
        own = [key for key, _ in wrapper.named_parameters(recurse=False)]
        if not raw or any(key.removesuffix("_raw") not in raw for key in own):
            continue
        for weight, parameter in raw.items():
            inner[0]._parameters.pop(f"{weight}_raw", None)
            vars(inner[0]).pop(weight, None)
            setattr(inner[0], weight, nn.Parameter(parameter.detach(), parameter.requires_grad))
        for holder in model.modules():
            for key, held in holder._modules.items():
                if held is wrapper:
                    holder._modules[key] = inner[0]
        done.append(
            f"{name} drops weights of its {type(inner[0]).__name__} in training: the layer stands in its place."
        )
    return done


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict in which recurrent weights that are pruned, under weight_norm or under weight drop stand themselves.

    What they were computed of is left out. Wrappers that drop weights are taken off, as `with_plain_weights` does.
    Other weights, and those whose parts are not all there, are as they were.
    """
    found = dict(tensors)
    while (raw := _raw_weight(found)) is not None:
        found = _unwrapped(found, *raw)
    for name in list(found):
        match = _OLD.match(name)
        stem = name.removesuffix(f"_{match['part']}") if match is not None else name
        if match is None or stem in found:
            continue
        mask, v = found.get(f"{stem}_mask"), found.get(f"{stem}_v")
        if match["part"] == "orig" and mask is not None:
            found[stem] = found.pop(f"{stem}_orig") * found.pop(f"{stem}_mask")
        elif match["part"] == "g" and v is not None:
            g = found.pop(f"{stem}_g")
            over = [k for k in range(v.ndim) if g.ndim < v.ndim or g.shape[k] == 1]
            norm = torch.linalg.vector_norm(found.pop(f"{stem}_v").float(), dim=over, keepdim=True)
            found[stem] = (v.float() * (g.float() / norm)).to(v.dtype)
    return found


def _raw_weight(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The layer and the name of a weight of which there is a raw one, and not itself."""
    matches = (match for name in tensors if (match := _OLD.match(name)) and match["part"] == "raw")
    return next(
        (
            (match["layer"] or "", match["weight"])
            for match in matches
            if match.string.removesuffix("_raw") not in tensors
        ),
        None,
    )


def _unwrapped(tensors: Mapping[str, Tensor], layer: str, weight: str) -> dict[str, Tensor]:
    """With a raw weight under its own name, which the wrapper holds (fastai) or the layer inside of it (AWD-LSTM)."""
    prefix = f"{layer}." if layer else ""
    within = layer.rpartition(".")[2] == "module"
    outer, inside = (prefix.removesuffix("module."), prefix) if within else (prefix, f"{prefix}module.")
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == f"{prefix}{weight}_raw":
            made[f"{outer}{weight}"] = tensor
        elif name != f"{inside}{weight}":
            made[outer + name.removeprefix(inside) if name.startswith(inside) else name] = tensor
    return made
