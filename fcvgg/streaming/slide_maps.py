"""Pictures of a score map on disk: thumbnails, and pyramids of the image's full size.

They show one class's probability, or the most probable class of every cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fcvgg.categories import class_index, class_name
from fcvgg.errors import CategoryError, FcvggError, ImageError
from fcvgg.geometry import Geometry, Pair
from fcvgg.images.lazy.georeference import Georeference
from fcvgg.images.lazy.opening import open_image
from fcvgg.images.lazy.source import StripSource, nodata_of
from fcvgg.images.lazy.thumbnail import thumbnail
from fcvgg.probability import cells_with_data, chance_level, normalized, to_probabilities
from fcvgg.results.colours import class_colours
from fcvgg.results.figures import CellLabels, edges_of_cells, label_figure
from fcvgg.results.heatmap import Heatmap
from fcvgg.results.interpolation import interpolated, pixel_points, shown, within
from fcvgg.results.score_map import labels_of
from fcvgg.support.atomic import atomic_file, checked_file
from fcvgg.support.extras import imported

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fcvgg.streaming.score_store import ScoreStore

THUMBNAIL = 1600
"""Pixels of a thumbnail's larger side."""

_TILE = 512
_SMALLEST_LEVEL = 512
_READ_BYTES = 64 << 20
_NAMED = 255
"""Classes that a pyramid names."""

_NODATA = 42113
"""GDAL's tag of the value of pixels without data."""

_LISTED = 8
_MOST_CLASSES = 1 << 24


