"""Differentiable score maps of images larger than memory.

The map is computed tile by tile without an autograd graph. The backward pass computes every tile
once more, with a graph, and back-propagates the tile's part of the gradient. Every cell belongs to
one tile, and a tile reads all that its cells see, so the sum over the tiles is the gradient of the
whole map. It is gradient checkpointing ("Training Deep Nets with Sublinear Memory Cost",
https://arxiv.org/abs/1604.06174) over space instead of layers, as in "Streaming convolutional
neural networks for end-to-end learning with multi-megapixel images"
(https://arxiv.org/abs/1911.04432), with exact borders by the network's geometry.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from fcvgg.errors import ArgumentError, TrainingError
from fcvgg.geometry import Pair
from fcvgg.inference.line_buffers import LineBuffers, MissingCells
from fcvgg.inference.schedule import AxisRanges, Schedule
from fcvgg.inference.stages import Stage, stages_of
from fcvgg.inference.strip_input import StripInput
from fcvgg.support.memory_text import rounded_up, size_text
from fcvgg.support.module_state import listed

_GRAPH = 2
"""Bytes that a tile takes, in those of all its maps: half are kept for the backward pass, and the
gradients and the workspace of the largest layers are added."""

_FIXED = 64 << 20
"""Bytes in addition: the libraries' own buffers, the allocator's gaps."""


def streamed_map(net: Any, pixels: StripInput, output: int, memory: int) -> Tensor:
    """The map ``(1, K, h, w)`` of an image, with gradients with respect to the parameters.

    Raises:
        ArgumentError: if `memory` is too little; the message states the least.
        TrainingError: if batch norm is in training mode.
    """
    _check_norms(net)
    tiles = TiledMap.planned(net, pixels, output, memory)
    scores: Tensor = _Streamed.apply(tiles, *net.parameters())
    return scores


@dataclass
class TiledMap:
    """A score map that is cut into tiles of cells, half-open ranges of rows and columns.

    Attributes:
        size: ``(h, w)`` of the map.
        tile: ``(h, w)`` of a tile, smaller at the map's end.
    """

    net: Any
    pixels: StripInput
    output: int
    size: Pair
    tile: Pair
    _random_states: list[Any] = field(default_factory=list)
    _autocast: AbstractContextManager[Any] | None = None

    @classmethod
    def planned(cls, net: Any, pixels: StripInput, output: int, memory: int) -> TiledMap:
        """The map in tiles whose graph fits into `memory` bytes."""
        size = net.output_size(pixels.source.size)
        stages = stages_of(net.layers, net.in_channels, output)
        return cls(net, pixels, output, size, _tile(stages, pixels, size, memory))

    def scores(self) -> Tensor:
        """The whole map, without a graph; remembers what the backward pass has to repeat."""
        self._autocast = _autocast_of(self.pixels.device)
        result: Tensor | None = None
        for rows, cols in self._tiles():
            if self.net.training:
                self._random_states.append(_random_state(self.pixels.device))
            cells = self._cells(rows, cols)
            if result is None:
                result = cells.new_empty(1, cells.shape[1], *self.size)
            result[:, :, rows[0] : rows[1], cols[0] : cols[1]] = cells
        assert result is not None  # an image of any size has at least one cell
        return result

    def gradients(self, scores: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """The parameters' gradients, given the gradient of the map."""
        totals: list[Tensor | None] = [None] * len(parameters)
        for i, (rows, cols) in enumerate(self._tiles()):
            part = scores[:, :, rows[0] : rows[1], cols[0] : cols[1]]
            if not part.any():  # a loss of the best cells alone needs few tiles
                continue
            state = self._random_states[i] if self._random_states else None
            with torch.enable_grad(), _repeated(state, self._autocast):
                cells = self._cells(rows, cols)
            found = torch.autograd.grad(cells, parameters, part, allow_unused=True)
            del cells
            for k, gradient in enumerate(found):
                total = totals[k]
                if gradient is not None:
                    totals[k] = gradient if total is None else total.add_(gradient)
        return totals

    def _tiles(self) -> Iterator[tuple[Pair, Pair]]:
        height, width = self.size
        for top in range(0, height, self.tile[0]):
            for left in range(0, width, self.tile[1]):
                bottom, right = min(top + self.tile[0], height), min(left + self.tile[1], width)
                yield (top, bottom), (left, right)

    def _cells(self, rows: Pair, cols: Pair) -> Tensor:
        """The cells ``(1, K, rows, cols)`` of a tile; NaN where they see missing pixels."""
        # read for every tile: what is computed from parameters belongs to the tile's graph
        stages = stages_of(self.net.layers, self.net.in_channels, self.output)
        height = AxisRanges(stages, 0, self.pixels.size[0], rows)
        width = AxisRanges(stages, 1, self.pixels.size[1], cols)
        at_once = [1] * len(stages)
        schedule = Schedule(stages, height, self.pixels.size[0], at_once, at_once)
        strip, missing = self.pixels.strip(height.ranges[0], width.ranges[0])
        cells = LineBuffers(schedule, width, rows[0]).push(strip)
        assert cells is not None  # one strip holds all rows
        unknown = MissingCells(schedule, width, rows[0]).push(missing)
        return cells if unknown is None else cells.masked_fill(unknown, torch.nan)


