"""The formats of models that run from their own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from htcompress.errors import CheckpointError, RequestError
from htcompress.graphs.file import ONNX_FILE, OnnxFile
from htcompress.graphs.graph import Graph
from htcompress.graphs.keras_graph import KERAS_FILES, KerasGraph
from htcompress.sources.keras_file import holds_model
from htcompress.sources.recognise import Container, Foreign, recognise

GRAPHS: Mapping[Container, Callable[[Path], Graph]] = {
    Container.ONNX: OnnxFile.read,
    Container.KERAS: KerasGraph.read,
    Container.HDF5: KerasGraph.read,
}
"""What reads them."""

FILES = (ONNX_FILE, *KERAS_FILES)
"""What they are called in output directories."""


def container_of(path: str | Path) -> Container | None:
    """Of which of these formats a file is, by what is in it; None where of none, or where it holds weights alone."""
    place = Path(path)
    try:
        found = recognise(place, place.stat().st_size) if place.is_file() else None
    except OSError:
        return None
    if found is None or isinstance(found, Foreign) or found not in GRAPHS:
        return None
    return None if found is Container.HDF5 and not holds_model(place) else found


def refuse_names(path: str | Path, names: Mapping[str, str] | None) -> None:
    """Raise `RequestError` where names are given for a graph, whose layers are found by its nodes."""
    if names:
        raise RequestError(f"--names is for files of weights; the layers of {path} bear names already. Leave it out.")


def graph_in(directory: str | Path) -> Path | None:
    """The model in an output directory that runs from its own file; None where there is none."""
    places = (Path(directory) / name for name in FILES)
    return next((place for place in places if container_of(place) is not None), None)


def read_graph(path: Path) -> Graph:
    """The model in a file. Raises `CheckpointError` where it is of no format that runs."""
    container = container_of(path)
    if container is None:
        raise CheckpointError(f"{path} is no model that runs from its file: give an ONNX file or one of Keras.")
    return GRAPHS[container](path)
