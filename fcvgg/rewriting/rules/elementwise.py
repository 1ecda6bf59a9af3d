"""Layers that act on each element by itself, or combine values element by element."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import inf
from math import log as log_of
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops import StochasticDepth, stochastic_depth

from fcvgg.errors import UnsupportedLayerError
from fcvgg.geometry import KernelGeometry
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells, Constant
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.modules import TrainingOnly
from fcvgg.rewriting.rules.alignment import aligned
from fcvgg.rewriting.rules.registry import always, attributes, calling, of_one_value, register, rule

_ELEMENTWISE = {"elementwise": True, "positional": True}


def pointwise(*targets: Any, **known: Any) -> None:
    """Register layers and functions that act on each element, or combine values elementwise.

    Args:
        targets: module classes, functions and method names.
        known: further fields of `fcvgg.rewriting.rules.registry.LayerKind`.
    """
    register(*targets, rewrite=act_elementwise, **_ELEMENTWISE, **known)


elementwise_rule = partial(rule, **_ELEMENTWISE)


def act_elementwise(
    build: MapBuilder, call: Call, *args: Any, as_function: Any = None, **kwargs: Any
) -> Any:
    """The source's own call on maps; `as_function` is what is called in its place."""
    found: list[Any] = []
    fx.node.map_aggregate((args, kwargs), found.append)  # type: ignore[arg-type]
    operands = [a for a in found if isinstance(a, Cells)]
    constants = [a for a in found if isinstance(a, Constant)]
    maps, ordered, like = aligned(build, call, operands, constants)
    swap = {id(old): new for old, new in zip((*operands, *constants), (*maps, *ordered))}
    args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: swap.get(id(a), a))  # type: ignore
    if as_function is None:
        node = build.emit(call, args, kwargs)
    else:
        node = build.emit_function(call, as_function, *args, **kwargs)
    step = build.join(maps, call, node) if len(maps) > 1 else maps[0].step
    result = replace(like, node=node, step=step).computed_from(operands).joined_with(maps)
    if call.parameters():
        build.record(call, call.kind, (KernelGeometry(), KernelGeometry()), result)
    return result


