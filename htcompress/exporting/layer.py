"""A recurrent layer alone as an ONNX model: the call of torch's module."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from htcompress.errors import RequestError
from htcompress.exporting.graph import IR_VERSION, OPSET, Graph
from htcompress.exporting.recurrent import add_recurrent, check_expressible
from htcompress.exporting.verify import difference, session
from htcompress.nn.recurrent import HTRecurrent

TRIED = ((1, 1), (3, 7), (5, 2))
"""Batches and lengths that each model is tried on."""


def layer_model(module: HTRecurrent, name: str, *, lengths: bool = False) -> tuple[bytes, float]:
    """The layer as an ONNX model, and the largest difference from torch.

    Its inputs are `input`, `h_0` and, for an LSTM, `c_0`; its outputs `output`, `h_n`, `c_n`, with torch's shapes for
    a batch; a cell has no `output`.

    Args:
        module: the compressed layer.
        name: what messages call it.
        lengths: whether there is an input `lengths` besides, (batch,) in int32, of sequences that are padded at their
            ends: what a packed sequence is in torch.

    Raises `RequestError` where ONNX cannot express the layer.
    """
    check_expressible(module.settings, name)
    if lengths and module.settings.cell:
        raise RequestError(f"Layer {name or '(top level)'} is a cell: it takes one step, and has no lengths.")
    module = module.float().eval()
    made = _model(module, lengths).SerializeToString()
    runtime, worst = session(made), 0.0
    for batch, steps in TRIED:
        inputs = _inputs(module, batch, steps)
        if lengths:
            inputs["lengths"] = 1 + torch.arange(batch, dtype=torch.int32) * 3 % steps
            inputs["lengths"][batch // 2] = steps
        worst = max(worst, difference(runtime, inputs, _expected(module, inputs), f"batch {batch}, {steps} steps"))
    return made, worst


def _model(module: HTRecurrent, lengths: bool) -> onnx.ModelProto:
    s, graph = module.settings, Graph("")
    names = ["h", "c"][: s.recurrence.states]
    sizes = [s.state_size, s.hidden_size]
    given = [f"{n}_0" for n in names]
    x, initial = "input", given
    if s.cell:
        x, initial = graph.unsqueeze(x, 0), [graph.unsqueeze(value, 0) for value in given]
    elif s.batch_first:
        x = graph.add("Transpose", x, perm=[1, 0, 2])
    y, after = add_recurrent(graph, module, x, initial, lengths="lengths" if lengths else "")
    results = dict(zip([f"{n}_n" for n in names], after, strict=True))
    if s.cell:
        results = {n: graph.squeeze(value, 0) for n, value in results.items()}
    else:
        results = {"output": graph.add("Transpose", y, perm=[1, 0, 2]) if s.batch_first else y, **results}
    for result, value in results.items():
        graph.nodes.append(helper.make_node("Identity", [value], [result], name=result))
    sequence = ["batch"] if s.cell else ["batch", "time"] if s.batch_first else ["time", "batch"]
    stack = [] if s.cell else [s.num_layers * s.num_directions]
    states: list[list[str | int]] = [[*stack, "batch", size] for size, _ in zip(sizes, names, strict=False)]
    width = s.state_size * s.num_directions
    shapes: dict[str, list[str | int]] = {"input": [*sequence, s.input_size], **dict(zip(given, states, strict=True))}
    shapes |= {"output": [*sequence, width], **dict(zip((f"{n}_n" for n in names), states, strict=True))}

    def infos(which: Sequence[str]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in which]

    inputs = infos(["input", *given])
    if lengths:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]))
    body = helper.make_graph(
        graph.nodes, f"htcompress_{s.kind.value}", inputs, infos(list(results)), graph.initializers
    )
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="htcompress"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _inputs(module: HTRecurrent, batch: int, steps: int) -> dict[str, Tensor]:
    s = module.settings
    generator = torch.Generator().manual_seed(batch)
    sequence = [batch] if s.cell else [batch, steps] if s.batch_first else [steps, batch]
    stack = [] if s.cell else [s.num_layers * s.num_directions]
    shapes = {"input": (*sequence, s.input_size), "h_0": (*stack, batch, s.state_size)}
    if s.recurrence.states > 1:
        shapes["c_0"] = (*stack, batch, s.hidden_size)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    # What enters the gates is about 1: far beyond that, float32 itself is off by more than what is looked for.
    norms = [gates.written_out().ih for gates in module.directions().values()]
    largest = max(float(ih.detach().norm(dim=1).max()) for ih in norms if ih is not None)
    inputs["input"] /= max(1.0, largest)
    return inputs


def _expected(module: HTRecurrent, inputs: dict[str, Tensor]) -> list[Tensor]:
    x, lengths = inputs["input"], inputs.get("lengths")
    state = [inputs[name] for name in ("h_0", "c_0") if name in inputs]
    s = module.settings
    given = x if lengths is None else pack_padded_sequence(x, lengths, s.batch_first, enforce_sorted=False)
    with torch.no_grad():
        result = module(given, tuple(state) if len(state) == 2 else state[0])
    if s.cell:
        return list(result) if isinstance(result, tuple) else [result]
    output, last = result
    if lengths is not None:
        output, _ = pad_packed_sequence(output, s.batch_first)
    return [output, *(last if isinstance(last, tuple) else [last])]
