"""What `fcvgg.verify` reports, and what it refuses to compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import SmallVGG, Unpadded, images, seeded
from torch import nn

import fcvgg
from fcvgg.verification import check


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
            r"the network takes 3 channels, got 4 in \(2, 4, 32, 32\); images a",
        ),
        (images(3, 32, 32), r"the network takes images \(N, 3, H, W\), got \(3, 32, 32\); add the"),
        ([1, 2], r"the network takes images \(N, 3, H, W\), got list; add the batch"),
        ("photo.jpg", r"the network takes images \(N, 3, H, W\), got str; add the batch"),
        (images(0, 3, 32, 32), r"the batch \(0, 3, 32, 32\) is empty; expected at least one"),
        (images(1, 3, 32, 40), r"images \(1, 3, 32, 40\) do not have the native size \(32, 32\); "),
        (
            images(1, 3, 32, 32, dtype=torch.float32),
            r"the network takes images of torch\.float64, got torch\.float32; cast them with",
        ),
    ],
)
def test_images_that_it_does_not_take(pair: Any, batch: Any, message: str) -> None:
    with pytest.raises(fcvgg.ImageError, match=rf"^{message}"):
        fcvgg.verify(*pair, batch)


def test_what_is_no_model(pair: Any) -> None:
    model, net = pair
    with pytest.raises(
        fcvgg.ArgumentError, match=r"^model is a str; expected the torch\.nn\.Modul"
    ):
        fcvgg.verify("vgg16", net)
    with pytest.raises(fcvgg.ArgumentError, match=r"^net is a SmallVGG; expected what fcvgg\.conv"):
        fcvgg.verify(model, model)
    with pytest.raises(fcvgg.ArgumentError, match=r"^net is a NoneType; expected what fcvgg\.conv"):
        fcvgg.verify(model, None)


def test_another_model_than_the_source(pair: Any) -> None:
    _, net = pair
    with pytest.raises(
        fcvgg.ArgumentError,
        match=r"^model and net give other outputs, \[\(2, 7\)\] and \[\(2, 5\)\]; expected the",
    ):
        fcvgg.verify(seeded(SmallVGG, 7), net)
    with pytest.raises(
        fcvgg.ArgumentError,
        match=r"^model, a Unpadded, does not run on images \(2, 3, 32, 32\) of torch\.float64: ",
    ):
        fcvgg.verify(seeded(Unpadded, extent=(9, 9)), net)
