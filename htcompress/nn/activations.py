"""The activations that recurrences may have in the place of torch's own: what Keras and ONNX have beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """A function of single numbers.

    Attributes:
        word: what it is called in configurations.
        apply: the function.
        onnx: its name in ONNX, in the operator's own spelling.
        alpha, beta: what ONNX's function takes; None where it takes none.
    """

    word: str
    apply: Callable[[Tensor], Tensor]
    onnx: str
    alpha: float | None = None
    beta: float | None = None


def _hard_sigmoid(x: Tensor) -> Tensor:
    return (0.2 * x + 0.5).clamp(0.0, 1.0)


def _linear(x: Tensor) -> Tensor:
    return x


_EVERY = (
    Activation("sigmoid", torch.sigmoid, "Sigmoid"),
    Activation("tanh", torch.tanh, "Tanh"),
    Activation("relu", torch.relu, "Relu"),
    # Of ONNX, and of Keras before version 3.
    Activation("hard_sigmoid", _hard_sigmoid, "HardSigmoid", 0.2, 0.5),
    # Of Keras 3, and torch's hardsigmoid.
    Activation("hard_sigmoid_sixth", F.hardsigmoid, "HardSigmoid", 1 / 6, 0.5),
    Activation("softsign", F.softsign, "Softsign"),
    Activation("softplus", F.softplus, "Softplus"),
    Activation("elu", F.elu, "Elu", 1.0),
    Activation("linear", _linear, "Affine", 1.0, 0.0),
)

ACTIVATIONS = {activation.word: activation for activation in _EVERY}
"""By their words."""


def activation_of(onnx: str, alpha: float | None, beta: float | None) -> Activation | None:
    """What ONNX calls so, its parameters given or the operator's own; None where there is none like it."""
    for activation in _EVERY:
        if activation.onnx.lower() == onnx.lower():
            wanted = [(alpha, activation.alpha), (beta, activation.beta)]
            if all(given is None or (own is not None and abs(given - own) < 1e-6) for given, own in wanted):
                return activation
    return None
