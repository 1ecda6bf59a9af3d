"""Images that are read strip by strip: what all of them share, arrays, and Pillow's images."""

from __future__ import annotations

import io
import logging
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fcvgg.errors import FcvggError, FcvggWarning, ImageError, one_line
from fcvgg.geometry import Pair
from fcvgg.images.lazy.georeference import Georeference
from fcvgg.images.pictures import pixels_of
from fcvgg.names import counted, web_address

_ORIENTATION = 0x0112
_TURNED = 5
"""EXIF orientations from this one on exchange height and width."""

_JPEG_2000_HEADER = 4096
"""Bytes of a file among which the size and depth of a JPEG 2000 image stand."""

SAMPLES = (1, 3, 4)

_ONE_PICTURE = ("MPO", "PSD", "ICO", "ICNS")
"""Formats whose further frames are layers, sizes or depths of the picture that comes first."""

_SAMPLED_ROWS = 16
"""Rows by which an image is judged without reading it whole."""

_OPAQUE = 0.5
"""Least share of a picture's alpha that is wholly opaque or wholly transparent."""

_MASK = "mask"

FROM_FILE = "file"
"""The name of the nodata value that the file itself declares."""

_LARGEST_SIDE = 1 << 27
"""Pixels of a side: what files say without holding it would never end to be read."""

_WITHOUT_NUMPY = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""torch's floats that NumPy does not have."""

_LARGEST_PIXEL = 1e9
"""Micrometres of a pixel at most, a kilometre: a file that says more is not believed."""

Bands = Sequence[int] | None
"""Which channels of an image are taken, counted from 0 and in this order; None takes all."""

File = Path | BinaryIO
"""A path, or a file in memory."""


_warned: set[str] = set()
_of_pages: ContextVar[list[str] | None] = ContextVar("of_pages", default=None)


def warn(text: str, once: str | None) -> None:
    """Warn, of what `once` names a single time in a process; None warns always.

    Python's own filter forgets what it showed as soon as any other is set, as for every file that
    Pillow decodes.
    """
    if once in _warned:
        return
    if once is not None:
        _warned.add(once)
    warnings.warn(text, FcvggWarning, stacklevel=3)


