"""The converted network trains as the source does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import (
    Functional,
    GlobalPooled,
    Headed,
    Lambda,
    SmallVGG,
    images,
    narrow_vgg,
    seeded,
)
from torch import Tensor, nn

import fcvgg


def vector_head() -> nn.Module:
    """Every kind of layer that a head has, after features flattened in another order."""
    layers = [
        *(nn.Linear(288, 12), nn.BatchNorm1d(12), nn.PReLU(12), nn.Dropout(0.4)),
        *(nn.Linear(12, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 4), nn.LogSoftmax(1)),
    ]
    flatten = Lambda(lambda x: x.permute(0, 2, 3, 1).flatten(1))
    return Headed(nn.Sequential(nn.Dropout2d(0.2), flatten, *layers))


def tied() -> nn.Module:
    model = Headed(
        nn.Sequential(
            nn.Flatten(), nn.Linear(288, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)
        )
    )
    model.head[5].weight = model.head[3].weight
    return model


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vgg": (lambda: SmallVGG(bn=True), 32),
    "functional": (Functional, 28),
    "global pool and shortcut": (GlobalPooled, 48),
    "layers on vectors": (vector_head, 24),
    "tied": (tied, 24),
    "weight norm": (
        lambda: Headed(
            nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(288, 4)))
        ),
        24,
    ),
    "vgg11_bn": (lambda: narrow_vgg("vgg11_bn", width=64), 224),
}


def loss_of(outputs: Tensor) -> Tensor:
    scores = outputs.flatten(1)
    return F.cross_entropy(scores, torch.arange(len(scores)) % scores.shape[1])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_two_steps_of_sgd_give_the_same_weights(name: str, momentum: float) -> None:
    build, size = NETS[name]
    model = seeded(build)
    net = fcvgg.convert(model, input_size=size, copy=True, verify=False)
    batch = images(4, 3, size, size)
    losses = []
    for module in (model, net):
        module.train()
        optimiser = torch.optim.SGD(module.parameters(), 0.1, momentum, weight_decay=1e-3)
        torch.manual_seed(7)
        for _ in range(2):
            optimiser.zero_grad()
            loss = loss_of(module(batch))
            loss.backward()
            optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    twin = seeded(build)
    twin.load_state_dict(net.classifier_state_dict())
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=1e-10, atol=1e-12)


def test_gradients_flow_to_every_parameter_and_to_the_image() -> None:
    net = fcvgg.convert(seeded(SmallVGG))
    batch = images(2, 3, 48, 40, requires_grad=True)
    net(batch).square().mean().backward()
    assert batch.grad is not None
    assert (batch.grad != 0).any()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


def test_the_sources_gradients_are_its_own() -> None:
    model = seeded(SmallVGG)
    net = fcvgg.convert(model)
    net(images(1, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_frozen_layers_stay_frozen() -> None:
    model = seeded(SmallVGG)
    model.features.requires_grad_(False)
    net = fcvgg.convert(model, copy=True)
    net(images(1, 3, 32, 32)).sum().backward()
    graded = {n for n, p in net.network.named_parameters() if p.grad is not None}
    assert graded == {n for n, p in model.named_parameters() if n.startswith("classifier")}


def test_train_and_eval_switch_dropout() -> None:
    net = fcvgg.convert(seeded(SmallVGG))
    batch = images(1, 3, 64, 64)
    assert torch.equal(net(batch), net(batch))
    assert net.train() is net
    assert not torch.equal(net(batch), net(batch))
    net.eval()
    assert torch.equal(net(batch), net(batch))


def test_a_source_in_training_mode_gives_a_network_in_training_mode() -> None:
    model = seeded(SmallVGG).train()
    net = fcvgg.convert(model)
    assert net.training
    assert model.training
    assert all(m.training for m in model.modules())
    assert net.network.classifier[2].training
