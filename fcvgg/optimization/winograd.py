"""3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3), written with matrix products.

A tile of 6x6 inputs gives 4x4 outputs with 36 multiplications where the direct sum takes 144 (Lavin
and Gray, https://arxiv.org/abs/1509.09308). Both transforms are one matrix product each, with the
two axes' matrices as a Kronecker product, and the tiles are taken in blocks small enough for the
processor's cache, which is what makes it pay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Matrix = Sequence[Sequence[float]]

_OUTPUT = 4
"""Outputs of a tile along one axis."""

_TILE = 6
"""Inputs of a tile along one axis."""

_INPUT_TRANSFORM: Matrix = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_KERNEL_TRANSFORM: Matrix = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_OUTPUT_TRANSFORM: Matrix = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
]

_TILES_PER_THREAD = 64
"""Tiles of a block: its transformed inputs, at 512 channels 4.7 MB, fit a core's share of cache."""

_MOST_TILES = 512


def tiles_of(height: int, width: int) -> int:
    """The tiles that outputs ``(height, width)`` take."""
    return -(-height // _OUTPUT) * -(-width // _OUTPUT)


def transformed_kernels(weight: Tensor) -> Tensor:
    """Kernels ``(O, C, 3, 3)`` as ``(36, C, O)``, which takes four times their memory."""
    square = _both_axes(_KERNEL_TRANSFORM, torch.float64)  # (36, 9)
    columns = weight.detach().double().permute(2, 3, 1, 0).flatten(2).flatten(0, 1)  # (9, C*O)
    kernels = (square @ columns).unflatten(1, (weight.shape[1], weight.shape[0]))
    return kernels.to(weight.dtype).contiguous()


def winograd_convolution(
    x: Tensor, kernels: Tensor, bias: Tensor, padding: tuple[int, int], relu: bool = False
) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=padding)`` with stride 1, and the ReLU after it.

    Args:
        x: map ``(N, C, H, W)``, read fastest in channels_last.
        kernels: of `transformed_kernels`.
        bias: ``(O,)``.
        padding: zeros around the map, rows and columns.
        relu: apply a ReLU.

    Returns:
        ``(N, O, H + 2*padding - 2, W + 2*padding - 2)`` in channels_last.
    """
    inputs = _both_axes(_INPUT_TRANSFORM, x.dtype)  # (36, 36)
    outputs = _both_axes(_OUTPUT_TRANSFORM, x.dtype)  # (16, 36)
    count, channels, height, width = x.shape
    features = kernels.shape[2]
    rows, cols = height + 2 * padding[0] - 2, width + 2 * padding[1] - 2
    down, across = -(-rows // _OUTPUT), -(-cols // _OUTPUT)
    block = max(min(_tiles_at_a_time() // across, down), 1)  # rows of tiles

    result = torch.empty(
        (count, features, rows, cols), dtype=x.dtype, memory_format=torch.channels_last
    )
    places, source = result.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)  # (N, H, W, C)
    right = across * _OUTPUT + 2
    strip = x.new_zeros(block * _OUTPUT + 2, right, channels)
    most = block * across
    tiles = x.new_empty(36 * most * channels)
    spread = x.new_empty(36 * most * channels)
    products = x.new_empty(36 * most * features)
    sums = x.new_empty(16 * most * features)
    for image in range(count):
        for first in range(0, down, block):
            lines = min(block, down - first)
            number = lines * across
            _fill(strip, source[image], first * _OUTPUT - padding[0], padding[1], lines)
            taken = tiles[: 36 * number * channels].view(36, -1)
            taken.view(_TILE, _TILE, lines, across, channels).copy_(_tiled(strip, lines, across))
            moved = spread[: 36 * number * channels].view(36, -1)
            torch.mm(inputs, taken, out=moved)
            product = products[: 36 * number * features].view(36, number, features)
            torch.bmm(moved.view(36, number, channels), kernels, out=product)
            values = sums[: 16 * number * features].view(16, -1)
            torch.mm(outputs, product.view(36, -1), out=values)
            _place(values, bias, relu, places[image], first * _OUTPUT, lines, across)
    return result


def _tiles_at_a_time() -> int:
    return min(_TILES_PER_THREAD * torch.get_num_threads(), _MOST_TILES)


def _both_axes(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    one = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(one, one).to(dtype)


def _fill(strip: Tensor, image: Tensor, top: int, left: int, lines: int) -> None:
    """Copy the padded rows that `lines` rows of tiles read, from row `top` on."""
    needed = lines * _OUTPUT + 2
    low, high = max(top, 0), min(top + needed, image.shape[0])
    strip[: low - top].zero_()
    strip[max(high - top, 0) : needed].zero_()
    if high > low:
        strip[low - top : high - top, left : left + image.shape[1]].copy_(image[low:high])


def _tiled(strip: Tensor, lines: int, across: int) -> Tensor:
    """The overlapping tiles of a strip ``(H, W, C)`` as a view ``(6, 6, lines, across, C)``."""
    row, col, channel = strip.stride()
    return strip.as_strided(
        (_TILE, _TILE, lines, across, strip.shape[2]),
        (row, col, _OUTPUT * row, _OUTPUT * col, channel),
    )


def _place(
    values: Tensor, bias: Tensor, relu: bool, image: Tensor, top: int, lines: int, across: int
) -> None:
    """Put outputs ``(16, tiles, O)`` with bias and ReLU into the rows of an image ``(H, W, O)``."""
    features = len(bias)
    squares = values.view(_OUTPUT, _OUTPUT, lines, across, features).permute(2, 0, 3, 1, 4)
    rows = min(lines * _OUTPUT, image.shape[0] - top)
    target = image[top : top + rows]
    if rows == lines * _OUTPUT and image.shape[1] == across * _OUTPUT:
        torch.add(squares, bias, out=target.view(squares.shape))
    else:
        whole = squares.reshape(lines * _OUTPUT, across * _OUTPUT, features)
        torch.add(whole[:rows, : image.shape[1]], bias, out=target)
    if relu:
        target.relu_()
