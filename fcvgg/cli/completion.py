"""What a shell completes: names, found without the packages that have them, which load slowly."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

_REGISTERED = re.compile(r"^@register_model\(\)\n(?:@.+\n)*def (\w+)\(", re.MULTILINE)


def complete_model(incomplete: str) -> list[str]:
    """The `autocompletion` of a model, without timm's and the hub's many; a shell adds files."""
    names = ["demo", "demo:imagenet", "timm:", "hf:", *_torchvision_names()]
    return [name for name in names if name.startswith(incomplete)]


def complete_arch(incomplete: str) -> list[str]:
    """The `autocompletion` of a checkpoint's architecture."""
    return [name for name in _torchvision_names() if name.startswith(incomplete)]


def _torchvision_names() -> list[str]:
    """Torchvision's classifiers, read off its source."""
    torchvision = find_spec("torchvision")
    if torchvision is None or torchvision.origin is None:
        return []
    files = sorted((Path(torchvision.origin).parent / "models").glob("*.py"))
    return [name for file in files for name in _REGISTERED.findall(file.read_text("utf-8"))]
