"""Torch layers that hold the arrays of a file, as every reader of foreign formats makes them.

The layers are made on the meta device: their own random values would be computed in vain.
"""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fcvgg.geometry import Pair

Function = TypeVar("Function", bound=Callable[..., Any])


def registering(
    table: dict[str, Function],
) -> Callable[..., Callable[[Function], Function]]:
    """A decorator ``reads(*names)`` that enters a function into a table under names of a format."""

    def reads(*names: str) -> Callable[[Function], Function]:
        def register(function: Function) -> Function:
            table.update(dict.fromkeys(names, function))
            return function

        return register

    return reads


def as_tensor(array: Any) -> Tensor:
    """An array as a float32 tensor, which shares the array's memory where that can be written.

    Raises:
        ValueError: if it does not hold real numbers.
    """
    kind = np.asarray(array).dtype
    if kind.kind in "cOSU":
        raise ValueError(f"weights must be real numbers, got {kind}")
    array = np.ascontiguousarray(array, dtype=np.float32).reshape(np.shape(array))
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int = 1,
) -> nn.Conv2d:
    """A convolution with the weight ``(O, C / groups, kh, kw)`` and the bias ``(O,)``."""
    outputs, inputs, *kernel = weight.shape
    layer = nn.Conv2d(
        *(inputs * groups, outputs, (kernel[0], kernel[1]), stride, padding, dilation, groups),
        bias=bias is not None,
        device="meta",
    )
    return _holding(layer, weight, bias)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A fully connected layer with the weight ``(O, C)`` and the bias ``(O,)``."""
    outputs, features = weight.shape
    return _holding(nn.Linear(features, outputs, bias is not None, device="meta"), weight, bias)


def batch_norm(
    rank: int,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    momentum: float,
) -> nn.Module:
    """Batch norm of values of `rank` dimensions; `momentum` is the share of the old mean kept."""
    kind = nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d
    layer = kind(len(mean), epsilon, 1 - momentum, device="meta")
    layer.running_mean, layer.running_var = mean, variance  # (C,) each
    layer.num_batches_tracked = torch.tensor(0)
    return _holding(layer, weight, bias)


Layer = TypeVar("Layer", bound=nn.Module)


def _holding(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def joined(*values: Tensor, dim: int = 1) -> Tensor:
    """Values joined along a dimension, the channels by default."""
    return torch.cat(values, dim)


def folded(*values: Any, function: Callable[..., Any]) -> Any:
    """A function of two values applied to all of them in turn."""
    result, *rest = values
    for value in rest:
        result = function(result, value)
    return result


def subtracted_from(x: Tensor, value: Any) -> Tensor:
    """``value - x``, where the image's value leads, so that torch.fx sees the call."""
    return python.add(python.neg(x), value)


def divided_into(x: Tensor, value: Any) -> Tensor:
    """``value / x``."""
    return python.mul(python.pow(x, -1), value)


def hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha * x + beta``, limited to 0 and 1."""
    return torch.clamp(x * alpha + beta, 0.0, 1.0)
