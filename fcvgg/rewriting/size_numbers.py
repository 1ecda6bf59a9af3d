"""Numbers that a model computes from the height or width of its features, and computes with.

A traced number is that of the native size. A cell stands for a crop (`Geometry.window_of`), which
is smaller where strides leave out the last rows of a native image; there the source would compute
with another number, so that no cell could be what the source gives for its crop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fcvgg.errors import ConversionError, UnsupportedLayerError
from fcvgg.geometry import Pair
from fcvgg.rewriting.capture import Captured, capture
from fcvgg.rewriting.rules import is_known
from fcvgg.rewriting.rules.registry import kind_of
from fcvgg.rewriting.tracing import describe


def check_numbers(captured: Captured, model: nn.Module, crop: Pair) -> None:
    """Compare what a model computes with at its native size and on the crop of a cell.

    A model that does not run on the crop, or runs differently there, has its native size alone.

    Raises:
        UnsupportedLayerError: if it multiplies, adds or compares by other numbers there.
    """
    try:
        other = capture(model, crop, is_known, captured.channels)
    except ConversionError:
        return
    native, small = list(captured.graph.nodes), list(other.graph.nodes)
    if [(n.op, n.target) for n in native] != [(n.op, n.target) for n in small]:
        return
    for node, again in zip(native, small):
        numbers = [_numbers(n, c) for n, c in ((node, captured), (again, other))]
        if not _equal(*numbers):
            raise UnsupportedLayerError(
                f"{describe(node)} computes with a number that follows from the input size, "
                f"{numbers[0]} at {captured.size} and {numbers[1]} at {crop}, what a "
                f"cell sees of it; pass input_size={crop}, or write the number out"
            )


def _numbers(node: fx.Node, captured: Captured) -> Any:
    """The numbers that an element-wise function gets, or the literal that a node holds."""
    if node.op == "get_attr" and "_tensor_constant" in str(node.target):
        return getattr(captured.root, str(node.target), None)
    kind = kind_of(node, None) if node.op in ("call_function", "call_method") else None
    if kind is None or not kind.elementwise:
        return []
    found: list[float] = []
    fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda a: found.append(a) if isinstance(a, (int, float)) else None,  # type: ignore
    )
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.is_meta or torch.equal(one, other)
    return bool(one == other)
