"""Layers that work in place, where the source's values share memory and the maps do not show it.

Reshapes emit nothing, so several of the source's values lie on one map of the new graph. What is
done in place to one of them must change those that share its memory, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import fx

from fcvgg.errors import UnsupportedLayerError
from fcvgg.rewriting.capture import storages_of
from fcvgg.rewriting.layouts import Cells
from fcvgg.rewriting.tracing import describe


class InPlaceChanges:
    """Keeps the source's values right where a layer changes one of them in place.

    Args:
        graph: the new graph.
        values: what each node of the source has become, which is brought up to date.
    """

    def __init__(self, graph: fx.Graph, values: dict[fx.Node, Any]):
        self._graph = graph
        self._values = values

    def part_before(self, node: fx.Node, changed: fx.Node) -> None:
        """Copy the map that a layer is to change in place, where the source keeps another value.

        Reshapes emit nothing, so values that the source copied (or slices that it left alone) may
        lie on the same map here. Those that are read later must not change, nor what a layer
        before needs for its gradient: its input, or the output that it made.
        """
        x = self._values[changed]
        # A reader that is already emitted may need the old value for its gradient, and a map that
        # the source holds in other memory must not change with it.
        apart = bool(x.node.users) or not self._made_in_place(changed, x.node)
        for other, cells in self._read_later(node, x.node):
            # what shares memory with the changed value changes in the source too, if it lies within
            # it
            known = _share_storage(other, changed) and cells.elements_within(x)
            apart |= not known
            if known == "some":
                raise UnsupportedLayerError(
                    f"{describe(node)} changes a part of {describe(other)} in place, which is read "
                    "later as a whole; use the function that returns a new value"
                )
        # An operation that returns a new value here (`x += y` on a traced tensor) needs no copy.
        if apart and not node.meta.get("anew"):
            copied = self._graph.call_method("clone", (x.node,))
            self._move(changed, x, lambda cells: replace(cells, node=copied))

    def follow(self, node: fx.Node, changed: fx.Node, result: Cells) -> None:
        """Values that share what was changed in place are what the result is."""
        x = self._values[changed]
        later = [n for n, _ in self._read_later(node, x.node) if _share_storage(n, changed)]
        if later and not result.same_layout(x):
            raise UnsupportedLayerError(
                f"{describe(node)} changes {describe(later[0])} in place by values whose elements "
                "were moved; use the function that returns a new value"
            )
        self._move(changed, x, lambda cells: replace(cells, node=result.node).alike(result))

    def _move(self, changed: fx.Node, x: Cells, change: Callable[[Cells], Cells]) -> None:
        """Change where the values are that share their elements with one of the source's."""

        def moved(cells: Any) -> Any:
            on_map = isinstance(cells, Cells) and cells.node is x.node
            return change(cells) if on_map and cells.elements_within(x) == "all" else cells

        # The nodes are collected first, since the loop changes what they are found by.
        for node in {n: None for n, _ in self._on_map(x.node) if _share_storage(n, changed)}:
            value = self._values[node]
            several = isinstance(value, (tuple, list))
            self._values[node] = type(value)(map(moved, value)) if several else moved(value)

    def _made_in_place(self, changed: fx.Node, place: fx.Node) -> bool:
        """Whether the memory that is changed is what the layer that made the map wrote."""
        made = next(node for node, _ in self._on_map(place))
        return _share_storage(made, changed)

    def _on_map(self, place: fx.Node) -> Iterator[tuple[fx.Node, Cells]]:
        """The source's values that lie on a map of the new graph."""
        for node, value in self._values.items():
            for cells in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(cells, Cells) and cells.node is place:
                    yield node, cells

    def _read_later(self, node: fx.Node, place: fx.Node) -> list[tuple[fx.Node, Cells]]:
        """The source's values on a map that are read after a node."""
        return [
            (other, cells)
            for other, cells in self._on_map(place)
            if any(user > node for user in other.users)
        ]


def _share_storage(one: fx.Node, other: fx.Node) -> bool:
    """Whether values of the source share memory: what is done in place to one changes the other."""
    return not storages_of(one.meta["value"]).isdisjoint(storages_of(other.meta["value"]))
