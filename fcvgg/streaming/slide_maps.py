"""Pictures of a score map on disk: an overlay thumbnail, and a pyramid of the image's full size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fcvgg.categories import class_index, class_name
from fcvgg.errors import CategoryError, FcvggError, ImageError
from fcvgg.geometry import Geometry, Pair
from fcvgg.images.lazy.georeference import Georeference
from fcvgg.images.lazy.opening import open_image
from fcvgg.images.lazy.source import StripSource, nodata_of
from fcvgg.images.pictures import Picture
from fcvgg.probability import cells_with_data, chance_level, normalized, to_probabilities
from fcvgg.results.heatmap import Heatmap
from fcvgg.results.interpolation import interpolated, pixel_points, shown, within
from fcvgg.support.atomic import atomic_file, checked_file
from fcvgg.support.extras import imported

if TYPE_CHECKING:
    from fcvgg.streaming.score_store import ScoreStore

THUMBNAIL = 1600
"""Pixels of a thumbnail's larger side."""

_TILE = 512
_SMALLEST_LEVEL = 512
_READ_BYTES = 64 << 20
_THUMBNAIL_ROWS = 4
_LISTED = 8
_MOST_CLASSES = 1 << 24


class SlideMap:
    """One class's probability over an image, from a score map on disk.

    Args:
        store: a finished score map.
        target: a class index or category name; None for the class with the highest average score,
            or the only one.

    Raises:
        CategoryError: if the class is unknown or its probability cannot be known from the map.
        ImageError: if no cell has data.
    """

    def __init__(self, store: ScoreStore, target: int | str | None = None):
        if not store.complete:
            raise FcvggError(f"{store.path} is not finished; repeat the call that began it")
        with store.reading():
            place = _target(store, target)
            self.cells = _probabilities(store, place)  # (h, w), NaN where there is no data
        if np.isnan(self.cells).all():
            raise ImageError(f"no cell of {store.path} has data, so there is nothing to show")
        self._description = store.description
        self.path = store.path
        self.geometry = Geometry.from_dict(store.description["geometry"])
        self.image_size: Pair = tuple(store.description["image_size"])
        sizes = store.description.get("pixel_size")
        self.pixel_size: tuple[float, float] | None = sizes and (sizes[0], sizes[1])
        names = store.description["categories"]
        kept = store.description["classes"] if store.description["kind"] == "scores" else None
        self.index = place if kept is None else kept[place]
        self.label = class_name(self.index, None) if names is None else names[place]

    @property
    def chance(self) -> float:
        """The probability of the class that says nothing."""
        kept = self._description["classes"] if self._description["all_classes"] else ()
        count = self._description.get("num_classes", len(kept))
        return chance_level(count, self._description["activation"])

    def shown(self, ys: NDArray[Any], xs: NDArray[Any], size: Pair) -> NDArray[np.float32]:
        """The probability at points `ys`, `xs` of the image, for a picture of it of some size.

        Where a pixel of a reduced picture covers several cells, it shows the highest probability,
        so that a few cells of a large slide stay visible. Without data it is NaN.
        """
        if size == self.image_size:
            return self.sampled(ys, xs)
        cells, points = torch.from_numpy(self.cells), (torch.from_numpy(ys), torch.from_numpy(xs))
        extents = [pixels / n for pixels, n in zip(self.image_size, size)]
        return shown(cells, self.geometry, points, extents).numpy()

    def sampled(self, ys: NDArray[Any], xs: NDArray[Any]) -> NDArray[np.float32]:
        """The probability at points of the image, ``(len(ys), len(xs))``.

        It is interpolated between the cells' centres and held outside them.
        """
        points = torch.from_numpy(np.asarray(ys, float)), torch.from_numpy(np.asarray(xs, float))
        return interpolated(torch.from_numpy(self.cells), self.geometry, points).numpy()

    def source(self) -> StripSource | None:
        """The image that was streamed, if it was a file and is still there."""
        path = self._description["source"]
        if path is None or not (Path(path).is_file() or Path(path).is_dir()):
            return None
        return open_image(
            path,
            self._description["level"],
            bands=self._description.get("bands"),
            nodata=nodata_of(self._description.get("nodata")),
        )

    def heatmap(self, source: StripSource | None = None, side: int = THUMBNAIL) -> Heatmap:
        """A heatmap of reduced size, on a thumbnail of the image if it is given.

        Raises:
            ImageError: if the image has another size than the streamed one.
        """
        height, width = self.image_size
        factor = max(max(height, width) / side, 1.0)
        size = (max(round(height / factor), 1), max(round(width / factor), 1))
        # the middle of every thumbnail pixel, in pixels of the image
        ys, xs = (pixel_points(n, m) for n, m in zip(size, self.image_size))
        rows, cols = (
            within(axis, points, n)
            for axis, points, n in zip(self.geometry.axes, (ys, xs), self.cells.shape)
        )
        if source is not None and source.size != self.image_size:
            raise ImageError(
                f"{source.name} must have the size of the image of {self.path}, {self.image_size}, "
                f"got {source.size}"
            )
        picture = None if source is None else _thumbnail(source, ys.numpy(), xs.numpy())
        values = self.shown(ys.numpy(), xs.numpy(), size).clip(0, 1)  # (H, W)
        coverage = (rows[:, None] & cols).numpy() & ~np.isnan(values)
        return Heatmap(values, coverage, self.label, picture, chance=self.chance)

    def save_pyramid(self, path: str | Path) -> Path:
        """Write the probability at every pixel as a pyramidal OME-TIFF, 0 to 255 for 0 to 1.

        Pixels without data are 0, like those without the class.

        The file has the slide's size in pixels, its pixel size where the slide states one, and the
        class as the name of its channel, as viewers of OME-TIFF (napari, QuPath) read them. For a
        georeferenced image it is a GeoTIFF with its coordinate reference system and transform.

        Raises:
            FcvggError: if it cannot be written.
        """
        path = checked_file(path, "path", (".tif", ".tiff"))
        tifffile = imported("tifffile", "stream")
        sizes = self._levels()
        place = Georeference.of_description(self._description)
        options: dict[str, Any] = {
            "tile": (_TILE, _TILE),
            "dtype": "uint8",
            "compression": "zlib",
            "photometric": "minisblack",
        }
        with (
            atomic_file(path) as temporary,
            tifffile.TiffWriter(temporary, bigtiff=True, ome=True) as file,
        ):
            for level, size in enumerate(sizes):
                options.update(self._resolution(size))
                first = {
                    "metadata": self._metadata(),
                    "subifds": len(sizes) - 1,
                    "extratags": place.tags if place is not None else (),
                }
                # the reduced levels hang on the first as sub-images, as OME-TIFF demands
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
        # tile by tile, so that memory does not grow with the slide
        ys, xs = (pixel_points(n, m).numpy() for n, m in zip(size, self.image_size))
        for top in range(0, size[0], _TILE):
            for left in range(0, size[1], _TILE):
                values = self.shown(ys[top : top + _TILE], xs[left : left + _TILE], size)
                yield np.round(np.nan_to_num(values).clip(0, 1) * 255).astype(np.uint8)


