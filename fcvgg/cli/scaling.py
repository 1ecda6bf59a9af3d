"""Score maps of rescaled images, in the pixels of the image as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fcvgg.images import ImageLike
    from fcvgg.network import FullyConvolutional
    from fcvgg.score_map import ScoreMap


def score_map_at(net: FullyConvolutional, image: ImageLike, scale: int | None) -> ScoreMap:
    """The score map of an image whose smaller side is made `scale` pixels long.

    Positions, heatmap and overlay refer to the image's own pixels. None keeps its size.

    Raises:
        ImageError: if it cannot be used as an image.
        PreprocessError: if the network's preprocessing is unknown.
    """
    from fcvgg.images import in_mode, read_image
    from fcvgg.preprocessing import resized_to_side

    if scale is None:
        return net.score_map(image)
    whole = in_mode(read_image(image), net.in_channels)
    score_map = net.score_map(resized_to_side(whole, scale))
    return replace(score_map, image_size=(whole.height, whole.width), image=whole)
