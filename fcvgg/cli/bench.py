"""``fcvgg bench``: a converted network beside what a user could pick instead."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcvgg.cli.console import folder, say, say_wrote
from fcvgg.cli.options import OutputFolder, lengths

NAME = "bench"
EXAMPLES = (
    "fcvgg bench",
    "fcvgg bench vgg11 --sizes 224,512 --repeats 3",
    "fcvgg bench --only fcvgg --only onnxruntime --clock cpu --threads 1",
)

NAMES = (
    *("fcvgg", "fcvgg optimised", "fcvgg optimised bf16", "onnxruntime", "OpenVINO f32"),
    *("OpenVINO bf16", "usual recipe", "timm", "FC model", "FC sliding window"),
    "MONAI sliding window",
)
"""Of the contenders, here too since theirs needs torch, which no help should wait for."""


def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A torchvision name; weights are random.")
    ] = "vgg16",
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="N,...", help="Sides of the square images.")
    ] = "224,512,1024",
    batches: Annotated[
        str, typer.Option("--batches", metavar="N,...", help="Images per call.")
    ] = "1",
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Timed calls of each contender.")
    ] = 7,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME",
            help=f"A contender to time; repeat for several: {', '.join(NAMES)}.",
            show_default="all",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, help="Processor threads of each contender.", show_default="torch's"
        ),
    ] = None,
    clock: Annotated[
        str,
        typer.Option(
            "--clock",
            metavar="wall|cpu",
            help="The time that is counted; cpu with --threads 1 for a busy machine.",
        ),
    ] = "wall",
    out: OutputFolder = Path(),
) -> None:
    """Time score maps side by side with other ways to compute them."""
    from fcvgg.benchmarking.measurements import benchmark
    from fcvgg.benchmarking.results import Benchmark

    def keep(result: Benchmark) -> None:
        folder(out)
        result.write(out)

    result = benchmark(
        model,
        sizes=lengths(sizes, "--sizes") or [],
        batches=lengths(batches, "--batches") or [],
        repeats=repeats,
        contenders=only,
        threads=threads,
        clock=clock,
        report=say,
        keep=keep,
    )
    say()
    for line in result.markdown().splitlines():
        say(line)
    for path in result.write(out):
        say_wrote(path)
