"""Pooled heads beyond averages and maxima."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nets import images, native_error, relative_error, seeded, sliding_window
from torch import Tensor, nn

import fcvgg


class Pooled(nn.Module):
    """An unpadded trunk, a pool, and a fully connected layer."""

    def __init__(self, pool: Callable[..., Tensor]):
        super().__init__()
        self.pool = pool
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 2))
        self.power = nn.Parameter(torch.tensor([3.0]))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.trunk(x), self.power).flatten(1))


def gem(x: Tensor, power: Tensor) -> Tensor:
    x = x.clamp(min=1e-6).pow(power)
    return nn.functional.avg_pool2d(x, (x.size(-2), x.size(-1))).pow(1.0 / power)


def log_sum_exp(x: Tensor, power: Tensor) -> Tensor:
    return torch.logsumexp(x * power, (2, 3)) / power


def log_mean_exp(x: Tensor, power: Tensor) -> Tensor:
    return (x * power).exp().mean((2, 3)).log() / power


def of_channels(x: Tensor, power: Tensor) -> Tensor:
    return (x - x.logsumexp(1, keepdim=True)).amax((2, 3))


POOLS = [gem, log_sum_exp, log_mean_exp, of_channels]


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool.__name__)
@pytest.mark.parametrize("output_stride", [None, 1])
def test_pooled_heads(
    pool: Callable[..., Tensor], output_stride: int | None, tmp_path: Path
) -> None:
    model = seeded(Pooled, pool)
    net = fcvgg.convert(model, input_size=11, output_stride=output_stride)
    assert native_error(model, net) <= 1e-12
    batch = images(2, 3, 18, 15)
    maps = net(batch)
    assert relative_error(sliding_window(model, net, batch), maps) <= 1e-12
    net.save(tmp_path / "net.fcvgg")
    assert relative_error(maps, fcvgg.load(tmp_path / "net.fcvgg")(batch)) <= 1e-12
    streamed = torch.as_tensor(fcvgg.stream(net, batch[0]).scores)
    torch.testing.assert_close(streamed, maps[0], rtol=1e-12, atol=1e-12)
