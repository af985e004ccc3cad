"""Recurrent modules with HT weights, drop-ins for torch's own."""

from htcompress.nn.dense import DenseDirection, DenseLayer
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
    "DenseDirection",
    "DenseLayer",
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
