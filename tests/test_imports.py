"""What `import fcvgg` offers and what it loads, in a fresh process."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fcvgg

SOURCES = sorted(Path(fcvgg.__file__).parent.rglob("*.py"))
STUBS = sorted(Path(fcvgg.__file__).parent.rglob("*.pyi"))
_FIRST_NAMES = """
ArgumentError CaptureError CategoryError ConversionError DatasetError DenseTraining
EffectiveReceptiveField Equivalence EquivalenceError Evaluation FCN FcvggError Features FineTuned
FullyConvolutional Geometry GeometryChanges GeometryError Heatmap ImageError InputSizeError LabelMap
LayerNames LayerTable LoadError MaskFolder MissingExtraError OptimizedNetwork Preprocess
PreprocessError Probe Recipe RefusedLayerError ScoreMap ScoredBox SegmentationMetrics TrainingError
UnsupportedLayerError VGGFeatures WindowComparison compare_windows convert effective_receptive_field
evaluate evaluate_fcn features_upto finetune for_input_size freeze_ geometry_changes insert_after
label_metrics layer_names load loss_for mask_folder open_image optimize parameter_groups
plot_features probe receptive_fields replace_head replace_layers stream train_fcn
trainable_parameters unfreeze_ verify
"""
FIRST_NAMES = _FIRST_NAMES.split()
"""What `fcvgg` offered before most of it moved to topics; importable for good, never changed."""
NAMES = [*FIRST_NAMES, "Agreement"]
"""All that it offers: the first names, and those that came later."""

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
    assert not loaded & {*OPTIONAL, "torch"}
    assert not any(name == "fcvgg.cli" or name.startswith("fcvgg.cli.") for name in loaded)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    thing = getattr(fcvgg, name)
    documentation = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert documentation
    assert len(documentation.strip()) > 20


def test_the_names_in_front_are_few_sorted_and_among_all() -> None:
    assert list(fcvgg.__all__) == sorted(set(fcvgg.__all__))
    assert len(fcvgg.__all__) <= 20
    assert set(fcvgg.__all__) <= set(NAMES)


def test_every_public_error_is_an_fcvgg_error() -> None:
    errors = [getattr(fcvgg, name) for name in FIRST_NAMES if name.endswith("Error")]
    assert len(errors) > 5
    assert all(issubclass(error, fcvgg.FcvggError) for error in errors)


def test_no_module_is_named_like_a_public_function() -> None:
    functions = {name for name in FIRST_NAMES if inspect.isfunction(getattr(fcvgg, name))}
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


def test_the_stubs_name_what_is_there() -> None:
    """What type checkers see is what is imported, and all of the first names are among it."""
    found = set()
    for path in STUBS:
        package = ".".join(path.parent.relative_to(Path(fcvgg.__file__).parents[1]).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                home = importlib.import_module(
                    f"{package}.{node.module}" if node.module else package
                )
                for alias in node.names:
                    here = getattr(importlib.import_module(package), alias.name)
                    assert here is getattr(home, alias.name)
                    assert alias.asname == alias.name  # exported, by the rules of stubs
                    found.add((package, alias.name))
    assert {name for package, name in found if package == "fcvgg"} == {*NAMES, *fcvgg._TOPICS}


TOPICS = {
    "errors": ["FcvggError", "ArgumentError", "MissingExtraError"],
    "evaluation": ["evaluate", "compare_windows", "receptive_fields", "LayerTable"],
    "transfer": ["freeze_", "replace_head", "probe", "features_upto", "VGGFeatures"],
    "segmentation": ["FCN", "train_fcn", "evaluate_fcn", "mask_folder", "label_metrics"],
}


def test_topics_are_reached_without_an_import_of_their_own() -> None:
    code = (
        f"import fcvgg\nfor topic, names in {TOPICS}.items():\n"
        "    for name in names: assert getattr(getattr(fcvgg, topic), name) is getattr(fcvgg, name)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_everything_is_imported_without_scikit_learn() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from fcvgg import *; from fcvgg.transfer import *; from fcvgg import freeze_\n"
        "try: from fcvgg import VGGFeatures\n"
        "except ImportError as error: print(error)\n"
        "import fcvgg\n"
        "try: fcvgg.transfer.VGGFeatures\n"
        "except fcvgg.MissingExtraError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert first == second
    assert first.endswith("install it with: pip install 'fcvgg[sklearn]'")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="No fcvgg attribute konvert"):
        fcvgg.konvert  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'konvert' from 'fcvgg'"):
        from fcvgg import konvert  # noqa: F401


def test_what_dir_lists_is_in_front_and_there() -> None:
    code = (
        "import fcvgg, json; fcvgg.load, fcvgg.freeze_; names = dir(fcvgg); "
        "assert all(hasattr(fcvgg, name) for name in names); print(json.dumps(names))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = {name for name in json.loads(run.stdout) if not name.startswith("_")}
    assert listed == {*fcvgg.__all__, *fcvgg._TOPICS}
    assert "__version__" in json.loads(run.stdout)
