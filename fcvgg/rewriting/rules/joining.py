"""Values joined along a dimension: concatenation, stacks, repetitions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fcvgg.errors import UnsupportedLayerError
from fcvgg.rewriting.capture import BATCH
from fcvgg.rewriting.channel_view import is_flattened
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells, Constant, channels_along, with_channels
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.rules.elementwise import act_elementwise
from fcvgg.rewriting.rules.registry import always, calling, rule


@rule(*calling("cat", "concat", "concatenate"), positional=True, affine=always)
def cat(build: MapBuilder, call: Call, tensors: Sequence[Any], dim: int = 0, **names: Any) -> Cells:
    dim = names.get("axis", dim)
    parts = _cells_of(build, call, tensors)
    axis = parts[0].axis_of(dim)
    if axis is None:
        raise UnsupportedLayerError(f"{call} joins along dimension {dim}, the images of the batch")
    parts = _on_one_window(build, call, parts)
    plain = all(channels_along(x, axis) is not None for x in parts) and _at_same_places(parts, axis)
    if not plain or len({x.node for x in parts}) == 1:
        return _joined(build, call, parts, axis)
    # every part holds its channels along the axis: those of the result are in order
    parts = [build.features(call, x, axis) for x in parts]
    channels = sum(p.extent[0] for p in parts)
    node = build.emit_function(call, torch.cat, list(parts), 1)
    step = build.join(parts, call, node)
    result = with_channels(parts[0], axis, channels, node=node, step=step).joined_with(parts)
    return _meaning(result, parts)


def _at_same_places(parts: Sequence[Cells], axis: int) -> bool:
    """Whether parts hold the same positions at each index of the other axes."""
    if all(x.moved is None for x in parts):
        return True
    places = [x.layout.movedim(axis, 0)[0] % x.positions for x in parts]
    return all(torch.equal(places[0], other) for other in places[1:])


@rule(*calling("stack"), affine=always)
def stack(
    build: MapBuilder, call: Call, tensors: Sequence[Any], dim: int = 0, **names: Any
) -> Cells:
    """Values along a new axis; before the images for ``torch.stack([one, other])``."""
    parts = _on_one_window(build, call, _cells_of(build, call, tensors))
    batch = parts[0].batch
    dim = names.get("axis", dim) % (len(parts[0].dims) + 2)
    axis = dim - (dim > batch)
    raised = [
        replace(x, moved=x.layout.unsqueeze(axis), batch=batch + (dim <= batch)) for x in parts
    ]
    return _joined(build, call, raised, axis)


@rule(operator.setitem, affine=always)
def setitem(build: MapBuilder, call: Call, x: Any, index: Any, value: Any) -> Cells:
    """``x[:, 0] = value``: the value's elements take their places in the layout."""
    if isinstance(x, Cells) and isinstance(value, (int, float)):
        if isinstance(index, Cells):  # a mask, as in x[x < 0] = 0
            return act_elementwise(  # type: ignore[no-any-return]
                build, call, x, index, float(value), as_function=torch.masked_fill
            )
        return _set_number(build, call, x, index, float(value))
    if not isinstance(x, Cells) or not isinstance(value, Cells):
        raise UnsupportedLayerError(
            f"{call} sets a part of a value to something that is not computed from the image"
        )
    parts = _on_one_window(build, call, [x, value])
    spread = [replace(p, moved=p.layout.flatten(), batch=0) for p in parts]
    both = _joined(build, call, spread, 0)
    count = len(spread[0].layout)
    old = both.layout[:count].reshape(parts[0].dims)
    new = both.layout[count:].reshape(parts[1].dims)
    # Python's index may name the images' axis, so the layout has one while it is assigned to
    batch = torch.stack([old] * BATCH, x.batch)
    batch[index] = torch.stack([new] * BATCH, value.batch)
    return replace(both, moved=batch.select(x.batch, 0), batch=x.batch)


def _set_number(build: MapBuilder, call: Call, x: Cells, index: Any, value: float) -> Cells:
    """``x[:, 0] = 0``: elements are taken from a further channel of the number."""
    one = build.graph.call_method("narrow", (x.node, 1, 0, 1))
    number = build.graph.call_function(torch.full_like, (one, value))  # (N, 1, h, w)
    node = build.graph.call_function(torch.cat, ((x.node, number), 1))
    batch = torch.stack([x.layout] * BATCH, x.batch)
    # the further channel comes last, and its elements stand at the places of those that are set
    batch[index] = x.elements + batch[index] % x.positions
    extent = (x.extent[0] + 1, *x.extent[1:])
    layout = batch.select(x.batch, 0)
    return replace(x, node=node, extent=extent, moved=layout).computed_from([x])


