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
from fcvgg.streaming.strip_sources import _SAMPLES, PillowSource, StripSource


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
    normalized = normalizer(known)
    if isinstance(source, PillowSource):
        pillow = source
        return lambda rows, cols: normalized(np.asarray(pillow.strip(rows, cols, channels)))
    if source.channels == channels:
        return lambda rows, cols: normalized(source.read(rows, cols))
    _check_convertible(source, channels)

    def converted(rows: Pair, cols: Pair) -> Tensor:
        pixels = source.read(rows, cols)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return normalized(np.asarray(in_mode(image, channels)))

    return converted


def normalizer(preprocess: Preprocess) -> Callable[[NDArray[np.uint8]], Tensor]:
    """`Preprocess.normalized` by a table of the 256 values, with the channels last in memory.

    The bits are the same. A strip is small, and threads that meet after each of several operations
    on it take longer than the work.
    """
    channels = preprocess.channels
    values = np.arange(256, dtype=np.uint8).repeat(channels).reshape(1, 256, channels)
    table = preprocess.normalized(values)[0, :, 0].numpy()  # (C, 256)
    order = range(channels)[:: -1 if preprocess.channel_order == "BGR" else 1]

    def normalized(pixels: NDArray[np.uint8]) -> Tensor:
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels  # (h, w, C)
        result = np.empty(pixels.shape, np.float32)
        for to, channel in enumerate(order):
            result[..., to] = table[to][pixels[..., channel]]
        return torch.from_numpy(result).permute(2, 0, 1)[None]  # (1, C, h, w)

    return normalized


def _check_convertible(source: StripSource, channels: int) -> None:
    """Refuse channels that are not grey, RGB or RGBA, unless they are the network's."""
    if source.channels not in _SAMPLES:
        raise ImageError(
            f"the network takes {channels} channels, and bands={source.bands} of {source.name} "
            f"were chosen; choose {channels}"
        )
    if source.channels == 4 and not source.alpha:
        raise ImageError(
            f"{source.name} has four bands, and the last is no transparency, so that they are not "
            f"RGBA; choose {channels} of them: fcvgg.open_image(path, "
            f"bands={tuple(range(channels))})"
        )


def _owned(pixels: NDArray[Any]) -> Tensor:
    """A copy ``(1, C, h, w)`` of preprocessed floats, with the channels last in memory."""
    last = np.array(pixels.transpose(1, 2, 0), pixels.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(last).permute(2, 0, 1)[None]


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
