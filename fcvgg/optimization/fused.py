"""The layers of an optimised network: evaluation only, with bias and ReLU in one call.

`FusedConv2d` and `FusedWindowLinear` run on any device and in any dtype. `PackedConv2d` and
`PackedWindowLinear` hold their weights in the order that oneDNN computes with, so that no call
reorders them. They may hold a second form of the weights: transformed for Winograd's algorithm, or
ordered for a convolution over rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.geometry import Pair
from fcvgg.inference.memory import on_huge_pages
from fcvgg.optimization.measuring import faster_kernels, gains, least_gaining
from fcvgg.optimization.onednn import RowConvolution, gains_by_halves, halves, joined_halves
from fcvgg.optimization.products import Kernels
from fcvgg.optimization.winograd import (
    CONVOLUTION,
    Tiling,
    window_tiling,
    winograd_convolution,
)
from fcvgg.rewriting.modules import GEMM_CELLS, by_windows, window_linear
from fcvgg.rewriting.rules.registry import register
from fcvgg.rewriting.sliding import Sliding, windows_of

_USUAL_ROWS = 100
"""Rows of the product for which fully connected weights are packed; any number runs."""

_USUAL_SIZE = 56
"""Rows and columns of the map for which convolution weights are packed before one was seen."""

_LEAST_CHANNELS = 64
"""Channels from which Winograd's algorithm is tried; with fewer its transforms cost too much."""

_LEAST_WINDOW_CHANNELS = 128
"""The same for fully connected layers at every window."""

_TRIED_FEATURES = 1024
"""Features of a layer with which Winograd's algorithm is tried: a quarter of a VGG's fc6."""

_BFLOAT16_ROUNDING = 2**-6
"""Of the largest score: numbers have 8 bits, and the order of sums differs."""

_WINDOW_KERNELS = range(5, 8)
"""Extents of the windows for which Winograd's algorithm saves enough multiplications."""


class FusedLayer(nn.Module):
    """A layer with weight ``(O, C, kh, kw)`` and bias ``(O,)``, and the ReLU after it."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    groups = 1

    def __init__(self, weight: Tensor, bias: Tensor, dilation: Pair, relu: bool):
        super().__init__()
        self.out_channels, self.in_channels = weight.shape[:2]  # the inputs of one group
        self.kernel = (weight.shape[2], weight.shape[3])
        self.dilation = dilation
        self.relu = relu
        self._hold(weight, bias)

    def _hold(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def weight_count(self) -> int:
        """Elements of the weight."""
        return prod((self.out_channels, self.in_channels, *self.kernel))

    def held_bytes(self) -> int:
        """Bytes of the layer's own weights."""
        return self.weight.nbytes

    def extra_repr(self) -> str:
        return (
            f"{self.out_channels}, kernel={self.kernel}, padding={self.padding}, "
            f"dilation={self.dilation}, relu={self.relu}"
        )


