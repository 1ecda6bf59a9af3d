"""Images as a network's input: every kind of them, read by one reader."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from fcvgg.errors import ArgumentError, ImageError, one_line
from fcvgg.geometry import Pair
from fcvgg.images.lazy.input import (
    check_pixels,
    check_preprocessed,
    checked_preprocess,
    whole_picture,
)
from fcvgg.images.lazy.opening import strip_source
from fcvgg.images.lazy.source import StripSource, opened
from fcvgg.images.pictures import Picture, in_mode
from fcvgg.images.preprocessing import Preprocess, size_of_side
from fcvgg.probability import widened

ImageLike = Union[str, "os.PathLike[str]", Image.Image, np.ndarray, Tensor, StripSource, Picture]

__all__ = ["ImageLike", "Picture", "PreparedImage", "in_mode", "prepare", "read_image"]

_TENSOR_MODES = {
    "nearest": "nearest-exact",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "lanczos": "bicubic",  # the nearest kernel that torch has
}
"""torch's names of `fcvgg.images.preprocessing.INTERPOLATIONS`."""


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image on its way into a network.

    Attributes:
        size: ``(H, W)`` of the user's image, in whose pixels results are given.
        values: the image to be preprocessed, in the network's channels; None for a tensor.
        pixels: the preprocessed tensor ``(1, C, H, W)``; None until then.
        rescaled: whether its size was chosen for this evaluation, so that preprocessing keeps it.
        interpolation: how it is rescaled; the preprocessing's.
    """

    size: Pair
    values: Picture | None = None
    pixels: Tensor | None = None
    rescaled: bool = False
    interpolation: str = "bilinear"

    @property
    def picture(self) -> Image.Image | None:
        """What people are shown of it; None for a tensor."""
        return None if self.values is None else self.values.image

    def tensor(self, preprocess: Preprocess | None) -> Tensor:
        """The network's input ``(1, C, H, W)``."""
        if self.pixels is not None:
            return self.pixels
        assert self.values is not None
        assert preprocess is not None
        values = self.values
        if not self.rescaled:
            values = values.resized(preprocess.resized_size(values.size), preprocess.interpolation)
        return preprocess.normalized(values.pixels)


def prepare(image: Any, preprocess: Preprocess | None, channels: int) -> PreparedImage:
    """Read an image for a network of `channels` input channels.

    Args:
        image: a tensor, taken as preprocessed; a `Picture`; or what
            `fcvgg.images.lazy.opening.strip_source` takes, which is read whole.
        preprocess: the network's; None if it is unknown.
        channels: of the network.

    Raises:
        ImageError: if it cannot be used as an image.
        PreprocessError: if it is no tensor and the network's preprocessing is unknown.
    """
    how = "bilinear" if preprocess is None else preprocess.interpolation
    if isinstance(image, Tensor):
        pixels = _checked_tensor(image, channels)
        return PreparedImage(_size(pixels), pixels=pixels, interpolation=how)
    if isinstance(image, Picture):
        known = checked_preprocess(preprocess, channels)
        if image.channels != channels:
            raise ImageError(
                f"the picture has {image.channels} channels and the network takes {channels}; "
                "prepare it for this network"
            )
        return PreparedImage(image.size, image, interpolation=known.interpolation)
    if isinstance(image, (str, os.PathLike, Image.Image)):  # known to be pixels before it is opened
        checked_preprocess(preprocess, channels)
    source = strip_source(image, channels)
    if source.preprocessed:
        check_preprocessed(source, channels)
        pixels = torch.from_numpy(np.array(source.whole()))[None]
        return PreparedImage(_size(pixels), pixels=pixels, interpolation=how)
    values = whole_picture(source, checked_preprocess(preprocess, channels))
    return PreparedImage(values.size, values, interpolation=how)


def read_picture(image: Any, preprocess: Preprocess) -> Picture:
    """An image of pixels for a preprocessing, in its channels and units.

    Raises:
        ImageError: if it cannot be used as an image.
    """
    prepared = prepare(image, preprocess, preprocess.channels)
    if prepared.values is None:
        raise ImageError(
            f"{type(image).__name__} is preprocessed; expected an image file, a PIL image or "
            "pixels (H, W, C)"
        )
    return prepared.values


def image_size(image: Any) -> Pair:
    """The size ``(H, W)`` of an image, all of whose pixels can be read.

    Raises:
        ImageError: if it cannot be used as an image.
    """
    source = strip_source(image)
    source.whole()
    return source.size


def check_usable(image: Any, preprocess: Preprocess) -> None:
    """Refuse an image whose channels or values do not suit a preprocessing.

    Only where the brightest value matters, that of 16 bits of an assumed range, are pixels read.

    Raises:
        ImageError: if so.
    """
    source = strip_source(image, preprocess.channels)
    if source.preprocessed:
        check_preprocessed(source, preprocess.channels)
    else:
        check_pixels(source, preprocess)


