"""The windows of cells as boxes on the image, and the best of those that overlap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import nms

from fcvgg.errors import check_share
from fcvgg.geometry import Geometry, Pair

OVERLAP = 0.3
"""Intersection over union: neighbouring windows have more at common strides, and windows on two
objects that stand apart have less."""


class ScoredBox(NamedTuple):
    """A half-open box of pixels and the probability of what it shows."""

    top: int
    left: int
    bottom: int
    right: int
    score: float


@dataclass(frozen=True, eq=False)
class CellWindows:
    """The windows of cells on an image, from one map or several.

    Attributes:
        boxes: float64 ``(n, 4)``: top, left, bottom, right in pixels of the image, half-open; they
            may leave the image.
        scores: float64 ``(n,)``: the probabilities.
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Iterable[CellWindows]) -> CellWindows:
        """The windows of several maps of one image."""
        parts = tuple(parts)
        return cls(
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.scores for part in parts]),
        )

    def best(self, threshold: float, overlap: float, image_size: Pair) -> list[ScoredBox]:
        """Boxes within the image by non-maximum suppression, the most probable first."""
        check_share("threshold", threshold)
        check_share("overlap", overlap)
        chosen = self.scores >= threshold
        limits = np.array(image_size * 2)
        boxes = np.round(self.boxes[chosen]).clip(0, limits)  # (n, 4): top, left, bottom, right
        scores = self.scores[chosen]
        # a window that lies wholly outside the image is empty once it is clipped
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, scores = boxes[inside], scores[inside]
        kept = nms(torch.from_numpy(boxes[:, [1, 0, 3, 2]]), torch.from_numpy(scores), overlap)
        edges, scores = boxes[kept.numpy()].astype(int), scores[kept.numpy()]
        return [
            ScoredBox(top, left, bottom, right, score)
            for (top, left, bottom, right), score in zip(edges.tolist(), scores.tolist())
        ]


def cell_windows(
    geometry: Geometry, probabilities: NDArray[np.float64], input_size: Pair, image_size: Pair
) -> CellWindows:
    """The windows of a map's cells, in pixels of the image.

    Args:
        geometry: of the network's input, whose size is `input_size`.
        probabilities: ``(h, w)``.
    """
    rows, cols = (
        np.array([axis.window_of(i) for i in range(n)], np.float64) * (size / pixels)
        for axis, n, pixels, size in zip(geometry.axes, probabilities.shape, input_size, image_size)
    )  # (h, 2), (w, 2): start and end
    boxes = np.empty((*probabilities.shape, 4))
    boxes[..., 0::2], boxes[..., 1::2] = rows[:, None], cols[None]
    return CellWindows(boxes.reshape(-1, 4), probabilities.reshape(-1).astype(np.float64))
