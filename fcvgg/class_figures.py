"""Figures of a score map's classes: the most probable ones side by side, and who wins where."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from fcvgg.categories import class_name
from fcvgg.class_colours import class_colours
from fcvgg.errors import ArgumentError
from fcvgg.figures import draw_heatmap, extent_of_cells, show_image
from fcvgg.heatmap import ALPHA, COLOUR_MAP, CONTOURS, DRAWN, colour_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fcvgg.score_map import ScoreMap

TOP = 5

MOST_COLOURED = 7
"""Classes that a figure can tell apart by colour."""

_OTHERS = "#777777"
_OPACITY = 0.6
_PANEL, _TITLE, _BAR, _CAPTION = 3.2, 0.8, 0.9, 2.8
"""Inches: a panel's longer side, the titles' height, the colour bar's width, the titles' width."""

_PANEL_PIXELS = 800
"""Of a panel's longer side: twice what it has at the figure's own resolution."""


def class_grid(
    score_map: ScoreMap,
    k: int = TOP,
    *,
    alpha: float = ALPHA,
    cmap: str = COLOUR_MAP,
    contours: Sequence[float] = CONTOURS,
) -> Figure:
    """The k most probable classes as aligned heatmaps, with one absolute colour scale.

    The first panel shows the photograph, where it is known. Large images are drawn reduced; the
    axes count their pixels.

    Args:
        score_map: of one image.
        k: how many classes; all of them if there are fewer.
        alpha: as for `Heatmap.overlay`.
        cmap: as for `Heatmap.overlay`.
        contours: as for `Heatmap.plot`.

    Raises:
        ArgumentError: if `k` is not positive.
        ImageError: if no cell has data.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    score_map.require_data()
    if k < 1:
        raise ArgumentError(f"k={k} is no number of classes; expected 1 or more")
    prediction = score_map.predict()
    order = prediction.argsort(descending=True)[:k].tolist()
    photograph = score_map.image is not None
    columns, rows = _grid(len(order) + photograph)
    width, height = _panel(score_map.image_size)
    size = (columns * max(width, _CAPTION) + _BAR, rows * (height + _TITLE))
    shown = score_map.image_size[1] / max(score_map.image_size) * _PANEL
    # not compressed, panels count as high as their slots, and titles are cut off; titles wider
    # than their panels never count
    layout = ConstrainedLayoutEngine(compress=True, w_pad=max((_CAPTION - shown) / 2, 0.04))
    figure = Figure(figsize=size, dpi=110, layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    panels = list(axes.flat)
    if score_map.image is not None:
        ax = panels.pop(0)
        show_image(ax, score_map, "RGB", _PANEL_PIXELS)
        ax.set_title(
            f"{score_map.image.height} x {score_map.image.width} pixels", fontsize="medium"
        )
    compared = score_map.activation not in ("independent_logits", "sigmoid")
    found_at = score_map.label_map() if compared else score_map.probabilities() > 0.5
    known = score_map.has_data.sum()
    for index, ax in zip(order, panels):
        heatmap = draw_heatmap(
            ax, score_map, index, _PANEL_PIXELS, alpha=alpha, cmap=cmap, contours=contours
        )
        cells = found_at == index if compared else found_at[index]
        share = f"{float(cells.sum() / known):.0%} of cells"
        share = f"top class of {share}" if compared else f"above 50% in {share}"
        found = f"{heatmap.values[heatmap.peak]:.1%} at +" if heatmap.coverage.any() else "no peak"
        ax.set_title(
            f"{heatmap.label}\n{float(prediction[index]):.1%} averaged over the image\n"
            f"{share}, {found}",
            fontsize="medium",
        )
    colour_bar(figure, axes, alpha=alpha, cmap=cmap, blended=photograph, contours=contours)
    return figure


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
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    if not 1 <= most <= MOST_COLOURED:
        raise ArgumentError(f"most={most}; expected 1 to {MOST_COLOURED} coloured classes")
    height, width = score_map.image_size
    own = ax is None
    if ax is None:
        panel = _panel(score_map.image_size)
        size = (1.5 * panel[0] + 2.4, 1.5 * panel[1] + _TITLE)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    labels = score_map.label_map().cpu().numpy()
    known = max(int(score_map.has_data.sum()), 1)
    present, counts = np.unique(labels[labels >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    step = -(-max(labels.shape) // DRAWN)
    drawn = labels[step // 2 :: step, step // 2 :: step]
    cells = np.zeros((*drawn.shape, 4))
    patches = []
    colours = class_colours(len(score_map.scores)) / 255
    for index in present[order[:most]]:
        colour = colours[index]
        cells[drawn == index] = to_rgba(colour, _OPACITY)
        share = (labels == index).sum() / known
        name = class_name(int(index), score_map.categories)
        patches.append(Patch(color=colour, alpha=_OPACITY, label=f"{name} ({share:.0%})"))
    others = present[order[most:]]
    if len(others):
        cells[np.isin(drawn, others)] = to_rgba(_OTHERS, _OPACITY)
        share = np.isin(labels, others).sum() / known
        name = f"{len(others)} more classes ({share:.0%})"
        patches.append(Patch(color=_OTHERS, alpha=_OPACITY, label=name))
    if score_map.image is not None:
        show_image(ax, score_map, "L", cmap="gray", vmin=0, vmax=255)
    ax.imshow(cells, interpolation="nearest", extent=extent_of_cells(score_map))
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(height - 0.5, -0.5)
    ax.set_title(f"most probable class of {labels.shape[0]} x {labels.shape[1]} cells")
    ax.set_axis_off()
    if not patches:
        return ax
    look = {"title": "class (share of cells)", "frameon": False, "alignment": "left"}
    if own:  # the layout makes room for a figure's legend, not for one beside an image
        ax.figure.legend(handles=patches, loc="outside right upper", **look)
    else:
        ax.legend(
            handles=patches, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, **look
        )
    return ax


def _grid(panels: int) -> tuple[int, int]:
    """Columns and rows for a number of panels: wider than high."""
    columns = min(panels, 3 if panels <= 9 else ceil(panels**0.5))
    return columns, ceil(panels / columns)


def _panel(size: tuple[int, int]) -> tuple[float, float]:
    """Inches ``(width, height)`` of a panel for an image of ``(H, W)``; a strip stays visible."""
    height, width = size
    longer = max(size)
    return max(width / longer * _PANEL, 1.2), max(height / longer * _PANEL, 0.8)
