"""Whose arrays stand where in a file of Keras: both of its formats, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from htcompress.sources import hdf5
from htcompress.sources.keras_config import BIDIRECTIONAL, WRAPPERS, Spec, groups

_CELL = re.compile(r"cells?(_\d+)?$")
_COUNTED = re.compile(r"_\d+$")
_BESIDE = ("optimizer", "optimizer_weights", "seed_generator", "compile_metrics", "metrics", "loss_tracker")
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")
"""Groups in which files of Keras 3, and the first of that format, keep the layers of a model."""

FORWARD, BACKWARD = "forward", "backward"

UNMATCHED = "cannot be matched with the model's configuration by its weights' names"


@dataclass(frozen=True)
class Part:
    """The arrays of one layer, or of one direction of it, in the order that Keras has them.

    Attributes:
        path: the names of the models that the layer is in, and its own.
        places: the paths of the arrays in the file.
        names: what Keras calls them, where the file says so; else their numbers.
        spec: what the configuration says of the layer; None where there is none.
        direction: `FORWARD` or `BACKWARD` of a Bidirectional.
        cls: the class in lower case, where the file says no more than that.
        cell: whether they are those of a cell.
        why: why nothing can be made of them.
    """

    path: tuple[str, ...]
    places: tuple[str, ...]
    names: tuple[str, ...]
    spec: Spec | None = None
    direction: str = ""
    cls: str = ""
    cell: bool = False
    why: str = ""

    @property
    def is_recurrent(self) -> bool:
        """Whether they are those of a recurrent layer, as far as names tell."""
        told = self.spec is not None and self.spec.is_recurrent
        return told or self.cell or "recurrent_kernel" in self.names

    @property
    def name(self) -> str:
        """The path, dotted."""
        return ".".join(part.replace("/", ".").strip(".") for part in self.path)


# ---- files until Keras 2, and .h5 of Keras 3: a list of arrays for each layer --------------------------------


def has_layer_lists(file: Any) -> bool:
    """Whether a file of h5py is of the older format."""
    return _layer_lists(file) is not None


def _layer_lists(file: Any) -> Any:
    group = file.get("model_weights", file)
    return group if hdf5.words(group.attrs, "layer_names") is not None else None


def listed_parts(file: Any, spec: Spec | None) -> Iterator[Part]:
    """The parts of a file of the older format; `spec` is the model's, where the file holds one."""
    root = _layer_lists(file)
    above = root.name.strip("/")
    known = {} if spec is None else {layer.name: layer for layer in spec.inner}
    for layer in hdf5.words(root.attrs, "layer_names") or ():
        if layer not in root:
            continue
        names = hdf5.words(root[layer].attrs, "weight_names") or ()
        arrays = [(name, "/".join(filter(None, (above, layer, name)))) for name in names]
        if spec is not None and layer not in known:
            yield from _by_name((layer,), arrays, why=UNMATCHED)
        else:
            yield from _of_layer((layer,), known.get(layer), arrays)


Arrays = Sequence[tuple[str, str]]
"""What Keras calls an array, and where it stands."""


def _of_layer(path: tuple[str, ...], spec: Spec | None, arrays: Arrays) -> Iterator[Part]:
    if not arrays:
        return
    if spec is None:
        yield from _by_name(path, arrays)
    elif spec.cls == BIDIRECTIONAL and len(spec.inner) == 2 and len(arrays) % 2 == 0:
        half = len(arrays) // 2
        yield _part(path, arrays[:half], spec.inner[0], FORWARD)
        yield _part(path, arrays[half:], spec.inner[1], BACKWARD)
    elif spec.cls in WRAPPERS and len(spec.inner) == 1:
        yield from _of_layer(path, spec.inner[0], arrays)
    elif spec.is_model:
        yield from _of_model(path, spec, arrays)
    else:
        yield _part(path, arrays, spec)


def _of_model(path: tuple[str, ...], spec: Spec, arrays: Arrays) -> Iterator[Part]:
    known = {layer.name: layer for layer in spec.inner}
    own: dict[str, list[tuple[str, str]]] = {}
    lost: list[tuple[str, str]] = []
    for name, place in arrays:
        steps = name.split("/")[:-1]
        plain = [_COUNTED.sub("", step) for step in steps]
        found = next((step for step in (*steps, *plain) if step in known), None)
        (lost if found is None else own.setdefault(found, [])).append((name, place))
    for name, inner in own.items():
        yield from _of_layer((*path, name), known[name], inner)
    yield from _by_name(path, lost, why=UNMATCHED)


