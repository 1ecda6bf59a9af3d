"""Reading images: paths, PIL images, arrays and tensors, in every common mode."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fcvgg.errors import ArgumentError, FcvggError, ImageError, PreprocessError, one_line
from fcvgg.geometry import Pair
from fcvgg.preprocessing import INTERPOLATIONS, Preprocess
from fcvgg.probability import widened

ImageLike = Union[str, "os.PathLike[str]", Image.Image, np.ndarray, Tensor]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

_TENSOR_MODES = {
    "nearest": "nearest-exact",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "lanczos": "bicubic",  # the nearest kernel that torch has
}
"""torch's names of `INTERPOLATIONS`."""


@dataclass(frozen=True)
class PreparedImage:
    """An image on its way into a network.

    Attributes:
        size: ``(H, W)`` of the user's image, in whose pixels results are given.
        picture: the image to look at and to preprocess, in the mode of the network's channels;
            None for a tensor.
        pixels: the preprocessed tensor ``(1, C, H, W)``; None until then.
        rescaled: whether its size was chosen for this evaluation, so that preprocessing keeps it.
        interpolation: how it is rescaled; the preprocessing's.
    """

    size: Pair
    picture: Image.Image | None = None
    pixels: Tensor | None = None
    rescaled: bool = False
    interpolation: str = "bilinear"

    def tensor(self, preprocess: Preprocess | None) -> Tensor:
        """The network's input ``(1, C, H, W)``."""
        if self.pixels is not None:
            return self.pixels
        assert self.picture is not None
        assert preprocess is not None
        return (
            replace(preprocess, resize=None)(self.picture)
            if self.rescaled
            else preprocess(self.picture)
        )


def prepare(image: Any, preprocess: Preprocess | None, channels: int) -> PreparedImage:
    """Read an image for a network of `channels` input channels.

    Raises:
        ImageError: if it cannot be used as an image.
        PreprocessError: if it is no tensor and the network's preprocessing is unknown.
    """
    if isinstance(image, Tensor):
        pixels = _checked_tensor(image, channels)
        prepared = PreparedImage(size=(pixels.shape[2], pixels.shape[3]), pixels=pixels)
        return (
            prepared
            if preprocess is None
            else replace(prepared, interpolation=preprocess.interpolation)
        )
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
    picture = in_mode(read_image(image), channels)
    return PreparedImage(
        size=(picture.height, picture.width),
        picture=picture,
        interpolation=preprocess.interpolation,
    )


def read_image(image: Any) -> Image.Image:
    """An upright PIL image from a path, a PIL image or an array.

    Raises:
        ImageError: if there is no file, it is no image or a broken one, or the array is unsuitable.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _upright(image, f"the image {getattr(image, 'filename', '')}".rstrip())
    if isinstance(image, (str, os.PathLike)):
        return _from_file(Path(image))
    raise ImageError(
        f"{type(image).__name__} is no image; expected a path, a PIL image, a uint8 array "
        "(H, W, C) or a preprocessed tensor (C, H, W)"
    )


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image as ``uint8`` with 1, 3 or 4 channels.

    Transparent pixels are shown on white, 16-bit grey is scaled to 8 bits. Integers of 32 bits
    (mode ``I``) are taken for 8-bit values where none is above 255, else for 16-bit ones.

    Raises:
        ImageError: if the image has no such form.
    """
    mode = _MODES.get(channels)
    if mode is None:
        raise ImageError(
            f"the network takes {channels} channels, which no image file has; "
            f"pass a preprocessed tensor ({channels}, H, W)"
        )
    if image.mode.startswith("I"):
        image = _from_array(_as_unsigned(np.asarray(image)))
    elif image.mode == "F":
        raise ImageError("the image holds floating-point values of unknown range; pass uint8")
    if mode != "RGBA" and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image)
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise ImageError(
            f"an image of mode {image.mode} cannot be shown as {mode}; convert it first"
        ) from error


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
    height, width = image.size
    factor = _checked_side(side) / min(height, width)
    return with_size(image, (max(round(height * factor), 1), max(round(width * factor), 1)))


def _checked_side(side: Any) -> int:
    if not isinstance(side, (int, np.integer)) or isinstance(side, bool) or side < 1:
        raise ImageError(f"scale {side!r} is no length; expected a positive number of pixels")
    return int(side)


def with_size(image: PreparedImage, size: Pair) -> PreparedImage:
    """The image resized to ``(h, w)``, whatever its aspect ratio; see `with_smallest_side`."""
    if image.picture is not None:
        picture = image.picture.resize((size[1], size[0]), INTERPOLATIONS[image.interpolation])
        return replace(image, size=size, picture=picture, rescaled=True)
    assert image.pixels is not None
    wide = widened(image.pixels)  # antialiasing is not there for half precision
    mode = _TENSOR_MODES[image.interpolation]
    smooth = {} if mode == "nearest-exact" else {"align_corners": False, "antialias": True}
    pixels = F.interpolate(wide, list(size), mode=mode, **smooth)  # type: ignore[arg-type]
    return replace(image, size=size, pixels=pixels.to(image.pixels), rescaled=True)


def mirrored(image: PreparedImage) -> PreparedImage:
    """The image with left and right exchanged."""
    if image.picture is not None:
        return replace(image, picture=ImageOps.mirror(image.picture))
    assert image.pixels is not None
    return replace(image, pixels=image.pixels.flip(-1))


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


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(
            f"an array of {array.dtype} has no known range; pass uint8 (H, W, C), "
            "or a preprocessed tensor"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if 0 in array.shape:
        raise ImageError(f"the array {array.shape} has no pixels")
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)):
        return Image.fromarray(array)
    raise ImageError(
        f"an array of shape {array.shape} is no image; expected (H, W), (H, W, 3) or (H, W, 4)"
    )


def _as_unsigned(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Grey values as ``uint8`` or ``uint16``; mode ``I``, of 32 bits, does not say which."""
    if pixels.size and (pixels.min() < 0 or pixels.max() > np.iinfo(np.uint16).max):
        raise ImageError(
            f"the image holds integers from {pixels.min()} to {pixels.max()}, beyond 16 bits; "
            "pass uint8"
        )
    of_bytes = pixels.dtype == np.int32 and pixels.max(initial=0) <= np.iinfo(np.uint8).max
    return pixels.astype(np.uint8 if of_bytes else np.uint16)


def _from_file(path: Path) -> Image.Image:
    try:
        if path.is_dir():
            raise ImageError(f"{path} is a folder; expected an image file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes and metadata
            with Image.open(path) as image:
                return _upright(image, str(path))
    except FileNotFoundError as error:
        raise ImageError(f"there is no image file {path}") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path} is no image that Pillow can read; expected PNG, JPEG or the like"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path} is too large to be loaded whole: {one_line(error)}; make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        ) from error
    except FcvggError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads to
        raise ImageError(f"{path} cannot be read: {one_line(error)}") from error


def _upright(image: Image.Image, origin: str) -> Image.Image:
    """The image, loaded and turned as its EXIF entry says."""
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads to
        raise ImageError(f"{origin} is a broken image: {one_line(error)}") from error
    if 0 in image.size:
        raise ImageError(f"{origin} has no pixels: its size is {image.size}")
    return image
