"""``fcvgg page``: a static site that runs a network in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fcvgg.cli.completion import complete_model
from fcvgg.cli.console import folder, say, say_next, say_wrote
from fcvgg.cli.options import (
    MODEL_HELP,
    Arch,
    MapHead,
    OutputStride,
    OwnModel,
    Weights,
    head_option,
    load_network,
    output_folder,
)
from fcvgg.cli.page_data import network_data
from fcvgg.errors import FcvggError

if TYPE_CHECKING:
    from fcvgg.network import FullyConvolutional

NAME = "page"
EXAMPLES = (
    "fcvgg page flowers.onnx -o flowers-page",
    "fcvgg page demo -o demo-page",
    "python -m http.server --directory demo-page",
)

_LARGEST = 2 * 1024**3
"""Bytes that a browser holds in one piece."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model, show_default=False
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        file_okay=False,
        help="Folder of the site; created if absent.",
        callback=output_folder(),
        show_default=False,
    ),
]


def run(
    model: Model,
    output: Output,
    weights: Weights = "DEFAULT",
    arch: Arch = None,
    output_stride: OutputStride = None,
    head: MapHead = None,
    own: OwnModel = OwnModel(),
) -> None:
    """Write a static site whose network runs in the browser.

    The network is exported to ONNX and run by onnxruntime-web, which npm fetches. Any web server
    can serve the folder, and images never leave the visitor's machine.
    """
    from fcvgg.viewer.site import RUNTIME, fetched_runtime, write_site

    say(f"fetching {RUNTIME} with npm")
    runtime = fetched_runtime()
    say(f"loading {model}")
    names: dict[str, Any] = {"weights": weights, "arch": arch, **head_option(head)}
    net = load_network(model, own, output_stride=output_stride, **names)
    network = _page_data(net, f"fcvgg: {Path(model).name}")
    folder(output.resolve().parent)

    def export(path: Path) -> None:
        say("exporting to ONNX, then comparing the file with the network")
        say(f"  model.onnx: {net.export(path).check}")

    write_site(output, runtime, network, export, network["title"])
    say_wrote(output)
    for path in sorted(output.iterdir()):
        say(f"  {path.name}: {path.stat().st_size:,} bytes")
    say_next(f"python -m http.server --bind 127.0.0.1 --directory {output}")


def _page_data(net: FullyConvolutional, title: str) -> dict[str, Any]:
    """What the browser computes maps with, or `FcvggError` for a network too large for it."""
    import PIL

    from fcvgg.images.preprocessing import encoded_preprocess

    size = sum(p.numel() * p.element_size() for p in net.parameters())
    if size > _LARGEST:
        raise FcvggError(
            f"the network must have at most {_LARGEST / 2**30:g} GB of weights for a browser, got "
            f"{size / 2**30:.1f} GB; use 'fcvgg serve'"
        )
    return {
        **network_data(net, title),
        "preprocess": encoded_preprocess(net.preprocess),
        "activation": net.activation,
        "names": net.categories,
        "bytes": size,
        "pillow": int(PIL.__version__.partition(".")[0]),  # releases resample differently
    }
