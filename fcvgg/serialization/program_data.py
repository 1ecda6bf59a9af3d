"""A `Program` as plain data, and the same program again, checked before it is returned."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from fcvgg import probability
from fcvgg.errors import ArgumentError, GeometryError, LoadError, one_line
from fcvgg.geometry import Geometry, KernelGeometry
from fcvgg.rewriting.modules import TrainingOnly, WindowLinear
from fcvgg.rewriting.outputs import TENSOR, Form, form_of_data, tuple_of
from fcvgg.rewriting.program import LayerRecord, Program, TrainingMode, graph_module
from fcvgg.serialization.graph_data import (
    called_layers,
    decoded_graph,
    decoded_layer,
    encoded_graph,
    encoded_layer,
)
from fcvgg.serialization.shape_budget import ShapeBudget
from fcvgg.serialization.tensor_table import (
    TENSORS,
    TensorEntry,
    check_declared,
    check_path,
    fill,
    owner_of,
)
from fcvgg.support import untrusted
from fcvgg.support.module_state import dtype_of


def describe_program(program: Program) -> dict[str, Any]:
    """The graph, the layers it calls and what is known of them, as plain data."""
    network = program.network
    return {
        "graph": encoded_graph(network.graph),
        "layers": {name: encoded_layer(name, layer) for name, layer in called_layers(network)},
        "aliases": sorted(program.aliases),
        "training_mode": _described_mode(program),
        "geometry": program.geometry.to_dict(),
        "activations": list(program.activations),
        "classes": list(program.classes),
        "outputs": program.outputs.to_data(),
        "head": program.head,
        "average": program.average and [asdict(w) for w in program.average],
        "finals": list(program.finals),
        "in_channels": program.in_channels,
        "records": [asdict(record) for record in program.records],
    }


def _described_mode(program: Program) -> dict[str, list[str]]:
    """What ``train()`` does; layers of the user's own that act in training mode are lost."""
    mode = program.training_mode
    lost = (n for n, layer in called_layers(program.network) if isinstance(layer, TrainingOnly))
    return {
        "still": sorted(mode.still),
        "lively": sorted(mode.lively),
        "frozen": sorted(mode.frozen),
        "unfollowed": [*mode.unfollowed, *lost],
    }


def _training_mode(data: Any) -> TrainingMode:
    """What `_described_mode` wrote; nothing particular in bundles of before."""
    parts = {"still": [], "lively": [], "frozen": [], "unfollowed": [], **data}
    for name, places in parts.items():
        if not isinstance(places, list) or not all(type(place) is str for place in places):
            raise LoadError(
                f"training_mode.{name} must be a list of names in a bundle, got {places!r}"
            )
    return TrainingMode(
        still=frozenset(parts["still"]),
        lively=frozenset(parts["lively"]),
        frozen=frozenset(parts["frozen"]),
        unfollowed=tuple(parts["unfollowed"]),
    )


def rebuild_program(
    description: Mapping[str, Any],
    table: Mapping[str, TensorEntry],
    tensors: Mapping[str, Tensor],
) -> Program:
    """The program that `describe_program` described, holding `tensors`.

    It is built and run without values first, so nothing is returned that would fail in forward.

    Raises:
        LoadError: if the description names what fcvgg does not know, or does not hold together.
    """
    layers: dict[str, nn.Module] = {}
    tree = nn.Module()
    for name, layer in description["layers"].items():
        check_path(name, LoadError)
        layers[name] = decoded_layer(name, layer)
        owner, _, child = name.rpartition(".")
        owner_of(tree, owner).add_module(child, layers[name])
    check_declared(tree, table)
    # first on the meta device: a wrong description fails there before it takes memory
    meta = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in table.items()
    }
    fill(tree, table, meta)
    aliases = frozenset(description["aliases"])
    if not aliases <= layers.keys():
        raise LoadError(
            f"aliases must be layers of the bundle, got {sorted(aliases - layers.keys())}"
        )
    program = Program(
        network=graph_module(tree.eval(), decoded_graph(description["graph"], layers, table)),
        geometry=_geometry(description["geometry"]),
        activations=tuple(checked_activation(a) for a in description["activations"]),
        classes=tuple(_positive(n, "classes") for n in description["classes"]),
        in_channels=_positive(description["in_channels"], "in_channels"),
        records=tuple(_record(record) for record in description["records"]),
        aliases=aliases,
        outputs=_outputs(description),
        training_mode=_training_mode(description.get("training_mode", {})),
        **_head(description),
    )
    outputs = len(program.outputs.names())
    if not len(program.classes) == len(program.activations) == outputs > 0:
        raise LoadError(
            f"a bundle must have one activation and number of classes for each of its {outputs} "
            f"outputs, got {len(program.activations)} and {len(program.classes)}"
        )
    orders = _check_runs(program)
    fill(program.network, table, tensors)
    _check_orders(program.network, orders)
    return program