def read_image(image: Any) -> Image.Image:
    """A file or PIL image as Pillow gives it, upright and in its own mode: for masks of labels.

    Raises:
        ImageError: if there is no file, or it is no image or a broken one.
    """
    if isinstance(image, Image.Image):
        return _upright(image, f"the image {getattr(image, 'filename', '')}".rstrip())
    path = Path(image)
    try:
        found, folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be read: {one_line(error)}") from error
    if not found:
        raise ImageError(f"there is no image file {path}")
    if folder:
        raise ImageError(f"{path} is a folder; expected an image file")
    with opened(path, str(path)) as file:
        return _upright(file, str(path))


def smaller_sides(scales: Iterable[int] | int) -> tuple[int, ...]:
    """Scales, several or one, as lengths of an image's smaller side.

    Raises:
        ArgumentError: if there is none.
        ImageError: if one is no length.
    """
    several = isinstance(scales, Iterable) and not isinstance(scales, str)
    sides = tuple(scales) if several else (scales,)  # type: ignore[arg-type]
    if not sides:
        raise ArgumentError(
            f"scales={scales!r} names none; expected smaller sides in pixels, or None to keep the "
            "image's size"
        )
    return tuple(_checked_side(side) for side in sides)


def checked_flip(flip: Any) -> bool:
    """Whether the mirrored image is evaluated too.

    Raises:
        ArgumentError: if it is neither true nor false.
    """
    if not isinstance(flip, (bool, np.bool_)):
        raise ArgumentError(f"flip={flip!r} is unknown; expected True or False")
    return bool(flip)


def with_smallest_side(image: PreparedImage, side: int) -> PreparedImage:
    """The image rescaled as its preprocessing interpolates, the aspect ratio kept.

    Results then refer to the new pixels, and preprocessing does not resize it again.
    """
    return with_size(image, size_of_side(image.size, _checked_side(side)))


def _checked_side(side: Any) -> int:
    if not isinstance(side, (int, np.integer)) or isinstance(side, bool) or side < 1:
        raise ImageError(f"scale {side!r} is no length; expected a positive number of pixels")
    return int(side)


def with_size(image: PreparedImage, size: Pair) -> PreparedImage:
    """The image resized to ``(h, w)``, whatever its aspect ratio; see `with_smallest_side`."""
    if image.values is not None:
        values = image.values.resized(size, image.interpolation)
        return replace(image, size=size, values=values, rescaled=True)
    assert image.pixels is not None
    wide = widened(image.pixels)  # antialiasing is not there for half precision
    mode = _TENSOR_MODES[image.interpolation]
    smooth = {} if mode == "nearest-exact" else {"align_corners": False, "antialias": True}
    pixels = F.interpolate(wide, list(size), mode=mode, **smooth)  # type: ignore[arg-type]
    return replace(image, size=size, pixels=pixels.to(image.pixels), rescaled=True)


def mirrored(image: PreparedImage) -> PreparedImage:
    """The image with left and right exchanged."""
    if image.values is not None:
        return replace(image, values=image.values.mirrored())
    assert image.pixels is not None
    return replace(image, pixels=image.pixels.flip(-1))


def _size(pixels: Tensor) -> Pair:
    return pixels.shape[2], pixels.shape[3]


def _checked_tensor(image: Tensor, channels: int) -> Tensor:
    shape = tuple(image.shape)
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[0] != 1:
        raise ImageError(
            f"a tensor of shape {shape} is no image; expected (C, H, W) or (1, C, H, W)"
        )
    if batch.shape[1] != channels:
        raise ImageError(
            f"the network takes {channels} channels, got a tensor of shape {shape}; "
            "expected (C, H, W)"
        )
    if 0 in shape:
        raise ImageError(f"the image {shape} has no pixels")
    if not batch.is_floating_point():
        raise ImageError(
            f"a tensor is taken as preprocessed and must hold floats, got {image.dtype}; "
            "pass uint8 pixels as a NumPy array (H, W, C)"
        )
    return batch


def _upright(image: Image.Image, origin: str) -> Image.Image:
    """The image, loaded and turned as its EXIF entry says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes and metadata
            image.load()
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads to
        raise ImageError(f"{origin} is a broken image: {one_line(error)}") from error
    if 0 in image.size:
        raise ImageError(f"{origin} has no pixels: its size is {image.size}")
    return image


def each_image(images: Any) -> Iterable[Any]:
    """One image after the other from a batch, any other iterable of images, or a single image."""
    if hasattr(images, "shape") and hasattr(images, "dtype"):  # an array of any library
        return images if len(images.shape) == 4 else [images]
    single = (str, bytes, os.PathLike, io.IOBase, StripSource)
    several = isinstance(images, Iterable) and not isinstance(images, single)
    return images if several else [images]
