"""Programs of C for what torch is slow at: built when they are first needed, or done without."""

from htcompress.native.library import library

__all__ = ["library"]
