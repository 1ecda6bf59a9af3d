"""Quality of label maps: pixel accuracy and intersection over union, by torchmetrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fcvgg.categories import distinct_names
from fcvgg.errors import ArgumentError, DatasetError
from fcvgg.results.label_map import IGNORE_INDEX
from fcvgg.support.extras import imported


@dataclass(frozen=True)
class SegmentationMetrics:
    """Quality of label maps, over all pixels together that are not ignored.

    Attributes:
        pixel_accuracy: the share of pixels with the right label.
        mean_iou: the mean of `iou` over the classes that are in a mask or were predicted.
        iou: intersection over union of each class, by name; NaN for a class that is nowhere.
    """

    pixel_accuracy: float
    mean_iou: float
    iou: dict[str, float]

    def __str__(self) -> str:
        classes = ", ".join(f"{name} {value:.3f}" for name, value in self.iou.items())
        return f"mean IoU {self.mean_iou:.3f}, pixel accuracy {self.pixel_accuracy:.3f} ({classes})"


def confusion_metric(num_classes: int) -> Any:
    """A torchmetrics metric of the confusion matrix ``(K, K)``, rows being the truth.

    Raises:
        MissingExtraError: if torchmetrics is not installed.
    """
    torchmetrics = imported("torchmetrics", "train")
    return torchmetrics.ConfusionMatrix(
        task="multiclass", num_classes=num_classes, ignore_index=IGNORE_INDEX
    )


def count_labels(confusion: Any, predicted: Tensor, truth: Tensor) -> None:
    """Add a network's labels to a confusion matrix; pixels without data are not counted."""
    unknown = predicted == IGNORE_INDEX
    truth = truth.masked_fill(unknown, IGNORE_INDEX)
    confusion.update(predicted.masked_fill(unknown, 0), truth)


def metrics_of(confusion: Tensor, categories: Iterable[str]) -> SegmentationMetrics:
    """The metrics of a confusion matrix ``(K, K)``.

    Raises:
        DatasetError: if it counts no pixel.
    """
    counts = confusion.double()
    hits = counts.diag()
    union = counts.sum(0) + counts.sum(1) - hits
    if not union.any():
        raise DatasetError(
            f"the masks must label at least one pixel, got {IGNORE_INDEX} for all; nothing can be "
            "measured"
        )
    iou = hits / union  # NaN where a class is nowhere
    return SegmentationMetrics(
        pixel_accuracy=float(hits.sum() / counts.sum()),
        mean_iou=float(iou.nanmean()),
        iou=dict(zip(categories, iou.tolist())),
    )


def label_metrics(
    pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]], categories: Iterable[str]
) -> SegmentationMetrics:
    """The metrics of label maps of any origin.

    Args:
        pairs: predicted labels and true ones, integers ``(H, W)`` each; `IGNORE_INDEX` among the
            true ones is not counted.
        categories: the names of the classes.

    Raises:
        ArgumentError: if two label maps differ in size, or a label is not a class.
        MissingExtraError: if torchmetrics is not installed.
    """
    names = distinct_names(tuple(categories))
    confusion = confusion_metric(len(names))
    for predicted, truth in pairs:
        _check_labels(predicted, truth, len(names))
        confusion.update(*(torch.from_numpy(x.astype(np.int64)) for x in (predicted, truth)))
    return metrics_of(confusion.confmat, names)


def _check_labels(predicted: NDArray[Any], truth: NDArray[Any], classes: int) -> None:
    if predicted.shape != truth.shape:
        raise ArgumentError(
            f"the predicted labels must have the shape of the true ones, {truth.shape}, got "
            f"{predicted.shape}"
        )
    counted = truth != IGNORE_INDEX
    for what, labels in (("predicted", predicted[counted]), ("true", truth[counted])):
        wrong = labels[(labels < 0) | (labels >= classes)]
        if wrong.size:
            raise ArgumentError(
                f"{what} labels must be 0 to {classes - 1}, or {IGNORE_INDEX} among the true ones, "
                f"got {wrong[0]}"
            )
