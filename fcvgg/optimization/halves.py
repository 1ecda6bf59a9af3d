"""A 3x3 convolution of one small map with many channels, as that of a batch of its two halves.

oneDNN shares one map among two threads by blocks of rows and channels that fit badly: of 32x32
positions and 512 channels in bfloat16, 2.2 ms are 1.9 when each thread has its half
(`examples/benchmarks/NOTES.md`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fcvgg.optimization.processor import has_amx

_THREADS = 2
"""The only number for which it was measured, besides one thread, where it gains nothing."""

_LEAST_ROWS = 20
"""Rows below which the copy costs more than it gains."""

_MOST_POSITIONS = 48 * 48
"""Positions up to which it gains."""

_LEAST_CHANNELS = 512
"""Output channels from which it gains."""


def gains_by_halves(x: Tensor, out_channels: int) -> bool:
    """Whether a convolution of ``(N, C, H, W)`` maps to so many channels is faster by halves."""
    batch, _, height, width = x.shape
    return (
        (batch == 1 and x.dtype == torch.bfloat16)
        and (height >= _LEAST_ROWS and height * width <= _MOST_POSITIONS)
        and (out_channels >= _LEAST_CHANNELS and torch.get_num_threads() == _THREADS)
        and has_amx()
    )


def halves(x: Tensor) -> Tensor:
    """``(2, C, h + 2, W)``, channels last, of ``(1, C, H, W)`` with h half of H, rounded up.

    Each half has the rows around it that a 3x3 convolution reads: the other half's, or zeros.
    """
    rows = x.permute(0, 2, 3, 1)[0]
    height = -(-len(rows) // 2)
    both = rows.new_empty(2, height + 2, *rows.shape[1:])
    upper, lower = rows[: height + 1], rows[height - 1 :]
    both[0, 0] = 0
    both[0, 1:] = upper
    both[1, : len(lower)] = lower
    both[1, len(lower) :] = 0
    return both.permute(0, 3, 1, 2)


def joined_halves(scores: Tensor, height: int) -> Tensor:
    """``(1, O, H, W)`` of the scores ``(2, O, h, W)`` of both halves, without a copy."""
    rows = scores.permute(0, 2, 3, 1).flatten(0, 1)
    return rows[None, :height].permute(0, 3, 1, 2)
