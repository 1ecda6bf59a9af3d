"""Batches and augmentation that depend on seed, epoch and index only.

Neither the number of workers nor an interruption changes what a network is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from hashlib import blake2b
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler


def mixed_seed(*numbers: int) -> int:
    """A seed of 63 bits that depends on all numbers, on their order and on their count."""
    digest = blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class EpochSampler(Sampler[tuple[int, int]]):
    """``(epoch, index)`` for every item of a dataset, shuffled by seed and epoch."""

    def __init__(self, dataset: Sized, seed: int, epoch: int):
        self.count = len(dataset)
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        for index in torch.randperm(self.count, generator=generator).tolist():
            yield self.epoch, index

    def __len__(self) -> int:
        return self.count


class SeededItems(Dataset[Any]):
    """A dataset whose items are drawn with a seed of their own, by ``(epoch, index)``.

    Only torch's CPU generator is seeded, from which torchvision's transforms draw; its state is
    restored.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        state = torch.get_rng_state()
        # not torch.manual_seed, which would also set the generators of the devices
        torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, index))
        try:
            return self.dataset[index]
        finally:
            torch.set_rng_state(state)

    def __len__(self) -> int:
        return len(self.dataset)
