"""One file, one answer: every format gives the same pixels to everything that takes images."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import fcvgg
from fcvgg.cli import app
from fcvgg.cli.options import OwnPreprocess
from fcvgg.demo import demo_photograph
from fcvgg.evaluation.protocols import _Plan, _Run
from fcvgg.finetuning.images import ImageRows
from fcvgg.finetuning.pretrained import load_pretrained
from fcvgg.images.datasets import Labelled, LabelledFiles
from fcvgg.images.lazy.input import strip_reader, warn_of_dark_values
from fcvgg.images.lazy.opening import open_image, strip_source
from fcvgg.images.reading import prepare, read_picture
from fcvgg.segmentation.mask_folders import MaskedImages, MaskFolder
from fcvgg.streaming.score_store import open_store
from fcvgg.streaming.slide_maps import SlideMap
from fcvgg.transfer.image_features import FeatureExtractor

tifffile = pytest.importorskip("tifffile")
zarr = pytest.importorskip("zarr")
imagecodecs = pytest.importorskip("imagecodecs")
rasterio = pytest.importorskip("rasterio")

Pixels = NDArray[Any]
SIZE = 40, 52
REFLECTANCE = fcvgg.Preprocess((0.1,) * 3, (0.2,) * 3, scale=1e-4)
BYTES = fcvgg.Preprocess((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
ORIENTED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def noise(*shape: int, top: float = 255, dtype: Any = np.uint8) -> Pixels:
    values = np.random.default_rng(0).random((*SIZE, *shape)) * top
    return values.astype(dtype)


def net_for(preprocess: fcvgg.Preprocess) -> fcvgg.FullyConvolutional:
    """Window 8, stride 4, two classes, in double precision."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(preprocess.channels, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 2)).double().eval()
    return fcvgg.convert(model, preprocess=preprocess, verify=False)


def rgb(grey: Pixels) -> Pixels:
    return grey.reshape(*SIZE, 1).repeat(3, 2)


def on_white(pixels: Pixels) -> Pixels:
    alpha = pixels[..., -1:] / np.float64(255)
    return pixels[..., :-1] * alpha + 255 * (1 - alpha)


# -- formats --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How a source is made of pixels, and what a network is to be given."""

    write: Callable[[Path], Any]
    truth: Pixels
    preprocess: fcvgg.Preprocess = BYTES
    tolerance: float = 0.51  # of a value from 0 to 255, which Pillow rounds


def pillow(pixels: Pixels, ending: str, mode: str | None = None, **options: Any) -> Any:
    def write(folder: Path) -> Path:
        image = Image.fromarray(pixels)
        image = image if mode is None else image.convert(mode)
        image.save(folder / f"a.{ending}", **options)
        return folder / f"a.{ending}"

    return write


def tiff(pixels: Pixels, **options: Any) -> Any:
    def write(folder: Path) -> Path:
        with tifffile.TiffWriter(folder / "a.tif", ome=options.pop("ome", None)) as file:
            file.write(pixels, **options)
        return folder / "a.tif"

    return write


def png16(pixels: Pixels) -> Any:
    def write(folder: Path) -> Path:
        (folder / "a.png").write_bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels)))
        return folder / "a.png"

    return write


def geotiff(bands: Pixels, georeferenced: bool = False, **options: Any) -> Any:
    """A GeoTIFF of bands ``(C, H, W)``, as GDAL writes it."""

    def write(folder: Path) -> Path:
        count, height, width = bands.shape
        place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 4e5, 0, -10, 5e6)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(
                folder / "a.tif",
                "w",
                driver="GTiff",
                height=height,
                width=width,
                count=count,
                dtype=bands.dtype,
                **(place if georeferenced else {}),
                **options,
            ) as file:
                file.write(bands)
        return folder / "a.tif"

    return write


