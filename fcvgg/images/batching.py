"""Inputs of equal size, run together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")
Group = TypeVar("Group", bound=Hashable)

BATCH_PIXELS = 1 << 20
"""Pixels run at once; a larger image runs alone."""

_HELD_BATCHES = 4
"""Batches whose images may wait for others of their size."""


def run_in_batches(
    inputs: Iterable[tuple[Key, Group, Tensor]],
    run: Callable[[Group, Tensor], Tensor],
    most: int | None = None,
) -> Iterator[tuple[Key, Tensor]]:
    """Every input's result, in an order of its own: inputs of one group and size run together.

    The inputs are taken one by one, and the pixels held are limited, so that memory is bounded.

    Args:
        inputs: ``(key, group, image)`` with images ``(1, C, H, W)``.
        run: gives one row per image for a group and a batch ``(N, C, H, W)``.
        most: images run at once; as many as come to `BATCH_PIXELS` when None.

    Yields:
        ``(key, row)`` for every input.
    """
    waiting: dict[Hashable, list[tuple[Key, Group, Tensor]]] = {}
    held = 0
    size_of, limit = (_pixels, BATCH_PIXELS) if most is None else (_count, most)

    def flush(kind: Hashable) -> Iterator[tuple[Key, Tensor]]:
        nonlocal held
        batch = waiting.pop(kind)
        held -= size_of(batch)
        rows = run(batch[0][1], torch.cat([image for _, _, image in batch]))
        yield from zip((key for key, _, _ in batch), rows)

    for key, group, image in inputs:
        kind: Hashable = (group, image.shape, image.dtype, image.device)
        same = waiting.setdefault(kind, [])
        if same and size_of(same) + size_of([(key, group, image)]) > limit:
            yield from flush(kind)
            same = waiting.setdefault(kind, [])
        same.append((key, group, image))
        held += size_of([(key, group, image)])
        while held > _HELD_BATCHES * limit:
            yield from flush(max(waiting, key=lambda k: size_of(waiting[k])))
    for rest in list(waiting):
        yield from flush(rest)


def _count(batch: list[tuple[Key, Group, Tensor]]) -> int:
    return sum(image.shape[0] for _, _, image in batch)


def _pixels(batch: list[tuple[Key, Group, Tensor]]) -> int:
    return sum(image.shape[0] * image.shape[2] * image.shape[3] for _, _, image in batch)
