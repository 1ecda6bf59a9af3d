"""Parts of an image of any size as a network's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fcvgg.geometry import Geometry, Pair
from fcvgg.images.lazy.input import strip_reader
from fcvgg.images.lazy.source import StripSource
from fcvgg.inference.missing import missing_pixels
from fcvgg.support.module_state import device_of


@dataclass(frozen=True)
class StripInput:
    """Reads rows and columns of an image, preprocessed and padded below the window.

    Attributes:
        read: gives rows and columns of the image as preprocessed floats.
        geometry: of the network, whose window is the smallest input.
        channels: of the network's input.
        device, dtype: of its arithmetic.
    """

    source: StripSource
    read: Callable[[Pair, Pair], Tensor]
    geometry: Geometry
    channels: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, net: Any, source: StripSource) -> StripInput:
        """For a converted network."""
        return cls(
            source,
            strip_reader(source, net.preprocess, net.in_channels),
            net.geometry,
            net.in_channels,
            device_of(net),
            net.compute_dtype,
        )

    @property
    def size(self) -> Pair:
        """``(H, W)`` of the network's input."""
        height, width = (
            max(n, axis.window) for n, axis in zip(self.source.size, self.geometry.axes)
        )
        return height, width

    def strip(self, rows: Pair, cols: Pair) -> tuple[Tensor, Tensor | None]:
        """Rows and columns of the input.

        Returns:
            the input ``(1, C, h, w)``, and bool ``(1, 1, h, w)`` of the pixels that are not finite,
            for which the input holds zeros; None if all are finite.
        """
        (top, _), (left, _) = self.geometry.padding_for(self.source.size)
        # pixels of the image in the strip, whose coordinates start at the padding
        y, x = (
            (min(max(first - before, 0), size), min(max(end - before, 0), size))
            for (first, end), before, size in zip((rows, cols), (top, left), self.source.size)
        )
        if y[0] == y[1] or x[0] == x[1]:
            shape = (1, self.channels, rows[1] - rows[0], cols[1] - cols[0])
            return torch.zeros(shape, device=self.device, dtype=self.dtype), None  # padding only
        pixels = self.read(y, x).to(self.device, self.dtype)
        missing = missing_pixels(pixels)
        if missing is not None:  # zeros, since layers treat NaN differently
            pixels = pixels.masked_fill(missing, 0)
        # with the channels last oneDNN is faster, and a row of a map is one piece of memory
        last = self.device.type == "cpu" and pixels.element_size() <= 4
        order = torch.channels_last if last else torch.contiguous_format
        pixels = pixels.contiguous(memory_format=order)
        across = x[0] + left - cols[0], cols[1] - x[1] - left
        padding = (*across, y[0] + top - rows[0], rows[1] - y[1] - top)
        if not any(padding):
            return pixels, missing
        return F.pad(pixels, padding), None if missing is None else F.pad(missing, padding)
