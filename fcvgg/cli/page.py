"""``fcvgg page``: a static site that runs a network in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    from fcvgg.images.preprocessing import encoded_preprocess
    from fcvgg.viewer.site import write_site

    names: dict[str, Any] = {"weights": weights, "arch": arch, **head_option(head)}
    net = load_network(model, own, output_stride=output_stride, **names)
    network = network_data(net, f"fcvgg: {Path(model).name}")
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    if size > _LARGEST:
        raise FcvggError(
            f"the network must have at most 2 GB of weights for a browser, got {size / 2**30:.1f} "
            "GB; use 'fcvgg serve'"
        )
    network["preprocess"] = encoded_preprocess(net.preprocess)
    network["activation"] = net.activation
    network["names"] = net.categories
    checks = []
    folder(output.resolve().parent)
    write_site(
        output, network, lambda path: checks.append(net.export(path).check), network["title"]
    )
    say_wrote(output)
    say(f"  model.onnx: {checks[0]}")
    for path in sorted(output.iterdir()):
        say(f"  {path.name}: {path.stat().st_size:,} bytes")
    say_next(f"python -m http.server --bind 127.0.0.1 --directory {output}")
