"""The layers of an optimised network: evaluation only, with bias and ReLU in one call.

`FusedConv2d` and `FusedWindowLinear` run on any device and in any dtype. `PackedConv2d` and
`PackedWindowLinear` hold their weights in the order that oneDNN computes with, so that no call
reorders them, and may hold another form of them beside it: transformed for Winograd's algorithm, or
ordered for a convolution over rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.geometry import Pair, Window
from fcvgg.inference.memory import on_huge_pages
from fcvgg.inference.sliding import Sliding, Windows, strip_rule
from fcvgg.optimization.onednn import RowConvolution, gains_by_halves, halves, joined_halves
from fcvgg.optimization.winograd import (
    CONVOLUTION,
    Tiling,
    window_tiling,
    winograd_convolution,
)
from fcvgg.rewriting.modules import _GEMM_CELLS, by_windows, window_linear

_USUAL_ROWS = 100
"""Rows of the product that packed fully connected weights are ordered for; any number runs."""

_USUAL_SIZE = 56
"""Rows and columns of the map that convolution weights are ordered for before one was seen."""

_LEAST_CHANNELS = 128
"""Channels from which Winograd's transforms cost less than the products they save."""

_LEAST_TILES = 32
"""Tiles of a convolution below which reading the larger transformed weights takes longer."""

_LEAST_WINDOW_TILES = 16
"""The same for a fully connected layer at every window."""

_BFLOAT16_ROUNDING = 2**-6
"""Of the largest score: numbers have 8 bits, and the order of sums differs."""

_WINDOW_KERNELS = range(5, 8)
"""Extents of the windows for which Winograd's algorithm saves enough multiplications."""


