"""Heatmaps of several scales on one pixel grid, against a loop over pixels and scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import SmallVGG, Unpadded, images, seeded
from PIL import Image

import fcvgg
from fcvgg.results.score_map import pyramid_heatmap

PREPROCESS = fcvgg.Preprocess((0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


@pytest.fixture(scope="module", params=[SmallVGG, Unpadded])
def net(request) -> fcvgg.FullyConvolutional:
    model = seeded(request.param)
    with torch.no_grad():
        last = model.classifier[-1] if isinstance(model, SmallVGG) else model.head[-1]
        last.weight.mul_(30)
    return fcvgg.convert(model, input_size=34, preprocess=PREPROCESS)


def picture(height: int, width: int) -> Image.Image:
    blocks = np.random.default_rng(3).integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


@torch.no_grad()
def oracle(net, image: Image.Image, target: int, scales, combine: str):
    """Pixel by pixel: where it lies on each scaled image, between which cells, what they say."""
    height, width = image.height, image.width
    values, coverage = np.zeros((height, width)), np.zeros((height, width), bool)
    levels = []
    for scale in scales:
        factor = scale / min(height, width)
        size = (round(height * factor), round(width * factor))
        scaled = image.resize(size[::-1], Image.Resampling.BILINEAR)
        probabilities = net(PREPROCESS(scaled).double())[0].softmax(0)[target].numpy()
        levels.append((size, net.geometry.placed(size), probabilities))
    for y in range(height):
        for x in range(width):
            inside, held = [], []
            for size, geometry, p in levels:
                point = ((y + 0.5) * size[0] / height - 0.5, (x + 0.5) * size[1] / width - 0.5)
                origin = geometry.centre_of(0, 0)
                place = [(q - o) / s for q, o, s in zip(point, origin, geometry.stride)]
                near = [min(max(c, 0), n - 1) for c, n in zip(place, p.shape)]
                low = [min(int(c), n - 2) if n > 1 else 0 for c, n in zip(near, p.shape)]
                value = 0.0
                for i in (0, 1):
                    for j in (0, 1):
                        weight = max(1 - abs(near[0] - low[0] - i), 0)
                        weight *= max(1 - abs(near[1] - low[1] - j), 0)
                        if weight:
                            value += weight * p[low[0] + i, low[1] + j]
                held.append(value)
                if all(-1e-9 <= c <= n - 1 + 1e-9 for c, n in zip(place, p.shape)):
                    inside.append(value)
            values[y, x] = max(held) if combine == "max" else sum(held) / len(held)
            coverage[y, x] = bool(inside)
    return values, coverage


@pytest.mark.parametrize("combine", ["max", "mean"])
@pytest.mark.parametrize("size", [(40, 52), (61, 37)])
def test_every_pixel_equals_the_loop(net, size, combine) -> None:
    image = picture(*size)
    scales = (48, 60, 90)  # each with several rows of cells
    heatmap = net.heatmap(image, 2, scales=scales, combine=combine)
    values, coverage = oracle(net, image, 2, scales, combine)
    assert heatmap.values.shape == size
    assert heatmap.values.dtype == np.float32
    np.testing.assert_allclose(heatmap.values, values, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(heatmap.coverage, coverage)
    assert heatmap.values.max() > heatmap.values.min() + 0.05


def test_one_scale_of_the_images_own_size_is_the_plain_heatmap(net) -> None:
    image = picture(48, 61)
    plain, scaled = net.heatmap(image, 1), net.heatmap(image, 1, scales=[48])
    np.testing.assert_allclose(plain.values, scaled.values, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(plain.coverage, scaled.coverage)
    np.testing.assert_allclose(plain.boxes(0), scaled.boxes(0), rtol=1e-5)


def test_the_peak_lies_where_a_scale_has_cells(net) -> None:
    for combine in ("max", "mean"):
        heatmap = net.heatmap(picture(50, 40), 0, scales=[34, 70], combine=combine)
        assert heatmap.coverage[heatmap.peak]


def test_a_tensor_and_a_scale_below_the_window(net) -> None:
    tensor = images(3, 40, 44)
    heatmap = net.heatmap(tensor, 0, scales=[20, 40])
    assert heatmap.values.shape == (40, 44)
    assert heatmap.image is None
    assert len(heatmap.windows.scores) > 1
    # below the window there is one cell, of the padded image
    single = net.heatmap(tensor, 0, scales=[20])
    assert np.ptp(single.values) == 0
    assert len(single.windows.scores) == 1


def test_without_a_target_the_class_of_the_mean_prediction_is_shown(net) -> None:
    image = picture(48, 61)
    scales = [40, 70]
    expected = int(net.classify(image, scales=scales)[0].argmax())
    assert net.heatmap(image, scales=scales).label == f"class {expected}"


def test_an_object_of_another_size_than_the_window_shows_up() -> None:
    """The packaged net finds the face at its own scale only; the pyramid finds it in any photo."""
    net = fcvgg.load("demo")
    from fcvgg.demo import demo_photograph

    photo = demo_photograph()
    face = (50, 160, 210, 280)  # by eye
    plain = net.heatmap(photo, "face")
    pyramid = net.heatmap(photo, "face", scales=(96, 112, 128, 160))
    y, x = pyramid.peak
    assert face[0] <= y < face[2]
    assert face[1] <= x < face[3]
    inside = np.s_[face[0] : face[2], face[1] : face[3]]
    assert pyramid.values[inside].max() > 0.9
    assert plain.values[inside].max() < 0.9
    best = pyramid.boxes(0.5)[0]
    assert best.top < 130 < best.bottom
    assert best.left < 220 < best.right


def test_errors(net) -> None:
    image = picture(40, 40)
    with pytest.raises(fcvgg.ArgumentError, match=r"^combine must be 'max' or 'mean', got 'sum'$"):
        net.heatmap(image, 0, scales=[40], combine="sum")
    with pytest.raises(fcvgg.ArgumentError, match=r"^scales must be smaller sides .*, got \[\]"):
        net.heatmap(image, 0, scales=[])
    with pytest.raises(
        fcvgg.ArgumentError, match=r"^scales must be one or more smaller sides in pixels, got none$"
    ):
        pyramid_heatmap([])
    with pytest.raises(fcvgg.ImageError, match=r"scales must be positive .*, got -3"):
        net.heatmap(image, 0, scales=[-3])
    with pytest.raises(fcvgg.CategoryError, match=r"class must be an index .*, got 9"):
        net.heatmap(image, 9, scales=[40])


def jump(values: np.ndarray) -> float:
    """The largest step from a pixel to its neighbour."""
    return max(float(np.abs(np.diff(values, axis=axis)).max(initial=0)) for axis in (0, 1))


@given(
    seed=st.integers(0, 99),
    size=st.tuples(st.integers(40, 90), st.integers(40, 90)),
    scales=st.lists(st.integers(34, 120), min_size=2, max_size=4, unique=True),
)
@settings(max_examples=40)
def test_the_pyramid_is_as_continuous_as_its_scales(seed, size, scales) -> None:
    """No step at a frame, and with the maximum nowhere below one of the scales."""
    model = fcvgg.convert(seeded(SmallVGG), verify=False)
    noise = torch.Generator().manual_seed(seed)
    maps = []
    for scale in scales:
        factor = scale / min(size)
        pixels = (round(size[0] * factor), round(size[1] * factor))
        scores = 3 * torch.randn(5, *model.output_size(pixels), generator=noise)
        maps.append(fcvgg.ScoreMap(scores, model.geometry.placed(pixels), size, pixels))
    each = np.stack([one.heatmap(1).values for one in maps])
    steepest = max(map(jump, each)) + 1e-6
    highest = pyramid_heatmap(maps, 1, "max").values
    assert (highest >= each.max(0)).all()
    mean = pyramid_heatmap(maps, 1, "mean").values
    np.testing.assert_allclose(mean, each.mean(0), rtol=0, atol=1e-6)
    assert max(jump(highest), jump(mean)) <= steepest
