"""One heatmap from score maps of several scales of an image.

Objects larger or smaller than the window show up at the scale at which they fit it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

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

    At every pixel the values of all scales are combined, those too that a scale holds beyond its
    outermost cells: the result is as continuous as the scales are, and the maximum is nowhere below
    one of them. A scale without data at a pixel does not count there.

    Args:
        maps: of one image, with its size as ``image_size``.
        target: a class index or category name; None for the top class of the mean prediction.
        combine: ``"max"`` or ``"mean"``.

    Raises:
        ArgumentError: if `combine` is neither, or there are no maps.
        ImageError: if no cell of any map has data.
    """
    if combine not in COMBINATIONS:
        raise ArgumentError(f"combine={combine!r} is unknown; expected 'max' or 'mean'")
    if not maps:
        raise ArgumentError("no scales were given; expected at least one smaller side in pixels")
    useful = [one for one in maps if one.has_data.any()]
    if not useful:
        maps[0].require_data()
    if target is None:
        index = int(torch.stack([one.predict() for one in useful]).mean(0).argmax())
    else:
        index = class_index(target, maps[0].categories, len(maps[0].scores))
    first, *others = useful
    heatmap = first.heatmap(index)
    values, coverage, windows = heatmap.values, heatmap.coverage, [heatmap.windows]
    counts = (~np.isnan(values)).astype(np.uint8)
    if combine == "mean":
        np.nan_to_num(values, copy=False)
    for one in others:
        further = one.heatmap(index)
        known = ~np.isnan(further.values)
        if combine == "max":
            np.fmax(values, further.values, out=values)
        else:
            np.add(values, further.values, out=values, where=known)
            counts += known
        coverage |= further.coverage
        windows.append(further.windows)
    if combine == "mean":
        values = np.where(counts, values / np.maximum(counts, 1), np.nan).astype(np.float32)
    return replace(
        heatmap,
        values=values,
        coverage=coverage,
        windows=CellWindows.joined(w for w in windows if w is not None),
    )
