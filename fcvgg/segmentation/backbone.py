"""A converted network without its classifier, which returns the maps that an FCN scores."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fcvgg.errors import ArgumentError, UnsupportedLayerError
from fcvgg.geometry import IMAGE, Axis, Geometry, Pair
from fcvgg.network import FullyConvolutional
from fcvgg.probability import UNKNOWN
from fcvgg.rewriting.capture import capture
from fcvgg.rewriting.program import LayerRecord, Program, graph_module
from fcvgg.rewriting.rules import is_known
from fcvgg.transfer.naming import LayerNames, NamedLayer, layer_names

_ACTIVATIONS = ("bn", "relu", "activation")
_HEAD_ROLES = ("fc", "avgpool", "maxpool")
_NEW_POOL = "_window"
"""What the name of a function ends in where a pool over the window took its place."""


@dataclass(frozen=True)
class MapSource:
    """One map inside a network.

    Attributes:
        name: the canonical name of its layer.
        node: the name of its node in the network's graph.
        geometry: the positions of its cells.
        channels: the number of its channels.
    """

    name: str
    node: str
    geometry: Geometry
    channels: int


def without_classifier(net: FullyConvolutional, own: bool, same: bool) -> FullyConvolutional:
    """A network that returns the map before a converted network's last fully connected layer.

    For VGG that is fc7. Later layers are dropped.

    Args:
        net: a converted network of one output.
        own: whether it has parameters of its own, or shares the storage of the net's.
        same: whether the head's window is padded with zeros, so that its cells coincide with those
            of the features before it; see `fcvgg.convert`.

    Raises:
        ArgumentError: if the network has several outputs.
        UnsupportedLayerError: if there is no such map.
    """
    if len(net.program.classes) != 1:
        raise ArgumentError(
            f"net must have one output, got {len(net.program.classes)}; convert the model without "
            "its further heads"
        )
    names = layer_names(net)
    last = next((x for x in reversed(names.layers) if x.role == "fc"), None)
    if last is None:
        raise UnsupportedLayerError(
            f"{net.source} has no fully connected layer whose input could be scored"
        )
    source = _read_by(last, net, names)
    network = copy.deepcopy(net.network, _memo(net, last, own))
    graph = _ending(network.graph, source.node)
    kept = {node.name for node in graph.nodes}
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    _drop_uncalled(network, graph)
    geometry = source.geometry
    if same:
        geometry = _padded(graph, geometry, _head_windows(net, names))
    program = Program(
        network=graph_module(network, graph),
        geometry=geometry,
        activations=(UNKNOWN,),
        classes=(source.channels,),
        in_channels=net.in_channels,
        records=tuple(r for r in net.program.records if r.name in called | kept),
        aliases=net.program.aliases & called,
        training_mode=net.program.training_mode,
    )
    return FullyConvolutional(
        program, input_size=net.input_size, preprocess=net.preprocess, source=net.source
    )


def map_sources(backbone: FullyConvolutional, count: int) -> list[MapSource]:
    """The backbone's own map and `count` finer ones, each of half the stride of the one before.

    A finer map is that of the layer at which the network reaches its stride, with the activation
    after it: pool4 and pool3 for VGG.

    Raises:
        ArgumentError: if the network has no map of such a stride.
    """
    names = layer_names(backbone)
    end = _results(backbone.network.graph)[0]
    layer = _origin(end, names)
    sources = [MapSource(layer.name, end.name, backbone.geometry, backbone.program.classes[0])]
    for halvings in range(1, count + 1):
        height, width = backbone.geometry.stride
        wanted = height / 2**halvings, width / 2**halvings
        sources.append(_first_of_stride(backbone, names, wanted))
    return sources


def return_maps_(backbone: FullyConvolutional, sources: list[MapSource]) -> FullyConvolutional:
    """Let the backbone return the maps of all sources, as a tuple if there are several."""
    backbone.network.graph = _ending(backbone.network.graph, *(s.node for s in sources))
    _check_sizes(backbone, sources)
    return backbone


def _check_sizes(backbone: FullyConvolutional, sources: list[MapSource]) -> None:
    """Compare the maps' sizes, traced without values, with those that geometry gives.

    Raises:
        UnsupportedLayerError: if they differ, since scores would lie on the wrong pixels.
    """
    window, stride = backbone.geometry.window, backbone.geometry.stride
    for steps in ((0, 0), (1, 2)):
        size = window[0] + steps[0] * stride[0], window[1] + steps[1] * stride[1]
        results = _results(capture(backbone.network, size, is_known).graph)
        for source, result in zip(sources, results):
            found = tuple(result.meta["value"].shape[1:])
            expected = (source.channels, *source.geometry.output_size(size))
            if found != expected:
                raise UnsupportedLayerError(
                    f"the map of {source.name} must be {expected} for an input of {size} by its "
                    f"geometry, got {found}; a dense network cannot be built on it"
                )


def with_first_map(backbone: FullyConvolutional) -> FullyConvolutional:
    """The backbone as it was before `return_maps_`: with its first map alone."""
    graph = backbone.network.graph
    network = graph_module(backbone.network, _ending(graph, _results(graph)[0].name))
    return FullyConvolutional(
        replace(backbone.program, network=network),
        input_size=backbone.input_size,
        preprocess=backbone.preprocess,
        source=backbone.source,
    )


# -- finding maps -----------------------------------------------------------------------------


def _read_by(last: NamedLayer, net: FullyConvolutional, names: LayerNames) -> MapSource:
    """The map that the last fully connected layer reads."""
    node = last.node.all_input_nodes[0]
    if node.target is F.pad:  # put there for padding="same"; the score layer is 1x1 and needs none
        node = node.all_input_nodes[0]
    if node.op == "placeholder":
        raise UnsupportedLayerError(
            f"{last.name} of {net.source} reads the image itself, so there is no map to score"
        )
    step = _step_of(net, node)
    origin = _origin(node, names)
    return MapSource(origin.name, node.name, net.geometry.upto(step), _channels(net, node))


def _first_of_stride(
    backbone: FullyConvolutional, names: LayerNames, stride: tuple[float, float]
) -> MapSource:
    strides = []
    for layer in names:
        record = _record_of(backbone, layer.node)
        if not layer.block or record is None:
            continue
        geometry = backbone.geometry.upto(record.step)
        strides.append(geometry.stride)
        if geometry.stride == stride:
            node = _activated(layer, names)
            return MapSource(layer.name, node.name, geometry, record.channels)
    known = ", ".join(_short(s) for s in dict.fromkeys(strides))
    wanted = " x ".join(f"{s:g}" for s in dict.fromkeys(stride))
    raise ArgumentError(
        f"the network has no map of stride {wanted} for this variant (its strides are {known}); "
        "choose a coarser variant"
    )


def _activated(layer: NamedLayer, names: LayerNames) -> fx.Node:
    """The layer's node, or that of the activation that alone follows a convolution."""
    by_node = {x.node: x for x in names}
    node = layer.node
    while layer.role == "conv" and len(node.users) == 1:
        follower = by_node.get(next(iter(node.users)))
        if follower is None or follower.role not in _ACTIVATIONS:
            break
        node = follower.node
    return node


