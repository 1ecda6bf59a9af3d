"""TIFF, BigTIFF and OME-TIFF, of which only the tiles or strips that are needed are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcvgg.errors import FcvggError, ImageError, MissingExtraError, one_line
from fcvgg.geometry import Pair
from fcvgg.images.lazy.georeference import (
    KEY_DOUBLES,
    KEY_TEXT,
    KEYS,
    MATRIX,
    PIXEL_SCALE,
    TIE_POINTS,
    Georeference,
    Transform,
)
from fcvgg.images.lazy.source import (
    Bands,
    File,
    StripSource,
    level_of,
    quiet,
    usable_pixel_size,
    warn_of_pages,
)
from fcvgg.images.pictures import in_bytes
from fcvgg.support.extras import imported

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _SEPARATED, _YCBCR, _CIELAB = 0, 1, 2, 3, 5, 6, 8
"""TIFF's photometric interpretations that can be read."""

_SPACES = {_SEPARATED: "CMYK", _YCBCR: "YCbCr", _CIELAB: "LAB"}
"""Pillow's modes of those that are not grey or RGB."""

_MASK = 4
"""TIFF's photometric interpretation, and bit of the kind of page, of a mask: 1 where there is an
image."""

_REDUCED = 1
"""TIFF's bit of the kind of page of a thumbnail."""

_PLAIN_SERIES = ("generic", "uniform", "shaped")
"""tifffile's kinds of series that are pages as such, not images of a scanner's file."""

_GREYS = (_WHITE_IS_ZERO, _BLACK_IS_ZERO)

_JPEG = (6, 7)
"""TIFF's compressions whose decoder turns YCbCr into RGB."""

_APERIO_YCBCR = 33003
"""The compression that stores YCbCr in JPEG 2000, whatever the photometric interpretation says."""

_ALPHA = (1, 2)
"""TIFF's kinds of extra samples that are transparency; with the first, colours are multiplied by
it."""

_ASSOCIATED = 1

_SEPARATE = 2
"""TIFF's planar configuration of which every sample has tiles of its own."""

_CMYK = 1
"""TIFF's set of inks of four."""

_INCH, _CENTIMETRE = 2, 3
"""TIFF's units of resolutions."""

_LARGEST_OF_INCHES = 10.0
"""Micrometres of a pixel at most that are believed where they are stated by the inch: larger ones,
of less than 2,540 pixels, are about printing."""

_ORIENTATION, _X_RESOLUTION, _INK_SET, _SAMPLE_FORMAT = 274, 282, 332, 339
_SUBSAMPLING, _REFERENCE_LEVELS = 530, 532
_NODATA = 42113
"""GDAL's tag for the value of pixels without data, as text."""

_GEOREFERENCE = (PIXEL_SCALE, TIE_POINTS, MATRIX, KEYS)
"""Tags of which a georeferenced file has one at least."""

_MOST_PAGES = 1 << 13
"""Pages of a TIFF; tifffile describes each, in half a millisecond or more."""

_TURNED = 5
"""Orientations from this one on exchange height and width."""

_ROWS_FLIPPED, _COLS_FLIPPED = (3, 4, 6, 7), (2, 3, 7, 8)
"""Orientations of which the rows, and columns, that are stored run from the far end."""

_FULL_RANGE = (0, 255, 128, 255, 128, 255)
"""Black and white of brightness and colours in YCbCr that uses all values of 8 bits."""

_MICROMETRES = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}


@dataclass(frozen=True)
class _Plane:
    """Where the tiles or strips of one page of a TIFF stand in the file."""

    offsets: Sequence[int]
    counts: Sequence[int]
    jpeg_tables: bytes | None


