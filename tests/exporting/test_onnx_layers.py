"""Recurrent layers alone as ONNX: onnxruntime does what torch's original does, whatever the options."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from crossing import crossed
from layers import HIDDEN, INPUTS, LAYOUTS, SCOPES, TABLE, drop_in, make
from onnx import numpy_helper
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import htcompress
from htcompress.errors import RequestError
from htcompress.exporting.layer import TRIED, layer_model
from htcompress.exporting.verify import session
from htcompress.nn import HTRecurrent

EXPRESSIBLE = [case for case in TABLE if "proj_size" not in case[1]]
PRODUCTS = {"MatMul", "Reshape", "Slice", "Transpose", "Gather", "Concat", "Squeeze", "Unsqueeze", "Identity"}
CONSTANTS = {"ConstantOfShape", "EyeLike"}
RECURRENT = {"LSTM", "GRU", "RNN"}


def run(made: bytes, **inputs: torch.Tensor) -> list[np.ndarray]:
    return session(made).run(None, {name: value.numpy() for name, value in inputs.items()})


def close(found: list[np.ndarray], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == tuple(b.shape)
        assert float(np.abs(a - b.detach().numpy()).max()) < 1e-5


@pytest.mark.parametrize(("kind", "options", "scope", "layout"), crossed(EXPRESSIBLE), ids=str)
def test_every_option(kind: str, options: dict[str, object], scope: str, layout: str) -> None:
    module = make(kind, **options)
    replaced = drop_in(module, scope, layout)
    made, error = layer_model(replaced, "rnn")
    assert error < 1e-5
    # A batch and a length that the export did not see, against the original, not against what was exported.
    assert (4, 9) not in TRIED
    x = torch.randn(4, 9, INPUTS) if options["batch_first"] else torch.randn(9, 4, INPUTS)
    stack = options["num_layers"] * (2 if options["bidirectional"] else 1)  # type: ignore[operator]
    states = {"h_0": torch.randn(stack, 4, HIDDEN)}
    if kind == "LSTM":
        states["c_0"] = torch.randn(stack, 4, HIDDEN)
    output, last = module(x, tuple(states.values()) if kind == "LSTM" else states["h_0"])
    close(run(made, input=x, **states), [output, *(last if kind == "LSTM" else [last])])
    looks_standard(made, replaced, layout if scope != "dense" else "split")


def looks_standard(made: bytes, module: HTRecurrent, layout: str) -> None:
    model = onnx.load_from_string(made)
    assert [entry.domain for entry in model.opset_import] == [""]
    found = Counter(node.op_type for node in model.graph.node)
    assert sum(found[op] for op in RECURRENT) == module.settings.num_layers
    allowed = PRODUCTS | CONSTANTS | RECURRENT | (set() if layout != "paired" else {"Einsum"})
    exponents = [g.input_exponents for g in module.directions().values() if g.input_exponents is not None]
    assert set(found) <= allowed | ({"Cast", "Pow", "Mul"} if exponents else set())
    # The file holds the stored numbers and no others.
    numbers = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    stored = sum(parameter.numel() for parameter in module.parameters())
    assert sum(array.size for array in numbers if array.dtype == np.float32) == stored
    assert stored == module.parameter_count - sum(-(-len(own) // 4) for own in exponents)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "tanh", "relu"])
def test_lengths_are_packed_sequences(kind: str, both: bool, first: bool) -> None:
    module = make(kind, num_layers=2, bidirectional=both, batch_first=first)
    made, _ = layer_model(drop_in(module), "rnn", lengths=True)
    x, lengths = torch.randn(4, 9, INPUTS), torch.tensor([3, 9, 1, 6], dtype=torch.int32)
    x = x if first else x.transpose(0, 1).contiguous()
    states = {"h_0": torch.randn(4 if both else 2, 4, HIDDEN)}
    if kind == "LSTM":
        states["c_0"] = torch.randn(4 if both else 2, 4, HIDDEN)
    packed = pack_padded_sequence(x, lengths, first, enforce_sorted=False)
    output, last = module(packed, tuple(states.values()) if kind == "LSTM" else states["h_0"])
    padded, _ = pad_packed_sequence(output, first)
    # What stands behind the end of a sequence plays no part.
    behind = torch.arange(9)[None] >= lengths[:, None]
    x[behind if first else behind.T] = 1e3
    close(run(made, input=x, lengths=lengths, **states), [padded, *(last if kind == "LSTM" else [last])])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell: type[nn.Module], layout: str, scope: str) -> None:
    module = cell(INPUTS, HIDDEN)
    made, _ = layer_model(drop_in(module, scope, layout), "cell")
    x, h, c = torch.randn(4, INPUTS), torch.randn(4, HIDDEN), torch.randn(4, HIDDEN)
    if cell is nn.LSTMCell:
        close(run(made, input=x, h_0=h, c_0=c), list(module(x, (h, c))))
    else:
        close(run(made, input=x, h_0=h), [module(x, h)])


@pytest.mark.parametrize("form", ["ht", "tt", "tr", "bt", "svd"])
def test_the_formats_to_compare_with(form: str) -> None:
    model = nn.LSTM(48, 12, batch_first=True)
    compact = htcompress.compress(model, budget=800, format=form).model
    made, error = layer_model(compact, "")
    assert error < 1e-5
    x, state = torch.randn(2, 5, 48), torch.zeros(1, 2, 12)
    with torch.no_grad():
        output, (h, c) = compact(x)
    close(run(made, input=x, h_0=state, c_0=state), [output, h, c])


def test_a_large_matrix_stays_factored() -> None:
    compact = htcompress.compress(nn.LSTM(3600, 16), budget=1500).model
    made, _ = layer_model(compact, "")
    assert len(made) < 4 * 1500 + 16_384


@pytest.mark.parametrize("scope", SCOPES)
def test_projections_are_refused_by_name(scope: str) -> None:
    module = nn.LSTM(INPUTS, HIDDEN, proj_size=3)
    with pytest.raises(RequestError, match=r"Layer encoder\.rnn has a projection \(proj_size=3\).*--to dense"):
        layer_model(drop_in(module, scope), "encoder.rnn")
