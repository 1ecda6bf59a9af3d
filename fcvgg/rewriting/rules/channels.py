"""Layers that work along the channels: normalisation, softmax, statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.errors import RefusedLayerError, UnsupportedLayerError
from fcvgg.geometry import Window
from fcvgg.rewriting.channel_view import channel_view
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells, Constant, Unusable, channels_along
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.marks import FollowsTraining
from fcvgg.rewriting.modules import ChannelLayerNorm, ChannelRMSNorm
from fcvgg.rewriting.program import Windows
from fcvgg.rewriting.rules.convolution import values_of
from fcvgg.rewriting.rules.elementwise import act_elementwise
from fcvgg.rewriting.rules.pooling import along_channels, features_of, reduced
from fcvgg.rewriting.rules.registry import attributes, calling, register, rule


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
) -> tuple[Cells, Windows, Tensor | None]:
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
    height, width = (Window(n, dilation=d) for n, d in zip(x.extent[1:], x.dilation))
    x = build.gathered(x, call)
    flat = build.features(call, replace(x, moved=x.layout.flatten()), 0)
    return flat, (height, width), flat.layout.reshape(x.dims)


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
    axis = _axis(call, input, dim)
    if channels_along(input, axis) is None:
        return along_channels(build, call, input, (axis,), "normalize", p, eps)
    x = build.features(call, input, axis)
    node = build.emit_function(call, F.normalize, x, p, 1, eps)
    return replace(x, node=node).meaning_of("logits")


@rule(torch.linalg.vector_norm, has_extent=True)
def vector_norm(
    build: MapBuilder,
    call: Call,
    x: Any,
    ord: float = 2,
    dim: Any = None,
    keepdim: bool = False,
    **_: Any,
) -> Cells:
    return reduced(build, call, x, dim, keepdim, "norm", float(ord))


@rule(*calling("var"), has_extent=True)
def variance(
    build: MapBuilder,
    call: Call,
    input: Any,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    correction: float | None = None,
) -> Cells:
    divisor = int(unbiased) if correction is None else correction
    return reduced(build, call, input, dim, keepdim, "var", divisor)


@rule(*calling("median"), has_extent=True)
def median(build: MapBuilder, call: Call, input: Any, dim: Any, keepdim: bool = False) -> Any:
    indices = Unusable("the indices of a median, which depend on the map's size")
    return reduced(build, call, input, dim, keepdim, "median"), indices


@rule(*calling("cumsum", "cumprod", "logcumsumexp"), has_extent=True)
def cumulate(build: MapBuilder, call: Call, input: Any, dim: int, **_: Any) -> Cells:
    name = call.kind.removeprefix("Tensor.")
    return along_channels(build, call, input, (_axis(call, input, dim),), name)


@rule(*calling("topk"), has_extent=True)
def topk(
    build: MapBuilder,
    call: Call,
    input: Any,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
) -> Any:
    return _ranked(build, call, input, dim, "topk", k, largest)


@rule(*calling("sort"), has_extent=True)
def sort(
    build: MapBuilder,
    call: Call,
    input: Any,
    dim: int = -1,
    descending: bool = False,
    stable: bool = False,
) -> Any:
    return _ranked(build, call, input, dim, "sort", descending)


@rule(*calling("kthvalue"), has_extent=True)
def kthvalue(
    build: MapBuilder, call: Call, input: Any, k: int, dim: int = -1, keepdim: bool = False
) -> Any:
    axis = _axis(call, input, dim)
    made = along_channels(build, call, input, (axis,), "kthvalue", k, keepdim=keepdim)
    return made, Unusable("the indices of a choice, which depend on the map's size")


def _ranked(
    build: MapBuilder, call: Call, x: Any, dim: int, name: str, *settings: Any
) -> tuple[Cells, Unusable]:
    """The values of each channel's positions by rank; the classes' scores stay in their order."""
    axis = _axis(call, x, dim)
    if channels_along(x, axis) is not None:
        raise RefusedLayerError(
            f"{call} is refused: the scores of all classes must come out, not a choice among them"
        )
    made = along_channels(build, call, x, (axis,), name, *settings)
    return made, Unusable(f"the indices of {name}, which depend on the map's size")


@rule(nn.GLU, F.glu, arguments=attributes("dim"))
def glu(build: MapBuilder, call: Call, input: Any, dim: int = -1) -> Cells:
    return along_channels(build, call, input, (_axis(call, input, dim),), "glu")


@rule(
    *(nn.AvgPool3d, *calling("avg_pool3d")),
    arguments=attributes(
        *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
        "divisor_override",
    ),
)
def avg_pool3d(
    build: MapBuilder,
    call: Call,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Cells:
    """Averages over neighbouring channels, as in local response normalisation (N, 1, C, H, W)."""
    kernel, step, pads = (
        tuple(v) if isinstance(v, (tuple, list)) else (v,) * 3
        for v in (kernel_size, kernel_size if stride in (None, []) else stride, padding)
    )
    view = channel_view(input) if isinstance(input, Cells) else None
    over_channels = view is not None and view.axes == (0, 1) and view.sizes[0] == 1
    if not over_channels or kernel[1:] != (1, 1) or step[1:] != (1, 1) or any(pads[1:]):
        raise UnsupportedLayerError(
            f"{call} pools over {kernel}; expected a kernel (n, 1, 1) over channels (N, 1, C, H, W)"
        )
    settings = (kernel[0], step[0], pads[0], ceil_mode, count_include_pad, divisor_override)
    return along_channels(build, call, input, (1,), "avg_pool", *settings)


@rule(
    *(nn.AdaptiveAvgPool1d, *calling("adaptive_avg_pool1d")),
    arguments=attributes("output_size"),
    has_extent=True,
    role="avgpool",
)
def adaptive_avg_pool1d(build: MapBuilder, call: Call, input: Any, output_size: Any) -> Cells:
    return _adaptive_pool1d(build, call, input, output_size, "avg")


@rule(
    *(nn.AdaptiveMaxPool1d, *calling("adaptive_max_pool1d")),
    arguments=attributes("output_size", "return_indices"),
    has_extent=True,
    role="maxpool",
)
def adaptive_max_pool1d(
    build: MapBuilder, call: Call, input: Any, output_size: Any, return_indices: bool = False
) -> Cells:
    if return_indices:
        raise UnsupportedLayerError(f"{call} returns indices, which depend on the map's size")
    return _adaptive_pool1d(build, call, input, output_size, "max")


def _adaptive_pool1d(build: MapBuilder, call: Call, x: Any, size: Any, kind: str) -> Cells:
    """Bins of the last dimension: all positions of each channel, as a global pool."""
    bins = size[0] if isinstance(size, (tuple, list)) else size
    if not isinstance(x, Cells) or len(x.dims) != 2:
        raise UnsupportedLayerError(f"{call} expects a value (N, C, L) of the image")
    if bins == 1:
        return reduced(build, call, x, -1, True, "mean" if kind == "avg" else "amax")
    return along_channels(build, call, x, (1,), f"adaptive_{kind}_pool1d", bins)


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
    axis = _axis(call, x, dim)
    if channels_along(x, axis) is None:
        view = channel_view(x)
        classes = view is not None and axis in view.axes  # of each position, or head
        made = along_channels(build, call, x, (axis,), function.__name__)
        return made.meaning_of(activation if classes else "logits")
    x = build.features(call, x, axis)
    return replace(x, node=build.emit_function(call, function, x, 1)).meaning_of(activation)


def _axis(call: Call, x: Any, dim: Any) -> int:
    """The layout's axis of the source's dimension `dim`."""
    if not isinstance(x, Cells) or not isinstance(dim, int):
        raise UnsupportedLayerError(f"{call} works along {dim!r}; expected the classes")
    axis = x.axis_of(dim)
    if axis is None:
        raise UnsupportedLayerError(f"{call} works along dimension {dim}, the images of the batch")
    return axis
