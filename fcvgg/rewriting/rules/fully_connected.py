"""Fully connected layers: the heart of the method.

A layer over all ``C x h x w`` elements of the features becomes a window of ``h x w`` positions, one
over the channels of each position a 1x1 window. The columns of its weight are put in the order of
the map, which the layout tells.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fcvgg.errors import UnsupportedLayerError
from fcvgg.geometry import Pair, Window
from fcvgg.rewriting.layouts import Cells, Constant, with_channels
from fcvgg.rewriting.modules import WindowLinear, window_linear
from fcvgg.rewriting.rewriter import Call, Rewriter, WindowWeight
from fcvgg.rewriting.rules.registry import calling, rule


@rule(nn.Linear)
def linear_module(build: Rewriter, call: Call, x: Any) -> Cells:
    layer = call.module
    assert isinstance(layer, nn.Linear)
    if nn.utils.parametrize.is_parametrized(layer):
        weight, bias = (_parametrized(build, call, layer, name) for name in ("weight", "bias"))
        return _fully_connected(build, call, x, weight, bias)
    return _fully_connected(build, call, x, layer.weight, layer.bias)


@rule(*calling("linear"))
def linear(build: Rewriter, call: Call, input: Any, weight: Any, bias: Any = None) -> Cells:
    if not isinstance(weight, Constant):
        raise UnsupportedLayerError(
            f"{call} has weights computed from the image; expected a parameter"
        )
    return _fully_connected(build, call, input, weight, bias)


def _parametrized(build: Rewriter, call: Call, layer: nn.Module, name: str) -> Constant | None:
    """A parameter that torch computes from others (weight norm), computed anew at every call."""
    value = getattr(layer, name)
    if value is None:
        return None
    if nn.utils.parametrize.is_parametrized(layer, name):
        node = build.graph.call_module(f"{call.name}.parametrizations.{name}")
    else:
        node = build.graph.get_attr(f"{call.name}.{name}")
    return Constant(node, value.detach())


def _fully_connected(build: Rewriter, call: Call, x: Any, weight: Any, bias: Any) -> Cells:
    """A fully connected layer: over the whole window, or over the channels of each position."""
    if not isinstance(x, Cells) or not x.dims:
        raise UnsupportedLayerError(
            f"{call} takes something that is no value (N, features) of the image"
        )
    x = build.whole(x)
    whole = x.positions > 1 and x.dims[-1] == x.elements and x.fills_window
    features = weight.value.shape[0] if isinstance(weight, Constant) else weight.shape[0]
    inputs = x.dims[-1]
    if whole or x.positions == 1:
        build.begin_head(x, inputs, call)
    if whole:
        order = x.layout.flatten()
        x, windows = build.head_window(call, x, x.extent[1:])
        point = replace(x, extent=(1, 1, 1), moved=torch.zeros_like(x.layout[..., :1]))
        target = with_channels(point, -1, features)
    else:
        x = build.features(call, x, -1)
        order = torch.arange(x.extent[0])
        windows = Window(), Window()
        target = with_channels(x, -1, features)
    kernel = (windows[0].kernel, windows[1].kernel)
    dilation = (windows[0].dilation, windows[1].dilation)
    if isinstance(weight, Constant):
        node = _functional(build, call, x, weight, bias, kernel, order, dilation)
    else:
        shaped = build.window_weight(weight, kernel, order)
        layer = _window_linear_layer(shaped, bias, dilation)
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


def _functional(
    build: Rewriter,
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
