"""Whether torch is making a graph of what is run, for other sizes and other numbers than those at hand."""

from __future__ import annotations

import torch


def is_tracing() -> bool:
    """Whether `torch.compile`, `torch.export` or `torch.jit.trace` looks on."""
    return bool(torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None)
