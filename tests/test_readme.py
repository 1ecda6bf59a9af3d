"""Every block that the README shows is run here, or is what CI itself runs."""

import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from fcvgg.cli import app
from fcvgg.demo import demo_photograph
from fcvgg.streaming.score_store import open_store

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """The folder with the photographs that the README speaks of."""
    monkeypatch.chdir(tmp_path)
    demo_photograph().resize((300, 280)).save("photo.jpg")
    Image.effect_noise((270, 300), 60).save("other.png")
    for kind in ("images", "masks"):
        (tmp_path / "labelled" / kind).mkdir(parents=True)
    for i, left in enumerate((170, 190, 210)):  # a face and what is beside it
        small = demo_photograph().crop((left, 60, left + 96, 156))
        small.save(f"labelled/images/{i}.jpg")
        mask = Image.new("L", small.size)
        mask.paste(1, (220 - left, 20, 270 - left, 96))
        mask.save(f"labelled/masks/{i}.png")
    for kind, place in (("face", (180, 60)), ("suit", (40, 380))):  # as many looks at each
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(6):
            left, top = place[0] + 4 * i, place[1]
            part = demo_photograph().crop((left, top, left + 90, top + 90))
            part.save(f"photos/{kind}/{i}.jpg")
    return tmp_path


@pytest.fixture
def ray(monkeypatch):
    """Ray, which the block on many machines starts, is stopped."""
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning", "ignore::DeprecationWarning:ray")
def test_python_blocks_run_in_order(photographs, capsys, ray):
    namespace = {}
    assert len(blocks("python")) == 12
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    bands, whole = (open_store(f"{name}.zarr").array[:] for name in ("bands", "scores"))
    np.testing.assert_allclose(bands, whole, rtol=1e-4, atol=1e-4)
    table = pq.read_table("classes").to_pylist()
    assert {Path(row["path"]).name for row in table} == {"photo.jpg", "other.png"}
    assert all(len(row["classes"]) == 1 and not row["error"] for row in table)
    assert "equivalent at 224x224" in capsys.readouterr().out
    assert {"heatmap.png", "my-vgg", "faces.onnx"} <= {p.name for p in photographs.iterdir()}


def command_lines():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("fcvgg ")]


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_run(photographs, line):
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    assert result.output


def test_install_commands_are_whole_and_ci_runs_the_second():
    demo, tests = (b.strip() for b in blocks("sh")[:2])
    assert demo.startswith("python3 -m venv .venv && ")
    assert demo.endswith(".venv/bin/fcvgg demo")
    assert tests.startswith("python3 -m venv .venv && ")
    assert tests.endswith("pytest")
    assert "grep -m 1 'pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_links_lead_to_files():
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", README)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_every_folder_and_module_at_the_top_is_on_the_map():
    map_section = README[README.index("## Map of the source") :]
    package = ROOT / "fcvgg"
    modules = [
        p.name for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    ]
    unnamed = [m for m in modules if not m.startswith("__") and f"(fcvgg/{m})" not in map_section]
    assert not unnamed
