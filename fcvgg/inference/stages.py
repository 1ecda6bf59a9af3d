"""A converted network as a list of operations on maps.

`stages_of` reads the network's graph as `Stage`s: layers that slide over their map, and operations
that work on each position alone.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fcvgg.errors import UnsupportedLayerError
from fcvgg.rewriting.modules import cut_to
from fcvgg.rewriting.rules.registry import is_positional, is_relu, sliding_of
from fcvgg.rewriting.sliding import Sliding
from fcvgg.rewriting.tracing import operation_name

_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


@dataclass(frozen=True)
class Stage:
    """One operation of the network on maps.

    Attributes:
        name: of its node in the graph.
        inputs: the stages that it reads; stage 0 is the image.
        channels: of its output.
        sliding: how it computes a part of its map; None where it works on each position alone.
        call: computes an operation of the latter kind from its inputs.
        in_place: whether it writes its output into its input.
        is_relu: whether it is a ReLU, which can write its output where it is wanted.
    """

    name: str
    inputs: tuple[int, ...]
    channels: int
    sliding: Sliding | None = None
    call: Callable[[Sequence[Tensor]], Tensor] | None = None
    in_place: bool = False
    is_relu: bool = False


def stages_of(network: fx.GraphModule, in_channels: int, output: int = 0) -> list[Stage]:
    """The stages that one output of a converted network needs; the last one computes it.

    Raises:
        UnsupportedLayerError: if a node cannot be computed strip by strip; it is named.
    """
    return _StageReader(network, in_channels).read(output)


class _StageReader:
    def __init__(self, network: fx.GraphModule, in_channels: int):
        self._network = network
        self._constants: dict[fx.Node, Any] = {}
        self._stages = [Stage("images", (), in_channels)]
        self._places: dict[fx.Node, int] = {}

    def read(self, output: int) -> list[Stage]:
        nodes = list(self._network.graph.nodes)
        result = nodes[-1].args[0]
        wanted = result[output] if isinstance(result, (tuple, list)) else result
        self._needed = _ancestors(wanted)
        for node in nodes:
            if node.op == "placeholder":
                self._places[node] = 0
            elif node in self._needed:
                self._add(node)
        place = self._places[wanted]
        if place != len(self._stages) - 1:  # its value was changed in place afterwards
            self._stages = self._stages[: place + 1]
        return self._stages

    def _add(self, node: fx.Node) -> None:
        if not any(fed in self._places for fed in node.all_input_nodes):
            self._constants[node] = self._evaluated(node, self._constants)
            return
        module = None
        if node.op == "call_module":
            module = self._network.get_submodule(str(node.target))
        sliding = sliding_of(node, module, self._constants.get)
        if sliding is not None:
            self._places[node] = self._append(node, sliding=sliding)
        elif is_positional(node, module):
            self._add_positional(node, module)
        else:
            kind = type(module).__name__ if module is not None else operation_name(node)
            raise UnsupportedLayerError(
                f"{node.name} ({kind}) cannot be streamed without a rule for how it computes a "
                "strip of its map; register it with positional=True or slides= (see "
                "fcvgg.rewriting.rules)"
            )

    def _add_positional(self, node: fx.Node, module: nn.Module | None) -> None:
        changed = _changed_in_place(node, module)
        shared = changed is not None and len([u for u in changed.users if u in self._needed]) > 1
        call = self._call(node, changed if shared else None)
        place = self._append(
            node,
            call=call,
            in_place=changed is not None and not shared,
            is_relu=is_relu(node, module),
        )
        self._places[node] = place
        if changed is not None and shared:  # readers from here on see the changed value
            self._places[changed] = place

    def _append(self, node: fx.Node, **settings: Any) -> int:
        maps = [fed for fed in node.all_input_nodes if fed in self._places]
        inputs = tuple(self._places[fed] for fed in maps)
        channels = self._channels(node, inputs, settings.get("sliding"))
        self._stages.append(Stage(node.name, inputs, channels, **settings))
        return len(self._stages) - 1

    def _channels(self, node: fx.Node, inputs: tuple[int, ...], sliding: Sliding | None) -> int:
        fed = [self._stages[i].channels for i in inputs]
        if sliding is not None:
            return sliding.channels or fed[0] * sliding.multiplies
        if node.target in (torch.cat, torch.concat, torch.concatenate):
            return sum(fed)
        if node.target is cut_to:
            return fed[0]
        if node.target == "narrow":
            return int(node.args[3])  # type: ignore[arg-type]
        if node.target is torch.index_select:
            return len(self._constants[node.args[2]])  # type: ignore[index]
        return max(fed)

    def _call(self, node: fx.Node, kept: fx.Node | None) -> Callable[[Sequence[Tensor]], Tensor]:
        """The node's operation on values of its map inputs; it works on a copy of `kept`."""
        maps = [fed for fed in node.all_input_nodes if fed in self._places]
        constants = {
            fed: self._constants[fed] for fed in node.all_input_nodes if fed not in self._places
        }

        def call(values: Sequence[Tensor]) -> Tensor:
            known = {**constants, **dict(zip(maps, values))}
            if kept is not None:
                known[kept] = known[kept].clone()
            return self._evaluated(node, known)

        return call

    def _evaluated(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        """The value of a node, from the values of its inputs."""
        target: Any = node.target
        if node.op == "get_attr":
            return operator.attrgetter(target)(self._network)
        args, kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: known[a] if isinstance(a, fx.Node) else a
        )  # type: ignore
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_module":
            target = self._network.get_submodule(target)
        return target(*args, **kwargs)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    ends = [node]
    while ends:
        end = ends.pop()
        if end not in found:
            found.add(end)
            ends.extend(end.all_input_nodes)
    return found


def _changed_in_place(node: fx.Node, module: nn.Module | None) -> fx.Node | None:
    """The node whose value an operation changes instead of making a new one."""
    first = next(iter(node.all_input_nodes))
    if module is not None:
        return first if getattr(module, "inplace", False) else None
    if node.op == "call_method":
        return first if str(node.target).endswith("_") else None
    if node.target in _IN_PLACE or getattr(node.target, "__name__", "").endswith("_"):
        return first
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore
    except (TypeError, ValueError):  # built in, and then without such an argument
        return None
    return first if bound.arguments.get("inplace", False) else None
