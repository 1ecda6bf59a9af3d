"""The dense map against the source model on every window, one crop at a time.

A crop sees zeros beyond its border where the dense map sees the neighbouring pixels. So for a net
with padding the two differ wherever a side of the window lies inside the image, by how much the
scores depend on what is there; for one without padding they are equal everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fcvgg.categories import class_index, class_name
from fcvgg.conversion import convert
from fcvgg.errors import ImageError
from fcvgg.geometry import Pair
from fcvgg.images.reading import ImageLike
from fcvgg.network import FullyConvolutional
from fcvgg.probability import require_classes, to_probabilities
from fcvgg.results.score_map import ScoreMap
from fcvgg.rewriting.outputs import flattened
from fcvgg.support.module_state import device_of, dtype_of, evaluating
from fcvgg.support.progress import progress_bar
from fcvgg.support.tables import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_BATCH = 16
"""Crops that the source model is given at once."""

_SIDES = range(5)

_PANEL, _LABELS, _POINTS = 3.6, 0.6, 10.0
"""Inches of a panel's longer side and of an axis's labels; the size of titles in points."""

_HEADINGS = (
    *("sides inside", "cells", "max error", "mean error", "rank agreement", "top-1 agreement"),
)


@dataclass(frozen=True)
class SideRow:
    """Some of the cells.

    Attributes:
        label: which: how many sides of the window lie inside the image, ``"outside"`` where the
            crop leaves it, or ``"all"``.
        cells: how many cells there are.
        max_error: the largest difference of a score, relative to the largest score of the crops.
        mean_error: the mean of each cell's largest difference, relative likewise.
        rank_agreement: the mean of Spearman's correlation between both orders of the classes;
            not a number for a single class.
        top1_agreement: the share of cells that both give to the same class.
    """

    label: str
    cells: int
    max_error: float
    mean_error: float
    rank_agreement: float
    top1_agreement: float


@dataclass(frozen=True, eq=False)
class WindowComparison:
    """How far the dense map is from the source model on crops; printing it shows a table.

    Attributes:
        dense: the score map of the image.
        crops: the same with the source model's scores of every cell's window.
        sides_inside: ``(h, w)``: how many sides of each cell's window lie inside the image, where
            the crop saw zeros and the dense map neighbours.
        outside: bool ``(h, w)``: whether the crop leaves the image, so that the model was shown
            zeros. That happens at the far borders where the native size is larger than the window,
            and with ``padding="same"``.
        error: ``(h, w)``: each cell's largest difference of a score, relative to the largest score
            of all crops.
        rank_agreement: ``(h, w)``: Spearman's correlation between both orders of the classes.
        top1_agreement: bool ``(h, w)``: whether both give the cell to the same class.
    """

    dense: ScoreMap
    crops: ScoreMap
    sides_inside: NDArray[np.int64]
    outside: NDArray[np.bool_]
    error: NDArray[np.float64]
    rank_agreement: NDArray[np.float64]
    top1_agreement: NDArray[np.bool_]

    def by_sides(self) -> list[SideRow]:
        """A row for each number of sides that occurs, and one where crops leave the image."""
        groups = [(str(n), (self.sides_inside == n) & ~self.outside) for n in _SIDES]
        groups.append(("outside", self.outside))
        return [self._row(label, cells) for label, cells in groups if cells.any()]

    def overall(self) -> SideRow:
        """All cells."""
        return self._row("all", np.ones(self.error.shape, bool))

    def _row(self, label: str, cells: NDArray[np.bool_]) -> SideRow:
        return SideRow(
            label=label,
            cells=int(cells.sum()),
            max_error=float(self.error[cells].max()),
            mean_error=float(self.error[cells].mean()),
            rank_agreement=_mean(self.rank_agreement[cells]),
            top1_agreement=float(self.top1_agreement[cells].mean()),
        )

    def __str__(self) -> str:
        rows = [_HEADINGS]
        for row in (*self.by_sides(), self.overall()):
            errors = f"{row.max_error:.1e}", f"{row.mean_error:.1e}"
            agreement = f"{row.rank_agreement:.3f}", f"{row.top1_agreement:.1%}"
            rows.append((row.label, f"{row.cells}", *errors, *agreement))
        note = (
            "errors are relative to the largest score; a side inside the image is one where the "
            "crop saw zeros"
        )
        return f"{text_table(rows)}\n{note}"

    def plot(self, target: int | str | None = None) -> Figure:
        """One class's heatmap from the crops and from the dense map, and the error of every cell.

        Args:
            target: a class index or category name; None for the top class of the crops.
        """
        from fcvgg.results.drawing import BAR, colour_bar, panel_size, panels
        from fcvgg.results.figures import draw_cells, draw_heatmap

        index = (
            int(self.crops.predict().argmax())
            if target is None
            else class_index(target, self.crops.categories, len(self.crops.scores))
        )
        name = class_name(index, self.crops.categories)
        width, height = panel_size(self.dense.image_size, _PANEL)
        titles = [f"model on every window: {name}", f"dense map: {name}", "error of each cell"]
        titles.append("every cell (bar: mean)")
        made = panels(
            [*[width] * 3, _PANEL],
            [height],
            titles=titles,
            points=_POINTS,
            right=(BAR, BAR + _LABELS, 0),
            below=max(height, 2) + _LABELS,
        )
        *maps, errors, sides = made.axes[0]
        for ax, part in zip(maps, (self.crops, self.dense)):
            heatmap = draw_heatmap(ax, part, index)
        heatmap.draw_bar(maps, cax=made.bar(1))
        shown = draw_cells(errors, self.dense, self.error, vmin=0)
        colour_bar(shown, errors, made.bar(2)).set_label("of the largest score")
        self._plot_sides(sides)
        for ax, title in zip(made.axes[0], titles):
            ax.set_title(title, fontsize=_POINTS, parse_math=False)
        return made.figure

    def _plot_sides(self, ax: Axes) -> None:
        """Every cell's error above its number of sides, and their means."""
        ax.set_axis_on()
        rows = self.by_sides()
        places = {row.label: place for place, row in enumerate(rows)}
        labels = np.where(self.outside, "outside", self.sides_inside.astype(str))
        x = np.vectorize(places.__getitem__)(labels)
        spread = np.random.default_rng(0).uniform(-0.12, 0.12, x.shape)
        ax.plot(x + spread, self.error, ".", color="#666666", ms=4, alpha=0.6)
        for place, row in enumerate(rows):
            ax.hlines(row.mean_error, place - 0.25, place + 0.25, color="#D55E00", lw=2.5)
            ax.annotate(
                f"{row.mean_error:.2g}",
                (place + 0.28, row.mean_error),
                va="center",
                color="#D55E00",
                fontsize="small",
            )
        ax.set_xticks(range(len(rows)), list(places))
        ax.set_xlim(-0.5, len(rows) - 0.2)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("sides of the window inside the image")
        ax.set_ylabel("error")
        ax.spines[["top", "right"]].set_visible(False)


