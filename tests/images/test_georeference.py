"""Where streamed images lie on the earth: in stores, and in the heatmaps that are made of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from nets import SmallVGG, seeded
from PIL import Image

import fcvgg
from fcvgg import FcvggError, open_image
from fcvgg.geometry import Geometry
from fcvgg.images.lazy.georeference import FIELDS, Georeference
from fcvgg.results.colours import class_colours
from fcvgg.streaming.score_store import ScoreStore, open_store
from fcvgg.streaming.slide_maps import SlideLabels, SlideMap

rasterio = pytest.importorskip("rasterio")
tifffile = pytest.importorskip("tifffile")

UTM = (10.0, 0.0, 5e5, 0.0, -10.0, 4.6e6)
DEGREES = (0.0001, 0.0, 14.123456789, 0.0, -0.0001, 48.987654321)
TURNED = (8.7, -5.1, 5e5, -5.2, -8.6, 4.6e6)
SOUTH_UP = (10.0, 0.0, 5e5, 0.0, 10.0, 4.6e6)
LAEA = "+proj=laea +lat_0=10 +lon_0=20 +datum=WGS84"
SINUSOIDAL = "+proj=sinu +R=6371007.181 +units=m"


@pytest.fixture(scope="module")
def net() -> fcvgg.FullyConvolutional:
    preprocess = fcvgg.Preprocess((0.5,) * 3, (0.2,) * 3)
    return fcvgg.convert(seeded(SmallVGG), preprocess=preprocess, categories=tuple("abcde"))


def pixels(height: int = 90, width: int = 110) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(1, 255, (3, height, width), np.uint8)


def scene(path: Path, crs: Any, transform: Any, values: Any = None, **options: Any) -> Path:
    """A GeoTIFF as GDAL writes it."""
    values = pixels() if values is None else values
    place = {} if transform is None else {"transform": rasterio.Affine(*transform)}
    count, height, width = values.shape
    size = {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", photometric="RGB", crs=crs, **size, **place, **options
        ) as file:
            file.write(values)
    return path


def place_of(path: Path) -> tuple[Any, list[float]]:
    """The system and transform that rasterio finds in a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path) as file:
            return file.crs, list(file.transform)[:6]


def applied(transform: Any, point: tuple[float, float]) -> tuple[float, float]:
    """A point ``(x, y)`` by an affine transform, whose operator has changed with its versions."""
    a, b, c, d, e, f = list(transform)[:6]
    x, y = point
    return a * x + b * y + c, d * x + e * y + f


def store_of(net: Any, source: Any, folder: Path, **options: Any) -> ScoreStore:
    return fcvgg.stream(net, source, out=folder / "s.zarr", **options)


def pyramid_of(store: ScoreStore) -> Path:
    return SlideMap(store, "a").save_pyramid(store.path.with_name("h.ome.tif"))


@pytest.fixture(params=["path", "dataset"])
def opened(request: Any) -> Iterator[Callable[[Path], Any]]:
    datasets: list[Any] = []

    def open_dataset(path: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            datasets.append(rasterio.open(path))
        return datasets[-1]

    yield open_dataset if request.param == "dataset" else lambda path: path
    for dataset in datasets:
        dataset.close()


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32633", UTM),
        ("EPSG:32633", TURNED),
        ("EPSG:32633", SOUTH_UP),
        ("EPSG:4326", DEGREES),
        ("EPSG:3857", UTM),
        ("EPSG:2056+5728", UTM),
        ("ESRI:54009", UTM),
        (LAEA, UTM),
        (SINUSOIDAL, UTM),
        (None, UTM),
        ("EPSG:32633", None),
    ],
    ids=str,
)
def test_heatmaps_lie_where_the_image_lies(
    net: Any, tmp_path: Path, opened: Any, crs: Any, transform: Any
) -> None:
    system = None if crs is None else rasterio.CRS.from_user_input(crs)
    path = scene(tmp_path / "scene.tif", system, transform)
    expected = place_of(path)
    store = store_of(net, opened(path), tmp_path)
    heatmap = pyramid_of(store)
    found = place_of(heatmap)
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-12, atol=1e-9)
    description = open_store(store.path).description
    if crs is None:
        assert description["crs"] is None
    else:
        assert rasterio.CRS.from_user_input(description["crs"]) == expected[0]
    if transform is None:
        assert description["transform"] is None is description["cell_transform"]
    else:
        np.testing.assert_allclose(description["transform"], transform, rtol=1e-12, atol=1e-9)
    assert description["source"] == str(path.resolve())
    with tifffile.TiffFile(heatmap) as file:
        assert file.is_ome


