"""`Heatmap`: one class's probability at every pixel, and how it is shown.

matplotlib is imported where it is used, so that importing fcvgg stays light.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fcvgg.errors import ImageError
from fcvgg.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOUR_MAP = "inferno"
"""Perceptually uniform, dark where there is nothing."""


@dataclass(frozen=True)
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

    values: np.ndarray[Any, np.dtype[np.float32]]
    coverage: np.ndarray[Any, np.dtype[np.bool_]]
    label: str = ""
    image: Image.Image | None = None

    @property
    def peak(self) -> tuple[int, int]:
        """The pixel ``(y, x)`` of the highest probability, within the hull of the centres."""
        inside = np.where(self.coverage, self.values, -1.0)
        y, x = np.unravel_index(int(inside.argmax()), inside.shape)
        return int(y), int(x)

    def overlay(self, alpha: float = 0.6, cmap: str = COLOUR_MAP) -> Image.Image:
        """The heatmap laid on its image, of the image's size.

        The opacity of the colours grows with the probability up to `alpha`, so that the image stays
        visible where there is nothing to show. Without an image the colours stand alone.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is no opacity; expected a value in [0, 1]")
        colours = self._colours(cmap)
        if self.image is None:
            return Image.fromarray(np.round(colours * 255).astype(np.uint8))
        picture = np.asarray(self.image.convert("RGB"), dtype=np.float32) / 255
        opacity = alpha * np.sqrt(self.values)[..., None]
        blended = picture * (1 - opacity) + colours * opacity
        return Image.fromarray(np.round(blended * 255).astype(np.uint8))

    def plot(self, ax: Axes | None = None, *, cmap: str = COLOUR_MAP, alpha: float = 0.6) -> Axes:
        """Draw the overlay with a colour bar from 0 to 1 and a mark at the peak.

        The dashed frame is the hull of the cells' centres; outside it values are held.
        """
        from matplotlib import pyplot as plt
        from matplotlib.cm import ScalarMappable
        from matplotlib.patches import Rectangle

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        ax.imshow(self.overlay(alpha, cmap))
        rows, cols = (np.flatnonzero(self.coverage.any(axis)) for axis in (1, 0))
        ax.add_patch(
            Rectangle(
                (cols[0] - 0.5, rows[0] - 0.5),
                len(cols),
                len(rows),
                fill=False,
                edgecolor="white",
                linestyle="--",
                linewidth=0.8,
                alpha=0.8,
            )
        )
        y, x = self.peak
        ax.plot(x, y, "+", color="white", markersize=10, markeredgewidth=1.5)
        ax.set_title(f"{self.label}: {self.values[y, x]:.2f} at ({y}, {x})".removeprefix(": "))
        ax.set_axis_off()
        bar = ax.figure.colorbar(ScalarMappable(cmap=cmap), ax=ax, fraction=0.046, pad=0.03)
        bar.set_label("probability")
        return ax

    def save(self, path: str | Path) -> Path:
        """Write the overlay as an image, or the values where the name ends in ``.npy``."""
        path = Path(path)
        with written_whole(path) as temporary:
            if path.suffix == ".npy":
                with open(temporary, "wb") as file:
                    np.save(file, self.values)
            else:
                formats = Image.registered_extensions()
                if path.suffix.lower() not in formats:
                    raise ImageError(
                        f"{path.name!r} has no image format; use a name in .png, .jpg or .npy"
                    )
                self.overlay().save(temporary, formats[path.suffix.lower()])
        return path

    def _colours(self, cmap: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        from matplotlib import colormaps

        return colormaps[cmap](self.values)[..., :3].astype(np.float32)

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
