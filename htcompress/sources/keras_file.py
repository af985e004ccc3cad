"""Files of Keras: whole models (.h5, .keras) and weights alone, read and written with h5py."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from htcompress.errors import CheckpointError
from htcompress.nn.settings import RecurrentSettings
from htcompress.sources import hdf5, keras_parts
from htcompress.sources.checkpoint import Checkpoint, checked_name, first_line
from htcompress.sources.keras_config import Spec, snake_case
from htcompress.sources.keras_layouts import PARTS, Layout, NotUnderstoodError
from htcompress.sources.keras_parts import BACKWARD, Part
from htcompress.vocabulary import Kind

KERAS = "keras"
"""What reports call the format."""

WEIGHTS, CONFIG = "model.weights.h5", "config.json"
"""What stands in a `.keras` file, which is a zip archive."""

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

_ZIP_EXPANDS = 1100


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


@dataclass(frozen=True, eq=False)
class KerasFile:
    """A file of Keras.

    Attributes:
        path: the file.
        content: its bytes.
        config: the configuration of its model; None where it holds weights alone.
        layers: the recurrent layers that torch's modules can stand in for.
        others: all other weights.
        left: the other recurrent layers, and why.
    """

    path: Path
    content: bytes
    config: Any = None
    layers: tuple[KerasLayer, ...] = ()
    others: tuple[Other, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> KerasFile:
        """Read a file and find its layers.

        Raises:
            CheckpointError: it is damaged, not of Keras, or leads to other files.
            RequestError: h5py is not installed.
        """
        return cls.of(path, path.read_bytes())

    @classmethod
    def of(cls, path: Path, content: bytes) -> KerasFile:
        """As `read`, of bytes."""
        inner = _weights_of(content, path)
        with hdf5.opened(inner, path) as file:
            arrays = hdf5.datasets(file, len(inner), path)
            config = _config_of(content, file, path)
            spec = None
            if config is not None:
                try:
                    spec = Spec.of(config)
                except ValueError as error:
                    raise CheckpointError(f"{path} is damaged: {error}. Save the model again with Keras.") from error
            lists = keras_parts.has_layer_lists(file)
            found = keras_parts.listed_parts(file, spec) if lists else keras_parts.grouped_parts(file, spec)
            parts = [replace(part, places=tuple(p for p in part.places if p in arrays)) for part in found]
            parts = [part for part in parts if part.places]
            if not parts:
                held = ", ".join([*file][:6]) or "nothing"
                raise CheckpointError(
                    f"{path} is an HDF5 file without weights of Keras in it; it holds {held[:200]}. Save one with "
                    f'model.save("model.keras") or model.save_weights("model.weights.h5").'
                )
            shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        layers, left = _layers(parts, shapes)
        taken = {place for layer in layers for _, places in layer.directions for place in places}
        others = _apart(_others(parts, shapes, taken), {name for layer in layers for name in layer.names()})
        for name in (*left, *(layer.name for layer in layers), *(other.name for other in others)):
            checked_name(name, path)
        return cls(path, content, config, tuple(layers), tuple(others), left)

    @property
    def runs(self) -> bool:
        """Whether the file holds the model beside its weights."""
        return self.config is not None

    @property
    def suffix(self) -> str:
        """How such a file is called."""
        if self.content.startswith(b"PK"):
            return ".keras"
        return ".h5" if self.runs else ".weights.h5"

    def flat(self) -> dict[str, KerasLayer]:
        """The layers by names without dots, each given once."""
        found: dict[str, KerasLayer] = {}
        for layer in self.layers:
            base = layer.name.replace(".", "_")
            name, count = base, 1
            while name in found:
                count += 1
                name = f"{base}_{count}"
            found[name] = layer
        return found

    def names(self) -> list[str]:
        """The names of all tensors."""
        return [*(name for layer in self.layers for name in layer.names()), *(other.name for other in self.others)]

    def tensors(self) -> dict[str, Tensor]:
        """All weights by torch's names, in torch's layouts."""
        found: dict[str, Tensor] = {}
        with hdf5.opened(_weights_of(self.content, self.path), self.path) as file:
            for layer in self.layers:
                for k, (layout, places) in enumerate(layer.directions):
                    made = layout.to_torch([file[place][()] for place in places])
                    found |= {key: torch.from_numpy(made[part].copy()) for part, key in layer.keys(k).items()}
            for other in self.others:
                array = np.transpose(file[other.place][()], other.axes)
                found[other.name] = torch.from_numpy(np.array(array, order="C", dtype=_native(array.dtype)))
        return found

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> tuple[KerasFile, set[str]]:
        """The file with some of its weights replaced, and the names of those; all else is as it was.

        Args:
            tensors: by torch's names; those that the file does not know are passed over.

        Raises `CheckpointError` where one has another shape than in the file.
        """
        stream = io.BytesIO(_weights_of(self.content, self.path))
        done: set[str] = set()
        with hdf5.opened(stream, self.path, "r+") as file:
            for places, names, make in self._writers():
                given = {part: tensors[name] for part, name in names.items() if name in tensors}
                if len(given) < len(names):
                    continue
                made = make({part: _array(tensor) for part, tensor in given.items()})
                for place, array in zip(places, made, strict=True):
                    if file[place].shape != array.shape:
                        raise CheckpointError(
                            f"{self.path}: {place} has shape {file[place].shape}, what is to be written in its place "
                            f"{array.shape}. Give the file that the model was made from."
                        )
                    file[place][...] = array
                done |= set(names.values())
        return replace(self, content=_with_weights(self.content, stream.getvalue())), done

    def _writers(self) -> Iterator[tuple[Sequence[str], dict[str, str], Callable[[Any], list[np.ndarray]]]]:
        """Places in the file, the names of torch's tensors that go there by their parts, and what makes the arrays."""
        for layer in self.layers:
            for k, (layout, places) in enumerate(layer.directions):
                yield places, layer.keys(k), layout.from_torch
        for other in self.others:
            back = tuple(int(axis) for axis in np.argsort(other.axes))
            yield (
                (other.place,),
                {"it": other.name},
                lambda given, back=back: [np.transpose(given["it"], back)],  # type: ignore[misc]
            )


