"""A trial, before training begins, of whether normalisation can be trained on small batches."""

from __future__ import annotations

import torch
from torch import nn

from fcvgg.errors import ArgumentError
from fcvgg.geometry import Pair
from fcvgg.support.module_state import device_of, dtype_of, state_kept
from fcvgg.training.settings import Settings

_ONE_VALUE = "Expected more than 1"
"""The start of torch's message where batch or instance norm gets one value per channel."""


def check_batches(
    model: nn.Module, count: int, channels: int, size: Pair, settings: Settings
) -> None:
    """Run a model once in training mode on the smallest batch of an epoch; its state is restored.

    Args:
        model: the model.
        count: the number of training images.
        channels: the channels of an image.
        size: ``(h, w)`` of an image.
        settings: for the batch size and the devices.

    Raises:
        ArgumentError: if a layer has one value per channel to take statistics of; it is named.
    """
    devices = settings.devices if isinstance(settings.devices, int) else 1
    # a last batch of one image is dropped where there are others
    least = min(-(-count // devices), settings.batch_size, 2)
    images = torch.zeros(least, channels, *size, device=device_of(model), dtype=dtype_of(model))
    entered: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), state_kept(model):
            model.train()(images)
    except ValueError as error:
        if not str(error).startswith(_ONE_VALUE):
            raise
        name = entered[-1]
        layer = f"{type(model.get_submodule(name)).__name__} in {name or 'the model'}"
        remedy = "train at a larger size"
        if least == 1:
            more = "add images, or train on crops of one larger size"
            remedy = "use batch_size=2 or more" if settings.batch_size == 1 else more
        raise ArgumentError(
            f"batch_size={settings.batch_size} cannot train {layer}, which gets one value per "
            f"channel of {least} image{'s' * (least > 1)} of {size[0]}x{size[1]} pixels; {remedy}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
