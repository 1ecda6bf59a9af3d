"""Which level of a pyramid has the pixels that are asked for, or that a network was trained on."""

from __future__ import annotations

from fcvgg.errors import ArgumentError, ImageError
from fcvgg.images.lazy.source import StripSource, warn

TOLERANCE = 1.2
"""Ratio of two pixel sizes up to which they count as the same: scanners of one magnification differ
by less, and neighbouring levels by 2 at least."""


def level_pixel_sizes(source: StripSource) -> list[float]:
    """Micrometres of a pixel of every level, or `ImageError` if the image does not state them."""
    if source.mpp is None:
        raise ImageError(
            f"{source.name} must state its pixel size to choose a level by it, got none; choose "
            "one with level="
        )
    finest = source.mpp * source.size[0] / source.full_size[0]
    heights = [height for height, _ in source.level_sizes] or [source.size[0]]
    return [finest * source.full_size[0] / height for height in heights]


def described_levels(source: StripSource) -> str:
    """The levels of an image with their pixel sizes, in words."""
    return ", ".join(f"{size:.4g} (level {i})" for i, size in enumerate(level_pixel_sizes(source)))


def fits(size: float, wanted: float) -> bool:
    """Whether two pixel sizes count as the same."""
    return max(size / wanted, wanted / size) <= TOLERANCE


def fitting_level(source: StripSource, mpp: float) -> int:
    """The level whose pixels are nearest to `mpp` micrometres.

    Raises:
        ImageError: if the image does not state its pixel size, or no level is near enough; the
            message lists the levels.
    """
    sizes = level_pixel_sizes(source)
    best = min(range(len(sizes)), key=lambda i: max(sizes[i] / mpp, mpp / sizes[i]))
    if not fits(sizes[best], mpp):
        raise ImageError(
            f"mpp must be within {TOLERANCE - 1:.0%} of the micrometres per pixel of a level of "
            f"{source.name}, {described_levels(source)}, got {mpp:g}; scale the image to it, or "
            "choose a level with level="
        )
    return best


def checked_mpp(mpp: float | None, level: int = 0) -> float | None:
    """A pixel size in micrometres that may choose a level, or `ArgumentError`."""
    if mpp is None:
        return None
    if isinstance(mpp, bool) or not isinstance(mpp, (int, float)) or not 0 < mpp < float("inf"):
        raise ArgumentError(f"mpp must be a positive number of micrometres per pixel, got {mpp!r}")
    if level:
        raise ArgumentError(f"level and mpp exclude each other, got level={level} and mpp={mpp:g}")
    return float(mpp)


def training_level(source: StripSource, trained: float | None) -> int | None:
    """The level to take in place of this one; None where it fits or none does."""
    if trained is None or source.mpp is None or fits(source.mpp, trained):
        return None
    try:
        return fitting_level(source, trained)
    except ImageError:
        return None


def at_training_scale(
    source: StripSource, trained: float | None, may_choose: bool = True
) -> StripSource:
    """The image at the level whose pixels a network was trained on; a warning says which.

    Where no level has them, or another one was chosen, the warning says so and the image stays.

    Args:
        trained: micrometres of a pixel; None if unknown.
        may_choose: whether the level was left open.
    """
    if trained is None or source.mpp is None or fits(source.mpp, trained):
        return source
    begin = f"{source.name} has {source.mpp:.4g} micrometres per pixel at level {source.level}, "
    begin += f"and the network was trained at {trained:.4g}"
    level = training_level(source, trained) if may_choose else None
    if level is None or source.at_level is None:
        listed = f" of the levels {described_levels(source)}" if len(source.level_sizes) > 1 else ""
        warn(f"{begin}; its scores may mean little; choose another{listed} or scale it", None)
        return source
    chosen = source.at_level(level)
    warn(f"{begin}; level {level} with {chosen.mpp:.4g} is taken; level= or mpp= choose", None)
    return chosen
