"""Polygons of cells and regions, compared with shapely by coordinates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from nets import SmallVGG, seeded

import fcvgg
from fcvgg.results.geojson import ClassCells
from fcvgg.results.score_map import ScoreMap

shapely = pytest.importorskip("shapely")

PREPROCESS = fcvgg.Preprocess((0.5,) * 3, (0.5,) * 3)
UNIT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@pytest.fixture(scope="module")
def net() -> Any:
    model = seeded(SmallVGG).float()
    names = ["grass", "brick", "sky", "sea", "sand"]
    return fcvgg.convert(model, preprocess=PREPROCESS, verify=False, categories=names)


def pixels(height: int, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def polygons(collection: dict[str, Any]) -> list[Any]:
    return [shapely.geometry.shape(feature["geometry"]) for feature in collection["features"]]


def regions(chosen: Any) -> list[Any]:
    cells = ClassCells(np.asarray(chosen, float), "a", 0, UNIT)
    return polygons(cells.to_geojson(None, 0.5, "regions", False))


def union_of(chosen: Any) -> Any:
    return shapely.union_all([shapely.box(x, y, x + 1, y + 1) for y, x in np.argwhere(chosen)])


SHAPES = {
    "none": ["..."],
    "one": ["x"],
    "corner": ["x.", ".x"],
    "hole": ["xxx", "x.x", "xxx"],
    "hole at a corner": [".xxx", "x..x", "x.xx", "xxx."],
    "holes at a corner": ["xxxx", "x.xx", "xx.x", "xxxx"],
    "island": ["xxxxx", "x...x", "x.x.x", "x...x", "xxxxx"],
    "bay": ["xxx", "x.x", "xx."],
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    chosen = np.array([[letter == "x" for letter in row] for row in SHAPES[name]])
    check(chosen, regions(chosen))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_random_shapes(share: float) -> None:
    for seed in range(6):
        chosen = np.random.default_rng(seed).random((17, 23)) < share
        check(chosen, regions(chosen))


def check(chosen: np.ndarray[Any, Any], found: list[Any]) -> None:
    assert all(polygon.is_valid and polygon.geom_type == "Polygon" for polygon in found)
    # counterclockwise around, clockwise in holes
    assert all(shapely.is_ccw(polygon.exterior) for polygon in found)
    assert not any(shapely.is_ccw(hole) for polygon in found for hole in polygon.interiors)
    assert sum(polygon.area for polygon in found) == chosen.sum()
    assert shapely.union_all(found).equals(union_of(chosen))
    for polygon in found:  # without corners on a straight line
        for ring in (polygon.exterior, *polygon.interiors):
            assert shapely.get_num_points(shapely.simplify(ring, 0)) == len(ring.coords)
    measure = pytest.importorskip("skimage.measure")
    assert len(found) == measure.label(chosen, connectivity=1).max()


def test_cells_lie_around_their_centres(net: Any) -> None:
    score_map = net.score_map(pixels(90, 70))
    probabilities = score_map.probabilities()[1]
    threshold = float(probabilities.median())
    collection = score_map.to_geojson(kind="cells", target="brick", threshold=threshold)
    chosen = (probabilities >= threshold).nonzero().tolist()
    assert 0 < len(chosen) < probabilities.numel()
    for (row, col), polygon in zip(chosen, polygons(collection), strict=True):
        y, x = (point + 0.5 for point in net.geometry.centre_of(row, col))
        down, across = net.geometry.stride
        box = (x - across / 2, y - down / 2, x + across / 2, y + down / 2)
        np.testing.assert_allclose(polygon.bounds, box, rtol=0, atol=1e-9)
        assert polygon.area == down * across
    first = collection["features"][0]["properties"]
    assert first["objectType"] == "tile"
    assert first["classification"]["name"] == first["class"] == "brick"
    assert all(0 <= n <= 255 for n in first["classification"]["color"])
    expected = pytest.approx(float(probabilities[tuple(chosen[0])]))
    assert first["measurements"] == {"probability": expected}


def test_regions_and_files(net: Any, tmp_path: Path) -> None:
    score_map = net.score_map(pixels(90, 70))
    share = float(score_map.probabilities()[score_map.index_of(None)].median())
    cells = score_map.to_geojson(kind="cells", threshold=share)
    found = score_map.to_geojson(tmp_path / "regions.geojson", threshold=share)
    assert json.loads((tmp_path / "regions.geojson").read_text()) == found
    assert "crs" not in found
    assert shapely.union_all(polygons(found)).equals(shapely.union_all(polygons(cells)))
    assert 0 < len(found["features"]) < len(cells["features"])
    for feature, polygon in zip(found["features"], polygons(found)):
        measured = feature["properties"]["measurements"]
        assert feature["properties"]["objectType"] == "annotation"
        assert measured["cells"] * np.prod(net.geometry.stride) == polygon.area
        assert share <= measured["probability"] <= measured["highest probability"]


def test_an_image_that_is_rescaled_keeps_its_pixels(net: Any) -> None:
    image = pixels(120, 90)
    collection = net.score_map(image, scale=60).to_geojson(kind="cells", threshold=0)
    y, x = ((point + 0.5) * 1.5 for point in net.geometry.centre_of(0, 0))
    assert polygons(collection)[0].centroid.coords[0] == pytest.approx((x, y), rel=0, abs=1e-9)


def test_cells_without_data_are_left_out() -> None:
    cells = ClassCells(np.array([[np.nan, 0.7], [np.nan, 0.2]]), "a", 3, UNIT)
    (polygon,) = polygons(cells.to_geojson(None, 0.5, "regions", False))
    assert polygon.equals(shapely.box(1, 0, 2, 1))


def test_what_cannot_be_meant(net: Any, tmp_path: Path) -> None:
    score_map = net.score_map(pixels(90, 70))
    for options, message in (
        ({"threshold": 2}, r"^threshold must be"),
        ({"kind": "boxes"}, r"^kind must be"),
        ({"path": 0.5}, r"^path must be the name of a file, got 0.5; pass threshold=0.5$"),
        ({"path": tmp_path / "a.png"}, r"^path must be"),
        ({"target": "gravel"}, "gravel"),
    ):
        with pytest.raises(fcvgg.FcvggError, match=message):
            score_map.to_geojson(**options)
    assert not list(tmp_path.iterdir())
    nothing = ScoreMap(torch.full((2, 3, 3), torch.nan), net.geometry, (40, 40), (40, 40))
    with pytest.raises(fcvgg.ImageError, match="the score map must have a cell with data"):
        nothing.to_geojson()


# -- of slides and scenes -------------------------------------------------------------------------


def test_a_level_of_a_slide_is_shown_on_level_0(net: Any, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    image = pixels(280, 200)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        for level in (image, image[::2, ::2]):
            options = {"tile": (32, 32), "metadata": None, "subfiletype": int(level is not image)}
            file.write(level, photometric="rgb", **options)
    slide = fcvgg.open_image(tmp_path / "slide.tif", 1)
    store = fcvgg.stream(net, slide, out=tmp_path / "m.zarr")
    options = {"kind": "cells", "threshold": 0, "target": 1}
    found = [made.to_geojson(**options) for made in (store, fcvgg.stream(net, slide))]
    y, x = ((point + 0.5) * 2 for point in net.geometry.centre_of(3, 5))
    for collection in (*found, net.score_map(slide).to_geojson(**options)):
        polygon = polygons(collection)[3 * store.array.shape[-1] + 5]
        np.testing.assert_allclose(polygon.centroid.coords[0], (x, y), rtol=0, atol=1e-9)
        assert polygon.area == 4 * np.prod(net.geometry.stride)
    again = fcvgg.stream(net, slide, where=store.to_geojson(**{**options, "threshold": 0.21}))
    np.testing.assert_array_equal(  # polygons lead back to their cells
        again.has_data, fcvgg.stream(net, slide).probabilities()[1] >= 0.21
    )
    classes = fcvgg.stream(net, slide, out=tmp_path / "classes.zarr", classes="argmax")
    labels = classes.to_geojson(target=1)
    chosen = polygons(labels)
    assert all(set(one["properties"]["measurements"]) == {"cells"} for one in labels["features"])
    assert all("probability" not in one["properties"] for one in labels["features"])
    assert store.has_data.all()
    assert classes.has_data.all()
    best = np.argwhere(classes.array[:] == 1)
    assert sum(polygon.area for polygon in chosen) == len(best) * 4 * np.prod(net.geometry.stride)
    one = fcvgg.stream(net, slide, out=tmp_path / "one.zarr", classes=["brick"])
    assert one.to_geojson(**{**options, "target": "brick"})["features"][0]["properties"][
        "probability"
    ] == pytest.approx(found[0]["features"][0]["properties"]["probability"], rel=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_a_scene_gives_its_own_coordinates(net: Any, tmp_path: Path, turned: bool) -> None:
    rasterio = pytest.importorskip("rasterio")
    transform = rasterio.Affine(9.8, 2.0 * turned, 500_000.25, 1.5 * turned, -10.2, 5_000_000.5)
    image = pixels(80, 100)
    profile = {"driver": "GTiff", "height": 80, "width": 100, "count": 3, "dtype": "uint8"}
    with rasterio.open(
        tmp_path / "s.tif", "w", crs="EPSG:32633", transform=transform, **profile
    ) as file:
        file.write(np.moveaxis(image, 2, 0))
    store = fcvgg.stream(net, tmp_path / "s.tif", out=tmp_path / "m.zarr")
    made = store, fcvgg.stream(net, tmp_path / "s.tif"), net.score_map(tmp_path / "s.tif")
    y, x = (point + 0.5 for point in net.geometry.centre_of(0, 0))
    for one in made:
        collection = one.to_geojson(kind="cells", threshold=0, target=0)
        name = collection["crs"]["properties"]["name"]
        assert name == "urn:ogc:def:crs:EPSG::32633"
        polygon = polygons(collection)[0]
        centre = ~transform @ polygon.centroid.coords[0]
        np.testing.assert_allclose(centre, (x, y), rtol=0, atol=1e-9)
        assert shapely.is_ccw(polygon.exterior)
        plain = one.to_geojson(kind="cells", threshold=0, target=0, pixels=True)
        assert plain["crs"] is None
        assert polygons(plain)[0].centroid.coords[0] == pytest.approx((x, y))


def test_the_command_line_writes_polygons(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image = fcvgg.demo.demo_photograph()
    image.save("photo.png")
    assert run("stream", "photo.png", "-m", "demo", "-o", "faces.zarr").exit_code == 0
    options = ("-t", "face", "--geojson", "regions,0.5")
    ran = run("heatmap", "photo.png", "faces.zarr", "-m", "demo", *options)
    assert ran.exit_code == 0, ran.stderr
    assert "wrote faces-heatmap.geojson" in ran.stdout
    found = [json.loads(Path(f"{name}-heatmap.geojson").read_text()) for name in ("photo", "faces")]
    assert len(found[0]["features"]) == len(found[1]["features"]) > 0
    assert found[1]["features"][0]["properties"]["class"] == "face"
    ran = run("heatmap", "photo.png", "-m", "demo", "--geojson", "windows")
    assert ran.exit_code == 2
    assert "is not regions, cells or a probability" in " ".join(ran.stderr.split())
