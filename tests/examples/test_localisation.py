"""The grid pointing game: its mosaics, its score, and what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
NAMES = list("abcdef")


@pytest.fixture
def game(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("localisation")
    for name in ("localisation", "machine"):
        del sys.modules[name]


def test_every_target_stands_once_in_its_mosaic(game: ModuleType) -> None:
    for side, targets in ((2, 60), (3, 18)):
        found = game.mosaics(NAMES, side)
        assert sum(len(mosaic.targets) for mosaic in found) == targets
        for mosaic in found:
            assert len(mosaic.tiles) == side**2
            assert all(mosaic.tiles.count(target) == 1 for target in mosaic.targets)
    places = Counter(m.tiles.index(m.targets[0]) for m in game.mosaics(NAMES, 3))
    assert places == dict.fromkeys(range(9), 2)


def test_the_score_is_the_share_in_the_targets_tile(game: ModuleType) -> None:
    mosaic = game.Mosaic(2, tuple("abcd"), tuple("abcd"))
    colours = {
        name: Image.new("L", (game.TILE, game.TILE), 10 * i) for i, name in enumerate("abcd")
    }
    pixels = np.asarray(mosaic.image(colours).convert("L"))
    for i, name in enumerate("abcd"):
        assert (mosaic.within(pixels, name) == 10 * i).all()
        assert mosaic.within(pixels, name).shape == (game.TILE, game.TILE)


def test_the_measured_share_is_above_that_of_every_other_package() -> None:
    rows = json.loads((BENCHMARKS / "localisation.json").read_text())["rows"]
    small = {row["method"]: row["share"] for row in rows if row["side"] == 2}
    best = max(share for name, share in small.items() if not name.startswith("fcvgg"))
    assert small["fcvgg, positions"] >= 0.97
    assert small["fcvgg, positions"] >= best + 0.12
