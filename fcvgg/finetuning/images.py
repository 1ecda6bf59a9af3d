"""Labelled images as a network's input: read, resized and augmented."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from fcvgg.errors import check_choice
from fcvgg.geometry import Pair
from fcvgg.images.datasets import LabelledFiles
from fcvgg.images.pictures import Picture
from fcvgg.images.preprocessing import Preprocess
from fcvgg.images.reading import read_picture

RESIZES = ("resize", "center-crop")

_LEAST_AREA = 0.5
"""The least share of an image that a random crop keeps; ImageNet's 0.08 loses small objects."""

_JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02}


class ImageRows(Dataset[tuple[Tensor, int]]):
    """Images as a network's input ``(C, h, w)`` with their labels.

    Args:
        files: which images.
        preprocess: how ``uint8`` pixels become input; its resize is not used.
        size: ``(h, w)`` of the input.
        resize: ``"resize"`` to that size, whose aspect ratio may differ, or ``"center-crop"``: to
            the smallest size that covers it, of which the middle is taken.
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
        self.files = files
        self.preprocess = replace(preprocess, resize=None)
        self.size = size
        self.resize = checked_resize(resize)
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
        height, width = (  # rounded down, either could be a pixel short
            max(round(n * scale), m) for m, n in zip(self.size, picture.size)
        )
        picture = picture.resized((height, width), how)
        top, left = ((n - m) // 2 for m, n in zip(self.size, picture.size))
        return picture.cropped(top, left, self.size)


def checked_resize(resize: str) -> str:
    """One of `RESIZES`; ``"centre-crop"`` is taken too.

    Raises:
        ArgumentError: if it is neither.
    """
    resize = "center-crop" if resize == "centre-crop" else resize
    check_choice("resize", resize, RESIZES)
    return resize


def _augmentation(size: Pair, preprocess: Preprocess) -> v2.Transform:
    coloured = preprocess.channels in (1, 3) and preprocess.takes_bytes
    crop = v2.RandomResizedCrop(
        size,
        scale=(_LEAST_AREA, 1.0),
        interpolation=InterpolationMode(preprocess.interpolation),
        antialias=True,
    )
    colour = [v2.ColorJitter(**_JITTER)] if coloured else []
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *colour])


def _augmented(picture: Picture, transform: v2.Transform) -> Picture:
    values = torch.from_numpy(np.array(picture.pixels)).permute(2, 0, 1)  # (C, H, W)
    if values.dtype == torch.uint8 or not picture.in_bytes:
        changed = transform(values)
    else:
        changed = transform(values / 255) * 255  # torchvision has floats from 0 to 1
    return replace(picture, pixels=changed.permute(1, 2, 0).numpy())
