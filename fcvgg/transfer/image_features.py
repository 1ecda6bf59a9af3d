"""Images of any kind and size to rows of features: read, preprocessed, batched, pooled, cached."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fcvgg.choices import Pooling
from fcvgg.errors import (
    ArgumentError,
    ConversionError,
    FcvggError,
    ImageError,
    check_choice,
    check_integer,
)
from fcvgg.geometry import Pair, checked_size
from fcvgg.images.pipelines import given_preprocess
from fcvgg.images.preprocessing import PreprocessLike
from fcvgg.images.reading import prepare
from fcvgg.loading import load
from fcvgg.network import FullyConvolutional
from fcvgg.rewriting.capture import input_channels
from fcvgg.support.atomic import atomic_file, checked_folder
from fcvgg.support.module_state import device_of, dtype_of, evaluating
from fcvgg.support.progress import progress_bar
from fcvgg.transfer.extraction import Features, features_upto
from fcvgg.transfer.naming import layer_names

POOLINGS = (*get_args(Pooling), None)


class FeatureExtractor:
    """The features of named layers for images.

    Args:
        model: a converted network, any other model with `preprocess`, or a name or file for
            `fcvgg.load`.
        layers: names as for `features_upto`.
        pooling: ``"avg"`` or ``"max"`` over a map's positions, so that an image of any size gives
            one number per channel; None keeps all positions.
        size: None keeps an image's size; an int is its smaller side, ``(h, w)`` its size.
        preprocess: how images become input; the network's own when None.
        value_range: the values ``(black, white)`` of images that are not ``uint8``, in place of
            the preprocessing's.
        batch_size: images of one size that run at once.
        cache: None, ``"memory"``, or a folder.
        progress: show a bar on stderr.
        device: where to run; where the model is when None.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        layers: Sequence[str],
        *,
        pooling: Pooling | None = "avg",
        size: int | Iterable[int] | None = None,
        preprocess: PreprocessLike | None = None,
        value_range: tuple[float, float] | None = None,
        batch_size: int = 16,
        cache: str | Path | None = None,
        progress: bool = False,
        device: str | torch.device | None = None,
    ):
        check_choice("pooling", pooling, POOLINGS)
        check_integer("batch_size", batch_size, 1)
        self.size = _checked_size(size)
        model = load(model) if isinstance(model, (str, Path)) else model
        own = model.preprocess if isinstance(model, FullyConvolutional) else None
        self.in_channels = (
            model.in_channels if isinstance(model, FullyConvolutional) else input_channels(model)
        )
        given = given_preprocess(preprocess, self.in_channels)
        self.preprocess = own if given is None else given
        if self.preprocess is not None and value_range is not None:
            self.preprocess = replace(self.preprocess, value_range=value_range)
        self.pooling = pooling
        self.batch_size = batch_size
        self.progress = progress
        self._cache = cache_for(cache)
        names = layer_names(model)
        self.layers = tuple(layers)
        order = names.layers
        ends = {layer: names.end_of(layer) for layer in self.layers}
        deepest = max(ends.values(), key=order.index)
        self._children = {layer: end.name.replace(".", "_") for layer, end in ends.items()}
        self.deepest = deepest.name
        self.network: Features = features_upto(model, deepest.path or deepest.name).eval()
        if device is not None:
            self.network.to(device)
        self.least = _least(self.network)
        self._digest = digest_of(self.network) if self._cache is not None else ""

    def rows(self, images: Iterable[Any]) -> dict[str, NDArray[Any]]:
        """The features ``(images, features)`` of every layer, float32."""
        images = list(images)
        if not images:
            raise ImageError("images must hold at least one image, got none")
        found: dict[str, list[NDArray[Any] | None]] = {n: [None] * len(images) for n in self.layers}
        waiting: dict[Pair, list[tuple[int, Tensor, dict[str, str]]]] = defaultdict(list)
        # Images of one size wait until they fill a batch; each row goes to its image's place.
        what = f"features up to {self.deepest}"
        with progress_bar(what, len(images), self.progress) as advance:
            for index, image in enumerate(images):
                pixels = self.pixels(image)
                keys = self._keys(pixels)
                known = {n: self._cache.get(k) for n, k in keys.items()} if self._cache else {}
                if known and all(row is not None for row in known.values()):
                    for name, row in known.items():
                        found[name][index] = row
                else:
                    size = (pixels.shape[2], pixels.shape[3])
                    waiting[size].append((index, pixels, keys))
                    if len(waiting[size]) == self.batch_size:
                        self._run(waiting.pop(size), found)
                advance(1)
            for batch in waiting.values():
                self._run(batch, found)
        return {name: self._stacked(rows) for name, rows in found.items()}

    def pixels(self, image: Any) -> Tensor:
        """The network's input ``(1, C, H, W)`` of an image."""
        pixels = self._read(image)
        size = (pixels.shape[2], pixels.shape[3])
        if self.least is not None and any(n < m for n, m in zip(size, self.least)):
            raise ImageError(
                f"an image of {size} pixels is too small for {self.deepest}, which needs at least "
                f"{self.least}; pass size=, the size to rescale to"
            )
        return pixels

    def _read(self, image: Any) -> Tensor:
        prepared = prepare(image, self.preprocess, self.in_channels)
        if prepared.pixels is not None:
            return self._resized(prepared.pixels)
        assert self.preprocess is not None
        size = self.preprocess.resize if self.size is None else self.size
        return prepared.tensor(replace(self.preprocess, resize=size))

    def _resized(self, pixels: Tensor) -> Tensor:
        if self.size is None:
            return pixels
        height, width = pixels.shape[2:]
        size = self.size
        if isinstance(size, int):
            scale = size / min(height, width)
            size = (max(round(height * scale), 1), max(round(width * scale), 1))
        if size == (height, width):
            return pixels
        return F.interpolate(
            pixels.float(), size, mode="bilinear", align_corners=False, antialias=True
        ).to(pixels.dtype)

    def _keys(self, pixels: Tensor) -> dict[str, str]:
        if self._cache is None:
            return {}
        return {
            name: key_of(pixels, self._digest, self._children[name], self.pooling)
            for name in self.layers
        }

    @torch.no_grad()
    def _run(
        self,
        batch: Sequence[tuple[int, Tensor, dict[str, str]]],
        found: dict[str, list[NDArray[Any] | None]],
    ) -> None:
        pixels = torch.cat([pixels for _, pixels, _ in batch])  # (N, C, H, W)
        pixels = pixels.to(device_of(self.network), dtype_of(self.network))
        with evaluating(self.network):
            maps = self.network.maps(pixels, self._children.values())
        for name, child in self._children.items():
            rows = self._pooled(maps[child]).float().cpu().numpy()
            for (index, _, keys), row in zip(batch, rows):
                found[name][index] = row.copy()
                if self._cache is not None:
                    self._cache.put(keys[name], row.copy())

    def _pooled(self, maps: Tensor) -> Tensor:
        if maps.ndim == 2 or self.pooling is None:
            return maps.flatten(1)
        return maps.mean((2, 3)) if self.pooling == "avg" else maps.amax((2, 3))

    def _stacked(self, rows: Sequence[NDArray[Any] | None]) -> NDArray[Any]:
        lengths = {len(row) for row in rows if row is not None}
        if len(lengths) > 1:
            raise ImageError(
                f"images of different sizes give {sorted(lengths)} features with pooling=None; "
                "pass size=(h, w), or pooling='avg'"
            )
        return np.stack([row for row in rows if row is not None])


def _least(network: Features) -> Pair | None:
    """The least size that gives features; None where the layers take one size only."""
    try:
        return network.geometry.window
    except ConversionError:
        return None


def _checked_size(size: Any) -> int | Pair | None:
    if size is None:
        return None
    height, width = checked_size(size, error=ArgumentError)
    return (height, width) if isinstance(size, Iterable) else height


# -- features that were computed before -----------------------------------------------------------

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
    """Rows as ``.npy`` files in a folder; features in a broken file are computed again."""

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
        with atomic_file(path) as temporary:
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
    raise ArgumentError(f"cache must be None, 'memory' or a folder, got {cache!r}")


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