class _Streamed(torch.autograd.Function):
    """The map as one operation of its parameters, so that hooks and optimisers work as usual."""

    @staticmethod
    def forward(ctx: Any, tiles: TiledMap, *parameters: nn.Parameter) -> Tensor:
        ctx.tiles = tiles
        ctx.save_for_backward(*parameters)  # torch then notices if they change before the backward
        return tiles.scores()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scores: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        parameters = [p for p, wanted in zip(ctx.saved_tensors, needed) if wanted]
        found = iter(ctx.tiles.gradients(scores, parameters))
        return None, *(next(found) if wanted else None for wanted in needed)


# -- the size of tiles ----------------------------------------------------------------------------


def _tile(stages: list[Stage], pixels: StripInput, size: Pair, memory: int) -> Pair:
    """The tile ``(h, w)`` of cells for which the least is computed twice within the memory."""
    channels = np.array([stage.channels for stage in stages])
    budget = (memory - _FIXED) / (_GRAPH * pixels.dtype.itemsize)  # elements of all maps

    def extents(axis: int, cells: int) -> Any:
        """Positions of every map that some cells in the middle of the image need."""
        first = (size[axis] - cells) // 2
        ranges = AxisRanges(stages, axis, pixels.size[axis], (first, first + cells)).ranges
        return np.array([high - low for low, high in ranges])

    def elements(rows: int, across: Any) -> int:
        return int((channels * extents(0, rows) * across).sum())

    best: tuple[float, Pair] | None = None
    blocks = 1
    while True:
        cols = ceil(size[1] / blocks)
        across = extents(1, cols)
        rows = _largest(size[0], lambda n, across=across: elements(n, across) <= budget)
        if rows:
            work = elements(rows, across) * ceil(size[0] / rows) * ceil(size[1] / cols)
            if best is None or work < best[0]:
                best = work, (rows, cols)
        if cols == 1:
            break
        blocks = ceil(blocks * 1.5)
    if best is None:
        least = _GRAPH * pixels.dtype.itemsize * elements(1, extents(1, 1)) + _FIXED
        raise ArgumentError(
            f"memory must be at least {size_text(rounded_up(least))} for the graph of one cell, "
            f"got {size_text(memory)}"
        )
    return best[1]


def _largest(most: int, fits: Any) -> int:
    """The largest number up to `most` that fits, 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# -- what the backward pass repeats ---------------------------------------------------------------


def _check_norms(net: Any) -> None:
    modules = dict(net.layers.named_modules())
    training = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    if net.training:
        training += [n.name for n in net.layers.graph.nodes if n.target is F.batch_norm]
    if training:
        raise TrainingError(
            "batch norm must be in evaluation mode to stream, since a tile's statistics are not "
            f"the image's, got {listed(training)} in training mode; call net.eval(), or eval() of "
            "those layers after net.train()"
        )


def _random_state(device: torch.device) -> tuple[Tensor, Any]:
    devices = get_device_states(torch.empty(0, device=device))
    return torch.get_rng_state(), devices


def _autocast_of(device: torch.device) -> AbstractContextManager[Any]:
    """The autocast settings of now, to be entered again in the backward pass."""
    kind = device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


@contextmanager
def _repeated(
    state: tuple[Tensor, Any] | None, autocast: AbstractContextManager[Any] | None
) -> Iterator[None]:
    """Random numbers, such as dropout's, and dtypes as they were in the forward pass."""
    assert autocast is not None
    if state is None:
        with autocast:
            yield
        return
    cpu, (ids, states) = state
    with torch.random.fork_rng(ids), autocast:
        torch.set_rng_state(cpu)
        set_device_states(ids, states)
        yield
