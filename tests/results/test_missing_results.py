"""What results make of cells without data: they leave them out, and nothing else changes."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from nets import SmallVGG, images, seeded
from PIL import Image

import fcvgg
from fcvgg.results.heatmap import Heatmap
from fcvgg.results.score_map import ScoreMap, pyramid_heatmap
from fcvgg.streaming.score_store import ScoreStore
from fcvgg.streaming.slide_maps import SlideMap

NAN = float("nan")
PREPROCESS = fcvgg.Preprocess((0.5,) * 3, (0.2,) * 3)


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def net() -> fcvgg.FullyConvolutional:
    model = seeded(SmallVGG)
    with torch.no_grad():
        model.classifier[-1].weight.mul_(60)
    return fcvgg.convert(model, preprocess=PREPROCESS, categories=tuple("abcde"))


@pytest.fixture
def whole(net) -> ScoreMap:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    return net.score_map(picture)


def holed(score_map: ScoreMap, *cells: tuple[int, int], value: float = NAN) -> ScoreMap:
    """Some cells without data; NaN in one class is as good as in all."""
    scores = score_map.scores.clone()
    for i, (row, col) in enumerate(cells):
        scores[: 1 + i % 2 * 4, row, col] = value
    return replace(score_map, scores=scores)


CELLS = ((0, 0), (4, 6), (4, 7), (9, 3))


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_averages_are_of_the_cells_with_data(whole, value: float) -> None:
    made = holed(whole, *CELLS, value=value)
    known = torch.ones(whole.scores.shape[1:], dtype=torch.bool)
    for cell in CELLS:
        known[cell] = False
    assert torch.equal(made.has_data, known)
    scores = whole.scores[:, known]  # (K, n)
    torch.testing.assert_close(made.average(), scores.mean(1))
    torch.testing.assert_close(made.predict(), scores.mean(1).softmax(0))
    torch.testing.assert_close(made.predict("probabilities"), scores.softmax(0).mean(1))
    expected = scores.mean(1).softmax(0).sort(descending=True).values.tolist()
    assert [p for _, p in made.top()] == pytest.approx(expected)
    probabilities = made.probabilities()
    assert torch.equal(probabilities.isnan(), ~known.expand_as(probabilities))
    torch.testing.assert_close(probabilities[:, known], whole.probabilities()[:, known])
    labels = whole.label_map().masked_fill(~known, -1)
    assert torch.equal(made.label_map(), labels)
    assert made.label_map().dtype == torch.int64


def test_a_class_that_a_model_excludes_is_no_missing_data(whole) -> None:
    scores = whole.scores.clone()
    scores[2] = -torch.inf
    made = replace(whole, scores=scores)
    assert made.has_data.all()
    assert made.predict()[2] == 0
    assert made.predict().sum() == pytest.approx(1)
    scores[:, 0, 0] = -torch.inf
    assert not made.has_data[0, 0]


def test_a_map_without_data() -> None:
    net = fcvgg.convert(seeded(SmallVGG), preprocess=PREPROCESS)
    made = net.score_map(torch.full((3, 40, 40), NAN, dtype=torch.float64))
    assert made.average().isnan().all()
    assert made.predict().isnan().all()
    assert (made.label_map() == -1).all()
    refused = (made.top, made.heatmap, lambda: made.heatmap(1), made.plot)
    for call in (*refused, lambda: pyramid_heatmap([made, made], 0)):
        with pytest.raises(fcvgg.ImageError, match=r"^the score map must have a cell with data"):
            call()
    assert made.plot_labels().get_legend() is None


# -- pixels ---------------------------------------------------------------------------------------


def depends(made: ScoreMap, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The pixels whose interpolation gives a cell without data some weight, one by one."""
    weights = []
    for axis, cells, pixels, n in zip(
        made.geometry.axes, made.scores.shape[1:], made.input_size, size
    ):
        place = ((np.arange(n) + 0.5) * pixels / n - 0.5 - axis.centre_of(0)) / axis.stride
        distance = np.abs(place.clip(0, cells - 1)[:, None] - np.arange(cells))
        weights.append((1 - distance).clip(min=0) > 1e-9)
    rows, cols = weights
    missing = ~made.has_data.numpy()
    return np.einsum("yi,ij,xj->yx", rows, missing, cols, dtype=int) > 0


