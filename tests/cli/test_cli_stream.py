"""``fcvgg stream`` and the pictures that ``fcvgg heatmap`` makes of what it wrote."""

from __future__ import annotations

import shutil
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import tifffile
import torch
import zarr
from matplotlib import pyplot as plt
from nets import SmallVGG, images, seeded
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import fcvgg
from fcvgg.cli import app
from fcvgg.demo import demo_photograph
from fcvgg.images.lazy.opening import open_image, strip_source
from fcvgg.images.lazy.thumbnail import thumbnail
from fcvgg.results.colours import class_colours
from fcvgg.results.drawing import share_text
from fcvgg.streaming.score_store import ScoreStore, open_store
from fcvgg.streaming.slide_maps import SlideMap


@pytest.fixture
def slide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("slide.tif", np.asarray(demo_photograph().resize((200, 168))))
    return tmp_path / "slide.tif"


def fcvgg_command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_stream_writes_the_map_and_heatmap_shows_it(slide):
    ran = fcvgg_command("stream", slide, "-o", "scores.zarr", "--model", "demo")
    assert ran.exit_code == 0, ran.output
    assert "scores.zarr" in ran.output
    ran = fcvgg_command("heatmap", "scores.zarr", "--target", "face", "--output", "pictures")
    assert ran.exit_code == 0, ran.output
    (pyramid,) = (slide.parent / "pictures").glob("*.tif*")
    (picture,) = (slide.parent / "pictures").glob("*.png")
    assert picture.stat().st_size > 1000
    values = tifffile.imread(pyramid).astype(float)
    expected = fcvgg.load("demo", verify=False).heatmap("slide.tif", "face").values
    assert values.shape == expected.shape
    np.testing.assert_allclose(values / max(values.max(), 1) * expected.max(), expected, atol=0.02)


def test_only_a_region_is_streamed(slide):
    mask = np.zeros((6, 7), np.uint8)
    mask[2:4, 2:4] = 255
    Image.fromarray(mask).save("mask.png")
    command = ("stream", slide, "-o", "scores.zarr", "--model", "demo")
    ran = fcvgg_command(*command, "--where", "mask.png")
    assert ran.exit_code == 0, ran.output
    cells = open_store(slide.parent / "scores.zarr").array[0]
    share = np.isfinite(cells).mean()
    assert 0 < share < 0.5
    assert f", {share:.1%} of the cells computed" in " ".join(ran.output.split())
    ran = fcvgg_command(*command, "--where", "missing.geojson")
    assert ran.exit_code == 2
    assert "'missing.geojson', which is not a file" in " ".join(ran.output.split())


def pyramid_of(slide, **options):
    """The pyramid that `fcvgg heatmap` writes for a TIFF of the packaged photograph."""
    pixels = np.tile(np.asarray(demo_photograph()), (1, 3, 1))[:500, :1030]
    tifffile.imwrite("large.tif", pixels, photometric="rgb", tile=(256, 256), **options)
    for command in (
        ("stream", "large.tif", "-o", "large.zarr", "--model", "demo"),
        ("heatmap", "large.zarr", "--target", "face", "--output", "pictures"),
    ):
        ran = fcvgg_command(*command)
        assert ran.exit_code == 0, ran.output
    return slide.parent / "pictures" / "large-heatmap.ome.tif"


HALVED = fcvgg.Preprocess((0.5,) * 3, (0.2,) * 3)

OME_SIZE = {"PhysicalSizeY": 250, "PhysicalSizeYUnit": "nm", "PhysicalSizeX": 0.5}