def test_class_labels_are_a_raster_with_colours_and_nodata(net: Any, tmp_path: Path) -> None:
    path = scene(tmp_path / "scene.tif", rasterio.CRS.from_epsg(32633), UTM)
    store = store_of(net, path, tmp_path, classes="argmax")
    labels = SlideLabels(store).save_pyramid(tmp_path / "labels.ome.tif")
    found, expected = place_of(labels), place_of(path)
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-12, atol=1e-9)
    with rasterio.open(labels) as file:
        assert (file.nodata, file.dtypes) == (255, ("uint8",))
        colours = file.colormap(1)
        shown = [colours[i][:3] for i in range(5)]
        values = file.read(1, masked=True)
    np.testing.assert_array_equal(shown, class_colours(5))
    y, x = (round(n) for n in Geometry.from_dict(store.description["geometry"]).centre_of(1, 2))
    assert values[y, x] == store.array[1, 2]
    assert values.mask[0, 0]  # beyond the cells


KEYS = 34735
POINTS = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 2, 3072, 0, 1, 32633)
AREAS = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633)


def tagged(path: Path, **tags: Any) -> Path:
    """A TIFF with tags as they are, of which some may be broken."""
    codes = {"scale": (33550, 12), "ties": (33922, 12), "matrix": (34264, 12), "keys": (KEYS, 3)}
    codes |= {"doubles": (34736, 12), "text": (34737, 2), "orientation": (274, 3)}
    extra = [(*codes[name], len(value), value, True) for name, value in tags.items()]
    tifffile.imwrite(
        path, pixels().transpose(1, 2, 0), photometric="rgb", metadata=None, extratags=extra
    )
    return path


SCALE, TIES = (10.0, 20.0, 0.0), (3.0, 7.0, 0.0, 5e5, 4.6e6, 0.0)
MATRIX = (10.0, 1.0, 0.0, 5e5, 2.0, -20.0, 0.0, 4.6e6, *(0.0,) * 7, 1.0)


@pytest.mark.parametrize(
    "tags",
    [
        {"scale": SCALE, "ties": TIES, "keys": AREAS},
        {"scale": SCALE, "ties": TIES, "keys": POINTS},
        {"scale": (10.0, -20.0, 0.0), "ties": TIES, "keys": AREAS},
        {"scale": SCALE, "ties": TIES, "matrix": MATRIX, "keys": AREAS},
        {"matrix": MATRIX, "keys": AREAS},
        {"matrix": MATRIX, "keys": POINTS},
        {"scale": (10.0, 0.0, 0.0), "matrix": MATRIX, "keys": AREAS},
    ],
    ids=lambda tags: "-".join(tags),
)
def test_tags_mean_what_gdal_takes_them_for(net: Any, tmp_path: Path, tags: Any) -> None:
    path = tagged(tmp_path / "scene.tif", **tags)
    expected = place_of(path)
    found = place_of(pyramid_of(store_of(net, path, tmp_path)))
    assert found[0] == expected[0] == rasterio.CRS.from_epsg(32633)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    "tags",
    [
        {"ties": TIES * 3, "keys": AREAS},  # ground control points
        {"scale": (float("nan"), 1.0, 0.0), "ties": TIES},
        {"scale": (float("inf"), 1.0, 0.0), "ties": TIES},
        {"scale": SCALE, "ties": TIES[:4]},
        {"scale": (10.0,), "ties": TIES},
        {"matrix": (0.0,) * 16},
        {"matrix": MATRIX[:12]},
    ],
    ids=lambda tags: "-".join(tags),
)
def test_a_broken_transform_says_nothing(net: Any, tmp_path: Path, tags: Any) -> None:
    path = tagged(tmp_path / "scene.tif", **tags)
    store = store_of(net, path, tmp_path)
    assert store.description["transform"] is None is store.description["cell_transform"]
    assert place_of(pyramid_of(store))[1] == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "tags",
    [
        {"keys": (1, 1, 0)},
        {"keys": (1, 1, 0, 9, 1024, 0, 1, 1)},  # fewer keys than it says
        {"keys": (1, 1, 0, 1, 1026, 34737, 22, 0), "text": "short"},
        {"keys": (1, 1, 0, 1, 2057, 34736, 1, 5), "doubles": (1.0,)},
        {"keys": (1, 1, 0, 1, 2057, 34736, 1, 0), "doubles": (float("nan"),)},
        {"keys": (1, 1, 0, 1, 2057, 999, 1, 0)},
        {"keys": (1, 1, 0, 4000, *(1024, 0, 1, 1) * 4000)},
    ],
    ids=lambda tags: str(next(iter(tags.values()))[:8]),
)
def test_broken_keys_say_nothing(net: Any, tmp_path: Path, capfd: Any, tags: Any) -> None:
    path = tagged(tmp_path / "scene.tif", scale=SCALE, ties=TIES, **tags)
    store = store_of(net, path, tmp_path)
    assert store.description["geo_keys"] is None is store.description["crs"]
    assert store.description["transform"] == [10.0, 0.0, 5e5 - 30, 0.0, -20.0, 4.6e6 + 140]
    pyramid_of(store)
    assert capfd.readouterr().err == ""