def _by_name(path: tuple[str, ...], arrays: Arrays, *, why: str = "") -> Iterator[Part]:
    """Parts told by the names of weights alone: what stands before the last slash owns them."""
    owners: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for name, place in arrays:
        owner = name.split("/")[:-1]
        while owner and _CELL.search(owner[-1]):
            owner.pop()
        if path[-1] in owner:
            owner = owner[len(owner) - owner[::-1].index(path[-1]) :]
        owners.setdefault(tuple(owner), []).append((name, place))
    for steps, own in owners.items():
        # A layer that was loaded twice is called otherwise in its weights' names.
        inner = steps if len(owners) > 1 else ()
        direction = next((d for d in (FORWARD, BACKWARD) if inner and inner[-1].startswith(f"{d}_")), "")
        yield _part((*path, *(inner[:-1] if direction else inner)), own, None, direction, why)


def _part(path: tuple[str, ...], arrays: Arrays, spec: Spec | None, direction: str = "", why: str = "") -> Part:
    names = tuple(name.rpartition("/")[2].partition(":")[0] for name, _ in arrays)
    return Part(path, tuple(place for _, place in arrays), names, spec, direction, why=why)


# ---- .keras and .weights.h5 of Keras 3: groups in groups ------------------------------------------------------


def grouped_parts(file: Any, spec: Spec | None) -> Iterator[Part]:
    """The parts of a file of the newer format; `spec` is the model's, where there is one."""
    for part in _walk(file, (), spec, ""):
        yield part if part.path else Part(("model",), part.places, part.names, part.spec)


def _walk(group: Any, path: tuple[str, ...], spec: Spec | None, direction: str, cls: str = "") -> Iterator[Part]:
    yield from _own(group, path, spec, direction, cls)
    for name in group:
        child = group[name]
        if name == "vars" or not hasattr(child, "keys") or (not path and name in _BESIDE):
            continue
        if name in _CONTAINERS and (spec is None or spec.is_model):
            yield from _contained(child, path, spec)
        elif name == "cell":
            yield from _own(child, path, spec, direction, cls, cell=True)
            yield from _stacked(child, path, spec, direction)
        elif name == "layer":
            yield from _walk(child, path, spec.inner[0] if spec is not None and spec.inner else None, direction)
        elif name in ("forward_layer", "backward_layer"):
            own = name.partition("_")[0]
            inner = None if spec is None or len(spec.inner) != 2 else spec.inner[own == BACKWARD]
            yield from _walk(child, path, inner, own)
        else:
            yield from _walk(child, (*path, _said(child) or name), None, "", _COUNTED.sub("", name))


def _contained(container: Any, path: tuple[str, ...], spec: Spec | None) -> Iterator[Part]:
    known = {} if spec is None else groups(spec.inner)
    by_name = {layer.name: layer for layer in known.values()}
    for name in container:
        said = _said(container[name])
        layer = by_name.get(said or "") or known.get(name)
        own = layer.name if layer is not None else said or name
        yield from _walk(container[name], (*path, own), layer, "", _COUNTED.sub("", name))


def _stacked(cell: Any, path: tuple[str, ...], spec: Spec | None, direction: str) -> Iterator[Part]:
    """Cells in cells, which are run together step by step."""
    for name in cell:
        child = cell[name]
        if name != "vars" and hasattr(child, "keys"):
            for part in _walk(child, path, None, direction):
                names = tuple(f"{name}.{own}" for own in part.names)
                yield replace(
                    part, path=path, names=names, spec=spec, cell=True, why="runs several cells together step by step"
                )


def _said(group: Any) -> str | None:
    """The name of a layer that newer files note."""
    if "vars" in group and "name" in group["vars"].attrs:
        return hdf5.text(group["vars"].attrs["name"]) or None
    return None


def _own(
    group: Any, path: tuple[str, ...], spec: Spec | None, direction: str, cls: str, *, cell: bool = False
) -> Iterator[Part]:
    if "vars" in group and len(group["vars"]):
        held = group["vars"]
        names = sorted(held, key=lambda name: (len(name), name))
        above = held.name.strip("/")
        yield Part(path, tuple(f"{above}/{name}" for name in names), tuple(names), spec, direction, cls, cell)
