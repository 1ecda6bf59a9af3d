"""`Heatmap`: one class's probability at every pixel, and how it is shown.

matplotlib is imported where it is used, so that importing fcvgg stays light.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fcvgg.errors import ArgumentError, ImageError, check_share
from fcvgg.results.boxes import OVERLAP, CellWindows, ScoredBox
from fcvgg.results.drawing import extent_of, frame, in_colours, png_bytes, reduction
from fcvgg.support.atomic import HEATMAP_ENDINGS, atomic_file, checked_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALPHA = 0.75
COLOUR_MAP = "inferno"
"""Perceptually uniform."""

_LEVELS = 256
_OPAQUE_FROM = 0.5
"""The probability from which colours have their full opacity."""

_MIDDLE_GREY = 0.5

_ROWS = 1 << 20
"""Pixels that are coloured at a time."""

CONTOURS = (0.25, 0.5, 0.75)
"""The probabilities along which a plot draws lines."""

_BOX_COLOUR, _BOX_HALO = "white", "black"


@dataclass(frozen=True, eq=False)
class Heatmap:
    """One class's probability over an image.

    The values are absolute, never stretched to the image's own range, so two heatmaps compare.

    Attributes:
        values: float32 ``(H, W)`` in [0, 1]: the probability of each cell, interpolated between
            the cells' centres and held outside them; NaN where there is no data, since a cell that
            the value depends on sees pixels that are not finite.
        coverage: bool ``(H, W)``: the pixels with data between the outermost centres, where the
            values are interpolated and not held.
        label: the class.
        image: the image that the map speaks about, if it is known.
        windows: the windows of the cells, with their probabilities, for `boxes`.
    """

    values: NDArray[np.float32]
    coverage: NDArray[np.bool_]
    label: str = ""
    image: Image.Image | None = None
    windows: CellWindows | None = None

    @property
    def peak(self) -> tuple[int, int]:
        """The pixel ``(y, x)`` of the highest probability, among those that `coverage` holds.

        Raises:
            ImageError: if it holds none.
        """
        if not self.coverage.any():
            raise ImageError(
                "the heatmap must have a pixel with data to have a peak, got none; look at the "
                "cells of the score map instead"
            )
        inside = np.where(self.coverage, self.values, np.float32(-1))
        y, x = np.unravel_index(int(inside.argmax()), inside.shape)
        return int(y), int(x)

    def boxes(self, threshold: float = 0.5, overlap: float = OVERLAP) -> list[ScoredBox]:
        """Windows of cells that see the class, the most probable of those that overlap.

        Args:
            threshold: the least probability.
            overlap: the largest intersection over union with a better box (torchvision's ``nms``).

        Returns:
            boxes ``(top, left, bottom, right, score)``, half-open and clipped to the image, the
            most probable first.

        Raises:
            ArgumentError: if the heatmap was made without cells, or a value is outside [0, 1].
        """
        if self.windows is None:
            raise ArgumentError(
                "the heatmap must hold windows of cells to have boxes, got none; make it with "
                "net.heatmap"
            )
        height, width = self.values.shape
        return self.windows.best(threshold, overlap, (height, width))

    def overlay(
        self, alpha: float = ALPHA, cmap: str = COLOUR_MAP, boxes: Iterable[ScoredBox] = ()
    ) -> Image.Image:
        """The heatmap laid on its image, of the image's size.

        The image is shown in grey, so that colour always means probability. Where there is nothing
        to show, or no data, it stays untouched; the colours' opacity grows with the probability and
        reaches `alpha` at one half. Without an image the colours stand alone, and grey means that
        there is no data.

        Args:
            alpha: the largest opacity, in [0, 1].
            cmap: the name of a matplotlib colour map.
            boxes: drawn on top with their scores; see `boxes`.

        Raises:
            ArgumentError: if `alpha` is outside [0, 1], or there is no such colour map.
        """
        height, width = self.values.shape
        grey = None if self.image is None else self.image.convert("RGB").convert("L")
        tint = _Tint(alpha, cmap)
        # in strips: colours in float32 take twelve times the memory of the levels
        pixels = np.empty((height, width, 3), np.uint8)
        step = max(_ROWS // width, 1)
        for top in range(0, height, step):
            values = self.values[top : top + step]
            known = ~np.isnan(values)
            levels = np.where(known, values, 0) * _LEVELS  # as matplotlib
            levels = levels.clip(max=_LEVELS - 1).astype(np.uint8)
            if grey is None:
                colours = np.where(known[..., None], tint.colours[levels], _MIDDLE_GREY)
            else:
                under = grey.crop((0, top, width, top + len(values)))
                colours = tint(np.asarray(under, np.float32) / np.float32(255), levels)
            pixels[top : top + step] = np.round(colours * 255).clip(0, 255)
        return _with_boxes(Image.fromarray(pixels), boxes)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        alpha: float = ALPHA,
        cmap: str = COLOUR_MAP,
        contours: Sequence[float] = CONTOURS,
        boxes: Iterable[ScoredBox] = (),
        bar: bool = True,
    ) -> Axes:
        """Draw the overlay with lines of equal probability, a colour bar and a mark at the peak.

        The dashed frame is the hull of the cells' centres; outside it values are held. The colour
        bar shows the colours as they look on middle grey. Large images are drawn reduced.

        Args:
            ax: where to draw; a new figure when None.
            alpha: as for `overlay`.
            cmap: as for `overlay`.
            contours: probabilities along which lines are drawn, within the frame.
            boxes: as for `overlay`.
            bar: draw the colour bar.
        """
        if ax is None:
            from matplotlib import pyplot as plt

            _, ax = plt.subplots(layout="constrained")
        # reduced before it is drawn, since matplotlib holds RGBA of the full size in memory
        step = reduction(self.values.shape)
        drawn = self._reduced(step)
        drawn.draw(ax, (step, step), alpha=alpha, cmap=cmap, contours=contours, boxes=boxes)
        frame(ax, self.values.shape)
        ax.set_title(f"{self.label}: {self._found(2)}".removeprefix(": "))
        if bar:
            blended = self.image is not None
            colour_bar(ax.figure, ax, alpha=alpha, cmap=cmap, blended=blended, contours=contours)
        return ax

    def draw(
        self,
        ax: Axes,
        pixel: tuple[float, float],
        *,
        alpha: float = ALPHA,
        cmap: str = COLOUR_MAP,
        contours: Sequence[float] = CONTOURS,
        boxes: Iterable[ScoredBox] = (),
    ) -> None:
        """Draw overlay, lines, frame and peak, without a title, where an image has its pixels.

        Args:
            ax: where to draw.
            pixel: height and width of a pixel of this heatmap, in pixels of that image.
            alpha: as for `overlay`.
            cmap: as for `overlay`.
            contours: as for `plot`.
            boxes: as for `overlay`, in pixels of that image.
        """
        from matplotlib.patches import Rectangle
        from matplotlib.patheffects import withStroke

        down, across = pixel
        height, width = self.values.shape
        drawn = []
        for box in boxes:
            top, left, bottom, right = (round(n / p) for n, p in zip(box, (down, across) * 2))
            drawn.append(ScoredBox(top, left, bottom, right, box[4]))
        extent = extent_of((height * down, width * across))
        ax.imshow(self.overlay(alpha, cmap, drawn), extent=extent)
        ax.set_axis_off()
        if not self.coverage.any():
            return
        self._draw_contours(ax, contours, pixel)
        (top, bottom), (left, right) = (
            np.flatnonzero(self.coverage.any(axis))[[0, -1]] for axis in (1, 0)
        )
        corner = (left * across - 0.5, top * down - 0.5)
        size = ((right + 1 - left) * across, (bottom + 1 - top) * down)
        halo = [withStroke(linewidth=2, foreground="black")]
        hull = Rectangle(corner, *size, fill=False, color="white")
        hull.set(linestyle="--", linewidth=1, path_effects=halo)
        ax.add_patch(hull)
        y, x = ((n + 0.5) * p - 0.5 for n, p in zip(self.peak, pixel))
        outlined = [withStroke(linewidth=3, foreground="black")]
        ax.plot(x, y, "+", color="white", ms=11, mew=1.5, path_effects=outlined)

    def _reduced(self, step: int) -> Heatmap:
        """The highest value of every `step` by `step` pixels, on the image averaged over them."""
        if step == 1:
            return self
        values, coverage = self.values, self.coverage
        for axis, size in enumerate(self.values.shape):
            # maxima, so that a small detection is not averaged away; fmax ignores NaN
            first = np.arange(0, size, step)
            values = np.fmax.reduceat(values, first, axis)
            coverage = np.logical_or.reduceat(coverage, first, axis)
        image = self.image and in_colours(self.image).reduce(step)
        return Heatmap(values, coverage, self.label, image)

    def _draw_contours(
        self, ax: Axes, contours: Sequence[float], pixel: tuple[float, float]
    ) -> None:
        from matplotlib.patheffects import withStroke

        values = np.ma.masked_array(self.values, ~self.coverage)
        crossed = [c for c in contours if values.min() < c < values.max()]
        if not crossed or min(self.values.shape) < 2:
            return
        y, x = ((np.arange(n) + 0.5) * p - 0.5 for n, p in zip(values.shape, pixel))
        lines = ax.contour(x, y, values, sorted(crossed), colors="white", linewidths=0.8)
        lines.set(path_effects=[withStroke(linewidth=1.8, foreground="black")])

    def save(
        self,
        path: str | Path,
        *,
        alpha: float = ALPHA,
        cmap: str = COLOUR_MAP,
        boxes: Iterable[ScoredBox] = (),
    ) -> Path:
        """Write the overlay as an image, or the values where the name ends in ``.npy``.

        Args:
            path: whose ending is the format.
            alpha: as for `overlay`.
            cmap: as for `overlay`.
            boxes: as for `overlay`.

        Raises:
            ImageError: if the name ends in none of `fcvgg.support.atomic.HEATMAP_ENDINGS`.
            FcvggError: if the file cannot be written.
        """
        path = checked_file(path, "path", HEATMAP_ENDINGS, ImageError)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            if path.suffix.lower() == ".npy":
                np.save(file, self.values)
            else:
                Image.init()
                kind = Image.EXTENSION[path.suffix.lower()]
                self.overlay(alpha, cmap, boxes).save(file, kind)
        return path

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The values, as ``np.asarray(heatmap)`` takes them."""
        if copy is False and dtype is not None and np.dtype(dtype) != self.values.dtype:
            raise ValueError(f"dtype must be {self.values.dtype} to share memory, got {dtype}")
        values = self.values.astype(self.values.dtype if dtype is None else dtype, copy=False)
        return values.copy() if copy and values is self.values else values

    def _repr_png_(self) -> bytes:
        """The overlay, as a notebook shows it: reduced where it is large."""
        return png_bytes(self._reduced(reduction(self.values.shape)).overlay())

    def __repr__(self) -> str:
        height, width = self.values.shape
        return f"Heatmap({self.label!r}, {height}x{width}, {self._found(3, 'peak ')})"

    def _found(self, digits: int, name: str = "") -> str:
        """The highest probability and where it is, in words."""
        if not self.coverage.any():
            return "no data"
        y, x = self.peak
        return f"{name}{self.values[y, x]:.{digits}f} at ({y}, {x})"


def colour_bar(
    figure: Any,
    axes: Any,
    *,
    alpha: float = ALPHA,
    cmap: str = COLOUR_MAP,
    blended: bool = True,
    contours: Sequence[float] = (),
) -> None:
    """Draw the colours of probabilities from 0 to 1 to the right of axes.

    Args:
        figure: what the axes belong to.
        axes: one, or an array of them.
        alpha: as for `Heatmap.overlay`.
        cmap: as for `Heatmap.overlay`.
        blended: show the colours as they look on middle grey, not alone.
        contours: the probabilities along which lines are drawn, to be marked.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    grey = np.full(_LEVELS, _MIDDLE_GREY, np.float32)
    tint = _Tint(alpha, cmap)
    shown = tint(grey, np.arange(_LEVELS)) if blended else tint.colours
    where = {"fraction": 0.046, "pad": 0.03}
    bar = figure.colorbar(ScalarMappable(cmap=ListedColormap(shown)), ax=axes, **where)
    bar.set_label("probability")
    for level in contours:
        bar.ax.axhline(level, color="black", linewidth=1.8)
        bar.ax.axhline(level, color="white", linewidth=0.8)


def _with_boxes(image: Image.Image, boxes: Iterable[ScoredBox]) -> Image.Image:
    """The image with every box's outline and score; the pixels of a box are inside its line."""
    draw = ImageDraw.Draw(image)
    width = max(round(min(image.size) / 200), 1)
    font = ImageFont.load_default(max(min(image.size) / 32, 9))
    for top, left, bottom, right, score in sorted(boxes, key=lambda box: box[4]):
        edges = (left, top, right - 1, bottom - 1)
        inner = tuple(e + d * width for e, d in zip(edges, (1, 1, -1, -1)))
        if inner[2] > inner[0] and inner[3] > inner[1]:
            draw.rectangle(inner, outline=_BOX_HALO, width=width)
        draw.rectangle(edges, outline=_BOX_COLOUR, width=width)
        draw.text(
            (left + 3 * width, top + 2 * width),
            f"{score:.2f}",
            fill=_BOX_COLOUR,
            font=font,
            stroke_width=width,
            stroke_fill=_BOX_HALO,
        )
    return image


def _colours(cmap: str) -> NDArray[np.float32]:
    """The colours ``(256, 3)`` of the probabilities from 0 to 1."""
    from matplotlib import colormaps

    if cmap not in colormaps:
        raise ArgumentError(
            f"cmap must be the name of a matplotlib colour map, such as 'viridis', got {cmap!r}"
        )
    return colormaps[cmap](np.linspace(0, 1, _LEVELS))[:, :3].astype(np.float32)


class _Tint:
    """The colours of probabilities, laid on grey with an opacity that grows up to `alpha`."""

    def __init__(self, alpha: float, cmap: str):
        check_share("alpha", alpha)
        self.colours = _colours(cmap)  # (256, 3)
        rising = np.linspace(0, 1 / _OPAQUE_FROM, _LEVELS, dtype=np.float32)
        opacity = np.float32(alpha) * rising.clip(max=1)
        self._kept, self._added = 1 - opacity, opacity[:, None] * self.colours

    def __call__(self, grey: NDArray[np.float32], levels: NDArray[Any]) -> NDArray[np.float32]:
        """Colours ``(..., 3)`` of probability `levels` (0 to 255) on a picture in [0, 1]."""
        return (grey * self._kept[levels])[..., None] + self._added[levels]
