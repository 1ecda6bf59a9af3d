"""Layers and weights that the source uses at several places stay one parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import Headed, images, native_error, relative_error, seeded, sliding_window
from torch import Tensor, nn

import fcvgg


class Head(nn.Module):
    """Two layers of 288 features, and what a forward makes of them."""

    def __init__(self, call: Callable[[Head, Tensor], Tensor], tied: bool = False):
        super().__init__()
        self.fc = nn.Linear(288, 288)
        self.other = nn.Linear(288, 288)
        self.last = nn.Linear(288, 3)
        self.call = call
        if tied:
            self.other.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self, x))


def rows_first(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1)


CALLS: dict[str, Callable[[Head, Tensor], Tensor]] = {
    "after the flatten and again": lambda s, x: s.fc(torch.tanh(s.fc(x.flatten(1)))),
    "in another order and again": lambda s, x: s.fc(torch.tanh(s.fc(rows_first(x)))),
    "in two orders": lambda s, x: s.fc(x.flatten(1)) + s.fc(rows_first(x)),
    "three times": lambda s, x: s.fc(s.fc(torch.tanh(s.fc(x.flatten(1))))),
    "as layer and function": lambda s, x: F.linear(
        torch.tanh(s.fc(rows_first(x))), s.fc.weight, s.fc.bias
    ),
    "as function twice": lambda s, x: F.linear(
        F.linear(x.flatten(1), s.fc.weight).tanh(), s.fc.weight, s.other.bias
    ),
    "its weight normalised": lambda s, x: F.linear(
        s.fc(rows_first(x)), F.normalize(s.fc.weight, dim=1)
    ),
}
TIED: dict[str, Callable[[Head, Tensor], Tensor]] = {
    "window, then vector": lambda s, x: s.other(torch.tanh(s.fc(x.flatten(1)))),
    "vector, then window in another order": lambda s, x: (
        s.other(rows_first(x)) + s.fc(s.fc(x.flatten(1)).tanh())
    ),
}
MODELS = {
    **{name: (call, False) for name, call in CALLS.items()},
    **{f"tied: {name}": (call, True) for name, call in TIED.items()},
}


def built(name: str) -> nn.Module:
    call, tied = MODELS[name]
    return seeded(lambda: Headed(Head(call, tied), pads=0))


@pytest.mark.parametrize("name", MODELS)
def test_every_cell_is_the_model_on_its_window(name: str) -> None:
    model = built(name)
    net = fcvgg.convert(model, input_size=30)
    batch = images(2, 3, 41, 36)
    assert relative_error(sliding_window(model, net, batch), net(batch)) <= 1e-12
    assert list(net.state_dict()) == list(model.state_dict())
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_three_steps_of_adamw_leave_the_same_weights(name: str) -> None:
    model = built(name)
    net = fcvgg.convert(model, input_size=30, copy=True)
    batch, labels = images(4, 3, 30, 30), torch.tensor([0, 2, 1, 2])
    for module in (model, net):
        optimiser = torch.optim.AdamW(module.parameters(), 0.01, weight_decay=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            F.cross_entropy(module(batch).flatten(1), labels).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimiser.step()
    trained = net.classifier_state_dict()
    for key, weights in model.state_dict().items():
        torch.testing.assert_close(trained[key], weights, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_files_and_strips(name: str, tmp_path: Path) -> None:
    model = built(name)
    net = fcvgg.convert(model, input_size=30, copy=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    net.load_state_dict(model.state_dict())
    assert native_error(model, net) <= 1e-12
    batch = images(1, 3, 41, 36)
    expected = net(batch).detach()
    back = fcvgg.load(net.save(tmp_path / "bundle"))
    torch.testing.assert_close(back(batch).detach(), expected, rtol=1e-10, atol=1e-10)
    streamed = fcvgg.stream(net, batch[0].numpy(), memory="32MiB").scores
    torch.testing.assert_close(torch.as_tensor(streamed), expected[0], rtol=1e-10, atol=1e-10)
