"""``fcvgg classify``: class probabilities by dense evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table

from fcvgg.choices import Average
from fcvgg.cli.console import check_any_exists, exit_if_any_failed, for_each_image, say, say_json
from fcvgg.cli.options import (
    Arch,
    Bands,
    Device,
    ImageOpener,
    Images,
    Model,
    Nodata,
    OwnModel,
    Weights,
    lengths,
    loaded,
)
from fcvgg.cli.reports import titled
from fcvgg.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from fcvgg.network import FullyConvolutional

NAME = "classify"
EXAMPLES = (
    "fcvgg classify dog.jpg",
    "fcvgg classify *.jpg --scales 256,384,512 --flip",
    "fcvgg classify street.jpg --full-size",
    "fcvgg classify dog.jpg --top 1 --json",
)


def run(
    images: Images,
    model: Model = "vgg16",
    weights: Weights = "DEFAULT",
    arch: Arch = None,
    top: Annotated[
        int, typer.Option("--top", "-k", metavar="K", min=1, help="How many classes to name.")
    ] = 5,
    scales: Annotated[
        str | None,
        typer.Option(
            "--scales",
            "-s",
            metavar="N,N,...",
            help="Smaller sides to which an image is rescaled; their probabilities are averaged.",
            show_default="8/7 of the native size: 256 for 224",
        ),
    ] = None,
    full_size: Annotated[
        bool,
        typer.Option(
            "--full-size",
            help="Keep the image's size, to average over everything the network sees in parts of a "
            "large image.",
        ),
    ] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirrored image.")] = False,
    average: Annotated[
        Average, typer.Option("--average", help="What is averaged over the cells.")
    ] = "scores",
    bands: Bands = None,
    nodata: Nodata = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON array in place of text.")
    ] = False,
    own: OwnModel = OwnModel(),
    device: Device = "cpu",
) -> None:
    """Name every image's most probable classes, averaged over it.

    An image is rescaled first, as classifiers are usually evaluated, so that it is seen whole.
    """
    from fcvgg.errors import ImageError

    sides, opener = lengths(scales, "--scales"), ImageOpener(bands, nodata)
    if sides is not None and full_size:
        raise ArgumentError("--scales and --full-size exclude each other; give one of the two")
    check_any_exists(images)
    net = loaded(model, own, device, weights=weights, arch=arch)
    resizes = net.preprocess is not None and net.preprocess.resize is not None
    if sides is None and not full_size and not resizes:
        sides = [net.usual_scale]

    def classify(image: Path) -> dict[str, Any]:
        source = opener.open(image)
        probabilities = net.classify(source, scales=sides, flip=flip, average=average)[0]
        if not probabilities.isfinite().all():
            remedy = "" if full_size else "; --full-size averages over the windows that have data"
            raise ImageError(
                f"{image} has no class: every window of it sees pixels without data{remedy}"
            )
        predictions = _predictions(net, probabilities, top)
        result = {"image": str(image), "scales": sides, "predictions": predictions}
        if not as_json:
            say(_table(result))
        return result

    results = for_each_image(images, "classifying", classify)
    if as_json:
        say_json(results)
    exit_if_any_failed(images, results)


def _predictions(net: FullyConvolutional, probabilities: Tensor, top: int) -> list[dict[str, Any]]:
    values, indices = probabilities.topk(min(top, len(probabilities)))
    return [
        {
            "index": index,
            "category": None if net.categories is None else net.categories[index],
            "probability": value,
        }
        for index, value in zip(indices.tolist(), values.tolist())
    ]


def _table(result: dict[str, Any]) -> RenderableType:
    from fcvgg.categories import class_name

    table = Table(box=None, show_header=False)
    table.add_column(justify="right", style="green")
    table.add_column()
    for prediction in result["predictions"]:
        index, name = prediction["index"], prediction["category"]
        label = class_name(index, None) if name is None else f"{name} ({index})"
        table.add_row(f"{prediction['probability']:.4f}", label)
    sides = result["scales"]
    scale = "" if sides is None else f", its smaller side at {', '.join(map(str, sides))} pixels"
    return titled(f"{result['image']}{scale}", table)
