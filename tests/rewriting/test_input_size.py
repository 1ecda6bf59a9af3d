"""Any input size: the native one inferred, every other one mapped as the geometry says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import (
    Functional,
    GlobalPooled,
    Headed,
    Lambda,
    SmallVGG,
    Unpadded,
    images,
    narrow_vgg,
    native_error,
    relative_error,
    seeded,
    sliding_window,
)
from torch import Tensor, nn

import fcvgg

# -- the native size ------------------------------------------------------------------------------


def vgg_with_head(extent: int) -> nn.Module:
    """VGG11 whose head takes `extent` x `extent` features, without an adaptive pool."""
    model = narrow_vgg("vgg11", width=32)
    model.avgpool = nn.Identity()
    model.classifier[0] = nn.Linear(16 * extent * extent, 64)
    return model


@pytest.mark.parametrize(("extent", "size"), [(1, 32), (4, 128), (7, 224), (12, 384)])
def test_the_native_size_follows_from_the_first_fc_layer(extent: int, size: int) -> None:
    model = seeded(vgg_with_head, extent)
    net = fcvgg.convert(model, verify=False)
    assert net.input_size == net.geometry.window == (size, size)
    assert net.geometry.stride == (32, 32)
    assert native_error(model, net, 1) <= 1e-12


@pytest.mark.parametrize(
    "call",
    [
        lambda x, fc: fc(x.view(-1, 8 * 6 * 6)),
        lambda x, fc: fc(x.reshape((-1, 288))),
        lambda x, fc: fc(x.reshape(x.size(0), 8 * 36)),
        lambda x, fc: fc(x.permute(0, 2, 3, 1).reshape(-1, 288)),
        lambda x, fc: fc(x.view(x.size(0), 8, 36).flatten(1)),
        lambda x, fc: fc((x if x.shape[-1] > 5 else F.interpolate(x, 6)).flatten(1)),
        lambda x, fc: F.linear(x.flatten(1), fc.weight),
        lambda x, fc: fc(F.adaptive_max_pool2d(x, 6).flatten(1)),
    ],
)
def test_the_native_size_is_one_at_which_the_batch_stays_the_batch(call: Any) -> None:
    model = seeded(Headed, Lambda(call, nn.Linear(288, 4)))
    net = fcvgg.convert(model)
    assert net.input_size == (24, 24)
    assert native_error(model, net) <= 1e-12


def test_the_smallest_native_size_is_inferred_and_a_larger_one_is_the_same_net() -> None:
    model = seeded(narrow_vgg, "vgg11", width=64)
    inferred, given_size = fcvgg.convert(model), fcvgg.convert(model, input_size=240)
    assert (inferred.input_size, given_size.input_size) == ((224, 224), (240, 240))
    assert inferred.geometry == given_size.geometry
    assert native_error(model, given_size, 1) <= 1e-12
    batch = images(1, 3, 256, 300)
    torch.testing.assert_close(inferred(batch), given_size(batch))


def test_a_trunk_that_needs_more_than_the_first_trial_size() -> None:
    def build() -> nn.Module:
        pools = [
            layer for _ in range(4) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(4))
        ]
        return nn.Sequential(nn.Conv2d(3, 4, 1), *pools, nn.Flatten(), nn.Linear(4, 2))

    model = seeded(build)
    net = fcvgg.convert(model, verify=False)
    assert net.input_size == (256, 256)
    assert native_error(model, net, 1) <= 1e-12


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: seeded(GlobalPooled),
            r"mean .* takes features of any size, so the native size is not determined; pass input",
        ),
        (
            lambda: torchvision.models.resnet18(),
            r"avgpool \(AdaptiveAvgPool2d\) takes features of any size, .*; pass input_size=",
        ),
        (
            lambda: seeded(Headed, Lambda(lambda x, fc: fc(x.flatten(1)), nn.Linear(8 * 35, 4))),
            r"no square input gives .* the 280 features it takes: 24 pixels give 8x6x6; pass input",
        ),
        (
            lambda: seeded(Headed, Lambda(lambda x, fc: fc(x.flatten(1)), nn.Linear(5, 4))),
            r"no square input gives .* the 5 features it takes",
        ),
    ],
)
def test_where_the_graph_does_not_determine_the_native_size_it_is_asked_for(
    build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(fcvgg.InputSizeError, match=message):
        fcvgg.convert(build())


def test_a_model_that_insists_on_its_size_is_asked_for_it() -> None:
    def head(x, fc):
        assert x.shape[2] == 6, "wrong image size"
        return fc(x.flatten(1))

    model = seeded(Headed, Lambda(head, nn.Linear(288, 4)))
    with pytest.raises(fcvgg.InputSizeError, match=r"wrong image size.*; pass input_size="):
        fcvgg.convert(model)
    assert fcvgg.convert(model, input_size=24).equivalence.passed


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, r"input_size must be a positive int or \(h, w\), got 0"),
        ((32, -1), r"input_size must be .*, got \(32, -1\)"),
        ((1, 2, 3), r"input_size must be .*, got \(1, 2, 3\)"),
        (32.5, r"input_size must be .*, got 32\.5"),
        ("32", r"input_size must be .*, got '32'"),
        (40, r"does not run at input size \(40, 40\): classifier.0 \(Linear\) fails with"),
        (2, r"does not run at input size \(2, 2\): features.6 \(MaxPool2d\) fails with"),
    ],
)
def test_wrong_native_sizes(size: Any, message: str) -> None:
    with pytest.raises(fcvgg.InputSizeError, match=message):
        fcvgg.convert(seeded(SmallVGG), input_size=size)


def test_a_native_size_at_which_a_fixed_view_mixes_the_batch() -> None:
    model = seeded(Headed, Lambda(lambda x, fc: fc(x.view(-1, 288)), nn.Linear(288, 4)))
    with pytest.raises(
        fcvgg.InputSizeError,
        match=r"view \(Tensor.view in head\) moves elements between the images of the batch at "
        r"input size \(48, 48\): a reshape with fixed sizes turned positions into batch rows",
    ):
        fcvgg.convert(model, input_size=48)


# -- every other size -----------------------------------------------------------------------------


def converted(model: nn.Module, **options: Any) -> Any:
    return fcvgg.convert(model, verify=False, **options)


NETS: dict[str, Callable[[], Any]] = {
    "vgg": lambda: converted(seeded(SmallVGG)),
    "functional": lambda: converted(seeded(Functional), input_size=28),
    "global pool": lambda: converted(seeded(GlobalPooled), input_size=40),
    "unpadded": lambda: converted(seeded(Unpadded)),
    "finer": lambda: converted(seeded(SmallVGG), output_stride=1),
    "same": lambda: converted(seeded(SmallVGG), padding="same"),
    "pool of bins": lambda: converted(
        seeded(
            Headed,
            nn.Sequential(nn.AdaptiveAvgPool2d((4, 3)), nn.Flatten(), nn.Linear(96, 4)),
        ),
        input_size=(28, 40),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_the_output_size_is_what_the_geometry_says(name: str) -> None:
    net = NETS[name]()
    for height, width in [(1, 1), (1, 50), (2, 3), (7, 31), (33, 32), (45, 61), (64, 97), (90, 64)]:
        with torch.no_grad():
            maps = net(images(2, 3, height, width))
        assert tuple(maps.shape) == (2, net.num_classes, *net.output_size((height, width)))
        assert torch.isfinite(maps).all()


@pytest.mark.parametrize("size", [(1, 1), (5, 30), (31, 32), (20, 60)])
def test_below_the_window_the_image_is_centred_in_zeros(size: tuple[int, int]) -> None:
    net = fcvgg.convert(seeded(SmallVGG))
    batch = images(1, 3, *size)
    canvas = torch.zeros(1, 3, *(max(n, 32) for n in size), dtype=torch.float64)
    top, left = (max(32 - n, 0) // 2 for n in size)
    canvas[:, :, top : top + size[0], left : left + size[1]] = batch
    torch.testing.assert_close(net(batch), net(canvas))
    y, x = net.geometry.placed(size).centre_of(0, 0)
    assert (y, x) == (15.5 - top, 15.5 - left)


def test_every_image_of_a_batch_is_mapped_alike() -> None:
    net = fcvgg.convert(seeded(SmallVGG))
    batch = images(5, 3, 44, 70)
    maps = net(batch)
    for i in range(5):
        assert relative_error(maps[i : i + 1], net(batch[i : i + 1])) <= 1e-12


def test_rows_past_the_last_full_cell_are_not_seen() -> None:
    net = fcvgg.convert(seeded(Unpadded))
    window, stride = net.geometry.window[0], net.geometry.stride[0]
    batch = images(1, 3, window + stride - 1, window)
    changed = batch.clone()
    changed[:, :, window:] = 9
    torch.testing.assert_close(net(batch), net(changed))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            images(3, 32, 32),
            r"images must be \(N, 3, H, W\), got \(3, 32, 32\); add the batch with",
        ),
        (images(1, 4, 32, 32), r"images must have 3 channels, got 4 in \(1, 4, 32, 32\); pass"),
        (images(0, 3, 32, 32), r"images must hold at least one pixel, got .*\(0, 3, 32, 32\)"),
        (images(1, 3, 0, 32), r"images must hold at least one pixel, got .*\(1, 3, 0, 32\)"),
        ([[1]], r"images must be \(N, 3, H, W\), got list"),
    ],
)
def test_what_is_no_batch_of_images(bad: Any, message: str) -> None:
    net = fcvgg.convert(seeded(SmallVGG), verify=False)
    with pytest.raises(fcvgg.ImageError, match=message):
        net(bad)


# -- any net at any size --------------------------------------------------------------------------


@st.composite
def layers(draw: Any, channels: int, padded: bool, ceil: bool) -> tuple[nn.Module, int]:
    """A convolution, a pool or two branches, with any kernel, stride, dilation and padding."""
    kind = draw(st.sampled_from(["conv", "conv", "max", "avg", "branches"]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    if kind == "branches":
        width = draw(st.integers(1, 3))
        return Branches(channels, width, draw(st.integers(1, 2)), padded, draw(st.booleans())), 4
    dilation = draw(st.integers(1, 2)) if kind != "avg" else 1
    most = [(k - 1) * dilation // 2 if kind == "conv" else k // 2 for k in kernel]
    padding = tuple(draw(st.integers(0, m)) for m in most) if padded else (0, 0)
    if kind == "conv":
        return nn.Conv2d(channels, 4, kernel, stride, padding, dilation), 4
    rounding = draw(st.booleans()) and ceil
    if kind == "max":
        return nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=rounding), channels
    counted = draw(st.booleans())
    return nn.AvgPool2d(kernel, stride, padding, rounding, counted), channels


class Branches(nn.Module):
    """A shortcut beside a convolution that keeps the map's size, added or concatenated."""

    def __init__(self, channels: int, kernel: int, stride: int, padded: bool, joined: bool):
        super().__init__()
        width = 2 if joined else 4
        pad = kernel // 2 if padded and kernel % 2 else 0
        self.crop = 0 if pad else kernel - 1
        self.a = nn.Conv2d(channels, width, kernel, stride, pad)
        self.b = nn.Conv2d(channels, width, 1 if pad else kernel, stride)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), torch.tanh(self.b(x))
        return torch.cat([a, b], 1) if self.joined else a + b


