"""How a ``uint8`` image becomes a network's input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fcvgg.errors import GeometryError, PreprocessError
from fcvgg.geometry import Pair, checked_size

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PRESETS: dict[str, tuple[tuple[float, ...], tuple[float, ...], float, str]] = {
    "imagenet": (*_IMAGENET, 1 / 255, "RGB"),
    "caffe": ((103.939, 116.779, 123.68), (1.0, 1.0, 1.0), 1.0, "BGR"),
    "tf": ((0.5,), (0.5,), 1 / 255, "RGB"),
    "unit": ((0.0,), (1.0,), 1 / 255, "RGB"),
    "none": ((0.0,), (1.0,), 1.0, "RGB"),
}
"""Mean, std, scale and channel order by name; one mean stands for every channel."""


@dataclass(frozen=True)
class Preprocess:
    """``(image * scale - mean) / std`` per channel, after an optional resize.

    Args:
        mean: one number per channel of the network, in its channel order and after scaling; one
            number stands for a single grey channel.
        std: likewise.
        scale: factor on the ``uint8`` values; 1/255 for values in [0, 1], 1 for caffe-style models.
        channel_order: ``"RGB"``, or ``"BGR"`` for caffe-style models.
        resize: None keeps the image's size (dense use); an int is the length of the smaller side;
            ``(h, w)`` is the size itself.
        interpolation: ``"bilinear"``, ``"bicubic"``, ``"nearest"`` or ``"lanczos"``.

    >>> Preprocess.imagenet()
    Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), ...)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    channel_order: str = "RGB"
    resize: int | Pair | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = tuple(value) if isinstance(value, Iterable) else (value,)
            object.__setattr__(self, name, tuple(float(v) for v in numbers))
        if len(self.mean) != len(self.std) or not self.mean:
            raise PreprocessError(
                f"mean has {len(self.mean)} values and std {len(self.std)}; "
                "expected one of each per channel"
            )
        if not all(map(isfinite, self.mean)):
            raise PreprocessError(f"mean is {self.mean}; expected finite values")
        if not all(v > 0 and isfinite(v) for v in self.std):
            raise PreprocessError(f"std is {self.std}; expected positive values")
        if not (isfinite(self.scale) and self.scale > 0):
            raise PreprocessError(f"scale={self.scale} is no factor; expected a positive value")
        if self.channel_order not in ("RGB", "BGR"):
            raise PreprocessError(
                f"channel_order={self.channel_order!r} is unknown; expected 'RGB' or 'BGR'"
            )
        if self.channel_order == "BGR" and self.channels == 4:
            raise PreprocessError("channel_order='BGR' needs 3 channels, got mean and std for 4")
        object.__setattr__(self, "resize", _checked_resize(self.resize))
        if self.interpolation not in INTERPOLATIONS:
            raise PreprocessError(
                f"interpolation={self.interpolation!r} is unknown; "
                f"expected one of {', '.join(INTERPOLATIONS)}"
            )

    @classmethod
    def imagenet(cls, **changes: Any) -> Preprocess:
        """What torchvision's ImageNet classifiers were trained with."""
        return cls(*_IMAGENET, **changes)

    @classmethod
    def preset(cls, name: str, channels: int = 3) -> Preprocess:
        """A usual preprocessing by name, for a network of some channels.

        Args:
            name: ``"imagenet"``; ``"caffe"``, BGR with the means of ImageNet subtracted; ``"tf"``,
                values from -1 to 1; ``"unit"``, from 0 to 1; ``"none"``, from 0 to 255 as they are.
            channels: of the network.

        Raises:
            PreprocessError: if there is none of that name, or it is for other channels.
        """
        if name not in PRESETS:
            raise PreprocessError(
                f"preprocess {name!r} is unknown; expected one of {', '.join(PRESETS)}"
            )
        mean, std, scale, order = PRESETS[name]
        if len(mean) not in (1, channels):
            raise PreprocessError(
                f"preprocess {name!r} is for {len(mean)} channels and the network takes {channels};"
                " give mean and std"
            )
        several = channels // len(mean)
        return cls(mean * several, std * several, scale=scale, channel_order=order)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def __call__(self, image: Image.Image) -> Tensor:
        """The input ``(1, C, H, W)`` of an image in the mode of the network's channels.

        Raises:
            PreprocessError: if the image has other channels than `mean`.
        """
        if len(image.getbands()) != self.channels:
            raise PreprocessError(
                f"the image has mode {image.mode} and the preprocessing {self.channels} channel(s);"
                " convert the image first"
            )
        return self.normalized(np.asarray(self.resized(image)))

    def resized(self, image: Image.Image) -> Image.Image:
        if self.resize is None:
            return image
        if isinstance(self.resize, int):
            return resized_to_side(image, self.resize, self.interpolation)
        height, width = self.resize
        return image.resize((width, height), INTERPOLATIONS[self.interpolation])

    def normalized(self, pixels: np.ndarray[Any, Any]) -> Tensor:
        """The input ``(1, C, H, W)``, float32, of ``uint8`` pixels ``(H, W, C)`` or ``(H, W)``."""
        values = torch.from_numpy(np.array(pixels)).float()
        values = values[..., None] if values.ndim == 2 else values  # (H, W, C)
        if self.channel_order == "BGR":
            values = values.flip(-1)
        values = (values * self.scale - _row(self.mean)) / _row(self.std)
        return values.permute(2, 0, 1)[None].contiguous()  # (1, C, H, W)


def given_preprocess(value: Preprocess | str | None, channels: int) -> Preprocess | None:
    """The preprocessing that a caller gave: itself, or by the name of a preset.

    Raises:
        PreprocessError: if it is neither, or the preset is for other channels.
    """
    if isinstance(value, str):
        return Preprocess.preset(value, channels)
    if value is not None and not isinstance(value, Preprocess):
        raise PreprocessError(
            "preprocess must be a fcvgg.Preprocess, such as fcvgg.Preprocess(mean, std), or one of "
            f"{', '.join(map(repr, PRESETS))}, got {value!r}"
        )
    return value


def resized_to_side(image: Image.Image, side: int, interpolation: str = "bilinear") -> Image.Image:
    """The image with its smaller side of length `side`, the aspect ratio kept."""
    width, height = image.size
    factor = side / min(width, height)
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    return image.resize(size, INTERPOLATIONS[interpolation])


def encoded_preprocess(preprocess: Preprocess | None) -> dict[str, Any] | None:
    """A `Preprocess` as plain data."""
    return None if preprocess is None else asdict(preprocess)


def decoded_preprocess(data: Mapping[str, Any] | None) -> Preprocess | None:
    """The `Preprocess` of `encoded_preprocess`.

    Raises:
        PreprocessError: if its values are not usable.
    """
    if data is None:
        return None
    known = {field.name for field in fields(Preprocess)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
    return Preprocess(**values)  # type: ignore[arg-type]  # a broken file fails in its checks


def _checked_resize(resize: Any) -> int | Pair | None:
    if resize is None:
        return None
    try:
        height, width = checked_size(resize)
    except GeometryError as error:
        raise PreprocessError(
            f"resize={resize!r} is no size; expected None, a positive int or (h, w)"
        ) from error
    return (height, width) if isinstance(resize, Iterable) else height


def _row(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
