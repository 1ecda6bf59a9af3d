"""Exact score maps of images of any size, in bounded memory.

`stream` reads an image strip by strip, runs the network over the strips with line buffers
(`fcvgg.line_buffers`), and keeps the scores or writes them to disk row by row.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fcvgg.categories import class_index
from fcvgg.errors import ArgumentError, CategoryError
from fcvgg.geometry import Axis, Geometry, Pair
from fcvgg.network import FullyConvolutional, evaluating
from fcvgg.placement import device_of, dtype_of
from fcvgg.probability import to_probabilities
from fcvgg.score_map import ScoreMap
from fcvgg.streaming.allocator import trimmer
from fcvgg.streaming.line_buffers import LineBuffers, stages_of
from fcvgg.streaming.score_store import FORMAT, ScoreStore, check_same, create_store, open_store
from fcvgg.streaming.strip_plan import (
    Layout,
    StripPlan,
    estimated_peak,
    itemsize_of,
    parsed_memory,
    plan_strips,
    readable,
)
from fcvgg.streaming.strip_sources import StripSource, strip_reader, strip_source

if TYPE_CHECKING:
    from rich.progress import Progress


_CHUNK_BYTES = 8 << 20
"""Bytes of the rows of cells that wait until a whole chunk of them can be written."""

_CHUNK_ROWS = 32
_TOP = 5


@torch.no_grad()
def stream(
    net: FullyConvolutional,
    source: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    classes: Sequence[int | str] | str | None = None,
    rows: Pair | None = None,
    memory: int | str = "1GiB",
    progress: bool = False,
    output: int = 0,
) -> Any:
    """The score map of an image of any size, equal to the network's on the whole image.

    The image is read in strips of rows. Every layer keeps the last rows that its next output needs,
    so no position is computed twice, and the memory does not grow with the image's height.

    Args:
        net: a converted network.
        source: a path (TIFF, BigTIFF, OME-TIFF, zarr, OME-Zarr; what else Pillow reads is decoded
            whole), what `fcvgg.open_image` gives (for a level of a pyramid), a PIL image, or an
            array that can be sliced (NumPy, memmap, zarr, h5py, dask): ``uint8`` pixels
            ``(H, W, C)`` or ``(H, W)``, which are preprocessed, or preprocessed floats
            ``(C, H, W)``, also as a tensor.
        out: a folder for the map as a zarr array, with class names and geometry in its attributes.
            Rows are written as they are finished; after an interruption the same call resumes.
            None keeps the map in memory.
        classes: class indices or names to keep, ``"argmax"`` for the best class of every cell, or
            ``"top5"``; None keeps all.
        rows: half-open range of the map's rows; only the image's rows that they need are read.
        memory: bytes that the call may add, or text such as ``"512MiB"``, the map itself included
            where it is kept in memory. Images too wide for it are cut into blocks of columns, whose
            borders are computed twice.
        progress: show a bar with the rate and the time left.
        output: which output, for a network with several.

    Returns:
        a `ScoreMap` with the scores ``(K, h, w)``, or ``(len(classes), h, w)``; for ``"argmax"`` an
        int64 tensor ``(h, w)`` as of `ScoreMap.label_map`; for ``"top5"`` a tensor ``(2, 5, h, w)``
        of class indices and their scores, the best first. With `out`, the `ScoreStore` on disk.

    Raises:
        ArgumentError: if an option is none of these, or `memory` too little; the least is named.
        ImageError: if the image cannot be used, is truncated or shrinks.
        FcvggError: if `out` exists and holds something else, or cannot be written.
    """
    job = StreamJob.prepared(net, source, classes, rows, output)
    budget = parsed_memory(memory)
    if out is None:
        return _in_memory(job, budget, progress)
    store, plan = opened_store(job, Path(out), budget)
    with evaluating(net), _bar(progress, job, plan) as advance:
        for block in range(len(plan.blocks)):
            _fill(job, plan, store, block, advance)
    return store


# -- what is asked for ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """Which scores of a cell are kept: all, some classes, the best one or the best five."""

    kind: str
    indices: tuple[int, ...]
    count: int
    activation: str

    @classmethod
    def of(cls, classes: Any, net: FullyConvolutional, output: int) -> Selection:
        """Read the argument `classes` of `stream`.

        Raises:
            ArgumentError: if it is none.
            CategoryError: if a class is unknown.
        """
        count = net.program.classes[output]
        activation = net.activation_of(output)
        if classes is None:
            return cls("scores", tuple(range(count)), count, activation)
        if isinstance(classes, str):
            if classes not in ("argmax", "top5"):
                raise ArgumentError(
                    f"classes={classes!r} is unknown; expected 'argmax', 'top5', or a sequence of "
                    "class indices and names"
                )
            return cls(classes, (), count, activation)
        if not isinstance(classes, Iterable):
            raise ArgumentError(
                f"classes={classes!r} is no sequence; expected class indices and names, such as "
                f"[{classes!r}]"
            )
        names = net.categories if output == 0 else None
        indices = tuple(class_index(c, names, count) for c in classes)
        if not indices or len(set(indices)) < len(indices):
            raise ArgumentError(f"classes={list(classes)} names no class, or one twice")
        return cls("scores", indices, count, activation)

    @property
    def lead(self) -> tuple[int, ...]:
        """The result's dimensions before the rows and columns."""
        top = min(_TOP, self.count)
        return {"scores": (len(self.indices),), "argmax": (), "top5": (2, top)}[self.kind]

    @property
    def whole(self) -> bool:
        return self.indices == tuple(range(self.count))

    def dtype(self, scores: torch.dtype) -> torch.dtype:
        if self.kind == "argmax":
            return torch.int64
        return torch.float32 if self.kind == "top5" and itemsize_of(scores) < 4 else scores

    def __call__(self, scores: Tensor) -> Tensor:
        """What is kept of scores ``(K, h, w)``."""
        if self.kind == "argmax":
            if self.count == 1:
                return (to_probabilities(scores, self.activation)[0] > 0.5).long() - 1
            return scores.argmax(0)
        if self.kind == "top5":
            best, indices = scores.to(self.dtype(scores.dtype)).topk(min(_TOP, self.count), 0)
            return torch.stack([indices.to(best), best])
        return scores if self.whole else scores[list(self.indices)]


