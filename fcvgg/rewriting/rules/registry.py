"""One record per layer kind: all that the package knows of a layer, in every form of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fcvgg.errors import RefusedLayerError, UnsupportedLayerError
from fcvgg.rewriting.emission import Call
from fcvgg.rewriting.layouts import Cells
from fcvgg.rewriting.sliding import Sliding

Rule = Callable[..., Any]


@dataclass(frozen=True)
class LayerKind:
    """What is known of one kind of layer.

    Attributes:
        rewrite: what a call in the source becomes on maps; None where only converted networks have
            such layers.
        arguments: gives a module's settings as the arguments of the function form, for `rewrite`
            and `slides`; None where there are none.
        slides: gives the `fcvgg.rewriting.sliding.Sliding` of a call in a converted network, which
            reads several positions. It gets the arguments of the function without the map, or the
            module where `arguments` is None.
        positional: whether it computes every position of a map by itself.
        elementwise: whether it computes every element of a map by itself.
        has_extent: whether it reads several positions of the source's features; where it slides,
            its windows tell.
        role: what it does in a network: ``"conv"``, ``"fc"``, ``"bn"``, ``"relu"``,
            ``"activation"`` (another one), ``"pool"``, ``"avgpool"`` and ``"maxpool"`` (adaptive),
            ``"drop"``, ``"flatten"``, ``"prob"``, or ``""``.
        inert: whether it returns its input in evaluation mode.
        affine: tells from the arguments of a call on maps whether it computes every position by an
            affine function of its values, which commutes with a mean over positions; None where
            it never does. Layers that merely move values need none.
        final: ``"softmax"``, ``"log_softmax"`` or ``"sigmoid"`` where that is what it computes.
        refused_on_maps: why the layer is refused where it gets several positions, and not vectors.
        in_bundle: whether a bundle may hold calls of it. None says that of module classes with a
            rule alone: who registers a class lets files construct it with settings of theirs.
    """

    rewrite: Rule | None = None
    arguments: Callable[[Any], Mapping[str, Any]] | None = None
    slides: Callable[..., Sliding] | None = None
    positional: bool = False
    elementwise: bool = False
    has_extent: bool = False
    role: str = ""
    inert: bool = False
    affine: Callable[..., bool] | None = None
    final: str = ""
    refused_on_maps: str = ""
    in_bundle: bool | None = None

    def settings_of(self, module: nn.Module | None) -> Mapping[str, Any]:
        """The arguments that a module stands for; none for a function, whose call has them."""
        return {} if module is None or self.arguments is None else self.arguments(module)


KINDS: dict[Any, LayerKind] = {}
"""From a module class, a function or the name of a Tensor method to the record of its kind."""

REFUSED: dict[Any, str] = {}
"""Layers and functions known to break the equivalence, with the reason."""

ATTENTION = "attention mixes all positions, so a cell would change with the rest of the image"


STATISTICS = "its statistics mix all positions, so a cell would change with the rest of the image"


def register(*targets: Any, **known: Any) -> None:
    """Record fields of `LayerKind` for module classes, functions and method names.

    Fields that are not given stay as they were recorded: a rule that takes the place of another one
    changes how a layer is rewritten, not how it streams.
    """
    # Targets whose records were one, or were none, share one record afterwards too.
    if "rewrite" in known:
        known = {"refused_on_maps": "", **known}
    before = {target: KINDS.get(target, LayerKind()) for target in targets}
    after = {kind: replace(kind, **known) for kind in before.values()}  # one for all the targets
    KINDS.update({target: after[kind] for target, kind in before.items()})


def rule(*targets: Any, **known: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rewriting rule of a layer kind, with further fields of its record.

    Args:
        targets: module classes, functions and method names.
        known: fields of `LayerKind`.
    """

    def decorated(function: Rule) -> Rule:
        register(*targets, rewrite=function, **known)
        return function

    return decorated


def attributes(*names: str) -> Callable[[Any], Mapping[str, Any]]:
    """For `LayerKind.arguments`: the attributes of a module that the function form has by name."""
    return lambda module: {name: getattr(module, name) for name in names}


def of_one_value(*args: Any, **kwargs: Any) -> bool:
    """For `LayerKind.affine`: a sum, or products with parameters and numbers alone."""
    return sum(isinstance(x, Cells) for x in (*args, *kwargs.values())) < 2


def always(*_: Any, **__: Any) -> bool:
    """For `LayerKind.affine`: of any arguments."""
    return True


def refuse(reason: str, *targets: Any) -> None:
    """Register layers and functions that would not stay exact, with the reason."""
    REFUSED.update(dict.fromkeys(targets, reason))


def kind_of(node: fx.Node, module: nn.Module | None) -> LayerKind | None:
    """The record of what a node of the source's graph, or of a converted one, calls."""
    if module is None:
        return KINDS.get(node.target)
    # the class itself first, which is quick: plain forward passes read the leading layers each time
    return KINDS.get(type(module)) or KINDS.get(class_of(module))


