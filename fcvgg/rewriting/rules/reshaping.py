"""Functions that only move or select elements: they act on the layout and emit nothing."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from fcvgg.errors import InputSizeError, UnsupportedLayerError
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells, Constant, rearranged
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.rules.patches import as_blocks
from fcvgg.rewriting.rules.registry import calling, register

_SELECTIONS = {
    *calling("getitem", "narrow", "select", "unbind", "flip", "chunk", "split"),
    *calling("index_select", "fliplr", "flipud", "tensor_split"),
}
"""Functions that reach into the batch on purpose, not for want of the right size."""


_LARGEST_LAYOUT = 1 << 26
"""Elements that are moved by index: half a gigabyte, more than any network has at its own size."""


def moves(*targets: Any, **known: Any) -> None:
    """Register functions that only rearrange or select elements; they act on the layout alone.

    Args:
        targets: module classes, functions and method names.
        known: further fields of `fcvgg.rewriting.rules.registry.LayerKind`.
    """
    register(*targets, rewrite=_moves, **known)


def _moves(build: MapBuilder, call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, (tuple, list)) and call.node.target is operator.getitem:
        return x[args[0]]
    if not isinstance(x, Cells):
        return call.node.meta["value"]

    if x.elements > _LARGEST_LAYOUT:
        raise UnsupportedLayerError(
            f"{call} moves {x.elements:,} elements, more than {_LARGEST_LAYOUT:,}; pass a smaller "
            "input_size"
        )
    args, kwargs = fx.node.map_aggregate(
        (args, kwargs), lambda a: build.value_of(a, call) if isinstance(a, Constant) else a
    )  # type: ignore

    def operation(batch: Tensor) -> Any:
        if call.module is not None:
            return call.module(batch, *args, **kwargs)
        if call.node.op == "call_method":
            return getattr(batch, str(call.node.target))(*args, **kwargs)
        return call.node.target(batch, *args, **kwargs)  # type: ignore[operator]

    moved = rearranged(x, operation)
    if moved is None and call.node.target in _SELECTIONS:
        raise UnsupportedLayerError(f"{call} takes some images of the batch, or mixes them")
    made = call.node.meta["value"]
    if moved is None and isinstance(made, Tensor) and made.ndim == 4 and len(made) == 1:
        raise UnsupportedLayerError(
            f"{call} puts the images of the batch into channels, as for convolutions whose weights "
            "are computed from each image (dynamic convolution); a cell would depend on all that "
            "they are computed from"
        )
    if moved is None:
        height, width = build.captured.size
        raise InputSizeError(
            f"{call} moves elements between the images of the batch at input size "
            f"({height}, {width}): a reshape with fixed sizes turned positions into batch rows; "
            "pass the native size, or reshape with x.view(x.size(0), -1)"
        )
    moved = [as_blocks(build, call, cells) for cells in moved]
    single = isinstance(call.node.meta["value"], Tensor)
    return moved[0] if single else tuple(moved)


moves(nn.Flatten, *calling("flatten", "view", "reshape"), role="flatten")
moves(
    *(nn.Unflatten, nn.ChannelShuffle, operator.getitem),
    *calling("unflatten", "permute", "transpose", "moveaxis", "swapaxes", "swapdims", "ravel"),
    *calling("squeeze", "squeeze_", "unsqueeze", "unsqueeze_", "chunk", "split", "tensor_split"),
    *calling("select", "unbind", "flip", "fliplr", "flipud", "channel_shuffle"),
    *calling("contiguous", "detach", "repeat", "expand", "tile", "repeat_interleave", "t"),
    *calling("broadcast_to"),
    "unfold",  # windows of one dimension
)
moves(nn.Identity, inert=True)
moves(*calling("narrow", "index_select", "movedim"), positional=True)  # rules emit them too
