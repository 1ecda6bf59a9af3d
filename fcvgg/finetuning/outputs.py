"""Outputs and features of a classifier for images, outside Lightning."""

from __future__ import annotations

from collections.abc import Iterator
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


def frozen_features(
    model: nn.Module, layer: nn.Module, images: Dataset[Any], what: str, **execution: Any
) -> TensorDataset:
    """The inputs ``(N, D)`` of a fully connected layer for every image, with the labels.

    In evaluation mode, so that dropout has no effect. `execution` is as for `outputs_of`.
    """
    rows: list[Tensor] = []
    labels: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(inputs[0].float().cpu())

    handle = layer.register_forward_pre_hook(keep)
    try:
        labels.extend(
            truth for _, truth in outputs_of(model, images, f"features, {what}", **execution)
        )
    finally:
        handle.remove()
    return TensorDataset(torch.cat(rows), torch.cat(labels))


def probabilities_of(
    model: nn.Module, images: Dataset[Any], activation: str, **execution: Any
) -> Tensor:
    """The class probabilities ``(N, K)`` that a classifier gives images at its native size.

    `activation` is the kind of its scores, as for `fcvgg.FullyConvolutional`; `execution` is as for
    `outputs_of`.
    """
    outputs = outputs_of(model, images, "held-out images", **execution)
    return torch.cat([to_probabilities(scores, activation, dim=1).cpu() for scores, _ in outputs])