def compare_windows(
    model: nn.Module,
    net: FullyConvolutional,
    image: ImageLike,
    *,
    output: int | str = 0,
    progress: bool = False,
) -> WindowComparison:
    """Run the source model on every cell's window and compare it with the dense map.

    The crop of a cell is the source's native input that begins where the cell's window does; what
    it lacks beyond the image is zeros.

    Args:
        model: the source model.
        net: what `fcvgg.convert` made of it. Where its cells are positions, the means over windows
            are compared: the cells of ``head="window"``.
        image: as for ``net.score_map``.
        output: which output, by number or name, for a model with several.
        progress: show a progress bar on stderr.

    Raises:
        ImageError: if the image has pixels that are not finite, with which nothing can be compared.
    """
    if net.head != "window":
        net = _of_windows(model, net)
    dense, index = net.score_map(image, output=output), net.output_index(output)
    unknown = int((~dense.has_data).sum())
    if unknown:
        raise ImageError(
            f"image must have finite pixels everywhere, got {unknown} of {dense.has_data.numel()} "
            "cells without data; use a part of it that has data"
        )
    pixels = net._prepared(image).tensor(net.preprocess).to(device_of(model), dtype_of(model))
    rows, cols = dense.scores.shape[1:]
    starts = [dense.geometry.window_of(row, col)[:2] for row in range(rows) for col in range(cols)]
    scores = []
    with (
        progress_bar("windows", len(starts), progress) as advance,
        torch.no_grad(),
        evaluating(model),
    ):
        for batch in _crops(pixels, starts, net.input_size):
            given = model(batch)
            given = flattened(given)[0][index]
            scores.append(given.reshape(len(batch), -1))
            advance(len(batch))
    crops = torch.cat(scores).T.unflatten(1, (rows, cols)).to(dense.scores)  # (K, h, w)
    # An image below the window is padded up to it, and its sides are those of the padded image.
    size = tuple(max(n, w) for n, w in zip(dense.input_size, net.geometry.window))
    before = [net.geometry.padding_for(dense.input_size)[axis][0] for axis in (0, 1)]
    first = np.array(starts).reshape(rows, cols, 2) + before  # (h, w, 2), in the padded image
    last = first + net.input_size
    return _compared(
        dense,
        crops,
        sides=(first > 0).sum(2) + (last < size).sum(2),
        outside=np.asarray(((first < 0) | (last > size)).any(2)),
    )


