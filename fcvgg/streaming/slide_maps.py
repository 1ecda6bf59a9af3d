"""Pictures of a score map on disk: an overlay thumbnail, and a pyramid of the image's full size."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fcvgg.categories import class_index, class_name
from fcvgg.errors import CategoryError, FcvggError, ImageError
from fcvgg.files import checked_file, written_whole
from fcvgg.geometry import Axis, Geometry, Pair
from fcvgg.heatmap import Heatmap
from fcvgg.probability import to_probabilities
from fcvgg.sources.extras import imported
from fcvgg.streaming.opening import open_image
from fcvgg.streaming.score_store import ScoreStore
from fcvgg.streaming.strip_sources import StripSource

THUMBNAIL = 1600
"""Pixels of a thumbnail's larger side."""

_TILE = 512
_SMALLEST_LEVEL = 512
_READ_BYTES = 64 << 20
_LISTED = 8


class SlideMap:
    """One class's probability over an image, from a score map on disk.

    Args:
        store: a finished score map.
        target: a class index or category name; None for the class with the highest average score,
            or the only one.

    Raises:
        CategoryError: if the class is unknown or its probability cannot be known from the map.
    """

    def __init__(self, store: ScoreStore, target: int | str | None = None):
        if not store.complete:
            raise FcvggError(f"{store.path} is not finished; the call that began it resumes it")
        self._description = store.description
        self.path = store.path
        self.geometry = Geometry.from_dict(store.description["geometry"])
        self.image_size: Pair = tuple(store.description["image_size"])
        sizes = store.description.get("pixel_size")
        self.pixel_size: tuple[float, float] | None = sizes and (sizes[0], sizes[1])
        names = store.description["categories"]
        place = _target(store, target)
        kept = store.description["classes"] if store.description["kind"] == "scores" else None
        self.index = place if kept is None else kept[place]
        self.label = class_name(self.index, None) if names is None else names[place]
        self.cells = _probabilities(store, place)  # (h, w)

    def shown(self, ys: NDArray[Any], xs: NDArray[Any], size: Pair) -> NDArray[np.float32]:
        """The probability at pixels of a picture of the image of this size, at points `ys`, `xs`.

        Where a pixel of a reduced picture covers cells, it shows the highest: on the small picture
        of a large slide, what a few cells have found would else fall between the pixels.
        """
        values = self.sampled(ys, xs)
        (top, bottom), (left, right) = (
            _covered(axis, points, pixels / n, cells)
            for axis, points, pixels, n, cells in zip(
                self.geometry.axes, (ys, xs), self.image_size, size, self.cells.shape
            )
        )
        reduced = size != self.image_size
        if not reduced or (top >= bottom).all() or (left >= right).all():
            return values
        rows = _highest(self.cells[:, left.min() : right.max()], top, bottom)
        highest = _highest(rows.T, left - left.min(), right - left.min()).T
        return np.maximum(values, highest)

    def sampled(self, ys: NDArray[Any], xs: NDArray[Any]) -> NDArray[np.float32]:
        """The probability at points of the image, ``(len(ys), len(xs))``.

        It is interpolated between the cells' centres and held outside them.
        """
        (top, y), (left, x) = (
            _neighbours(axis, points, n)
            for axis, points, n in zip(self.geometry.axes, (ys, xs), self.cells.shape)
        )
        bottom = np.minimum(top + 1, self.cells.shape[0] - 1)
        right = np.minimum(left + 1, self.cells.shape[1] - 1)
        rows = self.cells[top] * (1 - y)[:, None] + self.cells[bottom] * y[:, None]
        return (rows[:, left] * (1 - x) + rows[:, right] * x).astype(np.float32)

    def source(self) -> StripSource | None:
        """The image that was streamed, if it was a file and is still there."""
        path = self._description["source"]
        if path is None or not Path(path).exists():
            return None
        return open_image(path, self._description["level"], bands=self._description.get("bands"))

    def heatmap(self, source: StripSource | None = None, side: int = THUMBNAIL) -> Heatmap:
        """A heatmap of reduced size, on a thumbnail of the image if it is given.

        Raises:
            ImageError: if the image has another size than the streamed one.
        """
        height, width = self.image_size
        factor = max(max(height, width) / side, 1.0)
        size = (max(round(height / factor), 1), max(round(width / factor), 1))
        ys, xs = (_points(n, m) for n, m in zip(size, self.image_size))
        rows, cols = (
            _within(axis, points, n)
            for axis, points, n in zip(self.geometry.axes, (ys, xs), self.cells.shape)
        )
        if source is not None and source.size != self.image_size:
            raise ImageError(
                f"{source.name} has size {source.size}, and {self.path} was made of an image of "
                f"size {self.image_size}"
            )
        picture = None if source is None else _thumbnail(source, ys, xs)
        values = self.shown(ys, xs, size).clip(0, 1)
        return Heatmap(values, rows[:, None] & cols[None, :], self.label, picture)

    def save_pyramid(self, path: str | Path) -> Path:
        """Write the probability at every pixel as a pyramidal OME-TIFF, 0 to 255 for 0 to 1.

        It has the slide's size in pixels, its pixel size where the slide states one, and the class
        as the name of its channel, as viewers of OME-TIFF (napari, QuPath) read them.

        Raises:
            FcvggError: if it cannot be written.
        """
        path = checked_file(path, "path", (".tif", ".tiff"))
        tifffile = imported("tifffile", "stream")
        sizes = self._levels()
        options: dict[str, Any] = {
            "tile": (_TILE, _TILE),
            "dtype": "uint8",
            "compression": "zlib",
            "photometric": "minisblack",
        }
        with (
            written_whole(path) as temporary,
            tifffile.TiffWriter(temporary, bigtiff=True, ome=True) as file,
        ):
            for level, size in enumerate(sizes):
                options.update(self._resolution(size))
                first = {"metadata": self._metadata(), "subifds": len(sizes) - 1}
                kind = first if level == 0 else {"metadata": None, "subfiletype": 1}
                file.write(self._tiles(size), shape=size, **kind, **options)
        return path

    def _metadata(self) -> dict[str, Any]:
        """What the file says in OME's terms."""
        metadata: dict[str, Any] = {"axes": "YX", "Name": self.label}
        metadata["Channel"] = {"Name": [self.label]}
        for axis, size in zip("YX", self.pixel_size or ()):
            metadata[f"PhysicalSize{axis}"] = size
            metadata[f"PhysicalSize{axis}Unit"] = "µm"
        return metadata

    def _resolution(self, size: Pair) -> dict[str, Any]:
        """A level's pixels per centimetre, for readers that look at TIFF's own tags."""
        if self.pixel_size is None:
            return {}
        down, across = (
            1e4 / pixel * n / whole
            for pixel, n, whole in zip(self.pixel_size, size, self.image_size)
        )
        return {"resolution": (across, down), "resolutionunit": "CENTIMETER"}

    def _levels(self) -> list[Pair]:
        sizes = [self.image_size]
        while max(sizes[-1]) > _SMALLEST_LEVEL:
            height, width = sizes[-1]
            sizes.append((-(-height // 2), -(-width // 2)))
        return sizes

    def _tiles(self, size: Pair) -> Iterator[NDArray[np.uint8]]:
        ys, xs = (_points(n, m) for n, m in zip(size, self.image_size))
        for top in range(0, size[0], _TILE):
            for left in range(0, size[1], _TILE):
                values = self.shown(ys[top : top + _TILE], xs[left : left + _TILE], size)
                yield np.round(values.clip(0, 1) * 255).astype(np.uint8)


def _target(store: ScoreStore, target: int | str | None) -> int:
    """The class's place among those of the map."""
    description = store.description
    names, kind = description["categories"], description["kind"]
    if kind == "top5":
        raise CategoryError(
            f"{store.path} holds the top five of every cell; a heatmap needs scores of a class"
        )
    count = store.array.shape[0] if kind == "scores" else len(names or ()) or 1 << 31
    if isinstance(target, Integral) and kind == "scores" and not description["all_classes"]:
        if target not in description["classes"]:
            held = ", ".join(map(str, description["classes"][:_LISTED]))
            held += ", ..." if count > _LISTED else ""
            raise CategoryError(f"{store.path} holds the classes {held}, not class {target}")
        return int(description["classes"].index(target))
    if target is not None:
        return class_index(target, names, count)
    if kind == "argmax":
        counts = np.zeros(1, np.int64)  # cells without a class, -1, are not counted
        for rows in _row_ranges(store):
            more = np.bincount(store.array[rows].ravel() + 1)[1:]
            counts = np.pad(counts, (0, max(len(more) - len(counts), 0)))
            counts[: len(more)] += more
        return int(counts.argmax())
    if count == 1:
        return 0
    totals = sum(store.array[:, rows].sum((1, 2), dtype=float) for rows in _row_ranges(store))
    return int(np.argmax(totals))


def _probabilities(store: ScoreStore, index: int) -> NDArray[np.float32]:
    description, array = store.description, store.array
    if description["kind"] == "argmax":
        cells = np.empty(array.shape, np.float32)
        for rows in _row_ranges(store):
            cells[rows] = array[rows] == index
        return cells
    activation = description["activation"]
    if activation != "logits":
        return to_probabilities(torch.from_numpy(array[index][None]), activation)[0].float().numpy()
    if not description["all_classes"]:
        raise CategoryError(
            f"{store.path} holds the logits of some of the classes, and probabilities need those of"
            " all; stream without classes"
        )
    bands = [
        to_probabilities(torch.from_numpy(array[:, rows]), activation)[index].float()
        for rows in _row_ranges(store)
    ]
    return torch.cat(bands).numpy()


def _row_ranges(store: ScoreStore) -> Iterator[slice]:
    """Rows a few at a time, in whole chunks."""
    *lead, height, width = store.array.shape
    row = int(np.prod([*lead, width])) * store.array.dtype.itemsize
    step = max(_READ_BYTES // row // store.chunk_rows, 1) * store.chunk_rows
    for first in range(0, height, step):
        yield slice(first, min(first + step, height))


def _points(size: int, pixels: int) -> NDArray[Any]:
    """Where `size` samples lie on an axis of `pixels`."""
    return (np.arange(size) + 0.5) * (pixels / size) - 0.5


def _places(axis: Axis, points: NDArray[Any]) -> NDArray[Any]:
    return (points - axis.centre_of(0)) / axis.stride


def _neighbours(axis: Axis, points: NDArray[Any], cells: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The cell before each point, and how far the point is on the way to the next."""
    places = _places(axis, points).clip(0, cells - 1)
    first = np.floor(places).astype(int)
    return first, (places - first).astype(np.float32)


def _covered(
    axis: Axis, points: NDArray[Any], extent: float, cells: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Half-open ranges of the cells whose centres lie within `extent` pixels around points."""
    first = np.ceil(_places(axis, points - extent / 2)).clip(0, cells)
    end = np.ceil(_places(axis, points + extent / 2)).clip(0, cells)
    return first.astype(int), end.astype(int)


def _highest(
    values: NDArray[np.float32], first: NDArray[Any], end: NDArray[Any]
) -> NDArray[np.float32]:
    """The maximum of each range of rows; 0 for an empty one."""
    return np.stack([values[a:b].max(0, initial=0) for a, b in zip(first, end)])


def _within(axis: Axis, points: NDArray[Any], cells: int) -> NDArray[np.bool_]:
    """Which points lie between the first and the last centre; the nearest one if none does."""
    places = _places(axis, points)
    inside = (places >= 0) & (places <= cells - 1)
    if not inside.any():
        inside[np.abs(places - (cells - 1) / 2).argmin()] = True
    return inside


def _thumbnail(source: StripSource, ys: NDArray[Any], xs: NDArray[Any]) -> Image.Image | None:
    """The image's nearest pixels; None where its channels are no colours."""
    if source.preprocessed:
        raise ImageError(f"{source.name} is preprocessed and has no picture")
    if source.channels not in (1, 3, 4):
        return None
    cols = np.round(xs).astype(int).clip(0, source.size[1] - 1)
    rows = np.round(ys).astype(int).clip(0, source.size[0] - 1)
    lines = [source.read((int(y), int(y) + 1), (0, source.size[1]))[0, cols] for y in rows]
    pixels = np.stack(lines)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
