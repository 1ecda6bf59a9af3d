"""What each Keras layer is in torch: the table that `fcvgg.sources.keras_file` reads by.

A function receives the builder, the layer's description and the values it is called on, and gives
the value that it computes. Maps ``(N, H, W, C)`` in Keras are ``(N, C, H, W)`` here.
https://keras.io/api/layers/
"""

# ruff: noqa: D103  (a function is named for the layer it adds)

from __future__ import annotations

import operator as python
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.geometry import Pair
from fcvgg.sources import layers, padding
from fcvgg.sources.keras_model import Builder, Layer, Value
from fcvgg.sources.layers import as_tensor, folded, joined
from fcvgg.support import untrusted

Reader = Callable[..., Value]

LAYERS: dict[str, Reader] = {}
"""From a Keras class to the function that adds it to a model."""

_NORMALIZATION_FLOOR = 1e-7  # keras.config.epsilon()

OPERATIONS = (
    *("Add", "Subtract", "Multiply", "TrueDivide", "Divide", "Maximum", "Minimum", "Average"),
    *("Power", "Absolute", "Negative", "Sqrt", "Square", "Flip", "GetItem", "Stack", "ExpandDims"),
)
"""Those that are called on numbers too, as ``inputs / 255.`` and the like leave them in a model.

Layers and operations of one name do the same.
"""

reads = layers.registering(LAYERS)
"""Registers a function for layers of these classes."""


@reads("InputLayer", "Identity", "ActivityRegularization", "GaussianNoise", "GaussianDropout")
@reads("StochasticDepth", "RandomContrast", "RandomBrightness")
@reads("RandomFlip", "RandomRotation", "RandomZoom", "RandomTranslation")
def identity(build: Builder, layer: Layer, x: Value) -> Value:
    """Layers that give back their input in prediction, such as random changes of images."""
    return x


# -- convolutions and fully connected layers ------------------------------------------------------


@reads("Conv2D", "Convolution2D", "DepthwiseConv2D")
def conv2d(build: Builder, layer: Layer, x: Value) -> Value:
    _expect_map(build, layer, x)
    kernel, stride, dilation = _pair(layer, "kernel_size"), _stride(layer), _dilation(layer)
    depthwise = layer.kind == "DepthwiseConv2D"
    filters = layer.get("depth_multiplier", 1) if depthwise else layer.get("filters")
    outputs = None if depthwise else filters
    weight, bias = _weight_and_bias(build, layer, (*kernel, None, filters), outputs)
    if depthwise:
        groups = weight.shape[2]
        weight = _depthwise(weight)
    else:  # (kh, kw, C, O) -> (O, C, kh, kw)
        groups = layer.get("groups", 1)
        weight = weight.transpose(3, 2, 0, 1)
    fixed, x = _padded(build, layer, x, (kernel, stride, dilation), 0.0)
    module = layers.convolution(as_tensor(weight), bias, stride, fixed, dilation, groups)
    return _activated(build, layer, build.layer(layer, module, x))


def _depthwise(weight: Any) -> Any:
    """``(kh, kw, C, filters of each channel)`` as ``(C * filters, 1, kh, kw)``."""
    return weight.transpose(2, 3, 0, 1).reshape(-1, 1, *weight.shape[:2])


@reads("SeparableConv2D", "SeparableConvolution2D")
def separable_conv2d(build: Builder, layer: Layer, x: Value) -> Value:
    _expect_map(build, layer, x)
    kernel, stride, dilation = _pair(layer, "kernel_size"), _stride(layer), _dilation(layer)
    filters, multiplier = layer.get("filters"), layer.get("depth_multiplier", 1)
    shapes: dict[str, tuple[int | None, ...]] = {
        "depthwise kernel": (*kernel, None, multiplier),
        "pointwise kernel": (1, 1, None, filters),
    }
    if layer.get("use_bias", True):
        shapes["bias"] = (filters,)
    depthwise, pointwise, *bias = build.weights(layer, shapes)
    groups = depthwise.shape[2]
    fixed, x = _padded(build, layer, x, (kernel, stride, dilation), 0.0)
    first = layers.convolution(
        as_tensor(_depthwise(depthwise)), None, stride, fixed, dilation, groups
    )
    second = layers.convolution(
        as_tensor(pointwise.transpose(3, 2, 0, 1)),
        as_tensor(bias[0]) if bias else None,
        *((1, 1), (0, 0), (1, 1)),
    )
    x = build.layer(layer, first, x, part="depthwise")
    return _activated(build, layer, build.layer(layer, second, x, part="pointwise"))


