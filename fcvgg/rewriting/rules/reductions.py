"""Functions of several values of a cell: statistics and ranks of positions, channels or windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.errors import RefusedLayerError, UnsupportedLayerError
from fcvgg.geometry import KernelGeometry
from fcvgg.rewriting.channel_view import channel_view
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells, Constant, Unusable, channels_along, pooled_layout
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.modules import ALONG_CHANNELS, REDUCTIONS, over_channels
from fcvgg.rewriting.rules.elementwise import act_elementwise
from fcvgg.rewriting.rules.joining import stack
from fcvgg.rewriting.rules.pooling import pool_window, refuse_indices
from fcvgg.rewriting.rules.registry import always, attributes, calling, register, rule
from fcvgg.rewriting.sliding import Part, Sliding


@rule(*calling("max"))
def maximum(
    build: MapBuilder, call: Call, input: Any, dim: Any = None, keepdim: bool = False, **names: Any
) -> Any:
    """The larger of two values, or a maximum over the rows or columns of each channel."""
    # `torch.max` is two functions: of two tensors, and over a dimension.
    other = names.get("other", dim)
    if isinstance(other, (Cells, Constant)):
        return act_elementwise(build, call, input, other, as_function=torch.maximum)
    dim = names.get("axis", dim)
    if dim is None:
        raise UnsupportedLayerError(f"{call} reduces over the images of the batch")
    indices = Unusable("the indices of a maximum, which depend on the map's size")
    return reduced(build, call, input, dim, keepdim, "amax"), indices


@rule(
    *calling("mean", "sum", "amax", "amin", "prod", "logsumexp", "nanmean", "nansum"),
    has_extent=True,
)
def reduce_values(
    build: MapBuilder, call: Call, input: Any, dim: Any = None, keepdim: bool = False, **names: Any
) -> Any:
    """A mean, sum or the like over rows and columns of each channel, or over channels."""
    dim = names.get("axis", dim)
    input = in_dtype(build, input, *names.values())
    return reduced(build, call, input, dim, keepdim, call.kind.removeprefix("Tensor."))


register(*calling("mean", "sum"), affine=always)


def in_dtype(build: MapBuilder, x: Any, *settings: Any) -> Any:
    """A value in the dtype that is among a function's settings."""
    dtype = next((value for value in settings if isinstance(value, torch.dtype)), None)
    if dtype is None or not isinstance(x, Cells):
        return x
    return replace(x, node=build.graph.call_method("to", (x.node, dtype)))


def reduced(
    build: MapBuilder, call: Call, input: Any, dim: Any, keepdim: bool, name: str, *settings: Any
) -> Cells:
    """A function that leaves one value of those along some dimensions.

    Over all rows or columns of each channel a mean, sum or maximum is a pool. Over channels it is
    computed at every position, and over anything else for every window, whose elements are
    gathered first.

    Args:
        name: a key of `fcvgg.rewriting.modules.REDUCTIONS`.
        settings: further arguments of it.
    """
    if not isinstance(input, Cells):
        raise UnsupportedLayerError(f"{call} reduces something that is no value of the image")
    axes = _axes(call, input, dim)
    left = pooled_layout(input, axes) if name in _POOLS and not settings else None
    if left is None:
        return along_channels(build, call, input, axes, name, *settings, keepdim=keepdim)
    bins, layout = left
    # The order of the elements within what is reduced does not matter, so the map can be pooled
    # as it lies; the layout of what is left is put back afterwards.
    whole = replace(input, moved=None)
    pooled = pool_window(build, call, whole, _POOLS[name], bins, 1 if name == "sum" else None)
    for axis in axes if keepdim else ():
        layout = layout.unsqueeze(axis)
    return _without_axes(replace(pooled, moved=layout), input, () if keepdim else axes)


_POOLS = {"mean": "avg", "sum": "avg", "amax": "max"}
"""Reductions of positions that torch's pools compute, by the kind of pool."""


def _axes(call: Call, x: Cells, dim: Any) -> tuple[int, ...]:
    """The layout's axes of the source's dimensions."""
    dims = range(len(x.dims) + 1) if dim is None else (dim,) if isinstance(dim, int) else dim
    axes = [x.axis_of(d) for d in dims]
    if not axes or any(axis is None for axis in axes):
        raise UnsupportedLayerError(f"{call} reduces over the images of the batch")
    return tuple(sorted(axis for axis in axes if axis is not None))


def _without_axes(result: Cells, x: Cells, axes: Sequence[int]) -> Cells:
    """The place of the images' axis once axes before it are gone."""
    return replace(result, batch=x.batch - sum(axis < x.batch for axis in axes))


