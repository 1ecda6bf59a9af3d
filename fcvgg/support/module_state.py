"""The state of a module: the device and dtype of its parameters, and its modes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def evaluating(module: nn.Module) -> AbstractContextManager[None]:
    """Evaluation mode for a while; every module then gets its own mode back."""
    return in_mode(module, False)


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """One mode for all modules for a while; every module then gets its own mode back.

    The modes are set one by one, since a model's own ``train()`` may do more, or leave dropout on.
    """
    with _modes_kept(module):
        for m in module.modules():
            m.training = training
        yield


@contextmanager
def state_kept(*modules: nn.Module) -> Iterator[None]:
    """Restores every module's mode and the values of all buffers, such as running statistics."""
    buffers = [(b, b.clone()) for module in modules for b in module.buffers()]
    with _modes_kept(*modules):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in buffers:
                    if not torch.equal(buffer, values):  # an unchanged one may be read-only
                        buffer.copy_(values)


@contextmanager
def _modes_kept(*modules: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def listed(places: Sequence[str], root: str = "", most: int = 3) -> str:
    """Names of modules for a message, the root's in place of an empty one."""
    names = ", ".join(name or root or "the model" for name in places[:most])
    return names + (f" and {len(places) - most} more" if len(places) > most else "")
