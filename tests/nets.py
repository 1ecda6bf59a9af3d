"""Tiny seeded classifiers, each named for what it isolates, and the slow oracles.

All are in evaluation mode and float64 unless asked otherwise; `seeded` gives batch norms
statistics that are not the identity, so that a lost one shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import VGG, cfgs, make_layers

from fcvgg.rewriting.outputs import flattened

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""The design's tolerances at the native size, relative to the largest score."""

VGG_CONFIGURATIONS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
VGGS = [name + suffix for name in VGG_CONFIGURATIONS for suffix in ("", "_bn")]


def seeded(
    build: Callable[..., nn.Module], *args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> nn.Module:
    """A model with the same weights at every call, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.track_running_stats:
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.to(dtype).eval()


def images(
    *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64, requires_grad: bool = False
) -> Tensor:
    """Noise ``(N, C, H, W)``, the same at every call."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.to(dtype).requires_grad_(requires_grad)


def relative_error(expected: Tensor, got: Tensor) -> float:
    """The largest difference, relative to the largest of the expected values."""
    assert expected.shape == got.shape, (expected.shape, got.shape)
    return ((expected - got).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def native_error(model: nn.Module, net: nn.Module, count: int = 3) -> float:
    """How far the two are apart at the native size; also checks that the map is one cell."""
    dtype = next(model.parameters()).dtype
    batch = images(count, net.in_channels, *net.input_size, dtype=dtype)
    pairs = list(zip(as_tuple(model(batch)), as_tuple(net(batch)), strict=True))
    for expected, got in pairs:
        assert tuple(got.shape[2:]) == (1, 1) == net.output_size(net.input_size)
        assert torch.equal(expected.reshape(count, -1).argmax(1), got.flatten(1).argmax(1))
    return max(relative_error(a.reshape(count, -1), b.flatten(1)) for a, b in pairs)


@torch.no_grad()
def assert_restored(original: nn.Module, restored: nn.Module, batch: Tensor) -> None:
    """A network that was read back or copied has the same weights, bit for bit, and their scores.

    The scores are equal to rounding: where tensors lie in memory decides which kernels run.
    """
    state = restored.state_dict()
    assert state.keys() == original.state_dict().keys()
    for name, value in original.state_dict().items():
        assert (value.dtype, value.shape) == (state[name].dtype, state[name].shape), name
        assert torch.equal(value, state[name]), name
    for expected, got in zip(as_tuple(original(batch)), as_tuple(restored(batch)), strict=True):
        assert relative_error(expected, got) <= EXACT[expected.dtype]


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return tuple(flattened(value)[0])


@torch.no_grad()
def sliding_window(model: nn.Module, net: nn.Module, batch: Tensor) -> Tensor:
    """The oracle: the source model on the crop of every cell, ``(N, K, h, w)``."""
    rows, cols = net.output_size(batch.shape[2:])
    scores = []
    for row in range(rows):
        for col in range(cols):
            top, left, bottom, right = net.geometry.window_of(row, col)
            scores.append(model(batch[:, :, top:bottom, left:right]))
    return torch.stack(scores, -1).unflatten(-1, (rows, cols))


# -- VGG and its like ---------------------------------------------------------------------------


def narrow_vgg(name: str, classes: int = 10, width: int = 16) -> nn.Module:
    """torchvision's VGG at full depth with 1/`width` of the channels and of the head."""
    configuration = cfgs[VGG_CONFIGURATIONS[name.removesuffix("_bn")]]
    narrow = [v if v == "M" else int(v) // width for v in configuration]
    features = make_layers(narrow, batch_norm=name.endswith("_bn"))
    with torch.device("meta"):  # the head that torchvision would make has 120 million weights
        model = VGG(features, init_weights=False)
    channels = 512 // width
    model.classifier = nn.Sequential(
        *(nn.Linear(channels * 49, 64), nn.ReLU(True), nn.Dropout()),
        *(nn.Linear(64, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, classes)),
    )
    return model


class SmallVGG(nn.Module):
    """Two padded convolutions, two pools, three FC layers: native size 32, 8x8 features."""

    def __init__(self, classes: int = 5, in_channels: int = 3, bn: bool = False):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8) if bn else nn.Identity()),
            *(nn.ReLU(True), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(12 * 8 * 8, 24), nn.ReLU(True), nn.Dropout(0.3)),
            *(nn.Linear(24, 16), nn.ReLU(True), nn.Dropout(0.3), nn.Linear(16, classes)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Unpadded(nn.Module):
    """No padding anywhere, floor mode: equal to the sliding window at every cell."""

    def __init__(self, classes: int = 4, extent: tuple[int, int] = (3, 3)):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Tanh(), nn.AvgPool2d(2)),
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(8 * extent[0] * extent[1], 7), nn.ReLU(), nn.Linear(7, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Headed(nn.Module):
    """A trunk with 6x6x8 features at the native size 24, and the head under test."""

    def __init__(self, head: nn.Module, pads: int = 1):
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=pads), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 8, 3, padding=pads), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.trunk(x))


class Lambda(nn.Module):
    """A function as a module, with the layers that it uses; `call` receives them first."""

    def __init__(self, call: Callable[..., Any], *layers: nn.Module):
        super().__init__()
        self.call = call
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.call(x, *self.layers)


class Functional(nn.Module):
    """Parameters of its own and functions only."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) / 3)
        self.norm_weight = nn.Parameter(torch.rand(6) + 0.5)
        self.register_buffer("mean", torch.randn(6) / 4)
        self.register_buffer("var", torch.rand(6) + 0.5)
        self.fc1 = nn.Parameter(torch.randn(16, 6 * 7 * 7) / 16)
        self.bias1 = nn.Parameter(torch.randn(16))
        self.fc2 = nn.Parameter(torch.randn(5, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, stride=2, padding=1))
        x = F.batch_norm(x, self.mean, self.var, self.norm_weight, training=self.training)
        x = F.adaptive_avg_pool2d(F.max_pool2d(x, 2), (7, 7))
        x = F.dropout(x.view(x.size(0), -1), 0.4, training=self.training)
        x = torch.tanh(F.linear(x, self.fc1, self.bias1))
        return F.log_softmax(F.linear(x, self.fc2), dim=-1)


class GlobalPooled(nn.Module):
    """Strided and padded convolutions with a shortcut, and a global average pool."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.left = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.right = nn.Conv2d(8, 12, 1, stride=2)
        self.fc = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = F.relu(self.left(x) + self.right(x))
        return self.fc(x.mean((2, 3)))


class SqueezeExcited(nn.Module):
    """Channels gated by a global pool, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.fc(x.mean((2, 3)))