@pytest.mark.parametrize(
    ("options", "pixel_size"),
    [
        ({"ome": True, "metadata": {"axes": "YXS", **OME_SIZE}}, (0.25, 0.5)),
        ({"description": "Aperio Image|AppMag = 20|MPP = 0.4990", "metadata": None}, (0.499,) * 2),
        ({"resolution": (20000, 40000), "resolutionunit": "CENTIMETER"}, (0.25, 0.5)),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),  # how it prints
        ({}, None),
    ],
)
def test_viewers_find_levels_pixel_size_and_the_class(slide, options, pixel_size):
    with tifffile.TiffFile(pyramid_of(slide, **options)) as file:
        (series,) = file.series
        assert [level.shape for level in series.levels] == [(500, 1030), (250, 515), (125, 258)]
        assert series.axes == "YX"
        image = ET.fromstring(file.ome_metadata).find("{*}Image")
        pixels, channel = image.find("{*}Pixels"), image.find(".//{*}Channel")
        assert image.get("Name") == channel.get("Name") == "face"
        found = [pixels.get(f"PhysicalSize{axis}") for axis in "YX"]
        if pixel_size is None:
            assert found == [None, None]
            return
        assert list(map(float, found)) == pytest.approx(pixel_size)
        for level in series.levels:
            across, down = level.keyframe.get_resolution("CENTIMETER")
            scale = np.divide((500, 1030), level.shape)
            assert (1e4 / down, 1e4 / across) == pytest.approx(pixel_size * scale, rel=1e-3)


def test_small_pictures_show_what_single_cells_found(slide):
    tifffile.imwrite("dark.tif", np.zeros((2100, 1100, 3), np.uint8), photometric="rgb")
    ran = fcvgg_command("stream", "dark.tif", "-o", "dark.zarr", "--model", "demo")
    assert ran.exit_code == 0, ran.output
    store = open_store("dark.zarr", writable=True)
    face = fcvgg.load("demo", verify=False).categories.index("face")
    store.array[face] = -20
    store.array[face, 77, 33] = 20
    slide_map = SlideMap(store, "face")
    for side in (300, 64, 20):
        heatmap = slide_map.heatmap(side=side)
        assert heatmap.values.max() == pytest.approx(1, abs=0.05)
        found = np.array(np.unravel_index(heatmap.values.argmax(), heatmap.values.shape)) + 0.5
        scale = np.divide((2100, 1100), heatmap.values.shape)
        centre = np.array(slide_map.geometry.centre_of(77, 33))
        assert (np.abs(found * scale - 0.5 - centre) <= scale / 2 + 4).all()
        assert (heatmap.values > 0.5).mean() < 0.02
    with tifffile.TiffFile(slide_map.save_pyramid("dark.ome.tif")) as file:
        assert [level.asarray().max() >= 220 for level in file.series[0].levels] == [True] * 4


def test_a_slide_that_is_none_is_one_line(slide):
    (slide.parent / "note.tif").write_text("no slide")
    ran = fcvgg_command("stream", "note.tif", "-o", "scores.zarr", "--model", "demo")
    assert ran.exit_code == 2
    assert "note.tif" in ran.stderr
    assert not (slide.parent / "scores.zarr").exists()


def test_bands_are_chosen(slide):
    bands = np.moveaxis(np.asarray(demo_photograph().resize((200, 168))), -1, 0)
    options = {"photometric": "minisblack", "metadata": {"axes": "CYX"}}
    tifffile.imwrite("scene.tif", np.concatenate([bands[:1], bands]), **options)
    stream = ("stream", "scene.tif", "--model", "demo", "-o")
    ran = fcvgg_command(*stream, "all.zarr")
    assert ran.exit_code == 2
    assert "has four bands" in ran.stderr
    ran = fcvgg_command(*stream, "bands.zarr", "--bands", "1,2,3")
    assert ran.exit_code == 0, ran.output
    fcvgg_command("stream", slide, "-o", "scores.zarr", "--model", "demo")
    chosen, whole = (open_store(name).array[:] for name in ("bands.zarr", "scores.zarr"))
    np.testing.assert_allclose(chosen, whole, rtol=1e-5, atol=1e-6)
    ran = fcvgg_command("heatmap", "bands.zarr", "--output", "pictures")  # on the same bands
    assert ran.exit_code == 0, ran.output
    ran = fcvgg_command(*stream, "bands.zarr", "--bands", "3,2,1")
    assert ran.exit_code == 2
    assert "holds another score map" in ran.stderr
    ran = fcvgg_command(*stream, "none.zarr", "--bands", "red")
    assert ran.exit_code == 2
    assert "'red' is not a list of channel indices" in ran.stderr


