"""Regions of an image: polygons of GeoJSON (RFC 7946), and which squares of a grid they touch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcvgg.errors import ArgumentError, one_line
from fcvgg.geometry import Pair
from fcvgg.support.extras import imported

Polygon = list[NDArray[np.float64]]
"""Closed rings ``(n, 2)`` of x and y: the outline, and holes."""

_LON_LAT = ("OGC:CRS84", "OGC:1.3:CRS84", "CRS84")
"""GeoJSON's names of EPSG:4326, whose coordinates it always gives as longitude and latitude."""


@dataclass(frozen=True)
class Regions:
    """Polygons as GeoJSON states them.

    Attributes:
        polygons: at least one.
        crs: the name of their coordinate reference system; None where they state none.
        in_pixels: whether they state that they have none (``"crs": null``).
    """

    polygons: list[Polygon]
    crs: str | None = None
    in_pixels: bool = False

    @classmethod
    def of(cls, value: Any) -> Regions:
        """The polygons of GeoJSON, of a list of geometries, or of a geopandas or shapely object.

        Raises:
            ArgumentError: naming the part that is not a polygon.
        """
        crs = getattr(value, "crs", None)  # of geopandas, which leaves it out of its GeoJSON
        name = None if crs is None else _system(crs if isinstance(crs, str) else crs.to_string())
        data = getattr(value, "__geo_interface__", value)
        stated = data.get("crs", ...) if isinstance(data, Mapping) else ...
        if isinstance(stated, Mapping):
            properties = stated.get("properties")
            found = properties.get("name") if isinstance(properties, Mapping) else None
            if not isinstance(found, str):
                raise ArgumentError(f"where must name its crs as GeoJSON does, got {stated!r}")
            name = _system(found)
        polygons = list(_polygons(data, "where"))
        if not polygons:
            raise ArgumentError("where must hold at least one polygon, got none")
        return cls(polygons, name, stated is None)


def read_regions(path: Path) -> Regions:
    """The polygons of a GeoJSON file.

    Raises:
        ArgumentError: if it cannot be read, or is not GeoJSON.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ArgumentError(f"where={path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"where={path} must be GeoJSON, got: {one_line(error)}") from error
    return Regions.of(data)


def same_system(name: str, other: str) -> bool:
    """Whether two coordinate reference systems, by name or WKT, are the same."""
    first, second = _system(name), _system(other)
    if first == second:
        return True
    with suppress(Exception):  # without rasterio only the names can be compared
        parsed = imported("rasterio.crs", "geo").CRS.from_user_input
        return bool(parsed(first) == parsed(second))
    return False


def _system(name: str) -> str:
    """A system's short name: ``urn:ogc:def:crs:EPSG::32632`` is ``EPSG:32632``."""
    short = name.removeprefix("urn:ogc:def:crs:").replace("::", ":")
    return "EPSG:4326" if short in _LON_LAT else short


def _polygons(data: Any, place: str) -> Iterator[Polygon]:
    """The polygons of a GeoJSON object, or of a list of them."""
    data = getattr(data, "__geo_interface__", data)
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        for i, one in enumerate(data):
            yield from _polygons(one, f"{place}[{i}]")
        return
    if not isinstance(data, Mapping):
        raise ArgumentError(f"{place} must be GeoJSON, got {type(data).__name__}")
    kind = data.get("type")
    if kind == "Feature":
        if data.get("geometry") is not None:  # GeoJSON allows features without a place
            yield from _polygons(data["geometry"], place)
    elif kind in ("FeatureCollection", "GeometryCollection"):
        name = "features" if kind == "FeatureCollection" else "geometries"
        members = data.get(name)
        if not isinstance(members, Sequence) or isinstance(members, str):
            raise ArgumentError(f"{place} must have a list of {name}, got {members!r}")
        yield from _polygons(members, f"{place}.{name}")
    elif kind == "Polygon":
        yield _rings(data.get("coordinates"), place)
    elif kind == "MultiPolygon":
        for rings in _listed(data.get("coordinates"), place):
            yield _rings(rings, place)
    else:
        raise ArgumentError(
            f"{place} must be a Polygon, MultiPolygon, Feature or FeatureCollection, got "
            f"{kind!r}; leave other geometries out"
        )