@dataclass(frozen=True)
class StreamJob:
    """Everything about a stream but how it is cut into strips."""

    net: FullyConvolutional
    source: StripSource
    read: Callable[[Pair, Pair], Tensor]
    selection: Selection
    layout: Layout
    output: int

    @classmethod
    def prepared(cls, net: Any, source: Any, classes: Any, rows: Any, output: int = 0) -> StreamJob:
        """Check the arguments of `stream`."""
        if not isinstance(net, FullyConvolutional):
            raise ArgumentError(
                f"stream takes a converted network, got {type(net).__name__}; "
                "pass fcvgg.convert(model)"
            )
        if output not in range(len(net.program.classes)):
            raise ArgumentError(
                f"output={output!r} is unknown; the network has {len(net.program.classes)}"
            )
        image = strip_source(source)
        selection = Selection.of(classes, net, output)
        size = tuple(max(n, axis.window) for n, axis in zip(image.size, net.geometry.axes))
        height, width = net.output_size(image.size)
        layout = Layout(
            stages_of(net.network, net.in_channels, output),
            (size[0], size[1]),
            _checked_rows(rows, height),
            (0, width),
            itemsize_of(dtype_of(net)),
        )
        read = strip_reader(image, net.preprocess, net.in_channels)
        return cls(net, image, read, selection, layout, output)

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's."""
        (top, bottom), (left, right) = self.layout.rows, self.layout.cols
        return (*self.selection.lead, bottom - top, right - left)

    @property
    def dtype(self) -> torch.dtype:
        return self.selection.dtype(dtype_of(self.net))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the result."""
        *lead, _, width = self.shape
        return int(np.prod([*lead, width])) * itemsize_of(self.dtype)

    @property
    def categories(self) -> tuple[str, ...] | None:
        names = self.net.categories if self.output == 0 else None
        if names is None or self.selection.kind != "scores":
            return names
        return tuple(names[i] for i in self.selection.indices)

    @property
    def geometry(self) -> Geometry:
        """The result's, in the image's pixels; its row 0 is the first row asked for."""
        placed = self.net.geometry.placed(self.source.size)
        return Geometry(_from_row(placed.height, self.layout.rows[0]), placed.width)

    def plan(self, memory: int, beside: int) -> StripPlan:
        """How to stream within `memory` bytes, of which `beside` are taken already."""
        beside += self.source.resident
        return plan_strips(self.layout, memory, beside, self.source.column_bytes)

    def peak(self, strip_bytes: int, block: int, beside: int) -> int:
        """The bytes that strips and blocks of columns of these sizes need."""
        beside += self.source.resident
        return beside + estimated_peak(self.layout, strip_bytes, block, self.source.column_bytes)

    def strip(self, rows: Pair, cols: Pair) -> Tensor:
        """Rows and columns of the network's input, which is padded below the window."""
        (top, _), (left, _) = self.net.geometry.padding_for(self.source.size)
        height, width = self.source.size
        y = (min(max(rows[0] - top, 0), height), min(max(rows[1] - top, 0), height))
        x = (min(max(cols[0] - left, 0), width), min(max(cols[1] - left, 0), width))
        device, dtype = device_of(self.net), dtype_of(self.net)
        if y[0] == y[1] or x[0] == x[1]:
            shape = (1, self.net.in_channels, rows[1] - rows[0], cols[1] - cols[0])
            return torch.zeros(shape, device=device, dtype=dtype)
        pixels = self.read(y, x).to(device, dtype)
        if device.type == "cpu" and pixels.element_size() <= 4:
            # oneDNN is faster so, and a row of a map is one piece of memory
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        around = (x[0] + left - cols[0], cols[1] - x[1] - left)
        around = (*around, y[0] + top - rows[0], rows[1] - y[1] - top)  # type: ignore[assignment]
        return F.pad(pixels, around) if any(around) else pixels