class StripSource:
    """An image whose rows are read as they are needed.

    Attributes:
        name: what messages call it.
        size: ``(H, W)``.
        channels: of a pixel.
        dtype: of its values.
        preprocessed: whether it gives preprocessed floats rather than values of pixels.
        resident: bytes that it holds in memory as a whole.
        block_rows: rows that the file or array can only give together; they are held while needed.
        path: of the file, if it is one.
        level: of the pyramid in the file.
        level_sizes: ``(H, W)`` of every level of the pyramid; empty where there is one.
        bands: the channels that were chosen, if some were.
        alpha: whether the last of two or four channels is said to be transparency.
        nodata: the value that the file declares for pixels without data, if it does.
        white: the largest of integers that a file says to have, of less than the dtype's bits; None
            for all of them.
        missing_value: the value whose pixels are read as NaN; None keeps every value.
        reduced: whether the file holds more than 8 bits, of which its reader gives 8.
        pixel_size: height and width of a pixel in micrometres, if the file says so.
        georeference: where the pixels lie on the earth, if the file says so.
    """

    name = "the image"
    path: Path | None = None
    level = 0
    level_sizes: Sequence[Pair] = ()
    size: Pair
    channels: int
    dtype: np.dtype[Any]
    preprocessed = False
    resident = 0
    block_rows = 1
    alpha = False
    nodata: float | None = None
    white: float | None = None
    missing_value: float | None = None
    reduced = False
    pixel_size: tuple[float, float] | None = None
    georeference: Georeference | None = None
    reopened: Callable[[], StripSource] | None = None
    """Opens the same image once more, in another process too."""
    at_level: Callable[[int], StripSource] | None = None
    """Opens another level of the same pyramid."""

    def __init__(self, bands: Bands = None) -> None:
        if bands is not None and not isinstance(bands, Iterable):
            raise ImageError(
                f"bands must be channels counted from 0, such as (0, 1, 2), got {bands!r}"
            )
        self.bands = None if bands is None else tuple(bands)
        self._held: dict[Pair, tuple[int, Any]] = {}  # by columns, the last block of rows
        self._stored = 0  # channels, before some are chosen
        self._by_mask = False

    def __repr__(self) -> str:
        height, width = self.size
        what = "preprocessed " if self.preprocessed else ""
        chosen = "" if self.bands is None else f", bands {', '.join(map(str, self.bands))}"
        level = f", level {self.level}" if self.level else ""
        return (
            f"{type(self).__name__}({self.name}, {height}x{width} pixels, {self.channels} "
            f"channels{chosen}{level}, {what}{self.dtype})"
        )

    def __reduce__(self) -> Any:
        return (self.reopened, ()) if self.reopened is not None else super().__reduce__()

    @property
    def full_size(self) -> Pair:
        """``(H, W)`` of level 0, whose pixels viewers count in."""
        return self.level_sizes[0] if self.level_sizes else self.size

    @property
    def mpp(self) -> float | None:
        """Micrometres of a pixel, or of a georeferenced one by its metres; None if unknown."""
        sizes = self.pixel_size
        if sizes is None and self.georeference is not None:
            sizes = self.georeference.pixel_size
        return None if sizes is None else sum(sizes) / 2

    @property
    def itemsize(self) -> int:
        """Bytes of a value as `read` gives it: pixels without data make floats of all."""
        kept = self.left_out is None
        return self.dtype.itemsize if kept else np.result_type(self.dtype, np.float32).itemsize

    @property
    def column_bytes(self) -> int:
        """Bytes that are held per column of the image in addition to the strip itself."""
        channels = max(self._stored, self.channels)
        return 3 * self.block_rows * channels * self.itemsize if self.block_rows > 1 else 0

    def read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        """The values of pixels, ``(rows, cols, C)``; preprocessed floats are ``(C, rows, cols)``.

        Where pixels without data are asked for (`missing_value`) they are NaN, and all values are
        floats.

        Raises:
            ImageError: if they cannot be read.
        """
        axis = 1 if self.preprocessed else 0
        step, height = self.block_rows, self.size[0]
        if step <= 1:
            with self._reading(rows):
                return self._pixels(rows, cols)
        # strips overlap by a halo: the last block of every range of columns is held, so that its
        # tiles are not decoded again
        parts = []
        for block in range(rows[0] // step, -(-rows[1] // step)):
            first = block * step
            if cols not in self._held or self._held[cols][0] != block:
                held = self._held.items()
                self._held = {c: last for c, last in held if c[1] <= cols[0] or cols[1] <= c[0]}
                with self._reading((first, min(first + step, height))):
                    pixels = self._pixels((first, min(first + step, height)), cols)
                self._held[cols] = block, pixels
            low, high = max(rows[0] - first, 0), min(rows[1] - first, step)
            parts.append(self._held[cols][1].take(range(low, high), axis=axis))
        return np.concatenate(parts, axis) if len(parts) > 1 else parts[0]

    def whole(self) -> NDArray[Any]:
        """All pixels at once, as `read` gives them.

        Raises:
            ImageError: if they cannot be read, or are more than Pillow would load.
        """
        height, width = self.size
        limit = Image.MAX_IMAGE_PIXELS
        if self._is_stored and limit is not None and height * width > 2 * limit:
            raise ImageError(
                f"{self.name} must have at most {2 * limit} pixels to be loaded whole, got "
                f"{height}x{width}; read it strip by strip with fcvgg.stream, or raise "
                "PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
            )
        pixels = self.read((0, height), (0, width))
        self.release()
        return pixels

    def release(self) -> None:
        """Free the rows that are held for the next strips."""
        self._held = {}

    def sample(self) -> Iterator[NDArray[Any]]:
        """Some rows, evenly spread from the first to the last, as `read` gives them."""
        height, width = self.size
        for y in np.unique(np.linspace(0, height - 1, _SAMPLED_ROWS).round().astype(int)).tolist():
            yield self.read((y, y + 1), (0, width))

    def transparent(self) -> bool:
        """Whether the last of two or four channels is taken for transparency."""
        return self.alpha

    def _looks_like_alpha(self) -> bool:
        """Whether the last channel is that of a picture's transparency rather than another band.

        Most of its pixels are wholly opaque or wholly transparent, or all are alike.
        """
        values = np.concatenate([part[..., -1] for part in self.sample()])
        values = values[values == values]  # without what has no data
        full = np.iinfo(self.dtype).max if self.dtype.kind in "iu" else 1
        extreme = (values == 0) | (values == full)
        return not values.size or bool(extreme.mean() >= _OPAQUE or (values == values[0]).all())

    def treat_as_missing(self, nodata: float | str | None) -> None:
        """Read pixels of a value as NaN.

        Args:
            nodata: the value; ``"file"`` is what the file declares, or else its mask or
                transparency; None keeps all as they are.

        Raises:
            ImageError: if the file declares none.
        """
        if isinstance(nodata, str) and nodata == FROM_FILE:
            self._by_mask = self.nodata is None and self._has_mask()
            if self.nodata is None and not self._by_mask:
                raise ImageError(
                    f"{self.name} must declare a nodata value for nodata='file', got none; pass "
                    "the value, such as nodata=0"
                )
            nodata = self.nodata
        if nodata is not None and (isinstance(nodata, bool) or not isinstance(nodata, Real)):
            raise ImageError(
                f"nodata must be a number, 'file' or None, got {nodata!r}; 'file' takes what the "
                "file declares"
            )
        self.missing_value = None if nodata is None else float(nodata)

    @property
    def left_out(self) -> str | None:
        """Which pixels are read as NaN: those of a value, or of the file's mask."""
        if self._by_mask:
            return _MASK
        return None if self.missing_value is None else str(self.missing_value)

    @property
    def _is_stored(self) -> bool:
        """Whether it lies in a file rather than in memory."""
        return True

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        """What is stored, ``(rows, cols, C)``."""
        raise NotImplementedError

    def _coloured(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Grey or colours of what is stored."""
        return stored

    def _pixels(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        """The chosen bands of pixels, NaN where there is no data."""
        stored = self._read(rows, cols)
        if self.preprocessed and not self._by_mask:
            return stored
        if self.preprocessed:  # (C, rows, cols)
            return np.where(self._masked(stored, rows, cols), stored.dtype.type(np.nan), stored)
        pixels = self._coloured(stored)
        chosen: Any = slice(None) if self.bands is None else list(self.bands)
        if self._by_mask:
            absent = self._masked(stored, rows, cols)
        elif self.missing_value is not None:
            # the channels of a palette's colours are stored as one index, slides' with their alpha
            colours = stored[..., : pixels.shape[2]]
            indexed = colours.shape[2] < pixels.shape[2]
            absent = self._equal(colours if indexed else colours[..., chosen], self.missing_value)
        else:
            return pixels[..., chosen]
        pixels = pixels[..., chosen]
        exact = np.result_type(pixels.dtype, np.float32)
        return np.where(absent[..., None], exact.type(np.nan), pixels.astype(exact, copy=False))

    def _has_mask(self) -> bool:
        """Whether the file says by a mask or transparency where it has no data."""
        return False

    def _masked(self, stored: NDArray[Any], rows: Pair, cols: Pair) -> NDArray[np.bool_]:
        """Which pixels have no data by that mask."""
        raise NotImplementedError

    @staticmethod
    def _equal(stored: NDArray[Any], value: float) -> NDArray[np.bool_]:
        """Which pixels hold the value of those without data.

        Unsigned values of pictures and scenes use the ends of their range for data too, so that
        all bands have to hold it; of others one band without data leaves the pixel unknown.
        """
        if stored.dtype.kind == "f":
            value = float(np.asarray(value).astype(stored.dtype))
        equal = np.isnan(stored) if np.isnan(value) else stored == value
        return equal.all(2) if stored.dtype.kind == "u" else equal.any(2)

    @contextmanager
    def _reading(self, rows: Pair) -> Iterator[None]:
        try:
            with quiet("tifffile", "PIL.TiffImagePlugin"):
                yield
        except FcvggError:
            raise
        except Exception as error:  # decoders raise whatever a broken file leads to
            raise ImageError(
                f"rows {rows[0]} to {rows[1]} of {self.name} cannot be read: {one_line(error)}"
            ) from error

    def _check(self) -> None:
        """Refuse what is not an image; `size`, `channels` and `dtype` are known by now."""
        if 0 in self.size or self.channels == 0:
            raise ImageError(f"{self.name} must have pixels, got the size {self.size}")
        if max(self.size) > _LARGEST_SIDE:
            raise ImageError(
                f"{self.name} must have sides of at most {_LARGEST_SIDE} pixels, got the size "
                f"{self.size}; read a part of it"
            )
        if self.preprocessed:
            return
        if self.dtype.kind not in "iuf":
            raise ImageError(
                f"{self.name} holds {self.dtype}, which has no known range; pass uint8 (H, W, C)"
            )
        self._stored = self.channels
        if self.bands is not None:
            if not self.bands or not all(band in range(self.channels) for band in self.bands):
                raise ImageError(
                    f"bands must be from 0 to {self.channels - 1} for {self.name}, got {self.bands}"
                )
            self.channels = len(self.bands)
            self.alpha = False


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
        self.dtype = np.dtype(numpy_dtype(array)).newbyteorder("=")
        self.alpha = not preprocessed and (
            self.channels == 4 or (self.channels == 2 and isinstance(array, Tensor))
        )
        self._by_mask = np.ma.is_masked(array)
        self.block_rows = min(_chunk(array, axes.index("Y")), self.size[0] or 1)
        self._check()

    @property
    def _is_stored(self) -> bool:
        array = self._array
        return isinstance(array, np.memmap) or not isinstance(array, (np.ndarray, Tensor))

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        self._check_file()
        ranges = {"Y": slice(*rows), "X": slice(*cols), "S": slice(None)}
        part = self._array[tuple(ranges.get(axis, 0) for axis in self._axes)]
        if isinstance(part, Tensor):
            part = part.detach().cpu()
            part = part.float() if part.dtype in _WITHOUT_NUMPY else part
        pixels = np.asarray(part)
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        kept = [axis for axis in self._axes if axis in ranges]
        order = [axis for axis in ("SYX" if self.preprocessed else "YXS") if axis in kept]
        pixels = pixels.transpose([kept.index(axis) for axis in order])
        return pixels if "S" in kept else pixels[..., None]

    def _masked(self, stored: NDArray[Any], rows: Pair, cols: Pair) -> NDArray[np.bool_]:
        hidden = ArraySource(np.ma.getmaskarray(self._array), self._axes, self.name, True)
        return np.asarray(hidden._read(rows, cols).any(0 if "S" in self._axes else 2))

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
    """A PIL image, or a file that Pillow can only decode as a whole; of several frames the first.

    Args:
        image: the image, its path, or the file in memory.
        bands: the channels to take; None takes all.
    """

    def __init__(self, image: Image.Image | File, bands: Bands = None):
        super().__init__(bands)
        self._file = None if isinstance(image, Image.Image) else image
        self._array: NDArray[Any] | None = None
        if isinstance(image, Image.Image):
            self.name = f"the image {getattr(image, 'filename', '')}".rstrip()
            several = self._has_frames(image)
            self._take(self._decoded(image))
        else:
            self.path = image if isinstance(image, Path) else None
            self.name = str(image) if self.path is not None else self.name
            with opened(image, self.name) as file:
                several = self._has_frames(file)
                described, self.reduced = _described(file), _is_reduced(file)
                if described is None or file.format == "PNG":  # which is decoded to be turned
                    self._take(self._decoded(file))
                else:
                    self.size = _upright_size(file)
                    self.channels, self.dtype = described
            self.resident = 2 * self.size[0] * self.size[1] * self.channels * self.itemsize
        self.alpha = self.channels in (2, 4)
        self._check()
        if several:
            warn_of_pages(self)

    @property
    def _is_stored(self) -> bool:
        return False  # Pillow has a limit of its own

    @staticmethod
    def _has_frames(image: Image.Image) -> bool:
        """Whether there are several frames or pages, of which the first is taken."""
        if getattr(image, "format", None) in _ONE_PICTURE:
            return False
        try:
            return bool(getattr(image, "is_animated", False)) and image.tell() == 0
        except Exception:  # of the frames behind the first, which are not read
            return False

    def _take(self, pixels: NDArray[Any]) -> None:
        self._array = pixels
        self.size, self.channels = (pixels.shape[0], pixels.shape[1]), pixels.shape[2]
        self.dtype = pixels.dtype

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        if self._array is None:
            assert self._file is not None
            with opened(self._file, self.name) as file:
                self._array = self._decoded(file)
        return self._array[slice(*rows), slice(*cols)]

    def _decoded(self, image: Image.Image) -> NDArray[Any]:
        with _decoding(self.name):
            pixels = _wide_png(image)
        if pixels is not None:
            return pixels
        step = _step_of_greys(image)
        image = upright(image, self.name)
        if step > 1 and isinstance(image.info.get("transparency"), int):
            image = image.copy()
            image.info["transparency"] *= step
        try:
            return pixels_of(image)
        except ValueError as error:
            raise ImageError(
                f"{self.name} of mode {image.mode} cannot be shown as RGB; convert it first"
            ) from error


def warn_of_pages(source: StripSource) -> None:
    """Warn of a file of several pages or frames, once for each file; see `pages_warned_of_once`."""
    name, found = source.name, _of_pages.get()
    if found is None or source.path is None:
        _say_of_pages(f"{name} has", None if source.path is None else name)
    elif name not in _warned:
        _warned.add(name)
        found.append(name)


@contextmanager
def pages_warned_of_once() -> Iterator[None]:
    """Warn once, at the end, of all files of several pages that are opened within."""
    if _of_pages.get() is not None:
        yield
        return
    found: list[str] = []
    outer = _of_pages.set(found)
    try:
        yield
    finally:
        _of_pages.reset(outer)
    if len(found) > 1:
        _say_of_pages(f"{found[0]} and {counted(len(found) - 1, 'other file')} have", None)
    elif found:
        _say_of_pages(f"{found[0]} has", None)


def _say_of_pages(files: str, once: str | None) -> None:
    warn(
        f"{files} several pages or frames, of which the first is taken; save the others as files "
        "of their own",
        once,
    )


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Let Pillow decode: its warnings are ignored, and errors become those of a broken image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes and metadata
            yield
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads to
        raise ImageError(f"{name} is a broken image: {one_line(error)}") from error


def upright(image: Image.Image, name: str) -> Image.Image:
    """A PIL image, loaded and turned as its EXIF entry says, or `ImageError` if it is broken."""
    with _decoding(name):
        image.load()
        image = ImageOps.exif_transpose(image)
    if 0 in image.size:
        raise ImageError(f"{name} must have pixels, got the size {image.size}")
    return image


def _described(image: Image.Image) -> tuple[int, np.dtype[Any]] | None:
    """Channels and dtype of what Pillow decodes; None where only the pixels tell."""
    depth = _wide_rawmode(image)
    if depth is not None:
        return 4 if "transparency" in image.info else len(depth), np.dtype(np.uint16)
    if image.mode == "I":
        return None
    probe = Image.new(image.mode, (1, 1))  # converted as the image will be
    probe.info = image.info
    try:
        pixels = pixels_of(probe)
    except ValueError:  # the image itself then raises the error that is shown
        return None
    return pixels.shape[2], pixels.dtype


def _is_reduced(image: Image.Image) -> bool:
    """Whether Pillow gives 8 of the bits that a PPM or a JPEG 2000 holds."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    tiles = getattr(image, "tile", None)
    if image.format == "PPM" and tiles:
        return isinstance(tiles[0][3], tuple) and tiles[0][3][1] > 255
    file = getattr(image, "fp", None)
    if image.format != "JPEG2000" or file is None:
        return False
    place = file.tell()
    file.seek(0)
    header = file.read(_JPEG_2000_HEADER)
    file.seek(place)
    start = header.find(b"\xff\x4f\xff\x51")
    depth = header[start + 42 : start + 43]
    return start >= 0 and bool(depth) and (depth[0] & 0x7F) + 1 > 8


def _step_of_greys(image: Image.Image) -> int:
    """From a grey to the next in a PNG of 2 or 4 bits: Pillow spreads them, but not their
    transparent one.
    """
    tiles = getattr(image, "tile", None)
    return {"L;2": 85, "L;4": 17}.get(str(tiles[0][3]), 1) if tiles and image.format == "PNG" else 1


def _wide_rawmode(image: Image.Image) -> str | None:
    """The channels of a PNG of 16 bits that Pillow would give in 8."""
    tiles = getattr(image, "tile", None)
    if getattr(image, "format", None) != "PNG" or not tiles or tiles[0][0] != "zip":
        return None
    rawmode = tiles[0][3]
    channels = rawmode.removesuffix(";16B") if isinstance(rawmode, str) else ""
    return channels if channels in ("RGB", "RGBA", "LA") and channels != rawmode else None


def _wide_png(image: Image.Image) -> NDArray[np.uint16] | None:
    """The pixels of a PNG of 16 bits with several channels.

    Pillow decodes the upper byte of each number. Decoded as if the numbers were little-endian, it
    gives the lower one; grey with alpha is four bytes in a row, as RGBA of 8 bits is.
    """
    channels = _wide_rawmode(image)
    source = getattr(image, "fp", None)
    if channels is None or source is None:
        return None
    source.seek(0)
    data = source.read()
    kinds = ("RGBA",) if channels == "LA" else (f"{channels};16B", f"{channels};16L")
    parts = []
    for rawmode in kinds:
        with Image.open(io.BytesIO(data)) as part:
            part.tile = [(*part.tile[0][:3], rawmode)]  # type: ignore[attr-defined]
            part.load()
            parts.append(np.asarray(ImageOps.exif_transpose(part)).astype(np.uint16))
    if channels == "LA":
        parts = [parts[0][..., ::2], parts[0][..., 1::2]]
    pixels = (parts[0] * np.uint16(256) + parts[1]).astype(np.uint16, copy=False)
    hidden = image.info.get("transparency")
    if channels != "RGB" or hidden is None:
        return pixels
    opaque = (pixels != np.array(hidden, np.uint16)).any(2, keepdims=True)
    return np.concatenate([pixels, opaque * np.uint16(65535)], 2)


def level_of(levels: Sequence[Any], level: int, name: str) -> Any:
    """One level of a pyramid, or `ImageError`."""
    if not isinstance(level, int) or not 0 <= level < len(levels):
        raise ImageError(f"level must be from 0 to {len(levels) - 1} for {name}, got {level!r}")
    return levels[level]


def nodata_of(left_out: str | None) -> float | str | None:
    """What `fcvgg.open_image` takes as ``nodata`` for a `StripSource.left_out`, or `ValueError`."""
    return FROM_FILE if left_out == _MASK else None if left_out is None else float(left_out)


def usable_pixel_size(size: Sequence[float]) -> tuple[float, float] | None:
    """Height and width of a pixel in micrometres as a file states them; None if not plausible."""
    height, width = size
    return (height, width) if all(0 < n < _LARGEST_PIXEL for n in size) else None


def numpy_dtype(array: Any) -> Any:
    """The dtype in which an array's values are read."""
    if not isinstance(array, Tensor):
        return np.dtype(array.dtype)
    if array.is_floating_point():
        unknown = array.dtype in _WITHOUT_NUMPY
        return np.dtype(np.float32 if unknown else f"f{array.element_size()}")
    try:
        return np.dtype(str(array.dtype).removeprefix("torch."))
    except TypeError as error:
        raise ImageError(
            f"a tensor must hold uint8 pixels or preprocessed floats, got {array.dtype}"
        ) from error


def _chunk(array: Any, axis: int) -> int:
    """Rows of a chunk; 1 for what is not stored in chunks."""
    chunks = getattr(array, "chunks", None)
    if isinstance(array, (np.ndarray, Tensor)) or not chunks:
        return 1
    rows = chunks[axis]
    return int(rows if isinstance(rows, (int, np.integer)) else max(rows))


def is_folder(path: Path) -> bool:
    """Whether a path is a folder rather than a file; `ImageError` if it is neither."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(absent(str(path))) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ImageError(f"{path} cannot be read: {reason}") from error
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):  # of which reading twice loses the start
        raise ImageError(
            f"{path} must be a file, got a pipe, socket or device; pass what it gives as bytes"
        )
    return stat.S_ISDIR(mode)


def absent(name: str) -> str:
    """What to say of a path that leads nowhere."""
    address = web_address(name)
    if address is None:
        return f"there is no image file {name}"
    return f"the image must be a file, got the address {address}; download it and pass its path"


@contextmanager
def opened(file: File, name: str) -> Iterator[Image.Image]:
    """A file's header, read by Pillow with its limits on the size, or `ImageError`."""
    try:
        if not isinstance(file, Path):
            file.seek(0)
        with warnings.catch_warnings(), quiet("PIL.TiffImagePlugin"):
            warnings.simplefilter("ignore")  # about sizes and metadata
            image = Image.open(file)
        with image:
            yield image
    except FcvggError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not an image that Pillow can read; convert it to PNG or JPEG"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} must be smaller to be loaded whole, got {one_line(error)}; reduce it, save it "
            "as a tiled TIFF, which fcvgg.stream reads without a limit, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        ) from error
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads to
        raise ImageError(f"{name} cannot be read: {one_line(error)}") from error


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep what readers log from stderr; what is wrong with a file is raised."""

    def nothing(_: logging.LogRecord) -> bool:
        return False

    found = [logging.getLogger(name) for name in loggers]
    for logger in found:
        logger.addFilter(nothing)
    try:
        yield
    finally:
        for logger in found:
            logger.removeFilter(nothing)


def _upright_size(image: Image.Image) -> Pair:
    turned = image.getexif().get(_ORIENTATION, 1) >= _TURNED
    return (image.width, image.height) if turned else (image.height, image.width)
