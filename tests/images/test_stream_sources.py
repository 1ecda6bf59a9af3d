"""Everything that `fcvgg.stream` reads gives the score map of the same pixels in memory."""

from __future__ import annotations

import gzip
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nets import SmallVGG, images, relative_error, seeded
from numpy.typing import NDArray
from PIL import Image

import fcvgg
from fcvgg.errors import FcvggError, ImageError
from fcvgg.images.lazy.chunks import unpacked_size
from fcvgg.images.lazy.input import normalizer
from fcvgg.images.lazy.opening import open_image, strip_source

tifffile = pytest.importorskip("tifffile")
zarr = pytest.importorskip("zarr")
imagecodecs = pytest.importorskip("imagecodecs")

Pixels = NDArray[Any]


@pytest.fixture(scope="module")
def net() -> Any:
    return fcvgg.convert(seeded(SmallVGG), preprocess=fcvgg.Preprocess.imagenet())


def photograph(*shape: int, dtype: Any = np.uint8) -> Pixels:
    top = np.iinfo(dtype).max
    return np.random.default_rng(3).integers(0, top, shape, endpoint=True).astype(dtype)


def agree(net: Any, source: Any, pixels: Any) -> None:
    expected = net.score_map(pixels).scores
    assert relative_error(expected, fcvgg.stream(net, source).scores) <= 1e-12
    rows = (3, min(9, expected.shape[1]))
    part = fcvgg.stream(net, source, rows=rows).scores
    assert relative_error(expected[:, slice(*rows)], part) <= 1e-12


# -- arrays ---------------------------------------------------------------------------------------


def _memmap(folder: Path, pixels: Pixels) -> Any:
    np.save(folder / "a.npy", pixels)
    return np.load(folder / "a.npy", mmap_mode="r")


def _zarr(folder: Path, pixels: Pixels) -> Any:
    array = zarr.create_array(
        str(folder / "a.zarr"), shape=pixels.shape, dtype=pixels.dtype, chunks=(32, 20, 3)
    )
    array[:] = pixels
    return array


def _h5py(folder: Path, pixels: Pixels) -> Any:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("image", data=pixels, chunks=(16, 90, 3))
    return h5py.File(folder / "a.h5")["image"]


def _dask(folder: Path, pixels: Pixels) -> Any:
    return pytest.importorskip("dask.array").from_array(pixels, chunks=(40, 30, 3))


@pytest.mark.parametrize("made", [_memmap, _zarr, _h5py, _dask, lambda _, p: p])
def test_arrays(net: Any, tmp_path: Path, made: Callable[[Path, Pixels], Any]) -> None:
    pixels = photograph(111, 90, 3)
    agree(net, made(tmp_path, pixels), pixels)


@pytest.mark.parametrize("shape", [(90, 70), (90, 70, 1), (90, 70, 4)])
def test_grey_and_transparent_arrays(net: Any, shape: tuple[int, ...]) -> None:
    agree(net, photograph(*shape), photograph(*shape))


def test_sixteen_bits(net: Any) -> None:
    pixels = photograph(90, 70, 3, dtype=np.uint16)
    agree(net, pixels, pixels)


def test_preprocessed_floats(net: Any) -> None:
    x = images(1, 3, 90, 70)
    agree(net, x, x)
    agree(net, x[0], x)
    agree(net, x[0].numpy(), x)
    bare = fcvgg.convert(seeded(SmallVGG))
    agree(bare, x, x)


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "bmp"])
def test_files_that_pillow_decodes(net: Any, tmp_path: Path, ending: str) -> None:
    pixels = photograph(95, 70, 3)
    path = tmp_path / f"image.{ending}"
    Image.fromarray(pixels).save(path)
    agree(net, path, pixels)
    agree(net, str(path), pixels)
    agree(net, Image.open(path), pixels)


def test_jpegs_are_turned_upright(net: Any, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph(95, 70, 3)).save(path, exif=exif)
    agree(net, path, path)
    assert strip_source(path).size == (70, 95)


