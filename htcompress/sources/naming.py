"""Tensors under names of their own, put under torch's: what `--names` maps, each matrix as torch lays it out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from htcompress.errors import CheckpointError, RequestError
from htcompress.sources.checkpoint import Checkpoint

TRANSPOSED, AS_IT_IS = ".T", ".N"
"""What may follow a name in a mapping: the transpose is meant, or the matrix as it is."""
NONE = "0"
"""In a mapping, a bias that is not there: zeros."""

_RECURRENT = re.compile(r"(?:^|\.)(weight|bias)_([ih]h|hr)((?:_l[0-9]{1,6}(?:_reverse)?)?)$")
_GATES = (1, 3, 4)
_SHOWN = 40


def names_of(text: str | None) -> dict[str, str] | None:
    """What `--names` says: `torch's=own,...`, or a JSON object of the same.

    >>> names_of("rnn.weight_ih_l0=w_ih, rnn.weight_hh_l0=w_hh.T")
    {'rnn.weight_ih_l0': 'w_ih', 'rnn.weight_hh_l0': 'w_hh.T'}

    Raises `RequestError` where it says nothing of the kind.
    """
    if text is None:
        return None
    expected = "--names is a list 'rnn.weight_ih_l0=ARRAY,rnn.weight_hh_l0=ARRAY', or a JSON object of the same"
    found: list[tuple[str, str]]
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text, object_pairs_hook=list)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{expected}; found no JSON ({error!s:.100}).") from error
    else:
        parts = [part.partition("=") for part in text.split(",") if part.strip()]
        found = [(name.strip(), own.strip()) for name, _, own in parts]
    for name, own in found:
        if not name or not isinstance(own, str) or not own:
            raise RequestError(f"{expected}; found {name!r:.100} without an array.")
    if not found:
        raise RequestError(f"{expected}; found nothing.")
    names = [name for name, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"--names gives {twice} twice; each name of torch has one array.")
    return dict(found)


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with tensors under torch's names; those that are not mapped keep theirs.

    A recurrent weight of which only the transpose fits the other weights of its layer is transposed.

    Args:
        names: torch's names, and what the tensors are called; `.T` behind that: the transpose, `.N`: as it is. `0` for
            a bias: zeros, where the file has but one of the two that torch adds.

    Raises `CheckpointError` where there is no such tensor, a name is taken, the matrices of a layer fit in no way, or
    in several.
    """
    given = checkpoint.tensors
    sources, said = {}, {}
    none = [name for name, own in names.items() if own == NONE and NONE not in given]
    for name, own in names.items():
        if name not in none:
            sources[name], said[name] = _meant(own, checkpoint)
    left = {name: tensor for name, tensor in given.items() if name not in sources.values()}
    taken = next((name for name in names if name in left), None)
    if taken is not None:
        raise CheckpointError(f"{checkpoint.path} has an array {taken} already, which --names gives to another.")
    tensors = {**left, **{name: given[own] for name, own in sources.items()}}
    turned = {name for name, way in said.items() if way == TRANSPOSED}
    tensors |= {name: torch.zeros_like(_other_bias(name, tensors, checkpoint)) for name in none}
    for group in _layers(tensors):
        # What is not mapped is in torch's own layout.
        free = [name for name in group if name in sources and said[name] is None and tensors[name].ndim == 2]
        turned |= _turned(group, tensors, free, turned, checkpoint, sources)
    tensors = {n: t.T.contiguous() if n in turned and t.ndim == 2 else t for n, t in tensors.items()}
    return replace(checkpoint, tensors=tensors, metadata=None)


