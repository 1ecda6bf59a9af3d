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
Level = Annotated[
    int, typer.Option(metavar="N", min=0, help="Level of a pyramid; 0 is the full resolution.")
]


def run(
    slide: Slide,
    output: Output,
    network: NetworkOptions = NetworkOptions(),
    classes: Classes = None,
    memory: Memory = "1GiB",
    level: Level = 0,
    bands: Bands = None,
    nodata: Nodata = None,
    output_stride: OutputStride = None,
) -> None:
    """Write the score map of an image larger than memory."""
    from fcvgg.streaming.execution import stream
    from fcvgg.streaming.score_store import is_store, open_store

    source = ImageOpener(bands, nodata).open(slide, level)
    net = network.load(output_stride=output_stride)
    kept = _classes(classes, net.categories)
    before = open_store(output).share if is_store(output) else 0.0
    with resumed_by_the_same_call(output):
        store = stream(net, source, out=output, classes=kept, memory=memory, progress=True)
    height, width = source.size
    shape = "x".join(map(str, store.array.shape))
    bare = store.without_data
    say(
        f"{slide}: {height}x{width} pixels gave {shape} {store.description['kind']}"
        + (f", {bare:.1%} of the cells without data" if bare else "")
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
