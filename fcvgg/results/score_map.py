"""`ScoreMap`: the scores of one image, cell by cell; one heatmap of several scales."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fcvgg.categories import class_index, class_name
from fcvgg.choices import Average, Combine, PolygonKind
from fcvgg.errors import ArgumentError, FcvggWarning, ImageError, check_choice
from fcvgg.geometry import Geometry, Pair, checked_size
from fcvgg.images.lazy.georeference import (
    Georeference,
    Transform,
    composed,
    scaling,
    transform_of_cells,
)
from fcvgg.probability import (
    average_of_cells,
    average_over_space,
    cells_with_data,
    chance_level,
    require_classes,
    to_probabilities,
    upcast,
)
from fcvgg.results.boxes import CellWindows, cell_windows
from fcvgg.results.drawing import resized
from fcvgg.results.geojson import ClassCells
from fcvgg.results.geotiff import ENDINGS as GEOTIFF_ENDINGS
from fcvgg.results.geotiff import save_cells
from fcvgg.results.heatmap import Heatmap
from fcvgg.results.interpolation import check_pixels, interpolated, pixel_points, shown, within
from fcvgg.support.atomic import PAGE_ENDINGS, atomic_file, checked_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    from fcvgg.results.web_page import Page


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """Raw class scores ``(K, h, w)`` of one image.

    A cell that sees a pixel without data (not finite) has NaN scores. It counts in no average, has
    no label, and no pixel of a heatmap whose interpolation involves it has a value.

    Attributes:
        scores: the network's output, whatever the source's activation made of it.
        geometry: where the cells lie, in pixels of the network's input.
        image_size: ``(H, W)`` of the image, in whose pixels results are given.
        input_size: ``(H, W)`` of the network's input: the image's, unless preprocessing resized it.
        categories: the class names, or None.
        activation: what the scores are.
        image: the image itself, to lay results on; None for a tensor.
        full_size: ``(H, W)`` of level 0 of the slide of which the image is a level; None for the
            image's own.
        georeference: where the image's pixels lie on the earth, if it is known.
        could_have_positions: whether ``head="position"`` would give the network a map of positions
            where this one has a cell for each window.
    """

    scores: Tensor
    geometry: Geometry
    image_size: Pair
    input_size: Pair
    categories: tuple[str, ...] | None = None
    activation: str = "logits"
    image: Image.Image | None = None
    full_size: Pair | None = None
    georeference: Georeference | None = None
    could_have_positions: bool = False

    def __repr__(self) -> str:
        classes, height, width = self.scores.shape
        return (
            f"ScoreMap({classes} classes, {height}x{width} cells on {self.image_size[0]}x"
            f"{self.image_size[1]} pixels, {self.activation})"
        )

    @property
    def is_flat(self) -> bool:
        """Whether there is one cell, so that heatmaps show nothing, where positions would show."""
        return self.could_have_positions and self.scores[0].numel() == 1

    @property
    def has_data(self) -> Tensor:
        """The cells, bool ``(h, w)``, whose scores say something: none NaN or plus infinity."""
        return cells_with_data(self.scores)

    @property
    def chance(self) -> float:
        """The probability of a class that says nothing: ``1 / K``, or one half of a sigmoid."""
        return chance_level(len(self.scores), self.activation)

    def average(self) -> Tensor:
        """The raw scores averaged over the cells with data, ``(K,)``; NaN where there is none."""
        return average_of_cells(self.scores)

    def probabilities(self) -> Tensor:
        """The class probabilities of every cell, ``(K, h, w)``; NaN where it has no data."""
        probabilities = to_probabilities(self.scores, self.activation)
        return probabilities.masked_fill(~self.has_data, torch.nan)

    def predict(self, average: Average = "scores") -> Tensor:
        """The class probabilities of the image, ``(K,)``, averaged as `average` says.

        The average is over the cells with data; NaN where there is none.
        """
        return average_over_space(self.scores, self.activation, average)

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k most probable classes of the averaged prediction, with their probabilities.

        Raises:
            ImageError: if no cell has data.
        """
        self.require_data()
        values, indices = self.predict().topk(min(k, len(self.scores)))
        return [
            (class_name(i, self.categories), p) for i, p in zip(indices.tolist(), values.tolist())
        ]

    def label_map(self) -> Tensor:
        """The most probable class of every cell, int64 ``(h, w)``; -1 where it has no data.

        For a network of one class: 0 where its probability is above one half, else -1.
        """
        if len(self.scores) == 1:
            return _labels_of_one(
                self.probabilities()
            )  # among all classes, if it is one of several
        return labels_of(self.scores, self.activation)

    def resample(self, size: Iterable[int] | int | None = None) -> Tensor:
        """The scores at every pixel, ``(K, H, W)``, interpolated between the cells' centres.

        Outside the centres the nearest cell's score is held. A pixel that depends on a cell
        without data is NaN.

        Args:
            size: pixels to cover the image with; the image's own when None.

        Raises:
            ArgumentError: if that is more than memory is meant for; the limit is named.
        """
        size = checked_size(self.image_size if size is None else size)
        check_pixels(
            size,
            "pass a smaller one to resample, or look at one class with heatmap(target, size=)",
            len(self.scores),
        )
        # a cell without data may hold infinities in some classes; NaN in all spreads alike
        scores = self.scores.masked_fill(~self.has_data, torch.nan)
        return interpolated(upcast(scores), self.geometry, self._points(size)).to(scores.dtype)

    def heatmap(
        self, target: int | str | None = None, *, size: Iterable[int] | int | None = None
    ) -> Heatmap:
        """One class's probability at every pixel.

        Args:
            target: a class index or category name; None for the top class of the average.
            size: pixels to cover the image with; the image's own when None. The heatmap then speaks
                about an image resized to it. Of a reduced one, pixels that cover several cells show
                the highest.

        Raises:
            ArgumentError: if the size is more than memory is meant for; the limit is named.
            ImageError: if no cell has data.
        """
        reduced = size is not None and checked_size(size) != self.image_size
        size = self.image_size if size is None else checked_size(size)
        check_pixels(
            size,
            "pass a smaller one to score_map.heatmap(target, size=(h, w)), or stream to disk with "
            "out= and use ScoreStore.heatmap",
        )
        if self.is_flat:
            warn_of_one_cell()
        index = self.index_of(target)
        cells = self.probabilities()[index].clamp(0, 1).float().cpu()  # (h, w)
        points = self._points(size)
        if reduced:
            extents = [pixels / n for pixels, n in zip(self.input_size, size)]
            values = shown(cells, self.geometry, points, extents)
        else:
            values = interpolated(cells, self.geometry, points)
        rows, cols = (
            within(axis, at, n) for axis, at, n in zip(self.geometry.axes, points, cells.shape)
        )
        return Heatmap(
            values=values.clamp_(0, 1).numpy(),
            coverage=(values.isnan().logical_not_() & rows[:, None] & cols).numpy(),
            label=class_name(index, self.categories),
            image=self.image if self.image is None else resized(self.image, size),
            windows=cell_windows(self.geometry, cells.double().numpy(), self.input_size, size),
            chance=self.chance,
        )

    def index_of(self, target: int | str | None) -> int:
        """The index of a class, given by index or name; of the top class of the average if None.

        Raises:
            CategoryError: if there is no such class.
            ImageError: if no cell has data.
        """
        self.require_data()
        if target is not None:
            return class_index(target, self.categories, len(self.scores))
        return int(self.predict().argmax())

    def require_data(self) -> None:
        """Refuse a map that says nothing.

        Raises:
            ImageError: if no cell has data.
        """
        if not self.has_data.any():
            raise ImageError(
                "the score map must have a cell with data, got none: each sees pixels that are not "
                "finite or nodata; use a part of the image with more data, or smaller windows"
            )

    def plot(self, k: int = 5, **options: Any) -> Figure:
        """The k most probable classes as aligned heatmaps, with one absolute colour scale.

        Of a regression (activation ``"values"``), the first k values of every cell, without
        options. See `fcvgg.results.figures.class_grid` for the options;
        `fcvgg.results.figures.save_figure` writes it.
        """
        from fcvgg.results.figures import class_grid, value_grid

        if self.activation == "values":
            return value_grid(self, range(min(k, len(self.scores))), **options)
        return class_grid(self, k, **options)

    def plot_labels(self, ax: Axes | None = None, most: int = 6) -> Axes:
        """Every cell in the colour of its most probable class, with a legend.

        The `most` frequent classes have colours of their own, the others share grey.
        """
        from fcvgg.results.figures import CellLabels, label_figure

        return label_figure(CellLabels.of(self), ax, most)

    def save(
        self, path: str | os.PathLike[str], classes: Iterable[int | str] | None = None
    ) -> Path:
        """Write a page on which the map is explored in a browser: one HTML file, without a network.

        It holds the image and every cell's probabilities and boxes, and loads nothing. The map of a
        georeferenced image may be a cloud-optimised GeoTIFF instead, whose pixels are the cells and
        whose bands are the scores of classes (``fcvgg[geo]``).

        Args:
            path: a name in ``.html``, or ``.tif``.
            classes: indices or names of the classes it holds; as many of the most probable as keep
                the file below 1 MB when None (all 1000 of ImageNet at 16x16 cells).

        Raises:
            ArgumentError: if the name ends otherwise, or the classes do not fit.
            ImageError: if no cell has data, or a GeoTIFF's image is not georeferenced.
            FcvggError: if the file cannot be written.
        """
        from fcvgg.results.web_page import page_of

        path = checked_file(path, "path", (*PAGE_ENDINGS, *GEOTIFF_ENDINGS))
        if path.suffix.lower() in GEOTIFF_ENDINGS:
            return self._save_geotiff(path, classes)
        text = page_of(self, classes)
        with atomic_file(path) as temporary:
            temporary.write_text(text, "utf-8")
        return path

    def _save_geotiff(self, path: Path, classes: Iterable[int | str] | None) -> Path:
        chosen = range(len(self.scores)) if classes is None else map(self.index_of, classes)
        indices = list(chosen)
        scores = upcast(self.scores[indices]).cpu().numpy()  # (classes, h, w)
        names = [class_name(index, self.categories) for index in indices]
        place = self._cells_on_earth, self._crs
        return save_cells(path, [scores], scores.shape, scores.dtype, names, *place)

    @property
    def _crs(self) -> str | None:
        return None if self.georeference is None else self.georeference.crs

    @property
    def _cells_on_image(self) -> Transform:
        on_input = transform_of_cells(self.geometry)
        return composed(scaling(self.input_size, self.image_size), on_input)

    @property
    def _cells_on_earth(self) -> Transform | None:
        place = self.georeference
        if place is None or place.transform is None:
            return None
        return composed(place.transform, self._cells_on_image)

    def to_geojson(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        target: int | str | None = None,
        threshold: float = 0.5,
        kind: PolygonKind = "regions",
        pixels: bool = False,
    ) -> dict[str, Any]:
        """Where a class is probable, as polygons for QuPath and geographic systems.

        A cell is the box of the network's stride around its centre. Coordinates are those of a
        georeferenced image, whose system the member ``crs`` names; else pixels of the image, of a
        slide those of level 0, counted from the outer corner of the first one, as QuPath does.

        Args:
            path: a file to write, in ``.geojson`` or ``.json``; None writes none.
            target: a class index or category name; None for the top class of the average.
            threshold: probability, in [0, 1], that the cells have at least.
            kind: ``"regions"`` of cells that are connected by their edges, with holes, or
                ``"cells"``, a polygon each.
            pixels: take pixels for a georeferenced image too.

        Returns:
            the FeatureCollection: annotations (or tiles) with the class, its colour and the
            probability, of regions the mean and the highest.

        Raises:
            ArgumentError: if the name ends otherwise, or an option cannot be used.
            ImageError: if no cell has data.
            FcvggError: if the file cannot be written.
        """
        index = self.index_of(target)
        to_level_0 = scaling(self.image_size, self.full_size or self.image_size)
        return ClassCells(
            self.probabilities()[index].double().cpu().numpy(),
            class_name(index, self.categories),
            index,
            composed(to_level_0, self._cells_on_image),
            self._cells_on_earth,
            self._crs,
        ).to_geojson(path, threshold, kind, pixels)

    def show(self, classes: Iterable[int | str] | None = None, height: int = 720) -> Page:
        """The page of `save` in a notebook.

        Args:
            classes: as for `save`.
            height: of the frame, in pixels of the screen.
        """
        from fcvgg.results.web_page import Page, page_of

        return Page(page_of(self, classes), height)

    def _points(self, size: Pair) -> tuple[Tensor, Tensor]:
        """The pixels of a picture of the image, in pixels of the network's input."""
        rows, cols = (pixel_points(n, pixels) for n, pixels in zip(size, self.input_size))
        return rows, cols


