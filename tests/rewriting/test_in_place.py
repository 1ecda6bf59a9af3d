"""Layers in place: their results and gradients are the source's, wherever the source has any."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import Headed, Lambda, images, native_error, seeded
from torch import Tensor, nn

import fcvgg

MAKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": lambda x: (x / 4).exp(),
    "softmax": lambda x: x.softmax(1),
    "log softmax": lambda x: F.log_softmax(x, 1),
    "square root": lambda x: (x.square() + 1).sqrt(),
    "reciprocal square root": lambda x: (x.square() + 1).rsqrt(),
    "elu": F.elu,
    "selu": F.selu,
    "relu": torch.relu,
    "average": lambda x: F.adaptive_avg_pool2d(x, 6),
    "maximum": lambda x: torch.maximum(x, -x),
}
"""Functions whose gradient needs what they made, or what they were given."""

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky relu": lambda x: F.leaky_relu(x, 0.1, inplace=True),
    "elu": lambda x: F.elu_(x),
    "tanh": lambda x: x.tanh_(),
    "product": lambda x: x.mul_(1.5),
    "clamp": lambda x: x.clamp_(0.1, 2),
}


def by_rows(x: Tensor) -> Tensor:
    """A reshape that copies."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1)


def check_gradients(head: Callable[..., Tensor], *layers: nn.Module) -> None:
    model = seeded(lambda: Headed(Lambda(head, *layers)))
    net = fcvgg.convert(model, input_size=24, copy=True)
    assert native_error(model, net) <= 1e-12
    batch = images(3, 3, 24, 24)
    for module in (model, net):  # a step takes every gradient to the weights, in whatever order
        module.train()
        optimiser = torch.optim.SGD(module.parameters(), 1.0)
        module(batch).square().sum().backward()
        optimiser.step()
    trained = net.classifier_state_dict()
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(trained[name], weights, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_after_a_reshape_that_copies(make, change) -> None:
    check_gradients(lambda x, fc: fc(change(by_rows(make(x)))), nn.Linear(288, 4))


READERS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "a mean": lambda x, conv: x.mean((2, 3)),
    "a sum": lambda x, conv: x.sum((2, 3)),
    "a maximum of copies": lambda x, conv: x.clone().amax((2, 3)),
    "a product with a number": lambda x, conv: (x * 2).mean((2, 3)),
    "a convolution of a copy": lambda x, conv: conv(x.clone()).mean((2, 3)),
}


@pytest.mark.parametrize("change", ["leaky relu", "product"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_of_a_map_that_was_read_before(read, change: str) -> None:
    def head(x: Tensor, conv: nn.Module, fc: nn.Module) -> Tensor:
        x = x + 0.1
        before = read(x, conv)
        return fc(torch.cat([before, CHANGES[change](x).mean((2, 3))], 1))

    check_gradients(head, nn.Conv2d(8, 8, 1), nn.Linear(16, 4))


def test_a_linear_layer_of_a_copied_order_keeps_its_input() -> None:
    def head(x: Tensor, one: nn.Module, two: nn.Module) -> Tensor:
        x = x * 1.0
        scores = one(by_rows(x))
        return scores + two(F.leaky_relu(x, 0.2, inplace=True).flatten(1))

    check_gradients(head, nn.Linear(288, 4), nn.Linear(288, 4))


def test_the_usual_chain_copies_nothing() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten()]
    model = seeded(nn.Sequential, *layers, nn.ReLU(True), nn.Linear(144, 3), nn.ReLU(True))
    net = fcvgg.convert(model)
    assert not [node for node in net.network.graph.nodes if node.target == "clone"]
