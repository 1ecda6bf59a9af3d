"""Figures made of a score map; matplotlib is imported where it is used."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcvgg.categories import class_name
from fcvgg.errors import ArgumentError, ImageError
from fcvgg.geometry import Pair
from fcvgg.results.colours import class_colours
from fcvgg.results.drawing import (
    DRAWN,
    draw_legend,
    extent_of,
    frame,
    on_middle_grey,
    reduction,
    resized,
    saved_by_figure,
)
from fcvgg.results.heatmap import Heatmap, OverlayOptions
from fcvgg.support.atomic import FIGURE_ENDINGS, atomic_file, checked_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from typing_extensions import Unpack

    from fcvgg.results.score_map import ScoreMap

CELL_COLOUR_MAP = "viridis"
"""Not the heatmap's, since scores and probabilities are different quantities."""

_PANEL, _BARS, _TITLE = 4.0, 1.9, 0.35
"""Inches: a panel's width, both colour bars' width with their labels, the titles' height."""

_GALLERY = 2.4
"""Inches: the height of a gallery's photographs."""

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
            "the score map must have an image to show, got one made from a tensor; make it from a "
            "path, a PIL image or a uint8 array"
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
    draw_heatmap(heatmap, score_map, index, contours=()).draw_bar(heatmap, ())
    name = class_name(index, score_map.categories)
    heatmap.set_title(f"heatmap: probability of {name!r}")
    return figure


def gallery(score_maps: Sequence[ScoreMap], targets: Sequence[int | str | None]) -> Figure:
    """Photographs in a row, and below each the heatmap of one class, with one colour bar.

    Args:
        score_maps: of one network, of images that are known (`ScoreMap.image`).
        targets: a class index or category name for each; None for the top class of the average.
    """
    from matplotlib.figure import Figure

    widths = [one.image_size[1] / one.image_size[0] for one in score_maps]  # at one height
    figure = Figure(
        figsize=(_GALLERY * sum(widths) + _BARS / 2, 2 * (_GALLERY + _TITLE)),
        dpi=110,
        layout="constrained",
    )
    columns = figure.subplots(2, len(widths), width_ratios=widths, squeeze=False).T
    for (photograph, map_), one, target in zip(columns, score_maps, targets):
        show_image(photograph, one, "RGB")
        heatmap = draw_heatmap(map_, one, one.index_of(target), contours=())
        y, x = heatmap.peak
        map_.set_title(f"{heatmap.label}: {heatmap.values[y, x]:.2f}", parse_math=False)
    heatmap.draw_bar(columns[:, 1], ())
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure, whole or not at all, in the format that the name ends in.

    Raises:
        ArgumentError: if the name ends in none of `fcvgg.support.atomic.FIGURE_ENDINGS`.
        FcvggError: if the file cannot be written.
    """
    path = checked_file(path, "path", FIGURE_ENDINGS)
    with atomic_file(path) as temporary:
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
    frame(ax, score_map.image_size)
    return heatmap


def show_image(ax: Axes, score_map: ScoreMap, mode: str, side: int = DRAWN, **options: Any) -> None:
    """Draw a score map's image, in colours (``"RGB"``) or grey (``"L"``), as `draw_heatmap`."""
    if score_map.image is None:
        return
    size = score_map.image_size
    picture = resized(score_map.image, _drawn_size(size, side)).convert(mode)
    ax.imshow(picture, extent=extent_of(size), **options)
    ax.set_axis_off()


def _drawn_size(size: Pair, side: int) -> Pair:
    """The size at which an image of this one is drawn."""
    factor = max(max(size) / side, 1.0)
    height, width = (max(round(n / factor), 1) for n in size)
    return height, width


def _plot_cells(ax: Axes, score_map: ScoreMap, index: int) -> None:
    """Draw every cell as a square of one stride around its centre; the margin has no cells."""
    show_image(ax, score_map, "L", cmap="gray", alpha=_FADED)
    shown = ax.imshow(
        score_map.scores[index].float().cpu().numpy(),
        cmap=CELL_COLOUR_MAP,
        interpolation="nearest",
        extent=extent_of_cells(score_map),
    )
    frame(ax, score_map.image_size)
    rows, cols = score_map.scores.shape[1:]
    rescaled = score_map.input_size != score_map.image_size
    seen = f" at {score_map.input_size[0]} x {score_map.input_size[1]} pixels" if rescaled else ""
    ax.set_title(f"score map: {rows} x {cols} cells{seen}")
    bar = ax.figure.colorbar(shown, ax=ax, fraction=0.046, pad=0.03)
    kind = "value" if score_map.activation == "values" else "score"
    bar.set_label(f"{kind} of {output_name(score_map, index)!r}")


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
    (top, bottom), (left, right) = edges  # of pixels, not of their middles
    return left, right, bottom, top


