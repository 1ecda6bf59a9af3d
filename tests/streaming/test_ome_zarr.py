"""Stores are OME-Zarr 0.5 images, in few files, and those of older versions open and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import SmallVGG, seeded

import fcvgg
from fcvgg.streaming import resumption
from fcvgg.streaming.score_store import ScoreStore, open_store

zarr = pytest.importorskip("zarr")
tifffile = pytest.importorskip("tifffile")

PREPROCESS = fcvgg.Preprocess((0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def net() -> Any:
    model = seeded(SmallVGG).float()
    return fcvgg.convert(model, preprocess=PREPROCESS, verify=False, categories=list("abcde"))


def pixels(height: int, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def checked_image(path: Path) -> tuple[list[dict[str, str]], dict[str, list[float]], Any]:
    """Axes, transformations and array of the only level, as OME-Zarr 0.5 demands them."""
    group = zarr.open_group(str(path), mode="r")
    assert group.metadata.zarr_format == 3
    ome = group.attrs["ome"]
    assert ome["version"] == "0.5"
    (multiscale,) = ome["multiscales"]
    axes, (dataset,) = multiscale["axes"], multiscale["datasets"]
    array = group[dataset["path"]]
    names, kinds = ([axis[key] for axis in axes] for key in ("name", "type"))
    assert len(names) == len(set(names)) == array.ndim in (2, 3, 4, 5)
    assert list(array.metadata.dimension_names) == names
    assert kinds.count("space") in (2, 3)
    assert kinds == sorted(kinds)  # channel, then space
    assert kinds.count("channel") <= 1
    first, second = dataset["coordinateTransformations"]
    assert (first["type"], second["type"]) == ("scale", "translation")
    assert len(first["scale"]) == len(second["translation"]) == array.ndim
    return axes, {"scale": first["scale"], "translation": second["translation"]}, array


def centres(path: Path, row: int, col: int) -> list[float]:
    """The world coordinates (y, x) of a cell."""
    _, place, _ = checked_image(path)
    pairs = zip(place["scale"][-2:], (row, col), place["translation"][-2:])
    return [scale * index + start for scale, index, start in pairs]


@pytest.mark.parametrize("classes", [None, "argmax", "top5", ["c", "a"]])
def test_every_kind_of_map_is_an_ome_zarr_image(net: Any, tmp_path: Path, classes: Any) -> None:
    store = fcvgg.stream(net, pixels(90, 70), out=tmp_path / "m.zarr", classes=classes)
    axes, place, array = checked_image(store.path)
    np.testing.assert_array_equal(array[:], store.array[:])
    assert place["scale"][:-2] == [1] * (array.ndim - 2)
    assert [axis["name"] for axis in axes] == {2: ["y", "x"], 3: [*"cyx"], 4: [*"czyx"]}[array.ndim]
    assert all("unit" not in axis for axis in axes)
    for cell in ((0, 0), (7, 9)):
        assert centres(store.path, *cell) == list(net.geometry.centre_of(*cell))


def test_rows_of_an_image_below_the_window_too(net: Any, tmp_path: Path) -> None:
    band = fcvgg.stream(net, pixels(90, 70), out=tmp_path / "band.zarr", rows=(5, 9))
    assert centres(band.path, 2, 3) == list(net.geometry.centre_of(7, 3))
    small = fcvgg.stream(net, pixels(20, 50), out=tmp_path / "small.zarr")
    assert centres(small.path, 0, 3) == list(net.geometry.placed((20, 50)).centre_of(0, 3))


def test_pictures_of_a_band_show_its_place_in_the_whole_map(net: Any, tmp_path: Path) -> None:
    image = pixels(120, 100)
    whole = fcvgg.stream(net, image, out=tmp_path / "whole.zarr")
    band = fcvgg.stream(net, image, out=tmp_path / "band.zarr", rows=(10, 14))
    shown, expected = band.heatmap("c"), whole.heatmap("c")
    first, last = (net.geometry.centre_of(row, 0)[0] for row in (10, 13))
    rows = np.arange(120)
    inside = expected.coverage & ((rows >= first) & (rows <= last))[:, None]
    assert inside.any()
    np.testing.assert_array_equal(shown.coverage, inside)
    np.testing.assert_allclose(shown.values[inside], expected.values[inside], rtol=0, atol=1e-6)
    extents = [one.plot_labels().images[-1].get_extent() for one in (band, whole)]
    assert extents[0] == extents[1]

    def squares(score_map: Any) -> list[Any]:
        found = score_map.to_geojson(target="c", threshold=0, kind="cells")["features"]
        return [one["geometry"]["coordinates"] for one in found]

    cols = band.array.shape[-1]
    assert squares(band) == squares(whole)[10 * cols : 14 * cols]
    assert squares(band) == squares(fcvgg.stream(net, image, rows=(10, 14)))


@pytest.mark.parametrize("level", [0, 1])
def test_coordinates_are_those_of_the_slide(net: Any, tmp_path: Path, level: int) -> None:
    """In micrometres where the slide states them; of every level the same as of level 0."""
    image = pixels(240, 200)
    options: dict[str, Any] = {"photometric": "rgb", "tile": (32, 32)}
    with tifffile.TiffWriter(tmp_path / "slide.ome.tif", ome=True) as file:
        known = {f"PhysicalSize{axis}": size for axis, size in (("Y", 0.5), ("X", 0.25))}
        units = {f"PhysicalSize{axis}Unit": "µm" for axis in "YX"}
        file.write(image, subifds=1, metadata={"axes": "YXS", **known, **units}, **options)
        file.write(image[::2, ::2], subfiletype=1, **options)
    slide = fcvgg.open_image(tmp_path / "slide.ome.tif", level)
    assert slide.full_size == (240, 200)
    store = fcvgg.stream(net, slide, out=tmp_path / "m.zarr")
    axes, _, _ = checked_image(store.path)
    assert [axis.get("unit") for axis in axes] == [None, "micrometer", "micrometer"]
    factor = 2**level
    y, x = ((point + 0.5) * factor - 0.5 for point in net.geometry.centre_of(4, 6))
    np.testing.assert_allclose(centres(store.path, 4, 6), (y * 0.5, x * 0.25), rtol=0, atol=1e-10)


def test_without_a_pixel_size_coordinates_are_pixels_of_level_0(net: Any, tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        options: dict[str, Any] = {"photometric": "rgb", "tile": (32, 32), "metadata": None}
        file.write(pixels(240, 200), **options)
        file.write(pixels(120, 100), subfiletype=1, **options)
    store = fcvgg.stream(net, fcvgg.open_image(tmp_path / "slide.tif", 1), out=tmp_path / "m.zarr")
    expected = [(point + 0.5) * 2 - 0.5 for point in net.geometry.centre_of(4, 6)]
    assert centres(store.path, 4, 6) == expected


def test_a_thousand_classes_are_few_files(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file for every strip of rows, or for its part in a block of columns."""
    monkeypatch.setattr(resumption, "_CHUNK_ROWS", 8)
    many = fcvgg.convert(seeded(SmallVGG, 1000).float(), preprocess=PREPROCESS, verify=False)
    store = fcvgg.stream(many, pixels(160, 100), out=tmp_path / "m.zarr")
    rows = store.array.shape[-2]
    written = [path for path in (store.path / "0" / "c").rglob("*") if path.is_file()]
    assert rows > 16
    assert len(written) == -(-rows // store.chunk_rows)
    whole = many.score_map(pixels(160, 100)).scores
    np.testing.assert_allclose(store.array[:], whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(store.array[567], store.array[:][567])


def in_older_layout(store: ScoreStore) -> None:
    """Make a store one array, as older versions wrote it, of which the last rows are missing."""
    scores, attributes = store.array[:], {"fcvgg": dict(store.description)}
    attributes["fcvgg"].pop("full_size")
    finished = scores.shape[-2] // store.chunk_rows // 2 * store.chunk_rows
    array = zarr.create_array(
        store=str(store.path),
        shape=scores.shape,
        dtype=scores.dtype,
        chunks=store.array.chunks,
        fill_value=np.nan,
        attributes=attributes,
        overwrite=True,
    )
    array[:, :finished] = scores[:, :finished]
    (store.path / "fcvgg-progress.json").write_text(json.dumps({"finished": [finished]}))


def test_stores_of_older_versions_open_and_resume(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumption, "_CHUNK_ROWS", 4)
    image = pixels(120, 70)
    store = fcvgg.stream(net, image, out=tmp_path / "m.zarr")
    scores = store.array[:]
    in_older_layout(store)
    assert 0 < open_store(store.path).share < 1
    again = fcvgg.stream(net, image, out=store.path)
    assert again.complete
    assert again.array.shards is None
    np.testing.assert_array_equal(again.array[:], scores)
    assert again.heatmap("c").values.shape == (120, 70)
    with pytest.raises(fcvgg.ImageError, match="must be an image, got a score map"):
        fcvgg.open_image(store.path)
