"""Strips of an image as the network's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fcvgg.errors import ImageError, PreprocessError
from fcvgg.geometry import Pair
from fcvgg.images import in_mode
from fcvgg.preprocessing import Preprocess
from fcvgg.streaming.strip_sources import PillowSource, StripSource


def strip_reader(
    source: StripSource, preprocess: Preprocess | None, channels: int
) -> Callable[[Pair, Pair], Tensor]:
    """A function that gives rows and columns of an image as the network's input ``(1, C, h, w)``.

    Raises:
        PreprocessError: if pixels need preprocessing and it is unknown or would resize the image.
        ImageError: if the image has other channels than the network.
    """
    if source.preprocessed:
        if source.channels != channels:
            raise ImageError(
                f"the network takes {channels} channels, and {source.name} has {source.channels}; "
                "floats are taken as preprocessed (C, H, W)"
            )
        return lambda rows, cols: _owned(source.read(rows, cols))
    known = _checked_preprocess(preprocess, channels)
    if isinstance(source, PillowSource):
        pillow = source
        return lambda rows, cols: known(pillow.strip(rows, cols, channels))
    if source.channels == channels:
        return lambda rows, cols: known.normalized(source.read(rows, cols))

    def converted(rows: Pair, cols: Pair) -> Tensor:
        pixels = source.read(rows, cols)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return known(in_mode(image, channels))

    return converted


def _owned(pixels: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(pixels, dtype=pixels.dtype.newbyteorder("="), order="C"))[None]


def _checked_preprocess(preprocess: Preprocess | None, channels: int) -> Preprocess:
    if preprocess is None:
        raise PreprocessError(
            "the network's preprocessing is unknown, so pixels cannot be fed to it; pass "
            "preprocess=fcvgg.Preprocess(mean, std) to convert or load, or preprocessed floats"
        )
    if preprocess.resize is not None:
        raise PreprocessError(
            f"the preprocessing resizes images to {preprocess.resize}, and a streamed image keeps "
            "its size; use a preprocessing with resize=None"
        )
    if preprocess.channels != channels:
        raise PreprocessError(
            f"the preprocessing has {preprocess.channels} channels and the network {channels}; "
            "give mean and std one value per channel"
        )
    return preprocess
