"""Streaming and classifying on many machines, with Ray.

Ray runs on this machine by default, and on a cluster by its address: start it with ``ray start
--head`` on one machine and ``ray start --address=HEAD:6379`` on the others, and pass
``address="auto"`` on any of them. Every machine must find files under the same path. A worker that
dies is replaced and its work is done again. Needs the extra ``fcvgg[ray]``.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from fcvgg.categories import class_name
from fcvgg.errors import ArgumentError, FcvggError, ImageError, one_line
from fcvgg.geometry import Pair
from fcvgg.images.files import SPECIAL, Unreadable, image_files, is_leftover, left_out
from fcvgg.names import readable
from fcvgg.network import FullyConvolutional
from fcvgg.streaming.execution import as_array, bands, chunked
from fcvgg.streaming.interest import Interest
from fcvgg.streaming.job import StreamJob, as_result, plan_in_memory
from fcvgg.streaming.resumption import open_or_create_store
from fcvgg.streaming.strip_plan import StripPlan
from fcvgg.support.atomic import STORE_ENDINGS, TABLE_ENDINGS, atomic_folder, checked_folder
from fcvgg.support.extras import imported
from fcvgg.support.locking import locked
from fcvgg.support.memory_text import parsed_memory
from fcvgg.support.module_state import evaluating
from fcvgg.support.progress import progress_bar

Bundle = dict[str, bytes]
"""The files of a network that `FullyConvolutional.save` wrote."""

Write = Callable[[int, int, np.ndarray[Any, Any]], None]
"""Takes rows of cells, with the block of columns and the first row."""

Running = tuple[int, Pair, Any]
"""A block of columns, a band of rows, and references to the parts that a worker computes."""

_RETRIES = 3

_BLOCKS, _BLOCK_ROWS = 4, 1000
"""Blocks of a table per worker at least, so that none waits long for another at the end, and rows
of a block at most."""


def stream(
    net: FullyConvolutional,
    source: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    classes: Sequence[int | str] | str | None = None,
    rows: Pair | None = None,
    memory: int | str = "1GiB",
    progress: bool = False,
    workers: int | None = None,
    threads: int = 1,
    address: str | None = None,
    **options: Any,
) -> Any:
    """`fcvgg.stream` with bands of rows given to workers; the result is the same.

    Each worker reads the image's rows that its band and the halo need. With as many threads the
    bits are those of one process. Rows are kept or written from top to bottom: rows of later bands
    that finish early wait in Ray's object store, and are computed again after an interruption.
    Where Ray has GPUs, every worker takes one, or a part of one where there are fewer.

    Args:
        net, source, out, classes, rows, progress: as for `fcvgg.stream`; every worker must find
            the file of `source`, if it is one or an open slide.
        memory: bytes that each worker may add, or text such as ``"512MiB"``.
        workers: how many bands are computed at once; None takes what Ray has room for.
        threads: processor cores of each worker.
        address: of a Ray cluster, or None for this machine.
        options: `output`, `nodata`, `where`, `fill` and `mpp` of `fcvgg.stream`.

    Returns:
        the same as `fcvgg.stream`.
    """
    folder = None if out is None else checked_folder(out, "out", STORE_ENDINGS)
    ray = _with_room(address, workers, threads)
    job = StreamJob.prepared(net, source, classes, rows, **options)
    budget = parsed_memory(memory)
    found = ray.cluster_resources().get("GPU", 0), ray.available_resources().get("CPU", 1)
    workers, gpus = _share(*found, workers, threads)
    nodata = options.get("nodata")
    if job.source.reopened is not None:  # with the level and nodata value that were chosen
        source, nodata = job.source, None
    asked = classes, rows, job.output, nodata
    shared = ray.put(pack(net)), _send(ray, source), asked
    work = ray.remote(_band).options(
        num_cpus=threads, num_gpus=gpus, max_retries=_RETRIES, num_returns="streaming"
    )

    def run(plan: StripPlan, finished: Sequence[int], chunk: int, write: Write) -> None:
        pieces = (
            (block, band)
            for block in range(len(plan.blocks))
            for band in _split(finished[block], job.shape[-2], workers, chunk)
        )
        if job.interest is not None and not gpus:  # chosen here once, since processors are alike
            for cols in plan.blocks:
                job.bands(cols, plan.strip_bytes)
        interest = ray.put(job.interest)

        def begin(block: int, band: Pair) -> Running:
            return block, band, work.remote(*shared, interest, plan, block, band, chunk, threads)

        _run_in_order(ray, itertools.starmap(begin, pieces), workers, write)

    if folder is not None:
        with locked(folder):
            store, plan = open_or_create_store(job, folder, budget)
            with _shown(store.write, progress, job, store.finished) as write:
                run(plan, store.finished, store.chunk_rows, write)
        return store
    plan = plan_in_memory(job, budget)
    result = torch.empty(job.shape, dtype=job.dtype)

    def keep(block: int, row: int, cells: np.ndarray[Any, Any]) -> None:
        place = result[..., row : row + cells.shape[-2], slice(*plan.blocks[block])]
        place.copy_(torch.from_numpy(cells.copy()))  # a copy, since Ray's arrays are read-only

    finished = [0] * len(plan.blocks)
    with _shown(keep, progress, job, finished) as write:
        run(plan, finished, 1, write)
    return as_result(job, result)


def _share(gpus: float, cores: float, workers: int | None, threads: int) -> tuple[int, float]:
    """How many workers there are, and the GPUs of each: one, or a part if they are fewer."""
    workers = workers or max(int(gpus) or int(cores) // threads, 1)
    return workers, min(int(1e4 * gpus / workers) / 1e4, 1.0)  # as finely as Ray divides them


@contextmanager
def _shown(
    write: Write, progress: bool, job: StreamJob, finished: Sequence[int]
) -> Iterator[Write]:
    """`write` with a bar of the rows that it has written, of all blocks of columns."""
    total = len(finished) * job.shape[-2] - sum(finished)
    with progress_bar("streaming", total, progress, rate="rows/s") as advance:

        def write_and_show(block: int, row: int, cells: np.ndarray[Any, Any]) -> None:
            write(block, row, cells)
            advance(cells.shape[-2])

        yield write_and_show


def _run_in_order(ray: Any, bands: Iterator[Running], workers: int, write: Write) -> None:
    """Write the rows of bands in order, while the next bands are computed; `bands` begins them."""
    # the next band begins when the first one is written: no more than `workers` wait in the store
    running = deque(itertools.islice(bands, workers))
    try:
        while running:
            block, band, parts = running[0]
            for row, cells in _compute_rows(ray, band, parts):
                write(block, row, cells)
            running.popleft()
            running.extend(itertools.islice(bands, 1))
    finally:
        for _, _, parts in running:
            ray.cancel(parts)


def _with_room(address: str | None, workers: int | None, threads: int) -> Any:
    """Ray, connected, with room for the workers.

    Raises:
        ArgumentError: if the workers do not fit, for whom Ray would wait for ever.
    """
    for name, number in (("workers", workers), ("threads", threads)):
        if number is not None and number < 1:
            raise ArgumentError(f"{name} must be at least 1, got {number}")
    ray = start_ray(address)
    cores = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())
    if address is None and threads > cores:
        raise ArgumentError(
            f"threads must be at most {cores}, the cores that Ray has on a machine, got {threads}"
        )
    return ray


def _compute_rows(ray: Any, band: Pair, parts: Any) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """The rows that the worker of a band computes, as they come, each part with its first row."""
    row = band[0]
    try:
        for part in parts:
            cells = ray.get(part)
            yield row, cells
            row += cells.shape[-2]
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise FcvggError(
            f"a worker failed {_RETRIES + 1} times at rows {row} to {band[1]}: "
            f"{type(error).__name__}"
        ) from error


def _send(ray: Any, source: Any) -> Any:
    """A reference to the source for other processes.

    Raises:
        ImageError: if it cannot be sent to them.
    """
    try:
        return ray.put(source)
    except Exception as error:  # pickling arrays and datasets of other libraries raises anything
        reason = one_line(error.__cause__ or error)
        raise ImageError(
            f"source must be a path, or an object that can be sent to workers, got "
            f"{type(source).__name__}: {reason}; pass a path that every machine finds"
        ) from error


def _split(first: int, end: int, parts: int, chunk: int) -> Iterator[Pair]:
    """Ranges of rows, about as many as `parts`, that begin at whole chunks."""
    step = max(-(-(end - first) // (parts * chunk)) * chunk, chunk)
    for row in range(first, end, step):
        yield row, min(row + step, end)


@torch.no_grad()
def _band(
    bundle: Bundle,
    source: Any,
    asked: tuple[Any, ...],
    interest: Interest | None,
    plan: StripPlan,
    block: int,
    band: Pair,
    chunk: int,
    threads: int,
) -> Iterator[np.ndarray[Any, Any]]:
    """A worker's part: the rows of one band in one block of columns, some at a time."""
    torch.set_num_threads(threads)
    net = _unpack(tuple(bundle.items()))
    if imported("ray", "ray").get_gpu_ids() and torch.cuda.is_available():
        net = net.cuda()
    classes, rows, output, nodata = asked
    job = StreamJob.prepared(net, source, classes, rows, output, nodata, interest=interest)
    first, end = (job.workload.rows[0] + row for row in band)
    with evaluating(net):
        parts = bands(job, plan, plan.blocks[block], (first, end), lambda _: None)
        for _, cells in chunked(parts, band[0], chunk, band[1]):
            yield as_array(cells)