class FusedConv2d(nn.Module):
    """A convolution with bias, and the ReLU after it."""

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor, relu: bool):
        super().__init__()
        self.stride = _pair(conv.stride)
        self.padding = _pair(conv.padding)
        self.dilation = _pair(conv.dilation)
        self.groups = conv.groups
        self.kernel = (weight.shape[2], weight.shape[3])
        self.out_channels, self.in_channels = weight.shape[:2]  # the inputs of one group
        self.relu = relu
        self._take(weight, bias)

    def _take(self, weight: Tensor, bias: Tensor) -> None:
        layout = torch.channels_last if weight.is_cuda else torch.contiguous_format
        self.weight = nn.Parameter(weight.contiguous(memory_format=layout), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolved(x, self.padding)

    def convolved(self, x: Tensor, padding: Pair) -> Tensor:
        """The layer with other padding: none for rows that come padded."""
        x = F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        return x.relu_() if self.relu else x

    def held_bytes(self) -> int:
        """Bytes of the layer's own weights."""
        return _bytes(self.weight)

    def extra_repr(self) -> str:
        return f"{self.out_channels}, kernel={self.kernel}, padding={self.padding}, {self.relu=}"


class Packed(nn.Module):
    """Weights in an order that only oneDNN can read, and perhaps Winograd's kernels beside them.

    Both are shared by copies; oneDNN's are packed anew after a pickle.
    """

    _packed: Any
    _bias: Tensor
    _kernels: Tensor | None
    _tiling: Tiling

    def _pack(self, weight: Tensor) -> Any:
        raise NotImplementedError

    def _padding(self) -> Pair:
        return (0, 0)

    @property
    def dtype(self) -> torch.dtype:
        return self._bias.dtype

    @property
    def has_winograd(self) -> bool:
        return self._kernels is not None

    def settle(self, x: Tensor) -> None:
        """Keep only the form of the weights that is faster on maps of this size."""
        if self._kernels is None:
            return
        if self._suits(x, self._padding()):
            self._packed = None
        else:
            self._kernels = None

    def _by_winograd(self, x: Tensor, padding: Pair, relu: bool) -> Tensor | None:
        """The layer by Winograd's algorithm; None where oneDNN is faster."""
        if self._kernels is None or not (self._packed is None or self._suits(x, padding)):
            return None
        return winograd_convolution(self._tiling, x, self._kernels, self._bias, padding, relu)

    def _suits(self, x: Tensor, padding: Pair) -> bool:
        raise NotImplementedError

    def _outputs(self, x: Tensor, padding: Pair) -> Pair:
        height, width = (n + 2 * p - self._tiling.kernel + 1 for n, p in zip(x.shape[2:], padding))
        return height, width

    def _held_bytes(self, weights: int) -> int:
        own = 0 if self._packed is None else weights * self._bias.element_size()
        return own + _bytes(self._kernels)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        held = ("_packed", "_kernels", "_rows", "_bias")  # replaced, never changed
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
    """The same on a CPU through oneDNN: weights in its order, and perhaps Winograd's beside."""

    _tiling = CONVOLUTION

    def __init__(
        self, conv: nn.Conv2d, weight: Tensor, bias: Tensor, relu: bool, winograd: bool = False
    ):
        self._tries_winograd = winograd
        super().__init__(conv, weight, bias, relu)

    def _take(self, weight: Tensor, bias: Tensor) -> None:
        self._bias = bias
        self._kernels = None
        self._order: Any = None
        self._packed = self._pack(weight)
        if self._tries_winograd and self._allows_winograd(weight):
            self._kernels = on_huge_pages(self._tiling.kernels(weight))

    def _pack(self, weight: Tensor) -> Any:
        shape = (1, self.in_channels * self.groups, _USUAL_SIZE, _USUAL_SIZE)
        return self._ordered(weight.to_mkldnn(), shape)

    def _ordered(self, weight: Tensor, shape: Sequence[int]) -> Any:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        window = (self.padding, self.stride, self.dilation)
        return reorder(weight, *window, self.groups, shape)

    def _allows_winograd(self, weight: Tensor) -> bool:
        regular = self.kernel == (3, 3) and self.stride == self.dilation == (1, 1)
        wide = min(weight.shape[:2]) >= _LEAST_CHANNELS
        return regular and wide and self.groups == 1 and weight.dtype == torch.float32

    def _padding(self) -> Pair:
        return self.padding

    def _suits(self, x: Tensor, padding: Pair) -> bool:
        return len(x) * self._tiling.tiles(*self._outputs(x, padding)) >= _LEAST_TILES

    def convolved(self, x: Tensor, padding: Pair) -> Tensor:
        scores = self._by_winograd(x, padding, self.relu)
        if scores is not None:
            return scores
        if self._gains_by_halves(x, padding):
            return joined_halves(self._by_onednn(halves(x), (0, 1), halved=True), x.shape[2])
        return self._by_onednn(x, padding)

    def _gains_by_halves(self, x: Tensor, padding: Pair) -> bool:
        regular = self.kernel == (3, 3) and self.stride == self.dilation == padding == (1, 1)
        return regular and self.groups == 1 and gains_by_halves(x, self.out_channels)

    def _by_onednn(self, x: Tensor, padding: Pair, halved: bool = False) -> Tensor:
        order = x.shape[3], halved  # not the height and the padding: strips differ in them
        if order != self._order:  # or oneDNN would reorder the weights at every call
            self._packed = self._ordered(self._packed, x.shape)
            self._order = order
        attribute = "relu" if self.relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(
            *(x, self._packed, self._bias, padding, self.stride, self.dilation, self.groups),
            *(attribute, [], ""),
        )

    def held_bytes(self) -> int:
        kernel = self.kernel[0] * self.kernel[1]
        return self._held_bytes(self.out_channels * self.in_channels * kernel)


class FusedWindowLinear(nn.Module):
    """A fully connected layer at every window, with bias, and the ReLU after it."""

    def __init__(self, weight: Tensor, bias: Tensor, dilation: Pair, relu: bool):
        super().__init__()
        self.kernel = (weight.shape[2], weight.shape[3])
        self.out_channels, self.in_channels = weight.shape[:2]
        self.dilation = dilation
        self.relu = relu
        self._take(weight, bias)

    def _take(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = window_linear(x, self.weight, self.bias, self.dilation)
        return x.relu_() if self.relu else x

    def held_bytes(self) -> int:
        """Bytes of the layer's own weights."""
        return _bytes(self.weight)

    def extra_repr(self) -> str:
        return f"{self.out_channels}, kernel={self.kernel}, dilation={self.dilation}, {self.relu=}"


class PackedWindowLinear(Packed, FusedWindowLinear):
    """The same on a CPU through oneDNN, with the weights in its order.

    Settled for a size in bfloat16, it may hold a second form of them for maps of that size.
    """

    _rows: RowConvolution | None = None

    def __init__(
        self, weight: Tensor, bias: Tensor, dilation: Pair, relu: bool, winograd: bool = False
    ):
        self._tries_winograd = winograd
        super().__init__(weight, bias, dilation, relu)

    def _take(self, weight: Tensor, bias: Tensor) -> None:
        self._bias = bias
        self._kernels = None
        self._tiling = window_tiling(self.kernel[0])
        if self._tries_winograd and self._allows_winograd(weight):
            self._kernels = on_huge_pages(self._tiling.kernels(weight))
        self._packed = self._pack(weight.permute(0, 2, 3, 1).reshape(len(weight), -1))

    def _pack(self, weight: Tensor) -> Any:  # (O, kh*kw*C)
        return on_huge_pages(torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_ROWS))

    def _allows_winograd(self, weight: Tensor) -> bool:
        return self._is_wide() and weight.dtype == torch.float32

    def _is_wide(self) -> bool:
        """Whether the layer is one of those for which other forms than products were measured."""
        square = self.kernel[0] == self.kernel[1] and self.kernel[0] in _WINDOW_KERNELS
        wide = min(self.out_channels, self.in_channels) >= _LEAST_CHANNELS
        return square and wide and self.dilation == (1, 1)

    def _suits(self, x: Tensor, padding: Pair) -> bool:
        outputs = self._outputs(x, padding)
        tiles = self._tiling.tiles(*outputs)
        saves = tiles * self._tiling.inputs**2 < prod((*outputs, *self.kernel))
        return saves and tiles >= _LEAST_WINDOW_TILES

    def settle(self, x: Tensor) -> None:
        super().settle(x)
        grid = self._outputs(x, (0, 0))
        if self._is_wide() and self.dtype == torch.bfloat16 and RowConvolution.suits(grid):
            rows = self._row_convolution(grid)
            if _agree(rows(x), self.forward(x)):  # calling it would settle it again
                self._rows = rows

    def _row_convolution(self, grid: Pair) -> RowConvolution:
        weight = self._packed.to_dense()
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
        if self.kernel == (1, 1):
            return self._linear(x.movedim(1, -1)).movedim(-1, 1)
        if self._rows is not None and self._rows.takes(x):
            return self._rows(x)
        scores = self._by_winograd(x, (0, 0), self.relu)
        if scores is not None:
            return scores
        cells = self.gathered * _GEMM_CELLS
        return by_windows(
            *(x, self.kernel, self.dilation, self._linear), channels_last=True, cells=cells
        )

    @property
    def gathered(self) -> int:
        """How many times the usual number of windows are gathered: as many bytes in bfloat16."""
        return 2 if self.dtype == torch.bfloat16 else 1

    def _linear(self, rows: Tensor) -> Tensor:
        attribute = "relu" if self.relu else "none"
        return torch.ops.mkldnn._linear_pointwise(
            rows.contiguous(), self._packed, self._bias, attribute, [], ""
        )

    def held_bytes(self) -> int:
        kernel = self.kernel[0] * self.kernel[1]
        held = self._held_bytes(self.out_channels * self.in_channels * kernel)
        return held + (0 if self._rows is None else self._rows.held_bytes())


class HalvingMaxPool2d(nn.Module):
    """``nn.MaxPool2d(2)`` in bfloat16, without the indices that torch computes beside it.

    Args:
        positive: whether the map comes from a ReLU. The bits of such numbers are in order as
            integers, which the processor compares without widening them.
    """

    def __init__(self, positive: bool = False):
        super().__init__()
        self.positive = positive

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.maximum(*_pairs(self._comparable(x), 2))
        return torch.maximum(*_pairs(rows, 3)).view(x.dtype)

    def halve_into(self, x: Tensor, out: Tensor) -> None:
        """Write the same into `out`, and overwrite rows of `x`, which are in the cache."""
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


def has_packing() -> bool:
    """Whether this torch has oneDNN with the operations that packed layers call."""
    operations = ("_convolution_pointwise", "_linear_pointwise", "_reorder_linear_weight")
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
        and all(hasattr(torch.ops.mkldnn, name) for name in operations)
    )


