"""``fcvgg convert``: a converted network as a bundle, or for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fcvgg.cli.completion import complete_model
from fcvgg.cli.console import folder, say, say_wrote
from fcvgg.cli.options import (
    MODEL_HELP,
    Arch,
    MapHead,
    OutputStride,
    OwnModel,
    Weights,
    head_option,
    load_network,
    output_name,
)
from fcvgg.cli.reports import equivalence_report, geometry_report
from fcvgg.errors import FcvggError
from fcvgg.support.atomic import EXPORT_ENDINGS, checked_folder

NAME = "convert"
EXAMPLES = (
    "fcvgg convert vgg16 -o vgg16-fcn",
    "fcvgg convert flowers.pth --arch vgg11 --categories flowers.txt -o flowers-fcn",
    "fcvgg convert flowers-fcn -o flowers.onnx",
    "fcvgg convert flowers-fcn -o flowers.onnx --pixels --probabilities",
    "fcvgg heatmap rose.jpg --model flowers-fcn",
)


def _check_output(out: Path) -> None:
    if out.suffix.lower() not in EXPORT_ENDINGS:
        checked_folder(out, "--output", remedy=", or a name in .onnx or .pt2 to export")


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help=MODEL_HELP, autocompletion=complete_model, show_default=False
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="Where to save: a name in .onnx for ONNX or in .pt2 for torch.export, else a bundle, "
        "the folder that the other commands and fcvgg.load take.",
        show_default=False,
        callback=output_name(_check_output),
    ),
]

Pixels = Annotated[
    bool,
    typer.Option(
        "--pixels",
        help="The exported file takes pixels (N, H, W, C), uint8 in RGB, and preprocesses them.",
    ),
]
Probabilities = Annotated[
    bool,
    typer.Option("--probabilities", help="The exported file gives probabilities, not scores."),
]


def run(
    source: Source,
    out: Output,
    weights: Weights = "DEFAULT",
    arch: Arch = None,
    output_stride: OutputStride = None,
    head: MapHead = None,
    pixels: Pixels = False,
    probabilities: Probabilities = False,
    own: OwnModel = OwnModel(),
) -> None:
    """Convert a classifier, verify the result and save it."""
    exports = out.suffix.lower() in EXPORT_ENDINGS
    if exports and out.exists() and out.resolve() == Path(source).resolve():
        raise FcvggError(f"{out} is the source, which would be lost; choose another --output")
    if not exports and (pixels or probabilities):
        raise FcvggError(
            f"--pixels and --probabilities are for exported files, got the bundle {out}; choose an "
            "--output in .onnx or .pt2"
        )
    names: dict[str, Any] = {"weights": weights, "arch": arch, **head_option(head)}
    net = load_network(source, own, output_stride=output_stride, **names)
    folder(out.parent)
    checked = None
    if exports:
        checked = net.export(out, preprocess=pixels, probabilities=probabilities).check
    else:
        net.save(out)
    say(equivalence_report(net))
    say()
    say(geometry_report(net))
    say()
    say_wrote(out)
    for path in [out] if exports else sorted(out.iterdir()):
        say(f"  {path.name}: {path.stat().st_size:,} bytes")
    if checked is not None:
        say(f"  {checked}")
