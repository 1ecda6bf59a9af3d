"""Images that are read strip by strip: arrays, PIL images and files of any size.

tifffile and zarr are imported where they are used; the extra ``fcvgg[stream]`` brings them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fcvgg.errors import FcvggError, ImageError, MissingExtraError, PreprocessError, one_line
from fcvgg.geometry import Pair
from fcvgg.images import in_mode, read_image
from fcvgg.preprocessing import Preprocess
from fcvgg.sources.extras import imported

_ORIENTATION = 0x0112
_TURNED = 5
"""EXIF orientations from this one on exchange height and width."""

_SAMPLES = (1, 3, 4)

_WHITE_IS_ZERO, _PALETTE = 0, 3
"""TIFF's photometric interpretations that need more than reading."""

_SEPARATE = 2
"""TIFF's planar configuration of which every sample has tiles of its own."""


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

    def __init__(self) -> None:
        self._held: tuple[int, Pair, Any] | None = None

    @property
    def column_bytes(self) -> int:
        """Bytes that are held per column of the image, beside the strip itself."""
        return 3 * self.block_rows * self.channels * self.itemsize if self.block_rows > 1 else 0

    def read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        """Pixels ``(rows, cols, C)``, ``uint8``; preprocessed floats are ``(C, rows, cols)``.

        Raises:
            ImageError: if they cannot be read.
        """
        axis = 1 if self.preprocessed else 0
        step, height = self.block_rows, self.size[0]
        if step <= 1:
            with self._reading(rows):
                return self._as_bytes(self._read(rows, cols))
        parts = []
        for block in range(rows[0] // step, -(-rows[1] // step)):
            first = block * step
            if self._held is None or self._held[:2] != (block, cols):
                self._held = None
                with self._reading((first, min(first + step, height))):
                    pixels = self._as_bytes(self._read((first, min(first + step, height)), cols))
                self._held = (block, cols, pixels)
            low, high = max(rows[0] - first, 0), min(rows[1] - first, step)
            parts.append(self._held[2].take(range(low, high), axis=axis))
        return np.concatenate(parts, axis)

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        raise NotImplementedError

    def _as_bytes(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """``uint16`` scaled to ``uint8``, as for whole images."""
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
        if self.channels not in _SAMPLES:
            raise ImageError(
                f"{self.name} has {self.channels} channels; expected 1, 3 or 4, in the order "
                "(H, W, C)"
            )


class ArraySource(StripSource):
    """An array that is sliced: NumPy, memmap, zarr, h5py, dask or a tensor.

    Args:
        axes: what the dimensions are: Y and X, S for the samples of a pixel, others have length 1.
    """

    def __init__(self, array: Any, axes: str, name: str, preprocessed: bool = False):
        super().__init__()
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


@dataclass(frozen=True)
class _Plane:
    """Where the tiles or strips of one page of a TIFF stand in the file."""

    offsets: Sequence[int]
    counts: Sequence[int]
    jpeg_tables: bytes | None


class TiffSource(StripSource):
    """One level of a TIFF, BigTIFF or OME-TIFF; only the tiles or strips that are needed are read.

    Args:
        level: of the pyramid; 0 is the full resolution.
    """

    def __init__(self, path: Path, level: int = 0):
        super().__init__()
        self.name = str(path)
        self.path = path
        tifffile = imported("tifffile", "stream")
        try:
            with tifffile.TiffFile(path) as file:
                self._describe(file, level)
                found = file.filehandle.size
        except FcvggError:
            raise
        except Exception as error:
            raise ImageError(f"{path} is no readable TIFF: {one_line(error)}") from error
        self._check(self._page.dtype)
        self._check_whole(found)

    def _describe(self, file: Any, level: int) -> None:
        """Read everything but the pixels."""
        series = _level(file.series[0].levels, level, self.name)
        self._page = page = series.keyframe
        squeezed = [axis for axis, n in zip(series.axes, series.shape) if n > 1 or axis in "YX"]
        planes = len(series.pages)
        if set(squeezed) - set("YXSC") or (planes > 1 and planes not in _SAMPLES):
            raise ImageError(
                f"{self.name} has axes {series.axes} of lengths {tuple(series.shape)}; expected "
                "one plane of rows, columns and channels: pass it as an array"
            )
        orientation = page.tags.get(274)
        if orientation is not None and orientation.value != 1:
            raise ImageError(
                f"{self.name} is stored turned (TIFF orientation {int(orientation.value)}), which "
                "cannot be read strip by strip; save it upright"
            )
        self._planes = [_Plane(p.dataoffsets, p.databytecounts, p.jpegtables) for p in series.pages]
        self._decode = page.decode
        self._byteorder = file.byteorder
        self._samples = page.samplesperpixel
        self._colours = None
        if page.photometric == _PALETTE:
            self._colours = (np.asarray(page.colormap) >> 8).astype(np.uint8).T  # (colours, 3)
        self.size = (page.imagelength, page.imagewidth)
        self.channels = 3 if self._colours is not None else self._samples * planes
        self.itemsize = np.dtype(page.dtype).itemsize if page.dtype is not None else 1
        self._direct = page.is_contiguous and page.compression == 1 and page.predictor == 1
        self._direct = self._direct and page.planarconfig == 1 and page.fillorder == 1
        rows = page.tilelength if page.is_tiled else page.rowsperstrip
        self.block_rows = 1 if self._direct else min(int(rows), self.size[0])

    @property
    def _tile(self) -> Pair:
        key = self._page
        if key.is_tiled:
            return key.tilelength, key.tilewidth
        return min(key.rowsperstrip, self.size[0]), self.size[1]

    def _check_whole(self, found: int) -> None:
        tall, wide = self._tile
        tiles = -(-self.size[0] // tall) * -(-self.size[1] // wide)
        tiles *= self._samples if self._page.planarconfig == _SEPARATE else 1
        for plane in self._planes:
            ends = [offset + count for offset, count in zip(plane.offsets, plane.counts)]
            if (len(ends) < tiles and not self._direct) or not ends or max(ends) > found:
                reach = f", and its pixels reach to byte {max(ends)}" if ends else ""
                raise ImageError(f"{self.name} is truncated: it has {found} bytes{reach}")

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        read = self._rows if self._direct else self._segments
        assert self.path is not None
        with open(self.path, "rb") as file:
            planes = [read(file, plane, rows, cols) for plane in self._planes]
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, 2)
        if self._page.photometric == _WHITE_IS_ZERO:
            return np.iinfo(pixels.dtype).max - pixels
        return pixels if self._colours is None else self._colours[pixels[..., 0]]

    def _bytes(self, file: BinaryIO, offset: int, count: int) -> bytes:
        file.seek(offset)
        data = file.read(count)
        if len(data) != count:
            raise ImageError(
                f"{self.name} has shrunk while it was read: byte {offset + count} is beyond its end"
            )
        return data

    def _rows(self, file: BinaryIO, plane: _Plane, rows: Pair, cols: Pair) -> NDArray[Any]:
        """Rows of an uncompressed image, which follow each other in the file."""
        dtype = np.dtype(self._page.dtype).newbyteorder(self._byteorder)
        row = self.size[1] * self._samples * dtype.itemsize
        data = self._bytes(file, plane.offsets[0] + rows[0] * row, (rows[1] - rows[0]) * row)
        pixels = np.frombuffer(data, dtype).reshape(-1, self.size[1], self._samples)
        return pixels[:, cols[0] : cols[1]].astype(self._page.dtype, copy=False)

    def _segments(self, file: BinaryIO, plane: _Plane, rows: Pair, cols: Pair) -> NDArray[Any]:
        """Pixels of the tiles or strips that cover rows and columns."""
        height, width = self.size
        tall, wide = self._tile
        across, down = -(-width // wide), -(-height // tall)
        samples = self._samples if self._page.planarconfig == _SEPARATE else 1
        shape = (rows[1] - rows[0], cols[1] - cols[0], self._samples)
        pixels: NDArray[Any] = np.zeros(shape, self._page.dtype)
        for sample in range(samples):
            part = pixels[..., sample : sample + 1] if samples > 1 else pixels
            for y in range(rows[0] // tall, -(-rows[1] // tall)):
                for x in range(cols[0] // wide, -(-cols[1] // wide)):
                    segment = self._segment(file, plane, (sample * down + y) * across + x)
                    if segment is not None:
                        _paste(part, segment, y * tall - rows[0], x * wide - cols[0])
        return pixels

    def _segment(self, file: BinaryIO, plane: _Plane, index: int) -> NDArray[Any] | None:
        """One tile or strip; None for one that was not stored."""
        if not plane.counts[index]:
            return None
        data = self._bytes(file, plane.offsets[index], plane.counts[index])
        tables = {"jpegtables": plane.jpeg_tables} if plane.jpeg_tables is not None else {}
        try:
            segment, _, shape = self._decode(data, index, **tables)
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise MissingExtraError(
                    f"{self.name} is compressed with a method that needs the package imagecodecs; "
                    "install it with: pip install 'fcvgg[stream]'"
                ) from error
            raise
        return None if segment is None else segment[0, : shape[1], : shape[2]]


class RasterSource(StripSource):
    """An open rasterio dataset."""

    def __init__(self, dataset: Any):
        super().__init__()
        self._dataset = dataset
        self.name = str(getattr(dataset, "name", "the dataset"))
        self.size = (dataset.height, dataset.width)
        self.channels = dataset.count
        self.itemsize = np.dtype(dataset.dtypes[0]).itemsize
        self.block_rows = min(max(shape[0] for shape in dataset.block_shapes), self.size[0])
        self._check(np.dtype(dataset.dtypes[0]))

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        return np.moveaxis(np.asarray(self._dataset.read(window=(rows, cols))), 0, -1)


def open_image(path: str | os.PathLike[str], level: int = 0) -> StripSource:
    """An image file for `fcvgg.stream`, which takes paths too and then reads level 0.

    Args:
        path: TIFF, BigTIFF, OME-TIFF, a zarr array or OME-Zarr image, or what Pillow reads; of
            these Pillow's formats are decoded whole, and count towards the memory.
        level: of a pyramid; 0 is the full resolution.

    Raises:
        ImageError: if it is no image, is broken, or has no such level.
        MissingExtraError: if reading it needs the packages of ``fcvgg[stream]``.
    """
    path = Path(path)
    if not path.exists():
        raise ImageError(f"there is no image file {path}")
    source = _zarr_source(path, level) if path.is_dir() else _file_source(path, level)
    source.path, source.level = path, level
    return source


def _file_source(path: Path, level: int) -> StripSource:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    if not magic:
        raise ImageError(f"{path} is empty")
    if magic[:2] in (b"II", b"MM"):
        return TiffSource(path, level)
    if level:
        raise ImageError(f"{path} has no level {level}: only TIFF and zarr hold pyramids")
    return PillowSource(path)


def strip_source(source: Any) -> StripSource:
    """What `fcvgg.stream` accepts, as a `StripSource`.

    Raises:
        ImageError: if it cannot be used as an image.
    """
    if isinstance(source, StripSource):
        return source
    if isinstance(source, (str, os.PathLike)):
        return open_image(source)
    if isinstance(source, Image.Image):
        return PillowSource(source)
    if hasattr(source, "block_shapes") and hasattr(source, "read"):
        return RasterSource(source)
    if hasattr(source, "shape") and hasattr(source, "dtype") and hasattr(source, "__getitem__"):
        return _array_source(source)
    raise ImageError(
        f"{type(source).__name__} is no image; expected a path, a PIL image, uint8 pixels "
        "(H, W, C) or preprocessed floats (C, H, W)"
    )


def _array_source(array: Any) -> StripSource:
    name = f"the {'tensor' if isinstance(array, Tensor) else 'array'} {tuple(array.shape)}"
    floating = np.issubdtype(_numpy_dtype(array), np.floating)
    if isinstance(array, Tensor) and not floating:
        raise ImageError(
            f"{name} is taken as preprocessed and must hold floats, got {array.dtype}; pass uint8 "
            "pixels as a NumPy array (H, W, C)"
        )
    if floating:
        axes = {3: "SYX", 4: "NSYX"}.get(len(array.shape))
        if axes is None or (axes == "NSYX" and array.shape[0] != 1):
            raise ImageError(
                f"{name} of floats is no preprocessed image; expected (C, H, W) or (1, C, H, W)"
            )
        return ArraySource(array, axes, name, preprocessed=True)
    axes = {2: "YX", 3: "YXS"}.get(len(array.shape))
    if axes is None:
        raise ImageError(f"{name} is no image; expected (H, W), (H, W, 3) or (H, W, 4)")
    return ArraySource(array, axes, name)


def _zarr_source(path: Path, level: int) -> StripSource:
    zarr = imported("zarr", "stream")
    try:
        node = zarr.open(str(path), mode="r")
    except Exception as error:
        raise ImageError(f"{path} is a folder and no zarr image: {one_line(error)}") from error
    axes: Sequence[str] | None = None
    if isinstance(node, zarr.Group):
        image = (node.attrs.get("ome") or node.attrs).get("multiscales")
        if not image:
            raise ImageError(
                f"{path} is a zarr group and no OME-Zarr image; pass one of its arrays: "
                f"{', '.join(sorted(node.array_keys())) or 'it has none'}"
            )
        datasets = image[0]["datasets"]
        node = node[_level(datasets, level, str(path))["path"]]
        axes = [a["name"] if isinstance(a, dict) else a for a in image[0].get("axes", [])]
    elif level:
        raise ImageError(f"{path} has no level {level}: it is one zarr array")
    if "fcvgg" in node.attrs:
        raise ImageError(f"{path} is a score map that fcvgg.stream wrote, and no image")
    return ArraySource(node, _axes_of(node.shape, axes, path), str(path))


def _axes_of(shape: Sequence[int], names: Sequence[str] | None, path: Path) -> str:
    """One letter per dimension, of which those that are not Y, X or S have length 1."""
    if names:
        letters = "".join({"c": "S", "s": "S"}.get(n.lower(), n.upper()[:1]) for n in names)
    elif len(shape) == 2:
        letters = "YX"
    elif len(shape) == 3:
        letters = "YXS" if shape[2] in _SAMPLES else "SYX"
    else:
        letters = "?" * len(shape)
    others = [n for letter, n in zip(letters, shape) if letter not in "YXS"]
    if len(letters) != len(shape) or any(n > 1 for n in others) or "Y" not in letters:
        raise ImageError(
            f"{path} has shape {tuple(shape)}; expected (H, W, C) or (C, H, W): pass one plane"
        )
    return letters


def _level(levels: Sequence[Any], level: int, name: str) -> Any:
    if not isinstance(level, int) or not 0 <= level < len(levels):
        raise ImageError(f"{name} has no level {level}; it has {len(levels)}, counted from 0")
    return levels[level]


def _paste(target: NDArray[Any], part: NDArray[Any], top: int, left: int) -> None:
    """Put a tile at its place, cut to the target."""
    rows, cols = target.shape[:2]
    y, x = max(-top, 0), max(-left, 0)
    part = part[y : rows - top, x : cols - left]
    height, width = part.shape[:2]
    target[top + y : top + y + height, left + x : left + x + width] = part


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


# -- into the network -----------------------------------------------------------------------------


def strip_reader(
    source: StripSource, preprocess: Preprocess | None, channels: int
) -> Callable[[Pair, Pair], Tensor]:
    """A function that gives rows and columns of an image as the network's input ``(1, C, h, w)``.

    Raises:
        PreprocessError: if pixels need preprocessing and it is unknown or would resize the image.
        ImageError: if the image has other channels than the network.
    """
    if source.preprocessed:
        if source.channels != channels:
            raise ImageError(
                f"the network takes {channels} channels, and {source.name} has {source.channels}; "
                "floats are taken as preprocessed (C, H, W)"
            )
        return lambda rows, cols: _owned(source.read(rows, cols))
    known = _checked_preprocess(preprocess, channels)
    if isinstance(source, PillowSource):
        pillow = source
        return lambda rows, cols: known(pillow.strip(rows, cols, channels))
    if source.channels == channels:
        return lambda rows, cols: known.normalized(source.read(rows, cols))

    def converted(rows: Pair, cols: Pair) -> Tensor:
        pixels = source.read(rows, cols)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return known(in_mode(image, channels))

    return converted


def _owned(pixels: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(pixels, dtype=pixels.dtype.newbyteorder("="), order="C"))[None]


def _checked_preprocess(preprocess: Preprocess | None, channels: int) -> Preprocess:
    if preprocess is None:
        raise PreprocessError(
            "the network's preprocessing is unknown, so pixels cannot be fed to it; pass "
            "preprocess=fcvgg.Preprocess(mean, std) to convert or load, or preprocessed floats"
        )
    if preprocess.resize is not None:
        raise PreprocessError(
            f"the preprocessing resizes images to {preprocess.resize}, and a streamed image keeps "
            "its size; use a preprocessing with resize=None"
        )
    if preprocess.channels != channels:
        raise PreprocessError(
            f"the preprocessing has {preprocess.channels} channels and the network {channels}; "
            "give mean and std one value per channel"
        )
    return preprocess
