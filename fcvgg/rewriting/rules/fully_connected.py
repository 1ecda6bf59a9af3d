"""Fully connected layers: the heart of the method.

A layer over all ``C x h x w`` elements of the features becomes a window of ``h x w`` positions, one
over the channels of each position a 1x1 window. The columns of its weight are put in the order of
the map, which the layout tells.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fcvgg.errors import UnsupportedLayerError
from fcvgg.geometry import KernelGeometry, Pair
from fcvgg.rewriting.channel_view import channel_view, is_flattened
from fcvgg.rewriting.emission import Call, WindowWeight
from fcvgg.rewriting.layouts import Cells, Constant, with_channels
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.modules import GEMM_CELLS, WindowLinear, window_linear
from fcvgg.rewriting.rules.convolution import values_of
from fcvgg.rewriting.rules.registry import attributes, calling, of_one_value, register, rule
from fcvgg.rewriting.sliding import Part, Sliding, windows_of


@rule(
    *(nn.Linear, *calling("linear")),
    arguments=attributes("weight", "bias"),
    role="fc",
    affine=of_one_value,
)
def linear(build: MapBuilder, call: Call, input: Any, weight: Any, bias: Any = None) -> Cells:
    values_of(call, weight)
    if call.module is not None and nn.utils.parametrize.is_parametrized(call.module):
        weight, bias = (build.parameter(call, name) for name in ("weight", "bias"))
    return fully_connected(build, call, input, weight, bias)


def fully_connected(build: MapBuilder, call: Call, x: Any, weight: Any, bias: Any) -> Cells:
    """A fully connected layer: over the whole window, or over the channels of each position."""
    if not isinstance(x, Cells) or not x.dims:
        raise UnsupportedLayerError(
            f"{call} takes something that is no value (N, features) of the image"
        )
    # Copies of channels (a repeated map, a cat of slices) are made real before columns are counted.
    x = build.whole(x)
    whole = x.positions > 1 and x.dims[-1] == x.elements and x.fills_window
    if not whole and len(x.dims) == 1 and is_flattened(x):  # a part of the window
        x = build.gathered(x, call)
    features, inputs = values_of(call, weight).shape[0], x.dims[-1]
    if not whole and (places := _places_along(x)) is not None:
        return _over_positions(build, call, x, places, weight, bias)
    if whole or x.positions == 1:
        build.begin_head(x, inputs, call)
    if whole:
        # Column j of the weight multiplies element order[j] of the window: the layout is the order.
        order = x.layout.flatten()
        x, windows = build.head_window(call, x, x.extent[1:])
        point = replace(x, extent=(1, 1, 1), moved=torch.zeros_like(x.layout[..., :1]))
        target = with_channels(point, -1, features)
    else:
        # A layer on one axis of several applies to every position alone, as a 1x1 window.
        x = build.features(call, x, -1)
        order = torch.arange(x.extent[0])
        windows = KernelGeometry(), KernelGeometry()
        target = with_channels(x, -1, features)
    kernel = (windows[0].kernel, windows[1].kernel)
    dilation = (windows[0].dilation, windows[1].dilation)
    if isinstance(weight, Constant):
        node = _functional(build, call, x, weight, bias, kernel, order, dilation)
    else:
        shaped = build.window_weight(weight, kernel, order)
        layer = _window_linear_layer(shaped, bias, dilation)
        # A weight that is shared by layers of different windows keeps the shape of the first one.
        if layer.kernel_size == kernel and torch.equal(shaped.order, order):
            node = build.emit_module(call, layer, x, (kernel, dilation))
        else:  # another window over the same columns: the parameter stays one
            build.hold(call, layer)
            held = Constant(build.graph.get_attr(f"{call.name}.weight"), weight.detach())
            if bias is not None:
                bias = Constant(build.graph.get_attr(f"{call.name}.bias"), bias.detach())
            node = _functional(build, call, x, held, bias, kernel, order, dilation)
    step = build.steps.add(windows, (x.step,), str(call))
    result = replace(target, node=node, step=step).meaning_of("logits")
    build.record(call, "Linear", windows, result, features * inputs)
    return result


def _places_along(x: Cells) -> Tensor | None:
    """The positions along the last axis, if all of a channel's lie there."""
    view = channel_view(x) if x.positions > 1 else None
    if view is None or view.places.ndim != 1 or len(x.dims) - 1 in view.axes:
        return None
    return view.places if len(view.places.unique()) == x.positions else None


