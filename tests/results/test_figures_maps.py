"""Figures of a score map's classes: what they say, where things lie, and their colours."""

from __future__ import annotations

import io
import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from nets import SmallVGG, images, seeded
from PIL import Image

import fcvgg
from fcvgg.geometry import Axis, Geometry, KernelGeometry, Step
from fcvgg.results.colours import class_colours
from fcvgg.results.figures import side_by_side
from fcvgg.results.heatmap import Heatmap

CLASSES = ("ash", "birch", "cedar", "date", "elm")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def score_map() -> fcvgg.ScoreMap:
    net = fcvgg.convert(
        seeded(SmallVGG), preprocess=fcvgg.Preprocess((0.5,) * 3, (0.2,) * 3), categories=CLASSES
    )
    blocks = np.random.default_rng(3).integers(0, 256, (6, 7, 3), np.uint8)
    plain = net.score_map(Image.fromarray(blocks).resize((72, 60)))
    spread = (plain.scores - plain.scores.mean((1, 2), keepdim=True)) * 60  # every class wins cells
    return fcvgg.ScoreMap(**{**vars(plain), "scores": spread + torch.arange(5)[:, None, None] / 5})


def drawn(figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_the_grid_shows_the_top_classes_in_order_and_one_absolute_scale(score_map) -> None:
    figure = score_map.plot(3)
    drawn(figure)
    top = score_map.top(3)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0] == "60 x 72 pixels"
    for (name, probability), title in zip(top, titles[1:4], strict=True):
        heatmap = score_map.heatmap(name)
        peak = f"{heatmap.values[heatmap.peak]:.1%}".replace("100.0%", ">99.9%")
        whole = f"peak {peak} (○), whole image {probability:.1%}"
        assert title.startswith(f"{name}\n{whole}\ntop class of ")
        assert title.endswith(" of cells")
    bars = [ax for ax in figure.axes if ax.get_ylabel() == "probability"]
    assert len(bars) == 1
    assert bars[0].get_ylim() == (0, 1)
    for ax, (name, _) in zip(figure.axes[1:4], top, strict=True):
        assert_shows(ax, score_map.heatmap(name))


def assert_shows(ax, heatmap, **options) -> None:
    """A small heatmap is drawn with several pixels for each, which are equal where it measures."""
    shown = np.asarray(ax.images[0].get_array())
    times = shown.shape[0] // heatmap.values.shape[0]
    assert times > 8
    covered = heatmap.coverage.repeat(times, 0).repeat(times, 1)
    expected = np.asarray(heatmap.overlay(**options)).repeat(times, 0).repeat(times, 1)
    np.testing.assert_array_equal(shown[covered], expected[covered])
    stripes = shown[~covered].reshape(-1, 3)
    assert (stripes != expected[~covered].reshape(-1, 3)).any()  # which are finer than its pixels