def along_channels(
    build: MapBuilder,
    call: Call,
    x: Cells,
    axes: tuple[int, ...],
    name: str,
    *settings: Any,
    keepdim: bool = True,
) -> Cells:
    """A function along axes of channels; where they are not, of every window's elements.

    Args:
        axes: of the layout.
        name: a key of `fcvgg.rewriting.modules.ALONG_CHANNELS`.
        keepdim: whether the axes are kept, of length 1, by a function that reduces them.
    """
    view = channel_view(x)
    if view is None or not set(axes) <= set(view.axes):
        x = build.gathered(x, call)
        view = channel_view(x)
        assert view is not None
    dims = tuple(view.axes.index(axis) for axis in axes)
    node = x.node
    if not torch.equal(view.channels.flatten(), torch.arange(x.extent[0])):
        node = build.chosen(node, view.channels.flatten())
    like = torch.empty(1, *view.sizes, 1, 1, device="meta")
    sizes = ALONG_CHANNELS[name](like, tuple(1 + dim for dim in dims), *settings).shape[1:-2]
    made = build.emit_function(
        *(call, over_channels, replace(x, node=node), name, view.sizes, dims, settings),
        channels=prod(sizes),
    )
    result = view.laid_out(x, sizes, node=made).computed_from([x])
    if keepdim or name not in REDUCTIONS:
        return result
    layout = result.layout
    for axis in reversed(axes):
        layout = layout.squeeze(axis)
    return _without_axes(replace(result, moved=layout), x, axes)


def _slide_over_channels(
    name: str,
    sizes: tuple[int, ...],
    dims: tuple[int, ...],
    settings: tuple[Any, ...],
    channels: int,
) -> Sliding:
    """A window of one position, since the function may change the number of channels."""

    def run(x: Tensor, part: Part) -> Tensor:
        return over_channels(x, name, sizes, dims, settings, channels)

    windows = KernelGeometry(), KernelGeometry()
    return Sliding(windows, run, channels=channels, pads_width=True, pads_height=True)


register(over_channels, slides=_slide_over_channels)


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


@rule(*calling("median", "nanmedian"), has_extent=True)
def median(build: MapBuilder, call: Call, input: Any, dim: Any, keepdim: bool = False) -> Any:
    indices = Unusable("the indices of a median, which depend on the map's size")
    name = call.kind.removeprefix("Tensor.")
    return reduced(build, call, input, dim, keepdim, name), indices


@rule(*calling("quantile", "nanquantile"), has_extent=True)
def quantile(
    build: MapBuilder,
    call: Call,
    input: Any,
    q: Any,
    dim: Any = None,
    keepdim: bool = False,
    interpolation: str = "linear",
) -> Cells:
    """Quantiles; several of them come along a new first dimension, before the images."""
    levels = build.literal(q) if isinstance(q, Constant) else torch.tensor(q)
    if levels is None or not isinstance(input, Cells):
        raise UnsupportedLayerError(f"{call} takes quantiles by a parameter; expected numbers")
    name = call.kind.removeprefix("Tensor.")
    made = [
        reduced(build, call, input, dim, keepdim, name, level, interpolation)
        for level in levels.flatten().tolist()
    ]
    return stack(build, call, made) if levels.ndim else made[0]


@rule(*calling("cumsum", "cumprod", "logcumsumexp"), has_extent=True)
def cumulate(build: MapBuilder, call: Call, input: Any, dim: int, **names: Any) -> Cells:
    name = call.kind.removeprefix("Tensor.")
    input = in_dtype(build, input, *names.values())
    return along_channels(build, call, input, (axis_of(call, input, dim),), name)


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
    axis = axis_of(call, input, dim)
    made = along_channels(build, call, input, (axis,), "kthvalue", k, keepdim=keepdim)
    return made, Unusable("the indices of a choice, which depend on the map's size")


def _ranked(
    build: MapBuilder, call: Call, x: Any, dim: int, name: str, *settings: Any
) -> tuple[Cells, Unusable]:
    """The values of each channel's positions by rank; the classes' scores stay in their order."""
    axis = axis_of(call, x, dim)
    if channels_along(x, axis) is not None:
        raise RefusedLayerError(
            f"{call} is refused: the scores of all classes must come out, not a choice among them"
        )
    made = along_channels(build, call, x, (axis,), name, *settings)
    return made, Unusable(f"the indices of {name}, which depend on the map's size")


@rule(nn.GLU, F.glu, arguments=attributes("dim"))
def glu(build: MapBuilder, call: Call, input: Any, dim: int = -1) -> Cells:
    return along_channels(build, call, input, (axis_of(call, input, dim),), "glu")


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
    refuse_indices(call, return_indices)
    return _adaptive_pool1d(build, call, input, output_size, "max")


def _adaptive_pool1d(build: MapBuilder, call: Call, x: Any, size: Any, kind: str) -> Cells:
    """Bins of the last dimension: all positions of each channel, as a global pool."""
    bins = size[0] if isinstance(size, (tuple, list)) else size
    if not isinstance(x, Cells) or len(x.dims) != 2:
        raise UnsupportedLayerError(f"{call} expects a value (N, C, L) of the image")
    if bins == 1:
        return reduced(build, call, x, -1, True, "mean" if kind == "avg" else "amax")
    return along_channels(build, call, x, (1,), f"adaptive_{kind}_pool1d", bins)


def axis_of(call: Call, x: Any, dim: Any) -> int:
    """The layout's axis of the source's dimension `dim`."""
    if not isinstance(x, Cells) or not isinstance(dim, int):
        raise UnsupportedLayerError(f"{call} works along {dim!r}; expected the classes")
    axis = x.axis_of(dim)
    if axis is None:
        raise UnsupportedLayerError(f"{call} works along dimension {dim}, the images of the batch")
    return axis
