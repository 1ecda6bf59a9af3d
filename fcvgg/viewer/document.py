"""The page as one HTML document, with the data that it starts with."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

Host = Literal["file", "serve", "page"]
"""What computes the maps of the page: nothing, as the file holds one; the server; the browser."""

_CONNECTIONS = {
    "file": "",
    "serve": "connect-src 'self';",
    "page": "connect-src 'self'; worker-src 'self';",
}
"""What the browser may load: nothing from any other host, whatever the data holds."""


def document(host: Host, data: Mapping[str, Any], title: str) -> str:
    """The page as one HTML document that loads nothing but what its host computes.

    Args:
        host: what computes the maps.
        data: what the page starts with: a score map, or the description of a network.
        title: of the page.
    """
    script = page_file("viewer.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; {_CONNECTIONS[host]}"
    )
    # "<" could end the script element in which the data stands
    encoded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "host": host,
        "policy": policy,
        "title": html.escape(title),
        "style": page_file("viewer.css"),
        "data": encoded,
        "script": script,
    }
    text = page_file("index.html")
    for name, part in parts.items():
        before, after = text.split(f"{{{{{name}}}}}")
        text = before + part + after
    return text


def page_file(name: str) -> str:
    """The text of one of the page's files."""
    return (resources.files(__name__.rpartition(".")[0]) / "page" / name).read_text("utf-8")
