"""A task of the user's beside a model that runs from its own file: what it yields, and what its `evaluate()` is given.

A tuple is all inputs in the model's order, a dict is by their names, and anything else is the one. A list is calls in a
row, from each of which the states go on to the next; but of a model that keeps no states a list of arrays, as a
`DataLoader` gives it, is its inputs in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from htcompress.errors import TaskError
from htcompress.graphs.feeds import Feed, Feeds, Value, fits, passed_on, single, typed, zeros
from htcompress.graphs.graph import Session
from htcompress.task import Task


@dataclass(frozen=True, eq=False)
class YieldedFeeds(Feeds):
    """Batches as the user's code yields them, each a sample to the graph, of whatever lengths.

    Attributes:
        batches: each a list of calls, without the states.
    """

    batches: Sequence[list[Feed]]

    @classmethod
    def read(cls, task: Task, session: Session) -> YieldedFeeds:
        """All that `calibration()` of a task yields.

        Raises `TaskError` where that is nothing, or fits no input; the message says which are expected.
        """
        task.require("calibration", purpose="a model that runs from its own file, without --calibration X.npz,")
        source = f"calibration() of {task.source}"
        known = {value.name: value for value in session.inputs}
        batches, rows = [], []
        for item in task.calibration():
            row = isinstance(item, list) and (bool(session.passed) or all(isinstance(c, Mapping | tuple) for c in item))
            rows.append(row)
            calls = item if row else [tuple(item) if isinstance(item, list) else item]
            # Copies: a generator may fill one array anew.
            feeds = [feed_of(call, session.inputs, source) for call in calls]
            batches.append([{name: array.copy() for name, array in feed.items()} for feed in feeds])
        if not batches or not all(batches):
            raise TaskError(f"{source} yields nothing; it must yield at least one batch of the model's inputs.")
        names = [set(feed) for calls in batches for feed in calls]
        if any(found != names[0] for found in names) or len(set(rows)) > 1:
            raise TaskError(
                f"{source} yields batches of unlike forms; let all have the same inputs, and all be lists of calls or "
                f"none."
            )
        missing = [value for value in session.inputs if value.name not in names[0]]
        states = passed_on(missing, session.outputs, session.passed, source)
        return cls(source, known, states, len(batches), rows[0], batches)

    @property
    def size(self) -> int:
        return 1

    @property
    def targets(self) -> np.ndarray | None:
        return None

    def part(self, start: int, stop: int) -> YieldedFeeds:
        return replace(self, batches=self.batches[start:stop], samples=stop - start)

    def singly(self) -> YieldedFeeds:
        return self

    def sequences(self) -> Iterator[list[Feed]]:
        for calls in self.batches:
            yield [{**call, **self.begun(count_of(call, self.inputs))} for call in calls]


def feed_of(item: Any, inputs: Sequence[Value], source: str) -> Feed:
    """An item of the user's by the names of a graph's inputs, in their types.

    Raises `TaskError` where it names others, or has more than there are.
    """
    if isinstance(item, Mapping):
        given = dict(item)
    else:
        parts = item if isinstance(item, tuple) else (item,)
        names = [value.name for value in inputs] if len(parts) <= len(inputs) else [f"{len(parts)} arrays"]
        given = dict(zip(names, parts, strict=False))
    known = {value.name: value for value in inputs}
    wanted = f"the model's inputs are {', '.join(f'{value.name} {value.said}' for value in inputs)}"
    if not given or any(name not in known for name in given):
        told = ", ".join(map(str, given)) or "nothing"
        raise TaskError(f"{source} gives {told}; {wanted}. Give these, in order or by name.")
    found = {}
    for name, value in given.items():
        try:
            array = _array(value)
            found[name] = typed(array, known[name]) if array.ndim else single(array, known[name])
        except (TypeError, ValueError) as error:
            raise TaskError(
                f"{source} gives a {type(value).__name__} for the input {name}, which is no array of "
                f"{known[name].type[len('tensor(') : -1]}: {error}."
            ) from error
        shape, own = found[name].shape, known[name].shape
        if not fits(shape, own):
            raise TaskError(f"{source} gives {name} of shape {shape}; {wanted}. Give it whole, as the model takes it.")
    return found


def _array(value: Any) -> np.ndarray:
    """An array of a tensor, or of what numpy takes for one. Raises `TypeError` or `ValueError` where it is none."""
    if isinstance(value, Tensor):
        wide = value.detach().float() if value.dtype is torch.bfloat16 else value
        array = wide.to_dense().numpy(force=True)
    else:
        array = np.asarray(value)
    if array.dtype.kind == "c":
        raise TypeError("its numbers are complex")
    return array


def count_of(feed: Feed, inputs: Mapping[str, Value]) -> int:
    """How many samples a call has, by the first input whose axis of samples takes any number; 1 where there is none."""
    for name, value in inputs.items():
        axis = value.batched_later or 0
        if name in feed and len(value.shape) > axis and value.shape[axis] is None:
            return feed[name].shape[axis]
    return 1


class Running:
    """A model that runs from its file, as `evaluate()` of a task is given it.

    `run(x, lengths)` takes the inputs in their order, `run(x=x)` and `run({"x": x})` by their names: arrays, or
    tensors. Inputs that are states may be left out, and are zeros then. What comes back is the output, or of several a
    dict by their names; tensors where tensors were given.

    Attributes:
        inputs: the names of the inputs.
        outputs: those of the outputs.
    """

    def __init__(self, session: Session, source: str) -> None:
        self._session, self._source = session, f"evaluate() of {source}"
        self.inputs = [value.name for value in session.inputs]
        self.outputs = [value.name for value in session.outputs]

    def __call__(self, *parts: Any, **named: Any) -> Any:
        """Run it once."""
        own = self._session.inputs
        item = named if named and not parts else parts[0] if len(parts) == 1 and not named else parts
        feed = feed_of(item, own, self._source)
        if named and parts:
            twice = [name for name in named if name in feed]
            if twice:
                raise TaskError(f"{self._source} gives {', '.join(twice)} twice, in order and by name.")
            feed |= feed_of(named, own, self._source)
        missing = [value for value in own if value.name not in feed]
        passed_on(missing, self._session.outputs, self._session.passed, self._source)
        count = count_of(feed, {value.name: value for value in own})
        feed |= {value.name: zeros(value, count) for value in missing}
        (found,) = self._session.answers([feed], {})
        given = item.values() if isinstance(item, Mapping) else item if isinstance(item, tuple) else (item,)
        as_tensors = any(isinstance(value, Tensor) for value in [*given, *named.values()])
        answered = {name: torch.from_numpy(found[name]) if as_tensors else found[name] for name in self.outputs}
        return answered[self.outputs[0]] if len(answered) == 1 else answered
