"""What every layer of a network sees: a table of receptive fields."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import overload

from torch import nn

from fcvgg.conversion import convert
from fcvgg.errors import InputSizeError
from fcvgg.geometry import Pair, checked_size
from fcvgg.network import FullyConvolutional
from fcvgg.rewriting.program import LayerRecord
from fcvgg.support.tables import text_table

_COLUMNS = (
    "layer",
    "kind",
    "kernel",
    "stride",
    "receptive field",
    "output stride",
    "offset",
    "output",
    "parameters",
    "multiply-adds",
)


@dataclass(frozen=True)
class LayerRow:
    """One layer. Extents are ``(h, w)`` in input pixels unless said otherwise.

    Attributes:
        name: the layer's path in the source model.
        kind: its class.
        kernel: ``(h, w)`` in elements of its input.
        stride: ``(h, w)`` in elements of its input.
        dilation: ``(h, w)`` in elements of its input.
        receptive_field: all pixels that one output depends on, padding included.
        output_stride: pixels between neighbouring outputs.
        offset: first pixel of the receptive field of output 0.
        output_size: outputs for an input of the table's size.
        channels: output channels.
        parameters: how many the layer has.
        multiply_adds: for an input of the table's size.
    """

    name: str
    kind: str
    kernel: Pair
    stride: Pair
    dilation: Pair
    receptive_field: Pair
    output_stride: Pair
    offset: Pair
    output_size: Pair
    channels: int
    parameters: int
    multiply_adds: int


class LayerTable(Sequence[LayerRow]):
    """The rows of `receptive_fields`, in order of computation; printing it shows a table.

    ``table["features.30"]`` finds a layer by its name.
    """

    def __init__(self, rows: Iterable[LayerRow], input_size: Pair):
        self.rows = tuple(rows)
        self.input_size = input_size

    @overload
    def __getitem__(self, key: int | str) -> LayerRow: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[LayerRow]: ...
    def __getitem__(self, key: int | str | slice) -> LayerRow | Sequence[LayerRow]:
        if isinstance(key, str):
            for row in self.rows:
                if row.name == key:
                    return row
            names = [row.name for row in self.rows]
            near = difflib.get_close_matches(key, names, 4)
            hint = f"near: {', '.join(near)}" if near else f"the first is {names[0]}"
            raise KeyError(f"no layer {key!r}; {hint}")
        return self.rows[key]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    @property
    def parameters(self) -> int:
        """Parameters of all layers; those of a layer that is called twice count once."""
        return sum({row.name: row.parameters for row in self.rows}.values())

    @property
    def multiply_adds(self) -> int:
        return sum(row.multiply_adds for row in self.rows)

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, a row per layer, under `headings`."""
        return [
            (
                row.name,
                row.kind,
                short(row.kernel) + (f" d{short(row.dilation)}" if max(row.dilation) > 1 else ""),
                short(row.stride),
                short(row.receptive_field),
                short(row.output_stride),
                f"{row.offset[0]},{row.offset[1]}"
                if len({*row.offset}) > 1
                else f"{row.offset[0]}",
                f"{row.channels}x{row.output_size[0]}x{row.output_size[1]}",
                f"{row.parameters:,}" if row.parameters else "",
                f"{row.multiply_adds:,}" if row.multiply_adds else "",
            )
            for row in self.rows
        ]

    @property
    def headings(self) -> tuple[str, ...]:
        return _COLUMNS

    def __str__(self) -> str:
        totals = f"{self.parameters:,}", f"{self.multiply_adds:,}"
        last = ("total", f"at {short(self.input_size)}", *("",) * 6, *totals)
        lines = [self.headings, *self.cells(), last]
        return text_table(lines, left=2)


def receptive_fields(
    model: nn.Module, *, input_size: int | Iterable[int] | None = None
) -> LayerTable:
    """The receptive field, stride and place of every layer of a model.

    Args:
        model: a classifier that `fcvgg.convert` takes, or a converted network.
        input_size: the size for which output sizes and multiply-adds are counted; the native size
            when None. For a model with a global pool it is the native size too.

    Returns:
        a `LayerTable` of the layers with a kernel or parameters, in order of computation.
    """
    net = model if isinstance(model, FullyConvolutional) else _converted(model, input_size)
    size = net.input_size if input_size is None else checked_size(input_size)
    height, width = (axis.sizes(max(n, axis.window)) for axis, n in zip(net.geometry.axes, size))
    return LayerTable((_row(net, record, height, width) for record in net.program.records), size)


def _converted(model: nn.Module, input_size: int | Iterable[int] | None) -> FullyConvolutional:
    try:
        return convert(model, verify=False)
    except InputSizeError:
        if input_size is None:
            raise
        return convert(model, input_size=input_size, verify=False)


def _row(
    net: FullyConvolutional, record: LayerRecord, height: list[int], width: list[int]
) -> LayerRow:
    geometry = net.geometry.upto(record.step)
    size = (height[record.step], width[record.step])
    windows = record.windows
    return LayerRow(
        name=record.name,
        kind=record.kind,
        kernel=(windows[0].kernel, windows[1].kernel),
        stride=(windows[0].stride, windows[1].stride),
        dilation=(windows[0].dilation, windows[1].dilation),
        receptive_field=geometry.receptive_field,
        output_stride=geometry.stride,
        offset=geometry.offset,
        output_size=size,
        channels=record.channels,
        parameters=record.parameters,
        multiply_adds=record.multiply_adds_per_position * prod(size),
    )


def short(pair: Pair) -> str:
    """``(3, 3)`` as ``3``, ``(3, 5)`` as ``3x5``."""
    return f"{pair[0]}" if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"
