"""A detector whose answer is known: the heatmap must be high where the bright block is.

The nets are set by hand. Their trunk thresholds the brightness and averages it over squares of one
stride; their FC layer weighs the squares of the window, the middle ones most. The cell whose
window is centred on the block therefore scores highest, and the heatmap's peak must fall within a
stride of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

import fcvgg
from fcvgg.results.score_map import ScoreMap

STRIDE = 8
BLOCK = 6
BRIGHT, DIM = 1.0, 0.3

Point = tuple[int, int]


def detector(squares: int, pool: Callable[[], nn.Module] = lambda: nn.AvgPool2d(2)) -> nn.Module:
    """VGG in shape, with a window of `squares` x `squares` features at stride 8."""
    layers: list[nn.Module] = []
    for stage in range(3):
        conv = nn.Conv2d(1, 1, 3, padding=1)
        nn.init.dirac_(conv.weight)
        nn.init.constant_(conv.bias, -(BRIGHT + DIM) / 2 if stage == 0 else 0)
        layers += [conv, nn.ReLU(), pool()]
    return nn.Sequential(*layers, nn.Flatten(), tent(squares)).eval()


def tent(squares: int) -> nn.Linear:
    """Weighs `squares` x `squares` features, the middle ones most."""
    fc = nn.Linear(squares * squares, 1)
    weights = 1 + torch.minimum(torch.arange(squares), torch.arange(squares).flip(0))
    with torch.no_grad():
        fc.weight.copy_((weights[:, None] * weights[None, :]).flatten() / weights.max() ** 2 * 8)
        fc.bias.fill_(-2)
    return fc


def scene(size: Point, corner: Point) -> Tensor:
    """A dim image ``(1, H, W)`` with one bright block."""
    image = torch.full((1, *size), DIM)
    image[:, corner[0] : corner[0] + BLOCK, corner[1] : corner[1] + BLOCK] = BRIGHT
    return image


def corners(seen: Point, step: int = 5) -> Iterator[Point]:
    """Placements all over the pixels that are seen, each border and each corner included."""
    rows, cols = (sorted({*range(0, n - BLOCK, step), 1, n - BLOCK - 1, n - BLOCK}) for n in seen)
    edge_rows, edge_cols = {0, rows[-1]}, {0, cols[-1]}
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            if (i + j) % 3 == 0 or row in edge_rows or col in edge_cols:
                yield row, col


def distance(peak: Point, corner: Point) -> int:
    """Pixels from the peak to the nearest pixel of the block, along the farther axis."""
    return max(max(c - p, p - (c + BLOCK - 1), 0) for p, c in zip(peak, corner))


def seen_by(net: fcvgg.FullyConvolutional, size: Point) -> Point:
    """Rows and columns that lie in some cell's window; past the last full cell there is none."""
    rows, cols = net.output_size(size)
    _, _, bottom, right = net.geometry.placed(size).window_of(rows - 1, cols - 1)
    return min(bottom, size[0]), min(right, size[1])


def peak_of_aligned(score_map: ScoreMap) -> Point:
    return score_map.heatmap(0).peak


def peak_of_stretched(score_map: ScoreMap) -> Point:
    """The peak of the map stretched over the image, as heatmap tools do."""
    stretched = F.interpolate(
        score_map.probabilities()[None], score_map.image_size, mode="bilinear", align_corners=False
    )
    return divmod(int(stretched.argmax()), score_map.image_size[1])


def missed(
    net: fcvgg.FullyConvolutional,
    size: Point,
    placements: Iterable[Point],
    peak_of: Callable[[ScoreMap], Point] = peak_of_aligned,
) -> list[tuple[Point, Point]]:
    """Every placement whose peak is not within a stride of the block, with the peak."""
    peaks = ((corner, peak_of(net.score_map(scene(size, corner)))) for corner in placements)
    return [(corner, peak) for corner, peak in peaks if distance(peak, corner) > STRIDE]


SIZES = [(64, 64), (71, 90), (40, 133), (24, 24), (31, 57), (23, 10), (9, 40), (6, 6)]
"""Square and not, a multiple of the stride and not, one cell only, and below the window of 24."""


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pool", [nn.AvgPool2d, nn.MaxPool2d], ids=["average", "max"])
def test_the_peak_falls_within_a_stride_of_the_block(
    size: Point, pool: Callable[[int], nn.Module]
) -> None:
    net = fcvgg.convert(detector(3, lambda: pool(2)))
    assert net.geometry.window == (24, 24)
    assert net.geometry.stride == (STRIDE, STRIDE)
    assert missed(net, size, corners(seen_by(net, size))) == []


