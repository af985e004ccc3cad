"""Names of tensors: those of a file matched with those of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from htcompress.model.inventory import same_memory

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What DataParallel, torch.compile and their kin put into the names of a module's tensors."""


def own_names(model: nn.Module) -> list[str]:
    """The names of a model's state_dict; those of lazy modules too, which have no shape yet."""
    return list(model.state_dict(keep_vars=True))


def renamed(tensors: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Tensors by the model's names, where theirs differ by a prefix or by what wrappers put in."""
    if all(name in tensors for name in own):
        return dict(tensors)
    names = set(own)
    best = dict(tensors)
    for found in (_without_prefix(tensors, own), _unwrapped(tensors, own)):
        if len(names & found.keys()) > len(names & best.keys()):
            best = found
    return best


def _without_prefix(tensors: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Names without a wrapper's prefix (Lightning's `model.`, say), where that makes them the model's."""
    counts: dict[str, int] = {}
    names = set(own)
    for name in tensors:
        for at in [k + 1 for k, letter in enumerate(name) if letter == "."]:
            if name[at:] in names:
                counts[name[:at]] = counts.get(name[:at], 0) + 1
    if not counts:
        return {}
    prefix = max(counts, key=lambda p: counts[p])
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _unwrapped(tensors: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Names matched by what is left of them without the parts that wrappers put in, on either side."""
    plain = {_plain(name): name for name in own}
    if len(plain) < len(own):
        return {}
    stripped = {_plain(name): tensor for name, tensor in tensors.items()}
    found = _without_prefix(stripped, plain) if not plain.keys() <= stripped.keys() else stripped
    return {plain.get(name, name): tensor for name, tensor in found.items()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def same_tensor(a: Any, b: Any) -> bool:
    """Whether two values of a state are one tensor: the same numbers at the same place."""
    return isinstance(a, Tensor) and isinstance(b, Tensor) and same_memory(a, b)


def listed(names: list[str], most: int = 4) -> str:
    """Names in a sentence, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
