"""Which rows and columns every operation of a network computes, in whole numbers.

`AxisRanges` says what part of every map some cells need along one axis; `Schedule` says which rows
every operation computes at which strip of the image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fcvgg.geometry import KernelGeometry, Pair
from fcvgg.inference.stages import Stage


@dataclass(frozen=True)
class Reach:
    """What an operation reads along one axis of an input with `size` positions.

    Attributes:
        mirrors: whether positions outside the input repeat those inside (reflect, replicate), so
            that outputs at the border read more of them.
    """

    window: KernelGeometry
    size: int
    mirrors: bool = False

    def needs(self, first: int, end: int) -> Pair:
        """The positions of the input that outputs ``[first, end)`` read: at least one."""
        low, high = self.window.reads(first, end)
        if self.mirrors and low < 0:
            high = max(high, self.window.before + 1)
        if self.mirrors and high > self.size:
            low = min(low, self.size - 1 - self.window.after)
        low = min(max(low, 0), self.size - 1)
        return low, max(min(high, self.size), low + 1)

    def kept_from(self, first: NDArray[np.int64], end: int) -> NDArray[np.int64]:
        """The first position that outputs ``[first, end)`` still need, for each value of `first`.

        It is `size` where no output is left.
        """
        low, _ = self.window.reads(first, first + 1)
        if self.mirrors and self.window.reads(end - 1, end)[1] > self.size:
            low = np.minimum(low, self.size - 1 - self.window.after)
        return np.where(first < end, np.clip(low, 0, self.size), self.size)

    def finished(self, available: NDArray[np.int64], first: int, end: int) -> NDArray[np.int64]:
        """The end of those outputs of ``[first, end)`` that inputs up to `available` allow."""
        done = self.window.finished(available)
        least = min(self.size, self.window.before + 1) if self.mirrors else 1
        done = np.where(available >= least, np.clip(done, first, end), first)
        return np.where(available >= self.needs(first, end)[1], end, done)


class AxisRanges:
    """The size of every operation's map along one axis, and the part of it that is computed.

    Args:
        axis: 0 for the height, 1 for the width.
        size: of the image, not below the window.
        outputs: the half-open range of cells that is asked for.
    """

    def __init__(self, stages: Sequence[Stage], axis: int, size: int, outputs: Pair):
        self.sizes = [size]
        self.reaches: list[Reach] = [Reach(KernelGeometry(), size)]
        for stage in stages[1:]:
            fed = min(self.sizes[i] for i in stage.inputs)
            sliding = stage.sliding
            window = KernelGeometry() if sliding is None else sliding.windows[axis]
            mirrors = sliding is not None and sliding.border != "constant"
            self.reaches.append(Reach(window, fed, mirrors))
            self.sizes.append(window.output_size(fed))
        self.ranges = needed_ranges(stages, self.reaches, outputs)


def needed_ranges(
    stages: Sequence[Stage],
    reaches: Sequence[Reach],
    outputs: Pair,
    extend: Callable[[int, Pair], Pair] = lambda stage, needed: needed,
) -> list[Pair]:
    """The range of every operation's positions that the last operation's `outputs` need.

    `extend` may enlarge the range of an operation. One that nothing needs has ``(0, 0)``.
    """
    ranges: list[Pair | None] = [None] * len(stages)
    ranges[-1] = outputs
    for i in range(len(stages) - 1, 0, -1):
        needed = ranges[i]
        if needed is None:
            continue
        ranges[i] = needed = extend(i, needed)
        low, high = reaches[i].needs(*needed)
        for fed in stages[i].inputs:
            other = ranges[fed] or (low, high)
            ranges[fed] = min(low, other[0]), max(high, other[1])
    if ranges[0] is not None:
        ranges[0] = extend(0, ranges[0])
    return [(0, 0) if r is None else r for r in ranges]


class Schedule:
    """Which rows every operation computes at which strip of the image.

    Deep layers have short rows, and fetch all their weights to compute one. They wait for several
    strips and compute several rows at once. All periods are powers of two, so that layers compute
    at the same strips and do not wait for each other.

    Args:
        stages: of the network.
        height: the sizes and ranges along the height.
        strip: rows of the image in a strip.
        periods: for every operation, after how many strips it computes; all do at the last strip.
        multiples: for every operation, the number of which its rows are a multiple, except at the
            end of the map.

    Attributes:
        ends: int64 ``(strips, stages)``: the end of the rows that are computed after each strip.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        height: AxisRanges,
        strip: int,
        periods: Sequence[int],
        multiples: Sequence[int],
    ):
        self.stages = stages
        self.height = height
        self.strip = strip
        first, end = height.ranges[0]
        first_strip = first // strip
        numbers = np.arange(first_strip, -(-end // strip)) + 1  # strips read after each, of all
        self.ends = np.zeros((len(numbers), len(stages)), np.int64)
        self.ends[:, 0] = np.clip(numbers * strip, first, end)
        for i, stage in enumerate(stages[1:], 1):
            low, high = height.ranges[i]
            available = self.ends[:, list(stage.inputs)].min(1)
            # an input that has computed nothing yet stands at its first row, which is not there
            empty = max(height.ranges[fed][0] for fed in stage.inputs)
            available = np.where(available > empty, available, 0)
            done = height.reaches[i].finished(available, low, high)
            whole = np.maximum(done - done % multiples[i], low)
            done = np.where(done < high, whole, done)
            computes = numbers % periods[i] == 0
            computes[-1] = True
            self.ends[:, i] = np.maximum.accumulate(np.where(computes, done, low))

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The end of the rows that were computed before each strip, as `ends` after it."""
        first = np.array([[low for low, _ in self.height.ranges]])
        return np.concatenate([first, self.ends[:-1]])

    @cached_property
    def kept(self) -> NDArray[np.int64]:
        """The first row of its input that an operation needs after each strip, as `ends`."""
        axis, ends = self.height, self.ends.T
        kept = [
            reach.kept_from(done, end)
            for reach, done, (_, end) in zip(axis.reaches, ends, axis.ranges)
        ]
        return np.stack(kept, 1)

    def waiting_rows(
        self, stage: int, done: NDArray[np.int64], arrived: NDArray[np.int64]
    ) -> list[tuple[int, NDArray[np.int64]]]:
        """How many rows of each of its inputs an operation still needs, by strip.

        Args:
            stage: the operation.
            done: the end of its own rows that are computed, for each strip.
            arrived: ``(strips, stages)``, the ends of the rows of all operations that came.

        Returns:
            the inputs and the numbers of their rows.
        """
        ranges = self.height.ranges
        kept = self.height.reaches[stage].kept_from(done, ranges[stage][1])
        return [
            (fed, np.maximum(arrived[:, fed] - np.maximum(kept, ranges[fed][0]), 0))
            for fed in self.stages[stage].inputs
        ]

    def restart_at(self, row: int) -> tuple[int, list[int]]:
        """Where to begin so that `row` and all later ones come out with the same bits.

        oneDNN's sums depend on how many rows it computes at once. So every operation begins at a
        row where one of its strips begins, and all its later strips are those of a whole run.

        Returns:
            the number of the first strip, and every operation's first row.
        """

        def to_start_of_strip(stage: int, needed: Pair) -> Pair:
            starts = self.starts[:, stage]
            begun = starts[starts <= needed[0]]
            return int(begun[-1]) if len(begun) else needed[0], needed[1]

        outputs = row, self.height.ranges[-1][1]
        ranges = needed_ranges(self.stages, self.height.reaches, outputs, to_start_of_strip)
        strip = int(np.searchsorted(self.ends[:, 0], ranges[0][0], side="right"))
        return strip, [low for low, _ in ranges]

    def with_stages(self, stages: Sequence[Stage]) -> Schedule:
        """The same schedule for other operations with the same windows."""
        other = copy.copy(self)
        other.stages = stages
        return other
