"""`convert` of a model that runs from its file: the stages of `htcompress.compression` on torch twins of its nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from htcompress.compression import Compressed, Opened, compressed_model
from htcompress.construction import DataFile
from htcompress.data import Data, Items
from htcompress.errors import CheckpointError, RequestError
from htcompress.graphs.calibration import METRICS, Calibration
from htcompress.graphs.feeds import Feeds
from htcompress.graphs.graph import Answers, Graph, Session
from htcompress.graphs.measuring import ERROR, answers_of, call_times, difference, feeds_for, measures, metrics_of
from htcompress.graphs.passing import entering, entering_of, outputs_of, ran
from htcompress.graphs.twins import Entering, Twins, follows
from htcompress.graphs.yielded import Running
from htcompress.isolation import restored
from htcompress.model.latency import LATENCY_OF
from htcompress.model.names import listed
from htcompress.model.replace import stand_ins
from htcompress.observer import Observer
from htcompress.report import Latency, words
from htcompress.request import Request
from htcompress.sources.read import identified
from htcompress.task import Task, load_task
from htcompress.values import leaves

_EVALUATED = 4
"""One in so many samples is kept apart to measure on."""

_KEPT = 2**29
"""Bytes of what enters the nodes that are kept; beyond, the graph runs anew in every pass."""

_ALIKE, _QUANTISED_ALIKE = 1e-3, 0.1
"""How far a twin may be from its node, relative to the node's output; integers round what enters them, too."""


