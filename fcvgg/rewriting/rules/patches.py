"""Blocks of positions that become channels: space to depth, pixel unshuffle, unfold.

Each output position holds the elements of one window of the input, so these are layers that slide
a kernel, as a convolution with fixed weights would.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fcvgg.geometry import KernelPair, Pair
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells, channels_along, in_order, of_blocks
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.modules import Patches
from fcvgg.rewriting.rules.convolution import settings_of
from fcvgg.rewriting.rules.registry import attributes, calling, register, rule
from fcvgg.rewriting.sliding import Sliding, windows_of


def _slide_patches(kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Sliding:
    windows = windows_of(kernel_size, stride, padding, dilation)
    inner = Patches(kernel_size, stride, (0, 0), dilation)
    elements = kernel_size[0] * kernel_size[1]
    return Sliding(windows, lambda x, part: inner(x), multiplies=elements)


register(
    Patches,
    arguments=attributes("kernel_size", "stride", "padding", "dilation"),
    slides=_slide_patches,
)


def gather_patches(
    build: MapBuilder, call: Call, x: Cells, windows: KernelPair, extent: Pair
) -> Cells:
    """The elements of each window as channels: ``(N, C, H, W) -> (N, C*kh*kw, h, w)``.

    Args:
        extent: positions ``(h, w)`` at the native size.
    """
    kernel = (windows[0].kernel, windows[1].kernel)

    def emit(dense: KernelPair, changed: bool) -> fx.Node:
        name = f"{call.node.name}_patches"
        return build.emit_new_module(name, Patches(kernel, **settings_of(dense)), x)

    return build.window(
        call,
        x,
        windows,
        emit,
        kind="Patches",
        pools="other",
        extent=(x.extent[0] * kernel[0] * kernel[1], *extent),
    )


@rule(
    nn.PixelUnshuffle,
    *calling("pixel_unshuffle"),
    arguments=attributes("downscale_factor"),
    has_extent=True,
)
def pixel_unshuffle(build: MapBuilder, call: Call, input: Any, downscale_factor: int) -> Cells:
    x = build.as_map(input, call)
    height, width = (n // downscale_factor for n in x.extent[1:])
    windows = windows_of(downscale_factor, downscale_factor, 0)
    return gather_patches(build, call, x, windows, (height, width))


@rule(
    nn.Unfold,
    torch.nn.functional.unfold,
    arguments=attributes("kernel_size", "dilation", "padding", "stride"),
    has_extent=True,
)
def unfold(
    build: MapBuilder,
    call: Call,
    input: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Cells:
    """Windows as columns ``(N, C*kh*kw, h*w)``, which a reshape may make a map again."""
    x = build.as_map(input, call)
    windows = windows_of(kernel_size, stride, padding, dilation)
    height, width = (w.output_size(n) for w, n in zip(windows, x.extent[1:]))
    patches = gather_patches(build, call, x, windows, (height, width))
    return replace(patches, moved=in_order(patches.extent).flatten(1))


def as_blocks(build: MapBuilder, call: Call, x: Cells) -> Cells:
    """A value whose channels are strided positions of a map, as a map; others as they are.

    Reshapes and slices make such values: space to depth, and the focus layer of YOLO.
    """
    if len(x.dims) != 3 or x.dims[1:] in (x.extent[1:], (1, 1)):  # (1, 1) is a head's flatten
        return x
    blocks = [n // m if n % m == 0 else 0 for n, m in zip(x.extent[1:], x.dims[1:])]
    if 0 in blocks:
        return x
    block = blocks[0], blocks[1]
    extent = (x.extent[0] * block[0] * block[1], x.dims[1], x.dims[2])
    moved = of_blocks(x, block)
    channels = channels_along(replace(x, extent=extent, moved=moved), 0)
    if channels is None or not torch.equal(
        moved[0] - channels[0] * extent[1] * extent[2], in_order(extent[1:])
    ):
        return x
    patches = gather_patches(build, call, x, windows_of(block, None, 0), extent[1:])
    return build.features(call, replace(patches, moved=moved), 0)
