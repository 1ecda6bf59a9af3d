"""A layer's feature maps on an image; matplotlib is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fcvgg.errors import ArgumentError, ConversionError, ImageError, check_integer
from fcvgg.images.pipelines import given_preprocess
from fcvgg.images.preprocessing import Preprocess, PreprocessLike
from fcvgg.images.reading import ImageLike, prepare
from fcvgg.network import FullyConvolutional
from fcvgg.results.drawing import BAR, colour_bar, panels
from fcvgg.rewriting.capture import input_channels
from fcvgg.support.module_state import device_of, dtype_of, evaluating
from fcvgg.transfer.extraction import features_upto

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL, _TITLE = 1.35, 0.35
"""Inches: a panel's width, the height of the figure's title."""

_BRIGHTEST = 0.999
"""The quantile of all values at which the colours end, so that one spike does not dim the rest."""


def plot_features(
    model: nn.Module,
    image: ImageLike,
    layer: str,
    *,
    maps: int | Sequence[int] = 39,
    columns: int | None = None,
    preprocess: PreprocessLike | None = None,
) -> Figure:
    """A grid of a layer's feature maps on an image, the image first.

    All maps have one scale of colours, so that they compare; where there are negative values, white
    is zero.

    Args:
        model: a converted network, or any model with `preprocess`.
        image: as for `FullyConvolutional.score_map`.
        layer: a name as for `fcvgg.features_upto`; ``"conv3_1"`` is before the activation,
            ``"relu3_1"`` after it.
        maps: which channels, or how many of those that vary most over the image, in their order.
        columns: of the grid.
        preprocess: how the image becomes input; the network's own when None.

    Raises:
        ArgumentError: if there is no such layer or channel.
        ConversionError: if the layer gives no map.
    """
    values, pixels = _maps(model, image, layer, preprocess)
    channels = _channels(values, maps)
    if columns is None:
        columns = ceil(sqrt((len(channels) + 1) * 1.4))
    check_integer("columns", columns, 1)
    return _grid(values, channels, columns, pixels, layer)


@torch.no_grad()
def _maps(
    model: nn.Module, image: ImageLike, layer: str, preprocess: PreprocessLike | None
) -> tuple[Tensor, Tensor]:
    """The maps ``(K, h, w)`` and the image as it entered, ``(H, W, 3)`` or ``(H, W)`` in [0, 1]."""
    own = model.preprocess if isinstance(model, FullyConvolutional) else None
    channels = model.in_channels if isinstance(model, FullyConvolutional) else input_channels(model)
    given = given_preprocess(preprocess, channels)
    preprocess = own if given is None else given
    prepared = prepare(image, preprocess, channels)
    pixels = prepared.tensor(preprocess)
    features = features_upto(model, layer).eval()
    try:
        least = features.geometry.window
    except ConversionError:
        least = (1, 1)
    size = (pixels.shape[2], pixels.shape[3])
    if any(n < m for n, m in zip(size, least)):
        raise ImageError(f"an image of {size} pixels is too small for {layer}; it needs {least}")
    with evaluating(features):
        values = features(pixels.to(device_of(features), dtype_of(features)))
    if values.ndim != 4:
        raise ConversionError(
            f"layer must give a map (channels, rows, columns), got {layer} with "
            f"{tuple(values.shape[1:])}; name one before the flatten, or convert the model first"
        )
    return values[0].float().cpu(), _shown(pixels[0], preprocess)


def _shown(pixels: Tensor, preprocess: Preprocess | None) -> Tensor:
    """The preprocessed image as one can look at it."""
    if preprocess is not None and preprocess.channels == len(pixels):
        mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
        pixels = (pixels * std + mean) / (preprocess.scale * 255)
        if preprocess.channel_order == "BGR":
            pixels = pixels.flip(0)
    else:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp_min(1e-12)
    pixels = pixels.float().cpu().clamp(0, 1)
    return pixels[0] if len(pixels) not in (3, 4) else pixels.permute(1, 2, 0)


def _channels(values: Tensor, maps: int | Sequence[int]) -> list[int]:
    count = len(values)
    if isinstance(maps, int):
        check_integer("maps", maps, 1)
        spread = values.flatten(1).std(1, correction=0)
        return sorted(spread.topk(min(maps, count)).indices.tolist())
    channels = list(maps)
    wrong = [c for c in channels if not isinstance(c, int) or not 0 <= c < count]
    if wrong or not channels:
        raise ArgumentError(
            f"maps must be a number of maps or channels from 0 to {count - 1}, got {channels}"
        )
    return channels


def _grid(
    values: Tensor, channels: Sequence[int], columns: int, pixels: Tensor, layer: str
) -> Figure:
    rows = ceil((len(channels) + 1) / columns)
    height = _PANEL * pixels.shape[0] / pixels.shape[1]
    made = panels(
        [_PANEL] * columns, [height] * rows, titles=["image"], points=8, top=_TITLE, right=(BAR,)
    )
    first, *rest = list(made.axes.flat)
    first.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1)
    first.set_title("image", fontsize=8)
    shown = values[list(channels)]
    end = max(float(np.quantile(shown.abs().numpy(), _BRIGHTEST)), 1e-12)
    signed = bool((shown < 0).any())
    for ax, channel, part in zip(rest, channels, shown):
        drawn = ax.imshow(
            part.numpy(),
            cmap="RdBu_r" if signed else "magma",
            vmin=-end if signed else 0,
            vmax=end,
            interpolation="nearest",
        )
        ax.set_title(str(channel), fontsize=8)
    colour_bar(drawn, made.axes, made.bar()).set_label("activation")
    made.figure.suptitle(
        f"{layer}: {len(channels)} of {len(values)} maps of {values.shape[1]} x {values.shape[2]}",
        fontsize=10,
    )
    return made.figure
