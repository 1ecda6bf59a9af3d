"""The classifier that transfer works on: a model, or what a converted network stands for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn

from fcvgg.conversion import unwrapped
from fcvgg.network import FullyConvolutional
from fcvgg.rewriting.modules import ChannelLayerNorm, ChannelRMSNorm
from fcvgg.rewriting.rules.registry import role_of
from fcvgg.support.module_state import device_of, dtype_of, evaluating
from fcvgg.transfer.operations import Operation

_ON_VECTORS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: nn.BatchNorm1d,
    ChannelLayerNorm: nn.LayerNorm,
    ChannelRMSNorm: nn.RMSNorm,
}
"""Layers on channels, and what they are on the features of a vector."""

_OF_EACH = ("fc", "relu", "activation", "drop", "prob")
"""Roles of layers that treat vectors as they treat the channels of a cell."""


def source_of(model: nn.Module) -> nn.Module:
    """The classifier that transfer changes copies of.

    A converted network gives its classifier, whose layers have the source's paths. It is built of
    `nn.Sequential` where they are a chain, so that its head and layers can be replaced.

    Raises:
        ConversionError: if the model is neither an `nn.Module` nor a converted network.
    """
    if not isinstance(model, FullyConvolutional):
        return unwrapped(model)
    classifier = model.classifier().train(model.training)
    chain = _as_chain(classifier)
    if chain is None:
        return classifier
    images = torch.zeros(1, model.in_channels, *model.geometry.crop)
    images = images.to(device_of(model), dtype_of(model))
    with torch.no_grad(), evaluating(chain), evaluating(classifier):
        same = torch.equal(chain(images), classifier(images))
    return chain if same else classifier


def _as_chain(classifier: Any) -> nn.Sequential | None:
    """The layers of a classifier in order, in containers by their paths; None if it is no chain."""
    steps: list[tuple[tuple[str, ...], nn.Module]] = []
    last: fx.Node | None = None
    vector = False
    for node in classifier.graph.nodes:
        if node.op == "placeholder":
            last = node
            continue
        if node.all_input_nodes != [last]:
            return None
        last = node
        if node.op == "output":
            break
        if node.target is torch.unsqueeze or (node.target is torch.flatten and vector):
            continue  # between vectors and the maps of one cell that they were
        step = _step(node, classifier, vector)
        if step is None:
            return None
        vector = vector or node.target is torch.flatten
        steps.append(step)
    return _nested(_placed(steps))


def _step(
    node: fx.Node, classifier: nn.Module, vector: bool
) -> tuple[tuple[str, ...], nn.Module] | None:
    """A node as a layer with its path, which is the node's name alone for a function."""
    if node.op == "call_module":
        module = classifier.get_submodule(str(node.target))
        kind = _ON_VECTORS.get(type(module)) if vector else None
        if kind is not None:
            same, module = vars(module), kind.__new__(kind)
            vars(module).update(same)
        elif vector and role_of(type(module)) not in _OF_EACH:
            return None
        return tuple(str(node.target).split(".")), module
    if node.op == "get_attr":
        return None
    if node.target is torch.flatten:
        return ("", node.name), nn.Flatten()
    target: Any = node.target
    return ("", node.name), Operation(target, tuple(node.args[1:]), dict(node.kwargs))


def _placed(
    steps: Sequence[tuple[tuple[str, ...], nn.Module]],
) -> list[tuple[tuple[str, ...], nn.Module]]:
    """The layers with paths for functions: in the innermost container of both neighbours."""
    placed: list[tuple[tuple[str, ...], nn.Module]] = []
    for i, (path, module) in enumerate(steps):
        if path[0] == "":
            after = next((p for p, _ in steps[i + 1 :] if p[0]), ())
            before = placed[-1][0] if placed else ()
            shared = [a for a, b in zip(before[:-1], after[:-1]) if a == b]
            path = (*shared, path[1])
        placed.append((path, module))
    return placed


def _nested(steps: Sequence[tuple[tuple[str, ...], nn.Module]]) -> nn.Sequential | None:
    """Containers by the parts of the paths; None where one would be entered twice."""
    children: dict[str, nn.Module] = {}
    for key, group in groupby(steps, lambda step: step[0][0]):
        inner = [(path[1:], module) for path, module in group]
        made = inner[0][1] if inner[0][0] == () else _nested(inner)
        if key in children or made is None or (len(inner) > 1 and () in dict(inner)):
            return None
        children[key] = made
    chain = nn.Sequential()
    for key, child in children.items():
        chain.add_module(key, child)
    return chain
