"""The user's code and ours side by side: neither finds the process otherwise than it left it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_their_gradients: ContextVar[bool] = ContextVar("their_gradients", default=True)
"""Whether the user's code had gradients recorded when it last ran."""


@contextmanager
def restored() -> Iterator[None]:
    """Afterwards the process has its gradient mode, default dtype and device, threads and random states as before.

    In between gradients are recorded, whatever the caller's mode; the user's code finds the caller's.
    """
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    token = _their_gradients.set(grad)
    try:
        with torch.inference_mode(False), torch.enable_grad(), _random_states_kept():
            yield
    finally:
        _their_gradients.reset(token)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_num_threads(threads)


@contextmanager
def user_code(*, gradients: bool = False) -> Iterator[None]:
    """While this lasts gradients are recorded as the user's code left it, and afterwards as ours did.

    With `gradients` they are recorded whatever the user's code has set: a loss is nothing without.
    """
    ours, theirs = torch.is_grad_enabled(), _their_gradients.get()
    torch.set_grad_enabled(gradients or theirs)
    try:
        yield
    finally:
        _their_gradients.set(theirs if gradients else torch.is_grad_enabled())
        torch.set_grad_enabled(ours)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global random generators of torch, NumPy and Python start from a seed, and afterwards go on as before."""
    with _random_states_kept():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


@dataclass(frozen=True, eq=False)
class RandomState:
    """Where the global random generators of torch (one on the CPU, one a GPU), NumPy and Python stand."""

    torch: list[Tensor]
    numpy: tuple[Any, ...]
    python: tuple[Any, ...]

    @classmethod
    def now(cls) -> RandomState:
        """That of this moment."""
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls([torch.get_rng_state(), *gpus], tuple(np.random.get_state()), random.getstate())

    def is_now(self) -> bool:
        """Whether nothing was drawn since."""
        now = RandomState.now()
        alike = len(self.torch) == len(now.torch) and all(map(torch.equal, self.torch, now.torch))
        return alike and repr(self.numpy) == repr(now.numpy) and self.python == now.python

    def restore(self) -> None:
        """Let the generators go on from here."""
        torch.set_rng_state(self.torch[0])
        for device, state in enumerate(self.torch[1 : 1 + torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


class Draws:
    """Random sequences of their own for what is drawn in some blocks, whatever others draw between.

    They begin where the global generators stand.
    """

    def __init__(self) -> None:
        self._state = RandomState.now()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """While this lasts the global generators go on with these sequences, and afterwards with theirs."""
        others = RandomState.now()
        self._state.restore()
        try:
            yield
        finally:
            self._state = RandomState.now()
            others.restore()


@contextmanager
def _random_states_kept() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """While this lasts new tensors are made on a device, whatever default the user's code has set."""
    if torch.get_default_device() == device:
        # The context of a device would look at every call of torch.
        yield
        return
    with device:
        yield


def on_the_cpu() -> AbstractContextManager[None]:
    """While this lasts new tensors are made on the CPU, whatever default device the user's code has set."""
    return made_on(torch.device("cpu"))
