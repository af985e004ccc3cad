"""The user's task: the model, its data and its metric, from a Python file or module."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from htcompress.errors import HTCompressError, TaskError
from htcompress.isolation import user_code
from htcompress.task_files import is_beside, module_name, neighbours_of
from htcompress.values import call


@dataclass(frozen=True, eq=False)
class Task:
    """What a task file defines; see the documentation for what each name is needed for.

    Every call into the user's code that fails becomes a `TaskError` naming the function and the line.
    """

    source: str
    module: ModuleType
    folder: str = "."
    """What the task imports from, as a script does from its own."""

    def has(self, name: str) -> bool:
        """Whether the task defines a name; None stands for not."""
        return getattr(self.module, name, None) is not None

    def model(self) -> nn.Module:
        """A fresh dense model."""
        made = self._call("model")
        if not isinstance(made, nn.Module):
            raise TaskError(f"model() in {self.source} returned {type(made).__name__}; expected a torch.nn.Module.")
        return made

    def calibration(self) -> Iterator[Any]:
        """The model's inputs, batch by batch, as the task yields them (see `htcompress.data`)."""
        return self._iterate("calibration")

    def training(self) -> Iterator[Any]:
        """Pairs of inputs and target, or inputs alone; those of `calibration()` where there is no `training()`."""
        return self._iterate("training" if self.has("training") else "calibration")

    def unlabelled(self) -> Iterator[Any]:
        """Further inputs to fine-tune on, batch by batch, without targets."""
        return self._iterate("unlabelled")

    @property
    def can_train(self) -> bool:
        """Whether there is anything to fine-tune on."""
        return self.has("training") or self.has("calibration")

    @property
    def loss(self) -> Callable[[Any, Any], Tensor] | None:
        """The task's loss of output and target; None where it has none."""
        if not self.has("loss"):
            return None
        return lambda output, target: self._call("loss", output, target, gradients=True)

    @property
    def higher_is_better(self) -> bool | None:
        """What the headline metric means; None where the task does not say."""
        found = getattr(self.module, "higher_is_better", None)
        return None if found is None else bool(found)

    def evaluate(self, model: Callable[..., Any]) -> dict[str, float]:
        """The metrics of a model, or of one that runs from its own file; the first is the headline."""
        return metrics_of(self._call("evaluate", model), source=self.source)

    def require(self, *names: str, purpose: str) -> None:
        """Raise `TaskError` where a name is missing that a purpose needs."""
        for name in names:
            if not callable(getattr(self.module, name, None)):
                raise TaskError(
                    f"The task {self.source} lacks {name}(), which {purpose} needs. Define a function of that name; "
                    f"the documentation's page on tasks shows one."
                )

    def _call(self, name: str, *arguments: Any, gradients: bool = False) -> Any:
        self.require(name, purpose="this command")
        try:
            with importable(self.folder), user_code(gradients=gradients):
                return getattr(self.module, name)(*arguments)
        except TaskError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failed(name, error) from error

    def _iterate(self, name: str) -> Iterator[Any]:
        found = self._call(name)
        if not isinstance(found, Iterable):
            raise TaskError(
                f"{name}() in {self.source} returned {type(found).__name__}; expected batches. Yield them, or return a "
                f"list or a DataLoader."
            )
        ended = object()
        try:
            with importable(self.folder), user_code():
                items = iter(found)
            while True:
                with importable(self.folder), user_code():
                    item = next(items, ended)
                if item is ended:
                    return
                yield item
        except TaskError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failed(name, error) from error

    def _failed(self, name: str, error: BaseException) -> TaskError:
        return TaskError(
            f"{name}() in {self.source} raised {_said(error)}{_where(error, str(self.module.__file__))}. Correct the "
            f"task; --debug shows the traceback."
        )


def load_task(source: str | Path | Task, *, needs: Sequence[str] = ("model",)) -> Task:
    """Load a task from a file (`path/to/task.py`) or a module (`package.module`); a task that is one is given back.

    It is the user's own code and is run as such: what lies in its folder can be imported, then and later, as for a
    script.

    Args:
        needs: functions that it has to define; none beside a model that runs from its own file.

    Raises:
        TaskError: it is missing, does not import, or lacks one of these.
    """
    if isinstance(source, Task):
        return source
    task = Task(str(source), *imported(str(source), "task"))
    task.require(*needs, purpose="every command")
    return task


