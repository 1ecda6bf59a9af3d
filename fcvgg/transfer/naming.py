"""One set of names for the layers of every VGG-kind network, read off its computation.

Convolutions are counted within blocks, which pools end: ``conv1_1``, ``bn1_1``, ``relu1_1``, ...,
``pool1``, ``conv2_1``. Fully connected layers follow as ``fc6``, ``fc7``, ``fc8`` however many
blocks there are, since 6 is what the field calls the first (Caffe's names for VGG). Keras's names
(``block1_conv1``, ``block1_pool``, ``fc1``, ``predictions``) stand for the same layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import overload

from torch import Tensor, fx, nn

from fcvgg.conversion import unwrapped
from fcvgg.errors import ArgumentError, ConversionError, InputSizeError
from fcvgg.geometry import Pair
from fcvgg.network import FullyConvolutional
from fcvgg.rewriting.capture import capture
from fcvgg.rewriting.native_size import infer_input_size
from fcvgg.rewriting.rules import is_known
from fcvgg.rewriting.rules.registry import role_of
from fcvgg.rewriting.tracing import operation_name
from fcvgg.support.tables import text_table

FIRST_FC = 6
"""The number of the first fully connected layer; VGG has five blocks before it."""

_TRIAL_SIZES = (224, 32, 64, 96, 128, 160, 192, 256, 299, 320, 384, 448, 512)
"""Sizes at which a model without a native size is traced; one that asserts its size takes one."""

_GIVEN: ContextVar[Pair | None] = ContextVar("size", default=None)


@contextmanager
def traced_at(size: Pair) -> Iterator[None]:
    """Within it, the names of a model whose native size cannot be inferred are read at a size."""
    token = _GIVEN.set(size)
    try:
        yield
    finally:
        _GIVEN.reset(token)


@dataclass(frozen=True)
class NamedLayer:
    """One layer.

    Attributes:
        name: its canonical name.
        keras: its name in Keras's VGG, or ``""`` where Keras has no such layer.
        path: the module's path in the model; ``""`` for a function that `forward` calls.
        kind: its class or function.
        role: what it does: ``"conv"``, ``"bn"``, ``"relu"``, ``"activation"`` (another one),
            ``"pool"``, ``"fc"``, ``"drop"``, ``"avgpool"``, ``"maxpool"``, ``"flatten"``,
            ``"prob"``, or ``""``.
        block: which block of convolutions it is in, from 1; 0 in the head.
        node: its call in the traced graph.
    """

    name: str
    keras: str
    path: str
    kind: str
    role: str
    block: int
    node: fx.Node


class LayerNames(Sequence[NamedLayer]):
    """The layers of a model by canonical name, in order of computation; printing shows a table.

    Attributes:
        size: the input size at which the model was traced.
        native: whether that is its native size.
    """

    def __init__(
        self,
        layers: Iterable[NamedLayer],
        root: nn.Module,
        graph: fx.Graph,
        size: Pair,
        native: bool,
    ):
        self.layers = tuple(layers)
        self.root = root
        self.graph = graph
        self.size = size
        self.native = native

    @overload
    def __getitem__(self, key: int | str) -> NamedLayer: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[NamedLayer]: ...
    def __getitem__(self, key: int | str | slice) -> NamedLayer | Sequence[NamedLayer]:
        return self.find(key) if isinstance(key, str) else self.layers[key]

    def find(self, name: str) -> NamedLayer:
        """The layer of a canonical or Keras name, or of a module's path.

        Raises:
            ArgumentError: if there is none.
        """
        for layer in self.layers:
            if name and name in (layer.name, layer.keras, layer.path):
                return layer
        for layer in self.layers:  # functions were named as in the graph before they had roles
            if not layer.path and name == layer.node.name:
                return layer
        known = [n for layer in self.layers for n in (layer.name, layer.keras) if n]
        near = difflib.get_close_matches(str(name), known, 3)
        hint = f"near: {', '.join(near)}" if near else f"its layers are {', '.join(self.names)}"
        raise ArgumentError(
            f"the model has no layer {name!r} ({hint}); fcvgg.layer_names(model) lists them all"
        )

    def end_of(self, name: str) -> NamedLayer:
        """The layer whose output a name stands for.

        It is the layer itself, but for Keras's convolutions and fully connected layers, which hold
        their activation.
        """
        layer = self.find(name)
        if name != layer.keras or layer.role not in ("conv", "fc"):
            return layer
        for follower in self.layers[self.layers.index(layer) + 1 :]:
            if follower.role not in ("bn", "relu", "activation"):
                break
            layer = follower
        return layer

    def upto(self, name: str) -> tuple[NamedLayer, ...]:
        """All layers from the first to the named one."""
        return self.layers[: self.layers.index(self.find(name)) + 1]

    def parameters_of(self, layer: NamedLayer) -> tuple[nn.Parameter, ...]:
        """What a layer learns: its module's parameters, or those that its function is given."""
        if layer.path:
            return tuple(self.root.get_submodule(layer.path).parameters())
        constants = _constants(self.graph) if layer.role else set()  # arithmetic is not a layer
        waiting = [n for n in layer.node.all_input_nodes if n in constants]
        found: list[nn.Parameter] = []
        for node in waiting:  # which grows
            waiting.extend(node.all_input_nodes)
            if node.op == "get_attr":
                place, _, name = str(node.target).rpartition(".")
                value = getattr(self.root.get_submodule(place), name)
                found += [value] if isinstance(value, nn.Parameter) else []
        return tuple(found)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[NamedLayer]:
        return iter(self.layers)

    def __str__(self) -> str:
        rows = [("layer", "Keras", "path", "kind")]
        rows += [(x.name, x.keras, x.path, x.kind) for x in self.layers]
        return text_table(rows, left=4)


