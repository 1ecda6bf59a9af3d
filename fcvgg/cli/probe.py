"""``fcvgg probe``: which layer's features suit a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from fcvgg.choices import Classifier, Pooling
from fcvgg.cli.console import note_skipped, say, say_wrote
from fcvgg.cli.options import (
    NetworkOptions,
    names,
    output_file,
    output_name,
    side_or_size,
)
from fcvgg.cli.reports import ReportTable, titled
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


Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="Folder with one folder of images per class, or with a part train that holds such "
        "folders.",
        show_default=False,
    ),
]
Layers = Annotated[
    Any,
    typer.Option(
        metavar="NAME,NAME,...",
        parser=names,
        help="Layers to compare.",
        show_default="all pool layers",
    ),
]
Size = Annotated[
    Any,
    typer.Option(
        metavar="N|HxW",
        parser=side_or_size,
        help="Size to rescale every image to: N pixels for its smaller side, or HxW.",
        show_default="the image's size",
    ),
]
PoolingOf = Annotated[
    Pooling, typer.Option("--pooling", help="Pooling of a feature map over its positions.")
]
ClassifierKind = Annotated[
    Classifier,
    typer.Option("--classifier", help="Classifier to fit: logistic regression or a linear SVM."),
]
Folds = Annotated[
    int, typer.Option(metavar="N", min=2, help="Number of folds of the cross-validation.")
]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder that keeps computed features for later runs.",
        file_okay=False,
        callback=output_name(lambda path: checked_folder(path, "--cache")),
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Figure to write.",
        callback=output_file(*FIGURE_ENDINGS),
    ),
]


def run(
    data: Data,
    network: NetworkOptions = NetworkOptions(),
    layers: Layers = None,
    size: Size = None,
    pooling: PoolingOf = "avg",
    classifier: ClassifierKind = "logistic",
    folds: Folds = 5,
    cache: Cache = None,
    output: Output = Path("probe.png"),
) -> None:
    """Find the layer whose features suit your images best.

    A linear classifier is fitted to the features of each layer and judged by cross-validation.
    """
    from fcvgg.results.figures import save_figure
    from fcvgg.transfer import class_folders, probe

    found = class_folders(data)
    note_skipped(found.skipped, len(found.paths))
    net = network.load()
    result = probe(
        net,
        found.paths,
        [found.classes[label] for label in found.labels],
        layers=layers,
        classifier=classifier,
        folds=folds,
        pooling=pooling,
        size=size,
        cache=cache,
        progress=True,
    )
    counts = ", ".join(f"{name}: {counted(count, 'image')}" for name, count in found.counts.items())
    say(counts if found.folder == data else f"{found.folder}: {counts}")
    say(_report(result, folds))
    say(f"best: {result.best.layer}, {result.best.mean:.1%} of held-out images right")
    axes = result.plot()
    say_wrote(save_figure(axes.figure.figure, output))


def _report(result: Probe, folds: int) -> RenderableType:
    shown = ReportTable(result.headings, result.cells(), marked=result.rows.index(result.best))
    return titled(f"A linear classifier on each layer's features, {folds} folds", shown)
