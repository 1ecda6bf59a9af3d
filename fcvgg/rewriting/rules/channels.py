"""Layers that work along the channels: normalisation, softmax, concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fcvgg.errors import RefusedLayerError, UnsupportedLayerError
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells, Constant, with_channels
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.marks import FollowsTraining
from fcvgg.rewriting.modules import ChannelLayerNorm
from fcvgg.rewriting.program import Windows
from fcvgg.rewriting.rules.convolution import values_of
from fcvgg.rewriting.rules.elementwise import act_elementwise
from fcvgg.rewriting.rules.pooling import features_of
from fcvgg.rewriting.rules.registry import attributes, calling, register, rule


def _check_plain(call: Call) -> None:
    if nn.utils.parametrize.is_parametrized(call.module):  # type: ignore[arg-type]
        raise UnsupportedLayerError(
            f"{call} has a parametrized weight; call torch.nn.utils.parametrize."
            "remove_parametrizations on it first"
        )


_BATCH_STATISTICS = (
    "it normalises by the statistics of the batch in evaluation mode too, which mix all positions "
    "and images; expected running statistics"
)


@rule(
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, F.batch_norm),
    arguments=attributes("running_mean", "running_var"),
    positional=True,
    role="bn",
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
    x, windows = _last_axis(build, call, input, normalized_shape)
    shape = tuple(normalized_shape)
    if call.module is not None:
        _check_plain(call)
        twin = ChannelLayerNorm(list(shape), eps, weight is not None, device="meta")
        twin.weight, twin.bias = weight, bias
        node = build.emit_module(call, twin, x, "channels")
    else:
        last = replace(x, node=build.graph.call_method("movedim", (x.node, 1, -1)))  # (N, h, w, C)
        normed = build.emit_function(call, F.layer_norm, last, shape, weight, bias, eps)
        node = build.graph.call_method("movedim", (normed, -1, 1))  # (N, C, h, w)
    result = replace(x, node=node).meaning_of("logits")
    build.record(call, "LayerNorm", windows, result)
    return result


register(ChannelLayerNorm, positional=True)


def _last_axis(
    build: MapBuilder, call: Call, x: Any, shape: Sequence[int]
) -> tuple[Cells, Windows]:
    if len(shape) != 1:
        raise UnsupportedLayerError(
            f"{call} normalises over {tuple(shape)}, which mixes positions; expected the channels"
        )
    return features_of(build, call, x, -1)


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
    x = build.features(call, input, _axis(call, input, dim))
    node = build.emit_function(call, F.normalize, x, p, 1, eps)
    return replace(x, node=node).meaning_of("logits")


@rule(nn.Softmax, *calling("softmax"), arguments=attributes("dim"), positional=True, role="prob")
def softmax(
    build: MapBuilder, call: Call, input: Any, dim: int | None = None, *_: Any, **__: Any
) -> Cells:
    return _softmax(build, call, input, dim, torch.softmax, "probabilities")


register(
    nn.Softmax2d, rewrite=softmax, arguments=lambda _: {"dim": -3}, positional=True, role="prob"
)


@rule(
    nn.LogSoftmax,
    *calling("log_softmax"),
    arguments=attributes("dim"),
    positional=True,
    role="prob",
)
def log_softmax(
    build: MapBuilder, call: Call, input: Any, dim: int | None = None, *_: Any, **__: Any
) -> Cells:
    return _softmax(build, call, input, dim, torch.log_softmax, "log_probabilities")


def _softmax(
    build: MapBuilder, call: Call, x: Any, dim: int | None, function: Any, activation: str
) -> Cells:
    if dim is None and isinstance(x, Cells):  # torch's implicit choice
        dim = 0 if len(x.dims) in (0, 2) else 1
    x = build.features(call, x, _axis(call, x, dim))
    return replace(x, node=build.emit_function(call, function, x, 1)).meaning_of(activation)


def _axis(call: Call, x: Any, dim: Any) -> int:
    """The layout's axis of the source's dimension `dim`."""
    if not isinstance(x, Cells) or not isinstance(dim, int):
        raise UnsupportedLayerError(f"{call} works along {dim!r}; expected the classes")
    axis = dim % (len(x.dims) + 1) - 1
    if axis < 0:
        raise UnsupportedLayerError(f"{call} works along dimension {dim}, the images of the batch")
    return axis


@rule(*calling("cat", "concat", "concatenate"), positional=True)
def cat(build: MapBuilder, call: Call, tensors: Sequence[Any], dim: int = 0, **names: Any) -> Cells:
    dim = names.get("axis", dim)
    parts = [build.features(call, x, _axis(call, x, dim)) for x in tensors]
    axis = _axis(call, parts[0], dim)
    grids = {(p.extent[1:], p.dilation) for p in parts}
    if len(grids) > 1:
        raise UnsupportedLayerError(
            f"{call} concatenates maps of different sizes or dilations {sorted(grids)}"
        )
    channels = sum(p.extent[0] for p in parts)
    node = build.emit_function(call, torch.cat, list(parts), 1)
    step = build.join(parts, call, node)
    result = with_channels(parts[0], axis, channels, node=node, step=step).joined_with(parts)
    same = len({(p.activation, p.share) for p in parts}) == 1
    return result.alike(parts[0]) if same else result.computed_from(parts)
