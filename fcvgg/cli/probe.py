"""``fcvgg probe``: which layer's features suit a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.table import Table

from fcvgg.choices import Classifier, Pooling
from fcvgg.cli.console import say, say_wrote, tell_skipped
from fcvgg.cli.options import (
    Arch,
    Device,
    Model,
    OwnModel,
    Weights,
    loaded,
    output_file,
    output_name,
)
from fcvgg.cli.options import size as size_of
from fcvgg.cli.reports import titled
from fcvgg.errors import FcvggError
from fcvgg.names import counted
from fcvgg.support.atomic import FIGURE_ENDINGS, checked_folder

if TYPE_CHECKING:
    from fcvgg.transfer import Probe

NAME = "probe"
EXAMPLES = (
    "fcvgg probe photos",
    "fcvgg probe photos --size 224 --classifier svm --folds 10",
    "fcvgg probe faces --model demo --size 32x32 --output faces.png",
)


def run(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder with one folder of images per class, or with a part train that holds "
            "such folders.",
            show_default=False,
        ),
    ],
    model: Model = "vgg16",
    weights: Weights = "DEFAULT",
    arch: Arch = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="NAME,NAME,...",
            help="The layers to compare.",
            show_default="all pool layers",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="N|HxW",
            help="Rescale every image: its smaller side, or its size.",
            show_default="the image's size",
        ),
    ] = None,
    pooling: Annotated[
        Pooling, typer.Option("--pooling", help="What a map's positions are reduced to.")
    ] = "avg",
    classifier: Annotated[
        Classifier,
        typer.Option("--classifier", help="The classifier: logistic regression or a linear SVM."),
    ] = "logistic",
    folds: Annotated[
        int,
        typer.Option(
            "--folds", metavar="N", min=2, help="Number of folds of the cross-validation."
        ),
    ] = 5,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="DIR",
            help="A folder that keeps features for the next run.",
            file_okay=False,
            callback=output_name(lambda path: checked_folder(path, "--cache")),
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The figure to write.",
            callback=output_file(*FIGURE_ENDINGS),
        ),
    ] = Path("probe.png"),
    own: OwnModel = OwnModel(),
    device: Device = "cpu",
) -> None:
    """Find the depth whose features suit images best.

    A linear classifier is fitted on each layer's features.
    """
    from fcvgg.results.figures import save_figure
    from fcvgg.transfer import class_folders, probe

    wanted = size_of(size, "--size")
    found = class_folders(data)
    tell_skipped(found.skipped, len(found.paths))
    net = loaded(model, own, device, weights=weights, arch=arch)
    try:
        result = probe(
            net,
            found.paths,
            [found.classes[label] for label in found.labels],
            layers=layers.split(",") if layers else None,
            classifier=classifier,
            folds=folds,
            pooling=pooling,
            size=wanted if size and "x" in size.lower() else wanted and wanted[0],
            cache=cache,
            progress=True,
        )
    except FcvggError as error:
        raise type(error)(str(error).replace("pass size=", "pass --size")) from error
    counts = ", ".join(f"{name}: {counted(count, 'image')}" for name, count in found.counts.items())
    say(counts if found.folder == data else f"{found.folder}: {counts}")
    say(_table(result, folds))
    best = result.best
    say(f"best: {best.layer}, {best.mean:.1%} of held-out images right")
    axes = result.plot()
    say_wrote(save_figure(axes.get_figure(root=True), output))  # type: ignore[arg-type]


def _table(result: Probe, folds: int) -> RenderableType:
    table = Table(box=None, header_style="cyan")
    table.add_column("layer")
    for heading in ("features", "accuracy", "spread"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        mark = "green" if row is result.best else ""
        table.add_row(row.layer, f"{row.features}", f"{row.mean:.3f}", f"{row.std:.3f}", style=mark)
    table.add_row("chance", "", f"{result.chance:.3f}", "", style="dim")
    return titled(f"A linear classifier on each layer's features, {folds} folds", table)
