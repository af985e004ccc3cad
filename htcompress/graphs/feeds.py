"""Calibration data of a graph: arrays by the names of its inputs, as batches that it takes.

The first axis of an array is its samples. An array with as many axes as its input is cut into batches along it; one
with an axis more holds whole inputs. Where a model passes states from call to call, one with an axis more has the calls
as its second, and one with two axes more holds a whole input for each call. Inputs that no array is there for are such
states: they begin with zeros and are fed with the output that is theirs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from htcompress.errors import TaskError

BATCH = 16
"""Samples at a time where a graph takes any number."""

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}

_BATCHED = re.compile(r"batch|^(n|b|bs|bsz)$", re.IGNORECASE)
_STEPS = re.compile(r"^(t|l|(time|seq|step|len|frame).*|.*(time|steps|frames|length))$", re.IGNORECASE)

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Value:
    """An input or output of a graph.

    Attributes:
        shape: None where an axis takes any size.
        type: as onnxruntime says it.
        axes: what the graph calls its axes; empty where it has no name for one, or for any.
    """

    name: str
    shape: tuple[int | None, ...]
    type: str
    axes: tuple[str, ...] = ()

    @classmethod
    def of(cls, info: Any) -> Value:
        """Of what onnxruntime tells."""
        shape = tuple(n if isinstance(n, int) and n > 0 else None for n in info.shape)
        return cls(info.name, shape, info.type, tuple(n[:40] if isinstance(n, str) else "" for n in info.shape))

    @property
    def said(self) -> str:
        """Its shape in words."""
        names = self.axes or [""] * len(self.shape)
        sizes = [str(n) if n is not None else name or "any" for n, name in zip(self.shape, names, strict=True)]
        return f"({', '.join(sizes)})"

    @property
    def batched_later(self) -> int | None:
        """Which of its axes the graph calls its batch, where that is open and the first one is called after time."""
        named = [n is None and bool(_BATCHED.search(axis)) for n, axis in zip(self.shape, self.axes, strict=False)]
        if not any(named) or named[0] or self.shape[0] is not None or not _STEPS.search(self.axes[0]):
            return None
        return named.index(True)


@dataclass(frozen=True, eq=False)
class Feeds(ABC):
    """Samples for a graph.

    Attributes:
        source: where they are from, for messages.
        inputs: of the graph, by name.
        states: the inputs that are passed on, and the outputs that they are fed with.
        samples: how many there are.
        calls: whether a sample is a sequence of calls.
    """

    source: str
    inputs: Mapping[str, Value]
    states: Mapping[str, str]
    samples: int
    calls: bool

    @property
    @abstractmethod
    def size(self) -> int:
        """Samples at a time."""

    @property
    @abstractmethod
    def targets(self) -> np.ndarray | None:
        """What the samples are measured against, if anything; samples first."""

    @abstractmethod
    def part(self, start: int, stop: int) -> Feeds:
        """Some of the samples."""

    @abstractmethod
    def singly(self) -> Feeds:
        """The same, one sample at a time wherever the graph does not ask for more."""

    @abstractmethod
    def sequences(self) -> Iterator[list[Feed]]:
        """Batches of samples, each a list of calls of which the later are to be fed with the states of the earlier."""

    def begun(self, count: int) -> Feed:
        """The states before the first call of so many samples."""
        return {name: zeros(self.inputs[name], count) for name in self.states}


def zeros(value: Value, count: int) -> np.ndarray:
    """What a state begins with; axes that take any size are those of the samples."""
    return np.zeros([count if n is None else n for n in value.shape], dtype=_TYPES[value.type])


@dataclass(frozen=True, eq=False)
class ArrayFeeds(Feeds):
    """Samples that are cut out of arrays.

    Attributes:
        arrays: by the names of inputs, samples first.
        constants: inputs that are the same in every call.
        most: samples at a time where the graph says that it takes any number.
        wanted: the targets.
    """

    arrays: Mapping[str, np.ndarray]
    constants: Mapping[str, np.ndarray]
    most: int = BATCH
    wanted: np.ndarray | None = None

    @property
    def targets(self) -> np.ndarray | None:
        return self.wanted

    def part(self, start: int, stop: int) -> ArrayFeeds:
        cut = {name: array[start:stop] for name, array in self.arrays.items()}
        wanted = None if self.wanted is None else self.wanted[start:stop]
        return replace(self, arrays=cut, samples=stop - start, wanted=wanted)

    def singly(self) -> ArrayFeeds:
        return replace(self, most=1)

    def sequences(self) -> Iterator[list[Feed]]:
        size = self.size
        for start in range(0, self.samples - (size - 1 if self._fixed() else 0), size):
            stop = min(start + size, self.samples)
            chosen = {name: array[start:stop] for name, array in self.arrays.items()}
            if not self.calls:
                yield [self._call(chosen, stop - start)]
                continue
            steps = min(array.shape[1] for array in chosen.values())
            yield [
                self._call({name: array[:, k] for name, array in chosen.items()}, stop - start) for k in range(steps)
            ]

    def _call(self, chosen: Mapping[str, np.ndarray], count: int) -> Feed:
        found = {}
        for name, array in chosen.items():
            value = self.inputs[name]
            # Whole inputs come one at a time.
            whole = array[0] if array.ndim == len(value.shape) + 1 else array
            found[name] = typed(whole, value)
        return {**self.constants, **found, **self.begun(count)}

    @property
    def takes_single(self) -> bool:
        """Whether a state is of one size: an open first axis of an input is then no batch, but steps, say."""
        return not self._fixed() and any(None not in self.inputs[name].shape for name in self.states)

    def _fixed(self) -> bool:
        return any(self.inputs[name].shape[:1] not in ((None,), ()) for name in self.arrays)

    @property
    def size(self) -> int:
        sizes = []
        for name, array in self.arrays.items():
            value = self.inputs[name]
            if array.ndim - self.calls > len(value.shape) or self.takes_single:
                return 1
            sizes.append(value.shape[0] if value.shape and value.shape[0] is not None else self.most)
        # Enough batches to train on some and hold others out.
        return min([*sizes, max(1, self.samples // BATCH)]) if not self._fixed() else min(sizes)


def read_feeds(
    path: str | Path,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    *,
    targets: str | None = None,
    passed: Mapping[str, str] | None = None,
) -> ArrayFeeds:
    """The arrays of an `.npz` file for the inputs of a graph.

    Args:
        targets: the name of an array that is no input: what the samples are measured against.
        passed: of inputs that are states, the outputs that are known to be theirs; those of others are guessed.

    Raises:
        TaskError: the file is not there or no archive of arrays, or an array fits no input; the message says which
            names and shapes are expected.
    """
    path = Path(path)
    wanted = ", ".join(f"{value.name} {value.said}" for value in inputs)
    arrays, wanted_of = read_arrays(path, targets, wanted, inputs[0].name if inputs else "x")
    if len(arrays) == 1 and len(inputs) == 1:
        arrays = {inputs[0].name: next(iter(arrays.values()))}  # there is but one place for it
    known = {value.name: value for value in inputs}
    unknown = [name for name in arrays if name not in known]
    if unknown or not arrays:
        held = ", ".join(arrays) or "nothing"
        lacking = [name for name in known if name not in arrays]
        advice = "Name the arrays so."
        if unknown and not lacking:
            advice = f"Leave out {', '.join(unknown)}, or name what is measured against with --targets {unknown[0]}."
        raise TaskError(f"{path} holds {held}; the model's inputs are {wanted}. {advice}")
    constants = {n: single(a, known[n]) for n, a in arrays.items() if a.ndim == 0}
    arrays = {name: array for name, array in arrays.items() if array.ndim}
    missing = [value for value in inputs if value.name not in {**arrays, **constants}]
    states = passed_on(missing, outputs, passed or {}, str(path))
    counts = {name: len(array) for name, array in arrays.items()}
    if not arrays or len(set(counts.values())) > 1 or not min(counts.values()):
        told = ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
        raise TaskError(f"The arrays of {path} have unlike numbers of samples ({told}); the first axis is the samples.")
    calls = bool(states) and all(0 < a.ndim - len(known[n].shape) <= 2 for n, a in arrays.items())
    feeds = ArrayFeeds(str(path), known, states, min(counts.values()), calls, arrays, constants, wanted=wanted_of)
    if wanted_of is not None and (not wanted_of.ndim or len(wanted_of) != feeds.samples):
        count = len(wanted_of) if wanted_of.ndim else "no"
        raise TaskError(f"The array {targets} has {count} samples, the inputs {feeds.samples}.")
    for name, array in arrays.items():
        _check(array, known[name], calls, path)
        later = known[name].batched_later
        if later is not None and array.ndim - calls == len(known[name].shape) and not feeds.takes_single:
            axes = known[name].said[1:-1].split(", ")
            whole = ", ".join(["samples", *axes[:later], "1", *axes[later + 1 :]])
            raise TaskError(
                f"The input {name} takes {known[name].said}, whose samples stand along {known[name].axes[later]}; "
                f"those of an array are its first axis. Give whole inputs, of shape ({whole})."
            )
    if feeds.samples < feeds.size:
        raise TaskError(
            f"{path} has {feeds.samples} samples, and the model takes {feeds.size} at a time. Give more, or export the "
            f"model with an open batch."
        )
    return feeds


def read_arrays(
    path: Path, targets: str | None, wanted: str, example: str
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The arrays of an `.npz` file by their names, and the one of them that is the targets.

    Args:
        targets: its name; None: there is none.
        wanted: what the model takes, for messages.
        example: a name of an input.

    Raises `TaskError` where the file is not there, no archive of plain arrays, or has no such targets.
    """
    if not path.is_file():
        raise TaskError(f"There is no file {path}. Give an .npz file with an array for each input: {wanted}.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        raise TaskError(
            f"{path} is no .npz file of plain arrays ({str(error).splitlines()[0]}). Save one with numpy.savez("
            f"'{path.name}', {example}=...), an array for each input: {wanted}."
        ) from error
    if targets is not None and targets not in arrays:
        raise TaskError(f"{path} has no array {targets}; it holds {', '.join(arrays)}.")
    return arrays, None if targets is None else arrays.pop(targets)


