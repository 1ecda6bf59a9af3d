"""Streaming only where it matters: the cells there have the bits of the whole call."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import SmallVGG, narrow_vgg, seeded
from PIL import Image, ImageDraw

import fcvgg
from fcvgg.errors import FcvggError
from fcvgg.images.regions import Regions, same_system, squares_touched
from fcvgg.inference.line_buffers import LineBuffers, same_bits
from fcvgg.inference.missing import sees_whole_field
from fcvgg.inference.stages import stages_of
from fcvgg.streaming.bands import chains, row_bands
from fcvgg.streaming.execution import bands
from fcvgg.streaming.job import StreamJob, plan_in_memory
from fcvgg.streaming.score_store import open_store
from fcvgg.streaming.strip_plan import StripPlan
from fcvgg.streaming.tissue import otsu, tissue

pytest.importorskip("zarr")


def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many strips, also for a small image."""
    monkeypatch.setattr("fcvgg.streaming.strip_plan._STRIP_BYTES", 30_000)
    monkeypatch.setattr("fcvgg.streaming.strip_plan._LEAST_BYTES", 30_000)
    monkeypatch.setattr("fcvgg.streaming.strip_plan._POSITIONS", 64)


def columns_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this processor's kernels give other last bits for fewer columns."""
    monkeypatch.setattr("fcvgg.streaming.job.same_bits", lambda *_: True)


@pytest.fixture(scope="module")
def net() -> Any:
    preprocess = fcvgg.Preprocess.imagenet()
    model = seeded(SmallVGG).float()
    return fcvgg.convert(model, preprocess=preprocess, categories=list("abcde"))


def photograph(height: int, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3)).astype(np.uint8)


class Counting:
    """An array that notes which rows and columns are read."""

    def __init__(self, array: np.ndarray[Any, Any]):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.read = np.zeros(array.shape[:2], int)

    def __getitem__(self, key: Any) -> Any:
        self.read[key[0], key[1]] += 1
        return self.array[key]


