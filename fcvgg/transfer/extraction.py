"""The layers of a network up to a named one, as a network of its own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from fcvgg.conversion import convert
from fcvgg.errors import ConversionError, UnsupportedLayerError
from fcvgg.geometry import Geometry, Pair
from fcvgg.network import FullyConvolutional
from fcvgg.rewriting.capture import BATCH, capture
from fcvgg.rewriting.rules import is_known
from fcvgg.rewriting.tracing import describe, operation_name
from fcvgg.transfer.naming import LayerNames, NamedLayer, layer_names
from fcvgg.transfer.operations import Operation

_TRIAL_SIZES = (32, 64, 128, 224, 512, 1024)


class Features(nn.Sequential):
    """Layers in order, under their canonical names: ``features.conv1_1``, ``features[:4]``.

    ``(N, C, H, W) -> (N, K, h, w)`` for any size from the geometry's window on; ``(N, K)`` from a
    flatten on. Made by `features_upto`.
    """

    @property
    def geometry(self) -> Geometry:
        """Where the last layer's positions lie on the image.

        Raises:
            ConversionError: if the layers take one input size only and end in no map.
        """
        return _geometry(self)

    @property
    def out_channels(self) -> int:
        """Channels of the last layer's output."""
        graph = capture(self, _running_size(self), is_known).graph
        last = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
        assert isinstance(last, fx.Node)
        return int(last.meta["value"].shape[1])

    def maps(self, images: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        """The outputs of several of the layers, by name, in one run."""
        wanted = set(layers)
        found: dict[str, Tensor] = {}
        x = images
        for name, module in self.named_children():
            x = module(x)
            if name in wanted:
                # a copy, since activations after it may work in place
                found[name] = x.clone()
        return found


def features_upto(model: nn.Module, layer: str) -> Features:
    """The network up to and including a layer, for input of any size, with weights of its own.

    Anything can be stacked on it: ``nn.Sequential(fcvgg.features_upto(model, "pool4"), head)``.
    The source is not changed.

    Args:
        model: a classifier, its features alone, or a converted network; with a converted one the
            fully connected layers take any size too.
        layer: a canonical name (`fcvgg.layer_names`), a Keras name or a module's path. A
            convolution ends before its activation (``"conv3_1"``, then ``"relu3_1"``); Keras's
            ``"block3_conv1"`` holds the activation, as in Keras.

    Raises:
        ArgumentError: if there is no such layer.
        UnsupportedLayerError: if the layers up to it are not a chain, each fed by the one before.
    """
    names = layer_names(model)
    end = names.end_of(layer)
    memo: dict[int, Any] = {}
    children = OrderedDict(
        (x.name.replace(".", "_"), _as_module(x, names, memo)) for x in chain_upto(names, end)
    )
    return Features(children).train(model.training)


def chain_upto(names: LayerNames, end: NamedLayer) -> list[NamedLayer]:
    """The layers from the image to `end`, each fed by the one before.

    Raises:
        UnsupportedLayerError: if one is fed by several, or not by the one before.
    """
    by_node = {layer.node: layer for layer in names}
    chain = []
    node = end.node
    while node.op != "placeholder":
        fed = node.all_input_nodes
        if len(fed) != 1:
            raise UnsupportedLayerError(
                f"{_described(node, names)} is fed by {', '.join(map(str, fed))}; the layers up to "
                "a named one must be a chain of layers with parameters of their own"
            )
        chain.append(by_node[node])
        node = fed[0]
    return chain[::-1]


def _described(node: fx.Node, names: LayerNames) -> str:
    return next(f"{x.name} ({x.kind})" for x in names if x.node is node)


def _as_module(layer: NamedLayer, names: LayerNames, memo: dict[int, Any]) -> nn.Module:
    node = layer.node
    if layer.path:
        return copy.deepcopy(names.root.get_submodule(layer.path), memo)
    if layer.role == "flatten":
        return _flatten(layer, names)
    target = node.target
    assert callable(target) or isinstance(target, str)
    return Operation(target, tuple(node.args[1:]), dict(node.kwargs))


def _flatten(layer: NamedLayer, names: LayerNames) -> nn.Module:
    """`nn.Flatten` for a reshape, whose sizes were fixed when it was traced."""
    fed = layer.node.all_input_nodes[0].meta.get("value")
    value = layer.node.meta.get("value")
    rows = fed is not None and value is not None and tuple(value.shape) == (BATCH, fed[0].numel())
    if not rows:
        raise UnsupportedLayerError(
            f"{describe(layer.node)} does not flatten the features of one image (traced at "
            f"{names.size}); name a layer before it, or convert the model first"
        )
    return nn.Flatten(1)


def _running_size(features: nn.Module) -> Pair:
    for size in _TRIAL_SIZES:
        if capture(features, (size, size), is_known).failure() is None:
            return size, size
    raise ConversionError(
        f"the layers run at none of the square sizes {_TRIAL_SIZES}; "
        "they need the size that the model was made for"
    )


def _geometry(features: Features) -> Geometry:
    """By converting the features under a global pool, and taking the geometry before the pool."""
    size = _running_size(features)
    graph = capture(features, size, is_known).graph
    last = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    assert isinstance(last, fx.Node)
    value = last.meta["value"]
    if value.ndim != 4:
        raise ConversionError(
            f"{operation_name(last)} gives {tuple(value.shape[1:])} per image, not a map; geometry "
            "is known up to the last map, or for the layers of a converted network"
        )
    program = _under_pool(features, size).program
    if tuple(value.shape[2:]) == (1, 1):  # a pool over a single position is dropped
        return program.geometry
    return program.geometry.upto(program.records[-1].step - 1)


def _under_pool(features: Features, size: Pair) -> FullyConvolutional:
    under_pool = nn.Sequential(
        OrderedDict(features=features, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    )
    return convert(under_pool, input_size=size, verify=False)


def map_geometries(model: nn.Module) -> list[tuple[NamedLayer, Geometry]]:
    """Every convolution and pool before the head, with the geometry of its output."""
    names = layer_names(model)
    windowed = [x for x in names if x.block and x.role in ("conv", "pool")]
    if not windowed:
        return []
    features = features_upto(model, windowed[-1].name)
    net = _under_pool(features, _running_size(features))
    steps = {r.name.removeprefix("features."): r.step for r in net.program.records}
    return [
        (x, net.geometry.upto(steps[x.name.replace(".", "_")]))
        for x in windowed
        if x.name.replace(".", "_") in steps
    ]
