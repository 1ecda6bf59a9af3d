"""The benchmark of fine-tuning: its sets, and the runs that it compares."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fcvgg.finetuning.strategies import Recipe

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("skimage")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS.parent)
    yield importlib.import_module("finetuning")
    for name in ("finetuning", "textures", "imagenet_vgg16"):
        sys.modules.pop(name, None)


def test_sets_are_of_the_size_that_they_are_called(benchmark: ModuleType) -> None:
    for name, (crops, count) in benchmark.SETS.items():
        parts = [part for part, _, pixels in crops(count) if pixels.shape == (64, 64)]
        assert f"{parts.count('train')} images" in name
        assert parts.count("val") == parts.count("train")


def test_the_runs_differ_in_what_is_compared(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, Any] = {}

    def finetune(data: Path, model: Any, folder: Path, **options: Any) -> SimpleNamespace:
        assert {path.name for path in data.iterdir()} == {"train", "val"}
        Recipe(**{k: v for k, v in options.items() if k != "epochs"})
        runs[folder.name] = options
        return SimpleNamespace(accuracy=0.5)

    monkeypatch.setattr(benchmark.fcvgg, "finetune", finetune)
    row = benchmark.measured(
        "digits", None, benchmark.digit_crops(1), 6, tmp_path, freeze_upto="pool5"
    )
    assert str(row).startswith("| digits | 0 s | 0 s | 50.0% | 50.0%")
    assert runs["computed"] == {**runs["kept"], "cache": 0}
    assert {**runs["reached"], "epochs": 6} == runs["kept"]
    assert runs["svm"] == {"freeze_upto": "pool5", "strategy": "svm"}
