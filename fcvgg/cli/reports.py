"""What several commands print about a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fcvgg.geometry import Pair

if TYPE_CHECKING:
    from fcvgg.network import FullyConvolutional


def equivalence_report(net: FullyConvolutional) -> RenderableType:
    """The check of a converted network against its source."""
    report = net.equivalence
    title = f"{net.source} as a fully convolutional network, against its source"
    table = facts()
    if report is None:
        table.add_row("check", "none was made")
        return titled(title, table)
    table.add_row("verdict", "equivalent" if report.passed else "NOT EQUIVALENT")
    table.add_row("run at", f"{by(report.input_size)} pixels, {report.images} images of noise")
    table.add_row(
        "largest error",
        f"{report.max_rel_error:.1e} of the largest score (tolerance {report.tolerance:.0e})",
    )
    table.add_row("top-1 agreement", f"{report.top1_agreement:.0%}")
    table.add_row("translation error", f"{report.translation_error:.1e}, input moved by one stride")
    return titled(title, table)


def geometry_report(net: FullyConvolutional, size: Pair | None = None) -> RenderableType:
    """Where the cells lie; for an image of `size`, how many there are."""
    geometry = net.geometry
    table = facts()
    table.add_row("native size", by(net.input_size))
    table.add_row("window", by(geometry.window))
    table.add_row("stride", by(geometry.stride))
    table.add_row(
        "receptive field", f"{by(geometry.receptive_field)}, cell 0 from pixel {geometry.offset}"
    )
    y, x = geometry.centre_of(0, 0)
    table.add_row("centre of cell 0", f"({y:g}, {x:g})")
    if size is not None:
        small = any(n < w for n, w in zip(size, geometry.window))
        padded = ", padded with zeros up to the window" if small else ""
        table.add_row(f"cells at {by(size)}", by(geometry.output_size(size)) + padded)
    return titled("Geometry, in pixels, height first", table)


def by(pair: Pair) -> str:
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


def facts() -> Table:
    """An empty table of names and values."""
    table = Table(box=None, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    return table
