"""Searches as the planning asks for them, with a matrix and what it must know."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from htcompress.forms import Problem, searched
from htcompress.forms.form import MatrixSearch
from htcompress.matrix.blocks import Blocks
from htcompress.matrix.metric import Metric
from htcompress.vocabulary import Format


def search_of(matrix: Tensor | Blocks, metric: Metric, *, form: str = Format.HT.value, **problem: Any) -> MatrixSearch:
    """The candidates for a matrix in a form; keywords are those of `Problem`."""
    return searched(Problem(Blocks.of(matrix), metric, **problem), form)
