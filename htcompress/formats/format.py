"""The names of the formats."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """How a matrix may be factored: Hierarchical Tucker, and what it is compared with."""

    HT = "ht"
    TT = "tt"
    TR = "tr"
    BT = "bt"
    SVD = "svd"

    @property
    def long_name(self) -> str:
        """The name in full."""
        return _TITLES[self.value]


_TITLES = {
    "ht": "Hierarchical Tucker",
    "tt": "tensor train",
    "tr": "tensor ring",
    "bt": "block term",
    "svd": "truncated SVD",
}
