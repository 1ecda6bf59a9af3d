"""The description of a score map on disk, read once and checked against its array."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np

from fcvgg.errors import FcvggError, one_line
from fcvgg.geometry import Geometry, Pair, checked_size
from fcvgg.images.lazy.georeference import FIELDS, are_keys, is_transform
from fcvgg.images.lazy.source import nodata_of, usable_pixel_size
from fcvgg.probability import ACTIVATIONS, UNKNOWN

FORMAT = 2

_LARGEST_SIDE = 1 << 31
_MOST_CLASSES = 1 << 24
_LARGEST_CHUNK = 64 << 20
_MOST_CHUNKS = 1 << 16
_LARGEST_STRIP = 1 << 40
_BELIEVED_CELLS = 1 << 26
_CELLS_PER_BYTE = 1 << 12
"""Finished cells per byte on disk at most: chunks without data are not stored."""

_LATER = (
    *("dtype", "output", "network", "weights", "image", "pixel_size", "bands", "nodata", "where"),
    *("num_classes", "full_size", *FIELDS),
)
"""Fields that older stores lack, or that only a resumed stream compares."""

_DIMENSIONS = {"scores": 3, "argmax": 2, "top5": 4}


def checked_description(data: Any, array: Any) -> dict[str, Any]:
    """The description in a store's attributes, which later code can trust.

    Args:
        data: the description, as read from the file.
        array: the zarr array that it describes.

    Raises:
        FcvggError: naming the field that is missing, of another kind, or does not fit the array.
    """
    if not isinstance(data, Mapping):
        raise FcvggError(f"the description must be an object, got {type(data).__name__}")
    if data.get("format") != FORMAT:
        raise FcvggError(
            f"format must be {FORMAT}, which this version of fcvgg reads, got "
            f"{data.get('format')!r}; upgrade fcvgg"
        )
    for name, (holds, expected) in _FIELDS.items():
        if name not in data:
            if name in _LATER:
                continue
            raise FcvggError(f"the description lacks {name!r}")
        if not holds(data[name]):
            raise FcvggError(f"{name} must be {expected}, got {data[name]!r}")
    try:
        geometry = Geometry.from_dict(data["geometry"])
        cells = geometry.output_size(checked_size(data["image_size"]))
    except FcvggError as error:
        raise FcvggError(f"geometry must be that of a network: {one_line(error)}") from error
    _check_array(data, array, cells)
    # zarr decodes a chunk as a whole, however little of it is read
    chunk = prod(array.chunks) * np.dtype(array.dtype).itemsize
    if chunk > _LARGEST_CHUNK:
        raise FcvggError(f"chunks must be of at most {_LARGEST_CHUNK:,} bytes, got {chunk:,}")
    count = prod(array.shards or array.chunks) // prod(array.chunks)  # zarr reads all their places
    if count > _MOST_CHUNKS:
        raise FcvggError(f"shards must be of at most {_MOST_CHUNKS:,} chunks, got {count:,}")
    return dict(data)


def checked_progress(data: Any, blocks: list[Pair], rows: int) -> list[int]:
    """How many rows of every block are finished.

    Raises:
        ValueError: if the file holds anything else.
    """
    finished = data.get("finished") if isinstance(data, Mapping) else None
    if not isinstance(finished, list) or len(finished) != len(blocks):
        raise ValueError(f"it must hold the finished rows of {len(blocks)} blocks, got {data!r}")
    if not all(_is_whole(n, 0, rows) for n in finished):
        raise ValueError(f"finished rows must be from 0 to {rows}, got {finished!r}")
    return finished


def _check_array(data: Mapping[str, Any], array: Any, cells: Pair) -> None:
    # a file from elsewhere may claim anything: every index that is used later is checked here
    kind, shape = data["kind"], tuple(array.shape)
    first, end = data["rows"]
    expected = (end - first, cells[1])
    if end > cells[0] or len(shape) != _DIMENSIONS[kind] or shape[-2:] != expected:
        raise FcvggError(
            f"the array must be of {_DIMENSIONS[kind]} dimensions that end in {expected}, the "
            f"cells of rows {first} to {end} of {cells}, got {shape}"
        )
    wanted = "i" if kind == "argmax" else "f"
    if np.dtype(array.dtype).kind != wanted:
        raise FcvggError(
            f"the array must hold {kind} as numbers of kind {wanted!r}, got {array.dtype}"
        )
    if kind == "top5" and (shape[0] != 2 or not 0 < shape[1] <= 5):
        raise FcvggError(f"the array must begin with (2, 5) for top5, got {shape}")
    classes, names = data["classes"], data["categories"]
    lead = shape[0] if kind == "scores" else 0
    if len(classes) != lead or (kind == "scores" and not lead):
        raise FcvggError(f"classes must name the {lead} of the array, got {len(classes)}")
    if kind == "scores" and names is not None and len(names) != lead:
        raise FcvggError(f"categories must name the {lead} classes of the array, got {len(names)}")
    # the blocks cover all columns, in order and without gaps
    blocks = [tuple(block) for block in data["blocks"]]
    ends = [0, *(b for _, b in blocks)]
    if any(a != before or a >= b for (a, b), before in zip(blocks, ends)) or ends[-1] != shape[-1]:
        raise FcvggError(f"blocks must follow each other from 0 to {shape[-1]}, got {blocks!r}")


def check_held(cells: int, stored_bytes: Callable[[], int]) -> None:
    """Refuse more finished cells than the files of a store can hold.

    Raises:
        FcvggError: if there are more.
    """
    if cells > _BELIEVED_CELLS and cells > _CELLS_PER_BYTE * stored_bytes():
        raise FcvggError(
            f"finished cells must be at most {_CELLS_PER_BYTE:,} per byte of its files, got "
            f"{cells:,} in {stored_bytes():,} bytes"
        )


# -- kinds of values ------------------------------------------------------------------------------


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _are_whole(value: Any, least: int, most: int, count: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and (count is None or len(value) == count)
        and all(_is_whole(n, least, most) for n in value)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pixel_size(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and len(value) == 2
        and all(type(n) in (int, float) for n in value)
        and usable_pixel_size(value) is not None
    )


def _is_nodata(value: Any) -> bool:
    try:
        nodata_of(value)
    except (TypeError, ValueError):
        return False
    return value is None or _is_text(value)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda v: v in tuple(_DIMENSIONS), f"one of {', '.join(_DIMENSIONS)}"),
    "geometry": (lambda v: isinstance(v, dict), "an object"),
    "image_size": (lambda v: _are_whole(v, 1, _LARGEST_SIDE, 2), "[height, width]"),
    "full_size": (lambda v: _are_whole(v, 1, _LARGEST_SIDE, 2), "[height, width]"),
    "rows": (
        lambda v: _are_whole(v, 0, _LARGEST_SIDE, 2) and v[0] < v[1],
        "[first, end] of the rows of cells",
    ),
    "classes": (
        lambda v: _are_whole(v, 0, _MOST_CLASSES) and len(set(v)) == len(v),
        "a list of class indices",
    ),
    "all_classes": (lambda v: type(v) is bool, "true or false"),
    "categories": (
        lambda v: v is None or (isinstance(v, list) and all(map(_is_text, v))),
        "null or a list of names",
    ),
    "activation": (
        lambda v: v in (*ACTIVATIONS, UNKNOWN),
        f"one of {', '.join((*ACTIVATIONS, UNKNOWN))}",
    ),
    "dtype": (_is_text, "a name"),
    "output": (lambda v: _is_whole(v, 0, _MOST_CLASSES), "an index"),
    "network": (_is_text, "a checksum"),
    "weights": (_is_text, "a checksum"),
    "image": (_is_text, "a checksum"),
    "source": (lambda v: v is None or (_is_text(v) and "\0" not in v), "null or a path"),
    "level": (lambda v: _is_whole(v, 0, 64), "a level of the pyramid"),
    "pixel_size": (_is_pixel_size, "null or [height, width] in micrometres"),
    "bands": (lambda v: v is None or _are_whole(v, 0, _MOST_CLASSES), "null or a list of bands"),
    "crs": (lambda v: v is None or _is_text(v), "null or a coordinate reference system"),
    "transform": (lambda v: v is None or is_transform(v), "null or six finite numbers"),
    "cell_transform": (lambda v: v is None or is_transform(v), "null or six finite numbers"),
    "geo_keys": (lambda v: v is None or are_keys(v), "null or the keys of a GeoTIFF"),
    "nodata": (_is_nodata, "null, 'mask' or a number as text"),
    "where": (lambda v: v is None or _is_text(v), "null or a checksum"),
    "num_classes": (lambda v: _is_whole(v, 1, _MOST_CLASSES), "a number of classes"),
    "strip_bytes": (lambda v: _is_whole(v, 1, _LARGEST_STRIP), "a number of bytes"),
    "blocks": (
        lambda v: (
            isinstance(v, list)
            and bool(v)
            and all(_are_whole(block, 0, _LARGEST_SIDE, 2) for block in v)
        ),
        "a list of [first, end] of columns of cells",
    ),
}
"""The fields of a description: whether a value is one, and what is expected."""
