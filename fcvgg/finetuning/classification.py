"""The Lightning module of a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.errors import ConversionError
from fcvgg.support.extras import imported
from fcvgg.training.loop import TrainingModule


class Classification(TrainingModule):
    """Trains a classifier; logs loss and accuracy of training and validation.

    Args:
        model: gives scores, or log-probabilities.
        loss: the loss that `fcvgg.loss_for` gives for the whole classifier.
        classes: the number of classes.
        weights: of the classes in the loss, or None.
        groups: the parameter groups of the model; by default one.
        frozen: keep the model in evaluation mode, where only a linear layer of it is trained.
        run: computes the model's output from its input, if not by calling it.
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
        groups: list[dict[str, Any]] | None = None,
        frozen: bool = False,
        run: Callable[[Tensor], Any] | None = None,
    ):
        super().__init__()
        metrics = imported("torchmetrics.classification", "train")
        self.model = model
        self.log_probabilities = isinstance(loss, nn.NLLLoss)
        self.frozen = frozen
        self._groups = groups
        self._run = run or model.__call__
        self.register_buffer("class_weights", weights, persistent=False)
        self.train_accuracy = metrics.MulticlassAccuracy(classes, average="micro")
        self.valid_accuracy = metrics.MulticlassAccuracy(classes, average="micro")
        self.valid_balanced_accuracy = metrics.MulticlassAccuracy(classes, average="macro")

    def groups(self) -> list[dict[str, Any]]:
        return super().groups() if self._groups is None else self._groups

    def train(self, mode: bool = True) -> Classification:
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(self, images: Tensor) -> Any:
        return self._run(images)

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
        scores = self(images)
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            found = type(scores).__name__
            if isinstance(scores, Tensor):
                found = f"a tensor of shape {tuple(scores.shape)}"
            raise ConversionError(
                f"{type(self.model).__name__} gives {found} in training; expected one tensor of "
                "scores (N, K)"
            )
        return scores.float()