TIFFS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "big-endian": {"byteorder": ">"},
    "strips": {"rowsperstrip": 16, "compression": "zlib"},
    "tiles": {"tile": (32, 48), "compression": "zlib", "predictor": True},
    "uncompressed tiles": {"tile": (32, 32)},
    "one strip": {"compression": "zlib", "rowsperstrip": 111},
    "bigtiff": {"bigtiff": True, "tile": (64, 64)},
    "planes": {"planarconfig": "separate", "tile": (32, 32)},
}


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiffs(net: Any, tmp_path: Path, kind: str, dtype: Any) -> None:
    pixels = photograph(111, 90, 3, dtype=dtype)
    options = dict(TIFFS[kind])
    opening = {k: options.pop(k) for k in ("bigtiff", "byteorder") if k in options}
    stored = pixels.transpose(2, 0, 1) if kind == "planes" else pixels
    with tifffile.TiffWriter(tmp_path / "a.tif", **opening) as file:
        file.write(stored, photometric="rgb", **options)
    agree(net, tmp_path / "a.tif", pixels)


def test_tiffs_of_grey_and_palette(net: Any, tmp_path: Path) -> None:
    grey = photograph(80, 70)
    for name, values in (("minisblack", grey), ("miniswhite", 255 - grey)):
        tifffile.imwrite(tmp_path / "a.tif", values, photometric=name)
        agree(net, tmp_path / "a.tif", grey)
    image = Image.fromarray(photograph(80, 70, 3)).quantize(32)
    image.save(tmp_path / "p.tif")
    agree(net, tmp_path / "p.tif", np.asarray(image.convert("RGB")))


def test_jpeg_tiles_and_levels_of_a_pyramid(net: Any, tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs")
    ramp = np.linspace(0, 255, 256 * 192 * 3).reshape(256, 192, 3).astype(np.uint8)
    options = {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb"}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        file.write(ramp, subifds=1, metadata={"axes": "YXS"}, **options)
        file.write(ramp[::2, ::2], subfiletype=1, **options)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        levels = [level.asarray() for level in file.series[0].levels]
    agree(net, tmp_path / "a.ome.tif", levels[0])
    agree(net, fcvgg.open_image(tmp_path / "a.ome.tif", level=1), levels[1])
    with pytest.raises(FcvggError, match=r"^level must be from 0 to 1 for .*, got 2$"):
        fcvgg.open_image(tmp_path / "a.ome.tif", level=2)


def test_zarr_folders(net: Any, tmp_path: Path) -> None:
    pixels = photograph(111, 90, 3)
    _zarr(tmp_path, pixels)
    agree(net, tmp_path / "a.zarr", pixels)
    group = zarr.open_group(str(tmp_path / "ome.zarr"), mode="w")
    for name, values in (("0", pixels), ("1", pixels[::2, ::2])):
        planes = values.transpose(2, 0, 1)[None]
        group.create_array(name, shape=planes.shape, dtype="uint8", chunks=(1, 1, 32, 32))[:] = (
            planes
        )
    axes = [{"name": name} for name in "tcyx"]
    datasets = [{"path": "0"}, {"path": "1"}]
    group.attrs["ome"] = {"multiscales": [{"axes": axes, "datasets": datasets}]}
    agree(net, tmp_path / "ome.zarr", pixels)
    agree(net, fcvgg.open_image(tmp_path / "ome.zarr", level=1), pixels[::2, ::2])


def test_raster_datasets(net: Any) -> None:
    pixels = photograph(90, 70, 3)

    def read(window: Any) -> Pixels:
        (top, bottom), (left, right) = window
        return pixels[top:bottom, left:right].transpose(2, 0, 1)

    dataset = SimpleNamespace(
        read=read, height=90, width=70, count=3, dtypes=["uint8"] * 3, block_shapes=[(16, 70)] * 3
    )
    agree(net, dataset, pixels)


def test_a_block_of_rows_is_read_once(net: Any) -> None:
    calls: list[tuple[int, int]] = []

    class Blocked:
        array = photograph(128, 60, 3)
        shape, dtype, chunks = array.shape, array.dtype, (32, 60, 3)

        def __getitem__(self, key: Any) -> Any:
            calls.append((key[0].start, key[0].stop))
            return self.array[key]

    agree(net, Blocked(), Blocked.array)
    assert calls[:4] == [(0, 32), (32, 64), (64, 96), (96, 128)]


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((0, 40, 3), np.uint8), "must have pixels, got the size"),
        (
            np.zeros((40, 40, 2), np.uint8),
            r"must have 1, 3 or 4 channels.*, got 2; array\[\.\.\., \[0\]\] chooses",
        ),
        (np.zeros((40, 40, 3), np.int32), "holds int32, which has no known range"),
        (np.zeros((40, 40, 3), bool), "holds bool, which has no known range"),
        (
            np.full((40, 40, 3), 9, np.float32),
            "must hold floats from 0 to 1, got float32 from 0 to 9",
        ),
        (
            np.zeros((40, 40, 5), np.float32),
            "the array .* must have the network's 3 channels, got 40",
        ),
        (np.zeros((2, 3, 40, 40), np.float32), "preprocessed floats must be"),
        (np.zeros(40, np.uint8), "pixels must be .*, got the array"),
        (None, "the image must be a path, .*, got NoneType"),
        ("absent.tif", "there is no image file absent.tif"),
    ],
)
def test_unusable_sources(net: Any, source: Any, message: str) -> None:
    with pytest.raises(FcvggError, match=message):
        fcvgg.stream(net, source)


