"""What figures share: sizes at which images are drawn, axes that count pixels, legends."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from fcvgg.geometry import Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN = 1600
"""Largest side of what a figure draws, in pixels, however large the image is."""


MIDDLE_GREY = 0.5

_IMAGE, _BAR, _TITLE = 6.0, 1.1, 0.4
"""Inches of a figure of one image: its longer side, a colour bar's width, a title's height."""


def figure_options(size: Sequence[int], dpi: float | None = None) -> dict[str, Any]:
    """Options of a figure of one image ``(H, W)`` with a title and a colour bar.

    Args:
        size: of the image.
        dpi: dots per inch; as many as lose no pixel of an image up to `DRAWN` when None.
    """
    height, width = (max(n / max(size) * _IMAGE, _IMAGE / 4) for n in size)
    dpi = dpi or max(110, min(max(size), DRAWN) / _IMAGE)
    return {"figsize": (width + _BAR, height + _TITLE), "dpi": dpi, "layout": "constrained"}


def reduction(size: Sequence[int]) -> int:
    """The step at which rows and columns are taken so that no side is longer than `DRAWN`."""
    return -(-max(size) // DRAWN)


def in_colours(image: Image.Image) -> Image.Image:
    """The image in a mode that can be averaged: palettes and one-bit images cannot."""
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def muted(image: Image.Image) -> Image.Image:
    """An RGB image with half of its contrast, so that colours laid on it stay what they are."""
    return image.point([64 + value // 2 for value in range(256)] * 3)


def in_grey(image: Image.Image) -> Image.Image:
    """An RGB image without its colours."""
    return image.convert("RGB").convert("L").convert("RGB")


def on_middle_grey(colours: Any, alpha: Any) -> Any:
    """How colours in [0, 1] look with an opacity on middle grey, as legends show them."""
    return alpha * colours + (1 - alpha) * MIDDLE_GREY


def resized(image: Image.Image, size: Pair) -> Image.Image:
    """The image at another size ``(h, w)``; a smaller one averages, so that no detail is lost."""
    if (image.height, image.width) == size:
        return image
    smaller = size[0] <= image.height and size[1] <= image.width
    kind = Image.Resampling.BOX if smaller else Image.Resampling.BILINEAR
    return in_colours(image).resize((size[1], size[0]), kind)


def extent_of(size: Sequence[float]) -> tuple[float, float, float, float]:
    """Left, right, bottom and top edge of an image ``(H, W)``, for ``Axes.imshow``."""
    return -0.5, size[1] - 0.5, size[0] - 0.5, -0.5


def frame(ax: Axes, size: Sequence[float]) -> None:
    """Limit axes to an image ``(H, W)``, whose pixels they count, and hide ticks and spines."""
    left, right, bottom, top = extent_of(size)
    ax.set(xlim=(left, right), ylim=(bottom, top))
    ax.set_axis_off()


def bar_axes(axes: Any) -> Axes:
    """Axes for a colour bar to the right of others, as high as what those show."""
    import numpy as np
    from matplotlib.colorbar import make_axes
    from matplotlib.transforms import Bbox

    panels: list[Axes] = np.ravel(axes).tolist()
    bar, _ = make_axes(panels, location="right", fraction=0.046, pad=0.03)
    bar.set_box_aspect(None)

    def place(bar: Any, _: Any) -> Bbox:
        # an image seldom fills its slot, which the layout knows alone
        slot = bar.get_position(original=True)
        shown = Bbox.union([panel.get_position() for panel in panels])
        unused = max(panel.get_position(original=True).x1 for panel in panels) - shown.x1
        return Bbox.from_extents(slot.x0 - unused, shown.y0, slot.x1 - unused, shown.y1)

    bar.set_axes_locator(place)
    return bar


def saved_by_figure(ax: Axes) -> Axes:
    """The axes with their figure's `savefig`, so that axes and figures are written alike."""
    ax.savefig = ax.figure.figure.savefig  # type: ignore[attr-defined]  # also in subfigures
    return ax


def draw_legend(ax: Axes, patches: Sequence[Any], title: str, own_figure: bool) -> None:
    """Draw a legend to the right of an image.

    Args:
        ax: the image's axes.
        patches: of matplotlib, with labels.
        title: the legend's.
        own_figure: whether the figure holds nothing else. Its constrained layout makes room for a
            legend of the figure, but not for one outside an image's axes.
    """
    look: dict[str, Any] = {"title": title, "frameon": False, "alignment": "left"}
    if own_figure:
        ax.figure.legend(handles=patches, loc="outside right upper", **look)
    else:
        look |= {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}
        ax.legend(handles=patches, **look)


def picture_of(figure: Figure) -> Image.Image:
    """The figure as an RGB image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG, for notebooks."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