def _joined(build: MapBuilder, call: Call, parts: Sequence[Cells], axis: int) -> Cells:
    """The maps one after the other along the channels; the layouts tell what lies where."""
    maps = {x.node: x for x in reversed(parts)}
    maps = {x.node: maps[x.node] for x in parts}  # each once, in the order of the parts
    firsts, channels = dict[fx.Node, int](), 0
    for node, x in maps.items():
        firsts[node] = channels
        channels += x.extent[0]
    positions = parts[0].positions
    layouts = [x.layout + firsts[x.node] * positions for x in parts]
    try:
        layout: Tensor = torch.cat(layouts, axis)
    except RuntimeError as error:
        raise UnsupportedLayerError(f"{call} joins values of different shapes") from error
    node, step = parts[0].node, parts[0].step
    if len(maps) > 1:
        node = build.emit_function(call, torch.cat, list(maps.values()), 1)
        step = build.join(list(maps.values()), call, node)
    extent = (channels, *parts[0].extent[1:])
    result = replace(parts[0], node=node, step=step, extent=extent, moved=layout)
    return _meaning(result.joined_with(parts), parts)


def _meaning(result: Cells, parts: Sequence[Cells]) -> Cells:
    same = len({(p.activation, p.share) for p in parts}) == 1
    return result.alike(parts[0]) if same else result.computed_from(parts)


def _cells_of(build: MapBuilder, call: Call, tensors: Sequence[Any]) -> list[Cells]:
    """The parts as maps; a tensor that forward made becomes one of its numbers at every cell."""
    like = next((x for x in tensors if isinstance(x, Cells)), None)
    if like is not None and is_flattened(like) and any(isinstance(x, Constant) for x in tensors):
        tensors = [build.gathered(x, call) if isinstance(x, Cells) else x for x in tensors]
        like = next(x for x in tensors if isinstance(x, Cells))
    parts = []
    for x in tensors:
        if isinstance(x, Constant) and like is not None:
            x = _constant_map(build, call, x, like)
        if not isinstance(x, Cells):
            raise UnsupportedLayerError(f"{call} joins something that is no value of the image")
        parts.append(x)
    return parts


def _constant_map(build: MapBuilder, call: Call, constant: Constant, like: Cells) -> Cells:
    """A constant with a row for every image as channels that are the same at every cell."""
    values = constant.value
    if like.positions > 1:
        raise UnsupportedLayerError(
            f"{call} joins a map {like.shape} with a constant of shape {tuple(values.shape)} that "
            "is shaped by position; a cell would depend on where it is"
        )
    if values.ndim != len(like.dims) + 1:
        raise UnsupportedLayerError(
            f"{call} joins a constant of shape {tuple(values.shape)} with a value {like.shape}; "
            "expected one row for every image, beside scores"
        )
    row = build.graph.call_method("select", (constant.node, like.batch, 0))
    column = build.graph.call_method("reshape", (row, (1, -1, 1, 1)))
    one = build.graph.call_method("narrow", (like.node, 1, 0, 1))
    zeros = build.graph.call_function(torch.zeros_like, (one,))  # (N, 1, h, w)
    node = build.graph.call_function(torch.add, (zeros, column))
    dims = values.select(like.batch, 0).shape
    layout = torch.arange(dims.numel()).reshape(dims)
    return replace(like, node=node, extent=(dims.numel(), 1, 1), moved=layout)


def _on_one_window(build: MapBuilder, call: Call, parts: Sequence[Cells]) -> list[Cells]:
    """Parts with the same positions; flattened windows of several sizes become channels first."""
    grids = {(p.extent[1:], p.dilation if p.positions > 1 else (1, 1)) for p in parts}
    if len(grids) == 1:
        return list(parts)
    if any(p.positions > 1 and p.is_map for p in parts):
        raise UnsupportedLayerError(
            f"{call} concatenates maps of different sizes or dilations {sorted(grids)}"
        )
    return [build.gathered(p, call) for p in parts]
