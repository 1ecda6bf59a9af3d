"""``fcvgg stream`` and the pictures that ``fcvgg heatmap`` makes of what it wrote."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

import fcvgg
from fcvgg.cli import app
from fcvgg.demo import demo_photograph


@pytest.fixture
def slide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("slide.tif", np.asarray(demo_photograph().resize((200, 168))))
    return tmp_path / "slide.tif"


def fcvgg_command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_stream_writes_the_map_and_heatmap_shows_it(slide):
    ran = fcvgg_command("stream", slide, "-o", "scores.zarr", "--model", "demo")
    assert ran.exit_code == 0, ran.output
    assert "scores.zarr" in ran.output
    ran = fcvgg_command("heatmap", "scores.zarr", "--target", "face", "--output", "pictures")
    assert ran.exit_code == 0, ran.output
    (pyramid,) = (slide.parent / "pictures").glob("*.tif*")
    (picture,) = (slide.parent / "pictures").glob("*.png")
    assert picture.stat().st_size > 1000
    values = tifffile.imread(pyramid).astype(float)
    expected = fcvgg.load("demo", verify=False).heatmap("slide.tif", "face").values
    assert values.shape == expected.shape
    np.testing.assert_allclose(values / max(values.max(), 1) * expected.max(), expected, atol=0.02)


def test_a_slide_that_is_none_is_one_line(slide):
    (slide.parent / "note.tif").write_text("no slide")
    ran = fcvgg_command("stream", "note.tif", "-o", "scores.zarr", "--model", "demo")
    assert ran.exit_code == 2
    assert "note.tif" in ran.stderr
    assert not (slide.parent / "scores.zarr").exists()
