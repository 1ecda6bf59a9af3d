"""``fcvgg evaluate``: accuracy on labelled images by the VGG paper's protocols."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fcvgg.choices import Average
from fcvgg.cli.console import say, say_wrote, tell_skipped
from fcvgg.cli.options import (
    Arch,
    Device,
    Model,
    OwnModel,
    Weights,
    lengths,
    loaded,
    output_file,
)
from fcvgg.names import readable
from fcvgg.support.atomic import JSON_ENDINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "evaluate"
EXAMPLES = (
    "fcvgg evaluate flowers/test --model flowers-fcn",
    "fcvgg evaluate imagenet/val --scales 256,384,512 --flip --protocols dense",
    "fcvgg evaluate flowers/test --model flowers-fcn --protocols all",
)


def run(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder with one folder of images per class, named like the model's categories, "
            "or with parts that hold such folders: test, or else val, is taken.",
            show_default=False,
        ),
    ],
    model: Model = "vgg16",
    weights: Weights = "DEFAULT",
    arch: Arch = None,
    protocols: Annotated[
        str,
        typer.Option(
            "--protocols",
            "-p",
            metavar="NAME,NAME,...",
            help="How images are shown to the network: center-crop, resize, ten-crop, dense, "
            "multi-crop, dense+multi-crop, or all.",
        ),
    ] = "center-crop,resize,dense",
    scales: Annotated[
        str | None,
        typer.Option(
            "--scales",
            "-s",
            metavar="N,N,...",
            help="Smaller sides to which an image is rescaled; their probabilities are averaged.",
            show_default="8/7 of the native size",
        ),
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirrored image.")] = False,
    average: Annotated[
        Average, typer.Option("--average", help="What is averaged over the cells.")
    ] = "scores",
    classes: Annotated[
        bool, typer.Option("--classes", help="Print a row per class for every protocol.")
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            dir_okay=False,
            help="The JSON file to write, with confusion matrices and every class.",
            callback=output_file(*JSON_ENDINGS),
        ),
    ] = Path("evaluation.json"),
    own: OwnModel = OwnModel(),
    device: Device = "cpu",
) -> None:
    """Measure accuracy on labelled images.

    By dense evaluation, by crops, and by both combined.
    """
    from fcvgg.errors import FcvggError
    from fcvgg.evaluation.protocols import evaluate

    sides = lengths(scales, "--scales")
    if not output.parent.is_dir():  # before the long work, not after it
        raise FcvggError(f"cannot write {output}: there is no folder {output.parent}")
    net = loaded(model, own, device, weights=weights, arch=arch)
    evaluation = evaluate(
        net,
        data,
        protocols=[name.strip() for name in protocols.split(",") if name.strip()],
        scales=sides,
        flip=flip,
        average=average,
        progress=True,
    )
    tell_skipped(evaluation.skipped, evaluation.images)
    named = model if weights == "DEFAULT" else f"{model} with {weights}"
    say(Text(readable(f"{named} on {data}"), style="bold"))
    say(_table(evaluation.headings, evaluation.cells(), 4))
    for line in evaluation.about():  # stderr has what was left out
        say(line)
    if classes:
        for result in evaluation:
            say()
            headings = ("class", "images", "precision", "recall", "F1")
            say(Text(result.protocol, style="bold"))
            say(_table(headings, evaluation.class_cells(result.protocol), 1))
    evaluation.to_json(output)
    say_wrote(output)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Table:
    """A table whose first `left` columns are flush left."""
    table = Table(box=None, header_style="cyan")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    return table
