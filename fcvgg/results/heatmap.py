"""`Heatmap`: one class's probability at every pixel, and how it is shown.

matplotlib is imported where it is used, so that importing fcvgg stays light.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcvgg.choices import BoxKind
from fcvgg.errors import ArgumentError, ImageError, check_choice, check_share
from fcvgg.results.boxes import (
    IOU_THRESHOLD,
    CellWindows,
    ScoredBox,
    draw_boxes,
    region_boxes,
)
from fcvgg.results.colours import (
    ALPHA,
    COLOUR_MAP,
    HELD,
    LEVELS,
    colour_table,
    evidence,
    opacity_table,
    probability_ticks,
)
from fcvgg.results.drawing import (
    BAR,
    MIDDLE_GREY,
    colour_bar,
    extent_of,
    frame,
    in_colours,
    in_grey,
    lossless_dpi,
    on_middle_grey,
    panel_size,
    panels,
    picture_of,
    png_bytes,
    reduction,
    saved_by_figure,
)
from fcvgg.support.atomic import HEATMAP_ENDINGS, atomic_file, checked_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from typing_extensions import Unpack


_ROWS = 1 << 18
"""Pixels that are coloured at a time."""

_STRIPES = 80
"""Stripes that the smaller side is wide, where values are held."""


_DRAWN_LEAST = 800
"""Pixels of the longer side that a figure draws at least, of a small image."""

_TICK = 0.19
"""Inches between the labels of a colour bar at least."""


class OverlayOptions(TypedDict, total=False):
    """Options of `Heatmap.overlay`, which `plot`, `figure`, `draw` and `save` take too."""

    alpha: float
    cmap: str
    boxes: Iterable[ScoredBox]
    grey: bool


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
        chance: the probability that says nothing, from which colours rise; see
            `fcvgg.probability.chance_level`.
    """

    values: NDArray[np.float32]
    coverage: NDArray[np.bool_]
    label: str = ""
    image: Image.Image | None = None
    windows: CellWindows | None = None
    chance: float = 0.5

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

    def boxes(
        self,
        threshold: float = 0.5,
        iou_threshold: float = IOU_THRESHOLD,
        *,
        kind: BoxKind = "windows",
        overlap: float | None = None,
    ) -> list[ScoredBox]:
        """Boxes around what has at least a probability, the most probable first.

        Args:
            threshold: the least probability.
            iou_threshold: the largest intersection over union of a window with a better one, as of
                torchvision's ``nms``; regions never overlap.
            kind: ``"windows"`` of cells that see the class, the most probable of those that
                overlap; or ``"regions"``, the extents of connected pixels that `coverage` holds.
            overlap: the former name of `iou_threshold`.

        Returns:
            boxes ``(top, left, bottom, right, score)``, half-open and clipped to the image; the
            score is the window's or the region's highest probability.

        Raises:
            ArgumentError: if windows are wanted and the heatmap was made without cells, or a value
                is outside [0, 1] or unknown.
        """
        check_choice("kind", kind, get_args(BoxKind))
        if kind == "regions":
            check_share("threshold", threshold)
            return region_boxes(self.values, self.coverage & (self.values >= threshold))
        if self.windows is None:
            raise ArgumentError(
                "the heatmap must hold windows of cells to have boxes of them, got none; make it "
                "with net.heatmap, or pass kind='regions'"
            )
        limit = iou_threshold if overlap is None else overlap
        height, width = self.values.shape
        return self.windows.best(threshold, limit, (height, width))

    def overlay(
        self,
        alpha: float = ALPHA,
        cmap: str = COLOUR_MAP,
        boxes: Iterable[ScoredBox] = (),
        *,
        grey: bool = True,
    ) -> Image.Image:
        """The heatmap laid on its image, of the image's size.

        Colour and opacity grow with how far the probability is above chance, as
        `fcvgg.results.colours.evidence` counts it; at chance, below it and where there is no data
        the image stays untouched. Values that are held and not measured are hatched. Without an
        image the colours stand alone, and grey means that there is no data.

        Args:
            alpha: the largest opacity, in [0, 1].
            cmap: the name of a matplotlib colour map.
            boxes: drawn on top with their scores; see `boxes`.
            grey: show the image in grey, so that colour always means probability; its own colours
                if False.

        Raises:
            ArgumentError: if `alpha` is outside [0, 1], or there is no such colour map.
        """
        height, width = self.values.shape
        colours, opacity = colour_table(cmap), opacity_table(alpha)
        image = self.image and (in_grey(self.image) if grey else self.image.convert("RGB"))
        if image is None:
            opacity = np.ones_like(opacity)
        # in strips: colours in float32 take twelve times the memory of the levels
        pixels = np.empty((height, width, 3), np.uint8)
        step = max(_ROWS // width, 1)
        for top in range(0, height, step):
            rows = slice(top, top + step)
            levels = _levels(self.values[rows], self.chance)  # (rows, W)
            share = np.where(self.coverage[rows], 1, self._stripes(rows))
            strength = (opacity[levels] * share)[..., None]  # (rows, W, 1)
            under = MIDDLE_GREY if image is None else _crop(image, rows)
            mixed = under * (1 - strength) + colours[levels] * strength
            pixels[rows] = np.round(mixed * 255).clip(0, 255)
        return draw_boxes(Image.fromarray(pixels), boxes)

    def _stripes(self, rows: slice) -> NDArray[np.float32]:
        """The share of the opacity that held values have: diagonal stripes; 0 without data."""
        height, width = self.values.shape
        wide = max(min(height, width) // _STRIPES, 1)
        y, x = np.ogrid[rows.start : min(rows.stop, height), :width]
        striped = (y + x) // wide % 3 == 0
        return np.where(striped & ~np.isnan(self.values[rows]), np.float32(HELD), np.float32(0))

    def plot(
        self,
        ax: Axes | None = None,
        *,
        contours: Sequence[float] | None = None,
        bar: bool = True,
        **options: Unpack[OverlayOptions],
    ) -> Axes:
        """Draw the overlay with lines of equal probability, a colour bar and a ring at the peak.

        The dashed frame is the hull of the cells' centres; outside it values are held. The colour
        bar shows the colours as they look on middle grey. Large images are drawn reduced.

        Args:
            ax: where to draw; a new figure when None.
            contours: probabilities along which lines are drawn, within the frame; those that label
                the colour bar when None.
            bar: draw the colour bar.
            options: of `overlay`.

        Returns:
            the axes; their figure's `savefig` is theirs too.
        """
        if ax is None:
            from matplotlib import pyplot as plt

            return saved_by_figure(self._own_panel(plt.figure, 110, contours, bar, options))
        self._draw_titled(ax, contours, options)
        if bar:
            self.draw_bar(ax, contours, **options)
        return saved_by_figure(ax)

    def _draw_titled(
        self, ax: Axes, contours: Sequence[float] | None, options: OverlayOptions
    ) -> None:
        # reduced before it is drawn, since matplotlib holds RGBA of the full size in memory
        step = reduction(self.values.shape)
        self._reduced(step).draw(ax, (step, step), contours=contours, **options)
        frame(ax, self.values.shape)
        ax.set_title(self._title(), parse_math=False)

    def _own_panel(
        self,
        make: Any,
        dpi: float,
        contours: Sequence[float] | None,
        bar: bool,
        options: OverlayOptions,
    ) -> Axes:
        """The axes of a figure of its own, in the image's proportions."""
        width, height = panel_size(self.values.shape)
        room = (BAR if bar else 0,)
        made = panels([width], [height], titles=[self._title()], right=room, dpi=dpi, make=make)
        self._draw_titled(made.axes[0, 0], contours, options)
        if bar:
            self.draw_bar(made.axes, contours, cax=made.bar(), **options)
        return made.axes[0, 0]  # type: ignore[no-any-return]

    def _title(self) -> str:
        return f"{self.label}: {self._found(2)}".removeprefix(": ")

    def figure(self, **options: Unpack[OverlayOptions]) -> Figure:
        """What `plot` draws, as a figure in the image's proportions; no pixel is lost up to 1600.

        Args:
            options: of `overlay`.
        """
        from matplotlib.figure import Figure

        ax = self._own_panel(Figure, lossless_dpi(self.values.shape), None, True, options)
        return ax.figure  # type: ignore[return-value]

    def draw(
        self,
        ax: Axes,
        pixel: tuple[float, float],
        *,
        contours: Sequence[float] | None = None,
        **options: Unpack[OverlayOptions],
    ) -> None:
        """Draw overlay, lines, frame and peak, without a title, where an image has its pixels.

        Args:
            ax: where to draw.
            pixel: height and width of a pixel of this heatmap, in pixels of that image.
            contours: as for `plot`.
            options: of `overlay`; boxes are in pixels of that image.
        """
        from matplotlib.patches import Rectangle
        from matplotlib.patheffects import withStroke

        down, across = pixel
        height, width = self.values.shape
        finer = ceil(_DRAWN_LEAST / max(height, width))
        drawn = []
        for box in options.get("boxes", ()):
            edges = (n / p * finer for n, p in zip(box, (down, across) * 2))
            top, left, bottom, right = map(round, edges)
            drawn.append(ScoredBox(top, left, bottom, right, box[4]))
        options["boxes"] = drawn
        overlay = self._enlarged(finer).overlay(**options)
        ax.imshow(overlay, extent=extent_of((height * down, width * across)))
        ax.set_axis_off()
        if not self.coverage.any():
            return
        self._draw_contours(ax, pixel, self._contours(contours))
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
        # a ring, which does not cover what it marks
        look: dict[str, Any] = {
            "mfc": "none",
            "color": "white",
            "ms": 11,
            "mew": 1.5,
            "clip_on": False,
        }
        ax.plot(x, y, "o", path_effects=outlined, **look)

    def draw_bar(
        self,
        axes: Any,
        contours: Sequence[float] | None = None,
        *,
        cax: Axes | None = None,
        **options: Unpack[OverlayOptions],
    ) -> None:
        """Draw the colours of probabilities from chance to 1 to the right of axes, as high as them.

        Args:
            axes: one, or several of one figure.
            contours: as for `plot`; marked on the bar.
            cax: axes for the bar itself, instead of a part of `axes`.
            options: of `overlay`.
        """
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap

        alpha, cmap = options.get("alpha", ALPHA), options.get("cmap", COLOUR_MAP)
        colours = colour_table(cmap)
        if self.image is not None:
            colours = on_middle_grey(colours, opacity_table(alpha)[:, None])
        bar = colour_bar(ScalarMappable(cmap=ListedColormap(colours)), axes, cax)
        ax = bar.ax
        inches = ax.get_position().height * ax.figure.bbox.height / ax.figure.dpi  # type: ignore[union-attr]
        ticks = probability_ticks(self.chance, _TICK / inches)
        places = evidence(ticks, self.chance).tolist()
        bar.set_ticks(places, labels=[f"≤ {ticks[0]:.2g}", *map("{:g}".format, ticks[1:])])
        bar.set_label("probability")
        for level in evidence(self._contours(contours), self.chance):
            ax.axhline(level, color="black", linewidth=1.8)
            ax.axhline(level, color="white", linewidth=0.8)

    def _contours(self, given: Sequence[float] | None) -> Sequence[float]:
        return probability_ticks(self.chance)[1:-1] if given is None else given

    def _enlarged(self, factor: int) -> Heatmap:
        """Every pixel as several, so that stripes and texts on it are finer than it is."""
        if factor == 1:
            return self
        values = self.values.repeat(factor, 0).repeat(factor, 1)
        coverage = self.coverage.repeat(factor, 0).repeat(factor, 1)
        height, width = values.shape
        image = self.image and self.image.resize((width, height), Image.Resampling.NEAREST)
        return replace(self, values=values, coverage=coverage, image=image)

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
        return replace(self, values=values, coverage=coverage, image=image, windows=None)

    def _draw_contours(
        self, ax: Axes, pixel: tuple[float, float], contours: Sequence[float]
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
        self, path: str | Path, *, legend: bool = False, **options: Unpack[OverlayOptions]
    ) -> Path:
        """Write the overlay as an image, or the values where the name ends in ``.npy``.

        Args:
            path: whose ending is the format.
            legend: write what `plot` draws: the class, the peak and a colour bar too. The image
                then has another size.
            options: of `overlay`.

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
                drawn = picture_of(self.figure(**options)) if legend else self.overlay(**options)
                drawn.save(file, kind)
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


def _levels(values: NDArray[Any], chance: float) -> NDArray[np.uint8]:
    """The places of probabilities in the tables of colours and opacities."""
    return np.rint(evidence(values, chance) * (LEVELS - 1)).astype(np.uint8)


def _crop(image: Image.Image, rows: slice) -> NDArray[np.float32]:
    """Rows of an RGB image in [0, 1]."""
    part = image.crop((0, rows.start, image.width, min(rows.stop, image.height)))
    return np.asarray(part, np.float32) / np.float32(255)
