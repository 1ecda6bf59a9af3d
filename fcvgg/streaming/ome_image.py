"""What OME-Zarr 0.5 says of a score map on disk, so that viewers lay it on its slide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fcvgg.geometry import Geometry, Pair
from fcvgg.images.lazy.georeference import Transform, composed, scaling, transform_of_cells

VERSION = "0.5"

Axis = dict[str, str]
"""One dimension of an array, by its name, type and unit."""


def cells_on_slide(description: Mapping[str, Any]) -> Transform:
    """From the cells of a map to the slide's pixels at level 0, from a store's description."""
    geometry = Geometry.from_dict(description["geometry"])
    size = _pair(description["image_size"])
    full = _pair(description.get("full_size", size))
    return composed(scaling(size, full), transform_of_cells(geometry))


def ome_axes(dimensions: int, description: Mapping[str, Any]) -> list[Axis]:
    """The axes of an array that ends in rows and columns of cells.

    Of the five best classes the ranks lie along a third axis of space, since OME-Zarr allows one
    axis of another kind at most.
    """
    unit = {} if description.get("pixel_size") is None else {"unit": "micrometer"}
    axes: list[Axis] = [
        {"name": "c", "type": "channel"},
        {"name": "z", "type": "space"},
        {"name": "y", "type": "space", **unit},
        {"name": "x", "type": "space", **unit},
    ]
    return {2: axes[2:], 3: [axes[0], *axes[2:]], 4: axes}[dimensions]


def ome_image(axes: list[Axis], path: str, description: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes ``ome`` of the group that holds the array.

    The coordinates of a cell are its centre: in micrometres where the slide's pixel size is known,
    else in pixels of its level 0, of which the middle of the first one is 0.
    """
    across, _, left, _, down, top = cells_on_slide(description)
    size = _pair(description["image_size"])
    full = _pair(description.get("full_size", size))
    sizes = description.get("pixel_size")  # of the level
    pixel = [one * n / m for one, n, m in zip(sizes, size, full)] if sizes else [1.0, 1.0]
    before = len(axes) - 2
    scale = [1.0] * before + [down * pixel[0], across * pixel[1]]
    first = [(start + step / 2 - 0.5) for start, step in ((top, down), (left, across))]
    translation = [0.0] * before + [at * one for at, one in zip(first, pixel)]
    transformations = [
        {"type": "scale", "scale": scale},
        {"type": "translation", "translation": translation},
    ]
    datasets = [{"path": path, "coordinateTransformations": transformations}]
    multiscale = {"name": description["kind"], "axes": axes, "datasets": datasets}
    return {"version": VERSION, "multiscales": [multiscale]}


def _pair(size: Any) -> Pair:
    height, width = size
    return height, width