def test_no_picture_takes_the_place_of_another_and_the_others_are_made(slide):
    (slide.parent / "a").mkdir()
    ran = fcvgg_command("stream", slide, "-o", "a/scores.zarr", "--model", "demo")
    assert ran.exit_code == 0, ran.output
    shutil.copytree("a", "b")
    shutil.copytree("a/scores.zarr", "d.zarr")
    ran = fcvgg_command("heatmap", "a/scores.zarr", "b/scores.zarr", "d.zarr", "-o", "pictures")
    assert ran.exit_code == 2
    said = " ".join(ran.output.split())
    assert "b/scores.zarr and a/scores.zarr would both be written to" in said
    names = sorted(path.name for path in (slide.parent / "pictures").iterdir())
    endings = ("-heatmap.ome.tif", "-heatmap.png")
    assert names == [f"{stem}{ending}" for stem in ("d", "scores") for ending in endings]


def test_a_map_of_some_classes_is_known_by_the_networks_indices(slide, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.append(nn.Linear(16, 5))
    net = fcvgg.convert(model, input_size=32, activation="independent_logits", verify=False)
    x = torch.randn(3, 64, 80)
    store = fcvgg.stream(net, x, out=tmp_path / "some.zarr", classes=[3, 1])
    chosen = SlideMap(store, 1)
    assert (chosen.index, chosen.label) == (1, "class 1")
    np.testing.assert_allclose(chosen.cells, net.score_map(x).probabilities()[1], atol=1e-5)
    assert SlideMap(store).index in (1, 3)
    with pytest.raises(fcvgg.errors.CategoryError, match=r"a class of .* \(3, 1\), got 2"):
        SlideMap(store, 2)


def test_one_class_of_logits_is_shown_as_its_probability(tmp_path):
    """The softmax's denominator over all classes stands beside it."""
    net = fcvgg.convert(seeded(SmallVGG), categories=list("abcde"))
    x = images(3, 150, 90)
    expected = net.score_map(x)
    for memory in ("1GiB", "26MiB"):  # blocks of columns too
        store = fcvgg.stream(net, x, out=tmp_path / memory, classes=["d", "b"], memory=memory)
        again = open_store(tmp_path / memory)
        assert store.array.shape == again.array.shape == (2, *expected.scores.shape[1:])
        for name in "bd":
            shown = SlideMap(again, name)
            probabilities = expected.probabilities()["abcde".index(name)]
            np.testing.assert_allclose(shown.cells, probabilities, atol=1e-6)
        assert again.heatmap("b").values.shape == (150, 90)
        with pytest.raises(fcvgg.errors.CategoryError, match=r"a class of .* \(3, 1\), got 2"):
            SlideMap(again, 2)
    # a map that an older version began is finished without, and says what it lacks
    shutil.rmtree(tmp_path / "1GiB" / "normalizer")
    (tmp_path / "1GiB" / "fcvgg-progress.json").unlink()
    store = fcvgg.stream(net, x, out=tmp_path / "1GiB", classes=["d", "b"])
    np.testing.assert_allclose(store.array[0], expected.scores[3], atol=1e-6)
    with pytest.raises(
        fcvgg.errors.CategoryError, match=r"written by an older version, .*; stream the"
    ):
        SlideMap(store, "d")


def test_half_precision_keeps_the_denominator_exact():
    net = fcvgg.convert(seeded(SmallVGG, dtype=torch.float32)).bfloat16()
    some = fcvgg.stream(net, images(3, 60, 60).bfloat16(), classes=[1])
    whole = fcvgg.stream(net, images(3, 60, 60).bfloat16())
    expected = whole.probabilities()[1:2]
    torch.testing.assert_close(some.probabilities(), expected, rtol=1e-5, atol=0)


def test_the_most_frequent_class_of_a_map_of_classes(slide, tmp_path):
    options = ("--model", "demo", "--classes", "argmax")
    ran = fcvgg_command("stream", slide, "-o", "best.zarr", *options)
    assert ran.exit_code == 0, ran.output
    store = open_store("best.zarr", writable=True)
    store.array[:] = -1  # no data
    store.array[0, :2] = 1
    store.array[0, 2:5] = 0
    found = SlideMap(store)
    assert found.index == 0
    assert np.nansum(found.cells) == 3
    ran = fcvgg_command("heatmap", "best.zarr", "--target", "background")
    share = "the best class of 60.0% of the cells"
    assert share in " ".join(ran.output.split())


@pytest.mark.parametrize("kept", ["argmax", "top5", None])
def test_a_map_of_labels_is_shown_in_one_colour_per_class(slide, kept):
    """As a thumbnail with a legend, and as a pyramid with a table of colours."""
    model = seeded(SmallVGG)
    net = fcvgg.convert(model, categories=list("abcde"), preprocess=HALVED)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    last.bias.data -= net.score_map(slide).average()  # every class wins cells
    store = fcvgg.stream(net, slide, out="best.zarr", classes=kept)
    ran = fcvgg_command("heatmap", "best.zarr", *(("--figure", "labels") if kept is None else ()))
    assert ran.exit_code == 0, ran.output
    written = slide.parent / "best-labels.ome.tif"
    with Image.open(slide.parent / "best-labels.png") as picture:
        assert picture.width > picture.height / 2
    scores = net.score_map(slide)
    labels = scores.label_map().numpy()
    assert len(np.unique(labels)) > 2
    most = int(np.bincount(labels.ravel()).argmax())
    share = share_text((labels == most).mean())
    assert f"best.zarr: 168x200 pixels, {'abcde'[most]} {share}" in " ".join(ran.output.split())
    colours = class_colours(5)
    with tifffile.TiffFile(written) as file:
        (series,) = file.series
        assert [level.shape for level in series.levels] == [(168, 200)]
        table = file.pages[0].colormap
        np.testing.assert_array_equal(table.T[:5], colours.astype(np.uint16) * 257)
        assert file.pages[0].tags["GDAL_NODATA"].value == "255"
        names = ", ".join(f"{i} {'abcde'[i]}" for i in np.unique(labels))
        assert f"classes: {names}" in file.ome_metadata
        pixels = series.levels[0].asarray()
    centres = [
        [round(scores.geometry.centre_of(i, i)[axis]) for i in range(n)]
        for axis, n in enumerate(labels.shape)
    ]
    np.testing.assert_array_equal(pixels[np.ix_(*centres)], labels)
    half = scores.geometry.stride[0] // 2
    assert (pixels[: centres[0][0] - half] == 255).all()  # no cell in the margin
    ax = store.plot_labels()
    drawn = np.asarray(ax.images[-1].get_array())
    np.testing.assert_allclose(drawn[labels == most][0, :3], colours[most] / 255)
    assert len(ax.images) == 2  # the slide lies under it
    plt.close("all")


def test_a_band_of_rows_is_shown_where_it_lies(slide):
    net = fcvgg.convert(seeded(SmallVGG), preprocess=HALVED)
    whole = fcvgg.stream(net, slide, out="whole.zarr")
    band = fcvgg.stream(net, slide, out="band.zarr", rows=(4, 9))
    expected, found = (SlideMap(store, 1).cells for store in (whole, band))
    np.testing.assert_allclose(found[4:9], expected[4:9], atol=1e-6)
    assert found.shape == expected.shape
    assert np.isnan(np.delete(found, range(4, 9), 0)).all()


def test_labels_that_cannot_be_known_are_refused(slide):
    net = fcvgg.convert(seeded(SmallVGG), preprocess=HALVED)
    store = fcvgg.stream(net, slide, out="some.zarr", classes=[1, 2])
    with pytest.raises(fcvgg.errors.CategoryError, match=r"got some classes; stream with classes="):
        store.plot_labels()


def test_a_store_shows_itself(slide):
    net = fcvgg.load("demo", verify=False)
    store = fcvgg.stream(net, slide, out="scores.zarr")
    assert (
        repr(store) == f"ScoreStore('scores.zarr': {'x'.join(map(str, store.array.shape))} scores)"
    )
    expected = net.heatmap("slide.tif", "face")
    heatmap = store.heatmap("face")
    assert (heatmap.label, heatmap.values.shape) == ("face", expected.values.shape)
    np.testing.assert_allclose(heatmap.values, expected.values, atol=1e-4)


def test_a_heatmap_of_nothing_is_refused_before_the_model_is_loaded(slide):
    for command in ("heatmap", "classify"):
        ran = fcvgg_command(command, "nothing.zarr", "--model", "vgg16")
        assert ran.exit_code == 2
        assert "there is no image file nothing.zarr" in " ".join(ran.output.split())


def test_a_thumbnail_is_averaged() -> None:
    """The nearest pixels of a fine pattern would show it coarser than it is, and as strongly."""
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 900, 3), np.uint8)
    source = strip_source(pixels)
    small = np.asarray(thumbnail(source, (120, 90)), float)
    exact = pixels.reshape(120, 10, 90, 10, 3).mean((1, 3))  # of all pixels, not of some
    np.testing.assert_allclose(small, exact, atol=0.51)
    assert np.array_equal(thumbnail(source, (1200, 900)), pixels)


