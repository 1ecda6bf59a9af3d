"""How a network is streamed within a memory bound: the height of strips, the width of blocks.

The estimate walks the `fcvgg.streaming.schedule.Schedule` and adds up, for every operation at every
strip, the rows that wait, the operation's input and output and the library's workspace.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fcvgg.errors import ArgumentError
from fcvgg.geometry import Pair
from fcvgg.inference.stages import Stage
from fcvgg.rewriting.modules import _GEMM_CELLS
from fcvgg.streaming.schedule import Extents, Schedule

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS.update({f"{unit}I": 1 << 10 * i for i, unit in enumerate("KMGT", 1)})

_SAFETY = 1.1
_FIXED = 24 << 20
"""Bytes beside the maps: the libraries' own buffers, the allocator's gaps."""

_STRIP_BYTES = 8 << 20
"""Bytes of a map, per thread, that an operation computes at once: they stay in the cache."""

_POSITIONS = 4096
"""Positions for which weights are fetched often enough to be used well."""

_MOST_STRIPS = 16
"""Strips that a layer waits for at most: what waits is lost when a run is interrupted."""

_LEAST_BYTES = 1 << 18
"""Bytes of it below which an image is rather cut into blocks of columns."""

_WINDOWS = 8
"""Windows of rows over which the memory is estimated; it repeats after some."""

_BLOCK = 64
"""Columns of cells that wide blocks are a multiple of, so that chunks on disk divide them."""

_PIXEL = 1 + 3 * 4
"""Bytes of one channel of a pixel on its way to the network: uint8, and three times float32."""


def parsed_memory(memory: int | str) -> int:
    """Bytes, from a number of them or text such as ``"512MiB"`` or ``"2GB"``.

    Raises:
        ArgumentError: if it is neither.
    """
    if isinstance(memory, (int, np.integer)) and not isinstance(memory, bool) and memory > 0:
        return int(memory)
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", memory.upper())
        if match and match[2] in _UNITS and float(match[1]) > 0:
            return int(float(match[1]) * _UNITS[match[2]])
    raise ArgumentError(
        f"memory={memory!r} is no amount; expected bytes or text such as '512MiB' or '2GB'"
    )


def readable(size: float) -> str:
    """Bytes as people write them, rounded up: ``"513MiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{int(np.ceil(size))}{unit}"
        size /= 1024
    return f"{np.ceil(size * 10) / 10:g}GiB"