def test_pixels_without_preprocessing() -> None:
    bare = fcvgg.convert(seeded(SmallVGG), verify=False)
    with pytest.raises(FcvggError, match="preprocessing is unknown"):
        fcvgg.stream(bare, photograph(40, 40, 3))
    resizing = fcvgg.Preprocess.imagenet(resize=64)
    bare.preprocess = resizing
    with pytest.raises(
        FcvggError, match=r"must have resize=None to stream an image, .*, got resize=64"
    ):
        fcvgg.stream(bare, photograph(40, 40, 3))


def test_broken_files(net: Any, tmp_path: Path) -> None:
    whole = tmp_path / "whole.tif"
    tifffile.imwrite(whole, photograph(90, 70, 3), photometric="rgb", tile=(32, 32))
    data = whole.read_bytes()
    cut = tmp_path / "cut.tif"
    for share in (0.9, 0.5, 0.01):
        cut.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(FcvggError, match=r"cut.tif (is truncated|cannot be read as a TIFF)"):
            fcvgg.stream(net, cut)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(FcvggError, match=r"empty\.png is not an image that Pillow can read"):
        fcvgg.stream(net, tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(FcvggError, match="is not an image that Pillow can read"):
        fcvgg.stream(net, tmp_path / "text.png")
    tifffile.imwrite(cut, np.full((40, 40, 3), 9, np.float32), photometric="rgb")
    with pytest.raises(FcvggError, match="must hold floats from 0 to 1, got float32"):
        fcvgg.stream(net, cut)
    with pytest.raises(FcvggError, match="must be an image file or a zarr image, got a folder"):
        fcvgg.stream(net, tmp_path)


def test_a_corrupt_tile(net: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    options = {"tile": (32, 32), "compression": "zlib", "photometric": "rgb"}
    tifffile.imwrite(path, photograph(90, 70, 3), **options)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[4]
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(FcvggError, match=r"rows 32 to 64 of .*a.tif cannot be read"):
        fcvgg.stream(net, path)


def test_files_that_shrink_while_they_are_read(net: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, photograph(90, 70, 3), photometric="rgb")
    source = fcvgg.open_image(path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(FcvggError, match=r"a\.tif has shrunk while it was read"):
        fcvgg.stream(net, source)
    mapped = _memmap(tmp_path, photograph(90, 70, 3))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:9000])
    with pytest.raises(FcvggError, match=r"a\.npy has shrunk while it was read"):
        fcvgg.stream(net, mapped)


def test_a_decompression_bomb(net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(photograph(90, 70, 3)).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", photograph(90, 70, 3), photometric="rgb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(FcvggError, match=r"must be smaller to be loaded whole, .* tiled TIFF"):
        fcvgg.stream(net, tmp_path / "a.png")
    assert fcvgg.stream(net, tmp_path / "a.tif").image_size == (90, 70)
    with pytest.raises(
        ImageError,
        match=r"a\.tif must have at most 2000 pixels to be loaded whole, got 90x70; .* "
        r"fcvgg\.stream, or raise PIL\.Image\.MAX_IMAGE_PIXELS",
    ):
        net.score_map(tmp_path / "a.tif")


def test_a_missing_package(net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads what it reads rightly, and nothing else."""
    plain, grey = tmp_path / "plain.tif", tmp_path / "grey.tif"
    tifffile.imwrite(plain, photograph(90, 70, 3), photometric="rgb")
    tifffile.imwrite(grey, photograph(90, 70), photometric="minisblack")
    others = {
        "wide": (photograph(90, 70, dtype=np.uint16), {"photometric": "minisblack"}),
        "pages": (photograph(3, 90, 70), {"photometric": "minisblack"}),
        "planes": (photograph(3, 90, 70), {"photometric": "rgb", "planarconfig": "separate"}),
        "white": (photograph(90, 70), {"photometric": "miniswhite"}),
    }
    for name, (pixels, options) in others.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, **options)
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    agree(net, plain, photograph(90, 70, 3))
    agree(net, grey, photograph(90, 70))
    for read in (lambda path: fcvgg.stream(net, path), net.score_map):
        for name in others:
            message = rf"{name}\.tif is a TIFF .*'tifffile'.*pip install 'fcvgg\[stream\]'"
            with pytest.raises(fcvgg.MissingExtraError, match=message):
                read(tmp_path / f"{name}.tif")


# -- satellite scenes and what files leave out ----------------------------------------------------


def geotiff(path: Path, bands: Pixels, **options: Any) -> Path:
    """A GeoTIFF of bands ``(C, H, W)``, as GDAL writes it."""
    rasterio = pytest.importorskip("rasterio")
    count, height, width = bands.shape
    tiles = {"tiled": True, "blockxsize": 32, "blockysize": 16, "compress": "deflate"}
    options = {**tiles, "dtype": bands.dtype, "crs": "EPSG:32633", **options}
    options["transform"] = rasterio.Affine(10, 0, 4e5, 0, -10, 5e6)
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=count, **options
    ) as file:
        file.write(bands)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_geotiffs_by_rasterio_and_as_files(net: Any, tmp_path: Path, dtype: Any) -> None:
    rasterio = pytest.importorskip("rasterio")
    pixels = photograph(90, 70, 3, dtype=dtype)
    pixels[20:40, :30] = 0  # no data: the value that stands there
    path = geotiff(tmp_path / "a.tif", pixels.transpose(2, 0, 1), nodata=0, interleave="band")
    agree(net, path, pixels)
    with rasterio.open(path) as dataset:
        agree(net, dataset, pixels)
    windows: list[Any] = []
    with rasterio.open(path) as dataset:
        spied = SimpleNamespace(
            read=lambda window: windows.append(window) or dataset.read(window=window),
            **{n: getattr(dataset, n) for n in ("height", "width", "count", "dtypes", "name")},
            **{n: getattr(dataset, n) for n in ("block_shapes", "colorinterp")},
        )
        fcvgg.stream(net, spied)
    assert len(windows) == len(set(windows)) == 6  # row of tiles by row of tiles, each once


def test_a_palette_by_rasterio(net: Any, tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    image = Image.fromarray(photograph(80, 70, 3)).quantize(32)
    image.save(tmp_path / "p.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "p.tif") as dataset:
            agree(net, dataset, np.asarray(image.convert("RGB")))


def test_a_fourth_band_that_is_no_transparency(net: Any, tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    bands = photograph(90, 70, 4).transpose(2, 0, 1)
    path = geotiff(tmp_path / "a.tif", bands, photometric="RGB")
    message = r"has four bands, of which the last is not taken for transp.*bands=\(0, 1, 2\)"
    with pytest.raises(FcvggError, match=message):
        fcvgg.stream(net, path)
    agree(net, fcvgg.open_image(path, bands=(2, 1, 3)), bands[[2, 1, 3]].transpose(1, 2, 0))
    with rasterio.open(path) as dataset:
        with pytest.raises(FcvggError, match=message):
            fcvgg.stream(net, dataset)
        chosen = fcvgg.open_image(dataset, bands=(2, 1, 3))
        agree(net, chosen, bands[[2, 1, 3]].transpose(1, 2, 0))
    four = fcvgg.convert(
        seeded(SmallVGG, in_channels=4),
        preprocess=fcvgg.Preprocess((0.5,) * 4, (0.2,) * 4),
        verify=False,
    )
    x = four.preprocess.normalized(bands.transpose(1, 2, 0)).double()
    assert relative_error(four.score_map(x).scores, fcvgg.stream(four, path).scores) <= 1e-12
    geotiff(path, bands)  # the fourth is marked as transparency
    with pytest.raises(FcvggError, match=message):
        fcvgg.stream(net, path)
    with pytest.raises(FcvggError, match=message):
        net.score_map(path)


def test_bands_of_many(net: Any, tmp_path: Path) -> None:
    bands = photograph(6, 90, 70, dtype=np.uint16)
    path = geotiff(tmp_path / "a.tif", bands)
    with pytest.raises(FcvggError, match=r"must have 1, 3 or 4 channels.*, got 6; .*chooses some"):
        fcvgg.stream(net, path)
    agree(net, fcvgg.open_image(path, bands=(3, 2, 1)), bands[[3, 2, 1]].transpose(1, 2, 0))
    with pytest.raises(FcvggError, match=r"^bands must be from 0 to 5 for .*, got \(0, 6\)"):
        fcvgg.open_image(path, bands=(0, 6))
    with pytest.raises(FcvggError, match=r"^bands must be channels counted from 0, .*, got 1"):
        fcvgg.open_image(path, bands=1)  # type: ignore[arg-type]
    with pytest.raises(
        FcvggError, match=r"^bands must be the network's 3 channels of .*, got \(0, 1\)"
    ):
        fcvgg.stream(net, fcvgg.open_image(path, bands=(0, 1)))
    planes = zarr.create_array(
        str(tmp_path / "b.zarr"), shape=(1, 6, 90, 70), dtype="u2", chunks=(1, 2, 32, 32)
    )
    planes[:] = bands[None]
    group = zarr.open_group(str(tmp_path / "ome.zarr"), mode="w")
    group.create_array("0", data=bands[None], chunks=(1, 2, 32, 32))
    axes = [{"name": name} for name in "tcyx"]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}]}]
    source = fcvgg.open_image(tmp_path / "ome.zarr", bands=(5, 0, 1))
    agree(net, source, bands[[5, 0, 1]].transpose(1, 2, 0))
    Image.fromarray(photograph(90, 70, 3)).save(tmp_path / "a.png")
    source = fcvgg.open_image(tmp_path / "a.png", bands=(2, 0, 1))
    agree(net, source, photograph(90, 70, 3)[..., [2, 0, 1]])


def test_what_a_file_does_not_store(net: Any, tmp_path: Path) -> None:
    pixels = photograph(96, 64, 3)
    pixels[:32, :20] = 0  # zarr leaves such a chunk out
    _zarr(tmp_path, pixels)
    path = tmp_path / "a.zarr"
    agree(net, path, pixels)
    with pytest.raises(
        FcvggError, match=r"a.zarr must store all of its 12 chunks, got 11; missing='fill'"
    ):
        fcvgg.open_image(path, missing="error")
    sparse = geotiff(tmp_path / "a.tif", np.zeros((3, 96, 64), np.uint8), sparse_ok=True)
    agree(net, sparse, np.zeros((96, 64, 3), np.uint8))
    with pytest.raises(
        FcvggError, match=r"a.tif must store all of its 12 tiles, got 0; missing='fill'"
    ):
        fcvgg.open_image(sparse, missing="error")
    agree(net, fcvgg.open_image(geotiff(sparse, pixels.T), missing="error"), pixels.swapaxes(0, 1))
    with pytest.raises(FcvggError, match=r"^missing must be 'fill' or 'error', got 'zero'"):
        fcvgg.open_image(path, missing="zero")


def test_colours_that_are_not_rgb(net: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, photograph(40, 40, 3), photometric="icclab")
    with pytest.raises(FcvggError, match=r"must store RGB, grey, .*, got ICCLAB of 8 bits; save"):
        fcvgg.stream(net, path)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_the_table_gives_the_bits_of_the_preprocessing(order: str) -> None:
    preprocess = fcvgg.Preprocess.imagenet(channel_order=order)
    pixels = photograph(33, 21, 3)
    assert torch.equal(normalizer(preprocess)(pixels), preprocess.normalized(pixels))
    grey = fcvgg.Preprocess((0.4,), (0.3,), scale=1.0)
    pixels = photograph(33, 21)
    assert torch.equal(normalizer(grey)(pixels), grey.normalized(pixels))


def test_tiffs_that_do_not_hold_what_they_say(net: Any, tmp_path: Path) -> None:
    grey = np.zeros((40, 40), np.uint8)
    tifffile.imwrite(tmp_path / "four.tif", grey, photometric="minisblack")
    data = bytearray((tmp_path / "four.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "four.tif") as file:
        tag = file.pages[0].tags["BitsPerSample"]
    data[tag.valueoffset : tag.valueoffset + 2] = (12).to_bytes(2, "little")
    (tmp_path / "four.tif").write_bytes(data)
    with pytest.raises(ImageError, match=r"^rows 0 to 40 of .*four.tif cannot be read: "):
        fcvgg.stream(net, tmp_path / "four.tif")  # 12 bits of each value are not there
    data[tag.valueoffset : tag.valueoffset + 2] = (20).to_bytes(2, "little")
    (tmp_path / "four.tif").write_bytes(data)
    with pytest.raises(ImageError, match=r"four.tif must have .* bits per sample, got 20"):
        open_image(tmp_path / "four.tif")
    planes = np.zeros((3, 40, 40), np.uint8)
    options: dict[str, Any] = {"imagej": True, "truncate": True, "metadata": {"axes": "CYX"}}
    tifffile.imwrite(tmp_path / "cut.tif", planes, photometric="minisblack", **options)
    with pytest.raises(ImageError, match=r"must describe the 3x40x40 numbers .*, got 1600"):
        open_image(tmp_path / "cut.tif")


def test_an_ome_tiff_in_several_files(tmp_path: Path) -> None:
    plane = np.zeros((40, 40), np.uint8)
    for name in ("a.ome.tif", "b.ome.tif"):
        tifffile.imwrite(tmp_path / name, plane, photometric="minisblack")
    data = "".join(
        f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1"><UUID FileName="{name}.ome.tif">urn:{name}'
        "</UUID></TiffData>"
        for c, name in enumerate("ab")
    )
    ome = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:a"><Image ID="I">'
        '<Pixels ID="P" DimensionOrder="XYCZT" Type="uint8" SizeX="40" SizeY="40" SizeC="2"'
        f' SizeZ="1" SizeT="1"><Channel ID="C:0"/><Channel ID="C:1"/>{data}</Pixels></Image></OME>'
    )
    options: dict[str, Any] = {"photometric": "minisblack", "metadata": None}
    tifffile.imwrite(tmp_path / "a.ome.tif", plane, description=ome.encode(), **options)
    with pytest.raises(ImageError, match="must have its pixels in one file, got several"):
        open_image(tmp_path / "a.ome.tif", bands=[0, 1])


def test_an_incomplete_copy_of_an_ome_zarr(tmp_path: Path) -> None:
    group = zarr.open_group(str(tmp_path / "image.zarr"), mode="w")
    scale = {"coordinateTransformations": [{"type": "scale", "scale": [1, 1]}], "path": "0"}
    axes = [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    group.attrs["ome"] = {"multiscales": [{"datasets": [scale], "axes": axes}]}
    with pytest.raises(ImageError, match="must hold the OME-Zarr image that it describes, got"):
        open_image(tmp_path / "image.zarr")
    group.create_array("0", data=np.zeros((40, 40), np.uint8))
    for described in (5, [5], {"a": 1}, [{"axes": 7, "datasets": "x"}], [{"axes": [1, 2]}]):
        group.attrs["ome"] = {"multiscales": described}
        with pytest.raises(ImageError, match="must hold the OME-Zarr image that it describes"):
            open_image(tmp_path / "image.zarr")
    group.attrs["ome"] = {"multiscales": [{"datasets": [scale], "axes": ["y", "y"]}]}
    with pytest.raises(ImageError, match=r"must be \(H, W, C\) .*, got the shape \(40, 40\)"):
        open_image(tmp_path / "image.zarr")


PIXEL_SIZES = [(0.25, 0.5), (0.0, 0.5), (0.5, float("nan")), (float("inf"),) * 2, (0.5, 1e12)]


@pytest.mark.parametrize("size", PIXEL_SIZES)
def test_a_pixel_size_that_is_none_is_left_out(net: Any, tmp_path: Path, size: Any) -> None:
    """Whatever an image says of it, its map can be written, read and resumed."""
    pixels = photograph(60, 50, 3)
    expected = size if size == PIXEL_SIZES[0] else None
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    group.create_array("0", shape=pixels.shape, dtype=pixels.dtype)[:] = pixels
    axes = [{"name": name, "unit": "micrometer"} for name in "yx"] + [{"name": "c"}]
    scale = [{"type": "scale", "scale": [*size, 1]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["ome"] = {"multiscales": [{"axes": axes, "datasets": datasets}]}
    metadata = {"axes": "YXS", "PhysicalSizeY": size[0], "PhysicalSizeX": size[1]}
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, photometric="rgb", metadata=metadata)
    for name in ("a.zarr", "a.ome.tif"):
        assert open_image(tmp_path / name).pixel_size == expected
        for _ in range(2):
            store = fcvgg.stream(net, tmp_path / name, out=tmp_path / f"{name}-map")
        assert store.description["pixel_size"] == (expected and list(expected))


ZEROS = bytes(1 << 22)
BOMBS = {
    "zstd": imagecodecs.zstd_encode(ZEROS),
    "a size that is not true": b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + bytes(3),
    "blosc": imagecodecs.blosc_encode(ZEROS, compressor="lz4"),
    # of a stream, whose size is not stated: blocks that repeat one byte 2**21 times
    "stream": b"\x28\xb5\x2f\xfd\0\x70" + ((1 << 24) - 5).to_bytes(3, "little") + b"\0",
    "gzip": gzip.compress(np.random.default_rng(0).bytes(1 << 17) + ZEROS),
    "plain": ZEROS,
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("version", [2, 3])
def test_chunks_that_unpack_to_more_than_they_should(
    tmp_path: Path, name: str, version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcvgg.images.lazy.chunks._UNSTATED", 1 << 20)
    options = {"chunks": (16, 16, 3), "zarr_format": version}
    zarr.create_array(str(tmp_path / "a.zarr"), data=photograph(40, 40, 3), **options)
    chunk = next(tmp_path.rglob("0/0/0") if version == 3 else tmp_path.rglob("0.0.0"))
    source = open_image(tmp_path / "a.zarr")
    whole = source.whole()
    np.testing.assert_array_equal(whole, photograph(40, 40, 3))
    chunk.write_bytes(BOMBS[name])
    with pytest.raises(FcvggError, match=r"must hold a chunk of 768 bytes, got \d{7,} or more; wr"):
        source.read((0, 9), (0, 9))
    np.testing.assert_array_equal(source.read((16, 40), (0, 40)), whole[16:])


def test_sides_that_nobody_can_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    zarr.create_array(str(path), shape=(1 << 40, 40), chunks=(40, 40), dtype="uint8")
    with pytest.raises(
        ImageError, match=r"a\.zarr must have sides of at most \d+ pixels, got the si"
    ):
        open_image(path)


def test_a_tiff_of_too_many_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcvgg.images.lazy.tiff._MOST_PAGES", 2)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 9, 9), np.uint8), photometric="minisblack")
    with pytest.raises(ImageError, match=r"a\.tif must have at most 2 pages, got 3; save the one"):
        open_image(tmp_path / "a.tif")


def test_the_size_of_a_gzip_chunk_is_counted() -> None:
    noise = np.random.default_rng(0).bytes(1 << 20)
    assert unpacked_size(gzip.compress(noise + ZEROS * 20)) == (True, 81 << 20)
    assert unpacked_size(zlib.compress(b"abc")) == (True, 11)


@pytest.mark.parametrize("version", [2, 3])
def test_several_images_in_one_zarr(tmp_path: Path, version: Any) -> None:
    """As bioformats2raw writes a slide with its label, and plates of many wells."""
    path = tmp_path / "a.zarr"
    root = zarr.open_group(str(path), mode="w", zarr_format=version)
    with pytest.raises(ImageError, match="must be an OME-Zarr image, got another zarr group with"):
        open_image(path)
    axes = [{"name": "y"}, {"name": "x"}]
    image = {"multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
    for name in ("0", "1", "10"):
        group = root.create_group(name)
        group.create_array("0", data=np.full((40, 40), int(name), np.uint8))
        group.attrs.update(image if version == 2 else {"ome": image})
    with pytest.raises(
        ImageError, match=r"must be one image, got the images 0, 1, 10; pass .*a\.zarr/0$"
    ):
        open_image(path)
    assert open_image(path / "10").whole().max() == 10
    plate = {"plate": {"wells": []}}
    root = zarr.open_group(str(tmp_path / "p.zarr"), mode="w", zarr_format=version)
    root.attrs.update(plate if version == 2 else {"ome": plate})
    with pytest.raises(ImageError, match=r"p\.zarr must be one image, got a plate; pass one field"):
        open_image(tmp_path / "p.zarr")


def test_options_that_an_open_dataset_does_not_have(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    path = geotiff(tmp_path / "a.tif", photograph(3, 90, 70), photometric="RGB")
    with rasterio.open(path) as dataset:
        with pytest.raises(
            FcvggError, match=r"^missing must be 'fill' for an open dataset, got 'error'"
        ):
            open_image(dataset, missing="error")
        for level in (1, 99, -1):
            with pytest.raises(
                ImageError, match=rf"^level must be from 0 to 0 for .*, got {level}$"
            ):
                open_image(dataset, level=level)


def test_a_segmentation_network_is_not_streamed(net: Any) -> None:
    fcn = fcvgg.FCN(net, 2, "32s")
    message = r"^net must be a converted network, got FCN; call its predict\(image"
    with pytest.raises(fcvgg.ArgumentError, match=message):
        fcvgg.stream(fcn, photograph(90, 70, 3))
