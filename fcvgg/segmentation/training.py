"""`train_fcn`: dense training on images with masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fcvgg.errors import ArgumentError, DatasetError, PreprocessError
from fcvgg.geometry import checked_size
from fcvgg.images.files import Unreadable
from fcvgg.segmentation.mask_folders import (
    MaskedImages,
    MaskFolder,
    collate_by_size,
    train_and_valid,
)
from fcvgg.segmentation.metrics import (
    SegmentationMetrics,
    confusion_metric,
    count_labels,
    metrics_of,
)
from fcvgg.segmentation.network import FCN
from fcvgg.support.atomic import checked_folder
from fcvgg.training.normalization import check_batches
from fcvgg.training.settings import Settings, balanced_weights
from fcvgg.transfer.image_features import digest_of

if TYPE_CHECKING:
    from fcvgg.segmentation.module import SegmentationModule
    from fcvgg.training.loop import TrainingRun

_CALIBRATION_IMAGES = 4
_DIGITS = 12


@dataclass(frozen=True)
class DenseTraining:
    """The result of `train_fcn`.

    Attributes:
        fcn: the network that was given, with the weights of its best epoch.
        run: the run's files, and the values of every epoch.
        metrics: on the validation images, with these weights.
        skipped: the files of the folder that were left out, and why.
        images: the number of images with masks that were used.
    """

    fcn: FCN
    run: TrainingRun
    metrics: SegmentationMetrics
    skipped: tuple[Unreadable, ...] = ()
    images: int = 0


def train_fcn(
    fcn: FCN,
    data: str | Path | tuple[MaskFolder, MaskFolder],
    folder: str | Path,
    *,
    settings: Settings | None = None,
    crop: int | Iterable[int] | None = None,
    flip: bool = True,
    class_weights: str | Sequence[float] | None = None,
    backbone_lr: float | None = None,
    valid_fraction: float = 0.2,
    resume: bool = False,
    progress: bool = False,
    valid_share: float | None = None,
) -> DenseTraining:
    """Train a dense network on images with masks, and keep the epoch of the highest mean IoU.

    The network is trained in place, on images of their own size: its preprocessing no longer
    resizes them. Score layers without weights yet are calibrated first (`FCN.calibrate_`). The
    folder gets ``best.ckpt``, ``last.ckpt``, ``history.csv``, and ``fcn`` for `FCN.load`.

    Args:
        fcn: the network; parameters whose ``requires_grad`` is False are not trained.
        data: a folder as for `train_and_valid`, whose masks are read by the network's categories;
            or the two parts.
        folder: the run's folder; it is made if absent.
        settings: how to train; AdamW at 1e-3 in batches of 4 when None.
        crop: the size of a random part of each training image, an int or ``(h, w)``; smaller images
            are padded with zeros, whose pixels are ignored. None takes whole images.
        flip: mirror each training image with probability 1/2.
        class_weights: factors of the classes' losses: one for each, ``"balanced"`` (inverse to
            their pixels in the training masks, with mean 1 over pixels), or None.
        backbone_lr: the learning rate of the converted network's layers; that of the settings when
            None.
        valid_fraction: the fraction of the images to validate on where the folder is not split.
        resume: go on with the run of the folder, if there is one.
        progress: show a bar, and print a line for every epoch, on stderr.
        valid_share: the former name of `valid_fraction`.

    Raises:
        DatasetError: if images or masks are not usable (see `mask_folder`), the training part holds
            a single class, or the validation part no labelled pixel.
        PreprocessError: if the network has no preprocessing.
        ArgumentError: if an option is out of range, or the batches are too small for batch norm.
        TrainingError: if the loss is not finite or a file cannot be written; see `fcvgg.training`.
        MissingExtraError: if Lightning or torchmetrics are not installed.
    """
    from fcvgg.segmentation.module import MONITOR, SegmentationModule
    from fcvgg.training.loop import fit

    checked_folder(folder, "folder")
    settings = settings or Settings(optimizer="adamw", batch_size=4)
    fraction = valid_fraction if valid_share is None else valid_share
    train, valid = _checked_parts(fcn, data, fraction, settings.seed)
    weights = _checked_weights(class_weights, train.counts)
    size = None if crop is None else checked_size(crop, "crop", ArgumentError)
    samples = MaskedImages(train, fcn, size, flip)
    _check_batches(fcn, samples, settings)
    module = SegmentationModule(fcn, weights, backbone_lr)
    fcn.preprocess = samples.preprocess
    fcn.calibrate_(samples.middles(_CALIBRATION_IMAGES))
    run = fit(
        module,
        samples,
        MaskedImages(valid, fcn),
        settings,
        folder,
        monitor=MONITOR,
        mode="max",
        identity=_identity(module, samples),
        resume=resume,
        collate=collate_by_size,
        progress=progress,
    )
    fcn.save(run.folder / "fcn")
    skipped = tuple(dict.fromkeys((*train.skipped, *valid.skipped)))
    return DenseTraining(fcn, run, evaluate_fcn(fcn, valid), skipped, len(train) + len(valid))


def evaluate_fcn(fcn: FCN, data: MaskFolder) -> SegmentationMetrics:
    """Pixel accuracy and intersection over union on images with masks, each image whole.

    Raises:
        MissingExtraError: if torchmetrics is not installed.
    """
    confusion = confusion_metric(fcn.num_classes)
    for index, image in enumerate(data.images):
        predicted = torch.from_numpy(fcn.predict(image).labels)
        count_labels(confusion, predicted, torch.from_numpy(data.labels(index)))
    return metrics_of(confusion.confmat, fcn.class_names)


def _identity(module: SegmentationModule, samples: MaskedImages) -> dict[str, Any]:
    """What an interrupted run must have in common with the one that finishes it."""
    fcn, weights = module.fcn, module.weights
    return {
        "variant": fcn.variant,
        "classes": fcn.num_classes,
        "images": [path.name for path in samples.data.images],
        "starting_weights": digest_of(fcn)[:_DIGITS],
        "crop": samples.crop,
        "flip": samples.flip,
        "class_weights": None if weights is None else weights.tolist(),
        "backbone_lr": module.backbone_lr,
    }


def _checked_parts(
    fcn: FCN, data: str | Path | tuple[MaskFolder, MaskFolder], fraction: float, seed: int
) -> tuple[MaskFolder, MaskFolder]:
    """The parts to train and to validate on; unusable ones are refused before time is spent."""
    if fcn.preprocess is None:
        raise PreprocessError(
            "the network's preprocessing is unknown, so image files cannot be fed to it; set "
            "fcn.preprocess = fcvgg.Preprocess(mean, std)"
        )
    if not isinstance(data, tuple):
        data = train_and_valid(data, fcn.class_names, fraction, seed, fcn.preprocess)
    train, valid = data
    for part in data:
        if len(part.categories) != fcn.num_classes:
            raise ArgumentError(
                f"the masks must have the network's {fcn.num_classes} classes, got "
                f"{len(part.categories)}"
            )
    if train.binary != valid.binary:
        raise DatasetError(
            "255 must mean the same in both parts, got class 1 in one and ignored pixels in the "
            "other; read both by fcvgg.train_fcn(fcn, folder)"
        )
    known = [name for name, count in zip(train.categories, train.counts) if count]
    if len(known) < 2:
        what = f"of one class ({known[0]})" if known else "to be ignored"
        raise DatasetError(
            f"all pixels of the {len(train)} training masks are {what}; expected two classes or "
            "more: label more images, or split them by another seed"
        )
    if not any(valid.counts):
        raise DatasetError(
            f"all pixels of the {len(valid)} validation masks are to be ignored; label more "
            "images, or split them by another seed"
        )
    return train, valid


def _check_batches(fcn: FCN, samples: MaskedImages, settings: Settings) -> None:
    """Refuse batches that are too small for batch norm, at the size that gives it least."""
    sizes = {samples.crop} if samples.crop is not None else set(samples.data.sizes)
    if not sizes:
        return
    # images of different sizes run apart, so any may be alone
    count = 1 if len(sizes) > 1 else len(samples)
    size = min(sizes, key=max)  # whose map is one cell, if any is
    check_batches(fcn, count, samples.channels, size, settings)


def _checked_weights(weights: str | Sequence[float] | None, counts: Sequence[int]) -> Tensor | None:
    """The classes' factors, float32 ``(K,)``; `counts` are the pixels of each class."""
    if weights is None:
        return None
    if isinstance(weights, str) and weights == "balanced":
        return balanced_weights(counts)
    try:
        values = torch.as_tensor(list(weights), dtype=torch.float32)
    except (TypeError, ValueError):
        values = torch.empty(0)
    usable = values.shape == (len(counts),) and values.isfinite().all()
    if not usable or values.min() < 0 or values.max() == 0:
        raise ArgumentError(
            f"class_weights must be None, 'balanced' or {len(counts)} numbers of at least 0, one "
            f"for each class and not all 0, got {weights!r}"
        )
    return values
