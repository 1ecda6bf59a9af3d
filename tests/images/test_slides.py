"""Slides that other libraries open, and levels chosen by the size of pixels."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from nets import SmallVGG, seeded
from PIL import Image

import fcvgg
from fcvgg.errors import FcvggWarning
from fcvgg.images.lazy.slide import SlideSource
from fcvgg.images.lazy.thumbnail import thumbnail
from fcvgg.streaming.tissue import tissue

tifffile = pytest.importorskip("tifffile")
zarr = pytest.importorskip("zarr")

PREPROCESS = fcvgg.Preprocess((0.5,) * 3, (0.5,) * 3)
Pixels = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def net() -> Any:
    return fcvgg.convert(seeded(SmallVGG).float(), preprocess=PREPROCESS, verify=False)


def pyramid(height: int = 300, width: int = 220, factors: Any = (1, 4)) -> list[Pixels]:
    """Levels of noise, so that a pixel that is read from elsewhere shows."""
    draw = np.random.default_rng(height).integers
    return [draw(0, 256, (height // n, width // n, 3), np.uint8) for n in factors]


def tiff(path: Path, levels: list[Pixels], mpp: float | None = 0.25, **options: Any) -> Path:
    """A tiled pyramid as scanners write it, whose pixels OpenSlide and TiffSlide read."""
    if mpp is not None:
        options |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as file:
        for i, pixels in enumerate(levels):
            file.write(
                pixels,
                photometric="rgb",
                tile=(64, 64),
                subfiletype=int(i > 0),
                metadata=None,
                compression="zlib",
                **(options if i == 0 else {}),
            )
    return path


class Slide:
    """The least that is taken for a slide, in OpenSlide's conventions."""

    def __init__(self, levels: list[Pixels], **properties: str):
        self.levels = levels
        self.level_dimensions = tuple((one.shape[1], one.shape[0]) for one in levels)
        self.properties = {f"openslide.{k.replace('_', '-')}": v for k, v in properties.items()}

    def read_region(self, location: Any, level: int, size: Any) -> Any:
        factor = self.level_dimensions[0][0] // self.level_dimensions[level][0]
        x, y = (n // factor for n in location)
        return self.given(self.levels[level][y : y + size[1], x : x + size[0]])

    def given(self, pixels: Pixels) -> Any:
        return Image.fromarray(pixels).convert("RGBA")


class PositionalSlide(Slide):
    """Names of its own, and plain arrays."""

    def read_region(self, xy: Any, at: int, wh: Any) -> Any:
        return super().read_region(xy, at, wh)

    def given(self, pixels: Pixels) -> Any:
        return pixels


class Region:
    """What cuCIM gives: NumPy knows how to read it."""

    def __init__(self, pixels: Pixels):
        self.__array_interface__ = np.ascontiguousarray(pixels).__array_interface__
        self.pixels = pixels


class CuImage:
    """In cuCIM's conventions."""

    def __init__(self, levels: list[Pixels]):
        self._slide = Slide(levels)
        self.resolutions = {
            "level_dimensions": self._slide.level_dimensions,
            "level_downsamples": (1.0, 4.0),
            "level_tile_sizes": ((64, 64), (64, 64)),
        }
        self.shape, self.dtype = [*levels[0].shape], object()

    def read_region(self, location: Any = (), size: Any = (), level: int = 0) -> Any:
        return Region(np.array(self._slide.read_region(location, level, size).convert("RGB")))

    def spacing(self, order: str) -> list[float]:
        return [0.25 for _ in order]

    def spacing_units(self, order: str) -> list[str]:
        return ["micrometer" for _ in order]


@pytest.mark.parametrize("kind", [Slide, PositionalSlide, CuImage])
@pytest.mark.parametrize("level", [0, 1])
def test_the_pixels_of_a_slide_are_read(net: Any, kind: Any, level: int) -> None:
    levels = pyramid()
    slide = kind(levels)
    image = fcvgg.open_image(slide, level=level)
    np.testing.assert_array_equal(image.whole(), levels[level])
    np.testing.assert_array_equal(image.read((5, 31), (7, 29)), levels[level][5:31, 7:29])
    if level == 0:
        expected = fcvgg.stream(net, levels[0]).scores
        assert fcvgg.stream(net, slide).scores.equal(expected)
        assert net.score_map(slide).scores.shape == expected.shape
    if kind is CuImage:
        assert image.pixel_size == (0.25 * 4**level,) * 2


def test_training_reads_levels_as_it_reads_arrays(net: Any, tmp_path: Path) -> None:
    """Scores and gradients of `net.streamed` from paths, slides and opened images."""
    levels = pyramid()
    path = tiff(tmp_path / "slide.tif", levels)
    sources = [
        [levels[0], path, str(path), Slide(levels), fcvgg.open_image(path)],
        [levels[1], fcvgg.open_image(path, 1), fcvgg.open_image(Slide(levels), 1)],
    ]
    for array, *others in sources:
        expected = trained_on(net, array)
        for source in others:
            torch.testing.assert_close(trained_on(net, source), expected, rtol=0, atol=0)


def trained_on(net: Any, image: Any) -> tuple[torch.Tensor, ...]:
    """Scores, and gradients of all parameters."""
    scores = net.streamed(image, memory="100MiB")
    gradients = torch.autograd.grad(scores.square().mean(), list(net.parameters()))
    return scores.detach(), *gradients


@pytest.mark.parametrize("library", ["openslide.OpenSlide", "tiffslide.TiffSlide"])
def test_readers_of_slides_give_the_pixels_of_the_file(
    net: Any, tmp_path: Path, library: str
) -> None:
    module, name = library.split(".")
    levels = pyramid(304, 224)
    path = tiff(tmp_path / "slide.tif", levels)
    with getattr(pytest.importorskip(module), name)(path) as slide:
        for level, pixels in enumerate(levels):
            image = fcvgg.open_image(slide, level)
            np.testing.assert_array_equal(image.whole(), pixels)
            assert image.pixel_size == pytest.approx((0.25 * 4**level,) * 2)
        assert fcvgg.open_image(slide, mpp=1).level == 1
        again = pickle.loads(pickle.dumps(fcvgg.open_image(slide, 1)))  # as workers get it
        np.testing.assert_array_equal(again.whole(), levels[1])
        again._slide.close()
        store = fcvgg.stream(net, slide, out=tmp_path / "slide.zarr")
        expected = fcvgg.stream(net, path).scores
        np.testing.assert_array_equal(store.array[:], expected)
        assert store.heatmap(0).image is not None  # read from the file, which tifffile can


def test_strips_of_a_level_between_the_pixels_are_those_of_the_whole(tmp_path: Path) -> None:
    """Of such a level OpenSlide interpolates, by where a region begins."""
    openslide = pytest.importorskip("openslide")
    path = tiff(tmp_path / "slide.tif", pyramid(1001, 803, (1, 2)))
    with openslide.OpenSlide(path) as slide:
        whole = fcvgg.open_image(slide, 1).whole()
        for rows, cols in (((3, 200), (0, 401)), ((77, 78), (50, 99)), ((300, 500), (400, 401))):
            part = fcvgg.open_image(slide, 1).read(rows, cols)
            np.testing.assert_array_equal(part, whole[slice(*rows), slice(*cols)])


@pytest.mark.parametrize(
    ("properties", "background"),
    [({}, 255), ({"background_color": "204060"}, (32, 64, 96)), ({"background_color": "?"}, 255)],
)
def test_what_was_not_scanned_is_background_or_missing(
    net: Any, properties: dict[str, str], background: Any
) -> None:
    (pixels,) = pyramid(90, 80, (1,))

    class Scanned(Slide):
        def given(self, pixels: Pixels) -> Any:
            return np.dstack([pixels, np.where(pixels[..., :1] < 128, 0, 255).astype(np.uint8)])

    expected = np.where(pixels[..., :1] < 128, np.array(background, np.uint8), pixels)
    slide = Scanned([pixels], **properties)
    np.testing.assert_array_equal(fcvgg.open_image(slide).whole(), expected)
    missing = fcvgg.open_image(slide, nodata="file").whole()
    np.testing.assert_array_equal(np.isnan(missing).all(2), pixels[..., 0] < 128)


def test_maps_of_slides_without_a_file_are_shown_on_them(net: Any, tmp_path: Path) -> None:
    slide = Slide(pyramid())
    store = fcvgg.stream(net, slide, out=tmp_path / "slide.zarr")
    assert store.heatmap(0).image is None
    shown = store.heatmap(0, image=slide).image
    assert shown is not None
    np.testing.assert_array_equal(np.asarray(shown), slide.levels[0])
    with pytest.raises(
        fcvgg.ImageError, match=r"must have the size .*; pass the image that was streamed$"
    ):
        store.heatmap(0, image=Slide(pyramid(304, 220)))


def test_the_level_that_was_streamed_is_shown(net: Any, tmp_path: Path) -> None:
    slide = Slide(pyramid(), mpp_x="0.25", mpp_y="0.25")
    store = fcvgg.stream(net, slide, mpp=1, out=tmp_path / "slide.zarr")
    for image in (slide, fcvgg.open_image(slide, 1)):
        shown = store.heatmap(0, image=image).image
        assert shown is not None
        np.testing.assert_array_equal(np.asarray(shown), slide.levels[1])


def test_thumbnails_and_tissue_are_of_the_small_level(monkeypatch: pytest.MonkeyPatch) -> None:
    read = set()

    class Watched(Slide):
        def read_region(self, location: Any, level: int, size: Any) -> Any:
            if size != (1, 1):  # which tells the channels
                read.add(level)
            return super().read_region(location, level, size)

    image = fcvgg.open_image(Watched(pyramid()))
    shown = thumbnail(image, (75, 55))
    np.testing.assert_array_equal(np.asarray(shown), image._slide.levels[1])
    monkeypatch.setattr("fcvgg.streaming.tissue._THUMBNAIL", 75)
    assert tissue(image).shape == (75, 55)
    assert read == {1}


def test_a_value_without_data_is_that_of_the_colours(net: Any) -> None:
    (pixels,) = pyramid(90, 80, (1,))
    pixels[20:30, 40:60] = 0
    values = fcvgg.open_image(Slide([pixels]), nodata=0).whole()
    np.testing.assert_array_equal(np.isnan(values).all(2), (pixels == 0).all(2))
    values = fcvgg.open_image(Slide([pixels]), nodata=0, bands=(2, 0)).whole()
    np.testing.assert_array_equal(np.isnan(values).all(2), (pixels[..., ::2] == 0).all(2))


def test_slides_that_are_none() -> None:
    slide = Slide(pyramid())
    with pytest.raises(fcvgg.ImageError, match=r"^level must be from 0 to 1 for the Slide, got 2$"):
        fcvgg.open_image(slide, 2)
    with pytest.raises(fcvgg.ArgumentError, match=r"^missing must be 'fill' for an open dataset"):
        fcvgg.open_image(slide, missing="error")

    class Short(Slide):
        def given(self, pixels: Pixels) -> Any:
            return pixels[:1]

    with pytest.raises(
        fcvgg.ImageError, match=r"read_region of the Short must give 256x220 pixels"
    ):
        fcvgg.open_image(Short(pyramid())).read((0, 2), (0, 2))

    class Broken(Slide):
        def given(self, pixels: Pixels) -> Any:
            if len(pixels) > 1:
                raise RuntimeError("bad\ntile")
            return pixels

    with pytest.raises(fcvgg.ImageError, match=r"^rows 0 to 256 of the Broken cannot be read: bad"):
        fcvgg.open_image(Broken(pyramid())).read((0, 2), (0, 2))


@pytest.mark.parametrize("ending", ["svs", "ndpi", "mrxs"])
def test_a_scanners_format_needs_its_reader(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"slide.{ending}"
    path.write_bytes(b"what only a vendor knows")
    with pytest.raises(fcvgg.ImageError) as caught:
        fcvgg.open_image(path)
    assert "or in Python pass openslide.OpenSlide(path) or tiffslide" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- pixel sizes ----------------------------------------------------------------------------------


def ome_zarr(path: Path, levels: list[Pixels], unit: str, size: float) -> Path:
    group = zarr.open_group(str(path), mode="w")
    datasets = []
    for i, pixels in enumerate(levels):
        group.create_array(str(i), data=pixels)
        scale = [size * len(levels[0]) / len(pixels)] * 2 + [1.0]
        transformations = [{"type": "scale", "scale": scale}]
        datasets.append({"path": str(i), "coordinateTransformations": transformations})
    axes = [{"name": name, "type": "space", "unit": unit} for name in "yx"]
    axes += [{"name": "c", "type": "channel"}]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes, "datasets": datasets}],
    }
    return path


