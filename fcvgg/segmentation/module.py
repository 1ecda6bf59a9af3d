"""The Lightning module of dense training (extra ``train``)."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fcvgg.errors import check_rate
from fcvgg.results.label_map import IGNORE_INDEX
from fcvgg.segmentation.metrics import confusion_metric, metrics_of
from fcvgg.segmentation.network import FCN
from fcvgg.training.loop import TrainingModule

MONITOR = "valid_mean_iou"

IOU_OF = "valid_iou_"
"""The prefix of a class's name; with many classes, a printed line would be too long."""

Batch = list[tuple[Tensor, Tensor]]
"""Images ``(N, C, H, W)`` and masks ``(N, H, W)``, one pair for each size."""


class SegmentationModule(TrainingModule):
    """Cross entropy over the labelled pixels of a batch; mean IoU over the validation images."""

    weights: Tensor | None
    unprinted = (IOU_OF,)

    def __init__(self, fcn: FCN, weights: Tensor | None, backbone_lr: float | None):
        super().__init__()
        if backbone_lr is not None:
            check_rate("backbone_lr", backbone_lr)
        self.fcn = fcn
        self.backbone_lr = backbone_lr
        self.confusion = confusion_metric(fcn.num_classes)
        self.register_buffer("weights", weights)

    def groups(self) -> list[dict[str, Any]]:
        pretrained = {id(p) for p in self.fcn.backbone.parameters()}
        groups: tuple[dict[str, Any], ...] = ({"params": []}, {"params": []})
        if self.backbone_lr is not None:
            groups[1]["lr"] = self.backbone_lr
        for parameter in self.fcn.parameters():
            if parameter.requires_grad:
                groups[id(parameter) in pretrained]["params"].append(parameter)
        return [group for group in groups if group["params"]]

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss, count = self._loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=count)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        loss, count = self._loss(batch, self.confusion)
        self.log("valid_loss", loss, batch_size=count)

    def on_validation_epoch_end(self) -> None:
        metrics = metrics_of(self.confusion.compute(), self.fcn.class_names)
        self.confusion.reset()
        self.log(MONITOR, metrics.mean_iou)
        self.log("valid_pixel_accuracy", metrics.pixel_accuracy)
        self.log_dict(
            {f"{IOU_OF}{name}": iou for name, iou in metrics.iou.items() if isfinite(iou)}
        )

    def _loss(self, batch: Batch, confusion: Any = None) -> tuple[Tensor, int]:
        """The mean loss over the labelled pixels of all images, and the number of images."""
        total = torch.zeros((), device=self.device)
        weight = torch.zeros((), device=self.device)
        for images, masks in batch:
            scores = self.fcn(images).float()  # (N, K, H, W)
            if confusion is not None:
                confusion.update(scores.argmax(1), masks)
            total = total + F.cross_entropy(
                scores, masks, self.weights, ignore_index=IGNORE_INDEX, reduction="sum"
            )
            known = masks[masks != IGNORE_INDEX]  # (pixels,)
            weight = weight + (known.numel() if self.weights is None else self.weights[known].sum())
        return total / weight.clamp(min=1e-12), sum(len(images) for images, _ in batch)
