"""Files of Keras: whole models (.h5, .keras) and weights alone, read and written with h5py."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from htcompress.errors import CheckpointError
from htcompress.sources import hdf5, keras_parts
from htcompress.sources.checkpoint import Checkpoint, checked_name, first_line
from htcompress.sources.keras_config import Spec
from htcompress.sources.keras_layers import KerasLayer, Other, Reading, layers_of, others_of, tensors_of

KERAS = "keras"
"""What reports call the format."""

WEIGHTS, CONFIG = "model.weights.h5", "config.json"
"""What stands in a `.keras` file, which is a zip archive."""

METADATA = "metadata.json"
_THREE, _SIGMOIDS = (3, 0), (2, 3)
"""The versions from which on hard sigmoids are flatter, and gates have sigmoids unless they are told otherwise."""

_UNSAID = (1, 0)
"""The version of a file that does not say it: of those which did not."""

_ZIP_EXPANDS = 1100


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
        listed: whether it is of the older format, a list of arrays for each layer.
        version: of the Keras that has written it, as far as it says so.
    """

    path: Path
    content: bytes
    config: Any = None
    layers: tuple[KerasLayer, ...] = ()
    others: tuple[Other, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    listed: bool = False
    version: tuple[int, int] = _UNSAID

    @property
    def older(self) -> bool:
        """Whether it was written by Keras before version 3."""
        return self.version < _THREE

    @classmethod
    def read(cls, path: Path, *, adapts: bool = True) -> KerasFile:
        """Read a file and find its layers.

        Args:
            adapts: whether layers count that torch has no module for, see `Reading`; weights alone have none such.

        Raises:
            CheckpointError: it is damaged, not of Keras, or leads to other files.
            RequestError: h5py is not installed.
        """
        return cls.of(path, path.read_bytes(), adapts=adapts)

    @classmethod
    def of(cls, path: Path, content: bytes, *, adapts: bool = True) -> KerasFile:
        """As `read`, of bytes."""
        inner = _weights_of(content, path)
        with hdf5.opened(inner, path) as file:
            arrays = hdf5.datasets(file, len(inner), path)
            config = _config_of(content, file, path)
            version = _version_of(content, file, path)
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
        layers, left = layers_of(parts, shapes, Reading(version < _THREE, adapts and config is not None))
        others = others_of(parts, shapes, layers)
        for name in (*left, *(layer.name for layer in layers), *(other.name for other in others)):
            checked_name(name, path)
        return cls(path, content, config, tuple(layers), tuple(others), left, lists, version)

    @property
    def runs(self) -> bool:
        """Whether the file holds the model beside its weights."""
        return self.config is not None

    @property
    def suffix(self) -> str:
        """How such a file is called."""
        if self.content.startswith(b"PK"):
            return ".keras"
        return ".h5" if self.listed else ".weights.h5"

    @property
    def endings(self) -> tuple[str, ...]:
        """How the names of such files may end for Keras to know them."""
        return (".h5", ".hdf5") if self.listed else (self.suffix,)

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

    def checkpoint(self) -> Checkpoint:
        """The weights by torch's names, the layers that torch has no module for among them."""
        digest = hashlib.sha256(self.content).hexdigest()
        return Checkpoint(self.path, digest, self.tensors(), len(self.content), left=dict(self.left))

    def names(self) -> list[str]:
        """The names of all tensors."""
        return [*(name for layer in self.layers for name in layer.names()), *(other.name for other in self.others)]

    def tensors(self) -> dict[str, Tensor]:
        """All weights by torch's names, in torch's layouts."""
        with hdf5.opened(_weights_of(self.content, self.path), self.path) as file:
            return tensors_of(self.layers, self.others, lambda place: file[place][()])

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
    file = KerasFile.read(path, adapts=False)
    left = dict(file.left)
    if left and file.runs:
        known = KerasFile.of(path, file.content).left
        left |= {
            name: f"{reason}; without --task it is compressed" for name, reason in left.items() if name not in known
        }
    if left and not file.layers:
        reasons = " ".join(f"{name} {reason}." for name, reason in left.items())
        raise CheckpointError(f"None of the recurrent layers of {path} can be compressed: {reasons}")
    note = ""
    if not file.runs and _UNSAID < file.version < _SIGMOIDS and any(x.settings.gates > 1 for x in file.layers):
        version = ".".join(map(str, file.version))
        note = (
            f"{path.name} is of Keras {version}, whose gates had hard sigmoids unless they were told otherwise. "
            f"Weights alone do not say: they are read as those of torch's layers, with sigmoids. The "
            f"whole model (model.save) tells, and runs by itself with --calibration."
        )
    return Checkpoint(path, digest, file.tensors(), size, left=left, note=note)


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
    return with_member(content, WEIGHTS, weights) if content.startswith(b"PK") else weights


def with_member(content: bytes, name: str, value: bytes) -> bytes:
    """An archive with another file in the place of one."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, value if entry.filename == name else old.read(entry))
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


def _version_of(content: bytes, file: Any, path: Path) -> tuple[int, int]:
    """The version of Keras that has written a file."""
    zipped = content.startswith(b"PK")
    if zipped:
        try:
            said = json.loads(_member(content, METADATA, path)).get("keras_version")
        except (CheckpointError, ValueError, AttributeError, RecursionError):
            return _THREE
    else:
        group = file.get("model_weights", file)
        said = next((hdf5.text(at["keras_version"]) for at in (file.attrs, group.attrs) if "keras_version" in at), "")
    found = re.match(r"(\d{1,4})\.(\d{1,4})", str(said))
    if found is None:
        return _THREE if zipped else _UNSAID
    return int(found[1]), int(found[2])


def _array(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor; real ones in double precision, from which the file's own is taken."""
    own = tensor.detach().cpu()
    return (own.double() if own.is_floating_point() else own).numpy()
