"""Images as a network's input: every kind of them, read by one reader."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fcvgg.errors import ArgumentError, FcvggWarning, ImageError
from fcvgg.geometry import Pair
from fcvgg.images.files import contents, left_out
from fcvgg.images.lazy.georeference import Georeference
from fcvgg.images.lazy.input import (
    check_pixels,
    check_preprocessed,
    checked_preprocess,
    whole_picture,
)
from fcvgg.images.lazy.opening import as_file, is_file, is_zarr, strip_source
from fcvgg.images.lazy.source import StripSource, is_folder, opened, upright
from fcvgg.images.pictures import Picture, in_mode
from fcvgg.images.preprocessing import Preprocess, size_of_side
from fcvgg.probability import upcast

_File = Union[str, "os.PathLike[str]", bytes, BinaryIO]
ImageLike = _File | Image.Image | np.ndarray | Tensor | StripSource | Picture

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
        full_size: ``(H, W)`` of level 0 of the slide of which it is a level, if it is one.
        georeference: where its pixels lie on the earth, if it is known.
    """

    size: Pair
    values: Picture | None = None
    pixels: Tensor | None = None
    rescaled: bool = False
    interpolation: str = "bilinear"
    full_size: Pair | None = None
    georeference: Georeference | None = None

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


def prepare(
    image: Any,
    preprocess: Preprocess | None,
    channels: int,
    nodata: float | str | None = None,
) -> PreparedImage:
    """Read an image for a network of `channels` input channels.

    Args:
        image: a tensor of floats, taken as preprocessed; a `Picture`; or what
            `fcvgg.images.lazy.opening.strip_source` takes, which is read whole.
        preprocess: the network's; None if it is unknown.
        channels: of the network.
        nodata: as for `fcvgg.open_image`.

    Raises:
        ImageError: if it cannot be used as an image.
        PreprocessError: if it needs preprocessing and the network's is unknown.
        ArgumentError: if `nodata` is given for what is open already, or preprocessed.
    """
    how = "bilinear" if preprocess is None else preprocess.interpolation
    if isinstance(image, Tensor) and image.is_floating_point():
        # it stays on its device and in its graph
        check_preprocessed(strip_source(image, channels, nodata), channels)
        pixels = image if image.ndim == 4 else image[None]
        return PreparedImage(_size(pixels), pixels=pixels, interpolation=how)
    if isinstance(image, Picture):
        known = checked_preprocess(preprocess, channels)
        if image.channels != channels:
            raise ImageError(
                f"the picture must have the network's {channels} channels, got {image.channels}; "
                "prepare it for this network"
            )
        return PreparedImage(image.size, image, interpolation=known.interpolation)
    image = as_file(image)
    if isinstance(image, (str, os.PathLike, Image.Image)) or is_file(image):
        # known to be pixels before it is opened
        checked_preprocess(preprocess, channels)
    source = strip_source(image, channels, nodata)
    if source.preprocessed:
        check_preprocessed(source, channels)
        pixels = torch.from_numpy(np.array(source.whole()))[None]
        return PreparedImage(_size(pixels), pixels=pixels, interpolation=how)
    values = whole_picture(source, checked_preprocess(preprocess, channels))
    return PreparedImage(
        values.size,
        values,
        interpolation=how,
        full_size=source.full_size,
        georeference=source.georeference,
    )


def read_picture(image: Any, preprocess: Preprocess) -> Picture:
    """An image of pixels in a preprocessing's channels and units, or `ImageError`."""
    prepared = prepare(image, preprocess, preprocess.channels)
    if prepared.values is None:
        raise ImageError(
            "the image must be a file, a PIL image or pixels (H, W, C), got preprocessed floats in "
            f"a {type(image).__name__}"
        )
    return prepared.values


def image_size(image: Any) -> Pair:
    """The size ``(H, W)`` of an image, or `ImageError` if not all of its pixels can be read."""
    source = strip_source(image)
    source.whole()
    return source.size


