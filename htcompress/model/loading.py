"""A checkpoint's tensors in the user's model: the model's own `load_state_dict` is the judge."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from htcompress.errors import CheckpointError
from htcompress.isolation import user_code
from htcompress.model.names import listed, own_names, renamed, same_tensor
from htcompress.model.replace import recurrent_modules
from htcompress.nn.recurrence import TORCH_CLASSES
from htcompress.observer import Observer
from htcompress.sources.read import Checkpoint

_LARGE = 1 << 20
"""Numbers of a weight from which it is left where it is, in the mapped file, in place of being copied."""


def load_checkpoint(model: nn.Module, checkpoint: Checkpoint, observer: Observer, *, source: str) -> nn.Module:
    """Put a checkpoint's tensors into a model, in place, and the model into evaluation mode.

    Names may differ by a common prefix, or by what wrappers put in, on either side. Tensors that the model does not
    know are named in a message.

    Args:
        source: where the model came from, for messages.

    Raises `CheckpointError` where the checkpoint lacks a tensor, or one does not fit.
    """
    own = own_names(model)
    tensors = renamed({**checkpoint.tensors, **checkpoint.extra}, own)
    tell_of_others(checkpoint, observer)
    mapped = _large_weights(model, tensors)
    for name, parameter in mapped.items():
        parameter.data = tensors[name]
    state: OrderedDict[str, Any] = OrderedDict((n, t) for n, t in tensors.items() if n not in mapped)
    if checkpoint.metadata is not None and tensors.keys() == checkpoint.tensors.keys() | checkpoint.extra.keys():
        state._metadata = checkpoint.metadata  # type: ignore[attr-defined]
    _judged(model, state, mapped, checkpoint, source)
    unknown = [name for name in tensors if name not in own and name not in own_names(model)]
    if unknown:
        observer.message(f"{len(unknown)} tensors of {checkpoint.path} are unknown to model(): {listed(unknown)}.")
    return model.eval()


def _judged(
    model: nn.Module, state: Mapping[str, Any], there: Collection[str], checkpoint: Checkpoint, source: str
) -> None:
    advice = "Give the checkpoint of this model, or correct model()."
    try:
        with user_code():
            missing = list(model.load_state_dict(state, strict=False).missing_keys)
    except Exception as error:
        for name, tensor in model.state_dict().items():
            found = state.get(name)
            if isinstance(found, Tensor) and isinstance(tensor, Tensor) and found.shape != tensor.shape:
                raise CheckpointError(
                    f"{checkpoint.path}: {name} has shape {tuple(found.shape)}; model() in {source} has "
                    f"{tuple(tensor.shape)}. {advice}"
                ) from error
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.path} does not load into model() in {source}: {text[:300]}. {advice}"
        ) from error
    # A file may keep a tensor that the model holds twice under one name only.
    own = model.state_dict()
    here = [own[name] for name in own if name in state or name in there]
    missing = [n for n in missing if n not in there and not any(same_tensor(own.get(n), other) for other in here)]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} of the {len(own)} tensors of model() in {source}: "
            f"{listed(missing)}. {advice}"
        )


def _large_weights(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """The recurrent weights of a million numbers and more that a checkpoint holds just as the model does."""
    found = {}
    for name, module in recurrent_modules(model).items():
        if type(module) not in TORCH_CLASSES:
            continue  # a class of its own may load in a way of its own
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            stored = tensors.get(full)
            if (
                isinstance(stored, Tensor)
                and parameter.numel() >= _LARGE
                and (stored.dtype, stored.shape) == (parameter.dtype, parameter.shape)
            ):
                found[full] = parameter
    return found


def tell_of_others(checkpoint: Checkpoint, observer: Observer) -> None:
    """Name the weights that were not taken of a file that holds several, and say what is to be known of it."""
    if checkpoint.note:
        observer.message(checkpoint.note)
    if checkpoint.others:
        observer.message(
            f"{checkpoint.path} also holds {listed(list(checkpoint.others))}; to compress those weights, name them "
            f"with --weights."
        )
