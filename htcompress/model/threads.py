"""How many threads work is worth: by its size and not by the clock, so that it comes to the same numbers everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from htcompress.isolation import RandomState
from htcompress.model.plain import without_onednn
from htcompress.side_by_side import idle_threads

_PAYS = 800_000
"""Multiplications of a product, in the mean, from which on there is a second thread. With nothing else running, and
threads that spin while they wait, it takes LSTMs whose products have 130 to 520 thousand .67 to .92 of the time
(benchmarks/speed/threads.py); where waiting threads sleep, or something else runs, three to ten times as long."""

_LARGE = 1 << 21
"""Numbers of a matrix from which on its decompositions are worth sharing. Two cores with nothing else to do choose the
forms of matrices of up to a million in .93 to 1.15 of one core's time."""

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution)


@contextmanager
def threads_for_model(run: Callable[[], object]) -> Iterator[None]:
    """While this lasts torch has one thread where the products of a model's run are too small to share.

    Args:
        run: runs the model; it is called here, once, unless there is one thread anyway.
    """
    worth = ThreadsForRuns()
    if torch.get_num_threads() > 1:
        drawn = RandomState.now()
        try:
            with worth():
                run()
        finally:
            drawn.restore()
    with worth.told():
        yield


@contextmanager
def threads_for_matrices(largest: int) -> Iterator[None]:
    """While this lasts torch has one thread where the largest matrix has few numbers; matrices may have the others."""
    small = largest < _LARGE
    with _threads(1 if small else torch.get_num_threads()) as before, idle_threads(before if small else 1):
        yield


class ThreadsForRuns:
    """How many threads a model's runs are worth. The first tells, which has one thread."""

    def __init__(self) -> None:
        self._threads: int | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around each run."""
        if self._threads is not None:
            with _threads(self._threads):
                yield
            return
        # One operation of oneDNN is a whole layer.
        with _threads(1) as before, without_onednn(), _Products() as products:
            yield
        self._threads = before if products.mean >= _PAYS else 1

    @contextmanager
    def told(self) -> Iterator[None]:
        """Around what is like the runs; all threads where there was none."""
        with _threads(torch.get_num_threads() if self._threads is None else self._threads):
            yield


@contextmanager
def _threads(count: int) -> Iterator[int]:
    """So many threads; gives how many there were."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


class _Products(TorchDispatchMode):
    """Counts matrix products and convolutions, and what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.multiplications = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, for longer than a second, for what is never compiled."""
        return False

    @property
    def mean(self) -> float:
        """Multiplications of a product; 0 where there is none."""
        return self.multiplications / max(1, self.count)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            self.count += 1
            # The registry counts additions as well.
            self.multiplications += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=made) // 2
        return made
