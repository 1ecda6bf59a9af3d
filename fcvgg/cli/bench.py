"""``fcvgg bench``: a classifier and the networks made from it, timed on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from fcvgg.choices import Clock, Timed
from fcvgg.cli.completion import complete_model
from fcvgg.cli.console import folder, note, say, say_json, say_wrote
from fcvgg.cli.options import MODEL_HELP, Arch, InputSize, lengths, output_folder
from fcvgg.cli.reports import ReportTable, by, titled
from fcvgg.errors import ArgumentError, FcvggError, check_choice
from fcvgg.names import counted
from fcvgg.support.atomic import atomic_file
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

_ASKED_FOR = ("optimized-int8",)
"""Timed only where ``--only`` names them: quantising takes up to a minute."""

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


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=f"{MODEL_HELP} Names get random weights.",
        autocompletion=complete_model,
    ),
]
Sizes = Annotated[
    Any,
    typer.Option(
        "--size",
        "--sizes",
        metavar="N,...",
        parser=lengths,
        help="Sides of the square images, in pixels.",
        show_default="the native size, and 512",
    ),
]
Batches = Annotated[
    Any,
    typer.Option("--batch", "--batches", metavar="N,...", parser=lengths, help="Images per call."),
]
Repeat = Annotated[
    int, typer.Option("--repeat", "--repeats", metavar="N", min=1, help="Turns of each network.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help=f"Network to time; repeat for several: {', '.join(_NAMES)}.",
        show_default=f"all but {', '.join(_ASKED_FOR)}",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Processor threads.", show_default="torch's"),
]
ClockName = Annotated[
    Clock, typer.Option("--clock", help="Time to count; cpu with --threads 1 on a busy machine.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        file_okay=False,
        help="Folder for bench.json; created if absent.",
        callback=output_folder(),
        show_default=False,
    ),
]


def run(
    model: Model = "vgg16",
    sizes: Sizes = None,
    batches: Batches = "1",
    repeat: Repeat = 7,
    only: Only = None,
    threads: Threads = None,
    clock: ClockName = "wall",
    arch: Arch = None,
    input_size: InputSize = None,
    as_json: AsJson = False,
    out: Output = None,
) -> None:
    """Time a classifier and its converted networks on this machine.

    They take turns. The classifier gets images of its native size, the others whole images, so
    windows per second are compared: 2.00x is twice as fast. optimized-int8 quantises every layer,
    even where that harms the scores; fcvgg.optimize in Python leaves such layers in float32.
    """
    names = _checked_names(only)
    import torch

    from fcvgg.loading import load_with_source
    from fcvgg.optimization.timing import time_in_turns

    torch.manual_seed(0)
    options: dict[str, Any] = {"arch": arch, "weights": None, "input_size": input_size}
    source, net = load_with_source(model, **options, verify=False)
    timings: list[Timing] = []
    left_out: dict[str, str] = {}
    if threads is not None:
        torch.set_num_threads(threads)
    machine = f"torch {torch.__version__}, {counted(torch.get_num_threads(), 'thread')}"
    for side in _checked_sides(sizes, net):
        networks = _networks(names, source, net, side, left_out)
        for batch in batches:
            with progress_bar("timing", len(networks) * repeat) as advance:
                found = time_in_turns(networks, net, side, batch, repeat, clock, advance)
            timings += found
            if not as_json:
                images = f"{counted(batch, 'image')} of {side}x{side} per call"
                say(titled(f"{model}, {images}", _table(found)))
                say()
    rows = [asdict(t) | {"windows_per_second": t.windows_per_second} for t in timings]
    data: dict[str, Any] = {"model": model, "machine": machine, "clock": clock}
    data |= {"timings": rows, "left_out": left_out}
    if as_json:
        say_json(data)
    else:
        say(f"milliseconds per call, {clock} time; {machine}")
        say("vs source, vs plain: windows per second, relative to theirs")
    if out is not None:
        with atomic_file(folder(out) / "bench.json") as temporary:
            temporary.write_text(json.dumps(data, indent=1))
        say_wrote(out / "bench.json")


def _checked_names(only: list[str] | None) -> list[Timed]:
    usual = [name for name in _NAMES if name not in _ASKED_FOR]
    names: list[Any] = [_RENAMED.get(name, name) for name in only or usual]
    for name in names:
        check_choice("--only", name, _NAMES)
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
                note(f"left out {name}: {error}")
            left_out[name] = str(error)
    if not networks:
        raise ArgumentError(f"--only must name a network that can run here, got {', '.join(names)}")
    return networks


def _table(timings: list[Timing]) -> ReportTable:
    """Medians, and windows per second relative to those of the classifier and plain network."""
    rates = {timing.network: timing.windows_per_second for timing in timings}
    rows = []
    for timing in timings:
        median, low, high = map(_milliseconds, (timing.seconds, *timing.quartiles))
        ratios = (
            f"{rates[timing.network] / rates[other]:.2f}x" if other in rates else ""
            for other in ("source", "plain")
        )
        place = by(timing.size), f"{timing.windows:,}"
        rows.append((timing.network, *place, median, f"{low} - {high}", *ratios))
    return ReportTable(
        ("network", "images", "windows", "median", "quartiles", "vs source", "vs plain"), rows
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.{2 if seconds < 0.01 else 1 if seconds < 0.1 else 0}f}"
