"""Images of every kind, opened to be read strip by strip or whole.

tifffile and zarr are imported where they are used; the extra ``fcvgg[stream]`` brings them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fcvgg.errors import (
    ArgumentError,
    FcvggError,
    FcvggWarning,
    ImageError,
    MissingExtraError,
    check_choice,
    one_line,
)
from fcvgg.geometry import Pair
from fcvgg.images.lazy.chunks import ZarrSource
from fcvgg.images.lazy.georeference import Georeference
from fcvgg.images.lazy.magnification import at_training_scale, checked_mpp, fitting_level
from fcvgg.images.lazy.slide import SlideSource, is_slide
from fcvgg.images.lazy.source import (
    SAMPLES,
    ArraySource,
    Bands,
    File,
    PillowSource,
    StripSource,
    is_folder,
    level_of,
    numpy_dtype,
    opened,
    usable_pixel_size,
)
from fcvgg.images.lazy.tiff import TiffSource
from fcvgg.images.pictures import in_bytes
from fcvgg.support.atomic import VENDOR_ENDINGS
from fcvgg.support.extras import imported

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFFs and BigTIFFs of both byte orders begin."""

_ZARR = ("zarr.json", ".zarray", ".zgroup", ".zmetadata", ".zattrs")
"""Files of which a folder of zarr has one, by version 3 or 2."""

_PLAIN_TAGS = (258, 262, 277, 284)
"""Bits per sample, photometric interpretation, samples per pixel, planar configuration."""

_PLAIN_TIFF = ([[8], [1], [1], [1]], [[8, 8, 8], [2], [3], [1]])
"""Their values in the TIFFs, grey or RGB, that Pillow reads as every other reader does."""


_MICROMETRES = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "meter": 1e6}
"""Units of OME-Zarr."""