class TiffSource(StripSource):
    """One level of a TIFF, BigTIFF or OME-TIFF; only the tiles or strips that are needed are read.

    Args:
        file: the path, or the file in memory.
        level: of the pyramid; 0 is the full resolution.
        bands: the channels to take; None takes all.
        missing: ``"fill"`` takes tiles that the file does not store for its nodata value, zero if
            it declares none; ``"error"`` refuses.
        series: of images in the file: the first, or that of a mask.
    """

    def __init__(
        self,
        file: File,
        level: int = 0,
        bands: Bands = None,
        missing: str = "fill",
        series: int = 0,
    ):
        super().__init__(bands)
        self._series = series
        self._mask: TiffSource | None = None
        tifffile = imported("tifffile", "stream")
        self._source = file
        if isinstance(file, Path):
            self.path, self.name = file, str(file)
        else:
            file.seek(0)
        try:
            with quiet("tifffile"), tifffile.TiffFile(file) as tiff:
                if len(tiff.pages) > _MOST_PAGES:
                    raise ImageError(
                        f"{self.name} must have at most {_MOST_PAGES} pages, got "
                        f"{len(tiff.pages)}; save the one that is wanted as a file of its own"
                    )
                self._describe(tiff, level)
                self.pixel_size = _pixel_size(tiff, self.stored_size)
                found = tiff.filehandle.size
        except FcvggError:
            raise
        except Exception as error:
            raise ImageError(f"{self.name} cannot be read as a TIFF: {one_line(error)}") from error
        if self._turned and self.pixel_size is not None:
            self.pixel_size = self.pixel_size[::-1]
        self._check()
        self._check_whole(found)
        if missing == "error":
            self._check_stored()
        if self._several:
            warn_of_pages(self)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        if not isinstance(self._source, Path):
            self._source.seek(0)
            yield self._source
            return
        with open(self._source, "rb") as file:
            yield file

    def _describe(self, file: Any, level: int) -> None:
        """Read everything but the pixels."""
        series = level_of(file.series[self._series].levels, level, self.name)
        self._page = page = series.keyframe
        full = file.series[self._series].levels[0].keyframe
        first = full.tags  # which say what holds for all levels
        planes = self._pages_of(file, series)
        self._planes = [_Plane(p.dataoffsets, p.databytecounts, p.jpegtables) for p in planes]
        self._decode = page.decode
        self._byteorder = file.byteorder
        self._samples = page.samplesperpixel
        orientation = page.tags.valueof(_ORIENTATION, first.valueof(_ORIENTATION, 1))
        self._orientation = int(orientation) if orientation in range(1, 9) else 1
        self.stored_size = (page.imagelength, page.imagewidth)
        self.size = self.stored_size[::-1] if self._turned else self.stored_size
        pages = [one.keyframe for one in file.series[self._series].levels]
        sizes = [(one.imagelength, one.imagewidth) for one in pages]
        self.level_sizes = [size[::-1] for size in sizes] if self._turned else sizes
        self._describe_colours(page, self._samples * len(planes))
        self._mask_series = self._find_mask(file) if level == 0 else None
        self.georeferenced = any(code in first for code in _GEOREFERENCE)
        codes = (*_GEOREFERENCE, KEY_DOUBLES, KEY_TEXT)
        place = Georeference.of_tags({code: first.valueof(code) for code in codes if code in first})
        if place is not None:
            place = place.scaled(sizes[0], self.stored_size)
            self.georeference = place.through(self._upright)
        self.nodata = _number(page.tags.valueof(_NODATA, first.valueof(_NODATA)))
        # rows that follow each other in the file, unchanged, are read without tifffile
        layout = (page.compression, page.predictor, page.planarconfig, page.fillorder)
        plain = page.is_contiguous and layout == (1, 1, 1, 1)
        self._direct = plain and self._bits is None and not self._subsampled
        if self._turned:
            rows = page.tilewidth if page.is_tiled else self.size[0]
        else:
            rows = 1 if self._direct else self._tile[0]
        self.block_rows = min(int(rows), self.size[0])

    def _pages_of(self, file: Any, series: Any) -> list[Any]:
        """The pages of the first plane: one, or one for each channel.

        Pages that are not all in the file, and planes within a page, are refused.
        """
        if any(p is None or p.parent is not file for p in series.pages):
            raise ImageError(
                f"{self.name} must have its pixels in one file, got several; save it as one"
            )
        axes, lengths = series.axes, tuple(series.shape)
        page = series.keyframe
        around = len(lengths) - len(page.shape)  # axes along which pages follow each other
        beyond = [axis for axis, n in zip(axes, lengths) if n > 1 and axis not in "YXSC"]
        of_pages = np.prod(lengths[:around], dtype=object) == len(series.pages)
        if beyond and not (of_pages and set(beyond) <= set(axes[:around])):
            raise ImageError(
                f"{self.name} must be one plane of rows, columns and channels, got axes "
                f"{axes} of lengths {lengths}; pass one plane as an array"
            )
        stored = page.samplesperpixel * len(series.pages) * page.imagelength * page.imagewidth
        if stored != np.prod(lengths, dtype=object):
            raise ImageError(
                f"{self.name} must describe the {'x'.join(map(str, lengths))} numbers that it "
                f"declares, got {stored}, as in large ImageJ files; save it as an OME-TIFF"
            )
        self._several = bool(beyond) or _has_other_images(file, series)
        if not beyond:
            return list(series.pages)
        first = tuple(slice(None) if axis in "SC" else 0 for axis in axes[:around])
        numbers = np.arange(len(series.pages)).reshape(lengths[:around])[first]
        return [series.pages[int(number)] for number in np.ravel(numbers)]

    def _describe_colours(self, page: Any, samples: int) -> None:
        """Read channels, dtype and transparency, and how they follow from what is stored."""
        kind = page.photometric
        self._space = self._colour_space(page, samples)
        self._subsampled = self._space == "YCbCr" and page.is_subsampled
        bits = page.bitspersample
        known = {*_GREYS, _RGB, _PALETTE, *((_MASK,) if self._series else ())}
        if kind not in known and self._space is None and not _decodes_to_rgb(page):
            raise ImageError(
                f"{self.name} must store RGB, grey, a palette, CMYK of 8 or 16 bits, or YCbCr or "
                f"LAB of 8, got {getattr(kind, 'name', '?')} of {bits} bits; save it as one of them"
            )
        packed = bits in range(1, 16) and bits != 8
        if page.dtype is None or not (packed or bits in (8, 16, 32, 64)):
            raise ImageError(
                f"{self.name} must have 1 to 16, 32 or 64 bits per sample, got {bits}; save it so"
            )
        self.dtype = np.dtype(np.uint8 if page.dtype.kind == "b" else page.dtype)
        self._bits = bits if packed and kind != _PALETTE else None
        if self._bits is not None and bits > 8:
            self.white = float((1 << bits) - 1)
        if kind == _WHITE_IS_ZERO and self.dtype.kind != "u":
            raise ImageError(
                f"{self.name} must hold unsigned integers where 0 is white, got {self.dtype}; save "
                "it with 0 as black"
            )
        self._colours = None
        if kind == _PALETTE:
            table = np.asarray(page.colormap).T  # (colours, 3)
            # old programs wrote colours of 8 bits, which would all be black
            self._colours = (table >> 8 if table.max(initial=0) > 255 else table).astype(np.uint8)
            self.dtype = np.dtype(np.uint8)
        self.channels = samples if self._colours is None and self._space is None else 3
        extra = page.extrasamples
        with_alpha = (kind == _RGB and samples == 4) or (kind in _GREYS and samples == 2)
        self.alpha = with_alpha and self.white is None and bool(extra) and extra[-1] in _ALPHA
        self._associated = self.alpha and extra[-1] == _ASSOCIATED
        self._masks = self.alpha
        # by default GDAL tags the fourth band of bytes as alpha, whatever it is; unlike programs
        # for pictures it states a sample format and no resolution
        self._by_gdal = _SAMPLE_FORMAT in page.tags and _X_RESOLUTION not in page.tags

    def _colour_space(self, page: Any, samples: int) -> str | None:
        """Pillow's mode of what is stored, where it is converted to RGB here."""
        space = _SPACES.get(page.photometric)
        if page.compression == _APERIO_YCBCR and samples == 3:
            space = "YCbCr"
        if space == "CMYK":
            inks = page.tags.valueof(_INK_SET, _CMYK)
            usable = samples == 4 and inks == _CMYK and page.dtype in (np.uint8, np.uint16)
            return space if usable else None
        if _decodes_to_rgb(page) or samples != 3 or page.dtype != np.uint8:
            return None
        self._check_levels(page)
        return space

    def _check_levels(self, page: Any) -> None:
        """Refuse YCbCr of which black and white are not the ends of 8 bits, as in video."""
        levels = np.ravel(page.tags.valueof(_REFERENCE_LEVELS, ()))
        found = tuple(a / b for a, b in zip(levels[::2], levels[1::2]))
        if page.photometric == _YCBCR and found not in ((), _FULL_RANGE):
            raise ImageError(
                f"{self.name} must store YCbCr from 0 to 255, got the reference levels "
                f"{', '.join(f'{n:g}' for n in found)}; save it as RGB"
            )

    def _find_mask(self, file: Any) -> int | None:
        """The series that is a mask of this one."""
        for i, other in enumerate(file.series):
            page = other.keyframe
            size = (page.imagelength, page.imagewidth)
            if i != self._series and page.subfiletype & _MASK and size == self.stored_size:
                return i
        return None

    @property
    def _turned(self) -> bool:
        return self._orientation >= _TURNED

    @property
    def _upright(self) -> Transform:
        """From pixels as they are given to those that are stored, before they are turned."""
        height, width = self.stored_size
        row = (-1, height) if self._orientation in _ROWS_FLIPPED else (1, 0)
        col = (-1, width) if self._orientation in _COLS_FLIPPED else (1, 0)
        if self._turned:
            return 0, col[0], col[1], row[0], 0, row[1]
        return col[0], 0, col[1], 0, row[0], row[1]

    def transparent(self) -> bool:
        """Whether the last of two or four channels is taken for transparency.

        In a georeferenced file it never is: near infrared is often tagged so.
        """
        if not self.alpha or self.georeferenced:
            return False
        return not self._by_gdal or self._looks_like_alpha()

    @property
    def _tile(self) -> Pair:
        key = self._page
        if key.is_tiled:
            return key.tilelength, key.tilewidth
        return min(key.rowsperstrip, self.stored_size[0]), self.stored_size[1]

    def _check_whole(self, found: int) -> None:
        tall, wide = self._tile
        if min(tall, wide) < 1:
            raise ImageError(
                f"{self.name} must have tiles or strips of one pixel or more, got {tall}x{wide}"
            )
        tiles = -(-self.stored_size[0] // tall) * -(-self.stored_size[1] // wide)
        tiles *= self._samples if self._page.planarconfig == _SEPARATE else 1
        for plane in self._planes:
            ends = [offset + count for offset, count in zip(plane.offsets, plane.counts)]
            if (len(ends) < tiles and not self._direct) or not ends or max(ends) > found:
                reach = f", and its pixels reach to byte {max(ends)}" if ends else ""
                raise ImageError(f"{self.name} is truncated: it has {found} bytes{reach}")

    def _check_stored(self) -> None:
        counts = [count for plane in self._planes for count in plane.counts]
        if not all(counts):
            raise ImageError(
                f"{self.name} must store all of its {len(counts)} tiles, got "
                f"{len(counts) - counts.count(0)}; missing='fill' gives the others the nodata "
                "value, or zeros"
            )

    def _has_mask(self) -> bool:
        return self._masks or self._mask_series is not None

    def _masked(self, stored: NDArray[Any], rows: Pair, cols: Pair) -> NDArray[np.bool_]:
        if self._mask_series is None:
            return np.asarray(stored[..., -1] == 0)
        if self._mask is None:
            self._mask = TiffSource(self._source, series=self._mask_series)
        return np.asarray(self._mask._read(rows, cols)[..., 0] == 0)

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        read = self._rows if self._direct else self._segments
        # the ranges that are asked for, in the order and direction in which the file stores them
        ranges = [cols, rows] if self._turned else [rows, cols]
        flipped = [self._orientation in kinds for kinds in (_ROWS_FLIPPED, _COLS_FLIPPED)]
        for axis, size in enumerate(self.stored_size):
            if flipped[axis]:
                ranges[axis] = (size - ranges[axis][1], size - ranges[axis][0])
        with self._opened() as file:
            planes = [read(file, plane, *ranges) for plane in self._planes]
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, 2)
        pixels = pixels[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]
        return pixels.swapaxes(0, 1) if self._turned else pixels

    def _coloured(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Grey or colours of what is stored: palettes, inverted grey, CMYK, multiplied alpha."""
        if self._colours is not None:
            return self._colours[stored[..., 0]]
        if self._space is not None:
            return _in_rgb(stored, self._space)
        if self._bits is not None and self._bits < 8:
            stored = in_bytes(stored, self._bits)
        if self._page.photometric == _WHITE_IS_ZERO:
            top = stored.dtype.type(self.white or np.iinfo(stored.dtype).max)
            stored = np.concatenate([top - stored[..., :1], stored[..., 1:]], 2)
        return _unmultiplied(stored) if self._associated else stored

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
        row = self.stored_size[1] * self._samples * dtype.itemsize
        data = self._bytes(file, plane.offsets[0] + rows[0] * row, (rows[1] - rows[0]) * row)
        pixels = np.frombuffer(data, dtype).reshape(-1, self.stored_size[1], self._samples)
        return pixels[:, cols[0] : cols[1]].astype(self._page.dtype, copy=False)

    def _segments(self, file: BinaryIO, plane: _Plane, rows: Pair, cols: Pair) -> NDArray[Any]:
        """Pixels of the tiles or strips that cover rows and columns."""
        height, width = self.stored_size
        tall, wide = self._tile
        across, down = -(-width // wide), -(-height // tall)
        # planar files store all tiles of the first sample, then all of the second
        samples = self._samples if self._page.planarconfig == _SEPARATE else 1
        shape = (rows[1] - rows[0], cols[1] - cols[0], self._samples)
        pixels: NDArray[Any] = np.full(shape, self._fill, self._page.dtype)
        for sample in range(samples):
            part = pixels[..., sample : sample + 1] if samples > 1 else pixels
            for y in range(rows[0] // tall, -(-rows[1] // tall)):
                for x in range(cols[0] // wide, -(-cols[1] // wide)):
                    segment = self._segment(file, plane, (sample * down + y) * across + x)
                    if segment is not None:
                        _paste(part, segment, y * tall - rows[0], x * wide - cols[0])
        return pixels

    @property
    def _fill(self) -> float:
        """What tiles that the file does not store are filled with, as by GDAL."""
        dtype = np.dtype(self._page.dtype)
        if self.nodata is None or dtype.kind == "b":
            return 0
        if dtype.kind == "f":
            return self.nodata
        limits = np.iinfo(dtype)
        return int(self.nodata) if limits.min <= self.nodata <= limits.max else 0

    def _segment(self, file: BinaryIO, plane: _Plane, index: int) -> NDArray[Any] | None:
        """One tile or strip; None for one that was not stored."""
        if not plane.counts[index]:
            return None
        data = self._bytes(file, plane.offsets[index], plane.counts[index])
        if self._subsampled:
            return self._of_subsampled(data, index)
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

    def _of_subsampled(self, data: bytes, index: int) -> NDArray[Any]:
        """A tile or strip of YCbCr in blocks, which hold the brightness of each pixel and a colour.

        tifffile leaves them out, except in JPEG.
        """
        tifffile = imported("tifffile", "stream")
        wide, tall = self._page.tags.valueof(_SUBSAMPLING, (2, 2))  # pixels of a block
        height, width = self._tile
        if not self._page.is_tiled:
            height = min(height, self.stored_size[0] - index * height)
        down, across = -(-height // tall), -(-width // wide)
        expected = down * across * (tall * wide + 2)
        if self._page.compression != 1:
            data = tifffile.TIFF.DECOMPRESSORS[self._page.compression](data, out=expected)
        blocks = np.frombuffer(data, np.uint8, expected).reshape(down, across, -1)
        light = blocks[..., :-2].reshape(down, across, tall, wide).swapaxes(1, 2)
        light = light.reshape(down * tall, across * wide, 1)
        colour = blocks[..., -2:].repeat(tall, 0).repeat(wide, 1)  # (h, w, 2)
        return np.concatenate([light, colour], 2)[:height, :width]


def _decodes_to_rgb(page: Any) -> bool:
    """Whether the decoder turns YCbCr into RGB."""
    return page.photometric == _YCBCR and page.compression in _JPEG


def _in_rgb(stored: NDArray[Any], space: str) -> NDArray[Any]:
    """Pixels ``(h, w, C)`` of a colour space as RGB; of 16 bits by Pillow's formula for inks."""
    if stored.dtype == np.uint8:
        size, data = (stored.shape[1], stored.shape[0]), np.ascontiguousarray(stored).tobytes()
        return np.asarray(Image.frombytes(space, size, data, "raw", space).convert("RGB"))
    light = 65535 - stored.astype(np.float32)  # (h, w, CMYK)
    return (light[..., :3] * light[..., 3:] / 65535).round().astype(np.uint16)


def _unmultiplied(pixels: NDArray[Any]) -> NDArray[Any]:
    """Pixels whose colours are multiplied by alpha, the last channel, without that."""
    if pixels.dtype.kind == "i":
        return pixels
    full = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
    # in float64, since float32 does not hold products of 16 bits
    alpha = pixels[..., -1:].astype(np.float64)
    pure = np.divide(pixels * np.float64(full), alpha, out=np.zeros(pixels.shape), where=alpha > 0)
    pure[..., -1:] = alpha
    if pixels.dtype.kind == "u":
        pure = pure.round().clip(0, full)
    return pure.astype(pixels.dtype)


def _has_other_images(file: Any, series: Any) -> bool:
    """Whether pages of other sizes follow, as in scans, which are neither thumbnails nor masks."""
    others = [one for one in file.series[1:] if not one.keyframe.subfiletype & (_REDUCED | _MASK)]
    plain = all(one.kind in _PLAIN_SERIES for one in file.series)
    return plain and series is file.series[0] and bool(others)


def _number(text: Any) -> float | None:
    """The number in GDAL's tag; None where there is none."""
    try:
        return float(str(text).strip(" \0"))
    except ValueError:
        return None


def _pixel_size(file: Any, size: Pair) -> tuple[float, float] | None:
    """Micrometres of a pixel of a level of this size, as OME, Aperio or TIFF's tags state them."""
    first = file.series[0].keyframe
    sizes = _ome_pixel_size(file.ome_metadata) if file.is_ome else None
    scanned = re.search(r"\bMPP ?= ?(\d+(?:\.\d+)?)", first.description)
    if sizes is None and scanned is not None and float(scanned[1]) > 0:
        sizes = (float(scanned[1]), float(scanned[1]))
    if sizes is None and first.resolutionunit in (_INCH, _CENTIMETRE):
        across, down = first.get_resolution(_CENTIMETRE)
        sizes = (1e4 / down, 1e4 / across) if min(down, across) > 0 else None
        if first.resolutionunit == _INCH and sizes is not None and max(sizes) > _LARGEST_OF_INCHES:
            return None
    if sizes is None:
        return None
    down, across = sizes[0] * first.imagelength / size[0], sizes[1] * first.imagewidth / size[1]
    return usable_pixel_size((down, across))


def _ome_pixel_size(description: str) -> tuple[float, float] | None:
    tag = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", description)
    found = dict(re.findall(r'(PhysicalSize\w+)="([^"]*)"', tag[0])) if tag else {}
    try:
        sizes = [
            float(found[f"PhysicalSize{axis}"])
            * _MICROMETRES[found.get(f"PhysicalSize{axis}Unit", "µm")]
            for axis in "YX"
        ]
    except (KeyError, ValueError):
        return None
    return (sizes[0], sizes[1]) if min(sizes) > 0 else None


def _paste(target: NDArray[Any], part: NDArray[Any], top: int, left: int) -> None:
    """Put a tile at its place, cut to the target."""
    rows, cols = target.shape[:2]
    y, x = max(-top, 0), max(-left, 0)
    part = part[y : rows - top, x : cols - left]
    height, width = part.shape[:2]
    target[top + y : top + y + height, left + x : left + x + width] = part
