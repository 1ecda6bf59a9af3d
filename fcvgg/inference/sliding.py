"""How the layers of a converted network compute a part of their map, for `fcvgg.streaming`.

What stands in a converted graph either slides a window (the rules below give its `Sliding`) or
works on every position by itself (`is_positional`). A layer registered with `elementwise.pointwise`
needs nothing more; one with a window needs a `strip_rule` beside its `registry.rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fcvgg.geometry import Pair, Window
from fcvgg.rewriting.modules import (
    _GEMM_CELLS,
    BinnedPool2d,
    ChannelLayerNorm,
    DilatedAvgPool2d,
    WindowLinear,
    cut_to,
    window_linear,
)
from fcvgg.rewriting.rules.convolution import _pair, _windows
from fcvgg.rewriting.rules.registry import calling, kind_of, register

Windows = tuple[Window, Window]


@dataclass(frozen=True)
class Part:
    """The part of a map that is computed: half-open ranges of its rows and columns.

    Attributes:
        rows: output rows.
        cols: output columns.
        size: ``(H, W)`` of the layer's whole input.
        pads_width: whether the layer pads the width itself, since it is given all columns.
        pads_height: whether it pads both ends of the height too, and so gives rows beyond `rows`.
    """

    rows: Pair
    cols: Pair
    size: Pair
    pads_width: bool = False
    pads_height: bool = False

    def padding(self, windows: Windows) -> Pair:
        """What the layer itself pads at both ends of the height and of the width."""
        height, width = windows
        return (
            height.before if self.pads_height else 0,
            width.before if self.pads_width else 0,
        )


@dataclass(frozen=True)
class Sliding:
    """A layer that slides a window, applied to what the windows of some outputs cover.

    Attributes:
        windows: along the height and the width.
        run: computes outputs from a region of the input that is padded already, so that the first
            window starts at its first element and the last ends at its last; but for what the
            `Part` says that the layer pads.
        channels: output channels; None keeps the input's.
        multiplies: output channels per channel of the input, where `channels` is None.
        border: how positions outside the map are filled: ``"constant"``, ``"reflect"``,
            ``"replicate"``.
        value: the constant of the border.
        pads_width: whether `run` can pad the width as torch does where all columns are given.
        pads_height: whether it can pad both ends of the height, too.
        columns: elements per output position that an explicit gathering of windows takes.
        weights: elements of the weights.
        gathers: whether the windows of at most `_GEMM_CELLS` outputs are gathered at a time.
        indexes: whether the layer also makes an int64 index for every output.
        into: writes the outputs into a map ``(N, C, h, w)`` and may overwrite its input; of a layer
            that pads nothing and keeps channels and dtype. None where there is only `run`.
    """

    windows: Windows
    run: Callable[[Tensor, Part], Tensor]
    channels: int | None = None
    multiplies: int = 1
    border: str = "constant"
    value: float = 0.0
    pads_width: bool = False
    pads_height: bool = False
    columns: int = 0
    weights: int = 0
    gathers: bool = False
    indexes: bool = False
    into: Callable[[Tensor, Tensor], None] | None = None


StripRule = Callable[..., Sliding]


def strip_rule(*targets: Any) -> Callable[[StripRule], StripRule]:
    """Register how module classes or functions of converted graphs compute a part of a map.

    The rule gets the module, or the arguments of the function without the map itself.
    """

    def decorated(function: StripRule) -> StripRule:
        register(*targets, slides=function)
        return function

    return decorated


register(ChannelLayerNorm, cut_to, positional=True)


def _convolution(
    weight: Tensor,
    bias: Tensor | None,
    windows: Windows,
    groups: int,
    border: str = "constant",
) -> Sliding:
    height, width = windows
    stride, dilation = (height.stride, width.stride), (height.dilation, width.dilation)

    def run(x: Tensor, part: Part) -> Tensor:
        padding = part.padding(windows)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    pointwise = height.span == width.span == 1 and stride == (1, 1)
    return Sliding(
        windows,
        run,
        channels=weight.shape[0],
        border=border,
        pads_width=border == "constant" and width.before == width.after,
        pads_height=border == "constant" and height.before == height.after,
        columns=0 if pointwise else weight.shape[1:].numel(),
        weights=weight.numel(),
    )


@strip_rule(nn.Conv2d)
def conv2d_module(conv: nn.Conv2d) -> Sliding:
    windows = _windows(conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    border = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return _convolution(conv.weight, conv.bias, windows, conv.groups, border)


@strip_rule(*calling("conv2d"))
def conv2d(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Sliding:
    windows = _windows(weight.shape[2:], stride, padding, dilation)
    return _convolution(weight, bias, windows, groups)


@strip_rule(WindowLinear)
def window_linear_module(layer: WindowLinear) -> Sliding:
    return window_linear_call(layer.weight, layer.bias, _pair(layer.dilation))


@strip_rule(window_linear)
def window_linear_call(weight: Tensor, bias: Tensor | None, dilation: Pair) -> Sliding:
    windows = _windows(weight.shape[2:], 1, 0, dilation)
    height, width = windows

    def run(x: Tensor, part: Part) -> Tensor:
        """Some cells at a time: gathered windows stay small, and no weights are reordered."""
        if height.span == width.span == 1:
            return window_linear(x, weight, bias, dilation)
        rows, cols = x.shape[2] - height.span + 1, x.shape[3] - width.span + 1
        across = min(cols, _GEMM_CELLS)
        down = max(_GEMM_CELLS // across, 1)
        if rows <= down and cols <= across:
            return window_linear(x, weight, bias, dilation)
        scores = x.new_empty(x.shape[0], rows, cols, weight.shape[0]).movedim(-1, 1)
        for top in range(0, rows, down):
            bottom = min(top + down, rows)
            for left in range(0, cols, across):
                right = min(left + across, cols)
                window = x[:, :, top : bottom + height.span - 1, left : right + width.span - 1]
                cells = window_linear(window, weight, bias, dilation)
                scores[:, :, top:bottom, left:right] = cells
        return scores

    return Sliding(
        windows,
        run,
        channels=weight.shape[0],
        columns=0 if height.span == width.span == 1 else weight.shape[1:].numel(),
        weights=weight.numel(),
        gathers=True,
    )


@strip_rule(nn.MaxPool2d)
def max_pool2d_module(pool: nn.MaxPool2d) -> Sliding:
    return max_pool2d(pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)


@strip_rule(F.max_pool2d, torch.max_pool2d)
def max_pool2d(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Sliding:
    windows = _windows(kernel_size, stride, padding, dilation, ceil_mode)
    height, width = windows

    def run(x: Tensor, part: Part) -> Tensor:
        return F.max_pool2d(
            x,
            (height.kernel, width.kernel),
            (height.stride, width.stride),
            (0, width.before if part.pads_width else 0),
            (height.dilation, width.dilation),
            ceil_mode and part.pads_width,  # the width's overhang; the height has none left
        )

    return Sliding(windows, run, value=-torch.inf, pads_width=True, indexes=True)


@strip_rule(nn.AvgPool2d)
def avg_pool2d_module(pool: nn.AvgPool2d) -> Sliding:
    return avg_pool2d(
        *(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode),
        *(pool.count_include_pad, pool.divisor_override),
    )


@strip_rule(*calling("avg_pool2d"))
def avg_pool2d(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Sliding:
    windows = _windows(kernel_size, stride, padding, 1, ceil_mode)
    height, width = windows
    kernel, step = (height.kernel, width.kernel), (height.stride, width.stride)

    def run(x: Tensor, part: Part) -> Tensor:
        counts = _divisors(windows, part, count_include_pad)
        if divisor_override is not None or counts is None:
            return F.avg_pool2d(x, kernel, step, divisor_override=divisor_override)
        return F.avg_pool2d(x, kernel, step, divisor_override=1) / counts.to(x)

    return Sliding(windows, run)


@strip_rule(DilatedAvgPool2d)
def dilated_avg_pool2d(pool: DilatedAvgPool2d) -> Sliding:
    windows = _windows(pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    sums = DilatedAvgPool2d(
        pool.kernel_size, pool.stride, (0, 0), pool.dilation, divisor_override=1
    )

    def run(x: Tensor, part: Part) -> Tensor:
        counts = _divisors(windows, part, pool.count_include_pad)
        if pool.divisor_override is not None:
            return sums(x) / pool.divisor_override
        if counts is None:
            return sums(x) / (pool.kernel_size[0] * pool.kernel_size[1])
        return sums(x) / counts.to(x)

    return Sliding(windows, run, columns=max(pool.kernel_size))


def _divisors(windows: Windows, part: Part, count_padding: bool) -> Tensor | None:
    """What averages ``(h, w)`` are divided by; None where it is the kernel's size everywhere."""
    rows, cols = (
        _counts(window, first_end, size, count_padding)
        for window, first_end, size in zip(windows, (part.rows, part.cols), part.size)
    )
    height, width = windows
    if bool((rows == height.kernel).all() and (cols == width.kernel).all()):
        return None
    return rows[:, None] * cols[None, :]


