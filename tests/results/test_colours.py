"""The scale that colours probabilities, in numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fcvgg
from fcvgg.probability import chance_level
from fcvgg.results.colours import (
    ALPHA,
    LEVELS,
    OPAQUE_FROM,
    colour_table,
    evidence,
    opacity_table,
    probability_ticks,
)

CLASSES = [1, 2, 3, 4, 10, 1000, 20_000]


@pytest.mark.parametrize("classes", CLASSES)
def test_evidence_rises_from_chance_to_certainty(classes: int) -> None:
    chance = chance_level(classes, "logits")
    assert chance == (1 / classes if classes > 1 else 0.5)
    ends = evidence([0, chance / 2, chance, np.nan, 1], chance)
    np.testing.assert_allclose(ends, [0, 0, 0, 0, 1], atol=1e-6)
    rising = np.geomspace(chance, 1, 200)
    steps = np.diff(evidence(rising, chance))
    np.testing.assert_allclose(steps, 1 / 199, atol=1e-4)  # equal factors are equal steps


@pytest.mark.parametrize("classes", [2, 1000])
def test_evidence_is_the_logarithm_to_the_base_of_the_classes(classes: int) -> None:
    p = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    expected = [min(max(np.log(x * classes) / np.log(classes), 0), 1) for x in p]
    np.testing.assert_allclose(evidence(p, 1 / classes), expected, atol=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "independent_logits"])
def test_classes_that_do_not_share_are_at_chance_at_one_half(activation: str) -> None:
    assert [chance_level(n, activation) for n in (1, 7)] == [0.5, 0.5]


@pytest.mark.parametrize("classes", CLASSES)
def test_ticks_are_apart_and_reach_from_chance_to_one(classes: int) -> None:
    chance = chance_level(classes, "logits")
    ticks = probability_ticks(chance)
    assert (ticks[0], ticks[-1]) == (chance, 1)
    assert 3 <= len(ticks) <= 8
    assert np.diff(evidence(ticks, chance)).min() >= 0.1 - 1e-6


def test_ticks_of_a_thousand_classes() -> None:
    assert probability_ticks(0.001) == (0.001, 0.01, 0.1, 0.25, 0.5, 1)


def test_tables_of_colours_and_opacities() -> None:
    colours, opacity = colour_table(), opacity_table()
    assert colours.shape == (LEVELS, 3)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) >= 0).all()
    assert lightness[-1] < 0.75  # a strong colour, not a pale sheet
    assert opacity[0] == 0
    assert (np.diff(opacity) >= 0).all()
    assert opacity[-1] == pytest.approx(ALPHA)
    assert opacity[int(OPAQUE_FROM * LEVELS) - 8] < ALPHA
    with pytest.raises(fcvgg.ArgumentError, match=r"^alpha must be in \[0, 1\], got 2"):
        opacity_table(2)
