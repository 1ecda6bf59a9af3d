"""What a benchmark measured, as a table, as data and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from contenders import CONTENDERS, PLAIN
from fcvgg.errors import ArgumentError, FcvggError, one_line
from fcvgg.support.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Measurement:
    """One contender at one size.

    Attributes:
        seconds: the median of a call.
        quartiles: of the same.
        calls: that were counted.
        ratio: to plain fcvgg's median at the same size and batch; below 1 is faster. None
            where plain fcvgg did not run beside it.
        gflops: 10**9 operations of the dense network per second: the same work for everybody.
        share: of the peak measured in the same run. Winograd's algorithm does the work with fewer
            operations, so it may exceed 1.
        memory: bytes that its process held at most, or None.
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
                f"{path} is no speed.json of this benchmark: {one_line(error)}"
            ) from error

    def extended(
        self, rows: Sequence[Measurement], peak: float, skipped: dict[str, str]
    ) -> Benchmark:
        """This run with what was measured next in it; shares are of the highest peak."""
        peak = max(self.peak_gflops, peak)
        return replace(
            self,
            peak_gflops=peak,
            rows=tuple(replace(row, share=row.gflops / peak) for row in (*self.rows, *rows)),
            skipped={**self.skipped, **skipped},
        )

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
        ran |= {f"{size}x{size}, batch {batch}" for size, batch, _ in rows}
        skipped = {k: v for k, v in {**self.skipped, **other.skipped}.items() if k not in ran}
        return replace(
            other, rows=tuple(rows[key] for key in keys), peak_gflops=peak, skipped=skipped
        )

    def markdown(self) -> str:
        """A table for each size and batch."""
        lines = [
            f"# {self.model}: score maps side by side",
            "",
            f"{self.machine}; {self._threads()}, {self.clock} time, every contender in a "
            "process of its own, taking turns; "
            f"peak of this run {self.peak_gflops:,.0f} GFLOP/s in float32 (the best of a matrix "
            "product and a convolution).",
            "",
            "Medians; the ratio is to plain fcvgg's time. A turn is half a second or one call, "
            "after a call that is not counted unless calls take a second; where a first call takes "
            "ten, there is one more, and no quartiles. fcvgg is optimised for each size. Memory is "
            "the peak of its process, the error the largest "
            "difference from float64 scores relative to the largest score. Operations are the "
            "dense network's for everybody, so Winograd's algorithm and bfloat16 may exceed the "
            "peak.",
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
                    *(f"{row.seconds:.3g} s", (max(row.seconds, row.quartiles[1]), place)),
                    **{"xytext": (7, 0), "textcoords": "offset points"},
                    **{"va": "center", "fontsize": 8},
                )
            ax.set_yticks(range(len(rows)), [row.contender for row in rows])
            ax.set_ylim(-0.7, len(rows) - 0.3)
            ax.grid(axis="y", alpha=0.3)
            ax.set_xscale("log")
            low, high = min(r.quartiles[0] for r in rows), max(r.quartiles[1] for r in rows)
            ax.set_xlim(low / 1.3, high * (high / low) ** 0.25 * 1.3)
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel("seconds per call (median, quartiles)")
            ax.set_title(f"{size}x{size}, batch {batch}")
        figure.suptitle(f"{self.model}, {self._threads()}, {self.clock} time")
        return figure

    def write(self, folder: Path) -> list[Path]:
        """Write ``speed.md``, ``speed.json`` and ``speed.png``.

        Raises:
            FcvggError: if they cannot be written.
        """
        paths = [folder / f"speed.{ending}" for ending in ("md", "json", "png")]
        try:
            for path, text in zip(paths, (self.markdown(), json.dumps(asdict(self), indent=1))):
                with atomic_file(path) as temporary:
                    temporary.write_text(text)
            with atomic_file(paths[2]) as temporary:
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
        f"{low:.3f} to {high:.3f}" if row.calls > 1 else "",
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