@given(
    cells=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=4),
    size=st.tuples(st.integers(20, 70), st.integers(20, 70)),
)
def test_pixels_that_depend_on_them_have_no_value_and_all_others_keep_theirs(cells, size) -> None:
    model = fcvgg.convert(seeded(SmallVGG))
    scores = 4 * images(3, 5, 6)
    full = ScoreMap(scores, model.geometry, (50, 56), (50, 56))
    made = holed(full, *cells)
    missing = depends(made, size)
    expected, got = full.resample(size), made.resample(size)
    assert np.array_equal(got[0].isnan().numpy(), missing)
    assert torch.equal(got[:, ~missing], expected[:, ~missing])
    plain, heatmap = full.heatmap(1), made.heatmap(1)
    missing = depends(made, (50, 56))
    assert np.array_equal(np.isnan(heatmap.values), missing)
    np.testing.assert_array_equal(heatmap.values[~missing], plain.values[~missing])
    assert np.array_equal(heatmap.coverage, plain.coverage & ~missing)
    if heatmap.coverage.any():
        assert heatmap.values[heatmap.peak] == np.nanmax(heatmap.values[heatmap.coverage])


def test_one_pixel_of_a_photograph(net) -> None:
    image = images(3, 128, 160)
    image[0, 0, 0] = NAN
    heatmap = net.heatmap(image, "a")
    assert 0 < np.isnan(heatmap.values).mean() < 0.03  # one of 825 cells, held to the border
    assert np.isfinite(heatmap.values[heatmap.peak])
    assert np.isfinite([p for _, p in net.score_map(image).top()]).all()
    boxes = heatmap.boxes(0)
    assert boxes
    assert np.isfinite(boxes).all()


def test_boxes_of_cells_with_data_only(whole) -> None:
    heatmap = whole.heatmap(0)
    best = heatmap.boxes(0, 1)[0]
    row, col = divmod(int(whole.probabilities()[0].argmax()), whole.scores.shape[2])
    assert best not in holed(whole, (row, col)).heatmap(0).boxes(0, 1)


# -- pictures -------------------------------------------------------------------------------------


def test_an_overlay_leaves_the_image_bare(whole, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heatmap = holed(whole, *CELLS).heatmap(int(whole.predict().argmax()))
        missing = np.isnan(heatmap.values)
        assert 0 < missing.mean() < 0.5
        overlay = np.asarray(heatmap.overlay())
        grey = np.asarray(whole.image.convert("L"))
        assert (overlay[missing] == grey[missing][:, None]).all()
        assert (overlay[~missing] != grey[~missing][:, None]).any()
        alone = np.asarray(replace(heatmap, image=None).overlay())
        assert (alone[missing] == 128).all()
        heatmap.save(tmp_path / "a.png")
        heatmap.save(tmp_path / "a.npy")
        heatmap.plot().figure.savefig(tmp_path / "b.png")
        holed(whole, *CELLS).plot().savefig(tmp_path / "c.png")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), heatmap.values)


def test_a_heatmap_whose_cells_with_data_reach_no_pixel(whole) -> None:
    """Between cells that lie alone every pixel depends on one without data."""
    scores = whole.scores.clone()
    scores[:, ::2] = scores[:, :, ::2] = NAN
    heatmap = replace(whole, scores=scores).heatmap(1)
    assert not heatmap.coverage.any()
    assert repr(heatmap) == "Heatmap('b', 70x90, no data)"
    assert heatmap.plot().get_title() == "b: no data"
    assert "\nno peak, " in replace(whole, scores=scores).plot().axes[1].get_title()
    with pytest.raises(fcvgg.ImageError, match="must have a pixel with data to have a peak"):
        _ = heatmap.peak


