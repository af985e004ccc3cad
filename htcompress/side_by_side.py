"""Independent pieces of work beside each other, on threads that would stand idle."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")

if TYPE_CHECKING or sys.version_info >= (3, 12):
    from functools import cached_property
else:

    class cached_property:  # noqa: N801 - it stands for Python's
        """Python's, as it is from 3.12 on: before, one lock for all objects lets but one thread at a time compute."""

        def __init__(self, func: Callable[[Any], Any]) -> None:
            self.func, self.__doc__, self.attrname = func, func.__doc__, func.__name__

        def __set_name__(self, owner: type, name: str) -> None:
            self.attrname = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            known = vars(instance)
            if self.attrname not in known:
                known[self.attrname] = self.func(instance)
            return known[self.attrname]


__all__ = ["cached_property", "idle_threads", "side_by_side"]

_idle: ContextVar[int] = ContextVar("idle threads", default=1)


@contextmanager
def idle_threads(count: int) -> Iterator[None]:
    """While this lasts torch has one thread of so many, and pieces of work may have the others."""
    token = _idle.set(count)
    try:
        yield
    finally:
        _idle.reset(token)


def side_by_side(work: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
    """What work makes of every item, on as many threads as stand idle.

    The items have nothing in common that work changes, so that the results are those of one after the other. Each
    thread computes as this one does: with or without gradients, by one thread of torch.
    """
    workers = min(_idle.get(), len(items))
    if workers < 2:
        return [work(item) for item in items]
    learning = torch.is_grad_enabled()

    def alone(item: Item) -> Made:
        with torch.set_grad_enabled(learning):
            return work(item)

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(alone, items))
