"""Write a captured model as a graph of maps.

`Rewriter` walks the captured graph once. For each node it looks up the record of that layer or
function in `fcvgg.rewriting.rules`, whose rule asks a `fcvgg.rewriting.map_builder.MapBuilder` to
emit the operation on maps.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, fx, nn

from fcvgg.errors import (
    ConversionError,
    FcvggError,
    InputSizeError,
    RefusedLayerError,
    UnsupportedLayerError,
    one_line,
)
from fcvgg.geometry import IMAGE, Pair
from fcvgg.rewriting.aliasing import InPlaceChanges
from fcvgg.rewriting.averages import commuted, drop_unused
from fcvgg.rewriting.capture import BATCH, Captured, storages_of
from fcvgg.rewriting.emission import Call, refuse_pooled, refuse_product
from fcvgg.rewriting.layouts import Cells, Constant, Unusable, channels_along
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.program import Program, graph_module, same_grid
from fcvgg.rewriting.tracing import describe, operation_name

if TYPE_CHECKING:
    from fcvgg.rewriting.rules.registry import LayerKind


class Rewriter:
    """Rewrites the source's graph, one node at a time.

    Args:
        captured: the source's graph at its native size.
        build: puts the maps into a new graph.

    Attributes:
        crop: the extent ``(h, w)`` of the native image that the native scores depend on.
    """

    def __init__(self, captured: Captured, build: MapBuilder):
        self.build = build
        self.crop: Pair = captured.size
        self._captured = captured
        self._values: dict[fx.Node, Any] = {}
        self._in_place = InPlaceChanges(build.graph, self._values)
        self._dependent: dict[fx.Node, bool] = {}

    def run(self, kind_for: Callable[[fx.Node, nn.Module | None], LayerKind]) -> Program:
        """Rewrite every node by its rule and check that the branches' sizes agree."""
        outputs: Sequence[Cells] = ()
        needed = _needed(self._captured.graph)
        # A refusal says why the model cannot be converted; a missing rule may be a detail of the
        # same layer, as the reshapes around an attention are.
        self._refuse_first([n for n in needed if self._sees_images(n)], kind_for)
        for node in needed:
            if node.op == "placeholder":
                self._values[node] = self._image(node)
            elif node.op == "get_attr":
                self._values[node] = self.build.constant(node)
            elif node.op == "output":
                outputs = self._outputs(node)
            else:
                self._values[node] = self._rewrite(node, kind_for)
        return self._program(outputs)

    def _refuse_first(self, nodes: Iterable[fx.Node], kind_for: Callable[..., LayerKind]) -> None:
        """Name what breaks the equivalence before helpers of it that merely have no rule."""
        products: dict[fx.Node, fx.Node] = {}  # what is computed from a product of two values
        for node in nodes:
            if not node.op.startswith("call"):
                continue
            module = self.build.module_of(node)
            kind: LayerKind | None = None
            try:
                kind = kind_for(node, module)
            except RefusedLayerError:
                raise
            except UnsupportedLayerError:
                pass
            slides = kind is not None and (kind.slides is not None or kind.has_extent)
            if not slides and self._spreads_pooled(node):
                refuse_pooled(Call(node, module))
            first = next((products[n] for n in node.all_input_nodes if n in products), None)
            if self._multiplies_values(node):
                if first is not None:  # weights from queries and keys, then their values
                    refuse_product(Call(first, self.build.module_of(first)))
                first = node if _is_matrix(node) else None
            if first is not None:
                products[node] = first

    def _multiplies_values(self, node: fx.Node) -> bool:
        """Whether a node is a matrix product of two values of the images."""
        fed: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), lambda n: fed.append(n))
        name = operation_name(node).removeprefix("Tensor.")
        return name in ("matmul", "einsum") and sum(map(self._sees_images, fed)) > 1

    def _spreads_pooled(self, node: fx.Node) -> bool:
        """Whether a value of one position, pooled from a map, is spread over a map's positions."""
        made = node.meta.get("value")
        if not isinstance(made, Tensor) or made.ndim < 4:
            return False
        fed = [n.meta.get("value") for n in node.all_input_nodes if self._sees_images(n)]
        alike = [x for x in fed if isinstance(x, Tensor) and x.ndim == made.ndim]
        shapes = [x.shape for x in alike if x.numel() < made.numel()]
        over_last = made.shape[-2:].numel() > 1 and any(n[-2:] == (1, 1) for n in shapes)
        over_middle = made.ndim == 4 and made.shape[1:3].numel() > 1  # (N, H, W, C)
        return over_last or (over_middle and any(n[1:3] == (1, 1) and n[3] > 1 for n in shapes))

    def _rewrite(self, node: fx.Node, kind_for: Callable[..., LayerKind]) -> Any:
        module = self.build.module_of(node)
        call = Call(node, module)
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._operand)  # type: ignore
        # What is computed from parameters alone is the same for every image: no rule is needed, and
        # the graph computes it at every pass, so that gradients reach the parameters.
        if not self._sees_images(node) and "value" in node.meta:
            return Constant(self.build.emit(call, args, kwargs), node.meta["value"])
        kind = kind_for(node, module)
        rule = kind.rewrite
        assert rule is not None
        given: tuple[Any, ...] = (*args, *kwargs.values())
        for unusable in (argument for argument in given if isinstance(argument, Unusable)):
            raise UnsupportedLayerError(f"{call} takes {unusable.why}")
        # The trace went on after a failure only to name the layer that tells the native size.
        if "error" in node.meta:
            self._note_head(node)
            self._captured.require_success()
        changed = node.meta.get("changes")
        if changed is not None and isinstance(self._values.get(changed), Cells):
            # The copy may have moved the operands to another map, so they are looked up again.
            self._in_place.part_before(node, changed)
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._operand)  # type: ignore
        # settings of a module are for its rule; a repeated call must not pass them on
        call = replace(call, args=args, kwargs=kwargs)
        kwargs = {**_settings_for(rule, kind, module), **kwargs}
        _check_arguments(rule, call, args, kwargs)
        try:
            result = rule(self.build, call, *args, **kwargs)
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
        result = commuted(self.build, call, kind, result)
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
        features = _features_wanted(node, self._captured)
        if x is not None and features is not None:
            if (
                len(x.dims) == 2 and channels_along(x, -1) is None
            ):  # over positions: of each channel
                features *= x.extent[0]
            self.build.begin_head(x, features, describe(node))

    def _operand(self, argument: Any) -> Any:
        return self._values[argument] if isinstance(argument, fx.Node) else argument

    def _check_batch(self, call: Call, result: Any) -> None:
        """The batch must stay the batch, and a rule's layout must have the source's shape."""
        value = call.node.meta["value"]
        if isinstance(result, Cells) and tuple(value.shape) != result.shape_for(BATCH):
            raise UnsupportedLayerError(
                f"{call} gives shape {tuple(value.shape)} for {BATCH} images where "
                f"{result.shape_for(BATCH)} was expected: it mixes images or positions"
            )

    def _image(self, node: fx.Node) -> Cells:
        extent = tuple(node.meta["value"].shape[1:])
        return Cells(self.build.graph.placeholder("images"), IMAGE, extent)

    def _outputs(self, node: fx.Node) -> list[Cells]:
        form = self._captured.outputs
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
            if cells.batch:
                raise ConversionError(
                    f"the model's output{place} has the shape {cells.shape}; expected the images "
                    "first, (N, K)"
                )
            if self.build.positions and cells.average is None:
                self._refuse_positions()
            if len(cells.dims) < 2:  # flattened features, or those of one place: of every cell
                cells = self.build.gathered(cells, f"output{place}")
            if cells.positions > 1:
                why = "" if name else "the model has no fully connected or global-pool head: "
                whose = "the model's" if name else "its"
                remedy = "" if name else "; fcvgg.finetune gives features alone a new head"
                raise ConversionError(
                    f"{why}{whose} output{place} is {cells.shape}, a map; expected scores (N, K)"
                    f"{remedy}"
                )
            cells = self.build.whole_periods(cells)
            vectors.append(
                self.build.features(cells, replace(cells, moved=cells.layout.flatten()), 0)
            )
        nodes = tuple(v.node for v in vectors)
        self.build.graph.output(nodes[0] if form.is_tensor else nodes)
        return vectors

    def _refuse_positions(self) -> NoReturn:
        boundary = self.build.boundary
        found = "" if boundary is None else f", and {boundary.place} takes its window as a whole"
        raise ConversionError(
            f"head='position' must have a global average pool before its last layers{found}; use "
            "head='window', with a smaller output_stride or padding='same' for more cells"
        )

    def _program(self, outputs: Sequence[Cells]) -> Program:
        # One geometry stands for all outputs, so their cells must lie in the same places.
        first, *others = (self.build.steps.geometry_at(cells.step) for cells in outputs)
        if not all(same_grid(first, other) for other in others):
            raise ConversionError(
                "the model's outputs lie on different grids of cells; convert one head at a time"
            )
        self.build.cut_branches(first)
        height, width = (
            # padding that outweighs the image leaves no rows to tell apart
            n - unseen if n - unseen >= window else n
            for n, unseen, window in zip(self._captured.size, outputs[0].unseen, first.window)
        )
        self.crop = height, width
        average = outputs[0].average
        if any(cells.average != average for cells in outputs):
            average = None
        if self.build.positions:
            geometry = first.of_tiles()
        else:
            geometry = first.standing_for(self.crop, outputs[0].margin)
        if self.build.positions:
            drop_unused(self.build.graph)
        self.build.restore_weights()
        self.build.graph.lint()
        return Program(
            network=graph_module(self.build.modules, self.build.graph),
            geometry=geometry,
            activations=tuple(cells.meaning for cells in outputs),
            classes=tuple(cells.extent[0] for cells in outputs),
            in_channels=self._captured.channels,
            records=tuple(self.build.records),
            aliases=frozenset(self.build.aliases),
            outputs=self._captured.outputs,
            head="position" if self.build.positions else "window",
            average=average,
            finals=tuple(cells.final for cells in outputs),
        )