def imported(text: str, what: str) -> tuple[ModuleType, str]:
    """A module of the user's, from a file or by its name, and the folder that it imports from.

    Args:
        what: it is called in messages.

    Raises `TaskError` where it is missing or does not import.
    """
    path = Path(text)
    looks_like_file = path.suffix == ".py" or "/" in text or path.is_file()
    if looks_like_file and not path.is_file():
        raise TaskError(f"There is no {what} file {text}. Give a Python file ({what}.py) or a module (package.module).")
    try:
        module = _from_file(path) if looks_like_file else _from_module(text)
    except TaskError:
        raise
    except SyntaxError as error:
        line = "" if error.lineno is None else f" in line {error.lineno}"
        place = "" if error.filename is None or Path(error.filename).name == path.name else f" of {error.filename}"
        raise TaskError(
            f"The {what} {text} has a syntax error{line}{place}: {error.msg}. Correct it and try again."
        ) from error
    except (Exception, SystemExit) as error:
        where = _where(error, str(path.resolve()))
        if looks_like_file and isinstance(error, ImportError) and is_beside(error.name):
            folder = path.resolve().parent
            raise TaskError(
                f"The {what} {text} imports from its package by a dot{where}, and as a file it is in none. Give "
                f"{folder.name}.{path.stem} in its place, in the folder that holds {folder.name}/."
            ) from error
        raise TaskError(
            f"The {what} {text} failed while it was imported: {_said(error)}{where}. Correct it and try again."
        ) from error
    return module, str(path.resolve().parent) if looks_like_file else str(Path.cwd())


def metrics_of(result: Any, *, source: str) -> dict[str, float]:
    """The metrics that a result of `evaluate(model)` stands for. Raises `TaskError` where it is none."""
    try:
        found = dict(result.items()) if isinstance(result, Mapping) else {"metric": result}
        metrics = {str(name): _number(value) for name, value in found.items()}
    except Exception:  # an object of the user's, which may do anything
        metrics = {}
    if not metrics or None in metrics.values():
        raise TaskError(
            f"evaluate(model) in {source} returned {_shown(result)}; expected a float, or a dict of floats "
            f"whose first entry is the headline."
        )
    return {name: value for name, value in metrics.items() if value is not None}


def output_of(model: nn.Module, given: Sequence[Any], *, source: str) -> Any:
    """A model's output; what it raises becomes a `TaskError` that names the function the input came from."""
    try:
        return call(model, given)
    except HTCompressError:
        raise
    except Exception as error:
        values = [*given, *getattr(given, "named", {}).values()]
        shown = ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in values)
        raise TaskError(
            f"The model cannot take a batch of {source} ({shown}): {_said(error)}. A tuple is the model's positional "
            f"arguments, anything else its one argument; correct the task."
        ) from error


# ---- importing ----------------------------------------------------------------------------------------------


_neighbours: dict[str, dict[str, ModuleType]] = {}
"""By the folder of a task: the modules that it has imported from there."""


@contextmanager
def importable(folder: str) -> Iterator[None]:
    """While this lasts, what lies in a task's folder is imported before anything else; afterwards, after all else.

    Neighbours of two tasks may bear the same name: those of the other are put aside, and taken up with it again.
    """
    neighbours_of(folder)
    if list(_neighbours)[-1:] != [folder]:
        # Thousands of modules are asked once, for all folders.
        known = _lying_in(sys.modules, *_neighbours)
        for other, kept in _neighbours.items():
            found = {name: module for name, module in _lying_in(known, other).items() if name in sys.modules}
            kept |= {name: module for name, module in found.items() if name not in _lying_in(found, folder)}
            for name in found.keys() & kept.keys():
                del sys.modules[name]
        own = _neighbours.pop(folder, {})
        sys.modules.update({name: module for name, module in own.items() if name not in sys.modules})
        _neighbours[folder] = own
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _lying_in(modules: Mapping[str, ModuleType], *folders: str) -> dict[str, ModuleType]:
    """Those of some modules whose files are in one of some folders, and that are none of ours."""
    within = tuple(folder.rstrip(os.sep) + os.sep for folder in folders)
    found = {}
    for name, module in modules.items():
        file = getattr(module, "__file__", None)  # text is compared, no paths
        lies = isinstance(file, str) and file.startswith(within)
        if lies and not getattr(module, "__name__", "").startswith("htcompress"):
            found[name] = module
    return found


def _from_file(path: Path) -> ModuleType:
    if path.suffix != ".py" and spec_from_file_location("task", path) is None:
        raise TaskError(f"{path} is not a Python file. Give a Python file (task.py) or a module (package.module).")
    name = module_name(path)
    sys.modules.pop(name, None)  # it may have changed since
    with importable(str(path.resolve().parent)), user_code():
        return importlib.import_module(name)


def _from_module(name: str) -> ModuleType:
    try:
        with importable(str(Path.cwd())), user_code():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise TaskError(
                f"There is no module {name}. Give a Python file (task.py) or a module (package.module) that can be "
                f"imported from here."
            ) from error
        raise


def _number(value: Any) -> float | None:
    if isinstance(value, bool | str):
        return None
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except Exception:  # too large a number, a tensor without numbers, an object of the user's
        return None


def _shown(value: Any) -> str:
    try:
        return _shortened(repr(value))
    except Exception:
        return f"a {type(value).__name__}"


def _where(error: BaseException, file: str) -> str:
    own = Path(file).resolve()
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == own]
    return f" (line {lines[-1]})" if lines else ""


def _said(error: BaseException) -> str:
    text = _shortened(" ".join(str(error).split()).rstrip("."))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _shortened(text: str, most: int = 300) -> str:
    return text if len(text) <= most else text[:most] + " ..."
