"""Which of two ways is faster on this machine, measured.

Winograd's algorithm saves arithmetic and reads more weights: from which size on it pays depends on
the processor, its caches and the libraries below torch. So no such size is written down here. It is
measured when a network with such a layer is optimised, once in a process for each kind of layer, in
one thread and by that thread's own time, which other work on the machine hardly disturbs.
torch has one number of threads for a process, so others that start meanwhile get one as well.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from fcvgg.optimization.onednn import has_packing
from fcvgg.optimization.products import GroupedKernels, Kernels, StackedKernels

_CALLS = 3
"""Of each way, in turns; the least time counts, since what else happens only adds to it."""

_READ_BYTES = 256 * 1024**2
"""Of the tensor whose reading is timed: more than most caches hold."""

_CLOCK = time.perf_counter if sys.platform == "win32" else time.thread_time
"""Windows counts a thread's time in steps of 16 ms, longer than most of the calls."""

_KNOWN: dict[Any, float] = {}
"""The least sizes that were found, by the kind of layer."""


def least_gaining(kind: Any, sizes: Sequence[int], gains_at: Callable[[int], bool]) -> float:
    """The least of ascending sizes from which something gains; infinite if it gains at none.

    Args:
        kind: of layer; nothing is measured again for one that is known.
        sizes: to try.
        gains_at: measures one of them.
    """
    if kind not in _KNOWN:
        _KNOWN[kind] = next(filter(gains_at, sizes), math.inf)
    return _KNOWN[kind]


def faster_kernels(dtype: torch.dtype) -> type[Kernels]:
    """The form of Winograd's kernels whose products are faster."""
    if dtype != torch.float32 or not has_packing():
        return StackedKernels  # oneDNN has no other arithmetic that the algorithm bears
    return _faster_kernels()


@lru_cache
def _faster_kernels() -> type[Kernels]:
    """By products like those of a VGG's third block, of 64 tiles."""
    positions, channels = 36, 256
    like = torch.ones((), dtype=torch.float32, device="cpu")
    tiles, transform = like.new_ones(64, positions, channels), like.new_ones(16, positions)
    block = like.new_ones(positions, channels, channels)
    stacked, grouped = (form.of([block]) for form in (StackedKernels, GroupedKernels))
    gained = gains(
        lambda: list(grouped.outputs(tiles, transform)),
        lambda: list(stacked.outputs(tiles, transform)),
    )
    return GroupedKernels if gained else StackedKernels


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def gains(new: Callable[[], object], usual: Callable[[], object], more_bytes: int = 0) -> bool:
    """Whether a new way to compute something takes less time than the usual one.

    Args:
        new: is called several times, in turns with the other.
        usual: the same.
        more_bytes: of weights that the new way reads. Repeated calls find them in the cache, those
            of a network do not, so the time to read them is added.
    """
    with _one_thread():
        new(), usual()  # the first calls allocate memory and choose oneDNN's kernels
        times = [(_seconds(new), _seconds(usual)) for _ in range(_CALLS)]
    first, second = map(min, zip(*times))
    return first + more_bytes * _seconds_per_byte() < second


@lru_cache
def _seconds_per_byte() -> float:
    read = torch.ones(_READ_BYTES // 4, dtype=torch.float32, device="cpu")
    with _one_thread():
        return min(_seconds(read.sum) for _ in range(_CALLS)) / _READ_BYTES


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(call: Callable[[], object]) -> float:
    start = _CLOCK()
    call()
    return _CLOCK() - start
