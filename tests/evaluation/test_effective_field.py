"""The effective receptive field against finite differences, and nets whose field is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import GlobalPooled, Headed, Lambda, SmallVGG, images, seeded
from torch import nn

import fcvgg


class Smooth(nn.Module):
    """Padded convolutions and tanh, so that finite differences converge; native size 12."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(4, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        )
        self.fc = nn.Linear(3 * 9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).flatten(1))


@torch.no_grad()
def differences(net, image: torch.Tensor, cell: tuple[int, int], target: int) -> np.ndarray:
    """The score's absolute slope at every pixel, summed over channels, one pixel at a time."""
    step = 1e-5
    result = np.zeros(image.shape[1:])
    for c in range(image.shape[0]):
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                ends = []
                for sign in (1, -1):
                    moved = image.clone()
                    moved[c, y, x] += sign * step
                    ends.append(net(moved[None])[0, target, cell[0], cell[1]].item())
                result[y, x] += abs(ends[0] - ends[1]) / (2 * step)
    return result


def test_influence_equals_finite_differences() -> None:
    net = fcvgg.convert(seeded(Smooth))
    assert net.geometry.receptive_field == (18, 18)
    batch = [images(2, 21, 24, seed=s) for s in (1, 2)]
    result = fcvgg.effective_receptive_field(net, batch, cell=(1, 2), target=1)
    top, left, bottom, right = net.geometry.receptive_field_of(1, 2)
    assert (top, left, bottom, right) == (1, 5, 19, 23)
    slopes = [differences(net, image, (1, 2), 1) for image in batch]
    mean = sum(slopes)
    outside = mean.copy()
    outside[top:bottom, left:right] = 0
    assert outside.max() == 0  # no pixel outside the theoretical field moves the score
    expected = mean[top:bottom, left:right] / mean.sum()
    np.testing.assert_allclose(result.influence, expected, rtol=0, atol=1e-9)
    assert result.influence.sum() == pytest.approx(1, abs=1e-12)
    assert (result.seen == 2).all()
    assert result.complete


def test_pixels_in_the_padding_are_not_counted() -> None:
    net = fcvgg.convert(seeded(Smooth))
    large, small = images(2, 24, 24), images(2, 12, 12, seed=4)
    result = fcvgg.effective_receptive_field(net, [large, small], target=0)
    # the single cell of the small image sees 3 pixels of padding on every side
    expected = np.ones((18, 18), int)
    expected[3:15, 3:15] = 2
    np.testing.assert_array_equal(result.seen, expected)
    first = fcvgg.effective_receptive_field(net, large, target=0).influence
    row, col = net.geometry.cell_at(11.5, 11.5)
    slopes = differences(net, large, (row, col), 0)
    top, left, bottom, right = net.geometry.receptive_field_of(row, col)
    slopes = slopes[top:bottom, left:right]
    np.testing.assert_allclose(first, slopes / slopes.sum(), atol=1e-9)
    other = np.zeros((18, 18))
    other[3:15, 3:15] = differences(net, small, (0, 0), 0)
    mean = (slopes + other) / expected
    np.testing.assert_allclose(result.influence, mean / mean.sum(), atol=1e-9)
    alone = fcvgg.effective_receptive_field(net, small, target=0)
    assert not alone.complete
    assert "too small to show all of the field" in str(alone)


def ones(kernel: int, layers: int) -> nn.Module:
    """Equal weights everywhere: the influence is a convolution of boxes."""
    convolutions = [nn.Conv2d(1, 1, kernel, bias=False) for _ in range(layers)]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1, 1)).double()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model.eval()


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_equal_weights_give_the_boxes_convolution(layers: int) -> None:
    """Luo et al., section 2.2: a uniform kernel, applied n times, tends to a Gaussian."""
    extent = 2 * layers + 1
    net = fcvgg.convert(ones(3, layers), input_size=extent)
    result = fcvgg.effective_receptive_field(net, images(1, extent + 9, extent + 12), target=0)
    profile = np.ones(1)
    for _ in range(layers):
        profile = np.convolve(profile, np.ones(3) / 3)
    np.testing.assert_allclose(result.influence, np.outer(profile, profile), atol=1e-14)
    assert result.theoretical == (extent, extent)
    assert result.centre == pytest.approx((layers, layers), abs=1e-9)
    # the variance of three equal weights is 2/3, and variances add up
    assert result.deviation[0] ** 2 == pytest.approx(layers * 2 / 3, abs=1e-9)
    strong = np.outer(profile, profile) > 0.0455 * profile.max() ** 2
    assert result.size == pytest.approx(strong.sum() ** 0.5, abs=1e-12)
    assert result.ratio == pytest.approx(result.size / extent, abs=1e-12)
    assert result.size < extent or layers < 3


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95, 1.0])
def test_the_extent_holds_its_share_and_no_smaller_one_does(share: float) -> None:
    net = fcvgg.convert(ones(3, 5), input_size=11)
    result = fcvgg.effective_receptive_field(net, images(1, 30, 30))
    top, left, bottom, right = result.box(share)
    assert result.extent(share) == (bottom - top, right - left)
    assert result.influence[top:bottom, left:right].sum() >= share - 1e-9
    # the next smaller box around the centre, which is a pixel here, holds less
    assert (top + bottom, left + right) == (11, 11)
    assert result.influence[top + 1 : bottom - 1, left + 1 : right - 1].sum() < share


