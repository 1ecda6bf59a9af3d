"""A lock for folders that one run at a time may write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fcvgg.errors import FcvggError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder, which need not exist yet.

    The lock is a file next to the folder. The system releases it when the process ends, whatever
    ends it.

    Raises:
        FcvggError: if another run holds the lock.
    """
    path = path.resolve()
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, blocking=False)
    try:
        if path.parent.is_dir():
            lock.acquire()
    except Timeout:
        raise FcvggError(
            f"{path} must be written by one run at a time, got another run that is writing it; "
            "wait for it to end, or choose another name"
        ) from None
    except OSError:  # cannot be written, or a file system without locks: writing itself will tell
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes no open file
                file.unlink()
            lock.release()
