"""Which sizes of an ONNX model are open: found out in torch, held in onnxruntime, told where they are fixed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from htcompress.errors import RequestError
from htcompress.exporting.verify import difference, session

Place = tuple[int, int]
"""An input, by its number, and one of its axes."""

_TOGETHER = 3
"""The most sizes of a model that are taken to be one (the batches of x, of lengths and of a mask)."""


def verified(model: nn.Module, made: onnx.ModelProto, given: tuple[Any, ...]) -> tuple[bytes, float, tuple[str, ...]]:
    """The model's bytes, the largest difference from torch, and the sizes that are fixed though torch takes others.

    It is run on the inputs it was made with, and with other sizes wherever they are open. Sizes that torch takes
    otherwise only together (the batches of two inputs) become one; those that it never takes otherwise (the features
    of a layer) are fixed, and are nothing to tell.

    Args:
        model: what was exported.
        made: the exported model; open sizes that are not are fixed in it.
        given: the arguments it was made with.

    Raises `RequestError` where onnxruntime cannot run it or differs.
    """
    trial = _Trial(model, made, given)
    groups = _groups(trial)
    found = [trial.differs([], 0)]
    for group, places in list(groups.items()):
        size = trial.size(places[0])
        try:
            found.append(trial.differs(places, size + 1))
        except RequestError:
            # Something in the graph counts on the size.
            for name in group:
                _rename(made, name, size)
            trial.start()
            continue
        if trial.expected(places, 1) is not None:
            found.append(trial.differs(places, 1))
    return trial.bytes, max(found), tuple(_fixed(trial))


def _groups(trial: _Trial) -> dict[tuple[str, ...], list[Place]]:
    """The places of each open size, or of several that are one; what is not open is fixed in the model."""
    places: dict[str, list[Place]] = {}
    for place, size in trial.sizes.items():
        if isinstance(size, str):
            places.setdefault(size, []).append(place)
    groups: dict[tuple[str, ...], list[Place]] = {
        (name,): where for name, where in places.items() if trial.takes_more(where)
    }
    for name, where in places.items():
        size = trial.size(where[0])
        if any(name in group for group in groups):
            continue
        others = [other for other in places if other != name and trial.size(places[other][0]) == size]
        together = next(
            (c for c in _some(others) if trial.takes_more([p for o in (name, *c) for p in places[o]])), None
        )
        if together is None:
            _rename(trial.made, name, size)
            continue
        # All that was one with any of them.
        joined = [group for group in groups if set(group) & set(together)]
        names = tuple(dict.fromkeys([*(n for group in joined for n in group), *together, name]))
        for group in joined:
            del groups[group]
        for other in names[1:]:
            _rename(trial.made, other, names[0])
        groups[names] = [place for n in names for place in places[n]]
    trial.start()
    return groups


def _fixed(trial: _Trial) -> list[str]:
    """Sizes that the model fixes and torch takes otherwise, alone or together with others of the same size."""
    found = []
    for place, size in trial.sizes.items():
        if isinstance(size, str):
            continue
        others = [other for other in trial.sizes if other[0] != place[0] and trial.size(other) == size]
        if any(trial.takes_more([place, *chosen]) for chosen in [(), *_some(others)]):
            found.append(f"axis {place[1]} of {trial.names[place[0]]} is fixed at {size}")
    return found


def _some(of: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [chosen for count in range(1, _TOGETHER) for chosen in combinations(of, count)]


class _Trial:
    """A model and its export, to be called with inputs of other sizes."""

    def __init__(self, model: nn.Module, made: onnx.ModelProto, given: tuple[Any, ...]) -> None:
        self.model, self.made = model, made
        self.leaves, self.spec = pytree.tree_flatten(given)
        self.names = [value.name for value in made.graph.input]
        self.start()

    def start(self) -> None:
        """Take the export as it is now."""
        self.bytes = self.made.SerializeToString()
        self.runtime = session(self.bytes)

    @property
    def sizes(self) -> dict[Place, str | int]:
        """The export's sizes: the name of an open one, the number of a fixed one."""
        return {
            (k, axis): d.dim_param or d.dim_value
            for k, value in enumerate(self.made.graph.input)
            for axis, d in enumerate(value.type.tensor_type.shape.dim)
        }

    def size(self, place: Place) -> int:
        """The size it was made with."""
        leaf, axis = place
        return int(self.leaves[leaf].shape[axis])

    def inputs(self, places: Sequence[Place], size: int) -> list[Tensor]:
        """The inputs with another size at some places: cut off, or their first entries once more."""
        values = list(self.leaves)
        for leaf, axis in places:
            values[leaf] = torch.cat([values[leaf]] * 2, axis).narrow(axis, 0, size)
        return values

    def expected(self, places: Sequence[Place], size: int) -> list[Tensor] | None:
        """Torch's outputs for these; None where the model does not take them."""
        try:
            with torch.no_grad():
                output = self.model(*pytree.tree_unflatten(self.inputs(places, size), self.spec))
        except Exception:
            return None
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

    def takes_more(self, places: Sequence[Place]) -> bool:
        """Whether torch takes one more than it was made with."""
        return self.size(places[0]) > 0 and self.expected(places, self.size(places[0]) + 1) is not None

    def differs(self, places: Sequence[Place], size: int) -> float:
        """The difference from torch. Raises `RequestError` where it is too large or onnxruntime fails."""
        expected = self.expected(places, size)
        if expected is None:
            raise RequestError("The model does not take the data it was exported with once more.")
        named = " and ".join(f"{self.names[leaf]} (axis {axis})" for leaf, axis in places)
        case = f"inputs with {size} along {named}" if places else "the calibration data"
        return difference(self.runtime, dict(zip(self.names, self.inputs(places, size), strict=True)), expected, case)


def _rename(model: onnx.ModelProto, name: str, to: str | int) -> None:
    """Write another name, or a fixed size, in place of the name of a size."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for d in value.type.tensor_type.shape.dim:
            if d.dim_param == name:
                if isinstance(to, str):
                    d.dim_param = to
                else:
                    d.dim_value = to