@st.composite
def classifiers(draw: Any, padded: bool = True, ceil: bool = True) -> tuple[nn.Module, Any]:
    """A trunk of up to four layers and a head, and a native size at which it runs."""
    torch.manual_seed(draw(st.integers(0, 9)))
    channels, trunk = 3, []
    for _ in range(draw(st.integers(1, 4))):
        layer, channels = draw(layers(channels, padded, ceil))
        trunk += [layer, nn.Softplus()]
    features = nn.Sequential(*trunk).double()
    size = draw(st.tuples(st.integers(12, 40), st.integers(12, 40)))
    try:
        extent = features(torch.zeros(1, 3, *size, dtype=torch.float64)).shape[2:]
    except RuntimeError:  # a kernel larger than what is left
        size = (90, 90)
        extent = features(torch.zeros(1, 3, *size, dtype=torch.float64)).shape[2:]
    head = draw(st.sampled_from(["flatten", "pool", "bins"]))
    if head == "flatten":
        front = [nn.Flatten(), nn.Linear(channels * extent[0] * extent[1], 5)]
    elif head == "pool":
        front = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]
    else:
        front = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(channels * 4, 5)]
    model = nn.Sequential(features, *front, nn.Tanh(), nn.Linear(5, 3)).double().eval()
    return model, size


