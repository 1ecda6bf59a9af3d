"""Layers that change the number of positions between other layers: interpolation, transposed
convolution, pixel shuffle.

By a whole factor they move with the image, a stride of the coarser map at a time. What they give
between its positions differs from position to position, so the network's cells lie at least that
stride apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fcvgg.errors import RefusedLayerError, UnsupportedLayerError
from fcvgg.geometry import KernelGeometry, KernelPair, Pair
from fcvgg.rewriting.emission import Call, refuse_pooled
from fcvgg.rewriting.layouts import Cells
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.rules.convolution import values_of
from fcvgg.rewriting.rules.registry import attributes, calling, rule
from fcvgg.rewriting.sliding import Part, Sliding, pair_of

_NEIGHBOURS = {"nearest": 0, "nearest-exact": 0, "area": 0, "bilinear": 1, "bicubic": 2}
"""Positions of the coarser map on each side that a mode of interpolation reads."""


def _enlarging(factors: Pair, mode: str) -> KernelPair:
    height, width = (_interpolation(factor, _NEIGHBOURS[mode]) for factor in factors)
    return height, width


def _interpolation(factor: int, neighbours: int) -> KernelGeometry:
    if not neighbours or factor == 1:
        return KernelGeometry(repeats=factor)
    # output i lies at (i + 1/2) / factor - 1/2 of the coarser map, between two of its positions
    before = factor // 2 + (neighbours - 1) * factor
    kernel = (2 * neighbours - 1) * factor + 1
    return KernelGeometry(kernel, before=before, after=kernel - 1 - before, repeats=factor)


def _slide_enlarging(
    windows: KernelPair,
    run: Callable[[Tensor], Tensor],
    before: Pair = (0, 0),
    **settings: Any,
) -> Sliding:
    """Enlarge what the outputs read, and keep the outputs.

    Args:
        run: enlarges a map.
        before: rows and columns of its result before those of the first position.
    """

    def run_part(x: Tensor, part: Part) -> Tensor:
        made = run(x)
        for dim, window, (first, end) in zip((2, 3), windows, (part.rows, part.cols)):
            begin = window.reads(first, end)[0] * window.repeats - before[dim - 2]
            made = made.narrow(dim, first - begin, end - first)
        return made

    return Sliding(windows, run_part, **settings)


# -- interpolation --------------------------------------------------------------------------------


def _slide_interpolate(scale_factor: Sequence[float], mode: str, **settings: Any) -> Sliding:
    factors = round(scale_factor[0]), round(scale_factor[1])

    def run(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=scale_factor, mode=mode, **settings)

    return _slide_enlarging(_enlarging(factors, mode), run, border="replicate")


@rule(
    *(nn.Upsample, *calling("interpolate", "upsample")),
    arguments=attributes("size", "scale_factor", "mode", "align_corners"),
    slides=_slide_interpolate,
)
def interpolate(
    build: MapBuilder,
    call: Call,
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Cells:
    """Enlarge a map by whole factors, those of its sizes at the native size."""
    x = build.as_map(input, call)
    size = tuple(call.node.meta["value"].shape[2:])
    if size == x.extent[1:]:
        return x
    if x.positions == 1:
        refuse_pooled(call)
    if align_corners:
        _refuse(call, "aligns the corners, so that every position moves with the map's size")
    shrinks = _divisors(x.extent[1:], size, scale_factor)
    if shrinks is not None and mode != "bicubic" and not antialias:
        return _shrunk(build, call, x, shrinks, mode)
    factors = size[0] // x.extent[1], size[1] // x.extent[2]
    if tuple(n * factor for n, factor in zip(x.extent[1:], factors)) != size:
        _refuse(call, f"resizes {x.extent[1:]} positions to {size}, not by a whole factor")
    smooth = {} if _NEIGHBOURS[mode] == 0 else {"align_corners": False, "antialias": antialias}
    scale = float(factors[0]), float(factors[1])
    return build.window(
        call,
        x,
        _enlarging(factors, mode),
        lambda dense, changed: build.emit_function(
            call, F.interpolate, x, scale_factor=scale, mode=mode, **smooth
        ),
        kind="Upsample",
        pools="other",
    )


def _divisors(before: Pair, after: Pair, scale_factor: Any) -> Pair | None:
    """The whole numbers that sizes are divided by; None if there are none."""
    scales = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * 2
    found = []
    for old, new, scale in zip(before, after, scales):
        divisor = round(1 / scale) if scale and scale < 1 else old // new
        whole = scale == 1 / divisor if scale and divisor else divisor * new == old
        if not whole:
            return None
        found.append(divisor)
    return found[0], found[1]


def _shrunk(build: MapBuilder, call: Call, x: Cells, divisors: Pair, mode: str) -> Cells:
    """The positions at the middle of each block, or their mean; the first one for "nearest"."""
    height, width = (_middle(n, mode) for n in divisors)
    pads = (width.before, width.after, height.before, height.after)
    kernel, stride = (height.kernel, width.kernel), (height.stride, width.stride)

    def emit(dense: KernelPair, changed: bool) -> fx.Node:
        if changed:
            raise UnsupportedLayerError(
                f"{call} has no dilated form; convert without output_stride"
            )
        cut = build.graph.call_function(F.pad, (x.node, pads))
        return build.emit_function(call, F.avg_pool2d, replace(x, node=cut), kernel, stride)

    return build.window(call, x, (height, width), emit, kind="Downsample", pools="avg")


def _middle(divisor: int, mode: str) -> KernelGeometry:
    kernel = {"area": divisor, "bilinear": 2 - divisor % 2}.get(mode, 1)
    skipped = {"nearest": 0, "nearest-exact": divisor // 2}.get(mode, (divisor - kernel) // 2)
    after = skipped + kernel - divisor
    return KernelGeometry(kernel, divisor, before=-skipped, after=after)


def _refuse(call: Call, what: str) -> NoReturn:
    raise RefusedLayerError(
        f"{call} is refused: it {what}, which ties a cell to the size of the image; enlarge by a "
        "whole factor, or resize the image before the network"
    )


# -- layers with parameters, or none at all -------------------------------------------------------


def _transposed(weight: Tensor, stride: Any, padding: Any, more: Any, dilation: Any) -> KernelPair:
    pairs = (pair_of(v) for v in (weight.shape[2:], stride, padding, more, dilation))
    windows = []
    for kernel, step, pad, extra, spread in zip(*pairs):
        span = (kernel - 1) * spread + 1
        # position j of the input reaches the outputs j * step - pad + [0, span)
        before = span - step - pad
        after = span - step - pad + extra
        windows.append(KernelGeometry(span - step + 1, before=before, after=after, repeats=step))
    return windows[0], windows[1]


def _slide_conv_transpose2d(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Sliding:
    windows = _transposed(weight, stride, padding, output_padding, dilation)

    def run(x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, stride, 0, 0, groups, dilation)

    channels = weight.shape[1] * groups
    before = pair_of(padding)
    return _slide_enlarging(windows, run, before, channels=channels, weights=weight.numel())


@rule(
    *(nn.ConvTranspose2d, *calling("conv_transpose2d")),
    arguments=attributes(
        "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"
    ),
    slides=_slide_conv_transpose2d,
    role="conv",
)
def conv_transpose2d(
    build: MapBuilder,
    call: Call,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Cells:
    x = build.as_map(input, call)
    values = values_of(call, weight)
    windows = _transposed(values, stride, padding, output_padding, dilation)
    if min(window.kernel for window in windows) < 1:
        raise UnsupportedLayerError(f"{call} has a stride larger than its kernel; expected less")
    return build.window(call, x, windows, multiply_adds=values.numel(), kind="ConvTranspose2d")


def _slide_pixel_shuffle(upscale_factor: int) -> Sliding:
    windows = _enlarging((upscale_factor, upscale_factor), "nearest")
    return _slide_enlarging(windows, nn.PixelShuffle(upscale_factor), multiplies=1)


@rule(
    *(nn.PixelShuffle, *calling("pixel_shuffle")),
    arguments=attributes("upscale_factor"),
    slides=_slide_pixel_shuffle,
)
def pixel_shuffle(build: MapBuilder, call: Call, input: Any, upscale_factor: int) -> Cells:
    x = build.as_map(input, call)
    windows = _enlarging((upscale_factor, upscale_factor), "nearest")
    return build.window(call, x, windows, kind="PixelShuffle", pools="other")
