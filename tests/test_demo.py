"""What the guide to heatmaps says of the demo, measured again by the code that the guide names."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fcvgg
from fcvgg.demo import CATEGORIES, MEAN, SCALES, STD, demo_model

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "examples" / "guides" / "heatmaps.md").read_text()

FACE = (70, 170, 190, 275)
"""Top, left, bottom and right of the astronaut's face, by eye."""


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """examples/train_demo.py as a module."""
    path = ROOT / "examples" / "train_demo.py"
    spec = importlib.util.spec_from_file_location("train_demo_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def peaks(example: ModuleType) -> dict[str, tuple[float, tuple[float, float]]]:
    """The highest face probability in every photograph over all scales, and where."""
    preprocess = fcvgg.Preprocess(MEAN, STD)
    net = fcvgg.convert(demo_model(), preprocess=preprocess, categories=CATEGORIES)
    return {
        name: max(example.dense_peak(net, photograph, scale) for scale in SCALES)
        for name, photograph in example.report_images()
    }


def row(beginning: str) -> str:
    """The result in a row of the guide's table."""
    found = re.search(rf"^\| {beginning}.*?\| ([^|]*) \|$", GUIDE, re.MULTILINE)
    assert found is not None, beginning
    return found[1]


def stated(text: str) -> float:
    return float(re.match(r"[\d.]+", text)[0])  # type: ignore[index]


def test_the_table_names_the_command_that_measures_it() -> None:
    assert "<!-- measured by: python examples/train_demo.py --report -->" in GUIDE


def test_held_out_crops(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    _, tiles = example.load_tiles()
    _, backgrounds = example.load_backgrounds()
    example.report_held_out_crops(demo_model(), tiles, backgrounds)
    right, total = re.search(r"held-out crops: (\d+)/(\d+) right", capsys.readouterr().out).groups()
    assert f"{right} of {total}" == row("held-out crops classified right")


def test_the_astronauts_face(peaks: dict[str, Any]) -> None:
    probability, (y, x) = peaks["astronaut"]
    result = row("highest face probability in the astronaut photograph")
    assert probability == pytest.approx(stated(result), abs=0.02)
    place = re.search(r"\(y, x\) = \((\d+), (\d+)\), on the face", result)
    assert place is not None
    assert (y, x) == pytest.approx([int(n) for n in place.groups()], abs=4)
    top, left, bottom, right = FACE
    assert top <= y < bottom
    assert left <= x < right


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_photographs_without_a_face_stay_below_one_half(peaks: dict[str, Any], name: str) -> None:
    probability, _ = peaks[name]
    assert probability == pytest.approx(
        stated(row(f"highest in scikit-learn's `{name}`")), abs=0.02
    )
    assert probability < 0.5
