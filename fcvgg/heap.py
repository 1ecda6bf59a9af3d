"""How the C library's heap treats the large maps that come and go with every call.

A block that is mapped anew, or that takes memory which was given back, costs the system's clearing
of its pages: 18 of 75 ms for a VGG-16 in bfloat16 at 448 pixels. Only glibc is told anything.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache

import torch

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
