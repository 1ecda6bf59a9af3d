"""`Heatmap`: one class's probability at every pixel, and how it is shown.

matplotlib is imported where it is used, so that importing fcvgg stays light.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcvgg.errors import ArgumentError, ImageError
from fcvgg.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALPHA = 0.75
COLOUR_MAP = "inferno"
"""Perceptually uniform."""

_LEVELS = 256
_OPAQUE_FROM = 0.5
"""The probability from which colours have their full opacity."""

_MIDDLE_GREY = 0.5


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
    """

    values: NDArray[np.float32]
    coverage: NDArray[np.bool_]
    label: str = ""
    image: Image.Image | None = None

    @property
    def peak(self) -> tuple[int, int]:
        """The pixel ``(y, x)`` of the highest probability, within the hull of the centres."""
        inside = np.where(self.coverage, self.values, -1.0)
        y, x = np.unravel_index(int(inside.argmax()), inside.shape)
        return int(y), int(x)

    def overlay(self, alpha: float = ALPHA, cmap: str = COLOUR_MAP) -> Image.Image:
        """The heatmap laid on its image, of the image's size.

        The image is shown in grey, so that colour always means probability. Where there is nothing
        to show it stays untouched; the colours' opacity grows with the probability and reaches
        `alpha` at one half. Without an image the colours stand alone.

        Args:
            alpha: the largest opacity, in [0, 1].
            cmap: the name of a matplotlib colour map.

        Raises:
            ArgumentError: if `alpha` or `cmap` is none.
        """
        levels = (self.values * _LEVELS).clip(max=_LEVELS - 1).astype(np.uint8)  # as matplotlib
        if self.image is None:
            return Image.fromarray(_to_bytes(_colours(cmap))[levels])
        grey = np.asarray(self.image.convert("RGB").convert("L"), np.float32) / np.float32(255)
        return Image.fromarray(_to_bytes(_tinted(grey, levels, alpha, cmap)))

    def plot(self, ax: Axes | None = None, *, alpha: float = ALPHA, cmap: str = COLOUR_MAP) -> Axes:
        """Draw the overlay with a colour bar from 0 to 1 and a mark at the peak.

        The dashed frame is the hull of the cells' centres; outside it values are held. The colour
        bar shows the colours as they look on middle grey.
        """
        from matplotlib import pyplot as plt
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Rectangle
        from matplotlib.patheffects import withStroke

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        outlined = [withStroke(linewidth=3, foreground="black")]
        ax.imshow(self.overlay(alpha, cmap))
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
        levels = np.arange(_LEVELS)
        grey = np.full(_LEVELS, _MIDDLE_GREY, np.float32)
        shown = _colours(cmap) if self.image is None else _tinted(grey, levels, alpha, cmap)
        bar = ax.figure.colorbar(
            ScalarMappable(cmap=ListedColormap(shown)), ax=ax, fraction=0.046, pad=0.03
        )
        bar.set_label("probability")
        return ax

    def save(self, path: str | Path) -> Path:
        """Write the overlay as an image, or the values where the name ends in ``.npy``.

        Raises:
            ImageError: if the name's ending is no image format.
            FcvggError: if the file cannot be written.
        """
        path = Path(path)
        kind = "npy" if path.suffix.lower() == ".npy" else _image_format(path)
        with written_whole(path) as temporary, open(temporary, "wb") as file:
            if kind == "npy":
                np.save(file, self.values)
            else:
                self.overlay().save(file, kind)
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


def _colours(cmap: str) -> NDArray[np.float32]:
    """The colours ``(256, 3)`` of the probabilities from 0 to 1."""
    from matplotlib import colormaps

    if cmap not in colormaps:
        raise ArgumentError(
            f"cmap={cmap!r} is unknown; expected a name such as 'viridis'"
        )
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


def _image_format(path: Path) -> str:
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ImageError(
            f"{path.name!r} has no image format; expected a name in .png, .jpg or .npy"
        )
    return kind