def _checked_rows(rows: Any, height: int) -> Pair:
    if rows is None:
        return 0, height
    try:
        first, end = (int(n) for n in rows)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"rows={rows!r} is no range; expected (first, end)") from error
    if not 0 <= first < end <= height:
        raise ArgumentError(
            f"rows={(first, end)} is no range of the map's {height} rows; "
            f"expected 0 <= first < end <= {height}"
        )
    return first, end


def _from_row(axis: Axis, row: int) -> Axis:
    return replace(axis, origin=axis.origin + row * axis.stride)


# -- the work -------------------------------------------------------------------------------------


def bands(
    job: StreamJob, plan: StripPlan, cols: Pair, rows: Pair, advance: Callable[[int], None]
) -> Iterator[Tensor]:
    """The result's rows ``[first, end)`` for some columns, a few at a time, from top to bottom.

    The same plan gives the same bits wherever `rows` begins.
    """
    schedule = job.layout.schedule(plan.strip_bytes, cols)
    width = job.layout.width(cols)
    buffers = LineBuffers(schedule, width, rows[0], trimmer(plan.peak))
    left = rows[1] - rows[0]
    while left:
        first, end = buffers.image_rows
        cells = buffers.push(job.strip((first, end), buffers.image_cols))
        advance((end - first) * (buffers.image_cols[1] - buffers.image_cols[0]))
        if cells is not None:
            kept = job.selection(cells[0, :, :left])
            del cells
            left -= kept.shape[-2]
            yield kept


def _in_memory(job: StreamJob, memory: int, progress: bool) -> Any:
    plan = plan_in_memory(job, memory)
    device = device_of(job.net)
    result = torch.empty(job.shape, dtype=job.dtype, device=device)
    with evaluating(job.net), _bar(progress, job, plan) as advance:
        for cols in plan.blocks:
            row = 0
            for cells in bands(job, plan, cols, job.layout.rows, advance):
                result[..., row : row + cells.shape[-2], cols[0] : cols[1]] = cells
                row += cells.shape[-2]
    return as_result(job, result)


def plan_in_memory(job: StreamJob, memory: int) -> StripPlan:
    """The plan where the map is kept in memory too.

    Raises:
        ArgumentError: if there is none.
    """
    result_bytes = job.row_bytes * job.shape[-2]
    try:
        return job.plan(memory, result_bytes)
    except ArgumentError as error:
        if result_bytes < memory // 4:
            raise
        raise ArgumentError(
            f"{error}, of which the map itself takes {readable(result_bytes)}; write it to disk "
            "with out=, or keep fewer classes"
        ) from error


def as_result(job: StreamJob, result: Tensor) -> Any:
    """A finished map as `stream` returns it."""
    if job.selection.kind != "scores":
        return result
    kind = ScoreMap if job.selection.whole else ScoreMapOfSomeClasses
    return kind(
        scores=result,
        geometry=job.geometry,
        image_size=job.source.size,
        input_size=job.source.size,
        categories=job.categories,
        activation=job.selection.activation,
    )


class ScoreMapOfSomeClasses(ScoreMap):
    """A `ScoreMap` that lacks classes, so that a softmax over it would be wrong."""

    def probabilities(self) -> Tensor:
        """The class probabilities of every cell, where they do not depend on other classes."""
        self._require_probabilities()
        return super().probabilities()

    def predict(self, average: str = "scores") -> Tensor:
        """The classes' probabilities, where they do not depend on other classes."""
        self._require_probabilities()
        return super().predict(average)

    def _require_probabilities(self) -> None:
        if self.activation == "logits":
            raise CategoryError(
                "the score map holds some of the classes, and probabilities need the logits of all;"
                " stream with classes=None"
            )