pointwise(nn.ReLU, *calling("relu", "relu_"), role="relu")
pointwise(
    *(nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Tanh, nn.Softplus, nn.Softsign, nn.RReLU, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
    *(nn.Threshold, *calling("relu6", "leaky_relu", "leaky_relu_", "elu", "selu", "celu")),
    *calling("rrelu_", "threshold_", "elu_", "selu_", "celu_"),
    *calling("gelu", "silu", "mish", "hardswish", "tanh", "tanh_", "softplus", "softsign"),
    *calling("threshold", "rrelu", "hardshrink", "softshrink"),
    role="activation",
)
pointwise(
    *calling("pow", "square", "sqrt", "rsqrt"),
    *calling("log1p", "abs", "maximum", "minimum", "erf", "sign"),
    *calling("where", "masked_fill", "gt", "ge", "lt", "le"),
    *calling("sin", "cos", "reciprocal", "nan_to_num", "zeros_like", "ones_like", "full_like"),
    *calling("expm1", "exp2", "atan", "atan2", "asinh", "atanh", "sinh", "cosh", "tan", "sinc"),
    *calling("erfc", "trunc", "frac", "sgn", "ceil", "floor", "round", "remainder", "floordiv"),
    *calling("floor_divide", "mod", "fmod", "fmax", "fmin", "float_power", "heaviside", "eq", "ne"),
    *calling("isnan", "isinf", "isfinite", "invert", "and_", "or_", "xor", "logical_not"),
    *calling("logical_and", "logical_or", "logical_xor", "bitwise_not", "logit"),
    *calling("acos", "asin"),
    *(f"{name}_" for name in ("sqrt", "rsqrt", "square", "pow", "abs", "neg", "reciprocal", "sin")),
    *(f"{name}_" for name in ("cos", "erf", "log1p", "expm1", "floor", "ceil", "round", "sign")),
    *("masked_fill_", "nan_to_num_"),
)
pointwise(*calling("sub", "sub_", "isub", "neg", "positive"), affine=always)


def keep(build: MapBuilder, call: Call, x: Any, *rest: Any, **names: Any) -> Any:
    """Layers after which the scores are still what they were."""
    result = act_elementwise(build, call, x, *rest, **names)
    return result.alike(x) if isinstance(x, Cells) else result


_keeps = partial(register, rewrite=keep, affine=always, **_ELEMENTWISE)
_keeps(
    *("float", "half", "double", "bfloat16", "to", "type", "type_as"),
    *calling("clone", "pos"),  # emitted, since a layer that works in place may follow
    *(StochasticDepth, stochastic_depth),
)
_keeps(
    nn.Dropout,
    nn.AlphaDropout,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.FeatureAlphaDropout,
    role="drop",
    inert=True,
)
_keeps(TrainingOnly, inert=True)


@elementwise_rule(*calling("exp", "exp_"))
def exp(build: MapBuilder, call: Call, x: Any) -> Any:
    result = act_elementwise(build, call, x)
    return result.meaning_of("probabilities") if _is(x, "log_probabilities") else result


@elementwise_rule(*calling("log", "log_"))
def log(build: MapBuilder, call: Call, x: Any) -> Any:
    result = act_elementwise(build, call, x)
    return result.meaning_of("log_probabilities") if _is(x, *_PROBABILITIES) else result


_PROBABILITIES = ("probabilities", "sigmoid")


def _is(x: Any, *meanings: str) -> bool:
    return isinstance(x, Cells) and x.meaning in meanings


@elementwise_rule(*calling("add", "add_", "iadd"), affine=always)
def add(build: MapBuilder, call: Call, *args: Any, **kwargs: Any) -> Any:
    result = act_elementwise(build, call, *args, **kwargs)
    first, *others = (*args, *kwargs.values())
    operands = [x for x in (first, *others) if isinstance(x, Cells)]
    kinds = {x.activation for x in operands}
    whole = all(isinstance(x, Cells) or _is_zero(x) for x in (first, *others))
    if len(others) != 1 or len(kinds) > 1 or not kinds.issubset(_PROBABILITIES) or not whole:
        return result
    return result.meaning_of(kinds.pop(), sum(x.share for x in operands))


def _is_zero(x: Any) -> bool:
    """Whether it is the number with which Python's `sum` begins."""
    return isinstance(x, (int, float)) and x == 0


@elementwise_rule(*calling("mul", "mul_", "imul"), affine=of_one_value)
def mul(build: MapBuilder, call: Call, *args: Any, **kwargs: Any) -> Any:
    result = act_elementwise(build, call, *args, **kwargs)
    first, *others = (*args, *kwargs.values())
    if isinstance(first, (int, float)) and len(others) == 1:
        first, others = others[0], [first]
    return _scaled(result, first, others[0]) if len(others) == 1 else result


def _divides_by_number(x: Any, other: Any, rounding_mode: str | None = None) -> bool:
    return isinstance(x, Cells) and not isinstance(other, Cells) and rounding_mode is None


@elementwise_rule(*calling("div", "div_", "truediv", "itruediv"), affine=_divides_by_number)
def div(build: MapBuilder, call: Call, *args: Any, **kwargs: Any) -> Any:
    result = act_elementwise(build, call, *args, **kwargs)
    first, *others = (*args, *kwargs.values())
    known = len(others) == 1 and isinstance(others[0], (int, float)) and others[0] > 0
    return _scaled(result, first, 1 / others[0]) if known else result


def _scaled(result: Any, x: Any, factor: Any) -> Any:
    """Probabilities multiplied by a number, as for an average of several."""
    tagged = isinstance(x, Cells) and x.activation in _PROBABILITIES
    if not tagged or not isinstance(factor, (int, float)) or factor <= 0:
        return result
    return result.meaning_of(x.activation, x.share * factor)


@elementwise_rule(
    *(nn.Hardtanh, *calling("hardtanh")),
    arguments=attributes("min_val", "max_val"),
    role="activation",
)
def hardtanh(
    build: MapBuilder,
    call: Call,
    input: Any,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Any:
    limits = () if call.module is not None else (min_val, max_val, inplace)
    return _clamped(act_elementwise(build, call, input, *limits), input, min_val, max_val)


@elementwise_rule(*calling("clamp", "clamp_", "clip", "clip_"))
def clamp(build: MapBuilder, call: Call, input: Any, min: Any = None, max: Any = None) -> Any:
    return _clamped(act_elementwise(build, call, input, min, max), input, min, max)


_LEAST = 1e-3
"""How far from 0 and 1 limits of probabilities may be that only guard against rounding."""


def _clamped(result: Any, x: Any, lowest: Any, highest: Any) -> Any:
    """Probabilities stay what they are within limits that hold them; logits cut to [0, 1] are the
    hard sigmoid of Keras and others."""
    low = -inf if lowest is None else lowest
    high = inf if highest is None else highest
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return result
    if _is(x, "logits") and (low, high) == (0, 1):
        return result.meaning_of("sigmoid")
    holds = _is(x, *_PROBABILITIES) and low <= _LEAST and high >= 1 - _LEAST
    holds_logs = _is(x, "log_probabilities") and low <= log_of(_LEAST) and high >= 0
    return result.alike(x) if holds or holds_logs else result


def _check_mode(call: Call, p: float, training: Any) -> None:
    if training is True and p > 0:
        raise UnsupportedLayerError(
            f"{call} drops at random in evaluation mode too (training=True); "
            "pass training=self.training"
        )


@elementwise_rule(F.alpha_dropout, F.feature_alpha_dropout, role="drop", affine=always)
def alpha_dropout(
    build: MapBuilder,
    call: Call,
    x: Any,
    p: float = 0.5,
    training: Any = False,
    inplace: bool = False,
) -> Any:
    return dropout(build, call, x, p, training, inplace)


@elementwise_rule(F.dropout, F.dropout2d, F.dropout3d, role="drop", affine=always)
def dropout(
    build: MapBuilder,
    call: Call,
    x: Any,
    p: float = 0.5,
    training: Any = True,
    inplace: bool = False,
) -> Any:
    _check_mode(call, p, training)
    return keep(build, call, x, p, training, inplace)


@rule(nn.Dropout1d, role="drop", inert=True, affine=always)
def dropout1d_module(build: MapBuilder, call: Call, x: Any) -> Any:
    """Whole channels of a row of positions, or of no positions: all features of an image."""
    layer: Any = call.module
    twin = nn.Dropout2d if len(x.dims) > 1 else nn.Dropout3d  # the latter takes images as channels
    return replace(x, node=build.emit_module(call, twin(layer.p, layer.inplace), x, twin))


@rule(F.dropout1d, role="drop", affine=always)
def dropout1d(
    build: MapBuilder,
    call: Call,
    x: Any,
    p: float = 0.5,
    training: Any = True,
    inplace: bool = False,
) -> Any:
    _check_mode(call, p, training)
    function = F.dropout2d if len(x.dims) > 1 else F.dropout3d
    result = act_elementwise(build, call, x, p, training, inplace, as_function=function)
    return result.alike(x)


@elementwise_rule(
    *(nn.Sigmoid, nn.Hardsigmoid, *calling("sigmoid", "sigmoid_", "hardsigmoid")),
    role="activation",
)
def sigmoid(build: MapBuilder, call: Call, x: Any, *rest: Any, **names: Any) -> Any:
    return act_elementwise(build, call, x, *rest, **names).meaning_of("sigmoid")


register(nn.Sigmoid, *calling("sigmoid", "sigmoid_"), final="sigmoid")


@elementwise_rule(nn.LogSigmoid, *calling("logsigmoid"), role="activation")
def log_sigmoid(build: MapBuilder, call: Call, x: Any) -> Any:
    return act_elementwise(build, call, x).meaning_of("log_probabilities")
