"""Shapes in which oneDNN computes the same layers faster, and what it and the processor have."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from fcvgg.geometry import Pair
from fcvgg.inference.memory import on_huge_pages

# -- a fully connected layer as a convolution over rows -------------------------------------------
# A product of gathered windows reads kh*kw copies of every position from the cache. Here windows
# are gathered along the width only, which gives a map with kw times the channels, and a convolution
# of (kh, 1) does the rest: with AMX in bfloat16 it takes 0.75 to 0.9 of the product's time for 32
# cells and more (`examples/benchmarks/NOTES.md`). oneDNN orders such weights for one size of map,
# and would reorder 205 MB of a VGG's fc6 for another.

_LEAST_CELLS = 32
"""Cells of a map below which reading the weights takes longest, and a product reads them faster."""

_LEAST_PIECE_CELLS = 256
"""The same for every piece, where there are several and each reads all the weights."""

_MOST_CELLS_ACROSS = 44
"""Rows and columns of cells in a piece; beyond about 50 the convolution takes twice as long."""


class RowConvolution:
    """The layer for maps whose cells are `grid`; large ones are cut into pieces of one size.

    Args:
        rows: the layer's weight ``(O, kh*kw*C)``, each row in the order ``(kh, kw, C)``.
        kernel: ``(kh, kw)``.
        grid: rows and columns of cells.
    """

    def __init__(self, rows: Tensor, bias: Tensor, kernel: Pair, grid: Pair, relu: bool):
        self.grid = grid
        self._kernel = kernel
        self._piece = _piece(grid)
        self._bias = bias
        self._attribute = "relu" if relu else "none"
        self._packed = self._pack(rows)

    @staticmethod
    def suits(grid: Pair) -> bool:
        """Whether one map with so many cells is computed faster than by a product."""
        if not has_amx():
            return False
        pieces = prod(map(len, _starts(grid)))
        return prod(_piece(grid)) >= (_LEAST_CELLS if pieces == 1 else _LEAST_PIECE_CELLS)

    def takes(self, x: Tensor) -> bool:
        """Whether it is the faster way for these maps, which must have the cells of `grid`."""
        cells = tuple(n - k + 1 for n, k in zip(x.shape[2:], self._kernel))
        return cells == self.grid and (len(x) == 1 or prod(self._piece) >= _LEAST_PIECE_CELLS)

    def __call__(self, x: Tensor) -> Tensor:
        """Scores ``(N, O, h, w)`` of features ``(N, C, H, W)``, channels last."""
        starts = _starts(self.grid)
        if len(x) == prod(map(len, starts)) == 1:
            return self._convolved(x)
        shape = (len(x), len(self._bias), *self.grid)
        scores = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        (down, across), (kernel_height, kernel_width) = self._piece, self._kernel
        for i in range(len(x)):
            for top in starts[0]:
                for left in starts[1]:
                    bottom, right = top + down + kernel_height - 1, left + across + kernel_width - 1
                    region = x[i : i + 1, :, top:bottom, left:right]  # (1, C, H, W)
                    place = scores[i : i + 1, :, top : top + down, left : left + across]
                    place.copy_(self._convolved(region))
        return scores

    def held_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self._packed.numel() * self._bias.element_size()

    def _convolved(self, x: Tensor) -> Tensor:
        windows = x.permute(0, 2, 3, 1).unfold(2, self._kernel[1], 1)  # (1, H, w, C, kw)
        wide = windows.movedim(-1, -2).flatten(3).movedim(-1, 1)  # (1, kw*C, H, w)
        return torch.ops.mkldnn._convolution_pointwise(
            *(wide, self._packed, self._bias, (0, 0), (1, 1), (1, 1), 1),
            *(self._attribute, [], ""),
        )

    def _pack(self, rows: Tensor) -> Any:
        height = self._kernel[0]
        weight = rows.view(len(rows), height, -1).movedim(1, 2).unsqueeze(3)  # (O, kw*C, kh, 1)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        down, across = self._piece
        shape = (1, weight.shape[1], down + height - 1, across)
        dense = weight.contiguous().to_mkldnn()
        return on_huge_pages(reorder(dense, (0, 0), (1, 1), (1, 1), 1, shape))


def _piece(grid: Pair) -> Pair:
    """Rows and columns of cells of a piece."""
    return part_size(grid[0], _MOST_CELLS_ACROSS), part_size(grid[1], _MOST_CELLS_ACROSS)


def _starts(grid: Pair) -> tuple[list[int], list[int]]:
    """First cells of the pieces along both axes."""
    rows, cols = (part_starts(n, size) for n, size in zip(grid, _piece(grid)))
    return rows, cols


def part_size(total: int, most: int) -> int:
    """The size of as few equal parts as there can be, of at most `most` each."""
    return -(-total // -(-total // most))


def part_starts(total: int, size: int) -> list[int]:
    """Where the parts begin; the last one ends with the whole, over the one before if need be."""
    return [min(start, total - size) for start in range(0, total, size)]


# -- a 3x3 convolution of a small map as that of its two halves -----------------------------------
# oneDNN splits one map between two threads by blocks of rows and channels that fit badly. With one
# half for each thread, 32x32 positions and 512 channels in bfloat16 take 1.9 ms instead of 2.2
# (`examples/benchmarks/NOTES.md`).

_THREADS = 2
"""The only number of threads for which halves were measured to gain; with one they do not."""

_LEAST_ROWS = 20
"""Rows below which the copy costs more than it gains."""

_MOST_POSITIONS = 48 * 48
"""Positions up to which halves gain."""

_LEAST_CHANNELS = 512
"""Output channels from which halves gain."""


def gains_by_halves(x: Tensor, out_channels: int) -> bool:
    """Whether a convolution of ``(N, C, H, W)`` maps to so many channels is faster by halves."""
    batch, _, height, width = x.shape
    return (
        (batch == 1 and x.dtype == torch.bfloat16)
        and (height >= _LEAST_ROWS and height * width <= _MOST_POSITIONS)
        and (out_channels >= _LEAST_CHANNELS and torch.get_num_threads() == _THREADS)
        and has_amx()
    )


def halves(x: Tensor) -> Tensor:
    """``(2, C, h + 2, W)``, channels last, of ``(1, C, H, W)`` with h half of H, rounded up.

    Each half has the rows around it that a 3x3 convolution reads: the other half's, or zeros.
    """
    rows = x.permute(0, 2, 3, 1)[0]
    height = -(-len(rows) // 2)
    both = rows.new_empty(2, height + 2, *rows.shape[1:])
    upper, lower = rows[: height + 1], rows[height - 1 :]
    both[0, 0] = 0
    both[0, 1:] = upper
    both[1, : len(lower)] = lower
    both[1, len(lower) :] = 0
    return both.permute(0, 3, 1, 2)


def joined_halves(scores: Tensor, height: int) -> Tensor:
    """``(1, O, H, W)`` of the scores ``(2, O, h, W)`` of both halves, without a copy."""
    rows = scores.permute(0, 2, 3, 1).flatten(0, 1)
    return rows[None, :height].permute(0, 3, 1, 2)


# -- what oneDNN and the processor have ------------------------------------------------------------


def has_packing() -> bool:
    """Whether this torch has oneDNN with the operations that packed layers call."""
    operations = ("_convolution_pointwise", "_linear_pointwise", "_reorder_linear_weight")
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
        and all(hasattr(torch.ops.mkldnn, name) for name in operations)
    )


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16, and oneDNN may use it (see ``ONEDNN_MAX_CPU_ISA``)."""
    return (_reports("_is_avx512_bf16_supported") or has_amx()) and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def has_amx() -> bool:
    """Whether the processor has AMX tiles, which multiply matrices of bfloat16."""
    return _reports("_is_amx_tile_supported")


def _reports(name: str) -> bool:
    check = getattr(torch.cpu, name, None)
    return check is not None and bool(check())
