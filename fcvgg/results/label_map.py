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
from fcvgg.results.drawing import (
    draw_legend,
    extent_of,
    in_grey,
    legend_size,
    lossless_dpi,
    muted,
    on_middle_grey,
    panel_size,
    panels,
    png_bytes,
    reduction,
    resized,
    saved_by_figure,
    share_text,
)
from fcvgg.support.atomic import atomic_file, checked_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IGNORE_INDEX = 255
"""The label of pixels that are of no class, neither trained on nor counted."""

ALPHA = 0.55

_LINE = (32, 32, 32)
_BORDERS = 400
"""Lines between classes that the smaller side is wide."""

_LEGEND = "class (share of pixels)"


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

    def overlay(self, alpha: float = ALPHA, *, grey: bool = True) -> Image.Image:
        """The colours laid on the image, with lines between the classes; alone without an image.

        Args:
            alpha: the colours' opacity, in [0, 1].
            grey: show the image in grey, so that colour always means a class.

        Raises:
            ArgumentError: if `alpha` is not in [0, 1].
        """
        check_share("alpha", alpha)
        colours = self.coloured()
        if self.image is None:
            return colours
        image = in_grey(self.image) if grey else self.image.convert("RGB")
        blended = Image.blend(muted(image), colours, alpha)
        blended.paste(_LINE, mask=_mask(self._borders()))
        return Image.composite(blended, image, _mask(self.labels != IGNORE_INDEX))

    def _borders(self) -> NDArray[np.bool_]:
        """The pixels below or to the right of those of another class."""
        wide = max(min(self.labels.shape) // _BORDERS, 1)
        found = np.zeros(self.labels.shape, bool)
        found[wide:] |= self.labels[wide:] != self.labels[:-wide]
        found[:, wide:] |= self.labels[:, wide:] != self.labels[:, :-wide]
        return found

    def plot(
        self,
        ax: Axes | None = None,
        *,
        alpha: float = ALPHA,
        legend: bool = True,
        grey: bool = True,
    ) -> Axes:
        """Draw the overlay, with a legend of the classes that are there.

        Args:
            ax: where to draw; a new figure when None.
            alpha: as for `overlay`.
            legend: name the classes and their shares, to the right of the image.
            grey: as for `overlay`.

        Returns:
            the axes; their figure's `savefig` is theirs too.
        """
        if ax is None:
            from matplotlib import pyplot as plt

            return saved_by_figure(self._own_panel(plt.figure, alpha, grey, legend))
        return saved_by_figure(self._drawn(ax, alpha, grey, legend))

    def figure(self, *, alpha: float = ALPHA, grey: bool = True) -> Figure:
        """The overlay with a legend of the classes that are there, in the image's proportions.

        Large images are drawn reduced.
        """
        from matplotlib.figure import Figure

        figure = self._own_panel(Figure, alpha, grey, legend=True).figure
        return figure  # type: ignore[return-value]

    def _own_panel(self, make: Any, alpha: float, grey: bool, legend: bool) -> Axes:
        """The axes of a figure of its own."""
        size = self.labels.shape
        names = [patch.get_label() for patch in self._patches(alpha)]
        right, below = legend_size(names, _LEGEND) if legend else (0.0, 0.0)
        width, height = panel_size(size)
        options: dict[str, Any] = {"right": [right], "below": below, "dpi": lossless_dpi(size)}
        ax = panels([width], [height], make=make, **options).axes[0, 0]
        return self._drawn(ax, alpha, grey, legend)

    def _drawn(self, ax: Axes, alpha: float, grey: bool, legend: bool) -> Axes:
        shown = self._reduced().overlay(alpha, grey=grey)
        ax.imshow(shown, extent=extent_of(self.labels.shape))
        ax.set_axis_off()
        if legend:
            draw_legend(ax, self._patches(1 if self.image is None else alpha), _LEGEND)
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

    def _patches(self, alpha: float) -> list[Any]:
        from matplotlib.patches import Patch

        colours = on_middle_grey(class_colours(len(self.categories)) / 255, alpha)
        return [
            Patch(color=colour, label=f"{name} ({share_text(share)})")
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


def _mask(chosen: NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(chosen.astype(np.uint8) * 255)
