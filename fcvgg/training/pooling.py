"""Pooling heads: from score maps to one score for each image, for labels of whole images.

All take maps ``(N, K, h, w)``, such as a network's or `fcvgg.FullyConvolutional.streamed`'s, and
give ``(N, K)``. Cells that hold NaN in any class, as those that see missing pixels do, are left
out; an image without other cells gets NaN.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor, nn

from fcvgg.errors import ArgumentError, check_integer


class _Pool(nn.Module):
    """Pools the cells with data; an image without any gets NaN."""

    def forward(self, maps: Tensor) -> Tensor:
        """Scores ``(N, K)`` of maps ``(N, K, h, w)``.

        Raises:
            ArgumentError: if the maps have another shape.
        """
        values, present = _divided(maps)
        return self._pooled(values, present).masked_fill(~present.any(1)[:, None], torch.nan)

    def _pooled(self, values: Tensor, present: Tensor) -> Tensor:
        raise NotImplementedError


def _divided(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Values ``(N, K, h w)`` of cells, 0 without data, and whether they have data ``(N, h w)``."""
    if maps.ndim != 4:
        raise ArgumentError(
            f"maps must be (N, K, h, w), got {tuple(maps.shape)}; add the batch with maps[None]"
        )
    missing = maps.isnan().any(1).flatten(1)  # (N, h w)
    return maps.flatten(2).masked_fill(missing[:, None], 0), ~missing


class MeanPool(_Pool):
    """The mean over all cells, as in "Network In Network" (https://arxiv.org/abs/1312.4400).

    For evidence that is spread over the image. What is small is outweighed by the rest.
    """

    def _pooled(self, values: Tensor, present: Tensor) -> Tensor:
        return values.sum(2) / present.sum(1)[:, None]


class TopSharePool(_Pool):
    """The mean of each class's largest cells, a share of all; at least one cell.

    For evidence in a small part of the image, as in "Classification and Disease Localization in
    Histopathology Using Only Global Labels" (https://arxiv.org/abs/1802.02212).

    Args:
        share: of the cells, above 0 and at most 1, which gives the mean of all.
    """

    def __init__(self, share: float = 0.1):
        super().__init__()
        if not 0 < share <= 1:
            raise ArgumentError(f"share must be above 0 and at most 1, got {share!r}")
        self.share = share

    def extra_repr(self) -> str:
        return f"share={self.share}"

    def _pooled(self, values: Tensor, present: Tensor) -> Tensor:
        # rounding must not make 0.1 * 30 cells four
        count = (present.sum(1).double() * self.share - 1e-9).ceil().clamp_min(1)  # (N,)
        ranked = values.masked_fill(~present[:, None], -torch.inf).sort(2, descending=True).values
        chosen = torch.arange(values.shape[2], device=values.device) < count[:, None]  # (N, h w)
        return ranked.masked_fill(~chosen[:, None], 0).sum(2) / count[:, None].to(values.dtype)


class LogSumExpPool(_Pool):
    """A smooth maximum: ``log(mean(exp(sharpness * score))) / sharpness`` over the cells.

    Every cell learns, in proportion to the exponential of its score ("From Image-level to
    Pixel-level Labeling with Convolutional Networks", https://arxiv.org/abs/1411.6228).

    Args:
        sharpness: above 0; the mean as it goes to 0, the maximum as it grows.
    """

    def __init__(self, sharpness: float = 4.0):
        super().__init__()
        if not (sharpness > 0 and isfinite(sharpness)):
            raise ArgumentError(f"sharpness must be above 0 and finite, got {sharpness!r}")
        self.sharpness = sharpness

    def extra_repr(self) -> str:
        return f"sharpness={self.sharpness}"

    def _pooled(self, values: Tensor, present: Tensor) -> Tensor:
        exponents = (values * self.sharpness).masked_fill(~present[:, None], -torch.inf)
        total = exponents.logsumexp(2) - present.sum(1)[:, None].to(values.dtype).log()
        return total / self.sharpness


class AttentionPool(_Pool):
    """A mean of the cells with weights that are learnt: gated attention.

    The weights of an image's cells add up to 1. They are computed from each cell's own channels
    ("Attention-based Deep Multiple Instance Learning", https://arxiv.org/abs/1802.04712, section
    2.4), so maps of features serve better than those of two classes.

    Args:
        channels: of the maps.
        hidden: units of the attention's hidden layer.
    """

    def __init__(self, channels: int, hidden: int = 128):
        super().__init__()
        check_integer("channels", channels, 1)
        check_integer("hidden", hidden, 1)
        self.content = nn.Linear(channels, hidden)
        self.gate = nn.Linear(channels, hidden)
        self.attention = nn.Linear(hidden, 1, bias=False)

    def weights(self, maps: Tensor) -> Tensor:
        """What each cell counts for, ``(N, 1, h, w)``; 0 for cells that hold NaN.

        Raises:
            ArgumentError: if the maps are not ``(N, K, h, w)``.
        """
        return self._weights(*_divided(maps)).view(len(maps), 1, *maps.shape[2:])

    def _pooled(self, values: Tensor, present: Tensor) -> Tensor:
        return (values * self._weights(values, present)[:, None]).sum(2)

    def _weights(self, values: Tensor, present: Tensor) -> Tensor:
        cells = values.transpose(1, 2)  # (N, h w, K)
        hidden = self.content(cells).tanh() * self.gate(cells).sigmoid()
        logits = self.attention(hidden)[..., 0].masked_fill(~present, -torch.inf)  # (N, h w)
        weights: Tensor = logits.softmax(1).masked_fill(~present, 0)  # not NaN without any cell
        return weights
