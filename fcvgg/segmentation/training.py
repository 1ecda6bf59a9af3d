"""`train_fcn`: dense training on images with masks, by the one path through Lightning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fcvgg.errors import ArgumentError, DatasetError, GeometryError, PreprocessError
from fcvgg.geometry import Pair, checked_size
from fcvgg.images.files import Unreadable
from fcvgg.segmentation.mask_folders import MaskedImages, MaskFolder, collated, train_and_valid
from fcvgg.segmentation.metrics import (
    SegmentationMetrics,
    confusion_metric,
    count_labels,
    metrics_of,
)
from fcvgg.segmentation.network import FCN
from fcvgg.support.atomic import checked_folder
from fcvgg.support.module_state import device_of
from fcvgg.training.normalization import check_normalization, smallest_batch
from fcvgg.training.settings import Settings
from fcvgg.transfer.image_features import digest_of

if TYPE_CHECKING:
    from fcvgg.training.loop import TrainingRun

_CALIBRATION_IMAGES = 4
_DIGITS = 12


@dataclass(frozen=True)
class DenseTraining:
    """What `train_fcn` leaves.

    Attributes:
        fcn: the network that was given, with the weights of its best epoch.
        run: the run's files, and the values of every epoch.
        metrics: on the validation images, with these weights.
        skipped: the files of the folder that were left out, and why.
        images: how many images with masks were used.
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
    valid_share: float = 0.2,
    resume: bool = False,
    progress: bool = False,
) -> DenseTraining:
    """Train a dense network on images with masks; the best epoch is that of the highest mean IoU.

    The network is trained in place, on images of their own size: where its preprocessing resizes
    them, it does so no more. Score layers without weights yet are calibrated first
    (`FCN.calibrate_`). The folder gets ``best.ckpt``, ``last.ckpt`` and ``history.csv``, and
    ``fcn``, which `FCN.load` reads.

    Args:
        fcn: the network; what its parameters' ``requires_grad`` excludes stays as it is.
        data: a folder as for `train_and_valid`, whose masks are read by the network's categories;
            or the two parts.
        folder: where the files go. It is made if absent.
        settings: how to train; AdamW at 1e-3 in batches of 4 when None.
        crop: the size of the random part of each training image, an int or ``(h, w)``; smaller
            images are padded with zeros, whose pixels are ignored. None takes whole images.
        flip: mirror training images by chance, one in two.
        class_weights: factors of the classes' losses: one for each, ``"balanced"`` (inverse to
            their pixels in the training masks, the mean over pixels being 1), or None.
        backbone_lr: the learning rate of the layers that came with the converted network; that of
            the settings when None.
        valid_share: of the images that are for validation, where the folder is not split.
        resume: go on with the run of the folder, if there is one.
        progress: show a bar, and print a line for every epoch, on stderr.

    Raises:
        DatasetError: if images or masks are not usable; see `mask_folder`. Also if the part to
            train on holds one class alone, or the part to validate on no labelled pixel.
        PreprocessError: if the network has no preprocessing.
        ArgumentError: if an option is out of range, or the batches are too small for the network's
            batch normalisation.
        TrainingError: if the loss is not finite or a file cannot be written; see `fcvgg.training`.
        MissingExtraError: if Lightning or torchmetrics are not installed.
    """
    from fcvgg.segmentation.task import MONITOR, DenseTask
    from fcvgg.training.loop import fit

    checked_folder(folder, "folder")
    settings = settings or Settings(optimizer="adamw", batch_size=4)
    if fcn.preprocess is None:
        raise PreprocessError(
            "the network's preprocessing is unknown, so image files cannot be fed to it; set "
            "fcn.preprocess = fcvgg.Preprocess(mean, std)"
        )
    train, valid = (
        data
        if isinstance(data, tuple)
        else train_and_valid(data, fcn.class_names, valid_share, settings.seed, fcn.preprocess)
    )
    for part in (train, valid):
        if len(part.categories) != fcn.num_classes:
            raise ArgumentError(
                f"the masks have {len(part.categories)} classes and the network {fcn.num_classes}; "
                "expected as many"
            )
    if train.binary != valid.binary:
        raise DatasetError(
            "255 is class 1 in one part and ignored in the other; expected masks of one kind in "
            "both: read them by fcvgg.train_fcn(fcn, folder)"
        )
    _check_labelled(train, valid)
    weights = _checked_weights(class_weights, train.counts, fcn.num_classes)
    fcn.preprocess = replace(fcn.preprocess, resize=None)
    samples = MaskedImages(train, fcn, _checked_crop(crop), flip)
    _check_batches(fcn, samples, settings)
    fcn.calibrate_(samples.middles(_CALIBRATION_IMAGES))
    task = DenseTask(fcn, weights, backbone_lr)
    run = fit(
        task,
        samples,
        MaskedImages(valid, fcn),
        settings,
        folder,
        monitor=MONITOR,
        mode="max",
        identity={
            "variant": fcn.variant,
            "classes": fcn.num_classes,
            "images": [p.name for p in train.images],
            "starting_weights": digest_of(fcn)[:_DIGITS],
            "crop": samples.crop,
            "flip": flip,
            "class_weights": None if weights is None else weights.tolist(),
            "backbone_lr": backbone_lr,
        },
        resume=resume,
        collate=collated,
        progress=progress,
    )
    fcn.eval()
    fcn.save(run.folder / "fcn")
    skipped = tuple(dict.fromkeys((*train.skipped, *valid.skipped)))
    images = len(train) + len(valid)
    return DenseTraining(fcn, run, evaluate_fcn(fcn, valid), skipped, images)


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