@strip_rule(FusedConv2d, PackedConv2d)
def _conv_strip(conv: FusedConv2d) -> Sliding:
    windows = _windows(conv.kernel, conv.stride, conv.padding, conv.dilation)
    return Sliding(
        windows,
        lambda x, part: conv.convolved(x, part.padding(windows)),
        channels=conv.out_channels,
        pads_width=True,
        pads_height=True,
        columns=conv.kernel[0] * conv.kernel[1] * conv.in_channels,
        weights=conv.out_channels * conv.in_channels * conv.kernel[0] * conv.kernel[1],
    )


@strip_rule(FusedWindowLinear, PackedWindowLinear)
def _linear_strip(layer: FusedWindowLinear) -> Sliding:
    pointwise = layer.kernel == (1, 1)
    columns = layer.in_channels * layer.kernel[0] * layer.kernel[1]
    gathered = layer.gathered if isinstance(layer, PackedWindowLinear) else 1
    return Sliding(
        _windows(layer.kernel, (1, 1), (0, 0), layer.dilation),
        lambda x, part: layer(x),
        channels=layer.out_channels,
        columns=0 if pointwise else columns * gathered,
        weights=layer.out_channels * columns,
        gathers=True,
    )


@strip_rule(HalvingMaxPool2d)
def _pool_strip(pool: HalvingMaxPool2d) -> Sliding:
    windows = _windows((2, 2), (2, 2), (0, 0), (1, 1))
    return Sliding(
        windows,
        lambda x, part: pool(x),
        value=-torch.inf,
        pads_width=True,
        into=pool.halve_into,
    )


def _windows(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Windows:
    height, width = (
        Window(kernel[i], stride[i], dilation[i], padding[i], padding[i]) for i in (0, 1)
    )
    return height, width


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _agree(scores: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute scores in bfloat16 differ by its rounding only."""
    difference = (scores.float() - expected.float()).abs().max()
    return bool(difference <= _BFLOAT16_ROUNDING * expected.abs().max())


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
