"""The way back: a converted network as a classifier, with fully connected layers on vectors.

A bundle holds no source model. What `fcvgg.convert` does to a source, another output stride or
padding, and what training does to its head, it does to this classifier.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fcvgg.geometry import Geometry
from fcvgg.probability import final_scores
from fcvgg.rewriting.modules import BinnedPool2d, WindowLinear
from fcvgg.rewriting.program import Network, Program
from fcvgg.rewriting.twins import sharing_twin


def classifier_of(program: Program) -> nn.Module:
    """The classifier ``(N, C, H, W) -> (N, K)`` of a network, which shares its parameters.

    It runs at sizes that give the network one cell. Dilation of the head is undone: its layers
    take every n-th position, so that they have the kernels of the source again.
    """
    network = sharing_twin(program.network)
    assert isinstance(network, Network)
    graph = network.graph
    held = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    layers: dict[nn.Module, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    finals = iter(program.finals if program.head == "position" else ())
    for node in list(graph.nodes):
        module = network.get_submodule(node.target) if node.op == "call_module" else None
        if _keeps_the_size(node, program.geometry):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif isinstance(module, WindowLinear) and node.target not in held:
            if module not in layers:
                of_windows = program.head == "window"
                layers[module] = (
                    _fully_connected(module, weights) if of_windows else _on_positions(module)
                )
                owner, _, child = node.target.rpartition(".")
                setattr(network.get_submodule(owner), child, layers[module])
            if isinstance(layers[module], nn.Linear):
                _put_on_vectors(node, module)
        elif isinstance(module, BinnedPool2d):
            _put_on_bins(node, module)
        elif node.op == "output":
            with graph.inserting_before(node):
                node.args = fx.node.map_arg(
                    node.args, lambda maps: _vector(maps, program, next(finals, ""))
                )
    network.recompile()
    return network


def _vector(maps: fx.Node, program: Program, final: str) -> fx.Node:
    """The scores ``(N, K)`` of maps ``(N, K, h, w)`` of one window."""
    graph = maps.graph
    if program.head == "position":
        assert program.average is not None
        steps = tuple(window.dilation for window in program.average)
        if steps != (1, 1):
            maps = graph.call_function(torch.max_pool2d, (maps, (1, 1), steps))
        maps = graph.call_function(F.adaptive_avg_pool2d, (maps, (1, 1)))
    vector = graph.call_function(torch.flatten, (maps, 1))
    return graph.call_function(final_scores, (vector, final)) if final else vector


def _keeps_the_size(node: fx.Node, geometry: Geometry) -> bool:
    """Whether a node is what ``padding="same"`` puts before the head.

    Cell 0 then stands for a crop that begins so many pixels before the image.
    """
    if node.op != "call_function" or node.target is not F.pad or len(node.args) != 2:
        return False
    margin = [-axis.context_start // axis.stride for axis in geometry.axes]
    pads: Any = node.args[1]
    left, right, top, bottom = pads
    return any(margin) and [top, left] == margin and {bottom - top, right - left} <= {0, 1}


def _fully_connected(module: WindowLinear, weights: dict[int, nn.Parameter]) -> nn.Linear:
    """The layer of the source, which shares the parameters unless it permutes the columns.

    Args:
        weights: those made so far, by the `id` of the network's own.
    """
    own = module.weight
    weight = weights.setdefault(id(own), nn.Parameter(module.fc_weight(), own.requires_grad))
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight, layer.bias = weight, module.bias  # type: ignore[assignment]
    return layer.train(module.training)


def _on_positions(module: WindowLinear) -> nn.Conv2d:
    """The layer as a plain convolution, which shares the parameters."""
    size = (module.in_channels, module.out_channels, module.kernel_size)
    layer = nn.Conv2d(*size, dilation=module.dilation, bias=False, device="meta")  # type: ignore
    layer.weight, layer.bias = module.weight, module.bias
    return layer.train(module.training)


def _put_on_vectors(node: fx.Node, module: WindowLinear) -> None:
    """Let a layer take the whole map as a vector: ``(N, C, kh, kw) -> (N, O, 1, 1)``."""
    graph = node.graph
    with graph.inserting_before(node):
        row = graph.call_function(torch.flatten, (_every(node, module.dilation), 1))
        if module.column_order is not None:
            owner = graph.owning_module
            name = f"{node.name}_fc_order"
            assert owner is not None
            owner.register_buffer(name, module.fc_order(), persistent=False)
            row = graph.call_function(torch.index_select, (row, 1, graph.get_attr(name)))
        node.args = (row,)
    _put_on_one_cell(node, node)


def _put_on_bins(node: fx.Node, module: BinnedPool2d) -> None:
    """Let an adaptive pool take the whole map: ``(N, C, h, w) -> (N, C*oh*ow, 1, 1)``."""
    graph = node.graph
    pool = F.adaptive_avg_pool2d if module.kind == "avg" else F.adaptive_max_pool2d
    with graph.inserting_before(node):
        bins = graph.call_function(pool, (_every(node, module.dilation), tuple(module.bins)))
        row = graph.call_function(torch.flatten, (bins, 1))
    _put_on_one_cell(node, row)
    graph.erase_node(node)


def _put_on_one_cell(node: fx.Node, row: fx.Node) -> None:
    """Let a vector ``(N, O)``, as a map of one cell, stand for a node."""
    users = list(node.users)
    with row.graph.inserting_after(row):
        column = row.graph.call_function(torch.unsqueeze, (row, -1))
    with row.graph.inserting_after(column):
        cell = row.graph.call_function(torch.unsqueeze, (column, -1))
    for user in users:
        user.replace_input_with(node, cell)


def _every(node: fx.Node, step: Iterable[int]) -> fx.Node:
    """Every n-th position of a node's input, by a pool: its stride becomes dilation on request."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    steps = tuple(step)
    return x if steps == (1, 1) else node.graph.call_function(torch.max_pool2d, (x, (1, 1), steps))
