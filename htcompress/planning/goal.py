"""What is asked of a compression: how small or how exact, and in which forms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from htcompress.errors import RequestError
from htcompress.formats import Format
from htcompress.matrix import LayoutKind


class Scope(StrEnum):
    """Which matrices of a recurrent layer are put into HT form together."""

    AUTO = "auto"
    INTEGRATED = "integrated"
    SEPARATE = "separate"
    INPUT = "input"


class UnitOrder(StrEnum):
    """How the hidden units of a layer are ordered in its matrices, to make them fold well.

    `auto`: as folds best, with the order stored beside the matrices where it pays for its numbers; nobody outside of
    the layer sees it. `readers`: the units themselves are moved, and with them what the modules that read the layer's
    states have of them, which costs no numbers; code beside those modules finds states in another order. `keep`: as
    they are.
    """

    AUTO = "auto"
    READERS = "readers"
    KEEP = "keep"


@dataclass(frozen=True)
class Goal:
    """Exactly one of a budget, an error and a ratio; and the forms to look at.

    Args:
        budget: stored numbers of the recurrent layers, biases included, that are not exceeded.
        error: relative Frobenius error of each weight matrix that is not exceeded.
        ratio: how many times fewer numbers than the checkpoint's; a budget in other words.

    `format` is Hierarchical Tucker unless another is to be compared with it; truncated SVD is HT of order two.

    Raises:
        RequestError: none or several of the three, or a value that makes no sense.
    """

    budget: int | None = None
    error: float | None = None
    ratio: float | None = None
    scope: Scope = Scope.AUTO
    layout: LayoutKind = LayoutKind.AUTO
    format: Format = Format.HT
    units: UnitOrder = UnitOrder.AUTO

    def __post_init__(self) -> None:
        given = [name for name in ("budget", "error", "ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise RequestError(
                f"A compression needs exactly one goal: a budget (such as 5000), an error (such as 0.1) or a "
                f"ratio (such as 100); found {found}."
            )
        if self.budget is not None and self.budget < 1:
            raise RequestError(f"The budget is a number of parameters, at least 1; found {self.budget}.")
        if self.error is not None and not 0 <= self.error < 1:
            raise RequestError(
                f"The error is relative to the norm of a weight matrix: at least 0 and below 1 (such as 0.1); "
                f"found {self.error}."
            )
        if self.format in (Format.TT, Format.TR, Format.BT) and self.layout is not LayoutKind.AUTO:
            raise RequestError(
                f"The format {self.format} has one family of layouts; leave the layout at auto. Found {self.layout}."
            )
        if self.ratio is not None and not (self.ratio >= 1 and math.isfinite(self.ratio)):
            raise RequestError(f"The ratio is how many times smaller, at least 1 (such as 100); found {self.ratio}.")

    @property
    def folds(self) -> bool:
        """Whether matrices are folded into tensors; a truncated SVD takes them as they are."""
        return self.layout is not LayoutKind.SVD and self.format is not Format.SVD

    def budget_for(self, parameters: int) -> int | None:
        """The stored numbers allowed, of layers that store `parameters` now; None for an error goal."""
        if self.ratio is not None:
            return int(parameters / self.ratio)
        return self.budget
