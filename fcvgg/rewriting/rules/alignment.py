"""Operands of element-wise functions, brought to one grid and one order of channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fcvgg.errors import UnsupportedLayerError
from fcvgg.rewriting.channel_view import ChannelView, channel_view, is_flattened
from fcvgg.rewriting.emission import Call, refuse_pooled
from fcvgg.rewriting.layouts import Cells, Constant
from fcvgg.rewriting.map_builder import MapBuilder


def aligned(
    build: MapBuilder, call: Call, operands: Sequence[Cells], constants: Sequence[Constant]
) -> tuple[list[Cells], list[Constant], Cells]:
    """Maps and parameters whose channels stand for the same elements, and the result's layout.

    Returns:
        the operands and the constants, which broadcast over the map's channels, and a value of the
        layout of what is computed from them.

    Raises:
        RefusedLayerError: if a pooled value meets the map that it was pooled from.
        UnsupportedLayerError: if the operands lie differently, or a constant depends on positions.
    """
    # scalars fit every layout, and keep `x * 2` in the form in which it was written
    constants = [_narrowed(build, constant) for constant in constants]
    scalars = {
        i: _reshaped(build, constant, ())
        for i, constant in enumerate(constants)
        if constant.value.numel() == 1
    }
    shaped = [constant for i, constant in enumerate(constants) if i not in scalars]
    first = operands[0]
    if not shaped and all(first.same_layout(other) for other in operands):
        return list(operands), list(scalars.values()), first
    operands = _on_one_window(build, call, operands)
    views = [_view(build, call, cells) for cells in operands]
    shapes = [_without_batch(call, constant, operands) for constant in shaped]
    maps, made, result = _in_one_order(build, call, operands, views, list(zip(shaped, shapes)))
    rest = iter(made)
    ordered = [scalars[i] if i in scalars else next(rest) for i in range(len(constants))]
    return maps, ordered, result


def _on_one_window(build: MapBuilder, call: Call, operands: Sequence[Cells]) -> list[Cells]:
    """Operands with the same positions: windows are gathered where one holds them as channels."""
    extents = {cells.extent[1:] for cells in operands}
    if len(extents) > 1:
        if (1, 1) not in extents:
            raise UnsupportedLayerError(
                f"{call} combines maps of different sizes {sorted(extents)} at the native size"
            )
        pooled = [cells for cells in operands if cells.positions == 1]
        if any(_spreads(x, cells) for x in pooled for cells in operands if cells.positions > 1):
            refuse_pooled(call)
    if len(extents) > 1 or any(map(is_flattened, operands)):
        return [build.gathered(cells, call) for cells in operands]
    if len({cells.dilation for cells in operands}) > 1:
        raise UnsupportedLayerError(
            f"{call} joins branches of different dilation; their cells do not lie on one grid"
        )
    return list(operands)


def _spreads(pooled: Cells, cells: Cells) -> bool:
    """Whether one value for all positions meets each of a map: a gate of the whole window.

    A flattened window is no map any more: what follows treats its numbers as those of one cell.
    """
    if is_flattened(cells):
        return False
    places = cells.layout % cells.positions
    for axis in range(-1, -1 - places.ndim, -1):
        own = pooled.dims[axis] if -axis <= len(pooled.dims) else 1
        if own == 1 and places.shape[axis] > 1 and bool((places.diff(dim=axis) != 0).any()):
            return True
    return False


def _view(build: MapBuilder, call: Call, cells: Cells) -> ChannelView:
    view = channel_view(cells)
    if view is None:
        raise UnsupportedLayerError(
            f"{call} combines a value of shape {cells.shape} whose elements were moved, with "
            "others that lie differently; a cell of the map would not stay a cell"
        )
    return view


def _without_batch(call: Call, constant: Constant, operands: Sequence[Cells]) -> tuple[int, ...]:
    """The shape of a constant without the axis of the images, where it has one, of length 1."""
    shape = tuple(constant.value.shape)
    batch, ndim = next((c.batch, len(c.dims)) for c in operands)
    place = len(shape) - 1 - (ndim - batch)  # of the images' axis, from the right as torch aligns
    if place < 0:
        return shape
    if shape[place] != 1 or len(shape) > ndim + 1:
        raise UnsupportedLayerError(f"{call} {_BY_POSITION.format(shape)}")
    return shape[:place] + shape[place + 1 :]


_BY_POSITION = (
    "uses a parameter of shape {} that is shaped by position; a cell's result may depend on its "
    "channel only"
)


def _in_one_order(
    build: MapBuilder,
    call: Call,
    operands: Sequence[Cells],
    views: Sequence[ChannelView],
    constants: Sequence[tuple[Constant, tuple[int, ...]]],
) -> tuple[list[Cells], list[Constant], Cells]:
    """Choose and repeat channels so that index i of all operands is the same element."""
    ndim = max(len(cells.dims) for cells in operands)
    ndim = max(ndim, *(len(shape) for _, shape in constants), 0) if constants else ndim
    # positions are the same in all operands, so any of those with all position axes tells them
    widest = max(range(len(views)), key=lambda i: views[i].places.ndim)
    lead = ndim - len(operands[widest].dims)
    over_places = [
        lead + axis for axis in range(len(operands[widest].dims)) if axis not in views[widest].axes
    ]
    shapes = []
    for cells, view in zip(operands, views):
        own = ndim - len(cells.dims)
        others = [own + axis for axis in range(len(cells.dims)) if axis not in view.axes]
        alike = others == over_places and torch.equal(view.places, views[widest].places)
        if not alike and cells.positions > 1:
            return _of_windows(build, call, operands, constants)
        if not alike or cells.batch - len(cells.dims) != operands[0].batch - len(operands[0].dims):
            raise UnsupportedLayerError(
                f"{call} combines values of shapes {', '.join(c.shape for c in operands)} whose "
                "elements were moved differently"
            )
        shapes.append((1,) * own + tuple(view.inserted(view.sizes)))
    for _, shape in constants:
        padded = (1,) * (ndim - len(shape)) + shape
        if any(padded[axis] != 1 for axis in over_places):
            return _of_windows(build, call, operands, constants)
        shapes.append(padded)
    # as in the source, a dimension of length 1 meets every index of another one; on the map that is
    # a repetition of channels, or of none where the operand has a single one
    try:
        full = torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        raise UnsupportedLayerError(
            f"{call} combines maps of different numbers of channels"
        ) from error
    maps = [
        _ordered(build, cells, view.channels.reshape(shape), full)
        for cells, view, shape in zip(operands, views, shapes)
    ]
    made = [
        _expanded(build, constant, shape, full)
        for (constant, _), shape in zip(constants, shapes[len(operands) :])
    ]
    axes = tuple(axis for axis in range(ndim) if axis not in over_places)
    sizes = [full[axis] for axis in axes]
    common = ChannelView(torch.arange(0), axes, views[widest].places)
    batch = operands[0].batch + ndim - len(operands[0].dims)
    return maps, made, common.laid_out(operands[widest], sizes, batch=batch)


def _of_windows(
    build: MapBuilder,
    call: Call,
    operands: Sequence[Cells],
    constants: Sequence[tuple[Constant, tuple[int, ...]]],
) -> tuple[list[Cells], list[Constant], Cells]:
    """Operands whose positions differ, or meet a parameter for each of them: of every window."""
    gathered = [build.gathered(cells, call) for cells in operands]
    views = [_view(build, call, cells) for cells in gathered]
    return _in_one_order(build, call, gathered, views, constants)


def _ordered(build: MapBuilder, cells: Cells, channels: Tensor, full: Sequence[int]) -> Cells:
    """The map with the channels of the common order; a single one broadcasts by itself."""
    wanted = channels.flatten() if channels.numel() == 1 else channels.expand(full).flatten()
    if torch.equal(wanted, torch.arange(cells.extent[0])):
        return cells
    extent = (len(wanted), *cells.extent[1:])
    return replace(cells, node=build.chosen(cells.node, wanted), extent=extent)


def _expanded(
    build: MapBuilder, constant: Constant, shape: Sequence[int], full: Sequence[int]
) -> Constant:
    """A constant as ``(C, 1, 1)``, which broadcasts over the map."""
    if tuple(shape) != tuple(full):
        node = build.graph.call_method("reshape", (constant.node, tuple(shape)))
        node = build.graph.call_method("expand", (node, *full))
        constant = Constant(node, constant.value.reshape(tuple(shape)).expand(full))
    return _reshaped(build, constant, (-1, 1, 1))


def _reshaped(build: MapBuilder, constant: Constant, shape: tuple[int, ...]) -> Constant:
    return Constant(build.graph.call_method("reshape", (constant.node, shape)), constant.value)


def _narrowed(build: MapBuilder, constant: Constant) -> Constant:
    """A tensor that forward made, one element long where it is the same all along an axis.

    ``torch.zeros(len(x), K)`` has rows for the images, which the network may have more of.
    """
    values = build.literal(constant)
    if values is not None and not values.is_meta:
        same = [bool((values == values.narrow(i, 0, 1)).all()) for i in range(values.ndim)]
    elif constant.node.op == "call_method" and constant.node.target == "expand":
        values = constant.value
        fed = constant.value.stride()  # 0 along axes that were expanded
        same = [stride == 0 for stride in fed]
    else:
        return constant
    node = constant.node
    for axis, size in enumerate(values.shape):
        if size > 1 and same[axis]:
            values = values.narrow(axis, 0, 1)
            node = build.graph.call_method("narrow", (node, axis, 0, 1))
    return Constant(node, values.to("meta"))
