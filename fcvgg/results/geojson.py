"""Cells and regions of a score map as GeoJSON polygons, for QuPath and geographic systems."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fcvgg.choices import PolygonKind
from fcvgg.errors import ArgumentError, check_choice, check_share
from fcvgg.images.lazy.georeference import Transform
from fcvgg.results.boxes import connected_runs
from fcvgg.results.colours import class_colours
from fcvgg.support.atomic import atomic_file, checked_file

ENDINGS = (".geojson", ".json")

_COLOURS = 1 << 10
"""Classes with a colour of their own at most."""

Ring = list[list[float]]
"""Points ``[x, y]``, of which the last one is the first."""


@dataclass(frozen=True, eq=False)
class ClassCells:
    """The cells of one class on an image.

    Attributes:
        probabilities: ``(h, w)``, NaN where a cell has no data.
        label: the class's name.
        index: its index.
        on_slide: from cells to the pixels of level 0.
        on_earth: from cells to coordinates; None where they are unknown.
        crs: of those coordinates, ``"EPSG:n"`` or WKT, if it is known.
        measured: whether these are probabilities; else they say only which cells are of the class.
    """

    probabilities: NDArray[Any]
    label: str
    index: int
    on_slide: Transform
    on_earth: Transform | None = None
    crs: str | None = None
    measured: bool = True

    def to_geojson(
        self,
        path: str | os.PathLike[str] | None,
        threshold: float,
        kind: PolygonKind,
        pixels: bool,
    ) -> dict[str, Any]:
        """The polygons, as `fcvgg.results.score_map.ScoreMap.to_geojson` describes them."""
        if isinstance(path, (int, float)):
            raise ArgumentError(
                f"path must be the name of a file, got {path}; pass threshold={path}"
            )
        check_share("threshold", threshold)
        check_choice("kind", kind, get_args(PolygonKind))
        file = None if path is None else checked_file(path, "path", ENDINGS)
        on_earth = None if pixels else self.on_earth
        transform = self.on_slide if on_earth is None else on_earth
        with np.errstate(invalid="ignore"):
            chosen = self.probabilities >= threshold  # NaN is below
        colour = class_colours(self.index % _COLOURS + 1)[-1].tolist()
        features = [
            {
                "type": "Feature",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [_placed(ring, transform) for ring in rings],
                },
                "properties": self._properties(self.probabilities[rows, cols], kind, colour),
            }
            for rings, rows, cols in (_regions(chosen) if kind == "regions" else _cells(chosen))
        ]
        collection: dict[str, Any] = {"type": "FeatureCollection", "features": features}
        if self.on_earth is not None and pixels:
            collection["crs"] = None  # GeoJSON's word for coordinates that are not on the earth
        elif on_earth is not None and self.crs is not None:
            collection["crs"] = {"type": "name", "properties": {"name": _crs_name(self.crs)}}
        if file is not None:
            with atomic_file(file) as temporary:
                temporary.write_text(json.dumps(collection), "utf-8")
        return collection

    def _properties(
        self, values: NDArray[Any], kind: PolygonKind, colour: list[int]
    ) -> dict[str, Any]:
        """What QuPath reads of a polygon whose cells have these probabilities."""
        mean = {"probability": float(values.mean(dtype=np.float64))} if self.measured else {}
        measurements = dict(mean)
        if kind == "regions":
            if self.measured:
                measurements["highest probability"] = float(values.max())
            measurements["cells"] = len(values)
        return {
            "objectType": "annotation" if kind == "regions" else "tile",
            "classification": {"name": self.label, "color": colour},
            "measurements": measurements,
            "class": self.label,  # for tables, which do not look into objects
            **mean,
        }


def _crs_name(crs: str) -> str:
    """A coordinate reference system as the member ``crs`` names it, which GDAL reads."""
    authority, _, code = crs.partition(":")
    return f"urn:ogc:def:crs:EPSG::{code}" if authority == "EPSG" and code.isdigit() else crs


_Polygons = Iterator[tuple[list[NDArray[np.int64]], NDArray[Any], NDArray[Any]]]
"""The corners ``(n, 2)`` of every ring, as (x, y) in cells, and the polygon's rows and columns."""