class StoredMap:
    """What pictures of a finished score map share: the image under it, and the file of a pyramid.

    Raises:
        FcvggError: if the map is not finished.
    """

    _tiff: ClassVar[dict[str, Any]] = {"dtype": "uint8", "photometric": "minisblack"}
    """How a pyramid's pixels are stored."""

    _tags: ClassVar[tuple[Any, ...]] = ()
    """Further tags of its first level."""

    label: str
    """What the map shows."""

    def __init__(self, store: ScoreStore):
        if not store.complete:
            raise FcvggError(f"{store.path} is not finished; repeat the call that began it")
        self._description = store.description
        self.path = store.path
        stored = Geometry.from_dict(store.description["geometry"])
        # the stored row 0 is the first of the band, that of the pictures the first of the image
        above = store.description["rows"][0] * stored.height.stride
        height = replace(stored.height, origin=stored.height.origin - above)
        self.geometry = Geometry(height, stored.width)
        self.image_size: Pair = tuple(store.description["image_size"])
        sizes = store.description.get("pixel_size")
        self.pixel_size: tuple[float, float] | None = sizes and (sizes[0], sizes[1])

    @property
    def classes(self) -> int:
        """How many classes the network has, 0 if the map does not say."""
        kept = self._description["classes"] if self._description["all_classes"] else ()
        return int(self._description.get("num_classes", len(kept)))

    def _placed(self, cells: NDArray[Any], without: float) -> NDArray[Any]:
        """The cells of the whole image, of which the map may be a band of rows."""
        first, end = self._description["rows"]
        after = self.geometry.output_size(self.image_size)[0] - end
        return np.pad(cells, ((first, after), (0, 0)), constant_values=without)

    def _pixels(self, points: NDArray[Any], columns: NDArray[Any], size: Pair) -> NDArray[Any]:
        """The values of a pyramid's pixels at points of the image."""
        raise NotImplementedError

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

    def checked(self, source: StripSource | None) -> StripSource | None:
        """The image, at the level of its pyramid that has the size of the streamed one.

        Raises:
            ImageError: if none has.
        """
        if source is None or source.size == self.image_size:
            return source
        sizes = list(source.level_sizes)
        if source.at_level is not None and self.image_size in sizes:
            return source.at_level(sizes.index(self.image_size))
        raise ImageError(
            f"{source.name} must have the size of the image of {self.path}, {self.image_size}, "
            f"got {source.size}; pass the image that was streamed"
        )

    def thumbnail_size(self, side: int) -> Pair:
        """The size of a picture whose larger side has at most `side` pixels."""
        height, width = self.image_size
        factor = max(max(height, width) / side, 1.0)
        return max(round(height / factor), 1), max(round(width / factor), 1)

    def save_pyramid(self, path: str | Path) -> Path:
        """Write the map at every pixel as a pyramidal OME-TIFF.

        A class's probability is 0 to 255 for 0 to 1, and 0 without data too. Class labels are
        their indices, with a table of their colours; 255 (65535 for more classes) is no data.

        The file has the slide's size in pixels, its pixel size where the slide states one, and what
        it shows as the name of its channel, as viewers of OME-TIFF (napari, QuPath) read them. For
        a georeferenced image it is a GeoTIFF with its coordinate reference system and transform.

        Raises:
            FcvggError: if it cannot be written.
        """
        path = checked_file(path, "path", (".tif", ".tiff"))
        tifffile = imported("tifffile", "stream")
        sizes = self._levels()
        place = Georeference.of_description(self._description)
        options: dict[str, Any] = {
            "tile": (_TILE, _TILE),
            "compression": "zlib",
            **self._tiff,
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
                    "extratags": (*(() if place is None else place.tags), *self._tags),
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

    def _tiles(self, size: Pair) -> Iterator[NDArray[Any]]:
        # tile by tile, so that memory does not grow with the slide
        ys, xs = (pixel_points(n, m).numpy() for n, m in zip(size, self.image_size))
        for top in range(0, size[0], _TILE):
            for left in range(0, size[1], _TILE):
                yield self._pixels(ys[top : top + _TILE], xs[left : left + _TILE], size)


class SlideMap(StoredMap):
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
        super().__init__(store)
        with store.reading():
            place = _target(store, target)
            self.cells = self._placed(_probabilities(store, place), np.nan)  # (h, w)
        if np.isnan(self.cells).all():
            raise ImageError(f"no cell of {store.path} has data, so there is nothing to show")
        names = store.description["categories"]
        kept = store.description["classes"] if store.description["kind"] == "scores" else None
        self.index = place if kept is None else kept[place]
        self.label = class_name(self.index, None) if names is None else names[place]

    @property
    def chance(self) -> float:
        """The probability of the class that says nothing."""
        return chance_level(self.classes, self._description["activation"])

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

    def _pixels(self, points: NDArray[Any], columns: NDArray[Any], size: Pair) -> NDArray[Any]:
        values = self.shown(points, columns, size)
        return np.round(np.nan_to_num(values).clip(0, 1) * 255).astype(np.uint8)

    def heatmap(self, source: StripSource | None = None, side: int = THUMBNAIL) -> Heatmap:
        """A heatmap of reduced size, on a thumbnail of the image if it is given.

        Raises:
            ImageError: if the image has another size than the streamed one.
        """
        source, size = self.checked(source), self.thumbnail_size(side)
        # the middle of every thumbnail pixel, in pixels of the image
        ys, xs = (pixel_points(n, m) for n, m in zip(size, self.image_size))
        rows, cols = (
            within(axis, points, n)
            for axis, points, n in zip(self.geometry.axes, (ys, xs), self.cells.shape)
        )
        values = self.shown(ys.numpy(), xs.numpy(), size).clip(0, 1)  # (H, W)
        coverage = (rows[:, None] & cols).numpy() & ~np.isnan(values)
        picture = None if source is None else thumbnail(source, size)
        return Heatmap(values, coverage, self.label, picture, chance=self.chance)


class SlideLabels(StoredMap):
    """The most probable class of every cell of an image, from a score map on disk.

    Args:
        store: a finished score map: of labels, of the five best classes, or of all scores.

    Raises:
        CategoryError: if the map holds the scores of some classes only, or more than 65,535.
        ImageError: if no cell has data.
    """

    def __init__(self, store: ScoreStore):
        super().__init__(store)
        with store.reading():
            self.cells = self._placed(_labels(store), -1)  # (h, w)
        if (self.cells < 0).all():
            raise ImageError(f"no cell of {store.path} has a class, so there is nothing to show")
        self.count = max(self.classes, int(self.cells.max()) + 1)
        self.categories = store.description["categories"]
        present = np.unique(self.cells[self.cells >= 0]).tolist()
        names = (f"{i} {class_name(i, self.categories)}" for i in present[:_NAMED])
        self.label = "classes: " + ", ".join(names)
        kind = np.uint8 if self.count < 256 else np.uint16
        self._none = np.iinfo(kind).max
        if self.count > self._none:
            raise CategoryError(f"{self.path} must have at most 65535 classes, got {self.count}")
        colours = np.zeros((self._none + 1, 3), np.uint16)
        colours[: self.count] = class_colours(self.count)
        self._tiff = {  # type: ignore[misc]
            "dtype": kind,
            "photometric": "palette",
            "colormap": colours.T * np.uint16(257),
        }
        text = str(self._none)
        self._tags = ((_NODATA, 2, len(text) + 1, text, True),)  # type: ignore[misc]

    def shares(self) -> list[tuple[str, float]]:
        """The classes that are there, with their shares of the cells, the most frequent first."""
        counts = np.bincount(self.cells[self.cells >= 0])
        order = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
        return [(class_name(i, self.categories), counts[i] / counts.sum()) for i in order]

    def plot(
        self,
        source: StripSource | None = None,
        ax: Axes | None = None,
        most: int = 6,
        make: Any = None,
    ) -> Axes:
        """Draw every cell in the colour of its class on a thumbnail of the image, with a legend.

        Args:
            source: the image.
            ax: where to draw; a new figure when None.
            most: as for `ScoreMap.plot_labels`.
            make: the class or function of a new figure; pyplot's when None.

        Raises:
            ImageError: if the image has another size than the streamed one.
        """
        source = self.checked(source)
        size = self.thumbnail_size(THUMBNAIL)
        picture = None if source is None else thumbnail(source, size)
        extent = edges_of_cells(self.geometry, self.cells.shape, self.image_size, self.image_size)
        known = int((self.cells >= 0).sum())
        shown = CellLabels(
            self.cells, extent, self.image_size, self.count, known, self.categories, picture
        )
        return label_figure(shown, ax, most, make)

    def _pixels(self, points: NDArray[Any], columns: NDArray[Any], size: Pair) -> NDArray[Any]:
        """The class of the cell whose square a pixel lies in; beyond the cells there is none."""
        places = [
            np.floor((at - axis.centre_of(0)) / axis.stride + 0.5).astype(int)
            for axis, at in zip(self.geometry.axes, (points, columns))
        ]
        rows, cols = (at.clip(0, n - 1) for at, n in zip(places, self.cells.shape))
        inside = [at == near for at, near in zip(places, (rows, cols))]
        labels = self.cells[rows[:, None], cols]
        known = inside[0][:, None] & inside[1] & (labels >= 0)
        return np.where(known, labels, self._none).astype(self._tiff["dtype"])


def _labels(store: ScoreStore) -> NDArray[np.int64]:
    """The most probable class of every cell ``(h, w)``; -1 where there is none."""
    description, kind = store.description, store.description["kind"]
    if kind == "scores" and not description["all_classes"]:
        raise CategoryError(
            f"{store.path} must hold the scores of all classes, their labels or the five best to "
            "show the best class, got some classes; stream with classes='argmax'"
        )
    bands = []
    for rows in row_ranges(store):
        if kind == "argmax":
            bands.append(store.array[rows])
        elif kind == "top5":
            bands.append(np.nan_to_num(store.array[0, 0, rows], nan=-1).astype(np.int64))
        else:
            scores = torch.from_numpy(store.array[:, rows])  # (K, rows, w)
            bands.append(labels_of(scores, description["activation"]).numpy())
    labels = np.concatenate(bands)
    if labels.min(initial=0) < -1 or labels.max(initial=0) > _MOST_CLASSES:
        raise ValueError(f"class indices must be from -1 to {_MOST_CLASSES}")
    return labels


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
            one = description.get("num_classes", 1) == 1  # whose -1 says that it is not the class
            unknown = 0 if one else np.nan
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