class RasterSource(StripSource):
    """An open rasterio dataset, or one of its overviews.

    Pixels without data have the value that the file gives them.
    """

    def __init__(self, dataset: Any, level: int = 0, bands: Bands = None):
        super().__init__(bands)
        self.name = str(getattr(dataset, "name", "the dataset"))
        whole = (dataset.height, dataset.width)
        factors = dataset.overviews(1) if hasattr(dataset, "overviews") else []
        self.level_sizes = [whole, *((-(-whole[0] // n), -(-whole[1] // n)) for n in factors)]
        dataset = _overview(dataset, level, self.name)
        self._dataset = dataset
        self.level = level
        self.size = (dataset.height, dataset.width)
        self.channels = dataset.count
        meanings = [meaning.name for meaning in getattr(dataset, "colorinterp", ())]
        self.georeference = Georeference.of_dataset(dataset)
        transform = getattr(dataset, "transform", None)
        identity = getattr(transform, "is_identity", True)  # GDAL's word for no transform
        self._georeferenced = bool(getattr(dataset, "crs", None)) or not identity
        self.alpha = self.channels in (2, 4) and meanings[-1:] in ([], ["alpha"])
        self.nodata = getattr(dataset, "nodata", None)
        tags: Callable[..., Any] = getattr(dataset, "tags", lambda *_, **__: {})
        self._white_is_zero = tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        self.dtype = np.dtype(np.result_type(*dataset.dtypes))
        bits = str(tags(1, ns="IMAGE_STRUCTURE").get("NBITS"))
        self._bits = int(bits) if bits.isdigit() and 0 < int(bits) < 8 else None
        if self.dtype == np.uint16 and bits.isdigit() and 8 < int(bits) < 16:
            self.white = float((1 << int(bits)) - 1)
        self._colours: NDArray[np.uint8] | None = None
        if meanings[:1] == ["palette"] and not self._white_is_zero:
            colours = dataset.colormap(1)
            self._colours = np.array([colours[i][:3] for i in range(len(colours))], np.uint8)
            self.channels, self.dtype = 3, np.dtype(np.uint8)
        self.block_rows = min(max(shape[0] for shape in dataset.block_shapes), self.size[0])
        self._check()

    def transparent(self) -> bool:
        """Whether the last of two or four channels is taken for transparency."""
        return self.alpha and not self._georeferenced and self._looks_like_alpha()

    def _read(self, rows: Pair, cols: Pair) -> NDArray[Any]:
        return np.moveaxis(np.asarray(self._dataset.read(window=(rows, cols))), 0, -1)

    def _has_mask(self) -> bool:
        flags = getattr(self._dataset, "mask_flag_enums", ())
        return any(flag.name in ("per_dataset", "alpha") for band in flags for flag in band)

    def _masked(self, stored: NDArray[Any], rows: Pair, cols: Pair) -> NDArray[np.bool_]:
        return np.asarray(self._dataset.dataset_mask(window=(rows, cols))) == 0

    def _coloured(self, stored: NDArray[Any]) -> NDArray[Any]:
        if self._colours is not None:
            return self._colours[stored[..., 0]]
        grey = stored if self._bits is None else in_bytes(stored, self._bits)
        if not self._white_is_zero:
            return grey
        return grey.dtype.type(self.white or np.iinfo(grey.dtype).max) - grey


def _overview(dataset: Any, level: int, name: str) -> Any:
    """The dataset itself for level 0, else the overview, opened by the same name."""
    levels = [dataset, *(dataset.overviews(1) if hasattr(dataset, "overviews") else [])]
    level_of(levels, level, name)
    if level == 0:
        return dataset
    rasterio = imported("rasterio", "geo")
    try:
        return rasterio.open(name, overview_level=level - 1)
    except Exception as error:
        raise ImageError(
            f"level {level} of {name} cannot be opened: {one_line(error)}; pass the dataset that "
            f"rasterio.open(path, overview_level={level - 1}) gives"
        ) from error


def open_image(
    path: Any,
    level: int = 0,
    *,
    mpp: float | None = None,
    bands: Sequence[int] | None = None,
    missing: Literal["fill", "error"] = "fill",
    nodata: float | str | None = None,
) -> StripSource:
    """An image, read by strips or whole: for `fcvgg.stream`, and wherever else an image is taken.

    Args:
        path: TIFF, GeoTIFF, BigTIFF, OME-TIFF, a zarr array or OME-Zarr image, or what Pillow
            reads; of these Pillow's formats are decoded whole, and count towards the memory; of an
            animation the first frame is taken, and a TIFF of several equal pages is refused unless
            they are channels. Also a file in memory (`io.BytesIO`), and an open rasterio dataset,
            which brings the formats of GDAL, or slide of OpenSlide, TiffSlide or cuCIM (anything
            with ``level_dimensions`` and ``read_region``), which bring those of scanners.
        level: of a pyramid; 0 is the full resolution. Overviews in a file next to a TIFF (``.ovr``)
            count after its own.
        mpp: micrometres of a pixel, by which the level is chosen instead: the nearest one, which
            may differ by 20%. The size is what OME-XML, Aperio's description, TIFF's resolution,
            OME-Zarr's scale or the properties of an open slide state, and of georeferenced files
            whose coordinates are metres what the transform does.
        bands: the channels to take, counted from 0 and in the network's order, such as ``(3, 2,
            1)`` of a satellite scene; None takes all.
        missing: how to read tiles or chunks that the file does not store. ``"fill"`` gives them the
            fill value (of a TIFF its nodata value, else zero), as both formats mean it: writers
            leave out background. An incomplete copy looks the same; ``"error"`` refuses both.
        nodata: pixels of this value enter the network as NaN: a number, or ``"file"`` for the
            value that the file declares (`StripSource.nodata`), or else where its alpha band is 0,
            and of an open dataset its mask. Of unsigned integers all bands must hold the value, of
            others one. None takes every value as it is, also one that the file declares.

    Raises:
        ArgumentError: if `mpp` is not a size, or a level is given as well.
        ImageError: if it is not an image, is broken, or has no such level, band or nodata value;
            or if it states no pixel size for `mpp`, or no level has it, which are listed.
        MissingExtraError: if reading it needs the packages of ``fcvgg[stream]``.
    """
    check_choice("missing", missing, ("fill", "error"))
    mpp = checked_mpp(mpp, level)
    options: dict[str, Any] = {"bands": bands, "missing": missing, "nodata": nodata}
    try:
        source = _opened_source(path, level, bands, missing)
        source.treat_as_missing(nodata)
    except (FcvggError, FcvggWarning):
        raise
    except Exception as error:  # the description of a file can be wrong in any way
        raise ImageError(
            f"{path} cannot be read: {type(error).__name__}: {one_line(error)}"
        ) from error
    source.level = level
    source.at_level = partial(open_image, path, **options)
    if mpp is not None:
        chosen = fitting_level(source, mpp)
        if chosen != level:
            return open_image(path, chosen, **options)
    if isinstance(source, (RasterSource, SlideSource)):
        source.path = _path_of(source)
        if isinstance(source, SlideSource) and source.file is not None:
            source.reopened = partial(_reopened_slide, type(path), source.file, level, options)
    elif source.path is not None:
        source.reopened = partial(open_image, source.path, level, **options)
    return source


def _reopened_slide(
    kind: Callable[[str], Any], file: str, level: int, options: dict[str, Any]
) -> StripSource:
    """The slide of a file once more, in another process."""
    return open_image(kind(file), level, **options)


def _path_of(source: RasterSource | SlideSource) -> Path | None:
    """The file of what is open, if its path gives an image of the same size.

    Formats that only GDAL or scanners know, warped datasets and overviews opened as such have none.
    """
    name = source.file if isinstance(source, SlideSource) else source.name
    if name is None:
        return None
    try:
        same = open_image(name, source.level, bands=source.bands)
    except FcvggError:
        return None
    alike = (same.size, same.channels, same.dtype) == (source.size, source.channels, source.dtype)
    return same.path if alike else None


def _opened_source(path: Any, level: int, bands: Bands, missing: str) -> StripSource:
    path = as_file(path)
    if is_file(path):
        path.seek(0)
        return _file_source(path, "the image", path.read(4), level, bands, missing)
    if not isinstance(path, (str, os.PathLike)):
        if not _is_dataset(path) and not is_slide(path):
            raise ImageError(
                "the image must be a path, a file or its bytes, or an open rasterio dataset or "
                f"slide, got {type(path).__name__}"
            )
        if missing == "error":
            raise ArgumentError(
                "missing must be 'fill' for an open dataset, got 'error'; pass its path instead"
            )
        return (SlideSource if is_slide(path) else RasterSource)(path, level, bands)
    path = Path(path)
    if is_folder(path):
        source = _zarr_source(path, level, bands, missing)
        source.path = path
        return source
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _file_source(path, str(path), magic, level, bands, missing)
    except MissingExtraError:
        raise
    except ImageError as error:
        if path.suffix.lower() not in VENDOR_ENDINGS:
            raise
        raise ImageError(
            f"{one_line(error)}; or in Python pass openslide.OpenSlide(path) or "
            "tiffslide.TiffSlide(path), which read scanners' formats, in place of the path"
        ) from error


def as_file(source: Any) -> Any:
    """Encoded bytes and open files as a file that can be read from its start; others as they are.

    Raises:
        ImageError: if it is closed, or open for text.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if not is_file(source) or isinstance(source, io.BytesIO):
        return source
    name = getattr(source, "name", None) or "the image"
    try:
        seekable = source.seekable() if hasattr(source, "seekable") else hasattr(source, "seek")
        if seekable:
            source.seek(0)
        start = source.read(0 if seekable else -1)
    except Exception as error:  # files of other libraries raise errors of their own
        raise ImageError(
            f"the file {name} must be open for reading, got: {one_line(error)}"
        ) from error
    if not isinstance(start, (bytes, bytearray)):
        raise ImageError(f"the file {name} must be open for bytes, got text; open it with 'rb'")
    return source if seekable else io.BytesIO(start)


def is_file(source: Any) -> bool:
    """Whether it is a file in memory, or one that is open."""
    return (
        hasattr(source, "read")
        and not isinstance(source, StripSource)
        and (
            isinstance(source, io.IOBase) or hasattr(source, "seek") or hasattr(source, "readinto")
        )
    )


def _is_dataset(source: Any) -> bool:
    return hasattr(source, "block_shapes") and hasattr(source, "read")


def _file_source(
    file: File, name: str, magic: bytes, level: int, bands: Bands, missing: str
) -> StripSource:
    if magic in _TIFF:
        return _tiff_source(file, name, level, bands, missing)
    if level:
        raise ImageError(
            f"level must be 0 for {name}, got {level}; only TIFF and zarr hold pyramids"
        )
    return PillowSource(file, bands)


def _tiff_source(file: File, name: str, level: int, bands: Bands, missing: str) -> StripSource:
    try:
        if not isinstance(file, Path) or not Path(f"{file}.ovr").is_file():
            return TiffSource(file, level, bands, missing)
        whole = TiffSource(file, 0, bands, missing)
        own, further = whole.level_sizes, TiffSource(Path(f"{file}.ovr")).level_sizes
        source = whole if level == 0 else None
        if source is None and level < len(own):
            source = TiffSource(file, level, bands, missing)
        if source is None:
            source = _overview_file(whole, level - len(own), missing)
        source.level_sizes = [*own, *further]
        return source
    except MissingExtraError as error:
        if level == 0 and missing == "fill" and _is_plain_tiff(file, name):
            return PillowSource(file, bands)
        if "tifffile" not in str(error):
            raise
        raise MissingExtraError(
            f"{name} is a TIFF of a kind that needs the package 'tifffile' to be read rightly; "
            "install it with: pip install 'fcvgg[stream]'"
        ) from error


def _overview_file(whole: TiffSource, level: int, missing: str) -> TiffSource:
    """A level in the ``.ovr`` next to a TIFF, which alone says where it lies and what is nodata."""
    source = TiffSource(Path(f"{whole.path}.ovr"), level, whole.bands, missing)
    source.path = whole.path
    source.nodata, source.georeferenced = whole.nodata, whole.georeferenced
    if whole.georeference is not None:
        source.georeference = whole.georeference.scaled(whole.size, source.size)
    if whole.pixel_size is not None:
        sizes = zip(whole.pixel_size, whole.size, source.size)
        source.pixel_size = usable_pixel_size([pixel * n / m for pixel, n, m in sizes])
    return source


def _is_plain_tiff(file: File, name: str) -> bool:
    """Whether Pillow reads the same pixels of a TIFF as every other reader."""
    with opened(file, name) as image:
        tags = getattr(image, "tag_v2", {})
        values = [np.ravel(tags.get(code, 1)).tolist() for code in _PLAIN_TAGS]
        counts = tags.get(325, tags.get(279, 1))  # bytes of tiles or strips; 0 is not stored
        one_page = getattr(image, "n_frames", 1) == 1
        return values in _PLAIN_TIFF and one_page and bool(np.all(counts))


def strip_source(
    source: Any,
    channels: int | None = None,
    nodata: float | str | None = None,
    mpp: float | None = None,
    trained: float | None = None,
) -> StripSource:
    """What `fcvgg.stream` and `score_map` accept, as a `StripSource`.

    Args:
        source: an image of any kind.
        channels: of the network, by which pixels of floats ``(H, W, C)`` are distinguished from
            preprocessed floats ``(C, H, W)``.
        nodata, mpp: as for `open_image`.
        trained: micrometres of the pixels that a network was trained on; of a pyramid whose level
            was left open the one that has them is taken, and other images are warned of.

    Raises:
        ImageError: if it cannot be used as an image.
        ArgumentError: if `nodata` or `mpp` is given for what is open already, or preprocessed.
    """
    if isinstance(source, StripSource):
        if nodata is not None:
            raise ArgumentError(
                f"nodata must be None for an image that is open already, got {nodata!r}; pass it "
                "where the image is opened: fcvgg.open_image(path, nodata=...)"
            )
        if mpp is not None:
            raise ArgumentError(
                f"mpp must be None for an image that is open already, got {mpp!r}; pass it where "
                "the image is opened: fcvgg.open_image(path, mpp=...)"
            )
        return at_training_scale(source, trained, may_choose=False)
    source = as_file(source)
    is_open = is_file(source) or _is_dataset(source) or is_slide(source)
    if isinstance(source, (str, os.PathLike)) or is_open:
        source = open_image(source, nodata=nodata, mpp=mpp)
        return at_training_scale(source, trained, may_choose=mpp is None)
    if checked_mpp(mpp) is not None:
        raise ArgumentError(
            f"mpp must be None for pixels in memory, which state no size, got {mpp!r}; pass a path"
        )
    if isinstance(source, Image.Image):
        image: StripSource = PillowSource(source)
    elif hasattr(source, "shape") and hasattr(source, "dtype") and hasattr(source, "__getitem__"):
        image = _array_source(source, channels)
    else:
        raise ImageError(
            "the image must be a path, a PIL image, a uint8 array (H, W, C) or a preprocessed "
            f"tensor (C, H, W), a file or its bytes, got {type(source).__name__}"
        )
    if image.preprocessed and nodata is not None:
        raise ArgumentError(
            f"nodata must be None for preprocessed floats, got {nodata!r}; put NaN where they have "
            "no data"
        )
    image.treat_as_missing(nodata)
    return image


def _array_source(array: Any, channels: int | None) -> StripSource:
    shape = tuple(array.shape)
    name = f"the {'tensor' if isinstance(array, Tensor) else 'array'} {shape}"
    if np.issubdtype(numpy_dtype(array), np.floating) and not _holds_float_pixels(array, channels):
        axes = {3: "SYX", 4: "NSYX"}.get(len(shape))
        if axes is None or (axes == "NSYX" and shape[0] != 1):
            raise ImageError(f"preprocessed floats must be (C, H, W) or (1, C, H, W), got {name}")
        return ArraySource(array, axes, name, preprocessed=True)
    if len(shape) == 2:
        axes = "YX"
    elif len(shape) == 3 or (len(shape) == 4 and shape[0] == 1):
        batch = "N" if len(shape) == 4 else ""
        first = _channels_first(shape[-3:], channels, isinstance(array, Tensor))
        axes = batch + ("SYX" if first else "YXS")
    else:
        raise ImageError(
            f"pixels must be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, got {name}"
        )
    return ArraySource(array, axes, name)


def _holds_float_pixels(array: Any, channels: int | None) -> bool:
    """Whether floats are pixels, ``(H, W, C)`` or ``(H, W)``, rather than preprocessed."""
    shape = array.shape
    if isinstance(array, Tensor) or len(shape) == 2:
        return not isinstance(array, Tensor)
    own = SAMPLES if channels is None else (channels,)
    return len(shape) == 3 and shape[2] in (*SAMPLES, channels) and shape[0] not in own


def _channels_first(shape: Sequence[int], channels: int | None, tensor: bool) -> bool:
    """Whether pixels are ``(C, H, W)``: torchvision's tensors, others where nothing else fits."""
    counts = (*SAMPLES, channels, 2) if tensor else (*SAMPLES, channels)
    return shape[0] in counts and (tensor or shape[2] not in (*counts, 2))


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a zarr array or group rather than a folder of files."""
    return any((folder / name).is_file() for name in _ZARR)


def _zarr_source(path: Path, level: int, bands: Bands, missing: str) -> StripSource:
    if not is_zarr(path):
        raise ImageError(
            f"{path} must be an image file or a zarr image, got a folder; pass one of {path}/*"
        )
    zarr = imported("zarr", "stream")
    try:
        node = zarr.open(str(path), mode="r")
    except Exception as error:
        raise ImageError(f"{path} cannot be read as a zarr image: {one_line(error)}") from error
    axes: Sequence[str] | None = None
    pixel_size, sizes = None, []
    if "fcvgg" in node.attrs:
        raise ImageError(f"{path} must be an image, got a score map that fcvgg.stream wrote")
    if isinstance(node, zarr.Group):
        node = _ome_image(node, path)
        image = _ome_attributes(node)["multiscales"]
        try:
            dataset = level_of(image[0]["datasets"], level, str(path))
            group, node = node, node[dataset["path"]]
            levels = [group.get(one["path"]) for one in image[0]["datasets"]]
            pixel_size = _pixel_size(dataset, image[0].get("axes", []))
            axes = [a["name"] if isinstance(a, dict) else a for a in image[0].get("axes", [])]
            letters = _axes_of(node.shape, axes, path)
            y, x = letters.index("Y"), letters.index("X")
            if all(one is not None for one in levels):
                sizes = [(one.shape[y], one.shape[x]) for one in levels]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ImageError(
                f"{path} must hold the OME-Zarr image that it describes, got another content "
                f"({one_line(error)})"
            ) from error
    elif level:
        raise ImageError(f"level must be 0 for {path}, which is one zarr array, got {level}")
    else:
        letters = _axes_of(node.shape, None, path)
    if missing == "error" and node.nchunks_initialized < node.nchunks:
        raise ImageError(
            f"{path} must store all of its {node.nchunks} chunks, got {node.nchunks_initialized}; "
            "missing='fill' gives the others the fill value"
        )
    source = ZarrSource(node, letters, path, bands)
    source.alpha = source.alpha and axes is None  # OME's channels are not colours
    source.pixel_size, source.level_sizes = pixel_size, sizes
    return source


def _ome_attributes(node: Any) -> Any:
    """What OME-Zarr says of a group, by version 0.5 or an older one."""
    inner = node.attrs.get("ome")
    return inner if isinstance(inner, dict) else dict(node.attrs)


def _ome_image(node: Any, path: Path) -> Any:
    """The group that is an image: itself, or the only one that bioformats2raw wrote into it."""
    attributes = _ome_attributes(node)
    if attributes.get("multiscales"):
        return node
    groups = dict(node.groups())
    images = sorted(
        (name for name, group in groups.items() if _ome_attributes(group).get("multiscales")),
        key=lambda name: (len(name), name),
    )
    if len(images) == 1:
        return groups[images[0]]
    if images:
        raise ImageError(
            f"{path} must be one image, got the images {', '.join(images)}; pass one of them, such "
            f"as {path / images[0]}"
        )
    if attributes.get("plate"):
        raise ImageError(
            f"{path} must be one image, got a plate; pass one field of a well, such as "
            f"{path / 'A/1/0'}"
        )
    arrays = ", ".join(sorted(node.array_keys()))
    held = f"; pass one of its arrays: {arrays}" if arrays else " without arrays"
    raise ImageError(f"{path} must be an OME-Zarr image, got another zarr group{held}")


def _pixel_size(dataset: Any, axes: Sequence[Any]) -> tuple[float, float] | None:
    """Micrometres of a pixel of one level of an OME-Zarr image."""
    for transformation in dataset.get("coordinateTransformations", ()):
        scale = transformation.get("scale")
        if transformation.get("type") == "scale" and isinstance(scale, list):
            sizes = {
                axis["name"]: float(factor) * _MICROMETRES[axis["unit"]]
                for axis, factor in zip(axes, scale)
                if isinstance(axis, dict) and axis.get("unit") in _MICROMETRES
            }
            known = {"y", "x"} <= sizes.keys()
            return usable_pixel_size((sizes["y"], sizes["x"])) if known else None
    return None


def _axes_of(shape: Sequence[int], names: Sequence[str] | None, path: Path) -> str:
    """One letter per dimension, of which those that are not Y, X or S have length 1."""
    if names:
        letters = "".join({"c": "S", "s": "S"}.get(n.lower(), n.upper()[:1]) for n in names)
    elif len(shape) == 2:
        letters = "YX"
    elif len(shape) == 3:
        letters = "YXS" if shape[2] in SAMPLES else "SYX"
    else:
        letters = "?" * len(shape)
    others = [n for letter, n in zip(letters, shape) if letter not in "YXS"]
    counts = [letters.count(letter) for letter in "YXS"]
    plane = counts[:2] == [1, 1] and counts[2] <= 1
    if len(letters) != len(shape) or any(n > 1 for n in others) or not plane:
        raise ImageError(
            f"{path} must be (H, W, C) or (C, H, W), got the shape {tuple(shape)}; pass one plane"
        )
    return letters
