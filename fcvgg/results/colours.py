"""The colour of a class: the same in every figure, by its index."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FIRST = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
"""Okabe and Ito's, which colour-blind readers tell apart too (https://jfly.uni-koeln.de/color)."""

_STEPS = (0.8192, 0.6710, 0.5498)
"""Steps of hue, saturation and value that spread points evenly, however many there are
(https://extremelearning.com.au/unreasonable-effectiveness-of-quasirandom-sequences)."""


def class_colours(count: int) -> NDArray[np.uint8]:
    """A colour for each class, ``uint8 (count, 3)``, which does not depend on `count`.

    Seven are easily told apart; the others are spread over hue, saturation and value.
    """
    from matplotlib.colors import hsv_to_rgb, to_rgb

    first = np.array([to_rgb(colour) for colour in _FIRST])
    points = np.arange(max(count - len(first), 0))[:, None] * _STEPS % 1
    further = hsv_to_rgb(points * (1, 0.5, 0.45) + (0, 0.5, 0.55))
    return np.rint(np.concatenate([first, further])[:count] * 255).astype(np.uint8)
