"""HDF5 files from strangers: what they may hold, and a look at them in a process of its own.

HDF5 can read from other files (external storage, links, virtual data), claim arrays of any size,
and a flipped bit in its headers can send the C library into an endless loop, which Python cannot
interrupt. So this file, run as a script, opens a file, checks every object and reads every array,
as `fcvgg.sources.keras_file` does afterwards; `check` runs it within limits of time and memory. As
a script it imports h5py and NumPy alone, which takes 0.3 s.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MOST_OBJECTS = 100_000
_DEPTH = 64

_SECONDS = 20
_BYTES_PER_SECOND = 20_000_000
"""Reading compressed weights from a slow disk takes less."""

_ATTRIBUTE_BYTES = 16 << 20
_REFUSED = 3
"""Exit status of the script where it gives a reason."""


def check(path: str | Path, allowed: int) -> str | None:
    """Why an HDF5 file cannot be read; None where it can.

    Args:
        allowed: bytes that its arrays may take together.
    """
    if not sys.executable:
        return None
    script = "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    script += "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    seconds = _SECONDS + os.stat(path).st_size // _BYTES_PER_SECOND
    command = [sys.executable, "-I", "-c", script, json.dumps(sys.path), __file__]
    try:
        done = subprocess.run(
            [*command, str(path), str(allowed)],
            capture_output=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"reading it took more than {seconds} s, as broken headers make it"
    except OSError:  # no processes here: it is read without the look
        return None
    if done.returncode == 0:
        return None
    if done.returncode == _REFUSED:
        return done.stdout.decode("utf-8", "replace").strip()
    return f"the HDF5 library failed on it (exit status {done.returncode})"


def read_array(dataset: Any) -> Any:
    """A dataset as an array.

    Raises:
        ValueError: if it is not an array of real numbers.
    """
    import h5py
    import numpy as np

    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"it must hold arrays, got a {type(dataset).__name__} for one")
    if dataset.dtype.kind not in "fiu":
        raise ValueError(f"{dataset.name} must hold real numbers, got {dataset.dtype}")
    return np.asarray(dataset)


def _check_objects(file: Any, allowed: int) -> Iterator[Any]:
    """The arrays of a file, which has nothing but groups and arrays of its own.

    Raises:
        ValueError: if it has anything else, or claims too much.
    """
    import h5py

    claimed = count = 0
    seen: set[Any] = set()
    waiting = [(file["/"], 0)]
    while waiting:
        group, depth = waiting.pop()
        claimed += sum(_claimed_by_attribute(group, name) for name in group.attrs)
        for name in group if isinstance(group, h5py.Group) else ():
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                kind = type(link).__name__.removesuffix("Link").lower()
                raise ValueError(f"{group.name}/{name} must be held in the file, got a {kind} link")
            child = group[name]
            # groups may be linked in circles: each object is looked at once, by its address
            place = h5py.h5o.get_info(child.id).addr if hasattr(child, "id") else name
            if place in seen:
                continue
            seen.add(place)
            count += 1
            if count > _MOST_OBJECTS or depth > _DEPTH:
                raise ValueError(f"it must hold at most {_MOST_OBJECTS:,} objects, got more")
            if isinstance(child, h5py.Dataset):
                claimed += _claimed_by(child)
                yield child
            elif not isinstance(child, h5py.Group):
                continue
            waiting.append((child, depth + 1))
            if claimed > allowed:
                raise ValueError(
                    f"its arrays must take at most {allowed:,} bytes by the size of the file, got "
                    f"{claimed:,}; the file is broken or made to exhaust memory"
                )


def _claimed_by_attribute(item: Any, name: str) -> int:
    """The bytes of an attribute, which is read too: some cannot be, and only end this process."""
    attribute = item.attrs.get_id(name)
    size = math.prod(attribute.shape) * attribute.dtype.itemsize
    if size > _ATTRIBUTE_BYTES:
        raise ValueError(
            f"the attribute {name} of {item.name} must take at most {_ATTRIBUTE_BYTES:,} bytes, "
            f"got {size:,}"
        )
    with contextlib.suppress(Exception):
        item.attrs[name]
    return size


def _claimed_by(dataset: Any) -> int:
    """The bytes that an array takes, which must be data of this file."""
    if dataset.external:
        raise ValueError(f"{dataset.name} must be held in the file, got external storage")
    if dataset.is_virtual:
        raise ValueError(f"{dataset.name} must be held in the file, got a virtual dataset")
    size = int(dataset.nbytes or 0)
    if size and not dataset.id.get_storage_size():
        raise ValueError(f"{dataset.name} must hold data, got none stored for {size:,} bytes")
    # a chunk is decompressed whole, and may be declared larger than the array
    chunk = dataset.chunks or ()
    for extent in chunk:
        size = max(size, int(extent) * dataset.dtype.itemsize)
    return size


def _main(path: str, allowed: int) -> None:
    """Print why a file cannot be read and end with `_REFUSED`, or end well."""
    import h5py

    try:
        with _opened(path) as content, h5py.File(content, "r") as file:
            for dataset in list(_check_objects(file, allowed)):
                if dataset.dtype.kind in "fiu":
                    read_array(dataset)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        sys.stdout.buffer.write(lines[0].encode("utf-8", "backslashreplace"))
        sys.exit(_REFUSED)


def _opened(path: str) -> Any:
    """The HDF5 file, or the one that a ``.keras`` archive holds."""
    import io
    import zipfile

    if path.endswith(".keras"):
        with zipfile.ZipFile(path) as archive:
            return io.BytesIO(archive.read("model.weights.h5"))
    return open(path, "rb")


if __name__ == "__main__":
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2 * int(sys.argv[2]) + (1 << 31),) * 2)
    except (ImportError, OSError, ValueError):  # of systems without limits
        pass
    _main(sys.argv[1], int(sys.argv[2]))
