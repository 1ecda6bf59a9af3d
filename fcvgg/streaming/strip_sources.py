"""Images that are read strip by strip: what all of them share, arrays, and Pillow's images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fcvgg.errors import FcvggError, ImageError, one_line
from fcvgg.geometry import Pair
from fcvgg.images import in_mode, read_image

_ORIENTATION = 0x0112
_TURNED = 5
"""EXIF orientations from this one on exchange height and width."""

_SAMPLES = (1, 3, 4)

Bands = Sequence[int] | None
"""Which channels of an image are taken, counted from 0 and in this order; None takes all."""


class StripSource:
    """An image whose rows are read as they are needed.

    Attributes:
        name: what messages call it.
        size: ``(H, W)``.
        channels: of a pixel.
        preprocessed: whether it gives preprocessed floats rather than ``uint8`` pixels.
        resident: bytes that it holds in memory as a whole.
        block_rows: rows that the file or array can only give together; they are held while needed.
        path: of the file, if it is one.
        level: of the pyramid in the file.
        bands: the channels that were chosen, if some were.
        alpha: whether the fourth of four channels is transparency.
        pixel_size: height and width of a pixel in micrometres, if the file says so.
    """

    name = "the image"
    path: Path | None = None
    level = 0
    size: Pair
    channels: int
    itemsize = 1
    preprocessed = False
    resident = 0
    block_rows = 1
    alpha = True
    pixel_size: tuple[float, float] | None = None
    reopened: Callable[[], StripSource] | None = None
    """Opens the same image once more, in another process too."""

    def __init__(self, bands: Bands = None) -> None:
        self.bands = None if bands is None else tuple(bands)
        self._held: tuple[int, Pair, Any] | None = None
        self._stored = 0  # channels, before some are chosen

    def __reduce__(self) -> Any:
        return (self.reopened, ()) if self.reopened is not None else super().__reduce__()

    @property
    def column_bytes(self) -> int:
        """Bytes that are held per column of the image, beside the strip itself."""
        channels = max(self._stored, self.channels)
        return 3 * self.block_rows * channels * self.itemsize if self.block_rows > 1 else 0

    def read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        """Pixels ``(rows, cols, C)``, ``uint8``; preprocessed floats are ``(C, rows, cols)``.

        Raises:
            ImageError: if they cannot be read.
        """
        axis = 1 if self.preprocessed else 0
        step, height = self.block_rows, self.size[0]
        if step <= 1:
            with self._reading(rows):
                return self._pixels(rows, cols)
        parts = []
        for block in range(rows[0] // step, -(-rows[1] // step)):
            first = block * step
            if self._held is None or self._held[:2] != (block, cols):
                self._held = None
                with self._reading((first, min(first + step, height))):
                    pixels = self._pixels((first, min(first + step, height)), cols)
                self._held = (block, cols, pixels)
            low, high = max(rows[0] - first, 0), min(rows[1] - first, step)
            parts.append(self._held[2].take(range(low, high), axis=axis))
        return np.concatenate(parts, axis)

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        raise NotImplementedError

    def _pixels(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        """The bands that were chosen, ``uint16`` scaled to ``uint8`` as for whole images."""
        pixels = self._read(rows, cols)
        if self.bands is not None:
            pixels = pixels[..., list(self.bands)]
        if pixels.dtype == np.uint16:
            return np.round(pixels / np.float32(257)).astype(np.uint8)
        return pixels

    @contextmanager
    def _reading(self, rows: Pair) -> Iterator[None]:
        try:
            yield
        except FcvggError:
            raise
        except Exception as error:  # decoders raise whatever a broken file leads to
            raise ImageError(
                f"rows {rows[0]} to {rows[1]} of {self.name} cannot be read: {one_line(error)}"
            ) from error

    def _check(self, dtype: Any) -> None:
        """Refuse what is no image; `size` and `channels` are known by now."""
        if 0 in self.size:
            raise ImageError(f"{self.name} has no pixels: its size is {self.size}")
        if self.preprocessed:
            return
        if dtype not in (np.uint8, np.uint16):
            raise ImageError(
                f"{self.name} holds {dtype}, which has no known range; expected uint8 or uint16 "
                "pixels (H, W, C), or preprocessed floats (C, H, W)"
            )
        self._stored = self.channels
        if self.bands is not None:
            if not self.bands or not all(band in range(self.channels) for band in self.bands):
                raise ImageError(
                    f"bands={self.bands} are not among those of {self.name}, which has "
                    f"{self.channels}, counted from 0"
                )
            self.channels = len(self.bands)
        elif self.channels not in _SAMPLES:
            raise ImageError(
                f"{self.name} has {self.channels} channels; expected 1, 3 or 4, in the order "
                "(H, W, C); fcvgg.open_image(path, bands=(0, 1, 2)) chooses some"
            )


class ArraySource(StripSource):
    """An array that is sliced: NumPy, memmap, zarr, h5py, dask or a tensor.

    Args:
        axes: what the dimensions are: Y and X, S for the samples of a pixel, others have length 1.
    """

    def __init__(
        self, array: Any, axes: str, name: str, preprocessed: bool = False, bands: Bands = None
    ):
        super().__init__(bands)
        self._array, self._axes = array, axes
        self.name, self.preprocessed = name, preprocessed
        shape = dict(zip(axes, array.shape))
        self.size = (shape["Y"], shape["X"])
        self.channels = shape.get("S", 1)
        self.itemsize = np.dtype(_numpy_dtype(array)).itemsize
        self.block_rows = min(_chunk(array, axes.index("Y")), self.size[0] or 1)
        self._check(_numpy_dtype(array))

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        self._check_file()
        ranges = {"Y": slice(*rows), "X": slice(*cols), "S": slice(None)}
        part = self._array[tuple(ranges.get(axis, 0) for axis in self._axes)]
        if isinstance(part, Tensor):
            part = part.detach().cpu()
            part = part.float() if part.dtype == torch.bfloat16 else part
        pixels = np.asarray(part)
        kept = [axis for axis in self._axes if axis in ranges]
        if self.preprocessed:
            return pixels.transpose([kept.index(axis) for axis in "SYX"])
        if "S" not in kept:
            return pixels.transpose([kept.index(axis) for axis in "YX"])[..., None]
        return pixels.transpose([kept.index(axis) for axis in "YXS"])

    def _check_file(self) -> None:
        """A memory map of a file that has shrunk would end the process."""
        array = self._array
        if isinstance(array, np.memmap) and array.filename and array.base is not None:
            wanted = array.offset + (array.nbytes if array.flags.c_contiguous else 0)
            found = os.path.getsize(array.filename)
            if found < wanted:
                raise ImageError(
                    f"{array.filename} has shrunk while it was read: it has {found} bytes, and "
                    f"the array needs {wanted}"
                )


class PillowSource(StripSource):
    """A PIL image, or a file that Pillow can only decode as a whole."""

    def __init__(self, image: Image.Image | Path):
        super().__init__()
        self._image: Image.Image | None = None
        self.path = image if isinstance(image, Path) else None
        if isinstance(image, Path):
            self.name = str(image)
            with _opened(image) as file:
                self.size = _upright_size(file)
                self.channels = len(file.getbands())
                self.resident = 2 * file.height * file.width * self.channels
        else:
            self._image = read_image(image)
            self.size = (self._image.height, self._image.width)
            self.channels = len(self._image.getbands())
        if 0 in self.size:
            raise ImageError(f"{self.name} has no pixels: its size is {self.size}")

    def strip(self, rows: Pair, cols: Pair, channels: int) -> Image.Image:
        if self._image is None:
            self._image = read_image(self.path)
        return in_mode(self._image.crop((cols[0], rows[0], cols[1], rows[1])), channels)

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        return np.asarray(self.strip(rows, cols, 3))


def _level(levels: Sequence[Any], level: int, name: str) -> Any:
    if not isinstance(level, int) or not 0 <= level < len(levels):
        raise ImageError(f"{name} has no level {level}; it has {len(levels)}, counted from 0")
    return levels[level]


def _numpy_dtype(array: Any) -> Any:
    if not isinstance(array, Tensor):
        return np.dtype(array.dtype)
    if array.is_floating_point():
        return np.dtype(f"f{array.element_size()}")
    return np.dtype(np.int64)


def _chunk(array: Any, axis: int) -> int:
    """Rows of a chunk; 1 for what is not stored in chunks."""
    chunks = getattr(array, "chunks", None)
    if isinstance(array, (np.ndarray, Tensor)) or not chunks:
        return 1
    rows = chunks[axis]
    return int(rows if isinstance(rows, (int, np.integer)) else max(rows))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A file's header, with Pillow's limits on its size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                yield file
    except FcvggError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path} can only be decoded whole and is beyond Pillow's limit: {one_line(error)}; "
            "save it as a tiled TIFF, which is streamed without a limit, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{path} is no image that can be read: {one_line(error)}") from error


def _upright_size(image: Image.Image) -> Pair:
    turned = image.getexif().get(_ORIENTATION, 1) >= _TURNED
    return (image.width, image.height) if turned else (image.height, image.width)
