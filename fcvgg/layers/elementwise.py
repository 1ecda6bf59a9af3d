"""Layers that act on each element by itself, or combine values element by element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops import StochasticDepth, stochastic_depth

from fcvgg.cells import Cells, Constant, channels_along
from fcvgg.errors import RefusedLayerError, UnsupportedLayerError
from fcvgg.geometry import Window
from fcvgg.layers.registry import RULES, calling, rule
from fcvgg.rewriting import Call, Rewriter

Pair = tuple[int, int]


def pointwise(*targets: Any) -> None:
    """Register layers and functions that act on each element, or combine values elementwise."""
    RULES.update(dict.fromkeys(targets, act_elementwise))


def act_elementwise(build: Rewriter, call: Call, *args: Any, **kwargs: Any) -> Any:
    operands: list[Cells] = []
    fx.node.map_aggregate(
        (args, kwargs), lambda a: operands.append(a) if isinstance(a, Cells) else a
    )  # type: ignore
    aligned = _on_one_grid(build, call, operands)
    swap = {id(old): new for old, new in zip(operands, aligned)}
    first = max(aligned, key=lambda c: c.extent[0])

    def prepared(argument: Any) -> Any:
        if isinstance(argument, Cells):
            return swap[id(argument)]
        if isinstance(argument, Constant):
            return _per_channel(build, call, argument, first)
        return argument

    args, kwargs = fx.node.map_aggregate((args, kwargs), prepared)  # type: ignore
    node = build.emit(call, args, kwargs)
    step = build.join(aligned, call) if len(aligned) > 1 else first.step
    result = replace(first, node=node, step=step, activation="logits")
    if call.parameters():
        build.record(call, call.kind, (Window(), Window()), result)
    return result


def _on_one_grid(build: Rewriter, call: Call, operands: Sequence[Cells]) -> Sequence[Cells]:
    """Operands of one layout, or maps that broadcast over channels only."""
    first = operands[0]
    if all(first.same_layout(other) for other in operands):
        return operands
    extents = {cells.extent[1:] for cells in operands}
    if len(extents) > 1:
        if (1, 1) in extents:
            raise RefusedLayerError(
                f"{call} combines a map with a value pooled over all its positions "
                "(squeeze-and-excitation or global attention); every cell would depend on the "
                "whole image"
            )
        raise UnsupportedLayerError(
            f"{call} combines maps of different sizes {sorted(extents)} at the native size"
        )
    if len({cells.dilation for cells in operands}) > 1:
        raise UnsupportedLayerError(
            f"{call} joins branches of different dilation; their cells do not lie on one grid"
        )
    ndim = len(operands[0].dims)
    if any(len(c.dims) != ndim for c in operands) or ndim not in (1, 3):
        raise UnsupportedLayerError(
            f"{call} combines values of shapes {', '.join(c.shape for c in operands)} whose "
            "elements were moved differently"
        )
    settled = [build.as_map(c, call) if ndim == 3 else build.features(call, c, 0) for c in operands]
    if len({c.extent[0] for c in settled} - {1}) > 1:
        raise UnsupportedLayerError(f"{call} combines maps of different numbers of channels")
    return settled


def _per_channel(build: Rewriter, call: Call, constant: Constant, cells: Cells) -> Constant:
    """A parameter shaped to broadcast over the map, if it depends on nothing but the channel."""
    shape = tuple(constant.value.shape)
    if constant.value.numel() == 1:
        return Constant(build.graph.call_method("reshape", (constant.node, ())), constant.value)
    if len(shape) > len(cells.dims) and shape[0] == 1:
        shape = shape[1:]
    padded = (1,) * (len(cells.dims) - len(shape)) + shape
    axes = [i for i, n in enumerate(padded) if n > 1]
    if len(padded) == len(cells.dims) and len(axes) == 1:
        channels = channels_along(cells, axes[0])
        if channels is not None and torch.equal(channels, torch.arange(cells.extent[0])):
            node = build.graph.call_method("reshape", (constant.node, (-1, 1, 1)))
            return Constant(node, constant.value)
    raise UnsupportedLayerError(
        f"{call} uses a parameter of shape {tuple(constant.value.shape)} that is shaped by "
        "position; a cell's result may depend on its channel only"
    )


pointwise(
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid),
    *(nn.RReLU, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Threshold),
    *calling("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu"),
    *calling("celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "tanh"),
    *calling("tanh_", "softplus", "softsign", "logsigmoid", "threshold", "rrelu"),
    *calling("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "truediv", "neg", "pos"),
    *calling("iadd", "isub", "imul", "itruediv", "pow", "square", "sqrt", "rsqrt"),
    *calling("log1p", "abs", "clamp", "clamp_", "clip", "maximum", "minimum", "erf", "sign"),
    *calling("where", "masked_fill", "gt", "ge", "lt", "le"),
    *(StochasticDepth, stochastic_depth),
)


@rule(
    *(nn.Dropout, nn.AlphaDropout, nn.Dropout2d, nn.FeatureAlphaDropout),
    *("float", "half", "double", "bfloat16", "to", "type", "type_as"),
    *calling("clone"),  # emitted, since a layer that works in place may follow
)
def keep(build: Rewriter, call: Call, x: Any, *rest: Any, **names: Any) -> Any:
    """Layers after which the scores are still what they were."""
    result = act_elementwise(build, call, x, *rest, **names)
    return replace(result, activation=x.activation) if isinstance(x, Cells) else result


@rule(*calling("exp"))
def exp(build: Rewriter, call: Call, x: Any) -> Any:
    return _turned(act_elementwise(build, call, x), x, "log_probabilities", "probabilities")


@rule(*calling("log"))
def log(build: Rewriter, call: Call, x: Any) -> Any:
    return _turned(act_elementwise(build, call, x), x, "probabilities", "log_probabilities")


def _turned(result: Any, x: Any, before: str, after: str) -> Any:
    turned = isinstance(x, Cells) and x.activation == before
    return replace(result, activation=after) if turned else result


@rule(F.alpha_dropout, F.feature_alpha_dropout)
def alpha_dropout(
    build: Rewriter,
    call: Call,
    x: Any,
    p: float = 0.5,
    training: Any = False,
    inplace: bool = False,
) -> Any:
    return dropout(build, call, x, p, training, inplace)


@rule(F.dropout, F.dropout2d)
def dropout(
    build: Rewriter, call: Call, x: Any, p: float = 0.5, training: Any = True, inplace: bool = False
) -> Any:
    if training is True and p > 0:
        raise UnsupportedLayerError(
            f"{call} drops at random in evaluation mode too (training=True); "
            "pass training=self.training"
        )
    return keep(build, call, x, p, training, inplace)


@rule(nn.Sigmoid, *calling("sigmoid", "sigmoid_"))
def sigmoid(build: Rewriter, call: Call, x: Any, *rest: Any, **names: Any) -> Any:
    return replace(act_elementwise(build, call, x, *rest, **names), activation="sigmoid")
