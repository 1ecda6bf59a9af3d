"""Measure a converted network beside what a user could pick instead.

All contenders run in one process, taking turns, so that what else the machine does hits them
alike; medians and quartiles are reported. The peak is measured in the same run. The memory of each
is measured in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fcvgg.benchmarking.contenders import CONTENDERS, PLAIN, Run, made
from fcvgg.conversion import convert
from fcvgg.errors import ArgumentError, FcvggError, one_line
from fcvgg.files import written_whole
from fcvgg.network import FullyConvolutional

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SLOW = 10.0
"""Seconds of one call beyond which it is made once more only."""

_SHORT = 1.0
"""Seconds of one call up to which every turn begins with a call that is not counted: users call one
network again and again, and at the start of a turn another one's weights are in the cache. That
costs a millisecond or two, which longer calls do not notice.
"""

_PAUSE = 0.05
"""Seconds between turns, in which the threads of the contender before stop waiting for work."""

_MOST_CROPS = 100
"""Crops of a batch up to which sliding windows are run: 0.14 s each for a VGG-16."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""``"cpu"`` counts the processor's time; with one thread, neighbours do not disturb it."""


@dataclass(frozen=True)
class Measurement:
    """One contender at one size.

    Attributes:
        seconds: the median of a call.
        quartiles: of the same.
        ratio: to plain fcvgg's median at the same size and batch; below 1 is faster. None
            where plain fcvgg did not run beside it.
        gflops: 10**9 operations of the dense network per second: the same work for everybody.
        share: of the peak measured in the same run. Winograd's algorithm does the work with fewer
            operations, so it may exceed 1.
        memory: bytes that its own process held at most, or None.
        error: largest difference from float64 scores, relative to the largest score, or None.
    """

    contender: str
    size: int
    batch: int
    seconds: float
    quartiles: tuple[float, float]
    calls: int
    ratio: float | None
    gflops: float
    share: float
    memory: int | None = None
    error: float | None = None

    def completed(self, before: Measurement) -> Measurement:
        """The same with the memory and error of an earlier run where this one has none."""
        return replace(
            self,
            memory=before.memory if self.memory is None else self.memory,
            error=before.error if self.error is None else self.error,
        )


