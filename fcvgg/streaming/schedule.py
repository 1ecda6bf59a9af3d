"""Which rows and columns every operation of a network computes, in whole numbers.

`Extents` says what part of every map some cells need; `Schedule` says which rows every operation
computes when which strip of the image has come.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fcvgg.geometry import Pair, Window
from fcvgg.inference.stages import Stage


@dataclass(frozen=True)
class Reach:
    """What a stage's outputs read along one axis of an input with `size` positions."""

    window: Window
    size: int
    mirrors: bool = False

    def raw(self, first: int, end: int) -> Pair:
        """The positions, padding included, that outputs ``[first, end)`` read."""
        start = first * self.window.stride - self.window.before
        return start, (end - 1) * self.window.stride - self.window.before + self.window.span

    def needs(self, first: int, end: int) -> Pair:
        """The positions of the input that outputs ``[first, end)`` read: at least one."""
        low, high = self.raw(first, end)
        if self.mirrors and low < 0:
            high = max(high, self.window.before + 1)
        if self.mirrors and high > self.size:
            low = min(low, self.size - 1 - self.window.after)
        low = min(max(low, 0), self.size - 1)
        return low, max(min(high, self.size), low + 1)

    def kept_from(self, first: NDArray[np.int64], end: int) -> NDArray[np.int64]:
        """From where on outputs ``[first, end)`` need their input; for many values of `first`."""
        low = first * self.window.stride - self.window.before
        if self.mirrors and self.raw(end - 1, end)[1] > self.size:
            low = np.minimum(low, self.size - 1 - self.window.after)
        return np.clip(low, 0, self.size)

    def finished(self, available: NDArray[np.int64], first: int, end: int) -> NDArray[np.int64]:
        """The end of those outputs of ``[first, end)`` that inputs up to `available` allow."""
        window = self.window
        done = (available + window.before - window.span) // window.stride + 1
        least = min(self.size, window.before + 1) if self.mirrors else 1
        done = np.where(available >= least, np.clip(done, first, end), first)
        return np.where(available >= self.needs(first, end)[1], end, done)


class Extents:
    """The size of every stage's map along one axis, and the part of it that is computed.

    Args:
        axis: 0 for the height, 1 for the width.
        size: of the image, not below the window.
        outputs: the half-open range of cells that is asked for.
    """

    def __init__(self, stages: Sequence[Stage], axis: int, size: int, outputs: Pair):
        self.sizes = [size]
        self.reaches: list[Reach] = [Reach(Window(), size)]
        for stage in stages[1:]:
            fed = min(self.sizes[i] for i in stage.inputs)
            sliding = stage.sliding
            window = Window() if sliding is None else sliding.windows[axis]
            mirrors = sliding is not None and sliding.border != "constant"
            self.reaches.append(Reach(window, fed, mirrors))
            self.sizes.append(window.output_size(fed))
        self.ranges = demanded(stages, self.reaches, outputs)


def demanded(
    stages: Sequence[Stage],
    reaches: Sequence[Reach],
    outputs: Pair,
    widened: Callable[[int, Pair], Pair] = lambda stage, needed: needed,
) -> list[Pair]:
    """The range of every stage's positions that the last stage's `outputs` need.

    `widened` may enlarge the range of a stage.
    """
    ranges: list[Pair | None] = [None] * len(stages)
    ranges[-1] = outputs
    for i in range(len(stages) - 1, -1, -1):
        needed = ranges[i]
        if needed is None:  # of no use for this output
            ranges[i] = (0, 0)
            continue
        needed = ranges[i] = widened(i, needed)
        low, high = reaches[i].needs(*needed)
        for fed in stages[i].inputs:
            other = ranges[fed]
            union = (low, high) if other is None else (min(low, other[0]), max(high, other[1]))
            ranges[fed] = union
    return [r for r in ranges if r is not None]


class Schedule:
    """Which rows every stage computes at which strip of the image.

    Args:
        stages: of the network.
        height: the sizes and ranges along the height.
        strip: rows of the image in a strip.
        every: for every stage, at which strips it computes: at each of so many, and at the last.
            Deep layers, whose rows are short, so use their weights for several rows at once; those
            that wait for the same strips do not wait for each other.
        multiples: for every stage, of how many rows it computes a multiple, but at the map's end.

    Attributes:
        ends: int64 ``(strips, stages)``: the end of the rows that are computed after each strip.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        height: Extents,
        strip: int,
        every: Sequence[int],
        multiples: Sequence[int],
    ):
        self.stages = stages
        self.height = height
        self.strip = strip
        first, end = height.ranges[0]
        self._first_strip = first // strip
        strips = -(-end // strip) - self._first_strip
        self.ends = np.zeros((strips, len(stages)), np.int64)
        bounds = (np.arange(self._first_strip, self._first_strip + strips) + 1) * strip
        self.ends[:, 0] = np.clip(bounds, first, end)
        for i, stage in enumerate(stages[1:], 1):
            low, high = height.ranges[i]
            available = self.ends[:, list(stage.inputs)].min(1)
            empty = [height.ranges[fed][0] for fed in stage.inputs]
            available = np.where(available > max(empty), available, 0)
            done = height.reaches[i].finished(available, low, high)
            whole = np.maximum(done - done % multiples[i], low)
            done = np.where(done < high, whole, done)
            self.ends[:, i] = self._at(every[i], done, low)

    def _at(self, every: int, done: NDArray[np.int64], low: int) -> NDArray[np.int64]:
        """The end of a stage's rows after each strip, if it computes at some strips only."""
        strips = np.arange(len(done))
        computes = (self._first_strip + strips + 1) % every == 0
        computes[-1] = True
        last = np.maximum.accumulate(np.where(computes, strips, -1))
        return np.where(last >= 0, done[last], low)

    @cached_property
    def before(self) -> NDArray[np.int64]:
        """The end of the rows that were computed before each strip."""
        first = np.array([[low for low, _ in self.height.ranges]])
        return np.concatenate([first, self.ends[:-1]])

    def starts_for(self, row: int) -> tuple[int, list[int]]:
        """Where to begin so that `row` and all later ones come out with the same bits.

        Every stage then begins at a row where one of its strips begins, so that all strips are the
        same as in a run from the beginning.

        Returns:
            the number of the first strip, and every stage's first row.
        """

        def widened(stage: int, needed: Pair) -> Pair:
            bounds = self.before[:, stage]
            begun = bounds[bounds <= needed[0]]
            return int(begun[-1]) if len(begun) else needed[0], needed[1]

        last = self.height.ranges[-1][1]
        ranges = demanded(self.stages, self.height.reaches, (row, last), widened)
        starts = [low for low, _ in ranges]
        strip = int(np.searchsorted(self.ends[:, 0], starts[0], side="right"))
        return strip, starts

    def with_stages(self, stages: Sequence[Stage]) -> Schedule:
        """The same schedule for other operations with the same windows."""
        other = copy.copy(self)
        other.stages = stages
        return other

    def image_rows(self, strip: int) -> Pair:
        """The image's rows of a strip."""
        return int(self.before[strip, 0]), int(self.ends[strip, 0])
