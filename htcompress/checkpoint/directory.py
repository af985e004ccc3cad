"""The output directory: written whole or not at all, read back into a model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from htcompress.errors import CheckpointError, RequestError
from htcompress.nn.recurrent import HTRecurrent, module_class
from htcompress.nn.replace import recurrent_modules, replace_modules
from htcompress.nn.settings import RecurrentSettings
from htcompress.report import Report, model_card, to_html, to_markdown

FORMAT = "htcompress.model/1"
_STRUCTURE = ("kind", "input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size", "cell")


def config_of(modules: Mapping[str, HTRecurrent]) -> dict[str, Any]:
    """The contents of `config.json`: each layer's settings and the structure of its weights."""
    layers = {
        name: {"settings": module.settings.to_config(), "weights": module.to_config()}
        for name, module in modules.items()
    }
    return {"format": FORMAT, "layers": layers}


def check_writable(directory: Path) -> None:
    """Raise `RequestError` where an output directory could not be written, before any work is done."""
    if directory.exists() and not directory.is_dir():
        raise RequestError(f"The output {directory} is a file; give a directory with -o.")
    if directory.is_dir() and any(directory.iterdir()) and not _is_ours(directory):
        raise RequestError(
            f"The output directory {directory} exists and is not one of htcompress, so it is left as it is. Give "
            f"another with -o."
        )
    parent = _existing_parent(directory)
    if not parent.is_dir():
        raise RequestError(f"{parent} is a file, so the output {directory} cannot be in it; give a directory with -o.")
    if not os.access(parent, os.W_OK):
        raise RequestError(f"The folder {parent} cannot be written to; give another output directory with -o.")


def write_directory(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], report: Report) -> None:
    """Write an output directory: beside its place first, then renamed.

    An older one of ours is replaced; what its owner has put beside our files stays.
    """
    check_writable(directory)
    directory = directory.resolve()
    with _signals_deferred():
        _write(directory, tensors, config, report)


def _write(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], report: Report) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    made = _missing_parents(directory)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    moved: list[str] = []
    done = False
    try:
        partial.mkdir(parents=True)
        # safetensors refuses views and shared memory.
        whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(whole, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "model.safetensors").chmod(0o666 & ~_umask())
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (partial / "report.json").write_text(report.to_json(), encoding="utf-8")
        (partial / "report.html").write_text(to_html(report), encoding="utf-8")
        (partial / "report.md").write_text(to_markdown(report), encoding="utf-8")
        (partial / "README.md").write_text(model_card(report), encoding="utf-8")
        if directory.exists():
            directory.rename(old)
            for other in list(old.iterdir()):
                if not (partial / other.name).exists():
                    other.rename(partial / other.name)
                    moved.append(other.name)
        partial.rename(directory)
        done = True
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(
            f"The output directory {directory} cannot be written: {reason}. Make room, or give another with -o."
        ) from error
    finally:
        if old.exists() and not directory.exists():
            for name in moved:
                (partial / name).rename(old / name)
            old.rename(directory)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        if not done:
            for parent in made:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()


def _umask() -> int:
    """The process's umask; safetensors ignores it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the directory stands, then deliver them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {s: signal.signal(s, lambda number, _: arrived.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of an output directory. Raises `CheckpointError` where there is none."""
    path = directory / "config.json"
    if not directory.exists():
        raise CheckpointError(f"There is no directory {directory}. Give one that htcompress convert has written.")
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not an output directory of htcompress: it has no config.json. Give one that htcompress "
            f"convert has written."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid: {error}. Convert the model again.") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has the format {found!r}; this version reads {FORMAT!r}. Convert the model again."
        )
    return dict(config)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an output directory by name. Raises `CheckpointError` where they cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / "model.safetensors"
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Convert the model again.") from error


def read_modules(directory: Path, tensors: Mapping[str, Tensor]) -> list[tuple[list[str], HTRecurrent]]:
    """The compressed layers of an output directory without the model around them, and the names of each.

    A layer that the model holds under several names stands once.

    Args:
        directory: as written by `htcompress convert`.
        tensors: its tensors, see `read_tensors`.

    Raises `CheckpointError` where `config.json` and the tensors do not fit each other.
    """
    config = read_config(directory)
    found = []
    for name, layer in config["layers"].items():
        try:
            settings = RecurrentSettings.from_config(layer["settings"])
            module = module_class(settings).from_config(settings, layer["weights"])
            own = _under(name, module, tensors)
            if own is None:
                raise ValueError("tensors are missing or have other shapes")
            module.to(next(iter(own.values())).dtype).load_state_dict(own)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{directory / 'config.json'} does not fit model.safetensors at layer {name!r} "
                f"({type(error).__name__}: {error}). Convert the model again."
            ) from error
        last = next(reversed(own))
        others = [
            key.removesuffix(last).removesuffix(".") for key in tensors if key == last or key.endswith("." + last)
        ]
        tied = [n for n in others if n not in config["layers"] and _under(n, module, tensors) is not None]
        found.append(([name, *tied], module.eval()))
    return found


