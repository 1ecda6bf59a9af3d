"""Reductions over the channels of each position are exact; over positions they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import images, native_error, relative_error, seeded, sliding_window
from torch import Tensor, nn

import fcvgg


class Between(nn.Module):
    """A function of a map between an unpadded convolution and a pooled head."""

    def __init__(self, function: Callable[..., Tensor], channels: int = 6):
        super().__init__()
        self.function = function
        self.stem = nn.Conv2d(3, 6, 3, stride=2)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.shift = nn.Parameter(torch.rand(6))
        self.conv = nn.Conv2d(channels, 4, 2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.stem(x), self.scale, self.shift)
        return self.fc(self.conv(x).mean((2, 3)))


def layer_norm2d(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return scale[:, None, None] * (x - mean) / torch.sqrt(variance + 1e-6) + shift[:, None, None]


def rms_norm2d(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=1, keepdim=True) + 1e-6) * scale.view(1, -1, 1, 1)


def with_variance(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x / (x.var(dim=1, keepdim=True, unbiased=False) + torch.std(x, 1, keepdim=True))


def with_both(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    return (x - mean) * variance


def channels_last(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    x = torch.addcmul(shift, x, scale) / x.norm(dim=-1, keepdim=True)
    gate, value = x.split(3, -1)
    return torch.cat([gate * value, value - gate.amin(3, keepdim=True)], -1).permute(0, 3, 1, 2)


def spatial_attention(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    seen = torch.stack([x.mean(1), x.amax(1), torch.linalg.vector_norm(x, 1, 1)], 1)
    return x * torch.sigmoid(seen.sum(1, keepdim=True)) + x.max(1, keepdim=True)[0]


KINDS = [layer_norm2d, rms_norm2d, with_variance, with_both, channels_last, spatial_attention]


@pytest.mark.parametrize("function", KINDS, ids=lambda function: function.__name__)
def test_reductions_over_channels(function: Callable[..., Tensor], tmp_path: Path) -> None:
    model = seeded(Between, function)
    net = fcvgg.convert(model, input_size=15)
    assert native_error(model, net) <= 1e-12
    batch = images(2, 3, 22, 19)
    maps = net(batch)
    assert relative_error(sliding_window(model, net, batch), maps) <= 1e-12
    net.save(tmp_path / "net.fcvgg")
    assert relative_error(maps, fcvgg.load(tmp_path / "net.fcvgg")(batch)) <= 1e-12
    streamed = torch.as_tensor(fcvgg.stream(net, batch[0]).scores)
    torch.testing.assert_close(streamed, maps[0], rtol=1e-12, atol=1e-12)


REFUSED = {
    "global response normalisation": (
        lambda x, a, b: x / x.norm(dim=(2, 3), keepdim=True),
        r"truediv .*combines a map with a value pooled over all its positions",
    ),
    "efficient channel attention": (
        lambda x, a, b: (
            x
            * nn.functional.conv1d(x.mean((2, 3))[:, None], a[None, None, :3], padding=1)
            .view(-1, 6, 1, 1)
            .expand_as(x)
        ),
        r"expand .*combines a map with a value pooled over all its positions",
    ),
    "channels last": (
        lambda x, a, b: (x.movedim(1, -1) * x.movedim(1, -1).mean((1, 2), keepdim=True)).movedim(
            -1, 1
        ),
        r"mul .*combines a map with a value pooled over all its positions",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_statistics_of_the_whole_map_are_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(fcvgg.UnsupportedLayerError, match=message):
        fcvgg.convert(seeded(Between, function), input_size=15)


def test_a_norm_of_the_pooled_features() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).mean((2, 3), keepdim=True)  # (N, 6, 1, 1)
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            return self.fc((x * torch.rsqrt(x.pow(2).mean(1, keepdim=True))).flatten(1))

    model = seeded(Head)
    net = fcvgg.convert(model, input_size=9)
    batch = images(2, 3, 12, 11)
    assert relative_error(sliding_window(model, net, batch), net(batch)) <= 1e-12


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_the_record_of_a_functional_norm_names_its_kind(kind: str) -> None:
    norm = {"LayerNorm": F.layer_norm, "RMSNorm": F.rms_norm}[kind]

    def last(x: Tensor, *_: Tensor) -> Tensor:
        return norm(x.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2)

    net = fcvgg.convert(seeded(Between, last), input_size=15)
    assert kind in [layer.kind for layer in net.program.records]
