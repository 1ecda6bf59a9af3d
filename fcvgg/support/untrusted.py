"""What files may claim: limits that are checked before memory is taken for what a file says.

A file from a stranger may say that it is of any size, lead elsewhere, or never end. Readers ask
here for the bytes of a file, for JSON and for the members of archives, and compare what a file
says that it holds with `allowed_bytes`, which follows from the size that it really has.
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fcvgg.errors import FcvggError, LoadError, MissingExtraError, one_line
from fcvgg.support.memory_text import size_text

CONFIG_BYTES = 8 << 20
"""Bytes of a description in JSON; that of a ResNet-152 takes 0.3 MB."""

MOST_NODES = 3_000
"""Nodes, layers or tensors of a model; an EfficientNet-B7 has 1,100 nodes."""

LARGEST_NUMBER = 1 << 16
"""Of kernels, strides, dilations and paddings, in elements."""

_EXPANSION = 8
"""How many times its own size a file may hold, compressed or by naming a part several times."""

_ALWAYS_ALLOWED = 64 << 20


def allowed_bytes(path: str | Path) -> int:
    """Bytes that the contents of a file may take, by its size on disk."""
    return _EXPANSION * os.stat(path).st_size + _ALWAYS_ALLOWED


def check_claim(claimed: int, path: str | Path, what: str) -> None:
    """Raise `LoadError` for what claims more memory than a file of this size can hold."""
    allowed = allowed_bytes(path)
    if claimed > allowed:
        raise LoadError(
            f"{path} must hold at most {size_text(allowed)} of {what} by its own size, got "
            f"{size_text(claimed)}; it is broken or made to exhaust memory"
        )


def check_count(count: int, what: str, most: int = MOST_NODES) -> None:
    """Raise `LoadError` for a model of more parts than any known one has."""
    if count > most:
        raise LoadError(
            f"{what} must be at most {most:,}, got {count:,}; the file is broken or made to "
            "exhaust memory"
        )


# -- files ----------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Errors while a file is read name it in one line: its contents can be wrong in any way.

    Args:
        kind: what the file is read as, with its article.

    Raises:
        LoadError: in place of all errors but those about optional packages.
    """
    try:
        yield
    except MissingExtraError:
        raise
    except Exception as error:  # readers raise errors without a common class
        is_own = isinstance(error, FcvggError)
        if is_own and str(error).startswith(str(path)):
            raise
        name = "" if is_own else f"{type(error).__name__}: "
        raise LoadError(f"{path} cannot be read as {kind}: {name}{one_line(error)}") from error


def check_regular(path: Path, within: Path | None = None) -> None:
    """Refuse devices and pipes, and links that lead out of a folder.

    The links of the Hugging Face hub's cache, from a snapshot to the blobs of its repository or of
    all repositories, stay within it.

    Raises:
        LoadError: if so.
        OSError: if there is no file, or it cannot be looked at.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise LoadError(f"{path} must be a regular file, got a pipe, device or folder")
    if within is None:
        return
    real, folder = path.resolve(), within.resolve()
    caches = folder.parents[1:3] if folder.parent.name == "snapshots" else ()
    homes = [folder, *(cache / "blobs" for cache in caches)]
    if not any(real.is_relative_to(home) for home in homes):
        raise LoadError(
            f"{path} must be a file in {within}, got a link out of it; put the file there itself"
        )


def read_bytes(path: Path, limit: int, within: Path | None = None) -> bytes:
    """The bytes of a regular file that is not larger than `limit`.

    Raises:
        LoadError: if it is larger, no regular file, or a link out of the folder `within`.
        OSError: if it cannot be read.
    """
    check_regular(path, within)
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise LoadError(f"{path} must be at most {size_text(limit)}, got more")
    return data


def parsed_json(text: str | bytes, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """The contents of a description in JSON, or `ValueError`, also if it is too long or deep."""
    if len(text) > CONFIG_BYTES:
        limit, size = size_text(CONFIG_BYTES), size_text(len(text))
        raise ValueError(f"it must be at most {limit}, got {size}")
    try:
        return json.loads(text, parse_constant=parse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


# -- archives -------------------------------------------------------------------------------------


def check_members(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise `LoadError` for an archive whose members claim more than a file of its size can."""
    members = archive.infolist()
    check_count(len(members), f"{path}: the number of members", 10 * MOST_NODES)
    check_claim(sum(member.file_size for member in members), path, "members")


def read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member's bytes, or `LoadError` if it is absent, larger than `limit` or broken."""
    try:
        with archive.open(name) as member:
            data = member.read(limit + 1)
            whole = len(data) <= limit and not member.read(1)  # the end, where the checksum is seen
    except KeyError as error:
        raise LoadError(f"it holds no {name}") from error
    except Exception as error:  # of the decompressors: they have no class in common
        raise LoadError(
            f"its member {name} is broken: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not whole:
        raise LoadError(f"its member {name} must be at most {size_text(limit)}, got more")
    return data


def numbers_within(values: Iterable[Any], least: int, what: str) -> None:
    """Raise `LoadError` for kernels, strides and the like that no known layer has."""
    for value in values:
        if type(value) is not int or not least <= value <= LARGEST_NUMBER:
            raise LoadError(
                f"{what} must be an integer from {least} to {LARGEST_NUMBER:,}, got {value!r}"
            )
