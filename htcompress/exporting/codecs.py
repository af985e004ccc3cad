"""The numbers of a core in an ONNX graph, stored as its codec stores them and decoded by nodes.

What is computed of initializers alone, a runtime computes once, when it loads the model: so the file is small, and the
model runs as before.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from htcompress.exporting.graph import Graph
from htcompress.storage import Codec
from htcompress.storage.half import Half
from htcompress.storage.integer import Integer

_GROUP = 8
"""Codes that are unpacked together: so many of b bits fill b bytes."""


def stored(graph: Graph, core: Tensor, name: str, codec: Codec, scales: Tensor | None) -> str:
    """The name of a value with the numbers of a core in float32, whatever they are stored in."""
    if isinstance(codec, Half | Integer):
        known = graph.decoded.get(name)
        if known is None:
            parts = codec.encode(core.detach(), scales)
            shape = tuple(core.shape)
            known = (
                _half(graph, parts[""], name) if isinstance(codec, Half) else _integer(graph, codec, parts, shape, name)
            )
            graph.decoded[name] = known
        return known
    return graph.numbers(core, name)


def _half(graph: Graph, numbers: Tensor, name: str) -> str:
    return graph.cast(graph.raw(numbers, name), "FLOAT")


def _integer(graph: Graph, codec: Integer, parts: dict[str, Tensor], shape: tuple[int, ...], name: str) -> str:
    """(code + 1/2 - 2^(b-1)) * scale; codes lie in bytes one after the other, the lowest bit first."""
    count, width = torch.Size(shape).numel(), codec.width
    codes = parts[""]
    if width < 8:
        filled = -(-count // _GROUP) * width
        codes = torch.cat([codes, codes.new_zeros(filled - len(codes))])
        packed = graph.reshape(graph.cast(graph.raw(codes, name), "INT32"), -1, width)
        # A code lies in one byte or two: (first + 256 * second) div 2^shift mod 2^width.
        begin = [width * k for k in range(_GROUP)]
        first, second = (graph.once([min(at // 8 + more, width - 1) for at in begin], np.int32) for more in (0, 1))
        low, high = (graph.add("Gather", packed, places, axis=1) for places in (first, second))
        both = graph.add("Add", low, graph.add("Mul", high, graph.once([[256]], np.int32)))
        above = graph.add("Div", both, graph.once([[1 << at % 8 for at in begin]], np.int32))
        base = graph.once([[1 << width]], np.int32)
        value = graph.add("Sub", above, graph.add("Mul", graph.add("Div", above, base), base))
        value = graph.cut(graph.reshape(value, -1), 0, count)
    else:
        value = graph.raw(codes, name)
    rows = shape[0] if codec.by_rows else 1
    value = graph.reshape(graph.cast(value, "FLOAT"), rows, -1)
    value = graph.add("Add", value, graph.once(0.5 - (1 << width - 1), np.float32))
    scales = graph.reshape(graph.cast(graph.raw(parts["scales"], f"{name}_scales"), "FLOAT"), rows, 1)
    return graph.reshape(graph.add("Mul", value, scales), *shape)
