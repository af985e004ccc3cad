"""`convert` of an ONNX file: the stages of `htcompress.compression` on the torch twins of its recurrent nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from htcompress.compression import Compressed, Opened, compressed_model
from htcompress.data import Data, Items
from htcompress.directory.write import MODEL
from htcompress.errors import CheckpointError, RequestError
from htcompress.graphs.calibration import METRICS, Calibration
from htcompress.graphs.feeds import Feeds
from htcompress.graphs.file import OnnxFile
from htcompress.graphs.measuring import ERROR, answers_of, difference, feeds_for, metrics_of
from htcompress.graphs.running import Runner, entering, entering_of, outputs_of, watched
from htcompress.graphs.twins import Entering, Twins, follows
from htcompress.isolation import restored
from htcompress.model.latency import LATENCY_OF, interleaved
from htcompress.model.replace import stand_ins
from htcompress.observer import Observer
from htcompress.report import Latency, words
from htcompress.request import Request
from htcompress.sources.read import identified
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


def converted(checkpoint: Path, request: Request, given: Calibration, observer: Observer | None = None) -> Compressed:
    """Compress the recurrent nodes of an ONNX file.

    Args:
        checkpoint: the file.
        request: as for any checkpoint; its task is not used.
        given: data; without any, the weights alone are worked from.

    Returns:
        as for any checkpoint; `files` has the graph with its recurrent nodes replaced.

    Raises:
        HTCompressError: the file, its nodes or the data are nothing that can be worked with.
    """
    observer = observer or Observer()
    given.check()
    if request.task is not None:
        raise RequestError("An ONNX file runs by itself: give --calibration X.npz in place of --task.")
    if request.weights is not None or request.device != "cpu":
        raise RequestError("An ONNX file holds one model and is run on the CPU: leave out --weights and --device.")
    with restored():
        observer.stage("reading the graph")
        _, digest, _ = identified(checkpoint)
        graph = OnnxFile.read(checkpoint)
        source = {"file": checkpoint.name, "sha256": digest, "path": str(checkpoint), "format": "onnx"}
        data, feeds, proven = Data(), None, graph
        if given.file is not None and graph.nodes:
            proven, data, feeds = _with_data(graph, given, observer)
        _tell(proven, observer)
        twins = Twins(proven.nodes)
        model = Opened(twins, lambda: Twins(proven.nodes), twins.state_dict(), source)
        made = compressed_model(model, request, data, observer)
        return _finished(made, proven, feeds, observer)


def _tell(graph: OnnxFile, observer: Observer) -> None:
    for sentence in words.left(graph.left):
        observer.message(sentence)
    if not graph.nodes:
        reasons = " ".join(words.left(graph.left)) or "It has no LSTM, GRU or RNN nodes."
        raise CheckpointError(f"None of the recurrent nodes of {graph.path} can be compressed. {reasons}")


def _with_data(graph: OnnxFile, given: Calibration, observer: Observer) -> tuple[OnnxFile, Data, Feeds]:
    """The graph with those nodes that their twins answer for, and the data that passes through it."""
    if given.file is None:
        raise ValueError("There is no file of data.")
    observer.stage("trying twins")
    runner = Runner(graph.model, graph.path, watched=watched(graph.nodes))
    feeds = feeds_for(runner, given)
    # Whole batches, of which there may be a fixed size.
    kept = max(feeds.size, feeds.samples // _EVALUATED // feeds.size * feeds.size)
    if feeds.samples - kept < feeds.size:
        observer.message(
            f"{given.file} has {feeds.samples} samples: what is measured is measured on those of calibration."
        )
        seen, apart = feeds, feeds
    else:
        seen, apart = feeds.part(0, feeds.samples - kept), feeds.part(feeds.samples - kept, feeds.samples)
    proven = _proven(graph, runner, seen)
    if not proven.nodes:
        return proven, Data(), apart

    twins = Twins(proven.nodes)
    chained = _chained(proven, twins, runner, seen)

    def passing() -> Iterator[dict[str, Entering]]:
        return entering(runner, seen, proven.nodes, proven.stored, chained)

    def following(module: nn.Module) -> Items:
        """What enters each node behind the compressed ones, and what it gives in the original."""
        compact = Runner(proven.with_layers(module), graph.path, watched=watched(proven.nodes))

        def behind() -> Iterator[dict[str, Entering]]:
            pairs = zip(entering(compact, seen, proven.nodes, proven.stored, chained), items(), strict=True)
            for found, original in pairs:
                with torch.no_grad():
                    wanted = twins(original)
                yield {name: replace(given, wanted=tuple(wanted[name])) for name, given in found.items()}

        return Kept(behind)

    items = Kept(passing)
    plain = Runner(graph.model, graph.path)
    wanted = answers_of(plain, apart)

    def evaluate(module: nn.Module) -> dict[str, float]:
        layers = stand_ins(module)
        answers = wanted if not layers else answers_of(Runner(graph.with_layers(module), graph.path), apart)
        return {**metrics_of(given, answers, apart, plain), ERROR: difference(answers, wanted, plain, apart)}

    higher = False if feeds.targets is None else METRICS[given.headline][1]
    # One layer has none before it.
    data = Data(items, items, evaluate=evaluate, higher_is_better=higher)
    return proven, data if len(proven.nodes) == 1 else replace(data, following=following), apart


def _proven(graph: OnnxFile, runner: Runner, feeds: Feeds) -> OnnxFile:
    """The graph without the nodes that nothing passes through, or whose twins answer otherwise on the first batch."""
    twins, left = Twins(graph.nodes), dict(graph.left)
    first = next(iter(feeds.sequences()))
    values = {**graph.stored, **runner.answers(first[:1], feeds)[0]}
    for node in graph.nodes:
        given = entering_of(node, values)
        with torch.no_grad():
            pairs = zip(twins.outputs(node.name, given), outputs_of(node, values), strict=True)
            apart = max((float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs), default=0.0)
        if not apart <= (_QUANTISED_ALIKE if node.quantised else _ALIKE):
            left[node.name] = f"is not what torch computes (apart by {apart:.2g} on the first batch)"
    return replace(graph, nodes=[node for node in graph.nodes if node.name not in left], left=left)


def _chained(graph: OnnxFile, twins: Twins, runner: Runner, feeds: Feeds) -> bool:
    """Whether every node goes on from call to call with its own state."""
    if not feeds.calls:
        return False
    calls = next(iter(feeds.sequences()))
    values = [{**graph.stored, **answers} for answers in runner.answers(calls, feeds)]
    with torch.no_grad():
        return all(follows(twins, node.name, [entering_of(node, own) for own in values]) for node in graph.nodes)


def _finished(made: Compressed, graph: OnnxFile, feeds: Feeds | None, observer: Observer) -> Compressed:
    """With the graph, the numbers of the whole file, and times in onnxruntime."""
    observer.stage("writing the graph")
    if made.model is None:
        raise RuntimeError("A graph is compressed as a model.")
    result = graph.with_layers(made.model)
    try:
        onnx.checker.check_model(result)
    except onnx.checker.ValidationError as error:
        # What was not valid before may be so still.
        try:
            onnx.checker.check_model(graph.model)
        except onnx.checker.ValidationError:
            pass
        else:
            raise RuntimeError(f"The graph that was made is not valid: {error}") from error
    others = sum(int(np.prod(tensor.dims)) for tensor in graph.weights())
    others -= sum(t.numel() for node in graph.nodes for t in node.weights.values())
    totals = made.report.totals
    totals = replace(
        totals,
        model_parameters_before=totals.model_parameters_before + max(0, others),
        model_parameters_after=totals.model_parameters_after + max(0, others),
    )
    report = replace(made.report, totals=totals, left={**graph.left, **made.report.left})
    if feeds is not None:
        report = replace(report, latency=_latency(graph, result, feeds))
    return replace(made, report=report, files={MODEL: result.SerializeToString()})


def _latency(graph: OnnxFile, result: onnx.ModelProto, feeds: Feeds) -> Latency:
    """How long a call takes in onnxruntime, before and after."""
    calls = next(iter(feeds.sequences()))[:1]
    runners = {name: Runner(m, graph.path, threads=1) for name, m in (("dense", graph.model), ("compact", result))}
    found = interleaved({name: partial(runner.answers, calls, feeds) for name, runner in runners.items()})
    return Latency(found["dense"], found["compact"], f"one call in onnxruntime, {LATENCY_OF}")