def _origin(node: fx.Node, names: LayerNames) -> NamedLayer:
    """The layer with a kernel whose output, or an activation of it, a map is."""
    by_node = {x.node: x for x in names}
    while node in by_node and by_node[node].role not in ("fc", "conv", "pool", "avgpool"):
        node = node.all_input_nodes[0]
    if node not in by_node:
        raise UnsupportedLayerError(f"the map at {node} comes from no layer that is known by name")
    return by_node[node]


def _step_of(net: FullyConvolutional, node: fx.Node) -> int:
    """A node's place in the geometry."""
    if node.op == "placeholder":
        return IMAGE
    record = _record_of(net, node)
    if record is not None:
        return record.step
    fed = [n for n in node.all_input_nodes if n.op != "get_attr"]
    inputs = tuple(dict.fromkeys(_step_of(net, n) for n in fed))
    if len(inputs) == 1:
        return inputs[0]
    for i, step in enumerate(net.geometry.height.steps):
        if step.inputs == inputs:
            return i
    raise UnsupportedLayerError(f"the geometry of {node} is not known")


def _channels(net: FullyConvolutional, node: fx.Node) -> int:
    """The channels of the map at a node: those of the layer that it comes from."""
    record = _record_of(net, node)
    return record.channels if record is not None else _channels(net, node.all_input_nodes[0])


def _record_of(net: FullyConvolutional, node: fx.Node) -> LayerRecord | None:
    """The record of a node: by its module's path, or by its name where it was a function."""
    records = {r.name: r for r in net.program.records}
    names = (str(node.target), node.name, node.name.removesuffix(_NEW_POOL))
    return next((records[name] for name in names if name in records), None)


def _short(stride: Pair) -> str:
    return f"{stride[0]}" if stride[0] == stride[1] else f"{stride[0]}x{stride[1]}"


