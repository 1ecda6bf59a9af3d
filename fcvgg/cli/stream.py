"""``fcvgg stream``: the score map of an image larger than memory, on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fcvgg.categories import class_given
from fcvgg.cli.console import INTERRUPTED, complain, say, say_wrote
from fcvgg.cli.options import (
    Bands,
    ImageOpener,
    NetworkOptions,
    Nodata,
    OutputStride,
    names,
    output_folder,
)
from fcvgg.support.atomic import STORE_ENDINGS

NAME = "stream"
EXAMPLES = (
    "fcvgg stream slide.tif -o scores.zarr",
    "fcvgg stream slide.ome.tif -o tumour.zarr --level 1 --classes argmax --memory 2GiB",
    "fcvgg stream slide.tif -o scores.zarr --where tissue",
    "fcvgg stream slide.svs -o tumour.zarr --mpp 0.5",
    "fcvgg heatmap scores.zarr --target tumour",
)


Slide = Annotated[
    Path,
    typer.Argument(
        metavar="SLIDE", help="TIFF, OME-TIFF, zarr or other image.", show_default=False
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT.zarr",
        help="Folder for the score map; repeating the command resumes an interrupted run.",
        callback=output_folder(*STORE_ENDINGS),
        show_default=False,
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        "--classes",
        "-c",
        metavar="NAME,NAME,...",
        help="Classes to keep, by name or index; 'argmax' keeps the best class of every cell, "
        "'top5' the five best.",
        show_default="all",
    ),
]
Memory = Annotated[
    str, typer.Option(metavar="SIZE", help="Upper limit of the memory used, such as 2GiB.")
]
Where = Annotated[
    str | None,
    typer.Option(
        metavar="tissue|MASK|GEOJSON",
        help="Part of the image to score: 'tissue', a mask (.png, .npy) of any lower resolution, "
        "or polygons (.geojson) in pixels, or in the coordinates of a georeferenced image.",
        show_default="all",
    ),
]
Level = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Level of a pyramid; 0 is the full resolution.",
        show_default="0, or that of the pixel size the model was trained at",
    ),
]
PixelSize = Annotated[
    float | None,
    typer.Option(
        "--mpp",
        metavar="X",
        help="Micrometres per pixel, by which the level of a pyramid is chosen.",
        show_default=False,
    ),
]


def run(
    slide: Slide,
    output: Output,
    network: NetworkOptions = NetworkOptions(),
    classes: Classes = None,
    memory: Memory = "1GiB",
    level: Level = None,
    mpp: PixelSize = None,
    bands: Bands = None,
    nodata: Nodata = None,
    where: Where = None,
    output_stride: OutputStride = None,
) -> None:
    """Write the score map of an image larger than memory."""
    from fcvgg.images.lazy.magnification import at_training_scale, training_level
    from fcvgg.streaming.execution import stream
    from fcvgg.streaming.score_store import is_store, open_store

    source = ImageOpener(bands, nodata).open(slide, level or 0, mpp)
    net = network.load(output_stride=output_stride)
    trained = None if net.preprocess is None else net.preprocess.mpp
    if level is None and mpp is None and training_level(source, trained) is not None:
        source = at_training_scale(source, trained)
    kept = _classes(classes, net.categories)
    before = open_store(output).share if is_store(output) else 0.0
    with resumed_by_the_same_call(output):
        store = stream(
            net, source, out=output, classes=kept, memory=memory, progress=True, where=where
        )
    height, width = source.size
    shape = "x".join(map(str, store.array.shape))
    bare = store.without_data
    say(
        f"{slide}: {height}x{width} pixels gave {shape} {store.description['kind']}"
        + (f", {bare:.1%} of the cells without data" if bare and where is None else "")
        # labels of one class do not tell how many were
        + (f", {1 - bare:.1%} of the cells computed" if bare and where is not None else "")
    )
    if before == 1:
        say(f"{output} was complete already")
        return
    if before:
        say(f"resumed at {before:.0%}")
    say_wrote(output)


@contextmanager
def resumed_by_the_same_call(path: Path) -> Iterator[None]:
    """Streaming to a folder; when interrupted, a line says how far it is and how to resume it."""
    from fcvgg.streaming.score_store import is_store, open_store

    try:
        yield
    except KeyboardInterrupt:
        if not is_store(path):
            raise
        share = open_store(path).share
        complain(f"interrupted; {share:.0%} of {path} is finished and kept, the same call resumes")
        raise typer.Exit(INTERRUPTED) from None


def _classes(text: str | None, categories: Sequence[str] | None) -> str | list[int | str] | None:
    """Names and indices, from ``cat,dog,281``."""
    if text is None or text in ("argmax", "top5"):
        return text
    return [class_given(name, categories) for name in names(text)]
