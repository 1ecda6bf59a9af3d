"""Chunks of a zarr folder, measured before they are unpacked: a few bytes can claim gigabytes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from fcvgg.errors import ImageError
from fcvgg.geometry import Pair
from fcvgg.images.lazy.source import ArraySource, Bands

_SPARE = 1 << 20
"""Bytes by which a chunk may exceed what its array says."""

_UNSTATED = 1 << 30
"""Bytes that a chunk may have at most where its file does not state them exactly."""

_UNCOUNTED = 1 << 26
"""Bytes that gzip may give without being unpacked twice: at most 1032 times its own."""

_ZSTD, _GZIP, _BLOSC = b"\x28\xb5\x2f\xfd", b"\x1f\x8b", (b"\1", b"\2")
"""How files of compressors begin; of Blosc with the version of its format."""

_ZSTD_BLOCK = 1 << 17
"""Bytes that a block of Zstandard gives at most."""


class ZarrSource(ArraySource):
    """An array of a zarr folder.

    Args:
        array: the array.
        axes: as for `ArraySource`.
        path: the folder, or the one that holds it.
        bands: the channels to take; None takes all.
    """

    def __init__(self, array: Any, axes: str, path: Path, bands: Bands = None):
        super().__init__(array, axes, str(path), bands=bands)
        self._size_of_chunk = prod(array.chunks) * self.dtype.itemsize

    def _read(self, rows: Pair, cols: Pair) -> Any:
        if getattr(self._array, "shards", None) is None:  # several chunks in a file state nothing
            for file in self._files(rows, cols):
                self._check_chunk(file)
        return super()._read(rows, cols)

    def _files(self, rows: Pair, cols: Pair) -> Iterator[Path]:
        """The files of the chunks that cover rows and columns."""
        array = self._array
        asked = {"Y": rows, "X": cols}
        ranges = []
        for axis, length, step in zip(self._axes, array.shape, array.chunks):
            first, last = asked.get(axis, (0, length))
            ranges.append(range(first // step, -(-last // step)))
        for place in product(*ranges):
            yield array.store.root / array.path / array.metadata.encode_chunk_key(place)

    def _check_chunk(self, file: Path) -> None:
        if not file.exists():  # a chunk of the fill value
            return
        if not file.is_file():
            raise ImageError(f"{file} must be a file that holds a chunk, got something else")
        limit = 2 * self._size_of_chunk + _SPARE
        stated, found = True, file.stat().st_size
        if found <= limit:
            stated, found = unpacked_size(file.read_bytes(), limit)
        if found > (limit if stated else max(limit, _UNSTATED)):
            raise ImageError(
                f"{file} must hold a chunk of {self._size_of_chunk} bytes, got {found} or more; "
                "write the image once more"
            )


def unpacked_size(data: bytes, limit: int = _UNSTATED) -> tuple[bool, int]:
    """Whether the file of a chunk says its size, and the bytes that it gives, or at most gives.

    What gzip and zlib give is counted, up to a limit.

    >>> unpacked_size(b"\\x28\\xb5\\x2f\\xfd\\xe0" + (1 << 40).to_bytes(8, "little"))
    (True, 1099511627776)
    """
    if data[:4] == _ZSTD:
        return _of_zstd(data)
    if data[:1] in _BLOSC and len(data) == int.from_bytes(data[12:16], "little"):
        return True, int.from_bytes(data[4:8], "little")
    if data[:2] == _GZIP or (data[:1] == b"\x78" and int.from_bytes(data[:2], "big") % 31 == 0):
        return True, _of_deflate(data, limit)
    return True, len(data)


def _of_zstd(data: bytes) -> tuple[bool, int]:
    """Of Zstandard's frames (RFC 8878): as stated, or by their blocks."""
    total, place = 0, 0
    while data[place : place + 4] == _ZSTD and place + 5 < len(data):
        descriptor = data[place + 4]
        single = descriptor >> 5 & 1
        length = (single, 2, 4, 8)[descriptor >> 6]  # of the size in bytes
        place += 6 - single + (0, 1, 2, 4)[descriptor & 3]
        if length:
            return True, int.from_bytes(data[place : place + length], "little")
        last = False
        while not last and place + 3 <= len(data):
            header = int.from_bytes(data[place : place + 3], "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            total += size if kind < 2 else _ZSTD_BLOCK  # plain or one byte repeated, or compressed
            place += 3 + (1 if kind == 1 else size)
        place += 4 * (descriptor >> 2 & 1)
    return False, total


def _of_deflate(data: bytes, limit: int) -> int:
    """What gzip or zlib gives, counted no further than the limit, and only where it can be much."""
    if len(data) << 10 <= _UNCOUNTED:
        return len(data)
    unpack = zlib.decompressobj(wbits=47)  # either header
    total, rest = 0, data
    while rest and total <= limit:
        part = unpack.decompress(rest, _SPARE)
        if not part:
            break
        total, rest = total + len(part), unpack.unconsumed_tail
    return total