def _check_labelled(train: MaskFolder, valid: MaskFolder) -> None:
    """Refuse parts that nothing can be learned from, or measured on, before time is spent."""
    known = [name for name, count in zip(train.categories, train.counts) if count]
    if len(known) < 2:
        what = f"of one class ({known[0]})" if known else "to be ignored"
        raise DatasetError(
            f"all pixels of the {len(train)} masks to train on are {what}; expected two classes or "
            "more: label more images, or split them by another seed"
        )
    if not any(valid.counts):
        raise DatasetError(
            f"all pixels of the {len(valid)} masks to validate on are to be ignored; label more "
            "images, or split them by another seed"
        )


def _check_batches(fcn: FCN, samples: MaskedImages, settings: Settings) -> None:
    """Refuse batches that are too small for batch norm, at the size that gives it least."""
    sizes = {samples.crop} if samples.crop is not None else set(samples.data.sizes)
    if not sizes:
        return
    # images of different sizes run apart, so any may be alone
    alone = len(sizes) > 1
    count = 1 if alone else smallest_batch(len(samples), settings.batch_size, settings.devices)
    height, width = min(sizes, key=max)  # whose map is one cell, if any is
    images = torch.zeros(count, samples.channels, height, width)
    check_normalization(fcn, images.to(device_of(fcn), samples.dtype), settings.batch_size)


def _checked_crop(crop: int | Iterable[int] | None) -> Pair | None:
    if crop is None:
        return None
    try:
        return checked_size(crop)
    except (GeometryError, TypeError) as error:
        raise ArgumentError(
            f"crop={crop!r} is no size; expected None, a positive int or (h, w)"
        ) from error


def _checked_weights(
    weights: str | Sequence[float] | None, counts: Sequence[int], classes: int
) -> Tensor | None:
    if weights is None:
        return None
    if isinstance(weights, str):
        if weights != "balanced":
            raise ArgumentError(
                f"class_weights={weights!r} is unknown; expected 'balanced', one number for each "
                "class, or None"
            )
        known = np.array(counts, np.float64)
        inverse = np.divide(known.sum(), known, out=np.zeros_like(known), where=known > 0)
        return torch.tensor(inverse / np.count_nonzero(known), dtype=torch.float32)
    try:
        values = torch.as_tensor(list(weights), dtype=torch.float32)
    except (TypeError, ValueError):
        values = torch.empty(0)
    usable = values.shape == (classes,) and values.isfinite().all()
    if not usable or values.min() < 0 or values.max() == 0:
        raise ArgumentError(
            f"class_weights={weights!r} are none; expected {classes} numbers >= 0, one for each "
            "class, and one of them above 0"
        )
    return values