def test_labels_are_drawn_and_shared_without_them(whole) -> None:
    made = holed(whole, *CELLS)
    axes = made.plot_labels()
    shown = np.asarray(axes.images[-1].get_array())
    assert (shown[~made.has_data.numpy()][:, 3] == 0).all()
    labels = made.label_map().numpy()
    texts = [t.get_text() for t in axes.get_legend().get_texts()]
    for i in np.unique(labels[labels >= 0]):
        share = (labels == i).sum() / (labels >= 0).sum()
        assert f"{'abcde'[i]} ({share:.0%})" in texts


# -- several scales -------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["max", "mean"])
def test_other_scales_fill_in(net, whole, combine: str) -> None:
    made = [holed(whole, *CELLS), net.score_map(whole.image, scale=100)]
    made.append(replace(made[1], scores=torch.full_like(made[1].scores, NAN)))
    heatmap = pyramid_heatmap(made, 1, combine)
    first, second = (one.heatmap(1).values for one in made[:2])
    missing = np.isnan(first)
    np.testing.assert_array_equal(heatmap.values[missing], second[missing])
    both = np.stack([first, second])[:, ~missing]
    expected = both.max(0) if combine == "max" else both.mean(0)
    np.testing.assert_allclose(heatmap.values[~missing], expected, atol=1e-7)
    assert heatmap.coverage[missing & made[1].heatmap(1).coverage].all()
    np.testing.assert_allclose(
        pyramid_heatmap(made[:2]).values, pyramid_heatmap(made).values, atol=1e-7
    )


# -- many images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["scores", "probabilities"])
def test_classify_averages_over_the_cells_and_views_with_data(net, average: str) -> None:
    image = images(3, 60, 64)
    image[:, :3, :3] = NAN
    empty = torch.full_like(image, NAN)
    rows = net.classify([image, empty], average=average)
    torch.testing.assert_close(rows[0], net.score_map(image).predict(average).float())
    assert rows[1].isnan().all()
    assert rows.shape == (2, 5)
    # a corner without data spoils the only cell of the smaller scale
    both = net.classify(image, scales=[32, 64], average=average)
    torch.testing.assert_close(both, net.classify(image, scales=64, average=average))


def test_evaluate_lists_images_without_data(net) -> None:
    pytest.importorskip("torchmetrics")
    good, empty = images(3, 40, 40), torch.full((3, 40, 40), NAN, dtype=torch.float64)
    result = fcvgg.evaluate(net, [(good, 0), (empty, 1), (good, 2)], protocols=["dense", "resize"])
    assert result.images == 2
    assert [u.reason for u in result.unreadable] == ["no cell or no crop has data"]


# -- on disk --------------------------------------------------------------------------------------


@pytest.fixture
def gaps() -> torch.Tensor:
    image = images(3, 120, 90).float()
    image[:, 40:60, 30:50] = NAN
    return image


def test_streamed_maps(net, gaps: torch.Tensor, tmp_path: Path) -> None:
    plain = net.score_map(gaps.double())
    unknown = ~plain.has_data
    assert 0 < unknown.float().mean() < 1
    labels = fcvgg.stream(net, gaps.double(), classes="argmax")
    assert torch.equal(labels, plain.label_map())
    indices, best = fcvgg.stream(net, gaps.double(), classes="top5")
    assert torch.equal((indices == -1).all(0), unknown)
    assert torch.equal(best.isnan().all(0), unknown)

    store: ScoreStore = fcvgg.stream(net, gaps.double(), out=tmp_path / "a.zarr")
    heatmap, expected = store.heatmap("b"), plain.heatmap("b")
    np.testing.assert_allclose(heatmap.values, expected.values, atol=1e-5)
    np.testing.assert_array_equal(heatmap.coverage, expected.coverage)
    assert heatmap.peak == expected.peak
    assert store.heatmap().label == plain.top(1)[0][0]
    small = SlideMap(store, "b").heatmap(side=30)
    assert small.values.shape == (30, 22)
    assert np.nanmax(small.values) == pytest.approx(np.nanmax(plain.probabilities()[1]), abs=1e-5)

    tifffile = pytest.importorskip("tifffile")
    SlideMap(store, "b").save_pyramid(tmp_path / "a.ome.tif")
    levels = tifffile.imread(tmp_path / "a.ome.tif")
    assert (levels[np.isnan(expected.values)] == 0).all()

    best_of = fcvgg.stream(net, gaps.double(), out=tmp_path / "b.zarr", classes="argmax")
    shown = SlideMap(best_of)
    assert np.array_equal(np.isnan(shown.cells), unknown)
    counts = torch.bincount(plain.label_map()[~unknown])
    assert shown.index == int(counts.argmax())
    assert np.nansum(shown.cells) == counts.max()


