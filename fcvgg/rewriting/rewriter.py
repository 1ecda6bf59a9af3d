"""Write a captured model anew as a graph of maps.

`Rewriter` walks the captured graph once. For each node it looks up the rule of that layer or
function in `fcvgg.rewriting.rules`, which asks the rewriter to emit the operation on maps; the
rewriter keeps the new graph, the modules that it calls, the geometry step of every map and a record
of every layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fcvgg.errors import (
    CaptureError,
    ConversionError,
    FcvggError,
    InputSizeError,
    RefusedLayerError,
    UnsupportedLayerError,
    one_line,
)
from fcvgg.geometry import IMAGE, Geometry, Pair, Window
from fcvgg.rewriting.aliasing import InPlaceChanges
from fcvgg.rewriting.capture import BATCH, Captured, storages_of
from fcvgg.rewriting.layouts import (
    Cells,
    Constant,
    Unusable,
    channels_along,
    chosen_channels,
    with_channels,
)
from fcvgg.rewriting.marks import FeatureSize, FollowsTraining
from fcvgg.rewriting.modules import TrainingFlag, TrainingOnly, WindowLinear, cut_to
from fcvgg.rewriting.program import LayerRecord, Program, Steps, Windows, graph_module, same_grid
from fcvgg.rewriting.tracing import describe, operation_name
from fcvgg.support.module_state import device_of

if TYPE_CHECKING:
    from fcvgg.rewriting.rules.registry import LayerKind


@dataclass(frozen=True)
class Boundary:
    """Where the head begins: the last map before it and the extent that the head asks for.

    `wants` is ``(h, w)`` where a pool fixes it, a number of features where a fully connected layer
    does, and None where a global pool takes any size.
    """

    cells: Cells
    wants: Pair | int | None
    place: str


@dataclass(frozen=True)
class WindowWeight:
    """An FC weight ``(O, C*kh*kw)`` as the parameter ``(O, C, kh, kw)`` of a window.

    `order[j]` is the window's element that column j multiplies; `column_order` is None where that
    is j, see `WindowLinear`.
    """

    parameter: nn.Parameter
    order: Tensor
    column_order: Tensor | None


class Rewriter:
    """Builds the graph of maps, one source node at a time.

    Args:
        captured: the source's graph at its native size.
        modules: the tree of modules that the new graph calls, and that holds the parameters. It
            belongs to the rewriter, which replaces layers of it.
        output_stride: input pixels between cells that strides beyond are turned into dilation for.
        same: pad the head's first window so that the map keeps the size of the features.
    """

    def __init__(
        self,
        captured: Captured,
        modules: nn.Module,
        output_stride: int | None = None,
        same: bool = False,
    ):
        self.captured = captured
        self.modules = modules
        for name in captured.training_only:
            modules.set_submodule(name, TrainingOnly(modules.get_submodule(name)))
        self.graph = fx.Graph()
        self.boundary: Boundary | None = None
        self.records: list[LayerRecord] = []
        self._output_stride = output_stride
        self._same = same
        self.steps = Steps()
        self.kernels: set[tuple[str, Pair]] = set()
        self._window_weights: dict[nn.Parameter, WindowWeight] = {}
        self._values: dict[fx.Node, Any] = {}
        self._in_place = InPlaceChanges(self.graph, self._values)
        self._rewritten: dict[str, list[tuple[Any, str]]] = {}
        self._aliases: set[str] = set()
        self._originals: dict[str, nn.Module] = {}
        self._flags: dict[str, fx.Node] = {}
        self._dependent: dict[fx.Node, bool] = {}
        self._joins: dict[int, tuple[fx.Node, tuple[fx.Node, ...]]] = {}

    # -- the walk ---------------------------------------------------------------------------------

    def run(self, kind_for: Callable[[fx.Node, nn.Module | None], LayerKind]) -> Program:
        """Rewrite every node by its rule and check that the branches' sizes agree."""
        outputs: Sequence[Cells] = ()
        needed = _needed(self.captured.graph)
        self._refuse_first([n for n in needed if self._sees_images(n)], kind_for)
        for node in needed:
            if node.op == "placeholder":
                self._values[node] = self._image(node)
            elif node.op == "get_attr":
                self._values[node] = self._constant(node)
            elif node.op == "output":
                outputs = self._outputs(node)
            else:
                self._values[node] = self._rewrite(node, kind_for)
        return self._program(outputs)

    def _refuse_first(self, nodes: Iterable[fx.Node], kind_for: Callable[..., LayerKind]) -> None:
        """Name what breaks the equivalence before helpers of it that merely have no rule."""
        for node in nodes:
            if node.op.startswith("call"):
                try:
                    kind_for(node, self.module_of(node))
                except RefusedLayerError:
                    raise
                except UnsupportedLayerError:
                    continue

    def _rewrite(self, node: fx.Node, kind_for: Callable[..., LayerKind]) -> Any:
        module = self.module_of(node)
        call = Call(node, module)
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._operand)  # type: ignore
        if not self._sees_images(node) and "value" in node.meta:
            return Constant(self.emit(call, args, kwargs), node.meta["value"])
        kind = kind_for(node, module)
        rule, settings = kind.rewrite, kind.settings_of(module)
        assert rule is not None
        given: tuple[Any, ...] = (*args, *kwargs.values())
        for unusable in (argument for argument in given if isinstance(argument, Unusable)):
            raise UnsupportedLayerError(f"{call} takes {unusable.why}")
        if "error" in node.meta:
            self._note_head(node)
            self.captured.require_success()
        changed = node.meta.get("changes")
        if changed is not None and isinstance(self._values.get(changed), Cells):
            self._in_place.part_before(node, changed)
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._operand)  # type: ignore
        kwargs = {**settings, **kwargs}
        _check_arguments(rule, call, args, kwargs)
        try:
            result = rule(self, call, *args, **kwargs)
        except InputSizeError:
            self._note_head(node)
            raise
        except FcvggError:
            raise
        except Exception as error:
            raise UnsupportedLayerError(
                f"{call} cannot be written for maps: {one_line(error)}; "
                "see fcvgg.rewriting.rules for what is supported and how to register a rule"
            ) from error
        self._check_batch(call, result)
        if changed is not None and isinstance(result, Cells):
            self._in_place.follow(node, changed, result)
        return result

    def _sees_images(self, node: fx.Node) -> bool:
        """Whether a value is computed from the images, and not from parameters alone."""
        if node not in self._dependent:
            fed = any(self._sees_images(n) for n in node.all_input_nodes)
            self._dependent[node] = node.op == "placeholder" or fed
        return self._dependent[node]

    def _note_head(self, node: fx.Node) -> None:
        """A node that fails at this size: the next fully connected layer tells what is missing."""
        x = next(
            (v for v in map(self._values.get, node.all_input_nodes) if isinstance(v, Cells)), None
        )
        features = _features_wanted(node, self.captured)
        if self.boundary is None and x is not None and features is not None:
            self.boundary = Boundary(x, features, describe(node))

    def _operand(self, argument: Any) -> Any:
        return self._values[argument] if isinstance(argument, fx.Node) else argument

    def _check_batch(self, call: Call, result: Any) -> None:
        """The batch must stay the batch, and a rule's layout must have the source's shape."""
        value = call.node.meta["value"]
        if isinstance(result, Cells) and tuple(value.shape) != (BATCH, *result.dims):
            raise UnsupportedLayerError(
                f"{call} gives shape {tuple(value.shape)} for {BATCH} images where "
                f"{(BATCH, *result.dims)} was expected: it mixes images or positions"
            )

    def _image(self, node: fx.Node) -> Cells:
        extent = tuple(node.meta["value"].shape[1:])
        return Cells(self.graph.placeholder("images"), IMAGE, extent)

    def _constant(self, node: fx.Node) -> Constant:
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
        value = self._evaluated(constant.node)
        if not isinstance(value, Tensor) or value.is_meta or value.is_floating_point():
            raise UnsupportedLayerError(
                f"{call} takes elements by an index that is no tensor of integers or booleans; "
                "expected a slice, a list, or a buffer with data"
            )
        return value.detach().cpu()

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

    def _outputs(self, node: fx.Node) -> list[Cells]:
        form = self.captured.outputs
        returned: Any = (node.args[0],) if form.is_tensor else node.args[0]
        maps = fx.node.map_aggregate(returned, self._operand)
        vectors = []
        for name, cells in zip(form.names(), maps):  # type: ignore[arg-type]
            place = f" {name}" if name else ""
            if not isinstance(cells, Cells):
                raise ConversionError(
                    f"the model's output{place} is {type(cells).__name__.lower()}, not computed "
                    "from the images; wrap the model so that it returns scores (N, K)"
                )
            if cells.positions > 1:
                raise ConversionError(
                    f"the model has no fully connected or global-pool head: its output{place} is "
                    f"{cells.shape}, a map; expected scores (N, K)"
                )
            vectors.append(self.features(cells, replace(cells, moved=cells.layout.flatten()), 0))
        nodes = tuple(v.node for v in vectors)
        self.graph.output(nodes[0] if form.is_tensor else nodes)
        return vectors

    def _program(self, outputs: Sequence[Cells]) -> Program:
        first, *others = (self.steps.geometry_at(cells.step) for cells in outputs)
        if not all(same_grid(first, other) for other in others):
            raise ConversionError(
                "the model's outputs lie on different grids of cells; convert one head at a time"
            )
        self._cut_branches(first)
        height, width = (
            # padding that outweighs the image leaves no rows to tell apart
            n - unseen if n - unseen >= window else n
            for n, unseen, window in zip(self.captured.size, outputs[0].unseen, first.window)
        )
        geometry = first.standing_for((height, width), outputs[0].margin)
        self._restore_weights()
        self.graph.lint()
        return Program(
            network=graph_module(self.modules, self.graph),
            geometry=geometry,
            activations=tuple(cells.meaning for cells in outputs),
            classes=tuple(cells.extent[0] for cells in outputs),
            in_channels=self.captured.channels,
            records=tuple(self.records),
            aliases=frozenset(self._aliases),
            outputs=self.captured.outputs,
        )

    def join(self, cells: Sequence[Cells], call: Call, node: fx.Node) -> int:
        """The step of an operation over several maps, whose cells must lie on one grid.

        Args:
            node: the operation in the new graph.
        """
        if len({c.margin for c in cells}) > 1:
            raise ConversionError(
                f"{call} joins branches that padding='same' pads differently; use padding='valid'"
            )
        step = self.steps.join((c.step for c in cells), str(call))
        if len({c.step for c in cells}) > 1:  # else the step is that of the maps, not of this join
            self._joins[step] = node, tuple(c.node for c in cells)
        return step

    def _cut_branches(self, geometry: Geometry) -> None:
        """Cut branches to one size before they join, where some input gives them different ones.

        A pool that drops the odd row and a convolution that pads it are alike at the native size.
        Both count from the first row, so what the longer has in addition lies at its end.
        """
        for step in sorted(self.steps.differing_joins(geometry)):
            node, branches = self._joins[step]
            with self.graph.inserting_before(node):
                for branch in dict.fromkeys(branches):
                    others = tuple(other for other in branches if other is not branch)
                    cut = self.graph.call_function(cut_to, (branch, *others))
                    node.replace_input_with(branch, cut)

    # -- emitting ---------------------------------------------------------------------------------

    def emit(self, call: Call, args: Any, kwargs: Any, target: Any = None) -> fx.Node:
        """The source's own call on maps: Cells and Constants in the arguments become nodes."""
        args, kwargs = self._nodes(call, (args, kwargs))
        name = call.node.target if target is None else target
        return self.graph.create_node(call.node.op, name, tuple(args), kwargs, call.node.name)

    def _nodes(self, call: Call, arguments: Any) -> Any:
        def node_of(argument: Any) -> Any:
            if isinstance(argument, (Cells, Constant)):
                return argument.node
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
            self._flags[call.owner] = self.graph.call_module(name)
        return self._flags[call.owner]

    def owner_of(self, call: Call) -> nn.Module:
        """The module whose forward makes a call."""
        return self.modules.get_submodule(call.owner)

    def emit_function(
        self, call: Call, function: Callable[..., Any], *args: Any, **kw: Any
    ) -> fx.Node:
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

    def window_weight(self, weight: nn.Parameter, kernel: Pair, order: Tensor) -> WindowWeight:
        """The parameter that an FC weight becomes: a view, or a copy in another order of columns.

        `order[j]` is the window's element that column j of the FC weight multiplies. One weight
        becomes one parameter, in the shape and order of the first window that it is asked for, so
        that its gradient is whole.
        """
        if weight not in self._window_weights:
            columns = weight.detach()
            column_order = None
            if not torch.equal(order, torch.arange(len(order))):
                column_order = order.argsort().to(columns.device)
                columns = columns[:, column_order]
            shaped = nn.Parameter(columns.view(len(columns), -1, *kernel), weight.requires_grad)
            self._window_weights[weight] = WindowWeight(shaped, order, column_order)
        return self._window_weights[weight]

    def hold(self, call: Call, module: nn.Module) -> None:
        """Put a layer in the source layer's place without a call of it, for its parameters."""
        if str(call.node.target) not in self._rewritten:
            self._replace(str(call.node.target), module, None)

    def _restore_weights(self) -> None:
        """Give the graph FC weights in the source's shape where it reads one that was reshaped."""
        for node in self.graph.find_nodes(op="get_attr"):
            path, _, name = str(node.target).rpartition(".")
            owner = self.modules.get_submodule(path)
            if name != "weight" or not isinstance(owner, WindowLinear):
                continue
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
        versions = self._rewritten.setdefault(name, [])
        for known, place in versions:
            if known == key:
                return place
        if not versions and not self._called_unchanged(name):
            place = name
        else:
            place = self._fresh(f"{name.replace('.', '_')}_call{len(versions) + 1}")
            self._aliases.add(place)
        parent, _, child = place.rpartition(".")
        original = self._originals[name]
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

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The source's layer at a node, as it was before any rewriting."""
        if node.op != "call_module":
            return None
        name = str(node.target)
        if name not in self._originals:
            self._originals[name] = self.modules.get_submodule(name)
        return self._originals[name]

    def _fresh(self, name: str) -> str:
        """A path for a new module: the name, or the name with a number."""
        path, _, child = name.rpartition(".")
        taken = vars(self.modules.get_submodule(path))["_modules"]
        number = next(n for n in count() if (f"{child}_{n}" if n else child) not in taken)
        return f"{name}_{number}" if number else name

    # -- layouts ----------------------------------------------------------------------------------

    def as_map(self, cells: Any, call: Call) -> Cells:
        """The value as a map ``(C, H, W)``; a selection of channels is emitted where needed."""
        cells = self._expect_cells(cells, call)
        if cells.is_map:
            return cells
        if len(cells.dims) == 3:
            settled = self.features(call, cells, 0)
            if settled.is_map:
                return settled
        raise UnsupportedLayerError(
            f"{call} needs a map (N, C, H, W), but got a value of shape "
            f"{cells.shape} whose elements were moved; "
            "only element-wise layers and the fully connected layer may follow such a reshape"
        )

    def features(self, call: Any, cells: Any, axis: int) -> Cells:
        """The value with all its channels, in order, along one axis of the layout."""
        cells = self._expect_cells(cells, call)
        if not -len(cells.dims) <= axis < len(cells.dims):
            raise UnsupportedLayerError(f"{call} works on axis {axis}, which mixes images")
        channels = channels_along(cells, axis)
        if channels is None:
            raise UnsupportedLayerError(
                f"{call} mixes positions: along its axis the value {cells.shape} "
                "does not run over channels; a cell of the map would not stay a cell"
            )
        if torch.equal(channels, torch.arange(cells.extent[0])):
            return cells
        return with_channels(cells, axis, len(channels), node=self._chosen(cells.node, channels))

    def whole(self, cells: Cells) -> Cells:
        """The value on a map of the channels that it holds, where it holds them at all positions.

        A value of other elements is returned as it is.
        """
        chosen = None if cells.fills_window else chosen_channels(cells)
        if chosen is None:
            return cells
        channels, layout = chosen
        extent = (len(channels), *cells.extent[1:])
        node = self._chosen(cells.node, channels)
        return replace(cells, node=node, extent=extent, moved=layout)

    def _chosen(self, node: fx.Node, channels: Tensor) -> fx.Node:
        """Emit the choice of some channels: a slice where it is one."""
        first, count = int(channels[0]), len(channels)
        if torch.equal(channels, torch.arange(first, first + count)):
            return self.graph.call_method("narrow", (node, 1, first, count))
        return self.select(node, channels)

    def select(self, node: fx.Node, channels: Tensor) -> fx.Node:
        """Emit the choice of some channels, in any order, along dimension 1."""
        name = self._add_buffer("channel_order", channels)
        return self.graph.call_function(torch.index_select, (node, 1, self.graph.get_attr(name)))

    def _add_buffer(self, name: str, value: Tensor) -> str:
        taken = vars(self.modules)["_buffers"]
        name = next(f"{name}_{n}" for n in count() if f"{name}_{n}" not in taken)
        value = value.to(device_of(self.modules))
        self.modules.register_buffer(name, value, persistent=False)
        return name

    def _expect_cells(self, value: Any, call: Any) -> Cells:
        if isinstance(value, Cells):
            return value
        raise UnsupportedLayerError(
            f"{call} takes {type(value).__name__.lower()} where a value computed from the image "
            "is expected"
        )

    def begin_head(self, cells: Cells, wants: Pair | int | None, call: Call) -> None:
        """Note the first layer that asks for a certain size of the features."""
        if self.boundary is None:
            self.boundary = Boundary(cells, wants, str(call))

    # -- layers -----------------------------------------------------------------------------------

    def record(
        self, call: Call, kind: str, windows: Windows, result: Cells, multiply_adds: int = 0
    ) -> None:
        self.records.append(
            LayerRecord(
                name=call.name,
                kind=kind,
                windows=windows,
                step=result.step,
                channels=result.extent[0],
                parameters=call.parameters(),
                multiply_adds_per_position=multiply_adds,
            )
        )

    def window(
        self,
        call: Call,
        x: Cells,
        windows: Windows,
        emit: Callable[[Windows, bool], fx.Node],
        multiply_adds: int = 0,
        kind: str | None = None,
        pools: str | None = None,
    ) -> Cells:
        """A layer that slides a kernel: convolution or pool.

        `emit` receives the windows as they must be on this map, and whether they differ from the
        source's because strides before it, or its own, became dilation. `pools` is how a pool
        makes one value of many, ``"avg"``, ``"max"`` or ``"other"``; other layers make new scores.
        """
        dense, dilation = self._densified(call, x, windows)
        self.kernels.add((kind or call.kind, (windows[0].kernel, windows[1].kernel)))
        node = emit(dense, dense != windows)
        step = self.steps.add(dense, (x.step,), str(call))
        extent = tuple(call.node.meta["value"].shape[1:])
        unseen = self._unseen(x, windows, extent[1:])
        result = Cells(node, step, extent, dilation=dilation, margin=x.margin, unseen=unseen)
        if pools is not None:
            result = result.pooled_from(x, pools)
        self.record(call, kind or call.kind, dense, result, multiply_adds)
        return result

    def _unseen(self, x: Cells, windows: Windows, outputs: Sequence[int]) -> Pair:
        """Pixels at the end of the native image that are left out once a layer has run.

        Where strides do not divide, a layer leaves out what its last window does not reach; of
        that, padding is no loss.
        """
        unseen = []
        for axis, (window, size, cells) in enumerate(zip(windows, x.extent[1:], outputs)):
            rest = size + window.before - window.span - (cells - 1) * window.stride
            pixels = self.steps.stride_at(x.step)[axis] * x.dilation[axis]
            unseen.append(x.unseen[axis] + max(rest, 0) * pixels)
        return unseen[0], unseen[1]

    def _densified(self, call: Call, x: Cells, windows: Windows) -> tuple[Windows, Pair]:
        """The windows on this map, with strides beyond the output stride taken out."""
        dense, dilations = [], []
        for window, spread, stride in zip(windows, x.dilation, self.steps.stride_at(x.step)):
            allowed = window.stride
            if self._output_stride is not None:
                allowed = gcd(window.stride, max(self._output_stride // stride, 1))
            if window.ceil_mode and (spread > 1 or allowed != window.stride):
                raise ConversionError(
                    f"output_stride={self._output_stride} cannot be exact at {call}: ceil_mode "
                    "rounds the size up, which a dilated pool does not; use a larger output_stride"
                )
            dense.append(
                replace(
                    window,
                    stride=allowed,
                    dilation=window.dilation * spread,
                    before=window.before * spread,
                    after=window.after * spread,
                )
            )
            dilations.append(spread * (window.stride // allowed))
        return (dense[0], dense[1]), (dilations[0], dilations[1])

    def head_window(self, call: Call, x: Cells, extent: Pair) -> tuple[Cells, Windows]:
        """The window of the head over a map, padded first if the map is to keep its size.

        Padding is done once, for all positions that the head takes, so that a cell at the border is
        the head on features with zeros around them.
        """
        kernel = (
            Window(extent[0], dilation=x.dilation[0]),
            Window(extent[1], dilation=x.dilation[1]),
        )
        if not self._same or x.margin is not None or x.positions == 1:
            return x, kernel
        more = [(n - 1) * d for n, d in zip(x.extent[1:], x.dilation)]
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in more)
        stride = self.steps.stride_at(x.step)
        margin = (top * stride[0], left * stride[1])
        node = self.graph.call_function(
            torch.nn.functional.pad, (x.node, (left, right, top, bottom))
        )
        windows = Window(before=top, after=bottom), Window(before=left, after=right)
        step = self.steps.add(windows, (x.step,), str(call))
        return replace(x, node=node, step=step, margin=margin), kernel


@dataclass(frozen=True)
class Call:
    """One call in the source: its node, and its module as the converted network holds it."""

    node: fx.Node
    module: nn.Module | None

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


def _check_arguments(rule: Any, call: Call, args: Any, kwargs: Any) -> None:
    try:
        inspect.signature(rule).bind(None, call, *args, **kwargs)
    except TypeError as error:
        raise UnsupportedLayerError(
            f"{call} is called with arguments that its rule does not know: {error}"
        ) from error


def _needed(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the outputs depend on; others, like unused branches, need no rule.

    A layer that works in place is needed with what it changes, also if its result is not used.
    A graph that broke off has no output: all of its nodes may matter.
    """
    ends = [node for node in graph.nodes if node.op == "output"]
    if not ends:
        return list(graph.nodes)
    changing = [
        (node, storages_of(node.meta["value"]))
        for node in graph.nodes
        if node.meta.get("changes") is not None
    ]
    needed: set[fx.Node] = set()
    while ends:
        node = ends.pop()
        if node not in needed:
            needed.add(node)
            ends.extend(node.all_input_nodes)
            memory = storages_of(node.meta.get("value"))
            ends.extend(n for n, changed in changing if not memory.isdisjoint(changed))
    return [node for node in graph.nodes if node in needed]


def _features_wanted(node: fx.Node, captured: Captured) -> int | None:
    """The input features of the first fully connected layer at or after a node."""
    nodes = list(captured.graph.nodes)
    for later in nodes[nodes.index(node) :]:
        if later.op == "call_module":
            module = captured.root.get_submodule(str(later.target))
            if isinstance(module, nn.Linear):
                return module.in_features
            if hasattr(module, "kernel_size"):  # the trunk goes on: its features are not known
                return None
        if later.op == "call_function" and later.target is nn.functional.linear:
            weight = later.args[1] if len(later.args) > 1 else later.kwargs["weight"]
            if isinstance(weight, fx.Node) and "value" in weight.meta:
                return int(weight.meta["value"].shape[1])
    return None
