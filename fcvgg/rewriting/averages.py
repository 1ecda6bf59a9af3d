"""What commutes with a global average: the scores of positions behind the scores of windows.

A linear score of an average is the average of linear scores. So a head that averages all positions
of the features, and is affine from there on, may as well compute its scores at every position, for
the average to be taken last. `commuted` follows that property of values from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx

from fcvgg.errors import RefusedLayerError
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells
from fcvgg.rewriting.map_builder import MapBuilder

if TYPE_CHECKING:
    from fcvgg.rewriting.rules.registry import LayerKind


def commuted(build: MapBuilder, call: Call, kind: LayerKind, result: Any) -> Any:
    """The result of a call, said to be an average of positions where that still holds.

    A softmax or sigmoid that ends the head is left out of a network of positions.

    Raises:
        RefusedLayerError: if the call does not commute, and the network is one of positions.
    """
    operands, made = _cells_in((call.args, call.kwargs)), _cells_in(result)
    averages = {x.average for x in operands}
    # a pool that averages says so itself, of its own result
    if averages <= {None} or not made or made[0].average not in {*averages, None}:
        return result
    first = operands[0]
    alike = len(averages) == 1 and not any(x.final for x in operands)
    if all(r.node in {x.node for x in operands} for r in made):  # elements were moved
        known = first
    elif alike and _is_affine(kind, call, operands, made):
        known = first
        if (
            build.positions and kind.role == "bn"
        ):  # its statistics in training mode would be those of positions
            build.mode_dependent.append(call.name if call.module is not None else call.owner)
    elif alike and kind.final and len(operands) == 1 and first.activation == "logits":
        known = replace(first, final=kind.final)
        if build.positions:
            # what computes it stays unused in the graph, which drops it
            each = "independent_logits" if kind.final == "sigmoid" else "logits"
            return known.meaning_of(each)
    elif build.positions:
        raise RefusedLayerError(
            f"{call} does not commute with the global average before it, so that positions have no "
            "scores of their own; use head='window'"
        )
    else:
        known = replace(first, average=None, final="")

    def said(value: Any) -> Any:
        if not isinstance(value, Cells):
            return value
        return replace(value, average=known.average, final=known.final)

    return fx.node.map_aggregate(result, said)


def drop_unused(graph: fx.Graph) -> None:
    """Remove the calls whose results nothing uses, such as a softmax that was left out."""
    for node in reversed(graph.nodes):
        if node.op in ("call_module", "call_function", "call_method") and not node.users:
            graph.erase_node(node)


def _is_affine(
    kind: LayerKind, call: Call, operands: Sequence[Cells], made: Sequence[Cells]
) -> bool:
    """Whether a call is affine in its operands at each position."""
    if kind.affine is None or not kind.affine(*call.args, **call.kwargs):
        return False
    # a layer that slides, or takes a window that is not averaged as a whole, has a step of its own
    return len(operands) > 1 or all(r.step == operands[0].step for r in made)


def _cells_in(values: Any) -> list[Cells]:
    found: list[Any] = []
    fx.node.map_aggregate(values, found.append)  # type: ignore[arg-type]
    return [x for x in found if isinstance(x, Cells)]
