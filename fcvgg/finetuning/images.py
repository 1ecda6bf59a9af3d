"""Labelled images for training: found, split, resized and augmented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fcvgg.errors import ArgumentError
from fcvgg.geometry import Pair
from fcvgg.images.datasets import LabelledFiles
from fcvgg.images.pictures import Picture
from fcvgg.images.preprocessing import Preprocess
from fcvgg.images.reading import read_picture

# -- images to train on and to judge by -----------------------------------------------------------

RESIZES = ("resize", "centre-crop")

_LEAST_AREA = 0.5
"""The least share of an image that a random crop keeps; ImageNet's 0.08 loses small objects."""

_JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02}


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
