"""Dense recurrent modules that compute what torch has none for: other activations, a GRU that resets its state before
the candidate's matrix.

They stand for layers of ONNX and Keras, are instances of torch's classes with torch's weights, and are replaced as
those are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from htcompress.nn.calling import CalledAsLayers
from htcompress.nn.kernel_weights import KernelWeights
from htcompress.nn.recurrence import State
from htcompress.nn.settings import RecurrentSettings, torch_class
from htcompress.nn.stepwise import run_stepwise


class _Adapted(CalledAsLayers):
    """What the classes share."""

    def _run(self, x: Tensor, batch_sizes: Tensor | None, state: State) -> tuple[Tensor, State]:
        s, last = self.settings, []
        for layer in range(s.num_layers):
            span = slice(layer * s.num_directions, (layer + 1) * s.num_directions)
            weights = [self._weights(names) for names in s.weight_names[span]]
            before = tuple(t[span] for t in state)
            x, after = run_stepwise(s.recurrence, x, batch_sizes, before, weights)
            last.append(after)
        return x, tuple(torch.cat(parts) for parts in zip(*last, strict=True))

    def _weights(self, names: list[str]) -> KernelWeights:
        ih, hh, *biases = (getattr(self, name) for name in names)
        bias_ih, bias_hh = biases or (None, None)
        return KernelWeights(None, ih, hh, bias_ih, bias_hh, None)


class AdaptedLSTM(_Adapted, nn.LSTM):  # type: ignore[misc]
    """`torch.nn.LSTM` with other activations."""


class AdaptedGRU(_Adapted, nn.GRU):  # type: ignore[misc]
    """`torch.nn.GRU` with other activations, or with the reset gate before the candidate's matrix."""


class AdaptedRNN(_Adapted, nn.RNN):  # type: ignore[misc]
    """`torch.nn.RNN` with another activation."""


ADAPTED: tuple[type[nn.Module], ...] = (AdaptedLSTM, AdaptedGRU, AdaptedRNN)


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of dense recurrent modules, torch's or one of these, that a class is, or is derived from."""
    return next((own for own in ADAPTED if issubclass(cls, own)), None) or torch_class(cls)


def dense_module(settings: RecurrentSettings) -> nn.Module:
    """A module with these settings and drawn weights: torch's own where torch has it.

    Raises `ValueError` for cells, and for dropout or projections of what torch has not.
    """
    s = settings
    given: dict[str, Any] = {"bias": s.bias, "batch_first": s.batch_first, "bidirectional": s.bidirectional}
    given |= {"num_layers": s.num_layers, "dropout": s.dropout}
    if s.cell:
        raise ValueError("A cell is no layer.")
    if s.proj_size:
        given["proj_size"] = s.proj_size
    if s.recurrence.nonlinearity is not None:
        given["nonlinearity"] = s.recurrence.nonlinearity
    if s.recurrence.native:
        return s.recurrence.torch_layer(s.input_size, s.hidden_size, **given)
    if s.proj_size or s.dropout:
        raise ValueError("Layers with other activations than torch's have no projections and no dropout.")
    cls = next(cls for cls in ADAPTED if issubclass(cls, s.recurrence.torch_layer))
    made = cls(s.input_size, s.hidden_size, **given)
    made.settings = s  # type: ignore[assignment]
    return made
