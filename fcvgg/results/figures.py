"""Figures made of a score map; matplotlib is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcvgg.categories import class_name
from fcvgg.errors import ArgumentError, ImageError
from fcvgg.geometry import Geometry, Pair
from fcvgg.results.colours import class_colours
from fcvgg.results.drawing import (
    BAR,
    DRAWN,
    colour_bar,
    draw_legend,
    extent_of,
    frame,
    legend_size,
    on_middle_grey,
    panel_size,
    panels,
    reduction,
    resized,
    saved_by_figure,
    share_text,
)
from fcvgg.results.heatmap import Heatmap, OverlayOptions
from fcvgg.support.atomic import FIGURE_ENDINGS, atomic_file, checked_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from typing_extensions import Unpack

    from fcvgg.results.score_map import ScoreMap

Extent = tuple[float, float, float, float]

CELL_COLOUR_MAP = "viridis"
"""Not the heatmap's, since scores and probabilities are different quantities."""

_PANEL = 4.0
"""Inches of a panel's longer side."""

_GALLERY = 2.4
"""Inches: the height of a gallery's photographs."""

_SMALL = 10.0
"""Points of the titles of several panels."""

_FADED = 0.35


def side_by_side(score_map: ScoreMap, target: int | str | None = None) -> Figure:
    """The image, one class's scores cell by cell, and its heatmap, in three panels.

    Args:
        score_map: of an image that is known (`ScoreMap.image`).
        target: a class index or category name; None for the top class of the average.

    Raises:
        ImageError: if the score map was made from a tensor, so that there is no image to show.
    """
    image = score_map.image
    if image is None:
        raise ImageError(
            "the score map must have an image to show, got one made from a tensor; make it from a "
            "path, a PIL image or a uint8 array"
        )
    index = score_map.index_of(target)
    name = class_name(index, score_map.categories)
    rows, cols = score_map.scores.shape[1:]
    rescaled = score_map.input_size != score_map.image_size
    seen = f" at {score_map.input_size[0]} x {score_map.input_size[1]} pixels" if rescaled else ""
    titles = (
        f"photograph: {image.height} x {image.width} pixels",
        f"score map: {rows} x {cols} cells{seen}",
        f"heatmap: probability of {name!r}",
    )
    width, height = panel_size(score_map.image_size, _PANEL)
    made = panels([width] * 3, [height], titles=titles, points=_SMALL, right=(BAR, BAR))
    photograph, cells, heatmap = made.axes[0]
    show_image(photograph, score_map, "RGB")
    _draw_scores(cells, score_map, index, made.bar(1))
    draw_heatmap(heatmap, score_map, index, contours=()).draw_bar(heatmap, (), cax=made.bar())
    for ax, title in zip(made.axes[0], titles):
        ax.set_title(title, fontsize=_SMALL, parse_math=False)
    return made.figure


def gallery(score_maps: Sequence[ScoreMap], targets: Sequence[int | str | None]) -> Figure:
    """Photographs in a row, and below each the heatmap of one class, with one colour bar.

    Args:
        score_maps: of one network, of images that are known (`ScoreMap.image`).
        targets: a class index or category name for each; None for the top class of the average.
    """
    widths = [one.image_size[1] / one.image_size[0] * _GALLERY for one in score_maps]
    made = panels(widths, [_GALLERY] * 2, titles=["one line"])
    for photograph, map_, one, target in zip(*made.axes, score_maps, targets):
        show_image(photograph, one, "RGB")
        heatmap = draw_heatmap(map_, one, one.index_of(target), contours=())
        y, x = heatmap.peak
        map_.set_title(f"{heatmap.label}: {heatmap.values[y, x]:.2f}", parse_math=False)
    heatmap.draw_bar(made.axes, (), cax=made.bar(row=1))
    return made.figure


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


def heatmap_of(score_map: ScoreMap, index: int, side: int) -> Heatmap:
    """A class's heatmap whose longer side has at most `side` pixels."""
    return score_map.heatmap(index, size=_drawn_size(score_map.image_size, side))


