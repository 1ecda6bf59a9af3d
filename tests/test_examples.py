"""Every example runs as its docstring says and writes what it names."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from imagenet_weights import imagenet_example
from PIL import Image
from torchvision.models import squeezenet1_1

import fcvgg
from fcvgg.demo import SHOWN, demo_photograph

EXAMPLES = Path(__file__).parents[1] / "examples"
Run = Callable[..., str]


def test_heatmap_finds_the_face_in_the_packaged_photograph(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "heatmap.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout
    y, x = map(int, re.search(r"'face' at \(y, x\) = \((\d+), (\d+)\)", printed).groups())
    assert 60 < y < 190
    assert 160 < x < 290
    assert printed.endswith("wrote heatmap.png\n")
    with Image.open(tmp_path / "heatmap.png") as overlay:
        assert overlay.size == (512, 512)


def test_heatmap_of_a_photograph_and_a_checkpoint(tmp_path: Path, run_example: Run) -> None:
    torch.manual_seed(0)
    torch.save(squeezenet1_1(num_classes=3).state_dict(), tmp_path / "mine.pt")
    demo_photograph().resize((300, 260)).save(tmp_path / "photo.jpg")
    options = ["--model", "mine.pt", "--arch", "squeezenet1_1", "--output", "map.npy"]
    printed = run_example("heatmap.py", "photo.jpg", *options)
    assert "SqueezeNet makes (260, 300) pixels to torch.Size([3, " in printed
    assert np.load(tmp_path / "map.npy").shape == (260, 300)


def test_heatmap_says_in_one_line_what_is_wrong(tmp_path: Path, run_example: Run) -> None:
    with pytest.raises(SystemExit, match=r"^error: there is no image file absent\.jpg$"):
        run_example("heatmap.py", "absent.jpg")
    assert list(tmp_path.iterdir()) == []


def test_imagenet_finds_the_cat_the_cup_and_the_rocket(tmp_path: Path, run_example: Run) -> None:
    printed = run_example("imagenet.py")
    assert "equivalent at 224x224" in printed
    found = re.findall(r"Heatmap\('(.+)', \d+x\d+, peak (\S+) at \((\d+), (\d+)\)", printed)
    peaks = {name: (float(peak), int(y), int(x)) for name, peak, y, x in found}
    assert peaks.keys() == set(SHOWN)
    assert [peak for peak, _, _ in peaks.values()] == pytest.approx([0.98, 1.0, 0.56], abs=0.02)
    _, y, x = peaks["espresso"]
    assert 80 < y < 250
    assert 200 < x < 400
    _, y, x = peaks["missile"]
    assert 130 < y < 420
    assert 290 < x < 350
    with Image.open(tmp_path / "imagenet.jpg") as figure:
        assert figure.width > 1000
    assert (tmp_path / "imagenet.jpg").stat().st_size < 300_000


def test_any_size_makes_a_table_and_a_figure(tmp_path: Path, run_example: Run) -> None:
    heading, *rows, last = run_example("any_size.py").splitlines()
    assert heading.split()[:2] == ["image", "map"]
    net = fcvgg.load("demo")
    sizes = [tuple(map(int, row.split()[0].split("x"))) for row in rows]
    cells = [tuple(map(int, row.split()[1].split("x"))) for row in rows]
    assert len(sizes) == 5
    assert all(float(row.split()[5]) > 0.5 for row in rows)  # the face, found at every size
    assert cells == [net.output_size(size) for size in sizes]
    assert last == "wrote any_size.png"
    with Image.open(tmp_path / "any_size.png") as figure:
        assert figure.width > 1000


def test_equivalence_of_all_eight_vggs(tmp_path: Path, run_example: Run) -> None:
    _, *rows, last = run_example("equivalence.py", "--small", "--images", "1").splitlines()
    names = [row.split()[0] for row in rows]
    assert names == [f"vgg{n}{bn}" for n in (11, 13, 16, 19) for bn in ("", "_bn")]
    for row in rows:
        _, _, absolute, relative, top1, *times = row.split()
        assert float(absolute) >= 0
        assert float(relative) <= 1e-5
        assert top1 == "100%"
        assert all(float(time) > 0 for time in times)
    assert last == "all 8 agree on 1 images"


def test_gigapixel_streams_and_shows_what_it_found(tmp_path: Path, run_example: Run) -> None:
    printed = run_example("gigapixel.py", "--side", "1024")
    assert re.search(r"\(2, 125, 125\) scores, .* s per megapixel, \d+ MiB added", printed)
    assert printed.count("wrote ") == 3
    with Image.open(tmp_path / "gigapixel" / "detail-1024.png") as detail:
        assert detail.size == (1024, 1024)


def test_the_streaming_benchmark_reports_what_was_measured(
    tmp_path: Path, run_example: Run
) -> None:
    figures = {"rows": 1024, "cols": 512, "memory": "1GiB", "threads": 1, "seconds": 2, "cpu": 2}
    for way, added, difference in (("whole", 300 << 20, 0), ("stream", 100 << 20, 3e-7)):
        kept = {**figures, "way": way, "added": added, "difference": difference}
        (tmp_path / f"{way}-1024.json").write_text(json.dumps(kept))
    printed = run_example("benchmarks/streaming.py", "--folder", ".", "--report", ".")
    assert printed == "wrote streaming.md\nwrote streaming.png\n"
    table = (tmp_path / "streaming.md").read_text()
    assert "| 1024 | fcvgg.stream | 2.0 s | 3.81 s | 100 MiB | 3e-07 |" in table


def test_train_demo_trains(tmp_path: Path, run_example: Run) -> None:
    run_example("train_demo.py", "--quick", "--output", "weights.safetensors")
    assert 0 < (tmp_path / "weights.safetensors").stat().st_size < 2e6


def test_textures_compares_all_methods(tmp_path: Path, run_example: Run) -> None:
    imagenet_example()  # skips without the package that holds the weights
    printed = run_example("textures.py", "--quick")
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [int(row[1]) for row in rows] == [32, 16, 8] * 3
    assert [row[0].split()[1] for row in rows[::3]] == ["crop", "crop", "FCN-32s,"]
    assert all(0 <= float(row[2]) <= 1 for row in rows)
    assert all(float(row[5].rstrip(" |")) > 0 for row in rows)
    assert printed.endswith("wrote textures.png\n")
    with Image.open(tmp_path / "textures.png") as figure:
        assert figure.width > 900
    again = fcvgg.FCN.load(tmp_path / "textures-run" / "fcn-8s" / "fcn")
    assert again.predict(tmp_path / "textures-run" / "test" / "images" / "00.png").labels.any()


def test_slide_labels_trains_and_shows_the_evidence(tmp_path: Path, run_example: Run) -> None:
    printed = run_example("slide_labels.py", "--quick")
    assert re.search(
        r"accuracy: \d+\.\d% of 2 mosaics\nevidence: AUC 0\.\d+ over \d+ cells", printed
    )
    assert printed.endswith("wrote slide_labels.png\n")
    with Image.open(tmp_path / "slide_labels.png") as figure:
        assert figure.width > 300


def test_finetune_trains_converts_and_labels_a_mosaic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process and at smaller sizes, since VGG16 takes its time."""
    imagenet_example()  # or skip
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("finetune")
    monkeypatch.setattr(example, "SIZE", 64)
    monkeypatch.setattr(example, "QUARTER", 96)
    monkeypatch.chdir(tmp_path)
    options = ["--patches", "3", "--epochs", "2", "--output", "made"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options])
    example.main()
    printed = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"mosaic: ([\d.]+)% of", printed)]
    assert len(shares) == 2
    assert shares[1] > 70  # four classes; early features need few images
    assert "strategy svm: as requested" in printed
    assert printed.endswith("wrote made/mosaic.png\n")
    for strategy in ("auto", "svm"):
        assert (tmp_path / "made" / strategy / "report" / "report.md").exists()
        assert fcvgg.load(tmp_path / "made" / strategy / "model").categories[1] == "fur"
    with Image.open(tmp_path / "made" / "mosaic.png") as figure:
        assert figure.width > 1000
