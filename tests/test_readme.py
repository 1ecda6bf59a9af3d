"""Every block of README, guides and CONTRIBUTING is run here, or is what CI itself runs."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image
from test_architecture import MODULES, imports
from typer.testing import CliRunner

from fcvgg.cli import app
from fcvgg.demo import demo_photograph
from fcvgg.streaming.score_store import open_store

ROOT = Path(__file__).parents[1]
GUIDES = {path.name: path for path in sorted((ROOT / "examples" / "guides").glob("*.md"))}
PAGES = {
    "README.md": ROOT / "README.md",
    "CONTRIBUTING.md": ROOT / ".github" / "CONTRIBUTING.md",
    **GUIDES,
}
README = PAGES["README.md"].read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page].read_text(), re.DOTALL)


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the images that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    demo_photograph().resize((300, 280)).save("photo.jpg")
    with tifffile.TiffWriter("slide.tif") as file:
        for level, size in enumerate(((600, 560), (300, 280))):
            pixels = np.asarray(demo_photograph().resize(size))
            form = {"photometric": "rgb", "tile": (128, 128), "subfiletype": level}
            file.write(pixels, **form, resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    Image.effect_noise((270, 300), 60).save("other.png")
    for kind in ("images", "masks"):
        (tmp_path / "labelled" / kind).mkdir(parents=True)
    for i, left in enumerate((170, 190, 210)):  # a face and its surroundings
        small = demo_photograph().crop((left, 60, left + 96, 156))
        small.save(f"labelled/images/{i}.jpg")
        mask = Image.new("L", small.size)
        mask.paste(1, (220 - left, 20, 270 - left, 96))
        mask.save(f"labelled/masks/{i}.png")
    for kind, place in (("face", (180, 60)), ("suit", (40, 380))):  # equally many of both classes
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(6):
            left, top = place[0] + 4 * i, place[1]
            part = demo_photograph().crop((left, top, left + 90, top + 90))
            part.save(f"photos/{kind}/{i}.jpg")
    return tmp_path


@pytest.fixture
def stopped_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray, which the block on many machines starts, is stopped."""
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


# -- Python blocks: those of a page share one namespace, as a reader would run them --------------


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning", "ignore::DeprecationWarning:ray")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run_in_order(
    page: str,
    photographs: Path,
    capsys: pytest.CaptureFixture[str],
    stopped_ray: None,
) -> None:
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)
    if page in RESULTS:
        RESULTS[page](photographs, capsys.readouterr().out)


def check_readme(folder: Path, printed: str) -> None:
    assert "equivalent at 224x224" in printed
    assert "window 224, stride 32" in printed
    assert {"heatmap.png", "my-vgg"} <= {path.name for path in folder.iterdir()}


def check_slides(folder: Path, printed: str) -> None:
    bands, whole = (open_store(f"{name}.zarr").array[:] for name in ("bands", "scores"))
    np.testing.assert_allclose(bands, whole, rtol=1e-4, atol=1e-4)
    table = pq.read_table("classes").to_pylist()
    assert {Path(row["path"]).name for row in table} == {"photo.jpg", "other.png"}
    assert all(len(row["classes"]) == 1 and not row["error"] for row in table)


def check_deployment(folder: Path, printed: str) -> None:
    """What AOTInductor compiled gives the probabilities of `score_map`."""
    difference = float(printed.partition("compiled: differs by ")[2])
    assert difference <= 1e-5


def check_refusals(folder: Path, printed: str) -> None:
    assert "GroupNorm" in printed
    assert printed.count("\n") == 1


def check_contributing(folder: Path, printed: str) -> None:
    """The guide adds a layer that would be refused without its rule."""
    assert "equivalent at 8x8" in printed


def check_training(folder: Path, printed: str) -> None:
    assert "mean IoU" in printed
    assert {"run", "dense-run", "labels.png"} <= {path.name for path in folder.iterdir()}


RESULTS: dict[str, Callable[[Path, str], None]] = {
    "CONTRIBUTING.md": check_contributing,
    "README.md": check_readme,
    "deployment.md": check_deployment,
    "refusals.md": check_refusals,
    "slides.md": check_slides,
    "training.md": check_training,
}
"""What the blocks of a page must have written and printed."""


# -- shell blocks -------------------------------------------------------------------------------


def command_blocks() -> Iterator[tuple[str, list[str]]]:
    """The blocks of ``fcvgg`` commands; a block's lines run one after the other."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            lines = [line for line in block.splitlines() if line.startswith("fcvgg ")]
            if lines:
                yield page, lines


@pytest.mark.parametrize(("page", "lines"), list(command_blocks()))
def test_command_lines_run(photographs: Path, page: str, lines: list[str]) -> None:
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, f"{page}: {line}\n{result.output}"
        assert result.output


def test_other_commands_run_scripts_that_exist() -> None:
    named = {
        name
        for page in PAGES
        for block in blocks(page, "sh")
        for name in re.findall(r"(?<!\S)(?:examples|tests)/\S+\.py", block)
    }
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_starts_with_install_and_demo_and_has_one_test_command() -> None:
    install, demo = blocks("README.md", "sh")[0].strip().splitlines()
    assert install == "python3 -m venv .venv && .venv/bin/pip install ."
    assert demo == ".venv/bin/fcvgg demo"
    (tests,) = re.findall(r"^.*pytest$", README, re.MULTILINE)
    assert tests.startswith("python3 -m venv .venv && ")
    assert "grep -m 1 'pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


# -- text -------------------------------------------------------------------------------------


def test_readme_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", PAGES[page].read_text()):
        path, _, heading = link.partition("#")
        target = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in {title.lower().replace(" ", "-") for title in titles}, link


def test_readme_leads_to_every_guide_and_notebook() -> None:
    notebooks = (ROOT / "examples" / "notebooks").glob("*.ipynb")
    for path in (*GUIDES.values(), *notebooks, PAGES["CONTRIBUTING.md"]):
        assert f"({path.relative_to(ROOT)})" in README


def map_of_the_source() -> dict[str, int]:
    """The folders and modules at the top of the package, by the row of the map that has them."""
    _, table = README.split("From the ground up")
    rows = re.findall(r"^\| \[.*$", table, re.MULTILINE)
    links = re.compile(r"\(fcvgg/([\w.]+)\)")
    return {name: i for i, row in enumerate(rows) for name in links.findall(row)}


def test_every_folder_and_module_at_the_top_is_on_the_map() -> None:
    package = ROOT / "fcvgg"
    modules = {
        p.name for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert {m for m in modules if not m.startswith("__")} == set(map_of_the_source())


def test_no_part_imports_one_below_it_on_the_map() -> None:
    rows = {name.removesuffix(".py"): row for name, row in map_of_the_source().items()}
    for name in MODULES:
        own = name.split(".")[0]
        for other in imports(name):
            above = other.split(".")[0]
            if own in rows and above in rows:
                assert rows[above] <= rows[own], f"{name} imports {other}"
