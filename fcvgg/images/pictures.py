"""Images in memory: pixels in a network's channels, and the conversions that lead there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcvgg.errors import ImageError
from fcvgg.geometry import Pair
from fcvgg.images.preprocessing import INTERPOLATIONS

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's modes of 8-bit pixels by their channels."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""The shares of red, green and blue in grey, ITU-R 601-2, as Pillow takes them."""

_SHOWN = 0.01
"""Where the range is unknown, this share of the values is shown as black, and as much as white."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image in memory.

    Attributes:
        pixels: ``(H, W, C)`` in a network's channels: ``uint8``, or float32 as
            `Preprocess.units` gives them, NaN where there is no data.
        in_bytes: whether floats have the range of bytes, 0 to 255.
    """

    pixels: NDArray[Any]
    in_bytes: bool = True

    @property
    def size(self) -> Pair:
        """``(H, W)``."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def channels(self) -> int:
        """Numbers of a pixel."""
        return int(self.pixels.shape[2])

    def resized(self, size: Pair, interpolation: str) -> Picture:
        """At the size ``(h, w)``, by Pillow's filters; floats are not rounded."""
        if size == self.size:
            return self
        filtered = INTERPOLATIONS[interpolation]
        return self._change(lambda plane: plane.resize((size[1], size[0]), filtered))

    def mirrored(self) -> Picture:
        """With left and right exchanged."""
        return replace(self, pixels=self.pixels[:, ::-1])

    def cropped(self, top: int, left: int, size: Pair) -> Picture:
        """The part of the size ``(h, w)`` that begins at a pixel."""
        return replace(self, pixels=self.pixels[top : top + size[0], left : left + size[1]])

    @property
    def image(self) -> Image.Image:
        """The picture to look at: grey, RGB or RGBA of 8 bits.

        Of more channels the first three are shown, and of values of unknown range those from the
        1st to the 99th percentile.
        """
        pixels = self.pixels if self.channels in (1, 3, 4) else self.pixels[..., :3]
        pixels = pixels[..., :1] if pixels.shape[2] == 2 else pixels
        return _as_image(shown(pixels, self.in_bytes))

    def _change(self, change: Callable[[Image.Image], Image.Image]) -> Picture:
        """Change every channel alone: Pillow would weight the others by the last of four."""
        if self.pixels.dtype == np.uint8 and self.channels in (1, 3):
            pixels = np.asarray(change(_as_image(self.pixels)))
            return replace(self, pixels=pixels[..., None] if pixels.ndim == 2 else pixels)
        planes = [
            np.asarray(change(Image.fromarray(np.ascontiguousarray(self.pixels[..., i]))))
            for i in range(self.channels)
        ]
        return replace(self, pixels=np.stack(planes, 2))


def shown(pixels: NDArray[Any], in_bytes: bool) -> NDArray[np.uint8]:
    """Pixels as bytes to look at; those without data are black."""
    if pixels.dtype == np.uint8:
        return pixels
    low, high = 0.0, 255.0
    if not in_bytes:
        known = pixels[np.isfinite(pixels)]
        low, high = np.quantile(known, (_SHOWN, 1 - _SHOWN)) if known.size else (0.0, 1.0)
    values = (np.asarray(pixels, np.float32) - low) * (255 / (high - low) if high > low else 0.0)
    return np.nan_to_num(values, nan=0.0).clip(0, 255).round().astype(np.uint8)


def in_channels(pixels: NDArray[Any], channels: int, dtype: Any, white: float) -> NDArray[Any]:
    """Pixels ``(h, w, C)`` of grey, RGB or either with alpha in 1, 3 or 4 channels.

    ``uint8`` pixels are converted by Pillow. Others become float32 in their own range, of which
    `white` is the brightest value; transparent pixels are shown on white.

    Args:
        dtype: what the image holds, where `pixels` have been cast since: whole numbers have the
            alpha of their own range, floats one from 0 to 1.
    """
    if pixels.dtype == np.uint8:
        converted = np.asarray(in_mode(_as_image(pixels), channels))
        return converted[..., None] if converted.ndim == 2 else converted
    values = pixels.astype(np.float32, copy=False)
    opaque = np.float32(np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1)
    if values.shape[2] in (2, 4):
        alpha = values[..., -1:] / opaque
        if channels != 4:
            values = values[..., :-1] * alpha + np.float32(white) * (1 - alpha)
        else:
            values = np.concatenate([values[..., :1]] * 3 + [values[..., 1:]], 2)
    if channels == 1:
        return values if values.shape[2] == 1 else (values @ _LUMA)[..., None]
    if values.shape[2] == 1:
        values = values.repeat(3, 2)
    if channels == 4 and values.shape[2] == 3:
        values = np.concatenate([values, np.full_like(values[..., :1], opaque)], 2)
    return values


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """An image of 8 bits in the mode of 1, 3 or 4 channels, transparent pixels on white."""
    mode = MODES[channels]
    if mode != "RGBA" and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image)
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise ImageError(
            f"the image must be of a mode that converts to {mode}, got {image.mode}"
        ) from error


def pixels_of(image: Image.Image) -> NDArray[Any]:
    """The pixels ``(h, w, C)`` of a loaded PIL image: grey, RGB, either with alpha, or wide values.

    Pillow converts palettes, CMYK and the other colour spaces of 8 bits, or raises `ValueError`.
    Whole numbers of 32 bits (mode ``I``) that fit 8 bits are taken for 8-bit values, else for
    16-bit ones.
    """
    if image.mode == "I":
        return _as_unsigned(np.asarray(image))[..., None]
    if image.mode.startswith("I;") or image.mode == "F":
        pixels = np.asarray(image)
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)[..., None]
        hidden = image.info.get("transparency")
        if hidden is None:
            return pixels
        return np.concatenate([pixels, (pixels != hidden) * pixels.dtype.type(65535)], 2)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    mode = image.mode if image.mode in MODES.values() else "L" if image.mode == "1" else "RGB"
    if image.mode == "PA" or "transparency" in image.info:
        mode = "RGBA"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def in_bytes(stored: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Values of fewer than 8 bits as bytes of the same brightness."""
    top = (1 << bits) - 1
    return ((np.arange(top + 1) * 255 + top // 2) // top).astype(np.uint8)[
        np.minimum(stored, top).astype(np.uint8)
    ]


def _as_unsigned(pixels: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers of 32 bits as ``uint8`` or ``uint16`` where they fit; the mode does not say."""
    low, high = (int(pixels.min()), int(pixels.max())) if pixels.size else (0, 0)
    for dtype in (np.uint8, np.uint16):
        if low >= 0 and high <= np.iinfo(dtype).max:
            return pixels.astype(dtype)
    return pixels


def _as_image(pixels: NDArray[Any]) -> Image.Image:
    squeezed = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(squeezed))