def dataset(write: Any) -> Any:
    """The same file as an open rasterio dataset."""

    def opened(folder: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            return rasterio.open(write(folder))

    return opened


def ome_zarr(bands: Pixels, version: int, nested: bool) -> Any:
    """Bands ``(C, H, W)`` as OME-Zarr, also in the folders that bioformats2raw makes."""

    def write(folder: Path) -> Path:
        path = folder / "a.zarr"
        group = zarr.open_group(str(path), mode="w", zarr_format=version)
        if nested:
            layout = {"bioformats2raw.layout": 3}
            group.attrs.update(layout if version == 2 else {"ome": layout})
            group.create_group("OME")
            group = group.create_group("0")
        group.create_array("0", data=bands[None, :, None], chunks=(1, 1, 1, 16, 20))
        axes = [{"name": name} for name in "tczyx"]
        image = {"multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
        group.attrs.update(image if version == 2 else {"ome": image})
        return path

    return write


def zarr_array(pixels: Pixels, version: int) -> Any:
    def write(folder: Path) -> Path:
        array = zarr.create_array(
            str(folder / "a.zarr"), data=pixels, chunks=(16, 20, 3), zarr_format=version
        )
        assert array.shape == pixels.shape
        return folder / "a.zarr"

    return write


def of(value: Any) -> Any:
    return lambda _: value


COLOUR, GREY = noise(3), noise()
ALPHA = noise(4)
MASKED = noise(4)
MASKED[..., 3] = np.where(MASKED[..., 3] > 128, 255, 0)
WIDE, WIDE_GREY = noise(3, top=65535, dtype=np.uint16), noise(top=65535, dtype=np.uint16)
WIDE_ALPHA = noise(4, top=65535, dtype=np.uint16)
SCENE = noise(3, top=9000, dtype=np.uint16)
SIGNED = (noise(3, top=9000, dtype=np.float64) - 2000).astype(np.int16)
FLOATS = noise(3, top=9000, dtype=np.float32)
BINARY = Image.fromarray(GREY).convert("1")
PALETTE = Image.fromarray(COLOUR).quantize(64)
CMYK = Image.fromarray(noise(4), "CMYK")
YCBCR = Image.fromarray(noise(3), "YCbCr")
LAB = Image.fromarray(noise(3), "LAB")
TWELVE = noise(3, top=4095, dtype=np.uint16)
SHADES = np.array([[1], [2], [3]], np.uint16)


def _palette_with_transparency(folder: Path) -> Path:
    PALETTE.save(folder / "a.png", transparency=3)
    return folder / "a.png"


def _transparent_palette() -> Pixels:
    pixels = np.asarray(PALETTE.convert("RGB")).copy()
    pixels[np.asarray(PALETTE) == 3] = 255
    return pixels


def _animation(folder: Path, ending: str) -> Path:
    frames = [Image.fromarray(f) for f in (GREY, 255 - GREY)]
    frames[0].save(folder / f"a.{ending}", save_all=True, append_images=frames[1:], lossless=True)
    return folder / f"a.{ending}"


def _saved(image: Image.Image, ending: str) -> Any:
    def write(folder: Path) -> Path:
        image.save(folder / f"a.{ending}")
        return folder / f"a.{ending}"

    return write


def _exif(orientation: int, folder: Path) -> Path:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(COLOUR).save(folder / "a.png", exif=exif)
    return folder / "a.png"


def _level(folder: Path) -> Any:
    with tifffile.TiffWriter(folder / "a.tif") as file:
        options = {"photometric": "rgb", "tile": (16, 16)}
        file.write(COLOUR.repeat(2, 0).repeat(2, 1), subifds=1, **options)
        file.write(COLOUR, subfiletype=1, **options)
    return open_image(folder / "a.tif", level=1)


def _overview(folder: Path, beside: bool) -> Path:
    large = COLOUR.repeat(2, 0).repeat(2, 1).transpose(2, 0, 1)
    path = geotiff(large, photometric="RGB", tiled=True, blockxsize=16, blockysize=16)(folder)
    with rasterio.Env(TIFF_USE_OVR=beside), rasterio.open(path, "r+") as file:
        file.build_overviews([2], rasterio.enums.Resampling.nearest)
    assert (folder / "a.tif.ovr").exists() is beside
    return Path(path)


def _sparse(folder: Path) -> Path:
    path = folder / "a.tif"
    options = {"tiled": True, "blockxsize": 16, "blockysize": 16, "photometric": "RGB"}
    with rasterio.open(
        path, "w", "GTiff", 52, 40, 3, dtype="uint8", nodata=255, SPARSE_OK=True, **options
    ) as file:
        file.write(COLOUR[:16, :16].transpose(2, 0, 1), window=((0, 16), (0, 16)))
    return path


def _sparse_truth() -> Pixels:
    pixels = np.full((*SIZE, 3), 255, np.uint8)
    pixels[:16, :16] = COLOUR[:16, :16]
    return pixels


def _png_of_4_bits(path: Path) -> Path:
    pairs = (GREY[:, ::2] & 0xF0) | GREY[:, 1::2] >> 4
    rows = b"".join(b"\0" + row.tobytes() for row in pairs)
    header = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 4, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return _bytes(path, b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks))


def _chunk(kind: bytes, content: bytes) -> bytes:
    length, check = len(content), zlib.crc32(kind + content)
    return struct.pack(">I", length) + kind + content + struct.pack(">I", check)


def _aperio(folder: Path) -> Path:
    """YCbCr in JPEG 2000, as Aperio's scanners compress it."""
    path = tiff(np.asarray(YCBCR), photometric="rgb", compression="jpeg2000", tile=(16, 32))(folder)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags[259].overwrite(33003)
    return Path(path)


BLOCK = 2, 4
"""Rows and columns of pixels that have one colour."""


def _blocks() -> Pixels:
    """YCbCr of which every block of pixels has one colour."""
    pixels = np.array(YCBCR)
    for row, col in np.ndindex(BLOCK):
        pixels[row :: BLOCK[0], col :: BLOCK[1], 1:] = pixels[:: BLOCK[0], :: BLOCK[1], 1:]
    return pixels


def _subsampled_truth() -> Pixels:
    return np.asarray(Image.fromarray(_blocks(), "YCbCr").convert("RGB"))


def _subsampled(path: Path, deflated: bool) -> Path:
    """A TIFF of two strips, of which the second is shorter: 24 and 16 rows."""
    (height, width), (tall, wide), data, strips = SIZE, BLOCK, b"", []
    blocks = _blocks().reshape(height // tall, tall, width // wide, wide, 3).swapaxes(1, 2)
    light = blocks[..., 0].reshape(height // tall, width // wide, -1)
    units = np.concatenate([light, blocks[:, :, 0, 0, 1:]], 2)
    for part in (units[:12], units[12:]):
        strip = zlib.compress(part.tobytes()) if deflated else part.tobytes()
        strips.append((200 + len(data), len(strip)))
        data += strip
    (first, count), (second, other) = strips
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 150), (262, 3, 1, 6)]
    tags += [(259, 3, 1, 8 if deflated else 1), (273, 4, 2, 160), (277, 3, 1, 3), (278, 4, 1, 24)]
    tags += [(279, 4, 2, 170), (530, 3, 2, wide | tall << 16)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    held = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    held = held.ljust(150) + struct.pack("<3H", 8, 8, 8)
    held = held.ljust(160) + struct.pack("<2I", first, second)
    held = held.ljust(170) + struct.pack("<2I", count, other)
    return _bytes(path, held.ljust(200) + data)


JPEG = io.BytesIO()
Image.fromarray(COLOUR).save(JPEG, "JPEG", quality=95)

FORMATS: dict[str, Format] = {
    "png grey": Format(pillow(GREY, "png"), rgb(GREY)),
    "png grey and alpha": Format(pillow(noise(2), "png"), rgb(on_white(noise(2)))),
    "png rgb": Format(pillow(COLOUR, "png"), COLOUR),
    "png rgba": Format(pillow(ALPHA, "png"), on_white(ALPHA)),
    "png of one bit": Format(_saved(BINARY, "png"), rgb(np.asarray(BINARY) * 255)),
    "png palette": Format(_saved(PALETTE, "png"), np.asarray(PALETTE.convert("RGB"))),
    "png palette with transparency": Format(_palette_with_transparency, _transparent_palette()),
    "png grey of 16 bits": Format(pillow(WIDE_GREY, "png"), rgb(WIDE_GREY / 257)),
    "png rgb of 16 bits": Format(png16(WIDE), WIDE / 257),
    "png rgb of 16 bits as it is": Format(png16(SCENE), SCENE, REFLECTANCE),
    "png rgba of 16 bits": Format(png16(WIDE_ALPHA), on_white(WIDE_ALPHA / 257)),
    "png grey and alpha of 16 bits": Format(
        png16(WIDE_ALPHA[..., :2]), rgb(on_white(WIDE_ALPHA[..., :2] / 257))
    ),
    "png grey of 4 bits with a transparent value": Format(
        lambda f: _with_transparency(_png_of_4_bits(f / "a.png"), [5]),
        rgb(np.where(GREY >> 4 == 5, 255, (GREY >> 4) * 17)),
    ),
    "png grey of 16 bits with a transparent value": Format(
        lambda f: _with_transparency(png16(WIDE_GREY)(f), [WIDE_GREY[3, 4]]),
        rgb(np.where(WIDE_GREY[3, 4] == WIDE_GREY, 255, WIDE_GREY / 257)),
    ),
    "png rgb of 16 bits with a transparent colour": Format(
        lambda f: _with_transparency(png16(WIDE)(f), WIDE[3, 4]),
        np.where((WIDE[3, 4] == WIDE).all(2, keepdims=True), 255, WIDE / 257),
    ),
    "jpeg": Format(lambda f: _bytes(f / "a.jpg", JPEG.getvalue()), np.asarray(Image.open(JPEG))),
    "webp": Format(pillow(COLOUR, "webp", lossless=True), COLOUR),
    "bmp": Format(pillow(COLOUR, "bmp"), COLOUR),
    "gif, the first of two frames": Format(lambda f: _animation(f, "gif"), rgb(GREY)),
    "webp, the first of two frames": Format(lambda f: _animation(f, "webp"), rgb(GREY)),
    "tiff grey": Format(tiff(GREY, photometric="minisblack"), rgb(GREY)),
    "tiff rgb": Format(tiff(COLOUR, photometric="rgb"), COLOUR),
    "tiff rgba": Format(pillow(ALPHA, "tif"), on_white(ALPHA)),
    "tiff rgba of tifffile": Format(
        tiff(ALPHA, photometric="rgb", extrasamples=["unassalpha"]), on_white(ALPHA)
    ),
    "tiff with multiplied alpha": Format(
        tiff(
            np.concatenate([(MASKED[..., :3] * (MASKED[..., 3:] // 255)), MASKED[..., 3:]], 2),
            photometric="rgb",
            extrasamples=["assocalpha"],
        ),
        on_white(MASKED),
    ),
    "tiff grey and alpha": Format(pillow(noise(2), "tif"), rgb(on_white(noise(2)))),
    "tiff of one bit": Format(_saved(BINARY, "tif"), rgb(np.asarray(BINARY) * 255)),
    "tiff of one bit, packed": Format(
        pillow(GREY, "tif", "1", compression="group4"), rgb(np.asarray(BINARY) * 255)
    ),
    "tiff of four bits": Format(geotiff(GREY[None] >> 4, nbits=4), rgb((GREY >> 4) * 17)),
    "dataset of four bits": Format(
        dataset(geotiff(GREY[None] >> 4, nbits=4)), rgb((GREY >> 4) * 17)
    ),
    "tiff palette": Format(_saved(PALETTE, "tif"), np.asarray(PALETTE.convert("RGB"))),
    "tiff palette of 8 bits a colour": Format(
        tiff(GREY, photometric="palette", colormap=np.arange(256, dtype=np.uint16)[None] // SHADES),
        GREY[..., None] // SHADES[:, 0],
    ),
    "tiff cmyk": Format(_saved(CMYK, "tif"), np.asarray(CMYK.convert("RGB"))),
    "tiff cmyk of 16 bits": Format(
        tiff(np.asarray(CMYK).astype(np.uint16) * 257, photometric="separated"),
        np.round((255.0 - noise(4)[..., :3]) * (255.0 - noise(4)[..., 3:]) / 255 * 257) / 257,
    ),
    "tiff lab": Format(_saved(LAB, "tif"), np.asarray(LAB.convert("RGB"))),
    "tiff ycbcr": Format(_saved(YCBCR, "tif"), np.asarray(YCBCR.convert("RGB"))),
    "tiff ycbcr of a scanner": Format(_aperio, np.asarray(YCBCR.convert("RGB"))),
    "tiff ycbcr, one colour for 8 pixels": Format(
        lambda f: _subsampled(f / "a.tif", deflated=False), _subsampled_truth()
    ),
    "tiff ycbcr, one colour for 8 pixels, deflated": Format(
        lambda f: _subsampled(f / "a.tif", deflated=True), _subsampled_truth()
    ),
    "tiff of 12 bits": Format(
        tiff(TWELVE, photometric="rgb", bitspersample=12, rowsperstrip=SIZE[0]),
        TWELVE / (4095 / 255),
    ),
    "tiff of 12 bits as it is": Format(
        tiff(TWELVE, photometric="rgb", bitspersample=12, rowsperstrip=SIZE[0]), TWELVE, REFLECTANCE
    ),
    "dataset of 12 bits": Format(
        dataset(geotiff(TWELVE.transpose(2, 0, 1), nbits=12)), TWELVE / (4095 / 255)
    ),
    "tiff of 12 bits, 0 is white": Format(
        tiff(TWELVE[..., 0], photometric="miniswhite", bitspersample=12, rowsperstrip=SIZE[0]),
        rgb((4095 - TWELVE[..., 0]) / (4095 / 255)),
    ),
    "tiff of floats with multiplied alpha": Format(
        tiff(
            np.concatenate(
                [ALPHA[..., :3] / 255 * (ALPHA[..., 3:] / 255), ALPHA[..., 3:] / 255], 2
            ).astype(np.float32),
            photometric="rgb",
            extrasamples=["assocalpha"],
        ),
        on_white(ALPHA),
        fcvgg.Preprocess((0.4,) * 3, (0.2,) * 3, value_range=(0, 1)),
    ),
    "tiff grey of 16 bits": Format(tiff(WIDE_GREY, photometric="minisblack"), rgb(WIDE_GREY / 257)),
    "tiff rgb of 16 bits": Format(tiff(WIDE, photometric="rgb"), WIDE / 257),
    "tiff, 0 is white": Format(tiff(GREY, photometric="miniswhite"), rgb(255 - GREY)),
    "tiff, 0 is white, of 16 bits": Format(
        tiff(WIDE_GREY, photometric="miniswhite"), rgb((65535 - WIDE_GREY) / 257)
    ),
    "tiff in planes": Format(
        tiff(COLOUR.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), COLOUR
    ),
    "tiff in deflated tiles": Format(
        tiff(COLOUR, photometric="rgb", tile=(16, 32), compression="zlib", predictor=True), COLOUR
    ),
    "ome-tiff, a page a channel": Format(
        tiff(
            COLOUR.transpose(2, 0, 1), ome=True, photometric="minisblack", metadata={"axes": "CYX"}
        ),
        COLOUR,
    ),
    "imagej, a page a channel": Format(
        lambda f: _imagej(f / "a.tif", COLOUR.transpose(2, 0, 1)), COLOUR
    ),
    "level of a pyramid": Format(_level, COLOUR),
    "overview": Format(lambda f: open_image(_overview(f, False), level=1), COLOUR),
    "overview beside": Format(lambda f: open_image(_overview(f, True), level=1), COLOUR),
    "overview of a dataset": Format(
        lambda f: open_image(rasterio.open(_overview(f, False)), level=1), COLOUR
    ),
    "sparse tiles": Format(_sparse, _sparse_truth()),
    "geotiff rgb of 16 bits": Format(geotiff(WIDE.transpose(2, 0, 1)), WIDE / 257),
    "geotiff of reflectances": Format(geotiff(SCENE.transpose(2, 0, 1), True), SCENE, REFLECTANCE),
    "geotiff, int16": Format(geotiff(SIGNED.transpose(2, 0, 1)), SIGNED, REFLECTANCE),
    "geotiff, float32": Format(geotiff(FLOATS.transpose(2, 0, 1)), FLOATS, REFLECTANCE),
    "geotiff, a range that is given": Format(
        geotiff(SCENE.transpose(2, 0, 1)),
        (SCENE - 100.0) * (255 / 9900),
        fcvgg.Preprocess((0.4,) * 3, (0.2,) * 3, value_range=(100, 10000)),
    ),
    "dataset rgb": Format(dataset(geotiff(COLOUR.transpose(2, 0, 1), photometric="RGB")), COLOUR),
    "dataset of reflectances": Format(
        dataset(geotiff(SCENE.transpose(2, 0, 1), True)), SCENE, REFLECTANCE
    ),
    "dataset, 0 is white": Format(
        dataset(tiff(WIDE_GREY, photometric="miniswhite")), rgb((65535 - WIDE_GREY) / 257)
    ),
    "thirteen bands": Format(
        geotiff(noise(13, top=9000, dtype=np.uint16).transpose(2, 0, 1)),
        noise(13, top=9000, dtype=np.uint16),
        fcvgg.Preprocess((0.1,) * 13, (0.2,) * 13, scale=1e-4),
    ),
    "some of thirteen bands": Format(
        lambda f: open_image(
            geotiff(noise(13, top=9000, dtype=np.uint16).transpose(2, 0, 1))(f), bands=(3, 2, 1)
        ),
        noise(13, top=9000, dtype=np.uint16)[..., [3, 2, 1]],
        REFLECTANCE,
    ),
    "four bands": Format(
        geotiff(ALPHA.transpose(2, 0, 1), True), ALPHA, fcvgg.Preprocess((0.5,) * 4, (0.2,) * 4)
    ),
    "a file in memory": Format(lambda f: io.BytesIO(tiff(WIDE)(f).read_bytes()), WIDE / 257),
    "array uint8": Format(of(COLOUR), COLOUR),
    "array grey": Format(of(GREY), rgb(GREY)),
    "array rgba": Format(of(ALPHA), on_white(ALPHA)),
    "array uint16": Format(of(WIDE), WIDE / 257),
    "array uint16 as it is": Format(of(SCENE), SCENE, REFLECTANCE),
    "array int16": Format(of(SIGNED), SIGNED, REFLECTANCE),
    "array float64": Format(of(FLOATS.astype(float)), FLOATS, REFLECTANCE),
    "array of floats from 0 to 1": Format(
        of(FLOATS / 9000),
        FLOATS * (255 / 9000),
        fcvgg.Preprocess((0.4,) * 3, (0.2,) * 3, value_range=(0, 1)),
    ),
}
FORMATS |= {
    f"{kind} orientation {turn}": Format(write, ORIENTED[turn](COLOUR))
    for turn in ORIENTED
    for kind, write in {
        "png": partial(_exif, turn),
        "tiff": tiff(COLOUR, photometric="rgb", extratags=[(274, 3, 1, turn, True)]),
        "tiled tiff": tiff(
            COLOUR, photometric="rgb", tile=(16, 32), extratags=[(274, 3, 1, turn, True)]
        ),
    }.items()
}
FORMATS |= {
    f"zarr {version} {name}": Format(write, COLOUR)
    for version in (2, 3)
    for name, write in {
        "array": zarr_array(COLOUR, version),
        "ome": ome_zarr(COLOUR.transpose(2, 0, 1), version, False),
        "bioformats2raw": ome_zarr(COLOUR.transpose(2, 0, 1), version, True),
    }.items()
}
FORMATS |= {
    "pil L": Format(of(Image.fromarray(GREY)), rgb(GREY)),
    "pil RGB": Format(of(Image.fromarray(COLOUR)), COLOUR),
    "pil CMYK": Format(of(CMYK), np.asarray(CMYK.convert("RGB"))),
    "pil 1": Format(of(BINARY), rgb(np.asarray(BINARY) * 255)),
    "pil P": Format(of(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "pil LA": Format(of(Image.fromarray(noise(2))), rgb(on_white(noise(2)))),
    "pil RGBA": Format(of(Image.fromarray(ALPHA)), on_white(ALPHA)),
    "pil RGBa": Format(of(Image.fromarray(MASKED).convert("RGBa")), on_white(MASKED)),
    "pil I;16": Format(of(Image.fromarray(WIDE_GREY)), rgb(WIDE_GREY / 257)),
    "pil I": Format(of(Image.fromarray(WIDE_GREY.astype(np.int32))), rgb(WIDE_GREY / 257)),
    "pil F": Format(of(Image.fromarray(FLOATS[..., 0])), rgb(FLOATS[..., 0]), REFLECTANCE),
    "pil YCbCr": Format(of(Image.fromarray(COLOUR).convert("YCbCr")), COLOUR, tolerance=4),
    "pil HSV": Format(of(Image.fromarray(COLOUR).convert("HSV")), COLOUR, tolerance=6),
}


def _bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _with_transparency(path: Path, colour: Any) -> Path:
    """A PNG of which one colour is transparent, by the chunk after the header."""
    data, numbers = path.read_bytes(), b"".join(int(n).to_bytes(2, "big") for n in colour)
    return _bytes(path, data[:33] + _chunk(b"tRNS", numbers) + data[33:])


def _imagej(path: Path, planes: Pixels) -> Path:
    tifffile.imwrite(path, planes, imagej=True, metadata={"axes": "CYX"})
    return path


# -- entry points ---------------------------------------------------------------------------------


def _streamed(net: fcvgg.FullyConvolutional, source: Any) -> Tensor:
    return fcvgg.stream(net, source).scores


def _evaluated(net: fcvgg.FullyConvolutional, source: Any) -> Tensor:
    run = _Run(
        net, None, [Labelled("it", source, 0)], _Plan(("dense",), (SIZE[0],), False), "scores"
    )
    ((_, _, pixels),) = run._inputs(lambda _: None)
    return pixels


def _finetuned(net: fcvgg.FullyConvolutional, source: Any) -> Tensor:
    assert net.preprocess is not None
    size = strip_source(source, net.in_channels).size
    return ImageRows(LabelledFiles((source,), (0,)), net.preprocess, size)[0][0][None]


def _segmented(net: fcvgg.FullyConvolutional, source: Any) -> Tensor:
    fcn = fcvgg.FCN(net, 2, "32s")
    return MaskedImages(MaskFolder((source,), (Path(),), ("a", "b"), (0, 0)), fcn)._pixels(0)[None]


def _predicted(net: fcvgg.FullyConvolutional, source: Any) -> Tensor:
    torch.manual_seed(1)
    fcn = fcvgg.FCN(net, 2, "32s", categories=("a", "b")).eval()
    return torch.from_numpy(np.asarray(fcn.predict(source).labels))


def _of_bytes(net: fcvgg.FullyConvolutional, source: Any) -> Tensor:
    """As a worker of Ray reads a file."""
    if isinstance(source, Path) and source.is_file():
        source = io.BytesIO(source.read_bytes())
    return net.classify(source)


ENTRIES: dict[str, Callable[[fcvgg.FullyConvolutional, Any], Any]] = {
    "score_map": lambda net, source: net.score_map(source).scores,
    "heatmap": lambda net, source: torch.from_numpy(net.heatmap(source, 0).values),
    "classify": lambda net, source: net.classify(source),
    "bytes": _of_bytes,
    "stream": _streamed,
    "evaluate": _evaluated,
    "finetune": _finetuned,
    "train_fcn": _segmented,
    "predict": _predicted,
    "features": lambda net, source: torch.from_numpy(
        FeatureExtractor(net, ("pool1",)).rows([source])["pool1"]
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_entry_point_reads_the_same_pixels(tmp_path: Path, name: str) -> None:
    kind = FORMATS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        warnings.filterwarnings("ignore", r".* has several pages or frames, of which the first")
        source = kind.write(tmp_path)
        net = net_for(kind.preprocess)
        pixels = read_picture(source, kind.preprocess).pixels
        wide = 1 if kind.preprocess.takes_bytes else 9000 / 255
        np.testing.assert_allclose(pixels, kind.truth, rtol=2e-7, atol=kind.tolerance * wide)
        if pixels.dtype != np.uint8 and "alpha" not in name and "rgba" not in name:
            np.testing.assert_allclose(pixels, kind.truth, rtol=1e-6, atol=1e-4)  # not rounded
        given = kind.preprocess.normalized(np.array(pixels))
        assert given.shape == (1, kind.preprocess.channels, *kind.truth.shape[:2])
        for entry, read in ENTRIES.items():
            if entry in ("evaluate", "finetune", "train_fcn"):
                expected = given.to(read(net, source).dtype)
                if entry == "evaluate" and min(given.shape[2:]) != SIZE[0]:
                    continue  # it is rescaled
            else:
                expected = read(net, given)
            torch.testing.assert_close(
                read(net, source),
                expected,
                rtol=1e-6,
                atol=1e-6,
                msg=lambda m, e=entry: f"{e}: {m}",
            )


# -- what is refused by all of them ---------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "near infrared that is tagged as transparency": (
        geotiff(ALPHA.transpose(2, 0, 1)),
        r"a\.tif has four bands, of which the last is not taken for transparency.*"
        r"fcvgg\.open_image\(path, bands=\(0, 1, 2\)\)$",
    ),
    "near infrared of a place": (
        geotiff(MASKED.transpose(2, 0, 1), True),
        r"a\.tif has four bands, of which the last is not taken for transparency",
    ),
    "near infrared of a level": (
        lambda f: open_image(_four_bands_with_overview(f), level=1),
        r"a\.tif has four bands, of which the last is not taken for transparency",
    ),
    "near infrared of a dataset": (
        dataset(geotiff(ALPHA.transpose(2, 0, 1))),
        r"has four bands, of which the last is not taken for transparency",
    ),
    "five channels": (
        tiff(noise(5).transpose(2, 0, 1), ome=True, photometric="minisblack"),
        r"1, 3 or 4 channels.*, got 5; .*bands=\(0, 1, 2\)\) chooses some$|must be one plane",
    ),
    "thirteen bands": (
        geotiff(noise(13).transpose(2, 0, 1)),
        r"must have 1, 3 or 4 channels, or the network's 3, in the order .*, got 13",
    ),
    "two bands": (
        geotiff(noise(2).transpose(2, 0, 1)),
        r"must have 1, 3 or 4 channels.*, got 2; .*bands=\(0,\)\) chooses some$",
    ),
    "floats": (
        geotiff(FLOATS.transpose(2, 0, 1)),
        r"must hold floats from 0 to 1, got float32 from 0 to 89",
    ),
    "int16": (geotiff(SIGNED.transpose(2, 0, 1)), r"holds int16, which has no known range; pass"),
    "values that Pillow reduces": (
        lambda f: _bytes(f / "a.ppm", b"P6\n52 40\n65535\n" + WIDE.astype(">u2").tobytes()),
        r"a\.ppm must hold 8 bits for a preprocessing that takes values as they are, got more",
    ),
    "JPEG 2000 that Pillow reduces": (
        lambda f: _bytes(f / "a.jp2", imagecodecs.jpeg2k_encode(WIDE, level=0)),
        r"a\.jp2 must hold 8 bits .*, got more, of which Pillow gives 8",
    ),
    "signed values of which 0 is white": (
        tiff(SIGNED[..., 0], photometric="miniswhite"),
        r"must hold unsigned integers where 0 is white, got int16; save it",
    ),
}


def _four_bands_with_overview(folder: Path) -> Path:
    large = MASKED.repeat(2, 0).repeat(2, 1).transpose(2, 0, 1)
    path = geotiff(large, True, tiled=True, blockxsize=16, blockysize=16)(folder)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2])
    return Path(path)


@pytest.mark.parametrize("name", REFUSED)
def test_every_entry_point_refuses_the_same(tmp_path: Path, name: str) -> None:
    write, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        source = write(tmp_path)
        net = net_for(REFLECTANCE if "reduces" in name else BYTES)
        for entry, read in ENTRIES.items():
            if entry == "evaluate":
                found = fcvgg.evaluate  # which leaves it out, with the reason
                with pytest.raises(fcvgg.DatasetError, match=message.strip("^$")):
                    found(net, [(source, 0)], protocols="dense")
                continue
            if entry == "bytes" and isinstance(source, Path):
                with pytest.raises(fcvgg.ImageError) as raised:
                    read(net, source)
                assert "the image " in str(raised.value)
                continue
            with pytest.raises(fcvgg.ImageError, match=message):
                read(net, source)


def test_nothing_of_the_readers_reaches_stderr(tmp_path: Path, capfd: Any) -> None:
    path = geotiff(noise(13).transpose(2, 0, 1))(tmp_path)
    tifffile.imwrite(tmp_path / "b.tif", noise(5), photometric="rgb", extrasamples=[0, 0])
    capfd.readouterr()
    for file in (path, tmp_path / "b.tif"):
        with pytest.raises(fcvgg.ImageError):
            net_for(BYTES).score_map(file)
    assert capfd.readouterr() == ("", "")


# -- ranges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "takes"),
    [
        ({}, True),
        ({"scale": 1 / 127.5}, True),
        ({"scale": 1 / 256}, True),
        ({"mean": (103.9, 116.8, 123.7), "scale": 1, "channel_order": "BGR"}, True),
        ({"scale": 1}, False),
        ({"mean": (1353.7, 1117.2, 1041.9), "scale": 1}, False),
        ({"mean": (0.4, 0.5, 0.6), "scale": 1}, False),
        ({"scale": 1e-4}, False),
        ({"scale": 1 / 65535}, False),
        ({"scale": 1 / 4095}, False),
    ],
)
def test_what_a_preprocessing_takes(options: dict[str, Any], takes: bool) -> None:
    preprocess = fcvgg.Preprocess(**{"mean": (0,) * 3, "std": (1,) * 3, **options})
    assert preprocess.takes_bytes is takes
    expected = WIDE / 257 if takes else WIDE
    np.testing.assert_allclose(preprocess.units(WIDE), expected, rtol=1e-6)
    assert preprocess.units(COLOUR) is COLOUR


@pytest.mark.parametrize("options", [{}, {"scale": 1.0}, {"scale": 1 / 255}])
@pytest.mark.parametrize("values", [SCENE, SIGNED, FLOATS, FLOATS.astype(float), WIDE.astype("i4")])
def test_a_range_maps_its_ends_to_those_of_bytes(values: Pixels, options: dict[str, Any]) -> None:
    low, high = float(values.min()), float(values.max())
    preprocess = fcvgg.Preprocess((0,) * 3, (1,) * 3, value_range=(low, high), **options)
    units = preprocess.units(values)
    assert units.dtype == np.float32
    np.testing.assert_allclose([units.min(), units.max()], [0, 255], atol=1e-4)
    exact = (values.astype(float) - low) * 255 / (high - low)
    np.testing.assert_allclose(units, exact, rtol=1e-6, atol=1e-4)


def test_values_beyond_any_range_become_infinite_without_a_warning() -> None:
    preprocess = fcvgg.Preprocess((0,) * 3, (1,) * 3, value_range=(0, 1e-3))
    lowest = np.float32(-3.4028234663852886e38)
    assert preprocess.units(np.array([lowest, np.nan, 0], np.float32)).tolist()[::2] == [-np.inf, 0]
    assert replace(preprocess, value_range=None, scale=1).units(np.array([1e300])) == np.inf


@pytest.mark.parametrize("value", [(0,), (0, 0), (0, float("nan")), "ab", 5, (1, 2, 3)])
def test_what_is_no_range(value: Any) -> None:
    message = r"^value_range must be two different numbers \(low, high\), got "
    with pytest.raises(fcvgg.PreprocessError, match=message):
        fcvgg.Preprocess((0,) * 3, (1,) * 3, value_range=value)


def test_a_range_is_kept_in_bundles(tmp_path: Path) -> None:
    preprocess = fcvgg.Preprocess((0.4,) * 3, (0.2,) * 3, value_range=(0, 4095))
    net = net_for(preprocess)
    again = fcvgg.load(net.save(tmp_path / "net"))
    assert again.preprocess == preprocess
    torch.testing.assert_close(again.score_map(SCENE).scores, net.score_map(SCENE).scores)
    config = json.loads((net_for(BYTES).save(tmp_path / "plain") / "config.json").read_text())
    assert "value_range" not in config["preprocess"]  # as older versions wrote it


DARK: dict[str, Callable[[Path], Any]] = {
    "a file": geotiff(SCENE.transpose(2, 0, 1)),
    "a dataset": dataset(geotiff(SCENE.transpose(2, 0, 1))),
    "an array": of(SCENE),
    "a file whose bright values are no data": geotiff(
        np.where(SCENE < 300, 65535, SCENE).transpose(2, 0, 1), nodata=65535
    ),
    "a png": png16(SCENE),
}


@pytest.mark.parametrize("name", DARK)
def test_dark_values_of_16_bits_are_taken_for_the_whole_range_with_a_warning(
    tmp_path: Path, name: str
) -> None:
    """The range that is assumed is named, since most such images have another."""
    message = (
        r"^an image has only 16-bit values below 16384, which are nearly black in the range 0 to "
        r"65535 .*; pass value_range=\(low, high\) or a scale= .* or value_range=\(0, 65535\) if"
    )
    meant = net_for(replace(BYTES, value_range=(0, 65535)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        source = DARK[name](tmp_path)
        for entry, read in ENTRIES.items():
            expected = read(meant, source)
            warn_of_dark_values.cache_clear()  # which warns once in a process
            with pytest.warns(UserWarning, match=message):
                found = read(net_for(BYTES), source)
            torch.testing.assert_close(read(net_for(BYTES), source), found)
            torch.testing.assert_close(found, expected, msg=lambda m, e=entry: f"{e}: {m}")


def test_images_of_16_bits_that_are_bright_somewhere_are_read_without_a_warning() -> None:
    net = net_for(BYTES)
    pixels = np.full((400, 60, 3), 900, np.uint16)
    pixels[399, 31] = 40000
    torch.testing.assert_close(fcvgg.stream(net, pixels).scores, net.score_map(pixels).scores)
    black = np.zeros((40, 40), np.uint16)  # black in every range
    torch.testing.assert_close(net.score_map(black).scores, net.score_map(rgb8(black)).scores)


def rgb8(pixels: Pixels) -> Pixels:
    return pixels.astype(np.uint8)


# -- missing data ---------------------------------------------------------------------------------


def _holes(dtype: Any, value: float) -> Pixels:
    pixels = noise(3, top=200, dtype=dtype) + np.asarray(20, dtype)
    pixels[5:9, 30:44] = value
    return pixels


@pytest.mark.parametrize(
    ("dtype", "value", "preprocess"),
    [
        (np.uint8, 0, BYTES),
        (np.uint8, 255, BYTES),
        (np.uint16, 65535, REFLECTANCE),
        (np.int16, -9999, REFLECTANCE),
        (np.float32, -3.4028234663852886e38, REFLECTANCE),
        (np.float32, np.nan, REFLECTANCE),
    ],
)
@pytest.mark.parametrize("opened", [lambda p: p, rasterio.open], ids=["path", "dataset"])
def test_missing_data_enters_as_nan(
    tmp_path: Path, dtype: Any, value: float, preprocess: fcvgg.Preprocess, opened: Any
) -> None:
    pixels = _holes(dtype, value)
    path = geotiff(
        pixels.transpose(2, 0, 1), True, nodata=value, tiled=True, blockxsize=16, blockysize=16
    )(tmp_path)
    hole = np.zeros(SIZE, bool)
    hole[5:9, 30:44] = True
    plain = open_image(opened(path))
    np.testing.assert_equal(plain.nodata, value)
    np.testing.assert_array_equal(plain.whole(), pixels)
    source = open_image(opened(path), nodata="file")
    given = prepare(source, preprocess, 3).tensor(preprocess)
    assert torch.equal(given.isnan(), torch.from_numpy(hole).expand(1, 3, *SIZE))
    expected = preprocess.normalized(preprocess.units(pixels))
    torch.testing.assert_close(given[~given.isnan()], expected[~given.isnan()])
    read = strip_reader(source, preprocess, 3)
    strips = torch.cat([read((y, min(y + 7, 40)), (0, 52)) for y in range(0, 40, 7)], 2)
    torch.testing.assert_close(strips, given, equal_nan=True)
    if not np.isnan(value):
        by_value = open_image(opened(path), nodata=value)
        np.testing.assert_array_equal(by_value.whole(), source.whole())


def test_values_without_data_take_the_memory_of_floats(tmp_path: Path) -> None:
    path = geotiff(_holes(np.uint8, 0).transpose(2, 0, 1), True, nodata=0)(tmp_path)
    for source in (open_image(path), open_image(path, nodata=0)):
        assert source.itemsize == source.read((0, 1), (0, 1)).itemsize


@pytest.mark.parametrize("opened", [lambda p: p, rasterio.open], ids=["path", "dataset"])
def test_a_mask_in_place_of_a_value(tmp_path: Path, opened: Any) -> None:
    """As GDAL's tools mark what a warped scene does not cover."""
    pixels = np.concatenate([COLOUR, np.full((*SIZE, 1), 255, np.uint8)], 2)
    pixels[5:9, 30:44, 3] = 0
    path = geotiff(pixels.transpose(2, 0, 1), True)(tmp_path)
    source = open_image(opened(path), bands=(2, 1, 0), nodata="file")
    values = source.whole()
    assert np.array_equal(np.isnan(values).all(2), pixels[..., 3] == 0)
    assert np.array_equal(values[pixels[..., 3] > 0], COLOUR[..., ::-1][pixels[..., 3] > 0])
    assert source.left_out == "mask"


@pytest.mark.parametrize("opened", [lambda p: p, rasterio.open], ids=["path", "dataset"])
def test_the_mask_of_a_dataset(tmp_path: Path, opened: Any) -> None:
    path = geotiff(COLOUR.transpose(2, 0, 1), True, photometric="RGB")(tmp_path)
    mask = np.full(SIZE, 255, np.uint8)
    mask[5:9, 30:44] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
        file.write_mask(mask)
    values = open_image(opened(path), nodata="file").read((4, 20), (20, 50))
    assert np.array_equal(np.isnan(values).all(2), mask[4:20, 20:50] == 0)
    np.testing.assert_array_equal(open_image(path).whole(), COLOUR)


def test_nodata_that_is_not_declared(tmp_path: Path) -> None:
    path = geotiff(COLOUR.transpose(2, 0, 1), True, photometric="RGB")(tmp_path)
    with pytest.raises(
        fcvgg.ImageError, match=r"a\.tif must declare a nodata value .*, got none; pass the value, "
    ):
        open_image(path, nodata="file")
    with pytest.raises(
        fcvgg.ImageError, match=r"^nodata must be a number, 'file' or None, got 'a'"
    ):
        open_image(path, nodata="a")


def test_a_dark_channel_is_no_missing_data(tmp_path: Path) -> None:
    pixels = COLOUR.copy()
    pixels[..., 0] = 0
    pixels[3, 4] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    values = open_image(tmp_path / "a.png", nodata=0).whole()
    assert np.argwhere(np.isnan(values).any(2)).tolist() == [[3, 4]]
    signed = SIGNED.copy()
    signed[5, 6, 1] = -9999  # one band is enough: the network needs all of them
    path = geotiff(signed.transpose(2, 0, 1), True)(tmp_path)
    assert np.argwhere(np.isnan(open_image(path, nodata=-9999).whole()).any(2)).tolist() == [[5, 6]]


# -- strips ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_strips_of_a_tiff_are_parts_of_the_whole(tmp_path_factory: Any, data: Any) -> None:
    draw = data.draw
    height, width = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    samples, dtype = draw(st.sampled_from([1, 3])), draw(st.sampled_from(["u1", "u2", "f4"]))
    turn = draw(st.sampled_from(list(ORIENTED)))
    pixels = (np.random.default_rng(0).random((height, width, samples)) * 250).astype(dtype)
    layout = draw(
        st.sampled_from(
            [{}, {"tile": (16, 32)}, {"rowsperstrip": 7, "compression": "zlib"}, {"byteorder": ">"}]
        )
    )
    path = tmp_path_factory.mktemp("tiff") / "a.tif"
    kind = "rgb" if samples == 3 else "minisblack"
    tags = [(274, 3, 1, turn, True)]
    tifffile.imwrite(
        path,
        pixels.squeeze(2) if samples == 1 else pixels,
        photometric=kind,
        extratags=tags,
        **layout,
    )
    source, expected = open_image(path), ORIENTED[turn](pixels)
    assert source.size == expected.shape[:2]
    np.testing.assert_array_equal(source.whole(), expected)
    for _ in range(3):
        top, left = (draw(st.integers(0, n - 1)) for n in source.size)
        bottom = draw(st.integers(top + 1, source.size[0]))
        right = draw(st.integers(left + 1, source.size[1]))
        part = source.read((top, bottom), (left, right))
        np.testing.assert_array_equal(part, expected[top:bottom, left:right])


# -- the command line -----------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_names_its_own_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net_for(BYTES).float().save("net")
    geotiff(SCENE.transpose(2, 0, 1))(tmp_path).rename("scene.tif")
    geotiff(ALPHA.transpose(2, 0, 1))(tmp_path).rename("four.tif")
    for command in (("classify",), ("stream", "-o", "a.zarr"), ("heatmap",)):
        name, *options = command
        warn_of_dark_values.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            ran = run(name, "scene.tif", *options, "-m", "net")
        assert ran.exit_code == 0
        notes = " ".join(ran.stderr.split())
        assert notes.count("fcvgg: an image has only 16-bit values below 16384") == 1
        assert "(--range LOW,HIGH)" in notes
        assert "FcvggWarning" not in notes  # no file and line
        options = ["-o", "b.zarr"] if options else []
        ran = run(name, "four.tif", *options, "-m", "net")
        assert ran.exit_code == 2
        (line,) = ran.stderr.splitlines()
        assert line.endswith("choose 3 of them: --bands 0,1,2")
        ran = run(name, "scene.tif", *options, "-m", "net", "--range", "5")
        assert ran.exit_code == 2
        assert "'5' is not two different numbers LOW,HIGH" in " ".join(ran.stderr.split())
    ran = run("classify", "four.tif", "-m", "net", "--full-size", "--json", "--bands", "2,1,0")
    assert ran.exit_code == 0, ran.output
    expected = net_for(BYTES).classify(ALPHA[..., [2, 1, 0]]).max()
    assert json.loads(ran.stdout)["predictions"][0]["probability"] == pytest.approx(
        float(expected), abs=1e-5
    )


@pytest.mark.parametrize(
    "options", [("--range", "0,9000"), ("--range=0,9000", "--mean", "0", "--std", "1")]
)
def test_a_range_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = BYTES if len(options) == 2 else fcvgg.Preprocess((0,) * 3, (1,) * 3)
    net_for(BYTES).float().save("net")
    geotiff(SCENE.transpose(2, 0, 1))(tmp_path).rename("scene.tif")
    net = net_for(replace(base, value_range=(0, 9000)))
    ran = run("classify", "scene.tif", "-m", "net", "--full-size", "--json", *options)
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["predictions"][0]["probability"] == pytest.approx(
        float(net.classify("scene.tif").max()), abs=1e-5
    )
    ran = run("stream", "scene.tif", "-m", "net", "-o", "s.zarr", *options)
    assert ran.exit_code == 0, ran.output
    np.testing.assert_allclose(
        open_store("s.zarr").array[:], net.score_map("scene.tif").scores, atol=1e-5
    )


def test_a_range_beside_what_the_source_says() -> None:
    """As ``fcvgg finetune --range`` hands it on."""
    own = OwnPreprocess(value_range=(0, 4095))
    source = load_pretrained("demo", None, own.preprocess_for, None)
    assert source.preprocess.value_range == (0, 4095)
    assert replace(source.preprocess, value_range=None) == fcvgg.load("demo").preprocess
    assert own.preprocess_for(3) is None
    named = replace(own, preprocess="tf").preprocess_for(3)
    assert named == replace(fcvgg.Preprocess.preset("tf"), value_range=(0, 4095))


def test_missing_data_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net_for(BYTES).float().save("net")
    holes = _holes(np.uint8, 0).transpose(2, 0, 1)
    geotiff(holes, nodata=0, photometric="RGB")(tmp_path).rename("a.tif")
    for value in ("file", "0"):
        ran = run("stream", "a.tif", "-m", "net", "-o", f"{value}.zarr", "--nodata", value)
        assert ran.exit_code == 0, ran.output
        scores = open_store(f"{value}.zarr").array[:]
        assert 0 < np.isnan(scores).mean() < 0.5
    ran = run("stream", "a.tif", "-m", "net", "-o", "c.zarr", "--nodata", "black")
    assert ran.exit_code == 2
    assert "'black' is neither a number nor 'file'" in " ".join(ran.stderr.split())


def _scene_with_a_hole(value: float) -> Any:
    """A float GeoTIFF of the packaged photograph, 0 to 1, whose upper left corner has no data."""
    pixels = np.asarray(demo_photograph().resize((160, 160)), np.float32) / 255
    pixels[:40, :40] = value
    return pixels.transpose(2, 0, 1)


def test_a_declared_nodata_value_is_noted_once_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.tif", "a.tif"):
        geotiff(_scene_with_a_hole(-9999), True, nodata=-9999)(tmp_path).rename(name)
    own = ("-m", "demo", "--range", "0,1")
    note = "a.tif declares nodata -9999, which is read as pixel values; --nodata file leaves it out"
    for command in (
        ("classify", "a.tif", "b.tif", "--full-size"),
        ("heatmap", "a.tif", "b.tif", "-t", "face"),
        ("stream", "a.tif", "-o", "raw.zarr"),
    ):
        ran = run(*command, *own)
        assert ran.exit_code == 0, ran.output
        assert ran.stderr.count("declares nodata") == 1
        assert note in ran.stderr
    net = fcvgg.load("demo", verify=False)
    net.preprocess = replace(net.preprocess, value_range=(0, 1))
    expected = net.classify(open_image("a.tif", nodata="file"), scales=None)[0]
    for value in ("file", "-9999"):
        ran = run("classify", "a.tif", "--full-size", "--json", *own, f"--nodata={value}")
        assert ran.exit_code == 0, ran.output
        assert "declares" not in ran.stderr
        found = {p["index"]: p["probability"] for p in json.loads(ran.stdout)["predictions"]}
        for index, probability in enumerate(expected.tolist()):
            assert found[index] == pytest.approx(probability, abs=1e-5)
    ran = run("heatmap", "a.tif", *own, "-t", "face", "--nodata", "file", "-o", "h")
    assert ran.exit_code == 0, ran.output
    assert "declares" not in ran.stderr
    ran = run("stream", "a.tif", "-o", "raw.zarr", *own, "--nodata", "file")
    assert ran.exit_code == 2
    assert 'its nodata is none, not "-9999.0"' in ran.stderr
    ran = run("classify", "a.tif", *own, "--nodata", "black")
    assert "'black' is neither a number nor 'file'" in " ".join(ran.stderr.split())


def test_an_image_without_a_class_says_what_gives_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    geotiff(_scene_with_a_hole(np.nan), True, nodata=np.nan)(tmp_path)
    ran = run("classify", "a.tif", "-m", "demo", "--range", "0,1")
    assert ran.exit_code == 2
    assert "a.tif has no class: every window of it sees pixels without data; --full" in ran.stderr
    assert "declares" not in ran.stderr  # NaN is left out as it is
    assert run("classify", "a.tif", "-m", "demo", "--range", "0,1", "--full-size").exit_code == 0


@pytest.mark.parametrize("nodata", ["file", "-9999"])
def test_pixels_without_data_do_not_change_the_thumbnail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodata: str
) -> None:
    monkeypatch.chdir(tmp_path)
    geotiff(_scene_with_a_hole(-9999), True, nodata=-9999)(tmp_path)
    ran = run(
        "stream", "a.tif", "-m", "demo", "-o", "a.zarr", "--range", "0,1", f"--nodata={nodata}"
    )
    assert ran.exit_code == 0, ran.output
    slide = SlideMap(open_store("a.zarr"), "face")
    for side in (160, 50):  # its pixels hold some with data and some without
        picture = slide.heatmap(slide.source(), side=side).image
        shown = np.asarray(picture, float)
        whole = np.asarray(demo_photograph().resize((side, side)), float)
        edge = side // 4
        assert (shown[: edge - 1, : edge - 1] == 0).all()
        assert abs(shown[edge + 1 :] - whole[edge + 1 :]).mean() < 12
    assert slide.source().left_out == "-9999.0"
