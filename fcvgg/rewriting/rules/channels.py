"""Layers that work along the channels: normalisation and softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.errors import RefusedLayerError, UnsupportedLayerError
from fcvgg.geometry import KernelGeometry, KernelPair
from fcvgg.rewriting.channel_view import channel_view
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells, Constant, channels_along
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.marks import FollowsTraining
from fcvgg.rewriting.modules import ChannelLayerNorm, ChannelRMSNorm
from fcvgg.rewriting.rules.convolution import values_of
from fcvgg.rewriting.rules.elementwise import act_elementwise
from fcvgg.rewriting.rules.pooling import features_of
from fcvgg.rewriting.rules.reductions import along_channels, axis_of, in_dtype
from fcvgg.rewriting.rules.registry import STATISTICS, always, attributes, calling, register, rule


def _check_plain(call: Call) -> None:
    if nn.utils.parametrize.is_parametrized(call.module):  # type: ignore[arg-type]
        raise UnsupportedLayerError(
            f"{call} has a parametrized weight; call torch.nn.utils.parametrize."
            "remove_parametrizations on it first"
        )


@rule(
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, F.batch_norm),
    arguments=attributes("running_mean", "running_var"),
    positional=True,
    role="bn",
    affine=always,
)
def batch_norm(
    build: MapBuilder,
    call: Call,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Constant | None = None,
    bias: Constant | None = None,
    training: Any = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Cells:
    norm = call.module
    if training or running_mean is None:
        raise RefusedLayerError(
            f"{call} is refused: it normalises by the statistics of the batch in evaluation mode "
            "too, which mix all positions and images; expected running statistics"
        )
    x, windows = features_of(build, call, input, 0)
    if norm is None:
        if isinstance(build.owner_of(call), nn.modules.batchnorm._BatchNorm):
            # torch's own forward, in a subclass, computes the mode from self.training
            training = FollowsTraining(False)
        args = (x, running_mean, running_var, weight, bias, training, momentum, eps)
        node = build.emit(call, args, {})
    elif isinstance(norm, nn.BatchNorm1d):
        _check_plain(call)
        node = build.emit_module(call, _batch_norm2d(norm), x, "2d")
    else:
        node = build.repeat(call, x)
    result = replace(x, node=node).meaning_of("logits")
    build.record(call, "BatchNorm2d" if norm is None else call.kind, windows, result)
    return result


def _batch_norm2d(norm: nn.BatchNorm1d) -> nn.BatchNorm2d:
    twin = nn.BatchNorm2d(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        device="meta",
    )
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(twin, name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(twin, name, buffer)
    return twin


@rule(
    *(nn.PReLU, F.prelu, torch.prelu, "prelu"),
    arguments=attributes("weight"),
    positional=True,
    role="activation",
)
def prelu(build: MapBuilder, call: Call, input: Any, weight: Any) -> Cells:
    x = input if values_of(call, weight).numel() == 1 else build.features(call, input, 0)
    if call.module is not None:
        return act_elementwise(build, call, x)  # type: ignore[no-any-return]
    return replace(x, node=build.repeat(call, x)).computed_from([x])


@rule(
    *(nn.LayerNorm, *calling("layer_norm")),
    arguments=attributes("normalized_shape", "weight", "bias", "eps"),
    positional=True,
)
def layer_norm(
    build: MapBuilder,
    call: Call,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Cells:
    def twin() -> nn.Module:
        norm = ChannelLayerNorm(list(normalized_shape), eps, weight is not None, device="meta")
        norm.weight, norm.bias = weight, bias
        return norm

    affine = (weight, bias, eps)
    return _normalized(build, call, input, normalized_shape, twin, F.layer_norm, affine)


@rule(
    *(nn.RMSNorm, *calling("rms_norm")),
    arguments=attributes("normalized_shape", "weight", "eps"),
    positional=True,
)
def rms_norm(
    build: MapBuilder,
    call: Call,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    eps: float | None = None,
) -> Cells:
    def twin() -> nn.Module:
        norm = ChannelRMSNorm(list(normalized_shape), eps, weight is not None, device="meta")
        norm.weight = weight
        return norm

    return _normalized(build, call, input, normalized_shape, twin, F.rms_norm, (weight, eps))


def _normalized(
    build: MapBuilder,
    call: Call,
    input: Any,
    shape: Sequence[int],
    twin: Callable[[], nn.Module],
    function: Any,
    settings: Sequence[Any],
) -> Cells:
    """A norm of the features of each cell: `twin` for a layer, `function` with `settings` else."""
    x, windows, layout = _features_in_order(build, call, input, shape)
    if call.module is not None:
        _check_plain(call)
        node = build.emit_module(call, twin(), x, "channels")
    else:
        last = replace(x, node=build.graph.call_method("movedim", (x.node, 1, -1)))  # (N, h, w, C)
        affine = [_as_row(build, value) for value in settings]
        normed = build.emit_function(call, function, last, (x.extent[0],), *affine)
        node = build.graph.call_method("movedim", (normed, -1, 1))  # (N, C, h, w)
    result = replace(x, node=node, moved=layout).meaning_of("logits")
    kind = "LayerNorm" if function is F.layer_norm else "RMSNorm"
    build.record(call, kind, windows, result)
    return result


register(ChannelLayerNorm, ChannelRMSNorm, positional=True)


def _as_row(build: MapBuilder, value: Any) -> Any:
    """A parameter of the window's shape, flattened; anything else as it is."""
    if not isinstance(value, Constant) or value.value.ndim < 2:
        return value
    node = build.graph.call_method("reshape", (value.node, (-1,)))
    return Constant(node, value.value.flatten())


