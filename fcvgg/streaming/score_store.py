"""Score maps on disk: an OME-Zarr image that is filled row by row and can be resumed.

The group's attributes hold, under ``"fcvgg"``, what the map is: its geometry, class names and the
plan by which it is computed; and under ``"ome"`` where its cells lie, for viewers. A small file
next to the group's metadata holds which rows are finished. It is replaced atomically, so that a
killed process loses no finished row. Older stores are an array with the first of the attributes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcvgg.categories import class_name
from fcvgg.choices import PolygonKind
from fcvgg.errors import FcvggError, one_line
from fcvgg.geometry import Pair
from fcvgg.images.lazy.georeference import FIELDS
from fcvgg.images.lazy.opening import strip_source
from fcvgg.results.geojson import ClassCells
from fcvgg.results.geotiff import save_cells
from fcvgg.streaming.ome_image import cells_on_slide, ome_axes, ome_image
from fcvgg.streaming.store_description import check_held, checked_description, checked_progress
from fcvgg.support import untrusted
from fcvgg.support.atomic import atomic_file, atomic_folder
from fcvgg.support.extras import imported

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fcvgg.results.heatmap import Heatmap

ATTRIBUTE = "fcvgg"
_METADATA = "zarr.json"
_PROGRESS = "fcvgg-progress.json"
_SCORES, _NORMALIZER = "0", "normalizer"
_MAY_DIFFER = (
    *("blocks", "strip_bytes", "source", "pixel_size", "num_classes", "full_size", *FIELDS),
)
"""Fields that a resumed stream may change, and those that older stores lack."""

_CHECKSUMS = {
    "where": "where= or fill=",
    "network": "network",
    "weights": "weights",
    "image": "image, or the preprocessing or range of its values,",
}
"""Fields that show only that something differs, with their names in messages."""

_LONGEST_VALUE = 60
"""Characters of a value that a message shows."""

_OVERVIEWS = {"scores": "AVERAGE", "argmax": "MODE", "top5": "NEAREST"}
"""How GDAL reduces what a map holds."""

_CHUNK_CHANNELS = 64
_CHUNK_COLS = 512
_DISK_BLOCK = 4096


class ScoreStore:
    """A score map on disk, ``(..., h, w)``, whose rows are written in whole chunks.

    Attributes:
        array: the zarr array: scores, or what ``classes=`` keeps of them.
        normalizer: for logits of some classes, the log-sum-exp ``(h, w)`` over all classes, in the
            folder of the first array; None for other maps, and those of older versions.
        description: what the map is, from the attributes.
        finished: for every block of columns, how many of its rows are finished.
    """

    def __init__(
        self, path: Path, array: Any, description: Mapping[str, Any], normalizer: Any = None
    ):
        self.path = path
        self.array = array
        self.normalizer = normalizer
        self.description = description
        self.blocks: list[Pair] = [(a, b) for a, b in description["blocks"]]
        self.finished = self._read_progress()

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        shape = "x".join(map(str, self.array.shape))
        return f"ScoreStore({str(self.path)!r}: {shape} {self.description['kind']}{state})"

    def heatmap(self, target: int | str | None = None, *, image: Any = None) -> Heatmap:
        """A class's probability on a thumbnail of the image, as ``fcvgg heatmap`` shows it.

        Args:
            target: a class index or category name; None for the class with the highest average
                score, or the only one.
            image: what was streamed, to show the heatmap on, such as an open slide or what
                `fcvgg.open_image` gave; None for its file, if that is still there.

        Raises:
            CategoryError: if the class is unknown or its probability cannot be known from the map.
            ImageError: if no cell has data, or the image has another size.
        """
        from fcvgg.streaming.slide_maps import SlideMap

        shown = SlideMap(self, target)
        return shown.heatmap(shown.source() if image is None else strip_source(image))

    def plot_labels(self, ax: Axes | None = None, most: int = 6) -> Axes:
        """Every cell in the colour of its most probable class, on a thumbnail, with a legend.

        The `most` frequent classes have colours of their own, the others share grey.

        Raises:
            CategoryError: if the map holds the scores of some classes only.
            ImageError: if no cell has a class.
        """
        from fcvgg.streaming.slide_maps import SlideLabels

        shown = SlideLabels(self)
        return shown.plot(shown.source(), ax, most)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the map of a georeferenced image as a cloud-optimised GeoTIFF (``fcvgg[geo]``).

        Its pixels are the cells, with the image's coordinate reference system, and hold what the
        map does: a band of scores for each class, the index of the best class, or the classes and
        scores of the five best. Where there is no data they are NaN, or -1 for a class.

        Args:
            path: a name in ``.tif`` or ``.tiff``.

        Raises:
            ArgumentError: if the name ends otherwise.
            ImageError: if the image was not georeferenced.
            FcvggError: if the map is not finished, or the file cannot be written.
        """
        from fcvgg.streaming.slide_maps import row_ranges

        if not self.complete:
            raise FcvggError(f"{self.path} is not finished; repeat the call that began it")
        kind = self.description["kind"]
        dtype = np.result_type(self.array.dtype, np.float32)  # GDAL's readers know no float16
        if kind == "argmax":  # the narrowest that geographic systems know, of those that hold -1
            few = self.description.get("num_classes", 1 << 24) < 1 << 15
            dtype = np.dtype(np.int16 if few else np.int32)
        names = self._band_names()
        height, width = self.array.shape[-2:]
        place = self.description.get("cell_transform"), self.description.get("crs")

        def parts() -> Iterator[NDArray[Any]]:
            with self.reading():
                for rows in row_ranges(self):
                    yield self.array[..., rows, :].reshape(len(names), -1, width)

        shape = (len(names), height, width)
        return save_cells(path, parts(), shape, dtype, names, *place, _OVERVIEWS[kind])

    def _band_names(self) -> list[str]:
        """What every band of a GeoTIFF holds."""
        kind, names = self.description["kind"], self.description["categories"]
        if kind == "argmax":
            return ["class"]
        if kind == "top5":
            ranks = range(1, self.array.shape[1] + 1)
            return [f"{what} {rank}" for what in ("class", "score") for rank in ranks]
        return names or [class_name(index, None) for index in self.description["classes"]]

    def to_geojson(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        target: int | str | None = None,
        threshold: float = 0.5,
        kind: PolygonKind = "regions",
        pixels: bool = False,
    ) -> dict[str, Any]:
        """As `ScoreMap.to_geojson`; polygons of a map of classes state no probability.

        Raises:
            CategoryError: if the class is unknown or its probability cannot be known from the map.
        """
        from fcvgg.streaming.slide_maps import SlideMap

        place = self.description.get("cell_transform"), self.description.get("crs")
        slide = SlideMap(self, target)
        band = slide.cells[slice(*self.description["rows"])]  # where both transforms begin
        measured = self.description["kind"] != "argmax"
        on_slide = cells_on_slide(self.description)
        cells = ClassCells(band, slide.label, slide.index, on_slide, *place, measured=measured)
        return cells.to_geojson(path, threshold, kind, pixels)

    @property
    def chunk_rows(self) -> int:
        return int(self.array.chunks[-2])

    @property
    def complete(self) -> bool:
        return all(n == self.array.shape[-2] for n in self.finished)

    @property
    def finished_cells(self) -> int:
        """How many cells are finished."""
        return sum(rows * (b - a) for rows, (a, b) in zip(self.finished, self.blocks))

    @property
    def share(self) -> float:
        """The share of the cells that is finished."""
        return self.finished_cells / (self.array.shape[-2] * self.array.shape[-1])

    @property
    def has_data(self) -> NDArray[np.bool_]:
        """Where cells have data, bool ``(h, w)``; unlike a score map's, an array."""
        channel = {"scores": (0,), "top5": (1, 0)}.get(self.description["kind"], ())
        with self.reading():
            cells = self.array[channel] if channel else self.array[:]
        labels = self.description["kind"] == "argmax"
        return cells >= 0 if labels else cells < np.inf

    @property
    def without_data(self) -> float:
        """The share of the cells without data.

        A map of labels of a network with one class counts as full, since -1 is also the label of
        cells that are not of it; so do maps of labels that older versions wrote.

        Raises:
            FcvggError: if chunks cannot be read.
        """
        # one channel tells: a cell without data holds NaN in all of them
        kind, rows = self.description["kind"], self.array.shape[-2]
        if kind == "argmax" and self.description.get("num_classes", 1) == 1:
            return 0.0
        first: tuple[int, ...] = {"scores": (0,), "top5": (1, 0)}.get(kind, ())
        bare = 0
        with self.reading():
            for row in range(0, rows, self.chunk_rows):
                part = (*first, slice(row, row + self.chunk_rows))
                cells = self.array[part]
                bare += int((cells < 0 if kind == "argmax" else ~(cells < np.inf)).sum())
        return bare / (rows * self.array.shape[-1])

    def write(self, block: int, row: int, cells: NDArray[Any], mark: bool = True) -> None:
        """Write rows of one block of columns, and record them as finished if `mark`.

        Raises:
            FcvggError: if writing fails; the rows that were finished before stay.
        """
        first, end = self.blocks[block]
        start = self.blocks[0][0]
        rows, cols = slice(row, row + cells.shape[-2]), slice(first - start, end - start)
        try:
            if self.description["kind"] == "scores":
                count = self.array.shape[0]
                # the channel after the classes goes to an array of its own
                if self.normalizer is not None:
                    self.normalizer[rows, cols] = cells[count]
                cells = cells[:count]  # also drops the normalizer where an older store has none
            self.array[..., rows, cols] = cells  # (..., h, w)
            # recorded only now: a run that is killed in between computes these rows again
            if mark:
                self.mark(block, row + cells.shape[-2])
        except (OSError, FcvggError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise FcvggError(
                f"cannot write {self.path}: {reason}; {self.finished[block]} of "
                f"{self.array.shape[-2]} rows are finished and kept; repeat the call to resume"
            ) from error

    def mark(self, block: int, rows: int) -> None:
        """Record how many rows of a block are finished."""
        finished = [*self.finished[:block], rows, *self.finished[block + 1 :]]
        with atomic_file(self.path / _PROGRESS) as temporary:
            temporary.write_text(json.dumps({"finished": finished}))
        self.finished = finished

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A context in which errors about broken chunks become one line.

        Raises:
            FcvggError: if chunks cannot be read.
        """
        try:
            yield
        except FcvggError:
            raise
        except Exception as error:  # decompressors raise errors without a common class
            raise FcvggError(
                f"{self.path} must hold whole chunks of numbers, got one that cannot be read "
                f"({type(error).__name__}: {one_line(error)}); stream the image again"
            ) from error

    def _read_progress(self) -> list[int]:
        path = self.path / _PROGRESS
        try:
            data = untrusted.parsed_json(untrusted.read_bytes(path, untrusted.CONFIG_BYTES))
            return checked_progress(data, self.blocks, self.array.shape[-2])
        except FileNotFoundError:
            return [0] * len(self.blocks)
        except (FcvggError, OSError, ValueError) as error:
            raise FcvggError(f"{path} is broken: {one_line(error)}") from error


def create_store(
    path: Path,
    shape: tuple[int, ...],
    dtype: str,
    chunk_rows: int,
    description: Mapping[str, Any],
    normalized: bool = False,
) -> ScoreStore:
    """A new store, written atomically with all its attributes.

    Args:
        path: the folder.
        shape: of what is written to it.
        dtype: of the scores.
        chunk_rows: rows of cells that are written at a time.
        description: what the map is.
        normalized: whether the last channel is `ScoreStore.normalizer`.

    Raises:
        FcvggError: if it cannot be written.
    """
    zarr = imported("zarr", "stream")
    if normalized:
        shape = (shape[0] - 1, *shape[1:])
    # blocks of columns are written one after the other: a shard that two of them shared would be
    # read, changed and written again
    block = max(b - a for a, b in description["blocks"])
    several = len(description["blocks"]) > 1
    chunks = (
        *(min(n, _CHUNK_CHANNELS) for n in shape[:-2]),
        min(chunk_rows, shape[-2]),
        _aligned(block) if several else min(shape[-1], _CHUNK_COLS),
    )
    # one file for all that is written at a time, so that a thousand classes are no more files
    written = (*shape[:-2], chunks[-2], block if several else shape[-1])
    shards = tuple(-(-n // chunk) * chunk for n, chunk in zip(written, chunks))
    axes = ome_axes(len(shape), description)
    options: dict[str, Any] = {"dtype": dtype, "dimension_names": [axis["name"] for axis in axes]}
    with atomic_folder(path) as folder:
        attributes = {ATTRIBUTE: dict(description), "ome": ome_image(axes, _SCORES, description)}
        group = zarr.create_group(store=str(folder), attributes=attributes, overwrite=True)
        group.create_array(
            _SCORES,
            shape=shape,
            chunks=chunks,
            shards=shards,
            fill_value=-1 if description["kind"] == "argmax" else np.nan,  # no data yet
            **options,
        )
        if normalized:
            group.create_array(
                _NORMALIZER,
                shape=shape[-2:],
                chunks=chunks[-2:],
                shards=shards[-2:],
                fill_value=np.nan,
                **{**options, "dimension_names": options["dimension_names"][-2:]},
            )
    return open_store(path, writable=True)


def _aligned(block: int) -> int:
    """Columns of a chunk, such that no chunk belongs to two blocks."""
    return max(n for n in range(1, min(block, _CHUNK_COLS) + 1) if block % n == 0)


def open_store(path: str | Path, writable: bool = False) -> ScoreStore:
    """A score map that `fcvgg.stream` wrote, finished or not.

    Raises:
        FcvggError: if it holds something else, or is broken.
    """
    path = Path(path)
    zarr = imported("zarr", "stream")
    mode = "r+" if writable else "r"
    normalizer = None
    try:
        # zarr would read metadata of any size, and follow links out of the folder
        names = [name for name in ("", _SCORES, _NORMALIZER) if (path / name / _METADATA).exists()]
        for name in names:
            untrusted.read_bytes(path / name / _METADATA, untrusted.CONFIG_BYTES, within=path)
        data = dict(zarr.open(str(path), mode=mode).attrs)[ATTRIBUTE]
        array = zarr.open_array(str(path / _SCORES if _SCORES in names else path), mode=mode)
        if _NORMALIZER in names:
            normalizer = zarr.open_array(str(path / _NORMALIZER), mode=mode)
    except Exception as error:
        raise FcvggError(f"{path} must be a score map that fcvgg.stream wrote") from error
    try:
        store = ScoreStore(path, array, checked_description(data, array), normalizer)
        check_held(store.finished_cells, lambda: _bytes_within(path))
    except FcvggError as error:
        raise FcvggError(f"{path} is a broken score map: {one_line(error)}") from error
    if normalizer is not None and normalizer.shape != array.shape[-2:]:
        raise FcvggError(
            f"{path / _NORMALIZER} must have the shape of the cells, {array.shape[-2:]}, got "
            f"{normalizer.shape}"
        )
    return store


def _bytes_within(path: Path) -> int:
    """The bytes that the files of a folder take on disk, at least a block each."""
    return sum(max(file.stat().st_size, _DISK_BLOCK) for file in path.rglob("*") if file.is_file())


def is_store(path: str | Path) -> bool:
    """Whether a path is a score map that `fcvgg.stream` wrote."""
    try:
        data = untrusted.read_bytes(Path(path) / _METADATA, untrusted.CONFIG_BYTES)
        metadata = untrusted.parsed_json(data)
    except (FcvggError, OSError, ValueError):
        return False
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    return isinstance(attributes, dict) and ATTRIBUTE in attributes


def check_same(store: ScoreStore, description: Mapping[str, Any]) -> None:
    """Refuse to continue a map of something else.

    Raises:
        FcvggError: naming the first difference.
    """
    wanted = json.loads(json.dumps(dict(description)))  # tuples as lists, as a file has them
    # checksums last, so that a difference with a name is reported first
    for key, value in sorted(wanted.items(), key=lambda item: item[0] in _CHECKSUMS):
        found = store.description.get(key)
        if key not in _MAY_DIFFER and found != value:
            what = _CHECKSUMS.get(key, key.replace("_", " "))
            texts = ["none" if v is None else json.dumps(v) for v in (found, value)]
            is_short = key not in _CHECKSUMS and max(map(len, texts)) <= _LONGEST_VALUE
            raise FcvggError(
                f"{store.path} exists and holds another score map: its {what} is "
                f"{', not '.join(texts) if is_short else 'different'}; choose another name, or "
                "remove it"
            )