# -- the most probable classes side by side, and who wins where -----------------------------------

TOP = 5

MOST_COLOURED = 7
"""Classes that a figure can tell apart by colour."""

_OTHERS = np.full(3, 0.47)
_OPACITY = 0.6
_CLASS_PANEL, _CLASS_TITLE, _CLASS_BAR, _CAPTION = 3.2, 0.8, 0.9, 2.8
"""Inches: a panel's longer side, the titles' height, the colour bar's width, the titles' width."""

_PANEL_PIXELS = 800
"""Of a panel's longer side: twice what it has at the figure's own resolution."""


def class_grid(
    score_map: ScoreMap,
    k: int = TOP,
    *,
    contours: Sequence[float] | None = None,
    **options: Unpack[OverlayOptions],
) -> Figure:
    """The k most probable classes as aligned heatmaps, with one absolute colour scale.

    The first panel shows the photograph, where it is known. Large images are drawn reduced; the
    axes count their pixels.

    Args:
        score_map: of one image.
        k: how many classes; all of them if there are fewer.
        contours: as for `Heatmap.plot`.
        options: of `Heatmap.overlay`.

    Raises:
        ArgumentError: if `k` is not positive.
        ImageError: if no cell has data.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    score_map.require_data()
    if k < 1:
        raise ArgumentError(f"k must be at least 1, got {k}")
    prediction = score_map.predict()
    order = prediction.argsort(descending=True)[:k].tolist()
    photograph = score_map.image is not None
    panels = len(order) + photograph
    columns = min(panels, 3 if panels <= 9 else ceil(panels**0.5))
    rows = ceil(panels / columns)
    width, height = _class_panel(score_map.image_size)
    size = (columns * max(width, _CAPTION) + _CLASS_BAR, rows * (height + _CLASS_TITLE))
    shown = score_map.image_size[1] / max(score_map.image_size) * _CLASS_PANEL
    # uncompressed, the layout takes panels for as high as their slots and cuts titles off; it never
    # counts titles that are wider than their panels, hence the padding
    layout = ConstrainedLayoutEngine(compress=True, w_pad=max((_CAPTION - shown) / 2, 0.04))
    figure = Figure(figsize=size, dpi=110, layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False)
    unused = _after_photograph(axes, score_map)
    # independent classes do not compete for a cell, so their cells are counted one by one
    compared = score_map.activation not in ("independent_logits", "sigmoid")
    found_at = score_map.label_map() if compared else score_map.probabilities() > 0.5
    known = score_map.has_data.sum()
    for index, ax in zip(order, unused):
        heatmap = draw_heatmap(ax, score_map, index, _PANEL_PIXELS, contours=contours, **options)
        cells = found_at == index if compared else found_at[index]
        share = f"{float(cells.sum() / known):.0%} of cells"
        share = f"top class of {share}" if compared else f"above 50% in {share}"
        peak = heatmap.values[heatmap.peak] if heatmap.coverage.any() else None
        found = "no peak" if peak is None else f"peak {_percent(peak)} (○)"
        ax.set_title(
            f"{heatmap.label}\n{found}, whole image {_percent(prediction[index])}\n{share}",
            fontsize="medium",
            parse_math=False,
        )
    heatmap.draw_bar(axes, contours, **options)
    return figure


def value_grid(score_map: ScoreMap, outputs: Sequence[int]) -> Figure:
    """A regression's values, cell by cell, each output with a colour scale of its own.

    The first panel shows the photograph, where it is known.

    Args:
        score_map: of one image.
        outputs: their indices.

    Raises:
        ImageError: if no cell has data.
    """
    from matplotlib.figure import Figure

    score_map.require_data()
    panels = len(outputs) + (score_map.image is not None)
    columns = min(panels, 3)
    rows = ceil(panels / columns)
    width, height = _class_panel(score_map.image_size)
    size = (columns * (max(width, _CAPTION) + _CLASS_BAR), rows * (height + _CLASS_TITLE))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = _after_photograph(figure.subplots(rows, columns, squeeze=False), score_map)
    for index, ax in zip(outputs, axes):
        _plot_cells(ax, score_map, index)
        mean = float(score_map.average()[index])
        title = f"{output_name(score_map, index)}: {mean:.4g} on average"
        ax.set_title(title, fontsize="medium", parse_math=False)
    return figure


def output_name(score_map: ScoreMap, index: int) -> str:
    """The name of a class, or of a regression's output, which is no class."""
    if score_map.activation == "values" and score_map.categories is None:
        return f"output {index}"
    return class_name(index, score_map.categories)


