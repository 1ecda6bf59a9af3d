"""Colours that mean the same in every picture: of probabilities by evidence, of classes by index.

A probability is coloured by how far it is above chance, on a logarithmic scale: chance or less
shows nothing, certainty has the full colour, whatever the image and however many the classes. The
colours are laid on a picture with an opacity that grows with the evidence and leaves the picture
visible: ``(1 - opacity) * picture + opacity * colour``, both looked up at ``round(255 *
evidence)``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fcvgg.errors import ArgumentError, check_share

ALPHA = 0.65
"""The largest opacity: what was found stays visible under its colour."""

OPAQUE_FROM = 0.75
"""The evidence from which colours have their largest opacity."""

HELD = 0.5
"""The share of its opacity that a value has where it is held and not measured, in stripes."""

COLOUR_MAP = "inferno"
"""Perceptually uniform."""

SPAN = (0.15, 0.82)
"""The part of a colour map that is used: its dark end is lost on a dark picture, and its pale end
hides what lies under it."""

LEVELS = 256

_TICKS = (0.9, 0.75, 0.5, 0.25, 0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6)
_APART = 0.1
"""Evidence between neighbouring ticks at least, so that their labels do not touch."""

_FIRST = ("#D55E00", "#0072B2", "#F0E442", "#CC79A7", "#009E73", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers tell apart too (https://jfly.uni-koeln.de/color), in
the order that keeps the first ones farthest apart (CIEDE2000) when laid on grey."""

_STEPS = (0.8192, 0.6710, 0.5498)
"""Steps of hue, saturation and value that spread points evenly, however many there are
(https://extremelearning.com.au/unreasonable-effectiveness-of-quasirandom-sequences)."""


# -- probabilities --------------------------------------------------------------------------------


def evidence(probability: ArrayLike, chance: float) -> NDArray[np.float32]:
    """How far probabilities are above chance, from 0 (chance or less) to 1 (certainty).

    This is ``log(p / chance) / log(1 / chance)``, which is ``log(p * K) / log(K)`` for `K` classes
    that share the probability: equal factors of probability are equal steps of colour.

    Args:
        probability: in [0, 1]; NaN has no evidence.
        chance: what says nothing, in (0, 1); see `fcvgg.probability.chance_level`.
    """
    values = np.asarray(probability, np.float32)
    # fmax takes chance for NaN and for all that is below
    above = np.fmax(values, np.float32(chance)).astype(np.float32, copy=False)
    return (1 - np.log(above) / np.float32(np.log(chance))).clip(0, 1)


def probability_ticks(chance: float, apart: float = _APART) -> tuple[float, ...]:
    """Probabilities that label a colour bar, from chance to 1, at least `apart` on it."""
    apart = max(apart, _APART)
    kept = [1.0]
    for tick in _TICKS:
        at = float(evidence(tick, chance))
        if apart <= at <= float(evidence(kept[-1], chance)) - apart:
            kept.append(tick)
    return (chance, *reversed(kept))


def colour_table(cmap: str = COLOUR_MAP) -> NDArray[np.float32]:
    """The colours of evidence from 0 to 1, ``(256, 3)`` in [0, 1].

    Args:
        cmap: the name of a matplotlib colour map, of which `SPAN` is used.

    Raises:
        ArgumentError: if there is no such colour map.
    """
    from matplotlib import colormaps

    if cmap not in colormaps:
        raise ArgumentError(
            f"cmap must be the name of a matplotlib colour map, such as 'viridis', got {cmap!r}"
        )
    return colormaps[cmap](np.linspace(*SPAN, LEVELS))[:, :3].astype(np.float32)


def opacity_table(alpha: float = ALPHA) -> NDArray[np.float32]:
    """The opacities of evidence from 0 to 1, ``(256,)``: from 0 up to `alpha`.

    Raises:
        ArgumentError: if `alpha` is outside [0, 1].
    """
    check_share("alpha", alpha)
    rising = np.linspace(0, 1 / OPAQUE_FROM, LEVELS, dtype=np.float32)
    return np.float32(alpha) * rising.clip(max=1)


# -- classes --------------------------------------------------------------------------------------


def class_colours(count: int) -> NDArray[np.uint8]:
    """A colour for each class, ``uint8 (count, 3)``, which does not depend on `count`.

    Seven are easily told apart; the others are spread over hue, saturation and value.
    """
    from matplotlib.colors import hsv_to_rgb, to_rgb

    first = np.array([to_rgb(colour) for colour in _FIRST])
    points = np.arange(max(count - len(first), 0))[:, None] * _STEPS % 1
    further = hsv_to_rgb(points * (1, 0.5, 0.45) + (0, 0.5, 0.55))
    return np.rint(np.concatenate([first, further])[:count] * 255).astype(np.uint8)
