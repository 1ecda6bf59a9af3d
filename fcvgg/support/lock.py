"""A lock for folders that two runs could write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fcvgg.errors import FcvggError

LOCK = ".lock"


@contextmanager
def locked(folder: Path, error: type[FcvggError] = FcvggError) -> Iterator[None]:
    """Hold a folder against other processes and threads; the thread that holds it may enter again.

    Args:
        folder: a folder that exists; it has a file ``.lock`` meanwhile.
        error: the class of the error.

    Raises:
        FcvggError: of the class `error`, if another run holds the folder.
    """
    lock = FileLock(folder / LOCK, blocking=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as cause:
        raise error(
            f"{folder} is in use by another run; wait for it, or choose another folder"
        ) from cause
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