def _target(store: ScoreStore, target: int | str | None) -> int:
    """The place of a class among those of the map."""
    description = store.description
    names, kind = description["categories"], description["kind"]
    if kind == "top5":
        raise CategoryError(
            f"{store.path} must hold scores of a class to show a heatmap, got the top five of "
            "every cell; stream with classes=[name]"
        )
    count = store.array.shape[0] if kind == "scores" else len(names or ()) or 1 << 31
    if isinstance(target, Integral) and kind == "scores" and not description["all_classes"]:
        if target not in description["classes"]:
            held = ", ".join(map(str, description["classes"][:_LISTED]))
            held += ", ..." if count > _LISTED else ""
            raise CategoryError(f"target must be a class of {store.path} ({held}), got {target}")
        return int(description["classes"].index(target))
    if target is not None:
        return class_index(target, names, count)
    if kind == "argmax":
        counts = np.zeros(1, np.int64)  # cells without a class, -1, are not counted
        for rows in row_ranges(store):
            best = store.array[rows]
            if best.min(initial=0) < -1 or best.max(initial=0) > _MOST_CLASSES:
                raise ValueError(f"class indices must be from -1 to {_MOST_CLASSES}")
            more = np.bincount(best.ravel() + 1)[1:]
            counts = np.pad(counts, (0, max(len(more) - len(counts), 0)))
            counts[: len(more)] += more
        return int(counts.argmax())
    if count == 1:
        return 0
    totals = np.zeros(count)  # average scores decide, in float64 for millions of cells
    for rows in row_ranges(store):
        scores = torch.from_numpy(store.array[:, rows])  # (K, rows, w)
        scores = scores.masked_fill(~cells_with_data(scores), 0)
        totals += scores.sum((1, 2), dtype=torch.float64).numpy()
    return int(np.argmax(totals))


