"""Layers that work along the channels: normalisation, softmax, concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fcvgg.errors import RefusedLayerError, UnsupportedLayerError
from fcvgg.rewriting.layouts import Cells, Constant, with_channels
from fcvgg.rewriting.marks import FollowsTraining
from fcvgg.rewriting.modules import ChannelLayerNorm
from fcvgg.rewriting.program import Windows
from fcvgg.rewriting.rewriter import Call, Rewriter
from fcvgg.rewriting.rules.elementwise import act_elementwise
from fcvgg.rewriting.rules.pooling import features_of
from fcvgg.rewriting.rules.registry import calling, rule


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


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, positional=True)
def batch_norm_module(build: Rewriter, call: Call, x: Any) -> Cells:
    norm = call.module
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm))
    if norm.running_mean is None:
        raise RefusedLayerError(f"{call} is refused: {_BATCH_STATISTICS}")
    x, windows = features_of(build, call, x, 0)
    if not isinstance(norm, nn.BatchNorm1d):
        node = build.emit(call, (x,), {})
    else:
        _check_plain(call)
        node = build.emit_module(call, _batch_norm2d(norm), x, "2d")
    result = replace(x, node=node).meaning_of("logits")
    build.record(call, call.kind, windows, result)
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


@rule(F.batch_norm, positional=True)
def batch_norm(
    build: Rewriter,
    call: Call,
    input: Any,
    running_mean: Constant | None,
    running_var: Constant | None,
    weight: Constant | None = None,
    bias: Constant | None = None,
    training: Any = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Cells:
    if training or running_mean is None:
        raise RefusedLayerError(f"{call} is refused: {_BATCH_STATISTICS}")
    if isinstance(build.owner_of(call), nn.modules.batchnorm._BatchNorm):
        # torch's own forward, in a subclass, computes the mode that it passes from self.training
        training = FollowsTraining(False)
    x, windows = features_of(build, call, input, 0)
    node = build.emit(
        call, (x, running_mean, running_var, weight, bias, training, momentum, eps), {}
    )
    result = replace(x, node=node).meaning_of("logits")
    build.record(call, "BatchNorm2d", windows, result)
    return result


@rule(nn.PReLU, positional=True)
def prelu_module(build: Rewriter, call: Call, x: Any) -> Cells:
    assert isinstance(call.module, nn.PReLU)
    if call.module.weight.numel() > 1:
        x = build.features(call, x, 0)
    return act_elementwise(build, call, x)


@rule(F.prelu, torch.prelu, "prelu", positional=True)
def prelu(build: Rewriter, call: Call, input: Any, weight: Constant) -> Cells:
    x = input if weight.value.numel() == 1 else build.features(call, input, 0)
    node = build.emit(call, (x, weight), {})
    return replace(x, node=node).computed_from([x])


@rule(nn.LayerNorm, positional=True)
def layer_norm_module(build: Rewriter, call: Call, x: Any) -> Cells:
    norm = call.module
    assert isinstance(norm, nn.LayerNorm)
    _check_plain(call)
    x, windows = _last_axis(build, call, x, norm.normalized_shape)
    twin = ChannelLayerNorm(
        list(norm.normalized_shape), norm.eps, norm.elementwise_affine, device="meta"
    )
    twin.weight, twin.bias = norm.weight, norm.bias
    node = build.emit_module(call, twin, x, "channels")
    result = replace(x, node=node).meaning_of("logits")
    build.record(call, "LayerNorm", windows, result)
    return result


@rule(*calling("layer_norm"), positional=True)
def layer_norm(
    build: Rewriter,
    call: Call,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Cells:
    x, _ = _last_axis(build, call, input, normalized_shape)
    last = build.graph.call_method("movedim", (x.node, 1, -1))
    normed = build.emit_function(
        call, F.layer_norm, replace(x, node=last), tuple(normalized_shape), weight, bias, eps
    )
    node = build.graph.call_method("movedim", (normed, -1, 1))
    return replace(x, node=node).meaning_of("logits")


def _last_axis(build: Rewriter, call: Call, x: Any, shape: Sequence[int]) -> tuple[Cells, Windows]:
    if len(shape) != 1:
        raise UnsupportedLayerError(
            f"{call} normalises over {tuple(shape)}, which mixes positions; expected the channels"
        )
    return features_of(build, call, x, -1)


@rule(nn.LocalResponseNorm, nn.Softmax2d, *calling("local_response_norm"), positional=True)
def across_channels(build: Rewriter, call: Call, x: Any, *args: Any, **kwargs: Any) -> Cells:
    x = build.as_map(x, call)
    softmax = isinstance(call.module, nn.Softmax2d)
    node = build.emit(call, (x, *args), kwargs)
    return replace(x, node=node).meaning_of("probabilities" if softmax else "logits")


@rule(*calling("normalize"), positional=True)
def normalize(
    build: Rewriter,
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


@rule(nn.Softmax, nn.LogSoftmax, positional=True)
def softmax_module(build: Rewriter, call: Call, x: Any) -> Cells:
    return _softmax(build, call, x, call.module.dim, isinstance(call.module, nn.LogSoftmax))  # type: ignore


@rule(*calling("softmax"), positional=True)
def softmax(
    build: Rewriter, call: Call, input: Any, dim: int | None = None, *_: Any, **__: Any
) -> Cells:
    return _softmax(build, call, input, dim, log=False)


@rule(*calling("log_softmax"), positional=True)
def log_softmax(
    build: Rewriter, call: Call, input: Any, dim: int | None = None, *_: Any, **__: Any
) -> Cells:
    return _softmax(build, call, input, dim, log=True)


def _softmax(build: Rewriter, call: Call, x: Any, dim: int | None, log: bool) -> Cells:
    if dim is None and isinstance(x, Cells):  # torch's implicit choice
        dim = 0 if len(x.dims) in (0, 2) else 1
    x = build.features(call, x, _axis(call, x, dim))
    function = torch.log_softmax if log else torch.softmax
    activation = "log_probabilities" if log else "probabilities"
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
def cat(build: Rewriter, call: Call, tensors: Sequence[Any], dim: int = 0, **names: Any) -> Cells:
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