ONE_CELL = (
    "the score map has one cell, the whole window, so its heatmap shows one value everywhere; "
    "head='position' of fcvgg.convert and fcvgg.load (--head position) gives a map of positions"
)


@cache
def warn_of_one_cell() -> None:
    """Warn once in a process: what holds for one image holds for all of its size."""
    warnings.warn(ONE_CELL, FcvggWarning, stacklevel=3)


def labels_of(scores: Tensor, activation: str) -> Tensor:
    """The most probable class of every cell of ``(K, h, w)``, as `ScoreMap.label_map`."""
    if len(scores) > 1:
        require_classes(activation)
        return best_classes(scores)
    return _labels_of_one(to_probabilities(scores, activation))


def _labels_of_one(probabilities: Tensor) -> Tensor:
    """0 where the only class ``(1, h, w)`` is more probable than not, else -1."""
    return (probabilities[0] > 0.5).long() - 1


def best_classes(scores: Tensor) -> Tensor:
    """The class with the highest score in every cell of ``(K, h, w)``; -1 where it has no data."""
    return scores.argmax(0).masked_fill(~cells_with_data(scores), -1)


# -- several scales -------------------------------------------------------------------------------
# Objects larger or smaller than the window show up at the scale at which they fit it.

COMBINATIONS = ("max", "mean")