def _features_in_order(
    build: MapBuilder, call: Call, x: Any, shape: Sequence[int]
) -> tuple[Cells, KernelPair, Tensor | None]:
    """The value with its last dimensions as the channels, in order, and the layout that it has.

    Over more than the channels, a norm is one over all elements of each window.
    """
    if len(shape) == 1:
        x, windows = features_of(build, call, x, -1)
        return x, windows, x.moved
    if not isinstance(x, Cells) or x.dims != tuple(shape):
        raise UnsupportedLayerError(
            f"{call} normalises over {tuple(shape)}, which mixes positions; expected the channels, "
            "or all features of the window"
        )
    if x.dims == x.extent:
        build.begin_head(x, x.extent[1:], call)
    height, width = (KernelGeometry(n, dilation=d) for n, d in zip(x.extent[1:], x.dilation))
    x = build.gathered(x, call)
    flat = build.features(call, replace(x, moved=x.layout.flatten()), 0)
    return flat, (height, width), flat.layout.reshape(x.dims)


@rule(
    *(nn.GroupNorm, *calling("group_norm")),
    arguments=attributes("num_groups", "weight", "bias", "eps"),
    refused_on_maps=STATISTICS,
)
def group_norm(
    build: MapBuilder,
    call: Call,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Cells:
    """A norm of groups of the features of each cell: of vectors, and not of maps."""
    x, windows = features_of(build, call, input, 0)
    if call.module is not None:
        _check_plain(call)
        weight, bias = (build.parameter(call, name) for name in ("weight", "bias"))
    result = along_channels(build, call, x, (0,), "group_norm", num_groups, eps)
    for function, affine in ((torch.mul, weight), (torch.add, bias)):
        if affine is not None:
            column = build.graph.call_method("reshape", (affine.node, (-1, 1, 1)))  # (C, 1, 1)
            node = build.graph.call_function(function, (result.node, column))
            result = replace(result, node=node)
    result = result.meaning_of("logits")
    build.record(call, "GroupNorm", windows, result)
    return result


@rule(nn.LocalResponseNorm, *calling("local_response_norm"), positional=True)
def local_response_norm(build: MapBuilder, call: Call, x: Any, *args: Any, **kwargs: Any) -> Cells:
    x = build.as_map(x, call)
    return replace(x, node=build.emit(call, (x, *args), kwargs)).meaning_of("logits")


@rule(*calling("normalize"), positional=True)
def normalize(
    build: MapBuilder,
    call: Call,
    input: Any,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: None = None,
) -> Cells:
    axis = axis_of(call, input, dim)
    if channels_along(input, axis) is None:
        return along_channels(build, call, input, (axis,), "normalize", p, eps)
    x = build.features(call, input, axis)
    node = build.emit_function(call, F.normalize, x, p, 1, eps)
    return replace(x, node=node).meaning_of("logits")


_SOFTMAX: dict[str, Any] = {"positional": True, "role": "prob"}


@rule(nn.Softmax, *calling("softmax"), arguments=attributes("dim"), final="softmax", **_SOFTMAX)
def softmax(
    build: MapBuilder, call: Call, input: Any, dim: int | None = None, *rest: Any, **names: Any
) -> Cells:
    input = in_dtype(build, input, *rest, *names.values())
    return _softmax(build, call, input, dim, torch.softmax, "probabilities")


register(
    nn.Softmax2d, rewrite=softmax, arguments=lambda _: {"dim": -3}, final="softmax", **_SOFTMAX
)


@rule(
    nn.LogSoftmax,
    *calling("log_softmax"),
    arguments=attributes("dim"),
    final="log_softmax",
    **_SOFTMAX,
)
def log_softmax(
    build: MapBuilder, call: Call, input: Any, dim: int | None = None, *rest: Any, **names: Any
) -> Cells:
    input = in_dtype(build, input, *rest, *names.values())
    return _softmax(build, call, input, dim, torch.log_softmax, "log_probabilities")


def _softmax(
    build: MapBuilder, call: Call, x: Any, dim: int | None, function: Any, activation: str
) -> Cells:
    if dim is None and isinstance(x, Cells):  # torch's implicit choice
        dim = 0 if len(x.dims) in (0, 2) else 1
    axis = axis_of(call, x, dim)
    if channels_along(x, axis) is None:
        view = channel_view(x)
        classes = view is not None and axis in view.axes  # of each position, or head
        made = along_channels(build, call, x, (axis,), function.__name__)
        return made.meaning_of(activation if classes else "logits")
    x = build.features(call, x, axis)
    return replace(x, node=build.emit_function(call, function, x, 1)).meaning_of(activation)