@reads("Dense")
def dense(build: Builder, layer: Layer, x: Value) -> Value:
    units = layer.get("units")
    weight, bias = _weight_and_bias(build, layer, (None, units), units)
    module = layers.linear(as_tensor(weight.T), bias)
    return _activated(build, layer, _along_channels(build, layer, module, x))


def _along_channels(build: Builder, layer: Layer, module: nn.Module, x: Value) -> Value:
    """A module that works on the last dimension, where Keras has the channels."""
    if x.rank != 4:
        return build.layer(layer, module, x)
    last = build.step(layer, torch.permute, x, dims=(0, 2, 3, 1))
    return build.step(layer, torch.permute, build.layer(layer, module, last), dims=(0, 3, 1, 2))


def _weight_and_bias(
    build: Builder, layer: Layer, kernel: tuple[int | None, ...], outputs: int | None
) -> tuple[Any, Tensor | None]:
    """The layer's kernel as Keras keeps it, and its bias, if it has one."""
    shapes = {"kernel": kernel}
    if layer.get("use_bias", True):
        shapes["bias"] = (outputs,)
    weight, *bias = build.weights(layer, shapes)
    return weight, as_tensor(bias[0]) if bias else None


@reads("BatchNormalization", "BatchNormalizationV1", "SyncBatchNormalization")
def batch_normalization(build: Builder, layer: Layer, x: Value) -> Value:
    _expect_along_channels(build, layer, x, "normalises")
    names = {"gamma": layer.get("scale", True), "beta": layer.get("center", True)}
    shapes = {name: (None,) for name, used in names.items() if used}
    arrays = build.weights(layer, {**shapes, "moving_mean": (None,), "moving_variance": (None,)})
    held = dict(zip([*shapes, "mean", "variance"], map(as_tensor, arrays)))
    module = layers.batch_norm(
        x.rank,
        held.get("gamma", torch.ones_like(held["mean"])),
        held.get("beta", torch.zeros_like(held["mean"])),
        held["mean"],
        held["variance"],
        layer.get("epsilon", 1e-3),
        layer.get("momentum", 0.99),
    )
    return build.layer(layer, module, x)


@reads("LayerNormalization")
def layer_normalization(build: Builder, layer: Layer, x: Value) -> Value:
    _expect_along_channels(build, layer, x, "normalises")
    if layer.get("rms_scaling", False):
        raise build.refuse(layer, "scales by the root mean square")
    used = {"gamma": layer.get("scale", True), "beta": layer.get("center", True)}
    shapes = {name: (None,) for name, is_used in used.items() if is_used}
    if not shapes:
        raise build.refuse(layer, "has neither scale nor centre, so that its size is not known")
    held = dict(zip(shapes, map(as_tensor, build.weights(layer, shapes))))
    channels = len(next(iter(held.values())))
    module = nn.LayerNorm(channels, float(layer.get("epsilon", 1e-3)))
    module.weight = nn.Parameter(held.get("gamma", torch.ones(channels)))
    module.bias = nn.Parameter(held.get("beta", torch.zeros(channels)))
    return _along_channels(build, layer, module, x)


@reads("LayerScale")
def layer_scale(build: Builder, layer: Layer, x: Value) -> Value:
    (gamma,) = build.weights(layer, {"gamma": (None,)})
    return build.step(layer, torch.mul, x, _per_channel(build, layer, x, "gamma", gamma))


