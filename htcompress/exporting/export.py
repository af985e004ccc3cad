"""`htcompress export`: an output directory in a form that needs no htcompress."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any

from htcompress.directory.read import read_config
from htcompress.errors import RequestError
from htcompress.observer import Observer
from htcompress.task import Task


class Destination(StrEnum):
    """Where to: the original class, ONNX runtimes, C99, or the file of Keras that it came from."""

    DENSE = "dense"
    ONNX = "onnx"
    C = "c"
    KERAS = "keras"


@dataclass(frozen=True)
class Exported:
    """The files that were written.

    Attributes:
        files: one, or one for each layer.
        error: the largest difference between torch and onnxruntime; None for dense.
        fixed: sizes of an ONNX model's inputs that are fixed though the model in torch takes others.
        notes: what else there is to say of them.
    """

    files: tuple[Path, ...]
    error: float | None = None
    fixed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wish:
    """An export as it was asked for: the directory and its `config.json`, the file, and the options of `export`."""

    place: Path
    file: Path
    task: str | Path | Task | None
    lengths: bool
    nonlinearity: str | None
    config: dict[str, Any]
    original: Path | None = None
    states: bool = False


EXPORTERS = {
    Destination.DENSE: "htcompress.exporting.to_dense",
    Destination.ONNX: "htcompress.exporting.to_onnx",
    Destination.C: "htcompress.exporting.to_c",
    Destination.KERAS: "htcompress.exporting.to_keras",
}
"""All exports: modules with `export_as(wish, observer)`, imported when they are asked for."""


def export(
    directory: str | Path,
    out: str | Path,
    *,
    to: Destination | str,
    task: str | Path | Task | None = None,
    lengths: bool = False,
    states: bool = False,
    nonlinearity: str | None = None,
    original: str | Path | None = None,
    observer: Observer | None = None,
) -> Exported:
    """Write an output directory in another form.

    `dense`: a state_dict with the matrices written out, which loads into the original class with `strict=True`; as
    safetensors where `out` ends so, else as `torch.save` writes it. `onnx`: with a task the whole model, without one
    each recurrent layer alone (`out` for one, `out` with the layer's name before the suffix for several). Batch and
    time are dynamic; the file holds the cores. It is run by onnxruntime on other batches and lengths than it was made
    with before it is written. `c`: a folder with a header, C99 source and a program that tests it, for each stack of
    recurrent layers. `keras`: the file of Keras that the directory was made from, with the
    weights of the directory written out in the place of its own.

    Args:
        directory: as written by `htcompress convert`.
        out: the file.
        to: where to.
        task: the task whose `model()` the whole model is, and whose `calibration()` gives its inputs.
        lengths: whether layers alone read the lengths of padded sequences, in place of torch's packed ones.
        states: whether the states of a whole model's layers are inputs and outputs of the graph, for calls in a row;
            else every call begins with zeros.
        nonlinearity: `tanh` or `relu`: what an RNN alone computes, where the directory was made without the model and
            does not know.
        original: for `keras`, the file that the directory was made from, where it is no longer where it was.
        observer: is told the stages, and what had to be assumed.

    Raises:
        CheckpointError: the directory cannot be read.
        RequestError: the file cannot be written, a package is missing, ONNX cannot express the model, or nobody has
            said what an RNN computes.
        TaskError: the task lacks model() or calibration().
    """
    observer, place, file = observer or Observer(), Path(directory), Path(out)
    config = read_config(place)
    _check_file(file, folder=Destination(to) is Destination.C)
    if lengths and (task is not None or Destination(to) is not Destination.ONNX):
        raise RequestError("--lengths is an input of recurrent layers alone: --to onnx without --task.")
    if states and (task is None or Destination(to) is not Destination.ONNX):
        raise RequestError(
            "--states is for whole models: --to onnx with --task; layers alone have their states anyway."
        )
    if original is not None and Destination(to) is not Destination.KERAS:
        raise RequestError("--original is for --to keras; leave it out.")
    written_out = (Destination.DENSE, Destination.KERAS)
    if nonlinearity is not None and (task is not None or Destination(to) in written_out):
        raise RequestError(
            "--nonlinearity is for recurrent layers alone: --to onnx without --task; the model knows its own."
        )
    given = None if original is None else Path(original)
    exporter = import_module(EXPORTERS[Destination(to)])
    made: Exported = exporter.export_as(Wish(place, file, task, lengths, nonlinearity, config, given, states), observer)
    return made


def _check_file(file: Path, *, folder: bool) -> None:
    if folder and file.is_file():
        raise RequestError(f"{file} is a file; --to c writes a folder.")
    if file.is_dir() and not folder:
        raise RequestError(f"{file} is a directory; export writes a file, such as {file / 'model.pt'}.")
    if not file.parent.is_dir():
        raise RequestError(f"There is no folder {file.parent} to write {file.name} to; make it first.")
    if not os.access(file.parent, os.W_OK):
        raise RequestError(f"The folder {file.parent} cannot be written to; give another place for {file.name}.")