def _after_photograph(axes: NDArray[Any], score_map: ScoreMap) -> list[Axes]:
    """The axes of a grid, blank, after the one that shows the photograph, if that is known."""
    unused = list(axes.flat)
    for ax in unused:
        ax.set_axis_off()
    if score_map.image is not None:
        ax = unused.pop(0)
        show_image(ax, score_map, "RGB", _PANEL_PIXELS)
        height, width = score_map.image.height, score_map.image.width
        ax.set_title(f"{height} x {width} pixels", fontsize="medium")
    return unused


def _percent(probability: Any) -> str:
    """A probability in per cent, which is 0 or 100 only where it is."""
    value = float(probability)
    if 0 < value < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= value < 1 else f"{value:.1%}"


def label_figure(score_map: ScoreMap, ax: Axes | None = None, most: int = 6) -> Axes:
    """Every cell in the colour of its most probable class, with a legend.

    A cell is a square of one stride around its centre; there is no cell in the margin. The classes
    that win most cells are coloured, the others share grey; cells without data stay bare and do not
    count. A class has the same colour in every figure, by its index. Large images are drawn
    reduced.

    Args:
        score_map: of one image.
        ax: where to draw; a new figure when None.
        most: how many classes have a colour, up to 7.

    Raises:
        ArgumentError: if `most` is not from 1 to 7.
    """
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    if not 1 <= most <= MOST_COLOURED:
        raise ArgumentError(f"most must be from 1 to {MOST_COLOURED} classes, got {most}")
    own_figure = ax is None
    if ax is None:
        panel = _class_panel(score_map.image_size)
        size = (1.5 * panel[0] + 2.4, 1.5 * panel[1] + _CLASS_TITLE)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    labels = score_map.label_map().cpu().numpy()
    present, counts = np.unique(labels[labels >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    coloured, others = present[order[:most]], present[order[most:]]
    palette = class_colours(len(score_map.scores)) / 255
    groups: list[tuple[str, NDArray[Any], Any]] = [
        (class_name(int(index), score_map.categories), palette[index], [index])
        for index in coloured
    ]
    groups += [(f"{len(others)} more classes", _OTHERS, others)] * (len(others) > 0)
    known = max(int(score_map.has_data.sum()), 1)
    step = reduction(labels.shape)
    drawn = labels[step // 2 :: step, step // 2 :: step]
    cells = np.zeros((*drawn.shape, 4))
    patches = []
    for name, colour, indices in groups:
        cells[np.isin(drawn, indices)] = (*colour, _OPACITY)
        share = np.isin(labels, indices).sum() / known
        shown = on_middle_grey(colour, _OPACITY)
        patches.append(Patch(color=shown, label=f"{name} ({share:.0%})"))
    # half of the contrast, so that a colour is the same on dark and on bright parts
    show_image(ax, score_map, "L", cmap="gray", vmin=-127, vmax=383)
    extent = extent_of_cells(score_map)
    ax.imshow(cells, interpolation="nearest", extent=extent)
    _draw_borders(ax, drawn, extent)
    frame(ax, score_map.image_size)
    ax.set_title(f"most probable class of {labels.shape[0]} x {labels.shape[1]} cells")
    if patches:
        draw_legend(ax, patches, "class (share of cells)", own_figure)
    return saved_by_figure(ax)


def _draw_borders(
    ax: Axes, labels: NDArray[Any], extent: tuple[float, float, float, float]
) -> None:
    """Draw lines between cells of different classes, on axes that show them at `extent`."""
    from matplotlib.collections import LineCollection

    left, right, bottom, top = extent
    rows, cols = labels.shape
    y, x = np.linspace(top, bottom, rows + 1), np.linspace(left, right, cols + 1)
    row, col = np.nonzero(labels[:, 1:] != labels[:, :-1])
    upright = np.stack([x[col + 1], y[row], x[col + 1], y[row + 1]], 1)
    row, col = np.nonzero(labels[1:] != labels[:-1])
    level = np.stack([x[col], y[row + 1], x[col + 1], y[row + 1]], 1)
    lines = np.concatenate([upright, level]).reshape(-1, 2, 2)  # of two points (x, y)
    ax.add_collection(LineCollection(list(lines), colors="#202020", linewidths=0.8))


def _class_panel(size: tuple[int, int]) -> tuple[float, float]:
    """Inches ``(width, height)`` of a panel for an image of ``(H, W)``; a strip stays visible."""
    height, width = size
    longer = max(size)
    return max(width / longer * _CLASS_PANEL, 1.2), max(height / longer * _CLASS_PANEL, 0.8)
