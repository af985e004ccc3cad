"""Matrices in Hierarchical Tucker form: layouts, metrics, decomposition, the search for a good layout."""

from htcompress.matrix.decompose import RootSplit, SplitForm, WholeForm
from htcompress.matrix.htmatrix import HTMatrix
from htcompress.matrix.layout import Layout, LayoutKind
from htcompress.matrix.metric import Metric

__all__ = ["HTMatrix", "Layout", "LayoutKind", "Metric", "RootSplit", "SplitForm", "WholeForm"]
