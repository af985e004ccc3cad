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
from htcompress.nn.replace import recurrent_modules, replace_modules
from htcompress.nn.settings import Kind, RecurrentSettings, is_recurrent
from htcompress.nn.weights import DenseWeight, HTWeight

__all__ = [
    "HTGRU",
    "HTLSTM",
    "HTRNN",
    "DenseLayer",
    "DenseSlot",
    "DenseWeight",
    "GateMatrices",
    "GateWeights",
    "HTCell",
    "HTGRUCell",
    "HTLSTMCell",
    "HTLayers",
    "HTRNNCell",
    "HTRecurrent",
    "HTWeight",
    "Kind",
    "RecurrentSettings",
    "is_recurrent",
    "module_class",
    "recurrent_modules",
    "replace_modules",
]
