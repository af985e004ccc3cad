"""What a model has under several names: modules, and single weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from htcompress.model.inventory import place_of
from htcompress.model.names import listed


def further_names(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """The other names of modules (`self.decoder = self.encoder`), and for each the one that it is known by."""
    known = {id(model.get_submodule(name)): name for name in names}
    every = model.named_modules(remove_duplicate=False)
    return {name: known[id(module)] for name, module in every if known.get(id(module), name) != name}


def shared_weights(
    tensors: Mapping[str, Tensor], layers: Collection[str], owners: Mapping[str, str]
) -> list[tuple[str, ...]]:
    """The names of weights that are one tensor, and are several once layers are compressed.

    Args:
        tensors: of a model, under all of their names.
        layers: those that are compressed.
        owners: names of layers that share all weights with another, and its name: these stay one.
    """
    alike: dict[tuple[object, ...], list[tuple[str, str]]] = {}
    for name, tensor in tensors.items():
        place = place_of(tensor) if tensor.numel() else None
        if place is not None:
            layer, _, weight = name.rpartition(".")
            alike.setdefault(place, []).append((owners.get(layer, layer), weight))
    groups = [tuple(dict.fromkeys(group)) for group in alike.values()]
    apart = [group for group in groups if len(group) > 1 and any(layer in layers for layer, _ in group)]
    return [tuple(f"{layer}.{weight}" if layer else weight for layer, weight in group) for group in apart]


def told(shared: Sequence[tuple[str, ...]]) -> list[str]:
    """A sentence for each of these."""
    return [
        f"{listed(list(names))} are one tensor in the model, and are compressed apart: htcompress.load gives back "
        f"each, a state_dict of the model's class (export --to dense) cannot."
        for names in shared
    ]
