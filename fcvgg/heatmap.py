"""`Heatmap`: one class's probability at every pixel, and how it is shown.

matplotlib is imported where it is used, so that importing fcvgg stays light.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fcvgg.boxes import OVERLAP, CellWindows, ScoredBox
from fcvgg.errors import ArgumentError, ImageError
from fcvgg.files import HEATMAP_ENDINGS, checked_file, written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALPHA = 0.75
COLOUR_MAP = "inferno"
"""Perceptually uniform."""

_LEVELS = 256
_OPAQUE_FROM = 0.5
"""The probability from which colours have their full opacity."""

_MIDDLE_GREY = 0.5

CONTOURS = (0.25, 0.5, 0.75)
"""The probabilities along which a plot draws lines."""

_BOX_COLOUR, _BOX_HALO = "white", "black"


@dataclass(frozen=True, eq=False)
class Heatmap:
    """One class's probability over an image.

    The values are absolute, never stretched to the image's own range, so two heatmaps compare.

    Attributes:
        values: float32 ``(H, W)`` in [0, 1]: the probability of each cell, interpolated between
            the cells' centres and held outside them.
        coverage: bool ``(H, W)``: the pixels between the outermost centres, where the values are
            interpolated and not held.
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
        """The pixel ``(y, x)`` of the highest probability, within the hull of the centres."""
        inside = np.where(self.coverage, self.values, -1.0)
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
                "the heatmap holds no cells, so it has no boxes; make it with net.heatmap"
            )
        height, width = self.values.shape
        return self.windows.best(threshold, overlap, (height, width))

    def overlay(
        self, alpha: float = ALPHA, cmap: str = COLOUR_MAP, boxes: Iterable[ScoredBox] = ()
    ) -> Image.Image:
        """The heatmap laid on its image, of the image's size.

        The image is shown in grey, so that colour always means probability. Where there is nothing
        to show it stays untouched; the colours' opacity grows with the probability and reaches
        `alpha` at one half. Without an image the colours stand alone.

        Args:
            alpha: the largest opacity, in [0, 1].
            cmap: the name of a matplotlib colour map.
            boxes: drawn on top with their scores; see `boxes`.

        Raises:
            ArgumentError: if `alpha` or `cmap` is none.
        """
        levels = (self.values * _LEVELS).clip(max=_LEVELS - 1).astype(np.uint8)  # as matplotlib
        if self.image is None:
            return _with_boxes(Image.fromarray(_to_bytes(_colours(cmap))[levels]), boxes)
        grey = np.asarray(self.image.convert("RGB").convert("L"), np.float32) / np.float32(255)
        return _with_boxes(Image.fromarray(_to_bytes(_tinted(grey, levels, alpha, cmap))), boxes)

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
        bar shows the colours as they look on middle grey.

        Args:
            ax: where to draw; a new figure when None.
            alpha: as for `overlay`.
            cmap: as for `overlay`.
            contours: probabilities along which lines are drawn, within the frame.
            boxes: as for `overlay`.
            bar: draw the colour bar.
        """
        from matplotlib import pyplot as plt
        from matplotlib.patches import Rectangle
        from matplotlib.patheffects import withStroke

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        outlined = [withStroke(linewidth=3, foreground="black")]
        ax.imshow(self.overlay(alpha, cmap, boxes))
        self._draw_contours(ax, contours)
        rows, cols = (np.flatnonzero(self.coverage.any(axis)) for axis in (1, 0))
        frame = Rectangle(
            (cols[0] - 0.5, rows[0] - 0.5), len(cols), len(rows), fill=False, color="white"
        )
        frame.set(
            linestyle="--", linewidth=1, path_effects=[withStroke(linewidth=2, foreground="black")]
        )
        ax.add_patch(frame)
        y, x = self.peak
        ax.plot(x, y, "+", color="white", ms=11, mew=1.5, path_effects=outlined)
        ax.set_title(f"{self.label}: {self.values[y, x]:.2f} at ({y}, {x})".removeprefix(": "))
        ax.set_axis_off()
        if bar:
            blended = self.image is not None
            colour_bar(ax.figure, ax, alpha=alpha, cmap=cmap, blended=blended, contours=contours)
        return ax

    def _draw_contours(self, ax: Axes, contours: Sequence[float]) -> None:
        from matplotlib.patheffects import withStroke

        values = np.ma.masked_array(self.values, ~self.coverage)
        crossed = [c for c in contours if values.min() < c < values.max()]
        if not crossed or min(self.values.shape) < 2:
            return
        lines = ax.contour(values, sorted(crossed), colors="white", linewidths=0.8)
        lines.set(path_effects=[withStroke(linewidth=1.8, foreground="black")])

    def save(self, path: str | Path) -> Path:
        """Write the overlay as an image, or the values where the name ends in ``.npy``.

        Raises:
            ImageError: if the name ends in none of `fcvgg.files.HEATMAP_ENDINGS`.
            FcvggError: if the file cannot be written.
        """
        path = checked_file(path, "path", HEATMAP_ENDINGS, ImageError)
        with written_whole(path) as temporary, open(temporary, "wb") as file:
            if path.suffix.lower() == ".npy":
                np.save(file, self.values)
            else:
                Image.init()
                self.overlay().save(file, Image.EXTENSION[path.suffix.lower()])
        return path

    def _repr_png_(self) -> bytes:
        """The overlay, as a notebook shows it."""
        buffer = io.BytesIO()
        self.overlay().save(buffer, "PNG")
        return buffer.getvalue()

    def __repr__(self) -> str:
        y, x = self.peak
        height, width = self.values.shape
        return (
            f"Heatmap({self.label!r}, {height}x{width}, peak {self.values[y, x]:.3f} at ({y}, {x}))"
        )


def colour_bar(
    figure: Any,
    axes: Any,
    *,
    alpha: float = ALPHA,
    cmap: str = COLOUR_MAP,
    blended: bool = True,
    contours: Sequence[float] = (),
) -> None:
    """Draw the probabilities' colours, from 0 to 1, beside axes.

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
    shown = _tinted(grey, np.arange(_LEVELS), alpha, cmap) if blended else _colours(cmap)
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
        raise ArgumentError(f"cmap={cmap!r} is unknown; expected a name such as 'viridis'")
    return colormaps[cmap](np.linspace(0, 1, _LEVELS))[:, :3].astype(np.float32)


def _tinted(
    grey: NDArray[np.float32], levels: NDArray[Any], alpha: float, cmap: str
) -> NDArray[np.float32]:
    """Colours ``(..., 3)`` of probability `levels` (0 to 255) over a picture `grey` in [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ArgumentError(f"alpha={alpha} is no opacity; expected a value in [0, 1]")
    opacity = alpha * np.linspace(0, 1 / _OPAQUE_FROM, _LEVELS, dtype=np.float32).clip(max=1)
    colours = opacity[:, None] * _colours(cmap)
    return (grey * (1 - opacity)[levels])[..., None] + colours[levels]


def _to_bytes(colours: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.round(colours * 255).clip(0, 255).astype(np.uint8)
