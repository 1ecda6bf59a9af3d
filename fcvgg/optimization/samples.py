"""A user's images, on which a network is calibrated or compared with the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fcvgg.errors import ImageError
from fcvgg.images.preprocessing import Preprocess
from fcvgg.images.reading import each_image, prepare
from fcvgg.rewriting.outputs import flattened
from fcvgg.support.module_state import evaluating

if TYPE_CHECKING:
    from fcvgg.network import FullyConvolutional

_MOST_IMAGES = 64
"""Images that are used; of more, as many evenly spread over all."""

_MOST_PIXELS = 1 << 19
"""Of one image; of a larger one the middle is used. The quantiser keeps all maps of an image."""

_FAR = 10
"""Times the largest preprocessed pixel that the values of an image may reach."""


def sample_images(net: FullyConvolutional, images: Any, name: str) -> list[Tensor]:
    """Preprocessed images ``(1, C, H, W)`` in float32 on the CPU, from the window up.

    Args:
        net: that will see them.
        images: as for ``net.classify``.
        name: of the argument, for messages.

    Raises:
        ImageError: if there is none, or a tensor's values are far from preprocessed ones.
    """
    several: Any = each_image(images)
    if isinstance(several, (Sequence, Tensor, np.ndarray)) and len(several) > _MOST_IMAGES:
        several = [several[i * len(several) // _MOST_IMAGES] for i in range(_MOST_IMAGES)]
    found = []
    for image in islice(several, _MOST_IMAGES):
        pixels = prepare(image, net.preprocess, net.in_channels).tensor(net.preprocess)
        values = middle(pixels.detach().cpu().float(), _MOST_PIXELS)
        _check_range(values, net.preprocess, name)
        found.append(net._padded(values))
    if not found:
        raise ImageError(f"{name} must hold at least one image, got none")
    return found


def _check_range(image: Tensor, preprocess: Preprocess | None, name: str) -> None:
    """Refuse pixels of 0 to 255 in a tensor of floats, which counts as preprocessed.

    Ranges learnt from them would be wrong, and the agreement on them perfect.
    """
    if preprocess is None or not preprocess.takes_bytes:
        return
    ends = (
        abs(value * preprocess.scale - mean) / std
        for value in (0, 255)
        for mean, std in zip(preprocess.mean, preprocess.std)
    )
    usual, largest = max(ends), float(torch.nan_to_num(image, 0, 0, 0).abs().max())
    if largest > _FAR * usual:
        raise ImageError(
            f"{name} must hold pixels, or tensors of preprocessed images, whose values are up "
            f"to {usual:.3g} here, got one with {largest:.4g}; pass uint8 pixels (H, W, C), "
            "PIL images or paths"
        )


def expected_maps(
    net: FullyConvolutional, images: Sequence[Tensor], name: str
) -> list[list[Tensor]]:
    """For every image ``(1, C, H, W)`` the maps ``(1, K, h, w)`` of all outputs of a plain network.

    Raises:
        ImageError: if no cell has data.
    """
    with torch.no_grad(), evaluating(net):
        expected = [flattened(net(image))[0] for image in images]
    if not any(scores.isfinite().all(1).any() for maps in expected for scores in maps):
        raise ImageError(f"{name} must hold images with cells that have data, got none")
    return expected


def middle(image: Tensor, most: int) -> Tensor:
    """The middle of an image ``(1, C, H, W)`` of more than so many pixels."""
    height, width = image.shape[2:]
    if height * width <= most:
        return image
    rows = min(height, max(isqrt(most), most // width))
    cols = min(width, most // rows)
    top, left = (height - rows) // 2, (width - cols) // 2
    return image[:, :, top : top + rows, left : left + cols].contiguous()
