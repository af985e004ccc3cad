"""The layers in a file of Keras, as torch has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from htcompress.nn.settings import RecurrentSettings
from htcompress.sources.keras_config import Computed, Spec, snake_case
from htcompress.sources.keras_layouts import PARTS, Layout, NotUnderstoodError
from htcompress.sources.keras_parts import BACKWARD, FORWARD, Part
from htcompress.vocabulary import Kind

_KINDS = {4: Kind.LSTM, 3: Kind.GRU, 1: Kind.RNN_TANH}
"""Of the number of gates, where nothing else tells the class."""

_ROLES: Mapping[str, tuple[str, ...]] = {
    "dense": ("kernel", "bias"),
    "embedding": ("embeddings",),
    "conv1d": ("kernel", "bias"),
    "conv2d": ("kernel", "bias"),
    "conv3d": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "layer_normalization": ("gamma", "beta"),
}
"""What the arrays of a class are, in the order of files that number them."""

_UNLESS = {"bias": "use_bias", "gamma": "scale", "beta": "center"}
"""The settings without which an array is not there."""

_NAMES = {
    "kernel": "weight",
    "embeddings": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
"""Torch's words for Keras's."""


@dataclass(frozen=True)
class KerasLayer:
    """A recurrent layer in a file, as torch has it.

    Attributes:
        name: dotted, of the models that it is in and its own.
        settings: one layer, one or both directions.
        directions: the layout and the places of the arrays of each direction.
        specs: what the configuration says of each direction; None where there is none.
    """

    name: str
    settings: RecurrentSettings
    directions: tuple[tuple[Layout, tuple[str, ...]], ...]
    specs: tuple[Spec | None, ...]

    def keys(self, direction: int) -> dict[str, str]:
        """The full names of torch's tensors of a direction, by `PARTS`."""
        suffix = ("_l0", "_l0_reverse")[direction]
        return {part: f"{self.name}.{part}{suffix}" for part in (PARTS if self.settings.bias else PARTS[:2])}

    def names(self) -> list[str]:
        """The full names of all of torch's tensors."""
        return [name for k in range(len(self.directions)) for name in self.keys(k).values()]


@dataclass(frozen=True)
class Other:
    """An array of another layer: its name and its axes in torch."""

    name: str
    place: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """How layers of a file are taken.

    Attributes:
        older: whether the file is of Keras before version 3.
        adapts: whether layers count that torch has no module for, but that are computed step by step; else they are
            left, for weights by torch's names would be read as those of torch's modules.
    """

    older: bool = True
    adapts: bool = False


def layers_of(
    parts: Sequence[Part], shapes: Mapping[str, tuple[int, ...]], reading: Reading
) -> tuple[list[KerasLayer], dict[str, str]]:
    """The recurrent layers that a module can stand in for; of the others the reason, by name."""
    owned: dict[str, list[Part]] = {}
    for part in parts:
        if part.is_recurrent:
            owned.setdefault(part.name, []).append(part)
    layers: list[KerasLayer] = []
    left: dict[str, str] = {}
    for name, own in owned.items():
        try:
            layers += _understood(name, own, shapes, reading)
        except NotUnderstoodError as error:
            left[name] = str(error)
    return layers, left


def _understood(
    name: str, parts: list[Part], shapes: Mapping[str, tuple[int, ...]], reading: Reading
) -> list[KerasLayer]:
    # HDF5 lists groups by name: backwards first.
    parts = sorted(parts, key=lambda part: part.direction == BACKWARD)
    made = [_direction(name, part, shapes, reading) for part in parts]
    if len(made) == 1:
        return made
    if len(made) != 2 or {part.direction for part in parts} != {FORWARD, BACKWARD}:
        raise NotUnderstoodError(f"has the weights of {len(made)} layers under one name")
    # That which reads from the end is torch's second; where nothing tells, it is Keras's, too.
    if made[0].specs[0] is not None and made[0].specs[0].goes_backwards:
        made.reverse()
        parts.reverse()
    forward, backward = made
    if forward.settings != backward.settings:
        return [replace(layer, name=f"{name}.{p.direction}") for layer, p in zip(made, parts, strict=True)]
    both = replace(forward.settings, bidirectional=True)
    return [KerasLayer(name, both, forward.directions + backward.directions, forward.specs + backward.specs)]


