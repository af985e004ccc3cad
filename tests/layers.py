"""Every option of torch's recurrent layers with every way to store them, at full rank: they equal torch's own."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import nn

from htcompress.forms.ht import HTMatrix
from htcompress.matrix import Layout
from htcompress.nn import DenseDirection, GateMatrices, HTRecurrent, RecurrentSettings, module_class

INPUTS, HIDDEN = 6, 5
STEPS, BATCH = 7, 4
SCOPES = (
    "dense",
    "input",
    "separate",
    "integrated",
    "integrated, biases apart",
    "separate, inputs scaled",
    "integrated, inputs scaled",
)
LAYOUTS = ("svd", "split", "paired")


def full_rank(matrix: torch.Tensor, layout: str) -> HTMatrix:
    rows, cols = matrix.shape
    a, b = (-(-rows // 2), 2), (-(-cols // 3), 3)
    made = {
        "svd": lambda: Layout.order_two(rows, cols),
        "split": lambda: Layout.split(a, b, rows=rows, cols=cols),
        "paired": lambda: Layout.paired(a, b, rows=rows, cols=cols),
    }[layout]()
    return HTMatrix.from_dense(matrix, made)


def drop_in(module: nn.Module, scope: str = "integrated", layout: str = "split") -> HTRecurrent:
    settings = RecurrentSettings.of(module)
    matrices = []
    scope, _, scaled = scope.partition(", inputs ")
    for read in DenseDirection.read_all(settings, dict(module.named_parameters())):
        exponents = torch.arange(read.ih.shape[1]) % 5 * 3 - 6
        direction = replace(read, ih=torch.ldexp(read.ih, -exponents)) if scaled else read
        biases = {"bias": direction.bias, "bias_hn": direction.bias_hn}
        hr = None if direction.hr is None else full_rank(direction.hr, layout)
        if scope == "dense":
            matrices.append(direction.matrices())
        elif scope == "input":
            dense = direction.matrices()
            matrices.append(GateMatrices(ih=full_rank(direction.ih, layout), hh=dense.hh, hr=dense.hr, **biases))
        elif scope == "separate":
            ih, hh = full_rank(direction.ih, layout), full_rank(direction.hh, layout)
            matrices.append(GateMatrices(ih=ih, hh=hh, hr=hr, **biases))
        elif scope == "integrated":
            matrices.append(GateMatrices(joint=full_rank(direction.joint(with_biases=True), layout), hr=hr))
        else:
            joint = full_rank(direction.joint(with_biases=False), layout)
            matrices.append(GateMatrices(joint=joint, hr=hr, **biases))
        if scaled:
            matrices[-1] = replace(matrices[-1], input_exponents=exponents)
    return module_class(settings).from_matrices(settings, matrices).to(next(module.parameters()).dtype)


def make(kind: str, **options: object) -> nn.Module:
    if kind in ("tanh", "relu"):
        return nn.RNN(INPUTS, HIDDEN, nonlinearity=kind, **options)
    return getattr(nn, kind)(INPUTS, HIDDEN, **options)


OPTIONS = [
    {"num_layers": layers, "bidirectional": both, "bias": bias, "batch_first": first}
    for layers, both, bias, first in itertools.product((1, 2), (False, True), (True, False), (False, True))
]
CASES = [(kind, options) for kind in ("LSTM", "GRU", "tanh", "relu") for options in OPTIONS]
CASES += [("LSTM", {**options, "proj_size": 3}) for options in OPTIONS]


# Every option meets every scope; the layouts take turns, so that each scope meets each of them many times.
TABLE = [
    (kind, options, scope, LAYOUTS[(i + j) % 3])
    for i, (kind, options) in enumerate(CASES)
    for j, scope in enumerate(SCOPES)
]
