"""``fcvgg evaluate`` on folders of tiny pictures, with the packaged net."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from PIL import Image

import fcvgg
from fcvgg.demo import demo_photograph


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cuts of the packaged photograph: its face, and what is none."""
    monkeypatch.chdir(tmp_path)
    photo = demo_photograph()
    cuts = {"face": [(160, 60, 288, 188)], "background": [(0, 0, 120, 120), (300, 300, 440, 420)]}
    for name, boxes in cuts.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, box in enumerate(boxes):
            photo.crop(box).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def test_it_prints_the_table_and_writes_json(data: Path) -> None:
    (data / "face" / "broken.jpg").write_text("no image")
    ran = run("evaluate", data, "--model", "demo", "--protocols", "all", "--classes")
    assert ran.exit_code == 0
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert ran.stdout.splitlines()[0] == f"demo on {data}"
    assert lines[1] == ["protocol", "input", "scales", "flip", "views", "top-1"]
    assert [line[0] for line in lines[2:8]] == [
        "center-crop",
        "resize",
        "ten-crop",
        "dense",
        "multi-crop",
        "dense+multi-crop",
    ]
    assert "3 images" in ran.stdout
    assert "broken.jpg" not in ran.stdout
    assert ran.stderr.splitlines() == [
        f"fcvgg: skipped {data}/face/broken.jpg is not an image that Pillow can read; convert it "
        "to PNG or JPEG",
        "fcvgg: 1 of 4 files left out: 1 .jpg (could not be read)",
    ]
    assert "wrote evaluation.json" in ran.stdout
    written = json.loads(Path("evaluation.json").read_text())
    net = fcvgg.load("demo")
    expected = fcvgg.evaluate(net, data, protocols="all")
    assert written == json.loads(expected.to_json())
    assert expected["resize"].top1 == 1
    assert ran.stdout.count("precision") == 6


def test_options_reach_the_evaluation(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ran = run(
        *("evaluate", data, "-m", "demo", "-p", "dense", "-s", "40,50", "--flip"),
        *("--average", "probabilities", "-o", out),
    )
    assert ran.exit_code == 0
    written = json.loads(out.read_text())
    assert written["average"] == "probabilities"
    (protocol,) = written["protocols"]
    assert (protocol["scales"], protocol["flip"], protocol["views"]) == ([40, 50], True, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent must be a folder with one folder per class, got nothing of that name"),
        (["empty"], "empty must hold images in empty/CLASS/, got no folders"),
        (["data", "-p", "densest"], "--protocols must be all, or some of center-crop"),
        (["data", "-p", ","], "dense+multi-crop, got none"),
        (["data", "-o", "absent/x.json"], "cannot write absent/x.json: there is no folder absent"),
    ],
)
def test_errors_are_one_line(data: Path, arguments: list[str], message: str) -> None:
    Path("empty").mkdir()
    ran = run("evaluate", *arguments, "--model", "demo")
    assert ran.exit_code == 2
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert message in ran.stderr


def test_what_was_left_out_is_one_line_on_stderr(data: Path) -> None:
    for i in range(16):
        (data / "face" / f"{i}.xyz").write_text("no image")
    (data / os.fsdecode(b"n\xf6tes\x1b[31m.txt")).write_text("about")
    shutil.copytree(data, "parts/Val")
    ran = run("evaluate", "parts", "--model", "demo", "--protocols", "dense")
    assert ran.exit_code == 0
    line = "17 of 20 files left out: 16 .xyz (not a readable image), 1 .txt (not a readable image)"
    assert ran.stderr == f"fcvgg: {line}\n"
    assert "3 images\nthose of the part parts/Val\nwrote" in ran.stdout


def test_it_is_headed_by_the_model_that_was_named(data: Path) -> None:
    Path("run").mkdir()
    fcvgg.load("demo").save("run/model")
    shutil.rmtree(data / "background")
    Path("data/background").mkdir()
    ran = run("evaluate", "data", "--model", "run/model", "-p", "dense")
    assert ran.stdout.startswith("run/model on data\n")
    assert "\n1 image\n" in ran.stdout


def test_pixels_without_data_enter_no_score(data: Path, tmp_path: Path) -> None:
    net = fcvgg.load("demo")
    for path in data.rglob("*.png"):
        with Image.open(path) as image:
            pixels = np.maximum(np.asarray(image), 1)  # (H, W, 3)
        pixels[:, : pixels.shape[1] // 3] = 0
        Image.fromarray(pixels).save(path)
    sources = [fcvgg.open_image(path, nodata=0) for path in data.rglob("*.png")]
    expected = [net.classify(source, scales=64).isfinite().all() for source in sources]
    assert 0 < sum(expected) < 3  # of the wide image some windows have data
    options = ("-m", "demo", "-p", "dense", "-s", "64")
    for nodata, count in (((), 3), (("--nodata", "0"), sum(expected))):
        ran = run("evaluate", data, *options, *nodata, "-o", tmp_path / "out.json")
        assert ran.exit_code == 0, ran.stderr
        assert json.loads((tmp_path / "out.json").read_text())["images"] == count
    assert "no cell or no crop has data" in ran.stderr
    ran = run("evaluate", data, *options, "--nodata", "file")
    assert ran.exit_code == 2
    assert "must declare a nodata value" in ran.stderr


def test_folders_that_do_not_fit_the_classes(data: Path) -> None:
    Image.new("RGB", (40, 40)).save(data / "face" / "x.png")
    (data / "cats").mkdir()
    ran = run("evaluate", data, "--model", "demo")
    assert ran.exit_code == 2
    assert "the class 'cats' must match one category of the network" in ran.stderr
    assert not Path("evaluation.json").exists()
