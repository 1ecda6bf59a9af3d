"""The layers that a converted network has in place of the source's: plain `nn.Module` classes.

Each computes at every window position of a map what the source's layer computes once. They know
tensors only; where they are put is decided in `fcvgg.conversion`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.geometry import Pair

GEMM_CELLS = 400
"""Cells whose windows are gathered at a time for one matrix product.

A convolution with a 7x7 kernel reorders all its weights at every call: 411 MB for a VGG, and more
time than the product itself while there are few cells. Gathered windows cost memory in proportion
to the cells, 100 kB each for a VGG, hence blocks; with fewer cells at a time the weights are read
too often (examples/benchmarks/NOTES.md). A convolution remains where gradients would keep all the
windows, and on a GPU.
"""


class WindowLinear(nn.Conv2d):
    """A fully connected layer applied at every position of its window.

    ``(N, C, H, W) -> (N, O, h, w)`` with a weight ``(O, C, kh, kw)``: the columns of the FC weight
    ``(O, C*kh*kw)`` in the order of the map. `column_order` gives that order, ``weight =
    fc_weight[:, column_order]``, where the source permuted before it flattened. FC-shaped weights
    are reshaped as they are loaded.
    """

    column_order: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        dilation: Pair = (1, 1),
        bias: bool = True,
        column_order: Tensor | None = None,
        device: Any = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, dilation=dilation, bias=bias, device=device
        )
        self.register_buffer("column_order", column_order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return window_linear(x, self.weight, self.bias, self.dilation)  # type: ignore[arg-type]

    def fc_weight(self) -> Tensor:
        """The weight as the source holds it: ``(O, C*kh*kw)``, columns in the source's order."""
        columns = self.weight.detach().flatten(1)
        return columns if self.column_order is None else columns[:, self.fc_order()]

    def fc_order(self) -> Tensor:
        """The window's element that each column of the FC weight multiplies: ``(C*kh*kw,)``."""
        if self.column_order is None:
            return torch.arange(self.weight[0].numel(), device=self.weight.device)
        return self.column_order.argsort()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **names: Any
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.ndim == 2 and weight.numel() == self.weight.numel():
            if self.column_order is not None:
                weight = weight[:, self.column_order.to(weight.device)]
            state_dict[f"{prefix}weight"] = weight.reshape(self.weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest, **names)


def window_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Pair) -> Tensor:
    """``F.linear`` at every window position.

    Args:
        x: map ``(N, C, H, W)``.
        weight: ``(O, C, kh, kw)``.
        dilation: spacing of the window's elements.

    Returns:
        map ``(N, O, H - (kh-1)*dilation, W - (kw-1)*dilation)``.
    """
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        # one operation that every runtime knows, for every size
        return F.conv2d(x, weight, bias, dilation=dilation)
    kernel = (weight.shape[2], weight.shape[3])
    if kernel == (1, 1):
        rows = x.movedim(1, -1)  # (N, h, w, C)
        return F.linear(rows, weight.flatten(1), bias).movedim(-1, 1)
    height, width = (n - (k - 1) * d for n, k, d in zip(x.shape[2:], kernel, dilation))
    if height == width == 1:
        row = x[..., :: dilation[0], :: dilation[1]].flatten(1)  # (N, C*kh*kw)
        return F.linear(row, weight.flatten(1), bias)[..., None, None]
    cells = len(x) * height * width
    keeps_windows = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if min(height, width) < 1 or (cells > GEMM_CELLS and (keeps_windows or x.is_cuda)):
        return F.conv2d(x, weight, bias, dilation=dilation)
    columns = weight.flatten(1)  # (O, C*kh*kw)
    twice = 2 * GEMM_CELLS  # MKL is a twentieth faster, and maps of so many cells are large too
    return by_windows(x, kernel, dilation, lambda rows: F.linear(rows, columns, bias), cells=twice)


