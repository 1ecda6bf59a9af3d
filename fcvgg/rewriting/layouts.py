"""A value of the source model as the converted network computes it: a map and a layout.

At the native size the source computes a value for one image; the converted network computes the
same numbers at every position, as a map whose window of ``(C, H, W)`` elements holds them. The
*layout* says in which order: element j of the source's value is element ``layout.flatten()[j]`` of
the window, counted in C, H, W order. Reshapes and permutations of the source are applied to the
layout alone, by running them on it, so no flatten order is special.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import isclose, prod
from typing import Any

import torch
from torch import Tensor, fx

from fcvgg.geometry import KernelGeometry, KernelPair, Pair
from fcvgg.probability import UNKNOWN
from fcvgg.rewriting.capture import BATCH


@dataclass(frozen=True)
class Cells:
    """A map of the converted network and how the source's value lies in its window.

    Attributes:
        node: what computes the map ``(N, C, h, w)`` in the new graph.
        step: the map's place in the geometry.
        extent: ``(C, H, W)`` of the window that one source value fills.
        moved: the layout where elements were moved, None where it is the window in order: a map of
            features has millions of elements, and none of them is asked for.
        dilation: map positions between neighbouring elements of the window.
        activation: what the values are: logits, or what the last activation made of them.
        share: what probabilities have been multiplied by: the halves of an average have 0.5.
        margin: pixels ``(y, x)`` by which padding of the head (``padding="same"``) put the window
            of cell 0 before the image; None where the head has not been padded.
        unseen: pixels ``(y, x)`` at the end of the native image that strides leave out.
        average: the positions, counted on the map, whose mean is still to be taken of values that
            are affine in those of a global average; it commutes with what made them. None of other
            values.
        final: the function of `fcvgg.rewriting.rules.registry.LayerKind.final` that the source
            computes of that mean.
        batch: the axis of the source's value along which its images lie: 1 of stacked heads
            ``(heads, N, K)``. The layout has no such axis.
    """

    node: fx.Node
    step: int
    extent: tuple[int, int, int]
    moved: Tensor | None = None
    dilation: Pair = (1, 1)
    activation: str = "logits"
    share: float = 1.0
    margin: Pair | None = None
    unseen: Pair = (0, 0)
    average: KernelPair | None = None
    final: str = ""
    batch: int = 0

    @property
    def layout(self) -> Tensor:
        """int64, of the shape of the source's value without its batch."""
        return in_order(self.extent) if self.moved is None else self.moved

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape of the layout."""
        return self.extent if self.moved is None else tuple(self.moved.shape)

    @property
    def positions(self) -> int:
        return self.extent[1] * self.extent[2]

    @property
    def elements(self) -> int:
        return self.extent[0] * self.positions

    @property
    def shape(self) -> str:
        """The shape of the source's value, for messages."""
        return f"({', '.join(map(str, self.shape_for('N')))})"

    def shape_for(self, images: Any) -> tuple[Any, ...]:
        """The shape of the source's value for a number of images."""
        return (*self.dims[: self.batch], images, *self.dims[self.batch :])

    def axis_of(self, dim: int) -> int | None:
        """The layout's axis of a dimension of the source's value; None of the images'."""
        dim %= len(self.dims) + 1
        return None if dim == self.batch else dim - (dim > self.batch)

    @property
    def is_map(self) -> bool:
        """Whether the source's value is the window itself: ``(C, H, W)`` in order."""
        return self.moved is None or torch.equal(self.moved, in_order(self.extent))

    @property
    def fills_window(self) -> bool:
        """Whether the layout holds every element of the window once, in any order."""
        if self.moved is None:
            return True
        # a permutation of the window's elements, sorted, is their range
        return torch.equal(self.layout.flatten().sort().values, torch.arange(self.elements))

    def elements_within(self, other: Cells) -> str:
        """Whether all elements of the map, some or none (``""``) are among those of `other`."""
        if other.moved is None or self.moved is other.moved:
            return "all"
        # A table of all elements in place of a search: layouts have as many as the features.
        among = torch.zeros(max(self.elements, other.elements), dtype=torch.bool)
        among[other.moved.flatten()] = True
        inside = among[self.layout]
        return "all" if inside.all() else "some" if inside.any() else ""

    @property
    def meaning(self) -> str:
        """What the values are as scores: unknown where probabilities are not whole."""
        return self.activation if isclose(self.share, 1, rel_tol=1e-6) else UNKNOWN

    def meaning_of(self, activation: str, share: float = 1.0) -> Cells:
        """The same values, said to be something else."""
        return replace(self, activation=activation, share=share)

    def alike(self, other: Cells) -> Cells:
        """The same values, said to be what others are."""
        return self.meaning_of(other.activation, other.share)

    def computed_from(self, operands: Iterable[Cells]) -> Cells:
        """The same values, said to be what a function of `operands` is: still logits, or unknown.

        Layers that make new scores, fully connected ones and convolutions, make logits of anything.
        """
        plain = all(cells.activation == "logits" for cells in operands)
        return self.meaning_of("logits" if plain else UNKNOWN)

    def pooled_from(self, x: Cells, kind: str, divisor: int | None = None) -> Cells:
        """The same values, said to be what a pool of `x` is."""
        averages = kind == "avg" and divisor is None and x.activation == "probabilities"
        within = kind in ("avg", "max") and divisor is None and x.activation == "sigmoid"
        return self.alike(x) if averages or within else self.computed_from([x])

    def averaged_over(self, positions: Pair, dilation: Pair) -> Cells:
        """The same values, said to be averaged over neighbours, or to be so later."""
        height, width = (
            KernelGeometry(n, dilation=d) if n > 1 else before
            for n, d, before in zip(positions, dilation, self.average or _ALONE)
        )
        return replace(self, average=(height, width))

    def joined_with(self, others: Iterable[Cells]) -> Cells:
        """The same values, said to be computed from others too, which may see more."""
        unseen = [cells.unseen for cells in (self, *others)]
        return replace(self, unseen=(min(y for y, _ in unseen), min(x for _, x in unseen)))

    def same_layout(self, other: Cells) -> bool:
        return (
            self.extent == other.extent
            and self.batch == other.batch
            and self.dilation == other.dilation
            and (self.moved is other.moved or torch.equal(self.layout, other.layout))
        )


