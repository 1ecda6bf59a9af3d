"""Streaming and classifying on many machines, with Ray.

Ray runs on this machine by default, and on a cluster by its address: start it with ``ray start
--head`` on one machine and ``ray start --address=HEAD:6379`` on the others, and pass
``address="auto"`` on any of them. Files must lie where every machine finds them. A worker that dies
is replaced and its work is done again. The extra ``fcvgg[ray]`` brings what is needed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from itertools import islice
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
from fcvgg.streaming.job import StreamJob, as_result, plan_in_memory
from fcvgg.streaming.resumption import opened_store
from fcvgg.streaming.strip_plan import StripPlan, parsed_memory
from fcvgg.support.atomic import STORE_ENDINGS, TABLE_ENDINGS, checked_folder, folder_written_whole
from fcvgg.support.extras import imported
from fcvgg.support.module_state import evaluating

Bundle = dict[str, bytes]
"""The files of a network that `FullyConvolutional.save` wrote."""

_RETRIES = 3

_BLOCKS, _BLOCK_ROWS = 4, 1000
"""Blocks of a table for each worker at least, so that none waits long for another at the end, and
rows of a block at most."""


def stream(
    net: FullyConvolutional,
    source: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    classes: Sequence[int | str] | str | None = None,
    rows: Pair | None = None,
    memory: int | str = "1GiB",
    nodata: float | str | None = None,
    workers: int | None = None,
    threads: int = 1,
    address: str | None = None,
) -> Any:
    """`fcvgg.stream` with bands of rows given to workers; the result is the same.

    Each worker reads the image's rows that its band and the halo need. With as many threads the
    bits are those of one process. Rows are kept or written from top to bottom: those that later
    bands finish first wait in Ray's object store, and are computed again after an interruption.

    Args:
        net, source, out, classes, rows, nodata: as for `fcvgg.stream`; every worker must find a
            path.
        memory: what each worker may add.
        workers: how many bands are computed at once; None takes what Ray has room for.
        threads: processor cores of each worker.
        address: of a Ray cluster, or None for this machine.

    Returns:
        as `fcvgg.stream`.
    """
    folder = None if out is None else checked_folder(out, "out", STORE_ENDINGS)
    ray = _with_room(address, workers, threads)
    job = StreamJob.prepared(net, source, classes, rows, nodata=nodata)
    budget = parsed_memory(memory)
    if folder is None:
        plan, store = plan_in_memory(job, budget), None
        finished, chunk = [0] * len(plan.blocks), 1
        result = torch.empty(job.shape, dtype=job.dtype)
    else:
        store, plan = opened_store(job, folder, budget)
        finished, chunk = store.finished, store.chunk_rows
        result = None
    workers = workers or max(int(ray.available_resources().get("CPU", 1)) // threads, 1)
    height = job.shape[-2]
    pieces = (
        (block, band)
        for block in range(len(plan.blocks))
        for band in _split(finished[block], height, workers, chunk)
    )
    shared = ray.put(packed(net)), _sent(ray, source)
    work = ray.remote(_band).options(
        num_cpus=threads, max_retries=_RETRIES, num_returns="streaming"
    )

    def begun(block: int, band: Pair) -> tuple[int, Pair, Any]:
        part = (classes, rows, nodata, plan, block, band, chunk, threads)
        return block, band, work.remote(*shared, *part)

    running = deque(begun(*piece) for piece in islice(pieces, workers))
    try:
        while running:
            block, band, parts = running[0]
            for row, cells in _computed(ray, band, parts):
                if store is not None:
                    store.write(block, row, cells)
                    continue
                left, right = plan.blocks[block]
                assert result is not None
                place = result[..., row : row + cells.shape[-2], left:right]
                place.copy_(torch.from_numpy(cells.copy()))
            running.popleft()
            running.extend(begun(*piece) for piece in islice(pieces, 1))
    finally:
        for _, _, parts in running:
            ray.cancel(parts)
    return store if store is not None else as_result(job, result)  # type: ignore[arg-type]


def _with_room(address: str | None, workers: int | None, threads: int) -> Any:
    """Ray, connected, where such workers can run.

    Raises:
        ArgumentError: if they cannot: Ray would wait for ever.
    """
    for name, number in (("workers", workers), ("threads", threads)):
        if number is not None and number < 1:
            raise ArgumentError(f"{name}={number} is no number of {name}; expected at least 1")
    ray = started(address)
    cores = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())
    if address is None and threads > cores:
        raise ArgumentError(
            f"threads={threads} is more than the {cores} cores that Ray has on a machine; "
            "take fewer"
        )
    return ray


def _computed(ray: Any, band: Pair, parts: Any) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """What the worker of a band has computed, as it comes, each with its first row."""
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


def _sent(ray: Any, source: Any) -> Any:
    """A reference to the source for other processes.

    Raises:
        ImageError: if they cannot have it.
    """
    try:
        return ray.put(source)
    except Exception as error:  # whatever an array or dataset of some library raises
        reason = one_line(error.__cause__ or error)
        raise ImageError(
            f"{type(source).__name__} cannot be sent to workers: {reason}; pass a path that every "
            "machine finds"
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
    classes: Any,
    rows: Pair | None,
    nodata: float | str | None,
    plan: StripPlan,
    block: int,
    band: Pair,
    chunk: int,
    threads: int,
) -> Iterator[np.ndarray[Any, Any]]:
    """A worker's part: the rows of one band in one block of columns, some at a time."""
    torch.set_num_threads(threads)
    net = _unpacked(_Hashed(bundle))
    job = StreamJob.prepared(net, source, classes, rows, nodata=nodata)
    first, end = (job.layout.rows[0] + row for row in band)
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
    paths. Every file has a row, but what systems leave in folders; see `fcvgg.images.files`.

    Args:
        net: a converted network.
        paths: files and folders, or URIs of them in buckets (``s3://...``) and other stores that
            PyArrow or fsspec opens. Folders are searched with all folders in them.
        out: the folder or bucket for Parquet files with the columns ``path`` (string), ``classes``
            (list of string) and ``probabilities`` (list of float) of the `top` best, the best
            first, and ``error`` (string), which is empty where the image could be used. Bytes of a
            path that are not UTF-8 are written as escapes, ``\\xe4``.
        top: how many classes are written.
        workers: processes that classify.
        threads: processor cores of each worker.
        address: of a Ray cluster, or None for this machine.
        options: of `FullyConvolutional.classify`, such as ``scales``.

    Returns:
        `out` as a string, which also says how many rows there are and which files failed.

    Raises:
        ImageError: if there are no images.
        FcvggError: if `out` is a folder that holds files, or there is no cluster at `address`.
    """
    if top < 1:
        raise ArgumentError(f"top={top!r} is no number of classes; expected at least 1")
    checked_folder(str(out), "out", TABLE_ENDINGS)
    net.classify(Image.new("RGB", net.input_size[::-1]), **options)  # unusable options end here
    ray = _with_room(address, workers, threads)
    data = imported("ray.data", "ray")
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise ImageError("no images were given; expected at least one path")
    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise FcvggError(f"{out} holds files already; choose another name, or remove it")
    files = [file for name in names for file in _files_of(os.fspath(name))]
    data.DataContext.get_current().enable_progress_bars = False
    rows = data.from_items(
        [{"path": os.fsencode(name), "error": error} for name, error in files],
        override_num_blocks=min(len(files), max(_BLOCKS * workers, len(files) // _BLOCK_ROWS)),
    ).map_batches(
        _Classifier,
        fn_constructor_args=(ray.put(packed(net)), top, threads, options, os.getcwd()),
        batch_size=8,
        batch_format="pyarrow",
        compute=data.ActorPoolStrategy(size=workers),
        num_cpus=threads,
    )
    with _written_whole(out) as unfinished:
        rows.write_parquet(unfinished, **_beside(data.Dataset.write_parquet))
    return ClassTable(out)


class ClassTable(str):
    """Where `classify` wrote its rows: the path of a folder of Parquet files."""

    __slots__ = ()

    @property
    def rows(self) -> int:
        """How many files there are."""
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
    """The files of a path or URI, each with why it is no image, or an empty string.

    Raises:
        ImageError: if there are none.
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
        raise ImageError(f"there are no images in {name}; expected at least one{passed}")
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
def _written_whole(out: str | os.PathLike[str]) -> Iterator[str]:
    """Where to write a folder, which gets its name when it is finished; buckets have it at once."""
    if "://" in str(out):
        yield str(out)
        return
    path = Path(out).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_written_whole(path) as unfinished:
        yield str(unfinished)


def _beside(function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments by which reading and writing find room beside workers that hold every core."""
    cores = {"num_cpus": 0}
    return cores if "num_cpus" in signature(function).parameters else {"ray_remote_args": cores}


class _Classifier:
    """What every worker of `classify` holds."""

    def __init__(
        self, bundle: Any, top: int, threads: int, options: dict[str, Any], folder: str = ""
    ):
        torch.set_num_threads(threads)
        ray = imported("ray", "ray")
        held = ray.get(bundle) if isinstance(bundle, ray.ObjectRef) else bundle
        self.net = _unpacked(_Hashed(held))
        self.top, self.options = top, options
        self.folder = folder  # that relative paths start from

    def __call__(self, batch: Any) -> Any:
        """Rows as a table whose types do not depend on what is in it."""
        arrow = imported("pyarrow", "ray")
        names = [os.fsdecode(name) for name in batch["path"].to_pylist()]
        rows = [self._classified(*row) for row in zip(names, batch["error"].to_pylist())]
        classes, probabilities, errors = zip(*rows)
        columns = {
            "path": (arrow.string(), list(map(readable, names))),
            "classes": (arrow.list_(arrow.string()), classes),
            "probabilities": (arrow.list_(arrow.float32()), probabilities),
            "error": (arrow.string(), errors),
        }
        return arrow.table({k: arrow.array(v, kind) for k, (kind, v) in columns.items()})

    def _classified(self, name: str, error: str) -> tuple[list[str], list[float], str]:
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
    """A file as a path of this machine; a temporary copy of what lies in a store.

    Raises:
        ImageError: if it cannot be read; the message names the URI and no copy.
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


# -- the network on its way -----------------------------------------------------------------------


def started(address: str | None) -> Any:
    """Ray, connected: to what runs already, to a cluster, or to one started on this machine.

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


def packed(net: FullyConvolutional) -> Bundle:
    """A network as the files that `FullyConvolutional.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        saved = net.save(Path(folder) / "net")
        return {file.name: file.read_bytes() for file in saved.iterdir()}


class _Hashed:
    """A bundle as a key: equal if the hashes of its files are."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self._key = tuple(sorted((name, hash(bytes(data))) for name, data in bundle.items()))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self._key == other._key


@lru_cache(maxsize=1)
def _unpacked(bundle: _Hashed) -> FullyConvolutional:
    from fcvgg.loading import load

    with tempfile.TemporaryDirectory() as folder:
        for name, data in bundle.bundle.items():
            (Path(folder) / name).write_bytes(data)
        return load(folder)