def _probabilities(store: ScoreStore, index: int) -> NDArray[np.float32]:
    """The probability ``(h, w)`` of the class at a place of the map."""
    description, array = store.description, store.array
    if description["kind"] == "argmax":
        cells = np.empty(array.shape, np.float32)
        for rows in row_ranges(store):
            labels = array[rows]
            unknown = (
                np.nan if description.get("num_classes", 1) > 1 else 0
            )  # -1 of one class: not it
            cells[rows] = np.where(labels < 0, unknown, labels == index)
        return cells
    activation = description["activation"]
    if activation != "logits":  # probabilities of a class need no other class
        return to_probabilities(torch.from_numpy(array[index][None]), activation)[0].float().numpy()
    if not description["all_classes"]:
        if store.normalizer is None:
            raise CategoryError(
                f"{store.path} was written by an older version, without what the probabilities of "
                "some of the classes need; stream the image again"
            )
        logits, normalizer = (torch.from_numpy(a) for a in (array[index], store.normalizer[:]))
        return normalized(logits, normalizer).float().numpy()
    # a softmax needs all classes, so some rows at a time
    bands = [
        to_probabilities(torch.from_numpy(array[:, rows]), activation)[index].float()
        for rows in row_ranges(store)
    ]
    return torch.cat(bands).numpy()


def row_ranges(store: ScoreStore) -> Iterator[slice]:
    """Rows a few at a time, in whole chunks."""
    *lead, height, width = store.array.shape
    row = int(np.prod([*lead, width])) * store.array.dtype.itemsize
    step = max(_READ_BYTES // row // store.chunk_rows, 1) * store.chunk_rows
    for first in range(0, height, step):
        yield slice(first, min(first + step, height))


def _thumbnail(source: StripSource, ys: NDArray[Any], xs: NDArray[Any]) -> Image.Image | None:
    """The image's pixels, averaged; None where its channels are not colours.

    A few of the rows that a pixel of the thumbnail covers are read. Pixels without data do not
    count, and are black where there are no others.
    """
    if source.preprocessed:
        raise ImageError(f"{source.name} must hold pixels to be shown, got preprocessed values")
    if source.channels not in (1, 3, 4):
        return None
    (down, _), (across, width) = (
        (np.linspace(0, n, len(points) + 1).round().astype(int), n)
        for n, points in zip(source.size, (ys, xs))
    )
    lines = []
    for top, bottom in itertools.pairwise(down):
        rows = np.linspace(top, bottom - 1, min(_THUMBNAIL_ROWS, bottom - top)).round().astype(int)
        read = np.stack([source.read((int(y), int(y) + 1), (0, width))[0] for y in rows])
        known = np.isfinite(read)
        sums = np.where(known, read, 0).sum(0, dtype=np.float64)  # (W, C)
        # then over the columns of every pixel of the thumbnail
        sums, counts = (np.add.reduceat(n, across[:-1], 0) for n in (sums, known.sum(0)))
        lines.append(np.where(counts, sums / np.maximum(counts, 1), np.nan).astype(np.float32))
    pixels = np.stack(lines)
    if source.channels == 4 and not source.transparent():
        pixels = pixels[..., :3]
    return Picture(pixels, source.dtype == np.uint8).image
