"""Outputs and features of a classifier for images, outside Lightning."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fcvgg.probability import to_probabilities
from fcvgg.support.module_state import evaluating
from fcvgg.support.progress import progress_bar


@torch.no_grad()
def outputs_of(
    model: nn.Module,
    images: Dataset[Any],
    what: str,
    *,
    batch_size: int,
    device: torch.device,
    progress: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A model's outputs in evaluation mode with the labels, batch by batch.

    The model is moved to the device, and to the CPU at the end. The bar is called `what`.
    """
    model.to(device)
    count = len(images)  # type: ignore[arg-type]
    try:
        with evaluating(model), progress_bar(what, count, progress) as advance:
            for batch, labels in DataLoader(images, batch_size):
                yield model(batch.to(device)), labels
                advance(len(labels))
    finally:
        model.cpu()


class InputOf(nn.Module):
    """A model up to the input of one of its layers, or of a later call of it."""

    def __init__(self, model: nn.Module, layer: nn.Module, call: int = 0):
        super().__init__()
        self.model = model
        self.layer = layer
        self.call = call

    def forward(self, images: Tensor) -> Tensor:
        calls = count()

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if next(calls) == self.call:
                raise _ReachedError(inputs[0])

        handle = self.layer.register_forward_pre_hook(stop)
        try:
            self.model(images)
        except _ReachedError as reached:
            return reached.args[0]  # type: ignore[no-any-return]
        finally:
            handle.remove()
        raise AssertionError("the layer is not called")


class _ReachedError(Exception):
    """Ends a pass through a model, with what has come to the layer."""


def on_disk(folder: Path, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor in a file of a folder, which goes when the tensor does."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".features-") as file:
        if hasattr(os, "posix_fallocate"):  # else a full disk ends the process at a write
            os.posix_fallocate(file.fileno(), 0, 4 * prod(shape))
        values = torch.from_file(file.name, shared=True, size=prod(shape))
    return values.view(shape)


def stored_outputs(
    model: nn.Module,
    images: Dataset[Any],
    what: str,
    store: Callable[[tuple[int, ...]], Tensor] = torch.empty,
    **execution: Any,
) -> TensorDataset:
    """A model's outputs ``(N, ...)`` in float32 for every image, with the labels.

    In evaluation mode, so that dropout has no effect. `store` makes the tensor of a shape that
    holds them; `execution` is as for `outputs_of`.
    """
    values: Tensor | None = None
    labels: list[Tensor] = []
    done = 0
    for rows, truth in outputs_of(model, images, f"features, {what}", **execution):
        if values is None:
            values = store((len(images), *rows.shape[1:]))  # type: ignore[arg-type]
        values[done : done + len(rows)] = rows.cpu()
        done += len(rows)
        labels.append(truth)
    assert values is not None
    return TensorDataset(values, torch.cat(labels))


def probabilities_of(
    model: nn.Module, images: Dataset[Any], activation: str, **execution: Any
) -> Tensor:
    """The class probabilities ``(N, K)`` that a classifier gives images at its native size.

    `activation` is the kind of its scores, as for `fcvgg.FullyConvolutional`; `execution` is as for
    `outputs_of`.
    """
    outputs = outputs_of(model, images, "held-out images", **execution)
    return torch.cat([to_probabilities(scores, activation, dim=1).cpu() for scores, _ in outputs])
