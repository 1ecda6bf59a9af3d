"""What each Keras layer is in torch: the table that `fcvgg.sources.keras_file` reads by.

A function receives the builder, the layer's description and the values it is called on, and gives
the value that it computes. Maps ``(N, H, W, C)`` in Keras are ``(N, C, H, W)`` here.
https://keras.io/api/layers/
"""

# ruff: noqa: D103  (a function is named for the layer it adds)

from __future__ import annotations

from collections.abc import Callable
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

reads = layers.registering(LAYERS)
"""Registers a function for layers of these classes."""


@reads("InputLayer", "Identity", "ActivityRegularization", "GaussianNoise", "GaussianDropout")
@reads("RandomFlip", "RandomRotation", "RandomZoom", "RandomTranslation", "RandomContrast")
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
    if depthwise:  # (kh, kw, C, filters of each channel) -> (C * filters, 1, kh, kw)
        groups = weight.shape[2]
        weight = weight.transpose(2, 3, 0, 1).reshape(-1, 1, *kernel)
    else:  # (kh, kw, C, O) -> (O, C, kh, kw)
        groups = layer.get("groups", 1)
        weight = weight.transpose(3, 2, 0, 1)
    fixed, x = _padded(build, layer, x, (kernel, stride, dilation), 0.0)
    module = layers.convolution(as_tensor(weight), bias, stride, fixed, dilation, groups)
    return _activated(build, layer, build.layer(layer, module, x))


@reads("Dense")
def dense(build: Builder, layer: Layer, x: Value) -> Value:
    units = layer.get("units")
    weight, bias = _weight_and_bias(build, layer, (None, units), units)
    module = layers.linear(as_tensor(weight.T), bias)
    if x.rank == 4:  # Keras works on the last dimension, the channels
        last = build.step(layer, torch.permute, x, dims=(0, 2, 3, 1))
        x = build.step(layer, torch.permute, build.layer(layer, module, last), dims=(0, 3, 1, 2))
    else:
        x = build.layer(layer, module, x)
    return _activated(build, layer, x)


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
    _expect_channels_last(build, layer)
    if x.rank == 4:
        x = build.step(layer, torch.permute, x, dims=(0, 2, 3, 1))  # (N, H, W, C)
    return build.step(layer, torch.flatten, x, rank=2, start_dim=1)


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


@reads("ELU")
def elu(build: Builder, layer: Layer, x: Value) -> Value:
    return build.step(layer, F.elu, x, alpha=float(layer.get("alpha", 1.0)))


@reads("Softmax")
def softmax(build: Builder, layer: Layer, x: Value) -> Value:
    _expect_along_channels(build, layer, x, "works")
    return build.step(layer, torch.softmax, x, dim=1)


# -- joins ----------------------------------------------------------------------------------------


@reads("Add", "Multiply", "Subtract", "Maximum", "Minimum")
def combine(build: Builder, layer: Layer, *values: Value) -> Value:
    functions = {
        "Add": torch.add,
        "Multiply": torch.mul,
        "Subtract": torch.sub,
        "Maximum": torch.maximum,
        "Minimum": torch.minimum,
    }
    return build.step(layer, folded, *values, function=functions[layer.kind])


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
