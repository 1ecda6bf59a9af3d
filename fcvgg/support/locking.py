"""A lock for folders that one run at a time may write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fcvgg.errors import FcvggError


@contextmanager
def locked(path: Path, error: type[FcvggError] = FcvggError) -> Iterator[None]:
    """Hold a folder, which need not exist yet, against other processes and threads.

    The lock is a file next to the folder. The system releases it when the process ends, whatever
    ends it. The thread that holds it may enter again.

    Args:
        error: the class of the error.

    Raises:
        FcvggError: of the class `error`, if another run holds the folder.
    """
    path = path.resolve()
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, blocking=False, is_singleton=True)
    try:
        if path.parent.is_dir():
            lock.acquire()
    except Timeout:
        raise error(
            f"{path} is in use by another run; wait for it to end, or choose another folder"
        ) from None
    except OSError:  # cannot be written, or a file system without locks: writing itself will tell
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            if lock.lock_counter == 1:
                with suppress(OSError):  # Windows removes no open file
                    file.unlink()
            lock.release()