@reads("CustomScaleLayer")
def custom_scale_layer(build: Builder, layer: Layer, x: Value, residual: Value) -> Value:
    """InceptionResNetV2's residual connection."""
    scaled = build.step(layer, python.mul, residual, build.number(layer, layer.get("scale", 1.0)))
    return build.step(layer, torch.add, x, scaled)


# -- pools and paddings ---------------------------------------------------------------------------


@reads("MaxPooling2D", "MaxPool2D", "AveragePooling2D", "AvgPool2D")
def pooling2d(build: Builder, layer: Layer, x: Value) -> Value:
    _expect_map(build, layer, x)
    kernel = _pair(layer, "pool_size", 2)
    stride = _pair(layer, "strides", kernel)
    if "Max" in layer.kind:
        fixed, x = _padded(build, layer, x, (kernel, stride, (1, 1)), -torch.inf)
        return build.layer(layer, nn.MaxPool2d(kernel, stride, fixed), x)
    if layer.get("padding", "valid") == "same":
        return build.step(layer, padding.average_same, x, kernel=kernel, stride=stride)
    return build.layer(layer, nn.AvgPool2d(kernel, stride), x)


@reads("GlobalAveragePooling2D", "GlobalAvgPool2D", "GlobalMaxPooling2D", "GlobalMaxPool2D")
def global_pooling2d(build: Builder, layer: Layer, x: Value) -> Value:
    _expect_map(build, layer, x)
    kind = nn.AdaptiveMaxPool2d if "Max" in layer.kind else nn.AdaptiveAvgPool2d
    pooled = build.layer(layer, kind(1), x)
    if layer.get("keepdims", False):
        return pooled
    return build.step(layer, torch.flatten, pooled, rank=2, start_dim=1)


@reads("ZeroPadding2D")
def zero_padding2d(build: Builder, layer: Layer, x: Value) -> Value:
    _expect_map(build, layer, x)
    rows, columns = _both(layer.get("padding", 1))
    (top, bottom), (left, right) = _both(rows), _both(columns)
    untrusted.numbers_within((top, bottom, left, right), 0, f"padding of the layer {layer}")
    return build.layer(layer, nn.ZeroPad2d((left, right, top, bottom)), x)


@reads("Flatten")
def flatten(build: Builder, layer: Layer, x: Value) -> Value:
    if x.rank == 4:
        # (N, H, W, C); `channels_first` has Keras move dimension 1, whatever it holds, to the end
        first = layer.get("data_format", "channels_last") == "channels_first"
        x = build.step(layer, torch.permute, x, dims=(0, 3, 1, 2) if first else (0, 2, 3, 1))
    return build.step(layer, torch.flatten, x, rank=2, start_dim=1)


@reads("Permute")
def permute(build: Builder, layer: Layer, x: Value) -> Value:
    order = tuple(layer.get("dims", ()))
    if x.rank != 4 or sorted(order) != [1, 2, 3]:
        raise build.refuse(layer, f"orders the dimensions of a value of rank {x.rank} as {order}")
    last = (0, 2, 3, 1)  # the dimensions of (N, H, W, C) in (N, C, H, W)
    moved = (0, *(last[n] for n in order))
    return build.step(layer, torch.permute, x, dims=tuple(moved[n] for n in (0, 3, 1, 2)))


@reads("Reshape")
def reshape(build: Builder, layer: Layer, x: Value) -> Value:
    shape = tuple(layer.get("target_shape", ()))
    if len(shape) not in (1, 3):
        raise build.refuse(layer, f"gives a value of shape {shape}")
    x = flatten(build, layer, x)  # in Keras's order
    x = build.step(layer, torch.unflatten, x, rank=len(shape) + 1, dim=1, sizes=shape)
    return x if x.rank == 2 else build.step(layer, torch.permute, x, dims=(0, 3, 1, 2))


@reads("Dropout", "AlphaDropout", "SpatialDropout2D")
def dropout(build: Builder, layer: Layer, x: Value) -> Value:
    kind = nn.Dropout2d if layer.kind == "SpatialDropout2D" else nn.Dropout
    return build.layer(layer, kind(float(layer.get("rate", 0.5))), x)


# -- preprocessing within the model ---------------------------------------------------------------


