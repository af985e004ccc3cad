"""The user's code and ours side by side: neither finds the process otherwise than it left it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch

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
def on_the_cpu() -> Iterator[None]:
    """While this lasts new tensors are made on the CPU, whatever default device the user's code has set."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield
