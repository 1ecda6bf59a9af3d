"""What several commands print about a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from fcvgg.geometry import Pair
from fcvgg.names import readable

if TYPE_CHECKING:
    from fcvgg.network import FullyConvolutional

_LEAST_NAME = 16
"""Columns of a terminal that a table leaves its first column, of names, before it is broken up."""


def equivalence_report(net: FullyConvolutional) -> RenderableType:
    """The check of a converted network against its source."""
    report = net.equivalence
    title = f"{net.source} as a fully convolutional network, against its source"
    if report is None:
        return titled(title, facts({"check": "not made"}))
    largest = f"{report.max_rel_error:.1e} of the largest score"
    return titled(
        title,
        facts(
            {
                "verdict": "equivalent" if report.passed else "NOT EQUIVALENT",
                "run at": f"{by(report.input_size)} pixels, {report.images} images of noise",
                "largest error": f"{largest} (tolerance {report.tolerance:.0e})",
                "top-1 agreement": f"{report.top1_agreement:.0%}",
                "translation error": f"{report.translation_error:.1e}, input moved by one stride",
            }
        ),
    )


def geometry_report(net: FullyConvolutional, size: Pair | None = None) -> RenderableType:
    """Where the cells lie; for an image of `size`, how many there are."""
    geometry = net.geometry
    y, x = geometry.centre_of(0, 0)
    field = f"{by(geometry.receptive_field)}, cell 0 from pixel {geometry.offset}"
    found = {
        "native size": by(net.input_size),
        "window": by(geometry.window),
        "stride": by(geometry.stride),
        "receptive field": field,
        "centre of cell 0": f"({y:g}, {x:g})",
    }
    if size is not None:
        small = any(n < w for n, w in zip(size, geometry.window))
        padded = ", padded with zeros up to the window" if small else ""
        found[f"cells at {by(size)}"] = by(geometry.output_size(size)) + padded
    return titled("Geometry, in pixels, height first", facts(found))


def by(pair: Sequence[int]) -> str:
    """``(480, 640)`` as ``480x640``."""
    return f"{pair[0]}x{pair[1]}"


def count(number: int) -> str:
    """A count in three digits: ``1,792``, ``36.9 K``, ``103 M``, ``1.85 G``."""
    if number < 10_000:
        return f"{number:,}"
    value, unit = float(number), ""
    for larger in "KMGT":
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def titled(title: str, body: RenderableType, foot: str = "") -> RenderableType:
    """A body under a title, which is not broken to the body's width, and over lines at its foot."""
    lines = (Text(line, style="dim") for line in foot.splitlines())
    return Group(Text(title, style="bold"), body, *lines)


def facts(found: Mapping[str, RenderableType]) -> Table:
    """A table of names and values."""
    shown = Table(box=None, show_header=False)
    shown.add_column(style="cyan", no_wrap=True)
    shown.add_column()
    for name, value in found.items():
        shown.add_row(name, value)
    return shown


@dataclass(frozen=True)
class ReportTable:
    """A table whose first `left` columns are flush left, and whose row `marked` stands out.

    On a terminal that is too narrow, headings are broken at spaces; where that is not
    enough, every row becomes a list of facts, since a table would lose the ends of its values.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[RenderableType]]
    left: int = 1
    marked: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [[readable(str(cell)) for cell in column] for column in zip(*self.rows)]
        cells = [max(map(cell_len, column)) for column in columns]
        words = [max(map(cell_len, name.split()), default=0) for name in self.headings]
        wrapped = max(cells[0] - _LEAST_NAME, 0) if cells else 0  # only names are, not values
        for headings in (map(cell_len, self.headings), words):
            widths = [max(pair) for pair in zip(cells, headings)]
            if sum(widths) + 2 * len(widths) - wrapped <= options.max_width:
                yield self._drawn(widths)
                return
        for row in self.rows:
            yield facts(dict(zip(self.headings, row)))
            yield ""

    def _drawn(self, widths: Sequence[int]) -> Table:
        shown = Table(box=None, header_style="cyan", show_header=bool(self.headings))
        for i, (heading, width) in enumerate(zip(self.headings, widths)):
            shown.add_column(
                heading,
                justify="left" if i < self.left else "right",
                vertical="bottom",
                width=width if i else None,
            )
        for i, row in enumerate(self.rows):
            shown.add_row(*row, style="bold green" if i == self.marked else None)
        return shown
