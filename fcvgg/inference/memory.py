"""Memory of large maps and weights: reused when freed, returned to the system, on large pages."""

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
# The kernel zeroes newly mapped pages: 18 of 75 ms for VGG-16 in bfloat16 at 448 pixels. A process
# that keeps freed memory avoids that. Only glibc's allocator has the settings made here; `optimize`
# and `stream` make them, a plain forward pass never does.

_LARGEST_LEARNT = (32 << 20) - (64 << 10)
"""Bytes of the largest freed block by which glibc raises its threshold for mapping memory."""

_SETTINGS = {-3: 32 << 20, -1: 256 << 20}
"""Options of `mallopt`: M_MMAP_THRESHOLD, at its largest value, and M_TRIM_THRESHOLD."""

_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables with which a user makes these settings."""


def learn_block_sizes() -> None:
    """Raise glibc's thresholds, so that it takes blocks below 32 MB from the heap.

    It adapts to the blocks that are freed: one untouched block of the largest size, allocated and
    freed here, suffices. It then returns memory at the heap's end above 64 MB.
    """
    torch.empty(_LARGEST_LEARNT, dtype=torch.uint8)


@lru_cache(maxsize=1)
def keep_freed_maps() -> None:
    """Let the process keep up to 256 MB of freed memory, and take blocks below 32 MB from it.

    Threads other than the main one have heaps of their own, to which that does not apply. Nothing
    is changed where an environment variable of the user makes such a setting.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None or any(name in os.environ for name in _OWN_SETTINGS):
        return
    for option, size in _SETTINGS.items():
        set_option(option, size)


# -- returning freed memory to the system ---------------------------------------------------------

_STATM = Path("/proc/self/statm")
_LEAST, _MOST = 0.5, 1.0
"""Share of the bytes in use above which freed memory is returned: as late as the bound allows,
since the kernel must zero every page that is mapped again.
"""


def trimmer(used: int, memory: int) -> Callable[[int], None]:
    """A function to call before operations, which keeps what the process adds below `memory`.

    glibc keeps freed blocks, and the gaps between blocks in use can add up to a multiple of what is
    in use. The function takes the bytes of the operation's workspace. On systems other than Linux
    with glibc it does nothing.

    Args:
        used: bytes that are in use at most.
        memory: bytes that the process may add.
    """
    return trimmer_above(max(min(memory - used // 2, int(_MOST * used)), int(_LEAST * used)))


def trimmer_above(allowed: int) -> Callable[[int], None]:
    """As `trimmer`, where the process may hold `allowed` bytes more, freed ones included."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None or not _STATM.exists():
        return lambda needed: None
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
"""MADV_COLLAPSE of Linux 6.1: merge the pages now. Older systems refuse, which changes nothing."""


def on_huge_pages(weights: Tensor) -> Tensor:
    """The same tensor, after asking Linux to hold its memory in pages of 2 MB.

    The system may decline, which changes nothing. Small tensors are left alone.
    """
    advise, size = _madvise(), weights.numel() * weights.element_size()
    if advise is None or size < _LEAST_BYTES or weights.device.type != "cpu":
        return weights
    pointer_of: Any = Tensor.data_ptr
    if weights.is_mkldnn:  # such tensors hide their memory but for an operation of newer torch
        pointer_of = getattr(torch.ops.mkldnn, "data_ptr", None)
    if pointer_of is not None:
        pointer = int(pointer_of(weights))
        first = -(-pointer // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (pointer + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(ctypes.c_void_p(first), ctypes.c_size_t(length), _COLLAPSE)
    return weights


@lru_cache(maxsize=1)
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)


# -- the processor's caches -----------------------------------------------------------------------

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE = 32 << 20


@lru_cache(maxsize=1)
def last_cache_bytes() -> int:
    """Bytes of the last cache before memory, as Linux reports it; 32 MB where nothing does."""
    texts = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    sizes = [int(text[:-1]) << 10 for text in texts if text.endswith("K")]
    return max(sizes, default=_USUAL_CACHE)
