"""A graph in onnxruntime: its answers, and what enters its recurrent nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from htcompress.errors import CheckpointError, TaskError
from htcompress.graphs.feeds import Feed, Feeds, Value
from htcompress.graphs.nodes import RecurrentNode
from htcompress.graphs.twins import Entering, joined

Answers = list[dict[str, np.ndarray]]
"""Of each call: outputs by name."""


class Runner:
    """A session of a graph that also puts out some of its inner values."""

    def __init__(
        self, model: onnx.ModelProto, path: Path, *, watched: Sequence[str] = (), threads: int | None = None
    ) -> None:
        """Start it, with as many threads as torch has unless they are said.

        Raises `CheckpointError` where onnxruntime cannot.
        """
        made = model
        own = {value.name for value in model.graph.output}
        given = {value.name for value in model.graph.input} | {i.name for i in model.graph.initializer}
        inner = [name for name in dict.fromkeys(watched) if name and name not in own | given]
        if inner:
            made = onnx.ModelProto()
            made.CopyFrom(model)
            made.graph.output.extend([onnx.ValueInfoProto(name=name) for name in inner])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                made.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise CheckpointError(f"onnxruntime cannot load {path}: {_first_line(error)}.") from error
        self.inputs = [Value.of(info) for info in self.session.get_inputs()]
        self.outputs = [Value.of(info) for info in self.session.get_outputs() if info.name in own]
        self._names = [info.name for info in self.session.get_outputs()]

    def answers(self, calls: Sequence[Feed], feeds: Feeds) -> Answers:
        """What is put out in each of a sequence of calls, states passed on; inputs that are watched among it."""
        passed: Feed = {}
        found: Answers = []
        for call in calls:
            feed = {**call, **passed}
            try:
                values = self.session.run(self._names, feed)
            except Exception as error:
                shapes = ", ".join(f"{name} {array.shape}" for name, array in feed.items())
                raise TaskError(f"onnxruntime cannot run the model on {shapes}: {_first_line(error)}.") from error
            out = dict(zip(self._names, values, strict=True))
            passed = {name: out[output] for name, output in feeds.states.items()}
            found.append({**feed, **out})
        return found


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")[:300]


def entering(
    runner: Runner, feeds: Feeds, nodes: Sequence[RecurrentNode], stored: Mapping[str, np.ndarray], chained: bool
) -> Iterator[dict[str, Entering]]:
    """What enters the nodes in every call, or in calls in a row where their states are passed on.

    Args:
        stored: values that are constants of the graph.
        chained: whether calls in a row are one sequence to all of the nodes.
    """
    for calls in feeds.sequences():
        values = [{**stored, **answers} for answers in runner.answers(calls, feeds)]
        each = [{node.name: entering_of(node, own) for node in nodes} for own in values]
        if chained:
            yield {node.name: joined([own[node.name] for own in each]) for node in nodes}
        else:
            yield from each


def watched(nodes: Sequence[RecurrentNode]) -> list[str]:
    """The values that `entering` needs, and what the nodes put out."""
    return [name for node in nodes for name in (node.x, node.lengths, *node.initial, *node.outputs) if name]


def entering_of(node: RecurrentNode, values: Mapping[str, np.ndarray]) -> Entering:
    """What enters a node, as torch has it."""

    def states(name: str) -> Tensor:
        found = torch.from_numpy(np.array(values[name], dtype=np.float32))
        return found.transpose(0, 1).contiguous() if node.batch_first else found

    x = torch.from_numpy(np.array(values[node.x], dtype=np.float32))
    x = x.transpose(0, 1).contiguous() if node.batch_first else x
    lengths = torch.from_numpy(np.array(values[node.lengths], dtype=np.int64)) if node.lengths else None
    blank = torch.zeros(node.settings.num_directions, x.shape[1], node.settings.hidden_size)
    initial = tuple(states(name) if name else blank for name in node.initial)
    return Entering(x, initial, lengths)


def outputs_of(node: RecurrentNode, values: Mapping[str, np.ndarray]) -> list[Tensor]:
    """What a node has put out, in the layout of torch; those that are read."""
    found = []
    for place, name in enumerate(node.outputs):
        if name:
            value = torch.from_numpy(np.array(values[name], dtype=np.float32))
            if node.batch_first:
                value = value.permute(1, 2, 0, 3) if place == 0 else value.transpose(0, 1)
            found.append(value)
    return found
