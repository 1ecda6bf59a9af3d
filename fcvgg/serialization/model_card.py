"""The model card of a bundle: what the Hugging Face hub, and people, read of a saved network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fcvgg.geometry import Geometry, Pair

CARD = "README.md"

UNKNOWN_LICENSE = "unknown"
"""The hub's own identifier of a licence that nobody has stated."""

_MARK = (
    "<!-- Written by fcvgg, which replaces this file; remove this line to keep your changes. -->"
)

_TAGS = ("fcvgg", "pytorch", "image-classification", "fully-convolutional", "heatmap")


def is_own_card(path: Path) -> bool:
    """Whether a file is a card as it was written here, which another may replace."""
    return path.is_file() and _MARK in path.read_text(errors="replace")


def model_card(
    geometry: Geometry, classes: int, settings: Mapping[str, Any], license: str = UNKNOWN_LICENSE
) -> str:
    """The card in Markdown, which ``huggingface_hub.ModelCard.load`` parses.

    Args:
        geometry: of the network.
        classes: number of scores of a cell.
        settings: what the bundle says of the network, as its description holds it.
        license: an identifier of the hub, such as ``"mit"``.
    """
    title = settings["source"] or "A classifier"
    facts = {
        "window": list(geometry.window),
        "stride": list(geometry.stride),
        "categories": classes,
        "activation": settings["activation"],
    }
    header = {
        "library_name": "fcvgg",
        "license": license,
        "pipeline_tag": "image-classification",
        "tags": list(_TAGS),
        "fcvgg": facts,
    }
    # a value in JSON is a value in YAML
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in header.items()), "---"]
    rows = {
        "Window": _size(geometry.window),
        "Stride": _size(geometry.stride),
        "Native size": _size(tuple(settings["input_size"])),
        "Categories": f"{classes}",
        "Scores": settings["activation"],
        "Preprocessing": "included" if settings["preprocess"] else "none",
        "Equivalence with the source": _equivalence(settings["equivalence"]),
    }
    lines += [_MARK, "", f"# {title} as a fully convolutional network", ""]
    lines += ["It takes images of any size and gives a map of class scores.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    lines += ["```python", "import fcvgg", "", 'net = fcvgg.load("PATH or hf:USER/NAME")']
    lines += ['net.heatmap("photo.jpg").save("heatmap.png")', "```", ""]
    return "\n".join(lines)


def _size(pair: Pair) -> str:
    return f"{pair[0]} x {pair[1]} pixels"


def _equivalence(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "not checked"
    return (
        f"largest difference {report['max_abs_error']:.2g} (relative "
        f"{report['max_rel_error']:.2g}, tolerance {report['tolerance']:.2g}) on "
        f"{report['images']} images; same top class in {report['top1_agreement']:.0%}"
    )
