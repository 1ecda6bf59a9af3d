"""Convolutions by Winograd's minimal filtering, written with matrix products.

A tile of 6x6 inputs gives 4x4 outputs of a 3x3 convolution with 36 multiplications where the direct
sum takes 144, and a tile of 8x8 inputs gives 2x2 outputs of a 7x7 one with 64 instead of 196 (Lavin
and Gray, https://arxiv.org/abs/1509.09308). The transforms of the tiles are one matrix product
each, with the two axes' matrices as a Kronecker product. Tiles and features are taken in blocks
that fit the processor's cache, without which the algorithm would be slower than the direct sum.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import prod

import torch
from torch import Tensor

_POINTS = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))
"""Where the polynomials are evaluated, and at infinity as well. More points cost accuracy."""

_TILES_PER_THREAD = 64
"""Tiles of a block: its transformed inputs (4.7 MB at 512 channels) fit a core's share of cache."""

_MOST_TILES = 512

_MOST_BYTES = 28 * 1024**2
"""Of a block's transformed inputs: above 32 MB glibc maps new memory for every allocation."""

_FEATURES = 256
"""Features of a block where the kernels do not fit the cache in any case."""


@dataclass(frozen=True)
class Tiling:
    """Winograd's algorithm for square kernels.

    Attributes:
        kernel: extent of the kernels, at most 7.
        outputs: of a tile along one axis; `kernel` + `outputs` is at most 9.
        resident: whether a block's kernels stay in the cache, so that blocks of few tiles pay.
    """

    kernel: int
    outputs: int
    resident: bool = True

    @property
    def inputs(self) -> int:
        """Inputs of a tile along one axis."""
        return self.outputs + self.kernel - 1

    def tiles(self, height: int, width: int) -> int:
        """The tiles that outputs ``(height, width)`` take."""
        return -(-height // self.outputs) * -(-width // self.outputs)

    def kernels(self, weight: Tensor) -> Tensor:
        """Weights ``(O, C, k, k)`` as ``(O/F, inputs**2, C, F)`` for blocks of F features.

        They take ``inputs**2 / k**2`` times the weights' memory.
        """
        features, channels = weight.shape[:2]
        block = features if self.resident or features % _FEATURES else _FEATURES
        square = torch.kron(self._kernel_transform, self._kernel_transform)
        kernels = weight.new_empty(features // block, len(square), channels, block)
        for part, target in zip(weight.detach().split(block), kernels):
            columns = part.double().permute(2, 3, 1, 0).flatten(2).flatten(0, 1)  # (k*k, C*F)
            target.copy_((square @ columns).view(target.shape))  # (inputs**2, C, F)
        return kernels

    def input_transform(self, dtype: torch.dtype) -> Tensor:
        """``(inputs**2, inputs**2)``."""
        return torch.kron(self._input_transform, self._input_transform).to(dtype)

    def output_transform(self, dtype: torch.dtype) -> Tensor:
        """``(outputs**2, inputs**2)``."""
        return torch.kron(self._output_transform, self._output_transform).to(dtype)

    def tiles_at_a_time(self, channels: int, itemsize: int) -> int:
        """Tiles of a block, so that its transformed inputs stay in the cache."""
        if self.resident:
            return min(_TILES_PER_THREAD * torch.get_num_threads(), _MOST_TILES)
        return min(_MOST_BYTES // (self.inputs**2 * channels * itemsize), _MOST_TILES)

    # A convolution of one axis is a product of polynomials. Each factor is evaluated at the points,
    # the values are multiplied, and the product is interpolated from them (Toom and Cook).
    # Winograd's matrices transpose that: interpolation becomes the transform of the inputs.
    # Fractions keep the matrices exact up to the last rounding.

    @cached_property
    def _points(self) -> list[Fraction]:
        return [Fraction(point) for point in _POINTS[: self.inputs - 1]]

    @cached_property
    def _input_transform(self) -> Tensor:
        # one row has the polynomial with roots at all points but one, the last row at all points
        points = self._points
        without = [points[:i] + points[i + 1 :] for i in range(len(points))]
        rows = [[*_with_roots(roots), Fraction(0)] for roots in without]
        return _matrix([*rows, _with_roots(points)])

    @cached_property
    def _kernel_transform(self) -> Tensor:
        # one row evaluates a kernel at a point, scaled for the interpolation; the last at infinity
        rows = [
            [p**i / prod(p - q for q in self._points if q != p) for i in range(self.kernel)]
            for p in self._points
        ]
        return _matrix([*rows, [Fraction(i == self.kernel - 1) for i in range(self.kernel)]])

    @cached_property
    def _output_transform(self) -> Tensor:
        last = self.outputs - 1
        return _matrix(
            [[*(p**i for p in self._points), Fraction(i == last)] for i in range(last + 1)]
        )


CONVOLUTION = Tiling(kernel=3, outputs=4)
"""For 3x3 convolutions: a quarter of the multiplications."""


def window_tiling(kernel: int) -> Tiling:
    """For fully connected layers at every window: a third of the multiplications for 7x7."""
    return Tiling(kernel=kernel, outputs=2, resident=False)


def winograd_convolution(
    tiling: Tiling,
    x: Tensor,
    kernels: Tensor,
    bias: Tensor,
    padding: tuple[int, int] = (0, 0),
    relu: bool = False,
) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=padding)`` with stride 1, and the ReLU after it.

    Args:
        tiling: of the weights' extent.
        x: map ``(N, C, H, W)``, read fastest in channels_last.
        kernels: of `Tiling.kernels`.
        bias: ``(O,)``.
        padding: zeros around the map, rows and columns.
        relu: apply a ReLU.

    Returns:
        ``(N, O, H + 2*padding - k + 1, W + 2*padding - k + 1)`` in channels_last.
    """
    input_transform = tiling.input_transform(x.dtype)
    output_transform = tiling.output_transform(x.dtype)
    step, extent = tiling.outputs, tiling.inputs
    count, channels, height, width = x.shape
    features = kernels.shape[3]  # F, of one block of kernels
    rows, cols = (n + 2 * p - tiling.kernel + 1 for n, p in zip((height, width), padding))
    down, across = -(-rows // step), -(-cols // step)  # tiles
    most = tiling.tiles_at_a_time(channels, x.element_size())
    block = max(min(most // across, down), 1)  # rows of tiles
    images = max(min(most // (down * across), count), 1) if block == down else 1

    result = torch.empty(
        (count, len(bias), rows, cols), dtype=x.dtype, memory_format=torch.channels_last
    )
    places, source = result.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)  # (N, H, W, O or C)
    halo = extent - step
    # All blocks use the same five buffers, so that they stay in the cache and are mapped once.
    strip = x.new_zeros(images, block * step + halo, across * step + halo, channels)
    most = images * block * across
    tile_buffer = x.new_empty(extent**2 * most * channels)
    transformed_buffer = x.new_empty(extent**2 * most * channels)
    product_buffer = x.new_empty(extent**2 * most * features)
    output_buffer = x.new_empty(step**2 * most * features)
    for image, first in itertools.product(range(0, count, images), range(0, down, block)):
        some = min(images, count - image)
        lines = min(block, down - first)
        grid = (some, lines, across)
        tiles = prod(grid)
        padded = strip[:some, : lines * step + halo]  # (n, H, W, C)
        _fill(padded, source[image : image + some], first * step - padding[0], padding[1])
        given = tile_buffer[: extent**2 * tiles * channels].view(extent**2, -1)
        given.view(extent, extent, *grid, channels).copy_(_tiled(padded, tiling, lines, across))
        transformed = transformed_buffer[: given.numel()].view(extent**2, -1)
        torch.mm(input_transform, given, out=transformed)  # (inputs**2, tiles*C)
        products = product_buffer[: extent**2 * tiles * features].view(extent**2, tiles, features)
        outputs = output_buffer[: step**2 * tiles * features].view(step**2, -1)
        target = places[image : image + some, first * step : (first + lines) * step]
        for i, kernel in enumerate(kernels):  # (inputs**2, C, F)
            torch.bmm(transformed.view(extent**2, tiles, channels), kernel, out=products)
            torch.mm(output_transform, products.view(extent**2, -1), out=outputs)
            squares = outputs.view(step, step, *grid, features).permute(2, 3, 0, 4, 1, 5)
            part = slice(i * features, (i + 1) * features)
            _place(squares, bias[part], relu, target[..., part])
    return result


def _matrix(rows: list[list[Fraction]]) -> Tensor:
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)


def _with_roots(roots: list[Fraction]) -> list[Fraction]:
    """The coefficients of the product of ``x - root``, lowest power first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *coefficients], [*coefficients, Fraction(0)]
        coefficients = [a - root * b for a, b in zip(shifted, scaled)]
    return coefficients


def _fill(strip: Tensor, source: Tensor, top: int, left: int) -> None:
    """Copy the rows of images ``(N, H, W, C)`` from row `top` on, zeros outside."""
    height, width = source.shape[1:3]
    low, high = max(top, 0), min(top + strip.shape[1], height)
    strip[:, : low - top].zero_()
    strip[:, max(high - top, 0) :].zero_()
    if high > low:
        strip[:, low - top : high - top, left : left + width].copy_(source[:, low:high])


def _tiled(strip: Tensor, tiling: Tiling, lines: int, across: int) -> Tensor:
    """The overlapping tiles of ``(N, H, W, C)``: a view ``(inputs, inputs, N, h, w, C)``."""
    image, row, col, channel = strip.stride()
    return strip.as_strided(
        (tiling.inputs, tiling.inputs, len(strip), lines, across, strip.shape[3]),
        (row, col, image, tiling.outputs * row, tiling.outputs * col, channel),
    )


def _place(squares: Tensor, bias: Tensor, relu: bool, target: Tensor) -> None:
    """Put outputs ``(N, h, outputs, w, outputs, O)`` with bias and ReLU into ``(N, H, W, O)``."""
    count, lines, step, across = squares.shape[:4]
    rows, cols = target.shape[1:3]
    if (rows, cols) == (lines * step, across * step):
        whole = target.unflatten(2, (across, step)).unflatten(1, (lines, step))
        torch.add(squares, bias, out=whole)
    else:
        whole = squares.reshape(count, lines * step, across * step, len(bias))
        torch.add(whole[:, :rows, :cols], bias, out=target)
    if relu:
        target.relu_()
