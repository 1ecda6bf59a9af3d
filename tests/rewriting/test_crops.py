"""What a cell stands for: the crop of the native size that the user named, by the source itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nets import Headed, Lambda, images, native_error, relative_error, seeded, sliding_window
from torch import Tensor, nn

import fcvgg


def rnet() -> nn.Module:
    """The shape of MTCNN's second net, made for 24 pixels: unpadded, with ceil-mode pools."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(4, 5, 3), nn.PReLU(5), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(5, 6, 2), nn.PReLU(6), nn.Flatten(), nn.Linear(54, 8), nn.Linear(8, 2)),
    )


def arcface() -> nn.Module:
    """Padded strided convolutions from 112 pixels to 7x7 features."""
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, padding=1)]
    for _ in range(4):
        layers += [nn.Conv2d(4, 4, 3, 2, 1), nn.PReLU(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(196, 6))


@pytest.mark.parametrize(
    ("build", "size", "window", "stride"), [(rnet, 24, 22, 4), (arcface, 112, 97, 16)]
)
def test_the_box_of_a_cell_is_the_crop_that_the_user_named(build, size, window, stride) -> None:
    model = seeded(build)
    net = fcvgg.convert(model, input_size=size)
    assert native_error(model, net) <= 1e-12
    assert net.geometry.window == (window, window)
    assert net.geometry.crop == (size, size)
    assert net.geometry.window_of(0, 0) == (0, 0, size, size)
    assert net.geometry.window_of(2, 1) == (
        *(2 * stride, stride),
        *(2 * stride + size, stride + size),
    )
    heatmap = net.score_map(images(3, size, size + 2 * stride)).heatmap(0)
    boxes = {box[:4] for box in heatmap.boxes(0, 1)}
    assert boxes == {(0, i * stride, size, i * stride + size) for i in range(3)}


def test_inferred_the_native_size_is_the_window() -> None:
    net = fcvgg.convert(seeded(rnet))
    assert net.input_size == net.geometry.window == net.geometry.crop == (22, 22)


@torch.no_grad()
def test_the_last_cell_of_an_image_is_the_source_on_the_last_crop() -> None:
    """There the ceil-mode windows hang over the image as they hang over the crop."""
    model = seeded(rnet)
    net = fcvgg.convert(model, input_size=24)
    for steps in ((0, 0), (1, 3), (2, 2)):
        height, width = (24 + 4 * n for n in steps)
        image = images(1, 3, height, width)
        maps = net(image)
        row, col = (n - 1 for n in maps.shape[2:])
        assert (row, col) == steps
        top, left, bottom, right = net.geometry.window_of(row, col)
        assert (bottom, right) == (height, width)
        expected = model(image[..., top:bottom, left:right])
        assert relative_error(expected, maps[..., row, col]) <= 1e-12


def test_what_strides_leave_out_of_the_native_image_is_in_no_crop() -> None:
    model = seeded(Headed, nn.Sequential(nn.Flatten(), nn.Linear(288, 4)))
    for size, crop in (((24, 24), (24, 24)), ((27, 26), (24, 24))):
        geometry = fcvgg.convert(model, input_size=size).geometry
        assert geometry == fcvgg.convert(model).geometry
        assert geometry.crop == crop
    same = fcvgg.convert(model, input_size=27, padding="same").geometry
    assert same.crop == (24, 24)
    assert same.window_of(2, 2) == (0, 0, 24, 24)


@pytest.mark.parametrize("stride", [None, 8, 4])
def test_a_finer_stride_leaves_the_crop(stride: int | None) -> None:
    model = seeded(arcface)
    geometry = fcvgg.convert(model, input_size=112, output_stride=stride).geometry
    assert geometry.crop == (112, 112)
    floors = seeded(Headed, nn.Sequential(nn.Flatten(), nn.Linear(288, 4)))
    for output_stride in (4, 2, 1):
        geometry = fcvgg.convert(floors, input_size=27, output_stride=output_stride).geometry
        assert geometry.crop == (24, 24)


def test_branches_leave_out_what_all_of_them_leave_out() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 1, 2)
            self.fc = nn.Linear(4 * 36, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.left(x) + self.right(x)).flatten(1))

    geometry = fcvgg.convert(seeded(Branches), input_size=12).geometry
    assert (geometry.window, geometry.crop) == ((11, 11), (12, 12))


