"""Which cells a stream computes: those that overlap a mask, polygons or tissue.

The region is a boolean array ``(h, w)`` of the image's aspect ratio, tissue that is found on a
thumbnail (`tissue`), or polygons: GeoJSON as an object, a list of geometries, or an object of
shapely or geopandas. Polygons are in pixels of the full resolution, or of a georeferenced image in
its coordinates, unless they state ``"crs": null``. A path leads to a mask (``.png``, ``.npy``) or
to polygons (``.geojson``, ``.json``).

A cell stands for the square of one stride around its centre; the squares of the outermost cells
reach to the image's border. A cell is of interest if the region covers some of its square.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcvgg.errors import ArgumentError, one_line
from fcvgg.geometry import Geometry, Pair
from fcvgg.images.lazy.source import StripSource
from fcvgg.images.pictures import in_mode
from fcvgg.images.regions import Polygon, Regions, read_regions, same_system, squares_touched
from fcvgg.inference.schedule import Schedule
from fcvgg.streaming.slide_maps import thumbnail

TISSUE = "tissue"

_GEOJSON = (".geojson", ".json")

_LEAST_COLS = 16
"""Columns of cells that are computed at least: libraries sum fewer in another order."""

_MOST_WIDTHS = 6
"""Most widths of ranges in a block: each has to be compared with whole rows."""

_LOOKS = 4
"""Rows of every receptive field that are looked at for pixels without data."""

_NARROWER = 1 / 40
"""Share of a band's cells that its rows from some row downwards must save to be narrower."""

_GROUPS = 96
"""Most rows and columns of the grid on which bands are chosen: all pairs of rows are tried."""

_THUMBNAIL = 1024
"""Pixels of the larger side of the thumbnail on which tissue is looked for."""

_DARK, _BRIGHT, _LEAST_CONTRAST = 20, 200, 10
"""Of 255: borders that scanners leave are darker, the glass is brighter, tissue differs by more."""

_LEAST_GLASS = 0.05
"""Least share of bright pixels, among those that are not dark, for them to be a slide's glass."""

Band = tuple[Pair, list[Pair]]
"""Rows of cells, and the ranges of columns that are computed of them.

A band that begins where another ends, with as many ranges that lie within the other's, goes on
with what was computed for that one.
"""

Agree = Callable[[list[Band]], bool]


