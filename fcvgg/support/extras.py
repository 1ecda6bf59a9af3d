"""Optional packages, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from fcvgg.errors import MissingExtraError


def imported(module: str, extra: str) -> Any:
    """An optional package's module, or `MissingExtraError` that names what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"the package {module.partition('.')[0]!r} is needed and cannot be imported ({error}); "
            f"install it with: pip install 'fcvgg[{extra}]'"
        ) from error
