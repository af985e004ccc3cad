"""`export --to onnx`: the whole model of a task, or the recurrent layers alone."""

from __future__ import annotations

from htcompress.directory.read import load, read_modules, read_state
from htcompress.errors import RequestError
from htcompress.exporting.assumed import told_apart, unknown_settings
from htcompress.exporting.export import Exported, Wish
from htcompress.files import replacing
from htcompress.observer import Observer
from htcompress.report import read_report
from htcompress.task import load_task


def export_as(wish: Wish, observer: Observer) -> Exported:
    """Write the ONNX files, tried in onnxruntime; see `htcompress.export`."""
    _check_onnx()
    from htcompress.exporting.layer import layer_model
    from htcompress.exporting.model import whole_model

    place, file = wish.place, wish.file

    if wish.task is not None:
        loaded = load_task(wish.task)
        loaded.require("model", "calibration", purpose="exporting the whole model")
        model = load(place, loaded.model(), strict=False)
        made, error, fixed = whole_model(model, loaded, observer, states=wish.states)
        with replacing(file) as partial:
            partial.write_bytes(made)
        return Exported((file,), error, fixed)
    modules = read_modules(place, read_state(place))
    modules = told_apart(modules, unknown_settings(wish.config, read_report(place)), wish.nonlinearity, place, observer)
    reordered = [layer.name or "(top level)" for layer in read_report(place).layers if layer.units_reordered]
    if reordered:
        observer.message(
            f"The hidden units of {', '.join(reordered)} stand in another order than in the original. Read their "
            f"outputs with the weights of this directory (export --to dense), or export the whole model with --task."
        )
    files, worst, models = [], 0.0, []
    for (name, *_), module in modules:
        observer.stage(f"exporting {name or 'the recurrent layer'}")
        made, error = layer_model(module, name, lengths=wish.lengths)
        models.append(made)
        files.append(file if len(modules) == 1 else file.with_name(f"{file.stem}.{name or 'recurrent'}{file.suffix}"))
        worst = max(worst, error)
    for path, made in zip(files, models, strict=True):
        with replacing(path) as partial:
            partial.write_bytes(made)
    return Exported(tuple(files), worst)


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"export --to onnx needs the package {error.name}, which is not installed: pip install 'htcompress[onnx]'."
        ) from error
