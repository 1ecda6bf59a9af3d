"""Writing files: names that say what is in them, and nothing half-done after a failure."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fcvgg.errors import ArgumentError, FcvggError, one_line

_FORMATS = frozenset(
    f".{name}"
    for name in (
        *("png", "jpg", "jpeg", "jp2", "webp", "bmp", "gif", "ico", "ppm", "pgm", "svg", "pdf"),
        *("eps", "ps", "tif", "tiff", "svs", "ndpi", "mrxs", "dcm", "nii", "vrt", "img"),
        *("npy", "npz", "mat", "h5", "hdf5", "hdf", "nc", "zarr", "n5"),
        *("pt", "pth", "ckpt", "pt2", "onnx", "keras", "safetensors", "pb", "tflite", "bin", "pkl"),
        *("pickle", "joblib", "gguf", "mlmodel", "engine", "caffemodel", "t7", "torchscript"),
        *("zip", "tar", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar"),
        *("csv", "tsv", "json", "jsonl", "ndjson", "parquet", "feather", "arrow", "xlsx", "xls"),
        *("geojson", "gpkg", "shp", "kml", "xml", "yaml", "yml", "toml", "txt", "log", "md"),
        *("html", "htm", "py", "ipynb", "db", "sqlite", "mp4", "avi"),
    )
)
"""Endings by which people and programs know what a file holds."""

HEATMAP_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".ppm", ".eps"),
    *(".pdf", ".npy"),
)
"""What Pillow writes pixel for pixel, and NumPy's format for the values."""

FIGURE_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".pdf", ".svg", ".svgz", ".eps"),
    ".ps",
)
"""What matplotlib writes without other programs."""

EXPORT_ENDINGS = (".onnx", ".pt2")
CSV_ENDINGS = (".csv", ".txt")
PAGE_ENDINGS = (".html", ".htm")
JSON_ENDINGS = (".json", ".txt")
STORE_ENDINGS = (".zarr",)
TABLE_ENDINGS = (".parquet",)
VENDOR_ENDINGS = (
    *(".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".isyntax", ".czi"),
)
"""What scanners of slides write."""


def checked_folder(
    path: str | os.PathLike[str], name: str, endings: Sequence[str] = (), remedy: str = ""
) -> Path:
    """The path of a folder to write, whose name does not end as a file of another format does.

    A folder that has the name already may keep it.

    Args:
        path: where to write.
        name: the argument or option that says so.
        endings: those that such a folder may have; one of no known format is always allowed.
        remedy: what else there is to do.

    Raises:
        ArgumentError: if the ending is that of another format.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS - set(endings) or path.is_dir():
        return path
    stem = path
    while stem.suffix.lower() in _FORMATS:
        stem = stem.with_suffix("")
    what = f"a folder in {' or '.join(endings)}" if endings else "a folder"
    use = f"{stem.name}{endings[0] if endings else ''}"
    raise ArgumentError(
        f"{name} must be the name of {what}, got {path.name!r}, the name of a "
        f"{path.suffix.lower()} file; use {use!r}{remedy}"
    )


def checked_file(
    path: str | os.PathLike[str],
    name: str,
    endings: Sequence[str],
    error: type[FcvggError] = ArgumentError,
) -> Path:
    """The path of a file to write, whose name ends as its format demands.

    Args:
        path: where to write.
        name: the argument or option that says so.
        endings: those of the formats that can be written.
        error: what is raised.

    Raises:
        FcvggError: of the class `error`, if the name ends otherwise.
    """
    path = Path(path)
    if path.suffix.lower() in endings:
        return path
    *most, last = endings
    listed = f"{', '.join(most)} or {last}" if most else last
    raise error(f"{name} must be a name in {listed}, got {path.name!r}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file next to `path` that takes its name if the block ends without an error.

    Raises:
        FcvggError: if the folder does not exist or cannot be written.
    """
    if not path.parent.is_dir():
        raise FcvggError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent
        )
    except OSError as error:
        raise FcvggError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp lets the owner alone read it
        temporary.replace(path)
    except OSError as error:
        raise FcvggError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, own: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder next to `path` that takes its name if the block ends without an error.

    A folder that had the name is removed only then; its files that are not its `own`, by name, go
    over to the new one.

    Raises:
        FcvggError: if the folder around it does not exist or cannot be written.
    """
    if not path.parent.is_dir():
        raise FcvggError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _replace_folder(path, temporary, own)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise FcvggError(f"cannot write {path}: {error.strerror or one_line(error)}") from error


def _replace_folder(path: Path, new: Path, own: Iterable[str]) -> None:
    """Give a finished folder its name."""
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(f".{path.name}-replaced")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    for added in old.iterdir():
        if added.name not in own:
            added.rename(path / added.name)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
