"""The forms that a matrix may be stored in: Hierarchical Tucker, and what it is compared with, behind one protocol."""

from htcompress.forms.block_term import BlockTerm
from htcompress.forms.dense import DenseMatrix
from htcompress.forms.form import Choice, Columns, Form, Problem
from htcompress.forms.ht import HTMatrix
from htcompress.forms.network_matrix import NetworkMatrix
from htcompress.forms.registry import FORMS, form_named, searched, zeros
from htcompress.forms.tensor_ring import TensorRing
from htcompress.forms.tensor_train import TensorTrain

__all__ = [
    "FORMS",
    "BlockTerm",
    "Choice",
    "Columns",
    "DenseMatrix",
    "Form",
    "HTMatrix",
    "NetworkMatrix",
    "Problem",
    "TensorRing",
    "TensorTrain",
    "form_named",
    "searched",
    "zeros",
]
