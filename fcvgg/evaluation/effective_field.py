"""The effective receptive field: which pixels move a cell's score, and by how much.

The receptive field that the layers' geometry gives is what a cell can depend on; most of the
influence comes from a much smaller, bell-shaped part of it (Luo et al. 2016,
https://arxiv.org/abs/1701.04128).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fcvgg.categories import class_index
from fcvgg.errors import ArgumentError, ImageError
from fcvgg.geometry import Geometry, Pair
from fcvgg.images.reading import each_image
from fcvgg.names import counted
from fcvgg.network import FullyConvolutional
from fcvgg.rewriting.outputs import flattened
from fcvgg.support.module_state import device_of, dtype_of, evaluating
from fcvgg.support.progress import progress_bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_TWO_SIGMA = 0.9545
"""The share of a normal distribution within two standard deviations of its middle."""

_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class EffectiveReceptiveField:
    """The influence of every pixel of a cell's receptive field; printing it shows the numbers.

    Attributes:
        influence: float64 ``(h, w)``, of the theoretical field's extent: the mean over images of
            the score's absolute gradient, summed over channels, divided by its sum, so that all
            pixels' shares are 1.
        seen: int64 ``(h, w)``: on how many images each pixel lay on the image, not in its padding.
        images: how many images there were.
        geometry: where the cells lie.
    """

    influence: NDArray[np.float64]
    seen: NDArray[np.int64]
    images: int
    geometry: Geometry

    @property
    def theoretical(self) -> Pair:
        """Extent ``(h, w)`` in pixels of what a cell can depend on."""
        return self.geometry.receptive_field

    @property
    def complete(self) -> bool:
        """Whether every pixel of the field lay on some image."""
        return bool((self.seen > 0).all())

    @property
    def centre(self) -> tuple[float, float]:
        """The influence's centre of mass ``(y, x)``, from the field's first pixel."""
        y, x = (float(n) for n in self._moments(1))
        return y, x

    @property
    def deviation(self) -> tuple[float, float]:
        """The influence's standard deviation ``(y, x)`` in pixels."""
        y, x = (
            float(square - mean**2) ** 0.5
            for square, mean in zip(self._moments(2), self._moments(1))
        )
        return y, x

    @property
    def size(self) -> float:
        """The side in pixels of a square as large as the effective field.

        As in the paper, section 4: the root of the number of pixels whose influence is above
        1 - 95.45 % of the largest, where a bell has fallen off by two standard deviations' share.
        """
        strong = self.influence > (1 - _TWO_SIGMA) * self.influence.max()
        return float(strong.sum()) ** 0.5

    @property
    def ratio(self) -> float:
        """The effective field's size over the theoretical one's (the root of its area)."""
        height, width = self.theoretical
        return self.size / (height * width) ** 0.5

    def extent(self, share: float = 0.95) -> Pair:
        """Extent ``(h, w)`` of the box around the centre that holds a share of the influence.

        Raises:
            ArgumentError: if `share` is not in (0, 1].
        """
        top, left, bottom, right = self.box(share)
        return bottom - top, right - left

    def box(self, share: float = 0.95) -> tuple[int, int, int, int]:
        """The smallest box that holds a share of the influence, half-open, in the field's pixels.

        Of the boxes around the centre of mass with the field's proportions.
        """
        if not 0 < share <= 1:
            raise ArgumentError(f"share must be above 0 and at most 1, got {share}")
        # A pixel's distance is half the side of the smallest box that holds it, relative to the
        # field's: with pixels in order of distance, the boxes' influences are one cumulative sum.
        rows, cols = (
            np.abs(np.arange(n) - middle) / n for n, middle in zip(self.theoretical, self.centre)
        )
        distance = np.maximum(rows[:, None], cols[None])  # (h, w)
        order = np.argsort(distance, axis=None)
        held = np.cumsum(self.influence.flat[order])
        last = np.searchsorted(held, share * held[-1] - _ROUNDING)
        inside = distance <= distance.flat[order[min(last, len(order) - 1)]]
        ys, xs = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        return int(ys[0]), int(xs[0]), int(ys[-1]) + 1, int(xs[-1]) + 1

    def _moments(self, power: int) -> list[float]:
        profiles = (self.influence.sum(over) for over in (1, 0))
        return [float((p * np.arange(len(p)) ** power).sum()) for p in profiles]

    def __str__(self) -> str:
        height, width = self.theoretical
        extents = ", ".join(
            f"{share:.0%} of the influence in {'x'.join(map(str, self.extent(share)))}"
            for share in (0.5, 0.95)
        )
        y, x = self.deviation
        seen = "" if self.complete else "; the images were too small to show all of the field"
        return (
            f"effective receptive field {self.size:.1f} pixels, {self.ratio:.0%} of the "
            f"theoretical {height}x{width}: {extents}, standard deviation ({y:.1f}, {x:.1f}), "
            f"{counted(self.images, 'image')}{seen}"
        )

    def plot(self, ax: Axes | None = None, *, cmap: str = "viridis", share: float = 0.95) -> Axes:
        """Draw the influence, the theoretical field and the box that holds a share of it.

        The colours show the influence relative to the largest, on a square-root scale, since its
        tails are faint.
        """
        from matplotlib import pyplot as plt
        from matplotlib.colors import PowerNorm
        from matplotlib.patches import Rectangle

        from fcvgg.results.drawing import colour_bar, saved_by_figure

        if ax is None:
            _, ax = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
        height, width = self.influence.shape
        shown = ax.imshow(
            self.influence / self.influence.max(), cmap=cmap, norm=PowerNorm(0.5, 0, 1)
        )
        top, left, bottom, right = self.box(share)
        frames = (
            ((0, 0, height, width), "black", "-", f"theoretical: {height} x {width}"),
            (
                (top, left, bottom, right),
                "#D55E00",
                "--",
                f"{share:.0%} of the influence: {bottom - top} x {right - left}",
            ),
        )
        for (first, start, last, end), colour, style, label in frames:
            corner = (start - 0.5, first - 0.5)
            frame = Rectangle(corner, end - start, last - first, fill=False, label=label)
            ax.add_patch(frame)
            frame.set(edgecolor=colour, linestyle=style, linewidth=2, clip_on=False)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
        ax.set_title(
            f"effective receptive field: {self.size:.0f} of {(height * width) ** 0.5:.0f} pixels"
        )
        ax.set_xlabel("pixel of the field")
        colour_bar(shown, ax).set_label("influence, of the largest")
        return saved_by_figure(ax)


