"""Which rows and columns of cells are computed, so that all cells of interest are, at least cost.

Rows are cut into bands, and of each some ranges of columns are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fcvgg.geometry import Pair
from fcvgg.inference.schedule import Schedule

_LEAST_COLS = 16
"""Columns of cells that are computed at least: libraries sum fewer in another order."""

_MOST_WIDTHS = 6
"""Most widths of ranges in a block: each has to be compared with whole rows."""

_NARROWER = 1 / 40
"""Share of a band's cells that its rows from some row downwards must save to be narrower."""

_GROUPS = 96
"""Most rows and columns of the grid on which bands are chosen: all pairs of rows are tried."""

Band = tuple[Pair, list[Pair]]
"""Rows of cells, and the ranges of columns that are computed of them.

A band that begins where another ends, with as many ranges that lie within the other's, goes on
with what was computed for that one.
"""

Agree = Callable[[list[Band]], bool]


def chosen_bands(cells: NDArray[np.bool_], lost: tuple[float, float], agree: Agree) -> list[Band]:
    """The rows and ranges of columns to compute, from top to bottom.

    Args:
        cells: of interest, bool ``(h, w)``.
        lost: rows of cells that beginning a band costs, and columns that a range costs.
        agree: whether the cells of all ranges of some bands have the bits of whole rows.
    """
    width, step = cells.shape[1], 1
    while step < width:
        for narrows in (True, False):
            bands = row_bands(cells, lost, step, narrows)
            widths = {end - first for _, ranges in bands for first, end in ranges}
            if len(widths) <= _MOST_WIDTHS and agree(bands):
                return bands
        step = max(2 * step, _LEAST_COLS)
    return row_bands(cells, lost, width, narrows=False)


def chains(bands: Sequence[Band]) -> list[list[Band]]:
    """Bands that go on with what was computed for the one before, together."""
    chained: list[list[Band]] = []
    for band in bands:
        if chained and _goes_on(chained[-1][-1], band):
            chained[-1].append(band)
        else:
            chained.append([band])
    return chained


def _goes_on(band: Band, following: Band) -> bool:
    ((_, end), ranges), ((first, _), others) = band, following
    nested = all(low <= a and b <= high for (low, high), (a, b) in zip(ranges, others))
    return first == end and len(ranges) == len(others) and nested


