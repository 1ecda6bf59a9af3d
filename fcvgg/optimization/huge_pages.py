"""Large weights on large pages, so that reading them does not wait for page tables."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

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
