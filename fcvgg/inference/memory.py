"""Memory of large maps and weights: kept by the heap, given back, on large pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# -- the C library's heap -------------------------------------------------------------------------
# A block that is mapped anew, or that takes memory which was given back, costs the system's
# clearing of its pages: 18 of 75 ms for a VGG-16 in bfloat16 at 448 pixels. Only glibc is told
# anything.

_LARGEST_LEARNT = (32 << 20) - (64 << 10)
"""Bytes of the largest block from which glibc learns how large the blocks are that come and go."""

_SETTINGS = {-3: 32 << 20, -1: 256 << 20}
"""Of `mallopt`: M_MMAP_THRESHOLD, the largest that it takes, and M_TRIM_THRESHOLD."""

_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables with which a user decides these things."""


def learn_block_sizes() -> None:
    """Let glibc learn that blocks below 32 MB come and go, so that it takes them from the heap.

    It learns from blocks that are freed; one that is taken and freed here, untouched, teaches it
    the most at once. It then gives back what is free at the heap's end from 64 MB on.
    """
    torch.empty(_LARGEST_LEARNT, dtype=torch.uint8)


@lru_cache(maxsize=1)
def keep_freed_maps() -> None:
    """Let the process keep up to 256 MB of freed memory, and take blocks below 32 MB from it.

    Threads other than the main one have heaps of their own, for which that does not count. Nothing
    is done where the user has decided by a variable of the environment.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None or any(name in os.environ for name in _OWN_SETTINGS):
        return
    for option, size in _SETTINGS.items():
        set_option(option, size)


# -- giving freed memory back ---------------------------------------------------------------------

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


# -- weights on large pages -----------------------------------------------------------------------

_LEAST_BYTES = 8 * 1024**2

_COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1: fold the pages now; older systems refuse and nothing changes."""


def on_huge_pages(weights: Tensor) -> Tensor:
    """The same tensor; the system is asked to hold its memory in pages of 2 MB.

    A wish that is not granted is no error. Nothing is asked for small tensors, nor where the system
    is not Linux.
    """
    size = weights.numel() * weights.element_size()
    advise = _madvise()
    if advise is None or size < _LEAST_BYTES or weights.device.type != "cpu":
        return weights
    pointer = _pointer(weights)
    if pointer is not None:
        first = -(-pointer // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (pointer + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(ctypes.c_void_p(first), ctypes.c_size_t(length), _COLLAPSE)
    return weights


def _pointer(weights: Tensor) -> int | None:
    if not weights.is_mkldnn:
        return weights.data_ptr()
    data_ptr = getattr(torch.ops.mkldnn, "data_ptr", None)
    return None if data_ptr is None else int(data_ptr(weights))


@lru_cache(maxsize=1)
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
