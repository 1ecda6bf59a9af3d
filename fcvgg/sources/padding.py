"""Padding as TensorFlow's ``same`` means it: as many outputs as strides fit into the input.

It depends on the input's size where the stride is above one, and may be one larger at the end than
at the beginning, which torch's layers do not have.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fcvgg.errors import CaptureError
from fcvgg.geometry import Pair


def same_pads(size: int, kernel: int, stride: int, dilation: int = 1, lower: bool = False) -> Pair:
    """Padding before and after one axis; `lower` puts the odd one before."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    less, more = total // 2, total - total // 2
    return (more, less) if lower else (less, more)


def fixed_same_padding(kernel: Pair, stride: Pair, dilation: Pair) -> Pair | None:
    """The padding of ``same`` where it is equal at both ends and at every size of the input."""
    if stride != (1, 1) or any(d * (k - 1) % 2 for k, d in zip(kernel, dilation)):
        return None
    return dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2


def pad_same(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    dilation: Pair = (1, 1),
    value: float = 0.0,
    lower: bool = False,
) -> Tensor:
    """``(N, C, H, W)`` padded for a layer without padding of its own."""
    (top, bottom), (left, right) = (
        same_pads(n, k, s, d, lower) for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation)
    )
    pads = (left, right, top, bottom)
    return F.pad(x, pads, "constant", value) if any(pads) else x


def average_same(x: Tensor, kernel: Pair, stride: Pair, lower: bool = False) -> Tensor:
    """Average pooling with ``same`` padding, which does not count."""
    pads = [same_pads(n, k, s, 1, lower) for n, k, s in zip(x.shape[2:], kernel, stride)]
    if all(before == after for before, after in pads):
        padding = (pads[0][0], pads[1][0])
        return F.avg_pool2d(x, kernel, stride, padding, count_include_pad=False)
    if all(before == 0 and (after == 0 or s > 1) for (before, after), s in zip(pads, stride)):
        return F.avg_pool2d(x, kernel, stride, ceil_mode=True, count_include_pad=False)
    raise CaptureError(
        f"an average pool {kernel} with stride {stride} and padding 'same' must pad both ends "
        f"alike where the padding does not count, which torch cannot express otherwise, got {pads}"
    )
