"""A rewritten model: what is known of its layers, its geometry, and the graph that runs."""

from __future__ import annotations

import copy
import keyword
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import lcm
from typing import Any

from torch import fx, nn

from fcvgg.errors import ConversionError, RefusedLayerError, UnsupportedLayerError
from fcvgg.geometry import IMAGE, Axis, Geometry, KernelGeometry, KernelPair, Pair, Step
from fcvgg.rewriting.outputs import TENSOR, Form

"""A layer along the height and along the width."""


@dataclass(frozen=True)
class LayerRecord:
    """What one layer of the converted network is; `step` is its place in the geometry."""

    name: str
    kind: str
    windows: KernelPair
    step: int
    channels: int
    parameters: int
    multiply_adds_per_position: int


@dataclass(frozen=True)
class TrainingMode:
    """What ``train()`` of the source does beyond setting one mode for all of its modules.

    Attributes:
        still: the modules that the source's ``train()`` leaves in evaluation mode, by name.
        lively: the modules that its ``eval()`` leaves in training mode.
        frozen: the parameters that its ``train()`` takes the gradient from.
        unfollowed: the modules that compute something in training mode that the graph does not
            hold; the network cannot be trained.
    """

    still: frozenset[str] = frozenset()
    lively: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    unfollowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A rewritten model: what `fcvgg.network.FullyConvolutional` runs and knows of itself.

    `outputs` is the form in which the source returns its outputs; the graph gives them as a tuple,
    or as one map where the source returns one tensor.

    `head` is what a cell is: ``"window"`` a whole native window, ``"position"`` one position of the
    features, of whose scores the source averages those of `average` before it computes `finals`, a
    function for each output or ``""``. Of windows, `average` says that they could be positions.
    """

    network: fx.GraphModule
    geometry: Geometry
    activations: tuple[str, ...]
    classes: tuple[int, ...]
    in_channels: int
    records: tuple[LayerRecord, ...]
    aliases: frozenset[str]
    outputs: Form = TENSOR
    training_mode: TrainingMode = field(default=TrainingMode())
    head: str = "window"
    average: KernelPair | None = None
    finals: tuple[str, ...] = ()

    @property
    def could_have_positions(self) -> bool:
        """Whether the source, converted to windows, could be converted to positions."""
        return self.head == "window" and self.average is not None


# -- geometry, collected while the network is written ---------------------------------------------


class Steps:
    """The steps of both axes in order of computation, each with the layer that it stands for."""

    def __init__(self) -> None:
        self._axes: tuple[list[Step], list[Step]] = ([], [])
        self._strides: list[Pair] = []
        self._periods: list[Pair] = []
        self._places: list[str] = []

    def add(self, windows: KernelPair, inputs: Iterable[int], place: str) -> int:
        """Append a step to both axes and return its place; an identity over one input adds none."""
        inputs = tuple(dict.fromkeys(inputs))
        # Element-wise layers add no step, so that the chain holds only what changes the geometry.
        if len(inputs) == 1 and all(window.is_identity for window in windows):
            return inputs[0]
        for steps, window in zip(self._axes, windows):
            steps.append(Step(window, inputs))
        # Branches that join have one stride, so the first input's is that of all.
        before = self.stride_at(inputs[0])
        stride = tuple(n * w.stride // w.repeats for n, w in zip(before, windows))
        for n, window in zip(before, windows):
            if n % window.repeats:
                raise RefusedLayerError(
                    f"{place} is refused: it enlarges a map of stride {n} by {window.repeats}, so "
                    "that positions lie between the image's pixels; resize the image instead"
                )
        periods = [stride, *map(self.period_at, inputs)]
        self._strides.append((stride[0], stride[1]))
        self._periods.append((lcm(*(y for y, _ in periods)), lcm(*(x for _, x in periods))))
        self._places.append(place)
        return len(self._places) - 1

    def join(self, inputs: Iterable[int], place: str) -> int:
        """The step of a layer over several maps, whose cells must lie on one grid."""
        inputs = tuple(inputs)
        strides = {self.stride_at(step) for step in inputs}
        if len(strides) > 1:
            raise UnsupportedLayerError(
                f"{place} joins branches with different strides {sorted(strides)}; "
                "branches must have the same number of input pixels between cells"
            )
        return self.add((KernelGeometry(), KernelGeometry()), inputs, place)

    def stride_at(self, step: int) -> Pair:
        """Image pixels between neighbours after a step."""
        return (1, 1) if step == IMAGE else self._strides[step]

    def period_at(self, step: int) -> Pair:
        """Image pixels by which an image must move for the map after a step to move as a whole."""
        return (1, 1) if step == IMAGE else self._periods[step]

    def geometry_at(self, step: int) -> Geometry:
        """The geometry of the network up to a step."""
        return Geometry(*(Axis(tuple(steps)).upto(step) for steps in self._axes))

    def differing_joins(self, geometry: Geometry) -> set[int]:
        """The steps that join branches whose sizes differ at some input size.

        The network's own stride is a multiple of every other, so one period of it decides.
        """
        found: set[int] = set()
        for steps, axis in zip(self._axes, geometry.axes):
            whole = Axis(tuple(steps))
            for size in range(axis.window, axis.window + axis.stride):
                sizes = whole.sizes(size)
                for i, step in enumerate(steps):
                    if len({size if k == IMAGE else sizes[k] for k in step.inputs}) > 1:
                        found.add(i)
        return found


def same_grid(a: Geometry, b: Geometry) -> bool:
    """Whether the cells of two maps lie in the same places for every input size."""
    return all(
        (x.stride, x.offset, x.receptive_field, x.window)
        == (y.stride, y.offset, y.receptive_field, y.window)
        and x.agree(y)
        for x, y in zip(a.axes, b.axes)
    )


# -- the graph that runs, with the whole tree of modules around it --------------------------------


def graph_module(modules: nn.Module, graph: fx.Graph) -> Network:
    """A module that runs `graph` and owns the tree of `modules`, also layers it does not call.

    Raises:
        ConversionError: if a layer is called like a keyword of Python, which no code can name.
    """
    for node in graph.nodes:
        parts = str(node.target).split(".") if node.op in ("call_module", "get_attr") else ()
        if any(map(keyword.iskeyword, parts)):
            raise ConversionError(
                f"the layer {node.target!r} must not be called like a keyword of Python, which the "
                "code of a graph cannot name; rename it"
            )
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