def _under(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of a module under a name; None where they are not all there or have other shapes."""
    prefix = f"{name}." if name else ""
    found: dict[str, Tensor] = {}
    for key, like in module.state_dict().items():
        tensor = tensors.get(prefix + key)
        if tensor is None or tensor.shape != like.shape:
            return None
        found[key] = tensor
    return found


def load(directory: str | Path, model: nn.Module, *, strict: bool = True) -> nn.Module:
    """Load an output directory into a dense model: a copy with its recurrent modules replaced.

    What a state_dict cannot tell (`batch_first`, `dropout`, the nonlinearity of an RNN) is taken from the
    instance, and so are its mode, device and dtype.

    >>> import htcompress
    >>> compact = htcompress.load("out", OriginalModel())  # doctest: +SKIP

    Args:
        directory: as written by `htcompress convert` or `htcompress.save`.
        model: an instance of the original class; it is not changed.
        strict: whether tensors that the model does not know are an error; else they are left out.

    Raises:
        CheckpointError: the directory is not one of htcompress, or does not fit the model.
    """
    directory = Path(directory)
    config = read_config(directory)
    try:
        built = _modules(config, recurrent_modules(model), directory)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{directory / 'config.json'} is damaged ({type(error).__name__}: {error}). Convert the model again."
        ) from error
    compact = replace_modules(model, built)
    tensors = read_tensors(directory)
    problems = []
    for name, own in compact.state_dict().items():
        if name not in tensors:
            problems.append(f"lacks {name}")
        elif own.shape != tensors[name].shape:
            problems.append(f"has {name} of shape {tuple(tensors[name].shape)}, the model {tuple(own.shape)}")
    if strict:
        problems += [f"has {name}, unknown to the model" for name in tensors if name not in compact.state_dict()]
    if problems:
        raise CheckpointError(
            f"{directory / 'model.safetensors'} does not fit the model: it {'; it '.join(problems[:4])}. Give an "
            f"instance of the class that the checkpoint was trained with."
        )
    compact.load_state_dict(tensors, strict=False)
    return compact


def _modules(config: Mapping[str, Any], dense: Mapping[str, nn.Module], directory: Path) -> dict[str, nn.Module]:
    """The compressed modules that a `config.json` describes, still zero, like the model's in all else."""
    built: dict[str, nn.Module] = {}
    for name, layer in config["layers"].items():
        saved = RecurrentSettings.from_config(layer["settings"])
        if name not in dense:
            raise CheckpointError(
                f"{directory} has a compressed layer {name!r}; the model has {', '.join(map(repr, dense)) or 'none'}. "
                f"Give an instance of the class that the checkpoint was trained with."
            )
        here = RecurrentSettings.of(dense[name])
        wrong = [f for f in _STRUCTURE if not _same(f, getattr(saved, f), getattr(here, f))]
        if wrong:
            shown = ", ".join(f"{f}: {getattr(saved, f)} in the directory, {getattr(here, f)} here" for f in wrong)
            raise CheckpointError(
                f"Layer {name!r} of {directory} does not fit the model: {shown}. Give an instance of the class that "
                f"the checkpoint was trained with."
            )
        module = module_class(here).from_config(here, layer["weights"])
        built[name] = module.to(next(dense[name].parameters())).train(dense[name].training)
    return built


def _same(field: str, saved: Any, here: Any) -> bool:
    # A state_dict does not tell tanh from relu: the instance does.
    return bool(saved == here or (field == "kind" and {str(saved), str(here)} == {"rnn_tanh", "rnn_relu"}))


def _is_ours(directory: Path) -> bool:
    try:
        read_config(directory)
    except CheckpointError:
        return False
    return True


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _missing_parents(path: Path) -> list[Path]:
    """The parents that have to be made, the deepest first."""
    return [parent for parent in path.parents if not parent.exists()]
