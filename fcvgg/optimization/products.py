"""The products of Winograd's algorithm: transformed tiles times transformed kernels.

At every position of a tile (36 of them for 3x3 kernels) the tiles are multiplied by another matrix.
Two libraries can do that. torch's products of stacked matrices are MKL's, which reach the peak of
an Intel processor, and 0.6 of it where MKL takes it for AMD's; oneDNN's convolutions in groups
reach 0.85 in both cases (`examples/benchmarks/NOTES.md`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fcvgg.inference.memory import on_huge_pages


class Kernels:
    """The transformed kernels of a layer. A pickle holds them as they were given.

    Args:
        blocks: ``(P, C, F)`` each: the kernels of F features at P positions, in order.

    Attributes:
        most_features: F of a block at most; None where any number is as fast.
        tiles_per_thread: tiles that are transformed at a time, for every thread.
        least_tiles: T at least; fewer are filled up with others, whose outputs are dropped.
    """

    most_features: ClassVar[int | None]
    tiles_per_thread: ClassVar[int]
    least_tiles = 1

    def __init__(self, blocks: Iterable[Tensor]):
        self._blocks: list[Any] = [on_huge_pages(self._packed(block)) for block in blocks]

    @classmethod
    def of(cls, blocks: Iterable[Tensor]) -> Kernels:
        """Of blocks of any number of features."""
        return cls(
            part
            for block in blocks
            for part in block.split(cls.most_features or block.shape[2], dim=2)
        )

    def outputs(self, tiles: Tensor, transform: Tensor) -> Iterator[Tensor]:
        """The outputs of tiles, for one block of features after the other.

        Args:
            tiles: ``(T, P, C)``, transformed.
            transform: ``(S, P)``, from the products of a tile to its S outputs.

        Yields:
            ``(T, S, F)``.
        """
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the kernels."""
        return sum(block.numel() * block.element_size() for block in self._blocks)

    def _packed(self, block: Tensor) -> Any:
        """A block as the products read it."""
        raise NotImplementedError

    def _unpacked(self, packed: Any) -> Tensor:
        """The block ``(P, C, F)`` that `_packed` was given."""
        raise NotImplementedError

    def __reduce__(self) -> Any:
        return type(self), (list(map(self._unpacked, self._blocks)),)


class StackedKernels(Kernels):
    """Kernels ``(P, C, F)``, for products of stacked matrices."""

    most_features = None
    tiles_per_thread = 64

    def outputs(self, tiles: Tensor, transform: Tensor) -> Iterator[Tensor]:
        stack = tiles.movedim(1, 0)  # (P, T, C)
        if len(self._blocks) > 1:  # each reads it
            stack = stack.contiguous()
        for kernels in self._blocks:
            products = torch.bmm(stack, kernels)  # (P, T, F)
            outputs = transform @ products.flatten(1)  # (S, T*F)
            yield outputs.unflatten(1, products.shape[1:]).movedim(1, 0)

    def _packed(self, block: Tensor) -> Tensor:
        return block.contiguous()

    def _unpacked(self, packed: Tensor) -> Tensor:
        return packed


class GroupedKernels(Kernels):
    """Kernels ``(P*F, C, 1, 1)`` in oneDNN's order, for a convolution in P groups."""

    # oneDNN reorders kernels at every call where it wants another order for the number of tiles,
    # which takes 20 times as long as the products. With up to so many features it wants one order
    # for all numbers, but for AVX-512, for which the order changes at 64.
    most_features = 128
    tiles_per_thread = 128
    least_tiles = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1

    def outputs(self, tiles: Tensor, transform: Tensor) -> Iterator[Tensor]:
        groups = self._positions
        maps = tiles.flatten(1)[None, :, None].permute(0, 3, 1, 2)  # (1, P*C, T, 1)
        for kernels in self._blocks:
            products = torch.ops.mkldnn._convolution_pointwise(
                *(maps, kernels, None, (0, 0), (1, 1), (1, 1), groups, "none", [], "")
            )  # (1, P*F, T, 1)
            yield transform @ products[0, :, :, 0].T.unflatten(1, (groups, -1))

    def _packed(self, block: Tensor) -> Any:
        self._positions, channels, _ = block.shape
        dense = block.transpose(1, 2).reshape(-1, channels, 1, 1)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        shape = (1, self._positions * channels, self.tiles_per_thread, 1)
        return reorder(dense.to_mkldnn(), (0, 0), (1, 1), (1, 1), self._positions, shape)

    def _unpacked(self, packed: Any) -> Tensor:
        dense: Tensor = packed.to_dense()
        return dense.flatten(1).unflatten(0, (self._positions, -1)).transpose(1, 2)
