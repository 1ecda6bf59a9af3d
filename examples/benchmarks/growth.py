"""How time and memory grow with the image: the whole image and streaming, plain and optimised.

    python examples/benchmarks/growth.py --folder results
    python examples/benchmarks/growth.py --folder results --report examples/benchmarks

The network is VGG-16 with random weights and 1000 classes, the images are square noise. Every case
runs in a process of its own: an image of 256 pixels first, then a call whose memory counts, then as
many as fill ten seconds, three at least up to 2048 pixels, whose median counts. Beyond 4096 pixels
no call is timed.
The memory is what the operating system says that a call added at most, its result included; of
streaming the bound is ``--memory``. The work itself grows per pixel, since fc6 has no cell in a
border of three positions; the last column says by how much. Figures are kept in ``--folder``, so
that a long table can be measured in pieces; ``--report`` writes them as ``growth.md``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

import fcvgg
from fcvgg.support.atomic import atomic_file
from machine import machine
from measurements import operations
from streaming import status

WAYS = {
    "plain": "whole image",
    "optimised": "whole image, optimised",
    "stream": "stream",
    "stream-optimised": "stream, optimised",
}
SECONDS = 10
"""That the calls of a case fill."""

MANY = 2048
"""Side up to which three calls are timed at least."""

LARGEST = 4096
"""Side up to which calls are timed."""

Figures = dict[str, Any]


def main() -> None:
    """Measure every way at every size, or report what was measured."""
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(measured(arguments.child, arguments.sizes[0], arguments)))
    elif arguments.report:
        path = arguments.report / "growth.md"
        with atomic_file(path) as temporary:
            temporary.write_text(report(kept(arguments.folder)))
        print(f"wrote {path}")
    else:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for size in arguments.sizes:
            for way in arguments.ways:
                figures = in_a_process(way, size, arguments)
                (arguments.folder / f"{way}-{size}.json").write_text(json.dumps(figures))
                print(way, size, per_megapixel(figures), "s per megapixel", flush=True)


def in_a_process(way: str, size: int, arguments: argparse.Namespace) -> Figures:
    """The figures of one case."""
    command = [sys.executable, __file__, "--child", way, "--sizes", str(size)]
    command += ["--memory", arguments.memory, "--threads", str(arguments.threads)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{way} failed at {size}x{size}")
    figures: Figures = json.loads(result.stdout.splitlines()[-1])
    return figures


@torch.no_grad()
def measured(way: str, size: int, arguments: argparse.Namespace) -> Figures:
    """Run one case in this process."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    net = fcvgg.convert(torchvision.models.vgg16().eval(), input_size=224, verify=False)
    work = operations(net, size)
    call = runner(net, way, size, arguments.memory)
    image = torch.randn(3, size, size)
    call(image[:, :256, :256])  # libraries load, threads start
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    timed(call, image)
    added = status("VmHWM") - before
    seconds: list[float] = []
    least = 3 if size <= MANY else 1
    while size <= LARGEST and (sum(seconds) < SECONDS or len(seconds) < least):
        seconds.append(timed(call, image))
    return {
        "machine": machine(),
        "way": way,
        "size": size,
        "threads": arguments.threads,
        "memory": arguments.memory,
        "seconds": statistics.median(seconds) if seconds else None,
        "calls": len(seconds),
        "added": added,
        "operations": work,
    }


def runner(
    net: fcvgg.FullyConvolutional, way: str, size: int, memory: str
) -> Callable[[Tensor], Any]:
    """What gives the scores of a preprocessed image ``(C, H, W)``."""
    chosen = net
    if way.endswith("optimised"):
        streams = way.startswith("stream")  # strips are of many sizes
        chosen = fcvgg.optimize(net, size=None if streams else size)
    if way.startswith("stream"):
        return lambda image: fcvgg.stream(chosen, image, memory=memory)
    return lambda image: chosen.score_map(image)


def timed(call: Callable[[Tensor], Any], image: Tensor) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call(image)
    return time.perf_counter() - start


# -- the report -----------------------------------------------------------------------------------


def kept(folder: Path) -> list[Figures]:
    """The figures in a folder."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    if not found:
        raise SystemExit(f"there are no figures in {folder}; run growth.py --folder {folder} first")
    return found


def report(cases: list[Figures]) -> str:
    """The tables of time and memory as Markdown."""
    by_case = {(figures["way"], figures["size"]): figures for figures in cases}
    sizes = sorted({size for _, size in by_case})
    ways = [way for way in WAYS if any((way, size) in by_case for size in sizes)]
    first = cases[0]
    shared = ("machine", "threads", "memory")
    if any(figures[name] != first[name] for figures in cases for name in shared):
        raise SystemExit("the figures are of several machines or settings; keep those of one")
    work = {figures["size"]: figures["operations"] / figures["size"] ** 2 for figures in cases}

    def table(text: Callable[[Figures], str], last: dict[int, str]) -> str:
        heads = ["image", *(WAYS[way] for way in ways), *(["the work itself"] if last else [])]
        lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for size in sizes:
            found = [by_case.get((way, size)) for way in ways]
            cells = ["" if figures is None else text(figures) for figures in found]
            cells += [last[size]] if last else []
            lines.append(f"| {' | '.join([f'{size} x {size}', *cells])} |")
        return "\n".join(lines)

    growth = {size: f"{work[size] / work[sizes[0]] - 1:+.0%}" for size in sizes}
    return "\n".join(
        [
            "# VGG-16: time and memory as the image grows",
            "",
            f"{first['machine']}; {first['threads']} threads; "
            f"streams with memory={first['memory']!r}; medians, each case in a process "
            "of its own ([growth.py](growth.py)).",
            "",
            "Seconds per megapixel:",
            "",
            table(per_megapixel, growth),
            "",
            "Memory that a call added at most, MiB:",
            "",
            table(lambda figures: f"{figures['added'] / 2**20:,.0f}", {}),
            "",
        ]
    )


def per_megapixel(figures: Figures) -> str:
    """Seconds per million pixels; empty where no call was timed."""
    if figures["seconds"] is None:
        return ""
    return f"{figures['seconds'] / figures['size'] ** 2 * 1e6:.2f}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time and memory as the image grows.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--memory", default="512MiB", help="for fcvgg.stream (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("results"), help="where figures are kept"
    )
    parser.add_argument("--report", type=Path, help="only write the tables there")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
