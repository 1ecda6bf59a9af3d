"""The frozen layers of a classifier, computed once for every image instead of every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import Dataset

from fcvgg.errors import ConversionError
from fcvgg.finetuning.outputs import InputOf, on_disk, stored_outputs
from fcvgg.geometry import Pair
from fcvgg.rewriting.capture import Captured, capture, unfollowed_branches
from fcvgg.rewriting.marks import FollowsTraining
from fcvgg.rewriting.rules import is_known
from fcvgg.support.module_state import device_of, dtype_of, evaluating, state_kept

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class FrozenTrunk:
    """The layers of a classifier before its first one that varies from step to step.

    Attributes:
        model: the classifier.
        layer: the path of the layer after the trunk, whose input is computed once.
        calls: the shapes without the batch that the calls of each module in the trunk give.
        shape: ``(C, H, W)`` of an image.
    """

    model: nn.Module
    layer: str
    calls: dict[str, list[tuple[int, ...]]]
    shape: tuple[int, int, int]

    @property
    def upto(self) -> nn.Module:
        """The trunk as a model of its own."""
        layer = self.model.get_submodule(self.layer)
        return InputOf(self.model, layer, len(self.calls.get(self.layer, ())))

    def features(
        self, images: Dataset[Any], what: str, folder: Path | None, **execution: Any
    ) -> Dataset[Any]:
        """What the trunk gives for every image, with the labels; in a file if there is a folder."""
        store = torch.empty if folder is None else partial(on_disk, folder)
        return stored_outputs(self.upto, images, what, store, **execution)

    def bytes_per_image(self) -> int:
        """Of the features, in float32."""
        with torch.no_grad(), evaluating(self.model):
            return 4 * int(self.upto(self._images(1))[0].numel())

    @contextmanager
    def skipped(self) -> Iterator[Trainable]:
        """The model as a function of features for a while; its trunk's modules do nothing."""
        after = Trainable(self)
        modules = {path: self.model.get_submodule(path) for path in {*self.calls, self.layer}}
        try:
            for path, module in modules.items():
                module.forward = partial(after.run, path, module.forward)
            yield after
        finally:
            for module in modules.values():
                module.__dict__.pop("forward", None)

    def works(self) -> bool:
        """Whether the model computes from features what it computes from images."""
        images = self._images(2)
        with torch.no_grad(), evaluating(self.model):
            expected = self.model(images)
            features = self.upto(images)
            try:
                with self.skipped() as after:
                    found = after(features)
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                return False  # a function among the frozen layers needs the shapes that they give
        return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)

    def _images(self, count: int) -> Tensor:
        values = torch.Generator().manual_seed(0)
        images = torch.rand(count, *self.shape, generator=values)
        return images.to(device_of(self.model), dtype_of(self.model))


class Trainable:
    """A model whose trunk's modules compute nothing, up to the one that gets features.

    They give tensors without values, so that functions between them find the shapes they need.
    """

    def __init__(self, trunk: FrozenTrunk):
        self.trunk = trunk
        self.features: Tensor | None = None
        self.left: dict[str, Iterator[tuple[int, ...]]] = {}

    def __call__(self, features: Tensor) -> Any:
        self.features = features
        self.left = {path: iter(shapes) for path, shapes in self.trunk.calls.items()}
        return self.trunk.model(features.new_zeros(len(features), *self.trunk.shape))

    def run(self, path: str, forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A module's forward, or nothing if the call lies in the trunk."""
        shape = next(self.left.get(path, iter(())), None)
        if shape is not None:
            return x.new_empty(len(x), *shape, device="meta")
        if path == self.trunk.layer and self.features is not None:
            x, self.features = self.features, None
        return forward(x, *args, **kwargs)


def find_trunk(model: nn.Module, size: Pair, channels: int) -> FrozenTrunk | None:
    """The longest frozen trunk of a model that all paths from the image lead through, if any.

    It ends before the first layer that trains, or that changes from step to step: dropout, or batch
    norm in training mode. Something must be computed in it.
    """
    try:
        captured = capture(model, size, is_known)
    except ConversionError:
        return None
    if captured.failure() is not None or unfollowed_branches(model, captured, is_known):
        return None
    with state_kept(model):
        model.train()
        varying = {node for node in captured.graph.nodes if _varies(node, model, captured)}
    nodes = [n for n in captured.graph.nodes if n.op != "output"]
    images = nodes[0]
    found = None
    before: list[fx.Node] = [images]
    for node in nodes[1:]:
        fed = [n for n in node.all_input_nodes if n in before]
        if not fed:
            continue  # a constant
        if _is_bridge(node, before, nodes) and len(before) > 1:
            found = node, list(before)
        if node in varying:
            break
        before.append(node)
    if found is None:
        return None
    node, trunk = found
    calls: dict[str, list[tuple[int, ...]]] = {}
    for one in trunk:
        if one.op == "call_module":
            calls.setdefault(str(one.target), []).append(tuple(one.meta["value"].shape[1:]))
    result = FrozenTrunk(model, str(node.target), calls, (channels, *size))
    return result if calls and result.works() else None


def _is_bridge(node: fx.Node, before: list[fx.Node], nodes: list[fx.Node]) -> bool:
    """Whether a module's one input is all that it and later nodes take of those before it."""
    fed = [n for n in node.all_input_nodes if n in before]
    if node.op != "call_module" or len(fed) != 1:
        return False
    known = {*before, node}
    later = [n for n in nodes if n not in known]
    return not any(n in before for other in later for n in other.all_input_nodes)


def _varies(node: fx.Node, model: nn.Module, captured: Captured) -> bool:
    """Whether a node trains, or gives other values from step to step, in training mode."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        tensor = getattr(model.get_submodule(owner), name, None)
        return isinstance(tensor, nn.Parameter) and tensor.requires_grad
    if node.op == "call_module":
        path = str(node.target)
        module = model.get_submodule(path)
        return path in captured.training_only or any(_module_varies(m) for m in module.modules())
    marked: list[bool] = []
    fx.node.map_aggregate(  # type: ignore[type-var]
        (node.args, node.kwargs), lambda a: marked.append(isinstance(a, FollowsTraining))
    )
    return any(marked) or any(
        n.op == "get_attr" and _varies(n, model, captured) for n in node.all_input_nodes
    )


def _module_varies(module: nn.Module) -> bool:
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        return True
    random = (isinstance(module, _DropoutNd) and module.p > 0) or isinstance(module, nn.RReLU)
    return module.training and (random or isinstance(module, _NormBase))