# -- folders of images ----------------------------------------------------------------------------


def classify(
    net: FullyConvolutional,
    paths: str | Sequence[str],
    *,
    out: str | os.PathLike[str],
    top: int = 5,
    workers: int = 2,
    threads: int = 1,
    address: str | None = None,
    **options: Any,
) -> ClassTable:
    """Classify a folder or bucket of images with `FullyConvolutional.classify`, through Ray Data.

    Every worker loads the network once, and reads images as `FullyConvolutional.classify` reads
    paths. Every file has a row, except those that systems leave in folders; see
    `fcvgg.images.files`.

    Args:
        net: a converted network.
        paths: files and folders, or URIs of them in buckets (``s3://...``) and other stores that
            PyArrow or fsspec opens. Folders are searched with all folders in them.
        out: the folder or bucket for Parquet files with the columns ``path`` (string), ``classes``
            (list of string) and ``probabilities`` (list of float) of the `top` best, the best
            first, and ``error`` (string), empty where the image could be used. Bytes of a path that
            are not UTF-8 are written as escapes, ``\\xe4``.
        top: number of classes that are written.
        workers: processes that classify.
        threads: processor cores of each worker.
        address: of a Ray cluster, or None for this machine.
        options: of `FullyConvolutional.classify`, such as ``scales``.

    Returns:
        `out` as a string, with the number of rows and the files that failed as attributes.

    Raises:
        ImageError: if there are no images.
        FcvggError: if `out` is a folder that holds files, or there is no cluster at `address`.
    """
    if top < 1:
        raise ArgumentError(f"top must be at least 1, got {top!r}")
    checked_folder(str(out), "out", TABLE_ENDINGS)
    net.classify(Image.new("RGB", net.input_size[::-1]), **options)  # checks the options
    ray = _with_room(address, workers, threads)
    data = imported("ray.data", "ray")
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise ImageError("paths must name at least one file or folder, got none")
    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise FcvggError(
            f"out must be a new or empty folder, got {out}, which holds files; choose another "
            "name, or remove it"
        )
    files = [file for name in names for file in _files_of(os.fspath(name))]
    data.DataContext.get_current().enable_progress_bars = False
    rows = data.from_items(
        [{"path": os.fsencode(name), "error": error} for name, error in files],
        override_num_blocks=min(len(files), max(_BLOCKS * workers, len(files) // _BLOCK_ROWS)),
    ).map_batches(
        _Classifier,
        fn_constructor_args=(ray.put(pack(net)), top, threads, options, os.getcwd()),
        batch_size=8,
        batch_format="pyarrow",
        compute=data.ActorPoolStrategy(size=workers),
        num_cpus=threads,
    )
    with _write_folder(out) as unfinished:
        rows.write_parquet(unfinished, **_without_cores(data.Dataset.write_parquet))
    return ClassTable(out)


class ClassTable(str):
    """Where `classify` wrote its rows: the path of a folder of Parquet files."""

    __slots__ = ()

    @property
    def rows(self) -> int:
        """Number of files."""
        return int(self._dataset().count_rows())

    @property
    def skipped(self) -> tuple[Unreadable, ...]:
        """The files that could not be classified, and why."""
        compute = imported("pyarrow.compute", "ray")
        failed = self._dataset().to_table(["path", "error"], filter=compute.field("error") != "")
        return tuple(
            Unreadable(row["path"], row["error"])
            for row in sorted(failed.to_pylist(), key=lambda row: str(row["path"]))
        )

    def _dataset(self) -> Any:
        dataset = imported("pyarrow.dataset", "ray")
        system, path = _store_of(self) if _is_uri(self) else (None, str(self))
        return dataset.dataset(path, filesystem=system, format="parquet")


def _files_of(name: str) -> list[tuple[str, str]]:
    """The files of a path or URI, each with why it is not an image, or an empty string.

    Raises:
        ImageError: if there are no images.
    """
    passed = ""
    if _is_uri(name):
        found = _listed_in_store(name)
    elif os.path.isdir(name):
        listing = image_files(Path(name))
        found = [(str(path), "") for path in listing.images]
        found += [(one.name, one.reason) for one in listing.skipped]
        found = sorted(found) if listing.images else []
        passed = f" ({left_out(listing.skipped, 0)})" if listing.skipped else ""
    elif os.path.exists(name):
        found = [(name, "" if os.path.isfile(name) else SPECIAL)]
    else:
        raise ImageError(f"there is no file or folder {name}")
    if not found:
        raise ImageError(f"{name} must hold at least one image, got none{passed}")
    return found


def _listed_in_store(uri: str) -> list[tuple[str, str]]:
    """The files under a URI; hidden ones are left out with that reason."""
    fs = imported("pyarrow.fs", "ray")
    system, path = _store_of(uri)
    try:
        info = system.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise ImageError(f"there is no file or folder {uri}")
        if info.type == fs.FileType.File:
            return [(uri, "")]
        files = system.get_file_info(fs.FileSelector(path, recursive=True))
    except OSError as error:
        raise ImageError(f"{uri} cannot be listed: {one_line(error)}") from error
    found = []
    for one in sorted(files, key=lambda one: one.path):
        below = one.path[len(path) :].strip("/")
        parts = below.split("/")
        if one.type != fs.FileType.File or any(map(is_leftover, parts)):
            continue
        hidden = any(part.startswith(".") for part in parts)
        found.append((f"{uri.rstrip('/')}/{below}", "a hidden file" if hidden else ""))
    return found


def _is_uri(name: str) -> bool:
    return "://" in name


def _store_of(uri: str) -> tuple[Any, str]:
    """A file system of PyArrow, and the path in it.

    Raises:
        ImageError: if neither PyArrow nor fsspec knows such stores, or it cannot be reached.
    """
    fs = imported("pyarrow.fs", "ray")
    try:
        return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except (ValueError, OSError, NotImplementedError) as error:
        known = error
    try:
        system, path = imported("fsspec.core", "ray").url_to_fs(uri)
    except (ValueError, OSError, ImportError):
        raise ImageError(f"{uri} cannot be opened: {one_line(known)}") from known
    return fs.PyFileSystem(fs.FSSpecHandler(system)), path


@contextmanager
def _write_folder(out: str | os.PathLike[str]) -> Iterator[str]:
    """Where to write a folder atomically; in a bucket under its name, which has no renaming."""
    if _is_uri(str(out)):
        yield str(out)
        return
    path = Path(out).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(path) as unfinished:
        yield str(unfinished)


def _without_cores(function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments by which Ray reads and writes without a core of its own, since workers hold all."""
    cores = {"num_cpus": 0}
    return cores if "num_cpus" in signature(function).parameters else {"ray_remote_args": cores}


class _Classifier:
    """The network and options that every worker of `classify` holds."""

    def __init__(
        self, bundle: Any, top: int, threads: int, options: dict[str, Any], folder: str = ""
    ):
        torch.set_num_threads(threads)
        ray = imported("ray", "ray")
        held = ray.get(bundle) if isinstance(bundle, ray.ObjectRef) else bundle
        self.net = _unpack(tuple(held.items()))
        self.top, self.options = top, options
        self.folder = folder  # where relative paths start

    def __call__(self, batch: Any) -> Any:
        """The rows of a batch as a table, whose types do not depend on the values."""
        arrow = imported("pyarrow", "ray")
        names = [os.fsdecode(name) for name in batch["path"].to_pylist()]
        rows = [self._classify(*row) for row in zip(names, batch["error"].to_pylist())]
        classes, probabilities, errors = zip(*rows)
        return arrow.table(
            {
                "path": arrow.array(list(map(readable, names)), arrow.string()),
                "classes": arrow.array(classes, arrow.list_(arrow.string())),
                "probabilities": arrow.array(probabilities, arrow.list_(arrow.float32())),
                "error": arrow.array(errors, arrow.string()),
            }
        )

    def _classify(self, name: str, error: str) -> tuple[list[str], list[float], str]:
        if error:
            return [], [], readable(error)
        try:
            with _local(name, self.folder) as path:
                scores = self.net.classify(path, **self.options)[0]
            if not scores.isfinite().all():
                raise ImageError("no cell has data, so there is no class")
        except (OSError, FcvggError) as failed:
            return [], [], readable(" ".join(str(failed).split()))
        values, indices = scores.topk(min(self.top, len(scores)))
        names = [class_name(i, self.net.categories) for i in indices.tolist()]
        return names, values.tolist(), ""


@contextmanager
def _local(name: str, folder: str) -> Iterator[Path]:
    """A file as a path of this machine: a temporary copy if it lies in a store.

    Raises:
        ImageError: if it cannot be read; the message names the URI, not the copy.
    """
    if not _is_uri(name):
        yield Path(folder, name)
        return
    system, path = _store_of(name)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / f"image{PurePosixPath(path).suffix}"
        with system.open_input_stream(path) as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target)
        try:
            yield copy
        except ImageError as error:
            raise ImageError(str(error).replace(str(copy), name)) from error


# -- the network on other machines ----------------------------------------------------------------


def start_ray(address: str | None) -> Any:
    """Ray, connected to a running cluster, or to one that is started on this machine.

    Raises:
        MissingExtraError: if Ray is not installed.
        FcvggError: if there is no cluster at `address`.
    """
    ray = imported("ray", "ray")
    if ray.is_initialized():
        return ray
    try:
        local = {"include_dashboard": False} if address is None else {}
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise FcvggError(
            f"there is no Ray cluster at address={address!r}: {str(error).splitlines()[0]}"
        ) from error
    return ray


def pack(net: FullyConvolutional) -> Bundle:
    """A network as the files that `FullyConvolutional.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        saved = net.save(Path(folder) / "net")
        return {file.name: file.read_bytes() for file in saved.iterdir()}


@lru_cache(maxsize=1)
def _unpack(bundle: tuple[tuple[str, bytes], ...]) -> FullyConvolutional:
    """The network of a bundle's files; a worker that gets several bands loads it once."""
    from fcvgg.loading import load

    with tempfile.TemporaryDirectory() as folder:
        for name, data in bundle:
            (Path(folder) / name).write_bytes(data)
        return load(folder)
