"""Differentiable maps: gradients of the whole image, strip by strip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Functional, GlobalPooled, SmallVGG, Unpadded, images, relative_error, seeded
from torch import Tensor, nn

import fcvgg
from fcvgg.images.lazy.opening import strip_source
from fcvgg.inference import streamed_map
from fcvgg.inference.stages import stages_of
from fcvgg.inference.strip_input import StripInput

EXACT = 1e-12


class Residual(nn.Module):
    """A residual block with batch norm, operations that write in place, and a global pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(True))
        self.left = nn.Sequential(
            *(nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)),
            *(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)),
        )
        self.right = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.left(x)
        y += self.right(x)
        return self.fc(self.pool(torch.relu_(y)).flatten(1))


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "padded": (SmallVGG, {}),
    "batch norm": (lambda: SmallVGG(bn=True), {}),
    "dense": (SmallVGG, {"output_stride": 1}),
    "half as dense": (lambda: SmallVGG(bn=True), {"output_stride": 2}),
    "dense residual": (Residual, {"input_size": 24, "output_stride": 1}),
    "same": (SmallVGG, {"padding": "same"}),
    "unpadded": (Unpadded, {}),
    "functions": (Functional, {"input_size": 28}),
    "global pool": (GlobalPooled, {"input_size": 32}),
    "positions": (GlobalPooled, {"input_size": 32, "head": "position"}),
    "residual": (Residual, {"input_size": 24}),
}


def converted(name: str) -> fcvgg.FullyConvolutional:
    build, options = MODELS[name]
    return fcvgg.convert(seeded(build), **options)


def loss_of(scores: Tensor) -> Tensor:
    """Weighs every cell differently, and depends on the whole map."""
    weights = torch.linspace(-1, 1, scores.numel(), dtype=scores.dtype).view_as(scores)
    return (scores * weights).sum() + scores.square().mean() + scores.logsumexp((2, 3)).sum()


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor | None]:
    """Those of all trainable parameters; None for one that another stands for."""
    wanted = [p for p in net.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


def assert_equal_gradients(expected: list[Tensor | None], got: list[Tensor | None]) -> None:
    assert any(one is not None for one in expected)
    for i, (one, other) in enumerate(zip(expected, got, strict=True)):
        assert (one is None) == (other is None), i
        assert one is None or relative_error(one, other) <= EXACT, i


def with_plan(monkeypatch: Any, strip: int, every: int, block: int) -> None:
    plan = streamed_map.GraphPlan(strip, every, block, 1 << 30)
    monkeypatch.setattr(streamed_map, "_plan", lambda *args: plan)


# -- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("strip", "every", "block"), [(8, 1, 100), (5, 3, 2), (200, 1, 100)])
def test_scores_and_gradients_are_those_of_the_whole_image(
    name, strip, every, block, monkeypatch
) -> None:
    net = converted(name)
    image = images(1, 3, 75, 58)
    expected = net(image)
    with_plan(monkeypatch, strip, every, block)
    got = net.streamed(image[0])
    assert relative_error(expected, got) <= EXACT
    assert_equal_gradients(gradients(net, loss_of(expected)), gradients(net, loss_of(got)))


@settings(max_examples=15)
@given(
    st.sampled_from(sorted(MODELS)),
    st.tuples(st.integers(20, 90), st.integers(20, 70)),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 9),
)
def test_any_image_strip_and_block(name, size, strip, every, block) -> None:
    net = converted(name)
    image = images(1, 3, *size)
    with pytest.MonkeyPatch.context() as patch:
        with_plan(patch, strip, every, block)
        got = net.streamed(image[0])
        found = gradients(net, loss_of(got))
    assert_equal_gradients(gradients(net, loss_of(net(image))), found)


def test_a_loss_of_few_cells_computes_few_strips(monkeypatch) -> None:
    net = converted("unpadded")
    image = images(1, 3, 400, 40)
    with_plan(monkeypatch, 16, 1, 100)
    scores = net.streamed(image[0])
    pushed = []
    push = streamed_map.LineBuffers.push
    monkeypatch.setattr(
        streamed_map.LineBuffers, "push", lambda self, x: pushed.append(self.strip) or push(self, x)
    )
    found = gradients(net, scores[:, :, 3].sum())
    assert_equal_gradients(gradients(net, net(image)[:, :, 3].sum()), found)
    assert len(pushed) < 6  # of 25


def test_frozen_layers_get_no_gradient() -> None:
    net = converted("padded")
    net.get_parameter("network.features.0.weight").requires_grad_(False)
    net.get_parameter("network.features.0.bias").requires_grad_(False)
    image = images(1, 3, 60, 60)
    loss_of(net.streamed(image[0])).backward()
    frozen = net.get_parameter("network.features.0.weight")
    trained = [p for p in net.parameters() if p.requires_grad]
    assert frozen.grad is None
    assert_equal_gradients(gradients(net, loss_of(net(image))), [p.grad for p in trained])


def test_dropout_draws_the_same_in_both_passes(monkeypatch) -> None:
    """The derivative along a direction, by differences with the same random numbers."""
    net = converted("padded")
    net.train()
    with_plan(monkeypatch, 8, 3, 100)
    image = images(3, 70, 50)
    parameter = net.get_parameter("network.features.0.weight")

    def loss() -> Tensor:
        torch.manual_seed(3)
        return loss_of(net.streamed(image))

    (gradient,) = torch.autograd.grad(loss(), [parameter])
    direction = images(*parameter.shape, seed=5)
    with torch.no_grad():
        parameter += 1e-6 * direction
        high = loss()
        parameter -= 2e-6 * direction
        low = loss()
    torch.testing.assert_close(
        (high - low) / 2e-6, (gradient * direction).sum(), rtol=1e-5, atol=1e-7
    )


