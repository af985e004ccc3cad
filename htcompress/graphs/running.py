"""A graph of ONNX in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnxruntime
import torch

from htcompress.errors import CheckpointError, TaskError
from htcompress.graphs.feeds import Feed, Value
from htcompress.graphs.graph import Answers


class Runner:
    """A session of a graph that also puts out some of its inner values."""

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Path,
        passed: Mapping[str, str],
        *,
        watched: Sequence[str] = (),
        threads: int | None = None,
    ) -> None:
        """Start it, with as many threads as torch has unless they are said. For `passed` see `Session`.

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
        self.passed = passed
        self._names = [info.name for info in self.session.get_outputs()]

    def answers(self, calls: Sequence[Feed], states: Mapping[str, str]) -> Answers:
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
            passed = {name: out[output] for name, output in states.items()}
            found.append({**feed, **out})
        return found


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")[:300]