def is_relu(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node calls a ReLU, in any of its forms."""
    return kind_of(node, module) is KINDS[nn.ReLU]


def is_positional(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node of a converted graph computes every position of a map by itself."""
    kind = kind_of(node, module)
    return kind is not None and kind.positional


def sliding_of(node: fx.Node, module: nn.Module | None, arguments: Any) -> Sliding | None:
    """The `Sliding` of a node; None if its record holds no rule for one.

    Args:
        arguments: gives an argument of the node as a value; of the map itself it gives None.
    """
    kind = kind_of(node, module)
    if kind is None or kind.slides is None:
        return None
    if module is not None:
        # layers that only this package makes know their own settings, and have no function form
        return kind.slides(**kind.settings_of(module)) if kind.arguments else kind.slides(module)
    args = fx.node.map_arg(node.args[1:], arguments)
    kwargs = {k: fx.node.map_arg(v, arguments) for k, v in node.kwargs.items() if k != "input"}
    return kind.slides(*args, **kwargs)


def role_of(target: Any) -> str:
    """What a module class, function or method does, by its own record or that of a base class."""
    classes = target.__mro__ if isinstance(target, type) else (target,)
    return next((KINDS[cls].role for cls in classes if cls in KINDS and KINDS[cls].role), "")


def may_be_in_bundle(target: Any) -> bool:
    """Whether a bundle may call a function or method, or construct a module class."""
    kind = KINDS.get(target)
    if kind is None:
        return False
    if kind.in_bundle is None:
        return isinstance(target, type) and kind.rewrite is not None
    return kind.in_bundle


def kind_for(node: fx.Node, module: nn.Module | None) -> LayerKind:
    """The record with the rule by which a node of the source's graph is rewritten.

    Raises:
        RefusedLayerError: if the layer would not stay exact.
        UnsupportedLayerError: if there is no rule.
    """
    kind = kind_of(node, module)
    call = Call(node, module)
    if kind is not None and kind.rewrite is not None:
        if kind.refused_on_maps and _has_positions(node):
            raise RefusedLayerError(f"{call} is refused: {kind.refused_on_maps}")
        return kind
    reason = _refusal(call)
    if reason is not None:
        raise RefusedLayerError(f"{call} is refused: {reason}")
    what = "layer" if module is not None else "function"
    raise UnsupportedLayerError(
        f"{call} is a {what} without a rule; see fcvgg.rewriting.rules for what is supported and "
        "how to register a rule"
    )


def _has_positions(node: fx.Node) -> bool:
    fed = node.all_input_nodes[0].meta.get("value")
    return isinstance(fed, Tensor) and fed.shape[2:].numel() > 1


def _refusal(call: Call) -> str | None:
    if call.module is not None:
        return next((why for cls, why in REFUSED.items() if _is_a(call.module, cls)), None)
    attends = "attention" in call.kind.lower()
    return REFUSED.get(call.node.target, ATTENTION if attends else None)


def is_known(target: Any) -> bool:
    """Whether a module, a function or the name of a method is treated here as a whole.

    Others are looked into: modules always, functions of torch's where they are written in Python.
    """
    if not isinstance(target, nn.Module):
        name = getattr(target, "__name__", str(target))
        return _has_rule(target) or target in REFUSED or "attention" in name
    if _has_rule(class_of(target)) or any(_is_a(target, cls) for cls in REFUSED):
        return True
    # Torch's other layers are treated as a whole, so that a missing rule is named by the layer.
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(target).__module__.startswith("torch.nn.modules") and not isinstance(
        target, (*containers, nn.Bilinear)
    )


def _has_rule(target: Any) -> bool:
    return target in KINDS and KINDS[target].rewrite is not None


def class_of(module: nn.Module) -> type:
    """The class whose rule holds: the module's, or the one that it inherits all of its work from.

    Torch's parametrized layers (weight norm) are subclasses that add properties.
    """
    cls = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        cls = cls.__bases__[0]
    # A subclass that only sets attributes up or prints itself computes what its base computes.
    for base in cls.__mro__:
        if base in KINDS:
            return base
        if set(vars(base)) - _HARMLESS:
            return cls
    return cls


_HARMLESS = {
    *("__init__", "__repr__", "__doc__", "__module__", "__annotations__", "__constants__"),
    *("__static_attributes__", "__firstlineno__", "__dict__", "__weakref__", "__parameters__"),
    *("__slotnames__", "extra_repr", "reset_parameters", "__annotate__", "__annotations_cache__"),
    *("__annotate_func__", "__orig_bases__", "__qualname__"),
}
"""What a subclass may define and still compute as the class that it derives from."""


def _is_a(module: nn.Module | None, cls: Any) -> bool:
    return isinstance(cls, type) and isinstance(module, cls)


def calling(*names: str) -> list[Any]:
    """The functions of torch, torch.nn.functional and operator, and the methods, of these names."""
    spaces = (torch, F, operator)
    found = [getattr(space, name) for name in names for space in spaces if hasattr(space, name)]
    return [*found, *names]