def draw_on(ax: Axes, heatmap: Heatmap, size: Pair, **options: Any) -> None:
    """Draw a heatmap as `Heatmap.draw` does, on axes that count the pixels of an image ``(H, W)``.

    Args:
        ax: where to draw.
        heatmap: of that image, or of a reduced one.
        size: of the image.
        options: of `Heatmap.draw`.
    """
    (height, width), (down, across) = size, heatmap.values.shape
    heatmap.draw(ax, (height / down, width / across), **options)
    frame(ax, size)


def draw_heatmap(ax: Axes, score_map: ScoreMap, index: int, **options: Any) -> Heatmap:
    """Draw a class's heatmap, computed no larger than it is drawn; see `draw_on`."""
    heatmap = heatmap_of(score_map, index, DRAWN)
    draw_on(ax, heatmap, score_map.image_size, **options)
    return heatmap


def show_image(
    ax: Axes, shown: ScoreMap | CellLabels, mode: str, side: int = DRAWN, **options: Any
) -> None:
    """Draw the image, if it is known, in colours (``"RGB"``) or grey (``"L"``)."""
    if shown.image is None:
        return
    size = shown.image_size
    picture = resized(shown.image, _drawn_size(size, side)).convert(mode)
    ax.imshow(picture, extent=extent_of(size), **options)
    ax.set_axis_off()


def _drawn_size(size: Pair, side: int) -> Pair:
    """The size at which an image of this one is drawn."""
    factor = max(max(size) / side, 1.0)
    height, width = (max(round(n / factor), 1) for n in size)
    return height, width


def draw_cells(ax: Axes, score_map: ScoreMap, values: NDArray[Any], **options: Any) -> Any:
    """Draw a value ``(h, w)`` of every cell as a square of one stride; the margin has no cells."""
    show_image(ax, score_map, "L", cmap="gray", alpha=_FADED)
    extent = extent_of_cells(score_map)
    options = {"cmap": CELL_COLOUR_MAP, "interpolation": "nearest"} | options
    shown = ax.imshow(values, extent=extent, **options)
    frame(ax, score_map.image_size)
    return shown


def _draw_scores(ax: Axes, score_map: ScoreMap, index: int, cax: Axes) -> None:
    """Draw the scores of a class, or the values of a regression's output, with a colour bar."""
    shown = draw_cells(ax, score_map, score_map.scores[index].float().cpu().numpy())
    kind = "value" if score_map.activation == "values" else "score"
    colour_bar(shown, ax, cax).set_label(f"{kind} of {output_name(score_map, index)!r}")


def extent_of_cells(score_map: ScoreMap) -> Extent:
    """Left, right, bottom and top edge of all cells, in pixels of the image."""
    size, cells = score_map.image_size, score_map.scores.shape[1:]
    return edges_of_cells(score_map.geometry, cells, score_map.input_size, size)


def edges_of_cells(
    geometry: Geometry, cells: Sequence[int], input_size: Pair, image_size: Pair
) -> Extent:
    """Left, right, bottom and top edge of cells ``(h, w)``, in pixels of the image."""
    edges = []
    for axis, count, pixels, size in zip(geometry.axes, cells, input_size, image_size):
        scale = size / pixels
        first = axis.centre_of(0) - axis.stride / 2 + 0.5
        edges.append((first * scale - 0.5, (first + count * axis.stride) * scale - 0.5))
    (top, bottom), (left, right) = edges  # of pixels, not of their middles
    return left, right, bottom, top


# -- the most probable classes side by side, and who wins where -----------------------------------

TOP = 5

MOST_COLOURED = 7
"""Classes that a figure can tell apart by colour."""

_LEGEND = "class (share of cells)"

_BORDERED = 200
"""Cells of a side between which lines are drawn at most; they would cover more."""

