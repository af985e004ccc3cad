"""`htcompress export`: an output directory in a form that needs no htcompress."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from htcompress.directory.read import load, read_config, read_modules, read_state
from htcompress.errors import RequestError
from htcompress.exporting.dense import dense_tensors
from htcompress.files import replacing
from htcompress.observer import Observer
from htcompress.report import read_report
from htcompress.task import load_task


class Destination(StrEnum):
    """Where to: the original class, or ONNX runtimes."""

    DENSE = "dense"
    ONNX = "onnx"


@dataclass(frozen=True)
class Exported:
    """The files that were written.

    Attributes:
        files: one, or one for each layer.
        error: the largest difference between torch and onnxruntime; None for dense.
        fixed: sizes of an ONNX model's inputs that are fixed though the model in torch takes others.
    """

    files: tuple[Path, ...]
    error: float | None = None
    fixed: tuple[str, ...] = ()


def export(
    directory: str | Path,
    out: str | Path,
    *,
    to: Destination | str,
    task: str | Path | None = None,
    lengths: bool = False,
    nonlinearity: str | None = None,
    observer: Observer | None = None,
) -> Exported:
    """Write an output directory in another form.

    `dense`: a state_dict with the matrices written out, which loads into the original class with `strict=True`; as
    safetensors where `out` ends so, else as `torch.save` writes it. `onnx`: with a task the whole model, without one
    each recurrent layer alone (`out` for one, `out` with the layer's name before the suffix for several). Batch and
    time are dynamic; the file holds the cores. It is run by onnxruntime on other batches and lengths than it was made
    with before it is written.

    Args:
        directory: as written by `htcompress convert`.
        out: the file.
        to: where to.
        task: the task whose `model()` the whole model is, and whose `calibration()` gives its inputs.
        lengths: whether layers alone read the lengths of padded sequences, in place of torch's packed ones.
        nonlinearity: `tanh` or `relu`: what an RNN alone computes, where the directory was made without the model and
            does not know.
        observer: is told the stages, and what had to be assumed.

    Raises:
        CheckpointError: the directory cannot be read.
        RequestError: the file cannot be written, a package is missing, ONNX cannot express the model, or nobody has
            said what an RNN computes.
        TaskError: the task lacks model() or calibration().
    """
    observer, place, file = observer or Observer(), Path(directory), Path(out)
    config = read_config(place)
    _check_file(file)
    if lengths and (task is not None or Destination(to) is Destination.DENSE):
        raise RequestError("--lengths is an input of recurrent layers alone: --to onnx without --task.")
    if nonlinearity is not None and (task is not None or Destination(to) is Destination.DENSE):
        raise RequestError(
            "--nonlinearity is for recurrent layers alone: --to onnx without --task; the model knows its own."
        )
    if Destination(to) is Destination.DENSE:
        observer.stage("writing out the matrices")
        _save(dense_tensors(place), file)
        return Exported((file,))
    _check_onnx()
    from htcompress.exporting.assumed import told_apart, unknown_settings
    from htcompress.exporting.layer import layer_model
    from htcompress.exporting.model import whole_model

    if task is not None:
        loaded = load_task(task)
        loaded.require("model", "calibration", purpose="exporting the whole model")
        model = load(place, loaded.model(), strict=False)
        made, error, fixed = whole_model(model, loaded, observer)
        with replacing(file) as partial:
            partial.write_bytes(made)
        return Exported((file,), error, fixed)
    modules = read_modules(place, read_state(place))
    modules = told_apart(modules, unknown_settings(config, read_report(place)), nonlinearity, place, observer)
    reordered = [layer.name or "(top level)" for layer in read_report(place).layers if layer.units_reordered]
    if reordered:
        observer.message(
            f"The hidden units of {', '.join(reordered)} stand in another order than in the original. Read their "
            f"outputs with the weights of this directory (export --to dense), or export the whole model with --task."
        )
    files, worst, models = [], 0.0, []
    for (name, *_), module in modules:
        observer.stage(f"exporting {name or 'the recurrent layer'}")
        made, error = layer_model(module, name, lengths=lengths)
        models.append(made)
        files.append(file if len(modules) == 1 else file.with_name(f"{file.stem}.{name or 'recurrent'}{file.suffix}"))
        worst = max(worst, error)
    for path, made in zip(files, models, strict=True):
        with replacing(path) as partial:
            partial.write_bytes(made)
    return Exported(tuple(files), worst)


def _check_file(file: Path) -> None:
    if file.is_dir():
        raise RequestError(f"{file} is a directory; export writes a file, such as {file / 'model.pt'}.")
    if not file.parent.is_dir():
        raise RequestError(f"There is no folder {file.parent} to write {file.name} to; make it first.")
    if not os.access(file.parent, os.W_OK):
        raise RequestError(f"The folder {file.parent} cannot be written to; give another place for {file.name}.")


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"export --to onnx needs the package {error.name}, which is not installed: pip install 'htcompress[onnx]'."
        ) from error


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    with replacing(file) as partial:
        if file.suffix == ".safetensors":
            from safetensors.torch import save_file

            whole = {name: t.contiguous() for name, t in tensors.items()}
            _written(lambda: save_file(whole, partial, metadata={"format": "pt"}))
        else:
            _written(lambda: torch.save(dict(tensors), partial))


def _written(write: Callable[[], None]) -> None:
    """Let a library write a file of tensors; that it fails is an `OSError`, whatever the library says instead."""
    from safetensors import SafetensorError

    try:
        write()
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error).splitlines()[0]) from error
