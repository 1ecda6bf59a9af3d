"""From cells to pixels: where pixels lie among the centres of cells, and the values between them.

A pixel whose value depends on a cell without data, NaN, has none either; no other pixel does.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fcvgg.errors import ArgumentError
from fcvgg.geometry import Axis, Geometry, Pair

MOST_PIXELS = 1 << 26
"""Pixels of a heatmap that is held in memory at most: 256 MiB of values."""

MOST_VALUES = 1 << 29
"""Values of scores that are resampled to pixels at most: 2 GiB in single precision."""

_ROUNDING = 1e-9
"""In cells; a centre that lies on a pixel must count as inside, and its neighbours must not."""

_BLOCK = 1 << 20
"""Values that are interpolated at a time."""


def check_pixels(size: Pair, remedy: str, maps: int = 1) -> None:
    """Raise `ArgumentError` for a size that memory is not meant for, with the limit."""
    pixels = prod(size)
    if pixels > MOST_PIXELS or pixels * maps > MOST_VALUES:
        limit = min(MOST_PIXELS, MOST_VALUES // maps)
        classes = f" for {maps} classes" if maps > 1 else ""
        raise ArgumentError(
            f"size must be at most {limit:,} pixels{classes} in memory, got {size[0]}x{size[1]} "
            f"({pixels:,}); {remedy}"
        )


def pixel_points(size: int, pixels: int) -> Tensor:
    """Where the middles of `size` picture elements lie on an axis of `pixels`, float64."""
    return (torch.arange(size, dtype=torch.float64) + 0.5) * (pixels / size) - 0.5


def interpolated(maps: Tensor, geometry: Geometry, points: tuple[Tensor, Tensor]) -> Tensor:
    """Maps ``(..., h, w)`` at rows and columns of points, ``(..., H, W)``.

    They are linear between the cells' centres; outside them the nearest cell's value is held.
    """
    (top, bottom, y), (left, right, x) = (
        _between(axis, at, cells, maps)
        for axis, at, cells in zip(geometry.axes, points, maps.shape[-2:])
    )
    result = maps.new_empty(*maps.shape[:-2], len(y), len(x))
    # some rows at a time: the intermediate rows would take more memory than the result
    step = max(_BLOCK // max(prod(maps.shape[:-2]) * len(x), 1), 1)
    for first in range(0, len(y), step):
        part = slice(first, first + step)
        above, below = top[part], bottom[part]
        start = int(above.min())
        needed = maps[..., start : int(below.max()) + 1, :]
        # columns first: there are few rows of cells, and whole rows are then copied
        rows = torch.lerp(needed[..., left], needed[..., right], x)  # (..., cells, W)
        above, below = rows[..., above - start, :], rows[..., below - start, :]
        result[..., part, :] = torch.lerp(above, below, y[part, None])
    return result


def shown(
    cells: Tensor, geometry: Geometry, points: tuple[Tensor, Tensor], extents: Sequence[float]
) -> Tensor:
    """A map ``(h, w)`` of probabilities on a reduced picture: nothing falls between its pixels.

    Where a pixel, which is `extents` pixels of the network's input high and wide, covers the
    centres of cells, it shows the highest of them if that is more than the interpolated value.
    """
    values = interpolated(cells, geometry, points)
    (top, bottom), (left, right) = (
        _centres_within(axis, at, extent, n)
        for axis, at, extent, n in zip(geometry.axes, points, extents, cells.shape)
    )
    if bool((top >= bottom).all()) or bool((left >= right).all()):
        return values
    # maxima over rows, then over columns; ranges of cells that nothing covers are left out
    start = int(left.min())
    known = cells[:, start : int(right.max())].nan_to_num(-1)
    rows = _highest(known, top, bottom)
    highest = _highest(rows.T, left - start, right - start).T  # -1 where no cell has data
    return torch.where(highest < 0, values, torch.fmax(values, highest))


def within(axis: Axis, points: Tensor, cells: int) -> Tensor:
    """Which points lie between the first and the last centre; the nearest ones if none does."""
    places = _places(axis, points)
    inside = (places >= -_ROUNDING) & (places <= cells - 1 + _ROUNDING)
    if not inside.any():
        middle = (places - (cells - 1) / 2).abs()
        inside = middle <= middle.min() + _ROUNDING
    return inside


def _places(axis: Axis, points: Tensor) -> Tensor:
    """Where points lie, counted in cells."""
    return (points - axis.centre_of(0)) / axis.stride


def _between(axis: Axis, points: Tensor, cells: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cells before and after each point, and how far it is on the way between them.

    A point at a centre depends on that cell alone, which is then both.
    """
    places = _places(axis, points).clamp(0, cells - 1)
    nearest = places.round()
    # rounding must not draw in a neighbour, which may have no data, with a weight of 1e-16
    places = torch.where((places - nearest).abs() <= _ROUNDING, nearest, places)
    first = places.floor()
    way = places - first
    second = first + (way > 0)
    device = like.device
    return first.long().to(device), second.long().to(device), way.to(like)


def _centres_within(axis: Axis, points: Tensor, extent: float, cells: int) -> tuple[Tensor, Tensor]:
    """Half-open ranges of the cells whose centres lie within `extent` pixels around points."""
    first = _places(axis, points - extent / 2).ceil().clamp(0, cells)
    end = _places(axis, points + extent / 2).ceil().clamp(0, cells)
    return first.long(), end.long()


def _highest(values: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """The maximum of each range of rows; -1 for an empty one."""
    empty = values.new_full(values.shape[1:], -1)
    return torch.stack(
        [values[a:b].amax(0) if a < b else empty for a, b in zip(first.tolist(), end.tolist())]
    )
