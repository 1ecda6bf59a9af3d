"""Boxes of a heatmap: the cells' windows on the image, and suppression, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import SmallVGG, images, seeded
from PIL import Image

import fcvgg
from fcvgg.results.boxes import CellWindows, ScoredBox

PREPROCESS = fcvgg.Preprocess((0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


@pytest.fixture(scope="module")
def net() -> fcvgg.FullyConvolutional:
    model = seeded(SmallVGG)
    with torch.no_grad():
        model.classifier[-1].weight.mul_(30)
    return fcvgg.convert(model, preprocess=PREPROCESS)


def picture(height: int, width: int) -> Image.Image:
    blocks = np.random.default_rng(3).integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def overlap(a, b) -> float:
    height = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    width = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return height * width / (sum(areas) - height * width)


def suppressed(candidates, limit: float) -> list:
    """Greedy non-maximum suppression, one box at a time."""
    kept: list = []
    for box in sorted(candidates, key=lambda c: -c[4]):
        if all(overlap(box, other) <= limit for other in kept):
            kept.append(box)
    return kept


@torch.no_grad()
def oracle(net, image: Image.Image, target: int, scales, threshold: float, limit: float) -> list:
    """Every window of every scale, mapped to the image by its edges."""
    candidates = []
    for scale in scales:
        factor = scale / min(image.size)
        size = [round(n * factor) for n in (image.height, image.width)]
        scaled = image.resize(size[::-1], Image.Resampling.BILINEAR)
        geometry = net.geometry.placed(size)
        p = net(PREPROCESS(scaled).double())[0].softmax(0)[target]
        for row in range(p.shape[0]):
            for col in range(p.shape[1]):
                ends = geometry.window_of(row, col)
                shape = (image.height, image.width) * 2
                edges = [round(e * n / m) for e, n, m in zip(ends, shape, size * 2)]
                edges = [min(max(e, 0), n) for e, n in zip(edges, shape)]
                if p[row, col] >= threshold:
                    candidates.append((*edges, float(p[row, col])))
    return suppressed(candidates, limit)


@pytest.mark.parametrize("scales", [(60,), (32, 47, 75), (25, 60)])
@pytest.mark.parametrize(("threshold", "limit"), [(0.5, 0.3), (0.1, 0.6), (0.0, 0.0)])
def test_boxes_equal_the_loop(net, scales, threshold, limit) -> None:
    image = picture(57, 82)
    got = net.heatmap(image, 2, scales=scales).boxes(threshold, limit)
    expected = oracle(net, image, 2, scales, threshold, limit)
    assert [box[:4] for box in got] == [box[:4] for box in expected]
    np.testing.assert_allclose([b.score for b in got], [b[4] for b in expected], atol=1e-6)
    assert all(isinstance(value, int) for box in got for value in box[:4])


def test_boxes_of_the_plain_heatmap_are_the_windows(net) -> None:
    tensor = images(3, 40, 36)
    score_map = net.score_map(tensor)
    boxes = score_map.heatmap(0).boxes(0, 1)
    expected = {score_map.geometry.window_of(i, j) for i in range(3) for j in range(2)}
    assert {box[:4] for box in boxes} == expected
    assert [box.score for box in boxes] == sorted((box.score for box in boxes), reverse=True)


def test_an_image_below_the_window_has_the_whole_image_as_its_box(net) -> None:
    (box,) = net.heatmap(images(3, 20, 25), 0).boxes(0)
    assert box[:4] == (0, 0, 20, 25)


def test_windows_outside_the_image_give_no_box() -> None:
    boxes = np.array([[-9.0, 0, -1, 8], [0, 0, 8, 8], [7.6, 2, 8.4, 5]])
    windows = CellWindows(boxes, np.array([0.9, 0.8, 0.7]))
    assert windows.best(0, 1, (8, 8)) == [ScoredBox(0, 0, 8, 8, 0.8)]


def test_no_box_above_the_threshold(net) -> None:
    heatmap = net.heatmap(images(3, 40, 40), 0)
    assert heatmap.boxes(1.0) == []


def test_the_overlay_draws_boxes_on_their_own_pixels() -> None:
    values = np.zeros((60, 80), np.float32)
    heatmap = fcvgg.Heatmap(values, values == 0, image=Image.new("RGB", (80, 60), (90, 90, 90)))
    plain, drawn = heatmap.overlay(), heatmap.overlay(boxes=[ScoredBox(20, 10, 50, 70, 0.75)])
    changed = (np.asarray(plain) != np.asarray(drawn)).any(-1)
    rows, cols = (np.flatnonzero(changed[20:].any(axis)) for axis in (1, 0))
    assert (rows[0], rows[-1], cols[0], cols[-1]) == (0, 29, 10, 69)  # half-open
    assert changed[:20, 10:].any()  # the score, above the box
    white = (np.asarray(drawn) == 255).all(-1)
    assert white[20, 10:70].all()
    assert white[49, 10:70].all()
    assert white[20:50, 10].all()
    assert white[20:50, 69].all()
    assert not changed[40:48, 40:65].any()


def test_boxes_are_drawn_without_an_image_and_at_the_smallest_size() -> None:
    values = np.zeros((4, 4), np.float32)
    heatmap = fcvgg.Heatmap(values, values == 0)
    drawn = np.asarray(heatmap.overlay(boxes=[ScoredBox(1, 1, 2, 2, 0.5)]))
    assert (drawn[1, 1] == 255).all()


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_errors(net, value) -> None:
    heatmap = net.heatmap(images(3, 40, 40), 0)
    with pytest.raises(fcvgg.ArgumentError, match=r"^threshold must be in \[0, 1\], got"):
        heatmap.boxes(value)
    with pytest.raises(fcvgg.ArgumentError, match=r"^iou_threshold must be in \[0, 1\], got"):
        heatmap.boxes(0.5, value)
    bare = fcvgg.Heatmap(heatmap.values, heatmap.coverage)
    with pytest.raises(fcvgg.ArgumentError, match=r"must hold windows.*or pass kind='regions'"):
        bare.boxes()
    with pytest.raises(fcvgg.ArgumentError, match=r"^kind must be 'windows' or 'regions', got 'a'"):
        bare.boxes(kind="a")


def test_the_former_name_of_the_threshold_still_works(net) -> None:
    heatmap = net.heatmap(picture(57, 82), 2)
    named = heatmap.boxes(0, iou_threshold=0.6)
    assert named == heatmap.boxes(0, overlap=0.6) == heatmap.boxes(0, 0.6)
    assert len(named) > len(heatmap.boxes(0))


# -- regions --------------------------------------------------------------------------------------


def flooded(values: np.ndarray, chosen: np.ndarray) -> list:
    """The boxes of connected pixels, one flood at a time."""
    left = {tuple(place) for place in np.argwhere(chosen).tolist()}
    found = []
    while left:
        region, edge = set(), {left.pop()}
        while edge:
            region |= edge
            near = {
                (y + dy, x + dx) for y, x in edge for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
            }
            edge = near & left
            left -= edge
        ys, xs = zip(*region)
        score = max(values[place] for place in region)
        found.append((min(ys), min(xs), max(ys) + 1, max(xs) + 1, score))
    return sorted(found, key=lambda box: (-box[4], box[:4]))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 0.59, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (37, 53)])
def test_regions_equal_the_flood(share: float, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    values = rng.permutation(shape[0] * shape[1]).reshape(shape).astype(np.float32)
    values /= values.size
    chosen = rng.random(shape) < share
    heatmap = fcvgg.Heatmap(np.where(chosen, values / 2 + 0.5, values / 4), np.ones(shape, bool))
    got = heatmap.boxes(0.5, kind="regions")
    assert got == flooded(heatmap.values, chosen)
    assert all(isinstance(value, int) for box in got for value in box[:4])


def test_regions_of_a_spiral_and_of_a_comb_are_one() -> None:
    """Runs that meet only far below join late."""
    spiral = np.zeros((41, 41), bool)
    for ring in range(0, 20, 2):
        spiral[ring, ring : 41 - ring] = spiral[ring : 41 - ring, 40 - ring] = True
        spiral[40 - ring, ring : 41 - ring] = spiral[ring + 2 : 41 - ring, ring] = True
        spiral[ring + 2, ring : ring + 3] = True
    comb = np.zeros((30, 41), bool)
    comb[:, ::2] = comb[-1] = True
    for mask in (spiral, comb):
        values = mask.astype(np.float32)
        heatmap = fcvgg.Heatmap(values, np.ones(mask.shape, bool))
        assert heatmap.boxes(kind="regions") == [(0, 0, *mask.shape, 1.0)]


def test_regions_hold_measured_pixels_only() -> None:
    values = np.full((20, 30), 0.9, np.float32)
    values[:, 12:15] = 0.2
    values[8, 20] = np.nan
    coverage = np.zeros((20, 30), bool)
    coverage[5:15, 4:26] = True
    coverage[8, 20] = False
    got = fcvgg.Heatmap(values, coverage).boxes(0.5, kind="regions")
    assert [box[:4] for box in got] == [(5, 4, 15, 12), (5, 15, 15, 26)]


def test_scores_of_boxes_are_whole_and_apart() -> None:
    """Every text lies within the picture, and no two share a pixel."""
    from fcvgg.results.boxes import _free_place

    boxes = [
        ScoredBox(0, 0, 20, 20, 0.9),
        ScoredBox(2, 1, 30, 25, 0.8),
        ScoredBox(70, 95, 80, 100, 0.7),
    ]
    taken: list = []
    for box in boxes:
        place = _free_place(box, (24, 10), 2, (100, 80), taken)
        assert place is not None
        assert 0 <= place[0] < place[2] <= 100
        assert 0 <= place[1] < place[3] <= 80
        assert all(
            place[2] <= o[0] or o[2] <= place[0] or place[3] <= o[1] or o[3] <= place[1]
            for o in taken
        )
        taken.append(place)
    assert _free_place(boxes[0], (200, 10), 2, (100, 80), []) is None