@pytest.mark.parametrize("size", [(480, 320), (320, 480), (900, 160), (160, 900), (300, 300)])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_titles_lie_within_the_figure_and_apart(score_map, size, k) -> None:
    image = Image.new("RGB", size)
    shown = replace(score_map, image=image, image_size=size[::-1], input_size=size[::-1])
    figure = shown.plot(k)
    drawn(figure)
    boxes = [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
    assert len(boxes) == 1 + min(k, len(score_map.scores))
    for i, box in enumerate(boxes):
        assert box.y1 <= figure.bbox.y1
        assert box.x0 >= 0
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_independent_classes_are_counted_each_for_itself(score_map) -> None:
    shown = replace(score_map, activation="independent_logits")
    (index,) = shown.predict().topk(1).indices.tolist()
    share = (shown.probabilities()[index] > 0.5).double().mean().item()
    title = shown.plot(1).axes[1].get_title()
    assert title.endswith(f"\nabove 50% in {share:.0%} of cells")


def test_panels_are_aligned(score_map) -> None:
    figure = score_map.plot()
    drawn(figure)
    boxes = [ax.get_position().bounds for ax in figure.axes[:6] if ax.images]
    sizes = {(round(w, 6), round(h, 6)) for _, _, w, h in boxes}
    assert len(boxes) == 6
    assert len(sizes) == 1
    assert len({round(b[0], 6) for b in boxes}) == 3
    assert len({round(b[1], 6) for b in boxes}) == 2


def test_the_grid_of_a_tensor_and_of_few_classes() -> None:
    net = fcvgg.convert(seeded(SmallVGG, classes=2))
    figure = net.score_map(images(3, 48, 90)).plot(9)
    drawn(figure)
    assert sum(bool(ax.images) for ax in figure.axes) == 2
    with pytest.raises(fcvgg.ArgumentError, match=r"^k must be at least 1, got 0$"):
        net.score_map(images(3, 48, 48)).plot(0)


def test_the_label_map_colours_every_cell_by_its_class(score_map) -> None:
    ax = score_map.plot_labels()
    figure = ax.figure
    drawn(figure)
    labels = score_map.label_map().numpy()
    shown = np.asarray(ax.images[-1].get_array())
    order = sorted(np.unique(labels), key=lambda i: -(labels == i).sum())
    assert len(order) > 1
    for index in order:
        colours = np.unique(shown[labels == index][:, :3], axis=0)
        np.testing.assert_allclose(colours, class_colours(index + 1)[-1:] / 255)
    legend = ax.get_legend()
    expected = [f"{CLASSES[i]} ({(labels == i).mean():.0%})" for i in order]
    assert [t.get_text() for t in legend.get_texts()] == expected
    box = legend.get_window_extent()
    assert box.x1 <= figure.bbox.x1  # nothing is cut off
    # a cell is a square of one stride around its centre
    left, right, bottom, top = ax.images[-1].get_extent()
    rows, cols = labels.shape
    y, x = score_map.geometry.centre_of(0, 0)
    stride = score_map.geometry.stride[0]
    assert (left, top) == (x - stride / 2, y - stride / 2)
    assert (right, bottom) == (left + cols * stride, top + rows * stride)


def test_a_class_has_one_colour_whatever_wins(score_map) -> None:
    """The two most frequent classes change places; the image of each keeps its colour."""
    labels = score_map.label_map().numpy()
    first, second = np.argsort(-np.bincount(labels.ravel()))[:2]
    exchanged = score_map.scores.clone()
    exchanged[[first, second]] = score_map.scores[[second, first]]
    colours = []
    for scores in (score_map.scores, exchanged):
        shown = fcvgg.ScoreMap(**{**vars(score_map), "scores": scores})
        cells = np.asarray(shown.plot_labels().images[-1].get_array())
        colours.append([cells[shown.label_map().numpy() == i][0] for i in (first, second)])
    np.testing.assert_array_equal(colours[0], colours[1])
    assert not np.array_equal(*colours[0])


def test_colours_are_stable_and_all_different() -> None:
    colours = class_colours(1000)
    assert (colours.shape, colours.dtype) == ((1000, 3), np.uint8)
    assert len(np.unique(colours, axis=0)) == 1000
    for count in (0, 1, 5, 7, 8, 21):
        np.testing.assert_array_equal(class_colours(count), colours[:count])
    near = np.abs(colours[:40, None].astype(int) - colours[None, :40]).sum(-1)
    assert near[~np.eye(40, dtype=bool)].min() > 25


def test_rare_classes_share_grey(score_map) -> None:
    labels = score_map.label_map().numpy()
    _, ax = plt.subplots()
    assert score_map.plot_labels(ax, most=1) is ax
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    rest = len(np.unique(labels)) - 1
    assert texts[1].startswith(f"{rest} more classes (")
    for most in (0, 8):
        with pytest.raises(fcvgg.ArgumentError, match=r"^most must be from 1 to 7 classes, got "):
            score_map.plot_labels(most=most)


def test_the_label_map_of_one_class_leaves_the_others_bare() -> None:
    scores = torch.tensor([[[-2.0, 3.0, -1.0]]])
    net = fcvgg.convert(seeded(SmallVGG, classes=1))
    one = net.score_map(images(3, 32, 40))
    marked = fcvgg.ScoreMap(**{**vars(one), "scores": scores})
    shown = np.asarray(marked.plot_labels().images[-1].get_array())
    np.testing.assert_array_equal(shown[0, :, 3] > 0, [False, True, False])
    none = fcvgg.ScoreMap(**{**vars(one), "scores": -scores.abs()})
    assert none.plot_labels().get_legend() is None


def test_contours_lie_where_the_probability_is() -> None:
    values = np.tile(np.linspace(0, 1, 101, dtype=np.float32), (50, 1))
    ax = Heatmap(values, np.ones_like(values, bool)).plot()
    (lines,) = [c for c in ax.collections if hasattr(c, "levels")]
    assert tuple(lines.levels) == (0.75, 0.9)
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        np.testing.assert_allclose(path.vertices[:, 0], level * 100, atol=1e-3)


def test_contours_stay_within_the_hull_and_off_flat_maps() -> None:
    values = np.tile(np.linspace(0, 1, 101, dtype=np.float32), (50, 1))
    coverage = np.zeros_like(values, bool)
    coverage[10:40, 30:60] = True
    ax = Heatmap(values, coverage, chance=0.1).plot()
    (lines,) = [c for c in ax.collections if hasattr(c, "levels")]
    assert tuple(lines.levels) == (0.5,)  # 0.25 and 0.75 lie outside
    vertices = np.concatenate([p.vertices for p in lines.get_paths()])
    assert vertices[:, 1].min() >= 10
    assert vertices[:, 1].max() <= 39
    flat = Heatmap(np.full((5, 5), 0.5, np.float32), np.ones((5, 5), bool)).plot()
    assert not [c for c in flat.collections if hasattr(c, "levels")]
    line = Heatmap(values[:1], np.ones((1, 101), bool)).plot()
    assert not [c for c in line.collections if hasattr(c, "levels")]
    none = Heatmap(values, coverage).plot(contours=())
    assert not [c for c in none.collections if hasattr(c, "levels")]


def test_a_plot_without_a_bar_and_with_boxes(score_map) -> None:
    heatmap = score_map.heatmap(0)
    _, ax = plt.subplots()
    heatmap.plot(ax, bar=False)
    assert len(ax.figure.axes) == 1
    assert_shows(ax, heatmap)
    top, left, bottom, right, _ = box = heatmap.boxes(0)[0]
    shown = np.asarray(heatmap.plot(boxes=[box]).images[0].get_array())
    times = shown.shape[0] // 60
    outer = shown[top * times : bottom * times, left * times : right * times]
    assert all((edge == 255).all() for edge in (outer[0], outer[-1], outer[:, 0], outer[:, -1]))


def bars(figure) -> list:
    return [ax for ax in figure.axes if ax.get_ylabel() in ("probability", "score of 'elm'")]


@pytest.mark.parametrize("size", [(300, 300), (900, 160), (160, 900)])
def test_colour_bars_are_as_high_as_the_image_and_their_labels_apart(score_map, size) -> None:
    image = Image.new("RGB", size)
    shown = replace(score_map, image=image, image_size=size[::-1], input_size=size[::-1])
    own, axes = plt.subplots(1, 2, layout="constrained")
    shown.heatmap(4).plot(axes[0])
    for figure in (shown.heatmap(4).figure(), side_by_side(shown, 4), own):
        figure.draw_without_rendering()
        ax = next(ax for ax in figure.axes if ax.images)
        ax.apply_aspect()
        panel = ax.get_window_extent()
        for bar in bars(figure):
            box = bar.get_window_extent()
            if figure is own or panel.height >= 1.1 * figure.dpi:
                np.testing.assert_allclose((box.y0, box.y1), (panel.y0, panel.y1), atol=1)
            labels = [t.get_window_extent() for t in bar.get_yticklabels() if t.get_text()]
            if figure is not own:
                assert not any(a.overlaps(b) for a, b in itertools.pairwise(labels))
                outer = bar.get_tightbbox()
                assert outer.x1 <= figure.bbox.x1
                assert outer.y0 >= 0


def test_colour_maps_are_perceptually_uniform() -> None:
    """Lightness rises in almost equal steps (CIE L*), so equal differences look equal."""
    from matplotlib import colormaps

    from fcvgg.results.colours import COLOUR_MAP
    from fcvgg.results.figures import CELL_COLOUR_MAP

    for name in (COLOUR_MAP, CELL_COLOUR_MAP):
        rgb = colormaps[name](np.linspace(0, 1, 256))[:, :3]
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        bright = luminance > 0.008856
        lightness = np.where(bright, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
        steps = np.diff(lightness)
        assert steps.min() > 0
        assert steps.max() < 2.5 * steps.mean()


# -- large images ---------------------------------------------------------------------------------


def large(height: int, width: int, image: bool = True, classes: int = 5) -> fcvgg.ScoreMap:
    """A smooth map of an image of this size, of which nothing but the picture is that large."""
    geometry = Geometry(*(Axis((Step(KernelGeometry(64, 32), (-1,)),)) for _ in range(2)))
    cells = geometry.output_size((height, width))
    noise = torch.randn(1, classes, 6, 8, generator=torch.Generator().manual_seed(0))
    scores = 4 * torch.nn.functional.interpolate(noise, cells, mode="bilinear")[0]
    picture = Image.new("RGB", (width, height), (90, 120, 40)) if image else None
    return fcvgg.ScoreMap(
        scores, geometry, (height, width), (height, width), CLASSES, image=picture
    )


def drawn_arrays(figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for ax in figure.axes for image in ax.images]


@pytest.mark.parametrize(
    "draw",
    [
        lambda made: made.plot(),
        lambda made: made.plot_labels().figure,
        lambda made: made.heatmap(0).plot().figure,
        lambda made: side_by_side(made),
        lambda made: fcvgg.LabelMap(
            np.zeros(made.image_size, int), ("a", "b"), made.image
        ).figure(),
    ],
)
def test_figures_hold_no_more_than_they_show(draw) -> None:
    figure = draw(large(3000, 4000))
    arrays = drawn_arrays(figure)
    assert arrays
    assert all(max(a.shape[:2]) <= 1600 for a in arrays)
    assert max(a.shape[1] for a in arrays) >= 800
    for ax in figure.axes:  # whose axes still count the image's pixels
        if ax.images:
            assert ax.get_xlim() == (-0.5, 3999.5)
            assert ax.get_ylim() == (2999.5, -0.5)
    assert figure.dpi <= 300


def test_large_figures_take_little_memory() -> None:
    """NumPy's and Pillow's arrays alone would be 36 MB for each picture of full size."""
    made = large(9000, 12000, image=False)
    tracemalloc.start()
    try:
        drawn(made.plot(2))
        drawn(made.plot_labels().figure)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 << 20
    tracemalloc.start()
    try:
        made = large(3000, 4000, image=False)
        drawn(made.heatmap(0).plot().figure)
        overlay = made.heatmap(0).overlay()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert overlay.size == (4000, 3000)
    assert peak < 200 << 20  # 36 MB of them the overlay, 12 the coverage


def test_a_large_plot_marks_what_the_full_one_would() -> None:
    made = large(2000, 3300)
    heatmap = made.heatmap(2)
    ax = heatmap.plot()
    y, x = heatmap.peak
    assert ax.get_title() == f"cedar: {heatmap.values[y, x]:.2f} at ({y}, {x})"
    (mark,) = ax.lines
    np.testing.assert_allclose(mark.get_xydata()[0], (x, y), atol=3)
    (frame,) = ax.patches
    rows, cols = (np.flatnonzero(heatmap.coverage.any(axis)) for axis in (1, 0))
    expected = (cols[0] - 0.5, rows[0] - 0.5, len(cols), len(rows))
    np.testing.assert_allclose(frame.get_bbox().bounds, expected, atol=4)
    (lines,) = [c for c in ax.collections if hasattr(c, "levels")]
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        across, down = np.round(path.vertices).astype(int).T
        np.testing.assert_allclose(heatmap.values[down, across], level, atol=0.05)
    boxes = heatmap.boxes(0.5)[:1]
    heatmap.plot(boxes=boxes)


def test_notebooks_show_large_results_reduced() -> None:
    made = large(2000, 3300)
    labels = fcvgg.LabelMap(np.zeros(made.image_size, int), ("a", "b"), made.image)
    for shown in (made.heatmap(0), labels):
        picture = Image.open(io.BytesIO(shown._repr_png_()))
        assert picture.size == (1100, 667)


def test_a_heatmap_of_another_size() -> None:
    made = large(2000, 3000)
    full, small = made.heatmap(0), made.heatmap(0, size=(200, 300))
    assert small.values.shape == small.coverage.shape == (200, 300)
    assert small.image.size == (300, 200)
    blocks = full.values.reshape(200, 10, 300, 10)
    assert (small.values >= blocks.min((1, 3)) - 1e-6).all()
    assert (small.values <= blocks.max((1, 3)) + 0.02).all()  # centres lie between pixels
    np.testing.assert_allclose(small.values.max(), full.values.max(), atol=1e-3)
    box, reduced = full.boxes(0.3)[0], small.boxes(0.3)[0]
    np.testing.assert_allclose(np.array(box[:4]) / 10, reduced[:4], atol=1)


def test_one_cell_is_seen_on_a_small_picture_of_a_large_image() -> None:
    made = large(6400, 6400, image=False)
    scores = torch.full_like(made.scores, -9)
    scores[1, 77, 13] = 9
    alone = fcvgg.ScoreMap(**{**vars(made), "scores": scores})
    assert alone.heatmap(1, size=40).values.max() > 0.99
    assert drawn(alone.plot(1)).shape


def test_what_is_too_large_is_refused_with_the_way_round() -> None:
    made = large(9000, 12000, image=False)
    limit = r"^size must be at most 67,108,864 pixels in memory, got 9000x12000 \(108,000,000\); "
    remedy = r"pass a smaller one to score_map.heatmap\(target, size=\(h, w\)\), or stream"
    with pytest.raises(fcvgg.ArgumentError, match=limit + remedy):
        made.heatmap(0)
    with pytest.raises(fcvgg.ArgumentError, match=r"for 5 classes in memory, got 9000x12000"):
        made.resample()
    assert made.resample((90, 120)).shape == (5, 90, 120)
    assert made.heatmap(0, size=(900, 1200)).values.shape == (900, 1200)
