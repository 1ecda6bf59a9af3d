"""Boxes on the image: the best windows of cells, and the regions above a threshold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import nms

from fcvgg.errors import check_share
from fcvgg.geometry import Geometry, Pair

IOU_THRESHOLD = 0.3
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

    def best(self, threshold: float, iou_threshold: float, image_size: Pair) -> list[ScoredBox]:
        """Boxes within the image by non-maximum suppression, the most probable first."""
        check_share("threshold", threshold)
        check_share("iou_threshold", iou_threshold)
        chosen = self.scores >= threshold
        limits = np.array(image_size * 2)
        boxes = np.round(self.boxes[chosen]).clip(0, limits)  # (n, 4): top, left, bottom, right
        scores = self.scores[chosen]
        # a window that lies wholly outside the image is empty once it is clipped
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, scores = boxes[inside], scores[inside]
        corners = torch.from_numpy(boxes[:, [1, 0, 3, 2]])
        kept = nms(corners, torch.from_numpy(scores), iou_threshold).numpy()
        return _scored(boxes[kept].astype(int), scores[kept])


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


def _scored(edges: NDArray[np.int_], scores: NDArray[np.float64]) -> list[ScoredBox]:
    return [
        ScoredBox(top, left, bottom, right, score)
        for (top, left, bottom, right), score in zip(edges.tolist(), scores.tolist())
    ]


# -- connected regions ----------------------------------------------------------------------------


def region_boxes(values: NDArray[np.float32], chosen: NDArray[np.bool_]) -> list[ScoredBox]:
    """The boxes of connected regions, with their highest value, the highest first.

    Pixels are neighbours across an edge, not across a corner.

    Args:
        values: ``(H, W)``, known where `chosen` is.
        chosen: bool ``(H, W)``.
    """
    starts, ends, region = connected_runs(chosen)
    if not len(starts):
        return []
    width = chosen.shape[1] + 1
    (rows, first), end = np.divmod(starts, width), ends % width
    gapped = np.pad(values, ((0, 0), (0, 1))).ravel()
    highest = np.maximum.reduceat(gapped, np.stack([starts, ends], 1).ravel())[::2]
    order = np.argsort(region, kind="stable")
    begin = np.flatnonzero(np.diff(region[order], prepend=-1))
    low, high = np.minimum, np.maximum
    found = ((low, rows), (low, first), (high, rows + 1), (high, end), (high, highest))
    *edges, scores = (reduce.reduceat(each[order], begin) for reduce, each in found)
    best = np.argsort(-scores, kind="stable")
    return _scored(np.stack(edges, 1)[best], scores[best])


def connected_runs(
    chosen: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Runs of chosen pixels in reading order, and the connected region of each.

    Returns:
        where runs start and end, and one number for all runs of a region. Places are counted
        through rows that are one pixel longer than those of `chosen`: the gap keeps the runs of a
        row apart from those of the next.
    """
    steps = np.diff(np.pad(chosen, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, first = np.nonzero(steps == 1)
    width = chosen.shape[1] + 1
    starts, ends = rows * width + first, rows * width + np.nonzero(steps == -1)[1]
    return starts, ends, _joined(*_touching(starts, ends, width), len(rows))


def _touching(
    starts: NDArray[np.int64], ends: NDArray[np.int64], width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of runs, a row of `width` apart, that have a column in common."""
    low = np.searchsorted(ends, starts - width, "right")
    count = np.searchsorted(starts, ends - width, "left") - low
    below = np.repeat(np.arange(len(starts)), count)
    before = np.cumsum(count) - count
    return low[below] + np.arange(len(below)) - before[below], below


def _joined(one: NDArray[np.int64], other: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The smallest member of the component of each of `count` nodes, which pairs connect."""
    least = np.arange(count)
    while True:
        a, b = least[one], least[other]
        if (a == b).all():
            return least
        np.minimum.at(least, np.maximum(a, b), np.minimum(a, b))
        while (least[least] != least).any():
            least = least[least]


# -- drawing --------------------------------------------------------------------------------------

_LINE, _HALO = "white", "black"


def draw_boxes(image: Image.Image, boxes: Iterable[ScoredBox]) -> Image.Image:
    """The image with every box's outline and score; the pixels of a box are inside its line.

    A score stands where it is whole and covers no other, those of the best boxes first, and is
    left out where there is no such place.
    """
    draw = ImageDraw.Draw(image)
    wide = max(round(min(image.size) / 200), 1)
    font = ImageFont.load_default(max(min(image.size) / 32, 9))
    ordered = sorted(boxes, key=lambda box: box[4])
    for top, left, bottom, right, _ in ordered:
        edges = (left, top, right - 1, bottom - 1)
        inner = tuple(e + d * wide for e, d in zip(edges, (1, 1, -1, -1)))
        if inner[2] > inner[0] and inner[3] > inner[1]:
            draw.rectangle(inner, outline=_HALO, width=wide)
        draw.rectangle(edges, outline=_LINE, width=wide)
    written: list[tuple[float, ...]] = []
    for box in reversed(ordered):
        text = f"{box[4]:.2f}"
        size = draw.textbbox((0, 0), text, font, anchor="lt", stroke_width=wide)[2:]
        place = _free_place(box, (size[0] + wide, size[1] + wide), 2 * wide, image.size, written)
        if place is not None:
            written.append(place)
            at = (place[0] + wide, place[1] + wide)
            draw.text(at, text, _LINE, font, "lt", stroke_width=wide, stroke_fill=_HALO)
    return image


def _free_place(
    box: ScoredBox,
    size: tuple[float, float],
    gap: int,
    limits: tuple[int, int],
    taken: list[tuple[float, ...]],
) -> tuple[float, ...] | None:
    """Left, top, right and bottom of a text at one of a box's corners, inside or outside."""
    top, left, bottom, right, _ = box
    wide, high = size
    inside = (left + gap, right - gap - wide), (top + gap, bottom - gap - high)
    outside = (left, right - wide), (top - high, bottom)
    for xs, ys in (outside, inside):  # outside, a text hides nothing that was found
        for y in ys:
            for x in xs:
                place = (x, y, x + wide, y + high)
                within = x >= 0 and y >= 0 and place[2] <= limits[0] and place[3] <= limits[1]
                if within and not any(_overlap(place, other) for other in taken):
                    return place
    return None


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))
