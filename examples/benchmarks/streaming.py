"""Time, memory and exactness of streaming, against the ways people cut large images today.

    pip install 'fcvgg[bench]'
    python examples/benchmarks/streaming.py                        # 1024 and 2048 rows
    python examples/benchmarks/streaming.py --rows 1024 2048 4096 8192 --folder results
    python examples/benchmarks/streaming.py --folder results --report examples/benchmarks

The network is VGG-16 with random weights and ten classes, the image noise. Every way runs in a
process of its own:

- ``whole``: the network on the whole image;
- ``stream``: `fcvgg.stream`;
- ``halo``: tiles of 1024 pixels with the halo that makes every kept cell exact: cells that see the
  zeros around their tile are thrown away;
- ``tiles``: tiles of 1024 pixels that overlap by a window, as a sliding window would have it, so
  that cells beside the tiles' borders see zeros where pixels are;
- ``monai``: MONAI's `sliding_window_inference` with tiles of 1024 pixels that overlap by a quarter.

The memory is what the operating system says that the call added at most, its result included. The
difference is the largest from ``whole``, relative to its largest score. Figures are kept in
``--folder``, so that a long table can be measured in pieces (``--ways``, ``--rows``); ``--report``
writes them as ``streaming.md`` and ``streaming.png``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import fcvgg
from fcvgg.geometry import Axis, Pair
from machine import machine

WAYS = {
    "whole": "whole image",
    "stream": "fcvgg.stream",
    "halo": "tiles with halo",
    "tiles": "tiles by window",
    "monai": "MONAI",
}
TILE = 1024
CLASSES = 10
WHOLE_BYTES = 256
"""Bytes per pixel that the whole-image pass of VGG-16 certainly does with."""

SHARE = 0.93
"""Of the threads' time that is the process's own where nothing disturbs it."""

Figures = dict[str, Any]


def main() -> None:
    """Run every way at every height, or report what was measured."""
    arguments = parse_arguments()
    if arguments.child:
        way, folder = arguments.child, arguments.folder
        print(json.dumps(measured(arguments, way, arguments.rows[0], folder)))
        return
    if arguments.report:
        report(kept(arguments.folder), arguments.report)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for rows in arguments.rows:
            for way in arguments.ways:
                if way == "whole" and not fits(rows * arguments.cols):
                    print(f"{rows} rows, whole: left out, the machine has too little memory")
                    continue
                figures = undisturbed(arguments, folder, rows, way)
                (folder / f"{way}-{rows}.json").write_text(json.dumps(figures))
                print(line(figures), flush=True)
        print(f"\n{table(kept(folder))}")


def undisturbed(arguments: argparse.Namespace, folder: Path, rows: int, way: str) -> Figures:
    """One way's figures, measured again while other processes took part of the processor."""
    tries = []
    for _ in range(arguments.tries):
        tries.append(run_child(arguments, folder, rows, way))
        if tries[-1]["cpu"] > SHARE * arguments.threads * tries[-1]["seconds"]:
            break
    return min(tries, key=lambda figures: figures["seconds"])


