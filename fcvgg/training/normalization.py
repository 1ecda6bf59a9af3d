"""Whether a network's normalisation can be trained on batches of a size, before training begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fcvgg.errors import ArgumentError

_SAID = "Expected more than 1"
"""How torch's message begins where batch or instance norm gets one value per channel."""


def smallest_batch(images: int, batch_size: int, devices: Any = 1) -> int:
    """How many images the smallest batch of an epoch has: 1, or 2 for two or more.

    A last batch of one image is left out where there are others.
    """
    share = -(-images // devices) if isinstance(devices, int) else images
    return min(share, batch_size, 2)


def check_normalization(model: nn.Module, images: Tensor, batch_size: int) -> None:
    """Run a model once in training mode, and leave it as it was.

    Args:
        model: the model.
        images: ``(N, C, h, w)``, as many as the smallest batch has.
        batch_size: what the user chose, for the message.

    Raises:
        ArgumentError: if a layer has one value per channel to take statistics of; it is named.
    """
    entered: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _state_kept(model):
            model.train()(images)
    except ValueError as error:
        if not str(error).startswith(_SAID):
            raise
        name = entered[-1]
        layer = f"{type(model.get_submodule(name)).__name__} in {name or 'the model'}"
        size = "x".join(map(str, images.shape[2:]))
        wanted = "train at a larger size"
        if len(images) == 1:
            more = "add images, or train on crops of one larger size"
            wanted = "use batch_size=2 or more" if batch_size == 1 else more
        raise ArgumentError(
            f"batch_size={batch_size} cannot train {layer}, which gets one value per channel of "
            f"{len(images)} image{'s' * (len(images) > 1)} of {size} pixels; {wanted}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Modes and batch norm's running statistics are put back."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)
