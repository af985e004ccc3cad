"""The type checker of the tests: beartype, for which an int is a float, as for mypy and PEP 484."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from beartype import BeartypeConf, beartype

_typed = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(what: Any) -> Any:
    """`what`, a function or a class, with its signature checked at every call, but for those that are being traced.

    While `torch.jit.trace` records, the axes of a tensor are tensors, which are no sizes to a checker.
    """
    checked: Any = _typed(what)
    if isinstance(what, type):
        return checked
    plain: Callable[..., Any] = what

    @wraps(what)
    def either(*arguments: Any, **named: Any) -> Any:
        return (plain if torch.jit.is_tracing() else checked)(*arguments, **named)

    return either