def _over_positions(
    build: MapBuilder, call: Call, x: Cells, places: Tensor, weight: Any, bias: Any
) -> Cells:
    """A layer over the positions of each channel, ``(N, C, h * w) -> (N, C, O)``, as a window."""
    if call.module is not None:
        weight, bias = (build.parameter(call, name) for name in ("weight", "bias"))
    view = channel_view(x)
    assert view is not None
    build.begin_head(x, x.elements, call)
    build.one_cell(call)
    x, windows = build.head_window(call, x, x.extent[1:])
    channels, features = x.extent[0], weight.value.shape[0]
    columns = weight.node
    if not torch.equal(places, torch.arange(x.positions)):
        columns = build.select(columns, places.argsort())
    kernel = build.graph.call_method("reshape", (columns, features, 1, *x.extent[1:]))
    kernels = build.graph.call_method("repeat", (kernel, channels, 1, 1, 1))  # (C * O, 1, h, w)
    shaped = Constant(kernels, weight.value)
    if bias is not None:
        bias = Constant(build.graph.call_method("repeat", (bias.node, channels)), bias.value)
    node = build.emit_function(
        call, F.conv2d, x, shaped, bias, dilation=x.dilation, groups=channels
    )
    step = build.steps.add(windows, (x.step,), str(call))
    layout = view.channels[..., None] * features + torch.arange(features)
    extent = (channels * features, 1, 1)
    result = replace(x, node=node, step=step, extent=extent, moved=layout, dilation=(1, 1))
    result = result.meaning_of("logits")
    build.record(call, "Linear", windows, result, channels * weight.value.numel())
    return result


def _functional(
    build: MapBuilder,
    call: Call,
    x: Cells,
    weight: Constant,
    bias: Constant | None,
    kernel: Pair,
    order: Tensor,
    dilation: Pair,
) -> fx.Node:
    """``F.linear`` with a parameter of the source's, which keeps its name and its shape."""
    columns = weight.node
    # The parameter itself stays FC-shaped, since the model computes with it elsewhere too.
    if not torch.equal(order, torch.arange(len(order))):
        columns = build.select(columns, order.argsort())
    shape = (weight.value.shape[0], -1, *kernel)
    columns = build.graph.call_method("reshape", (columns, *shape))
    shaped = Constant(columns, weight.value)
    return build.emit_function(call, window_linear, x, shaped, bias, dilation)


def _window_linear_layer(
    shaped: WindowWeight, bias: nn.Parameter | None, dilation: Pair
) -> WindowLinear:
    features, channels, *kernel = shaped.parameter.shape
    layer = WindowLinear(
        channels,
        features,
        (kernel[0], kernel[1]),
        dilation,
        bias is not None,
        shaped.column_order,
        device="meta",
    )
    layer.weight, layer.bias = shaped.parameter, bias
    return layer


def _slide_window_linear(weight: Tensor, bias: Tensor | None, dilation: Any) -> Sliding:
    windows = windows_of(weight.shape[2:], 1, 0, dilation)
    height, width = windows
    spread = (height.dilation, width.dilation)
    pointwise = height.span == width.span == 1

    def run(x: Tensor, part: Part) -> Tensor:
        """Some cells at a time: gathered windows stay small, and no weights are reordered."""
        rows, cols = x.shape[2] - height.span + 1, x.shape[3] - width.span + 1
        across = min(cols, GEMM_CELLS)
        down = max(GEMM_CELLS // across, 1)
        if pointwise or (rows <= down and cols <= across):
            return window_linear(x, weight, bias, spread)
        scores = x.new_empty(x.shape[0], rows, cols, weight.shape[0]).movedim(-1, 1)  # (N, O, h, w)
        for top in range(0, rows, down):
            bottom = min(top + down, rows)
            for left in range(0, cols, across):
                right = min(left + across, cols)
                window = x[:, :, top : bottom + height.span - 1, left : right + width.span - 1]
                cells = window_linear(window, weight, bias, spread)
                scores[:, :, top:bottom, left:right] = cells
        return scores

    return Sliding(
        windows,
        run,
        channels=weight.shape[0],
        columns=0 if pointwise else weight.shape[1:].numel(),
        weights=weight.numel(),
        gathers=True,
    )


register(torch._weight_norm)  # what the hook of torch's weight norm computes weights by
register(
    *(WindowLinear, window_linear),
    arguments=attributes("weight", "bias", "dilation"),
    slides=_slide_window_linear,
    role="fc",
)
