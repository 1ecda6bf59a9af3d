"""Which of two ways is faster on this machine, measured.

Winograd's algorithm saves arithmetic and reads more weights: from which size on it pays depends on
the processor, its caches and the libraries below torch. So no such size is written down here. It is
measured when a network with such a layer is optimised, once in a process for each kind of layer, in
one thread and by that thread's own time, which other work on the machine hardly disturbs.
"""

from __future__ import annotations

import math
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

_READ_BYTES = 64 * 1024**2
"""Of the tensor whose reading is timed: more than most caches hold."""

_KNOWN: dict[Any, Any] = {}
"""What was found, by what was asked."""


def least_gaining(kind: Any, sizes: Sequence[int], gains_at: Callable[[int], bool]) -> float:
    """The least of ascending sizes from which something gains; infinite if it gains at none.

    Args:
        kind: of layer; nothing is measured again for one that is known.
        sizes: to try.
        gains_at: measures one of them.
    """
    if kind not in _KNOWN:
        _KNOWN[kind] = next(filter(gains_at, sizes), math.inf)
    least: float = _KNOWN[kind]
    return least


def faster_kernels(dtype: torch.dtype) -> type[Kernels]:
    """The form of Winograd's kernels whose products are faster."""
    if dtype != torch.float32 or not has_packing():
        return StackedKernels  # oneDNN has no other arithmetic that the algorithm bears
    if Kernels not in _KNOWN:
        _KNOWN[Kernels] = _faster_kernels()
    form: type[Kernels] = _KNOWN[Kernels]
    return form


def _faster_kernels(tiles: int = 64, positions: int = 36, channels: int = 256) -> type[Kernels]:
    """By products like those of a VGG's third block."""
    generator = torch.Generator().manual_seed(0)
    transformed = torch.rand(tiles, positions, channels, generator=generator)
    transform = torch.rand(16, positions, generator=generator)
    blocks = torch.rand(positions, channels, channels, generator=generator)

    def products(form: type[Kernels]) -> Callable[[], object]:
        kernels = form(blocks.split(form.most_features or channels, dim=2))
        return lambda: list(kernels.outputs(transformed, transform))

    grouped = gains(products(GroupedKernels), products(StackedKernels))
    return GroupedKernels if grouped else StackedKernels


def gains(way: Callable[[], object], other: Callable[[], object], more_bytes: int = 0) -> bool:
    """Whether a way takes less time than another.

    Args:
        way: is called several times, in turns with the other.
        other: the same.
        more_bytes: of weights that it reads. Repeated calls find them in the cache, those of a
            network do not, so the time to read them is added.
    """
    with _one_thread(), torch.no_grad():
        way(), other()  # the first calls allocate memory and choose oneDNN's kernels
        times = [(_seconds(way), _seconds(other)) for _ in range(_CALLS)]
    first, second = map(min, zip(*times))
    return first + more_bytes * _seconds_per_byte() < second


@lru_cache
def _seconds_per_byte() -> float:
    read = torch.zeros(_READ_BYTES, dtype=torch.uint8).view(torch.float32)
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
    start = time.thread_time()
    call()
    return time.thread_time() - start
