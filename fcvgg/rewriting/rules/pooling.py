"""Layers that reduce positions: pools of every kind, means over a map."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fcvgg.errors import UnsupportedLayerError
from fcvgg.geometry import KernelGeometry, KernelPair, Pair
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells, with_channels
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.marks import FeatureSize
from fcvgg.rewriting.modules import (
    BinnedPool2d,
    DilatedAvgPool2d,
)
from fcvgg.rewriting.rules.convolution import padded_apart, settings_of
from fcvgg.rewriting.rules.registry import (
    attributes,
    calling,
    kind_of,
    register,
    rule,
    sliding_of,
)
from fcvgg.rewriting.sliding import Part, Sliding, pair_of, windows_of


def pool_window(
    build: MapBuilder,
    call: Call,
    x: Cells,
    kind: str,
    bins: Pair,
    divisor: int | None = None,
    wants: Pair | None = None,
) -> Cells:
    """Adaptive pooling of the native window, applied to every window with stride 1.

    `wants` is the size that the pool asks its features to have, None where any will do.
    """
    extent = x.extent[1:]
    build.begin_head(x, wants, call)
    if extent == bins:
        return x.averaged_over((1, 1), x.dilation) if bins == (1, 1) else x
    # Where the bins divide the features, each is a plain pool of the same kernel, and the layers
    # that follow read them `covers` apart. Other bins overlap or differ, and become channels of a
    # cell.
    divides = all(n % o == 0 for n, o in zip(extent, bins))
    covers = extent if not divides else (extent[0] // bins[0], extent[1] // bins[1])
    averages = kind == "avg" and all(o in (1, n) for n, o in zip(extent, bins))
    if averages and build.positions:
        return _left_out(build, x, bins, covers, divisor)
    x, windows = build.head_window(call, x, covers)
    step = build.steps.add(windows, (x.step,), str(call))
    settings: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0)}
    pool: nn.Module
    if not divides:
        pool = BinnedPool2d(kind, extent, bins, x.dilation)
    elif kind == "max":
        pool = nn.MaxPool2d(covers, dilation=x.dilation, **settings)
    elif x.dilation == (1, 1):
        pool = nn.AvgPool2d(covers, divisor_override=divisor, **settings)
    else:
        pool = DilatedAvgPool2d(covers, dilation=x.dilation, divisor_override=divisor, **settings)
    node = build.emit_module(call, pool, x, (extent, bins, x.dilation, kind))
    if divides:
        dilation = tuple(d * (1 if o == 1 else k) for d, k, o in zip(x.dilation, covers, bins))
        result = replace(
            with_channels(_spread_over(x, bins), 0, x.extent[0]),
            node=node,
            step=step,
            dilation=(dilation[0], dilation[1]),
        )
    else:
        # bin (i, j) of channel c is channel (c*oh + i)*ow + j of a map of single cells
        channels = x.extent[0] * bins[0] * bins[1]
        layout = torch.arange(channels).reshape(x.extent[0], *bins)
        result = replace(x, node=node, step=step, extent=(channels, 1, 1), moved=layout)
    result = result.pooled_from(x, kind, divisor)
    if averages:
        result = result.averaged_over(covers, x.dilation)
    build.record(call, type(pool).__name__, windows, result)
    return result


def _left_out(build: MapBuilder, x: Cells, bins: Pair, covers: Pair, divisor: int | None) -> Cells:
    """An average that is to be taken of the scores instead; `divisor` makes another sum of it."""
    node = x.node
    if divisor is not None:
        node = build.graph.call_function(torch.mul, (node, prod(covers) / divisor))
    pooled = with_channels(_spread_over(x, bins), 0, x.extent[0]).pooled_from(x, "avg", divisor)
    return replace(pooled, node=node).averaged_over(covers, x.dilation)


def _spread_over(x: Cells, bins: Pair) -> Cells:
    """The same channels with a window of `bins` positions."""
    extent = (x.extent[0], *bins)
    return replace(x, extent=extent, moved=None)


def features_of(build: MapBuilder, call: Call, x: Any, axis: int) -> tuple[Cells, KernelPair]:
    """The value with all its channels along one axis, and the window that was gathered for it.

    Flattened features of a whole window, which a layer treats each by itself before the first fully
    connected one, become the channels of every cell: ``C*h*w`` numbers for each, exactly.
    """
    x = build.whole(x) if isinstance(x, Cells) else x
    if not isinstance(x, Cells) or x.positions == 1 or x.dims != (x.elements,):
        return build.features(call, x, axis), (KernelGeometry(), KernelGeometry())
    build.begin_head(x, x.elements, call)
    height, width = (KernelGeometry(n, dilation=d) for n, d in zip(x.extent[1:], x.dilation))
    return build.features(call, build.gathered(x, call), axis), (height, width)


@rule(
    *(nn.AdaptiveAvgPool2d, *calling("adaptive_avg_pool2d")),
    arguments=attributes("output_size"),
    has_extent=True,
    role="avgpool",
)
def adaptive_avg_pool2d(build: MapBuilder, call: Call, input: Any, output_size: Any) -> Cells:
    return _adaptive(build, call, input, "avg", output_size)


@rule(
    *(nn.AdaptiveMaxPool2d, *calling("adaptive_max_pool2d")),
    arguments=attributes("output_size", "return_indices"),
    has_extent=True,
    role="maxpool",
)
def adaptive_max_pool2d(
    build: MapBuilder, call: Call, input: Any, output_size: Any, return_indices: bool = False
) -> Cells:
    refuse_indices(call, return_indices)
    return _adaptive(build, call, input, "max", output_size)


def refuse_indices(call: Call, wanted: bool) -> None:
    """Refuse a pool that is asked where its maxima lie."""
    if wanted:
        raise UnsupportedLayerError(f"{call} returns indices, which depend on the map's size")


def _adaptive(build: MapBuilder, call: Call, input: Any, kind: str, output_size: Any) -> Cells:
    x = build.as_map(input, call)
    single = output_size is None or isinstance(output_size, int)
    wanted = (output_size,) * 2 if single else tuple(output_size)
    height, width = (n if o is None else o for n, o in zip(x.extent[1:], wanted))
    any_size = None in wanted or wanted == (1, 1)
    wants = None if any_size else (height, width)
    return pool_window(build, call, x, kind, (height, width), wants=wants)


def _is_global(
    build: MapBuilder, call: Call, x: Cells, kernel: Any, padding: Any, kind: str
) -> bool:
    """Whether a pool stands for a global one, which slides by one: it covers all of the features.

    That is certain where its kernel is the features' own size, ``F.avg_pool2d(x, x.size()[2:])``.
    A number written out is that of a global pool where only the head follows, nothing with an
    extent: the ``AvgPool2d(7)`` of early ResNets. It is a stage of the trunk, whose stride counts,
    where an earlier pool is like it: a VGG's last 2x2 pool has 2x2 features at 32 pixels. Averages
    of more than 3 positions are no stages.
    """
    sizes = kernel if isinstance(kernel, (tuple, list)) else (kernel,)
    if pair_of(kernel) != x.extent[1:] or pair_of(padding) != (0, 0):
        return False
    if all(isinstance(size, FeatureSize) for size in sizes):
        return True
    stage = (kind, pair_of(kernel)) in build.kernels
    if kind == "AvgPool2d" and min(pair_of(kernel)) > 3:
        stage = False
    return not stage and not _extent_follows(build, call)


def _extent_follows(build: MapBuilder, call: Call) -> bool:
    """Whether a layer with a spatial extent follows a call in the source."""
    later, seen = list(call.node.users), set()
    while later:
        node = later.pop()
        if node in seen:
            continue
        seen.add(node)
        later.extend(node.users)
        if node.op.startswith("call") and _has_extent(node, build.module_of(node)):
            return True
    return False


def _has_extent(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a layer of the source sees more than one position, or makes it so."""
    kind = kind_of(node, module)
    if kind is None or kind.slides is None:
        return kind is not None and kind.has_extent
    if any("value" not in fed.meta for fed in node.all_input_nodes[1:]):
        return True  # the trace broke off before it
    sliding = sliding_of(node, module, lambda fed: fed.meta.get("value"))
    return sliding is not None and any(w.span > 1 or w.before or w.after for w in sliding.windows)


