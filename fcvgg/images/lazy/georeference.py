"""Where an image lies on the earth: as GeoTIFF and rasterio state it, and as a store keeps it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import hypot
from typing import Any

import numpy as np
from PIL import Image

from fcvgg.geometry import Geometry
from fcvgg.support.extras import imported

Transform = tuple[float, float, float, float, float, float]
"""``(a, b, c, d, e, f)``: column x and row y lie at ``(a*x + b*y + c, d*x + e*y + f)``.

Columns and rows are counted from the outer corner of the first pixel, whose middle is (0.5, 0.5).
"""

PIXEL_SCALE, TIE_POINTS, MATRIX = 33550, 33922, 34264
KEYS, KEY_DOUBLES, KEY_TEXT = 34735, 34736, 34737
"""GeoTIFF's tags."""

_MODEL, _RASTER, _GEOGRAPHIC, _PROJECTED, _VERTICAL = 1024, 1025, 2048, 3072, 4096
"""GeoTIFF's keys: the kind of system, what pixels are, and the systems' EPSG codes."""

_AREA, _POINT = 1, 2
"""What pixels are: with the second, coordinates are those of their middles."""

_EPSG = range(1024, 32767)
"""Values of those keys that are EPSG codes."""

_SHORT, _DOUBLE, _ASCII = 3, 12, 2
"""TIFF's types of values."""

_MOST_NUMBERS, _MOST_CHARACTERS = 4096, 1 << 16
_LARGEST = 1e300

_ANY: Transform = (2.0, 0.0, 0.0, 0.0, -2.0, 0.0)
"""For files that are written for their keys; GDAL warns of a transform that is the identity."""

_IDENTITY: Transform = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

FIELDS = ("crs", "transform", "cell_transform", "geo_keys")
"""The fields of a store's description that state the place, as `described` gives them."""


@dataclass(frozen=True)
class GeoKeys:
    """A coordinate reference system as GeoTIFF's keys describe it; pixels are areas."""

    directory: tuple[int, ...]
    doubles: tuple[float, ...] = ()
    text: str = ""

    @property
    def entries(self) -> dict[int, tuple[int, int, int]]:
        """By key: the tag that holds its value, or 0, how many values, and where or the value."""
        groups = (self.directory[i : i + 4] for i in range(4, len(self.directory), 4))
        return {key: (tag, count, value) for key, tag, count, value in groups}

    @property
    def epsg(self) -> int | None:
        """The code of the system, if it is one of EPSG's and nothing but that."""
        stated = {key: value for key, (tag, _, value) in self.entries.items() if tag == 0}
        code = stated.get({1: _PROJECTED, 2: _GEOGRAPHIC}.get(stated.get(_MODEL, 0), 0))
        return code if code in _EPSG and _VERTICAL not in self.entries else None

    @property
    def of_points(self) -> bool:
        return self.entries.get(_RASTER, (0, 1, _AREA))[::2] == (0, _POINT)

    def of_areas(self) -> GeoKeys:
        """The same with coordinates that are those of pixels' corners."""
        directory = list(self.directory)
        for i in range(4, len(directory), 4):
            if directory[i] == _RASTER:
                directory[i + 1 : i + 4] = 0, 1, _AREA
        return GeoKeys(tuple(directory), self.doubles, self.text)