def check_usable(image: Any, preprocess: Preprocess) -> None:
    """Raise `ImageError` for an image whose channels or values do not suit a preprocessing.

    Of pixels only some rows are read, and only where their range is assumed.
    """
    source = strip_source(image, preprocess.channels)
    if source.preprocessed:
        check_preprocessed(source, preprocess.channels)
    else:
        check_pixels(source, preprocess)


def read_image(image: Any) -> Image.Image:
    """A file or PIL image as Pillow gives it, upright and in its own mode: for masks of labels.

    Raises:
        ImageError: if there is no file, or it is broken or not an image.
    """
    if isinstance(image, Image.Image):
        return upright(image, f"the image {getattr(image, 'filename', '')}".rstrip())
    path = Path(image)
    if is_folder(path):
        raise ImageError(f"{path} must be an image file, got a folder")
    with opened(path, str(path)) as file:
        return upright(file, str(path))


def _images_in(folder: Path) -> Sequence[Path]:
    if is_zarr(folder):
        return [folder]
    found = contents(folder)
    if not found.images:
        raise ImageError(f"the folder {folder} has no images; pass one that holds image files")
    if found.skipped:
        warnings.warn(left_out(found.skipped, len(found.images)), FcvggWarning, stacklevel=2)
    return found.images


def smaller_sides(scales: Iterable[int] | int) -> tuple[int, ...]:
    """Scales, several or one, as lengths of an image's smaller side, or an error."""
    several = isinstance(scales, Iterable) and not isinstance(scales, str)
    sides = tuple(scales) if several else (scales,)  # type: ignore[arg-type]
    if not sides:
        raise ArgumentError(
            "scales must be smaller sides in pixels, or None to keep the image's size, got "
            f"{scales!r}"
        )
    return tuple(_checked_side(side, "scales") for side in sides)


def checked_flip(flip: Any) -> bool:
    """Whether the mirrored image is evaluated too, or `ArgumentError`."""
    if not isinstance(flip, (bool, np.bool_)):
        raise ArgumentError(f"flip must be True or False, got {flip!r}")
    return bool(flip)


def with_smallest_side(image: PreparedImage, side: int) -> PreparedImage:
    """The image rescaled as its preprocessing interpolates, the aspect ratio kept.

    Results then refer to the new pixels, and preprocessing does not resize it again.
    """
    return with_size(image, size_of_side(image.size, _checked_side(side, "scale")))


def _checked_side(side: Any, name: str) -> int:
    if not isinstance(side, (int, np.integer)) or isinstance(side, bool) or side < 1:
        must = "a positive integer" if name == "scale" else "positive integers"
        raise ImageError(f"{name} must be {must}, in pixels, got {side!r}")
    return int(side)


def with_size(image: PreparedImage, size: Pair) -> PreparedImage:
    """The image resized to ``(h, w)``, whatever its aspect ratio; see `with_smallest_side`."""
    if image.values is not None:
        values = image.values.resized(size, image.interpolation)
        return replace(image, size=size, values=values, rescaled=True)
    assert image.pixels is not None
    wide = upcast(image.pixels)  # antialiasing is not there for half precision
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


def each_image(images: Any) -> Iterable[Any]:
    """One image after the other from a batch, any other iterable of images, or a single image.

    A folder stands for the images in it, by name; a warning counts the other files.

    Raises:
        ImageError: if a folder has no images.
    """
    if isinstance(images, (str, os.PathLike)) and os.path.isdir(images):
        return _images_in(Path(images))
    if hasattr(images, "shape") and hasattr(images, "dtype"):  # an array of any library
        kind = getattr(images.dtype, "kind", None)
        return images if len(images.shape) == 4 or kind in ("O", "U") else [images]
    single = (str, bytes, bytearray, memoryview, os.PathLike, StripSource)
    several = isinstance(images, Iterable) and not isinstance(images, single)
    return images if several and not is_file(images) else [images]
