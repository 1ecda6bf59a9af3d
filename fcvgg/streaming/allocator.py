"""Giving freed memory back to the system, so that a memory bound holds for the process."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

_STATM = Path("/proc/self/statm")
_SHARE = 0.5
"""Of the bound, from which on freed memory is given back: earlier it would only cost time."""


def trimmer(memory: int) -> Callable[[], None]:
    """A function to call between operations, which keeps what the process adds below `memory`.

    The C library keeps freed blocks for itself, and gaps between blocks in use add up to a multiple
    of what is in use. On systems other than Linux with glibc the function does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None or not _STATM.exists():
        return lambda: None
    limit = _resident_pages() + int(_SHARE * memory) // os.sysconf("SC_PAGE_SIZE")

    def give_back() -> None:
        if _resident_pages() > limit:
            trim(0)

    return give_back


def _resident_pages() -> int:
    return int(_STATM.read_bytes().split()[1])
