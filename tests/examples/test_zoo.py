"""The zoo of architectures: what its script finds, and what the guide says of it."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fcvgg.rewriting.rules.relatives import RELATIVES

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    yield importlib.import_module("zoo")
    for name in ("zoo", "zoo_models"):
        del sys.modules[name]


class Exact(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
        )


class Refused(Exact):
    def __init__(self) -> None:
        super().__init__()
        self.insert(3, nn.GroupNorm(2, 4))


class Crashing(Exact):
    def __init__(self) -> None:
        raise KeyError("no such setting")


def test_what_becomes_of_three_models(
    zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entries() -> Iterator:
        for model in (Exact, Refused, Crashing):
            yield zoo.Entry("timm", "tiny", model.__name__, model)

    monkeypatch.setattr(zoo, "LIBRARIES", {"timm": entries})
    monkeypatch.setattr(zoo, "examine_apart", zoo.examine)  # no processes of its own
    path = tmp_path / "rows" / "zoo.json"
    monkeypatch.setattr(sys, "argv", ["zoo.py", "--output", str(path)])
    zoo.main()
    found = {row.name: row for row in zoo.read(path)}
    exact, refused, crash = (found[name] for name in ("Exact", "Refused", "Crashing"))
    assert (exact.result, exact.input_size) == ("exact", 64)
    assert exact.error <= 1e-10
    assert refused.message.startswith("3 (GroupNorm) is refused: its statistics mix all positions")
    assert "KeyError: 'no such setting'" in crash.message
    assert "| timm | 3 | 1 | 1 |" in path.with_suffix(".md").read_text()
    monkeypatch.setattr(zoo, "examine_apart", lambda entry: pytest.fail("computed again"))
    zoo.main()
    assert len(zoo.read(path)) == 3


def test_a_model_that_is_wrong_is_seen(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = zoo.fcvgg.convert

    def spoiled(model: nn.Module, **options: object) -> nn.Module:
        net = convert(model, **options)
        if not next(model.parameters()).is_meta:
            model.get_submodule("6").bias = nn.Parameter(torch.zeros(10).double())
        return net

    monkeypatch.setattr(zoo.fcvgg, "convert", spoiled)
    row = zoo.examine(zoo.Entry("timm", "tiny", "Exact", Exact))
    assert row.result == "wrong"
    assert row.error > 1e-10


def test_a_model_that_takes_too_long(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def forever() -> nn.Module:
        while True:
            pass

    monkeypatch.setattr(zoo, "LIMIT", 1)
    row = zoo.examine_apart(zoo.Entry("timm", "tiny", "forever", forever))
    assert (row.result, row.message) == ("timeout", "more than 1 s")


def rows() -> list[dict[str, object]]:
    return json.loads((EXAMPLES / "benchmarks" / "zoo.json").read_text())["rows"]


def test_architectures_and_families_have_rows() -> None:
    """Other versions of the libraries have other models; these were there on the day."""
    found = Counter(row["library"] for row in rows())
    assert found["torchvision"] >= 80
    assert found["timm"] >= 150
    assert found["transformers"] >= 35
    assert len({row["family"] for row in rows() if row["library"] == "timm"}) >= 98


def test_every_row_is_exact_or_refused() -> None:
    others = [row for row in rows() if row["result"] not in ("exact", "refused")]
    assert others == []
    assert all(row["seconds"] <= 60 for row in rows())
    assert all(row["error"] <= 1e-10 for row in rows() if row["result"] == "exact")


@pytest.mark.parametrize(
    ("library", "name", "package"),
    [("onnx", "squeezenet", "onnx"), ("ultralytics", "yolov8n-cls", "ultralytics")],
)
def test_light_rows_are_found_again(zoo: ModuleType, library: str, name: str, package: str) -> None:
    pytest.importorskip(package)
    entry = next(entry for entry in zoo.LIBRARIES[library]() if entry.name == name)
    found, kept = zoo.examine(entry), next(row for row in rows() if row["name"] == name)
    assert (found.result, found.input_size) == (kept["result"], kept["input_size"])
    assert found.parameters == kept["parameters"]


def test_the_guide_counts_as_the_rows_do(zoo: ModuleType) -> None:
    guide = (EXAMPLES / "guides" / "architectures.md").read_text()
    assert guide.endswith(zoo.table(zoo.read(EXAMPLES / "benchmarks" / "zoo.json")))


def test_the_readme_counts_as_the_rows_do() -> None:
    counts = Counter(row["result"] for row in rows())
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert f"Of {len(rows())} architectures" in readme
    assert f"{counts['exact']} convert exactly and {counts['refused']} are refused" in readme


def test_relatives_that_refusals_name_are_exact() -> None:
    exact = {row["name"] for row in rows() if row["result"] == "exact"}
    assert {name for name, _ in RELATIVES.values()} - exact == set()