class Kept:
    """Items that are kept from the first pass on, where they do not take too much memory."""

    def __init__(self, items: Callable[[], Iterator[dict[str, Entering]]]) -> None:
        self._items = items
        self._kept: list[dict[str, Entering]] | None = None

    def __call__(self) -> Iterator[dict[str, Entering]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[dict[str, Entering]] = []
        size = 0
        for item in self._items():
            size += sum(tensor.nbytes for tensor in leaves(item))
            if size <= _KEPT:
                kept.append(item)
            else:
                kept.clear()
            yield item
        if size <= _KEPT:
            self._kept = kept


def converted(
    checkpoint: Path,
    read: Callable[[Path], Graph],
    request: Request,
    given: Calibration,
    observer: Observer | None = None,
) -> Compressed:
    """Compress the recurrent nodes of a graph.

    Args:
        checkpoint: the file.
        read: what reads files of its format.
        request: as for any checkpoint; a task may say what is yielded and what is measured.
        given: data; without any, and without a task, the weights alone are worked from.

    Returns:
        as for any checkpoint; `files` has the graph with its recurrent nodes replaced.

    Raises:
        HTCompressError: the file, its nodes or the data are nothing that can be worked with.
    """
    observer = observer or Observer()
    given.check()
    if request.weights is not None or request.device != "cpu":
        raise RequestError(f"{checkpoint} holds one model, which is run on the CPU: leave out --weights and --device.")
    with restored():
        observer.stage("reading the graph")
        _, digest, _ = identified(checkpoint)
        graph = read(checkpoint)
        source = {"file": checkpoint.name, "sha256": digest, "path": str(checkpoint), "format": graph.format}
        data, feeds, proven = Data(), None, graph
        task = None if request.task is None else load_task(request.task, needs=())
        if (given.file is not None or task is not None) and graph.nodes:
            proven, data, feeds = _with_data(graph, given, task, observer)
        _tell(proven, observer)
        twins = Twins(proven.nodes)
        model = Opened(twins, lambda: Twins(proven.nodes), twins.state_dict(), source)
        if given.file is not None:
            request = replace(request, data=DataFile(str(given.file), given.targets, given.metric))
        made = compressed_model(model, request, data, observer)
        return _finished(made, proven, feeds, observer)


def _tell(graph: Graph, observer: Observer) -> None:
    for sentence in words.left(graph.left):
        observer.message(sentence)
    for node in graph.nodes:
        if node.also:
            others = listed([one.name for one in node.also])
            observer.message(f"{node.name} has the weights of {others} in other branches: one layer stands for all.")
        sharing = [one.name for one in graph.nodes if one.shares == node.name]
        if sharing:
            observer.message(f"{node.name} also has the weights of {listed(sharing)}: one layer stands for all.")
    if not graph.nodes:
        reasons = " ".join(words.left(graph.left)) or "It has no LSTM, GRU or RNN nodes."
        raise CheckpointError(f"None of the recurrent layers of {graph.path} can be compressed. {reasons}")


def _with_data(graph: Graph, given: Calibration, task: Task | None, observer: Observer) -> tuple[Graph, Data, Feeds]:
    """The graph with those nodes that their twins answer for, and the data that passes through it."""
    own = task if measures(task, given) else None
    if task is not None and task.has("training"):
        observer.message(
            f"training() of {task.source} is not used: what runs from its own file learns from the original's answers."
        )
    observer.stage("trying twins")
    session = graph.session(watched=True)
    feeds = feeds_for(session, given, task)
    # A task has data of its own to measure on.
    seen, apart = (feeds, feeds) if own is not None else _parted(feeds, observer)
    proven = _proven(graph, session, seen)
    if not proven.nodes:
        return proven, Data(), apart

    twins = Twins(proven.nodes)
    chained = _chained(proven, twins, session, seen)

    def passing() -> Iterator[dict[str, Entering]]:
        return entering(session, seen, proven.nodes, proven.stored, chained)

    def following(module: nn.Module) -> Items:
        """What enters each node behind the compressed ones, and what it gives in the original."""
        compact = proven.with_layers(module).session(watched=True)

        def behind() -> Iterator[dict[str, Entering]]:
            pairs = zip(entering(compact, seen, proven.nodes, proven.stored, chained), items(), strict=True)
            for found, original in pairs:
                with torch.no_grad():
                    wanted = twins(original)
                # Behind compressed nodes another branch may be run.
                every = {**original, **found}
                yield {name: replace(given, wanted=tuple(wanted[name])) for name, given in every.items()}

        return Kept(behind)

    items = Kept(passing)
    plain = graph.session()
    wanted = [] if own is not None else answers_of(plain, apart)

    def evaluate(module: nn.Module) -> dict[str, float]:
        changed = proven.with_layers(module).session() if stand_ins(module) else None
        if own is not None:
            return own.evaluate(Running(changed or plain, own.source))
        answers = wanted if changed is None else answers_of(changed, apart)
        return {**metrics_of(given, answers, apart, plain), ERROR: difference(answers, wanted, plain, apart)}

    few = seen.part(seen.samples - _apart(seen), seen.samples)

    @cache
    def original() -> list[Answers]:
        return answers_of(plain, few)

    def judge(module: nn.Module) -> float:
        """By some of the data that is learnt from; none of what is measured on is among it."""
        return difference(answers_of(proven.with_layers(module).session(), few), original(), plain, few)

    higher = own.higher_is_better if own is not None else feeds.targets is not None and METRICS[given.headline][1]
    # One layer has none before it.
    data = Data(items, items, evaluate=evaluate, higher_is_better=higher, judge=judge)
    return proven, data if len(proven.nodes) == 1 else replace(data, following=following), apart


def _apart(feeds: Feeds) -> int:
    """A quarter of the samples, in whole batches, of which there may be a fixed size."""
    return max(feeds.size, feeds.samples // _EVALUATED // feeds.size * feeds.size)


def _parted(feeds: Feeds, observer: Observer) -> tuple[Feeds, Feeds]:
    """What is calibrated on, and what is measured on."""
    kept = _apart(feeds)
    if feeds.samples - kept < feeds.size:
        observer.message(
            f"{feeds.source} has {feeds.samples} samples: what is measured is measured on those of calibration."
        )
        return feeds, feeds
    return feeds.part(0, feeds.samples - kept), feeds.part(feeds.samples - kept, feeds.samples)


def _proven(graph: Graph, session: Session, feeds: Feeds) -> Graph:
    """The graph without the nodes that nothing passes through, or whose twins answer otherwise on the first batch."""
    left = _not_always_run(graph, session, feeds)
    twins = Twins(graph.nodes)
    first = next(iter(feeds.sequences()))
    values = {**graph.stored, **session.answers(first[:1], feeds.states)[0]}
    for node in graph.nodes:
        if node.name in left:
            continue
        if not ran(node, values):
            left[node.name] = "is nothing that the model's inputs reach"
            continue
        given = entering_of(node, values)
        with torch.no_grad():
            pairs = zip(twins.outputs(node.name, given), outputs_of(node, values), strict=True)
            apart = max((float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs), default=0.0)
        if not apart <= (_QUANTISED_ALIKE if node.quantised else _ALIKE):
            left[node.name] = f"is not what torch computes (apart by {apart:.2g} on the first batch)"
    return graph.without({one.name: left[n.name] for n in graph.nodes if n.name in left for one in n.everywhere})


def _not_always_run(graph: Graph, session: Session, feeds: Feeds) -> dict[str, str]:
    """The nodes in branches that are not run in every call, and that they are not: what they do is not known then."""
    branched, calls = [node for node in graph.nodes if node.place], 0
    runs = dict.fromkeys([node.name for node in branched], 0)
    for sequence in feeds.sequences() if branched else ():
        for values in session.answers(sequence, feeds.states):
            calls += 1
            for node in branched:
                runs[node.name] += ran(node, values)
    never = f"stands in a branch that none of the {calls} calls of the calibration data runs"
    some = f"stands in a branch that only {{}} of the {calls} calls of the calibration data run"
    return {name: some.format(count) if count else never for name, count in runs.items() if count < calls}


def _chained(graph: Graph, twins: Twins, session: Session, feeds: Feeds) -> bool:
    """Whether every node goes on from call to call with its own state."""
    if not feeds.calls:
        return False
    calls = next((calls for calls in feeds.sequences() if len(calls) > 1), None)
    if calls is None:
        return False
    values = [{**graph.stored, **answers} for answers in session.answers(calls, feeds.states)]
    with torch.no_grad():
        return all(follows(twins, node.name, [entering_of(node, own) for own in values]) for node in graph.nodes)


def _finished(made: Compressed, graph: Graph, feeds: Feeds | None, observer: Observer) -> Compressed:
    """With the graph, the numbers of the whole file, and times of the graph where that has changed."""
    observer.stage("writing the graph")
    if made.model is None:
        raise RuntimeError("A graph is compressed as a model.")
    result = graph.with_layers(made.model)
    name, content = result.content()
    whole = graph.numbers()
    others = whole - graph.layer_sizes()[0]
    totals = made.report.totals
    # The twins of quantised nodes and of nodes in half precision are wider than these.
    numbers, size = graph.layer_sizes(made.modules)
    totals = replace(
        totals,
        parameters_before=numbers,
        bytes_before=size,
        ratio=round(numbers / totals.parameters_after, 1) if totals.parameters_after else 0.0,
        model_parameters_before=whole,
        model_parameters_after=totals.model_parameters_after + others,
    )
    report = replace(made.report, totals=totals, left={**graph.left, **made.report.left})
    if feeds is not None:
        report = replace(report, latency=_latency(made, graph, result, feeds))
    return replace(made, report=report, files={name: content})


def _latency(made: Compressed, graph: Graph, result: Graph, feeds: Feeds) -> Latency | None:
    """How long a call takes, before and after: of the graph, or of its recurrent layers alone in torch."""
    if not result.keeps_cores:
        alone = made.report.latency
        return None if alone is None else replace(alone, of=f"the recurrent layers alone, {LATENCY_OF}")
    found = call_times({"dense": graph, "compact": result}, feeds)
    return Latency(found["dense"], found["compact"], f"one call in {graph.runtime}, {LATENCY_OF}")
