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
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from fcvgg.inference.memory import last_cache_bytes
from fcvgg.optimization.onednn import part_size, part_starts
from fcvgg.optimization.products import Kernels

_POINTS = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))
"""Where the polynomials are evaluated, and at infinity as well. More points cost accuracy."""

_MOST_TILES = 512

_MOST_BYTES = 28 * 1024**2
"""Of a block's transformed inputs where kernels do not stay in the cache, if the last cache holds
twice as much: above 32 MB glibc maps new memory for every allocation.
"""

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

    def kernels(self, weight: Tensor, form: type[Kernels]) -> Kernels:
        """Weights ``(O, C, k, k)``, transformed: ``inputs**2 / k**2`` times the memory."""
        features = len(weight) if self.resident else _FEATURES
        return form.of(self._transformed(part) for part in weight.detach().split(features))

    def _transformed(self, weight: Tensor) -> Tensor:
        """``(inputs**2, C, F)`` of weights ``(F, C, k, k)``."""
        square = torch.kron(self._kernel_transform, self._kernel_transform)
        columns = weight.double().permute(2, 3, 1, 0)  # (k, k, C, F)
        kernels = (square @ columns.flatten(2).flatten(0, 1)).to(weight.dtype)
        return kernels.unflatten(1, columns.shape[2:])

    def input_transform(self, dtype: torch.dtype) -> Tensor:
        """``(inputs**2, inputs**2)``."""
        return torch.kron(self._input_transform, self._input_transform).to(dtype)

    def output_transform(self, dtype: torch.dtype) -> Tensor:
        """``(outputs**2, inputs**2)``."""
        return torch.kron(self._output_transform, self._output_transform).to(dtype)

    def tiles_at_a_time(self, channels: int, itemsize: int, usual: int) -> int:
        """Tiles of a block, so that its transformed inputs stay in the cache.

        Args:
            channels: of the inputs.
            itemsize: bytes of one value.
            usual: tiles where the kernels stay in the cache as well.
        """
        if self.resident:
            return min(usual, _MOST_TILES)
        most = min(_MOST_BYTES, last_cache_bytes() // 2)
        return min(most // (self.inputs**2 * channels * itemsize), _MOST_TILES)

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


@lru_cache
def window_tiling(kernel: int) -> Tiling:
    """For fully connected layers at every window: a third of the multiplications for 7x7."""
    return Tiling(kernel=kernel, outputs=2, resident=False)


# The transforms need float32's precision.
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def winograd_convolution(
    tiling: Tiling,
    x: Tensor,
    kernels: Kernels,
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
    rows, cols = (n + 2 * p - tiling.kernel + 1 for n, p in zip((height, width), padding))
    down, across = -(-rows // step), -(-cols // step)  # tiles
    usual = kernels.tiles_per_thread * torch.get_num_threads()
    most = tiling.tiles_at_a_time(channels, x.element_size(), usual)
    block = part_size(down, max(min(most // across, down), 1))  # rows of tiles
    images = part_size(count, max(min(most // (down * across), count), 1)) if block == down else 1

    result = torch.empty(
        (count, len(bias), rows, cols), dtype=x.dtype, memory_format=torch.channels_last
    )
    places, source = result.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)  # (N, H, W, O or C)
    halo = extent - step
    # All blocks use the same buffers, so that they stay in the cache and are mapped once. They are
    # of one size, the last one overlapping the one before.
    strip = x.new_zeros(images, block * step + halo, across * step + halo, channels)
    grid = (images, block, across)
    tiles = prod(grid)
    given = x.new_empty(max(tiles, kernels.least_tiles), extent**2, channels)
    given[tiles:] = 0
    tiles_of_strip = given[:tiles].view(*grid, extent, extent, channels)
    transformed = torch.empty_like(given)
    for image, first in itertools.product(part_starts(count, images), part_starts(down, block)):
        _fill(strip, source[image : image + images], first * step - padding[0], padding[1])
        tiles_of_strip.copy_(_tiled(strip, tiling, block, across))
        torch.matmul(input_transform, given, out=transformed)  # (tiles, inputs**2, C)
        target = places[image : image + images, first * step : (first + block) * step]
        feature = 0
        for outputs in kernels.outputs(transformed, output_transform):  # (tiles, outputs**2, F)
            part = slice(feature, feature := feature + outputs.shape[2])
            squares = outputs[:tiles].unflatten(1, (step, step)).unflatten(0, grid)
            _place(squares.transpose(2, 3), bias[part], relu, target[..., part])
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
    """The overlapping tiles of ``(N, H, W, C)``: a view ``(N, h, w, inputs, inputs, C)``."""
    image, row, col, channel = strip.stride()
    step, extent = tiling.outputs, tiling.inputs
    return strip.as_strided(
        (len(strip), lines, across, extent, extent, strip.shape[3]),
        (image, step * row, step * col, row, col, channel),
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
