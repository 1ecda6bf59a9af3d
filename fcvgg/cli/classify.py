"""``fcvgg classify``: class probabilities by dense evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from fcvgg.choices import Average
from fcvgg.cli.console import (
    check_any_exists,
    exit_if_any_failed,
    for_each_image,
    images_in,
    say,
    say_json,
    write_csv,
)
from fcvgg.cli.options import (
    AsJson,
    Bands,
    Csv,
    Flip,
    ImageOpener,
    Images,
    NetworkOptions,
    Nodata,
    Recursive,
    Scales,
)
from fcvgg.cli.reports import ReportTable, titled
from fcvgg.errors import ArgumentError, ImageError

if TYPE_CHECKING:
    from torch import Tensor

    from fcvgg.network import FullyConvolutional

NAME = "classify"
EXAMPLES = (
    "fcvgg classify dog.jpg",
    "fcvgg classify *.jpg --scales 256,384,512 --flip",
    "fcvgg classify street.jpg --full-size",
    "fcvgg classify photos --recursive --top 1 --csv classes.csv",
    "curl -s https://example.org/dog.jpg | fcvgg classify - --json",
)


AverageOf = Annotated[
    Average, typer.Option("--average", help="Quantity to average over the cells of a score map.")
]
Top = Annotated[
    int, typer.Option("--top", "-k", metavar="K", min=1, help="Number of classes to print.")
]
FullSize = Annotated[
    bool,
    typer.Option(
        "--full-size",
        help="Keep the image's size and average over all of its windows, for large images.",
    ),
]


def run(
    images: Images,
    network: NetworkOptions = NetworkOptions(),
    top: Top = 5,
    scales: Scales = None,
    full_size: FullSize = False,
    flip: Flip = False,
    average: AverageOf = "scores",
    bands: Bands = None,
    nodata: Nodata = None,
    recursive: Recursive = False,
    csv: Csv = None,
    as_json: AsJson = False,
) -> None:
    """Print the most probable classes of every image.

    An image is rescaled first, so that the network sees it whole, and class probabilities are
    averaged over its score map.
    """
    if scales is not None and full_size:
        raise ArgumentError("--scales and --full-size exclude each other; give one of the two")
    images = list(images_in(images, recursive))
    check_any_exists(images)
    net = network.load()
    resizes = net.preprocess is not None and net.preprocess.resize is not None
    if scales is None and not full_size and not resizes:
        scales = [net.usual_scale]
    opener = ImageOpener(bands, nodata)

    def classify(image: Path) -> dict[str, Any]:
        source = opener.open(image)
        probabilities = net.classify(source, scales=scales, flip=flip, average=average)[0]
        if not probabilities.isfinite().all():
            remedy = "" if full_size else "; --full-size averages over the windows that have data"
            raise ImageError(
                f"{image} has no class: every window of it sees pixels without data{remedy}"
            )
        predictions = _predictions(net, probabilities, top)
        result = {"image": str(image), "scales": scales, "predictions": predictions}
        if as_json:
            say_json(result)
        elif csv is None:
            say(_report(result))
        return result

    results = for_each_image(images, "classifying", classify)
    if csv is not None:
        write_csv(csv, ("image", "rank", *_HEADINGS), _rows(results))
    exit_if_any_failed(images, results)


_HEADINGS = ("index", "category", "probability")


def _rows(results: Iterable[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    """A row for each class of each image."""
    for result in results:
        for rank, found in enumerate(result["predictions"], 1):
            yield result["image"], rank, *(found[name] for name in _HEADINGS)


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


def _report(result: dict[str, Any]) -> RenderableType:
    from fcvgg.categories import class_name

    rows = []
    for prediction in result["predictions"]:
        index, name = prediction["index"], prediction["category"]
        label = class_name(index, None) if name is None else f"{name} ({index})"
        rows.append((Text(f"{prediction['probability']:.4f}", style="green"), label))
    sides = result["scales"]
    scale = "" if sides is None else f", its smaller side at {', '.join(map(str, sides))} pixels"
    return titled(f"{result['image']}{scale}", ReportTable((), rows))