def test_pixels_without_data_have_no_gradient() -> None:
    net = converted("unpadded")
    image = images(1, 3, 80, 60)
    image[0, :, 30, 20] = torch.nan
    expected, got = net(image), net.streamed(image[0])
    assert torch.equal(expected.isnan(), got.isnan())
    assert expected.isnan().any()
    assert not expected.isnan().all()
    found = gradients(net, got.nan_to_num().square().sum())
    assert_equal_gradients(gradients(net, expected.nan_to_num().square().sum()), found)


def test_autocast_holds_in_the_backward_pass() -> None:
    net = fcvgg.convert(seeded(SmallVGG, dtype=torch.float32))
    image = images(1, 3, 64, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = net.streamed(image[0])
        expected = net(image)
    assert got.dtype == expected.dtype == torch.bfloat16
    for one, other in zip(gradients(net, expected.sum()), gradients(net, got.sum())):
        assert one is not None
        assert other is not None
        assert relative_error(one, other) <= 0.1


def test_an_optimiser_step_in_a_loop_lowers_the_loss() -> None:
    net = converted("global pool")
    net.eval()
    optimiser = torch.optim.SGD(net.parameters(), 0.05)
    image = images(3, 90, 70)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        scores = net.streamed(image).mean((2, 3))
        loss = nn.functional.cross_entropy(scores, torch.tensor([2]))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_a_retained_graph_serves_several_losses(monkeypatch) -> None:
    net = converted("padded")
    image = images(1, 3, 75, 58)
    with_plan(monkeypatch, 8, 3, 100)
    expected, got = net(image), net.streamed(image[0])
    wanted = list(net.parameters())
    first = torch.autograd.grad(got.sum(), wanted, retain_graph=True)
    assert_equal_gradients(gradients(net, net(image).sum()), list(first))
    assert_equal_gradients(gradients(net, loss_of(expected)), gradients(net, loss_of(got)))


# -- memory ---------------------------------------------------------------------------------------


def test_the_plan_follows_the_memory() -> None:
    net = converted("padded")
    image = images(3, 3000, 2000)
    stages = stages_of(net.layers, 3)
    pixels = StripInput.of(net, strip_source(image, 3))
    plans = [
        streamed_map._plan(stages, pixels, net.output_size((3000, 2000)), memory)
        for memory in (4 << 30, 500 << 20, 200 << 20)
    ]
    assert plans[0].strip > plans[-1].strip or plans[0].block > plans[-1].block
    with pytest.raises(
        fcvgg.ArgumentError, match=r"^memory must be at least .* for the graph of a"
    ):
        net.streamed(image, memory="64MiB")


def test_states_do_not_add_up_with_the_height() -> None:
    """One state for each strip where they are few, else one for every some strips."""
    assert streamed_map._states_kept(8, 14) == (1, 8)
    assert streamed_map._states_kept(20, 14) == (2, 11)
    assert streamed_map._states_kept(64, 14) == (8, 15)  # no fewer are possible
    assert streamed_map._states_kept(1, 0) == (1, 1)


# -- errors ---------------------------------------------------------------------------------------


def test_batch_norm_in_training_mode_is_refused() -> None:
    image = images(3, 40, 40)
    net = converted("batch norm")
    net.train()
    with pytest.raises(
        fcvgg.TrainingError,
        match=r"^batch norm must be in evaluation mode.*features\.1 in",
    ):
        net.streamed(image)
    functional = converted("functions")
    functional.train()
    with pytest.raises(fcvgg.TrainingError, match="batch_norm in training mode"):
        functional.streamed(image)


def test_an_image_that_requires_a_gradient_is_refused() -> None:
    with pytest.raises(fcvgg.ImageError, match=r"^image must not require a gradient.*detach\(\)"):
        converted("padded").streamed(images(3, 40, 40, requires_grad=True))


def test_parameters_that_change_before_the_backward_pass_are_noticed() -> None:
    net = converted("padded")
    loss = net.streamed(images(3, 40, 40)).sum()
    with torch.no_grad():
        next(net.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- trainers -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning_trains_on_streamed_images(tmp_path) -> None:
    """The Trainer's own loop and optimiser end where whole images end."""
    pl = pytest.importorskip("pytorch_lightning")

    class Task(pl.LightningModule):
        def __init__(self, streams: bool):
            super().__init__()
            self.net, self.streams = converted("padded").float(), streams

        def training_step(self, batch, _):
            image, label = batch
            scores = self.net.streamed(image[0]) if self.streams else self.net(image)
            return nn.functional.cross_entropy(scores.mean((2, 3)), label)

        def on_train_epoch_start(self):
            self.net.eval()  # the same without dropout

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = [(images(3, 60, 50, seed=i, dtype=torch.float32), i) for i in range(2)]
    trained = []
    for streams in (True, False):
        task = Task(streams)
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=1))
        trained.append(dict(task.net.named_parameters()))
    start = dict(converted("padded").float().named_parameters())
    for name, parameter in trained[0].items():
        assert not torch.equal(parameter, start[name]), name
        torch.testing.assert_close(parameter, trained[1][name], rtol=1e-4, atol=1e-6)