@dataclass(frozen=True)
class Layout:
    """What is streamed: the size of the network's input, and the cells that are asked for."""

    stages: Sequence[Stage]
    size: Pair
    rows: Pair
    cols: Pair
    itemsize: int = 4

    def schedule(self, strip_bytes: int, cols: Pair) -> Schedule:
        """The schedule by which operations compute about `strip_bytes` of their map at once."""
        height = self.height()
        widths = [high - low for low, high in self.width(cols).ranges]
        rows = [
            n * stage.channels * self.itemsize for n, stage in zip(widths, self.stages)
        ]  # bytes of one row of each map
        shares = [
            row * size / self.size[0] for row, size in zip(rows, height.sizes)
        ]  # bytes of each map for one row of the image
        strip = min(max(int(strip_bytes // max(shares)), 1), self.size[0])
        every, multiples = [1], [1]
        for i, stage in enumerate(self.stages[1:], 1):
            if stage.sliding is None or not stage.sliding.weights:
                every.append(1)
                multiples.append(1)
                continue
            stride = stage.sliding.windows[0].stride
            largest = max(rows[i], *(stride * rows[fed] for fed in stage.inputs))
            wanted = min(strip_bytes // largest, -(-_POSITIONS // widths[i]))
            strips = wanted * self.size[0] // (strip * height.sizes[i])
            strips = min(max(strips, 1), _MOST_STRIPS)
            every.append(1 << strips.bit_length() - 1)  # so that layers wait together
            come = every[i] * strip * height.sizes[i] // self.size[0]  # rows, in these strips
            product = _GEMM_CELLS // widths[i] if stage.sliding.gathers else 1
            multiples.append(max(min(product, come), 1))  # a part would fetch all weights as well
        return Schedule(self.stages, height, strip, every, multiples)

    def height(self) -> Extents:
        """The height's sizes and ranges."""
        return Extents(self.stages, 0, self.size[0], self.rows)

    def width(self, cols: Pair) -> Extents:
        """The width's sizes and ranges for some columns of cells."""
        return Extents(self.stages, 1, self.size[1], cols)


@dataclass(frozen=True)
class StripPlan:
    """How maps are cut.

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


def plan_strips(layout: Layout, memory: int, beside: int, source_row: int = 0) -> StripPlan:
    """The plan that uses the memory best: blocks of columns only where strips alone do not fit.

    Args:
        memory: bytes that may be added.
        beside: bytes of them that are taken whatever the plan is.
        source_row: bytes per column of the image that the source holds.

    Raises:
        ArgumentError: if no plan fits; the message says what the least is.
    """
    cells = layout.cols[1] - layout.cols[0]

    def peak(strip_bytes: int, block: int) -> int:
        return beside + estimated_peak(layout, strip_bytes, block, source_row)

    best = _STRIP_BYTES * torch.get_num_threads()
    sizes = [best >> i for i in range(best.bit_length()) if best >> i >= _LEAST_BYTES]
    for strip_bytes in sizes:
        if peak(strip_bytes, cells) <= memory:
            return _planned(layout, strip_bytes, cells, peak(strip_bytes, cells), memory)
    for strip_bytes in (*(n for n in sizes if n <= _STRIP_BYTES), 1):
        if peak(strip_bytes, 1) <= memory:
            block = _widest(memory, cells, lambda n, size=strip_bytes: peak(size, n))  # type: ignore
            block -= block % _BLOCK if block > _BLOCK else 0
            return _planned(layout, strip_bytes, block, peak(strip_bytes, block), memory)
    raise ArgumentError(
        f"memory={readable(memory)} is too little to stream an image of {layout.size[0]}x"
        f"{layout.size[1]} pixels through this network; the least that would do is "
        f"{readable(peak(1, 1))}"
    )


def _widest(memory: int, cells: int, peak: Callable[[int], int]) -> int:
    """The largest number of columns of cells that fits."""
    low, high = 1, cells
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(middle) <= memory else (low, middle - 1)
    return low


def _planned(layout: Layout, strip_bytes: int, block: int, peak: int, memory: int) -> StripPlan:
    first, end = layout.cols
    blocks = tuple((n, min(n + block, end)) for n in range(first, end, block))
    return StripPlan(strip_bytes, blocks, peak, memory)


def estimated_peak(layout: Layout, strip_bytes: int, block: int, source_row: int = 0) -> int:
    """Bytes that streaming one block of columns adds at its fullest."""
    first, end = layout.cols
    middle = max((first + end - block) // 2, first)
    width = layout.width((middle, middle + block))
    schedule = _shortened(layout).schedule(strip_bytes, (middle, middle + block))
    cols = [high - low for low, high in width.ranges]
    fullest = _fullest(layout, schedule, cols)
    image = schedule.ends[:, 0] - schedule.before[:, 0]
    source = source_row * cols[0] + int(image.max()) * cols[0] * layout.stages[0].channels * _PIXEL
    return int(_SAFETY * (fullest + source)) + _FIXED


def _shortened(layout: Layout) -> Layout:
    """The same for an image of fewer rows: all that can happen happens in the first few windows."""
    first, last = layout.rows
    height = Extents(layout.stages, 0, layout.size[0], (first, first + 1))
    window = height.ranges[0][1] - height.ranges[0][0]
    rows = last - first
    enough = -(-_WINDOWS * window * rows // layout.size[0])
    return replace(layout, rows=(first, first + min(rows, max(enough, 1) + _WINDOWS)))


def _fullest(layout: Layout, schedule: Schedule, cols: Sequence[int]) -> float:
    """The most bytes that maps and workspaces take at any operation of any strip."""
    stages, item = layout.stages, layout.itemsize
    height = schedule.height
    ends, before = schedule.ends, schedule.before
    row = [cols[i] * stage.channels * item for i, stage in enumerate(stages)]  # bytes of one row

    def kept(i: int, done: Any) -> Any:
        """The first row of its inputs that stage i still needs."""
        last = height.ranges[i][1]
        low = height.reaches[i].kept_from(done, last)
        return np.where(done < last, low, height.reaches[i].size)

    readers: list[list[int]] = [[] for _ in stages]
    held = np.zeros(len(ends))
    for i, stage in enumerate(stages):
        for fed in stage.inputs:
            readers[fed].append(i)
            waiting = before[:, fed] - kept(i, before[:, i])
            held += row[fed] * np.clip(waiting, 0, before[:, fed] - height.ranges[fed][0])
    fullest = 0.0
    for i, stage in enumerate(stages):
        computed = ends[:, i] - before[:, i]
        output = row[i] * computed
        if i == 0:
            held = held + output * max(len(readers[0]), 1)
            fullest = max(fullest, float((held + output).max()))
            continue
        given = np.zeros(len(ends))
        left = np.zeros(len(ends))
        for fed in stage.inputs:
            low = np.minimum(kept(i, before[:, i]), before[:, fed])
            given += row[fed] * np.maximum(ends[:, fed] - np.maximum(low, height.ranges[fed][0]), 0)
            low = np.minimum(kept(i, ends[:, i]), ends[:, fed])
            left += row[fed] * np.maximum(ends[:, fed] - np.maximum(low, height.ranges[fed][0]), 0)
        runs = computed > 0
        joined = given if stage.sliding is not None or len(stage.inputs) > 1 else 0 * given
        made = 0 * output if stage.in_place else output
        low_row, last_row = height.ranges[i]
        at_border = (before[:, i] == low_row) | (ends[:, i] == last_row)
        work = made + left + _workspace(stage, layout, given, output, at_border)
        work = np.where(runs, work, 0)
        fullest = max(fullest, float((held + np.where(runs, np.maximum(joined, work), 0)).max()))
        held = np.where(runs, held - given + left + output * len(readers[i]), held)
    return fullest


def _workspace(stage: Stage, layout: Layout, given: Any, output: Any, at_border: Any) -> Any:
    """What the library takes beside a layer's input and output."""
    sliding = stage.sliding
    if sliding is None:
        return 0 * output
    item = layout.itemsize
    positions = output / (stage.channels * item)
    work = 0 * output
    if sliding.gathers:
        work = work + np.minimum(positions, _GEMM_CELLS) * sliding.columns * item
    elif sliding.weights and item <= 4:  # oneDNN orders input, output and weights anew
        work = work + given + output + sliding.weights * item
    elif sliding.columns:
        work = work + positions * sliding.columns * item
    if sliding.indexes:
        work = work + positions * stage.channels * 8
    # a padded copy
    return work + (np.where(at_border, given, 0) if sliding.pads_width else given)


def itemsize_of(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty((), dtype=dtype).element_size()
