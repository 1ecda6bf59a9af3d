"""Images of every kind, opened to be read strip by strip.

tifffile and zarr are imported where they are used; the extra ``fcvgg[stream]`` brings them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fcvgg.errors import ArgumentError, FcvggError, ImageError, one_line
from fcvgg.geometry import Pair
from fcvgg.sources.extras import imported
from fcvgg.streaming.strip_sources import (
    _SAMPLES,
    ArraySource,
    Bands,
    PillowSource,
    StripSource,
    _level,
    _numpy_dtype,
)
from fcvgg.streaming.tiff_source import TiffSource


class RasterSource(StripSource):
    """An open rasterio dataset. Pixels without data have the value that the file gives them."""

    def __init__(self, dataset: Any, bands: Bands = None):
        super().__init__(bands)
        self._dataset = dataset
        self.name = str(getattr(dataset, "name", "the dataset"))
        self.size = (dataset.height, dataset.width)
        self.channels = dataset.count
        meanings = [meaning.name for meaning in getattr(dataset, "colorinterp", ())]
        self.alpha = meanings[3:4] in ([], ["alpha"])
        self._colours: NDArray[np.uint8] | None = None
        if meanings[:1] == ["palette"]:
            colours = dataset.colormap(1)
            self._colours = np.array([colours[i][:3] for i in range(len(colours))], np.uint8)
            self.channels = 3
        self.itemsize = np.dtype(dataset.dtypes[0]).itemsize
        self.block_rows = min(max(shape[0] for shape in dataset.block_shapes), self.size[0])
        self._check(np.dtype(dataset.dtypes[0]))

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        pixels = np.moveaxis(np.asarray(self._dataset.read(window=(rows, cols))), 0, -1)
        return pixels if self._colours is None else self._colours[pixels[..., 0]]


def open_image(
    path: Any, level: int = 0, *, bands: Sequence[int] | None = None, missing: str = "fill"
) -> StripSource:
    """An image file for `fcvgg.stream`, which takes paths too and then reads level 0.

    Args:
        path: TIFF, GeoTIFF, BigTIFF, OME-TIFF, a zarr array or OME-Zarr image, or what Pillow
            reads; of these Pillow's formats are decoded whole, and count towards the memory. Also
            an open rasterio dataset, which brings the formats of GDAL.
        level: of a pyramid; 0 is the full resolution.
        bands: the channels to take, counted from 0 and in the network's order, such as ``(3, 2,
            1)`` of a satellite scene; None takes all.
        missing: what tiles or chunks are that the file does not store. Both TIFF and zarr mean the
            fill value, zero as a rule, and writers leave out background so: ``"fill"``. An
            incomplete copy looks the same; ``"error"`` refuses both.

    Raises:
        ImageError: if it is no image, is broken, or has no such level or band.
        MissingExtraError: if reading it needs the packages of ``fcvgg[stream]``.
    """
    if missing not in ("fill", "error"):
        raise ArgumentError(f"missing={missing!r} is unknown; expected 'fill' or 'error'")
    if not isinstance(path, (str, os.PathLike)):
        return RasterSource(path, bands)
    path = Path(path)
    try:
        found = path.exists()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    if not found:
        raise ImageError(f"there is no image file {path}")
    opened = _zarr_source if path.is_dir() else _file_source
    try:
        source = opened(path, level, bands, missing)
    except FcvggError:
        raise
    except Exception as error:  # the description of a file can be wrong in any way
        raise ImageError(
            f"{path} cannot be read: {type(error).__name__}: {one_line(error)}"
        ) from error
    source.path, source.level = path, level
    source.reopened = partial(open_image, path, level, bands=bands, missing=missing)
    return source


def _file_source(path: Path, level: int, bands: Bands, missing: str) -> StripSource:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    if not magic:
        raise ImageError(f"{path} is empty")
    if magic[:2] in (b"II", b"MM"):
        return TiffSource(path, level, bands, missing)
    if level:
        raise ImageError(f"{path} has no level {level}: only TIFF and zarr hold pyramids")
    if bands is not None:
        raise ImageError(f"bands={tuple(bands)} of {path}: only TIFF and zarr have bands to choose")
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


def _zarr_source(path: Path, level: int, bands: Bands, missing: str) -> StripSource:
    zarr = imported("zarr", "stream")
    try:
        node = zarr.open(str(path), mode="r")
    except Exception as error:
        raise ImageError(f"{path} is a folder and no zarr image: {one_line(error)}") from error
    axes: Sequence[str] | None = None
    pixel_size = None
    if isinstance(node, zarr.Group):
        image = (node.attrs.get("ome") or node.attrs).get("multiscales")
        if not image:
            raise ImageError(
                f"{path} is a zarr group and no OME-Zarr image; pass one of its arrays: "
                f"{', '.join(sorted(node.array_keys())) or 'it has none'}"
            )
        try:
            dataset = _level(image[0]["datasets"], level, str(path))
            node = node[dataset["path"]]
            pixel_size = _pixel_size(dataset, image[0].get("axes", []))
            axes = [a["name"] if isinstance(a, dict) else a for a in image[0].get("axes", [])]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ImageError(
                f"{path} is no whole OME-Zarr image: its description does not fit what it holds "
                f"({one_line(error)})"
            ) from error
    elif level:
        raise ImageError(f"{path} has no level {level}: it is one zarr array")
    if "fcvgg" in node.attrs:
        raise ImageError(f"{path} is a score map that fcvgg.stream wrote, and no image")
    if missing == "error" and node.nchunks_initialized < node.nchunks:
        raise ImageError(
            f"{path} lacks {node.nchunks - node.nchunks_initialized} of its {node.nchunks} chunks; "
            "missing='fill' takes them for the fill value"
        )
    source = ArraySource(node, _axes_of(node.shape, axes, path), str(path), bands=bands)
    source.pixel_size = pixel_size
    return source


def _pixel_size(dataset: Any, axes: Sequence[Any]) -> tuple[float, float] | None:
    """Micrometres of a pixel of one level of an OME-Zarr image."""
    for transformation in dataset.get("coordinateTransformations", ()):
        scale = transformation.get("scale")
        if transformation.get("type") == "scale" and isinstance(scale, list):
            sizes = {
                axis["name"]: float(factor)
                for axis, factor in zip(axes, scale)
                if isinstance(axis, dict) and axis.get("unit") == "micrometer"
            }
            return (sizes["y"], sizes["x"]) if {"y", "x"} <= sizes.keys() else None
    return None


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
