"""Maps of scenes are cloud-optimised GeoTIFFs whose pixels are the cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import SmallVGG, seeded

import fcvgg
from fcvgg.results import geotiff

rasterio = pytest.importorskip("rasterio")
tifffile = pytest.importorskip("tifffile")
zarr = pytest.importorskip("zarr")

PREPROCESS = fcvgg.Preprocess((0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def net() -> Any:
    model = seeded(SmallVGG).float()
    names = ["grass", "brick", "sky", "sea", "sand"]
    return fcvgg.convert(model, preprocess=PREPROCESS, verify=False, categories=names)


def scene(path: Path, height: int, width: int, transform: Any, crs: str | None) -> Path:
    draw = np.random.default_rng(0).integers
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", crs=crs, transform=transform, nodata=0, **profile) as file:
        image = draw(1, 256, (3, height, width), np.uint8)
        image[:, 40:60, 40:60] = 0
        file.write(image)
    return path


UTM = (10.0, 0.0, 500_000.25, 0.0, -10.0, 5_000_000.5)
TURNED = (7.0, 2.0, 1_000.0, 3.0, -8.0, 2_000.0)


@pytest.mark.parametrize(("transform", "crs"), [(UTM, "EPSG:32633"), (TURNED, "EPSG:3857")])
@pytest.mark.parametrize("classes", [None, "argmax", "top5", ["sea"]])
def test_the_pixels_are_the_cells(
    net: Any, tmp_path: Path, transform: Any, crs: str, classes: Any
) -> None:
    affine = rasterio.Affine(*transform)
    path = scene(tmp_path / "scene.tif", 130, 150, affine, crs)
    store = fcvgg.stream(net, path, out=tmp_path / "m.zarr", classes=classes, nodata="file")
    saved = store.save(tmp_path / "map.tif")
    assert saved == tmp_path / "map.tif"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.zarr", "map.tif", "scene.tif"]
    with rasterio.open(saved) as file:
        assert file.crs.to_string() == crs
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        bands = store.array[:].reshape(-1, *store.array.shape[-2:])
        np.testing.assert_array_equal(file.read(), bands)
        assert file.read_masks(file.count).min() == 0  # the hole has no data
        names = {None: net.categories, "argmax": ("class",), "top5": file.descriptions}
        assert file.descriptions == tuple(names[classes] if classes != ["sea"] else classes)
        assert file.descriptions[0] in ("grass", "class", "class 1", "sea")
        for cell in ((0, 0), (11, 7)):
            y, x = (point + 0.5 for point in net.geometry.centre_of(*cell))
            found = ~affine @ (file.transform @ (cell[1] + 0.5, cell[0] + 0.5))
            np.testing.assert_allclose(found, (x, y), rtol=0, atol=1e-9)


def test_maps_in_memory(net: Any, tmp_path: Path) -> None:
    affine = rasterio.Affine(*TURNED)
    path = scene(tmp_path / "scene.tif", 130, 150, affine, "EPSG:3857")
    stored = fcvgg.stream(net, path, out=tmp_path / "m.zarr").save(tmp_path / "stored.tif")
    for score_map in (fcvgg.stream(net, path), net.score_map(path)):
        score_map.save(tmp_path / "map.tif", classes=["sky", 0])
        with rasterio.open(tmp_path / "map.tif") as file, rasterio.open(stored) as other:
            assert (file.crs, file.transform) == (other.crs, other.transform)
            assert file.descriptions == ("sky", "grass")
            np.testing.assert_allclose(file.read(), other.read([3, 1]), rtol=1e-4, atol=1e-5)
    with pytest.raises(fcvgg.ImageError, match=r"must be of a georeferenced image"):
        net.score_map(np.zeros((60, 50, 3), np.uint8)).save(tmp_path / "other.tif")


def test_large_maps_are_tiled_and_have_overviews(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cloud-optimised file's order: all descriptions first, overviews before the whole."""
    monkeypatch.setattr(geotiff, "TILE", 128)
    path = scene(tmp_path / "scene.tif", 1100, 900, rasterio.Affine(*UTM), "EPSG:32633")
    store = fcvgg.stream(net, path, out=tmp_path / "m.zarr", classes="argmax")
    assert min(store.array.shape) > 128
    with rasterio.open(store.save(tmp_path / "map.tif")) as file:
        assert file.block_shapes == [(128, 128)]
        assert file.overviews(1) == [2, 4][: len(file.overviews(1))] != []
        np.testing.assert_array_equal(file.read(1), store.array[:])
    with tifffile.TiffFile(tmp_path / "map.tif") as file:
        first, *others = file.pages
        assert not first.is_reduced
        assert all(page.is_tiled for page in file.pages)
        assert all(page.is_reduced for page in others)
        assert all(page.offset < min(first.dataoffsets) for page in file.pages)
        assert max(others[0].dataoffsets) < min(first.dataoffsets)


def test_scores_of_half_precision_and_systems_that_gdal_does_not_know(
    net: Any, tmp_path: Path
) -> None:
    path = scene(tmp_path / "scene.tif", 60, 50, rasterio.Affine(*UTM), "EPSG:32633")
    store = fcvgg.stream(net, path, out=tmp_path / "m.zarr")
    store.array = zarr.array(store.array[:].astype(np.float16))
    with rasterio.open(store.save(tmp_path / "map.tif")) as file:
        assert file.dtypes[0] == "float32"
        np.testing.assert_array_equal(file.read(), store.array[:])
    store.description = {**store.description, "crs": "nowhere"}
    with pytest.raises(fcvgg.FcvggError, match=r"map\.tif cannot be written: ") as caught:
        store.save(tmp_path / "map.tif")
    assert "\n" not in str(caught.value)


def test_what_is_no_scene_is_refused(net: Any, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    store = fcvgg.stream(net, image, out=tmp_path / "m.zarr")
    with pytest.raises(fcvgg.ImageError, match=r"must be of a georeferenced image"):
        store.save(tmp_path / "map.tif")
    with pytest.raises(fcvgg.ArgumentError, match=r"^path must be"):
        store.save(tmp_path / "map.png")
    store.finished = [0]
    with pytest.raises(fcvgg.FcvggError, match=r"is not finished"):
        store.save(tmp_path / "map.tif")
