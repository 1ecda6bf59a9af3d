"""What figures share: panels of exact size, with room for titles, bars and legends."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcvgg.geometry import Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

DRAWN = 1600
"""Largest side of what a figure draws, in pixels, however large the image is."""

MIDDLE_GREY = 0.5

IMAGE = 6.0
"""Inches of the longer side of an image that has a figure of its own."""

BAR = 1.2
"""Inches of a colour bar with its labels, to the right of a panel."""

TITLE_POINTS = 12.0
"""The size of titles by matplotlib's default."""

_SHORTEST_BAR = 1.1
_BAR_SHARE = 0.4
"""Of what a bar takes from a user's axes; its labels need the rest."""

_GAP, _BAR_WIDTH, _TITLE_GAP = 0.12, 0.2, 0.1
_CHARACTER, _LINE = 0.6, 1.3
"""Width and height of text, as parts of its size."""


def panel_size(size: Sequence[float], longer: float = IMAGE) -> tuple[float, float]:
    """Width and height in inches of an image ``(H, W)`` whose longer side is given."""
    return size[1] / max(size) * longer, size[0] / max(size) * longer


def lossless_dpi(size: Sequence[int]) -> float:
    """Dots per inch at which an image ``(H, W)`` up to `DRAWN` loses no pixel."""
    return max(110.0, min(max(size), DRAWN) / IMAGE)


@dataclass(frozen=True)
class Panels:
    """A figure of panels whose places are exact, since a layout engine cuts titles and bars off.

    Attributes:
        figure: of matplotlib.
        axes: ``(rows, columns)``.
        ends: inches at which the columns end, with the titles that are wider than their panels.
    """

    figure: Figure
    axes: NDArray[Any]
    ends: tuple[float, ...]

    def bar(self, column: int = -1, row: int = 0, last: int = -1) -> Axes:
        """Axes for a colour bar to the right of a column, from the top of a row down to another."""
        width, height = self.figure.get_size_inches()
        top = self.axes[row, column].get_position().y1 * height
        bottom = self.axes[last, column].get_position().y0 * height
        bottom = min(bottom, top - _SHORTEST_BAR)
        # a title that is wider than its panel stands between the parts of a longer bar
        one = row == last % len(self.axes)
        end = self.axes[row, column].get_position().x1 * width if one else self.ends[column]
        place = (end + _GAP, bottom, _BAR_WIDTH, top - bottom)
        return self.figure.add_axes(tuple(np.divide(place, (width, height) * 2)))


def panels(
    widths: Sequence[float],
    heights: Sequence[float],
    *,
    titles: Sequence[str] = (),
    points: float = TITLE_POINTS,
    right: Sequence[float] = (BAR,),
    top: float = 0.0,
    below: float = _SHORTEST_BAR,
    dpi: float = 110,
    make: Callable[..., Figure] | None = None,
) -> Panels:
    """A figure with a panel for each width and height.

    Args:
        widths: inches of the columns.
        heights: inches of the rows.
        titles: what will stand above the panels.
        points: the size of the titles.
        right: inches to the right of the last columns.
        top: inches above all panels, for a title of the figure.
        below: inches from the top of the last row down to the figure's end, at least.
        dpi: dots per inch.
        make: the figure's class or function; matplotlib's ``Figure`` when None.
    """
    from matplotlib.figure import Figure

    lines = [title.split("\n") for title in titles]
    above = max(map(len, lines), default=0) * points * _LINE / 72 + _TITLE_GAP
    caption = max((len(line) for title in lines for line in title), default=0)
    room = [0.0] * (len(widths) - len(right)) + [*right]
    slots = np.maximum(widths, caption * points * _CHARACTER / 72)
    ends = np.cumsum(slots + _GAP) + np.cumsum([0.0, *room[:-1]])
    tops = np.cumsum([above + before for before in (top, *heights[:-1])])
    size = ends[-1] + room[-1] + _GAP, tops[-1] + max(heights[-1], below) + _TITLE_GAP
    figure = (make or Figure)(figsize=size, dpi=dpi)
    axes = np.empty((len(heights), len(widths)), object)
    for row, col in np.ndindex(axes.shape):
        left = ends[col] - (slots[col] + widths[col]) / 2
        place = left, size[1] - tops[row] - heights[row], widths[col], heights[row]
        axes[row, col] = figure.add_axes(tuple(np.divide(place, size * 2)))
        axes[row, col].set_axis_off()
    return Panels(figure, axes, tuple(ends))


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


def share_text(share: float) -> str:
    """A share in per cent, which is 0 or 100 only where it is."""
    if 0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


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


def colour_bar(shown: Any, axes: Any, cax: Axes | None = None) -> Colorbar:
    """A colour bar to the right of axes, as high as what they show.

    Args:
        shown: a mappable of matplotlib.
        axes: one, or several of one figure.
        cax: axes for the bar itself, instead of a part of `axes`.
    """
    from matplotlib.colorbar import make_axes
    from matplotlib.transforms import Bbox

    others: list[Axes] = np.ravel(axes).tolist()
    if cax is not None:
        return others[0].figure.colorbar(shown, cax=cax)
    ax, _ = make_axes(others, location="right", fraction=0.1, pad=0.03)
    bar = others[0].figure.colorbar(shown, cax=ax)

    def place(ax: Any, _: Any) -> Bbox:
        ax.set_box_aspect(None)  # the layout makes bars 20 times as high as wide
        # an image seldom fills its slot, which the layout knows alone
        for other in others:
            other.apply_aspect()
        slot = ax.get_position(original=True)
        images = Bbox.union([other.get_position() for other in others])
        unused = max(other.get_position(original=True).x1 for other in others) - images.x1
        left, width = slot.x0 - unused, slot.width * _BAR_SHARE
        return Bbox.from_bounds(left, images.y0, width, images.height)

    ax.set_axes_locator(place)  # instead of the bar's own, which sets the aspect too
    return bar


def saved_by_figure(ax: Axes) -> Axes:
    """The axes with their figure's `savefig`, so that axes and figures are written alike."""
    ax.savefig = ax.figure.figure.savefig  # type: ignore[attr-defined]  # also in subfigures
    return ax


LEGEND_POINTS = 10.0


def legend_size(labels: Sequence[str], title: str) -> tuple[float, float]:
    """Width and height in inches that `draw_legend` takes."""
    longest = max(map(len, (*labels, title)))
    line = LEGEND_POINTS * 1.5 / 72
    return longest * LEGEND_POINTS * _CHARACTER / 72 + 0.7 + _GAP, (len(labels) + 1) * line + 0.1


def draw_legend(ax: Axes, patches: Sequence[Any], title: str) -> None:
    """Draw a legend to the right of an image, from its top on."""
    from matplotlib.transforms import ScaledTranslation

    gap = ScaledTranslation(_GAP, 0, ax.figure.dpi_scale_trans)  # type: ignore[union-attr]
    ax.legend(
        handles=patches,
        title=title,
        frameon=False,
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1, 1),
        bbox_transform=ax.transAxes + gap,
        borderaxespad=0,
        borderpad=0.2,
        fontsize=LEGEND_POINTS,
    )


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