_ALONE: KernelPair = (KernelGeometry(), KernelGeometry())


@dataclass(frozen=True)
class Constant:
    """A parameter, buffer or tensor literal of the source: its node and its value's shape."""

    node: fx.Node
    value: Tensor


@dataclass(frozen=True)
class Unusable:
    """A value of the source that is none on maps; what takes it is refused, saying why."""

    why: str


def in_order(extent: tuple[int, ...]) -> Tensor:
    """The layout of a value that is the window itself."""
    return torch.arange(prod(extent)).reshape(extent)  # (C, H, W)


def rearranged(cells: Cells, operation: Callable[[Tensor], Any]) -> list[Cells] | None:
    """The values after an operation that only moves elements, run on a batch of indices.

    None if the operation moves elements between the images of the batch.
    """
    # Every image of the batch gets indices of its own, so that an operation which moves elements
    # from one image to another shows in the numbers that come out.
    images = [cells.layout + i * cells.elements for i in range(BATCH)]
    result = operation(torch.stack(images, cells.batch))
    values = []
    for moved in result if isinstance(result, (tuple, list)) else [result]:
        # the images may have come to lie along another axis, in which their indices differ
        axes = sorted(range(moved.ndim), key=lambda axis: axis != cells.batch)
        batch = next((axis for axis in axes if _images_along(moved, axis, cells.elements)), None)
        if batch is None:
            return None
        values.append(replace(cells, moved=moved.select(batch, 0), batch=batch))
    return values


def _images_along(moved: Tensor, axis: int, elements: int) -> bool:
    """Whether an axis of indices runs over the images, each with the elements of the first."""
    if moved.shape[axis] != BATCH or not moved.numel():
        return False
    # The other images must hold the first one's indices, shifted by what was added to theirs.
    first, *rest = moved.unbind(axis)
    if first.min() < 0 or first.max() >= elements:
        return False
    return all(torch.equal(first + i * elements, x) for i, x in enumerate(rest, 1))