def effective_receptive_field(
    net: FullyConvolutional,
    images: Any,
    *,
    cell: Pair | None = None,
    target: int | str | None = None,
    output: int | str = 0,
    progress: bool = False,
) -> EffectiveReceptiveField:
    """The gradient of a cell's score with respect to the pixels, averaged over images.

    Args:
        net: the converted network.
        images: one or several, as for ``net.classify``; of any size. Images as large as the
            receptive field show all of it.
        cell: ``(row, col)``; for each image the one nearest to its middle if None.
        target: the class whose score is taken, an index or category name; for each image the
            cell's top class if None.
        output: which output, by number or name, for a model with several.
        progress: show a progress bar on stderr.

    Raises:
        ImageError: if there are no images, or the cell is on none of them.
        CategoryError: if there is no such class.
    """
    output, index = net.output_index(output), None
    if target is not None:
        names = net.categories if output == 0 else None
        index = class_index(target, names, net.program.classes[output])
    pool = list(each_image(images))
    if not pool:
        raise ImageError("images must hold at least one image, got none")
    total = np.zeros(net.geometry.receptive_field)
    seen = np.zeros(net.geometry.receptive_field, np.int64)
    with progress_bar("images", len(pool), progress) as advance:
        for image in pool:
            pixels = net._prepared(image).tensor(net.preprocess)
            _add_influence(net, pixels, cell, index, output, total, seen)
            advance(1)
    mean = np.divide(total, seen, out=np.zeros_like(total), where=seen > 0)
    if not mean.any():
        raise ImageError("no pixel moves the score: all gradients are zero; use other images")
    return EffectiveReceptiveField(mean / mean.sum(), seen, len(pool), net.geometry)


def _add_influence(
    net: FullyConvolutional,
    pixels: Tensor,
    cell: Pair | None,
    index: int | None,
    output: int,
    total: NDArray[np.float64],
    seen: NDArray[np.int64],
) -> None:
    """Add one image's gradient to the sums over the cell's receptive field."""
    size = (pixels.shape[2], pixels.shape[3])
    geometry = net.geometry.placed(size)
    rows, cols = net.output_size(size)
    row, col = _middle(geometry, size, (rows, cols)) if cell is None else cell
    if not (0 <= row < rows and 0 <= col < cols):
        raise ImageError(f"cell must be one of the {rows}x{cols} of an image of {size}, got {cell}")
    gradient = _gradient(net, pixels, (row, col), index, output)
    # the field may leave the image; only the part on the image has a gradient
    top, left, bottom, right = geometry.receptive_field_of(row, col)
    inside = np.s_[max(top, 0) : min(bottom, size[0]), max(left, 0) : min(right, size[1])]
    place = np.s_[
        inside[0].start - top : inside[0].stop - top,
        inside[1].start - left : inside[1].stop - left,
    ]
    total[place] += gradient.abs().sum((0, 1)).double().cpu().numpy()[inside]
    seen[place] += 1


def _middle(geometry: Geometry, size: Pair, cells: Pair) -> Pair:
    row, col = geometry.cell_at((size[0] - 1) / 2, (size[1] - 1) / 2)
    return min(row, cells[0] - 1), min(col, cells[1] - 1)


def _gradient(
    net: FullyConvolutional, pixels: Tensor, cell: Pair, index: int | None, output: int
) -> Tensor:
    """The gradient ``(1, C, H, W)`` of one cell's score."""
    images = pixels.to(device_of(net), dtype_of(net)).detach().requires_grad_()
    with torch.enable_grad(), evaluating(net):
        maps = net(images.clone())  # the first layer may work in place
        scores = flattened(maps)[0][output][0, :, cell[0], cell[1]]
        chosen = int(scores.argmax()) if index is None else index
        (gradient,) = torch.autograd.grad(scores[chosen], images)
    return gradient