def _cells(chosen: NDArray[np.bool_]) -> _Polygons:
    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    for row, col in np.argwhere(chosen):
        yield [square + np.array([col, row])], np.array([row]), np.array([col])


def _regions(chosen: NDArray[np.bool_]) -> _Polygons:
    """Components of cells that are connected by their edges, the outer ring before the holes."""
    starts, ends, region = connected_runs(chosen)
    if not len(starts):
        return
    labels = np.full(chosen.shape, -1, np.int64)
    labels[chosen] = np.repeat(region, ends - starts)  # runs and cells are in reading order
    holders: dict[int, list[NDArray[np.int64]]] = {}
    for label, ring in _rings(labels):
        holders.setdefault(label, []).append(ring)
    ys, xs = np.nonzero(chosen)
    order = np.argsort(labels[chosen], kind="stable")
    bounds = np.flatnonzero(np.diff(labels[chosen][order], prepend=-1))
    for members in np.split(order, bounds[1:]):
        label = int(labels[ys[members[0]], xs[members[0]]])
        yield sorted(holders[label], key=_area, reverse=True), ys[members], xs[members]


def _rings(labels: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The borders of all components: label and corners, with the component on the right.

    Where two cells of a component touch at a corner only, the border goes straight on from one to
    the other, so that no ring meets itself: the rings of a hole and around it share the corner.
    """
    padded = np.pad(labels, 1, constant_values=-1)
    height, width = labels.shape
    # from a corner to the next: right above a cell, down at its right, left below, up at its left
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    corners = ((0, 0), (0, 1), (1, 1), (1, 0))  # where those edges of a cell begin
    beyond = ((-1, 0), (0, 1), (1, 0), (0, -1))
    leaving: dict[tuple[int, int, int], int] = {}  # row, column, direction: the component
    for direction, ((down, right), (dy, dx)) in enumerate(zip(beyond, corners)):
        neighbour = padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        ys, xs = np.nonzero((labels >= 0) & (neighbour != labels))
        for y, x, label in zip((ys + dy).tolist(), (xs + dx).tolist(), labels[ys, xs].tolist()):
            leaving[y, x, direction] = label
    left = dict.fromkeys(leaving)
    while left:
        y, x, direction = next(iter(left))
        label = leaving[y, x, direction]
        ring = []
        while (y, x, direction) in left:
            del left[y, x, direction]
            ring.append((x, y))
            y, x = y + steps[direction][0], x + steps[direction][1]
            # a turn to the left first: to the cell of the component across the corner
            turns = ((direction + turn) % 4 for turn in (3, 0, 1))
            direction = next((d for d in turns if leaving.get((y, x, d)) == label), direction)
        yield label, _without_straight(np.array(ring))


def _without_straight(ring: NDArray[np.int64]) -> NDArray[np.int64]:
    """A ring without the corners at which it goes straight on."""
    before, after = np.roll(ring, 1, 0), np.roll(ring, -1, 0)
    return ring[((ring - before) != (after - ring)).any(1)]


def _area(ring: NDArray[Any]) -> float:
    """The area of a ring; that of holes is of another sign than that of outer rings."""
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _placed(ring: NDArray[np.int64], transform: Transform) -> Ring:
    a, b, c, d, e, f = transform
    x, y = ring.T.astype(np.float64)
    points = np.stack([a * x + b * y + c, d * x + e * y + f], 1)
    # counterclockwise around the polygon where y points up, as RFC 7946 asks for
    turned = points if a * e - b * d > 0 else points[::-1]
    return [*turned.tolist(), turned[0].tolist()]