@dataclass(frozen=True)
class Benchmark:
    """The measurements of one run, and what was left out and why."""

    model: str
    machine: str
    threads: int
    clock: str
    peak_gflops: float
    rows: tuple[Measurement, ...]
    skipped: dict[str, str]

    @staticmethod
    def read(path: Path) -> Benchmark:
        """What `write` wrote as JSON.

        Raises:
            FcvggError: if the file is none.
        """
        try:
            data = json.loads(path.read_text())
            rows = [{**row, "quartiles": tuple(row["quartiles"])} for row in data["rows"]]
            return Benchmark(**{**data, "rows": tuple(Measurement(**row) for row in rows)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FcvggError(
                f"{path} is no speed.json of fcvgg bench: {one_line(error)}"
            ) from error

    def joined(self, other: Benchmark) -> Benchmark:
        """This run with another one of the same model on the same machine; the other one counts.

        Ratios and shares of the peak stay those of each run, and so does a memory or an error that
        the other run did not measure. What one of them measured is left out no more.

        Raises:
            ArgumentError: if the two were made in different ways.
        """
        for name in ("model", "machine", "threads", "clock"):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                raise ArgumentError(
                    f"the runs differ in {name}: {mine!r} and {others!r}; join runs made alike"
                )
        rows: dict[tuple[int, int, str], Measurement] = {}
        for row in (*self.rows, *other.rows):
            key = row.size, row.batch, row.contender
            rows[key] = row if key not in rows else row.completed(rows[key])
        order = {name: i for i, name in enumerate(CONTENDERS)}
        keys = sorted(rows, key=lambda key: (key[0], key[1], order[key[2]]))
        peak = max(self.peak_gflops, other.peak_gflops)
        ran = {f"{name} at {size}x{size}, batch {batch}" for size, batch, name in rows}
        ran |= {name for _, _, name in rows}
        skipped = {k: v for k, v in {**self.skipped, **other.skipped}.items() if k not in ran}
        return replace(
            other, rows=tuple(rows[key] for key in keys), peak_gflops=peak, skipped=skipped
        )

    def markdown(self) -> str:
        """A table for each size and batch."""
        lines = [
            f"# {self.model}: score maps side by side",
            "",
            f"{self.machine}; {self._threads()}, {self.clock} time, contenders taking turns; "
            f"peak of this run {self.peak_gflops:,.0f} GFLOP/s in float32 (the best of a matrix "
            "product and a convolution).",
            "",
            "Medians; the ratio is to plain fcvgg's time. A turn begins with a call that is not "
            "counted, unless a call takes a second or more; fcvgg is optimised for each size. "
            "Memory is the peak of a process of its "
            "own, the error the largest difference from float64 scores relative to the largest "
            "score. Operations are the dense network's for everybody, so Winograd's algorithm and "
            "bfloat16 may exceed the peak.",
        ]
        for size, batch in dict.fromkeys((row.size, row.batch) for row in self.rows):
            rows = [row for row in self.rows if (row.size, row.batch) == (size, batch)]
            lines += ["", f"## {size}x{size}, batch {batch}", ""]
            lines += _table(_HEADINGS, [_cells(row) for row in rows])
        lines += self._growth()
        if self.skipped:
            lines += ["", "Left out:", ""]
            lines += [f"- {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines) + "\n"

    def _threads(self) -> str:
        return "1 thread" if self.threads == 1 else f"{self.threads} threads"

    def _growth(self) -> list[str]:
        """Seconds per megapixel and per 1000 GFLOP of one image, where there are several sizes."""
        ones = [
            row for row in self.rows if row.batch == 1 and not CONTENDERS[row.contender].by_crops
        ]
        sizes = sorted({row.size for row in ones})
        if len(sizes) < 2:
            return []
        found = {(row.contender, row.size): row for row in ones}
        table = []
        for name in dict.fromkeys(row.contender for row in ones):
            cells = [found.get((name, size)) for size in sizes]
            if sum(row is not None for row in cells) > 1:
                table.append([name, *map(_per_pixel, cells)])
        headings = ["contender", *(f"{size}x{size}" for size in sizes)]
        return ["", "## Seconds per megapixel (per TFLOP), batch 1", "", *_table(headings, table)]

    def plot(self) -> Figure:
        """Seconds per call of every contender, one panel for each size and batch."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter

        cases = list(dict.fromkeys((row.size, row.batch) for row in self.rows))
        across = min(len(cases), 3)
        down = -(-len(cases) // across)
        figure = Figure(figsize=(5.5 * across, 3.6 * down), dpi=110, layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for ax in axes[len(cases) :]:
            ax.set_axis_off()
        for ax, (size, batch) in zip(axes, cases):
            rows = [r for r in self.rows if (r.size, r.batch) == (size, batch)][::-1]
            for place, row in enumerate(rows):
                colour = "tab:blue" if row.contender.startswith(PLAIN) else "tab:gray"
                ax.plot(row.quartiles, (place, place), color="black", lw=1)
                ax.plot(row.seconds, place, "o", color=colour)
                ax.annotate(
                    *(f"{row.seconds:.3g} s", (row.seconds, place)),
                    **{"xytext": (7, 0), "textcoords": "offset points"},
                    **{"va": "center", "fontsize": 8},
                )
            ax.set_yticks(range(len(rows)), [row.contender for row in rows])
            ax.set_ylim(-0.7, len(rows) - 0.3)
            ax.grid(axis="y", alpha=0.3)
            ax.set_xscale("log")
            seconds = [row.seconds for row in rows]
            ax.set_xlim(
                min(seconds) / 1.3, max(seconds) * (max(seconds) / min(seconds)) ** 0.25 * 1.3
            )
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel("seconds per call (median, quartiles)")
            ax.set_title(f"{size}x{size}, batch {batch}")
        return figure

    def write(self, folder: Path) -> list[Path]:
        """Write ``speed.md``, ``speed.json`` and ``speed.png``.

        Raises:
            FcvggError: if they cannot be written.
        """
        paths = [folder / f"speed.{ending}" for ending in ("md", "json", "png")]
        try:
            for path, text in zip(paths, (self.markdown(), json.dumps(asdict(self), indent=1))):
                with written_whole(path) as temporary:
                    temporary.write_text(text)
            with written_whole(paths[2]) as temporary:
                self.plot().savefig(temporary, format="png")
        except OSError as error:
            raise FcvggError(f"cannot write {folder}: {one_line(error)}") from error
        return paths


_HEADINGS = ["contender", "time", "quartiles", "ratio", "GFLOP/s", "of peak", "memory", "error"]


def _cells(row: Measurement) -> list[str]:
    low, high = row.quartiles
    return [
        row.contender,
        f"{row.seconds:.3f} s",
        f"{low:.3f} to {high:.3f}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        f"{row.gflops:,.0f}",
        f"{row.share:.0%}",
        "" if row.memory is None else f"{row.memory / 1e6:,.0f} MB",
        "" if row.error is None else f"{row.error:.0e}",
    ]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that also reads well as text; columns of which nothing is known are left."""
    known = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    lines = [[line[i] for i in known] for line in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    texts = [
        [line[0].ljust(widths[0]), *(text.rjust(n) for text, n in zip(line[1:], widths[1:]))]
        for line in lines
    ]
    return [f"| {' | '.join(line)} |" for line in (texts[0], rule, *texts[1:])]


def _per_pixel(row: Measurement | None) -> str:
    if row is None:
        return ""
    return f"{row.seconds / row.size**2 * 1e6:.2f} ({1000 / row.gflops:.2f})"


def benchmark(
    model: str = "vgg16",
    *,
    sizes: Sequence[int] = (224, 512, 1024),
    batches: Sequence[int] = (1,),
    repeats: int = 7,
    contenders: Sequence[str] | None = None,
    threads: int | None = None,
    clock: str = "wall",
    memory: bool = True,
    report: Callable[[str], None] = lambda line: None,
    keep: Callable[[Benchmark], None] = lambda result: None,
) -> Benchmark:
    """Measure contenders side by side.

    Args:
        model: a torchvision name; its weights are random, which costs the same.
        sizes: sides of the square images.
        batches: images per call.
        repeats: calls of each that are counted.
        contenders: names of `fcvgg.benchmarking.contenders.CONTENDERS`; None takes all.
        threads: of every contender; None keeps torch's setting.
        clock: ``"wall"`` or ``"cpu"``.
        memory: also run each in a process of its own and measure the memory, with batch 1.
        report: is told what is being done.
        keep: is given what was measured so far, after every size and number of images, so that an
            interruption loses little.

    Raises:
        ArgumentError: if a name or number is none of these.
    """
    names = list(CONTENDERS) if contenders is None else list(contenders)
    _check_arguments(model, names, sizes, batches, repeats, clock)
    with _settings(threads):
        torch.manual_seed(0)
        source = torchvision.models.get_model(model, weights=None).eval()
        native = 299 if model == "inception_v3" else 224
        net = convert(source, input_size=native, verify=False)
        general = [name for name in names if not CONTENDERS[name].for_size]
        always, skipped = _made(general, source, native, native, report)
        peak = 0.0
        rows: list[Measurement] = []
        cases: list[tuple[int, int]] = []

        def result() -> Benchmark:
            return Benchmark(
                model=model,
                machine=machine(),
                threads=torch.get_num_threads(),
                clock=clock,
                peak_gflops=peak,
                rows=tuple(_shared(row, peak) for row in rows),
                skipped=skipped | _too_slow(rows, net, cases),
            )

        runs: dict[str, Run] = {}
        usable: dict[str, Run] = {}
        for size in sizes:
            runs, usable = {}, {}  # so that those of the size before are freed
            special = [name for name in names if name not in {*general, *skipped}]
            runs, left_out = _made(special, source, native, size, report)
            runs |= always
            skipped |= left_out
            for batch in batches:
                report(f"{size}x{size}, batch {batch}")
                images = torch.randn(batch, net.in_channels, size, size)
                crops = prod(net.output_size((size, size))) * batch
                usable = {n: runs[n] for n in names if n in runs and _fits(n, size, crops, native)}
                cases.append((size, batch))
                if not usable:
                    continue
                times, best = _times(usable, images, repeats, CLOCKS[clock])
                peak = max(peak, best)
                rows += list(_rows(times, net, usable, images, peak))
                keep(result())
        if not rows:
            reasons = [f"{name}: {why}" for name, why in result().skipped.items()]
            raise ArgumentError(
                f"none of {', '.join(names)} can run at these sizes; "
                f"{'; '.join(reasons) or f'some run at {native}x{native} only'}"
            )
        if memory:
            rows = [_with_memory(row, model, native, report) for row in rows]
        return result()


def operations(net: FullyConvolutional, size: int) -> int:
    """Multiplications and additions of the dense network on one square image."""
    total = 0
    axes = net.geometry.axes
    grids = [axis.sizes(size) for axis in axes]
    for record in net.program.records:
        rows, cols = (grid[record.step] if record.step >= 0 else size for grid in grids)
        total += 2 * record.multiply_adds_per_position * rows * cols
    return total


def machine() -> str:
    """The processor's name and the versions that matter."""
    name = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = found[0].partition(":")[2].strip() if found else name
    versions = [f"torch {torch.__version__}"]
    for package in ("onnxruntime", "openvino", "timm", "monai", "grad-cam", "torchcam"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([name, *versions])


def _check_arguments(
    model: str,
    names: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    clock: str,
) -> None:
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or not names:
        raise ArgumentError(
            f"there is no contender {', '.join(map(repr, unknown)) or 'given'}; expected some of "
            f"{', '.join(map(repr, CONTENDERS))}"
        )
    if model not in torchvision.models.list_models(module=torchvision.models):
        raise ArgumentError(f"there is no model {model!r}; expected a torchvision name")
    if clock not in CLOCKS:
        raise ArgumentError(
            f"clock={clock!r} is unknown; expected {' or '.join(map(repr, CLOCKS))}"
        )
    if repeats < 1 or not sizes or not batches or min([*sizes, *batches]) < 1:
        raise ArgumentError("sizes, batches and repeats must be positive")


@contextmanager
def _settings(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def _made(
    names: Sequence[str],
    source: nn.Module,
    native: int,
    size: int,
    report: Callable[[str], None],
) -> tuple[dict[str, Run], dict[str, str]]:
    """What runs on images of a size, and why the others are left out."""
    runs, skipped = {}, {}
    for name in names:
        report(f"preparing {name}")
        run = made(name, source, native, size)
        if isinstance(run, str):
            skipped[name] = run
            report(f"left out {name}: {run}")
        else:
            runs[name] = run
    return runs, skipped


def _fits(name: str, size: int, crops: int, native: int) -> bool:
    contender = CONTENDERS[name]
    if contender.native_only:
        return size == native
    return not contender.by_crops or crops <= _MOST_CROPS


def _too_slow(
    rows: Sequence[Measurement], net: FullyConvolutional, cases: Sequence[tuple[int, int]]
) -> dict[str, str]:
    """What is said of sliding windows where they were not run, from the time of their crops."""

    def crops(size: int, batch: int) -> int:
        return prod(net.output_size((size, size))) * batch

    reasons = {}
    for name in dict.fromkeys(row.contender for row in rows if CONTENDERS[row.contender].by_crops):
        last = [row for row in rows if row.contender == name][-1]
        per_crop = last.seconds / crops(last.size, last.batch)
        for size, batch in cases:
            number = crops(size, batch)
            if number > _MOST_CROPS:
                reasons[f"{name} at {size}x{size}, batch {batch}"] = (
                    f"{number:,} crops, about {number * per_crop:,.0f} s at the time per crop of "
                    f"{last.size}x{last.size}, batch {last.batch} (not run)"
                )
    return reasons


def _times(
    runs: dict[str, Run], images: Tensor, repeats: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every call of every contender, which take turns, and the peak in GFLOP/s."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    first = {}
    for name, run in runs.items():
        time.sleep(_PAUSE)
        first[name] = _seconds(run, images, clock)
    peak = 0.0
    for i in range(repeats):
        peak = max(peak, measured_peak(clock))
        for name, run in runs.items():
            time.sleep(_PAUSE)
            if first[name] < _SHORT:
                run(images)
            if i == 0 or first[name] < _SLOW:
                times[name].append(_seconds(run, images, clock))
    return times, peak


def _seconds(run: Run, images: Tensor, clock: Callable[[], float]) -> float:
    start = clock()
    run(images)
    return clock() - start


def measured_peak(clock: Callable[[], float] = time.perf_counter) -> float:
    """GFLOP/s in float32 of the better of a large matrix product and a large convolution."""
    a, b = torch.ones(2048, 2048), torch.ones(2048, 2048)
    x = torch.ones(1, 256, 64, 64).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(256, 256, 3, 3)
    cases: list[tuple[Callable[[], Any], float]] = [
        (lambda: a @ b, 2 * 2048**3),
        (lambda: F.conv2d(x, weight, padding=1), 2 * 9 * 256 * 256 * 64 * 64),
    ]
    best = 0.0
    for work, operations in cases:
        work()
        start = clock()
        work()
        best = max(best, operations / (clock() - start) / 1e9)
    return best


def _rows(
    times: dict[str, list[float]],
    net: FullyConvolutional,
    runs: dict[str, Run],
    images: Tensor,
    peak: float,
) -> Iterator[Measurement]:
    size, batch = images.shape[2], len(images)
    work = operations(net, size) * batch / 1e9
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    own = medians.get(PLAIN)
    expected = _exact(net, net._padded(images)) if size * size * batch <= 512 * 512 else None
    for name, seconds in times.items():
        low, high = np.percentile(seconds, [25, 75])
        gflops = work / medians[name]
        yield Measurement(
            contender=name,
            size=size,
            batch=batch,
            seconds=medians[name],
            quartiles=(float(low), float(high)),
            calls=len(seconds),
            ratio=None if own is None else medians[name] / own,
            gflops=gflops,
            share=gflops / peak,
            error=_error(name, runs[name], images, expected),
        )


def _exact(net: FullyConvolutional, images: Tensor) -> Tensor | None:
    """The scores in float64, layer by layer so that only one layer is widened at a time.

    None for a network that is more than layers.
    """
    x: Any = images.double()
    values: dict[Any, Any] = {}
    for node in net.network.graph.nodes:
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "call_module":
            module = net.network.get_submodule(str(node.target))
            values[node] = _widened(module, *(values[a] for a in node.args))
        elif node.op == "output":
            return values[node.args[0]]
        else:  # a graph with functions
            return None
    return None


def _widened(module: nn.Module, *args: Tensor) -> Any:
    state = {name: value.double() for name, value in module.state_dict().items()}
    return torch.func.functional_call(module, state, args)


def _error(name: str, run: Run, images: Tensor, expected: Tensor | None) -> float | None:
    if expected is None or not CONTENDERS[name].comparable:
        return None
    scores = run(images)
    scores = scores[..., None, None] if scores.ndim == 2 else scores
    return ((scores.double() - expected).abs().max() / expected.abs().max()).item()


def _shared(row: Measurement, peak: float) -> Measurement:
    return Measurement(**{**asdict(row), "quartiles": row.quartiles, "share": row.gflops / peak})


# -- memory ---------------------------------------------------------------------------------------


def _with_memory(
    row: Measurement, model: str, native: int, report: Callable[[str], None]
) -> Measurement:
    if row.batch != 1:
        return row
    report(f"memory of {row.contender} at {row.size}")
    memory = peak_memory(row.contender, model, native, row.size)
    return Measurement(**{**asdict(row), "quartiles": row.quartiles, "memory": memory})


def peak_memory(contender: str, model: str, native: int, size: int) -> int | None:
    """Bytes that a new process holds at most while it runs a contender on one image."""
    job = json.dumps([contender, model, native, size, torch.get_num_threads()])
    ran = subprocess.run(
        [sys.executable, "-m", "fcvgg.benchmarking.measurements", job],
        capture_output=True,
        text=True,
    )
    lines = ran.stdout.split()
    return int(lines[-1]) if ran.returncode == 0 and lines else None


def _measure_memory(job: str) -> None:
    """Run in a process of its own; prints the bytes."""
    contender, model, native, size, threads = json.loads(job)
    torch.set_num_threads(threads)
    with torch.no_grad():
        source = torchvision.models.get_model(model, weights=None).eval()
        run = made(contender, source, native, size)
        if not isinstance(run, str):
            del source
            for _ in range(2):
                run(torch.zeros(1, 3, size, size))
    print(peak_bytes())


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage tells on Linux includes the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    _measure_memory(sys.argv[1])