# -- padding the head's window ------------------------------------------------------------------


def _head_windows(net: FullyConvolutional, names: LayerNames) -> dict[str, LayerRecord]:
    """The layers of the head that slide a window over the features, by their nodes' names.

    They are fully connected layers, pools of stride 1, and any layer that reduces the features to
    one cell at the native size. There is none if `fcvgg.convert` has padded the head already.
    """
    if any(axis.context_start for axis in net.geometry.axes):
        return {}
    sizes = [axis.sizes(n) for axis, n in zip(net.geometry.axes, net.input_size)]
    found = {}
    for node in net.network.graph.nodes:
        record = _record_of(net, node)
        if record is None:
            continue
        slides = max(w.span for w in record.windows) > 1
        plain = all((w.stride, w.before, w.after) == (1, 0, 0) for w in record.windows)
        role = next((x.role for x in names if x.node is node), "")
        ends = all(size[record.step] == 1 for size in sizes)
        if slides and plain and (ends or role in _HEAD_ROLES):
            found[node.name] = record
    return found


def _padded(graph: fx.Graph, geometry: Geometry, windows: dict[str, LayerRecord]) -> Geometry:
    """Pad the input of the head's first window with zeros; the geometry with this padding.

    As in `fcvgg.convert`, the padding is inserted once, for all windows that follow each other.
    """
    axes = [list(axis.steps) for axis in geometry.axes]
    heads = [n for n in graph.nodes if n.name in windows]
    before = {node: _nodes_before(graph, node.name) - {node.name} for node in heads}
    for node in heads:
        if any(other.name in before[node] for other in heads):
            continue
        chain = [n for n in heads if n is node or node.name in before[n]]
        more = [sum(windows[n.name].windows[i].span - 1 for n in chain) for i in (0, 1)]
        (top, bottom), (left, right) = pads = [(n // 2, n - n // 2) for n in more]
        fed = node.all_input_nodes[0]
        with graph.inserting_before(node):
            zeros = graph.call_function(F.pad, (fed, (left, right, top, bottom)))
        node.replace_input_with(fed, zeros)
        step = windows[node.name].step
        for steps, (first, last) in zip(axes, pads):
            window = replace(steps[step].window, before=first, after=last)
            steps[step] = replace(steps[step], window=window)
    return Geometry(Axis(tuple(axes[0])), Axis(tuple(axes[1])))


# -- cutting the graph ------------------------------------------------------------------------


def _results(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that a graph returns."""
    results = next(n for n in graph.nodes if n.op == "output").args[0]
    return list(results) if isinstance(results, (tuple, list)) else [results]  # type: ignore


def _nodes_before(graph: fx.Graph, end: str) -> set[str]:
    """The names of a node and of the nodes that it depends on."""
    waiting = [n for n in graph.nodes if n.name == end]
    needed: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.name not in needed:
            needed.add(node.name)
            waiting.extend(node.all_input_nodes)
    return needed


def _ending(graph: fx.Graph, *ends: str) -> fx.Graph:
    """The part of a graph that returns the value of one node, or a tuple of several."""
    needed = set().union(*(_nodes_before(graph, end) for end in ends))
    new, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node.name in needed:
            copies[node] = new.node_copy(node, copies.__getitem__)
    by_name = {node.name: copy for node, copy in copies.items()}
    results = tuple(by_name[name] for name in ends)
    new.output(results if len(results) > 1 else results[0])
    new.lint()
    return new


def _drop_uncalled(tree: nn.Module, graph: fx.Graph) -> None:
    """Remove the modules that the graph does not call, and their tensors that it does not read."""
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}

    def drop(module: nn.Module, path: str) -> None:
        for name in [*module._parameters, *module._buffers]:
            if f"{path}{name}" not in read:
                delattr(module, name)
        for name, child in list(module.named_children()):
            place = f"{path}{name}"
            if place in called:
                continue
            if any(other.startswith(f"{place}.") for other in called | read):
                drop(child, f"{place}.")
            else:
                delattr(module, name)

    drop(tree, "")


def _memo(net: FullyConvolutional, last: NamedLayer, own: bool) -> dict[int, Any]:
    """The tensors of the net that are not copied: all of them, or the dropped classifier's."""
    if own:
        dropped = net.network.get_submodule(last.path).parameters() if last.path else ()
        return {id(p): p for p in dropped}
    return {
        **{id(p): nn.Parameter(p.detach(), p.requires_grad) for p in net.parameters()},
        **{id(b): b.detach() for b in net.buffers()},
    }