@dataclass(frozen=True, eq=False)
class Interest:
    """The cells that are computed, and what the others hold.

    Attributes:
        cells: bool ``(h, w)``.
        fill: the value of the others; None for what stands for no data.
    """

    cells: NDArray[np.bool_]
    fill: float | None = None
    checksum: str | None = None
    """Of what `where` and `fill` ask for; None where they ask for nothing."""
    known: dict[Any, list[Band]] = field(default_factory=dict)
    """The bands of every block of columns and height of strips, once they were chosen."""

    @classmethod
    def of(
        cls,
        where: Any,
        fill: Any,
        source: StripSource,
        geometry: Geometry,
        shape: Pair,
        rows: Pair,
    ) -> Interest:
        """What the arguments `where` and `fill` of `stream` ask for.

        Args:
            geometry: of the network, placed on the image.
            shape: of the whole map.
            rows: of the map, those that are asked for.

        Raises:
            ArgumentError: if they cannot be used, or no cell is selected.
        """
        cells = _cells(_region(where, source), source, geometry, shape)[slice(*rows)]
        if not cells.any():
            height, width = cells.shape
            remedy = f"pass a region that overlaps rows {rows[0]} to {rows[1]} of the map"
            if isinstance(where, str) and where == TISSUE:
                remedy = "no tissue was found, so pass a mask or polygons"
            raise ArgumentError(
                f"where must select at least one of the {height}x{width} cells, got none; {remedy}"
            )
        checksum = zlib.crc32(np.packbits(cells).tobytes() + str(fill).encode())
        return cls(cells, fill, f"{checksum:08x}")

    def with_data(self, source: StripSource, geometry: Geometry, rows: Pair) -> Interest:
        """Without cells that see pixels without data, and so hold NaN in any case.

        Some rows of the image are looked at, so that not all such cells are found. Cells see every
        pixel of their receptive field.
        """
        (down, across), (height, width) = geometry.axes, source.size
        cells = self.cells.copy()
        top, left = (
            axis.span_of(0)[0] + axis.stride * (start + np.arange(count))
            for axis, start, count in zip(geometry.axes, (rows[0], 0), cells.shape)
        )
        left, right = (n.clip(0, width) for n in (left, left + across.receptive_field))
        step = max(down.receptive_field // _LOOKS, 1)
        for y in range(min(step // 2, height - 1), height, step):
            first, end = np.searchsorted(top, (y - down.receptive_field, y), "right")
            if not cells[first:end].any():  # no cell of interest sees this row
                continue
            pixels = source.read((y, y + 1), (0, width))
            missing = np.isnan(pixels).any(0 if source.preprocessed else 2)
            before = np.r_[0, missing.ravel().cumsum()]  # how many lie left of every column
            cells[first:end] &= before[left] == before[right]
        return replace(self, cells=cells)

    def bands(self, cols: Pair, lost: tuple[float, float], agree: Agree) -> list[Band]:
        """The rows and ranges of columns to compute of a block of columns, from top to bottom.

        Args:
            cols: of the block.
            lost: rows of cells that beginning a band costs, and columns that a range costs.
            agree: whether the cells of all ranges of some bands have the bits of whole rows.
        """
        cells, width = self.cells[:, slice(*cols)], cols[1] - cols[0]
        step = 1
        while step < width:
            for narrows in (True, False):
                bands = row_bands(cells, lost, step, narrows)
                widths = {end - first for _, ranges in bands for first, end in ranges}
                if len(widths) <= _MOST_WIDTHS and agree(bands):
                    return bands
            step = max(2 * step, _LEAST_COLS)
        return row_bands(cells, lost, width, narrows=False)


# -- what is asked for ----------------------------------------------------------------------------


def _region(where: Any, source: StripSource) -> Regions | NDArray[np.bool_]:
    """Polygons, or a mask of any size."""
    if isinstance(where, str) and where == TISSUE:
        return tissue(source)
    if isinstance(where, (str, os.PathLike)):
        path = Path(where)
        if not path.is_file():
            raise ArgumentError(
                f"where must be '{TISSUE}', a mask, polygons or the path of either, got "
                f"{str(where)!r}, which is not a file"
            )
        return read_regions(path) if path.suffix.lower() in _GEOJSON else _read_mask(path)
    if hasattr(where, "__geo_interface__") or isinstance(where, (dict, list, tuple)):
        return Regions.of(where)
    if not hasattr(where, "__array__"):
        raise ArgumentError(
            f"where must be '{TISSUE}', a boolean array (h, w) or GeoJSON polygons, got "
            f"{type(where).__name__}"
        )
    return _checked_mask(np.asarray(where), "where")


def _read_mask(path: Path) -> NDArray[np.bool_]:
    """A mask from a file of NumPy, or an image whose pixels are not black where it is True."""
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                values = np.asarray(image if image.mode == "P" else image.convert("L")) != 0
    except Exception as error:  # decoders raise whatever a broken file leads to
        raise ArgumentError(
            f"where={path} must be a mask (.png, .npy) or GeoJSON, got: {one_line(error)}"
        ) from error
    return _checked_mask(values, f"where={path}")


def _checked_mask(values: NDArray[Any], name: str) -> NDArray[np.bool_]:
    if values.ndim != 2 or values.dtype.kind not in "bui" or not values.size:
        raise ArgumentError(
            f"{name} must be a boolean array (h, w), got {values.dtype} of shape {values.shape}"
        )
    return values != 0


def _cells(
    region: Regions | NDArray[np.bool_], source: StripSource, geometry: Geometry, shape: Pair
) -> NDArray[np.bool_]:
    """The cells ``(h, w)`` of whose squares a region covers some."""
    starts = [axis.centre_of(0) + 0.5 - axis.stride / 2 for axis in geometry.axes]
    if isinstance(region, Regions):
        return _cells_of_polygons(_in_pixels(region, source), source, geometry, shape, starts)
    (height, width), (tall, wide) = source.size, region.shape
    if abs(tall - height * wide / width) >= 1 and abs(wide - width * tall / height) >= 1:
        raise ArgumentError(
            f"where must have the aspect ratio of the image of {height}x{width} pixels, got a mask "
            f"of {tall}x{wide}"
        )
    counts = np.zeros((tall + 1, wide + 1), np.int64)
    counts[1:, 1:] = region.cumsum(0, dtype=np.int64).cumsum(1)
    (top, bottom), (left, right) = (
        _bounds(start, axis.stride, cells, size, pixels)
        for start, axis, cells, size, pixels in zip(
            starts, geometry.axes, shape, source.size, region.shape
        )
    )
    rows = counts[bottom] - counts[top]  # (h, w + 1)
    return rows[:, right] > rows[:, left]


def _bounds(
    start: float, stride: int, cells: int, size: int, pixels: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first and the end pixel of a mask that every cell's square overlaps, along one axis."""
    edges = start + stride * np.arange(cells + 1.0)
    edges[0], edges[-1] = 0, size  # the outermost squares reach to the border
    edges = (edges * pixels / size).clip(0, pixels).round(9)
    first = np.minimum(np.floor(edges[:-1]), pixels - 1).astype(np.int64)
    return first, np.maximum(np.ceil(edges[1:]).astype(np.int64), first + 1)


def _cells_of_polygons(
    polygons: Sequence[Polygon],
    source: StripSource,
    geometry: Geometry,
    shape: Pair,
    starts: Sequence[float],
) -> NDArray[np.bool_]:
    height, width = source.size
    scale = np.array(geometry.stride[::-1])
    # squares of their own between the outermost cells and the border, joined to them below
    before = [max(int(np.ceil(n / s)), 0) for n, s in zip(starts, geometry.stride)]
    after = [
        max(int(np.ceil((size - start) / stride)) - cells, 0)
        for size, start, stride, cells in zip(source.size, starts, geometry.stride, shape)
    ]
    origin = np.array([starts[1] - before[1] * scale[0], starts[0] - before[0] * scale[1]])
    inside = [rings for rings in polygons if _overlaps(rings, height, width)]
    placed = [[(ring - origin) / scale for ring in rings] for rings in inside]
    grid = squares_touched(placed, tuple(a + n + b for a, n, b in zip(before, shape, after)))  # type: ignore[arg-type]
    for axis, (first, cells) in enumerate(zip(before, shape)):
        grid = np.logical_or.reduceat(grid, [0, *range(first + 1, first + cells)], axis)
    return grid


def _overlaps(rings: Polygon, height: int, width: int) -> bool:
    low, high = rings[0].min(0), rings[0].max(0)
    return bool((low < (width, height)).all() and (high > 0).all())


def _in_pixels(regions: Regions, source: StripSource) -> list[Polygon]:
    """Polygons in pixels of the image, which they must overlap.

    Those of a georeferenced image are in its coordinates, others in pixels of its full resolution.
    """
    place = source.georeference
    if regions.in_pixels or place is None or place.transform is None:
        if regions.crs is not None:
            raise ArgumentError(
                f"where must be in pixels of {source.name}, which is not georeferenced, got "
                f"coordinates of {regions.crs}"
            )
        across, down = (n / full for n, full in zip(source.size[::-1], source.full_size[::-1]))
        scale, origin = np.diag([across, down]), np.zeros(2)
        system = "pixels"
    else:
        system = place.crs or "the image's coordinates"
        if regions.crs is not None and not same_system(regions.crs, system):
            raise ArgumentError(
                f"where must be in the image's coordinate reference system, {system}, got "
                f"{regions.crs}; reproject it, for example with geopandas' to_crs"
            )
        a, b, c, d, e, f = place.transform
        scale, origin = np.linalg.inv(np.array([[a, b], [d, e]])), np.array([c, f])
    polygons = [[(ring - origin) @ scale.T for ring in rings] for rings in regions.polygons]
    if not any(_overlaps(rings, *source.size) for rings in polygons):
        points = np.concatenate([ring for rings in regions.polygons for ring in rings])
        (left, top), (right, bottom) = points.min(0), points.max(0)
        remedy = "" if system == "pixels" else '; polygons in pixels state "crs": null'
        raise ArgumentError(
            f"where must overlap the image of {source.size[0]}x{source.size[1]} pixels, got "
            f"polygons from x={left:g}, y={top:g} to x={right:g}, y={bottom:g} in {system}{remedy}"
        )
    return polygons


# -- tissue ---------------------------------------------------------------------------------------


def tissue(source: StripSource) -> NDArray[np.bool_]:
    """Where a slide shows tissue, on a thumbnail ``(h, w)``.

    The distance of every pixel's colour from the background's is split by Otsu's threshold ("A
    threshold selection method from gray-level histograms", 1979). The background is the most
    frequent colour of the bright glass, and of images without glass the most frequent one of all.
    Black borders next to glass count as neither.

    Raises:
        ImageError: if the image holds preprocessed values.
        ArgumentError: if its channels are not colours.
    """
    factor = max(max(source.size) / _THUMBNAIL, 1)
    height, width = (max(round(n / factor), 1) for n in source.size)
    picture = thumbnail(source, (height, width))
    if picture is None:
        raise ArgumentError(
            f"where must be a mask or polygons for {source.name} of {source.channels} channels, "
            f"got {TISSUE!r}, which is found by its colours"
        )
    pixels = np.asarray(in_mode(picture, 3)).astype(np.int16)  # (h, w, 3)
    usable = pixels.max(2) >= _DARK
    glass = usable & (pixels.min(2) >= _BRIGHT)
    if glass.sum() <= _LEAST_GLASS * usable.sum():
        usable = glass = np.ones_like(usable)
    background = [np.bincount(plane[glass]).argmax() for plane in np.moveaxis(pixels, 2, 0)]
    distance = np.abs(pixels - background).max(2)
    threshold = max(otsu(distance[usable]), _LEAST_CONTRAST)
    found: NDArray[np.bool_] = usable & (distance > threshold)
    return found


def otsu(values: NDArray[Any]) -> int:
    """The threshold of whole numbers from 0 to 255 above which they are of the higher class.

    It makes the variance between the two classes largest.
    """
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below = counts.cumsum()  # how many are at or below each value
    sums = (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return int(np.nan_to_num(between).argmax())


# -- bands of rows --------------------------------------------------------------------------------


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
