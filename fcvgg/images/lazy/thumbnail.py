"""A small picture of an image of any size."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from PIL import Image

from fcvgg.errors import FcvggError, ImageError
from fcvgg.geometry import Pair
from fcvgg.images.lazy.source import StripSource
from fcvgg.images.pictures import Picture

_READ_BYTES = 64 << 20
"""Bytes of the sums of a strip."""

_SAME_SHAPE = 0.02
"""How far the ratio of sides of a pyramid's level may be from the image's, by its rounding."""


def thumbnail(source: StripSource, size: Pair) -> Image.Image | None:
    """The image at a size ``(h, w)``: means of all pixels; None where its channels are not colours.

    The smallest level of its pyramid that is not smaller is read, strip by strip. Pixels without
    data do not count, and are black where there are no others.

    Raises:
        ImageError: if it holds preprocessed values.
    """
    if source.preprocessed:
        raise ImageError(f"{source.name} must hold pixels to be shown, got preprocessed values")
    if source.channels not in (1, 3, 4):
        return None
    source = _reduced_level(source, size)
    (down, _), (across, width) = (
        (np.linspace(0, pixels, n + 1).round().astype(int), pixels)
        for pixels, n in zip(source.size, size)
    )
    # float64 sums of a strip take eight times its bytes
    step = max(_READ_BYTES // (8 * width * source.channels * source.itemsize), 1)
    lines = []
    for top, bottom in itertools.pairwise(down.tolist()):
        sums: Any = 0
        counts: Any = 0
        for first in range(top, bottom, step):
            read = source.read((first, min(first + step, bottom)), (0, width))
            known = np.isfinite(read)
            sums = sums + np.where(known, read, 0).sum(0, dtype=np.float64)  # (W, C)
            counts = counts + known.sum(0)
        # then over the columns of every pixel of the thumbnail
        sums, counts = (np.add.reduceat(n, across[:-1], 0) for n in (sums, counts))
        lines.append(np.where(counts, sums / np.maximum(counts, 1), np.nan).astype(np.float32))
    pixels = np.stack(lines)
    if source.channels == 4 and not source.transparent():
        pixels = pixels[..., :3]
    return Picture(pixels, source.dtype == np.uint8).image


def _reduced_level(source: StripSource, size: Pair) -> StripSource:
    """The smallest level of an image's pyramid that shows all of it and is not below a size."""
    found = source
    for level in range(source.level + 1, len(source.level_sizes)):
        if source.at_level is None:
            break
        try:
            further = source.at_level(level)
        except FcvggError:  # an open dataset need not give its overviews
            break
        down, across = (n / m for n, m in zip(source.size, further.size))
        alike = abs(down / across - 1) < _SAME_SHAPE and further.channels == source.channels
        if not alike or any(n < least for n, least in zip(further.size, size)):
            break
        found = further
    return found
