"""Time and memory of finer maps: dilation (`output_stride`) against shift-and-stitch.

For a map of stride s, shift-and-stitch runs the native network on (native / s)^2 shifted images and
interleaves the maps; dilation runs the network once, with the strides of its last pools turned into
dilation. Both give the same cells of a network without padding.

Times are medians within one run, with the methods taken in turn, so compare ratios and not runs.
Peak memory is what the operating system counts for a child process that does nothing else, less
what the child holds before its first run (``VmHWM`` where it can be reset, which is on Linux;
elsewhere ``ru_maxrss``, which hides maps that need less than loading the libraries did).

Usage: python examples/benchmarks/output_stride.py [--full] [--strides N ...] [--repeats N]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import vgg16
from torchvision.models.vgg import VGG, cfgs, make_layers

import fcvgg

SIZE = 512
STRIDES = (32, 16, 8, 4)
NARROWING = 8
"""The small net has 1/8 of VGG-16's channels: the same layers and geometry, 1/64 of the work."""


@dataclass(frozen=True)
class Row:
    """One stride: seconds and peak MiB of both methods, and how many network runs they took."""

    stride: int
    cells: tuple[int, int]
    dilation_seconds: float
    stitch_seconds: float
    dilation_mib: float
    stitch_mib: float
    stitch_runs: int


def network(full: bool, stride: int) -> fcvgg.FullyConvolutional:
    """VGG-16 with random weights, or the narrow one, at an output stride."""
    torch.manual_seed(0)
    model = vgg16(weights=None, init_weights=False) if full else _narrow_vgg16()
    return fcvgg.convert(model.eval(), output_stride=stride, verify=False)


def _narrow_vgg16() -> nn.Module:
    widths = [v if isinstance(v, str) else v // NARROWING for v in cfgs["D"]]
    with torch.device("meta"):  # its own head has 120 million weights
        model = VGG(make_layers(widths), init_weights=False)  # type: ignore[arg-type]
    model.features = make_layers(widths)  # type: ignore[arg-type]
    channels, hidden = 512 // NARROWING, 4096 // NARROWING
    model.classifier = nn.Sequential(
        *(nn.Linear(channels * 49, hidden), nn.ReLU(True), nn.Dropout()),
        *(nn.Linear(hidden, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, 1000)),
    )
    return model


def shift_and_stitch(net: fcvgg.FullyConvolutional, image: Tensor, stride: int) -> Tensor:
    """The map ``(1, K, h, w)`` of a finer stride from runs on shifted images, interleaved."""
    phases = net.geometry.stride[0] // stride
    starts = [
        [i * stride for i in range(phases) if n - i * stride >= window]
        for n, window in zip(image.shape[2:], net.geometry.window)
    ]
    rows, cols = (
        sum(axis.output_size(n - start) for start in places)
        for axis, n, places in zip(net.geometry.axes, image.shape[2:], starts)
    )
    stitched = image.new_empty((1, net.num_classes, rows, cols))
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            stitched[:, :, i::phases, j::phases] = net(image[:, :, top:, left:])
    return stitched


def prepared(full: bool, method: str, stride: int) -> Callable[[], Tensor]:
    """The work to measure: one map by dilation or by shift-and-stitch."""
    native = method == "stitch"
    net = network(full, STRIDES[0] if native else stride)
    image = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return lambda: shift_and_stitch(net, image, stride) if native else net(image)


def peak_mib(full: bool, method: str, stride: int, threads: int) -> float:
    """Peak memory that one map adds to a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_measure_memory, args=(sender, full, method, stride, threads), daemon=True
    )
    child.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError:
        raise SystemExit(f"{method} at stride {stride} ran out of memory") from None
    finally:
        child.join()


def _measure_memory(sender: Connection, full: bool, method: str, stride: int, threads: int) -> None:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        work = prepared(full, method, stride)
        before = _reset_peak()
        work()
    sender.send((_peak_bytes() - before) / 2**20)


def _reset_peak() -> int:
    """The bytes held now, from which the peak is counted anew where the system allows it."""
    gc.collect()  # what is free but kept would hide what the map needs
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def rows(full: bool, strides: list[int], repeats: int, threads: int) -> Iterator[Row]:
    """Measure every stride."""
    for stride in strides:
        works = {method: prepared(full, method, stride) for method in ("dilation", "stitch")}
        seconds: dict[str, list[float]] = {method: [] for method in works}
        with torch.inference_mode():
            shape = works["dilation"]().shape  # also warms up
            for _ in range(repeats):
                for method, work in works.items():
                    begin = time.perf_counter()
                    work()
                    seconds[method].append(time.perf_counter() - begin)
        del works
        yield Row(
            stride=stride,
            cells=(shape[2], shape[3]),
            dilation_seconds=statistics.median(seconds["dilation"]),
            stitch_seconds=statistics.median(seconds["stitch"]),
            dilation_mib=peak_mib(full, "dilation", stride, threads),
            stitch_mib=peak_mib(full, "stitch", stride, threads),
            stitch_runs=(STRIDES[0] // stride) ** 2,
        )


def main() -> None:
    """Measure, print a table and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="VGG-16 at its full width (minutes)")
    parser.add_argument("--strides", type=int, nargs="+", default=STRIDES, choices=STRIDES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = "VGG-16" if options.full else f"VGG-16 with 1/{NARROWING} of its channels"
    print(f"{name}, {SIZE}x{SIZE} pixels, {options.threads} CPU threads, torch {torch.__version__}")
    print("stride  cells    dilation           shift-and-stitch           time   runs")
    measured = []
    for row in rows(options.full, options.strides, options.repeats, options.threads):
        measured.append(asdict(row))
        cells = "x".join(map(str, row.cells))
        times = row.dilation_seconds, row.stitch_seconds
        print(
            f"{row.stride:>6}  {cells:<7}  {times[0]:7.2f} s {row.dilation_mib:6.0f} MiB"
            f"  {times[1]:7.2f} s {row.stitch_mib:6.0f} MiB"
            f"  {times[1] / times[0]:6.1f}x  1 : {row.stitch_runs}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2) + "\n")
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
