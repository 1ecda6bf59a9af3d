"""Giving freed memory back to the system, so that a memory bound holds for the process."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

from fcvgg.heap import learn_block_sizes

_STATM = Path("/proc/self/statm")
_LEAST, _MOST = 0.5, 1.0
"""Of the bytes in use, from which on freed memory is given back: as late as the bound allows, since
what is given back must be cleared anew by the system, page by page.
"""


def trimmer(used: int, memory: int) -> Callable[[int], None]:
    """A function to call before operations, which keeps what the process adds below `memory`.

    It is told how many bytes the operation needs at once beside its input and output. `used` are
    the bytes that are in use at most.

    The C library keeps freed blocks for itself, and gaps between blocks in use add up to a multiple
    of what is in use. On systems other than Linux with glibc the function does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None or not _STATM.exists():
        return lambda needed: None
    allowed = max(min(memory - used // 2, int(_MOST * used)), int(_LEAST * used))
    learn_block_sizes()
    page = os.sysconf("SC_PAGE_SIZE")
    trim(0)  # what was freed before would raise the limit
    limit = _resident_pages() + allowed // page

    def give_back(needed: int) -> None:
        if _resident_pages() + needed // page > limit:
            trim(0)

    return give_back


def _resident_pages() -> int:
    return int(_STATM.read_bytes().split()[1])
