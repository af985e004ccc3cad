"""Sizes of inputs: open ones are shared where they have to be, fixed ones are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from crossing import some
from test_onnx_models import HEAD, MODELS, converted

import htcompress
from htcompress.exporting.verify import session
from htcompress.task import load_task

LENGTHS = """
    def build(self):
        self.rnn = nn.LSTM(10, 8, batch_first=True)

    def forward(self, x, lengths):
        out, _ = self.rnn(x)
        {}


def inputs(generator):
    return torch.randn(4, 6, 10, generator=generator), torch.tensor([6, 5, 4, 3])
"""

READINGS = {
    "the last step": "return self.head(out[torch.arange(out.shape[0]), lengths - 1])",
    "gathered": "return self.head(out.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, 8))[:, 0])",
    "masked": "return (self.head(out) * (torch.arange(x.shape[1])[None] < lengths[:, None])[..., None]).sum(1)",
    "averaged": "return self.head(out.sum(1) / lengths[:, None])",
    "not at all": "return self.head(out[:, -1])",
}


def sizes(file: Path) -> dict[str, list[str | int]]:
    """The sizes of a model's inputs."""
    found = onnx.load(file).graph.input
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in found}


@pytest.mark.parametrize("reading", some(READINGS, "averaged", "gathered"))
def test_a_batch_of_two_inputs_is_open(tmp_path: Path, reading: str) -> None:
    task, out = converted(tmp_path, LENGTHS.format(READINGS[reading]))
    done = htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task)
    assert done.fixed == ()
    found = sizes(tmp_path / "model.onnx")
    assert isinstance(found["x"][0], str)
    assert isinstance(found["x"][1], str)
    assert found["lengths"] == [found["x"][0]] or reading == "not at all"
    model = htcompress.load(out, load_task(task).model()).eval()
    runtime = session((tmp_path / "model.onnx").read_bytes())
    for batch in (1, 2, 9):
        x, lengths = torch.randn(batch, 7, 10), torch.arange(batch) % 7 + 1
        with torch.no_grad():
            expected = model(x, lengths)
        (given,) = runtime.run(None, {"x": x.numpy(), "lengths": lengths.numpy()})
        assert float(np.abs(given - expected.numpy()).max()) < 1e-5


def test_a_number_of_steps_that_is_fixed_is_told(tmp_path: Path) -> None:
    loop = "h, c = self.cell(x[:, 0])\n        for t in x.unbind(1):\n            h, c = self.cell(t, (h, c))"
    task, out = converted(tmp_path, MODELS["a cell"].replace("h, c = self.cell(x[:, 0])", loop))
    done = htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task)
    assert done.fixed == ("axis 1 of x is fixed at 6",)


COUNTED = "torch.arange(len(out))", "torch.tensor(range(out.shape[0]))"


@pytest.mark.parametrize("counted", some(COUNTED, COUNTED[0]))
def test_a_batch_that_the_graph_counts_on_is_told(tmp_path: Path, counted: str) -> None:
    counted = f"return self.head(out[{counted}, lengths - 1])"
    task, out = converted(tmp_path, LENGTHS.format(counted))
    done = htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task)
    assert done.fixed == ("axis 0 of x is fixed at 4", "axis 0 of lengths is fixed at 4")
    assert sizes(tmp_path / "model.onnx")["lengths"] == [4]


def test_features_are_nothing_to_tell(tmp_path: Path) -> None:
    task, out = converted(tmp_path, MODELS["a state that comes in"])
    assert HEAD in task.read_text()
    assert htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task).fixed == ()