def _slide_max_pool2d(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Sliding:
    windows = windows_of(kernel_size, stride, padding, dilation, ceil_mode)
    height, width = windows

    def run(x: Tensor, part: Part) -> Tensor:
        # The region holds the rows of the padding already, filled with -inf like torch's.
        return F.max_pool2d(
            x,
            (height.kernel, width.kernel),
            (height.stride, width.stride),
            (0, width.before if part.pads_width else 0),
            (height.dilation, width.dilation),
            ceil_mode and part.pads_width,  # the width's overhang; the height has none left
        )

    return Sliding(windows, run, value=-torch.inf, pads_width=True, indexes=True)


@rule(
    *(nn.MaxPool2d, F.max_pool2d, torch.max_pool2d),
    arguments=attributes(
        "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"
    ),
    slides=_slide_max_pool2d,
    role="pool",
)
def max_pool2d(
    build: MapBuilder,
    call: Call,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Cells:
    refuse_indices(call, return_indices)
    x = build.as_map(input, call)
    kernel = pair_of(kernel_size)
    plain = pair_of(dilation) == (1, 1)
    if plain and _is_global(build, call, x, kernel_size, padding, "MaxPool2d"):
        return pool_window(build, call, x, "max", (1, 1))
    windows = windows_of(kernel, stride, padding, dilation, ceil_mode)

    def emit(dense: KernelPair, changed: bool) -> fx.Node:
        if not changed and call.module is not None:
            return build.repeat(call, x)
        if not changed:  # F.max_pool2d is a closure of torch's, which pickle cannot name
            settings = {**settings_of(windows), "ceil_mode": ceil_mode}
            return build.emit_function(call, torch.max_pool2d, x, kernel, **settings)
        # padding of more than half a kernel, which torch's pools refuse, is applied beforehand
        padded = padded_apart(build, x.node, dense, -torch.inf)
        settings = {**settings_of(dense), "padding": (0, 0)}
        return build.emit_module(
            call, nn.MaxPool2d(kernel, **settings), replace(x, node=padded), dense
        )

    return build.window(call, x, windows, emit, kind="MaxPool2d", pools="max")


def _slide_avg_pool2d(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    dilation: Any = 1,
) -> Sliding:
    windows = windows_of(kernel_size, stride, padding, dilation, ceil_mode)
    height, width = windows
    kernel, strides = (height.kernel, width.kernel), (height.stride, width.stride)
    spread = (height.dilation, width.dilation)
    dense = spread == (1, 1)

    def pool(divisor: int | None) -> nn.Module:
        if dense:
            return nn.AvgPool2d(kernel, strides, divisor_override=divisor)
        return DilatedAvgPool2d(kernel, strides, (0, 0), spread, divisor_override=divisor)

    whole, total = pool(divisor_override), pool(1)

    def run(x: Tensor, part: Part) -> Tensor:
        # At the borders torch divides by the elements that count there, which a strip alone does
        # not show: its rows look like the middle of a map. So sums are divided by counts of the
        # whole map.
        counts = _divisors(windows, part, count_include_pad)
        if divisor_override is not None or counts is None:
            return whole(x)  # type: ignore[no-any-return]
        return total(x) / counts.to(x)  # type: ignore[no-any-return]

    return Sliding(windows, run, columns=0 if dense else max(kernel))


def _divisors(windows: KernelPair, part: Part, count_padding: bool) -> Tensor | None:
    """What averages ``(h, w)`` are divided by; None where it is the kernel's size everywhere."""
    rows, cols = (
        _counts(window, first_end, size, count_padding)
        for window, first_end, size in zip(windows, (part.rows, part.cols), part.size)
    )
    height, width = windows
    if bool((rows == height.kernel).all() and (cols == width.kernel).all()):
        return None
    return rows[:, None] * cols[None, :]


def _counts(window: KernelGeometry, outputs: Pair, size: int, count_padding: bool) -> Tensor:
    """How many elements of each window count: padding as asked, what hangs over it never."""
    # positions of the whole map, negative in the padding before it
    first = torch.arange(*outputs) * window.stride - window.before
    places = first[:, None] + torch.arange(window.kernel) * window.dilation  # (outputs, kernel)
    if count_padding:
        return (places < size + window.after).sum(1)
    return ((places >= 0) & (places < size)).sum(1)


_AVG_POOL = ("kernel_size", "stride", "padding", "count_include_pad", "divisor_override")


@rule(
    *(nn.AvgPool2d, *calling("avg_pool2d")),
    arguments=attributes(*_AVG_POOL, "ceil_mode"),
    slides=_slide_avg_pool2d,
    role="pool",
)
def avg_pool2d(
    build: MapBuilder,
    call: Call,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    dilation: Any = 1,
) -> Cells:
    x = build.as_map(input, call)
    kernel = pair_of(kernel_size)
    if _is_global(build, call, x, kernel_size, padding, "AvgPool2d"):
        return pool_window(build, call, x, "avg", (1, 1), divisor_override)
    windows = windows_of(kernel, stride, padding, dilation, ceil_mode)

    def emit(dense: KernelPair, changed: bool) -> fx.Node:
        if not changed:
            return build.repeat(call, x)
        dilated = DilatedAvgPool2d(
            kernel,
            count_include_pad=count_include_pad,
            divisor_override=divisor_override,
            **settings_of(dense),
        )
        return build.emit_module(call, dilated, x, dense)

    # an average that counts padding, or divides by another number, of probabilities is none
    plain = divisor_override is None and not any(w.before for w in windows)
    pools = "avg" if plain else "other"
    return build.window(call, x, windows, emit, kind="AvgPool2d", pools=pools)


def _slide_bins(pool: BinnedPool2d) -> Sliding:
    windows = windows_of(pool.window, 1, 0, pool.dilation)
    bins = pool.bins[0] * pool.bins[1]
    return Sliding(windows, lambda x, part: pool(x), multiplies=bins)


rule(
    DilatedAvgPool2d,
    arguments=attributes(*_AVG_POOL, "dilation"),
    slides=_slide_avg_pool2d,
    role="pool",
)(avg_pool2d)
register(BinnedPool2d, slides=_slide_bins)