def by_windows(
    x: Tensor,
    kernel: Pair,
    dilation: Pair,
    linear: Callable[[Tensor], Tensor],
    channels_last: bool = False,
    cells: int | None = None,
) -> Tensor:
    """A function of rows ``(n, C*kh*kw) -> (n, O)`` at every window of a map.

    The windows are gathered for `cells` at a time, None for `GEMM_CELLS`; with `channels_last`
    their elements come in the order ``(kh, kw, C)``.
    """
    most = GEMM_CELLS if cells is None else cells
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    windows = x.unfold(2, spans[0], 1).unfold(3, spans[1], 1)  # (N, C, h, w, span, span)
    windows = windows[..., :: dilation[0], :: dilation[1]]
    windows = windows.permute((0, 2, 3, 4, 5, 1) if channels_last else (0, 2, 3, 1, 4, 5))
    count, height, width = windows.shape[:3]
    columns = prod(windows.shape[3:])

    if count * height * width <= most:
        rows = windows.reshape(-1, columns)  # the copy
        return linear(rows).unflatten(0, windows.shape[:3]).movedim(-1, 1)
    images = max(most // (height * width), 1)
    down = max(min(most // width, height), 1)
    across = min(most, width)
    gathered = x.new_empty(min(images, count) * down * across, columns)
    result: Tensor | None = None
    for i in range(0, count, images):
        for row in range(0, height, down):
            for col in range(0, width, across):
                place = slice(i, i + images), slice(row, row + down), slice(col, col + across)
                part = windows[place]
                rows = gathered[: prod(part.shape[:3])]
                rows.view(part.shape).copy_(part)
                scores = linear(rows)
                if result is None:
                    result = scores.new_empty(count, height, width, scores.shape[-1])
                result[place] = scores.unflatten(0, part.shape[:3])
    assert result is not None
    return result.movedim(-1, 1)


def cut_to(x: Tensor, *others: Tensor) -> Tensor:
    """The first rows and columns of a map ``(N, C, H, W)``, as many as all the others have too."""
    height, width = (min(m.shape[dim] for m in (x, *others)) for dim in (2, 3))
    return x[:, :, :height, :width]


class Patches(nn.Module):
    """The elements of every window as channels: ``(N, C, H, W) -> (N, C*kh*kw, h, w)``.

    Channel ``(c*kh + i)*kw + j`` holds element (i, j) of channel c, as in `torch.nn.Unfold`.
    """

    def __init__(self, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair):
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        top, left = self.padding
        x = F.pad(x, (left, left, top, top))
        for dim in (2, 3):  # (N, C, kh, H, W), then (N, C, kh, kw, h, w)
            kernel, stride, dilation = (
                v[dim - 2] for v in (self.kernel_size, self.stride, self.dilation)
            )
            rows = x.ndim - 4 + dim
            cells = (x.shape[rows] - (kernel - 1) * dilation - 1) // stride + 1
            taken = (cells - 1) * stride + 1
            parts = [x.narrow(rows, i * dilation, taken) for i in range(kernel)]
            parts = [p[..., ::stride, :] if dim == 2 else p[..., ::stride] for p in parts]
            x = torch.stack(parts, x.ndim - 2)
        return x.flatten(1, 3)

    def extra_repr(self) -> str:
        return (
            f"{self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}"
        )


class BinnedPool2d(nn.Module):
    """Adaptive pooling of every window of a fixed size: the bins become channels.

    ``(N, C, H, W) -> (N, C*oh*ow, h, w)`` with stride 1: each window of `window` positions is
    pooled to `bins` by torch's adaptive rule, where bin i covers ``floor(i*n/o)`` to
    ``ceil((i+1)*n/o)``, and channel ``(c*oh + i)*ow + j`` holds bin (i, j) of channel c.
    """

    def __init__(self, kind: str, window: Pair, bins: Pair, dilation: Pair = (1, 1)):
        super().__init__()
        self.kind = kind
        self.window = window
        self.bins = bins
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        for axis in (0, 1):
            x = self._pool(x, axis)
        return x.flatten(1, 3)

    def _pool(self, x: Tensor, axis: int) -> Tensor:
        """Pool the windows of one axis and put their bins before the last two dimensions."""
        window, bins, dilation = (v[axis] for v in (self.window, self.bins, self.dilation))
        dim = x.ndim - 2 + axis
        cells = x.shape[dim] - (window - 1) * dilation

        def shifted(position: int) -> Tensor:
            return x.narrow(dim, position * dilation, cells)

        pooled = []
        for i in range(bins):
            first, end = i * window // bins, -(-(i + 1) * window // bins)
            total = shifted(first)
            for position in range(first + 1, end):
                other = shifted(position)
                total = total + other if self.kind == "avg" else torch.maximum(total, other)
            pooled.append(total / (end - first) if self.kind == "avg" else total)
        return torch.stack(pooled, x.ndim - 2)

    def extra_repr(self) -> str:
        return f"{self.kind}, window={self.window}, bins={self.bins}, dilation={self.dilation}"


class DilatedAvgPool2d(nn.Module):
    """Average pooling whose elements lie `dilation` apart, which torch does not have.

    The padding counts as zeros, or, with ``count_include_pad=False``, not at all.
    """

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ):
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.count_include_pad = count_include_pad
        self.divisor_override = divisor_override

    def forward(self, x: Tensor) -> Tensor:
        if self.divisor_override is not None:
            return self._sum(x) / self.divisor_override
        if self.count_include_pad or self.padding == (0, 0):
            return self._sum(x) / (self.kernel_size[0] * self.kernel_size[1])
        return self._sum(x) / self._sum(torch.ones_like(x[:1, :1]))

    def _sum(self, x: Tensor) -> Tensor:
        top, left = self.padding
        x = F.pad(x, (left, left, top, top))
        for dim, kernel, stride, dilation in zip(
            (2, 3), self.kernel_size, self.stride, self.dilation
        ):
            cells = x.shape[dim] - (kernel - 1) * dilation
            shifted = [x.narrow(dim, i * dilation, cells) for i in range(kernel)]
            x = torch.stack(shifted).sum(0)
            x = x[:, :, ::stride] if dim == 2 else x[..., ::stride]
        return x

    def extra_repr(self) -> str:
        return (
            f"{self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}"
        )


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation of each cell's features: ``(N, C, h, w)``, normalised over C."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.movedim(1, -1).unflatten(-1, self.normalized_shape)  # (N, h, w, *shape)
        return super().forward(rows).flatten(3).movedim(-1, 1)


class ChannelRMSNorm(nn.RMSNorm):
    """Root mean square normalisation of each cell's features ``(N, C, h, w)`` over C."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1).unflatten(-1, self.normalized_shape)  # (N, h, w, *shape)
        return super().forward(rows).flatten(3).movedim(-1, 1)


def over_channels(
    x: Tensor,
    name: str,
    sizes: tuple[int, ...],
    dims: tuple[int, ...],
    settings: tuple[Any, ...],
    channels: int,
) -> Tensor:
    """A function along the channels of each position: ``(N, C, h, w) -> (N, channels, h, w)``.

    Args:
        name: a key of `ALONG_CHANNELS`.
        sizes: what the C channels unfold into, as ``x.unflatten(1, sizes)``.
        dims: of `sizes`, those that the function works along.
        settings: further arguments of it.
        channels: of the result.
    """
    unfolded = x.unflatten(1, sizes)  # (N, *sizes, h, w)
    made = ALONG_CHANNELS[name](unfolded, tuple(1 + dim for dim in dims), *settings)
    made = made.flatten(1, -3) if made.ndim > 4 else made
    assert made.shape[1] == channels, (name, made.shape, channels)
    return made


def _adaptive_pool1d(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def along(x: Tensor, dims: tuple[int, ...], bins: int) -> Tensor:
        rows = x.movedim(dims[0], -1)
        pooled = pool(rows.flatten(0, -2)[:, None], bins)[:, 0]  # (rows, bins)
        return pooled.unflatten(0, rows.shape[:-1]).movedim(-1, dims[0])

    return along


def _avg_pool(
    x: Tensor, dims: tuple[int, ...], kernel: int, stride: int, padding: int, *rounding: Any
) -> Tensor:
    """Averages over windows of one dimension: ``(N, ..., C, h, w)``."""
    volumes = x.movedim(dims[0], -3).flatten(0, -4)[:, None]  # (n, 1, C, h, w)
    pooled = F.avg_pool3d(volumes, (kernel, 1, 1), (stride, 1, 1), (padding, 0, 0), *rounding)
    others = [n for i, n in enumerate(x.shape[:-2]) if i != dims[0]]
    return pooled[:, 0].unflatten(0, others).movedim(-3, dims[0])


def _group_norm(x: Tensor, dims: tuple[int, ...], groups: int, eps: float) -> Tensor:
    cells = x.movedim(1, -1)  # (N, h, w, C)
    return F.group_norm(cells.flatten(0, 2), groups, eps=eps).view(cells.shape).movedim(-1, 1)


def _quantile(
    function: Callable[..., Tensor], x: Tensor, dims: tuple[int, ...], q: float, kind: str
) -> Tensor:
    return function(x, q, dims[0], True, interpolation=kind)


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mean": lambda x, dims: x.mean(dims, keepdim=True),
    "sum": lambda x, dims: x.sum(dims, keepdim=True),
    "amax": lambda x, dims: x.amax(dims, keepdim=True),
    "amin": lambda x, dims: x.amin(dims, keepdim=True),
    "prod": lambda x, dims: x.prod(dims[0], keepdim=True),
    "nanmean": lambda x, dims: x.nanmean(dims, keepdim=True),
    "nansum": lambda x, dims: x.nansum(dims, keepdim=True),
    "median": lambda x, dims: x.median(dims[0], keepdim=True).values,
    "nanmedian": lambda x, dims: x.nanmedian(dims[0], keepdim=True).values,
    "quantile": lambda x, dims, q, kind: _quantile(torch.quantile, x, dims, q, kind),
    "nanquantile": lambda x, dims, q, kind: _quantile(torch.nanquantile, x, dims, q, kind),
    "var": lambda x, dims, correction: x.var(dims, correction=correction, keepdim=True),
    "std": lambda x, dims, correction: x.std(dims, correction=correction, keepdim=True),
    "norm": lambda x, dims, order: torch.linalg.vector_norm(x, order, dims, keepdim=True),
    "logsumexp": lambda x, dims: x.logsumexp(dims, keepdim=True),
    "kthvalue": lambda x, dims, k: x.sort(dims[0]).values.narrow(dims[0], k - 1, 1),
}
"""Functions that leave one value of those along some dimensions."""

ALONG_CHANNELS: dict[str, Callable[..., Tensor]] = {
    **REDUCTIONS,
    "group_norm": _group_norm,
    "softmax": lambda x, dims: x.softmax(dims[0]),
    "softmin": lambda x, dims: F.softmin(x, dims[0]),
    "log_softmax": lambda x, dims: x.log_softmax(dims[0]),
    "normalize": lambda x, dims, p, eps: F.normalize(x, p, dims[0], eps),  # type: ignore[arg-type]
    "cumsum": lambda x, dims: x.cumsum(dims[0]),
    "cumprod": lambda x, dims: x.cumprod(dims[0]),
    "logcumsumexp": lambda x, dims: x.logcumsumexp(dims[0]),
    "sort": lambda x, dims, descending: x.sort(dims[0], descending).values,
    "topk": lambda x, dims, k, largest: x.topk(k, dims[0], largest).values,
    "pad": lambda x, dims, *pads: F.pad(x.movedim(dims[0], -1), *pads).movedim(-1, dims[0]),
    "avg_pool": _avg_pool,
    "glu": lambda x, dims: F.glu(x, dims[0]),
    "adaptive_avg_pool1d": _adaptive_pool1d(F.adaptive_avg_pool1d),
    "adaptive_max_pool1d": _adaptive_pool1d(F.adaptive_max_pool1d),
}
"""What `over_channels` computes. The first argument is ``(N, *sizes, h, w)``."""


class TrainingFlag(nn.Module):
    """Gives the network's mode to functions that take it: ``F.dropout(x, p, training=flag())``."""

    def forward(self) -> bool:
        return self.training


class TrainingOnly(nn.Module):
    """A layer of the source's that gives back what it gets in evaluation mode.

    Stochastic depth and noise are such layers; in training mode the layer computes as it does in
    the source: from the same random numbers, which follow the layout in memory. It holds no
    parameters.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.training = layer.training

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.contiguous()) if self.training else x
