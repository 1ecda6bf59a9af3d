"""One file, one answer: every format gives the same pixels to everything that takes images."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import fcvgg
from fcvgg.datasets import Labelled
from fcvgg.evaluation.protocols import _Plan, _Run
from fcvgg.finetuning.images import ImageRows, LabelledFiles
from fcvgg.images import read_picture
from fcvgg.segmentation.mask_folders import MaskFolder
from fcvgg.segmentation.samples import MaskedImages
from fcvgg.streaming.opening import open_image, strip_source
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
    "tiff cmyk": Format(_saved(CMYK, "tif"), np.asarray(CMYK.convert("RGB"))),
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
