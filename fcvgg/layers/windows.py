"""Layers that slide a kernel: convolutions, pools and paddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fcvgg.capture import FeatureSize
from fcvgg.cells import Cells, Constant
from fcvgg.errors import UnsupportedLayerError
from fcvgg.geometry import Pair, Window
from fcvgg.layers.pooling import (
    adaptive_avg_pool2d,
    adaptive_avg_pool2d_module,
    adaptive_max_pool2d,
    adaptive_max_pool2d_module,
    pool_window,
    reduce_positions,
)
from fcvgg.layers.registry import RULES, calling, class_of, rule
from fcvgg.modules import DilatedAvgPool2d
from fcvgg.program import Windows
from fcvgg.rewriting import Call, Rewriter


def _pair(value: Any) -> Pair:
    values = (value, value) if isinstance(value, int) else tuple(value)
    return (int(values[0]), int(values[-1]))


def _windows(
    kernel: Any, stride: Any, padding: Any, dilation: Any = 1, ceil_mode: bool = False
) -> Windows:
    """Windows of both axes from torch's arguments, where one number stands for both."""
    kernel, dilation = _pair(kernel), _pair(dilation)
    stride = _pair(stride) if stride not in (None, (), []) else kernel
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation)]
        pads = [(n // 2, n - n // 2) for n in total]
    else:
        pads = [(p, p) for p in _pair(padding)]
    height, width = (
        Window(kernel[i], stride[i], dilation[i], *pads[i], ceil_mode=ceil_mode) for i in (0, 1)
    )
    return height, width


def _settings(windows: Windows) -> dict[str, Any]:
    """Torch's arguments of windows with equal padding on both sides."""
    height, width = windows
    return {
        "stride": (height.stride, width.stride),
        "padding": (height.before, width.before),
        "dilation": (height.dilation, width.dilation),
    }


def _padded_apart(build: Rewriter, x: fx.Node, windows: Windows, value: float) -> fx.Node:
    height, width = windows
    pads = (width.before, width.after, height.before, height.after)
    return build.graph.call_function(F.pad, (x, pads, "constant", value)) if any(pads) else x


def _padded_alike(build: Rewriter, x: Cells, windows: Windows) -> tuple[Cells, Windows]:
    """The map padded with zeros first, where the window pads its two ends differently."""
    if all(w.before == w.after for w in windows):
        return x, windows
    height, width = (replace(w, before=0, after=0) for w in windows)
    return replace(x, node=_padded_apart(build, x.node, windows, 0.0)), (height, width)


@rule(nn.Conv2d)
def conv2d_module(build: Rewriter, call: Call, x: Any) -> Cells:
    conv = call.module
    assert isinstance(conv, nn.Conv2d)
    x = build.as_map(x, call)
    if conv.padding_mode == "circular":
        raise UnsupportedLayerError(
            f"{call} pads circularly: cells at one border would see the opposite one"
        )
    windows = _windows(conv.kernel_size, conv.stride, conv.padding, conv.dilation)

    def emit(dense: Windows, changed: bool) -> fx.Node:
        if not changed:
            return build.emit(call, (x,), {})
        if conv.padding_mode != "zeros" and any(w.before or w.after for w in dense):
            raise UnsupportedLayerError(
                f"{call} pads by {conv.padding_mode!r}, which has no dilated form; "
                "convert without output_stride"
            )
        padded, dense = _padded_alike(build, x, dense)
        return build.emit_module(call, _dilated_conv(conv, dense), padded, dense)

    products = conv.weight.numel()
    return build.window(call, x, windows, emit, products)


def _dilated_conv(conv: nn.Conv2d, windows: Windows) -> nn.Conv2d:
    """The same layer, parameters and all (also parametrized ones), with other settings."""
    dilated = type(conv).__new__(type(conv))
    vars(dilated).update({**vars(conv), **_settings(windows), "padding_mode": "zeros"})
    return dilated


@rule(F.conv2d, torch.conv2d)
def conv2d(
    build: Rewriter,
    call: Call,
    input: Any,
    weight: Constant,
    bias: Constant | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Cells:
    x = build.as_map(input, call)
    if not isinstance(weight, Constant):
        raise UnsupportedLayerError(
            f"{call} has weights computed from the image; expected a parameter"
        )
    windows = _windows(weight.value.shape[2:], stride, padding, dilation)

    def emit(dense: Windows, changed: bool) -> fx.Node:
        padded, dense = _padded_alike(build, x, dense)
        settings = _settings(dense)
        return build.emit_function(call, F.conv2d, padded, weight, bias, groups=groups, **settings)

    return build.window(call, x, windows, emit, weight.value.numel(), "Conv2d")


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
    found = RULES.get(class_of(module) if module is not None else node.target)
    if found is conv2d_module:
        settings: Any = module
        return _pair(settings.kernel_size) != (1, 1) or settings.padding not in (0, (0, 0), "valid")
    if found is conv2d:
        weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
        padding = node.kwargs.get("padding", node.args[4] if len(node.args) > 4 else 0)
        known = isinstance(weight, fx.Node) and "value" in weight.meta
        point = known and tuple(weight.meta["value"].shape[2:]) == (1, 1)  # type: ignore[union-attr]
        return not point or padding not in (0, (0, 0), "valid")
    return found in _WITH_EXTENT


@rule(nn.MaxPool2d)
def max_pool2d_module(build: Rewriter, call: Call, x: Any) -> Cells:
    pool = call.module
    assert isinstance(pool, nn.MaxPool2d)
    return max_pool2d(
        *(build, call, x, pool.kernel_size, pool.stride, pool.padding, pool.dilation),
        *(pool.ceil_mode, pool.return_indices),
    )


@rule(F.max_pool2d, torch.max_pool2d)
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


@rule(nn.AvgPool2d)
def avg_pool2d_module(build: Rewriter, call: Call, x: Any) -> Cells:
    pool = call.module
    assert isinstance(pool, nn.AvgPool2d)
    return avg_pool2d(
        *(build, call, x, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode),
        *(pool.count_include_pad, pool.divisor_override),
    )


@rule(*calling("avg_pool2d"))
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


@rule(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d)
def pad_module(build: Rewriter, call: Call, x: Any) -> Cells:
    module: Any = call.module
    modes = {nn.ReflectionPad2d: "reflect", nn.ReplicationPad2d: "replicate"}
    mode = next((name for cls, name in modes.items() if isinstance(module, cls)), "constant")
    return pad(build, call, x, module.padding, mode, getattr(module, "value", 0.0))


@rule(F.pad)
def pad(
    build: Rewriter,
    call: Call,
    input: Any,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Cells:
    x = build.as_map(input, call)
    if mode == "circular" or any(pad[4:]) or len(pad) % 2:
        raise UnsupportedLayerError(
            f"{call} pads {mode!r} by {tuple(pad)}; expected rows and columns"
        )
    left, right, top, bottom = map(int, (*pad, 0, 0)[:4])
    windows = Window(before=top, after=bottom), Window(before=left, after=right)

    def emit(dense: Windows, changed: bool) -> fx.Node:
        height, width = dense
        if changed and mode != "constant":
            raise UnsupportedLayerError(f"{call} pads {mode!r}, which has no dilated form")
        amounts = (width.before, width.after, height.before, height.after)
        return build.emit_function(call, F.pad, x, amounts, mode, value)

    return build.window(call, x, windows, emit, kind="Pad", pools="other")


_WITH_EXTENT = {
    *(max_pool2d_module, max_pool2d, avg_pool2d_module, avg_pool2d, pad_module, pad),
    *(adaptive_avg_pool2d_module, adaptive_avg_pool2d, reduce_positions),
    *(adaptive_max_pool2d_module, adaptive_max_pool2d),
}
