"""``fcvgg segment-train`` and ``fcvgg segment``, with the packaged net on a few tiny pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from PIL import Image

import fcvgg


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of a dark and a light half, with masks."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for i in range(4):
        labels = np.zeros((40, 48), np.uint8)
        labels[:, 15 + 5 * i :] = 1
        grey = (60 + 130 * labels + rng.normal(0, 9, labels.shape)).astype(np.uint8)
        Image.fromarray(grey).convert("RGB").save(tmp_path / "data" / "images" / f"{i}.png")
        Image.fromarray(labels).save(tmp_path / "data" / "masks" / f"{i}.png")
    return tmp_path / "data"


def test_train_resume_and_label(data: Path) -> None:
    (data / "images" / "3.png").write_text("no image")
    (data / "images" / "notes.txt").write_text("no image")
    options = ("--classes", "dark, light", "--model", "demo", "--crop", "32", "--batch-size", "2")
    options += ("--lr", "5e-3")
    ran = run("segment-train", data, *options, "--epochs", 2, "--freeze-upto", "pool2", "-o", "c")
    assert ran.exit_code == 0, ran.output
    assert "skipped" in ran.stderr
    assert "3.png is not an image" in ran.stderr
    counted = "2 of 5 files left out: 1 .txt (not a readable image), 1 .png (could not be read)"
    assert f"fcvgg: {counted}\n" in ran.stderr
    assert "FCN-32s, epoch " in ran.stdout
    assert "wrote c/fcn" in ran.stdout
    assert ran.stdout.endswith("next: fcvgg segment photo.jpg --fcn c/fcn\n")
    (line,) = (line for line in ran.stderr.splitlines() if line.startswith("epoch 2/2"))
    assert " mIoU " in line
    assert "dark" not in line, "of many classes, that is too long"
    assert "valid_iou_dark" in Path("c/history.csv").read_text()
    again = run("segment-train", data, *options, "-o", "c")
    assert again.stderr == (
        "fcvgg: error: c already holds a run (last.ckpt); pass --resume, or choose another folder\n"
    )
    coarse = fcvgg.FCN.load("c/fcn")
    first = fcvgg.load("demo").state_dict()["features.0.weight"]
    assert coarse.state_dict()["backbone.features.0.weight"].equal(first)
    fine = ("--variant", "8s", "--init-from", "c/fcn", "--class-weights", "balanced", "-o", "f")
    assert run("segment-train", data, *options, *fine, "--epochs", 6).exit_code == 0
    ran = run("segment-train", data, *options, *fine, "--epochs", 8, "--resume")
    assert ran.exit_code == 0, ran.output
    assert "resumed after epoch 6" in ran.stdout

    fcvgg.load("demo").save(Path("bundle"))
    ran = run("segment-train", data, "-c", "a,b", "-m", "bundle", "--epochs", 1, "-o", "b")
    assert ran.exit_code == 0, ran.output
    assert fcvgg.FCN.load("b/fcn").backbone.geometry.window == (8, 8)

    ran = run("segment", data / "images" / "0.png", "--fcn", "f/fcn", "--output", "out")
    assert ran.exit_code == 0, ran.output
    labels = np.asarray(Image.open("out/0-labels.png"))
    truth = np.asarray(Image.open(data / "masks" / "0.png"))
    assert (labels == truth).mean() > 0.9
    with Image.open("out/0-overlay.png") as overlay:
        assert overlay.width > overlay.height * 48 / 40  # the image, and beside it a legend
    assert "dark" in ran.stdout


def test_an_interrupted_run_says_how_it_goes_on(data: Path, monkeypatch: Any) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fcvgg.segmentation.training.train_fcn", interrupted)
    options = ("--classes", "dark,light", "--model", "demo", "-o", "run")
    ran = run("segment-train", data, *options)
    assert (ran.exit_code, ran.stderr) == (130, "fcvgg: error: interrupted\n")
    Path("run").mkdir()
    Path("run/last.ckpt").touch()
    ran = run("segment-train", data, *options)
    assert ran.exit_code == 130
    assert ran.stderr == (
        "fcvgg: error: interrupted; finished epochs are kept in run, and --resume continues\n"
    )


def test_no_label_map_takes_the_place_of_another(data: Path) -> None:
    fcvgg.FCN(fcvgg.load("demo"), 2).save("fcn")
    for place, side in (("a", 30), ("b", 31)):
        Path(place).mkdir()
        Image.new("RGB", (20, side)).save(f"{place}/x.png")
    ran = run("segment", "a/x.png", "b/x.png", "--fcn", "fcn", "--output", "out")
    assert ran.exit_code == 2
    assert "b/x.png and a/x.png would both be written to out/x-labels.png" in ran.stderr
    with Image.open("out/x-labels.png") as first:
        assert first.size == (20, 30)
    Image.new("RGB", (20, 20)).save("x-overlay.png")
    Image.new("RGB", (20, 20)).save("x.png")
    ran = run("segment", "x.png", "x-overlay.png", "--fcn", "fcn", "--output", ".")
    assert "the overlay of x.png would overwrite the input x-overlay.png" in ran.stderr
    with Image.open("x-overlay.png") as untouched:
        assert untouched.getextrema() == ((0, 0),) * 3


def test_bad_input_is_one_line_and_exit_2(data: Path) -> None:
    for arguments, message in [
        (("segment-train", data, "--classes", "dark", "-m", "demo"), "must be 2 to 255, got 1"),
        (("segment-train", "none", "-c", "a,b", "-m", "demo"), "none/images does not exist"),
        (
            ("segment-train", data, "-c", "a,b", "-m", "demo", "--init-from", "none"),
            "none must be the folder of an FCN",
        ),
        (("segment", data / "images" / "0.png", "--fcn", "none"), "must be the folder of an FCN"),
    ]:
        ran = run(*arguments)
        assert ran.exit_code == 2
        assert message in ran.stderr
        assert len(ran.stderr.splitlines()) == 1
