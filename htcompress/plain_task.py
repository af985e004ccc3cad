"""A task without a task file: a class that constructs plainly, and arrays of an `.npz` file as its data."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from htcompress.construction import Constructed
from htcompress.data import to_device
from htcompress.errors import CheckpointError, RequestError, TaskError
from htcompress.graphs.calibration import METRICS, Calibration
from htcompress.graphs.feeds import BATCH, read_arrays
from htcompress.graphs.measuring import ERROR, apart
from htcompress.isolation import user_code
from htcompress.observer import Observer
from htcompress.opening import dense_model
from htcompress.report import read_report
from htcompress.request import Request
from htcompress.side_by_side import cached_property
from htcompress.sources.read import read_checkpoint
from htcompress.task import Task, importable, imported, output_of
from htcompress.values import Arguments, tensors_of

Dense = Callable[[Task], nn.Module]
"""Gives the dense model of a task, with its weights."""

_EVALUATED = 4
"""The part of the samples that is kept apart for `evaluate()`: one in so many, the last ones."""

_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": lambda output, target: functional.nll_loss(_log_probabilities(output), target.flatten().long()),
    "mse": lambda output, target: functional.mse_loss(output, target.to(output.dtype)),
    "mae": lambda output, target: functional.l1_loss(output, target.to(output.dtype)),
}
"""What is minimised for each of `METRICS`."""


def task_for_checkpoint(asked: Constructed, checkpoint: str | Path, request: Request, observer: Observer) -> Task:
    """The task of a checkpoint of weights; without targets its own outputs are what is measured against.

    Raises as `made_task`.
    """

    def dense(task: Task) -> nn.Module:
        return dense_model(task, read_checkpoint(checkpoint, weights=request.weights, names=request.names), Observer())

    return made_task(asked, dense, observer)


def task_for_directory(
    asked: Constructed, directory: str | Path, observer: Observer, *, teacher: str | Path | None = None
) -> Task:
    """The task of an output directory; without targets the dense checkpoint's outputs are measured against.

    Args:
        teacher: the dense checkpoint; None: the one whose path the report keeps.

    Raises as `made_task`.
    """
    place = Path(directory)
    report = read_report(place)
    request = Request.of_report(report.request, seed=report.seed)

    def dense(task: Task) -> nn.Module:
        path = report.source.get("path")
        found = Path(teacher) if teacher is not None else None if path is None else place / path
        if found is None or not found.exists():
            raise CheckpointError(
                f"The dense checkpoint {report.source['file']} that {place} was made from is not found, and there are "
                f"no targets to measure against. Give --targets NAME, an array of {asked.calibration}."
            )
        read = read_checkpoint(found, weights=request.weights, names=request.names)
        if teacher is None and read.sha256 != report.source["sha256"]:
            raise CheckpointError(
                f"{found} is no longer the checkpoint that {place} was made from. Give --targets NAME to measure "
                f"against, an array of {asked.calibration}."
            )
        return dense_model(task, read, Observer())

    return made_task(asked, dense, observer)


def made_task(asked: Constructed, dense: Dense | None, observer: Observer) -> Task:
    """The task that options describe: `model()` constructs the class, and the arrays are all its data.

    Args:
        dense: gives the model whose outputs are measured against where there are no targets; None: there is none.

    Raises:
        RequestError: the options make no sense.
        TaskError: the class is not found or does not construct, or the arrays do not fit what it takes.
    """
    given = Calibration(None if asked.calibration is None else Path(asked.calibration), asked.targets, asked.metric)
    given.check()
    make, module, folder = _maker(asked)
    # As code of the user's that is run: a line of it that fails is told by its file.
    described = ModuleType("htcompress_plain_task")
    described.__file__ = str(getattr(module, "__file__", asked.name))
    task = Task(f"--model {asked.name}", described, folder)
    described.model = make  # type: ignore[attr-defined]
    with importable(folder), user_code():
        model = make().eval()
    if given.file is None:
        return task
    samples = Samples.read(given, model)
    whole, kept = samples, samples.part(samples.count - samples.count // _EVALUATED, samples.count)
    if kept.count == 0:
        observer.message(f"{given.file} has {samples.count} samples: what is measured is measured on all of them.")
        kept = whole
    else:
        samples = samples.part(0, samples.count - kept.count)
    measure = Measure(task, kept, given, dense)
    higher = METRICS[given.headline][1] if samples.targets is not None else False
    defined: dict[str, Any] = {"calibration": samples.inputs, "evaluate": measure, "higher_is_better": higher}
    if samples.targets is not None:
        defined |= {"training": samples.pairs, "loss": lambda o, t: _LOSSES[given.headline](*_aligned(o, t, given))}
    for name, value in defined.items():
        setattr(described, name, value)
    _check_samples_first(model, samples, given)
    return task


# ---- the model -------------------------------------------------------------------------------------------------


def _maker(asked: Constructed) -> tuple[Callable[[], nn.Module], ModuleType, str]:
    """What constructs the model, the module it is from, and the folder that this imports from."""
    source, _, path = asked.name.rpartition(":")
    if not source or not path:
        raise RequestError(f"--model is a class in a module, package.module:Class; found {asked.name!r}.")
    module, folder = imported(source, "module")
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, nn.Module)]
        raise TaskError(f"{source} has no class {path}; it has {', '.join(own) or 'no models'}. Correct --model.")

    def make() -> nn.Module:
        try:
            model = found(**asked.arguments)
        except Exception as error:
            said = " ".join(str(error).split())
            raise TaskError(
                f"{path} of --model is not constructed by {json.dumps(dict(asked.arguments))}: "
                f"{type(error).__name__}: {said:.300}. It takes {_signature(found)}; give those by "
                f"--model-arguments '{{...}}', or write a task where it takes more than JSON has."
            ) from error
        if not isinstance(model, nn.Module):
            raise TaskError(f"{path} of --model made a {type(model).__name__}; expected a torch.nn.Module.")
        return model

    return make, module, folder


def _signature(function: Any) -> str:
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):  # of C, or of a class with a metaclass of its own
        return "arguments that it does not tell"


# ---- its data --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs of a model, sample by sample, and what their outputs are to be.

    Attributes:
        arrays: by the names of forward's parameters, samples first.
        constants: single numbers, the same in every call.
        order: the names of those that are given by position; None where all are given by name.
        targets: samples first; None where there are none.
    """

    arrays: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    order: tuple[str, ...] | None
    targets: Tensor | None

    @classmethod
    def read(cls, given: Calibration, model: nn.Module) -> Samples:
        """The arrays of a file for a model: real numbers in its precision, whole ones as int64.

        Raises `TaskError` where they do not fit the parameters of its `forward`.
        """
        if given.file is None:
            raise ValueError("There is no file of data.")
        signature = inspect.signature(model.forward)
        parameters = signature.parameters
        positional = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = [n for n in positional if parameters[n].default is inspect.Parameter.empty]
        any_more = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
        wanted = f"forward{signature}"
        found, targets = read_arrays(given.file, given.targets, wanted, needed[0] if needed else "x")
        known = [*positional, *(n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY)]
        named = [n for n in found if n in known]
        in_order = not named and len(needed) <= len(found) and (any_more or len(found) <= len(positional))
        if not in_order and (len(named) < len(found) or any(n not in found for n in needed)):
            raise TaskError(
                f"{given.file} holds {', '.join(found) or 'nothing'}; the model is called as {wanted}. Name the arrays "
                f"as its parameters, or give them in their order under other names; --targets NAME names what is no "
                f"input."
            )
        real = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        constants = {name: array.item() for name, array in found.items() if array.ndim == 0}
        arrays = {name: _tensor(array, real) for name, array in found.items() if array.ndim}
        wanted_of = None if targets is None else _tensor(targets, real)
        counts = {name: len(array) for name, array in arrays.items()}
        if wanted_of is not None:
            counts[str(given.targets)] = len(wanted_of) if wanted_of.ndim else 0
        if not arrays or len(set(counts.values())) > 1 or not min(counts.values()):
            told = ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
            raise TaskError(
                f"The arrays of {given.file} have unlike numbers of samples ({told}); the first axis is the samples."
            )
        order = tuple(found) if in_order else tuple(positional[: len(found)])
        return cls(arrays, constants, order if set(order) == set(found) else None, wanted_of)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(next(iter(self.arrays.values())))

    def part(self, start: int, stop: int) -> Samples:
        """Some of them."""
        cut = {name: array[start:stop] for name, array in self.arrays.items()}
        return Samples(cut, self.constants, self.order, None if self.targets is None else self.targets[start:stop])

    def pairs(self) -> Iterator[Any]:
        """Inputs and targets, batch by batch: enough batches to train on some and hold others out."""
        size = min(BATCH, max(1, self.count // BATCH))
        for start in range(0, self.count, size):
            part = self.part(start, start + size)
            yield part.whole(), part.targets

    def whole(self) -> Any:
        """All of them at once."""
        named = {**self.arrays, **self.constants}
        return named if self.order is None else tuple(named[name] for name in self.order)

    def inputs(self) -> Iterator[Any]:
        """The inputs alone, batch by batch."""
        return (inputs for inputs, _ in self.pairs())


def _tensor(array: np.ndarray, real: torch.dtype) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise TaskError(f"The arrays of --calibration hold numbers; found the type {array.dtype}.")
    kind = {"f": np.float64 if array.dtype.itemsize > 4 else np.float32, "b": np.bool_}.get(array.dtype.kind, np.int64)
    made = torch.from_numpy(np.array(array, kind, order="C"))
    return made.to(real) if made.is_floating_point() else made


def _answered(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The outputs of a model that are real numbers, on the CPU."""
    given = Arguments((), inputs) if isinstance(inputs, Mapping) else Arguments(inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        found = list(tensors_of(output_of(model, to_device(given, device), source="--calibration")))
    if not found:
        raise TaskError("The model puts out no real numbers, which is all that can be measured. Write a task.")
    return [tensor.cpu() for tensor in found]


def _check_samples_first(model: nn.Module, samples: Samples, given: Calibration) -> None:
    """Raise `TaskError` where the model takes time first: two samples would be two steps of one."""
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    if samples.count < 2 or all(layer.batch_first for layer in layers):
        return
    together = _answered(model, samples.part(0, 2).whole())[0]
    alone = [_answered(model, samples.part(k, k + 1).whole())[0] for k in (0, 1)]
    if together.shape[:1] == (2,) and torch.allclose(together, torch.cat(alone), rtol=1e-3, atol=1e-4):
        return
    raise TaskError(
        f"The model answers two samples of {given.file} otherwise together than one by one: it seems to take time "
        f"first (batch_first=False), and the first axis of an array is the samples. Write a task, whose calibration() "
        f"yields the inputs as the model takes them."
    )


# ---- what is measured ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measure:
    """`evaluate(model)`: the metric against the targets, or how far outputs are from the dense model's."""

    task: Task
    samples: Samples
    given: Calibration
    dense: Dense | None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        found = [_answered(model, inputs) for inputs in self.samples.inputs()]
        if self.samples.targets is None:
            parts = list(zip(*(zip(a, b, strict=True) for a, b in zip(found, self._wanted, strict=True)), strict=True))
            errors = [apart([(a.double().numpy(), b.double().numpy()) for a, b in pairs]) for pairs in parts]
            return {ERROR: sum(errors) / len(errors)}
        output, target = _aligned(torch.cat([first for first, *_ in found]), self.samples.targets, self.given)
        return {self.given.headline: METRICS[self.given.headline][0](output.double().numpy(), target.numpy())}

    @cached_property
    def _wanted(self) -> list[list[Tensor]]:
        if self.dense is None:
            raise TaskError(
                f"There is no other model to measure outputs against. Give --targets NAME, an array of "
                f"{self.given.file}."
            )
        model = self.dense(self.task)
        return [_answered(model, inputs) for inputs in self.samples.inputs()]


def _aligned(output: Any, target: Tensor, given: Calibration) -> tuple[Tensor, Tensor]:
    """The first output and the targets, once their shapes fit the metric.

    Raises `TaskError` where they do not.
    """
    first = next(tensors_of(output))
    classes = given.headline == "accuracy"
    if not classes and first.shape == (*target.shape, 1):
        first = first.squeeze(-1)
    if (first.shape[:-1] if classes else first.shape) != target.shape or (classes and target.is_floating_point()):
        expected = "(..., classes) and whole numbers (...)" if classes else "the same shape"
        raise TaskError(
            f"The first output {tuple(first.shape)} and the targets {given.targets} {tuple(target.shape)} of "
            f"{target.dtype} do not compare by {given.headline}, which takes {expected}. Give another --metric, or "
            f"write a task."
        )
    return first, target.to(first.device)


def _log_probabilities(output: Tensor) -> Tensor:
    """Of (..., classes): scores, or probabilities already."""
    flat = output.flatten(0, -2)
    sums = flat.detach().sum(-1)
    if bool((flat >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        return flat.clamp_min(1e-12).log()
    return functional.log_softmax(flat, -1)