@reads("Rescaling")
def rescaling(build: Builder, layer: Layer, x: Value) -> Value:
    scale, offset = layer.get("scale", 1.0), layer.get("offset", 0.0)
    scaled = build.step(layer, torch.mul, x, _per_channel(build, layer, x, "scale", scale))
    return build.step(layer, torch.add, scaled, _per_channel(build, layer, x, "offset", offset))


@reads("Normalization")
def normalization(build: Builder, layer: Layer, x: Value) -> Value:
    if layer.get("invert", False):
        raise build.refuse(layer, "inverts the normalisation")
    _expect_along_channels(build, layer, x, "normalises")
    mean, variance = layer.config.get("mean"), layer.config.get("variance")
    if mean is None or variance is None:
        mean, variance = build.weights(layer, {"mean": (None,), "variance": (None,)})
    deviation = np.maximum(np.sqrt(np.asarray(variance, np.float32)), _NORMALIZATION_FLOOR)
    centred = build.step(layer, torch.sub, x, _per_channel(build, layer, x, "mean", mean))
    return build.step(
        layer, torch.div, centred, _per_channel(build, layer, x, "deviation", deviation)
    )


def _per_channel(build: Builder, layer: Layer, x: Value, name: str, value: Any) -> Value:
    row = torch.tensor(np.asarray(value, dtype=np.float32).reshape(-1))
    return build.constant(layer, name, row[:, None, None] if x.rank == 4 else row)


# -- activations ----------------------------------------------------------------------------------


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


_ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": _gelu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "exponential": torch.exp,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.2),
    "hard_sigmoid": F.hardsigmoid,
    "hard_silu": F.hardswish,
    "hard_swish": F.hardswish,
    "hard_tanh": F.hardtanh,
    "celu": F.celu,
    "log_sigmoid": F.logsigmoid,
}
_ALONG_CHANNELS = {"softmax": torch.softmax, "log_softmax": torch.log_softmax}


def _activated(build: Builder, layer: Layer, x: Value, key: str = "activation") -> Value:
    name = layer.get(key, "linear")
    while isinstance(name, dict):
        name = name.get("config", {}) if isinstance(name.get("config"), str) else name["class_name"]
    name = str(name).lower()
    if name == "linear":
        return x
    if name in _ALONG_CHANNELS:
        return build.step(layer, _ALONG_CHANNELS[name], x, dim=1)
    if name == "hard_sigmoid" and build.version < 3:
        return build.step(layer, layers.hard_sigmoid, x, alpha=0.2, beta=0.5)
    if name not in _ACTIVATIONS:
        raise build.refuse(layer, f"has the activation {name!r}")
    return build.step(layer, _ACTIVATIONS[name], x)


@reads("Activation")
def activation(build: Builder, layer: Layer, x: Value) -> Value:
    return _activated(build, layer, x)


@reads("ReLU")
def relu(build: Builder, layer: Layer, x: Value) -> Value:
    if layer.get("threshold", 0):
        raise build.refuse(layer, f"has the threshold {layer.get('threshold')}")
    slope, top = layer.get("negative_slope", 0), layer.config.get("max_value")
    x = (
        build.step(layer, F.leaky_relu, x, negative_slope=slope)
        if slope
        else build.step(layer, F.relu, x)
    )
    return x if top is None else build.step(layer, torch.clamp, x, max=float(top))


@reads("LeakyReLU")
def leaky_relu(build: Builder, layer: Layer, x: Value) -> Value:
    slope = float(layer.get("negative_slope", layer.get("alpha", 0.3)))
    return build.step(layer, F.leaky_relu, x, negative_slope=slope)


@reads("PReLU")
def prelu(build: Builder, layer: Layer, x: Value) -> Value:
    rank = x.rank - 1
    (slope,) = build.weights(layer, {"alpha": (None,) * rank})
    if slope.size != slope.shape[-1]:
        raise build.refuse(layer, f"has slopes of shape {slope.shape}, which depend on position")
    module = nn.PReLU(slope.size)
    module.weight = nn.Parameter(as_tensor(slope.reshape(-1)))
    return build.layer(layer, module, x)


