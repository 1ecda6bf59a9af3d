"""Which cells a stream computes: those that overlap a mask, polygons or tissue.

The region is a boolean array ``(h, w)`` of the image's aspect ratio, tissue that is found on a
thumbnail (`fcvgg.streaming.tissue`), or polygons: GeoJSON as an object, a list of geometries, or an
object of shapely or geopandas. Polygons are in pixels of the full resolution, or of a georeferenced
image in its coordinates, unless they state ``"crs": null``. A path leads to a mask (``.png``,
``.npy``) or to polygons (``.geojson``, ``.json``).

A cell stands for the square of one stride around its centre; the squares of the outermost cells
reach to the image's border. A cell is of interest if the region covers some of its square.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcvgg.errors import ArgumentError, one_line
from fcvgg.geometry import Geometry, Pair
from fcvgg.images.lazy.source import StripSource
from fcvgg.images.regions import Polygon, Regions, read_regions, same_system, squares_touched
from fcvgg.streaming.bands import Agree, Band, chosen_bands
from fcvgg.streaming.tissue import TISSUE, tissue

_GEOJSON = (".geojson", ".json")

_LOOKS = 4
"""Rows of every receptive field that are looked at for pixels without data."""


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
        """`chosen_bands` of the cells in a block of columns."""
        return chosen_bands(self.cells[:, slice(*cols)], lost, agree)


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