def _is_matrix(node: fx.Node) -> bool:
    """Whether a node gives a matrix for every image, as of queries and keys, and not a vector.

    Sums of values with weights, which pool the positions, leave a vector: what multiplies that
    again is no attention.
    """
    made = node.meta.get("value")
    return isinstance(made, Tensor) and made.ndim > 2 and min(made.shape[-2:]) > 1


def _settings_for(rule: Any, kind: LayerKind, module: nn.Module | None) -> Mapping[str, Any]:
    """What a rule gets of a module's settings: nothing where it names none of them.

    A user's rule may replace the package's and read the settings off ``call.module``.
    """
    settings = kind.settings_of(module)
    return settings if settings.keys() & inspect.signature(rule).parameters.keys() else {}


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
        if later.op == "call_function" and later.target is operator.matmul:
            weight = later.args[1]
            if isinstance(weight, fx.Node) and "value" in weight.meta:
                shape = weight.meta["value"].shape
                return int(shape[max(len(shape) - 2, 0)])
        if later.op == "call_function" and later.target is nn.functional.linear:
            weight = later.args[1] if len(later.args) > 1 else later.kwargs["weight"]
            if isinstance(weight, fx.Node) and "value" in weight.meta:
                return int(weight.meta["value"].shape[1])
    return None
