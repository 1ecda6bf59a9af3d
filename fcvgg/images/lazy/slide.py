"""Slides that another library has opened: OpenSlide, TiffSlide, cuCIM, or what is used alike."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcvgg.errors import ImageError
from fcvgg.geometry import Pair
from fcvgg.images.lazy.source import Bands, StripSource, level_of, usable_pixel_size
from fcvgg.images.pictures import MODES

_TILE = 256
"""Rows of a tile, where the slide does not say."""

_COLS = 2048
"""Columns that are read at a time."""

_BACKGROUND = "openslide.background-color"
_WHITE = "ffffff"


def is_slide(source: Any) -> bool:
    """Whether an object is read as OpenSlide's are."""
    return hasattr(source, "read_region") and _levels_of(source, "level_dimensions") is not None


class SlideSource(StripSource):
    """One level of an open slide, of which regions are read.

    Transparent pixels, which lie outside the scanned area, have the slide's background colour,
    white where it states none; ``nodata="file"`` makes them missing.

    Args:
        slide: what has ``level_dimensions``, ``(width, height)`` of every level, and
            ``read_region`` of ``location`` ``(x, y)`` at level 0, ``level`` and ``size``
            ``(width, height)``, whose result NumPy takes for pixels.
        level: of the pyramid; 0 is the full resolution.
        bands: the channels to take; None takes all.
    """

    def __init__(self, slide: Any, level: int = 0, bands: Bands = None):
        super().__init__(bands)
        self._slide = slide
        self.file = _file_of(slide)
        self.name = f"the {type(slide).__name__} {self.file or ''}".rstrip()
        self.level_sizes = [(int(h), int(w)) for w, h in _levels_of(slide, "level_dimensions")]
        self.size = level_of(self.level_sizes, level, self.name)
        self.level = level
        stated = getattr(slide, "properties", None)
        self._properties: Mapping[str, Any] = stated if isinstance(stated, Mapping) else {}
        self._downsample = self._stated_downsample()
        by_name = {"location", "level", "size"} <= _parameters(slide.read_region)
        self._by_name = by_name
        pixel = self._region((0, 1), (0, 1))
        self.dtype = pixel.dtype
        self._with_alpha = pixel.shape[2] in (2, 4)
        self.channels = pixel.shape[2] - self._with_alpha
        self._background = self._stated_background()
        sizes = self._stated_pixel_size()
        if sizes is not None:
            down, across = (n / m for n, m in zip(self.full_size, self.size))
            self.pixel_size = usable_pixel_size((sizes[0] * down, sizes[1] * across))
        self.block_rows = min(self._tile_rows(), self.size[0])
        self._check()
        self._stored = pixel.shape[2]

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        # OpenSlide interpolates where a level's pixel does not begin at one of level 0. What is
        # read begins at fixed columns, and rows (`block_rows`), so that strips have the same pixels
        # however an image is cut.
        parts = []
        for first in range(cols[0] // _COLS * _COLS, cols[1], _COLS):
            end = min(first + _COLS, self.size[1])
            part = self._region(rows, (first, end))
            parts.append(part[:, max(cols[0] - first, 0) : cols[1] - first])
        return np.concatenate(parts, 1)

    def _region(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        """What the slide gives for rows and columns of the level, ``(rows, cols, C)``."""
        location = self._at_level_0(cols[0]), self._at_level_0(rows[0])
        size = cols[1] - cols[0], rows[1] - rows[0]
        if self._by_name:  # cuCIM's order is another one
            given = self._slide.read_region(location=location, level=self.level, size=size)
        else:
            given = self._slide.read_region(location, self.level, size)
        if isinstance(given, Image.Image) and given.mode not in (*MODES.values(), "I;16", "F"):
            given = given.convert("RGB")
        pixels = np.asarray(given)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.ndim != 3 or pixels.shape[:2] != size[::-1] or pixels.shape[2] not in MODES:
            raise ImageError(
                f"read_region of {self.name} must give {size[1]}x{size[0]} pixels of 1 to 4 "
                f"channels, got {pixels.dtype} of shape {np.shape(given)}"
            )
        return pixels

    def _at_level_0(self, position: int) -> int:
        """The pixel of level 0 to ask for, so that a region begins at a pixel of the level.

        OpenSlide places what it is asked for between pixels, so that the nearest one is best; other
        readers cut off what is not a whole pixel of the level.
        """
        exact = position * self._downsample
        of_openslide = type(self._slide).__module__.partition(".")[0] == "openslide"
        return round(exact) if of_openslide else ceil(exact)

    def _has_mask(self) -> bool:
        return self._with_alpha

    def _masked(self, stored: NDArray[Any], rows: Pair, cols: Pair) -> NDArray[np.bool_]:
        return np.asarray(stored[..., -1] == 0)

    def _coloured(self, stored: NDArray[Any]) -> NDArray[Any]:
        if not self._with_alpha:
            return stored
        colours, alpha = stored[..., :-1], stored[..., -1]
        if self.dtype != np.uint8 or bool((alpha == 255).all()):
            return colours
        image = Image.fromarray(np.ascontiguousarray(stored)).convert("RGBA")
        canvas = Image.new("RGBA", image.size, self._background)
        laid = np.asarray(Image.alpha_composite(canvas, image))  # as transparency of other files
        return laid[..., : self.channels]

    # -- what the slide says of itself ---------------------------------------------------------

    def _stated_downsample(self) -> float:
        stated = _levels_of(self._slide, "level_downsamples")
        if stated is not None:
            return float(stated[self.level])
        ratios = [n / m for n, m in zip(self.full_size, self.size)]
        return sum(ratios) / len(ratios)  # as OpenSlide does

    def _stated_background(self) -> str:
        stated = str(self._properties.get(_BACKGROUND, _WHITE))
        return f"#{stated if re.fullmatch('[0-9A-Fa-f]{6}', stated) else _WHITE}"

    def _stated_pixel_size(self) -> tuple[float, float] | None:
        """Micrometres of a pixel of level 0."""
        for library in ("openslide", "tiffslide"):
            stated = [self._properties.get(f"{library}.mpp-{axis}") for axis in "yx"]
            try:
                return float(stated[0]), float(stated[1])  # type: ignore[arg-type]
            except (TypeError, ValueError):
                continue
        spacing, units = (getattr(self._slide, name, None) for name in ("spacing", "spacing_units"))
        if callable(spacing) and callable(units) and set(units("YX")) <= {"micrometer", "um", "µm"}:
            down, across = spacing("YX")
            return float(down), float(across)
        return None

    def _tile_rows(self) -> int:
        sizes = _levels_of(self._slide, "level_tile_sizes")
        if sizes is not None:
            return int(sizes[self.level][1])
        stated = [
            self._properties.get(f"{library}.level[{self.level}].tile-height")
            for library in ("openslide", "tiffslide")
        ]
        known = [int(n) for n in stated if n is not None and str(n).isdecimal() and int(n) > 0]
        return min(known[0], 4 * _TILE) if known else _TILE


def _levels_of(slide: Any, name: str) -> Any:
    """What a slide says of all its levels; cuCIM's images hold it in ``resolutions``."""
    resolutions = getattr(slide, "resolutions", None)
    held = resolutions.get(name) if isinstance(resolutions, Mapping) else None
    return getattr(slide, name, held)


def _parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of an extension: OpenSlide's and cuCIM's names are the same
        return {"location", "level", "size"}


def _file_of(slide: Any) -> str | None:
    """The path of a slide, by the attributes of OpenSlide, TiffSlide and cuCIM."""
    handle = getattr(getattr(slide, "ts_tifffile", None), "filehandle", None)
    for holder, name in ((slide, "_filename"), (slide, "path"), (handle, "path")):
        value = getattr(holder, name, None)
        if isinstance(value, (str, os.PathLike)):
            return os.fspath(value)
    return None