layers_of_an_unpadded_trunk = st.lists(
    st.tuples(st.sampled_from(["conv", "pool"]), st.integers(1, 3), st.integers(1, 2)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=40, deadline=None)
@given(
    layers_of_an_unpadded_trunk,
    st.tuples(st.integers(18, 30), st.integers(18, 30)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.sampled_from(["fc", "adaptive 2", "adaptive 3", "adaptive max 2", "mean", "number"]),
)
def test_any_unpadded_net_is_the_source_on_crops_of_the_native_size(
    trunk: list[tuple[str, int, int]], size: tuple[int, int], more: tuple[int, int], head: str
) -> None:
    layers: list[nn.Module] = []
    channels = 3
    for kind, kernel, stride in trunk:
        layers.append(
            nn.Conv2d(channels, 4, kernel, stride)
            if kind == "conv"
            else nn.MaxPool2d(kernel, stride)
        )
        channels = 4 if kind == "conv" else channels
    with torch.no_grad():
        shape = nn.Sequential(*layers)(torch.zeros(1, 3, *size)).shape[2:]
    pool: nn.Module = {
        "fc": nn.Identity(),
        "adaptive 2": nn.AdaptiveAvgPool2d(2),
        "adaptive 3": nn.AdaptiveAvgPool2d((3, 2)),
        "adaptive max 2": nn.AdaptiveMaxPool2d(2),
        "mean": nn.AdaptiveAvgPool2d(1),
        "number": nn.AvgPool2d((shape[0], shape[1])),
    }[head]
    assume(min(shape) >= 3)
    bins = pool(torch.zeros(1, channels, *shape)).shape[1:].numel()
    model = seeded(nn.Sequential, *layers, pool, nn.Flatten(), nn.Linear(bins, 2))
    net = fcvgg.convert(model, input_size=size)
    assert native_error(model, net, 1) <= 1e-11
    image = images(1, 3, size[0] + more[0], size[1] + more[1])
    maps = net(image)
    stride = net.geometry.stride
    for row in range(maps.shape[2]):
        for col in range(maps.shape[3]):
            top, left, bottom, right = net.geometry.window_of(row, col)
            assert (top, left) == (row * stride[0], col * stride[1])
            crop = image[..., top : top + size[0], left : left + size[1]]
            if crop.shape[2:] == size:
                assert relative_error(model(crop), maps[..., row, col]) <= 1e-11
            small = image[..., top:bottom, left:right]
            assert relative_error(model(small), maps[..., row, col]) <= 1e-11


# -- pools written as numbers ------------------------------------------------------------------

COVERING = {
    "function": lambda: Lambda(lambda x: F.avg_pool2d(x, 6)),
    "function with stride": lambda: Lambda(lambda x: F.max_pool2d(x, 6, 6)),
    "module": lambda: nn.MaxPool2d(6),
    "module with stride one": lambda: nn.MaxPool2d(6, stride=1),
    "pair": lambda: nn.AvgPool2d(kernel_size=(6, 6), stride=(6, 6)),
    "ceil mode": lambda: nn.MaxPool2d(6, ceil_mode=True),
    "divisor": lambda: nn.AvgPool2d(6, divisor_override=5),
}


@pytest.mark.parametrize("pool", COVERING.values(), ids=COVERING.keys())
@pytest.mark.parametrize("point", [False, True])
def test_a_last_pool_over_all_features_slides_by_one(pool, point: bool) -> None:
    layers = [nn.Conv2d(8, 8, 1), nn.ReLU()] if point else []
    model = seeded(
        lambda: Headed(nn.Sequential(pool(), *layers, nn.Flatten(), nn.Linear(8, 4)), pads=0)
    )
    net = fcvgg.convert(model, input_size=30)
    assert net.geometry.stride == (4, 4)
    batch = images(1, 3, 43, 38)
    assert relative_error(sliding_window(model, net, batch), net(batch)) <= 1e-12


@pytest.mark.parametrize("size", [12, (12, 16), 8])
def test_small_and_rectangular_features(size) -> None:
    """``F.avg_pool2d(x, 3)`` on 3x3 features, as old nets for 32 pixels have it."""
    height, width = (size, size) if isinstance(size, int) else size
    kernel = (height // 4, width // 4)
    for pool in (nn.AvgPool2d(kernel), Lambda(lambda x: F.avg_pool2d(x, kernel, kernel))):
        model = seeded(Headed, nn.Sequential(pool, nn.Flatten(), nn.Linear(8, 4)))
        net = fcvgg.convert(model, input_size=size)
        assert native_error(model, net) <= 1e-12
        assert net.geometry.stride == (4, 4)
        assert net.geometry.window == (height, width)


# -- numbers that follow from the size ---------------------------------------------------------


class Scaled(nn.Module):
    """Features multiplied by a number that the forward takes from a size."""

    def __init__(self, scale) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4 * 25, 3)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.fc(self.scale(x, y, F.max_pool2d(y, 2)).flatten(1))


SCALES = {
    "the image's height": lambda x, y, z: z * x.shape[2],
    "the root of the width": lambda x, y, z: z / x.size(3) ** 0.5,
    "of a map before the last pool": lambda x, y, z: z + y.shape[-1],
    "elements": lambda x, y, z: z * y[0, 0].numel(),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_a_number_that_differs_on_the_crop_is_refused(scale) -> None:
    model = seeded(Scaled, scale)
    with pytest.raises(
        fcvgg.UnsupportedLayerError,
        match=r"computes with a number that follows from the input size, .* at \(13, 13\) and .* "
        r"at \(12, 12\).*pass input_size=\(12, 12\), or write the number out",
    ):
        fcvgg.convert(model, input_size=13)
    net = fcvgg.convert(model, input_size=12)
    batch = images(1, 3, 17, 15)
    assert relative_error(sliding_window(model, net, batch), net(batch)) <= 1e-12


POOLED = {
    "sum over height and width": lambda x, y, z: z.sum((2, 3)) / (z.shape[2] * z.shape[3]),
    "features": lambda x, y, z: z * z.shape[2],
    "elements": lambda x, y, z: z / z[0].numel(),
}


@pytest.mark.parametrize("scale", POOLED.values(), ids=POOLED.keys())
@pytest.mark.parametrize("size", [12, 13])
def test_a_number_of_the_heads_own_window_is_exact(scale, size: int) -> None:
    model = seeded(Scaled, scale)
    if scale is POOLED["sum over height and width"]:
        model.fc = nn.Linear(4, 3).double()
    net = fcvgg.convert(model, input_size=size)
    batch = images(1, 3, 19, 15)
    assert relative_error(sliding_window(model, net, batch), net(batch)) <= 1e-12


# -- padding="same" ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
@pytest.mark.parametrize("bins", [1, 2, 3, 4, 5, 6, (3, 2), (6, 1), (2, 4)])
@pytest.mark.parametrize("size", [24, (20, 24)])
def test_border_cells_are_the_head_on_features_with_zeros_around_them(kind, bins, size) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    rows, cols = (bins, bins) if isinstance(bins, int) else bins
    head = nn.Sequential(
        kind(bins), nn.Flatten(), nn.Linear(8 * rows * cols, 7), nn.Tanh(), nn.Linear(7, 3)
    )
    model = seeded(Headed, head)
    net = fcvgg.convert(model, input_size=size, padding="same")
    image = images(1, 3, 36, 44)
    with torch.no_grad():
        features = model.trunk(image)
        extent = (height // 4, width // 4)
        pads = [((n - 1) // 2, n - 1 - (n - 1) // 2) for n in extent]
        padded = F.pad(features, (*pads[1], *pads[0]))
        expected = torch.stack(
            [
                model.head(padded[..., i : i + extent[0], j : j + extent[1]])
                for i in range(features.shape[2])
                for j in range(features.shape[3])
            ],
            -1,
        ).unflatten(-1, features.shape[2:])
        got = net(image)
    assert got.shape[2:] == features.shape[2:]
    assert relative_error(expected, got) <= 1e-12
