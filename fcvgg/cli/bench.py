"""``fcvgg bench``: a classifier and the networks made from it, timed on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.table import Table

from fcvgg.choices import Clock, Timed
from fcvgg.cli.console import folder, say, say_json, say_wrote, tell
from fcvgg.cli.options import MODEL_HELP, Arch, InputSize, lengths, output_folder
from fcvgg.cli.options import size as size_of
from fcvgg.cli.reports import by, titled
from fcvgg.errors import ArgumentError, FcvggError
from fcvgg.names import counted
from fcvgg.support.atomic import written_whole
from fcvgg.support.progress import progress_bar

if TYPE_CHECKING:
    from torch import nn

    from fcvgg.network import FullyConvolutional
    from fcvgg.optimization.timing import Timing

NAME = "bench"
EXAMPLES = (
    "fcvgg bench",
    "fcvgg bench vgg11 --size 224,512 --repeat 3",
    "fcvgg bench mine.onnx --only plain --only optimized --clock cpu --threads 1",
)

_NAMES: tuple[Timed, ...] = get_args(Timed)

_RENAMED: dict[str, Timed] = {
    "fcvgg": "plain",
    "fcvgg optimised": "optimized",
    "fcvgg optimised bf16": "optimized-bf16",
    "OpenVINO f32": "openvino",
    "OpenVINO bf16": "openvino-bf16",
    "FC model": "source",
}
"""Names of earlier versions."""

_USUAL = 512
"""Side of the images that are timed by default, besides the native size."""


def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Names get random weights.")
    ] = "vgg16",
    sizes: Annotated[
        str | None,
        typer.Option(
            "--size",
            "--sizes",
            metavar="N,...",
            help="Sides of the square images.",
            show_default="the native size, and 512",
        ),
    ] = None,
    batches: Annotated[
        str, typer.Option("--batch", "--batches", metavar="N,...", help="Images per call.")
    ] = "1",
    repeat: Annotated[
        int,
        typer.Option("--repeat", "--repeats", metavar="N", min=1, help="Turns of each network."),
    ] = 7,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME",
            help=f"A network to time; repeat for several: {', '.join(_NAMES)}.",
            show_default="all",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", metavar="N", min=1, help="Processor threads.", show_default="torch's"
        ),
    ] = None,
    clock: Annotated[
        Clock,
        typer.Option(
            "--clock", help="The time that is counted; cpu with --threads 1 for a busy machine."
        ),
    ] = "wall",
    arch: Arch = None,
    input_size: InputSize = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object in place of tables.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            file_okay=False,
            help="A folder to write bench.json to; made if absent.",
            callback=output_folder(),
            show_default=False,
        ),
    ] = None,
) -> None:
    """Time a classifier, the converted network and its faster forms on this machine.

    They take turns. The classifier gets images of its native size, the others whole images, so
    windows per second are compared: 2.0x is twice as fast.
    """
    names, sides = _checked_names(only), lengths(sizes, "--size")
    counts, native = lengths(batches, "--batch") or [], size_of(input_size, "--input-size")
    import torch

    from fcvgg.loading import load_with_source
    from fcvgg.optimization.timing import time_in_turns

    torch.manual_seed(0)
    source, net = load_with_source(model, arch=arch, weights=None, input_size=native, verify=False)
    timings: list[Timing] = []
    left_out: dict[str, str] = {}
    if threads is not None:
        torch.set_num_threads(threads)
    machine = f"torch {torch.__version__}, {counted(torch.get_num_threads(), 'thread')}"
    for side in _checked_sides(sides, net):
        networks = _networks(names, source, net, side, left_out)
        for batch in counts:
            with progress_bar("timing", len(networks) * repeat) as advance:
                found = time_in_turns(networks, net, side, batch, repeat, clock, advance)
            timings += found
            if not as_json:
                say(titled(f"{model}, {counted(batch, 'image')} per call", _table(found)))
                say()
    rows = [asdict(t) | {"windows_per_second": t.windows_per_second} for t in timings]
    data: dict[str, Any] = {"model": model, "machine": machine, "clock": clock}
    data |= {"timings": rows, "left_out": left_out}
    if as_json:
        say_json(data)
    else:
        say(f"{machine}, {clock} time; vs: by windows per second")
    if out is not None:
        with written_whole(folder(out) / "bench.json") as temporary:
            temporary.write_text(json.dumps(data, indent=1))
        say_wrote(out / "bench.json")


def _checked_names(only: list[str] | None) -> list[Timed]:
    names: list[Any] = [_RENAMED.get(name, name) for name in only or _NAMES]
    for name in names:
        if name not in _NAMES:
            raise ArgumentError(
                f"--only must be one of {', '.join(_NAMES)}, got {name!r}; "
                "examples/benchmarks/speed.py times other packages"
            )
    return list(dict.fromkeys(names))


def _checked_sides(sides: list[int] | None, net: FullyConvolutional) -> list[int]:
    native, least = max(net.input_size), max(net.geometry.window)
    sides = sides or [native, max(native, _USUAL)]
    if min(sides) < least:
        raise ArgumentError(
            f"--size must be at least the network's window of {least}, got {min(sides)}"
        )
    return list(dict.fromkeys(sides))


def _networks(
    names: list[Timed],
    source: nn.Module | None,
    net: FullyConvolutional,
    side: int,
    left_out: dict[str, str],
) -> dict[Timed, nn.Module]:
    """The networks that this machine and model have; the reasons of others go to `left_out`."""
    from fcvgg.optimization.timing import network_for

    networks: dict[Timed, nn.Module] = {}
    for name in names:
        try:
            networks[name] = network_for(name, source, net, side)
        except FcvggError as error:
            if name not in left_out:
                tell(f"left out {name}: {error}")
            left_out[name] = str(error)
    if not networks:
        raise ArgumentError(f"--only must name a network that can run here, got {', '.join(names)}")
    return networks


def _table(timings: list[Timing]) -> Table:
    """Medians, and windows per second relative to those of the classifier and plain network."""
    table = Table(box=None, header_style="cyan")
    table.add_column("network", no_wrap=True)
    for heading in ("images", "windows", "median ms", "quartiles", "vs source", "vs plain"):
        table.add_column(heading, justify="right", no_wrap=True)
    rates = {timing.network: timing.windows_per_second for timing in timings}
    for timing in timings:
        median, low, high = map(_milliseconds, (timing.seconds, *timing.quartiles))
        ratios = (
            f"{rates[timing.network] / rates[other]:.2f}x" if other in rates else ""
            for other in ("source", "plain")
        )
        place = by(timing.size), f"{timing.windows:,}"
        table.add_row(timing.network, *place, median, f"{low} - {high}", *ratios)
    return table


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.{2 if seconds < 0.01 else 1 if seconds < 1 else 0}f}"
