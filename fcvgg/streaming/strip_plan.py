"""How a network is streamed within a memory bound: the height of strips, the width of blocks.

The estimate walks the `fcvgg.inference.schedule.Schedule` and adds up, for every operation at every
strip, the rows that wait, the operation's input and output, and the library's workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fcvgg.errors import ArgumentError
from fcvgg.geometry import Pair
from fcvgg.inference.schedule import AxisRanges, Schedule
from fcvgg.inference.stages import Stage
from fcvgg.rewriting.modules import GEMM_CELLS
from fcvgg.support.memory_text import rounded_up, size_text

_SAFETY = 1.1
_FIXED = 24 << 20
"""Bytes in addition to the maps: the libraries' own buffers, the allocator's gaps."""

_STRIP_BYTES = 8 << 20
"""Bytes of a map, per thread, that an operation computes at once: they stay in the cache."""

_POSITIONS = 4096
"""Positions computed at once that make good use of fetched weights."""

_MOST_STRIPS = 16
"""Strips that a layer waits for at most: an interrupted run loses what waits."""

_LEAST_BYTES = 1 << 18
"""The least `StripPlan.strip_bytes` before an image is cut into blocks of columns instead."""

_WINDOWS = 8
"""Windows of rows over which the memory is estimated; it repeats after some."""

_BLOCK = 64
"""Columns of cells that wide blocks are a multiple of, so that chunks on disk divide them."""

_PIXEL = 1 + 3 * 4
"""Bytes of one channel of a pixel on its way to the network: uint8, and three times float32."""


@dataclass(frozen=True)
class Workload:
    """What a stream computes.

    Attributes:
        stages: the network's operations.
        size: ``(H, W)`` of the network's input.
        rows: half-open range of the cells that are asked for.
        cols: the same of columns.
        itemsize: bytes of a number of the maps.
    """

    stages: Sequence[Stage]
    size: Pair
    rows: Pair
    cols: Pair
    itemsize: int = 4

    def height(self) -> AxisRanges:
        """The height's sizes and ranges."""
        return AxisRanges(self.stages, 0, self.size[0], self.rows)

    def width(self, cols: Pair) -> AxisRanges:
        """The width's sizes and ranges for some columns of cells."""
        return AxisRanges(self.stages, 1, self.size[1], cols)

    def schedule(self, strip_bytes: int, cols: Pair) -> Schedule:
        """The schedule by which operations compute about `strip_bytes` of their map at once.

        A strip of the image gives every map as many rows as its size has of the image's. The
        largest map decides the strip; layers with weights wait until they have as many rows.
        """
        height = self.height()
        widths = [high - low for low, high in self.width(cols).ranges]
        row_bytes = [n * stage.channels * self.itemsize for n, stage in zip(widths, self.stages)]
        per_image_row = [row * size / self.size[0] for row, size in zip(row_bytes, height.sizes)]
        strip = min(max(int(strip_bytes // max(per_image_row)), 1), self.size[0])
        periods, multiples = [1] * len(self.stages), [1] * len(self.stages)
        for i, stage in enumerate(self.stages):
            if stage.sliding is None or not stage.sliding.weights:
                continue
            stride = stage.sliding.windows[0].stride
            largest = max(row_bytes[i], *(stride * row_bytes[fed] for fed in stage.inputs))
            wanted = min(strip_bytes // largest, -(-_POSITIONS // widths[i]))  # rows
            strips = wanted * self.size[0] // (strip * height.sizes[i])
            strips = min(max(strips, 1), _MOST_STRIPS)
            periods[i] = 1 << strips.bit_length() - 1  # so that layers wait together
            come = periods[i] * strip * height.sizes[i] // self.size[0]  # rows, in these strips
            product = GEMM_CELLS // widths[i] if stage.sliding.gathers else 1
            # a product of fewer rows than it has room for would fetch all weights as well
            multiples[i] = max(min(product, come), 1)
        return Schedule(self.stages, height, strip, periods, multiples)


@dataclass(frozen=True)
class StripPlan:
    """How maps are cut into strips of rows and blocks of columns.

    Attributes:
        strip_bytes: of a map that an operation computes at once; strips of rows follow from it.
        blocks: of columns of cells, which are computed one after the other.
        peak: the bytes that it takes at most, by estimate.
        memory: the bytes that were allowed.
    """

    strip_bytes: int
    blocks: tuple[Pair, ...]
    peak: int
    memory: int


def plan_strips(workload: Workload, memory: int, taken: int, source_row: int = 0) -> StripPlan:
    """The plan that uses the memory best: blocks of columns only where strips alone do not fit.

    Args:
        memory: bytes that may be added.
        taken: bytes of them that are taken whatever the plan is.
        source_row: bytes per column of the image that the source holds.

    Raises:
        ArgumentError: if no plan fits; the message says what the least is.
    """
    first, end = workload.cols

    def peak(strip_bytes: int, block: int) -> int:
        return taken + estimated_peak(workload, strip_bytes, block, source_row)

    def plan(strip_bytes: int, block: int) -> StripPlan:
        blocks = tuple((n, min(n + block, end)) for n in range(first, end, block))
        return StripPlan(strip_bytes, blocks, peak(strip_bytes, block), memory)

    best = _STRIP_BYTES * torch.get_num_threads()
    sizes = [best >> i for i in range(best.bit_length()) if best >> i >= _LEAST_BYTES]
    for strip_bytes in sizes:
        if peak(strip_bytes, end - first) <= memory:
            return plan(strip_bytes, end - first)
    for strip_bytes in (*(n for n in sizes if n <= _STRIP_BYTES), 1):
        if peak(strip_bytes, 1) <= memory:
            block = _widest(memory, end - first, lambda n, size=strip_bytes: peak(size, n))  # type: ignore
            return plan(strip_bytes, block - (block % _BLOCK if block > _BLOCK else 0))
    raise ArgumentError(
        f"memory must be at least {size_text(rounded_up(peak(1, 1)))} to stream an image of "
        f"{workload.size[0]}x{workload.size[1]} pixels through this network, got "
        f"{size_text(memory)}"
    )


def _widest(memory: int, cells: int, peak: Callable[[int], int]) -> int:
    """The largest number of columns of cells that fits."""
    low, high = 1, cells
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(middle) <= memory else (low, middle - 1)
    return low


# -- the estimate ---------------------------------------------------------------------------------


def estimated_peak(workload: Workload, strip_bytes: int, block: int, source_row: int = 0) -> int:
    """Bytes that streaming one block of columns adds at its fullest."""
    first, end = workload.cols
    middle = max((first + end - block) // 2, first)
    cols = middle, middle + block
    schedule = _shortened(workload).schedule(strip_bytes, cols)
    widths = [high - low for low, high in workload.width(cols).ranges]
    image = int((schedule.ends[:, 0] - schedule.starts[:, 0]).max())  # rows of a strip
    source = (source_row + image * workload.stages[0].channels * _PIXEL) * widths[0]
    return int(_SAFETY * (_fullest(workload, schedule, widths) + source)) + _FIXED


def _shortened(workload: Workload) -> Workload:
    """The same for fewer rows: all that can happen to memory happens in the first few windows."""
    first, last = workload.rows
    height = AxisRanges(workload.stages, 0, workload.size[0], (first, first + 1))
    window = height.ranges[0][1] - height.ranges[0][0]
    rows = last - first
    enough = -(-_WINDOWS * window * rows // workload.size[0])
    return replace(workload, rows=(first, first + min(rows, max(enough, 1) + _WINDOWS)))


def _fullest(workload: Workload, schedule: Schedule, widths: Sequence[int]) -> float:
    """The most bytes that maps and workspaces take at any operation of any strip.

    The operations are walked as `LineBuffers.push` runs them, for all strips at once: each array
    below has one number per strip.
    """
    stages, height = workload.stages, schedule.height
    starts, ends = schedule.starts, schedule.ends  # (strips, stages)
    computed = ends - starts
    row_bytes = [n * stage.channels * workload.itemsize for n, stage in zip(widths, stages)]

    def waiting(i: int, done: Any, arrived: Any) -> Any:
        """Bytes of the inputs that stage i still needs once its rows up to `done` are computed."""
        rows = schedule.waiting_rows(i, done, arrived)
        return sum(row_bytes[fed] * count for fed, count in rows)

    readers = [sum(stage.inputs.count(i) for stage in stages) for i in range(len(stages))]
    image = row_bytes[0] * computed[:, 0]
    held = sum(waiting(i, starts[:, i], starts) for i in range(1, len(stages)))
    held = held + image * max(readers[0], 1)
    fullest = float((held + image).max())
    for i, stage in enumerate(stages[1:], 1):
        output = row_bytes[i] * computed[:, i]
        arriving = sum(row_bytes[fed] * computed[:, fed] for fed in stage.inputs)
        given = waiting(i, starts[:, i], starts) + arriving
        left = waiting(i, ends[:, i], ends)
        low, high = height.ranges[i]
        at_border = (starts[:, i] == low) | (ends[:, i] == high)
        made = 0 if stage.in_place else output
        work = made + left + _workspace(stage, workload, given, output, at_border)
        # pieces of rows are joined before the operation runs, while their copies are still held
        joined = given if stage.sliding is not None or len(stage.inputs) > 1 else 0
        runs = computed[:, i] > 0
        fullest = max(fullest, float((held + runs * np.maximum(joined, work)).max()))
        held = held + runs * (left - given + output * readers[i])
    return fullest


def _workspace(stage: Stage, workload: Workload, given: Any, output: Any, at_border: Any) -> Any:
    """Bytes that the library takes in addition to a layer's input and output."""
    sliding = stage.sliding
    if sliding is None:
        return 0 * output
    item = workload.itemsize
    positions = output / (stage.channels * item)
    work = 0 * output
    if sliding.gathers:
        work = work + np.minimum(positions, GEMM_CELLS) * sliding.columns * item
    elif sliding.weights and item <= 4:  # oneDNN reorders input, output and weights
        work = work + given + output + sliding.weights * item
    elif sliding.columns:
        work = work + positions * sliding.columns * item
    if sliding.indexes:
        work = work + positions * stage.channels * 8
    padded_copy = np.where(at_border, given, 0) if sliding.pads_width else given
    return work + padded_copy
