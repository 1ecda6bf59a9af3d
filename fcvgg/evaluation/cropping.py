"""Crops of the native size: one at the centre, ten, or a grid of them.

They work on preprocessed tensors ``(1, C, H, W)``. An image below the native size is padded with
zeros, centred, up to it, as dense evaluation pads below the window.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fcvgg.geometry import Pair

GRID = 5
"""Crops along each side in the VGG paper's multi-crop evaluation (section 4.3)."""


def centre_crop(image: Tensor, size: Pair) -> Tensor:
    """The crop in the middle, placed as torchvision's ``center_crop`` places it."""
    image = _at_least(image, size)
    top, left = (round((n - s) / 2) for n, s in zip(image.shape[2:], size))
    return _crop(image, top, left, size)


def ten_crops(image: Tensor, size: Pair) -> Iterator[Tensor]:
    """Four corners, the centre, and the mirror images of these five."""
    image = _at_least(image, size)
    bottom, right = (n - s for n, s in zip(image.shape[2:], size))
    for top, left in ((0, 0), (0, right), (bottom, 0), (bottom, right)):
        yield from _with_mirror(_crop(image, top, left, size))
    yield from _with_mirror(centre_crop(image, size))


def grid_crops(image: Tensor, size: Pair, grid: int = GRID) -> Iterator[Tensor]:
    """Crops at a regular `grid` of places from corner to corner, and their mirror images."""
    image = _at_least(image, size)
    places = [
        np.linspace(0, n - s, grid).round().astype(int).tolist()
        for n, s in zip(image.shape[2:], size)
    ]
    for top in places[0]:
        for left in places[1]:
            yield from _with_mirror(_crop(image, top, left, size))


def _crop(image: Tensor, top: int, left: int, size: Pair) -> Tensor:
    return image[:, :, top : top + size[0], left : left + size[1]]


def _with_mirror(image: Tensor) -> Iterator[Tensor]:
    yield image
    yield image.flip(-1)


def _at_least(image: Tensor, size: Pair) -> Tensor:
    missing = [max(s - n, 0) for n, s in zip(image.shape[2:], size)]
    if not any(missing):
        return image
    top, left = (n // 2 for n in missing)
    return F.pad(image, (left, missing[1] - left, top, missing[0] - top))
