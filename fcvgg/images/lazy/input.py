"""Pixels of a source as a network's input, by strips and whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fcvgg.errors import FcvggWarning, ImageError, PreprocessError
from fcvgg.geometry import Pair
from fcvgg.images.lazy.source import ArraySource, StripSource, warn
from fcvgg.images.pictures import Picture, in_channels
from fcvgg.images.preprocessing import Preprocess

_CONVERTIBLE = (1, 3, 4)
"""Channels of networks that grey, RGB and RGBA can be brought to."""

_LEAST_OF_RANGE = 1 << 14
"""16-bit values that all lie below a quarter of the range are usually of a camera or scene that has
another: 12 and 14 bits, or reflectances times 10,000."""


@cache
def warn_of_dark_values() -> None:
    """Warn once in a process: what holds for one image holds as a rule for all of its folder."""
    warnings.warn(
        f"an image has only 16-bit values below {_LEAST_OF_RANGE}, which are nearly black in the "
        "range 0 to 65535 that the preprocessing takes them for; pass value_range=(low, high) or a "
        "scale= of its own to fcvgg.Preprocess (--range LOW,HIGH) if they have another range, or "
        "value_range=(0, 65535) if they are meant so",
        FcvggWarning,
        stacklevel=3,
    )


def strip_reader(
    source: StripSource, preprocess: Preprocess | None, channels: int
) -> Callable[[Pair, Pair], Tensor]:
    """A function that gives rows and columns of an image as the network's input ``(1, C, h, w)``.

    Raises:
        PreprocessError: if pixels need preprocessing and it is unknown or would resize the image.
        ImageError: if the image has other channels than the network, or its range is unknown.
    """
    if source.preprocessed:
        check_preprocessed(source, channels)
        return lambda rows, cols: _owned(source.read(rows, cols))
    known = checked_preprocess(preprocess, channels)
    if known.resize is not None:
        raise PreprocessError(
            "the preprocessing must have resize=None to stream an image, which keeps its size, got "
            f"resize={known.resize}"
        )
    convert = check_pixels(source, known)
    normalized = normalizer(known)
    return lambda rows, cols: normalized(convert(source.read(rows, cols)))


def check_pixels(
    source: StripSource, preprocess: Preprocess
) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """A function that brings pixels to the preprocessing's channels and units.

    `ImageError` if they have other channels than the network, or an unknown range.
    """
    preprocess = _with_declared_range(preprocess, source)
    convert = _converter(source, preprocess)
    _check_brightness(source.sample(), source, preprocess)
    return convert


def whole_picture(source: StripSource, preprocess: Preprocess) -> Picture:
    """A whole image in the preprocessing's channels and units, or `ImageError` if it has none."""
    preprocess = _with_declared_range(preprocess, source)
    convert = _converter(source, preprocess)
    values = source.whole()
    _check_brightness([values], source, preprocess)
    in_bytes = (
        source.dtype == np.uint8 or preprocess.takes_bytes or preprocess.value_range is not None
    )
    return Picture(convert(values), in_bytes)


def _with_declared_range(preprocess: Preprocess, source: StripSource) -> Preprocess:
    """The preprocessing with the range of the bits that a file declares, where one is assumed."""
    if source.white is None or not preprocess.assumes_range(source.dtype):
        return preprocess
    return replace(preprocess, value_range=(0, source.white))


def _converter(
    source: StripSource, preprocess: Preprocess
) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """A function that brings pixels to the preprocessing's channels and units."""
    channels, dtype, name = preprocess.channels, source.dtype, source.name
    preprocess.units(np.zeros(1, dtype), name=name)  # a range that is unknown is refused here
    if source.reduced and not (preprocess.takes_bytes and preprocess.value_range is None):
        raise ImageError(
            f"{name} must hold 8 bits for a preprocessing that takes values as they are, got more, "
            "of which Pillow gives 8; save it as PNG or TIFF"
        )
    if source.channels == channels:
        return lambda pixels: preprocess.units(pixels, dtype, name)
    _check_convertible(source, channels)
    white = 255.0
    if dtype != np.uint8 and preprocess.value_range is not None:
        white = preprocess.value_range[1]
    elif dtype.kind in "iu":
        white = float(np.iinfo(dtype).max)
    elif preprocess.assumes_range(dtype):
        white = 1.0
    elif source.channels in (2, 4):
        raise ImageError(
            f"{name} must have a known white where floats are transparent, got none; pass "
            "value_range=(low, high) to fcvgg.Preprocess, or leave the transparency out: "
            f"{_choice(source, channels)}"
        )
    return lambda pixels: preprocess.units(in_channels(pixels, channels, dtype, white), dtype, name)


