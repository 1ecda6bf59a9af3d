"""TIFF, BigTIFF and OME-TIFF, of which only the tiles or strips that are needed are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fcvgg.errors import FcvggError, ImageError, MissingExtraError, one_line
from fcvgg.geometry import Pair
from fcvgg.sources.extras import imported
from fcvgg.streaming.strip_sources import _SAMPLES, Bands, StripSource, _level

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
"""TIFF's photometric interpretations that can be read."""

_JPEG = (6, 7)
"""TIFF's compressions whose decoder turns YCbCr into RGB."""

_ALPHA = (1, 2)
"""TIFF's kinds of extra samples that are transparency."""

_SEPARATE = 2
"""TIFF's planar configuration of which every sample has tiles of its own."""


_CENTIMETRE = 3
"""TIFF's unit of resolutions that describe the object rather than the print."""

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
        level: of the pyramid; 0 is the full resolution.
        bands: the channels to take; None takes all.
        missing: ``"fill"`` takes tiles that the file does not store for zeros, ``"error"`` refuses.
    """

    def __init__(self, path: Path, level: int = 0, bands: Bands = None, missing: str = "fill"):
        super().__init__(bands)
        self.name = str(path)
        self.path = path
        tifffile = imported("tifffile", "stream")
        try:
            with tifffile.TiffFile(path) as file:
                self._describe(file, level)
                self.pixel_size = _pixel_size(file, self.size)
                found = file.filehandle.size
        except FcvggError:
            raise
        except Exception as error:
            raise ImageError(f"{path} is no readable TIFF: {one_line(error)}") from error
        self._check(self._page.dtype)
        self._check_whole(found)
        if missing == "error":
            self._check_stored()

    def _describe(self, file: Any, level: int) -> None:
        """Read everything but the pixels."""
        series = _level(file.series[0].levels, level, self.name)
        self._page = page = series.keyframe
        if any(p is None or p.parent is not file for p in series.pages):
            raise ImageError(
                f"{self.name} has its pixels in several files; expected one: save it as one"
            )
        squeezed = [axis for axis, n in zip(series.axes, series.shape) if n > 1 or axis in "YX"]
        planes = len(series.pages)
        known = planes in _SAMPLES or self.bands is not None
        if set(squeezed) - set("YXSC") or (planes > 1 and not known):
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
        colours = (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE)
        decoded = page.photometric == _YCBCR and page.compression in _JPEG
        if page.photometric not in colours and not decoded:
            raise ImageError(
                f"{self.name} stores its colours as {getattr(page.photometric, 'name', '?')}; "
                "expected RGB, grey or a palette: save it so"
            )
        extra = page.extrasamples
        self.alpha = page.photometric == _RGB and bool(extra) and extra[0] in _ALPHA
        self._planes = [_Plane(p.dataoffsets, p.databytecounts, p.jpegtables) for p in series.pages]
        self._decode = page.decode
        self._byteorder = file.byteorder
        self._samples = page.samplesperpixel
        stored = self._samples * planes * page.imagelength * page.imagewidth
        if stored != np.prod(series.shape, dtype=object):
            raise ImageError(
                f"{self.name} says that it holds {'x'.join(map(str, series.shape))} numbers and "
                f"describes {stored} of them, as large ImageJ files do; save it as an OME-TIFF"
            )
        if page.photometric != _PALETTE and page.bitspersample not in (8, 16, 32, 64):
            raise ImageError(
                f"{self.name} has {page.bitspersample} bits per sample; expected 8 or 16: "
                "save it so"
            )
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

    def _check_stored(self) -> None:
        counts = [count for plane in self._planes for count in plane.counts]
        if not all(counts):
            raise ImageError(
                f"{self.name} lacks {counts.count(0)} of its {len(counts)} tiles; "
                "missing='fill' takes them for zeros"
            )

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


def _pixel_size(file: Any, size: Pair) -> tuple[float, float] | None:
    """Micrometres of a pixel of a level of this size, as OME, Aperio or TIFF's tags state them."""
    first = file.series[0].keyframe
    sizes = _ome_pixel_size(file.ome_metadata) if file.is_ome else None
    scanned = re.search(r"\bMPP ?= ?(\d+(?:\.\d+)?)", first.description)
    if sizes is None and scanned is not None and float(scanned[1]) > 0:
        sizes = (float(scanned[1]), float(scanned[1]))
    if sizes is None and first.resolutionunit == _CENTIMETRE:  # inches are about printing
        across, down = first.get_resolution(_CENTIMETRE)
        sizes = (1e4 / down, 1e4 / across) if min(down, across) > 0 else None
    if sizes is None:
        return None
    return sizes[0] * first.imagelength / size[0], sizes[1] * first.imagewidth / size[1]


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