def _direction(name: str, part: Part, shapes: Mapping[str, tuple[int, ...]], reading: Reading) -> KerasLayer:
    """A layer of one direction."""
    if part.why:
        raise NotUnderstoodError(part.why)
    own = [shapes[place] for place in part.places]
    told = Computed(_kind_by_shape(own)) if part.spec is None else part.spec.computes(older=reading.older)
    layout = Layout.of(told.kind, own)
    if layout.recurrence.has_reset:
        if not layout.biases and part.spec is None:
            raise NotUnderstoodError("has no biases, and nothing tells whether it resets its state before the matrix")
        # One bias where the state is reset before the matrix, two where it is after.
        told = replace(told, resets_before=layout.biases == 1 if layout.biases else told.resets_before)
    if not reading.adapts and told.resets_before:
        raise NotUnderstoodError("resets its state before the matrix (reset_after=False), as torch's GRU does not")
    if not reading.adapts and told.activations:
        *gates, rest = told.activations
        words = f"activations {rest} and {gates[0]} (of gates)" if gates else f"activation {rest}"
        raise NotUnderstoodError(f"has the {words}, which torch's {told.kind.module} has not")
    settings = RecurrentSettings(
        told.kind,
        own[0][0],
        own[1][0],
        bias=layout.biases > 0,
        activations=",".join(told.activations),
        resets_before=told.resets_before,
    )
    return KerasLayer(name, settings, ((layout, part.places),), (part.spec,))


def _kind_by_shape(shapes: Sequence[tuple[int, ...]]) -> Kind:
    if len(shapes) < 2 or len(shapes[1]) != 2 or not shapes[1][0]:
        raise NotUnderstoodError(f"has weights of shapes {', '.join(map(str, shapes))}, which torch has not")
    gates = shapes[1][1] // shapes[1][0]
    if gates not in _KINDS:
        raise NotUnderstoodError(f"has {gates} gates, which no layer of torch has")
    return _KINDS[gates]


def tensors_of(
    layers: Iterable[KerasLayer], others: Iterable[Other], array: Callable[[str], np.ndarray]
) -> dict[str, Tensor]:
    """All weights by torch's names, in torch's layouts.

    Args:
        array: gives the array at a place.
    """
    found: dict[str, Tensor] = {}
    for layer in layers:
        for k, (layout, places) in enumerate(layer.directions):
            made = layout.to_torch([array(place) for place in places])
            found |= {key: _tensor(made[part]) for part, key in layer.keys(k).items()}
    return found | {other.name: _tensor(np.transpose(array(other.place), other.axes)) for other in others}


def _tensor(array: np.ndarray) -> Tensor:
    """In memory of its own, in this machine's order of bytes."""
    return torch.from_numpy(np.array(array, order="C", dtype=array.dtype.newbyteorder("=")))


def others_of(
    parts: Sequence[Part], shapes: Mapping[str, tuple[int, ...]], layers: Sequence[KerasLayer]
) -> list[Other]:
    """All arrays that are not of these layers, under names of which each is given once."""
    taken = {place for layer in layers for _, places in layer.directions for place in places}
    return _apart(_others(parts, shapes, taken), {name for layer in layers for name in layer.names()})


def _others(parts: Sequence[Part], shapes: Mapping[str, tuple[int, ...]], taken: set[str]) -> Iterator[Other]:
    """All arrays that are not of a recurrent layer, by torch's words where their class is known."""
    for part in parts:
        cls = part.cls if part.spec is None else snake_case(part.spec.cls)
        roles = part.names if not part.names[0].isdigit() else _roles(cls, part)
        known = not part.is_recurrent and (cls in _ROLES or (part.spec is None and not part.cls))
        for k, place in enumerate(part.places):
            if place in taken:
                continue
            role, shape = roles[k] if k < len(roles) else part.names[k], shapes[place]
            axes = _turned(len(shape)) if known and role == "kernel" else tuple(range(len(shape)))
            name = _NAMES.get(role, role) if known else role
            lone = f"{part.name}.{part.direction}" if part.direction else part.name
            yield Other(f"{lone}.{name}", place, axes)


def _apart(others: Iterable[Other], taken: set[str]) -> list[Other]:
    """The same under names of which each is given once."""
    found = []
    for other in others:
        count, name = 1, other.name
        while name in taken:
            count += 1
            name = f"{other.name}_{count}"
        taken.add(name)
        found.append(replace(other, name=name))
    return found


def _roles(cls: str, part: Part) -> tuple[str, ...]:
    """What arrays are that the file only numbers."""
    config = {} if part.spec is None else part.spec.config
    named = tuple(role for role in _ROLES.get(cls, ()) if config.get(_UNLESS.get(role, ""), True))
    return named or part.names


def _turned(axes: int) -> tuple[int, ...]:
    """Keras has the outputs last and the inputs before them, torch first."""
    return (axes - 1, axes - 2, *range(axes - 2)) if axes > 1 else tuple(range(axes))