def _listed(values: Any, place: str) -> Iterable[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ArgumentError(f"{place} must have coordinates of rings, got {_shown(values)}")
    return values


def _rings(rings: Any, place: str) -> Polygon:
    return [_ring(ring, place) for ring in _listed(rings, place)]


def _ring(ring: Any, place: str) -> NDArray[np.float64]:
    try:
        points = np.asarray(ring)
    except ValueError:  # positions of different lengths
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] < 2 or points.dtype.kind not in "iuf":
        raise ArgumentError(f"{place} must have rings of positions [x, y], got {_shown(ring)}")
    points = points[:, :2].astype(np.float64)
    if not np.isfinite(points).all():
        raise ArgumentError(f"{place} must have finite coordinates, got {_shown(ring)}")
    if len(points) < 4 or (points[0] != points[-1]).any():
        raise ArgumentError(
            f"{place} must have closed rings, of four positions or more of which the last is the "
            f"first, got {_shown(ring)}"
        )
    return points


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- squares of a grid ----------------------------------------------------------------------------


def squares_touched(polygons: Iterable[Polygon], shape: Pair) -> NDArray[np.bool_]:
    """Which unit squares of a grid ``(rows, columns)`` share some area with a polygon.

    A square does if an edge runs through its inside, or else if its middle lies inside by the
    even-odd rule. Edges along the lines of the grid touch neither side.
    """
    grid = np.zeros(shape, np.bool_)
    for rings in polygons:
        points = np.concatenate(rings)
        low = np.maximum(np.floor(points.min(0)), 0).astype(int)
        high = np.minimum(np.ceil(points.max(0)), shape[::-1]).astype(int)
        if (low < high).all():
            edges = np.concatenate([np.stack([ring[:-1], ring[1:]], 1) for ring in rings]) - low
            part = grid[low[1] : high[1], low[0] : high[0]]
            part |= _along(edges, part.shape) | _inside(edges, part.shape)
    return grid


def _along(edges: NDArray[np.float64], shape: Pair) -> NDArray[np.bool_]:
    """The squares whose inside an edge ``(n, 2, 2)`` runs through."""
    (x0, y0), (x1, y1) = _downwards(edges)
    edge, rows = _row_by_row(np.floor(y0), np.ceil(y1), shape[0])
    x0, y0, x1, y1 = x0[edge], y0[edge], x1[edge], y1[edge]
    height = np.where(y1 > y0, y1 - y0, 1)
    # the part of the edge in the row; a level edge lies in it as a whole
    start = x0 + (x1 - x0) * np.clip((rows - y0) / height, 0, 1)
    end = np.where(y1 > y0, x0 + (x1 - x0) * np.clip((rows + 1 - y0) / height, 0, 1), x1)
    first, last = np.floor(np.minimum(start, end)), np.ceil(np.maximum(start, end))
    return _summed(rows, first, 1, shape, last) > 0


def _inside(edges: NDArray[np.float64], shape: Pair) -> NDArray[np.bool_]:
    """The squares whose middle lies inside: an odd number of edges lies on its left."""
    (x0, y0), (x1, y1) = _downwards(edges)
    edge, rows = _row_by_row(np.ceil(y0 - 0.5), np.ceil(y1 - 0.5), shape[0])
    x0, y0, x1, y1 = x0[edge], y0[edge], x1[edge], y1[edge]
    crossing = x0 + (x1 - x0) * (rows + 0.5 - y0) / (y1 - y0)
    return _summed(rows, np.ceil(crossing - 0.5), 1, shape) % 2 == 1


def _downwards(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges by their upper and lower end: ``(2, 2, n)``, of either end x and y."""
    upward = edges[:, 0, 1] > edges[:, 1, 1]
    ordered = np.where(upward[:, None, None], edges[:, ::-1], edges)
    return np.moveaxis(ordered, 0, -1)


def _row_by_row(first: Any, end: Any, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs of an edge and a row that it reaches, from half-open ranges of rows."""
    first, end = (np.clip(n, 0, rows).astype(np.int64) for n in (first, end))
    counts = np.maximum(end - first, 0)
    edge = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return edge, first[edge] + np.arange(len(edge)) - before[edge]


def _summed(rows: Any, first: Any, value: int, shape: Pair, end: Any = None) -> NDArray[np.int64]:
    """`value` for every entry, added from its `first` column on, up to `end` if that is given."""
    steps = np.zeros((shape[0], shape[1] + 1), np.int64)
    np.add.at(steps, (rows, np.clip(first, 0, shape[1]).astype(int)), value)
    if end is not None:
        np.add.at(steps, (rows, np.clip(end, 0, shape[1]).astype(int)), -value)
    return steps.cumsum(1)[:, :-1]