@dataclass(frozen=True)
class Georeference:
    """Where an image lies on the earth.

    Attributes:
        transform: from pixels to coordinates; None where the file states none.
        crs: the coordinate reference system, as ``"EPSG:n"`` or WKT; None where unknown.
        keys: that system as GeoTIFF states it; None where unknown.
    """

    transform: Transform | None
    crs: str | None
    keys: GeoKeys | None

    @classmethod
    def of_tags(cls, tags: Mapping[int, Any]) -> Georeference | None:
        """The place that a GeoTIFF's tags state; broken tags are ignored.

        So are ground control points: their system is that of the points, not of the pixels.
        """
        keys = _keys_of(tags)
        transform = _transform_of(tags)
        if transform is None and _numbers(tags, TIE_POINTS):
            return None
        if keys is not None and keys.of_points and transform is not None:
            transform = composed(transform, (1, 0, -0.5, 0, 1, -0.5))
        if keys is not None:
            keys = keys.of_areas()
        return _stated(transform, None if keys is None else _system_of(keys), keys)

    @classmethod
    def of_dataset(cls, dataset: Any) -> Georeference | None:
        """The place that an open rasterio dataset states; the identity stands for no transform."""
        crs = getattr(dataset, "crs", None)
        transform = checked_transform(list(getattr(dataset, "transform", ()))[:6])
        transform = None if transform == _IDENTITY else transform
        return _stated(transform, crs.to_string(), _written(crs)) if crs else _stated(transform)

    @classmethod
    def of_description(cls, description: Mapping[str, Any]) -> Georeference | None:
        """The place that a score map on disk states; older ones state none."""
        transform, keys = description.get("transform"), description.get("geo_keys")
        if keys is not None:
            keys = GeoKeys(tuple(keys["directory"]), tuple(keys["doubles"]), keys["text"])
        transform = None if transform is None else checked_transform(transform)
        return _stated(transform, description.get("crs"), keys)

    @property
    def pixel_size(self) -> tuple[float, float] | None:
        """Height and width of a pixel in micrometres, if coordinates are lengths of a known unit.

        Codes of EPSG say so by rasterio; without it that of UTM is known.
        """
        unit = None if self.crs is None else _metres_of_unit(self.crs)
        if unit is None or self.transform is None:
            return None
        a, b, _, d, e, _ = self.transform
        return hypot(b, e) * unit * 1e6, hypot(a, d) * unit * 1e6

    def through(self, inner: Transform) -> Georeference:
        """The same place for other pixels, which `inner` takes to these."""
        if self.transform is None:
            return self
        return Georeference(composed(self.transform, inner), self.crs, self.keys)

    def scaled(self, size: tuple[int, int], reduced: tuple[int, int]) -> Georeference:
        """For an image of another size ``(H, W)`` of the same extent."""
        return self.through(scaling(reduced, size))

    @property
    def tags(self) -> list[tuple[int, int, int, Any, bool]]:
        """GeoTIFF's tags, as tifffile takes them: code, type, count, value, of one page only."""
        found: list[tuple[int, int, Any]] = []
        if self.transform is not None:
            a, b, c, d, e, f = self.transform
            if b == d == 0 and a > 0 > e:  # north up: more readers know these than the matrix
                found.append((PIXEL_SCALE, _DOUBLE, (a, -e, 0.0)))
                found.append((TIE_POINTS, _DOUBLE, (0.0, 0.0, 0.0, c, f, 0.0)))
            else:
                matrix = (a, b, 0.0, c, d, e, 0.0, f, *(0.0,) * 7, 1.0)
                found.append((MATRIX, _DOUBLE, matrix))
        if self.keys is not None:
            found.append((KEYS, _SHORT, self.keys.directory))
            found.append((KEY_DOUBLES, _DOUBLE, self.keys.doubles))
            found.append((KEY_TEXT, _ASCII, self.keys.text))
        return [(code, kind, len(value), value, True) for code, kind, value in found if value]


def transform_of_cells(geometry: Geometry) -> Transform:
    """From a map's cells to pixels: a cell is a box of the stride around its centre."""
    (y, x), (down, across) = geometry.centre_of(0, 0), geometry.stride
    return across, 0, x + 0.5 - across / 2, 0, down, y + 0.5 - down / 2


def described(place: Georeference | None, geometry: Geometry) -> dict[str, Any]:
    """The fields of a store's description: the image's place, and that of the cells as pixels.

    ``transform`` and ``cell_transform`` are as `Transform` for the image's pixels and the map's
    cells: applied to ``(column + 0.5, row + 0.5)`` either gives the middle of a pixel or cell.
    """
    place = place or Georeference(None, None, None)
    transform, keys = place.transform, place.keys
    cells = transform_of_cells(geometry)
    listed = keys and {**asdict(keys), "directory": [*keys.directory], "doubles": [*keys.doubles]}
    return {
        "crs": place.crs,
        "transform": transform and list(transform),
        "cell_transform": transform and list(composed(transform, cells)),
        "geo_keys": listed,
    }


def is_transform(value: Any) -> bool:
    """Whether it is a list of six finite numbers."""
    return isinstance(value, list) and len(value) == 6 and _are_numbers(value)


def are_keys(value: Any) -> bool:
    """Whether it is an object of the fields of `GeoKeys`."""
    return (
        isinstance(value, dict)
        and value.keys() == {"directory", "doubles", "text"}
        and isinstance(value["directory"], list)
        and isinstance(value["doubles"], list)
        and _checked_keys(value["directory"], value["doubles"], value["text"]) is not None
    )


def scaling(size: tuple[int, int], other: tuple[int, int]) -> Transform:
    """From pixels of an image of a size ``(H, W)`` to those of another size and the same extent."""
    down, across = (m / n for n, m in zip(size, other))
    return across, 0, 0, 0, down, 0


def composed(outer: Transform, inner: Transform) -> Transform:
    """The transform that applies `inner` first."""
    first, second = (np.array([*t, 0, 0, 1], np.float64).reshape(3, 3) for t in (outer, inner))
    a, b, c, d, e, f = map(float, (first @ second)[:2].ravel())
    return a, b, c, d, e, f


def checked_transform(numbers: Any) -> Transform | None:
    """A transform of six finite numbers; None if it is not one, or puts all pixels on one line."""
    if len(numbers) != 6 or not _are_numbers(numbers):
        return None
    a, b, c, d, e, f = map(float, numbers)
    return (a, b, c, d, e, f) if a * e != b * d else None


