"""What `import fcvgg` offers and what it loads, in a fresh process."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fcvgg

SOURCES = sorted(Path(fcvgg.__file__).parent.rglob("*.py"))
OPTIONAL = [
    "timm",
    "skimage",
    "sklearn",
    "onnx",
    "onnxruntime",
    "h5py",
    "keras",
    "matplotlib",
    "typer",
    "rich",
    "pytest",
    "hypothesis",
    "openvino",
    "pytorch_lightning",
    "torchmetrics",
]


def imported(path: Path) -> set[str]:
    """The modules that a source file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_importing_loads_no_optional_package() -> None:
    code = "import sys, json, fcvgg; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(run.stdout))
    assert not loaded & set(OPTIONAL)
    assert not any(name == "fcvgg.cli" or name.startswith("fcvgg.cli.") for name in loaded)


@pytest.mark.parametrize("name", fcvgg.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    thing = getattr(fcvgg, name)
    documentation = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert documentation
    assert len(documentation.strip()) > 20


def test_the_public_names_are_sorted_and_unique() -> None:
    assert list(fcvgg.__all__) == sorted(set(fcvgg.__all__))
    assert {
        "convert",
        "FullyConvolutional",
        "Geometry",
        "ScoreMap",
        "Heatmap",
        "verify",
        "load",
        "receptive_fields",
        "Preprocess",
        "FcvggError",
    } <= set(fcvgg.__all__)


def test_every_public_error_is_an_fcvgg_error() -> None:
    errors = [getattr(fcvgg, name) for name in fcvgg.__all__ if name.endswith("Error")]
    assert len(errors) > 5
    assert all(issubclass(error, fcvgg.FcvggError) for error in errors)


def test_no_module_is_named_like_a_public_function() -> None:
    functions = {name for name in fcvgg.__all__ if inspect.isfunction(getattr(fcvgg, name))}
    package = Path(fcvgg.__file__).parent  # where a module's name hides a function's
    assert not functions & {path.stem for path in package.iterdir()}


def test_nothing_imports_the_command_line() -> None:
    for path in SOURCES:
        if "cli" not in path.parts and path.stem != "__main__":
            assert not any(name.startswith("fcvgg.cli") for name in imported(path)), path


def test_geometry_is_below_everything_and_knows_no_torch() -> None:
    (geometry,) = (path for path in SOURCES if path.name == "geometry.py")
    names = imported(geometry)
    assert not any(name.split(".")[0] in ("torch", "torchvision") for name in names)
    assert {name for name in names if name.startswith("fcvgg")} <= {
        "fcvgg.errors",
        "fcvgg.errors.FcvggError",
        "fcvgg.errors.GeometryError",
    }


def test_type_checkers_see_what_is_imported_on_demand() -> None:
    tree = ast.parse(Path(fcvgg.__file__).read_text())
    seen = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fcvgg.")
        for alias in node.names
    }
    assert seen == {
        (f"fcvgg.{module}", name) for module, names in fcvgg._PUBLIC.items() for name in names
    }


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fcvgg' has no attribute 'konvert'"):
        fcvgg.konvert  # noqa: B018


def test_what_dir_lists_is_public_and_there() -> None:
    code = (
        "import fcvgg, json; fcvgg.load; names = dir(fcvgg); "
        "assert all(hasattr(fcvgg, name) for name in names); print(json.dumps(names))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = {name for name in json.loads(run.stdout) if not name.startswith("_")}
    assert listed == {*fcvgg.__all__, *fcvgg._MODULES}
    assert "__version__" in json.loads(run.stdout)
