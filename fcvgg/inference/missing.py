"""Pixels that are not finite, and the cells that see them.

A cell sees a pixel if the positions that each layer reads lead from the cell to the pixel. Layers
and engines treat NaN differently: a maximum may hide it, a tile of Winograd's algorithm spreads it.
So the network gets zeros there, and the cells that see such pixels become NaN by geometry, whatever
computes the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fcvgg.errors import UnsupportedLayerError
from fcvgg.geometry import Geometry, KernelGeometry, KernelPair
from fcvgg.inference.schedule import AxisRanges
from fcvgg.inference.stages import Stage, stages_of
from fcvgg.rewriting.modules import cut_to
from fcvgg.rewriting.sliding import Part, Sliding


@dataclass(frozen=True)
class Reader:
    """What an operation reads: positions of earlier ones, 0 being the image.

    Attributes:
        inputs: the operations that it reads; a join takes what all of its maps have.
        windows: along the height and the width.
        border: how positions outside the map are filled, see `Sliding`.
    """

    inputs: tuple[int, ...]
    windows: KernelPair = (KernelGeometry(), KernelGeometry())
    border: str = "constant"

    def seen(self, masks: Sequence[Tensor]) -> Tensor:
        """Which outputs read a marked position of the inputs, bool ``(N, 1, h, w)``."""
        mask = cut_to(masks[0], *masks[1:])
        for other in masks[1:]:
            mask = mask | cut_to(other, mask)
        for dim, window in zip((2, 3), self.windows):
            mask = _seen_along(mask, dim, window, self.border)
        return mask

    def stage(self) -> Stage:
        """The same as a stage, for strips of the image that come with their border."""
        if self.windows == (KernelGeometry(), KernelGeometry()):
            return Stage("missing", self.inputs, 1, call=self.seen)

        def run(mask: Tensor, part: Part) -> Tensor:
            height, width = self.windows
            inner = height.within(*part.rows), width.within(*part.cols)
            return Reader(self.inputs, inner).seen([mask])

        return Stage("missing", self.inputs, 1, Sliding(self.windows, run, border=self.border))


def _seen_along(mask: Tensor, dim: int, window: KernelGeometry, border: str) -> Tensor:
    """Which outputs along one axis read a marked position: the taps of the kernel, joined."""
    if window.is_identity:
        return mask
    size = mask.shape[dim]
    first = torch.arange(window.output_size(size), device=mask.device)
    first = first * window.stride - window.before
    result: Tensor | None = None
    for tap in range(window.kernel):
        places = (first + tap * window.dilation) // window.repeats
        outside = (places < 0) | (places >= size)
        hit = mask.index_select(dim, places_within(places, size, border))
        if border == "constant" and bool(outside.any()):
            hit &= ~outside.view(-1, 1) if dim == 2 else ~outside
        result = hit if result is None else result.logical_or_(hit)
    assert result is not None
    return result


def places_within(places: Tensor, size: int, border: str) -> Tensor:
    """For positions along an axis, those inside ``[0, size)`` that a border fills them with."""
    if border == "reflect":
        places = (size - 1) - ((size - 1) - places.abs()).abs()
    return places.clamp(0, size - 1)


def readers_of_stages(stages: Sequence[Stage]) -> list[Reader]:
    """What the stages after the image read."""
    return [
        Reader(stage.inputs)
        if stage.sliding is None
        else Reader(stage.inputs, stage.sliding.windows, stage.sliding.border)
        for stage in stages[1:]
    ]


def readers_of(
    network: fx.GraphModule, in_channels: int, output: int, geometry: Geometry
) -> list[Reader]:
    """What the operations of a converted network read; the last one gives the output.

    If a layer has no rule for strips, the windows are those of the geometry.
    """
    try:
        return readers_of_stages(stages_of(network, in_channels, output))
    except UnsupportedLayerError:
        return [
            Reader(tuple(i + 1 for i in down.inputs), (down.window, across.window))
            for down, across in zip(geometry.height.steps, geometry.width.steps)
        ]


def cells_that_see(pixels: Tensor, readers: Sequence[Reader]) -> Tensor:
    """The cells ``(N, 1, h, w)`` that see marked pixels ``(N, 1, H, W)``, both bool."""
    masks = [pixels]
    for reader in readers:
        masks.append(reader.seen([masks[i] for i in reader.inputs]))
    return masks[-1]


def sees_whole_field(stages: Sequence[Stage], geometry: Geometry) -> bool:
    """Whether a cell sees every pixel of its receptive field, as it mostly does."""
    places = [axis.interior(axis.window) for axis in geometry.axes]  # sizes, and cells in them
    rows, cols = (
        AxisRanges(stages, axis, size, (cell, cell + 1)).sizes
        for axis, (size, cell) in enumerate(places)
    )
    seen = [np.zeros(size, np.bool_) for size in zip(rows, cols)]
    (_, row), (_, col) = places
    seen[-1][row, col] = True
    readers = readers_of_stages(stages)
    for i in range(len(readers), 0, -1):
        read = [
            [(at * w.stride - w.before + tap * w.dilation) // w.repeats for tap in range(w.kernel)]
            for at, w in zip(np.nonzero(seen[i]), readers[i - 1].windows)
        ]
        for fed in readers[i - 1].inputs:
            height, width = seen[fed].shape
            for y in read[0]:
                for x in read[1]:
                    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
                    seen[fed][y[inside], x[inside]] = True
    top, bottom = geometry.height.span_of(row)
    left, right = geometry.width.span_of(col)
    return bool(seen[0][top:bottom, left:right].all())


def missing_pixels(images: Tensor) -> Tensor | None:
    """Pixels ``(N, 1, H, W)`` of images ``(N, C, H, W)`` not finite in some channel; None if none.

    For finite images this takes one sum, which also brings them into the cache.
    """
    wide = torch.float32 if images.dtype == torch.float16 else None  # float16 sums overflow soon
    if isfinite(images.detach().sum(dtype=wide).item()):
        return None
    finite = images.detach().isfinite()  # huge but finite pixels may overflow the sum
    return None if bool(finite.all()) else ~finite.all(1, keepdim=True)


def can_be_looked_at(images: Tensor) -> bool:
    """Whether a tensor has values: not while a network is traced, exported or vectorised."""
    return (
        type(images) in (Tensor, nn.Parameter)
        and images.device.type != "meta"
        and not torch._C._functorch.is_functorch_wrapped_tensor(images)
    )


def run_with_missing(
    images: Tensor,
    network: Callable[[Tensor], Any],
    readers: Callable[[int], Sequence[Reader]],
) -> Any:
    """``network(images)``, with NaN in the cells that see a pixel that is not finite.

    Args:
        images: ``(N, C, H, W)``, padded up to the window.
        network: gives a map ``(N, K, h, w)`` or a tuple of them.
        readers: of an output, by its number.
    """
    pixels = missing_pixels(images)
    if pixels is None:
        return network(images)
    maps = network(images.masked_fill(pixels, 0))
    several = maps if isinstance(maps, tuple) else (maps,)
    marked = tuple(
        scores.masked_fill(cells_that_see(pixels, readers(i)), torch.nan)
        for i, scores in enumerate(several)
    )
    return marked if isinstance(maps, tuple) else marked[0]
