"""`ScoreMap`: the scores of one image, cell by cell, and where the cells lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fcvgg.boxes import cell_windows
from fcvgg.categories import class_index, class_name
from fcvgg.geometry import Axis, Geometry, Pair, checked_size
from fcvgg.heatmap import Heatmap
from fcvgg.probability import average_over_space, require_classes, to_probabilities, widened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image


_ROUNDING = 1e-9
"""In cells; a centre that lies on a pixel must count as inside."""


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """Raw class scores ``(K, h, w)`` of one image.

    Attributes:
        scores: the network's output, whatever the source's activation made of it.
        geometry: where the cells lie, in pixels of the network's input.
        image_size: ``(H, W)`` of the image, in whose pixels results are given.
        input_size: ``(H, W)`` of the network's input: the image's, unless preprocessing resized it.
        categories: the class names, or None.
        activation: what the scores are.
        image: the image itself, to lay results on; None for a tensor.
    """

    scores: Tensor
    geometry: Geometry
    image_size: Pair
    input_size: Pair
    categories: tuple[str, ...] | None = None
    activation: str = "logits"
    image: Image.Image | None = None

    def __repr__(self) -> str:
        classes, height, width = self.scores.shape
        return (
            f"ScoreMap({classes} classes, {height}x{width} cells on {self.image_size[0]}x"
            f"{self.image_size[1]} pixels, {self.activation})"
        )

    def average(self) -> Tensor:
        """The raw scores averaged over the cells, ``(K,)``."""
        return self.scores.mean((1, 2))

    def probabilities(self) -> Tensor:
        """The class probabilities of every cell, ``(K, h, w)``."""
        return to_probabilities(self.scores, self.activation)

    def predict(self, average: str = "scores") -> Tensor:
        """The class probabilities of the image, ``(K,)``, averaged as `average` says."""
        return average_over_space(self.scores, self.activation, average)

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k most probable classes of the averaged prediction, with their probabilities."""
        values, indices = self.predict().topk(min(k, len(self.scores)))
        return [
            (class_name(i, self.categories), p) for i, p in zip(indices.tolist(), values.tolist())
        ]

    def label_map(self) -> Tensor:
        """The most probable class of every cell, int64 ``(h, w)``.

        For a network of one class: 0 where its probability is above one half, else -1.
        """
        if len(self.scores) == 1:
            return (self.probabilities()[0] > 0.5).long() - 1
        require_classes(self.activation)
        return self.scores.argmax(0)

    def resample(self, size: Iterable[int] | int | None = None) -> Tensor:
        """The scores at every pixel, ``(K, H, W)``, interpolated between the cells' centres.

        Outside the centres the nearest cell's score is held.

        Args:
            size: pixels to cover the image with; the image's own when None.
        """
        return self._at_pixels(self.scores, checked_size(self.image_size if size is None else size))

    def heatmap(self, target: int | str | None = None) -> Heatmap:
        """One class's probability at every pixel.

        Args:
            target: a class index or category name; None for the top class of the average.
        """
        index = (
            class_index(target, self.categories, len(self.scores)) if target is not None else None
        )
        index = int(self.predict().argmax()) if index is None else index
        cells = self.probabilities()[index : index + 1].clamp(0, 1)  # (1, h, w)
        values = self._at_pixels(cells, self.image_size)[0]
        rows, cols = (
            _coverage(axis, cells, pixels, size)
            for axis, cells, pixels, size in zip(
                self.geometry.axes, self.scores.shape[1:], self.input_size, self.image_size
            )
        )
        return Heatmap(
            values=values.clamp(0, 1).float().cpu().numpy(),
            coverage=(rows[:, None] & cols[None, :]).numpy(),
            label=class_name(index, self.categories),
            image=self.image,
            windows=cell_windows(
                self.geometry, cells[0].double().cpu().numpy(), self.input_size, self.image_size
            ),
        )

    def plot(self, k: int = 5, **options: Any) -> Figure:
        """The k most probable classes as aligned heatmaps, with one absolute colour scale.

        See `fcvgg.class_figures.class_grid` for the options; `fcvgg.figures.save_figure` writes it.
        """
        from fcvgg.class_figures import class_grid

        return class_grid(self, k, **options)

    def plot_labels(self, ax: Axes | None = None, most: int = 6) -> Axes:
        """Every cell in the colour of its most probable class, with a legend.

        The `most` frequent classes have colours of their own, the others share grey.
        """
        from fcvgg.class_figures import label_figure

        return label_figure(self, ax, most)

    def _at_pixels(self, maps: Tensor, size: Pair) -> Tensor:
        wide = widened(maps)
        rows, cols = (
            _interpolation(axis, cells, pixels, n).to(wide)
            for axis, cells, pixels, n in zip(
                self.geometry.axes, maps.shape[1:], self.input_size, size
            )
        )
        return (rows @ wide @ cols.T).to(maps.dtype)  # (H, h) @ (K, h, w) @ (w, W)


def _cell_coordinates(axis: Axis, input_size: int, size: int) -> Tensor:
    """Where the middles of `size` pixels over the input lie, counted in cells."""
    pixels = (torch.arange(size, dtype=torch.float64) + 0.5) * (input_size / size) - 0.5
    return (pixels - axis.centre_of(0)) / axis.stride


def _interpolation(axis: Axis, cells: int, input_size: int, size: int) -> Tensor:
    """Linear interpolation from cells to pixels as a matrix ``(size, cells)``."""
    place = _cell_coordinates(axis, input_size, size).clamp(0, cells - 1)
    distance = (place[:, None] - torch.arange(cells)).abs()
    return (1 - distance).clamp(min=0)


def _coverage(axis: Axis, cells: int, input_size: int, size: int) -> Tensor:
    """Which pixels lie between the first and the last centre; the nearest one if none does."""
    place = _cell_coordinates(axis, input_size, size)
    inside = (place >= -_ROUNDING) & (place <= cells - 1 + _ROUNDING)
    if not inside.any():
        middle = (place - (cells - 1) / 2).abs()
        inside = middle <= middle.min() + _ROUNDING
    return inside
