"""The guide of sources lists the layers and operators that are read, as the tables hold them."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path

from fcvgg.sources.keras_layers import LAYERS
from fcvgg.sources.onnx_operators import OPERATORS

GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "sources.md"
LINES = re.compile(r"(<!-- The lines below are written [^\n]*-->\n).*?(?=\n## )", re.DOTALL)


def table() -> str:
    named = {"Keras layers": LAYERS, "ONNX operators": OPERATORS}
    return "".join(
        "\n" + textwrap.fill(f"- {what}: {', '.join(sorted(known))}.", 116, subsequent_indent="  ")
        for what, known in named.items()
    )


def test_the_guide_lists_what_is_read() -> None:
    text = GUIDE.read_text()
    written = LINES.sub(lambda found: f"{found[1]}{table()}\n", text)
    if os.environ.get("FCVGG_WRITE_TABLES"):
        GUIDE.write_text(written)
    assert GUIDE.read_text() == written, "run this test with FCVGG_WRITE_TABLES=1"
