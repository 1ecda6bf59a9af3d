"""Folders in, tables out: what classify, heatmap and segment share."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from PIL import Image

import fcvgg
from fcvgg.demo import demo_photograph

DEMO = ("-m", "demo")


def rows_of(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    place = Path("photos")
    (place / "more").mkdir(parents=True)
    for i, name in enumerate(("b.png", "a.jpg", "more/b.png")):
        demo_photograph().resize((48 + 8 * i, 40)).save(place / name)
    (place / "notes.txt").write_text("no image")
    return place


def test_a_folder_becomes_a_table(photos: Path) -> None:
    ran = run("classify", photos, *DEMO, "--csv", "made.csv", "--top", "2")
    assert (ran.exit_code, ran.stdout) == (0, "wrote made.csv\n")
    assert "1 of 3 files left out: 1 .txt" in ran.stderr
    rows = rows_of("made.csv")
    assert [(row["image"], row["rank"]) for row in rows] == [
        *(
            ("photos/a.jpg", "1"),
            ("photos/a.jpg", "2"),
            ("photos/b.png", "1"),
            ("photos/b.png", "2"),
        )
    ]
    net = fcvgg.load("demo")
    expected = net.classify(photos / "a.jpg", scales=net.usual_scale)[0].max()
    assert float(rows[0]["probability"]) == pytest.approx(float(expected), rel=1e-5)


def test_folders_in_folders_on_request(photos: Path) -> None:
    ran = run("classify", photos, *DEMO, "--json", "--recursive")
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [each["image"] for each in found] == [
        f"photos/{name}" for name in ("a.jpg", "b.png", "more/b.png")
    ]


def test_broken_files_are_named_and_the_rest_is_written(photos: Path) -> None:
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n")
    ran = run("heatmap", photos, *DEMO, "--csv", "made.csv", "-o", "maps")
    assert ran.exit_code == 2
    assert "fcvgg: error: 1 of 3 images could not be used\n" in ran.stderr
    assert [row["image"] for row in rows_of("made.csv")] == [
        "photos/a.jpg",
        "photos/b.png",
    ]
    assert sorted(path.name for path in Path("maps").iterdir()) == [
        "a-heatmap.png",
        "b-heatmap.png",
    ]


def test_results_lie_in_folders_as_the_images_do(photos: Path) -> None:
    for ending in ("-heatmap.ome.tif", "-labels.png", "-labels.ome.tif"):  # of a score map
        (photos / f"slide{ending}").write_bytes((photos / "b.png").read_bytes())
    for _ in range(2):  # what the first run wrote is no image of the second
        ran = run("heatmap", photos, *DEMO, "-r", "-o", "photos")
        assert ran.exit_code == 0, ran.stderr
    made = sorted(str(path) for path in photos.rglob("*-heatmap.png"))
    assert made == [f"photos/{n}-heatmap.png" for n in ("a", "b", "more/b")]


def test_an_empty_folder(photos: Path) -> None:
    Path("empty/inner").mkdir(parents=True)
    ran = run("classify", "empty", *DEMO)
    assert ran.exit_code == 2
    assert "the folder empty has no images; --recursive also takes those of the f" in ran.stderr


def test_an_image_from_standard_input(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.TextIOWrapper(io.BytesIO((photos / "b.png").read_bytes()))
    monkeypatch.setattr("sys.stdin", data)
    from fcvgg.cli.console import STDIN
    from fcvgg.cli.options import ImageOpener

    assert ImageOpener(None, None).open(STDIN).size == (40, 48)


def test_an_address_is_one_true_line(photos: Path) -> None:
    ran = run("classify", "https://example.org/dog.jpg", *DEMO)
    assert "got the address https://example.org/dog.jpg; download it" in ran.stderr
    assert ran.exit_code == 2


def test_heatmap_as_json_with_boxes_scales_and_files(photos: Path) -> None:
    demo_photograph().save("whole.png")
    options = ("-t", "face", "--scales", "128,160", "--combine", "mean", "--boxes", "0.5")
    ran = run("heatmap", "whole.png", *DEMO, *options, "--json")
    found = json.loads(ran.stdout)
    heatmap = fcvgg.load("demo").heatmap("whole.png", "face", scales=(128, 160), combine="mean")
    assert (found["y"], found["x"]) == heatmap.peak
    assert found["peak"] == pytest.approx(float(heatmap.values.max()), rel=1e-4)
    assert [tuple(box.values()) for box in found["boxes"]] == [
        pytest.approx(tuple(box)) for box in heatmap.boxes(0.5)
    ]
    assert found["files"] == ["whole-heatmap.png"]
    with Image.open("whole-heatmap.png") as made:
        expected = heatmap.overlay(boxes=heatmap.boxes(0.5))
        assert np.array_equal(np.asarray(made), np.asarray(expected))


@pytest.mark.parametrize("figure", ["heatmap", "classes", "labels"])
def test_figures_and_scores(photos: Path, figure: str) -> None:
    ran = run("heatmap", "photos/b.png", *DEMO, "--figure", figure, "--scores", "--cmap", "viridis")
    assert ran.exit_code == 0, ran.stderr
    with Image.open("b-figure.png") as made:
        assert min(made.size) > 200
    score_map = fcvgg.load("demo").score_map("photos/b.png")
    with np.load("b-scores.npz") as held:
        np.testing.assert_allclose(held["scores"], score_map.scores.numpy(), rtol=1e-5)
        assert held["y"].tolist() == [15.5, 23.5]
        assert held["categories"].tolist() == ["background", "face"]


def test_options_that_exclude_each_other(photos: Path) -> None:
    for options in (("--scale", "64"), ("--scores",), ("--figure", "labels")):
        ran = run("heatmap", "photos/b.png", *DEMO, "--scales", "64,96", *options)
        assert ran.exit_code == 2
        assert "--scale" in ran.stderr


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("windows", {"kind": "windows", "threshold": 0.5}),
        ("regions", {"kind": "regions", "threshold": 0.5}),
        ("regions,0.8", {"kind": "regions", "threshold": 0.8}),
        ("0.4", {"kind": "windows", "threshold": 0.4, "iou_threshold": 0.7}),
    ],
)
def test_heatmap_draws_either_kind_of_boxes(
    photos: Path, given: str, options: dict[str, Any]
) -> None:
    demo_photograph().save("whole.png")
    limit = ("--iou-threshold", "0.7") if "iou_threshold" in options else ()
    ran = run(
        *("heatmap", "whole.png", *DEMO, "-t", "face", "--scale", "160", "--boxes", given),
        *(*limit, "--colour", "--json"),
    )
    heatmap = fcvgg.load("demo").score_map("whole.png", scale=160).heatmap("face")
    boxes = heatmap.boxes(**options)
    found = json.loads(ran.stdout)["boxes"]
    assert len(boxes) > 0
    assert [tuple(box.values()) for box in found] == [pytest.approx(tuple(box)) for box in boxes]
    with Image.open("whole-heatmap.png") as made:
        expected = heatmap.overlay(boxes=boxes, grey=False)
        assert np.array_equal(np.asarray(made), np.asarray(expected))


@pytest.mark.parametrize("given", ["circles", "regions,2", "-1", "regions,much", "nan"])
def test_heatmap_refuses_boxes_of_no_kind(photos: Path, given: str) -> None:
    ran = run("heatmap", "photos/b.png", *DEMO, "--boxes", given)
    assert ran.exit_code == 2
    assert f"'{given}' is not windows, regions or a probability in [0, 1]" in ran.stderr


def test_heatmap_with_a_legend_is_what_the_library_writes(photos: Path) -> None:
    ran = run("heatmap", "photos/b.png", *DEMO, "-t", "face", "--legend", "--alpha", "0.5")
    assert ran.exit_code == 0, ran.stderr
    heatmap = fcvgg.load("demo").score_map("photos/b.png").heatmap("face")
    heatmap.save("expected.png", legend=True, alpha=0.5)
    with Image.open("b-heatmap.png") as made, Image.open("expected.png") as expected:
        assert made.size != (48, 40)
        assert np.array_equal(np.asarray(made), np.asarray(expected))
