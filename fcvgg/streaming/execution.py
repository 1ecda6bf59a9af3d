"""Exact score maps of images of any size, in bounded memory.

`stream` reads an image strip by strip, runs the network over the strips with line buffers
(`fcvgg.inference.line_buffers`), and keeps the scores or writes them to disk row by row.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcvgg.geometry import Pair
from fcvgg.inference.line_buffers import LineBuffers, MissingCells
from fcvgg.inference.memory import trimmer
from fcvgg.network import FullyConvolutional
from fcvgg.streaming.bands import Band, chains, image_rows
from fcvgg.streaming.job import StreamJob, as_result, plan_in_memory
from fcvgg.streaming.resumption import open_or_create_store
from fcvgg.streaming.score_store import ScoreStore
from fcvgg.streaming.strip_plan import StripPlan
from fcvgg.support.atomic import STORE_ENDINGS, checked_folder
from fcvgg.support.locking import locked
from fcvgg.support.memory_text import parsed_memory
from fcvgg.support.module_state import device_of, dtype_of, evaluating
from fcvgg.support.progress import progress_bar

_MEGA = 10**6

_BLANK_BYTES = 8 << 20
"""Bytes of the rows of cells that are given at once where none is computed."""


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
    output: int | str = 0,
    nodata: float | str | None = None,
    where: Any = None,
    fill: float | None = None,
    mpp: float | None = None,
) -> Any:
    """The score map of an image of any size, equal to the network's on the whole image.

    The image is read in strips of rows. Every layer keeps the last rows that its next output needs,
    so no position is computed twice, and the memory does not grow with the image's height.

    Args:
        net: a converted network.
        source: a path (TIFF, BigTIFF, OME-TIFF, zarr, OME-Zarr; what else Pillow reads is decoded
            whole), what `fcvgg.open_image` gives (for a level of a pyramid, or some bands), an
            open rasterio dataset or slide (OpenSlide, TiffSlide, cuCIM), a PIL image, or an array
            that can be sliced (NumPy, memmap, zarr, h5py, dask): pixels ``(H, W, C)`` or
            ``(H, W)``, which are preprocessed, or preprocessed floats ``(C, H, W)``, also as a
            tensor. Pixels are the same as for `FullyConvolutional.score_map`; those of more than
            8 bits are taken as `fcvgg.Preprocess` says.
        out: a folder for the map as an OME-Zarr 0.5 image, with class names and geometry in its
            attributes, and of a georeferenced image its coordinate reference system and transform
            (``crs``, ``transform``, and ``cell_transform`` of the map's cells). Rows are written
            as they are finished; after an interruption the same call resumes. The map of another
            network or image (by its size and three rows) is refused. None keeps it in memory.
        classes: class indices or names to keep, ``"argmax"`` for the best class of every cell, or
            ``"top5"``; None keeps all.
        rows: half-open range of the map's rows; only the image's rows that they need are read.
        memory: bytes that the call may add, or text such as ``"512MiB"``, the map itself included
            where it is kept in memory. Images too wide for it are cut into blocks of columns, whose
            borders are computed twice.
        progress: show a bar with the rate and the time left.
        output: which output, by number or name, for a network with several.
        nodata: pixels of this value have no data, as for `fcvgg.open_image`: a number, or
            ``"file"`` for what the file declares. Not for preprocessed floats, which hold NaN
            there, nor for what is open already.
        where: the part of the image of interest, the rest is neither read nor computed:
            ``"tissue"``, a boolean array ``(h, w)`` of any resolution, GeoJSON polygons, or the
            path of either (`fcvgg.streaming.interest`). Cells keep the bits of the whole call.
        fill: what other cells hold, as scores or labels; None for NaN, or -1 for a class.
        mpp: micrometres per pixel that choose a pyramid's level, as for `fcvgg.open_image`; without
            it those of `fcvgg.Preprocess.mpp` do, and a warning says so.

    Returns:
        a `ScoreMap` with the scores ``(K, h, w)``, or ``(len(classes), h, w)``, whose probabilities
        are those among all classes; for ``"argmax"`` an int64 tensor ``(h, w)`` as of
        `ScoreMap.label_map`; for ``"top5"`` a tensor ``(2, 5, h, w)`` of class indices and their
        scores, the best first, of which no heatmap can be made. With `out`, the `ScoreStore` on
        disk. Cells that see pixels that are not finite hold NaN, or -1 for a class.

    Raises:
        ArgumentError: if an option cannot be used, or `memory` is too little; the message states
            the least.
        ImageError: if the image cannot be used, is truncated or shrinks.
        FcvggError: if `out` exists and holds something else, another run is writing it, or it
            cannot be written.
    """
    folder = None if out is None else checked_folder(out, "out", STORE_ENDINGS)
    job = StreamJob.prepared(net, source, classes, rows, output, nodata, where, fill, mpp)
    budget = parsed_memory(memory)
    if folder is None:
        return _in_memory(job, budget, progress)
    # held to the end: two runs would overwrite each other's record of finished rows
    with locked(folder):
        store, plan = open_or_create_store(job, folder, budget)
        with evaluating(net), _bar(progress, job, plan) as advance:
            for block in range(len(plan.blocks)):
                _fill(job, plan, store, block, advance)
    return store


def bands(
    job: StreamJob, plan: StripPlan, block: Pair, rows: Pair, advance: Callable[[float], None]
) -> Iterator[Tensor]:
    """Rows of cells ``(..., rows, cols)`` of a block of columns, a few at a time, downwards.

    The same plan gives the same bits wherever the range `rows` begins.
    """
    if job.interest is None:
        for _, cells in _computed(job, plan, block, [(rows[0], block)], rows, advance):
            yield cells
        job.source.release()  # other columns follow
        return
    row, end = rows
    top, (left, right) = job.workload.rows[0], block
    blank = job.blank  # (..., 1, 1)
    most = max(_BLANK_BYTES // job.row_bytes, 1)
    below: list[Band] = [((end, end), [])]
    for chain in [*chains(job.bands(block, plan.strip_bytes)), below]:
        first, last = chain[0][0][0], chain[-1][0][1]
        while row < min(first, end):  # above the band
            count = min(first, end, row + most) - row
            yield blank.expand(*blank.shape[:-2], count, right - left)
            row += count
        band = row, min(last, end)
        if band[0] >= band[1]:
            continue
        # the strips of all ranges give the same rows, since one schedule holds for all
        columns = zip(*([(rows[0], cols) for cols in ranges] for rows, ranges in chain))
        for parts in zip(*(_computed(job, plan, block, n, band, advance) for n in columns)):
            count = parts[0][1].shape[-2]
            cells = blank.repeat(*[1] * (blank.ndim - 2), count, right - left)
            for (a, b), part in parts:
                cells[..., a - left : b - left] = part
            wanted = job.interest.cells[row - top : row - top + count, left:right]
            yield torch.where(torch.from_numpy(wanted).to(cells.device), cells, blank)
            row += count
        job.source.release()


def _computed(
    job: StreamJob,
    plan: StripPlan,
    block: Pair,
    columns: Sequence[tuple[int, Pair]],
    rows: Pair,
    advance: Callable[[float], None],
) -> Iterator[tuple[Pair, Tensor]]:
    """Columns, and rows of their cells ``(..., rows, cols)``, by the schedule of their block.

    Args:
        columns: each with the first row that is computed of it; later ones lie within earlier ones.
    """
    schedule = job.workload.schedule(plan.strip_bytes, block)
    *_, cols = (each for row, each in columns if row <= rows[0])
    narrower = deque((row, each) for row, each in columns if row > rows[0])
    width = job.workload.width(cols)
    buffers = LineBuffers(schedule, width, rows[0], trimmer(plan.peak, plan.memory))
    missing = MissingCells(schedule, width, rows[0])
    left = rows[1] - rows[0]
    # the last strips may give more rows than are asked for: a band ends within a run's schedule
    while left:
        while narrower and narrower[0][0] <= rows[1] - left:
            _, cols = narrower.popleft()
            width = job.workload.width(cols)
            buffers.narrow(width)
            missing.narrow(width)
        first, end = buffers.image_rows
        left_col, right_col = buffers.image_cols
        *strip, pixels = job.input.strip((first, end), (left_col, right_col))
        cells = buffers.push(strip.pop())  # held nowhere else, so that it can be freed
        unknown = missing.push(pixels)
        advance((end - first) * (right_col - left_col) / _MEGA)
        if cells is not None:
            cells = cells if unknown is None else cells.masked_fill(unknown, torch.nan)
            kept = job.selection(cells[0, :, :left].to(dtype_of(job.net)))  # (..., rows, cols)
            del cells  # before the caller copies what is kept
            left -= kept.shape[-2]
            yield cols, kept


def _in_memory(job: StreamJob, memory: int, progress: bool) -> Any:
    plan = plan_in_memory(job, memory)
    device = device_of(job.net)
    result = torch.empty(job.shape, dtype=job.dtype, device=device)  # (..., h, w)
    with evaluating(job.net), _bar(progress, job, plan) as advance:
        for cols in plan.blocks:
            row = 0
            for cells in bands(job, plan, cols, job.workload.rows, advance):
                result[..., row : row + cells.shape[-2], cols[0] : cols[1]] = cells
                row += cells.shape[-2]
    return as_result(job, result)


def _fill(
    job: StreamJob,
    plan: StripPlan,
    store: ScoreStore,
    block: int,
    advance: Callable[[float], None],
) -> None:
    """Compute and write the rows of a block that are not finished."""
    first, end = job.workload.rows
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
    """Rows in whole chunks, each with its first row; the last one, up to `end`, may be shorter."""
    waiting: list[Tensor] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += part.shape[-2]
        whole = count if row + count == end else count - count % chunk_rows
        if whole:
            joined = torch.cat(waiting, -2) if len(waiting) > 1 else part  # (..., count, cols)
            yield row, joined[..., :whole, :]
            # a copy, since a view would hold the memory of the rows that are written
            waiting = [joined[..., whole:, :].clone()] if whole < count else []
            row, count = row + whole, count - whole


def as_array(cells: Tensor) -> np.ndarray[Any, Any]:
    """Values as zarr stores them: on the CPU, bfloat16 as float32."""
    cells = cells.float() if cells.dtype == torch.bfloat16 else cells
    return np.ascontiguousarray(cells.cpu().numpy())


def _bar(
    progress: bool, job: StreamJob, plan: StripPlan
) -> AbstractContextManager[Callable[[float], None]]:
    """A function that takes how many megapixels are done, and shows them if `progress`."""
    total = 0
    for block in plan.blocks:
        schedule = job.workload.schedule(plan.strip_bytes, block)
        for chain in chains(job.bands(block, plan.strip_bytes)):
            read = image_rows(schedule, chain[0][0])[0]
            for rows, ranges in chain:
                first, read = read, image_rows(schedule, rows)[1]
                widths = [job.workload.width(cols).ranges[0] for cols in ranges]
                total += sum((read - first) * (b - a) for a, b in widths)
    return progress_bar("streaming", total / _MEGA, progress, rate="MP/s")
