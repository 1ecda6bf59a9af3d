"""A fully connected layer at every window, as a convolution over rows, for maps of one size.

A product of gathered windows reads kh*kw copies of every position from the cache again and again.
Here windows are gathered along the width only, which gives a map with kw times the channels, and a
convolution of (kh, 1) does the rest: with AMX in bfloat16 0.75 to 0.9 of the product's time for 32
cells and more (`examples/benchmarks/NOTES.md`). oneDNN orders such weights for one size of map, and
would order 205 MB of a VGG's fc6 anew for another.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from fcvgg.geometry import Pair
from fcvgg.optimization.huge_pages import on_huge_pages
from fcvgg.optimization.processor import has_amx

_LEAST_CELLS = 32
"""Cells of a map below which reading the weights takes longest, and a product reads them faster."""

_LEAST_PIECE_CELLS = 256
"""The same for every piece, where there are several and each reads all the weights."""

_MOST_CELLS_ACROSS = 44
"""Rows and columns of cells in a piece; beyond about 50 the convolution takes twice as long."""


class RowConvolution:
    """The layer for maps whose cells are `grid`, which are cut into pieces of one size.

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
        """Whether it is the faster way for these maps: of its size, one or large ones."""
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
                    region = x[i : i + 1, :, top:, left:]
                    region = region[:, :, : down + kernel_height - 1, : across + kernel_width - 1]
                    place = scores[i : i + 1, :, top : top + down, left : left + across]
                    place.copy_(self._convolved(region))
        return scores

    def held_bytes(self) -> int:
        """Bytes of its weights."""
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
        weight: Any = rows.view(len(rows), height, -1).movedim(1, 2).unsqueeze(3)
        weight = weight.contiguous()  # (O, kw*C, kh, 1)
        weight = weight.to_mkldnn()
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        down, across = self._piece
        shape = (1, weight.shape[1], down + height - 1, across)
        return on_huge_pages(reorder(weight, (0, 0), (1, 1), (1, 1), 1, shape))


def _piece(grid: Pair) -> Pair:
    """Rows and columns of cells of a piece: as few equal pieces as there can be."""
    rows, cols = (-(-n // -(-n // _MOST_CELLS_ACROSS)) for n in grid)
    return rows, cols


def _starts(grid: Pair) -> tuple[list[int], list[int]]:
    """First cells of the pieces along both axes; the last one ends with the map."""
    rows, cols = (
        [min(start, n - size) for start in range(0, n, size)] for n, size in zip(grid, _piece(grid))
    )
    return rows, cols