def test_keys_that_gdal_does_not_know_are_kept(net: Any, tmp_path: Path, capfd: Any) -> None:
    keys = (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32767)
    store = store_of(net, tagged(tmp_path / "a.tif", scale=SCALE, ties=TIES, keys=keys), tmp_path)
    assert store.description["geo_keys"]["directory"] == list(keys)
    pyramid_of(store)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_that_are_turned_upright_stay_where_they_are(
    tmp_path: Path, orientation: int
) -> None:
    tags = {"matrix": MATRIX, "keys": AREAS, "orientation": (orientation,)}
    path = tagged(tmp_path / "a.tif", **tags)
    source = open_image(path)
    assert source.georeference is not None
    upright = rasterio.Affine(*source.georeference.transform)
    values = source.whole()
    stored = rasterio.Affine(*place_of(path)[1])
    expected = pixels().transpose(1, 2, 0)
    for y, x in [(0, 0), (5, 17), (40, 80)]:
        col, row = applied(~upright, applied(stored, (x + 0.5, y + 0.5)))
        assert col % 1 == pytest.approx(0.5, abs=1e-6)
        np.testing.assert_array_equal(values[int(row), int(col)], expected[y, x])


@pytest.mark.parametrize("beside", [False, True])
def test_levels_of_a_pyramid(net: Any, tmp_path: Path, opened: Any, beside: bool) -> None:
    path = scene(tmp_path / "a.tif", "EPSG:32633", TURNED, pixels(180, 221))
    with rasterio.Env(TIFF_USE_OVR=beside), rasterio.open(path, "r+") as file:
        file.build_overviews([2], rasterio.enums.Resampling.nearest)
    with rasterio.open(path, overview_level=0) as file:
        size, expected = (file.height, file.width), list(file.transform)[:6]
    assert size == (90, 111)
    store = store_of(net, open_image(opened(path), level=1), tmp_path)
    np.testing.assert_allclose(store.description["transform"], expected, rtol=1e-12, atol=1e-9)
    crs, found = place_of(pyramid_of(store))
    assert crs == rasterio.CRS.from_epsg(32633)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("rows", [None, (2, 5)])
@pytest.mark.parametrize("size", [(90, 110), (20, 70)], ids=["large", "padded"])
def test_cells_lie_where_their_middles_lie(
    net: Any, tmp_path: Path, rows: Any, size: tuple[int, int]
) -> None:
    rows = rows if size[0] > 50 else None
    path = scene(tmp_path / "a.tif", "EPSG:32633", TURNED, pixels(*size))
    description = store_of(net, path, tmp_path, rows=rows).description
    cells = rasterio.Affine(*description["cell_transform"])
    image = rasterio.Affine(*TURNED)
    geometry = net.geometry.placed(size)
    for row in range(3):
        for col in range(2):
            y, x = geometry.centre_of(row + (0 if rows is None else rows[0]), col)
            expected = applied(image, (x + 0.5, y + 0.5))
            np.testing.assert_allclose(applied(cells, (col + 0.5, row + 0.5)), expected, rtol=1e-12)


