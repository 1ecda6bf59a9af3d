"""A static site that runs an exported network in the browser."""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fcvgg.errors import FcvggError
from fcvgg.support.atomic import atomic_folder
from fcvgg.viewer.document import document, page_file

RUNTIME = "onnxruntime-web@1.30.0"
"""npm's package that runs ONNX files; it is in no wheel and no repository."""

_RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
"""What the page needs of it: the code and the WebAssembly for processors, without WebGPU."""

_SCRIPTS = ("worker.js", "resampling.js")
FILES = ("index.html", "model.onnx", *_SCRIPTS, *_RUNTIME_FILES)
"""What a site consists of."""

_PATIENCE = 300
"""Seconds that npm may take."""


def write_site(
    folder: Path,
    runtime: Mapping[str, bytes],
    network: Mapping[str, Any],
    export: Callable[[Path], Any],
    title: str,
) -> None:
    """Write a site, whole or not at all; other files in the folder are kept.

    Args:
        folder: where to.
        runtime: what `fetched_runtime` gives.
        network: what the page knows of the network before an image is opened.
        export: writes the network to an ``.onnx`` file.
        title: of the page.

    Raises:
        FcvggError: if the folder cannot be written.
    """
    with atomic_folder(folder, FILES) as new:
        export(new / "model.onnx")
        for name, content in runtime.items():
            (new / name).write_bytes(content)
        for name in _SCRIPTS:
            (new / name).write_text(page_file(name), "utf-8")
        (new / "index.html").write_text(document("page", network, title), "utf-8")


def fetched_runtime() -> dict[str, bytes]:
    """The runtime's files, by name, out of npm's package.

    Raises:
        FcvggError: if there is no npm, or it cannot fetch the package.
    """
    with tempfile.TemporaryDirectory() as place:
        _fetch(place)
        try:
            with tarfile.open(next(Path(place).glob("*.tgz"))) as package:
                parts = {
                    name: package.extractfile(f"package/dist/{name}") for name in _RUNTIME_FILES
                }
                return {name: part.read() for name, part in parts.items() if part is not None}
        except (StopIteration, KeyError, tarfile.TarError) as error:
            raise FcvggError(
                f"{RUNTIME} must hold {' and '.join(_RUNTIME_FILES)}, got a broken package from "
                "npm; run 'npm cache clean --force' and try again"
            ) from error


def _fetch(place: str) -> None:
    command = ["npm", "pack", RUNTIME, "--prefer-offline", "--pack-destination", place]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PATIENCE)
    except FileNotFoundError as error:
        raise FcvggError(
            f"npm must be installed to fetch {RUNTIME}, got none; install Node.js, or use "
            "'fcvgg serve', which needs none"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise FcvggError(
            f"npm must fetch {RUNTIME} within {_PATIENCE} s; check the network"
        ) from error
    except subprocess.CalledProcessError as error:
        reasons = [line for line in error.stderr.splitlines() if " error " in f" {line} "]
        reason = reasons[0].removeprefix("npm").strip() if reasons else "it gave no reason"
        raise FcvggError(
            f"npm must fetch {RUNTIME}, got: {reason}; connect to the network, npm keeps the "
            "package for the next time"
        ) from error