def _outputs(description: Mapping[str, Any]) -> Form:
    """The form of the outputs; bundles of before hold one map, or several as a tuple."""
    if "outputs" in description:
        try:
            return form_of_data(description["outputs"])
        except ValueError as error:
            raise LoadError(f"the bundle's outputs are broken: {one_line(error)}") from error
    result = description["graph"][-1]["args"][0]
    return tuple_of(len(description["classes"])) if _is_several(result) else TENSOR


def _is_several(result: Any) -> bool:
    """Whether the output of an encoded graph is a tuple or list of nodes."""
    return isinstance(result, list) or (isinstance(result, dict) and "tuple" in result)


def _head(description: Mapping[str, Any]) -> dict[str, Any]:
    """What the cells are; windows in bundles of before, which do not say."""
    head, finals = description.get("head", "window"), description.get("finals", [])
    average = description.get("average")
    if head not in ("window", "position") or (head == "position" and average is None):
        raise LoadError(f"the bundle's head must be 'window' or 'position', got {head!r}")
    known = ("", "softmax", "log_softmax", "sigmoid")
    if not isinstance(finals, list) or not all(final in known for final in finals):
        raise LoadError(f"the bundle's finals must be among {known}, got {finals!r}")
    if average is not None:
        height, width = map(KernelGeometry.from_dict, average)
        average = height, width
    return {"head": head, "average": average, "finals": tuple(finals)}


def _geometry(data: Any) -> Geometry:
    try:
        return Geometry.from_dict(data)
    except GeometryError as error:
        raise LoadError(f"the bundle's geometry is broken: {one_line(error)}") from error


def _record(data: Mapping[str, Any]) -> LayerRecord:
    height, width = map(KernelGeometry.from_dict, data["windows"])
    record = LayerRecord(**{**data, "windows": (height, width)})
    numbers = (
        *(record.step, record.channels, record.parameters),
        record.multiply_adds_per_position,
    )
    if any(type(n) is not int for n in numbers) or type(record.name) is not str:
        raise LoadError(f"the bundle's record of layer {record.name!r} must hold integers")
    return record


