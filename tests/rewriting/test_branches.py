"""Branches that meet: of one size at the native size, and cut to one where others part them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import images, native_error, relative_error, seeded
from torch import Tensor, nn

import fcvgg


class Parting(nn.Module):
    """Two ways to halve a map, of which one drops an odd row and the other pads it."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], channels: int):
        super().__init__()
        self.join = join
        self.shrink = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.pool = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2))
        self.fc = nn.Linear(channels * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.join(self.shrink(x), self.pool(x)).flatten(1))


JOINS = {
    "add": (lambda a, b: a + b, 4),
    "in place": (lambda a, b: b.add_(a), 4),
    "where": (lambda a, b: torch.where(a > b, a, b * a), 4),
    "cat": (lambda a, b: torch.cat([F.relu(a), b], 1), 8),
}


@pytest.mark.parametrize("join", JOINS)
def test_branches_that_part_at_odd_sizes(join: str, tmp_path: Path) -> None:
    model = seeded(Parting, *JOINS[join])
    net = fcvgg.convert(model)
    assert native_error(model, net) <= 1e-12
    batch = images(2, 3, 23, 20)  # 12x10 and 11x10 features
    maps = net(batch)
    assert tuple(maps.shape[2:]) == net.output_size((23, 20)) == (4, 3)
    pooled = model.pool(batch)  # the smaller one
    joined = model.join(model.shrink(batch)[:, :, :11, :10], pooled)
    expected = F.conv2d(joined, model.fc.weight.unflatten(1, (-1, 8, 8)), model.fc.bias)
    torch.testing.assert_close(maps, expected, rtol=1e-12, atol=1e-12)
    net.save(tmp_path / "net.fcvgg")
    restored = fcvgg.load(tmp_path / "net.fcvgg")
    assert relative_error(maps, restored(batch)) <= 1e-12
    streamed = torch.as_tensor(fcvgg.stream(net, batch[0]).scores)
    torch.testing.assert_close(streamed, maps[0], rtol=1e-12, atol=1e-12)


def test_cells_of_parting_branches_that_see_missing_pixels() -> None:
    net = fcvgg.convert(seeded(Parting, *JOINS["add"]))
    batch = images(1, 3, 23, 23)
    batch[0, 0, 22, 22] = torch.nan
    assert net(batch).isnan().any(1).nonzero().tolist() == []
    batch[0, 0, 21, 21] = torch.nan
    assert net(batch).isnan().any(1).nonzero().tolist() == [[0, 3, 3]]