def test_a_streamed_map_of_one_class_and_one_that_older_versions_wrote(tmp_path: Path) -> None:
    """There -1 is another class and no lack of data."""
    net = fcvgg.convert(seeded(SmallVGG, classes=1))
    store = fcvgg.stream(net, images(3, 60, 60), out=tmp_path / "a.zarr", classes="argmax")
    store.array[:] = -1
    store.array[0, 0] = 0
    assert np.isfinite(SlideMap(store).cells).all()
    several = fcvgg.convert(seeded(SmallVGG))
    store = fcvgg.stream(several, images(3, 60, 60), out=tmp_path / "b.zarr", classes="argmax")
    store.array[0, 0] = -1
    assert np.isnan(SlideMap(store).cells).sum() == 1
    del store.description["num_classes"]  # type: ignore[attr-defined]
    assert np.isfinite(SlideMap(store).cells).all()


def test_a_store_without_data_is_refused(net, tmp_path: Path) -> None:
    empty = torch.full((3, 60, 60), NAN, dtype=torch.float64)
    store = fcvgg.stream(net, empty, out=tmp_path / "a.zarr")
    with pytest.raises(fcvgg.ImageError, match=r"no cell of .*a\.zarr has data, so there is noth"):
        store.heatmap("a")


def test_unfinished_rows_hold_no_class(net, tmp_path: Path) -> None:
    for kind, unknown in (("argmax", -1), (None, NAN)):
        store = fcvgg.stream(net, images(3, 60, 60), out=tmp_path / f"{kind}.zarr", classes=kind)
        np.testing.assert_equal(store.array.fill_value, unknown)


# -- every pixel ----------------------------------------------------------------------------------


def test_label_maps_ignore_pixels_without_data(net) -> None:
    fcn = fcvgg.FCN(net, 3, "16s", categories=("x", "y", "z")).eval()
    for score in fcn.scores.values():
        torch.nn.init.normal_(score.conv.weight)
    image = images(3, 150, 140)
    image[0, 3, 5] = NAN
    found = fcn.predict(image)
    ignored = found.labels == 255
    assert ignored[3, 5]
    assert 0 < ignored.mean() < 0.5
    clean = image.nan_to_num(0)
    assert np.array_equal(found.labels[~ignored], fcn.predict(clean).labels[~ignored])
    assert sum(found.shares.values()) == pytest.approx(1)


# -- a heatmap as a value -------------------------------------------------------------------------


def test_a_heatmap_is_an_array_of_its_values(whole) -> None:
    heatmap = whole.heatmap(0)
    assert np.array_equal(np.asarray(heatmap), heatmap.values)
    assert np.asarray(heatmap).dtype == np.float32
    assert np.asarray(heatmap, np.float64).dtype == np.float64
    copied = np.array(heatmap)
    copied[:] = 0
    assert heatmap.values.max() > 0


def test_save_takes_what_overlay_takes(whole, tmp_path: Path) -> None:
    heatmap = whole.heatmap(0)
    options: dict[str, Any] = {"alpha": 0.4, "cmap": "viridis", "boxes": heatmap.boxes(0)[:2]}
    heatmap.save(tmp_path / "a.png", **options)
    assert np.array_equal(Image.open(tmp_path / "a.png"), heatmap.overlay(**options))
    assert isinstance(heatmap, Heatmap)