def typed(array: np.ndarray, value: Value) -> np.ndarray:
    """An array as an input takes it."""
    return np.ascontiguousarray(array.astype(_TYPES.get(value.type, array.dtype), copy=False))


def single(array: np.ndarray, value: Value) -> np.ndarray:
    """A number without axes for an input of one number, whose axes it may lack."""
    return np.asarray(array, dtype=_TYPES.get(value.type, array.dtype)).reshape([1] * len(value.shape))


def _check(array: np.ndarray, value: Value, calls: bool, path: Path) -> None:
    if value.type not in _TYPES:
        raise TaskError(f"The input {value.name} is {value.type}, which no array can be given for.")
    own = array.shape[1 + calls :]
    wanted = value.shape[1:] if array.ndim - calls == len(value.shape) else value.shape
    if not fits(own, wanted):
        raise TaskError(
            f"The array {value.name} of {path} has shape {array.shape}; the input takes {value.said}. Its first axis "
            f"is the samples{', its second the calls' if calls else ''}."
        )


def fits(shape: Sequence[int | None], wanted: Sequence[int | None]) -> bool:
    """Whether what has one shape may be given where another is wanted; an axis of None is of any size."""
    return len(shape) == len(wanted) and all(None in (n, m) or n == m for n, m in zip(shape, wanted, strict=True))


def passed_on(
    missing: Sequence[Value], outputs: Sequence[Value], passed: Mapping[str, str], source: str
) -> dict[str, str]:
    """Inputs without an array, and the outputs that are theirs, known or of their kind.

    Of their kind: by name where one contains the other, else in order. Raises `TaskError` where there is none.
    """
    found = {value.name: passed[value.name] for value in missing if value.name in passed}
    for value in missing:
        if value.name in found:
            continue
        alike = [
            o.name
            for o in outputs
            if o.type == value.type and o.shape and fits(o.shape, value.shape) and o.name not in found.values()
        ]
        alike = [name for name in alike if value.name in name or name in value.name] or alike
        if not alike:
            raise TaskError(
                f"{source} has no array for the input {value.name} {value.said}, and no output could be passed on to "
                f"it. Add the array; one number stands for all calls."
            )
        found[value.name] = alike[0]
    return found
