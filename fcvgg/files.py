"""Writing files so that a failure leaves nothing half-done."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fcvgg.errors import FcvggError, one_line


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name if the block ends without an error.

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
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise FcvggError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: Path, own: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name if the block ends without an error.

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
