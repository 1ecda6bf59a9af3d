"""Features that were computed before, found again by what they were computed from."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fcvgg.errors import ArgumentError, FcvggError
from fcvgg.files import checked_folder, written_whole

MEMORY_LIMIT = 256 * 2**20
"""Bytes of features that the cache in memory keeps; the oldest go first."""

Row = NDArray[Any]


class FeatureCache(Protocol):
    """Rows of features by a key."""

    def get(self, key: str) -> Row | None: ...

    def put(self, key: str, row: Row) -> None: ...


class MemoryCache:
    """Rows in this process's memory, up to a limit of bytes."""

    def __init__(self, limit: int = MEMORY_LIMIT):
        self.limit = limit
        self.size = 0
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def get(self, key: str) -> Row | None:
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def put(self, key: str, row: Row) -> None:
        if key not in self._rows:
            self._rows[key] = row
            self.size += row.nbytes
        while self.size > self.limit:
            _, oldest = self._rows.popitem(last=False)
            self.size -= oldest.nbytes

    def clear(self) -> None:
        self._rows.clear()
        self.size = 0


class DiskCache:
    """Rows as ``.npy`` files in a folder; a broken file is computed anew."""

    def __init__(self, folder: str | Path):
        self.folder = checked_folder(folder, "cache")

    def get(self, key: str) -> Row | None:
        try:
            row: Row = np.load(self._path(key), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return row

    def put(self, key: str, row: Row) -> None:
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FcvggError(f"cannot make the folder {path.parent}: {error.strerror}") from error
        with written_whole(path) as temporary:
            np.save(temporary, row)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npy"


MEMORY = MemoryCache()
"""The cache of ``cache="memory"``: one for the process, so that clones of an estimator share it."""


def cache_for(cache: Any) -> FeatureCache | None:
    """The cache that a user's ``cache=`` means: None, ``"memory"`` or a folder."""
    if cache is None:
        return None
    if cache == "memory":
        return MEMORY
    if isinstance(cache, (str, Path)):
        return DiskCache(cache)
    raise ArgumentError(f"cache={cache!r} is none; expected None, 'memory' or a folder")


def digest_of(module: nn.Module) -> str:
    """A key of what a module computes: its layers and its weights."""
    digest = hashlib.blake2b(repr(module).encode(), digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def key_of(pixels: Tensor, *settings: object) -> str:
    """The key of an image's features: its preprocessed pixels and all settings."""
    digest = hashlib.blake2b(repr((tuple(pixels.shape), *settings)).encode(), digest_size=16)
    digest.update(_bytes(pixels))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