def pyramid_heatmap(
    maps: Sequence[ScoreMap],
    target: int | str | None = None,
    combine: Combine = "max",
) -> Heatmap:
    """One class's probability at every pixel, from several scales.

    At every pixel the values of all scales are combined, those too that a scale holds beyond its
    outermost cells: the result is as continuous as the scales are, and the maximum is nowhere below
    one of them. A scale without data at a pixel does not count there.

    Args:
        maps: of one image, with its size as ``image_size``.
        target: a class index or category name; None for the top class of the mean prediction.
        combine: ``"max"`` or ``"mean"``.

    Raises:
        ArgumentError: if `combine` is neither, or there are no maps.
        ImageError: if no cell of any map has data.
    """
    check_choice("combine", combine, COMBINATIONS)
    if not maps:
        raise ArgumentError("scales must be one or more smaller sides in pixels, got none")
    useful = [one for one in maps if one.has_data.any()]
    if not useful:
        maps[0].require_data()
    if target is None:
        index = int(torch.stack([one.predict() for one in useful]).mean(0).argmax())
    else:
        index = class_index(target, maps[0].categories, len(maps[0].scores))
    if not all(one.is_flat for one in useful):
        useful = [replace(one, could_have_positions=False) for one in useful]
    # one scale at a time in place, so that no more than two heatmaps are held
    first, *others = useful
    heatmap = first.heatmap(index)
    values, coverage, windows = heatmap.values, heatmap.coverage, [heatmap.windows]
    counts = (~np.isnan(values)).astype(np.uint8)
    if combine == "mean":
        np.nan_to_num(values, copy=False)
    for one in others:
        further = one.heatmap(index)
        known = ~np.isnan(further.values)
        if combine == "max":
            np.fmax(values, further.values, out=values)
        else:
            np.add(values, further.values, out=values, where=known)
            counts += known
        coverage |= further.coverage
        windows.append(further.windows)
    if combine == "mean":
        values = np.where(counts, values / np.maximum(counts, 1), np.nan).astype(np.float32)
    return replace(
        heatmap,
        values=values,
        coverage=coverage,
        windows=CellWindows.joined(w for w in windows if w is not None),
    )
