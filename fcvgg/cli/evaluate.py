"""``fcvgg evaluate``: accuracy on labelled images by the VGG paper's protocols."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fcvgg.cli.classify import AverageOf
from fcvgg.cli.console import note_skipped, say, say_wrote
from fcvgg.cli.options import (
    Flip,
    NetworkOptions,
    Nodata,
    Scales,
    names,
    output_file,
)
from fcvgg.cli.reports import ReportTable
from fcvgg.errors import FcvggError
from fcvgg.names import readable
from fcvgg.support.atomic import JSON_ENDINGS

NAME = "evaluate"
EXAMPLES = (
    "fcvgg evaluate flowers/test --model flowers-fcn",
    "fcvgg evaluate imagenet/val --scales 256,384,512 --flip --protocols dense",
    "fcvgg evaluate flowers/test --model flowers-fcn --protocols all",
)

Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="Folder with one folder of images per class, named like the model's categories, or "
        "with parts that hold such folders: test, or else val, is used.",
        show_default=False,
    ),
]
Protocols = Annotated[
    Any,
    typer.Option(
        "--protocols",
        "-p",
        metavar="NAME,NAME,...",
        parser=names,
        help="Evaluation protocols: center-crop, resize, ten-crop, dense, multi-crop, "
        "dense+multi-crop, or all.",
    ),
]
Classes = Annotated[
    bool, typer.Option("--classes", help="Print a row per class for every protocol.")
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        dir_okay=False,
        help="JSON file to write, with confusion matrices and every class.",
        callback=output_file(*JSON_ENDINGS),
    ),
]


def run(
    data: Data,
    network: NetworkOptions = NetworkOptions(),
    protocols: Protocols = "center-crop,resize,dense",
    scales: Scales = None,
    flip: Flip = False,
    average: AverageOf = "scores",
    nodata: Nodata = None,
    classes: Classes = False,
    output: Output = Path("evaluation.json"),
) -> None:
    """Measure accuracy on labelled images.

    The protocols are those of the VGG paper: dense evaluation, crops, and both combined.
    """
    from fcvgg.evaluation.protocols import evaluate

    if not output.parent.is_dir():  # before the long work, not after it
        raise FcvggError(f"cannot write {output}: there is no folder {output.parent}")
    net = network.load()
    evaluation = evaluate(
        net,
        data,
        protocols=protocols,
        scales=scales,
        flip=flip,
        average=average,
        nodata=nodata,
        progress=True,
    )
    note_skipped(evaluation.skipped, evaluation.images)
    named = network.model
    if network.weights != "DEFAULT":
        named += f" with {network.weights}"
    say(Text(readable(f"{named} on {data}"), style="bold"))
    say(ReportTable(evaluation.headings, evaluation.cells(), left=4))
    for line in evaluation.about():  # stderr has what was left out
        say(line)
    if classes:
        for result in evaluation:
            say()
            say(Text(result.protocol, style="bold"))
            say(ReportTable(evaluation.class_headings, evaluation.class_cells(result.protocol)))
    evaluation.to_json(output)
    say_wrote(output)