def described(path: Path, kind: str) -> Any:
    """A pyramid of 0.25 micrometres that says so in its own way."""
    levels = pyramid()
    if kind == "Aperio":
        return svs(path, levels)
    inches = {"resolution": (25400 / 0.25,) * 2, "resolutionunit": "INCH"}
    if kind in ("micrometer", "millimeter"):
        return ome_zarr(path, levels, kind, 0.25 if kind == "micrometer" else 0.00025)
    if kind == "slide":
        return Slide(levels, mpp_x="0.25", mpp_y="0.25")
    if kind == "OME":
        with tifffile.TiffWriter(path, ome=True) as file:
            metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
            options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64)}
            file.write(levels[0], subifds=1, metadata=metadata, **options)
            file.write(levels[1], subfiletype=1, **options)
        return path
    return tiff(path, levels, **({"mpp": None, **inches} if kind == "inch" else {}))


def svs(path: Path, levels: list[Pixels]) -> Path:
    """As Aperio's scanners write it: the second page is a thumbnail."""
    about = "Aperio Image Library v12\n300x220 [0,0 300x220]|AppMag = 40|MPP = 0.2500|Left = 1"
    with tifffile.TiffWriter(path) as file:
        for pixels, tile in ((levels[0], (64, 64)), (levels[1], None), (levels[1], (64, 64))):
            file.write(pixels, photometric="rgb", tile=tile, description=about, metadata=None)
    return path


