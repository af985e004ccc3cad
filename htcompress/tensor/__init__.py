"""Tensors in Hierarchical Tucker form; knows nothing of networks."""

from htcompress.tensor.hsvd import Decomposition, decompose, ht_svd
from htcompress.tensor.ht import HTTensor, Identity
from htcompress.tensor.ranks import RankModel, RankPoint, parameter_count, pareto, rank_path
from htcompress.tensor.tree import DimensionTree, Nested, Node

__all__ = [
    "Decomposition",
    "DimensionTree",
    "HTTensor",
    "Identity",
    "Nested",
    "Node",
    "RankModel",
    "RankPoint",
    "decompose",
    "ht_svd",
    "parameter_count",
    "pareto",
    "rank_path",
]
