"""``fcvgg convert``: a converted network as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcvgg.cli.console import folder, say, say_wrote
from fcvgg.cli.options import MODEL_HELP, Arch, OutputStride, Weights, loaded
from fcvgg.cli.reports import equivalence_report, geometry_report

NAME = "convert"
EXAMPLES = (
    "fcvgg convert vgg16 -o vgg16-fcn",
    "fcvgg convert flowers.pth --arch vgg11 -o flowers-fcn",
    "fcvgg heatmap rose.jpg --model flowers-fcn",
)


def run(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help=MODEL_HELP,
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="The folder to write: config.json and model.safetensors.",
            show_default=False,
        ),
    ],
    weights: Weights = "DEFAULT",
    arch: Arch = None,
    output_stride: OutputStride = None,
) -> None:
    """Convert a classifier, check it and save the network."""
    net = loaded(source, weights=weights, arch=arch, output_stride=output_stride)
    folder(out.parent)
    net.save(out)
    say(equivalence_report(net))
    say()
    say(geometry_report(net))
    say()
    say_wrote(out)
    for path in sorted(out.iterdir()):
        say(f"  {path.name}: {path.stat().st_size:,} bytes")
