"""Reductions over the channels of every position: means, variances, norms.

They are what normalisation layers that are written out are made of, and exact: each position is
reduced by itself. The same functions over positions are pools (`fcvgg.rewriting.rules.pooling`), or
statistics of the whole map, which are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fcvgg.errors import RefusedLayerError, UnsupportedLayerError
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells, channels_along, with_channels
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.rules.registry import calling, register, rule

STATISTICS = "its statistics mix all positions, so a cell would change with the rest of the image"


def reduced_axes(call: Call, x: Any, dim: Any) -> tuple[int, ...]:
    """The layout's axes of the source's dimensions `dim`, in order."""
    if not isinstance(x, Cells):
        raise UnsupportedLayerError(f"{call} reduces something that is no value of the image")
    ndim = len(x.dims) + 1
    dims = tuple(range(ndim)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    axes = tuple(sorted(d % ndim - 1 for d in dims))
    if -1 in axes:
        raise UnsupportedLayerError(f"{call} reduces over the images of the batch")
    return axes


def runs_over_channels(x: Cells, axes: tuple[int, ...]) -> bool:
    """Whether the elements along the axes are those of one position."""
    return len(axes) == 1 and channels_along(x, axes[0]) is not None


def reduce_channels(
    build: MapBuilder,
    call: Call,
    x: Cells,
    axis: int,
    keepdim: bool,
    function: Callable[..., Any],
    **settings: Any,
) -> Cells:
    """A torch function over the channels of each position: ``(N, C, h, w) -> (N, 1, h, w)``."""
    x = build.features(call, x, axis)
    node = build.emit_function(call, function, x, dim=1, keepdim=True, **settings)
    one = with_channels(x, axis, 1, node=node).computed_from([x])
    return one if keepdim else replace(one, moved=one.layout.squeeze(axis))


def _statistic(
    build: MapBuilder,
    call: Call,
    x: Any,
    dim: Any,
    keepdim: bool,
    function: Callable[..., Any],
    **settings: Any,
) -> Cells:
    """A statistic that has no form on maps but over channels."""
    axes = reduced_axes(call, x, dim)
    if not runs_over_channels(x, axes):
        raise RefusedLayerError(f"{call} is refused: {STATISTICS}")
    return reduce_channels(build, call, x, axes[0], keepdim, function, **settings)


@rule(*calling("var", "std", "var_mean", "std_mean"))
def spread(
    build: MapBuilder,
    call: Call,
    input: Any,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: int | None = None,
    axis: Any = None,
) -> Any:
    """Variances and standard deviations, with their means where the function gives both."""
    dim = axis if dim is None else dim
    if isinstance(dim, bool):  # torch.var(x, unbiased)
        dim, unbiased = None, dim
    name = call.kind.removeprefix("Tensor.")
    function = torch.var if name.startswith("var") else torch.std
    correction = int(unbiased) if correction is None else correction
    result = _statistic(build, call, input, dim, keepdim, function, correction=correction)
    if not name.endswith("mean"):
        return result
    return result, _statistic(build, call, input, dim, keepdim, torch.mean)


@rule(*calling("norm"))
def norm(
    build: MapBuilder,
    call: Call,
    input: Any,
    p: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    dtype: None = None,
) -> Cells:
    order = 2 if p in ("fro", None) else p
    return _statistic(build, call, input, dim, keepdim, torch.norm, p=order)


@rule(torch.linalg.norm, torch.linalg.vector_norm)
def vector_norm(
    build: MapBuilder,
    call: Call,
    x: Any,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    dtype: None = None,
) -> Cells:
    return norm(build, call, x, ord, dim, keepdim)


# what is emitted has the channels as its dimension: the source's calls over positions become pools
register(
    *(torch.mean, torch.sum, torch.amax, torch.amin, torch.var, torch.std, torch.norm),
    torch.logsumexp,
    positional=True,
)
