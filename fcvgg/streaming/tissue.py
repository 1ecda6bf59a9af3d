"""Where a slide shows tissue."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcvgg.errors import ArgumentError
from fcvgg.images.lazy.source import StripSource
from fcvgg.images.lazy.thumbnail import thumbnail
from fcvgg.images.pictures import in_mode

TISSUE = "tissue"
"""What `where=` calls it."""

_THUMBNAIL = 1024
"""Pixels of the larger side of the thumbnail on which tissue is looked for."""

_DARK, _BRIGHT, _LEAST_CONTRAST = 20, 200, 10
"""Of 255: borders that scanners leave are darker, the glass is brighter, tissue differs by more."""

_LEAST_GLASS = 0.05
"""Least share of bright pixels, among those that are not dark, for them to be a slide's glass."""


def tissue(source: StripSource) -> NDArray[np.bool_]:
    """Where a slide shows tissue, on a thumbnail ``(h, w)``.

    The distance of every pixel's colour from the background's is split by Otsu's threshold ("A
    threshold selection method from gray-level histograms", 1979). The background is the most
    frequent colour of the bright glass, and of images without glass the most frequent one of all.
    Black borders next to glass count as neither.

    Raises:
        ImageError: if the image holds preprocessed values.
        ArgumentError: if its channels are not colours.
    """
    factor = max(max(source.size) / _THUMBNAIL, 1)
    height, width = (max(round(n / factor), 1) for n in source.size)
    picture = thumbnail(source, (height, width))
    if picture is None:
        raise ArgumentError(
            f"where must be a mask or polygons for {source.name} of {source.channels} channels, "
            f"got {TISSUE!r}, which is found by its colours"
        )
    pixels = np.asarray(in_mode(picture, 3)).astype(np.int16)  # (h, w, 3)
    usable = pixels.max(2) >= _DARK
    glass = usable & (pixels.min(2) >= _BRIGHT)
    if glass.sum() <= _LEAST_GLASS * usable.sum():
        usable = glass = np.ones_like(usable)
    background = [np.bincount(plane[glass]).argmax() for plane in np.moveaxis(pixels, 2, 0)]
    distance = np.abs(pixels - background).max(2)
    threshold = max(otsu(distance[usable]), _LEAST_CONTRAST)
    found: NDArray[np.bool_] = usable & (distance > threshold)
    return found


def otsu(values: NDArray[Any]) -> int:
    """The threshold of whole numbers from 0 to 255 above which they are of the higher class.

    It makes the variance between the two classes largest.
    """
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below = counts.cumsum()  # how many are at or below each value
    sums = (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return int(np.nan_to_num(between).argmax())