ANY_NET = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@ANY_NET
@given(classifiers(), st.data())
def test_any_net_converts_exactly_and_gives_the_geometrys_output_size(
    classifier: tuple[nn.Module, Any], data: Any
) -> None:
    model, size = classifier
    net = fcvgg.convert(model, input_size=size)
    batch = images(2, 3, *size)
    with torch.no_grad():
        assert relative_error(model(batch), net(batch)[:, :, 0, 0]) <= 1e-12
    other = data.draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    assert tuple(net(images(1, 3, *other)).shape[2:]) == net.output_size(other)


@ANY_NET
@given(classifiers(padded=False, ceil=False), st.integers(0, 9), st.integers(0, 9))
def test_any_unpadded_net_equals_the_sliding_window(
    classifier: tuple[nn.Module, Any], more_rows: int, more_cols: int
) -> None:
    model, size = classifier
    net = fcvgg.convert(model, input_size=size, verify=False)
    (height, width), (down, right) = net.geometry.window, net.geometry.stride
    batch = images(1, 3, height + min(more_rows, 2 * down), width + min(more_cols, 2 * right))
    expected = sliding_window(model, net, batch)
    assert relative_error(expected, net(batch)) <= 1e-11
    assert not net.geometry.touches_padding(batch.shape[2:]).any()


class Flat(nn.Module):
    """One linear layer on features of stride 4, made for 24x24 pixels or a size like it."""

    def __init__(self, features: int = 36):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(2 * features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


@pytest.mark.parametrize("given", [20, 32, (24, 32), 2])
def test_a_size_that_does_not_fit_names_one_that_does(given: Any) -> None:
    message = r"^the model does not run at input size .*; pass input_size=23, which the head is ma"
    with pytest.raises(fcvgg.InputSizeError, match=message):
        fcvgg.convert(seeded(Flat), input_size=given)
    assert fcvgg.convert(seeded(Flat), input_size=23).output_size(23) == (1, 1)


def test_a_size_that_does_not_fit_where_no_square_does() -> None:
    with pytest.raises(fcvgg.InputSizeError, match=r"does not run .*; pass another input_size$"):
        fcvgg.convert(seeded(Flat, 35), input_size=24)
