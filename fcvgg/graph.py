"""The graph that a converted network runs, with the whole tree of modules around it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import fx, nn


def graph_module(modules: nn.Module, graph: fx.Graph) -> Network:
    """A module that runs `graph` and owns the tree of `modules`, also layers it does not call."""
    network = Network(modules, graph, class_name="Network")
    for name in _TREE:
        setattr(network, name, getattr(modules, name))
    return network


class Network(fx.GraphModule):
    """A graph module that keeps its whole tree of modules in copies and pickles.

    Plain fx keeps what the graph calls, and checkpoints would lose their keys. A pickle holds the
    nodes of the graph, where fx would trace its code anew, into the functions of this package.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        tree, nodes = copy.deepcopy((_tree(self), _as_data(self.graph)), memo)
        return _network(tree, nodes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _network, (_tree(self), _as_data(self.graph))


_TREE = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training")


@dataclass(frozen=True)
class _Result:
    """Among the arguments of a node as data: the result of the node of this name."""

    name: str


def _tree(module: nn.Module) -> dict[str, Any]:
    return {name: getattr(module, name) for name in _TREE}


def _as_data(graph: fx.Graph) -> list[tuple[Any, ...]]:
    def data(argument: Any) -> Any:
        return _Result(argument.name) if isinstance(argument, fx.Node) else argument

    return [
        (n.op, n.name, n.target, *fx.node.map_aggregate((n.args, n.kwargs), data))  # type: ignore
        for n in graph.nodes
    ]


def _network(tree: dict[str, Any], nodes: list[tuple[Any, ...]]) -> Network:
    modules, graph, made = nn.Module(), fx.Graph(), dict[str, fx.Node]()
    vars(modules).update(tree)

    def node_of(argument: Any) -> Any:
        return made[argument.name] if isinstance(argument, _Result) else argument

    for op, name, target, args, kwargs in nodes:
        args, kwargs = fx.node.map_aggregate((args, kwargs), node_of)  # type: ignore
        made[name] = graph.create_node(op, target, args, kwargs, name)
    return graph_module(modules, graph)