class FusedConv2d(FusedLayer):
    """A convolution with bias, and the ReLU after it."""

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor, relu: bool):
        geometry: Any = (conv.stride, conv.padding)
        self.stride, self.padding = geometry
        self.groups = conv.groups
        super().__init__(weight, bias, (conv.dilation[0], conv.dilation[1]), relu)

    def _hold(self, weight: Tensor, bias: Tensor) -> None:
        order = torch.channels_last if weight.is_cuda else torch.contiguous_format
        super()._hold(weight.contiguous(memory_format=order), bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolved(x, self.padding)

    def convolved(self, x: Tensor, padding: Pair) -> Tensor:
        """The layer's output with other padding: none for rows that come padded."""
        x = F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        return x.relu_() if self.relu else x


class FusedWindowLinear(FusedLayer):
    """A fully connected layer at every window, with bias, and the ReLU after it."""

    def forward(self, x: Tensor) -> Tensor:
        x = window_linear(x, self.weight, self.bias, self.dilation)
        return x.relu_() if self.relu else x


class Packed(FusedLayer):
    """Weights in an order that only oneDNN can read, and perhaps Winograd's kernels.

    Copies of the layer share both. A pickle holds plain weights, which are packed when it is read,
    and the sizes that were measured where it was made.
    """

    _packed: Any
    _bias: Tensor
    _kernels: Kernels | None = None
    _least_tiles: float = math.inf
    _tries_winograd: bool
    _tiling: Tiling
    _sides: ClassVar[Sequence[int]]
    """Sides of square maps, in tiles, on which Winograd's algorithm is tried."""

    def _pack(self, weight: Tensor) -> Any:
        """Weights in oneDNN's order."""
        raise NotImplementedError

    def _for_packing(self, weight: Tensor) -> Tensor:
        """Weights ``(O, C, kh, kw)`` as `_pack` takes them."""
        return weight

    @property
    def _suits_winograd(self) -> bool:
        """Whether Winograd's algorithm can compute the layer, and is worth trying."""
        raise NotImplementedError

    def _hold(self, weight: Tensor, bias: Tensor) -> None:
        self._bias = bias
        self._packed = self._pack(self._for_packing(weight))
        if self._tries_winograd and self._suits_winograd and weight.dtype == torch.float32:
            self._hold_kernels(weight)

    def _directly(self, x: Tensor, padding: Pair) -> Tensor:
        """The layer by oneDNN."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return self._bias.dtype

    @property
    def has_winograd(self) -> bool:
        return self._kernels is not None

    def specialise(self, x: Tensor) -> None:
        """Keep only the form of the weights that is faster for maps of the size of `x`."""
        if self._kernels is None:
            return
        if self._winograd_pays(x, self.padding):
            self._packed = None
        else:
            self._kernels = None

    def _hold_kernels(self, weight: Tensor) -> None:
        """Transform the weights for Winograd's algorithm, if it is faster for any map."""
        form = faster_kernels(weight.dtype)
        kind = self._tiling, self.in_channels, self.out_channels, form
        trial = lru_cache(lambda: self._trial(weight[:_TRIED_FEATURES], form))
        sides = least_gaining(kind, self._sides, lambda side: trial()._gains_by_winograd(side))
        self._least_tiles = sides**2
        if sides < math.inf:
            self._kernels = self._tiling.kernels(weight, form)

    def _trial(self, weight: Tensor, form: type[Kernels]) -> Packed:
        """The layer with some of its features, in both forms."""
        trial = type(self).__new__(type(self))
        trial.__dict__.update(self.__dict__)
        trial.out_channels, trial._tries_winograd = len(weight), False
        trial._hold(weight, self._bias[: len(weight)])
        trial._kernels = self._tiling.kernels(weight, form)
        return trial

    def _gains_by_winograd(self, side: int) -> bool:
        """Whether Winograd's algorithm is faster for a map of ``side**2`` tiles."""
        assert self._kernels is not None
        outputs = side * self._tiling.outputs
        padding = [min(p, k // 2) for k, p in zip(self.kernel, self.padding)]
        size = [outputs + k - 1 - 2 * p for k, p in zip(self.kernel, padding)]
        x = self._bias.new_ones(1, self.in_channels, *size)
        x = x.contiguous(memory_format=torch.channels_last)
        rows, cols = padding
        return gains(
            lambda: self._by_winograd(x, (rows, cols)),
            lambda: self._directly(x, (rows, cols)),
            self._kernels.nbytes - self.weight_count * self._bias.element_size(),
        )

    def _winograd_pays(self, x: Tensor, padding: Pair) -> bool:
        """Whether Winograd's algorithm is faster than oneDNN for maps of this size."""
        if self._kernels is None or self._packed is None:
            return self._packed is None
        whole = (n // self._tiling.outputs for n in self._outputs(x, padding))  # tiles
        return len(x) * prod(whole) >= self._least_tiles

    def _by_winograd(self, x: Tensor, padding: Pair) -> Tensor:
        assert self._kernels is not None
        return winograd_convolution(self._tiling, x, self._kernels, self._bias, padding, self.relu)

    def _faster(self, x: Tensor, padding: Pair) -> Tensor:
        """The layer by the algorithm that is faster for the size of `x`."""
        pays = self._winograd_pays(x, padding)
        return self._by_winograd(x, padding) if pays else self._directly(x, padding)

    def _outputs(self, x: Tensor, padding: Pair) -> Pair:
        """Rows and columns of the layer's output for stride 1 and no dilation."""
        height, width = (n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], padding, self.kernel))
        return height, width

    @property
    def _attribute(self) -> str:
        """What oneDNN does with the sums, in torch's terms."""
        return "relu" if self.relu else "none"

    def held_bytes(self) -> int:
        packed = 0 if self._packed is None else self.weight_count * self._bias.element_size()
        return packed + (0 if self._kernels is None else self._kernels.nbytes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        held = ("_packed", "_kernels", "_rows", "_bias")  # replaced, never changed in place
        own = {k: v if k in held else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        twin.__dict__.update(own)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        packed = self._packed
        dense = None if packed is None else packed.to_dense()
        return {**self.__dict__, "_packed": dense, "_order": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._packed is not None:
            self._packed = self._pack(self._packed)


class PackedConv2d(Packed, FusedConv2d):
    """A convolution on a CPU through oneDNN, and by Winograd's algorithm where that is faster."""

    _tiling = CONVOLUTION
    _sides = (4, 5, 6, 8, 11, 16)
    _order: tuple[int, bool] | None = None

    def __init__(
        self, conv: nn.Conv2d, weight: Tensor, bias: Tensor, relu: bool, winograd: bool = False
    ):
        self._tries_winograd = winograd
        super().__init__(conv, weight, bias, relu)

    @property
    def _suits_winograd(self) -> bool:
        return min(self.out_channels, self.in_channels) >= _LEAST_CHANNELS and self._is_plain_3x3

    @property
    def _is_plain_3x3(self) -> bool:
        """Whether the layer is a 3x3 convolution without stride, dilation and groups."""
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1
        return plain and self.kernel == (3, 3)

    def _pack(self, weight: Tensor) -> Any:
        shape = (1, self.in_channels * self.groups, _USUAL_SIZE, _USUAL_SIZE)
        return self._ordered(weight.to_mkldnn(), shape)

    def _ordered(self, weight: Tensor, shape: Sequence[int]) -> Any:
        """Packed weights in the order that is fastest for inputs of a shape."""
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        return reorder(weight, self.padding, self.stride, self.dilation, self.groups, shape)

    def convolved(self, x: Tensor, padding: Pair) -> Tensor:
        return self._faster(x, padding)

    def _directly(self, x: Tensor, padding: Pair) -> Tensor:
        if self._is_plain_3x3 and padding == (1, 1) and gains_by_halves(x, self.out_channels):
            return joined_halves(self._by_onednn(halves(x), (0, 1), halved=True), x.shape[2])
        return self._by_onednn(x, padding)

    def _by_onednn(self, x: Tensor, padding: Pair, halved: bool = False) -> Tensor:
        # oneDNN reorders weights at every call where they suit other shapes, so they are reordered
        # once when the width changes. Strips of one map differ in height and padding, which must
        # not count.
        order = x.shape[3], halved
        if order != self._order:
            self._packed = self._ordered(self._packed, x.shape)
            self._order = order
        return torch.ops.mkldnn._convolution_pointwise(
            *(x, self._packed, self._bias, padding, self.stride, self.dilation, self.groups),
            *(self._attribute, [], ""),
        )


class PackedWindowLinear(Packed, FusedWindowLinear):
    """A fully connected layer at every window on a CPU, with the weights in oneDNN's order.

    Specialised for a size in bfloat16, it may hold a second form of them for maps of that size.
    """

    _rows: RowConvolution | None = None
    _sides = (2, 3, 4, 5, 8)

    def __init__(
        self, weight: Tensor, bias: Tensor, dilation: Pair, relu: bool, winograd: bool = False
    ):
        self._tries_winograd = winograd
        super().__init__(weight, bias, dilation, relu)

    def _for_packing(self, weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)

    @property
    def _tiling(self) -> Tiling:  # type: ignore[override]
        return window_tiling(self.kernel[0])

    @property
    def _suits_winograd(self) -> bool:
        return self._is_wide

    def _pack(self, weight: Tensor) -> Any:  # (O, kh*kw*C)
        return on_huge_pages(torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_ROWS))

    @property
    def _is_wide(self) -> bool:
        """Whether the layer is one of those for which other forms than products were measured."""
        square = self.kernel[0] == self.kernel[1] and self.kernel[0] in _WINDOW_KERNELS
        wide = min(self.out_channels, self.in_channels) >= _LEAST_WINDOW_CHANNELS
        return square and wide and self.dilation == (1, 1)

    def specialise(self, x: Tensor) -> None:
        super().specialise(x)
        grid = self._outputs(x, (0, 0))
        if self._is_wide and self.dtype == torch.bfloat16 and RowConvolution.suits(grid):
            rows = self._row_convolution(grid)
            if _agree(rows(x), self.forward(x)):  # a call of the module would come back here
                self._rows = rows

    def _row_convolution(self, grid: Pair) -> RowConvolution:
        weight = self._packed.to_dense()  # (O, kh*kw*C)
        return RowConvolution(weight, self._bias, self.kernel, grid, self.relu)

    def __getstate__(self) -> dict[str, Any]:
        grid = None if self._rows is None else self._rows.grid
        return {**super().__getstate__(), "_rows": None, "_grid": grid}

    def __setstate__(self, state: dict[str, Any]) -> None:
        grid = state.pop("_grid")
        super().__setstate__(state)
        if grid is not None and RowConvolution.suits(grid):
            self._rows = self._row_convolution(grid)

    def forward(self, x: Tensor) -> Tensor:
        """The layer by the fastest of four ways for the shape of `x`."""
        if self.kernel == (1, 1):
            return self._linear(x.movedim(1, -1)).movedim(-1, 1)  # (N, H, W, C) and back
        if self._rows is not None and self._rows.takes(x):
            return self._rows(x)
        return self._faster(x, (0, 0))

    def _directly(self, x: Tensor, padding: Pair) -> Tensor:
        cells = self.gathered * GEMM_CELLS
        return by_windows(
            *(x, self.kernel, self.dilation, self._linear), channels_last=True, cells=cells
        )

    @property
    def gathered(self) -> int:
        """How many times the usual number of windows are gathered: as many bytes in bfloat16."""
        return 2 if self.dtype == torch.bfloat16 else 1

    def _linear(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(
            rows.contiguous(), self._packed, self._bias, self._attribute, [], ""
        )

    def held_bytes(self) -> int:
        return super().held_bytes() + (0 if self._rows is None else self._rows.held_bytes())


class HalvingMaxPool2d(nn.Module):
    """``nn.MaxPool2d(2)`` in bfloat16, without the indices that torch computes as well.

    Args:
        positive: whether the map comes from a ReLU. As integers the bits of such numbers have the
            same order, and the processor compares them without conversion to float32.
    """

    def __init__(self, positive: bool = False):
        super().__init__()
        self.positive = positive

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.maximum(*_pairs(self._comparable(x), 2))
        return torch.maximum(*_pairs(rows, 3)).view(x.dtype)

    def halve_into(self, x: Tensor, out: Tensor) -> None:
        """Write the same into `out`; the rows of `x` are overwritten, which are in the cache."""
        x, out = self._comparable(x), self._comparable(out)
        rows, below = _pairs(x, 2)
        torch.maximum(rows, below, out=rows)
        torch.maximum(*_pairs(rows, 3), out=out)

    def _comparable(self, x: Tensor) -> Tensor:
        return x.view(torch.int16) if self.positive else x


def _pairs(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Every second row (axis 2) or column (axis 3), and its neighbour."""
    end = x.shape[axis] // 2 * 2
    if axis == 2:
        return x[:, :, 0:end:2], x[:, :, 1:end:2]
    return x[..., 0:end:2], x[..., 1:end:2]


def _slide_conv(conv: FusedConv2d) -> Sliding:
    windows = windows_of(conv.kernel, conv.stride, conv.padding, conv.dilation)
    return Sliding(
        windows,
        lambda x, part: conv.convolved(x, part.padding(windows)),
        channels=conv.out_channels,
        pads_width=True,
        pads_height=True,
        columns=conv.weight_count // conv.out_channels,
        weights=conv.weight_count,
    )


def _slide_linear(layer: FusedWindowLinear) -> Sliding:
    columns = 0 if layer.kernel == (1, 1) else layer.weight_count // layer.out_channels
    gathered = layer.gathered if isinstance(layer, PackedWindowLinear) else 1
    return Sliding(
        windows_of(layer.kernel, (1, 1), (0, 0), layer.dilation),
        lambda x, part: layer(x),
        channels=layer.out_channels,
        columns=columns * gathered,
        weights=layer.weight_count,
        gathers=True,
    )


def _slide_pool(pool: HalvingMaxPool2d) -> Sliding:
    windows = windows_of(2)
    return Sliding(
        windows,
        lambda x, part: pool(x),
        value=-torch.inf,
        pads_width=True,
        into=pool.halve_into,
    )


register(FusedConv2d, PackedConv2d, slides=_slide_conv)
register(FusedWindowLinear, PackedWindowLinear, slides=_slide_linear)
register(HalvingMaxPool2d, slides=_slide_pool)


def _agree(scores: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute scores in bfloat16 differ by its rounding only."""
    difference = (scores.float() - expected.float()).abs().max()
    return bool(difference <= _BFLOAT16_ROUNDING * expected.abs().max())
