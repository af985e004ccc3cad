"""Dense recurrent layers of torch, run without oneDNN where that is the slower of its two kernels.

For an LSTM of many inputs oneDNN packs the whole weight matrix anew at every call: at 57,600 inputs that takes
twice to six times as long as torch's own kernel, and a second copy of the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from htcompress.model.replace import recurrent_modules

_LARGE = 1 << 22
"""Numbers in a weight from which packing it costs more than it brings."""


@contextmanager
def without_packing(model: nn.Module | None) -> Iterator[None]:
    """While this lasts, the model's large recurrent layers run torch's own kernel on a CPU."""
    modules = [] if model is None else list(recurrent_modules(model).values())
    large = [m for m in modules if any(p.numel() >= _LARGE and p.device.type == "cpu" for p in m.parameters())]
    patched = [(module, vars(module).get("forward")) for module in large]
    with _flag_unwarned():
        for module in large:
            module.forward = _plain(module.forward)
        try:
            yield
        finally:
            for module, before in patched:
                del module.forward
                if before is not None:
                    module.forward = before


@contextmanager
def without_onednn() -> Iterator[None]:
    """While this lasts, all layers run torch's own kernels on a CPU."""
    with _flag_unwarned(), torch.backends.mkldnn.flags(enabled=False):
        yield


@contextmanager
def _flag_unwarned() -> Iterator[None]:
    """Torch's own setting of the flag warns of graphics cards that nobody asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration")
        yield


def _plain(forward: Any) -> Any:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch.backends.mkldnn.flags(enabled=False):
            return forward(*arguments, **keywords)

    return run
