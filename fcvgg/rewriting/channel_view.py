"""Values whose axes run either over channels or over positions, and functions along the former.

A function along axes of channels computes every position by itself, whatever else the source's
value looks like: the map's channels are unfolded into the axes that the source has, the function
is applied, and what comes out is folded into channels again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from fcvgg.rewriting.layouts import Cells, in_order


@dataclass(frozen=True)
class ChannelView:
    """How the axes of a value divide into those of channels and those of positions.

    Attributes:
        channels: int64, of the shape of the channel axes: the map's channel of each index.
        axes: the layout's axes over channels; at each other one only the position changes.
        places: int64, of the shape of the position axes: the window's position of each index.
    """

    channels: Tensor
    axes: tuple[int, ...]
    places: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.channels.shape)

    def inserted(self, sizes: Sequence[int]) -> list[int]:
        """Sizes of the channel axes at their places among all axes, the others 1."""
        shape = [1] * (len(self.axes) + self.places.ndim)
        for axis, size in zip(self.axes, sizes):
            shape[axis] = size
        return shape

    def laid_out(self, cells: Cells, sizes: Sequence[int], **changes: Any) -> Cells:
        """The same positions with other channels: in order, `sizes` along the channel axes."""
        positions = cells.positions
        shape = [1] * (len(self.axes) + self.places.ndim)
        others = (axis for axis in range(len(shape)) if axis not in self.axes)
        for axis, size in zip(others, self.places.shape):
            shape[axis] = size
        channels = torch.arange(prod(sizes)).reshape(self.inserted(sizes))
        layout = channels * positions + self.places.reshape(shape)
        extent = (prod(sizes), *cells.extent[1:])
        plain = layout.shape == extent and self.axes == (0,) and _in_order(self.places)
        return replace(cells, extent=extent, moved=None if plain else layout, **changes)


def _in_order(places: Tensor) -> bool:
    return torch.equal(places.flatten(), torch.arange(places.numel()))


def channel_view(cells: Cells) -> ChannelView | None:
    """The axes of a value over channels and over positions; None if one runs over both."""
    positions = cells.positions
    if cells.moved is None:
        return ChannelView(torch.arange(cells.extent[0]), (0,), in_order(cells.extent[1:]))
    channels, places = cells.moved // positions, cells.moved % positions
    over_places = [axis for axis in range(places.ndim) if _changes(places, axis)]
    if any(_changes(channels, axis) for axis in over_places):
        return None
    axes = tuple(axis for axis in range(places.ndim) if axis not in over_places)
    for axis in reversed(over_places):
        channels = channels.select(axis, 0)
    for axis in reversed(axes):
        places = places.select(axis, 0)
    return ChannelView(channels, axes, places)


def _changes(values: Tensor, axis: int) -> bool:
    return values.shape[axis] > 1 and not bool((values.diff(dim=axis) == 0).all())


def is_flattened(cells: Cells) -> bool:
    """Whether a value's axes tell channels and positions of its window no longer apart.

    What follows treats its elements as the numbers of one cell, whatever their places were.
    """
    if cells.positions == 1:
        return False
    return cells.dims == (cells.elements,) or channel_view(cells) is None
