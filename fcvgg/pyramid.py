"""One heatmap from score maps of several scales of an image.

Objects larger or smaller than the window show up at the scale at which they fit it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fcvgg.boxes import CellWindows
from fcvgg.categories import class_index
from fcvgg.errors import ArgumentError
from fcvgg.heatmap import Heatmap
from fcvgg.score_map import ScoreMap

COMBINATIONS = ("max", "mean")


def pyramid_heatmap(
    maps: Sequence[ScoreMap], target: int | str | None = None, combine: str = "max"
) -> Heatmap:
    """One class's probability at every pixel, from several scales.

    Where some maps cover a pixel with their cells, these are combined, and values that others only
    hold beyond their outermost cells do not count; elsewhere the held values are combined.

    Args:
        maps: of one image, with its size as ``image_size``.
        target: a class index or category name; None for the top class of the mean prediction.
        combine: ``"max"`` or ``"mean"``.

    Raises:
        ArgumentError: if `combine` is neither, or there are no maps.
    """
    if combine not in COMBINATIONS:
        raise ArgumentError(f"combine={combine!r} is unknown; expected 'max' or 'mean'")
    if not maps:
        raise ArgumentError("no scales were given; expected at least one smaller side in pixels")
    if target is None:
        index = int(torch.stack([one.predict() for one in maps]).mean(0).argmax())
    else:
        index = class_index(target, maps[0].categories, len(maps[0].scores))
    heatmaps = [one.heatmap(index) for one in maps]
    values = np.stack([one.values for one in heatmaps])  # (scales, H, W)
    coverage = np.stack([one.coverage for one in heatmaps])
    return Heatmap(
        values=_combined(values, coverage, combine),
        coverage=np.asarray(coverage.any(0)),
        label=heatmaps[0].label,
        image=heatmaps[0].image,
        windows=CellWindows.joined(one.windows for one in heatmaps if one.windows is not None),
    )


def _combined(
    values: NDArray[np.float32], coverage: NDArray[np.bool_], combine: str
) -> NDArray[np.float32]:
    counted = coverage | ~coverage.any(0)
    if combine == "max":
        return np.where(counted, values, 0).max(0)
    return (np.where(counted, values, 0).sum(0) / counted.sum(0)).astype(np.float32)