def holds_model(path: Path) -> bool:
    """Whether an HDF5 file holds a whole model of Keras. Raises `RequestError` where h5py is not installed."""
    try:
        with hdf5.opened(path, path) as file:
            return "model_config" in file.attrs
    except CheckpointError:
        return False


def read_keras(path: Path, digest: str, size: int, weights: str | None) -> Checkpoint:
    """The weights of a file of Keras by torch's names, in torch's layouts, of which there is one state_dict."""
    if weights:
        raise CheckpointError(
            f"{path} is a file of Keras, which holds one model; found weights {weights!r} asked for. Leave it out."
        )
    file = KerasFile.read(path)
    if file.left and not file.layers:
        reasons = " ".join(f"{name} {reason}." for name, reason in file.left.items())
        raise CheckpointError(f"None of the recurrent layers of {path} can be compressed: {reasons}")
    return Checkpoint(path, digest, file.tensors(), size, left=dict(file.left))


# ---- what is in a file ----------------------------------------------------------------------------------------


def _weights_of(content: bytes, path: Path) -> bytes:
    """The HDF5 file: the bytes themselves, or what stands in the archive."""
    return _member(content, WEIGHTS, path) if content.startswith(b"PK") else content


def _member(content: bytes, name: str, path: Path) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.getinfo(name).file_size > _ZIP_EXPANDS * len(content):
                raise ValueError(f"{name} unpacks to more than it can hold")
            return archive.read(name)
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, NotImplementedError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path} is not a readable file of Keras ({first_line(error)}). It may be cut short; save or download it "
            f"again."
        ) from error


def _with_weights(content: bytes, weights: bytes) -> bytes:
    """The file with another HDF5 file in it."""
    if not content.startswith(b"PK"):
        return weights
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, weights if entry.filename == WEIGHTS else old.read(entry))
    return made.getvalue()


def _config_of(content: bytes, file: Any, path: Path) -> Any:
    """The configuration of the model; None where there are weights alone."""
    try:
        if content.startswith(b"PK"):
            return json.loads(_member(content, CONFIG, path))
        given = file.attrs.get("model_config")
        return None if given is None else json.loads(hdf5.text(given))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a configuration that is no JSON ({first_line(error)}). Save the model again with Keras."
        ) from error


def _array(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor; real ones in double precision, from which the file's own is taken."""
    own = tensor.detach().cpu()
    return (own.double() if own.is_floating_point() else own).numpy()


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in this machine's order of bytes."""
    return dtype.newbyteorder("=")


# ---- what torch makes of it -----------------------------------------------------------------------------------


def _layers(parts: Sequence[Part], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[KerasLayer], dict[str, str]]:
    """The recurrent layers that torch can stand in for; of the others the reason, by name."""
    owned: dict[str, list[Part]] = {}
    for part in parts:
        if part.is_recurrent:
            owned.setdefault(part.name, []).append(part)
    layers: list[KerasLayer] = []
    left: dict[str, str] = {}
    for name, own in owned.items():
        try:
            layers += _understood(name, own, shapes)
        except NotUnderstoodError as error:
            left[name] = str(error)
    return layers, left


def _understood(name: str, parts: list[Part], shapes: Mapping[str, tuple[int, ...]]) -> list[KerasLayer]:
    # HDF5 lists groups by name: backwards first.
    parts = sorted(parts, key=lambda part: part.direction == BACKWARD)
    made = [_direction(name, part, shapes) for part in parts]
    if len(made) == 1:
        return made
    if len(made) != 2 or {part.direction for part in parts} != {keras_parts.FORWARD, BACKWARD}:
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


def _direction(name: str, part: Part, shapes: Mapping[str, tuple[int, ...]]) -> KerasLayer:
    """A layer of one direction."""
    if part.why:
        raise NotUnderstoodError(part.why)
    own = [shapes[place] for place in part.places]
    kind = _kind_by_shape(own) if part.spec is None else part.spec.kind()
    layout = Layout.of(kind, own)
    resets = layout.recurrence.keeps_candidate_bias
    if resets and layout.biases == 1:
        raise NotUnderstoodError("resets its state before the matrix (reset_after=False), as torch's GRU does not")
    if resets and not layout.biases and part.spec is None:
        raise NotUnderstoodError("has no biases, and nothing tells whether it resets its state before the matrix")
    settings = RecurrentSettings(kind, own[0][0], own[1][0], bias=layout.biases > 0)
    return KerasLayer(name, settings, ((layout, part.places),), (part.spec,))


def _kind_by_shape(shapes: Sequence[tuple[int, ...]]) -> Kind:
    if len(shapes) < 2 or len(shapes[1]) != 2 or not shapes[1][0]:
        raise NotUnderstoodError(f"has weights of shapes {', '.join(map(str, shapes))}, which torch has not")
    gates = shapes[1][1] // shapes[1][0]
    if gates not in _KINDS:
        raise NotUnderstoodError(f"has {gates} gates, which no layer of torch has")
    return _KINDS[gates]


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
