"""`LabelMap`: one class for every pixel, and how it is shown.

matplotlib is imported where it is used, so that importing fcvgg stays light.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcvgg.errors import ImageError, check_share
from fcvgg.results.colours import class_colours
from fcvgg.results.drawing import DRAWN, draw_legend, extent_of, png_bytes, reduction, resized
from fcvgg.support.atomic import atomic_file, checked_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IGNORE_INDEX = 255
"""The label of pixels that are of no class, neither trained on nor counted."""

ALPHA = 0.55

_IMAGE_INCHES, _LEGEND_INCHES = 6.0, 2.0


@dataclass(frozen=True, eq=False)
class LabelMap:
    """The class of every pixel of an image.

    Attributes:
        labels: integers ``(H, W)``, indices into `categories`, or `IGNORE_INDEX` for pixels
            without data.
        categories: the names of the classes.
        image: the image that the labels speak about, if it is known.
    """

    labels: NDArray[Any]
    categories: tuple[str, ...]
    image: Image.Image | None = None

    @property
    def shares(self) -> dict[str, float]:
        """The share of the labelled pixels that each class has."""
        known = self.labels[self.labels != IGNORE_INDEX]
        counts = np.bincount(known.ravel(), minlength=len(self.categories))
        return {name: n / max(known.size, 1) for name, n in zip(self.categories, counts.tolist())}

    def coloured(self) -> Image.Image:
        """The labels alone, each class in its colour, what is ignored in black."""
        return Image.fromarray(self._palette()[self.labels.astype(np.uint8)])

    def overlay(self, alpha: float = ALPHA) -> Image.Image:
        """The colours laid on the image, which is shown in grey; alone where there is none.

        Raises:
            ArgumentError: if `alpha` is not in [0, 1].
        """
        check_share("alpha", alpha)
        colours = self.coloured()
        if self.image is None:
            return colours
        grey = self.image.convert("RGB").convert("L").convert("RGB")
        known = Image.fromarray((self.labels != IGNORE_INDEX).astype(np.uint8) * 255)
        return Image.composite(Image.blend(grey, colours, alpha), grey, known)

    def plot(self, ax: Axes | None = None, *, alpha: float = ALPHA, legend: bool = True) -> Axes:
        """Draw the overlay, with a legend of the classes that are there.

        Args:
            ax: where to draw; a new figure when None.
            alpha: as for `overlay`.
            legend: name the classes and their shares, to the right of the image.
        """
        if ax is None:
            from matplotlib import pyplot as plt

            ax = plt.figure(layout="constrained").subplots()
            return self._drawn(ax, alpha, legend, own_figure=True)
        return self._drawn(ax, alpha, legend, own_figure=False)

    def figure(self, *, alpha: float = ALPHA) -> Figure:
        """The overlay with a legend of the classes that are there, in the image's proportions.

        Large images are drawn reduced.
        """
        from matplotlib.figure import Figure

        height, width = self.labels.shape
        down = max(_IMAGE_INCHES * height / width, _LEGEND_INCHES)
        figure = Figure(
            figsize=(_IMAGE_INCHES + _LEGEND_INCHES, down),
            dpi=max(110, min(width, DRAWN) / _IMAGE_INCHES),  # no pixel is lost up to there
            layout="constrained",
        )
        self._drawn(figure.subplots(), alpha, legend=True, own_figure=True)
        return figure

    def _drawn(self, ax: Axes, alpha: float, legend: bool, own_figure: bool) -> Axes:
        ax.imshow(self._reduced().overlay(alpha), extent=extent_of(self.labels.shape))
        ax.set_axis_off()
        if legend:
            draw_legend(ax, self._patches(), "class (share of pixels)", own_figure)
        return ax

    def _reduced(self) -> LabelMap:
        """The labels at the size at which a figure draws them, on the averaged image."""
        step = reduction(self.labels.shape)
        if step == 1:
            return self
        labels = self.labels[step // 2 :: step, step // 2 :: step]
        height, width = labels.shape
        image = self.image and resized(self.image, (height, width))
        return LabelMap(labels, self.categories, image)

    def _palette(self) -> NDArray[np.uint8]:
        """The colour of every label, ``uint8 (256, 3)``; black for what is not a class."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self.categories)] = class_colours(len(self.categories))
        return table

    def _patches(self) -> list[Any]:
        from matplotlib.patches import Patch

        colours = class_colours(len(self.categories)) / 255
        return [
            Patch(color=colour, label=f"{name} ({share:.0%})")
            for (name, share), colour in zip(self.shares.items(), colours)
            if share > 0
        ]

    def save(self, path: str | Path) -> Path:
        """Write the labels as a PNG of class indices with a palette, as `MaskFolder` reads them.

        Raises:
            ImageError: if the name does not end in ``.png``, or there are more than 255 classes.
            FcvggError: if the file cannot be written.
        """
        path = checked_file(path, "path", (".png",), ImageError)  # which keeps labels exact
        if len(self.categories) > IGNORE_INDEX:
            raise ImageError(
                f"a PNG must have at most {IGNORE_INDEX} classes, got {len(self.categories)}"
            )
        indexed = Image.fromarray(self.labels.astype(np.uint8))
        indexed.putpalette(self._palette().tobytes())
        with atomic_file(path) as temporary:
            indexed.save(temporary, "PNG")
        return path

    def _repr_png_(self) -> bytes:
        """The overlay, as a notebook shows it: reduced where it is large."""
        return png_bytes(self._reduced().overlay())

    def __repr__(self) -> str:
        height, width = self.labels.shape
        most = sorted(self.shares.items(), key=lambda item: -item[1])[:3]
        shown = ", ".join(f"{name} {share:.0%}" for name, share in most if share)
        return f"LabelMap({height}x{width} pixels, {len(self.categories)} classes: {shown})"
