"""Recurrent modules with HT weights, drop-ins for torch's own."""

from htcompress.nn.dense import DenseLayer, DenseSlot
from htcompress.nn.gates import GateMatrices, GateWeights
from htcompress.nn.recurrent import (
    HTGRU,
    HTLSTM,
    HTRNN,
    HTCell,
    HTGRUCell,
    HTLayers,
    HTLSTMCell,
    HTRecurrent,
    HTRNNCell,
    module_class,
)
from htcompress.nn.settings import RecurrentSettings, is_recurrent
from htcompress.nn.weights import Weight
from htcompress.vocabulary import Kind

__all__ = [
    "HTGRU",
    "HTLSTM",
    "HTRNN",
    "DenseLayer",
    "DenseSlot",
    "GateMatrices",
    "GateWeights",
    "HTCell",
    "HTGRUCell",
    "HTLSTMCell",
    "HTLayers",
    "HTRNNCell",
    "HTRecurrent",
    "Kind",
    "RecurrentSettings",
    "Weight",
    "is_recurrent",
    "module_class",
]
