"""What Lightning trains: a classifier, or its last layer on features that were computed once."""

from __future__ import annotations

from collections.abc import Callable
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
from fcvgg.training.loop import Task


class Classification(Task):
    """Trains a classifier; logs loss and accuracy of training and validation.

    Args:
        model: gives scores, or log-probabilities.
        loss: what `fcvgg.loss_for` says of the whole classifier.
        classes: how many there are.
        weights: of the classes in the loss, or None.
        groups: the parameter groups for a learning rate, of `self.model`.
        still: keep the model in evaluation mode, since what is trained of it has no other.
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
        still: bool = False,
    ):
        super().__init__()
        metrics = imported("torchmetrics.classification", "train")
        self.model = model
        self.log_probabilities = isinstance(loss, nn.NLLLoss)
        self.still = still
        self._groups_at = groups
        self.register_buffer("class_weights", weights, persistent=False)
        micro, macro = (
            {"num_classes": classes, "average": average} for average in ("micro", "macro")
        )
        self.train_accuracy = metrics.MulticlassAccuracy(**micro)
        self.valid_accuracy = metrics.MulticlassAccuracy(**micro)
        self.valid_balanced = metrics.MulticlassAccuracy(**macro)

    def groups(self) -> list[dict[str, Any]]:
        return super().groups() if self._groups_at is None else self._groups_at(self.settings.lr)

    def train(self, mode: bool = True) -> Classification:
        super().train(mode)
        if self.still:
            self.model.eval()
        return self

    def forward(self, images: Tensor) -> Any:
        return self.model(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        scores = self._scores(images)
        loss = self._loss(scores, labels)
        self.train_accuracy(scores, labels)
        self._log("train_loss", loss, labels)
        self._log("train_accuracy", self.train_accuracy, labels)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        scores = self._scores(images)
        self.valid_accuracy(scores, labels)
        self.valid_balanced(scores, labels)
        self._log("valid_loss", self._loss(scores, labels), labels)
        self._log("valid_accuracy", self.valid_accuracy, labels)
        self._log("valid_balanced_accuracy", self.valid_balanced, labels)

    def _scores(self, images: Tensor) -> Tensor:
        scores = self.model(images)
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            raise ConversionError(
                f"{type(self.model).__name__} gives {_what(scores)} in training; expected one "
                "tensor of scores (N, K)"
            )
        return scores.float()

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        loss = F.nll_loss if self.log_probabilities else F.cross_entropy
        return loss(scores, labels, weight=self.class_weights)

    def _log(self, name: str, value: Any, labels: Tensor) -> None:
        self.log(
            name,
            value,
            on_step=False,
            on_epoch=True,
            batch_size=len(labels),
            sync_dist=isinstance(value, Tensor),
        )


@torch.no_grad()
def frozen_features(
    model: nn.Module,
    layer: nn.Module,
    images: Dataset[Any],
    what: str,
    *,
    batch_size: int,
    device: torch.device,
    progress: bool = False,
) -> TensorDataset:
    """What comes to a fully connected layer ``(N, D)`` for every image, with its label.

    In evaluation mode, so that dropout leaves it as it is.
    """
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    handle = layer.register_forward_pre_hook(keep)
    model.to(device)
    total = len(images)  # type: ignore[arg-type]
    try:
        with evaluating(model), progress_bar(f"features, {what}", total, progress) as advance:
            for batch, truth in DataLoader(images, batch_size):
                model(batch.to(device))
                rows.append(seen.pop().float().cpu())
                labels.append(truth)
                advance(len(truth))
    finally:
        handle.remove()
        model.cpu()
    return TensorDataset(torch.cat(rows), torch.cat(labels))


@torch.no_grad()
def probabilities_of(
    model: nn.Module,
    images: Dataset[Any],
    activation: str,
    *,
    batch_size: int,
    device: torch.device,
    progress: bool = False,
) -> Tensor:
    """The class probabilities ``(N, K)`` that a classifier gives images at its native size.

    `activation` is what its scores are, as for `fcvgg.FullyConvolutional`.
    """
    found = []
    model.to(device)
    total = len(images)  # type: ignore[arg-type]
    try:
        with evaluating(model), progress_bar("held-out images", total, progress) as advance:
            for batch, truth in DataLoader(images, batch_size):
                scores = model(batch.to(device))
                found.append(to_probabilities(scores, activation, dim=1).cpu())
                advance(len(truth))
    finally:
        model.cpu()
    return torch.cat(found)


def _what(scores: Any) -> str:
    if isinstance(scores, Tensor):
        return f"a tensor of shape {tuple(scores.shape)}"
    return type(scores).__name__