def channels_along(cells: Cells, axis: int) -> Tensor | None:
    """The channel of each index along a layout's axis; None if positions change along it."""
    if cells.moved is None and axis in (0, -3):
        return torch.arange(cells.extent[0])
    # Element i of the window lies in channel i // positions, at position i % positions.
    rows = cells.layout.movedim(axis, 0).reshape(cells.layout.shape[axis], -1)  # (n, others)
    channels = rows[:, 0] // cells.positions  # (n,)
    positions = rows[0] - channels[0] * cells.positions  # (others,)
    within = bool((positions >= 0).all() and (positions < cells.positions).all())
    # Each row is one channel, and all rows hold the same positions in the same order.
    regular = torch.equal(rows, channels[:, None] * cells.positions + positions)
    return channels if within and regular else None


def chosen_channels(cells: Cells) -> tuple[Tensor, Tensor] | None:
    """The channels that a value holds at every position, also where they repeat, in its order.

    Returns:
        the channels, and the layout on a map of them; None if it holds others at some positions.
    """
    channels, places = (
        cells.layout.flatten() // cells.positions,
        cells.layout.flatten() % cells.positions,
    )
    count = len(places) // cells.positions
    if not count or count * cells.positions != len(places):
        return None
    # The elements are sorted by position; the stable sort keeps their order within each one.
    order = places.argsort(stable=True).reshape(cells.positions, count)  # (positions, count)
    rows = torch.arange(cells.positions)[:, None]  # (positions, 1)
    chosen = channels[order]  # (positions, count)
    if not torch.equal(places[order], rows.expand_as(order)):
        return None
    # A choice that differs between positions could not be one choice of the map's channels.
    if not torch.equal(chosen, chosen[:1].expand_as(chosen)):
        return None
    layout = torch.empty_like(places)
    layout[order] = torch.arange(count) * cells.positions + rows  # (positions, count)
    return chosen[0], layout.reshape(cells.dims)


def with_channels(cells: Cells, axis: int, channels: int, **changes: Any) -> Cells:
    """The same positions with other channels along `axis`, all of them and in order."""
    extent = (channels, *cells.extent[1:])
    if cells.moved is None and axis in (0, -3):
        return replace(cells, extent=extent, **changes)
    positions = cells.layout.movedim(axis, 0)[0] % cells.positions  # the layout without `axis`
    shape = (channels,) + (1,) * positions.ndim
    layout = torch.arange(channels).reshape(shape) * cells.positions + positions
    return replace(cells, extent=extent, moved=layout.movedim(0, axis), **changes)


def pooled_layout(cells: Cells, axes: tuple[int, ...]) -> tuple[Pair, Tensor] | None:
    """What reducing the layout's `axes` leaves, where it takes all rows, all columns or both.

    Returns:
        the positions ``(h, w)`` that are left and the layout over them; None if the reduction takes
        some positions only, or elements of several channels.
    """
    channels, height, width = cells.extent
    kept = [i for i in range(cells.layout.ndim) if i not in axes]
    # The elements that are reduced to one value stand along the last axis.
    rows = cells.layout.permute(*kept, *axes).flatten(len(kept))
    distinct = bool((rows.sort(-1).values.diff(dim=-1) > 0).all())
    # Pooling over rows and columns, over rows, or over columns: tried on indices, whatever the
    # order of the source's axes. An element repeated among those reduced would count twice.
    for bins in ((1, 1), (1, width), (height, 1)):
        covers = (height // bins[0], width // bins[1])
        left = in_order((channels, *bins))
        left_of = left.repeat_interleave(covers[0], 1).repeat_interleave(covers[1], 2).flatten()
        # the bin of each reduced element; all elements of one value must share it
        groups = left_of[rows]
        alike = torch.equal(groups, groups[..., :1].expand_as(groups))
        if distinct and alike and rows.shape[-1] == covers[0] * covers[1]:
            return bins, groups[..., 0]
    return None


def of_blocks(cells: Cells, block: Pair) -> Tensor:
    """The layout over another map, in which the elements of each block have become channels.

    Element ``(c, y, x)`` of the window is ``((c * bh + y % bh) * bw + x % bw, y // bh, x // bw)``
    there, as in the result of torch's pixel unshuffle.
    """
    (bh, bw), (_, height, width) = block, cells.extent
    layout = cells.layout
    channel, y, x = layout // cells.positions, layout % cells.positions // width, layout % width
    channel = (channel * bh + y % bh) * bw + x % bw
    return (channel * (height // bh) + y // bh) * (width // bw) + x // bw
