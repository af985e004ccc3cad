"""How many threads a model's runs are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from htcompress.isolation import RandomState
from htcompress.model.plain import without_onednn

_PAYS = 800_000
"""Multiplications of a product, in the mean, from which on a second thread pays. Two cores with nothing else to do
train LSTMs whose products have 90 to 520 thousand in .85 to 1.07 of one core's time, with 1.2 million in .73; where
waiting threads sleep, or something else runs, the small ones take two to ten times as long."""


@contextmanager
def threads_that_pay(run: Callable[[], object]) -> Iterator[None]:
    """While this lasts torch has one thread where the products of a model's run are too small to share.

    What decides is what the run multiplies, not the clock: the same work always comes to the same numbers.

    Args:
        run: runs the model; it is called here, once, unless there is one thread anyway.
    """
    before = torch.get_num_threads()
    if before > 1 and _mean_product(run) < _PAYS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mean_product(run: Callable[[], object]) -> float:
    """Multiplications of a matrix product or convolution of a run; 0 where there is none."""
    drawn = RandomState.now()
    try:
        # One operation of oneDNN is a whole layer.
        with without_onednn(), _Products() as products:
            run()
    finally:
        drawn.restore()
    return products.multiplications / max(1, products.count)


class _Products(TorchDispatchMode):
    """Counts matrix products and convolutions, and what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.count += 1
            # It counts additions as well.
            self.multiplications += counted(*args, **(kwargs or {}), out_val=made) // 2
        return made
