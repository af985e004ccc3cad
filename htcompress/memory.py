"""Memory that was freed and still counts as the process's."""

from __future__ import annotations

import ctypes
import gc


def give_back(*, collect: bool = False) -> None:
    """Give what was freed back to the system, where its allocator keeps it (glibc); nothing elsewhere.

    Tensors of a few megabytes come and go by the thousand. What lives on between them keeps glibc from giving any of
    their memory back by itself: after a search for forms it held twice of what was in use.

    Args:
        collect: whether objects that only hold each other are freed first, which takes a tenth of a second and more.
    """
    if collect:
        gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # another system, or another allocator
