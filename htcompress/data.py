"""The user's data and metric, and how an item of the data goes into the model.

A tuple is the model's positional arguments, anything else its one argument: so a task is documented. What loaders
yield is often something else (a list of inputs and targets, a dict of named arguments), and the model itself tells
which reading of it is meant: the first item is tried, and all others are read alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from htcompress.errors import HTCompressError, TaskError
from htcompress.finetuning.objective import TaskLoss
from htcompress.finetuning.stream import Batches
from htcompress.isolation import user_code
from htcompress.model.proof import Answer, answer
from htcompress.task import Task, metrics_of, output_of
from htcompress.values import Arguments, fresh, mapped

Items = Callable[[], Iterable[Any]]

Reading = Callable[[Any], Arguments]
TrainingReading = Callable[[Any], tuple[Arguments, Any]]


@dataclass(frozen=True, eq=False)
class Data:
    """The user's data and metric, from a task or from arguments of `compress`; None where not given.

    `calibration`, `training` and `unlabelled` start a pass over items as the user has them; `higher_is_better` is
    None where the user does not say. Where layers are taught apart, `following` gives what enters them in the
    compressed model, for a second round of fine-tuning, and `judge` how far what a whole model puts out is off.
    """

    calibration: Items | None = None
    training: Items | None = None
    unlabelled: Items | None = None
    loss: TaskLoss | None = None
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    higher_is_better: bool | None = None
    following: Callable[[nn.Module], Items] | None = None
    judge: Callable[[nn.Module], float] | None = None

    @classmethod
    def of_task(cls, task: Task) -> Data:
        """What a task defines."""
        return cls(
            task.calibration if task.has("calibration") else None,
            task.training if task.can_train else None,
            task.unlabelled if task.has("unlabelled") else None,
            task.loss,
            task.evaluate if task.has("evaluate") else None,
            task.higher_is_better,
        )

    @classmethod
    def of_arguments(
        cls,
        calibration: Iterable[Any] | Callable[[], Iterable[Any]] | None,
        training: Iterable[Any] | Callable[[], Iterable[Any]] | None,
        unlabelled: Iterable[Any] | Callable[[], Iterable[Any]] | None,
        loss: TaskLoss | None,
        evaluate: Callable[[nn.Module], Any] | None,
        higher_is_better: bool | None,
    ) -> Data:
        """What `compress` is given."""

        def measured(model: nn.Module) -> dict[str, float]:
            if evaluate is None:
                raise TaskError("There is no metric to evaluate.")
            with user_code():
                return metrics_of(evaluate(model), source="compress")

        return cls(
            None if calibration is None else lambda: _guarded(calibration),
            None if training is None else lambda: _guarded(training),
            None if unlabelled is None else lambda: _guarded(unlabelled),
            loss,
            None if evaluate is None else measured,
            higher_is_better,
        )

    def on(self, device: torch.device) -> Data:
        """The same with every batch on a device."""

        def moved(items: Items | None) -> Items | None:
            return None if items is None else lambda: (to_device(item, device) for item in items())

        return replace(
            self,
            calibration=moved(self.calibration),
            training=moved(self.training),
            unlabelled=moved(self.unlabelled),
        )


def _guarded(items: Iterable[Any] | Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """The user's items, each fetched as the user's code."""
    ended = object()
    with user_code():
        found = iter(items() if callable(items) else items)
    while True:
        with user_code():
            item = next(found, ended)
        if item is ended:
            return
        yield item


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors moved to a device in tuples, lists, dicts, dataclasses and packed sequences; anything else as it is."""
    if device.type == "cpu" and not torch.cuda.is_available():
        return value
    if isinstance(value, PackedSequence):
        return value.to(device)  # type: ignore[arg-type]
    return mapped(value, lambda tensor: tensor.to(device))


_NOTHING = object()


class Peeked:
    """Items of which the first is known before anybody goes through them; the pass that it came from is not lost."""

    def __init__(self, items: Items) -> None:
        self._items = items
        self._begun: Iterator[Any] | None = iter(items())
        self.first: Any = next(self._begun, _NOTHING)
        self.empty = self.first is _NOTHING

    def __call__(self) -> Iterator[Any]:
        if self._begun is None:
            return iter(self._items())
        begun, self._begun = self._begun, None
        return begun if self.empty else chain([self.first], begun)


# ---- reading items ------------------------------------------------------------------------------------------


def _whole(item: Any) -> Arguments:
    return Arguments((item,))


def _spread(item: Any) -> Arguments:
    return Arguments(tuple(item))


def _named(item: Any) -> Arguments:
    return Arguments((), item)


def _first(item: Any) -> Arguments:
    return arguments(item[0])


def arguments(item: Any) -> Arguments:
    """The arguments that an item stands for as documented: a tuple is all of them, anything else the one."""
    return _spread(item) if _parted(item, tuple) else _whole(item)


def training_item(item: Any) -> tuple[Arguments, Any]:
    """The arguments and the target that an item of `training()` stands for as documented; a pair has a target."""
    return (arguments(item[0]), item[1]) if _parted(item, tuple) and len(item) == 2 else (arguments(item), None)