def normalizer(preprocess: Preprocess) -> Callable[[NDArray[Any]], Tensor]:
    """`Preprocess.normalized` with the channels last in memory; of bytes by a table of 256 values.

    The bits are the same. A strip is small, and threads that meet after each of several operations
    on it take longer than the work.
    """
    channels = preprocess.channels
    values = np.arange(256, dtype=np.uint8).repeat(channels).reshape(1, 256, channels)
    table = preprocess.normalized(values)[0, :, 0].numpy()  # (C, 256)
    order = range(channels)[:: -1 if preprocess.channel_order == "BGR" else 1]

    def normalized(pixels: NDArray[Any]) -> Tensor:
        if pixels.dtype != np.uint8:
            return preprocess.normalized(pixels).contiguous(memory_format=torch.channels_last)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels  # (h, w, C)
        result = np.empty(pixels.shape, np.float32)
        for to, channel in enumerate(order):
            result[..., to] = table[to][pixels[..., channel]]
        return torch.from_numpy(result).permute(2, 0, 1)[None]  # (1, C, h, w)

    return normalized


def _check_brightness(
    parts: Iterable[NDArray[Any]], source: StripSource, preprocess: Preprocess
) -> None:
    """Warn of 16-bit values that are assumed to have the whole range, and use little of it.

    Transparency and the value of missing data do not count. Of floats the range is always assumed.
    """
    if not preprocess.assumes_range(source.dtype):
        return
    if source.dtype.kind == "f":
        for part in parts:  # which are refused outside the range
            preprocess.units(part, source.dtype, source.name)
        warn(
            f"{source.name} holds floats, which are taken for the range from 0 to 1; pass "
            "value_range=(low, high) to fcvgg.Preprocess (--range LOW,HIGH) if it is another, or "
            "value_range=(0, 1) to confirm it",
            None if source.path is None else "floats",
        )
        return
    highest = 0
    for part in parts:
        values = part[..., :-1] if source.alpha else part
        counted = values == values
        if source.nodata is not None:
            counted &= values != source.nodata
        highest = max(highest, np.max(values, where=counted, initial=0))
        if highest >= _LEAST_OF_RANGE:  # as a rule in the first part, which is read anyway
            return
    if highest:
        warn_of_dark_values()


def _check_convertible(source: StripSource, channels: int) -> None:
    """Refuse channels that are not grey, RGB or either with transparency."""
    found, name = source.channels, source.name
    if channels not in _CONVERTIBLE:
        _check_order(source, channels)
        remedy = f"pass a preprocessed tensor ({channels}, H, W)" if found < channels else None
        raise ImageError(
            f"{name} must have the network's {channels} channels, got {found}; "
            f"{remedy or f'choose some: {_choice(source, channels)}'}"
        )
    if found in (1, 3) or (found in (2, 4) and source.transparent()):
        return
    _check_order(source, channels)
    if source.bands is not None:
        raise ImageError(
            f"bands must be the network's {channels} channels of {name}, got {source.bands}"
        )
    kept = channels if found >= channels else 1
    if found == 4:
        raise ImageError(
            f"{name} has four bands, of which the last is not taken for transparency, so that they "
            f"are not RGBA; choose {kept} of them: {_choice(source, kept)}"
        )
    raise ImageError(
        f"{name} must have 1, 3 or 4 channels, or the network's {channels}, in the order "
        f"(H, W, C), got {found}; {_choice(source, kept)} chooses some"
    )


def _check_order(source: StripSource, channels: int) -> None:
    """Refuse an array (C, H, W), whose channels are taken for rows and its columns for channels."""
    if _in_memory(source) and source.size[0] in (1, 3, 4, channels) and source.channels > 4:
        raise ImageError(
            f"{source.name} must be (H, W, C) with {channels} channels, got {source.channels} in "
            "its last dimension; an array (C, H, W) is transposed by np.moveaxis(array, 0, -1)"
        )


def _in_memory(source: StripSource) -> bool:
    """Whether it is an array that the user holds."""
    return isinstance(source, ArraySource) and source.path is None


def _choice(source: StripSource, count: int) -> str:
    """What chooses some channels of an image."""
    if _in_memory(source):
        return f"array[..., {list(range(count))}]"
    return f"fcvgg.open_image(path, bands={tuple(range(count))})"


def check_preprocessed(source: StripSource, channels: int) -> None:
    """Raise `ImageError` for preprocessed floats of other channels than the network's."""
    if source.channels != channels:
        raise ImageError(
            f"{source.name} must have the network's {channels} channels, got {source.channels}; "
            "floats are taken as preprocessed (C, H, W), or as values (H, W, C)"
        )


def _owned(pixels: NDArray[Any]) -> Tensor:
    """A copy ``(1, C, h, w)`` of preprocessed floats, with the channels last in memory."""
    last = np.array(pixels.transpose(1, 2, 0), pixels.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(last).permute(2, 0, 1)[None]


def checked_preprocess(preprocess: Preprocess | None, channels: int) -> Preprocess:
    """The network's preprocessing, or `PreprocessError` if it is unknown or has other channels."""
    if preprocess is None:
        raise PreprocessError(
            "the network's preprocessing is unknown, so an image file or uint8 array cannot be fed "
            "to it; pass preprocess=fcvgg.Preprocess(mean, std) to convert or load, or a tensor"
        )
    if preprocess.channels != channels:
        raise PreprocessError(
            f"the preprocessing must have the network's {channels} channels, got "
            f"{preprocess.channels}; give mean and std one value per channel"
        )
    return preprocess