def squares(net: Any, size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """The square (top, bottom, left, right) of every cell, the outermost up to the border."""
    placed = net.geometry.placed(size)
    spans = []
    for axis, n, cells in zip(placed.axes, size, net.output_size(size)):
        edges = [axis.centre_of(0) + 0.5 + (i - 0.5) * axis.stride for i in range(cells + 1)]
        spans.append(list(zip([0, *edges[1:-1]], [*edges[1:-1], n])))
    return [(*down, *across) for down in spans[0] for across in spans[1]]


def inside(scores: Any) -> Any:
    return ~scores.isnan().any(0)


# -- the cells inside are those of the whole call -------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_any_mask_gives_the_bits_of_the_whole_call(net: Any, data: Any) -> None:
    height, width = data.draw(st.tuples(st.integers(40, 150), st.integers(200, 300)))
    down = data.draw(st.integers(2, 12))
    mask = np.zeros((down, max(round(down * width / height), 1)), bool)
    places = st.tuples(st.integers(0, mask.shape[0] - 1), st.integers(0, mask.shape[1] - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        mask[place] = True
    image = photograph(height, width)
    with pytest.MonkeyPatch.context() as patch:
        small_strips(patch)
        whole = fcvgg.stream(net, image).scores
        got = fcvgg.stream(net, image, where=mask).scores
    tall, wide = mask.shape
    rows, cols = np.mgrid[:tall, :wide]
    edges = (height / tall, width / wide)
    wanted = [
        bool(
            (
                mask
                & (rows * edges[0] < bottom - 1e-6)
                & ((rows + 1) * edges[0] > top + 1e-6)
                & (cols * edges[1] < right - 1e-6)
                & ((cols + 1) * edges[1] > left + 1e-6)
            ).any()
        )
        for top, bottom, left, right in squares(net, (height, width))
    ]
    expected = torch.tensor(wanted).view(whole.shape[1:])
    assert torch.equal(inside(got), expected)
    assert torch.equal(got[:, expected], whole[:, expected])


def test_only_the_rows_and_columns_of_the_region_are_read_and_computed(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_strips(monkeypatch)
    image = Counting(photograph(400, 600))
    mask = np.zeros((4, 6), bool)
    mask[0, 0] = mask[3, 5] = True
    columns_are_left_out(monkeypatch)
    got = fcvgg.stream(net, image, where=mask).scores
    whole = fcvgg.stream(net, image.array).scores
    torch.testing.assert_close(got[:, inside(got)], whole[:, inside(got)], rtol=0, atol=1e-5)
    read = image.read > 0
    read[np.linspace(0, 399, 16).round().astype(int)] = False  # rows that are judged by
    assert 0.02 < read.mean() < 0.2
    assert not read[180:220].any()
    assert not read[:, 250:350].any()


@torch.no_grad()
def test_ranges_of_columns_decode_no_chunks_twice(net: Any, monkeypatch: Any) -> None:
    small_strips(monkeypatch)
    columns_are_left_out(monkeypatch)
    mask = np.zeros((4, 6), bool)
    mask[:, 0] = mask[:, 5] = True
    image = Counting(photograph(400, 600))
    image.chunks = (64, 64, 3)  # type: ignore[attr-defined]
    job = StreamJob.prepared(net, image, None, None, where=mask)
    image.read[:] = 0  # of rows that are judged by
    plan = plan_in_memory(job, 1 << 30)
    assert len(list(bands(job, plan, plan.blocks[0], job.workload.rows, lambda _: None))) > 7
    assert image.read[:, :80].min() == image.read.max() == 1
    assert not image.read[:, 250:350].any()


def test_kernels_that_depend_on_the_width_leave_out_rows_only(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_strips(monkeypatch)
    monkeypatch.setattr("fcvgg.streaming.job.same_bits", lambda *_: False)
    image = Counting(photograph(300, 400))
    mask = np.zeros((6, 8), bool)
    mask[1, 1] = True
    got = fcvgg.stream(net, image, where=mask).scores
    whole = fcvgg.stream(net, image.array).scores
    assert torch.equal(got[:, inside(got)], whole[:, inside(got)])
    read = image.read > 0
    assert read[60].all()
    assert not read[200:280].any()


def test_operations_that_sum_by_the_width_are_noticed(net: Any) -> None:
    job = StreamJob.prepared(net, photograph(200, 200), None, None)
    workload, plan = job.workload, plan_in_memory(job, 1 << 30)
    schedule = workload.schedule(plan.strip_bytes, (0, 43))
    whole, part = workload.width((0, 43)), workload.width((10, 30))
    like = torch.empty(0)
    strips = range(len(schedule.ends))
    assert same_bits(schedule, strips, whole, [part, whole], like)
    stages = list(schedule.stages)
    first = next(i for i, stage in enumerate(stages) if stage.sliding is not None)
    run = stages[first].sliding.run  # type: ignore[union-attr]
    uneven = replace(stages[first].sliding, run=lambda x, p: run(x, p) * (1 + x.shape[3] * 1e-6))
    stages[first] = replace(stages[first], sliding=uneven)
    assert not same_bits(schedule.with_stages(stages), strips, whole, [part], like)


def test_choosing_columns_leaves_a_network_in_training_as_it_is() -> None:
    net = fcvgg.convert(seeded(SmallVGG, bn=True).float()).train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    mask = np.zeros((10, 13), bool)
    mask[3, 4] = True
    job = StreamJob.prepared(net, torch.rand(3, 200, 260), None, None, where=mask)
    job.bands((0, job.shape[-1]), plan_in_memory(job, 1 << 30).strip_bytes)
    assert any("running_mean" in name for name in before)
    torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)
    assert net.training


@pytest.mark.parametrize("classes", [None, ["b", "d"], "argmax", "top5"])
def test_kinds_of_maps_and_fills(net: Any, tmp_path: Path, classes: Any) -> None:
    image, mask = photograph(150, 200), np.zeros((3, 4), bool)
    mask[1, 1:3] = True
    options = {"classes": classes, "where": mask}
    in_memory = fcvgg.stream(net, image, **options)
    store = fcvgg.stream(net, image, out=tmp_path / "map.zarr", **options)
    whole = fcvgg.stream(net, image, classes=classes)
    cells = inside(fcvgg.stream(net, image, where=mask).scores)
    values = [m if isinstance(m, torch.Tensor) else m.scores for m in (in_memory, whole)]
    assert torch.equal(values[0][..., cells], values[1][..., cells])
    outside = values[0][..., ~cells]
    if classes == "top5":
        assert (outside[0] == -1).all()
        assert outside[1].isnan().all()
    else:
        assert (outside == -1).all() if classes == "argmax" else outside.isnan().all()
    np.testing.assert_array_equal(store.array[:], values[0].numpy())
    assert store.without_data == pytest.approx(1 - cells.double().mean().item())
    if classes == "top5":
        with pytest.raises(FcvggError, match=r"fill must be None for classes='top5', got 0"):
            fcvgg.stream(net, image, fill=0, **options)
        return
    filled = fcvgg.stream(net, image, fill=2, **options)
    filled = filled if classes == "argmax" else filled.scores
    assert (filled[..., ~cells] == 2).all()
    assert torch.equal(filled[..., cells], values[0][..., cells])


def test_probabilities_of_filled_cells_are_those_of_equal_classes(net: Any) -> None:
    image, mask = photograph(150, 200), np.eye(3, 4) > 0
    some = fcvgg.stream(net, image, where=mask, fill=0.5, classes=[0, 1])
    whole = fcvgg.stream(net, image, where=mask, fill=0.5)
    torch.testing.assert_close(some.probabilities(), whole.probabilities()[:2])
    assert (whole.probabilities() - 0.2).abs().min() < 1e-6


def test_an_interrupted_run_resumes_and_another_region_is_refused(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_strips(monkeypatch)
    monkeypatch.setattr("fcvgg.streaming.resumption._CHUNK_ROWS", 4)
    image, mask = photograph(400, 200), np.zeros((8, 4), bool)
    mask[1:3, 1] = mask[4:7, 2] = True
    whole = fcvgg.stream(net, image, where=mask).scores.numpy()

    class Interrupting(Counting):
        def __getitem__(self, key: Any) -> Any:
            if key[0].start > 250 and key[0].stop - key[0].start > 1:
                raise KeyboardInterrupt
            return super().__getitem__(key)

    path = tmp_path / "map.zarr"
    with pytest.raises(KeyboardInterrupt):
        fcvgg.stream(net, Interrupting(image), out=path, where=mask)
    assert 0 < open_store(path).finished[0] < whole.shape[1]
    for other in (None, ~mask):
        with pytest.raises(FcvggError, match="its where= or fill= is different"):
            fcvgg.stream(net, image, out=path, where=other)
    store = fcvgg.stream(net, image, out=path, where=mask)
    assert store.complete
    np.testing.assert_array_equal(store.array[:], whole)
    assert store.heatmap("a").coverage.mean() < 0.5


def test_blocks_of_columns_and_rows(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image, mask = photograph(200, 500), np.zeros((4, 10), bool)
    mask[1:3, 2] = mask[2, 7] = True
    monkeypatch.setattr(
        "fcvgg.streaming.job.plan_strips", lambda *_: _plan([(0, 60), (60, 118)], 1 << 16)
    )
    whole = fcvgg.stream(net, image).scores
    got = fcvgg.stream(net, image, where=mask).scores
    assert 0 < inside(got).double().mean() < 0.3
    assert torch.equal(got[:, inside(got)], whole[:, inside(got)])
    band = fcvgg.stream(net, image, where=mask, rows=(20, 30)).scores
    torch.testing.assert_close(band, got[:, 20:30], equal_nan=True)
    with pytest.raises(FcvggError, match=r"2x118 cells, got none; .* rows 0 to 2 of the map$"):
        fcvgg.stream(net, image, where=mask, rows=(0, 2))


def test_a_band_gets_narrower_as_the_region_does(net: Any, monkeypatch: Any) -> None:
    small_strips(monkeypatch)
    columns_are_left_out(monkeypatch)
    image, mask = photograph(260, 400), np.tri(130, 200, dtype=bool)[::-1]
    image[120:124, 50] = image[200, 20:24] = 0  # seen before and after columns are dropped
    job = StreamJob.prepared(net, image, None, None, 0, 0, where=mask)
    (chain,) = chains(job.bands((0, job.shape[-1]), plan_in_memory(job, 1 << 30).strip_bytes))
    assert len(chain) > 1
    whole = fcvgg.stream(net, image, nodata=0).scores
    got = fcvgg.stream(net, image, nodata=0, where=mask).scores
    cells = torch.from_numpy(job.interest.cells)
    assert 0.2 < cells.double().mean() < 0.7
    assert 0 < whole.isnan()[:, cells].double().mean() < 0.5
    close = {"rtol": 0, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(got[:, cells], whole[:, cells], **close)
    assert got[:, ~cells].isnan().all()
    row = chain[1][0][0] + 1  # begins where the band is narrower already
    band = fcvgg.stream(net, image, nodata=0, where=mask, rows=(row, len(cells))).scores
    torch.testing.assert_close(band, got[:, row:], **close)


def _plan(blocks: list[tuple[int, int]], strip_bytes: int) -> Any:
    return StripPlan(strip_bytes, tuple(blocks), 1 << 20, 1 << 30)


def test_the_pixels_outside_do_not_matter_for_the_whole_network(tmp_path: Path) -> None:
    net = fcvgg.convert(
        seeded(narrow_vgg, "vgg11").float(), preprocess=fcvgg.Preprocess.imagenet(), verify=False
    )
    image, mask = photograph(700, 1100), np.zeros((7, 11), bool)
    mask[2:5, 1:5] = True
    whole, got = (fcvgg.stream(net, image, where=m).scores for m in (None, mask))
    assert torch.equal(got[:, inside(got)], whole[:, inside(got)])


# -- bands ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_bands_hold_all_cells_without_overlaps(data: Any) -> None:
    height, width = data.draw(st.tuples(st.integers(1, 130), st.integers(1, 130)))
    cells = np.random.default_rng(data.draw(st.integers(0, 99))).random((height, width)) < 0.005
    lost = data.draw(st.tuples(st.floats(0, 20), st.floats(0, 20)))
    step = data.draw(st.integers(1, 140))
    left, row = cells.copy(), 0
    for (first, end), ranges in row_bands(cells, lost, step):
        assert row <= first < end <= height
        row = end
        col = 0
        for low, high in ranges:
            assert col <= low < high <= width
            assert high - low >= min(16, width)
            left[first:end, low:high], col = False, high
    assert not left.any()


def test_bands_follow_the_region() -> None:
    cells = np.zeros((100, 400), bool)
    cells[10:20, 30:60] = cells[70:90, 300:390] = True
    assert row_bands(cells, (4, 3), 1) == [((10, 20), [(30, 60)]), ((70, 90), [(300, 390)])]
    cells[10:20, 200:220] = True
    assert row_bands(cells, (4, 3), 1)[0] == ((10, 20), [(30, 60), (200, 220)])
    assert row_bands(cells, (4, 300), 1)[0] == ((10, 20), [(30, 220)])
    cells[30:40, 30:60] = True
    whole = ((10, 40), [(30, 220)])
    assert row_bands(cells, (40, 300), 1, narrows=False)[0] == whole
    assert row_bands(cells, (40, 300), 1)[:2] == [((10, 20), [(30, 220)]), ((20, 40), [(30, 60)])]


# -- polygons -------------------------------------------------------------------------------------


def geojson(*rings: Any, **members: Any) -> dict[str, Any]:
    geometry = {"type": "Polygon", "coordinates": [list(map(list, ring)) for ring in rings]}
    return {"type": "FeatureCollection", "features": [feature(geometry)], **members}


def feature(geometry: Any) -> dict[str, Any]:
    return {"type": "Feature", "properties": {}, "geometry": geometry}


def box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_squares_of_polygons_are_those_of_shapely(data: Any) -> None:
    shapely = pytest.importorskip("shapely")
    whole = data.draw(st.booleans())
    number = st.integers(-3, 15) if whole else st.floats(-3, 15, width=32)
    points = data.draw(st.lists(st.tuples(number, number), min_size=3, max_size=7, unique=True))
    outline = shapely.Polygon(points)
    if not outline.is_valid or outline.area < 1e-3:
        return
    hole = outline.buffer(-1.5)
    holed = outline.difference(hole) if hole.geom_type == "Polygon" else outline
    polygons = Regions.of(holed).polygons
    got = squares_touched(polygons, (9, 12))
    for row in range(9):
        for col in range(12):
            area = holed.intersection(shapely.box(col, row, col + 1, row + 1)).area
            if area > 1e-6 or area == 0:
                assert got[row, col] == (area > 0), (row, col, area)


def test_polygons_select_the_cells_whose_squares_they_touch(net: Any, tmp_path: Path) -> None:
    image = photograph(200, 260)
    outline, hole = (
        [(30.0, 40.5), (200.2, 60.0), (120.0, 170.0), (30.0, 40.5)],
        box(90, 70, 130, 100),
    )
    got = inside(fcvgg.stream(net, image, where=geojson(outline, hole)).scores)
    shapely = pytest.importorskip("shapely")
    region = shapely.Polygon(outline, [hole])
    expected = [
        region.intersection(shapely.box(left, top, right, bottom)).area > 0
        for top, bottom, left, right in squares(net, (200, 260))
    ]
    assert torch.equal(got, torch.tensor(expected).view(got.shape))
    path = tmp_path / "regions.geojson"
    path.write_text(json.dumps(geojson(outline, hole)))
    for where in (path, str(path), [feature(region.__geo_interface__)], region, [region]):
        assert torch.equal(inside(fcvgg.stream(net, image, where=where).scores), got)


def test_polygons_at_the_border_and_several_at_once(net: Any) -> None:
    image = photograph(200, 260)
    corner = {"type": "Polygon", "coordinates": [box(0, 0, 3, 3)]}
    far = {
        "type": "MultiPolygon",
        "coordinates": [[box(250, 190, 400, 400)], [box(9e3, 0, 9e4, 9)]],
    }
    both = {"type": "GeometryCollection", "geometries": [corner, far]}
    got = inside(fcvgg.stream(net, image, where=[both, feature(None)]).scores)
    assert got.nonzero().tolist() == [[0, 0], [got.shape[0] - 1, got.shape[1] - 1]]


def test_polygons_are_in_pixels_of_the_full_resolution(net: Any, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    image = photograph(256, 320)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        file.write(image, tile=(64, 64), photometric="rgb", subifds=1)
        file.write(image[::2, ::2], tile=(64, 64), photometric="rgb", subfiletype=1)
    level = fcvgg.open_image(tmp_path / "slide.tif", level=1)
    got = inside(fcvgg.stream(net, level, where=geojson(box(100, 60, 140, 90))).scores)
    half = inside(fcvgg.stream(net, image[::2, ::2], where=geojson(box(50, 30, 70, 45))).scores)
    assert torch.equal(got, half)


def georeferenced(path: Path, image: np.ndarray[Any, Any]) -> Path:
    """A GeoTIFF in EPSG:32632 whose pixels are 10 m wide."""
    tags = [
        (33550, 12, 3, (10.0, 10.0, 0.0), True),
        (33922, 12, 6, (0.0, 0.0, 0.0, 5e5, 5.2e6, 0.0), True),
        (34735, 3, 12, (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32632), True),
    ]
    pytest.importorskip("tifffile").imwrite(
        path, image, photometric="rgb", tile=(64, 64), metadata=None, extratags=tags
    )
    return path


def test_polygons_of_a_scene_are_in_its_coordinates(net: Any, tmp_path: Path) -> None:
    image = photograph(200, 260)
    path = georeferenced(tmp_path / "scene.tif", image)
    expected = inside(fcvgg.stream(net, image, where=geojson(box(40, 50, 90, 80))).scores)
    placed = box(5e5 + 400, 5.2e6 - 500, 5e5 + 900, 5.2e6 - 800)
    name = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    for where in (
        geojson(placed),
        geojson(placed, crs=name),
        geojson(box(40, 50, 90, 80), crs=None),
    ):
        assert torch.equal(inside(fcvgg.stream(net, path, where=where).scores), expected)
    lon_lat = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}
    message = r"coordinate reference system, EPSG:32632, got EPSG:4326; reproject it"
    with pytest.raises(FcvggError, match=message):
        fcvgg.stream(net, path, where=geojson(placed, crs=lon_lat))
    with pytest.raises(FcvggError, match=r"x=40, y=50 to x=90, y=80 in EPSG:32632; polygons in pi"):
        fcvgg.stream(net, path, where=geojson(box(40, 50, 90, 80)))
    with pytest.raises(FcvggError, match=r"in pixels of the array .*, which is not georef"):
        fcvgg.stream(net, image, where=geojson(placed, crs=name))
    assert same_system("urn:ogc:def:crs:OGC:1.3:CRS84", "EPSG:4326")


# -- tissue ---------------------------------------------------------------------------------------


def test_the_threshold_is_that_of_scikit_image() -> None:
    skimage = pytest.importorskip("skimage.filters")
    generator = np.random.default_rng(0)
    for shares in ((0.5, 0.5), (0.9, 0.1), (1.0, 0.0)):
        values = np.where(
            generator.random(4000) < shares[0],
            generator.normal(40, 9, 4000),
            generator.normal(150, 25, 4000),
        ).clip(0, 255)
        values = values.astype(np.uint8)
        assert otsu(values) == skimage.threshold_otsu(values, nbins=256) or shares[1] == 0
    assert otsu(np.full(9, 7)) <= 255


@pytest.mark.parametrize("kind", ["stained", "grey", "dark", "with black borders"])
def test_tissue_on_slides_of_several_kinds(net: Any, kind: str) -> None:
    generator = np.random.default_rng(1)
    canvas = Image.new("L", (300, 200))
    ImageDraw.Draw(canvas).ellipse((100, 50, 200, 150), fill=255)
    blob = np.asarray(canvas) > 0
    colours = {"grey": ((240,) * 3, (150,) * 3), "dark": ((3,) * 3, (90, 40, 120))}
    glass, stained = colours.get(kind, ((243, 241, 244), (190, 120, 170)))
    noise = generator.normal(0, 6, (*blob.shape, 3))
    image = np.where(blob[..., None], stained, glass) + noise
    if kind == "with black borders":
        image[:, :30] = image[190:] = 0
        image[:, :30] += noise[:, :30]
    image = image.clip(0, 255).astype(np.uint8)
    found = tissue(fcvgg.open_image(_png(image)))
    assert (found != blob).mean() < 0.02
    cells = inside(fcvgg.stream(net, image, where="tissue").scores)
    touched = inside(fcvgg.stream(net, image, where=blob).scores)
    assert (cells != touched).double().mean() < 0.05


def _png(image: np.ndarray[Any, Any]) -> Any:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file


# -- what cannot be used --------------------------------------------------------------------------

RING = box(10, 10, 50, 50)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("tisue", r"where must be 'tissue', a mask, polygons or the path .* 'tisue', which is no"),
        (3, r"must be 'tissue', a boolean array \(h, w\) or GeoJSON polygons, got int"),
        (np.ones((4, 9), bool), r"aspect ratio of the image of 120x160 pixels, got a mask of 4x9"),
        (np.ones((3, 4)), r"must be a boolean array \(h, w\), got float64 of shape \(3, 4\)"),
        (np.ones((3, 4, 1), bool), r"must be a boolean array \(h, w\), got bool of shape"),
        (
            np.zeros((3, 4), bool),
            r"at least one of the 23x33 cells, got none; pass a region that",
        ),
        (geojson(box(500, 0, 600, 50)), r"must overlap the image of 120x160 pixels, got polygons"),
        (geojson(), r"features\[0\] must have coordinates of rings, got \[\]"),
        ({"type": "FeatureCollection", "features": []}, r"at least one polygon, got none"),
        ({"type": "FeatureCollection"}, r"where must have a list of features, got None"),
        ([], r"where must hold at least one polygon, got none"),
        ({"type": "Point", "coordinates": [1, 2]}, r"Polygon, MultiPolygon, .* got 'Point'; leave"),
        (["tissue"], r"where\[0\] must be GeoJSON, got str"),
        (geojson(RING[:-1]), r"features\[0\] must have closed rings, of four positions or more"),
        (geojson([*RING[:-1], (10, float("nan"))]), r"features\[0\] must have finite coordinates"),
        (
            geojson([("1", "2"), *RING]),
            r"must have rings of positions \[x, y\], got \[\['1', '2'\]",
        ),
        (geojson([(1,), *RING]), r"must have rings of positions \[x, y\], got"),
        (geojson(RING, crs={"type": "link"}), r"must name its crs as GeoJSON does, got \{'type'"),
    ],
)
def test_regions_that_cannot_be_used(net: Any, where: Any, message: str) -> None:
    with pytest.raises(FcvggError, match=message) as caught:
        fcvgg.stream(net, photograph(120, 160), where=where)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used(net: Any, tmp_path: Path) -> None:
    image = photograph(120, 160)
    (tmp_path / "broken.geojson").write_text("{")
    (tmp_path / "broken.png").write_text("{")
    for name, message in (
        ("broken.geojson", "must be GeoJSON, got"),
        ("broken.png", "must be a m"),
    ):
        with pytest.raises(FcvggError, match=message):
            fcvgg.stream(net, image, where=tmp_path / name)
    mask = np.zeros((30, 40), bool)
    mask[10:20, 10:20] = True
    np.save(tmp_path / "mask.npy", mask)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    got = [
        inside(fcvgg.stream(net, image, where=tmp_path / n).scores)
        for n in ("mask.npy", "mask.png")
    ]
    assert torch.equal(*got)
    np.save(tmp_path / "wide.npy", np.ones((3, 9), bool))
    with pytest.raises(FcvggError, match="aspect ratio"):
        fcvgg.stream(net, image, where=tmp_path / "wide.npy")


def test_other_options_that_cannot_be_used(net: Any) -> None:
    image, mask = photograph(120, 160), np.ones((3, 4), bool)
    with pytest.raises(FcvggError, match=r"fill must be None without where=, got 0"):
        fcvgg.stream(net, image, fill=0)
    with pytest.raises(FcvggError, match=r"fill must be a number, got 'x'"):
        fcvgg.stream(net, image, fill="x", where=mask)  # type: ignore[arg-type]
    for fill in (0.5, 5, -2, float("nan")):
        with pytest.raises(FcvggError, match=r"a class from 0 to 4 or -1 for classes='argmax', g"):
            fcvgg.stream(net, image, fill=fill, where=mask, classes="argmax")
    with pytest.raises(FcvggError, match="no tissue was found"):
        fcvgg.stream(net, np.full((120, 160, 3), 250, np.uint8), where="tissue")
    with pytest.raises(FcvggError, match="must hold pixels to be shown, got preprocessed values"):
        fcvgg.stream(net, torch.rand(3, 120, 160), where="tissue")


# -- pixels without data --------------------------------------------------------------------------


def test_cells_without_data_are_not_computed(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_strips(monkeypatch)
    tifffile = pytest.importorskip("tifffile")
    image = photograph(320, 384).clip(1, 255)
    tiles = [image[y : y + 64, x : x + 64] for y in range(0, 320, 64) for x in range(0, 384, 64)]
    stored = [tile if i in (0, 7, 8, 13, 14) else None for i, tile in enumerate(tiles)]
    shape = {"shape": image.shape, "dtype": np.uint8, "tile": (64, 64), "photometric": "rgb"}
    path = tmp_path / "sparse.tif"
    tag = (42113, 2, 2, "0", True)
    tifffile.imwrite(path, iter(stored), extratags=[tag], metadata=None, **shape)
    source = fcvgg.open_image(path, nodata="file")
    pushed = []
    push = LineBuffers.push
    monkeypatch.setattr(
        LineBuffers, "push", lambda self, x: [pushed.append(x.shape[3]), push(self, x)][1]
    )
    got = fcvgg.stream(net, source).scores
    columns = sum(pushed)
    monkeypatch.setattr("fcvgg.streaming.job.sees_whole_field", lambda *_: False)
    everything = fcvgg.stream(net, source).scores
    assert 0 < inside(got).double().mean() < 0.2
    assert torch.equal(inside(got), inside(everything))
    assert torch.equal(got[:, inside(got)], everything[:, inside(got)])
    assert 0 < columns < 0.5 * (sum(pushed) - columns)
    nothing = fcvgg.stream(net, source, where=geojson(box(300, 300, 310, 310))).scores
    assert not inside(nothing).any()


def test_only_rows_that_cells_see_are_looked_at(net: Any) -> None:
    image = Counting(photograph(200, 160).clip(1, 255))
    job = StreamJob.prepared(net, image, None, (0, 1), nodata=0)
    assert job.interest is not None
    seen = net.geometry.placed((200, 160)).height.span_of(0)[1]
    looked_at = np.flatnonzero((image.read > 0).any(1))
    sampled = np.linspace(0, 199, 16).round().astype(int)
    assert np.setdiff1d(looked_at, sampled).max() < seen


@pytest.mark.parametrize("hidden", [float("nan"), -999.0])
def test_masked_floats_are_left_out_as_nan_is(net: Any, hidden: float) -> None:
    values = torch.randn(3, 120, 160).numpy()
    values[:, 40:60, 70:90] = np.nan
    masked = np.ma.array(np.nan_to_num(values, nan=hidden), mask=np.isnan(values))
    expected = fcvgg.stream(net, values).scores
    assert 0 < expected.isnan().double().mean() < 1
    got = fcvgg.stream(net, masked).scores
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_masked_pixels_are_left_out_as_a_value_is(net: Any) -> None:
    image = photograph(120, 160).clip(1, 255)
    image[40:60, 70:90] = 0
    expected = fcvgg.stream(net, image, nodata=0).scores
    got = fcvgg.stream(net, np.ma.masked_equal(image, 0)).scores
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_cells_that_skip_pixels_are_known() -> None:
    for dilation, expected in ((1, True), (3, False)):
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, dilation=dilation),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * (20 - 2 * dilation) ** 2, 2),
        ).eval()
        net = fcvgg.convert(model, input_size=20, verify=False)
        stages = stages_of(net.layers, 3)
        whole = sees_whole_field(stages, net.geometry)
        assert whole or not expected
    strided = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1, stride=2), torch.nn.Flatten(), torch.nn.Linear(400, 2)
    ).eval()
    net = fcvgg.convert(strided, input_size=20, verify=False)
    assert not sees_whole_field(stages_of(net.layers, 3), net.geometry)
