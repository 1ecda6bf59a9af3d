"""``--head position``, and the line that offers it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
from command_line import run

import fcvgg
from fcvgg.demo import demo_photograph


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The options of a small network with a global pool, in a folder with two photographs."""
    monkeypatch.chdir(tmp_path)
    for name in ("one.png", "two.png"):
        demo_photograph().resize((64, 64)).save(name)
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    torch.save(model.state_dict(), "small.pth")
    return (
        *("--model", "small.pth", "--arch", "shufflenet_v2_x0_5"),
        *("--input-size", "64", "--preprocess", "imagenet"),
    )


def test_one_cell_offers_positions_once(checkpoint: tuple[str, ...]) -> None:
    ran = run("heatmap", "one.png", "two.png", *checkpoint)
    assert ran.exit_code == 0
    assert ran.stderr.count("--head position gives a map of positions") == 1
    further = run("heatmap", "one.png", "two.png", *checkpoint, "--head", "position")
    assert further.exit_code == 0
    assert "--head position" not in further.stderr


def test_a_bundle_of_positions_keeps_its_head(checkpoint: tuple[str, ...]) -> None:
    model, *options = checkpoint[1:]
    ran = run("convert", model, *options, "--head", "position", "-o", "net")
    assert ran.exit_code == 0, ran.stderr
    assert re.search(r"verdict +equivalent", ran.stdout)
    assert fcvgg.load("net").head == "position"
    assert run("heatmap", "one.png", "--model", "net").exit_code == 0
    assert run("heatmap", "one.png", "--model", "net", "--head", "window").exit_code == 0
    assert fcvgg.load("net", head="window").head == "window"


def test_a_head_that_is_fully_connected_is_refused_in_one_line(checkpoint: tuple[str, ...]) -> None:
    ran = run("heatmap", "one.png", "--model", "demo", "--head", "position")
    assert ran.exit_code == 2
    assert "head='position' must have a global average pool" in ran.stderr
