"""The dense matrix as the only candidate: what is left to choose are its bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from htcompress.forms.form import Choice, Ladder, MatrixSearch


class DenseSearch(MatrixSearch):
    """Nothing but the matrix itself."""

    @property
    def spectrum(self) -> Tensor | None:
        return None

    @property
    def smallest(self) -> int:
        return self.matrix.numel()

    def best(self, max_parameters: int, *, polish: bool = False) -> Choice | None:
        return self.dense if max_parameters >= self.matrix.numel() else None

    def ladder(self) -> DenseLadder:
        return DenseLadder(self.dense)

    def cheapest(self, rtol: float) -> Choice:
        return self.dense


@dataclass(frozen=True, eq=False)
class DenseLadder(Ladder):
    """One choice."""

    dense: Choice

    @property
    def choices(self) -> Sequence[Choice]:
        return [self.dense]

    def improved(self, choice: Choice) -> Ladder | None:
        return None

    def neighbours(self, choice: Choice) -> Sequence[Choice]:
        return []
