"""Layers that slide a kernel: convolutions and paddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fcvgg.errors import UnsupportedLayerError
from fcvgg.geometry import KernelGeometry, KernelPair
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells, Constant, with_channels
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.modules import over_channels
from fcvgg.rewriting.rules.registry import attributes, calling, of_one_value, rule
from fcvgg.rewriting.sliding import Part, Sliding, windows_of


def settings_of(windows: KernelPair) -> dict[str, Any]:
    """Torch's arguments of windows with equal padding on both sides."""
    height, width = windows
    return {
        "stride": (height.stride, width.stride),
        "padding": (height.before, width.before),
        "dilation": (height.dilation, width.dilation),
    }


def padded_apart(build: MapBuilder, x: fx.Node, windows: KernelPair, value: float) -> fx.Node:
    height, width = windows
    pads = (width.before, width.after, height.before, height.after)
    return build.graph.call_function(F.pad, (x, pads, "constant", value)) if any(pads) else x


def _padded_alike(build: MapBuilder, x: Cells, windows: KernelPair) -> tuple[Cells, KernelPair]:
    """The map padded with zeros first, where the window pads its two ends differently."""
    if all(w.before == w.after for w in windows):
        return x, windows
    height, width = (replace(w, before=0, after=0) for w in windows)
    return replace(x, node=padded_apart(build, x.node, windows, 0.0)), (height, width)


def values_of(call: Call, weight: Any) -> Tensor:
    """The values of a layer's parameter.

    Raises:
        UnsupportedLayerError: if it is computed from the image.
    """
    if isinstance(weight, Constant):
        return weight.value
    if isinstance(weight, Tensor):
        return weight
    raise UnsupportedLayerError(
        f"{call} has weights computed from the image, as dynamic convolutions have; a cell would "
        "depend on all that they are computed from; expected a parameter"
    )


def _slide_conv2d(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Sliding:
    windows = windows_of(weight.shape[2:], stride, padding, dilation)
    height, width = windows
    strides, dilations = (height.stride, width.stride), (height.dilation, width.dilation)

    def run(x: Tensor, part: Part) -> Tensor:
        # Ends that the strip does not reach were padded, or cut out of the map, by the caller.
        pads = part.padding(windows)
        return F.conv2d(x, weight, bias, strides, pads, dilations, groups)

    zeros = padding_mode == "zeros"
    # A 1x1 convolution is a matrix product, for which torch gathers no windows.
    pointwise = height.span == width.span == 1 and strides == (1, 1)
    return Sliding(
        windows,
        run,
        channels=weight.shape[0],
        border="constant" if zeros else padding_mode,
        pads_width=zeros and width.before == width.after,
        pads_height=zeros and height.before == height.after,
        columns=0 if pointwise else weight.shape[1:].numel(),
        weights=weight.numel(),
    )


@rule(
    *(nn.Conv2d, *calling("conv2d")),
    arguments=attributes(
        "weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode"
    ),
    slides=_slide_conv2d,
    role="conv",
    affine=of_one_value,
)
def conv2d(
    build: MapBuilder,
    call: Call,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Cells:
    x = build.as_map(input, call)
    values = values_of(call, weight)
    if padding_mode == "circular":
        raise UnsupportedLayerError(
            f"{call} pads circularly: cells at one border would see the opposite one"
        )
    windows = windows_of(values.shape[2:], stride, padding, dilation)

    def emit(dense: KernelPair, changed: bool) -> fx.Node:
        # The source's layer itself stays in the network wherever strides stay as they are.
        if not changed:
            return build.repeat(call, x)
        if padding_mode != "zeros" and any(w.before or w.after for w in dense):
            raise UnsupportedLayerError(
                f"{call} pads by {padding_mode!r}, which has no dilated form; "
                "convert without output_stride"
            )
        padded, dense = _padded_alike(build, x, dense)
        if call.module is not None:
            return build.emit_module(call, _dilated_conv(call.module, dense), padded, dense)
        settings = settings_of(dense)
        return build.emit_function(call, F.conv2d, padded, weight, bias, groups=groups, **settings)

    kind = call.kind if call.module is not None else "Conv2d"
    return build.window(call, x, windows, emit, values.numel(), kind)


def _dilated_conv(conv: nn.Module, windows: KernelPair) -> nn.Module:
    """The same layer, parameters and all (also parametrized ones), with other settings."""
    # A copy by attributes, since a parametrized or subclassed layer cannot be constructed again.
    dilated = type(conv).__new__(type(conv))
    vars(dilated).update({**vars(conv), **settings_of(windows), "padding_mode": "zeros"})
    return dilated


def _pad_arguments(module: Any) -> dict[str, Any]:
    modes = {nn.ReflectionPad2d: "reflect", nn.ReplicationPad2d: "replicate"}
    mode = next((name for cls, name in modes.items() if isinstance(module, cls)), "constant")
    return {"pad": module.padding, "mode": mode, "value": getattr(module, "value", 0.0)}


def _slide_pad(pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Sliding:
    left, right, top, bottom = (*pad, 0, 0)[:4]
    windows = KernelGeometry(before=top, after=bottom), KernelGeometry(before=left, after=right)
    return Sliding(windows, lambda x, part: x, border=mode, value=value or 0.0)


@rule(
    *(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, F.pad),
    arguments=_pad_arguments,
    slides=_slide_pad,
)
def pad(
    build: MapBuilder,
    call: Call,
    input: Any,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Cells:
    x = build.as_map(input, call)
    if mode == "constant" and len(pad) == 6 and any(pad[4:]):
        return _pad_channels(build, call, x, tuple(map(int, pad)), value)
    if mode == "circular" or any(pad[4:]) or len(pad) % 2:
        raise UnsupportedLayerError(
            f"{call} pads {mode!r} by {tuple(pad)}; expected rows and columns"
        )
    left, right, top, bottom = map(int, (*pad, 0, 0)[:4])
    windows = KernelGeometry(before=top, after=bottom), KernelGeometry(before=left, after=right)

    def emit(dense: KernelPair, changed: bool) -> fx.Node:
        height, width = dense
        if changed and mode != "constant":
            raise UnsupportedLayerError(f"{call} pads {mode!r}, which has no dilated form")
        amounts = (width.before, width.after, height.before, height.after)
        return build.emit_function(call, F.pad, x, amounts, mode, value)

    return build.window(call, x, windows, emit, kind="Pad", pools="other")


def _pad_channels(
    build: MapBuilder, call: Call, x: Cells, pad: tuple[int, ...], value: float | None
) -> Cells:
    """Channels of one value before and after those of a map, as shortcuts of small ResNets have."""
    if any(pad[:4]):
        raise UnsupportedLayerError(
            f"{call} pads channels, rows and columns at once by {pad}; expected two calls"
        )
    channels = x.extent[0] + sum(pad[4:])
    settings = (pad[4:], "constant", value or 0.0)
    node = build.emit_function(
        call, over_channels, x, "pad", x.extent[:1], (0,), settings, channels=channels
    )
    return with_channels(x, 0, channels, node=node).computed_from([x])
