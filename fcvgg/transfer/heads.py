"""New fully connected layers on the features of a trained network."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fcvgg.errors import ArgumentError, ConversionError, check_integer
from fcvgg.support.module_state import device_of, dtype_of
from fcvgg.transfer.naming import LayerNames, NamedLayer, layer_names
from fcvgg.transfer.sources import source_of

WEIGHT_STD = 0.01
"""Standard deviation of new FC weights, whose biases are 0 (VGG paper, section 3.1)."""

_ENDINGS = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)


def replace_head(
    model: nn.Module,
    num_classes: int,
    hidden: Sequence[int] | None = (4096, 4096),
    dropout: float = 0.5,
    log_softmax: bool = False,
) -> nn.Module:
    """A copy of a classifier with new fully connected layers for other classes.

    The features keep their weights. New weights are drawn from N(0, 0.01), new biases are 0.

    Args:
        model: a classifier or converted network. It is not changed.
        num_classes: how many scores the new head gives.
        hidden: features of the FC layers before the last, each followed by ReLU and dropout; ``()``
            for one linear layer; None replaces the last layer only and keeps the others' weights.
        dropout: the probability of dropping a hidden feature; not used where `hidden` is None.
        log_softmax: end in log-probabilities, to be trained with `torch.nn.NLLLoss`; by default the
            head ends in scores, for `torch.nn.CrossEntropyLoss`. `loss_for` gives the right one.

    Raises:
        ArgumentError: if an argument is out of range.
        ConversionError: if the model has no head that can be replaced.
    """
    _check(num_classes, hidden, dropout)
    names = layer_names(source_of(model))
    layers = fully_connected(names)
    replaced = layers if hidden is not None else layers[-1:]
    model = copied_without(names.root, [x.path for x in replaced])
    last = layers[-1]
    parent, _, key = last.path.rpartition(".")
    holder = model.get_submodule(parent) if parent else model
    if hidden is None or (len(layers) == 1 and not isinstance(holder, nn.Sequential)):
        inputs = _inputs(names.root.get_submodule(last.path))
        new = _head(inputs, hidden or (), num_classes, dropout, names.root)
        setattr(holder, key, new if hidden else new[0])
        _end(holder, key, log_softmax, last)
        return model
    if not isinstance(holder, nn.Sequential) or any(
        x.path.rpartition(".")[0] != parent for x in layers
    ):
        raise ConversionError(
            f"the fully connected layers of {type(names.root).__name__} "
            f"({', '.join(x.path for x in layers)}) do not stand in one nn.Sequential; "
            "pass hidden=None to replace the last one only"
        )
    # The new layers take the old ones' place in the container and what follows them goes; their
    # keys go on from the last key that stays.
    first = layers[0].path.rpartition(".")[2]
    children = OrderedDict(holder.named_children())
    kept = list(children)[: list(children).index(first)]
    inputs = _inputs(names.root.get_submodule(layers[0].path))
    new = _head(inputs, hidden, num_classes, dropout, names.root)
    if log_softmax:
        new.append(nn.LogSoftmax(1))
    holder._modules.clear()
    for name in kept:
        holder.add_module(name, children[name])
    for module in new:
        holder.add_module(_next_key(holder), module.train(holder.training))
    return model


def loss_for(model: nn.Module) -> nn.Module:
    """The loss that a classifier is trained with, by what its head ends in.

    `torch.nn.NLLLoss` after a log-softmax, `torch.nn.CrossEntropyLoss` for scores.

    Raises:
        ConversionError: if the head ends in probabilities, for which both are wrong.
    """
    last = layer_names(model)[-1]
    kind = last.kind.rpartition(".")[2].lower().replace("_", "")  # also of Tensor.log_softmax
    if kind == "logsoftmax":
        return nn.NLLLoss()
    if last.role == "prob" or kind == "sigmoid":
        raise ConversionError(
            f"the model ends in probabilities ({last.name}, {last.kind}), and cross entropy would "
            "take a softmax of them again; give it scores with replace_head(..., hidden=None)"
        )
    return nn.CrossEntropyLoss()


def fully_connected(names: LayerNames) -> list[NamedLayer]:
    """The fully connected layers, which must be modules.

    Raises:
        ConversionError: if there are none, or one is a function.
    """
    layers = [x for x in names if x.role == "fc"]
    if not layers:
        raise ConversionError(
            f"{type(names.root).__name__} has no fully connected layer; stack one on it with "
            "torch.nn.Sequential"
        )
    for layer in layers:
        if not isinstance(names.root.get_submodule(layer.path) if layer.path else None, nn.Linear):
            raise ConversionError(
                f"{layer.name} is {layer.kind}{f' ({layer.path})' if layer.path else ''}; only "
                "nn.Linear layers can be replaced"
            )
    return layers


def new_linear(inputs: int, outputs: int, like: nn.Module) -> nn.Linear:
    """A fully connected layer as VGG's start: weights from N(0, 0.01), biases 0."""
    layer = nn.Linear(inputs, outputs, device=device_of(like), dtype=dtype_of(like))
    nn.init.normal_(layer.weight, 0, WEIGHT_STD)
    nn.init.zeros_(layer.bias)
    return layer.train(like.training)


def copied_without(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """A copy of a model in which layers to be replaced hold no memory of their own."""
    memo: dict[int, Any] = {}
    for path in paths:
        for parameter in model.get_submodule(path).parameters():
            memo[id(parameter)] = nn.Parameter(torch.empty(0), requires_grad=False)
    return copy.deepcopy(model, memo)


def _head(
    inputs: int, hidden: Sequence[int], num_classes: int, dropout: float, like: nn.Module
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for features in hidden:
        layers += [new_linear(inputs, features, like), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        inputs = features
    return nn.Sequential(*layers, new_linear(inputs, num_classes, like)).train(like.training)


def _end(holder: nn.Module, key: str, log_softmax: bool, last: NamedLayer) -> None:
    """Remove a softmax or sigmoid after the last layer, and add the wanted log-softmax."""
    if not isinstance(holder, nn.Sequential):
        if log_softmax:
            raise ConversionError(
                f"{last.name} ({last.path}) stands in a {type(holder).__name__}, whose forward "
                "ends as it does; log_softmax=True needs an nn.Sequential"
            )
        return
    names = [name for name, _ in holder.named_children()]
    for name in names[names.index(key) + 1 :]:
        if isinstance(holder._modules[name], _ENDINGS):
            del holder._modules[name]
    if log_softmax:
        holder.add_module(_next_key(holder), nn.LogSoftmax(1).train(holder.training))


def _next_key(holder: nn.Module) -> str:
    """The number after the last numbered child, as `nn.Sequential` counts."""
    taken = [int(name) for name in holder._modules if name.isdecimal()]
    return str(max(taken, default=-1) + 1)


def _inputs(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Linear)
    return layer.in_features


def _check(num_classes: Any, hidden: Any, dropout: Any) -> None:
    check_integer("num_classes", num_classes, 1)
    widths = () if hidden is None else tuple(hidden) if isinstance(hidden, Sequence) else (0,)
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in widths):
        raise ArgumentError(
            f"hidden must be positive layer widths, got {hidden!r}; () gives one linear layer, "
            "None replaces the last layer only"
        )
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ArgumentError(f"dropout must be at least 0 and below 1, got {dropout!r}")
