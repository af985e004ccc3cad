"""Truncated SVD: Hierarchical Tucker of order two, and nothing else."""

from __future__ import annotations

from dataclasses import replace

from htcompress.forms.form import Problem
from htcompress.forms.ht_search import HTSearch
from htcompress.vocabulary import LayoutKind


def low_rank_search(problem: Problem) -> HTSearch:
    """The truncated SVDs of a matrix in its metric."""
    return HTSearch(replace(problem, layout=LayoutKind.SVD))