def _stated(
    transform: Transform | None, crs: str | None = None, keys: GeoKeys | None = None
) -> Georeference | None:
    if transform is None and crs is None and keys is None:
        return None
    return Georeference(transform, crs, keys)


def _are_numbers(values: Any) -> bool:
    return all(
        isinstance(n, (int, float)) and not isinstance(n, bool) and abs(n) < _LARGEST
        for n in values
    )


# -- tags -----------------------------------------------------------------------------------------


def _numbers(tags: Mapping[int, Any], code: int) -> list[Any]:
    """A tag's numbers; empty if it is missing or holds anything else."""
    value = tags.get(code, ())
    value = list(value) if isinstance(value, (tuple, list, np.ndarray)) else [value]
    value = [n.item() if isinstance(n, np.generic) else n for n in value]
    return value if _are_numbers(value) else []


def _transform_of(tags: Mapping[int, Any]) -> Transform | None:
    """By pixel scale and tie point, else by matrix; GDAL looks for them in this order."""
    scale, ties, matrix = (_numbers(tags, code) for code in (PIXEL_SCALE, TIE_POINTS, MATRIX))
    if len(scale) >= 2 and scale[0] and scale[1]:
        if len(ties) < 6:
            return None
        column, row, _, x, y, _ = ties[:6]
        across, down = scale[0], abs(scale[1])  # rows run southwards, also for GDAL
        return checked_transform([across, 0, x - column * across, 0, -down, y + row * down])
    if len(matrix) != 16:
        return None
    return checked_transform([matrix[i] for i in (0, 1, 3, 4, 5, 7)])


def _keys_of(tags: Mapping[int, Any]) -> GeoKeys | None:
    text = tags.get(KEY_TEXT, "")
    return _checked_keys(_numbers(tags, KEYS), _numbers(tags, KEY_DOUBLES), text)


def _checked_keys(directory: list[Any], doubles: list[Any], text: Any) -> GeoKeys | None:
    """The keys, if every value that they refer to is there."""
    if len(directory) < 8 or not all(type(n) is int and 0 <= n < 1 << 16 for n in directory):
        return None
    directory = directory[: 4 + 4 * directory[3]]
    if not isinstance(text, str) or not text.isascii() or not _are_numbers(doubles):
        return None
    if max(len(directory), len(doubles)) > _MOST_NUMBERS or len(text) > _MOST_CHARACTERS:
        return None
    # a key refers to values by tag, count and place: all must lie within what is there
    keys = GeoKeys(tuple(directory), tuple(map(float, doubles)), text)
    if len(directory) != 4 + 4 * directory[3]:
        return None
    # readers of TIFF take the separator at the end of the text for padding
    held = {0: 1 << 16, KEY_DOUBLES: len(doubles), KEY_TEXT: len(text) + 1, KEYS: len(directory)}
    for tag, count, value in keys.entries.values():
        if tag not in held or (tag and value + count > held[tag]):
            return None
    return keys


# -- coordinate reference systems, as GDAL reads and writes them ----------------------------------


def _system_of(keys: GeoKeys) -> str | None:
    """``"EPSG:n"``, or what rasterio makes of the keys, if it is installed."""
    if keys.epsg is not None:
        return f"EPSG:{keys.epsg}"
    # GDAL's own reading of the keys: a file of one pixel that holds nothing else
    file = io.BytesIO()
    try:
        tags = Georeference(_ANY, None, keys).tags
        imported("tifffile", "stream").imwrite(
            file, np.zeros((1, 1), np.uint8), metadata=None, extratags=tags
        )
        memory = imported("rasterio.io", "geo").MemoryFile(file.getvalue())
        with memory, memory.open() as dataset:
            return dataset.crs.to_string() if dataset.crs else None
    except Exception:  # rasterio is missing, or GDAL cannot read them: the keys stay as they are
        return None


def _metres_of_unit(crs: str) -> float | None:
    """Metres of a projected system's unit; None for degrees, and where it is unknown."""
    if re.fullmatch(r"EPSG:32[67](0[1-9]|[1-5]\d|60)", crs):
        return 1.0
    try:
        system = imported("rasterio.crs", "geo").CRS.from_user_input(crs)
        return float(system.linear_units_factor[1]) if system.is_projected else None
    except Exception:  # rasterio is missing, or does not know it
        return None


def _written(crs: Any) -> GeoKeys | None:
    """The keys by which GDAL writes a system; None where GeoTIFF has none."""
    rasterio = imported("rasterio", "geo")
    shape = {"width": 1, "height": 1, "count": 1, "dtype": "uint8"}
    try:
        with imported("rasterio.io", "geo").MemoryFile() as memory:
            transform = rasterio.Affine(*_ANY)
            with memory.open(driver="GTiff", crs=crs, transform=transform, **shape):
                pass
            with Image.open(io.BytesIO(memory.read())) as image:
                return _keys_of(dict(getattr(image, "tag_v2", {})))
    except Exception:  # whatever GDAL raises of a system that it cannot write
        return None
