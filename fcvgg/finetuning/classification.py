"""The Lightning module of a classifier, and a classifier's outputs for images outside training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fcvgg.errors import ConversionError
from fcvgg.probability import to_probabilities
from fcvgg.support.extras import imported
from fcvgg.support.module_state import evaluating
from fcvgg.support.progress import progress_bar
from fcvgg.training.loop import TrainingModule


class Classification(TrainingModule):
    """Trains a classifier; logs loss and accuracy of training and validation.

    Args:
        model: gives scores, or log-probabilities.
        loss: the loss that `fcvgg.loss_for` gives for the whole classifier.
        classes: the number of classes.
        weights: of the classes in the loss, or None.
        groups: the parameter groups for a learning rate, of `self.model`.
        frozen: keep the model in evaluation mode, where only a linear layer of it is trained.
    """

    unprinted = ("valid_balanced_accuracy",)

    class_weights: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        classes: int,
        *,
        weights: Tensor | None = None,
        groups: Callable[[float], list[dict[str, Any]]] | None = None,
        frozen: bool = False,
    ):
        super().__init__()
        metrics = imported("torchmetrics.classification", "train")
        self.model = model
        self.log_probabilities = isinstance(loss, nn.NLLLoss)
        self.frozen = frozen
        self._groups_at = groups
        self.register_buffer("class_weights", weights, persistent=False)
        self.train_accuracy = metrics.MulticlassAccuracy(classes, average="micro")
        self.valid_accuracy = metrics.MulticlassAccuracy(classes, average="micro")
        self.valid_balanced_accuracy = metrics.MulticlassAccuracy(classes, average="macro")

    def groups(self) -> list[dict[str, Any]]:
        return super().groups() if self._groups_at is None else self._groups_at(self.settings.lr)

    def train(self, mode: bool = True) -> Classification:
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(self, images: Tensor) -> Any:
        return self.model(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train", "accuracy")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "valid", "accuracy", "balanced_accuracy")

    def _step(self, batch: Any, part: str, *metrics: str) -> Tensor:
        """The loss of a batch, which is logged with the metrics of its part."""
        images, labels = batch
        scores = self._scores(images)  # (N, K)
        loss_of = F.nll_loss if self.log_probabilities else F.cross_entropy
        loss = loss_of(scores, labels, weight=self.class_weights)
        logged: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        self.log(f"{part}_loss", loss, sync_dist=True, **logged)
        for name in (f"{part}_{metric}" for metric in metrics):
            metric = getattr(self, name)
            metric(scores, labels)
            self.log(name, metric, **logged)
        return loss

    def _scores(self, images: Tensor) -> Tensor:
        scores = self.model(images)
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            found = type(scores).__name__
            if isinstance(scores, Tensor):
                found = f"a tensor of shape {tuple(scores.shape)}"
            raise ConversionError(
                f"{type(self.model).__name__} gives {found} in training; expected one tensor of "
                "scores (N, K)"
            )
        return scores.float()


def frozen_features(
    model: nn.Module, layer: nn.Module, images: Dataset[Any], what: str, **execution: Any
) -> TensorDataset:
    """What a fully connected layer gets for every image, ``(N, D)``, with its label.

    In evaluation mode, so that dropout has no effect. `execution` is as for `_outputs`.
    """
    rows: list[Tensor] = []
    labels: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(inputs[0].float().cpu())

    handle = layer.register_forward_pre_hook(keep)
    try:
        labels.extend(
            truth for _, truth in _outputs(model, images, f"features, {what}", **execution)
        )
    finally:
        handle.remove()
    return TensorDataset(torch.cat(rows), torch.cat(labels))


def probabilities_of(
    model: nn.Module, images: Dataset[Any], activation: str, **execution: Any
) -> Tensor:
    """The class probabilities ``(N, K)`` that a classifier gives images at its native size.

    `activation` is what its scores are, as for `fcvgg.FullyConvolutional`; `execution` is as for
    `_outputs`.
    """
    outputs = _outputs(model, images, "held-out images", **execution)
    return torch.cat([to_probabilities(scores, activation, dim=1).cpu() for scores, _ in outputs])


@torch.no_grad()
def _outputs(
    model: nn.Module,
    images: Dataset[Any],
    what: str,
    *,
    batch_size: int,
    device: torch.device,
    progress: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A model's outputs in evaluation mode with the labels, batch by batch; it ends on the CPU."""
    model.to(device)
    count = len(images)  # type: ignore[arg-type]
    try:
        with evaluating(model), progress_bar(what, count, progress) as advance:
            for batch, labels in DataLoader(images, batch_size):
                yield model(batch.to(device)), labels
                advance(len(labels))
    finally:
        model.cpu()
