"""Labelled images for training: found, split, resized and augmented."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fcvgg.datasets import ClassFolders, class_folders, parts_of
from fcvgg.errors import ArgumentError, DatasetError
from fcvgg.geometry import Pair
from fcvgg.image_files import Unreadable
from fcvgg.images import read_picture
from fcvgg.pictures import Picture
from fcvgg.preprocessing import Preprocess

RESIZES = ("resize", "centre-crop")

_LEAST_AREA = 0.5
"""The least share of an image that a random crop keeps; ImageNet's 0.08 loses small objects."""

_JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02}


@dataclass(frozen=True)
class LabelledFiles:
    """Image files and the index of their class."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class SplitFolders:
    """Images to train on and images to judge by.

    Attributes:
        train: the images that are learnt from.
        valid: the images that are held out.
        classes: the class names, sorted.
        skipped: the files that were left out, and why.
        origin: how the two came about, for a reader.
    """

    train: LabelledFiles
    valid: LabelledFiles
    classes: tuple[str, ...]
    skipped: tuple[Unreadable, ...]
    origin: str

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """How many images of every class there are to train on, and held out."""
        train, valid = Counter(self.train.labels), Counter(self.valid.labels)
        return {name: (train[i], valid[i]) for i, name in enumerate(self.classes)}


def split_folders(folder: str | Path, fraction: float = 0.2, seed: int = 0) -> SplitFolders:
    """The images of a folder, to train on and held out.

    Args:
        folder: holds parts to train on and to validate on, each with one folder per class; or a
            part to train on alone, or the class folders themselves, which are then split. A part to
            test on is left for the last judgement and not looked at. See `fcvgg.datasets` for the
            names of parts.
        fraction: the share of every class that is held out where the folder is split; at least one
            image.
        seed: of the split.

    Raises:
        DatasetError: if there are no two classes, one is empty or too small to be split, the two
            parts have other classes, or the folders are neither parts nor classes.
        ArgumentError: if `fraction` is none.
    """
    folder = Path(folder)
    if not 0 < fraction < 1:
        raise ArgumentError(f"valid_fraction={fraction} is no share; expected 0 < share < 1")
    parts = parts_of(folder)
    if parts is None:
        return _split(class_folders(folder), fraction, seed)
    train, valid = parts.to_learn_from(), parts.valid
    found = (
        _split(class_folders(train), fraction, seed)
        if valid is None
        else _given(class_folders(train), class_folders(valid), train, valid)
    )
    alone = "" if parts.test is None else f"; {parts.test} is left for the last judgement"
    return replace(found, skipped=(*parts.skipped, *found.skipped), origin=f"{found.origin}{alone}")


def _given(train: ClassFolders, valid: ClassFolders, *folders: Path) -> SplitFolders:
    if train.classes != valid.classes:
        only = [
            f"only {folder} has {', '.join(sorted(set(a) - set(b)))}"
            for folder, a, b in (
                (folders[0], train.classes, valid.classes),
                (folders[1], valid.classes, train.classes),
            )
            if set(a) - set(b)
        ]
        raise DatasetError(
            f"the classes to train on and those held out differ: {'; '.join(only)}; "
            "expected the same class folders in both"
        )
    return SplitFolders(
        LabelledFiles(train.paths, train.labels),
        LabelledFiles(valid.paths, valid.labels),
        train.classes,
        (*train.skipped, *valid.skipped),
        f"held out are the images of {folders[1]}",
    )


def _split(found: ClassFolders, fraction: float, seed: int) -> SplitFolders:
    rng = np.random.default_rng(seed)
    held_out: set[int] = set()
    for label, name in enumerate(found.classes):
        places = [i for i, other in enumerate(found.labels) if other == label]
        if len(places) < 2:
            raise DatasetError(
                f"the class {name!r} has one image, which cannot be both trained on and held out; "
                "add images"
            )
        count = min(max(round(len(places) * fraction), 1), len(places) - 1)
        held_out.update(rng.permutation(places)[:count].tolist())
    return SplitFolders(
        _at(found, [i for i in range(len(found.paths)) if i not in held_out]),
        _at(found, sorted(held_out)),
        found.classes,
        found.skipped,
        f"held out are {fraction:.0%} of every class, drawn with seed {seed}",
    )


def _at(found: ClassFolders, places: Sequence[int]) -> LabelledFiles:
    return LabelledFiles(
        tuple(found.paths[i] for i in places), tuple(found.labels[i] for i in places)
    )


class ImageRows(Dataset[tuple[Tensor, int]]):
    """Images as a network's input ``(C, h, w)`` with their labels.

    Args:
        files: which images.
        preprocess: how ``uint8`` pixels become input; its resize is not used.
        size: ``(h, w)`` of the input.
        resize: ``"resize"`` to that size whatever the aspect ratio, or ``"centre-crop"``: as small
            as covers that size, and the middle of it.
        augment: a random crop of half the image's area or more, mirrored or not, with random
            brightness, contrast and colour; drawn from torch's generator.
    """

    def __init__(
        self,
        files: LabelledFiles,
        preprocess: Preprocess,
        size: Pair,
        resize: str = "resize",
        augment: bool = False,
    ):
        if resize not in RESIZES:
            raise ArgumentError(
                f"resize={resize!r} is unknown; expected {' or '.join(map(repr, RESIZES))}"
            )
        self.files = files
        self.preprocess = replace(preprocess, resize=None)
        self.size = size
        self.resize = resize
        self.transform = _augmentation(size, preprocess) if augment else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = read_picture(self.files.paths[index], self.preprocess)
        if self.transform is None:
            picture = self.fitted(picture)
        else:
            picture = _augmented(picture, self.transform)
        return self.preprocess.normalized(picture.pixels)[0], self.files.labels[index]

    def fitted(self, picture: Picture) -> Picture:
        """The picture at the network's input size."""
        how = self.preprocess.interpolation
        if self.resize == "resize":
            return picture.resized(self.size, how)
        scale = max(m / n for m, n in zip(self.size, picture.size))
        covering = [  # rounded down, either could be a pixel short
            max(round(n * scale), m) for m, n in zip(self.size, picture.size)
        ]
        picture = picture.resized((covering[0], covering[1]), how)
        top, left = ((n - m) // 2 for m, n in zip(self.size, picture.size))
        return picture.cropped(top, left, self.size)


def balanced_weights(labels: Sequence[int], classes: int) -> Tensor:
    """For every class its weight in the loss, such that all classes count the same in sum."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes)
    return len(labels) / (classes * counts.double()).float()


def _augmentation(size: Pair, preprocess: Preprocess) -> Any:
    from torchvision.transforms import InterpolationMode, v2

    modes = {mode.value: mode for mode in InterpolationMode}
    coloured = preprocess.channels in (1, 3) and preprocess.takes_bytes
    colour = [v2.ColorJitter(**_JITTER)] if coloured else []
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                size,
                scale=(_LEAST_AREA, 1.0),
                interpolation=modes[preprocess.interpolation],
                antialias=True,
            ),
            v2.RandomHorizontalFlip(),
            *colour,
        ]
    )


def _augmented(picture: Picture, transform: Any) -> Picture:
    values = torch.from_numpy(np.array(picture.pixels)).permute(2, 0, 1)  # (C, H, W)
    if values.dtype == torch.uint8 or not picture.in_bytes:
        changed = transform(values)
    else:
        changed = transform(values / 255) * 255  # torchvision has floats from 0 to 1
    return replace(picture, pixels=changed.permute(1, 2, 0).numpy())