def test_a_thumbnail_is_read_from_the_smallest_level_that_holds_it(slide) -> None:
    """Each level has its own brightness, which tells them apart; one of another shape is left."""
    levels = [np.full((640 // n, 480 // n, 3), 40 * n, np.uint8) for n in (1, 2, 4)]
    levels.append(np.full((80, 80, 3), 7, np.uint8))
    with tifffile.TiffWriter("levels.tif") as file:
        for i, pixels in enumerate(levels):
            kind = {"subifds": 3} if i == 0 else {"subfiletype": 1}
            file.write(pixels, photometric="rgb", tile=(64, 64), **kind)
    for size, value in (((640, 480), 40), ((321, 241), 40), ((320, 240), 80), ((40, 30), 160)):
        small = np.asarray(thumbnail(open_image("levels.tif"), size))
        assert small.shape == (*size, 3)
        assert (small == value).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_pixels_without_data_do_not_count_in_a_thumbnail(tmp_path, dtype) -> None:
    """A stored map remembers how its image was opened."""
    pixels = np.random.default_rng(0).integers(1, 256, (64, 64, 3)).astype(dtype)
    pixels[:6] = pixels[6, ::2] = 0
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    preprocess = fcvgg.Preprocess((0.5,) * 3, (0.2,) * 3, value_range=(0, 255))
    net = fcvgg.convert(seeded(SmallVGG), preprocess=preprocess)
    source = open_image(tmp_path / "a.tif", nodata=0)
    slide_map = SlideMap(fcvgg.stream(net, source, out=tmp_path / "a.zarr", classes=[0]))
    again = slide_map.source()
    np.testing.assert_array_equal(again.whole(), source.whole())
    with pytest.raises(fcvgg.FcvggError, match=r"another score map: its nodata is \"0.0\", not"):
        fcvgg.stream(net, tmp_path / "a.tif", out=tmp_path / "a.zarr", classes=[0])
    shown = np.asarray(slide_map.heatmap(again, 32).image, float)
    assert (shown[:3] == 0).all()
    expected = np.nanmean(source.whole()[6:].reshape(29, 2, 32, 2, 3), (1, 3))
    low, high = (0, 255) if dtype == np.uint8 else np.nanquantile(expected, (0.01, 0.99))
    expected = ((expected - low) * 255 / (high - low)).clip(0, 255)
    np.testing.assert_allclose(shown[3:], expected, atol=0.6)


def test_bands_that_are_no_colours_have_no_thumbnail(slide):
    pixels = np.zeros((40, 50, 5), np.uint8)
    tifffile.imwrite("five.tif", pixels, photometric="minisblack", planarconfig="contig")
    source = open_image("five.tif", bands=[0, 1, 2, 3, 4])
    assert thumbnail(source, (10, 10)) is None


def test_an_interrupted_stream_says_how_far_it_is_and_the_same_call_resumes(slide, monkeypatch):
    tifffile.imwrite("tall.tif", np.asarray(demo_photograph().resize((200, 1400))))
    stream = ("stream", "tall.tif", "-o", "scores.zarr", "--model", "demo")
    write = ScoreStore.write

    def interrupted(store, block, row, cells, mark=True):
        if row >= 96:
            raise KeyboardInterrupt
        write(store, block, row, cells, mark)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreStore, "write", interrupted)
        ran = fcvgg_command(*stream)
    store = open_store("scores.zarr")
    rows = store.array.shape[-2]
    assert 0 < store.finished[0] < rows
    assert store.share == store.finished[0] / rows
    assert (ran.exit_code, ran.stdout) == (130, "")
    assert ran.stderr == (
        f"fcvgg: error: interrupted; {store.share:.0%} of scores.zarr is finished and kept, "
        "the same call resumes\n"
    )
    ran = fcvgg_command(*stream)
    assert ran.exit_code == 0, ran.output
    assert f"\nresumed at {store.share:.0%}\nwrote scores.zarr\n" in ran.stdout
    ran = fcvgg_command(*stream)
    assert ran.stdout.endswith("\nscores.zarr was complete already\n")
    assert "without data" not in ran.stdout
    assert open_store("scores.zarr").complete
    assert open_store("scores.zarr").share == 1


@pytest.mark.parametrize("classes", [(), ("--classes", "argmax"), ("--classes", "top5")])
def test_the_share_of_cells_without_data_is_said(slide, classes):
    pixels = np.asarray(demo_photograph().resize((200, 168))).copy()
    pixels[pixels == 7] = 8
    pixels[:20, :20] = 7
    tifffile.imwrite("bare.tif", pixels)
    ran = fcvgg_command(
        *("stream", "bare.tif", "-o", "bare.zarr", "--model", "demo", "--nodata", "7", *classes)
    )
    assert ran.exit_code == 0, ran.output
    bare = fcvgg.load("demo").score_map(open_image("bare.tif", nodata=7)).scores[0].isnan()
    share = bare.double().mean().item()
    assert 0 < share < 1
    assert open_store("bare.zarr").without_data == pytest.approx(share)
    assert f", {share:.1%} of the cells without data\nwrote bare.zarr\n" in ran.stdout


def test_the_share_of_cells_computed_is_said_where_it_is_known(slide, monkeypatch):
    np.save("mask.npy", np.arange(21)[:, None].repeat(25, 1) < 10)
    tifffile.imwrite("small.tif", np.asarray(demo_photograph().resize((200, 168))))
    where = ("--model", "demo", "--classes", "argmax", "--where", "mask.npy")
    ran = fcvgg_command("stream", "small.tif", "-o", "some.zarr", *where)
    assert ran.exit_code == 0, ran.output
    share = 1 - open_store("some.zarr").without_data
    assert 0.3 < share < 0.7
    assert f", {share:.1%} of the cells computed\nwrote some.zarr\n" in ran.stdout
    monkeypatch.setattr(ScoreStore, "without_data", 0.0)  # as of labels of one class
    ran = fcvgg_command("stream", "small.tif", "-o", "some.zarr", *where)
    assert ran.exit_code == 0, ran.output
    assert "computed" not in ran.stdout


def test_a_stream_interrupted_before_it_began_says_no_more(slide, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fcvgg.streaming.execution.stream", interrupt)
    ran = fcvgg_command("stream", slide, "-o", "scores.zarr", "--model", "demo")
    assert (ran.exit_code, ran.stderr) == (130, "fcvgg: error: interrupted\n")


def test_options_that_a_score_map_does_not_take_are_named(slide):
    fcvgg_command("stream", slide, "-o", "scores.zarr", "--model", "demo")
    shown = ("heatmap", "scores.zarr", "--target", "face", "--output", "pictures")
    ran = fcvgg_command(*shown, "--bands", "2,1,0", "-m", "demo", "--range", "0,1")
    assert ran.exit_code == 0, ran.output
    assert "as it was streamed, without --range, --model, --bands" in ran.stderr
    assert "without" not in fcvgg_command(*shown).stderr


def test_a_folder_without_images_is_refused(slide):
    (slide.parent / "photos").mkdir()
    for command in ("classify", "heatmap"):
        ran = fcvgg_command(command, "photos", "--model", "demo")
        assert ran.exit_code == 2
        assert "the folder photos has no images; --recursive also" in " ".join(ran.stderr.split())


def test_a_broken_nodata_of_a_store_is_refused(slide):
    fcvgg_command("stream", slide, "-o", "scores.zarr", "--model", "demo")
    for nodata in ("everything", ["mask"], 5):
        group = zarr.open_group("scores.zarr", mode="r+")
        group.attrs["fcvgg"] = {**group.attrs["fcvgg"], "nodata": nodata}
        with pytest.raises(fcvgg.FcvggError, match="nodata must be null, 'mask' or a number"):
            open_store("scores.zarr")