def opened_store(job: StreamJob, path: Path, memory: int) -> tuple[ScoreStore, StripPlan]:
    """The store of a job on disk, new or to be resumed, and the plan it is computed by."""
    chunk_rows = max(min(_CHUNK_BYTES // job.row_bytes, _CHUNK_ROWS, job.shape[-2]), 1)
    description = _description(job)
    if path.exists():
        store = open_store(path, writable=True)
        check_same(store, description)
        return store, _resumed_plan(job, store, memory)
    plan = job.plan(memory, 3 * chunk_rows * job.row_bytes)
    description.update(strip_bytes=plan.strip_bytes, blocks=[list(block) for block in plan.blocks])
    dtype = job.dtype if job.dtype != torch.bfloat16 else torch.float32
    name = str(dtype).removeprefix("torch.")
    return create_store(path, job.shape, name, chunk_rows, description), plan


def _resumed_plan(job: StreamJob, store: ScoreStore, memory: int) -> StripPlan:
    """The plan by which the finished rows were computed: only it gives the same bits."""
    strip_bytes, blocks = int(store.description["strip_bytes"]), tuple(store.blocks)
    waiting = 3 * store.chunk_rows * job.row_bytes
    peak = job.peak(strip_bytes, max(b - a for a, b in blocks), waiting)
    if peak > memory and not store.complete:
        raise ArgumentError(
            f"memory={readable(memory)} is too little to resume {store.path}, which was begun with "
            f"more; the same strips need {readable(peak)}"
        )
    return StripPlan(strip_bytes, blocks, peak)


def _description(job: StreamJob) -> dict[str, Any]:
    categories = job.categories
    return {
        "format": FORMAT,
        "kind": job.selection.kind,
        "geometry": job.geometry.to_dict(),
        "image_size": list(job.source.size),
        "rows": list(job.layout.rows),
        "classes": list(job.selection.indices),
        "all_classes": job.selection.whole,
        "categories": None if categories is None else list(categories),
        "activation": job.selection.activation,
        "dtype": str(dtype_of(job.net)).removeprefix("torch."),
        "weights": _weights_checksum(job.net),
        "image": _image_checksum(job),
        "source": None if job.source.path is None else str(job.source.path.resolve()),
        "level": job.source.level,
    }


def _weights_checksum(net: FullyConvolutional) -> str:
    checksum = 0
    for tensor in net.state_dict().values():
        flat = tensor.detach().contiguous().cpu().view(-1)
        if flat.numel():
            checksum = zlib.crc32(flat.view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def _image_checksum(job: StreamJob) -> str:
    """Of the first, the middle and the last row that the network reads."""
    first, end = job.layout.height().ranges[0]
    cols = job.layout.width(job.layout.cols).ranges[0]
    checksum = 0
    for row in dict.fromkeys((first, (first + end) // 2, end - 1)):
        values = job.strip((row, row + 1), cols).double().cpu().contiguous()
        checksum = zlib.crc32(values.numpy().data, checksum)
    return f"{checksum:08x}"


def _fill(
    job: StreamJob,
    plan: StripPlan,
    store: ScoreStore,
    block: int,
    advance: Callable[[int], None],
) -> None:
    """Compute and write the rows of a block that are not finished."""
    first, end = job.layout.rows
    begin = first + store.finished[block]
    if begin == end:
        return
    for row, cells in chunked(
        bands(job, plan, plan.blocks[block], (begin, end), advance),
        store.finished[block],
        store.chunk_rows,
        end - first,
    ):
        store.write(block, row, as_array(cells))


def chunked(
    parts: Iterator[Tensor], row: int, chunk_rows: int, end: int
) -> Iterator[tuple[int, Tensor]]:
    """Rows in whole chunks, each with its first row; the last chunk may be shorter."""
    waiting: list[Tensor] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += part.shape[-2]
        whole = count if row + count == end else count - count % chunk_rows
        if whole:
            joined = torch.cat(waiting, -2) if len(waiting) > 1 else part
            yield row, joined[..., :whole, :]
            waiting = [joined[..., whole:, :].clone()] if whole < count else []
            row, count = row + whole, count - whole


def as_array(cells: Tensor) -> np.ndarray[Any, Any]:
    """Values as zarr stores them."""
    cells = cells.float() if cells.dtype == torch.bfloat16 else cells
    return np.ascontiguousarray(cells.cpu().numpy())


# -- progress -------------------------------------------------------------------------------------


@contextmanager
def _bar(progress: bool, job: StreamJob, plan: StripPlan) -> Iterator[Callable[[int], None]]:
    """A function that is told how many pixels were done, and shows it if asked to."""
    if not progress:
        yield lambda pixels: None
        return
    ranges = job.layout.height().ranges[0]
    cols = [job.layout.width(block).ranges[0] for block in plan.blocks]
    total = sum((ranges[1] - ranges[0]) * (b - a) for a, b in cols)
    with _progress() as bar:
        task = bar.add_task("streaming", total=total / 1e6)
        yield lambda pixels: bar.advance(task, pixels / 1e6)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        """Megapixels per second."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.2f} MP/s" if task.speed else "- MP/s")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
