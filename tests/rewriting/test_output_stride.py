"""Finer strides by dilation: the same cells as the native map, and the slow oracle between them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import GlobalPooled, Lambda, Unpadded, images, native_error, relative_error, seeded
from torch import Tensor, nn

import fcvgg
from fcvgg.errors import ConversionError

EXACT = 1e-12


class TinyVGG(nn.Module):
    """VGG's plan: padded 3x3 convolutions and three pools, then FC layers; native size 24."""

    def __init__(self, pool: Callable[[], nn.Module] = lambda: nn.MaxPool2d(2)):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(True), pool()),
            *(nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True), pool()),
            *(nn.Conv2d(6, 7, 3, padding=1), nn.ReLU(True), pool()),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(7 * 9, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class TinyAlexNet(nn.Module):
    """AlexNet's plan: a convolution of stride 4 and overlapping 3x3 pools; native size 67."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 5, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(5, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(6 * 9, 8), nn.ReLU())
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.classifier(self.features(x).flatten(1)))


def three_and_two() -> nn.Module:
    """Strides 2 and then 3, without padding: its native stride is 6."""
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, stride=2), nn.Tanh(), nn.Conv2d(5, 6, 3, stride=3), nn.Flatten()),
        *(nn.Linear(6 * 9, 4),),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], int, list[int]]] = {
    "VGG": (TinyVGG, 24, [8, 4, 2, 1]),
    "VGG with average pools": (lambda: TinyVGG(lambda: nn.AvgPool2d(2)), 24, [8, 4, 2, 1]),
    "padded max pools": (lambda: TinyVGG(lambda: nn.MaxPool2d(3, 2, 1)), 24, [8, 4, 2, 1]),
    "padded average pools": (lambda: TinyVGG(lambda: nn.AvgPool2d(3, 2, 1)), 24, [8, 4, 2, 1]),
    "average pools that do not count padding": (
        lambda: TinyVGG(lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        24,
        [8, 4, 2, 1],
    ),
    "AlexNet": (TinyAlexNet, 67, [16, 8, 4, 2, 1]),
    "ResNet": (GlobalPooled, 40, [8, 4, 2, 1]),
    "no padding": (Unpadded, 34, [8, 4, 2, 1]),
    "strides 2 and 3": (three_and_two, 19, [6, 3, 2, 1]),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("extra", [(0, 0), (13, 30)])
def test_subsampling_the_dense_map_gives_the_native_map(name: str, extra: tuple[int, int]) -> None:
    build, size, strides = NETS[name]
    model = seeded(build)
    native = fcvgg.convert(model, input_size=size)
    assert native.geometry.stride == (strides[0], strides[0])
    batch = images(2, 3, size + extra[0], size + extra[1])
    expected = native(batch)
    assert native_error(model, native) <= EXACT
    for stride in strides:
        net = fcvgg.convert(model, input_size=size, output_stride=stride)
        k = strides[0] // stride
        maps = net(batch)
        assert relative_error(expected, maps[..., ::k, ::k]) <= EXACT, stride
        assert tuple(maps.shape[2:]) == net.output_size(batch.shape[2:])
        assert net.state_dict().keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(net.classifier_state_dict()[key].reshape(value.shape), value), key


def shift_and_stitch(net: nn.Module, batch: Tensor, stride: int) -> Tensor:
    """The slow oracle: the native net on shifted inputs, its maps interleaved.

    Phases have as many cells as fit their shifted input; the dense map has those and no others.
    """
    native = net.geometry.stride[0]
    phases = native // stride
    parts = {
        (i, j): net(batch[:, :, i * stride :, j * stride :])
        for i in range(phases)
        for j in range(phases)
        if all(n - s * stride >= w for n, s, w in zip(batch.shape[2:], (i, j), net.geometry.window))
    }
    rows = sum(parts[i, 0].shape[2] for i in range(phases) if (i, 0) in parts)
    cols = sum(parts[0, j].shape[3] for j in range(phases) if (0, j) in parts)
    first = parts[0, 0]
    stitched = first.new_full((*first.shape[:2], rows, cols), torch.nan)
    for (i, j), part in parts.items():
        stitched[:, :, i::phases, j::phases] = part
    return stitched


UNPADDED: dict[str, tuple[Callable[[], nn.Module], int, list[int]]] = {
    "pools of both kinds": (Unpadded, 34, [8, 4, 2, 1]),
    "strides 2 and 3": (three_and_two, 19, [6, 3, 2, 1]),
    "overlapping pools": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 5, 5, stride=4), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(5, 6, 2)),
            *(nn.AvgPool2d(3, 2), nn.Flatten(), nn.Linear(6 * 4, 4)),
        ),
        61,
        [16, 8, 4, 2, 1],
    ),
    "two branches": (
        lambda: Lambda(
            lambda x, a, b, fc: fc((a(x) + b(x)).flatten(1)),
            *(nn.Conv2d(3, 5, 4, stride=4), nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(3, 5, 1))),
            nn.Linear(5 * 9, 4),
        ),
        12,
        [4, 2, 1],
    ),
}


@pytest.mark.parametrize("name", UNPADDED)
def test_every_phase_of_an_unpadded_net_is_the_net_on_the_shifted_image(name: str) -> None:
    build, size, strides = UNPADDED[name]
    model = seeded(build)
    native = fcvgg.convert(model, input_size=size)
    assert native.geometry.stride == (strides[0], strides[0])
    batch = images(1, 3, size + 29, size + 20)
    for stride in strides[1:]:
        net = fcvgg.convert(model, input_size=size, output_stride=stride)
        expected = shift_and_stitch(native, batch, stride)
        assert not expected.isnan().any()
        assert relative_error(expected, net(batch)) <= EXACT, stride


@pytest.mark.parametrize("name", NETS)
def test_the_geometry_follows(name: str) -> None:
    build, size, strides = NETS[name]
    model = seeded(build)
    native = fcvgg.convert(model, input_size=size).geometry
    for stride in strides:
        net = fcvgg.convert(model, input_size=size, output_stride=stride)
        geometry = net.geometry
        assert geometry.stride == (stride, stride)
        assert geometry.offset == native.offset
        assert geometry.receptive_field == native.receptive_field
        assert geometry.window == native.window
        assert geometry.centre_of(0, 0) == native.centre_of(0, 0)
        for pixels in (size, size + 5, size + 41):
            shape = net(images(1, 3, pixels, pixels + 7)).shape
            assert tuple(shape[2:]) == geometry.output_size((pixels, pixels + 7))


@pytest.mark.parametrize("name", ["VGG", "ResNet", "no padding"])
def test_the_receptive_field_is_where_the_gradient_is(name: str) -> None:
    """Every stride's cell depends on pixels inside its field and, at the field's edges, on some."""
    build, size, strides = NETS[name]
    net = fcvgg.convert(seeded(build), input_size=size, output_stride=strides[1])
    field = max(net.geometry.receptive_field)
    batch = images(8, 3, field + 4 * size, field + 4 * size, requires_grad=True)
    maps = net(batch)
    row, col = (n // 2 for n in maps.shape[2:])
    (gradient,) = torch.autograd.grad(maps[:, :, row, col].sum(), batch)
    seen = (gradient != 0).any(0).any(0).nonzero()
    top, left, bottom, right = net.geometry.receptive_field_of(row, col)
    assert seen.min(0).values.tolist()[0] >= top
    assert seen.min(0).values.tolist()[1] >= left
    assert seen.max(0).values.tolist()[0] < bottom
    assert seen.max(0).values.tolist()[1] < right
    # max pools pass the gradient of one pixel on, so the outermost may go unseen
    margin = 2 * strides[0]
    assert seen.min(0).values.tolist()[0] <= top + margin
    assert seen.max(0).values.tolist()[0] >= bottom - margin


def test_dense_nets_train_like_the_source() -> None:
    model = seeded(TinyVGG)
    native = fcvgg.convert(model, copy=True)
    dense = fcvgg.convert(model, output_stride=2, copy=True)
    batch = images(2, 3, 24, 24)
    for net in (native, dense):
        F.cross_entropy(net(batch)[..., 0, 0], torch.tensor([1, 3])).backward()
    pairs = zip(native.parameters(), dense.parameters(), strict=True)
    for a, b in pairs:
        assert relative_error(a.grad, b.grad) <= 1e-11


def test_same_padding_with_a_finer_stride() -> None:
    model = seeded(TinyVGG)
    for stride, cells in ((8, 6), (4, 11), (2, 21)):
        net = fcvgg.convert(model, output_stride=stride, padding="same")
        assert net.equivalence.passed
        assert net.output_size(48) == (cells, cells)


@pytest.mark.parametrize("stride", [3, 5, 6, 12, 16, 32])
def test_a_stride_that_does_not_divide_is_refused(stride: int) -> None:
    with pytest.raises(
        ConversionError,
        match=rf"output_stride must be one .* layers come to, 8, 4, 2 or 1, got {stride}$",
    ):
        fcvgg.convert(seeded(TinyVGG), output_stride=stride)


@pytest.mark.parametrize("stride", [0, -2, 1.5, "8"])
def test_a_stride_that_is_no_positive_integer_is_refused(stride: object) -> None:
    with pytest.raises(fcvgg.ArgumentError, match="output_stride must be a positive integer"):
        fcvgg.convert(seeded(TinyVGG), output_stride=stride)


@pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AvgPool2d])
def test_ceil_mode_is_refused_where_it_cannot_be_exact(pool: type[nn.Module]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(3, 5, 3, stride=2), pool(2, 2, ceil_mode=True), nn.ReLU()),
            *(nn.Conv2d(5, 6, 3, stride=2), nn.Flatten(), nn.Linear(6 * 9, 4)),
        )

    model = seeded(build)
    native = fcvgg.convert(model, input_size=31)
    dense = fcvgg.convert(model, input_size=31, output_stride=4)  # dilates what follows the pool
    batch = images(1, 3, 47, 60)
    assert relative_error(native(batch), dense(batch)[..., ::2, ::2]) <= EXACT
    with pytest.raises(ConversionError, match=r"cannot be exact at .*ceil_mode"):
        fcvgg.convert(model, input_size=31, output_stride=2)


def test_the_benchmark_compares_maps_that_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[2] / "examples" / "benchmarks" / "output_stride.py"
    spec = importlib.util.spec_from_file_location("output_stride", path)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "output_stride", benchmark)  # for its dataclass
    spec.loader.exec_module(benchmark)
    model = seeded(Unpadded)
    native = fcvgg.convert(model)
    batch = images(1, 3, 57, 49)
    with torch.no_grad():
        for stride in (8, 4, 2, 1):
            dense = fcvgg.convert(model, output_stride=stride)(batch)
            stitched = benchmark.shift_and_stitch(native, batch, stride)
            assert relative_error(dense, stitched) <= EXACT


class Strided(nn.Module):
    """Convolutions of these strides before a head."""

    def __init__(self, strides: tuple[int, ...]):
        super().__init__()
        layers = [nn.Conv2d(3, 3, 3, stride=stride, padding=1) for stride in strides]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize("strides", [(2, 2, 2), (4, 3), (3, 4), (6, 1, 2), (1,), (5,)])
def test_the_strides_that_an_error_lists_are_those_that_can_be_reached(strides) -> None:
    model, native = seeded(Strided, strides), prod(strides)
    reached = []
    for wanted in range(2 * native + 1, 0, -1):
        try:
            net = fcvgg.convert(model, input_size=48, output_stride=wanted, verify=False)
        except fcvgg.ConversionError as error:
            message = str(error)
            assert message.endswith(f", got {wanted}")
        else:
            assert net.geometry.stride == (wanted, wanted)
            reached.append(wanted)
    *others, last = map(str, reached)
    listed = f"{', '.join(others)} or {last}" if others else last
    assert f"output_stride must be one that the network's layers come to, {listed}, got" in message