@pytest.mark.parametrize("size", SIZES[:5], ids=str)
def test_the_peak_is_right_for_maps_padded_to_keep_their_size(size: Point) -> None:
    """As VGG: a window of seven features; padded, the cells' centres reach every border."""
    net = fcvgg.convert(detector(7), padding="same")
    whole_squares = size[0] // STRIDE * STRIDE, size[1] // STRIDE * STRIDE
    assert missed(net, size, corners(whole_squares)) == []


def test_the_peak_is_right_at_a_finer_stride() -> None:
    net = fcvgg.convert(detector(3), output_stride=2)
    assert net.geometry.stride == (2, 2)
    assert missed(net, (64, 64), corners((64, 64))) == []


def test_the_peak_is_right_when_preprocessing_resizes() -> None:
    """The map is made of 64x64 pixels and given in those of the image, 128x192."""
    preprocess = fcvgg.Preprocess(0, 1, resize=(64, 64))
    net = fcvgg.convert(detector(3), preprocess=preprocess)
    for corner in corners((64, 64)):
        small = (scene((64, 64), corner)[0] * 255).round().byte()
        large = small.repeat_interleave(2, 0).repeat_interleave(3, 1)
        heatmap = net.heatmap(large.numpy(), 0)
        assert heatmap.values.shape == (128, 192)
        peak = heatmap.peak[0] // 2, heatmap.peak[1] // 3
        assert distance(peak, corner) <= STRIDE, (corner, peak)


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_stretching_the_map_over_the_image_misses(size: Point) -> None:
    net = fcvgg.convert(detector(3))
    assert missed(net, size, corners(seen_by(net, size)), peak_of_stretched)


def test_stretching_misses_most_in_the_shape_of_vgg() -> None:
    """With seven features to the window, the cells' centres begin 27.5 pixels within the image."""
    net, size = fcvgg.convert(detector(7)), (104, 104)
    assert net.geometry.centre_of(0, 0) == (27.5, 27.5)
    within_hull = [(22 + row, 22 + col) for row, col in corners((60, 60))]
    assert missed(net, size, within_hull) == []
    stretched = missed(net, size, within_hull, peak_of_stretched)
    assert len(stretched) > 0.6 * len(within_hull)


def vgg16_detector() -> nn.Module:
    """The detector with VGG-16's thirteen convolutions and five pools, one channel wide."""
    layers: list[nn.Module] = list(make_layers([v if v == "M" else 1 for v in cfgs["D"]]))
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    convolutions[0] = layers[0] = nn.Conv2d(1, 1, 3, padding=1)
    for i, conv in enumerate(convolutions):
        nn.init.dirac_(conv.weight)
        nn.init.constant_(conv.bias, 0 if i else -(BRIGHT + DIM) / 2)
    return nn.Sequential(*layers, nn.Flatten(), tent(7)).eval()


@pytest.mark.parametrize("cell", [0, 7])
def test_a_map_stretched_over_448_pixels_is_off_by_84(cell: int) -> None:
    """The design's number, measured at VGG's outermost cells: aligned 0 pixels, stretched 84."""
    net = fcvgg.convert(vgg16_detector())
    assert net.geometry.window == (224, 224)
    assert net.geometry.stride == (32, 32)
    assert net.geometry.receptive_field == (404, 404)
    centre = 111.5 + 32 * cell
    corner = int(centre + 0.5) - BLOCK // 2
    score_map = net.score_map(scene((448, 448), (corner, corner)))
    assert score_map.scores.shape == (1, 8, 8)
    block = middle_of_highest(scene((448, 448), (corner, corner))[0])
    assert block == (centre, centre)

    aligned = score_map.heatmap(0).peak
    assert [abs(p - b) <= 0.5 for p, b in zip(aligned, block)] == [True, True]
    stretched = F.interpolate(score_map.probabilities()[None], (448, 448), mode="nearest-exact")
    highest = middle_of_highest(stretched[0, 0])
    assert [abs(p - b) for p, b in zip(highest, block)] == [84, 84]
    smooth = peak_of_stretched(score_map)  # the same, to where the interpolation is flat
    assert all(abs(p - b) >= 84 for p, b in zip(smooth, block))


def middle_of_highest(values: Tensor) -> tuple[float, float]:
    """The middle of the pixels that hold the largest value."""
    rows, cols = (values == values.max()).nonzero(as_tuple=True)
    return rows.double().mean().item(), cols.double().mean().item()
