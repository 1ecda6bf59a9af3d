"""What `fcvgg.verify` reports, and what it refuses to compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import EXACT, Lambda, SmallVGG, Unpadded, images, relative_error, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

import fcvgg
from fcvgg.verification import Temperature, check


def constant(*scores: float) -> nn.Module:
    """A model of native size 4 with the same scores for every image."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, len(scores))).double().eval()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor(scores))
    return model


def compared(source: tuple[float, ...], net: tuple[float, ...], tolerance: float) -> Any:
    converted = fcvgg.convert(constant(*net), input_size=4)
    return fcvgg.verify(constant(*source), converted, tolerance=tolerance)


def test_a_tie_that_rounding_breaks_is_no_disagreement() -> None:
    report = compared((1.0, 0.9999), (0.9999, 1.0), tolerance=1e-3)
    assert report.top1_agreement == 1
    assert report.passed


def test_another_class_counts_although_every_score_is_within_the_tolerance() -> None:
    report = compared((1.0, 0.4), (0.55, 0.85), tolerance=0.5)
    assert report.max_rel_error < report.tolerance
    assert report.top1_agreement == 0
    assert not report.passed
    assert str(report).startswith("NOT EQUIVALENT")


@pytest.mark.parametrize(
    ("source", "net", "agreement"),
    [((1.0, -1.0), (1.0, -1.0), 1), ((0.5,), (-0.5,), 0), ((0.5,), (0.4,), 1)],
)
def test_one_class_is_named_or_not(
    source: tuple[float, ...], net: tuple[float, ...], agreement: float
) -> None:
    assert compared(source, net, tolerance=0.5).top1_agreement == agreement


def test_check_says_that_other_classes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    report = compared((1.0, 0.4), (0.55, 0.85), tolerance=0.5)
    monkeypatch.setattr("fcvgg.verification.verify", lambda *_: report)
    with pytest.raises(fcvgg.EquivalenceError, match=r"names other classes .* 100% of images whos"):
        check(constant(1.0), fcvgg.convert(constant(1.0), input_size=4))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, fcvgg.FullyConvolutional]:
    model = seeded(SmallVGG)
    return model, fcvgg.convert(model)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            images(2, 4, 32, 32),
            r"images must have 3 channels, got 4 in \(2, 4, 32, 32\); pass \(",
        ),
        (images(3, 32, 32), r"images must be \(N, 3, H, W\), got \(3, 32, 32\); add the"),
        ([1, 2], r"images must be \(N, 3, H, W\), got list; add the batch"),
        ("photo.jpg", r"images must be \(N, 3, H, W\), got str; add the batch"),
        (images(0, 3, 32, 32), r"images must hold at least one pixel, got .*\(0, 3, 32, 32\)"),
        (
            images(1, 3, 32, 40),
            r"images must have the native size \(32, 32\).* got \(1, 3, 32, 40\)",
        ),
        (
            images(1, 3, 32, 32, dtype=torch.float32),
            r"images must be of torch\.float64, got torch\.float32; cast them with",
        ),
    ],
)
def test_images_that_it_does_not_take(pair: Any, batch: Any, message: str) -> None:
    with pytest.raises(fcvgg.ImageError, match=rf"^{message}"):
        fcvgg.verify(*pair, batch)


def test_what_is_no_model(pair: Any) -> None:
    model, net = pair
    with pytest.raises(
        fcvgg.ArgumentError, match=r"^model must be the torch\.nn\.Module .*, got str"
    ):
        fcvgg.verify("vgg16", net)
    with pytest.raises(
        fcvgg.ArgumentError, match=r"^net must be a converted network, got SmallVGG"
    ):
        fcvgg.verify(model, model)
    with pytest.raises(
        fcvgg.ArgumentError, match=r"^net must be a converted network, got NoneType"
    ):
        fcvgg.verify(model, None)


def test_another_model_than_the_source(pair: Any) -> None:
    _, net = pair
    with pytest.raises(
        fcvgg.ArgumentError,
        match=r"^model must be the net's own source, got outputs \[\(2, 7\)\] where .*\(2, 5\)",
    ):
        fcvgg.verify(seeded(SmallVGG, 7), net)
    with pytest.raises(
        fcvgg.ArgumentError,
        match=r"^model must be the net\'s own source, got a Unpadded that does not run on imag",
    ):
        fcvgg.verify(seeded(Unpadded, extent=(9, 9)), net)


class Clamped(nn.Module):
    """Cuts scores off at buffers, one for each class."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.register_buffer("low", torch.full((5,), low))
        self.register_buffer("high", torch.linspace(1, high, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


SATURATING = {
    "softmax": nn.Softmax(1),
    "log-softmax": Lambda(lambda x: F.log_softmax(x, 1).clamp(min=-50)),
    "sigmoid": nn.Sigmoid(),
    "sigmoid in place": Lambda(lambda x: x.sigmoid_()),
    "hard sigmoid": nn.Hardsigmoid(),
    "clamp": Lambda(lambda x: x.clamp(0, 1)),
    "clamp by tensors": Clamped(0.0, 1.0),
    "tanh": nn.Tanh(),
    "mean of two": Lambda(lambda x: (x.softmax(1) + (2 * x).softmax(1)) / 2),
    "logarithm": Lambda(lambda x: torch.log(x.softmax(1) + 1e-30)),
}


@pytest.mark.parametrize("ending", SATURATING)
def test_a_saturated_ending_does_not_hide_a_changed_weight(ending: str) -> None:
    model = nn.Sequential(seeded(SmallVGG), SATURATING[ending]).eval()
    with torch.no_grad():
        model[0].classifier[-1].weight *= 1e5
    net = fcvgg.convert(model, copy=True)
    assert fcvgg.verify(model, net).passed
    with torch.no_grad():
        net.network.get_submodule("0.features.4").weight[0] *= 1.01
    batch = images(2, 3, 32, 32)
    hidden = relative_error(model(batch), net(batch).flatten(1))
    assert hidden <= EXACT[torch.float64]  # the scores alone do not show it
    report = fcvgg.verify(model, net, batch)
    assert report.max_rel_error > 1e-5
    assert not report.passed
    with pytest.raises(fcvgg.EquivalenceError, match=r"differs from the model at \(32, 32\)"):
        check(model, net)


def test_bounds_that_differ_by_class_are_no_sigmoid() -> None:
    x = images(1, 5)
    with Temperature(10.0) as seen:
        assert torch.equal(Clamped(0.0, 2.0)(x), x.clamp(torch.zeros(5), torch.linspace(1, 2, 5)))
    assert seen.seen == 0


def test_a_temperature_leaves_what_is_small_as_it_is() -> None:
    model = nn.Sequential(constant(0.5, -0.5), nn.Softmax(1))
    x = images(1, 3, 4, 4)
    with Temperature() as seen:
        plain = model(x)
    assert (seen.seen, seen.largest) == (1, 0.5)
    assert torch.equal(plain, model(x))
    with Temperature(10.0):
        tempered = model(x)
    torch.testing.assert_close(tempered, torch.tensor([[0.05, -0.05]]).double().softmax(1))


def test_an_engine_that_runs_elsewhere_is_compared_by_its_scores() -> None:
    model = nn.Sequential(seeded(SmallVGG), nn.Softmax(1)).eval()
    with torch.no_grad():
        model[0].classifier[-1].weight *= 1e5
    net = fcvgg.convert(model)
    whole = net.forward

    def unseen(x: Any) -> Any:
        with _disable_current_modes():
            return whole(x)

    net.forward = unseen
    assert fcvgg.verify(model, net).passed
