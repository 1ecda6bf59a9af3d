"""Bilinear upsampling by transposed convolution, in the phase that geometry asks for.

A transposed convolution of stride f gives f outputs for every cell. The image pixel of an output
depends on the cells' centres, so `AxisUpsampling` computes the kernel's phase and the part of the
result that is kept from both grids, for one axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.errors import GeometryError
from fcvgg.geometry import Axis, Geometry, Pair

PIXELS = Geometry(Axis(), Axis())
"""The grid of the image itself: stride 1, the first centre at 0."""


@dataclass(frozen=True)
class AxisUpsampling:
    """How cells become the positions of a finer grid along one axis.

    Position m lies ``(m + shift) / factor`` cells after cell 0.
    """

    factor: int
    shift: float

    @classmethod
    def between(cls, cells: Axis, grid: Axis) -> AxisUpsampling:
        """From the cells of one axis to the positions of a finer one.

        Raises:
            GeometryError: if a cell does not span a whole number of positions.
        """
        factor, rest = divmod(cells.stride, grid.stride)
        if rest or factor < 1:
            raise GeometryError(
                f"the stride of the finer grid must divide that of the cells, {cells.stride}, got "
                f"{grid.stride}"
            )
        return cls(factor, (grid.centre_of(0) - cells.centre_of(0)) / grid.stride)

    @property
    def first_tap(self) -> int:
        """The first position, counted from ``factor * i``, to which cell i contributes."""
        return floor(-self.shift - self.factor) + 1

    def kernel(self) -> Tensor:
        """The weights of linear interpolation, ``(taps,)``: a triangle over two cells."""
        last = ceil(self.factor - self.shift) - 1
        taps = torch.arange(self.first_tap, last + 1, dtype=torch.float64)
        return 1 - (taps + self.shift).abs() / self.factor

    def reach(self, positions: int) -> Pair:
        """The half-open range of cells that `positions` outputs are interpolated from.

        It exceeds the map where positions lie outside the outermost centres.
        """
        low = floor(self.shift / self.factor)
        return low, max(ceil((positions - 1 + self.shift) / self.factor), low) + 1

    def first_kept(self, low: int) -> int:
        """The index of position 0 in the transposed convolution of the cells from `low` on."""
        return -self.first_tap - self.factor * low


class BilinearUpsampling(nn.Module):
    """Resamples maps from one grid to a finer one by a transposed convolution of each channel.

    The kernels are, or if learned start as, linear interpolation between the cells' centres;
    outside the outermost centres the nearest cell's value is held, as in `ScoreMap.resample`.

    Args:
        channels: the number of maps.
        cells: the positions of the given cells.
        grid: the wanted positions; `PIXELS` for the image itself.
        learned: train the kernels, as the paper does between the score layers. Fixed kernels are
            not in `state_dict`.
        dtype: the dtype of the kernels.
    """

    weight: Tensor

    def __init__(
        self,
        channels: int,
        cells: Geometry,
        grid: Geometry,
        learned: bool = False,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.axes = (
            AxisUpsampling.between(cells.height, grid.height),
            AxisUpsampling.between(cells.width, grid.width),
        )
        rows, cols = (axis.kernel() for axis in self.axes)
        kernel = (rows[:, None] * cols).to(dtype or torch.get_default_dtype())
        weight = kernel.expand(channels, 1, -1, -1).clone()  # (K, 1, kh, kw)
        if learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight, persistent=False)

    @property
    def factor(self) -> Pair:
        """Positions per cell ``(h, w)``."""
        return self.axes[0].factor, self.axes[1].factor

    def forward(self, maps: Tensor, size: Pair) -> Tensor:
        """Maps ``(N, K, h, w)`` at the first `size` positions of the grid, ``(N, K, H, W)``."""
        pads: list[int] = []
        kept: list[int] = []
        for axis, cells, positions in zip(self.axes, maps.shape[2:], size):
            low, high = axis.reach(positions)
            pads = [-low, high - cells, *pads]  # torch begins with the last dimension
            kept.append(axis.first_kept(low))
        maps = _held(maps, pads)  # (N, K, high - low, ...)
        finer = F.conv_transpose2d(maps, self.weight, stride=self.factor, groups=maps.shape[1])
        return finer[..., kept[0] : kept[0] + size[0], kept[1] : kept[1] + size[1]]

    def extra_repr(self) -> str:
        learned = "learned" if isinstance(self.weight, nn.Parameter) else "fixed"
        return f"{self.weight.shape[0]}, factor={self.factor}, {learned}"


def _held(maps: Tensor, pads: list[int]) -> Tensor:
    """Maps whose edge cells are repeated where `pads` are positive, cut where negative."""
    if max(pads) > 0:
        maps = F.pad(maps, [max(n, 0) for n in pads], mode="replicate")
    return F.pad(maps, [min(n, 0) for n in pads]) if min(pads) < 0 else maps
