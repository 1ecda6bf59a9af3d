"""Folders of images and masks: read once, checked whole, and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.datasets.folder import IMG_EXTENSIONS

from fcvgg.categories import distinct_names
from fcvgg.datasets import Unreadable
from fcvgg.errors import ArgumentError, DatasetError, ImageError, one_line
from fcvgg.images import check_usable, image_size, read_image
from fcvgg.preprocessing import Preprocess
from fcvgg.segmentation.label_map import IGNORE_INDEX

IMAGES, MASKS = "images", "masks"
TRAIN, VALID = "train", "valid"

_MASK_MODES = ("P", "L", "I", "I;16", "1")


@dataclass(frozen=True)
class MaskFolder:
    """Images with masks: PNGs of the same stem that hold a class index for every pixel.

    Attributes:
        images: the files that can be read.
        masks: the mask of each.
        categories: the names of the classes.
        counts: how many pixels each class has in all masks.
        skipped: the images that cannot be read, and why.
    """

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    categories: tuple[str, ...]
    counts: tuple[int, ...]
    skipped: tuple[Unreadable, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def part(self, indices: Sequence[int]) -> MaskFolder:
        """Some of the images, with their masks."""
        masks = tuple(self.masks[i] for i in indices)
        return replace(
            self,
            images=tuple(self.images[i] for i in indices),
            masks=masks,
            counts=_counts([read_mask(mask) for mask in masks], len(self.categories)),
        )


def mask_folder(
    folder: str | Path, categories: int | Sequence[str], preprocess: Preprocess | None = None
) -> MaskFolder:
    """The images and masks of a folder; every file is opened once and checked.

    Args:
        folder: with ``images/NAME.jpg`` (or another kind) and ``masks/NAME.png``. A mask holds
            class indices, as grey values or as a palette image's indices, and 255 for pixels that
            are neither trained on nor counted. Images are turned as their EXIF entry says, so
            masks label the upright image.
        categories: the names of the classes in the order of their indices, or how many there are.
        preprocess: the network's, by which it is known what images can be used; one for RGB of 8
            bits if None.

    Raises:
        DatasetError: if there are no images, a mask is missing, is of another size or kind, or has
            a label that is no class; the message names the file.
    """
    folder = Path(folder)
    names = _checked_categories(categories)
    known = preprocess or Preprocess.preset("unit")
    pairs = _paired(folder)
    images: list[Path] = []
    masks: list[Path] = []
    skipped: list[Unreadable] = []
    totals = np.zeros(len(names), np.int64)
    for image, mask in pairs:
        try:
            check_usable(image, known)  # as training will
            size = image_size(image)
            labels = read_mask(mask)
        except ImageError as error:
            skipped.append(Unreadable(str(image), one_line(error)))
            continue
        _check_pair(image, size, mask, labels, len(names))
        totals += _counts([labels], len(names))
        images.append(image)
        masks.append(mask)
    if not images:
        raise DatasetError(
            f"none of the {len(pairs)} images in {folder / IMAGES} can be read with its mask; the "
            f"first: {skipped[0]}"
        )
    if np.count_nonzero(totals) < 2:
        only = [name for name, n in zip(names, totals) if n] or [f"{IGNORE_INDEX}, to be ignored"]
        raise DatasetError(
            f"all labelled pixels of {folder} are of one class ({only[0]}); expected two or more"
        )
    return MaskFolder(tuple(images), tuple(masks), names, tuple(totals.tolist()), tuple(skipped))


def train_and_valid(
    folder: str | Path,
    categories: int | Sequence[str],
    share: float = 0.2,
    seed: int = 0,
    preprocess: Preprocess | None = None,
) -> tuple[MaskFolder, MaskFolder]:
    """Images to train on and to choose the best epoch by.

    Args:
        folder: with ``train/`` and ``valid/``, each as for `mask_folder`; or such a folder itself,
            which is split by chance.
        categories: as for `mask_folder`.
        share: of the images that are for validation, where the folder is split.
        seed: of the split.
        preprocess: as for `mask_folder`.

    Raises:
        DatasetError: as `mask_folder`, and if there are too few images to split.
        ArgumentError: if `share` is none.
    """
    folder = Path(folder)
    if not 0 < share < 1:
        raise ArgumentError(f"valid_share={share} is no share; expected 0 < valid_share < 1")
    if (folder / TRAIN).is_dir() and (folder / VALID).is_dir():
        train, valid = folder / TRAIN, folder / VALID
        return (
            mask_folder(train, categories, preprocess),
            mask_folder(valid, categories, preprocess),
        )
    whole = mask_folder(folder, categories, preprocess)
    if len(whole) < 2:
        raise DatasetError(
            f"{folder} has {len(whole)} image, too few to train and validate; expected two or more"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(max(round(share * len(whole)), 1), len(whole) - 1)
    return whole.part(sorted(order[held_out:])), whole.part(sorted(order[:held_out]))


def read_mask(path: Path) -> NDArray[np.int64]:
    """The class index of every pixel, int64 ``(H, W)``, turned as an EXIF entry says.

    Raises:
        ImageError: if the file cannot be read.
        DatasetError: if it holds colours and not indices.
    """
    image = read_image(path)
    if image.mode not in _MASK_MODES:
        raise DatasetError(
            f"the mask {path} has mode {image.mode}; expected a PNG of class indices, grey "
            "or with a palette"
        )
    return np.asarray(image).astype(np.int64)


def _checked_categories(categories: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(categories, int) and not isinstance(categories, bool):
        names = tuple(map(str, range(categories)))
    elif isinstance(categories, Sequence) and not isinstance(categories, str):
        names = tuple(map(str, categories))
    else:
        raise ArgumentError(
            f"categories={categories!r} are none; expected the names of the classes, or a number"
        )
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise ArgumentError(
            f"{len(names)} classes cannot be told apart by masks; expected 2 to {IGNORE_INDEX}"
        )
    return distinct_names(names)


def _paired(folder: Path) -> list[tuple[Path, Path]]:
    for part in (folder / IMAGES, folder / MASKS):
        if not part.is_dir():
            what = "is a file" if part.exists() else "does not exist"
            raise DatasetError(
                f"{part} {what}; expected {folder.name}/{IMAGES}/NAME.jpg and "
                f"{folder.name}/{MASKS}/NAME.png"
            )
    images = sorted(
        p
        for p in (folder / IMAGES).iterdir()
        if p.suffix.lower() in IMG_EXTENSIONS and not p.name.startswith(".")
    )
    if not images:
        raise DatasetError(f"there are no images in {folder / IMAGES}")
    by_stem: dict[str, Path] = {}
    pairs = []
    for image in images:
        if image.stem in by_stem:
            raise DatasetError(
                f"{by_stem[image.stem]} and {image} would have the same mask, {image.stem}.png; "
                "rename one"
            )
        by_stem[image.stem] = image
        mask = folder / MASKS / f"{image.stem}.png"
        if not mask.is_file():
            raise DatasetError(f"there is no mask for {image}; expected {mask}")
        pairs.append((image, mask))
    return pairs


def _check_pair(
    image: Path, size: tuple[int, int], mask: Path, labels: NDArray[Any], classes: int
) -> None:
    if labels.shape != size:
        turned = " of the upright image" if labels.shape == size[::-1] else ""
        raise DatasetError(
            f"the mask {mask} is {labels.shape[0]}x{labels.shape[1]} and its image {image} "
            f"{size[0]}x{size[1]}; expected one label for each pixel{turned}"
        )
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise DatasetError(
            f"the mask {mask} holds the label {labels[y, x]} at (y, x) = ({y}, {x}); expected 0 to "
            f"{classes - 1}, or {IGNORE_INDEX} for pixels to ignore"
        )


def _counts(masks: Sequence[NDArray[Any]], classes: int) -> tuple[int, ...]:
    total = np.zeros(classes, np.int64)
    for labels in masks:
        total += np.bincount(labels[labels != IGNORE_INDEX].ravel(), minlength=classes)
    return tuple(total.tolist())
