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

_MORE = 0.2
"""Of the bound, by which the process must grow before memory is given back once more: each time,
the system clears what is given back anew.
"""


def trimmer(memory: int) -> Callable[[], None]:
    """A function to call between operations, which keeps what the process adds below `memory`.

    The C library keeps freed blocks for itself, and gaps between blocks in use add up to a multiple
    of what is in use. On systems other than Linux with glibc the function does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None or not _STATM.exists():
        return lambda: None
    pages = memory // os.sysconf("SC_PAGE_SIZE")
    least = limit = _resident_pages() + int(_SHARE * pages)

    def give_back() -> None:
        nonlocal limit
        if _resident_pages() > limit:
            trim(0)
            limit = max(least, _resident_pages() + int(_MORE * pages))

    return give_back


def _resident_pages() -> int:
    return int(_STATM.read_bytes().split()[1])
