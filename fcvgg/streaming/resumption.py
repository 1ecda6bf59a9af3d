"""Resuming a stream: the map on disk must be of the same image, weights and plan."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from fcvgg.errors import ArgumentError
from fcvgg.images.lazy.georeference import described
from fcvgg.network import FullyConvolutional
from fcvgg.streaming.job import StreamJob
from fcvgg.streaming.score_store import ScoreStore, check_same, create_store, open_store
from fcvgg.streaming.store_description import FORMAT
from fcvgg.streaming.strip_plan import StripPlan
from fcvgg.support.memory_text import rounded_up, size_text
from fcvgg.support.module_state import dtype_of

_CHUNK_BYTES = 8 << 20
"""Bytes of the rows of cells that wait until they make a whole chunk."""

_CHUNK_ROWS = 32

_COPIES = 4
"""Of those rows: as they wait, joined, in zarr's hands, and encoded as one shard."""

_CHECKED_COLS = 2048
"""Columns of the image that are read at a time for its checksum."""


def open_or_create_store(job: StreamJob, path: Path, memory: int) -> tuple[ScoreStore, StripPlan]:
    """The store of a job on disk, new or to be resumed, and the plan it is computed by."""
    # few rows: an interrupted run loses those that do not make a whole chunk
    chunk_rows = max(min(_CHUNK_BYTES // job.row_bytes, _CHUNK_ROWS, job.shape[-2]), 1)
    description = _description(job)
    if path.exists():
        store = open_store(path, writable=True)
        check_same(store, description)
        return store, _resumed_plan(job, store, memory)
    plan = job.plan(memory, _COPIES * chunk_rows * job.row_bytes)
    description.update(strip_bytes=plan.strip_bytes, blocks=[list(block) for block in plan.blocks])
    # zarr has no bfloat16
    dtype = job.dtype if job.dtype != torch.bfloat16 else torch.float32
    name = str(dtype).removeprefix("torch.")
    normalized = job.selection.normalized
    return create_store(path, job.shape, name, chunk_rows, description, normalized), plan


def _resumed_plan(job: StreamJob, store: ScoreStore, memory: int) -> StripPlan:
    """The plan by which the finished rows were computed: only it gives the same bits."""
    strip_bytes, blocks = int(store.description["strip_bytes"]), tuple(store.blocks)
    waiting = _COPIES * store.chunk_rows * job.row_bytes
    peak = job.peak(strip_bytes, max(b - a for a, b in blocks), waiting)
    if peak > memory and not store.complete:
        raise ArgumentError(
            f"memory must be at least {size_text(rounded_up(peak))} to resume {store.path} with "
            f"the strips that it was begun with, got {size_text(memory)}"
        )
    return StripPlan(strip_bytes, blocks, peak, memory)


def _description(job: StreamJob) -> dict[str, Any]:
    categories = job.categories
    return {
        "format": FORMAT,
        "kind": job.selection.kind,
        "geometry": job.geometry.to_dict(),
        "image_size": list(job.source.size),
        "full_size": list(job.source.full_size),
        "rows": list(job.workload.rows),
        "classes": list(job.selection.indices),
        "all_classes": job.selection.whole,
        "num_classes": job.selection.count,
        "categories": None if categories is None else list(categories),
        "activation": job.selection.activation,
        "dtype": str(dtype_of(job.net)).removeprefix("torch."),
        "output": job.output,
        "network": _network_checksum(job.net),
        "weights": _weights_checksum(job.net),
        "nodata": job.source.left_out,
        "where": None if job.interest is None else job.interest.checksum,
        "image": _image_checksum(job),
        "source": None if job.source.path is None else str(job.source.path.resolve()),
        "level": job.source.level,
        "pixel_size": job.source.pixel_size and list(job.source.pixel_size),
        "bands": None if job.source.bands is None else list(job.source.bands),
        **described(job.source.georeference, job.geometry),
    }


def _network_checksum(net: FullyConvolutional) -> str:
    """A checksum of the operations and options: other networks may have the same weights."""
    return f"{zlib.crc32(f'{net.network.code}{net.network!r}'.encode()):08x}"


def _weights_checksum(net: FullyConvolutional) -> str:
    checksum = 0
    # as bytes, so that weights of any dtype count bit by bit
    for tensor in net.state_dict().values():
        flat = tensor.detach().contiguous().cpu().view(-1)
        if flat.numel():
            checksum = zlib.crc32(flat.view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def _image_checksum(job: StreamJob) -> str:
    """A checksum of the first, the middle and the last row that the network reads."""
    first, end = job.workload.height().ranges[0]
    left, right = job.workload.width(job.workload.cols).ranges[0]
    checksum = 0
    # three rows, since reading all of a slide would take as long as the stream itself
    for row in dict.fromkeys((first, (first + end) // 2, end - 1)):
        for col in range(left, right, _CHECKED_COLS):
            cols = (col, min(col + _CHECKED_COLS, right))
            values, missing = job.input.strip((row, row + 1), cols)
            values = values.double().cpu().contiguous()
            if missing is not None:  # the strip holds zeros there
                values = values.masked_fill(missing.cpu(), torch.nan)
            checksum = zlib.crc32(values.numpy().data, checksum)
    return f"{checksum:08x}"
