"""Matrices to be approximated: how they are folded, what an error of them counts, how cores are contracted."""

from htcompress.matrix.layout import Layout
from htcompress.matrix.metric import Metric

__all__ = ["Layout", "Metric"]
