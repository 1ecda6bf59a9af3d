"""The new graph: its calls, the modules that they call, and the parameters of those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from fcvgg.errors import CaptureError, RefusedLayerError, UnsupportedLayerError
from fcvgg.geometry import Pair
from fcvgg.rewriting.capture import Captured
from fcvgg.rewriting.layouts import Cells, Constant
from fcvgg.rewriting.marks import FeatureSize, FollowsTraining
from fcvgg.rewriting.modules import TrainingFlag, TrainingOnly, WindowLinear
from fcvgg.rewriting.tracing import describe, operation_name
from fcvgg.support.module_state import device_of


@dataclass(frozen=True)
class Call:
    """One call in the source.

    Attributes:
        node: in the source's graph.
        module: as the converted network holds it; None for functions and methods.
        args: what the arguments have become in the new graph.
        kwargs: the same of those by name.
    """

    node: fx.Node
    module: nn.Module | None
    args: tuple[Any, ...] = field(default=(), compare=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        return str(self.node.target) if self.module is not None else self.node.name

    @property
    def owner(self) -> str:
        """The path of the module whose forward makes the call."""
        return str(self.node.meta.get("owner", ""))

    @property
    def kind(self) -> str:
        if self.module is not None:
            return type(self.module).__name__
        return operation_name(self.node)

    def parameters(self) -> int:
        if self.module is not None:
            return sum(p.numel() for p in self.module.parameters())
        fed = (n for n in self.node.all_input_nodes if n.op == "get_attr")
        return sum(n.meta["value"].numel() for n in fed)

    def __str__(self) -> str:
        return describe(self.node)


@dataclass(frozen=True)
class WindowWeight:
    """An FC weight ``(O, C*kh*kw)`` as the parameter ``(O, C, kh, kw)`` of a window.

    `order[j]` is the window's element that column j multiplies; `column_order` is None where that
    is j, see `WindowLinear`.
    """

    parameter: nn.Parameter
    order: Tensor
    column_order: Tensor | None


class Emitter:
    """Puts calls into the new graph, and layers into the tree of modules that it calls.

    Args:
        captured: the source's graph at its native size.
        modules: the tree of modules that the new graph calls, and that holds the parameters; layers
            of it are replaced.
    """

    def __init__(self, captured: Captured, modules: nn.Module):
        self.captured = captured
        self.modules = modules
        for name in captured.training_only:
            # Layers that do nothing in evaluation are kept whole: they draw random numbers in
            # training.
            modules.set_submodule(name, TrainingOnly(modules.get_submodule(name)))
        self.graph = fx.Graph()
        self.aliases: set[str] = set()
        self._window_weights: dict[nn.Parameter, WindowWeight] = {}
        self._rewritten: dict[str, list[tuple[Any, str]]] = {}
        self._originals: dict[str, nn.Module] = {}
        self._flags: dict[str, fx.Node] = {}

    # -- calls ------------------------------------------------------------------------------------

    def emit(self, call: Call, args: Any, kwargs: Any) -> fx.Node:
        """The source's own call on maps: Cells and Constants in the arguments become nodes."""
        args, kwargs = self._nodes(call, (args, kwargs))
        node = call.node
        # The node keeps the source's name, by which records and layer names find it.
        return self.graph.create_node(node.op, node.target, tuple(args), kwargs, node.name)

    def repeat(self, call: Call, x: Cells) -> fx.Node:
        """The source's own call, with its own arguments, on another map."""
        return self.emit(call, (x, *call.args[1:]), call.kwargs)

    def emit_function(
        self, call: Call, function: Callable[..., Any], *args: Any, **kw: Any
    ) -> fx.Node:
        """A call of another function in the place of the source's."""
        args, kw = self._nodes(call, (args, kw))
        return self.graph.create_node("call_function", function, tuple(args), kw, call.node.name)

    def emit_module(self, call: Call, module: nn.Module, x: Cells, key: Any = None) -> fx.Node:
        """Call a layer made for this place.

        One that takes over the source layer's parameters keeps its name. Where the source calls a
        layer at several places that need different layers, the further ones get names of their own
        (`key` tells equal ones) that stay out of checkpoints.
        """
        if call.module is None:
            return self.emit_new_module(f"{call.node.name}_window", module, x)
        name = self._replace(str(call.node.target), module, key)
        return self.graph.create_node("call_module", name, (x.node,), {}, call.node.name)

    def emit_new_module(self, name: str, module: nn.Module, x: Cells) -> fx.Node:
        """Call a layer that stands for none of the source's, under a name of its own."""
        name = self._fresh(name)
        self.modules.add_module(name, module)
        return self.graph.create_node("call_module", name, (x.node,), {}, name)

    def select(self, node: fx.Node, channels: Tensor) -> fx.Node:
        """Emit the choice of some channels, in any order, along dimension 1."""
        # A buffer follows the network to other devices, as a constant in the graph would not. It is
        # a copy: a view would keep the whole layout in memory and in exported files.
        name = self._add_buffer("channel_order", channels.clone())
        return self.graph.call_function(torch.index_select, (node, 1, self.graph.get_attr(name)))

    def _nodes(self, call: Call, arguments: Any) -> Any:
        def node_of(argument: Any) -> Any:
            if isinstance(argument, (Cells, Constant)):
                return argument.node
            # A size of the features is a number here, though rules tell it from one written out.
            if isinstance(argument, FeatureSize):
                return int(argument)
            return self._mode(call) if isinstance(argument, FollowsTraining) else argument

        return fx.node.map_aggregate(arguments, node_of)  # type: ignore[arg-type]

    def _mode(self, call: Call) -> fx.Node:
        """The mode of the module whose forward makes a call, which may differ from the others'."""
        if call.owner not in self._flags:
            owner = self.modules.get_submodule(call.owner)
            name = self._fresh(f"{call.owner}.training_flag".removeprefix("."))
            owner.add_module(name.rpartition(".")[2], TrainingFlag().train(owner.training))
            # a call in the graph reads the mode at every pass, where a value would freeze it
            self._flags[call.owner] = self.graph.call_module(name)
        return self._flags[call.owner]

    def owner_of(self, call: Call) -> nn.Module:
        """The module whose forward makes a call."""
        return self.modules.get_submodule(call.owner)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The source's layer at a node, as it was before any rewriting."""
        if node.op != "call_module":
            return None
        name = str(node.target)
        # A layer that is called again may have been replaced by its first call's rewriting.
        if name not in self._originals:
            self._originals[name] = self.modules.get_submodule(name)
        return self._originals[name]

    # -- constants --------------------------------------------------------------------------------

    def constant(self, node: fx.Node) -> Constant:
        path, _, name = str(node.target).rpartition(".")
        owner = self.modules.get_submodule(path)
        if name not in owner._parameters and name not in owner._buffers:
            # a literal in forward, which the recorder put on its root, or a plain attribute
            literal = getattr(self.captured.root.get_submodule(path), name)
            if literal.is_meta:
                raise CaptureError(
                    "forward makes a tensor on the meta device, without data; make it on the "
                    "device of the images"
                )
            value = vars(owner).pop(name, literal).detach().to(device_of(self.modules))
            owner.register_buffer(name, value, persistent=False)
        return Constant(self.graph.get_attr(str(node.target)), node.meta["value"])

    def value_of(self, constant: Constant, call: Call) -> Tensor:
        """The numbers of a constant that say which elements a call takes.

        Raises:
            UnsupportedLayerError: if it holds none.
        """
        # Indices decide the layout, so they must be numbers now and not when the network runs.
        value = self._evaluated(constant.node)
        if not isinstance(value, Tensor) or value.is_meta or value.is_floating_point():
            raise UnsupportedLayerError(
                f"{call} takes elements by an index that is no tensor of integers or booleans; "
                "expected a slice, a list, or a buffer with data"
            )
        return value.detach().cpu()

    def evaluated(self, constant: Constant) -> Tensor:
        """The numbers of a constant, on the meta device where the model's parameters are."""
        return self._evaluated(constant.node)  # type: ignore[no-any-return]

    def literal(self, constant: Constant) -> Tensor | None:
        """The numbers of a tensor that forward made; None of a parameter or buffer."""
        name = str(constant.node.target) if constant.node.op == "get_attr" else ""
        return self._evaluated(constant.node) if "_tensor_constant" in name else None

    def _evaluated(self, node: fx.Node) -> Any:
        """What a node of the new graph that is computed from parameters alone gives."""
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            return getattr(self.modules.get_submodule(path), name)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._evaluated)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    # -- layers and their parameters --------------------------------------------------------------

    def window_weight(self, weight: nn.Parameter, kernel: Pair, order: Tensor) -> WindowWeight:
        """The parameter that an FC weight becomes: a view, or a copy in another order of columns.

        `order[j]` is the window's element that column j of the FC weight multiplies. One weight
        becomes one parameter, in the shape and order of the first window that it is asked for, so
        that its gradient is whole.
        """
        if weight not in self._window_weights:
            # A view where the columns are in order: the converted network shares the source's
            # memory. Other orders cost one copy of the weight, and a gradient flows to that copy
            # alone.
            columns = weight.detach()
            column_order = None
            if not torch.equal(order, torch.arange(len(order))):
                column_order = order.argsort().to(columns.device)
                columns = columns[:, column_order]
            shaped = nn.Parameter(columns.view(len(columns), -1, *kernel), weight.requires_grad)
            self._window_weights[weight] = WindowWeight(shaped, order, column_order)
        return self._window_weights[weight]

    def parameter(self, call: Call, name: str) -> Constant | None:
        """A parameter of the layer that a call calls, under its own name.

        One that torch computes from others (weight norm) is computed at every call.
        """
        value = getattr(call.module, name)
        if value is None:
            return None
        if nn.utils.parametrize.is_parametrized(call.module, name):  # type: ignore[arg-type]
            node = self.graph.call_module(f"{call.name}.parametrizations.{name}")
        else:
            node = self.graph.get_attr(f"{call.name}.{name}")
        return Constant(node, value.detach())

    def hold(self, call: Call, module: nn.Module) -> None:
        """Put a layer in the source layer's place without a call of it, for its parameters."""
        if str(call.node.target) not in self._rewritten:
            self._replace(str(call.node.target), module, None)

    def restore_weights(self) -> None:
        """Give the graph FC weights in the source's shape where it reads one that was reshaped."""
        for node in self.graph.find_nodes(op="get_attr"):
            path, _, name = str(node.target).rpartition(".")
            owner = self.modules.get_submodule(path)
            if name != "weight" or not isinstance(owner, WindowLinear):
                continue
            # Functions that read the FC weight directly expect ``(O, C*kh*kw)`` in the source's
            # order.
            users = list(node.users)
            with self.graph.inserting_after(node):
                restored = self.graph.call_method("flatten", (node, 1))
            if owner.column_order is not None:
                with self.graph.inserting_after(node):
                    order = self.graph.get_attr(self._add_buffer("column_order", owner.fc_order()))
                with self.graph.inserting_after(restored):
                    restored = self.graph.call_function(torch.index_select, (restored, 1, order))
            for user in users:
                user.replace_input_with(node, restored)

    def _replace(self, name: str, module: nn.Module, key: Any) -> str:
        # The first version of a layer takes the source's name, by which checkpoints find its
        # parameters; it may do so only if no call of the unchanged layer stands in the graph.
        versions = self._rewritten.setdefault(name, [])
        for known, place in versions:
            if known == key:
                return place
        if not versions and not self._called_unchanged(name):
            place = name
        else:
            place = self._fresh(f"{name.replace('.', '_')}_call{len(versions) + 1}")
            self.aliases.add(place)
        parent, _, child = place.rpartition(".")
        original = self._originals[name]
        # Modes differ between layers of one model, a frozen batch norm for one.
        module.train(original.training)
        if place == name:  # forward may read more than the layer's own class has
            for kind in ("_parameters", "_buffers"):
                own, given = getattr(module, kind), getattr(original, kind)
                own.update({key: tensor for key, tensor in given.items() if key not in own})
        self.modules.get_submodule(parent).add_module(child, module)
        versions.append((key, place))
        return place

    def _called_unchanged(self, name: str) -> bool:
        return any(n.op == "call_module" and n.target == name for n in self.graph.nodes)

    def _fresh(self, name: str) -> str:
        """A path for a new module: the name, or the name with a number."""
        path, _, child = name.rpartition(".")
        taken = vars(self.modules.get_submodule(path))["_modules"]
        number = next(n for n in count() if (f"{child}_{n}" if n else child) not in taken)
        return f"{name}_{number}" if number else name

    def _add_buffer(self, name: str, value: Tensor) -> str:
        taken = vars(self.modules)["_buffers"]
        name = next(f"{name}_{n}" for n in count() if f"{name}_{n}" not in taken)
        value = value.to(device_of(self.modules))
        # not persistent: checkpoints have the source's keys
        self.modules.register_buffer(name, value, persistent=False)
        return name


def refuse_pooled(call: Call) -> NoReturn:
    """Refuse to combine what was pooled over all positions with the positions themselves.

    Raises:
        RefusedLayerError: always.
    """
    raise RefusedLayerError(
        f"{call} combines a map with a value pooled over all its positions, as "
        "squeeze-and-excitation does; every cell would depend on the whole image"
    )


def refuse_product(call: Call) -> NoReturn:
    """Refuse a matrix product of two values of the image, as of queries and keys.

    Raises:
        RefusedLayerError: always.
    """
    raise RefusedLayerError(
        f"{call} is refused: products of values (attention) mix positions, so a cell would change "
        "with the rest of the image"
    )