def _parted(item: Any, kinds: type | tuple[type, ...] = (tuple, list)) -> bool:
    return isinstance(item, kinds) and not isinstance(item, PackedSequence)


def _readings(item: Any) -> list[Reading]:
    """How an item may go into a model, as documented first."""
    if _parted(item, tuple):
        return [_spread, _whole]
    if _parted(item, list):
        return [_whole, *([_spread] if item else []), *([_first] if len(item) > 1 else [])]
    if isinstance(item, Mapping) and all(isinstance(key, str) for key in item):
        return [_whole, _named]
    return [_whole]


def calibration_reading(model: nn.Module, item: Any, *, source: str = "calibration()") -> tuple[Reading, Answer]:
    """The first reading of an item that the model takes, and what it answers.

    Raises `TaskError`, with what the model says of the documented reading, where it takes none.
    """
    readings = _readings(item)
    for reading in readings:
        try:
            return reading, answer(model, reading(item))
        except HTCompressError:
            raise
        except Exception:
            continue
    output_of(model, readings[0](item), source=source)
    raise TaskError(f"The model takes a batch of {source} only now and then; let it answer alike each time.")


def training_reading(
    model: nn.Module, item: Any, *, loss: TaskLoss | None, like: tuple[Any, Reading] | None = None
) -> TrainingReading:
    """How an item of `training()` goes into the model, and what of it is a target.

    Args:
        like: an item of `calibration()` and how that is read: an item of just that form has no target.

    Raises `TaskError` where the model takes no reading of it.
    """

    def alone(reading: Reading) -> TrainingReading:
        return lambda item: (reading(item), None)

    def paired(reading: Reading) -> TrainingReading:
        return lambda item: (reading(item[0]), item[1])

    candidates: list[TrainingReading] = [alone(reading) for reading in _readings(item) if reading is not _first]
    if _parted(item) and len(item) == 2:
        pairs = [paired(reading) for reading in _readings(item[0])]
        as_calibration = like is not None and like[1] is _spread and _form(like[0]) == _form(item)
        candidates = [*candidates, *pairs] if as_calibration else [*pairs, *candidates]
    elif _parted(item) and len(item) > 2:
        candidates += [lambda item: (_spread(item[:-1]), item[-1]), lambda item: (arguments(item[0]), item[1:])]
    for candidate in candidates:
        given, target = candidate(item)
        try:
            output = answer(model, given).output
            if loss is not None and target is not None:
                with torch.enable_grad():
                    loss(fresh(output), target)
            return candidate
        except Exception:
            continue
    # The loss may be what fails: it says so when it is reached.
    for candidate in candidates:
        try:
            answer(model, candidate(item)[0])
            return candidate
        except Exception:
            continue
    output_of(model, candidates[0](item)[0], source="training()")
    raise TaskError("The model takes a batch of training() only now and then; let it answer alike each time.")


def _form(item: Any) -> Any:
    """What two items of one kind have in common."""
    if isinstance(item, Tensor):
        return item.dtype, item.ndim
    if isinstance(item, Sequence) and not isinstance(item, str):
        return [_form(part) for part in item] if len(item) < 8 else len(item)
    return type(item)


# ---- what a metric means ------------------------------------------------------------------------------------


_ERRORS = re.compile(
    r"(^|[^a-z])(mse|rmse|nrmse|rmsle|mae|mape|smape|loss|err|error|errors|wer|cer|der|eer|fer|ppl|perplexity|nll|bpc|bpd|"
    r"distance|divergence|cost|regret|deviation|entropy|mcd|fad|fid|kl|latency)([^a-z]|$)"
    r"|loss$|error$"
)
"""Parts of the names of metrics of which lower is better."""


def direction_of(metric: str, said: bool | None) -> bool:
    """Whether higher is better, as the user says; True where nothing is said and the name speaks of no error.

    Raises `TaskError` where it does.
    """
    if said is not None:
        return said
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", metric).lower()
    if _ERRORS.search(words):
        raise TaskError(
            f"evaluate() gives {metric!r}, of which lower may be better, and nothing says so. Set higher_is_better = "
            f"False (or True) in the task, or give higher_is_better to compress()."
        )
    return True


def finite(metrics: Mapping[str, float]) -> list[str]:
    """The metrics that are no finite numbers, in words."""
    return [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]


def stream(reading: Reading, items: Iterable[Any]) -> Iterator[Arguments]:
    """Items of `calibration()` as arguments."""
    return (reading(item) for item in items)


def training_stream(reading: TrainingReading, items: Items) -> Batches:
    """Passes over items of `training()` as arguments and targets."""
    return lambda: (reading(item) for item in items())


def alternating(labelled: Batches, unlabelled: Batches) -> Batches:
    """Passes over labelled batches with one unlabelled after each; these go on where the last pass left them."""
    ended = object()
    going: Iterator[tuple[Sequence[Any], Any]] = iter(())

    def passes() -> Iterator[tuple[Sequence[Any], Any]]:
        nonlocal going
        for item in labelled():
            yield item
            further: Any = next(going, ended)
            if further is ended:
                going = unlabelled()
                further = next(going, ended)
            if further is not ended:
                yield further

    return passes