_OTHERS = np.full(3, 0.47)
_OPACITY = 0.6
_CLASS_PANEL = 3.0
"""Inches of a panel's longer side."""

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
    score_map.require_data()
    if k < 1:
        raise ArgumentError(f"k must be at least 1, got {k}")
    prediction = score_map.predict()
    order = prediction.argsort(descending=True)[:k].tolist()
    image = score_map.image
    count = len(order) + (image is not None)
    columns = min(count, 3 if count <= 9 else ceil(count**0.5))
    # independent classes do not compete for a cell, so their cells are counted one by one
    compared = score_map.activation not in ("independent_logits", "sigmoid")
    found_at = score_map.label_map() if compared else score_map.probabilities() > 0.5
    known = score_map.has_data.sum()
    heatmaps, titles = [], [] if image is None else [f"{image.height} x {image.width} pixels"]
    for index in order:
        heatmap = heatmap_of(score_map, index, _PANEL_PIXELS)
        cells = found_at == index if compared else found_at[index]
        share = f"{share_text(float(cells.sum() / known))} of cells"
        share = f"top class of {share}" if compared else f"above 50% in {share}"
        peak = heatmap.values[heatmap.peak] if heatmap.coverage.any() else None
        found = "no peak" if peak is None else f"peak {_percent(peak)} (○)"
        whole = f"whole image {_percent(prediction[index])}"
        titles.append(f"{heatmap.label}\n{found}, {whole}\n{share}")
        heatmaps.append(heatmap)
    width, height = panel_size(score_map.image_size, _CLASS_PANEL)
    rows = ceil(count / columns)
    made = panels([width] * columns, [height] * rows, titles=titles, points=_SMALL)
    axes = list(made.axes.flat)
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize=_SMALL, parse_math=False)
    if image is not None:
        show_image(axes.pop(0), score_map, "RGB", _PANEL_PIXELS)
    for ax, heatmap in zip(axes, heatmaps):
        draw_on(ax, heatmap, score_map.image_size, contours=contours, **options)
    heatmap.draw_bar(made.axes, contours, cax=made.bar(), **options)
    return made.figure


def value_grid(score_map: ScoreMap, outputs: Sequence[int]) -> Figure:
    """A regression's values, cell by cell, each output with a colour scale of its own.

    The first panel shows the photograph, where it is known.

    Args:
        score_map: of one image.
        outputs: their indices.

    Raises:
        ImageError: if no cell has data.
    """
    score_map.require_data()
    image = score_map.image
    titles = [] if image is None else [f"{image.height} x {image.width} pixels"]
    means = score_map.average().tolist()
    titles += [f"{output_name(score_map, i)}: {means[i]:.4g} on average" for i in outputs]
    columns = min(len(titles), 3)
    rows = ceil(len(titles) / columns)
    width, height = panel_size(score_map.image_size, _CLASS_PANEL)
    room = [BAR] * columns
    made = panels([width] * columns, [height] * rows, titles=titles, points=_SMALL, right=room)
    places = list(np.ndindex(rows, columns))
    for place, title in zip(places, titles):
        made.axes[place].set_title(title, fontsize=_SMALL, parse_math=False)
    if image is not None:
        show_image(made.axes[places.pop(0)], score_map, "RGB", _PANEL_PIXELS)
    for (row, column), index in zip(places, outputs):
        ax = made.axes[row, column]
        _draw_scores(ax, score_map, index, made.bar(column, row, row))
    return made.figure


def output_name(score_map: ScoreMap, index: int) -> str:
    """The name of a class, or of a regression's output, which is no class."""
    if score_map.activation == "values" and score_map.categories is None:
        return f"output {index}"
    return class_name(index, score_map.categories)


def _percent(probability: Any) -> str:
    """A probability in per cent, which is 0 or 100 only where it is."""
    value = float(probability)
    if 0 < value < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= value < 1 else f"{value:.1%}"


