"""Figures made of a score map; matplotlib is imported where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcvgg.categories import class_name
from fcvgg.errors import ImageError
from fcvgg.files import FIGURE_ENDINGS, checked_file, written_whole
from fcvgg.geometry import Pair
from fcvgg.heatmap import DRAWN, Heatmap, colour_bar, resized
from fcvgg.score_map import ScoreMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL_COLOUR_MAP = "viridis"
"""Another map than the heatmap's, since scores and probabilities are other quantities."""

_PANEL, _BARS, _TITLE = 4.0, 1.9, 0.35
"""Inches: a panel's width, both colour bars' width with their labels, the titles' height."""

_FADED = 0.35


def side_by_side(score_map: ScoreMap, target: int | str | None = None) -> Figure:
    """The image, one class's scores cell by cell, and its heatmap, in three panels.

    Args:
        score_map: of an image that is known (`ScoreMap.image`).
        target: a class index or category name; None for the top class of the average.

    Raises:
        ImageError: if the score map was made from a tensor, so that there is no image to show.
    """
    from matplotlib.figure import Figure

    image = score_map.image
    if image is None:
        raise ImageError(
            "the score map was made from a tensor and has no image to show; "
            "make it from a path, a PIL image or a uint8 array"
        )
    index = score_map.index_of(target)
    height, width = score_map.image_size
    figure = Figure(
        figsize=(3 * _PANEL + _BARS, _PANEL * height / width + _TITLE),
        dpi=110,
        layout="constrained",
    )
    photograph, cells, heatmap = figure.subplots(1, 3)
    show_image(photograph, score_map, "RGB")
    photograph.set_title(f"photograph: {image.height} x {image.width} pixels")
    _plot_cells(cells, score_map, index)
    draw_heatmap(heatmap, score_map, index, contours=())
    colour_bar(figure, heatmap)
    name = class_name(index, score_map.categories)
    heatmap.set_title(f"heatmap: probability of {name!r}")
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure, whole or not at all, in the format that the name ends in.

    Raises:
        ArgumentError: if the name ends in none of `fcvgg.files.FIGURE_ENDINGS`.
        FcvggError: if the file cannot be written.
    """
    path = checked_file(path, "path", FIGURE_ENDINGS)
    with written_whole(path) as temporary:
        figure.savefig(temporary)
    return path


def draw_heatmap(
    ax: Axes, score_map: ScoreMap, index: int, side: int = DRAWN, **options: Any
) -> Heatmap:
    """Draw a class's heatmap as `Heatmap.draw` does, computed no larger than it is drawn.

    Args:
        ax: where to draw; it counts the image's pixels.
        score_map: of one image.
        index: of the class.
        side: pixels of the longer side at most.
        options: of `Heatmap.draw`.
    """
    height, width = score_map.image_size
    heatmap = score_map.heatmap(index, size=_drawn_size(score_map.image_size, side))
    down, across = heatmap.values.shape
    heatmap.draw(ax, (height / down, width / across), **options)
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    return heatmap


def show_image(ax: Axes, score_map: ScoreMap, mode: str, side: int = DRAWN, **options: Any) -> None:
    """Draw a score map's image, in colours (``"RGB"``) or grey (``"L"``), as `draw_heatmap`."""
    if score_map.image is None:
        return
    height, width = score_map.image_size
    picture = resized(score_map.image, _drawn_size(score_map.image_size, side)).convert(mode)
    ax.imshow(picture, extent=(-0.5, width - 0.5, height - 0.5, -0.5), **options)
    ax.set_axis_off()


def _drawn_size(size: Pair, side: int) -> Pair:
    """The size at which an image of this one is drawn."""
    factor = max(max(size) / side, 1.0)
    height, width = (max(round(n / factor), 1) for n in size)
    return height, width


def _plot_cells(ax: Axes, score_map: ScoreMap, index: int) -> None:
    """Every cell as a square of one stride around its centre; there is no cell in the margin."""
    show_image(ax, score_map, "L", cmap="gray", alpha=_FADED)
    shown = ax.imshow(
        score_map.scores[index].float().cpu().numpy(),
        cmap=CELL_COLOUR_MAP,
        interpolation="nearest",
        extent=extent_of_cells(score_map),
    )
    height, width = score_map.image_size
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(height - 0.5, -0.5)
    rows, cols = score_map.scores.shape[1:]
    resized = score_map.input_size != score_map.image_size
    seen = f" at {score_map.input_size[0]} x {score_map.input_size[1]} pixels" if resized else ""
    ax.set_title(f"score map: {rows} x {cols} cells{seen}")
    ax.set_axis_off()
    bar = ax.figure.colorbar(shown, ax=ax, fraction=0.046, pad=0.03)
    bar.set_label(f"score of {class_name(index, score_map.categories)!r}")


def extent_of_cells(score_map: ScoreMap) -> tuple[float, float, float, float]:
    """Left, right, bottom and top edge of all cells, in pixels of the image."""
    edges = []
    for axis, cells, pixels, size in zip(
        score_map.geometry.axes,
        score_map.scores.shape[1:],
        score_map.input_size,
        score_map.image_size,
    ):
        scale = size / pixels
        first = axis.centre_of(0) - axis.stride / 2 + 0.5
        edges.append((first * scale - 0.5, (first + cells * axis.stride) * scale - 0.5))
    (top, bottom), (left, right) = edges
    return left, right, bottom, top