@reads("ELU")
def elu(build: Builder, layer: Layer, x: Value) -> Value:
    return build.step(layer, F.elu, x, alpha=float(layer.get("alpha", 1.0)))


@reads("Softmax")
def softmax(build: Builder, layer: Layer, x: Value) -> Value:
    _expect_along_channels(build, layer, x, "works")
    return build.step(layer, torch.softmax, x, dim=1)


# -- joins ----------------------------------------------------------------------------------------


_ARITHMETIC: dict[str, Any] = {
    "Add": torch.add,
    "Multiply": torch.mul,
    "Subtract": torch.sub,
    "TrueDivide": torch.div,
    "Divide": torch.div,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "Average": torch.add,
}
_REVERSED: dict[str, Any] = {
    "Add": python.add,
    "Multiply": python.mul,
    "Subtract": layers.subtracted_from,
    "TrueDivide": layers.divided_into,
    "Divide": layers.divided_into,
}


@reads(*_ARITHMETIC)
def combine(build: Builder, layer: Layer, *arguments: Any) -> Value:
    """Layers on a list of values, and operations on two, of which one may be a constant."""
    if len(arguments) == 1 and isinstance(arguments[0], tuple):
        arguments = arguments[0]
    given = [value for value in arguments if isinstance(value, Value)]
    if len(given) == len(arguments):
        total = build.step(layer, folded, *given, function=_ARITHMETIC[layer.kind])
        if layer.kind != "Average":
            return total
        return build.step(layer, torch.mul, total, build.number(layer, 1 / len(given)))
    if len(given) != 1 or len(arguments) != 2 or layer.kind not in _REVERSED:
        raise build.refuse(layer, "is called on constants")
    leads = given[0] is arguments[0]
    function = _ARITHMETIC[layer.kind] if leads else _REVERSED[layer.kind]
    return build.step(layer, function, given[0], _operand(build, layer, given[0], arguments[leads]))


def _operand(build: Builder, layer: Layer, x: Value, value: Any) -> Value:
    """A constant that an operation takes besides a value: a number, or one for each channel."""
    array = np.asarray(value, dtype=np.float32)
    if array.size == 1:
        return build.number(layer, float(array.reshape(-1)[0]))
    if array.size != array.shape[-1]:
        raise build.refuse(layer, f"takes a constant of shape {array.shape}")
    return _per_channel(build, layer, x, "constant", array)


@reads("Power")
def power(build: Builder, layer: Layer, x: Any, exponent: Any) -> Value:
    if not isinstance(x, Value) or not isinstance(exponent, (int, float)):
        raise build.refuse(layer, "has an exponent other than a number")
    return build.step(layer, torch.pow, x, exponent=exponent)


@reads("Absolute", "Negative", "Sqrt", "Square")
def function_of_one(build: Builder, layer: Layer, x: Value) -> Value:
    functions: dict[str, Any] = {
        "Absolute": torch.abs,
        "Negative": torch.neg,
        "Sqrt": torch.sqrt,
        "Square": torch.square,
    }
    return build.step(layer, functions[layer.kind], x)


@reads("GetItem")
def get_item(build: Builder, layer: Layer, x: Value, key: Any) -> Value:
    """Channels of a map; one channel alone stays a map here, of which Keras drops the dimension."""
    _expect_map(build, layer, x)
    parts = list(key) if isinstance(key, tuple) else [key]
    if ... in parts:
        at = parts.index(...)
        parts[at : at + 1] = [slice(None)] * (5 - len(parts))
    parts += [slice(None)] * (4 - len(parts))
    channel = parts[-1]
    if len(parts) != 4 or any(part != slice(None) for part in parts[:-1]):
        raise build.refuse(layer, "takes parts of the rows, columns or images")
    if isinstance(channel, int):
        end = channel + 1 or None
        return build.step(layer, channels_of, x, rank=3, start=channel, stop=end, step=1)
    if not isinstance(channel, slice):
        raise build.refuse(layer, f"takes the channels {channel!r}")
    limits = {"start": channel.start, "stop": channel.stop, "step": channel.step}
    return build.step(layer, channels_of, x, **limits)


