"""Layers that slide a kernel: convolutions and paddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fcvgg.errors import UnsupportedLayerError
from fcvgg.geometry import Pair, Window
from fcvgg.rewriting.layouts import Cells, Constant
from fcvgg.rewriting.program import Windows
from fcvgg.rewriting.rewriter import Call, Rewriter
from fcvgg.rewriting.rules.registry import rule


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


@rule(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, has_extent=True)
def pad_module(build: Rewriter, call: Call, x: Any) -> Cells:
    module: Any = call.module
    modes = {nn.ReflectionPad2d: "reflect", nn.ReplicationPad2d: "replicate"}
    mode = next((name for cls, name in modes.items() if isinstance(module, cls)), "constant")
    return pad(build, call, x, module.padding, mode, getattr(module, "value", 0.0))


@rule(F.pad, has_extent=True)
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
