"""Pixels of a source as a network's input, by strips and whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fcvgg.errors import ImageError, PreprocessError
from fcvgg.geometry import Pair
from fcvgg.images.lazy.source import ArraySource, StripSource
from fcvgg.images.pictures import Picture, in_channels
from fcvgg.images.preprocessing import Preprocess, check_filled

_CONVERTIBLE = (1, 3, 4)
"""Channels of networks that grey, RGB and RGBA can be brought to."""

_LOOKED_AT = 9
"""Parts of an image, evenly spread, that are looked at first for its brightest value."""

_VALUES = 1 << 22
"""Values that are read at once to find the brightest."""


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
            f"the preprocessing resizes images to {known.resize}, and a streamed image keeps "
            "its size; use a preprocessing with resize=None"
        )
    convert = check_pixels(source, known)
    normalized = normalizer(known)
    return lambda rows, cols: normalized(convert(source.read(rows, cols)))


def check_pixels(
    source: StripSource, preprocess: Preprocess
) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """A function that brings pixels to the preprocessing's channels and units.

    Raises:
        ImageError: if they have none: other channels than the network, or an unknown range.
    """
    convert = _converter(source, preprocess)
    if preprocess.assumes_range(source.dtype):
        check_filled(_highest(source), source.name)
    return convert


def whole_picture(source: StripSource, preprocess: Preprocess) -> Picture:
    """An image of pixels as a whole, in the preprocessing's channels and units.

    Raises:
        ImageError: if the image has other channels than the network, or its range is unknown.
    """
    convert = _converter(source, preprocess)
    values = source.whole()
    if preprocess.assumes_range(source.dtype):
        check_filled(_brightest(values, source), source.name)
    in_bytes = (
        source.dtype == np.uint8 or preprocess.takes_bytes or preprocess.value_range is not None
    )
    return Picture(convert(values), in_bytes)


def _converter(
    source: StripSource, preprocess: Preprocess
) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """A function that brings pixels to the preprocessing's channels and units."""
    channels, dtype, name = preprocess.channels, source.dtype, source.name
    preprocess.units(np.zeros(1, dtype), name=name)  # a range that is unknown is refused here
    if source.reduced and not (preprocess.takes_bytes and preprocess.value_range is None):
        raise ImageError(
            f"{name} holds more than 8 bits, of which Pillow gives 8, and the preprocessing takes "
            "the values as they are; save it as PNG or TIFF"
        )
    if source.channels == channels:
        return lambda pixels: preprocess.units(pixels, dtype, name)
    _check_convertible(source, channels)
    white = 255.0
    if dtype != np.uint8 and preprocess.value_range is not None:
        white = preprocess.value_range[1]
    elif dtype.kind in "iu":
        white = float(np.iinfo(dtype).max)
    elif source.channels in (2, 4):
        raise ImageError(
            f"{name} has transparency and floats, whose white is unknown; pass "
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


def _highest(source: StripSource) -> float:
    """The brightest value of an image, or the first one that fills its range.

    A full image shows that in its first rows; only a dark one is read to the end.
    """
    highest = 0.0
    for rows, cols in _parts(source):
        highest = max(highest, _brightest(source.read(rows, cols), source))
        try:
            check_filled(highest, source.name)
        except ImageError:
            continue
        if highest:
            break
    return highest


def _parts(source: StripSource) -> Iterator[tuple[Pair, Pair]]:
    """Rows and columns that cover an image: the first block, some that are spread, and the rest."""
    height, width = source.size
    rows = source.block_rows
    if rows <= 1:
        rows = min(max(_VALUES // (width * source.channels), 1), height)
    cols = min(max(_VALUES // (rows * source.channels), 1), width)
    blocks = -(-height // rows)
    spread = np.linspace(0, blocks - 1, min(_LOOKED_AT, blocks)).round().astype(int).tolist()
    for block in dict.fromkeys([*spread, *range(blocks)]):
        for left in range(0, width, cols):
            below = min((block + 1) * rows, height)
            yield (block * rows, below), (left, min(left + cols, width))


def _brightest(values: NDArray[Any], source: StripSource) -> float:
    """The highest value; transparency and what stands for missing data do not count."""
    if source.alpha:
        values = values[..., :-1]
    counted = values == values
    if source.nodata is not None:
        counted &= values != source.nodata
    return float(np.max(values, where=counted, initial=0))


def _check_convertible(source: StripSource, channels: int) -> None:
    """Refuse channels that are not grey, RGB or either with transparency."""
    found, name = source.channels, source.name
    if channels not in _CONVERTIBLE:
        _check_order(source, channels)
        remedy = f"pass a preprocessed tensor ({channels}, H, W)" if found < channels else None
        raise ImageError(
            f"the network takes {channels} channels, and {name} has {found}; "
            f"{remedy or f'choose some: {_choice(source, channels)}'}"
        )
    if found in (1, 3) or (found in (2, 4) and source.transparent()):
        return
    _check_order(source, channels)
    if source.bands is not None:
        raise ImageError(
            f"the network takes {channels} channels, and bands={source.bands} of {name} were "
            f"chosen; choose {channels}"
        )
    kept = channels if found >= channels else 1
    if found == 4:
        raise ImageError(
            f"{name} has four bands, of which the last is not taken for transparency, so that they "
            f"are not RGBA; choose {kept} of them: {_choice(source, kept)}"
        )
    raise ImageError(
        f"{name} has {found} channels; expected 1, 3 or 4, or the network's {channels}, in the "
        f"order (H, W, C); {_choice(source, kept)} chooses some"
    )


def _check_order(source: StripSource, channels: int) -> None:
    """Refuse an array whose channels come first, which look like its rows."""
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
    """Refuse preprocessed floats of other channels than the network's.

    Raises:
        ImageError: if so.
    """
    if source.channels != channels:
        raise ImageError(
            f"the network takes {channels} channels, and {source.name} has {source.channels}; "
            "floats are taken as preprocessed (C, H, W), or as values (H, W, C)"
        )


def _owned(pixels: NDArray[Any]) -> Tensor:
    """A copy ``(1, C, h, w)`` of preprocessed floats, with the channels last in memory."""
    last = np.array(pixels.transpose(1, 2, 0), pixels.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(last).permute(2, 0, 1)[None]


def checked_preprocess(preprocess: Preprocess | None, channels: int) -> Preprocess:
    """The preprocessing of a network.

    Raises:
        PreprocessError: if it is unknown, or has other channels than the network.
    """
    if preprocess is None:
        raise PreprocessError(
            "the network's preprocessing is unknown, so an image file or uint8 array cannot be fed "
            "to it; pass preprocess=fcvgg.Preprocess(mean, std) to convert or load, or a tensor"
        )
    if preprocess.channels != channels:
        raise PreprocessError(
            f"the preprocessing has {preprocess.channels} channels and the network {channels}; "
            "give mean and std one value per channel"
        )
    return preprocess
