"""Independent pieces of work beside each other, on threads that would stand idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")

if TYPE_CHECKING:
    from functools import cached_property
else:

    class cached_property:  # noqa: N801 - it stands for Python's
        """Python's, with a lock of its own for every value.

        Until 3.11 one lock for all objects lets but one thread at a time compute, and from 3.12 on there is none, so
        that two that ask for the same both compute it.
        """

        def __init__(self, func: Callable[[Any], Any]) -> None:
            self.func, self.__doc__, self.attrname = func, func.__doc__, func.__name__

        def __set_name__(self, owner: type, name: str) -> None:
            self.attrname = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            known, name = vars(instance), self.attrname
            if name not in known:
                # Whoever waits asks for what does not ask for what it holds itself.
                lock = _locks.setdefault((id(instance), name), RLock())
                try:
                    with lock:
                        if name not in known:
                            known[name] = self.func(instance)
                finally:
                    _locks.pop((id(instance), name), None)
            return known[name]


__all__ = ["cached_property", "idle_threads", "side_by_side"]

_locks: dict[tuple[int, str], Any] = {}
"""Of values that are being computed."""

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

    The items have nothing in common that work changes but what is found of it, and is the same whoever finds it: the
    results are those of one after the other. Each thread computes as this one does: with or without gradients, by one
    thread of torch.
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