def has_recurrent(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a weight is named as torch names those of recurrent layers."""
    return any((match := _RECURRENT.search(name)) and match[1] == "weight" for name in tensors)


def unnamed(checkpoint: Checkpoint) -> CheckpointError:
    """The error where none is: what there is, and what to do."""
    return CheckpointError(
        f"{checkpoint.path} holds {_shown(checkpoint)}; none is named like weight_hh_l0 of torch.nn.LSTM, GRU or RNN. "
        f"Say which are: --names 'rnn.weight_ih_l0=ARRAY,rnn.weight_hh_l0=ARRAY,rnn.bias_ih_l0=ARRAY,"
        f"rnn.bias_hh_l0=ARRAY'."
    )


def _shown(checkpoint: Checkpoint) -> str:
    listed = [f"{name} {tuple(tensor.shape)}" for name, tensor in checkpoint.tensors.items()]
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def _meant(own: str, checkpoint: Checkpoint) -> tuple[str, str | None]:
    """Which tensor a mapping means, and whether it says how it lies."""
    for name, way in ((own, None), (own[:-2], own[-2:])):
        for known in (name, name.replace("/", ".")):
            if known in checkpoint.tensors and way in (None, TRANSPOSED, AS_IT_IS):
                return known, way
    raise CheckpointError(f"{checkpoint.path} has no array {own}; it holds {_shown(checkpoint)}. Correct --names.")


def _other_bias(name: str, tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> Tensor:
    """The bias that torch adds to one."""
    match = _RECURRENT.search(name)
    other = {"ih": "hh", "hh": "ih"}.get(match[2]) if match is not None and match[1] == "bias" else None
    found = None if other is None else tensors.get(name.replace(f"bias_{match[2]}", f"bias_{other}"))  # type: ignore[index]
    if found is None:
        raise CheckpointError(
            f"{checkpoint.path}: {name}={NONE} stands for a bias of zeros beside another bias, bias_ih or bias_hh; "
            f"found none. Correct --names."
        )
    return found


def _layers(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """The names of the tensors of each direction of a layer."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in tensors:
        if match := _RECURRENT.search(name):
            found.setdefault((name[: match.start()], match[3]), []).append(name)
    yield from found.values()


def _turned(
    group: Sequence[str],
    tensors: Mapping[str, Tensor],
    free: Sequence[str],
    forced: set[str],
    checkpoint: Checkpoint,
    sources: Mapping[str, str],
) -> set[str]:
    """Which of the matrices that are free to lie either way have to be transposed, that a layer fits together."""
    if not free:
        return set()
    ways = []
    for choice in product((False, True), repeat=len(free)):
        turned = {name for name, turn in zip(free, choice, strict=True) if turn}
        shapes = {}
        for name in group:
            shape = tuple(tensors[name].shape)
            part = "_".join(_RECURRENT.search(name).groups()[:2])  # type: ignore[union-attr]
            shapes[part] = shape[::-1] if name in turned | forced else shape
        if _fits(shapes):
            ways.append(turned)
    if len(ways) == 1:
        return ways[0]
    told = ", ".join(f"{name}={sources.get(name, name)} {tuple(tensors[name].shape)}" for name in group)
    if not ways:
        raise CheckpointError(
            f"{checkpoint.path}: {told} are not the weights of one layer, whichever is transposed; expected "
            f"weight_ih (gates x hidden, inputs), weight_hh (gates x hidden, hidden) and biases (gates x hidden), with "
            f"4 gates for an LSTM, 3 for a GRU, 1 for an RNN. Correct --names."
        )
    unsure = next(name for name in free if 0 < sum(name in turned for turned in ways) < len(ways))
    own = sources[unsure]
    raise CheckpointError(
        f"{checkpoint.path}: {own} {tuple(tensors[unsure].shape)} may be {unsure} or its transpose, for both fit; "
        f"which is not guessed. Write {unsure}={own}{AS_IT_IS} where it is (gates x hidden, ...) as in torch, or "
        f"{unsure}={own}{TRANSPOSED} for its transpose."
    )


def _fits(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors are those of one direction of a layer, as far as they are there."""
    ih, hh, hr = (shapes.get(f"weight_{part}") for part in ("ih", "hh", "hr"))
    if any(len(shape) != 2 for shape in (ih, hh, hr) if shape is not None):
        return False
    rows = {shape[0] for part, shape in shapes.items() if part != "weight_hr" and shape}
    if len(rows) != 1:
        return False
    (count,) = rows
    if hr is not None:
        return count == 4 * hr[1] and (hh is None or hh[1] == hr[0])
    return hh is None or any(count == gates * hh[1] for gates in _GATES)