def _counts(window: Window, outputs: Pair, size: int, count_padding: bool) -> Tensor:
    """How many elements of each window count: padding as asked, what hangs over it never."""
    first = torch.arange(*outputs) * window.stride - window.before
    places = first[:, None] + torch.arange(window.kernel) * window.dilation
    if count_padding:
        return (places < size + window.after).sum(1)
    return ((places >= 0) & (places < size)).sum(1)


@strip_rule(BinnedPool2d)
def binned_pool2d(pool: BinnedPool2d) -> Sliding:
    windows = _windows(pool.window, 1, 0, pool.dilation)
    bins = pool.bins[0] * pool.bins[1]
    return Sliding(windows, lambda x, part: pool(x), multiplies=bins)


@strip_rule(F.pad)
def pad(pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Sliding:
    left, right, top, bottom = (*pad, 0, 0)[:4]
    windows = Window(before=top, after=bottom), Window(before=left, after=right)
    return Sliding(windows, lambda x, part: x, border=mode, value=value or 0.0)


def is_positional(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node of a converted graph computes every position of a map by itself."""
    kind = kind_of(node, module)
    return kind is not None and kind.positional


def sliding_of(node: fx.Node, module: nn.Module | None, arguments: Any) -> Sliding | None:
    """The `Sliding` of a node of a converted graph; None if there is no rule for one.

    Args:
        arguments: gives an argument of the node as a value; of the map itself it gives None.
    """
    kind = kind_of(node, module)
    if kind is None or kind.slides is None:
        return None
    if module is not None:
        return (
            kind.slides(module) if kind.arguments is None else kind.slides(**kind.arguments(module))
        )
    args = fx.node.map_arg(node.args[1:], arguments)
    kwargs = {k: fx.node.map_arg(v, arguments) for k, v in node.kwargs.items() if k != "input"}
    return kind.slides(*args, **kwargs)