def _positive(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise LoadError(f"the bundle's {name} must be positive integers, got {value!r}")
    return value


def checked_activation(value: Any) -> str:
    """What scores are, if it is one of the known names."""
    try:
        return probability.checked_activation(value)
    except ArgumentError as error:
        raise LoadError(f"the bundle's {one_line(error)}") from error


# -- whether it runs ------------------------------------------------------------------------------


class _Trial(fx.Interpreter):
    """A run on tensors without values, node by node, that notes every choice of channels.

    Every value of a graph is a tensor, a few of them, or the mode that `TrainingFlag` gives.
    """

    def __init__(self, network: fx.GraphModule):
        super().__init__(network)
        self.extra_traceback = False  # which fx writes into the messages of errors
        self.orders: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        # an index beyond the last channel is not seen without values, so the bound is kept for it
        if n.target is torch.index_select and len(n.args) == 3:
            source, dim, order = n.args
            if isinstance(order, fx.Node) and order.op == "get_attr":
                size = self.env[source].shape[dim]  # type: ignore[index]
                name = str(order.target)
                self.orders[name] = min(size, self.orders.get(name, size))
        self._check_operands(n)
        try:
            value = super().run_node(n)
        except LoadError:
            raise
        except NotImplementedError:
            # a user's own layer may not run without values; those of torch and fcvgg all do
            if n.op == "call_module" and not _is_shipped(self.fetch_attr(str(n.target))):
                raise _NeedsValuesError from None
            raise
        if n.op != "output":
            self._check_value(n, value)
        return value

    def _check_operands(self, n: fx.Node) -> None:
        """Refuse arithmetic on anything but tensors and numbers: Python repeats and joins lists."""
        if n.op != "call_function" or getattr(n.target, "__module__", "") != "_operator":
            return
        operands = [self.env[a] if isinstance(a, fx.Node) else a for a in n.args]
        if n.target is operator.getitem:
            operands = operands[:1]
            kinds: tuple[type, ...] = (Tensor, tuple, list)
        elif n.target is operator.concat:
            kinds = (tuple, list)
        else:
            kinds = (Tensor, int, float)
        wrong = next((o for o in operands if not isinstance(o, kinds)), None)
        if wrong is not None:
            raise LoadError(
                f"the bundle's node {n.name} must compute with tensors and numbers, got a "
                f"{type(wrong).__name__}"
            )

    def _check_value(self, n: fx.Node, value: Any) -> None:
        parts = value if isinstance(value, (tuple, list)) else (value,)
        untrusted.check_count(len(parts), f"the number of values of the bundle's node {n.name}")
        if n.op == "call_module" and isinstance(value, bool):
            return  # of a TrainingFlag
        if not all(isinstance(part, Tensor) for part in parts):
            raise LoadError(
                f"the bundle's node {n.name} must give tensors, got {type(value).__name__}"
            )


class _NeedsValuesError(Exception):
    """A layer of the user's that torch cannot run without values."""


def _is_shipped(layer: nn.Module) -> bool:
    return type(layer).__module__.partition(".")[0] in ("torch", "torchvision", "fcvgg")


def _check_runs(program: Program) -> dict[str, int]:
    """Run the network, still without values, on an image of one window.

    Returns:
        the buffers that choose channels, each with the number of channels that it chooses from.
    """
    geometry = program.geometry
    images = torch.empty(
        *(1, program.in_channels, *geometry.window),
        dtype=dtype_of(program.network),
        device="meta",
    )
    trial = _Trial(program.network)
    try:
        with torch.no_grad(), ShapeBudget("the bundle's network"):
            maps = trial.run(images)
    except _NeedsValuesError:
        return trial.orders
    except LoadError:
        raise
    except Exception as error:  # operations fail in any way on arguments that are not theirs
        raise LoadError(f"the bundle's network does not run: {one_line(error)}") from error
    maps = maps if isinstance(maps, (tuple, list)) else (maps,)
    shapes = [tuple(m.shape) for m in maps]
    cells = geometry.output_size(geometry.window)
    expected = [(1, classes, *cells) for classes in program.classes]
    if shapes != expected:
        raise LoadError(
            f"the maps of the bundle's network must be {expected} by its geometry and classes, got "
            f"{shapes}"
        )
    return trial.orders


def _check_orders(network: nn.Module, orders: Mapping[str, int]) -> None:
    """Refuse orders that are not a permutation, or that choose a channel beyond the last."""
    for name, size in orders.items():
        _check_order(name, network.get_buffer(name), size, whole=False)
    for name, module in network.named_modules():
        if isinstance(module, WindowLinear) and module.column_order is not None:
            columns = module.weight[0].numel()
            _check_order(f"{name}.column_order", module.column_order, columns, whole=True)


def _check_order(name: str, order: Tensor, size: int, whole: bool) -> None:
    values = order.tolist() if order.ndim == 1 and order.dtype == torch.int64 else None
    if (
        values is None
        or not all(0 <= v < size for v in values)
        or (whole and sorted(values) != list(range(size)))
    ):
        what = "a permutation of" if whole else "indices from"
        raise LoadError(f"{name} in {TENSORS} must be {what} 0 to {size - 1}")