@pytest.mark.parametrize("build", [SmallVGG, GlobalPooled])
def test_the_effective_field_is_smaller_than_the_theoretical(build: type[nn.Module]) -> None:
    net = fcvgg.convert(seeded(build), input_size=32)
    extent = max(net.geometry.receptive_field) + 2 * net.geometry.stride[0]
    batch = images(6, 3, extent, extent)
    result = fcvgg.effective_receptive_field(net, batch)
    assert result.images == 6
    assert result.complete
    assert 0 < result.size < max(result.theoretical)
    assert result.extent(0.5) < result.extent(0.95) <= result.theoretical


def test_without_a_target_each_images_top_class_is_taken() -> None:
    net = fcvgg.convert(seeded(Smooth))
    batch = [images(2, 20, 20, seed=s) for s in range(3)]
    row, col = net.geometry.cell_at(9.5, 9.5)
    parts = []
    for image in batch:
        top = int(net(image[None])[0, :, row, col].argmax())
        area = net.geometry.receptive_field_of(row, col)
        slopes = differences(net, image, (row, col), top)
        parts.append(np.pad(slopes, 20)[area[0] + 20 : area[2] + 20, area[1] + 20 : area[3] + 20])
    result = fcvgg.effective_receptive_field(net, batch)
    mean = np.divide(sum(parts), result.seen, out=np.zeros((18, 18)), where=result.seen > 0)
    np.testing.assert_allclose(result.influence, mean / mean.sum(), atol=1e-9)


def test_images_below_the_window_and_other_outputs() -> None:
    model = seeded(
        Headed,
        Lambda(
            lambda x, a, b: (a(x.flatten(1)), b(x.flatten(1))),
            *(nn.Linear(288, 5), nn.Linear(288, 3)),
        ),
    )
    net = fcvgg.convert(model)
    result = fcvgg.effective_receptive_field(net, images(3, 14, 30), output=1, target=2)
    assert result.seen.sum() == 14 * 28 or result.seen.any(1).sum() == 14
    with pytest.raises(fcvgg.CategoryError, match=r"class must be an index .*, got 3"):
        fcvgg.effective_receptive_field(net, images(3, 24, 24), output=1, target=3)


def test_the_networks_state_is_kept_and_in_place_layers_work() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.ReLU(True), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    )
    net = fcvgg.convert(model).train()
    image = images(3, 9, 9)
    before = image.clone()
    with torch.no_grad():
        result = fcvgg.effective_receptive_field(net, image, progress=True)
    assert torch.equal(image, before)
    assert result.influence.sum() == pytest.approx(1)
    assert net.training
    assert all(p.grad is None for p in net.parameters())


def test_errors() -> None:
    net = fcvgg.convert(seeded(Smooth))
    image = images(2, 16, 16)
    with pytest.raises(fcvgg.ImageError, match="images must hold at least one image"):
        fcvgg.effective_receptive_field(net, [])
    with pytest.raises(fcvgg.ImageError, match=r"cell must be one of the 2x2 of .*, got \(0, 2\)"):
        fcvgg.effective_receptive_field(net, image, cell=(0, 2))
    with pytest.raises(fcvgg.CategoryError, match=r"class must be an index .*, got 5"):
        fcvgg.effective_receptive_field(net, image, target=5)
    with pytest.raises(fcvgg.ArgumentError, match=r"share must be above 0 and .*, got 1\.5"):
        fcvgg.effective_receptive_field(net, image).extent(1.5)
    dead = seeded(Smooth)
    nn.init.zeros_(dead.fc.weight)
    with pytest.raises(fcvgg.ImageError, match="no pixel moves the score"):
        fcvgg.effective_receptive_field(fcvgg.convert(dead), image)


def test_it_prints_and_plots() -> None:
    net = fcvgg.convert(seeded(SmallVGG))
    result = fcvgg.effective_receptive_field(net, images(3, 60, 60))
    text = str(result)
    assert text.startswith(f"effective receptive field {result.size:.1f} pixels, ")
    assert "of the theoretical 38x38" in text
    axes = result.plot()
    axes.figure.draw_without_rendering()
    height, width = result.extent()
    labels = [t.get_text() for t in axes.get_legend().get_texts()]
    assert labels == ["theoretical: 38 x 38", f"95% of the influence: {height} x {width}"]
    assert axes.images[0].get_array().max() == 1