@pytest.mark.parametrize("points", [(), ((0, 0, 1, 2), (0, 100, 10, 2), (80, 0, 1, 20))])
def test_an_image_without_a_place(net: Any, tmp_path: Path, opened: Any, points: Any) -> None:
    points = [rasterio.control.GroundControlPoint(*point) for point in points]
    options = {"gcps": points} if points else {}
    path = scene(tmp_path / "a.tif", "EPSG:32633" if points else None, None, **options)
    store = store_of(net, opened(path), tmp_path)
    assert [store.description[name] for name in FIELDS] == [None] * 4
    with tifffile.TiffFile(pyramid_of(store)) as file:
        assert not {33550, 33922, 34264, KEYS} & {tag.code for tag in file.pages[0].tags}


def test_the_place_stands_on_the_first_page_of_a_pyramid(net: Any, tmp_path: Path) -> None:
    path = scene(tmp_path / "a.tif", "EPSG:32633", UTM, pixels(90, 1100))
    with tifffile.TiffFile(pyramid_of(store_of(net, path, tmp_path))) as file:
        first, *others = file.series[0].levels
        assert {33550, 33922, KEYS} <= {tag.code for tag in first.keyframe.tags}
        assert len(others) == 2
        assert not any(KEYS in level.keyframe.tags for level in others)


def test_a_description_gives_the_same_place() -> None:
    place = Georeference.of_tags({KEYS: AREAS, 33550: SCALE, 33922: TIES})
    assert place is not None
    again = Georeference.of_tags({code: value for code, _, _, value, _ in place.tags})
    assert again == place


def test_the_command_line_writes_it(net: Any, tmp_path: Path) -> None:
    path = scene(tmp_path / "scene.tif", "EPSG:32633", UTM)
    store = store_of(net, path, tmp_path)
    result = run("heatmap", store.path, "--target", "a", "-o", tmp_path / "out")
    assert result.exit_code == 0
    heatmap = tmp_path / "out" / "s-heatmap.ome.tif"
    assert place_of(heatmap) == (rasterio.CRS.from_epsg(32633), list(UTM))


# -- stores ---------------------------------------------------------------------------------------


def edited(store: ScoreStore, change: Callable[[dict[str, Any]], Any]) -> None:
    path = store.path / "zarr.json"
    metadata = json.loads(path.read_text())
    change(metadata["attributes"]["fcvgg"])
    path.write_text(json.dumps(metadata))


def test_stores_without_a_place_load_and_resume(net: Any, tmp_path: Path) -> None:
    path = scene(tmp_path / "scene.tif", "EPSG:32633", UTM)
    store = store_of(net, path, tmp_path)
    scores = store.array[:]
    edited(store, lambda description: [description.pop(name) for name in FIELDS])
    store.array[:] = np.nan
    (store.path / "fcvgg-progress.json").unlink()
    assert not open_store(store.path).complete
    again = store_of(net, path, tmp_path)
    assert again.complete
    np.testing.assert_array_equal(again.array[:], scores)
    assert place_of(pyramid_of(again))[0] is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crs", 32633),
        ("transform", [1, 2, 3]),
        ("transform", "10 0 0 0 10 0"),
        ("transform", [1, 0, 0, 0, 1, 10**400]),
        ("cell_transform", [1, 0, 0, 0, 1, None]),
        ("geo_keys", []),
        ("geo_keys", {"directory": [1, 1, 0, 1, 1024, 0, 1, 1]}),
        ("geo_keys", {"directory": [1, 1, 0, 1, 1024, 0, 1, -1], "doubles": [], "text": ""}),
        ("geo_keys", {"directory": [1, 1, 0, 1, 1024, 0, 1, 1], "doubles": ["1"], "text": ""}),
        ("geo_keys", {"directory": [1, 1, 0, 1, 1024, 0, 1, 1], "doubles": [], "text": "é"}),
    ],
)
def test_a_store_that_says_anything_else_is_refused(
    net: Any, tmp_path: Path, name: str, value: Any
) -> None:
    store = store_of(net, scene(tmp_path / "a.tif", "EPSG:32633", UTM), tmp_path)
    edited(store, lambda description: description.update({name: value}))
    with pytest.raises(FcvggError, match=f"{name} must be null or "):
        open_store(store.path)