def row_bands(
    cells: NDArray[np.bool_], lost: tuple[float, float], step: int, narrows: bool = True
) -> list[Band]:
    """Bands of rows with ranges of columns that hold all cells of interest, at the least cost.

    Args:
        cells: bool ``(h, w)``.
        lost: rows of cells that beginning a band costs, and columns that a range costs.
        step: a number of columns of which ranges begin and end at a multiple.
        narrows: whether bands may be followed by narrower ones that go on with them.
    """
    height, width = cells.shape
    down, across = (-(-n // _GROUPS) for n in cells.shape)
    groups = np.logical_or.reduceat(cells, range(0, height, down), 0)
    groups = np.logical_or.reduceat(groups, range(0, width, across), 1)
    count = len(groups)
    # the least cost of the groups before each, by the band that ends there
    best, begins = np.zeros(count + 1), np.zeros(count + 1, int)
    for end in range(1, count + 1):
        held = np.logical_or.accumulate(groups[end - 1 :: -1], 0)  # by bands of growing height
        cols = _columns(held, lost[1] / across)
        rows = cols.cumsum() if narrows else cols * np.arange(1, end + 1)
        costs = best[:end] + (rows + cols * lost[0] / down)[::-1]
        begins[end] = costs.argmin()
        best[end] = costs.min()
    bands: list[Band] = []
    end = count
    while end:
        first = int(begins[end])
        rows = np.flatnonzero(cells[first * down : end * down].any(1))
        if len(rows):
            top, bottom = first * down + int(rows[0]), first * down + int(rows[-1]) + 1
            held = np.logical_or.reduce(cells[top:bottom], 0)
            band = (top, bottom), _ranges(held, lost[1], step)
            bands += _narrowing(cells, band, step)[::-1] if narrows else [band]
        end = first
    return bands[::-1]


def _columns(held: NDArray[np.bool_], lost: float) -> NDArray[np.float64]:
    """How many columns are computed for every row of marked columns ``(n, w)``, with those lost."""
    joined = _without_gaps(held, lost)
    ranges = joined[:, 0] + np.count_nonzero(joined[:, 1:] & ~joined[:, :-1], axis=1)
    return np.minimum(joined.sum(1) + ranges * lost, held.shape[1] + lost) * held.any(1)


def _without_gaps(held: NDArray[np.bool_], lost: float) -> NDArray[np.bool_]:
    """Marked columns with the gaps between them that cost less than another range."""
    places = np.arange(held.shape[1])
    left = np.maximum.accumulate(np.where(held, places, -np.inf), 1)
    right = np.minimum.accumulate(np.where(held, places, np.inf)[:, ::-1], 1)[:, ::-1]
    joined: NDArray[np.bool_] = right - left - 1 <= lost
    return joined


def _narrowing(cells: NDArray[np.bool_], band: Band, step: int) -> list[Band]:
    """A band, followed by narrower ones where the rows below need clearly fewer columns."""
    (top, bottom), ranges = band
    least = _NARROWER * (bottom - top) * _width(ranges)
    below = np.logical_or.accumulate(cells[top:bottom][::-1], 0)[::-1]  # by every row on
    bands: list[Band] = []
    for row in range(top + 1, bottom):
        needed = [_hull(below[row - top], cols, step) for cols in ranges]
        if (_width(ranges) - _width(needed)) * (bottom - row) >= least:
            bands.append(((top, row), ranges))
            top, ranges, below = row, needed, below[row - top :]
    return [*bands, ((top, bottom), ranges)]


def _width(ranges: Sequence[Pair]) -> int:
    return sum(end - first for first, end in ranges)


def _hull(marked: NDArray[np.bool_], cols: Pair, step: int) -> Pair:
    """The range within some columns that holds all marked ones of them."""
    places = np.flatnonzero(marked[slice(*cols)]) + cols[0]
    span = (int(places[0]), int(places[-1]) + 1) if len(places) else (cols[0], cols[0])
    return _widened(span, cols, step)


def _widened(span: Pair, within: Pair, step: int) -> Pair:
    """A range of columns with ends at multiples of `step`, and wide enough for equal bits."""
    low, high = within
    first, end = max(span[0] // step * step, low), min(-(-span[1] // step) * step, high)
    first = max(min(first, end - max(step, _LEAST_COLS)), low)
    return first, max(end, min(first + _LEAST_COLS, high))


def _ranges(marked: NDArray[np.bool_], lost: float, step: int) -> list[Pair]:
    """The ranges of columns that hold all that are marked."""
    width = len(marked)
    joined = np.diff(_without_gaps(marked[None], lost)[0], prepend=False, append=False)
    ranges: list[Pair] = []
    for first, end in np.flatnonzero(joined).reshape(-1, 2).tolist():
        first, end = _widened((first, end), (0, width), step)
        if ranges and first <= ranges[-1][1] + lost:
            first = ranges.pop()[0]
        ranges.append((first, end))
    whole = sum(end - first + lost for first, end in ranges) >= width + lost
    return [(0, width)] if whole else ranges


def rows_lost(schedule: Schedule, stride: int) -> float:
    """Rows of cells that beginning a band costs on average: its halo, and layers that wait."""
    first, end = schedule.height.ranges[-1]
    rows = np.unique(np.linspace(first, end - 1, 8).astype(int)).tolist()
    read = [image_rows(schedule, (row, row + 1)) for row in rows]
    return max(float(np.mean([b - a for a, b in read])) / stride - 1, 0.0)


def strips_of(schedule: Schedule, rows: Pair) -> range:
    """The strips that computing some rows of cells takes."""
    first, _ = schedule.restart_at(rows[0])
    return range(first, int(np.searchsorted(schedule.ends[:, -1], rows[1])) + 1)


def image_rows(schedule: Schedule, rows: Pair) -> Pair:
    """The rows of the image that computing some rows of cells reads."""
    _, done = schedule.restart_at(rows[0])
    return done[0], int(schedule.ends[strips_of(schedule, rows)[-1], 0])