KINDS = ["centimetre", "inch", "Aperio", "OME", "micrometer", "millimeter", "slide"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_level_is_chosen_by_the_size_of_pixels(tmp_path: Path, kind: str) -> None:
    source = described(
        tmp_path / ({"OME": "a.ome.tif", "Aperio": "a.svs"}.get(kind, "a.tif")), kind
    )
    for mpp, level in ((0.25, 0), (0.22, 0), (0.29, 0), (1, 1), (1.15, 1)):
        image = fcvgg.open_image(source, mpp=mpp)
        assert image.level == level
        if kind != "slide":  # which is not a file
            again = pickle.loads(pickle.dumps(image))  # as workers get it
            assert (again.level, again.size) == (level, image.size)
        assert image.size == (300 // 4**level, 220 // 4**level)
        assert image.mpp == pytest.approx(0.25 * 4**level)
    listed = re.escape(", 0.25 (level 0), 1 (level 1), got 0.5; ")
    with pytest.raises(fcvgg.ImageError, match=f"^mpp must be within 20% .*{listed}") as caught:
        fcvgg.open_image(source, mpp=0.5)
    assert "\n" not in str(caught.value)


def test_scenes_state_the_metres_of_a_pixel(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "scene.tif"
    for crs, unit in (("EPSG:32633", 1), ("EPSG:32664", 1200 / 3937), ("EPSG:4326", None)):
        profile = {"driver": "GTiff", "height": 60, "width": 50, "count": 3, "dtype": "uint8"}
        transform = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
        with rasterio.open(path, "w", crs=crs, transform=transform, **profile):
            pass
        expected = None if unit is None else pytest.approx(10e6 * unit)
        assert fcvgg.open_image(path).mpp == expected
    with pytest.raises(fcvgg.ImageError, match="must state its pixel size to choose a level"):
        fcvgg.open_image(path, mpp=10e6)


def test_pixel_sizes_that_cannot_choose(net: Any, tmp_path: Path) -> None:
    path = tiff(tmp_path / "slide.tif", pyramid(), mpp=None)
    with pytest.raises(fcvgg.ImageError, match=r"slide.tif must state its pixel size .*, got none"):
        fcvgg.open_image(path, mpp=0.5)
    for mpp in (0, -1, "fine", True, float("nan")):
        with pytest.raises(fcvgg.ArgumentError, match=r"^mpp must be a positive number"):
            fcvgg.open_image(path, mpp=mpp)  # type: ignore[arg-type]
    with pytest.raises(
        fcvgg.ArgumentError, match=r"^level and mpp exclude each other, got level=1"
    ):
        fcvgg.open_image(path, 1, mpp=1)
    with pytest.raises(fcvgg.ArgumentError, match="mpp must be None for an image that is open"):
        fcvgg.stream(net, fcvgg.open_image(path), mpp=1)
    with pytest.raises(fcvgg.ArgumentError, match="mpp must be None for pixels in memory"):
        fcvgg.stream(net, pyramid()[0], mpp=1)
    with pytest.raises(fcvgg.PreprocessError, match="mpp must be a positive number"):
        fcvgg.Preprocess(0.5, 0.5, mpp=0)  # type: ignore[arg-type]


# -- the pixel size that a network was trained at -------------------------------------------------


def trained_at(mpp: float | None, folder: Path) -> Any:
    preprocess = fcvgg.Preprocess((0.5,) * 3, (0.5,) * 3, mpp=mpp)
    net = fcvgg.convert(seeded(SmallVGG).float(), preprocess=preprocess, verify=False)
    net.save(folder)
    loaded = fcvgg.load(folder)
    assert loaded.preprocess == preprocess
    assert ("mpp" in (folder / "config.json").read_text()) == (mpp is not None)
    return loaded


def test_a_network_takes_the_level_that_it_was_trained_at(tmp_path: Path) -> None:
    levels = pyramid()
    path = tiff(tmp_path / "slide.tif", levels)
    net = trained_at(1.0, tmp_path / "net")
    with pytest.warns(FcvggWarning) as caught:
        chosen = fcvgg.stream(net, path)
    (message,) = [str(one.message) for one in caught]
    assert message.endswith(
        "slide.tif has 0.25 micrometres per pixel at level 0, and the network was trained at 1; "
        "level 1 with 1 is taken; level= or mpp= choose"
    )
    assert chosen.image_size == levels[1].shape[:2]
    assert fcvgg.stream(net, path, mpp=1).scores.equal(chosen.scores)  # and nothing is said
    with pytest.warns(FcvggWarning, match="its scores may mean little; choose another of"):
        asked = fcvgg.stream(net, path, mpp=0.25)
    with pytest.warns(FcvggWarning, match="its scores may mean little"):
        opened = fcvgg.stream(net, fcvgg.open_image(path))
    assert asked.image_size == opened.image_size == (300, 220)
    with pytest.warns(FcvggWarning, match="level 1 with 1 is taken"), torch.no_grad():
        assert net.streamed(path).equal(chosen.scores[None])


def test_a_network_that_no_level_fits_warns(tmp_path: Path) -> None:
    slide = Slide(pyramid(), mpp_x="0.25", mpp_y="0.25")
    with pytest.warns(FcvggWarning, match=r"another of the levels 0\.25 \(level 0\), 1 "):
        result = fcvgg.stream(trained_at(0.5, tmp_path / "net"), slide)
    assert result.image_size == (300, 220)
    unknown = trained_at(None, tmp_path / "other")
    assert fcvgg.stream(unknown, slide).image_size == (300, 220)
    assert isinstance(fcvgg.open_image(slide), SlideSource)


def test_the_command_line_chooses_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiff(tmp_path / "slide.tif", pyramid(800, 720))
    ran = run("stream", "slide.tif", "-o", "a.zarr", "-m", "demo", "--mpp", "1")
    assert ran.exit_code == 0, ran.stderr
    assert "slide.tif: 200x180 pixels gave" in ran.stdout
    run("convert", "demo", "-o", "net", "--trained-mpp", "1")
    warnings.simplefilter("default")  # as outside of the tests: a note
    ran = run("stream", "slide.tif", "-o", "b.zarr", "-m", "net")
    assert "level 1 with 1 is taken" in " ".join(ran.stderr.split())
    assert "slide.tif: 200x180 pixels gave" in ran.stdout
    ran = run("info", "slide.tif")
    assert [line.split() for line in ran.stdout.splitlines()[2:]] == [
        ["0", "800x720", "0.25", "µm"],
        ["1", "200x180", "1", "µm"],
    ]
    ran = run("info", "slide.tif", "--json")
    assert json.loads(ran.stdout)["levels"][1] == {"size": [200, 180], "mpp": 1.0}
    ran = run("stream", "slide.tif", "-o", "c.zarr", "-m", "demo", "--mpp", "0.5")
    assert ran.exit_code == 2
    assert "0.25 (level 0), 1 (level 1), got 0.5" in " ".join(ran.stderr.split())