def test_datasets_record_a_path_that_gives_the_same_pixels(tmp_path: Path) -> None:
    path = scene(tmp_path / "a.tif", "EPSG:32633", UTM, pixels(180, 220))
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2], rasterio.enums.Resampling.nearest)
    with rasterio.open(path) as dataset:
        assert open_image(dataset).path == path
        assert open_image(dataset, level=1).level == 1
        with rasterio.vrt.WarpedVRT(dataset, crs="EPSG:4326") as warped:
            assert open_image(warped).path is None
    with rasterio.open(path, overview_level=0) as dataset:
        assert open_image(dataset).path is None
    with rasterio.MemoryFile(path.read_bytes()) as memory, memory.open() as dataset:
        assert open_image(dataset).path is None


# -- nodata ---------------------------------------------------------------------------------------


def half(path: Path) -> Path:
    values = pixels(90, 160)
    values[:, :, :80] = 0
    return scene(path, "EPSG:32633", UTM, values, nodata=0)


@pytest.mark.parametrize("nodata", [0, "file"])
def test_cells_that_see_nodata_have_no_label(
    net: Any, tmp_path: Path, opened: Any, nodata: Any
) -> None:
    path = half(tmp_path / "a.tif")
    made = fcvgg.stream(net, opened(path), nodata=nodata)
    expected = fcvgg.stream(net, open_image(path, nodata=nodata))
    torch.testing.assert_close(made.scores, expected.scores, equal_nan=True)
    sees = [net.geometry.receptive_field_of(0, col)[1] < 80 for col in range(made.scores.shape[2])]
    sees = torch.tensor(sees).expand(made.scores.shape[1:])
    assert torch.equal(made.scores[0].isnan(), sees)
    assert 0 < sees.sum() < sees.numel()
    labels = made.label_map()
    assert torch.equal(labels < 0, sees)
    torch.testing.assert_close(made.average(), made.scores[:, ~sees].mean(1))
    whole = fcvgg.stream(net, path)
    torch.testing.assert_close(made.scores[:, ~sees], whole.scores[:, ~sees])
    store = store_of(net, opened(path), tmp_path, nodata=nodata, classes="argmax")
    np.testing.assert_array_equal(store.array[:], labels.numpy())


def test_nodata_of_arrays_and_pictures(net: Any) -> None:
    values = pixels(60, 70).transpose(1, 2, 0).copy()
    values[10:20, 10:20] = 0
    made = fcvgg.stream(net, values, nodata=0)
    assert made.scores.isnan().any()
    picture = fcvgg.stream(net, Image.fromarray(values), nodata=0)
    torch.testing.assert_close(picture.scores, made.scores, equal_nan=True)


@pytest.mark.parametrize("nodata", [0, "file", float("nan")])
def test_nodata_that_cannot_be_meant(net: Any, tmp_path: Path, nodata: Any) -> None:
    with pytest.raises(fcvgg.ArgumentError, match="nodata must be None for preprocessed floats"):
        fcvgg.stream(net, torch.zeros(3, 60, 60), nodata=nodata)
    source = open_image(half(tmp_path / "a.tif"))
    with pytest.raises(fcvgg.ArgumentError, match="nodata must be None for an image that is open"):
        fcvgg.stream(net, source, nodata=nodata)


@pytest.mark.parametrize("nodata", ["zero", True, (0, 0), np.zeros(2)])
def test_nodata_of_another_kind(net: Any, tmp_path: Path, nodata: Any) -> None:
    for source in (half(tmp_path / "a.tif"), pixels().transpose(1, 2, 0)):
        with pytest.raises(FcvggError, match="nodata must be a number, 'file' or None, got"):
            fcvgg.stream(net, source, nodata=nodata)