def layer_names(model: nn.Module) -> LayerNames:
    """The canonical names of a model's layers.

    Args:
        model: a classifier, its features alone, or a converted network.

    Raises:
        ConversionError: if its computation cannot be traced.
    """
    if isinstance(model, FullyConvolutional):
        graph, root = model.network.graph, model.network
        return LayerNames(_named(graph, root), root, graph, model.input_size, True)
    model = unwrapped(model)
    try:
        size, native = infer_input_size(model), True
        graph = capture(model, size, is_known).graph
    except ConversionError:
        (size, graph), native = _first_trace(model), False
    return LayerNames(_named(graph, model), model, graph, size, native)


def _first_trace(model: nn.Module) -> tuple[Pair, fx.Graph]:
    """The graph of a model at the first size that it does not refuse."""
    given = _GIVEN.get()
    refused: InputSizeError | None = None
    for size in [*([given] if given else []), *((n, n) for n in _TRIAL_SIZES)]:
        try:
            return size, capture(model, size, is_known).graph
        except InputSizeError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _named(graph: fx.Graph, root: nn.Module) -> list[NamedLayer]:
    numbering = _Numbering()
    layers = []
    constants = _constants(graph)
    for node in graph.nodes:
        if not node.op.startswith("call") or node.target == "training_flag" or node in constants:
            continue
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        role = _role_of(node, module)
        if role == "conv" and _takes_whole_map(node, module, numbering.in_head):
            role = "fc"
        path = str(node.target) if module is not None else ""
        kind = type(module).__name__ if module is not None else operation_name(node)
        name = numbering.name_for(role, path or node.name, kind)
        keras = numbering.keras_for(role)
        layers.append(NamedLayer(name, keras, path, kind, role, numbering.at, node))
    fc = [i for i, layer in enumerate(layers) if layer.role == "fc"]
    if fc:
        layers[fc[-1]] = replace(layers[fc[-1]], keras="predictions")
    return layers


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """What is computed from parameters alone, such as a weight's reshape, which is not a layer."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        fed = node.all_input_nodes
        if node.op == "get_attr" or (fed and found.issuperset(fed)):
            found.add(node)
    return found


def _role_of(node: fx.Node, module: nn.Module | None) -> str:
    if isinstance(module, nn.AvgPool2d) and module.stride in (1, (1, 1)):
        return "avgpool"  # a converted global pool; it ends no block
    return role_of(node.target if module is None else type(module))


def _takes_whole_map(node: fx.Node, module: nn.Module | None, in_head: bool) -> bool:
    """Whether a convolution is a fully connected layer written as one, as timm does."""
    fed = node.all_input_nodes[0].meta.get("value") if node.all_input_nodes else None
    if not isinstance(module, nn.Conv2d) or not isinstance(fed, Tensor) or fed.ndim != 4:
        return False
    whole = tuple(fed.shape[2:]) == module.kernel_size and module.padding in ((0, 0), "valid")
    return whole and (in_head or module.kernel_size != (1, 1))


class _Numbering:
    """Counts blocks, convolutions and fully connected layers as they come."""

    def __init__(self) -> None:
        self.block = 1
        self.convolution = 0
        self.fc = FIRST_FC - 1
        self.at = 1
        self.taken: dict[str, int] = {}

    @property
    def in_head(self) -> bool:
        return self.fc >= FIRST_FC

    def name_for(self, role: str, place: str, kind: str) -> str:
        # A pool ends its block, and the first fully connected layer ends the features: what
        # follows each is numbered after it.
        self.at = 0 if self.in_head else self.block
        if role == "conv" and not self.in_head:
            self.convolution += 1
            return self._free(f"conv{self.block}_{self.convolution}")
        if role == "pool" and not self.in_head:
            self.block, self.convolution = self.block + 1, 0
            return self._free(f"pool{self.block - 1}")
        if role == "fc":
            self.fc += 1
            self.at = 0
            return self._free(f"fc{self.fc}")
        if role in ("bn", "relu", "drop", "activation"):
            number = str(self.fc) if self.in_head else f"{self.block}_{self.convolution}"
            plain = kind.removeprefix("Tensor.").strip("_").lower()
            return self._free(f"{plain if role == 'activation' else role}{number}")
        if role in ("avgpool", "maxpool", "flatten", "prob"):
            self.at = 0
        return self._free(role or place)

    def keras_for(self, role: str) -> str:
        if role == "fc":
            return f"fc{self.fc - FIRST_FC + 1}"
        if self.in_head:
            return ""
        if role == "conv":
            return f"block{self.block}_conv{self.convolution}"
        return f"block{self.block - 1}_pool" if role == "pool" else ""

    def _free(self, name: str) -> str:
        self.taken[name] = self.taken.get(name, 0) + 1
        return name if self.taken[name] == 1 else f"{name}_{self.taken[name]}"