def run_child(arguments: argparse.Namespace, folder: Path, rows: int, way: str) -> Figures:
    """One way's figures, measured in a process of its own."""
    command = [sys.executable, __file__, "--child", way, "--folder", str(folder)]
    command += ["--rows", str(rows), "--cols", str(arguments.cols)]
    command += ["--memory", arguments.memory, "--threads", str(arguments.threads)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{way} failed at {rows} rows")
    figures: Figures = json.loads(result.stdout.splitlines()[-1])
    whole, own = (folder / f"{name}-{rows}.npy" for name in ("whole", way))
    if whole.exists():
        expected, scores = np.load(whole), np.load(own)
        figures["difference"] = float(np.abs(expected - scores).max() / np.abs(expected).max())
    return figures


def fits(pixels: int) -> bool:
    """Whether the whole-image pass leaves half of the free memory."""
    return WHOLE_BYTES * pixels < status("MemAvailable", "/proc/meminfo") / 2


# -- one measurement ------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace, way: str, rows: int, folder: Path) -> Figures:
    """Run one way in this process; the scores are left in the folder."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = torchvision.models.vgg16(num_classes=CLASSES).eval()
    net = fcvgg.convert(model, input_size=224, verify=False)
    image = torch.randn(3, rows, arguments.cols)
    run(net, way, image[:, :256, :256], arguments.memory)  # libraries load, threads start
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, cpu, start = status("VmRSS"), time.process_time(), time.perf_counter()
    scores = run(net, way, image, arguments.memory)
    figures = {
        "way": way,
        "rows": rows,
        "cols": arguments.cols,
        "memory": arguments.memory,
        "threads": arguments.threads,
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "added": status("VmHWM") - before,
    }
    np.save(folder / f"{way}-{rows}.npy", scores.numpy())
    return figures


@torch.no_grad()
def run(net: fcvgg.FullyConvolutional, way: str, image: Tensor, memory: str) -> Tensor:
    """The scores ``(K, h, w)`` of a preprocessed image by one of `WAYS`."""
    if way == "whole":
        return net.score_map(image).scores
    if way == "stream":
        return fcvgg.stream(net, image, memory=memory).scores
    if way == "monai":
        return with_monai(net, image)
    return tiled(net, image, halo=way == "halo")


def tiled(net: fcvgg.FullyConvolutional, image: Tensor, halo: bool) -> Tensor:
    """The scores tile by tile."""
    h, w = net.output_size(image.shape[1:])
    scores = torch.empty(CLASSES, h, w)
    across = list(tiles(net.geometry.width, image.shape[2], w, halo))
    for top, bottom, pixels_y, first_y in tiles(net.geometry.height, image.shape[1], h, halo):
        for left, right, pixels_x, first_x in across:
            cells = net(image[None, :, slice(*pixels_y), slice(*pixels_x)])[0]
            cells = cells[:, top - first_y : bottom - first_y, left - first_x : right - first_x]
            scores[:, top:bottom, left:right] = cells
    return scores


def tiles(axis: Axis, size: int, cells: int, halo: bool) -> Iterator[tuple[int, int, Pair, int]]:
    """Half-open ranges of cells along an axis, the pixels of their tile, and its first cell."""
    around = -(-max(-axis.offset, 0) // axis.stride) if halo else 0  # cells that see the tile's end
    step = (TILE - axis.window) // axis.stride + 1 - 2 * around
    for first in range(0, cells, step):
        end = min(first + step, cells)
        begin = max(first - around, 0)
        last = (end + around - 1) * axis.stride + axis.window
        yield first, end, (begin * axis.stride, min(last, size)), begin


def with_monai(net: fcvgg.FullyConvolutional, image: Tensor) -> Tensor:
    """MONAI's tiles, blended where they overlap; they need a map as large as its input."""
    from monai.inferers.utils import sliding_window_inference

    def predictor(tile: Tensor) -> Tensor:
        cells: Tensor = net(tile)
        return nn.functional.interpolate(cells, tile.shape[2:])

    tile = [min(TILE, n) for n in image.shape[1:]]
    pixels: Any = sliding_window_inference(image[None], tile, 1, predictor, overlap=0.25)
    return nn.functional.interpolate(pixels, net.output_size(image.shape[1:]))[0]


def status(key: str, file: str = "/proc/self/status") -> int:
    """A figure of memory in bytes, as Linux counts it."""
    lines = Path(file).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


# -- the report -----------------------------------------------------------------------------------


def kept(folder: Path) -> list[Figures]:
    """The figures in a folder, by height and way."""
    figures = [json.loads(path.read_text()) for path in folder.glob("*-*.json")]
    return sorted(figures, key=lambda f: (f["rows"], list(WAYS).index(f["way"])))


def line(figures: Figures) -> str:
    """One row of the table."""
    megapixels = figures["rows"] * figures["cols"] / 1e6
    difference = figures.get("difference")
    shown = "" if difference is None else "0" if difference == 0 else f"{difference:.0e}"
    return (
        f"| {figures['rows']} | {WAYS[figures['way']]} | {figures['seconds']:.1f} s "
        f"| {figures['cpu'] / megapixels:.2f} s "
        f"| {figures['added'] / 2**20:,.0f} MiB | {shown} |"
    )


def table(rows: list[Figures]) -> str:
    """The figures as Markdown."""
    heads = ("rows", "way", "time", "processor's per megapixel", "memory added", "difference")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *map(line, rows)])


def report(rows: list[Figures], folder: Path) -> None:
    """Write ``streaming.md`` and ``streaming.png``."""
    first = rows[0]
    title = f"VGG-16 at {first['cols']} columns: streaming, and other ways"
    about = f"{machine()}; {first['threads']} thread(s); streamed with memory={first['memory']!r}."
    shares = [f["cpu"] / f["seconds"] / f["threads"] for f in rows]
    if min(shares) < SHARE:
        about += (
            " The machine was shared: for some ways other processes took part of the processor, so "
            "the time of the processor is what compares, within a tenth."
        )
    path = folder / "streaming.md"
    path.write_text(f"# {title}\n\n{about}\n\n{table(rows)}\n\n![](streaming.png)\n")
    print(f"wrote {path}\nwrote {plotted(rows, title, folder / 'streaming.png')}")


def plotted(rows: list[Figures], title: str, path: Path) -> Path:
    """Memory and time per megapixel against the height."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for way, name in WAYS.items():
        own = [f for f in rows if f["way"] == way]
        if not own:
            continue
        heights = [f["rows"] for f in own]
        style = {"marker": "o", "linewidth": 2.5 if way == "stream" else 1.5, "label": name}
        left.plot(heights, [f["added"] / 2**20 for f in own], **style)
        right.plot(heights, [f["cpu"] / f["rows"] / f["cols"] * 1e6 for f in own], **style)
    for axes, what in ((left, "memory added (MiB)"), (right, "processor seconds per megapixel")):
        axes.set_xscale("log", base=2)
        heights = sorted({f["rows"] for f in rows})
        axes.set_xticks(heights, list(map(str, heights)))
        axes.set(xlabel="rows of the image", ylabel=what)
        axes.grid(alpha=0.3)
    left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    right.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    return path


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Streaming against other ways.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--cols", type=int, default=2048, help="(%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--memory", default="1GiB", help="for fcvgg.stream (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--tries", type=int, default=3, help="on a busy machine (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where figures and scores are kept")
    parser.add_argument("--report", type=Path, help="only write the table and plot there")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
