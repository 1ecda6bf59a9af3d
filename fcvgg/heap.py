"""How the C library's heap treats the large maps that come and go with every call."""

from __future__ import annotations

from functools import lru_cache

import torch

_LARGEST_LEARNT = (32 << 20) - (64 << 10)
"""Bytes of the largest block from which glibc learns how large the blocks are that come and go."""


@lru_cache(maxsize=1)
def keep_freed_maps() -> None:
    """Let freed maps below 32 MB be used again, instead of given back to the system.

    glibc maps every larger block anew, and the system clears its pages, which takes longer than
    some layers. What "larger" means it learns from the blocks that were freed; one that is taken
    and freed here, untouched, teaches it the most at once. Other allocators are not affected.
    """
    torch.empty(_LARGEST_LEARNT, dtype=torch.uint8)