def _of_windows(model: nn.Module, net: FullyConvolutional) -> FullyConvolutional:
    """The network whose cells are the means over windows of one of positions."""
    stride = net.geometry.stride
    return convert(
        model,
        input_size=net.input_size,
        output_stride=stride[0] if stride[0] == stride[1] else None,
        preprocess=net.preprocess,
        categories=net.categories,
        # what a position's scores are says nothing of those after a softmax of their means
        activation=None if any(net.program.finals) else net.activation,
        verify=False,
    )


def _crops(pixels: Tensor, starts: list[Pair], size: Pair) -> Iterator[Tensor]:
    """Batches of crops of `size` that begin at `starts`, with zeros where they leave the image."""
    height, width = pixels.shape[2:]
    tops, lefts = zip(*starts)
    above, before = max(-min(tops), 0), max(-min(lefts), 0)
    below = max(max(tops) + size[0] - height, 0)
    after = max(max(lefts) + size[1] - width, 0)
    padded = F.pad(pixels, (before, after, above, below))

    def crop(top: int, left: int) -> Tensor:
        return padded.narrow(2, above + top, size[0]).narrow(3, before + left, size[1])

    for first in range(0, len(starts), _BATCH):
        yield torch.cat([crop(*start) for start in starts[first : first + _BATCH]])


def _compared(
    dense: ScoreMap, crops: Tensor, sides: NDArray[np.int64], outside: NDArray[np.bool_]
) -> WindowComparison:
    reference = ScoreMap(**{**vars(dense), "scores": crops})
    wide, other = crops.double().cpu(), dense.scores.double().cpu()
    scale = max(float(wide.abs().max()), torch.finfo(torch.float32).tiny)
    return WindowComparison(
        dense=dense,
        crops=reference,
        sides_inside=sides,
        outside=outside,
        error=((wide - other).abs().amax(0) / scale).numpy(),
        rank_agreement=_rank_correlation(wide.numpy(), other.numpy()),
        top1_agreement=(_labels(reference) == _labels(dense)).cpu().numpy(),
    )


def _labels(score_map: ScoreMap) -> Tensor:
    """Each cell's class, ``(h, w)``; for a single class whether it is more likely than not."""
    if len(score_map.scores) == 1:
        return to_probabilities(score_map.scores, score_map.activation)[0] > 0.5
    require_classes(score_map.activation)
    return score_map.scores.argmax(0)


def _rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Spearman's correlation over the first axis; not a number where one side has no order."""
    first, second = _ranks(a), _ranks(b)
    first, second = first - first.mean(0), second - second.mean(0)
    scale = np.sqrt((first**2).sum(0) * (second**2).sum(0))
    products = (first * second).sum(0)
    return np.divide(products, scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of those that are numbers."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks along the first axis; equal values share their mean rank."""
    columns = values.reshape(len(values), -1)
    ranks = np.empty(columns.shape)
    for i, column in enumerate(columns.T):
        _, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)  # equal values hold the ranks from ends - counts to ends - 1
        ranks[:, i] = (ends - (counts - 1) / 2)[place]
    return ranks.reshape(values.shape)