@reads("Flip")
def flip(build: Builder, layer: Layer, x: Value, axis: Any = None) -> Value:
    _expect_map(build, layer, x)
    axis = layer.get("axis", axis)
    if axis not in (-1, 3):
        raise build.refuse(layer, f"reverses dimension {axis}")
    return build.step(layer, torch.flip, x, dims=(1,))


def channels_of(x: Tensor, start: int | None, stop: int | None, step: int | None) -> Tensor:
    """A slice of the channels of ``(N, C, H, W)``, in reverse order if the step is negative."""
    chosen = range(x.shape[1])[start:stop:step]
    if list(chosen) == list(range(x.shape[1]))[::-1]:
        return x.flip(1)
    return torch.cat([x.narrow(1, index, 1) for index in chosen], 1)


@reads("Stack")
def stack(build: Builder, layer: Layer, values: tuple[Value, ...], axis: Any = None) -> Value:
    """Single channels put together again, as ``preprocess_input`` does."""
    axis = layer.get("axis", axis)
    if axis not in (-1, 3) or any(value.rank != 3 for value in values):
        raise build.refuse(layer, f"stacks along dimension {axis}")
    return build.step(layer, joined, *values, rank=4)


@reads("ExpandDims")
def expand_dims(build: Builder, layer: Layer, x: Value, axis: Any = None) -> Value:
    axis = layer.get("axis", axis)
    if axis not in (-1, 3) or x.rank != 3:
        raise build.refuse(layer, f"adds dimension {axis}")
    return build.step(layer, torch.clone, x, rank=4)


@reads("Concatenate")
def concatenate(build: Builder, layer: Layer, *values: Value) -> Value:
    _expect_along_channels(build, layer, values[0], "joins")
    return build.step(layer, joined, *values)


# -- small helpers --------------------------------------------------------------------------------


def _both(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else tuple(value)


def _pair(layer: Layer, name: str, default: Any = None) -> Pair:
    height, width = _both(layer.get(name, default))
    untrusted.numbers_within((height, width), 1, f"{name} of the layer {layer}")
    return height, width


def _stride(layer: Layer) -> Pair:
    return _pair(layer, "strides", 1)


def _dilation(layer: Layer) -> Pair:
    return _pair(layer, "dilation_rate", 1)


def _expect_map(build: Builder, layer: Layer, x: Value) -> None:
    _expect_channels_last(build, layer)
    if x.rank != 4:
        raise build.refuse(layer, f"is called on values of {x.rank} dimensions instead of maps")


def _expect_channels_last(build: Builder, layer: Layer) -> None:
    if layer.get("data_format", "channels_last") != "channels_last":
        raise build.refuse(layer, f"has its data {layer.get('data_format')}")


def _expect_along_channels(build: Builder, layer: Layer, x: Value, does: str) -> None:
    """Refuse a layer that works along another dimension than the last one, the channels."""
    axis = layer.get("axis", -1)
    axis = axis[0] if isinstance(axis, (list, tuple)) and len(axis) == 1 else axis
    if not isinstance(axis, int) or axis % x.rank != x.rank - 1:
        raise build.refuse(layer, f"{does} along dimension {axis} instead of the channels")


def _padded(
    build: Builder, layer: Layer, x: Value, windows: tuple[Pair, Pair, Pair], value: float
) -> tuple[Pair, Value]:
    """The padding that torch's layer does itself, and the value, padded where it cannot."""
    mode = layer.get("padding", "valid")
    if mode == "valid":
        return (0, 0), x
    if mode != "same":
        raise build.refuse(layer, f"has the padding {mode!r}")
    kernel, stride, dilation = windows
    fixed = padding.fixed_same_padding(kernel, stride, dilation)
    if fixed is not None:
        return fixed, x
    settings: dict[str, Any] = {"kernel": kernel, "stride": stride, "dilation": dilation}
    return (0, 0), build.step(layer, padding.pad_same, x, value=value, **settings)