@dataclass(frozen=True)
class CellLabels:
    """The class of every cell of an image.

    Attributes:
        labels: integers ``(h, w)``; -1 where there is none.
        extent: the outer edges of the cells, as of `extent_of_cells`.
        image_size: ``(H, W)``.
        classes: how many there are.
        known: the cells with data.
        categories: their names, if they have any.
        image: the image, or a reduced one.
    """

    labels: NDArray[Any]
    extent: Extent
    image_size: Pair
    classes: int
    known: int
    categories: Sequence[str] | None = None
    image: Image.Image | None = None

    @classmethod
    def of(cls, score_map: ScoreMap) -> CellLabels:
        return cls(
            score_map.label_map().cpu().numpy(),
            extent_of_cells(score_map),
            score_map.image_size,
            len(score_map.scores),
            int(score_map.has_data.sum()),
            score_map.categories,
            score_map.image,
        )

    def groups(self, most: int) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
        """Name, colour and classes of the most frequent classes, and of all others together."""
        present, counts = np.unique(self.labels[self.labels >= 0], return_counts=True)
        order = present[np.argsort(-counts, kind="stable")]
        coloured, others = np.split(order, [most])
        palette = class_colours(self.classes) / 255
        groups = [(class_name(int(i), self.categories), palette[i], i[None]) for i in coloured]
        return groups + [(f"{len(others)} more classes", _OTHERS, others)] * (len(others) > 0)


def label_figure(
    cells: CellLabels, ax: Axes | None = None, most: int = 6, make: Any = None
) -> Axes:
    """Every cell in the colour of its most probable class, with a legend.

    A cell is a square of one stride around its centre; there is no cell in the margin. The classes
    that win most cells are coloured, the others share grey; cells without data stay bare and do not
    count. A class has the same colour in every figure, by its index. Large images are drawn
    reduced: a square that stands for several cells has the colour of most of them.

    Args:
        cells: of one image.
        ax: where to draw; a new figure when None.
        most: how many classes have a colour, up to 7.
        make: the class or function of a new figure; pyplot's when None.

    Raises:
        ArgumentError: if `most` is not from 1 to 7.
    """
    from matplotlib.patches import Patch

    if not 1 <= most <= MOST_COLOURED:
        raise ArgumentError(f"most must be from 1 to {MOST_COLOURED} classes, got {most}")
    groups = cells.groups(most)
    labels, known = cells.labels, max(cells.known, 1)
    step = reduction(labels.shape)
    first = [np.arange(0, n, step) for n in labels.shape]
    patches, counts = [], []
    for name, colour, indices in groups:
        found = np.isin(labels, indices)
        label = f"{name} ({share_text(found.sum() / known)})"
        patches.append(Patch(color=on_middle_grey(colour, _OPACITY), label=label))
        counts.append(np.add.reduceat(np.add.reduceat(found, first[0], 0), first[1], 1))
    bare = np.full((1, *map(len, first)), 0.5)
    drawn = np.concatenate([bare, *(each[None] for each in counts)]).argmax(0)  # 0: no class
    colours = np.array([(0, 0, 0, 0), *((*colour, _OPACITY) for _, colour, _ in groups)])
    title = f"most probable class of {labels.shape[0]} x {labels.shape[1]} cells"
    if ax is None:
        from matplotlib import pyplot as plt

        width, height = panel_size(cells.image_size)
        names = [str(patch.get_label()) for patch in patches]
        right, below = legend_size(names, _LEGEND)
        room: dict[str, Any] = {"right": [right], "below": below, "make": make or plt.figure}
        ax = panels([width], [height], titles=[title], **room).axes[0, 0]
    # half of the contrast, so that a colour is the same on dark and on bright parts
    show_image(ax, cells, "L", cmap="gray", vmin=-127, vmax=383)
    ax.imshow(colours[drawn], interpolation="nearest", extent=cells.extent)
    if max(drawn.shape) <= _BORDERED:
        _draw_borders(ax, drawn, cells.extent)
    frame(ax, cells.image_size)
    ax.set_title(title)
    if patches:
        draw_legend(ax, patches, _LEGEND)
    return saved_by_figure(ax)


def _draw_borders(ax: Axes, labels: NDArray[Any], extent: Extent) -> None:
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
