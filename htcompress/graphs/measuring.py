"""How well a graph answers: beside another, or against targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from htcompress.errors import CheckpointError, RequestError, TaskError
from htcompress.graphs.calibration import METRICS, Calibration
from htcompress.graphs.feeds import Feeds, read_feeds
from htcompress.graphs.formats import graph_in, read_graph
from htcompress.graphs.graph import Answers, Graph, Session
from htcompress.graphs.yielded import Running, YieldedFeeds
from htcompress.model.latency import interleaved
from htcompress.report import read_report
from htcompress.spread import Spread
from htcompress.task import Task
from htcompress.values import answered

ERROR = "output_error"
"""The metric where there are no targets; see `difference`."""


def feeds_for(session: Session, given: Calibration, task: Task | None = None) -> Feeds:
    """The data for a graph: in batches, or one by one where it takes no batches though it says so.

    Args:
        task: what yields it where no file is given.

    Raises `TaskError` where there is none that it takes.
    """
    feeds: Feeds
    if given.file is None and task is not None:
        feeds = YieldedFeeds.read(task, session)
    else:
        feeds = read_feeds(
            given.file or Path(), session.inputs, session.outputs, targets=given.targets, passed=session.passed
        )
    try:
        session.answers(next(iter(feeds.sequences()))[:1], feeds.states)
    except TaskError:
        feeds = feeds.singly()
        session.answers(next(iter(feeds.sequences()))[:1], feeds.states)
    return feeds


def answers_of(session: Session, feeds: Feeds) -> list[Answers]:
    """What a graph answers to all samples, batch by batch."""
    return [session.answers(calls, feeds.states) for calls in feeds.sequences()]


def _compared(session: Session, feeds: Feeds) -> list[str]:
    """The outputs that are compared: what is not passed on as a state, if there is any; real numbers, if any are."""
    passed = set(feeds.states.values())
    own = [o for o in session.outputs if o.name not in passed] or session.outputs
    real = [o.name for o in own if o.type in ("tensor(float)", "tensor(float16)", "tensor(double)")]
    return real or [o.name for o in own]


def difference(found: Sequence[Answers], wanted: Sequence[Answers], session: Session, feeds: Feeds) -> float:
    """How far outputs are apart, in the mean over them: the root of the squared difference over their variance.

    Of whole numbers (classes, say) it is the part of those that differ.
    """
    parts = []
    for name in _compared(session, feeds):
        pairs = [(a[name], b[name]) for calls in zip(found, wanted, strict=True) for a, b in zip(*calls, strict=True)]
        parts.append(apart(pairs))
    return sum(parts) / len(parts) if parts else 0.0


def apart(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """How far arrays are from those that are wanted, as one number; see `difference`."""
    if not all(b.dtype.kind == "f" for _, b in pairs):
        unlike = sum(int((a != b).sum()) if a.shape == b.shape else b.size for a, b in pairs)
        return unlike / max(1, sum(b.size for _, b in pairs))
    # A model that decodes freely gives answers of other lengths; nothing of those is right.
    alike = [(a if a.shape == b.shape else np.zeros_like(b), b) for a, b in pairs]
    a, b = (np.concatenate([pair[i].ravel().astype(np.float64) for pair in alike]) for i in (0, 1))
    known = answered(torch.from_numpy(b))
    spread = Spread.of([torch.from_numpy(np.atleast_1d(own)).double() for _, own in alike], known)
    lost = np.square(a - b)[known.numpy()].sum()
    return float(np.sqrt(lost / max(spread.count * spread.variance, 1e-30)))


def metrics_of(given: Calibration, answers: Sequence[Answers], feeds: Feeds, session: Session) -> dict[str, float]:
    """The metric of the first output against the targets; nothing where there are none.

    Where samples are calls in a row, targets of as many calls are held against each, others against the last. Raises
    `TaskError` where they do not compare.
    """
    if feeds.targets is None:
        return {}
    measure, _ = METRICS[given.headline]
    name = session.outputs[0].name
    found = _answered([[own[name] for own in calls] for calls in answers], feeds)
    try:
        return {given.headline: measure(found, feeds.targets[: len(found)])}
    except ValueError as error:
        raise TaskError(
            f"The output {name} {found.shape} and the targets {feeds.targets.shape} do not compare by "
            f"{given.headline}: {error}."
        ) from error


def _answered(answers: Sequence[Sequence[np.ndarray]], feeds: Feeds) -> np.ndarray:
    """What targets are held against, samples first: the answers to every call (samples, calls, ...), or the last."""
    shape = () if feeds.targets is None else feeds.targets.shape
    # A model of one sample at a time may answer without an axis for it.
    single = len(answers) == feeds.samples
    calls = [[own[None] if single and own.shape[:1] != (1,) else own for own in each] for each in answers]
    if feeds.calls and shape[1:2] == (len(calls[0]),):
        return np.concatenate([np.stack(each, 1) for each in calls])
    return np.concatenate([each[-1] for each in calls])


def measures(task: Task | None, given: Calibration) -> bool:
    """Whether a task says what is measured.

    Raises `RequestError` where the data do so, too, or are given twice.
    """
    if task is None:
        return False
    if given.file is not None and task.has("calibration"):
        raise RequestError(f"--calibration X.npz and calibration() of {task.source} are both data; leave out one.")
    if given.targets is not None and task.has("evaluate"):
        raise RequestError(f"--targets and evaluate() of {task.source} both say what is measured; leave out one.")
    return task.has("evaluate")


def evaluate(source: Path, given: Calibration, task: Task | None = None) -> dict[str, float]:
    """The metrics of a graph by a task's `evaluate()` or against targets, or beside the model that it was made from.

    All samples of the data count.

    Raises:
        RequestError: there is nothing to measure against.
        HTCompressError: the files are nothing that can be worked with.
    """
    given.check()
    place = graph_in(source) or source
    own = measures(task, given)
    if given.file is None and task is None:
        raise RequestError(f"{place} runs by itself: give --calibration X.npz to measure it on, or a task with --task.")
    session = read_graph(place).session()
    if own and task is not None:
        return task.evaluate(Running(session, task.source))
    feeds = feeds_for(session, given, task)
    found = answers_of(session, feeds)
    metrics = metrics_of(given, found, feeds, session)
    if source.is_dir():
        path = read_report(source).source.get("path")
        original = None if path is None else source / path
        if original is not None and original.is_file():
            wanted = answers_of(read_graph(original).session(), feeds)
            metrics[ERROR] = difference(found, wanted, session, feeds)
        elif not metrics:
            raise CheckpointError(f"The model {path} that {source} was made from is not found. Give --targets NAME.")
    if not metrics:
        advice = f"give --targets NAME, an array of {given.file}"
        if given.file is None and task is not None:
            advice = f"define evaluate() in {task.source}"
        raise RequestError(f"There is nothing to measure {source} against: {advice}.")
    return metrics


def call_times(graphs: Mapping[str, Graph], feeds: Feeds) -> dict[str, float]:
    """Milliseconds of one call of each graph, by name, on the first samples; one thread."""
    calls = next(iter(feeds.sequences()))[:1]
    sessions = {name: graph.session(threads=1) for name, graph in graphs.items()}
    return interleaved({name: partial(session.answers, calls, feeds.states) for name, session in sessions.items()})
