"""Inputs in unlike units: a power of two for each that makes them alike.

A trained model may read pascals beside volts, or raw spectra: the columns of its W_ih then differ by as much the other
way. In one matrix such columns cannot share a scale of rounding or a low rank, and what the metric adds to each of them
alike hides the small ones. A byte for each input takes the units out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int8
from torch import Tensor

from htcompress.model.statistics import DirectionStatistics
from htcompress.nn.dense import DenseDirection, DenseLayer
from htcompress.spread import scales_of

_UNLIKE = 16.0
"""How many times the smallest scale the largest is from which on inputs are unlike: four bits of rounding."""
_COUNTS = 1e-2
"""Of the median part that inputs have in what the gates see: what has less is no reason to part the others."""
_MOST = 100
"""The largest exponent: powers of two that float32 holds, and their inverses."""


def exponents_of(
    layers: Sequence[DenseLayer], statistics: Mapping[str, Mapping[str, DirectionStatistics]]
) -> dict[tuple[str, str], Tensor]:
    """The exponents of inputs in unlike units, by layer and direction; see `input_exponents`."""
    found = {
        (layer.name, name): input_exponents(direction, statistics[layer.name][name])
        for layer in layers
        for name, direction in layer.directions.items()
        if name in statistics.get(layer.name, {})
    }
    return {where: own for where, own in found.items() if own is not None}


def input_exponents(direction: DenseDirection, seen: DirectionStatistics) -> Int8[Tensor, " inputs"] | None:
    """The exponents of the powers of two that inputs are to be read times; None where they are alike as they are.

    The scale of an input is sqrt(E d^4 / E d^2) with d its difference from its mean: the size that it has where it
    varies, which is 1 for a flag, however rare, and about its standard deviation for a measurement.
    """
    count = direction.ih.shape[1]
    scale, spread = scales_of(seen.inputs)
    moment = seen.gradients_ih
    weight = (moment if moment.ndim == 1 else moment.diagonal()).double()[:, None]
    norms = torch.cat([(weight * part.cpu().double().square()).sum(0) for part in (direction.ih, direction.hh)])
    part = norms * spread
    live = part[part > 0]
    counts = part > _COUNTS * live.median() if len(live) else part > 0
    inputs, states = scale[:count][counts[:count]], scale[count:][counts[count:]]
    if not len(inputs):
        return None
    # The states, which the matrix may share, count as one input.
    every = torch.cat([inputs, states.median()[None]]) if len(states) else inputs
    if float(every.max()) < _UNLIKE * float(every.min()):
        return None
    within = scale[:count].clamp(float(inputs.min()), float(inputs.max()))
    return (-within.log2().round()).clamp(-_MOST, _MOST).to(torch.int8)
