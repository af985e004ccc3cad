"""`export --to keras`: the file that a directory was made from, with the directory's weights in it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from htcompress.errors import CheckpointError, RequestError
from htcompress.exporting.dense import dense_tensors
from htcompress.exporting.export import Exported, Wish
from htcompress.files import replacing
from htcompress.model.names import listed, renamed
from htcompress.observer import Observer
from htcompress.report import Report, read_report
from htcompress.sources.keras_file import KERAS, KerasFile
from htcompress.sources.read import identified
from htcompress.sources.recognise import Container


def export_as(wish: Wish, observer: Observer) -> Exported:
    """Write the file; see `htcompress.export`."""
    if wish.task is not None:
        raise RequestError("--to keras needs the original file and no task; leave out --task.")
    observer.stage("writing out the matrices")
    report = read_report(wish.place)
    file = KerasFile.read(_original(wish, report), adapts=report.source.get("format") == KERAS)
    if not wish.file.name.endswith(file.endings):
        raise RequestError(
            f"{wish.file} is to be a file like {file.path.name}, and Keras tells them by their names: give one that "
            f"ends in {' or '.join(file.endings)}."
        )
    tensors = dense_tensors(wish.place)
    places = _places(file, tensors, report)
    made, done = file.with_tensors({place: tensors[name] for name, place in places.items()})
    lacking = [
        layer for layer in wish.config["layers"] if not any(_owned(n, layer) and p in done for n, p in places.items())
    ]
    if lacking:
        raise CheckpointError(
            f"{file.path} has no place for the layers {listed(lacking)} of {wish.place}. Give the file that the "
            f"directory was made from with --original."
        )
    unknown = [name for name, place in places.items() if place not in done]
    notes = [f"not in the file, so left out: {listed(unknown)}"] if unknown else []
    with replacing(wish.file) as partial:
        partial.write_bytes(made.content)
    return Exported((wish.file,), notes=tuple(notes))


def _original(wish: Wish, report: Report) -> Path:
    """The file that the directory was made from, as its digest says."""
    told = report.source.get("path")
    place = wish.original or (None if told is None else wish.place / told)
    name = report.source["file"]
    if place is None or not place.is_file():
        raise RequestError(f"The file {name} that {wish.place} was made from is not found. Give it with --original.")
    what, digest, _ = identified(place)
    if what not in (Container.KERAS, Container.HDF5):
        raise RequestError(f"{place} is no file of Keras, so there is none to write its weights back into.")
    if digest != report.source["sha256"]:
        raise CheckpointError(
            f"{place} is not the file {name} that {wish.place} was made from: its sha256 is {digest}, expected "
            f"{report.source['sha256']}. Give that with --original."
        )
    return place


def _places(file: KerasFile, names: Collection[str], report: Report) -> dict[str, str]:
    """The names of a directory's tensors, and what they are called in the file."""
    if report.source.get("format") == KERAS:
        flat = file.flat()
        return {
            name: f"{flat[layer].name}.{key}" if layer in flat else name
            for name in names
            for layer, _, key in [name.rpartition(".")]
        }
    # The task's model may have put something before all names.
    return {name: place for place, name in renamed({name: name for name in names}, file.names()).items()}


def _owned(name: str, layer: str) -> bool:
    return name.startswith(f"{layer}.") if layer else "." not in name
