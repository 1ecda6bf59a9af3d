"""The table of rules: what each known layer or function becomes on maps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fcvgg.errors import RefusedLayerError, UnsupportedLayerError
from fcvgg.rewriting.rewriter import Call

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
"""From a module class, a function or the name of a Tensor method to its rule."""

REFUSED: dict[Any, str] = {}
"""Layers and functions known to break the equivalence, with the reason."""

ATTENTION = "attention mixes all positions, so a cell would change with the rest of the image"


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for module classes, functions and method names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def refuse(reason: str, *targets: Any) -> None:
    """Register layers and functions that would not stay exact, with the reason."""
    REFUSED.update(dict.fromkeys(targets, reason))


def rule_for(node: fx.Node, module: nn.Module | None) -> Rule:
    """The rule of a node in the source's graph.

    Raises:
        RefusedLayerError: if the layer would not stay exact.
        UnsupportedLayerError: if there is no rule.
    """
    target = class_of(module) if module is not None else node.target
    if target in RULES:
        return RULES[target]
    call = Call(node, module)
    reason = _refusal(call)
    if reason is not None:
        raise RefusedLayerError(f"{call} is refused: {reason}")
    what = "layer" if module is not None else "function"
    raise UnsupportedLayerError(
        f"{call} is a {what} without a rule; see fcvgg.rewriting.rules for what is supported and "
        "how to register a rule"
    )


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
        return target in RULES or target in REFUSED or "attention" in name
    if class_of(target) in RULES or any(_is_a(target, cls) for cls in REFUSED):
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(target).__module__.startswith("torch.nn.modules") and not isinstance(
        target, containers
    )


def class_of(module: nn.Module) -> type:
    """The class whose rule holds: the module's, or the one that it inherits all of its work from.

    Torch's parametrized layers (weight norm) are subclasses that add properties.
    """
    cls = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        cls = cls.__bases__[0]
    for base in cls.__mro__:
        if base in RULES:
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
