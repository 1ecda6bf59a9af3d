"""Layers that reduce positions: pools of every kind, means over a map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fcvgg.errors import UnsupportedLayerError
from fcvgg.geometry import Pair, Window
from fcvgg.rewriting.layouts import Cells, Constant, Unusable, pooled_layout, with_channels
from fcvgg.rewriting.marks import FeatureSize
from fcvgg.rewriting.modules import BinnedPool2d, DilatedAvgPool2d
from fcvgg.rewriting.program import Windows
from fcvgg.rewriting.rewriter import Call, Rewriter
from fcvgg.rewriting.rules.convolution import (
    _padded_apart,
    _pair,
    _settings,
    _windows,
)
from fcvgg.rewriting.rules.elementwise import act_elementwise
from fcvgg.rewriting.rules.registry import KINDS, calling, kind_of, rule


def pool_window(
    build: Rewriter,
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
        return x
    divides = all(n % o == 0 for n, o in zip(extent, bins))
    covers = extent if not divides else (extent[0] // bins[0], extent[1] // bins[1])
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
        channels = x.extent[0] * bins[0] * bins[1]
        layout = torch.arange(channels).reshape(x.extent[0], *bins)
        result = replace(x, node=node, step=step, extent=(channels, 1, 1), moved=layout)
    result = result.pooled_from(x, kind, divisor)
    build.record(call, type(pool).__name__, windows, result)
    return result


def _spread_over(x: Cells, bins: Pair) -> Cells:
    """The same channels with a window of `bins` positions."""
    extent = (x.extent[0], *bins)
    return replace(x, extent=extent, moved=None)


def features_of(build: Rewriter, call: Call, x: Any, axis: int) -> tuple[Cells, Windows]:
    """The value with all its channels along one axis, and the window that was gathered for it.

    Flattened features of a whole window, which a layer treats each by itself before the first fully
    connected one, become the channels of every cell: ``C*h*w`` numbers for each, exactly.
    """
    x = build.whole(x) if isinstance(x, Cells) else x
    if not isinstance(x, Cells) or x.positions == 1 or x.dims != (x.elements,):
        return build.features(call, x, axis), (Window(), Window())
    build.begin_head(x, x.elements, call)
    x, windows = build.head_window(call, x, x.extent[1:])
    step = build.steps.add(windows, (x.step,), str(call))
    bins = x.extent[1:]
    name = f"{call.node.name}_windows"
    node = build.emit_new_module(name, BinnedPool2d("max", bins, bins, x.dilation), x)
    # element k of the window is channel k now, so the layout holds as it is
    gathered = replace(x, node=node, step=step, extent=(x.elements, 1, 1), moved=x.layout)
    return build.features(call, gathered, axis), windows


@rule(nn.AdaptiveAvgPool2d, has_extent=True)
def adaptive_avg_pool2d_module(build: Rewriter, call: Call, x: Any) -> Cells:
    return adaptive_avg_pool2d(build, call, x, call.module.output_size)  # type: ignore[union-attr]


@rule(nn.AdaptiveMaxPool2d, has_extent=True)
def adaptive_max_pool2d_module(build: Rewriter, call: Call, x: Any) -> Cells:
    pool = call.module
    assert isinstance(pool, nn.AdaptiveMaxPool2d)
    return adaptive_max_pool2d(build, call, x, pool.output_size, pool.return_indices)


@rule(*calling("adaptive_avg_pool2d"), has_extent=True)
def adaptive_avg_pool2d(build: Rewriter, call: Call, input: Any, output_size: Any) -> Cells:
    return _adaptive(build, call, input, "avg", output_size)


@rule(*calling("adaptive_max_pool2d"), has_extent=True)
def adaptive_max_pool2d(
    build: Rewriter, call: Call, input: Any, output_size: Any, return_indices: bool = False
) -> Cells:
    if return_indices:
        raise UnsupportedLayerError(f"{call} returns indices, which depend on the map's size")
    return _adaptive(build, call, input, "max", output_size)


def _adaptive(build: Rewriter, call: Call, input: Any, kind: str, output_size: Any) -> Cells:
    x = build.as_map(input, call)
    single = output_size is None or isinstance(output_size, int)
    wanted = (output_size,) * 2 if single else tuple(output_size)
    height, width = (n if o is None else o for n, o in zip(x.extent[1:], wanted))
    any_size = None in wanted or wanted == (1, 1)
    wants = None if any_size else (height, width)
    return pool_window(build, call, x, kind, (height, width), wants=wants)


@rule(*calling("max"))
def maximum(
    build: Rewriter, call: Call, input: Any, dim: Any = None, keepdim: bool = False, **names: Any
) -> Any:
    """The larger of two values, or a maximum over the rows or columns of each channel."""
    other = names.get("other", dim)
    if isinstance(other, (Cells, Constant)):
        return act_elementwise(build, call, input, other, as_function=torch.maximum)
    dim = names.get("axis", dim)
    if dim is None:
        raise UnsupportedLayerError(f"{call} reduces over the images of the batch")
    indices = Unusable("the indices of a maximum, which depend on the map's size")
    return _reduced(build, call, input, dim, keepdim, "max"), indices


@rule(*calling("mean", "sum", "amax"), has_extent=True)
def reduce_positions(
    build: Rewriter, call: Call, input: Any, dim: Any = None, keepdim: bool = False, **names: Any
) -> Any:
    """A mean, sum or maximum over the rows and columns of each channel, whatever their order."""
    dim = names.get("axis", dim)
    return _reduced(build, call, input, dim, keepdim, call.kind.removeprefix("Tensor."))


def _reduced(build: Rewriter, call: Call, input: Any, dim: Any, keepdim: bool, name: str) -> Cells:
    if not isinstance(input, Cells):
        raise UnsupportedLayerError(f"{call} reduces something that is no value of the image")
    ndim = len(input.dims) + 1
    dims = tuple(range(ndim)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    axes = tuple(sorted(d % ndim - 1 for d in dims))
    if -1 in axes:
        raise UnsupportedLayerError(f"{call} reduces over the images of the batch")
    left = pooled_layout(input, axes)
    if left is None:
        raise UnsupportedLayerError(
            f"{call} reduces over {dim}, which is not all rows or columns of each channel; "
            "only global pooling is supported"
        )
    bins, layout = left
    whole = replace(input, moved=None)
    kind = "max" if name in ("amax", "max") else "avg"
    pooled = pool_window(build, call, whole, kind, bins, 1 if name == "sum" else None)
    for axis in axes if keepdim else ():
        layout = layout.unsqueeze(axis)
    return replace(pooled, moved=layout)


def _is_global(build: Rewriter, call: Call, x: Cells, kernel: Any, padding: Any, kind: str) -> bool:
    """Whether a pool stands for a global one, which slides by one: it covers all of the features.

    That is certain where its kernel is the features' own size, ``F.avg_pool2d(x, x.size()[2:])``.
    A number written out is that of a global pool where only the head follows, nothing with an
    extent: the ``AvgPool2d(7)`` of early ResNets. It is a stage of the trunk, whose stride counts,
    where an earlier pool is like it: a VGG's last 2x2 pool has 2x2 features at 32 pixels. Averages
    of more than 3 positions are no stages.
    """
    sizes = kernel if isinstance(kernel, (tuple, list)) else (kernel,)
    if _pair(kernel) != x.extent[1:] or _pair(padding) != (0, 0):
        return False
    if all(isinstance(size, FeatureSize) for size in sizes):
        return True
    stage = (kind, _pair(kernel)) in build.kernels
    if kind == "AvgPool2d" and min(_pair(kernel)) > 3:
        stage = False
    return not stage and not _extent_follows(build, call)


def _extent_follows(build: Rewriter, call: Call) -> bool:
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
    found = kind_of(node, module)
    if found is KINDS[nn.Conv2d]:
        settings: Any = module
        return _pair(settings.kernel_size) != (1, 1) or settings.padding not in (0, (0, 0), "valid")
    if found is KINDS[torch.conv2d]:
        weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
        padding = node.kwargs.get("padding", node.args[4] if len(node.args) > 4 else 0)
        known = isinstance(weight, fx.Node) and "value" in weight.meta
        point = known and tuple(weight.meta["value"].shape[2:]) == (1, 1)  # type: ignore[union-attr]
        return not point or padding not in (0, (0, 0), "valid")
    return found is not None and found.has_extent


@rule(nn.MaxPool2d, has_extent=True)
def max_pool2d_module(build: Rewriter, call: Call, x: Any) -> Cells:
    pool = call.module
    assert isinstance(pool, nn.MaxPool2d)
    return max_pool2d(
        *(build, call, x, pool.kernel_size, pool.stride, pool.padding, pool.dilation),
        *(pool.ceil_mode, pool.return_indices),
    )


@rule(F.max_pool2d, torch.max_pool2d, has_extent=True)
def max_pool2d(
    build: Rewriter,
    call: Call,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Cells:
    if return_indices:
        raise UnsupportedLayerError(f"{call} returns indices, which depend on the map's size")
    x = build.as_map(input, call)
    kernel = _pair(kernel_size)
    plain = _pair(dilation) == (1, 1)
    if plain and _is_global(build, call, x, kernel_size, padding, "MaxPool2d"):
        return pool_window(build, call, x, "max", (1, 1))
    windows = _windows(kernel, stride, padding, dilation, ceil_mode)

    def emit(dense: Windows, changed: bool) -> fx.Node:
        if not changed and call.module is not None:
            return build.emit(call, (x,), {})
        if not changed:  # F.max_pool2d is a closure of torch's, which pickle cannot name
            settings = {**_settings(windows), "ceil_mode": ceil_mode}
            return build.emit_function(call, torch.max_pool2d, x, kernel, **settings)
        # padding of more than half a kernel, which torch's pools refuse, is applied beforehand
        padded = _padded_apart(build, x.node, dense, -torch.inf)
        settings = {**_settings(dense), "padding": (0, 0)}
        return build.emit_module(
            call, nn.MaxPool2d(kernel, **settings), replace(x, node=padded), dense
        )

    return build.window(call, x, windows, emit, kind="MaxPool2d", pools="max")


@rule(nn.AvgPool2d, has_extent=True)
def avg_pool2d_module(build: Rewriter, call: Call, x: Any) -> Cells:
    pool = call.module
    assert isinstance(pool, nn.AvgPool2d)
    return avg_pool2d(
        *(build, call, x, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode),
        *(pool.count_include_pad, pool.divisor_override),
    )


@rule(*calling("avg_pool2d"), has_extent=True)
def avg_pool2d(
    build: Rewriter,
    call: Call,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Cells:
    x = build.as_map(input, call)
    kernel = _pair(kernel_size)
    if _is_global(build, call, x, kernel_size, padding, "AvgPool2d"):
        return pool_window(build, call, x, "avg", (1, 1), divisor_override)
    windows = _windows(kernel, stride, padding, 1, ceil_mode)

    def emit(dense: Windows, changed: bool) -> fx.Node:
        if not changed:
            return build.emit(call, (x, *call.node.args[1:]), call.node.kwargs)
        dilated = DilatedAvgPool2d(
            kernel,
            count_include_pad=count_include_pad,
            divisor_override=divisor_override,
            **_settings(dense),
        )
        return build.emit_module(call, dilated, x, dense)

    plain = divisor_override is None and not any(w.before for w in windows)
    pools = "avg" if plain else "other"
    return build.window(call, x, windows, emit, kind="AvgPool2d", pools=pools)
