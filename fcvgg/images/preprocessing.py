"""How pixels become a network's input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fcvgg.errors import ImageError, PreprocessError, check_choice
from fcvgg.geometry import Pair, checked_size

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_LARGEST_RESIZE = 4096
"""Pixels of a side that preprocessing may ask for: 200 MB of a square image in float32."""

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

ChannelOrder = Literal["RGB", "BGR"]

Resampling = Literal["pillow", "bytes", "rounded", "floats"]
"""How `NativeView` resizes."""

PRESETS: dict[str, tuple[tuple[float, ...], tuple[float, ...], float, ChannelOrder]] = {
    "imagenet": (*_IMAGENET, 1 / 255, "RGB"),
    "caffe": ((103.939, 116.779, 123.68), (1.0, 1.0, 1.0), 1.0, "BGR"),
    "tf": ((0.5,), (0.5,), 1 / 255, "RGB"),
    "unit": ((0.0,), (1.0,), 1 / 255, "RGB"),
    "none": ((0.0,), (1.0,), 1.0, "RGB"),
}
"""Mean, std, scale and channel order by name; one mean stands for every channel."""

_BYTE_SCALES = 1 / 256, 1 / 127
"""Scales in this range take values from 0 to 255: they map them to [0, 1] or [-1, 1]."""

_LATER = ("value_range", "view", "mpp")
"""Fields that older versions do not know."""

_BEYOND = 0.1
"""How far values of floats from 0 to 1 may lie outside: resampling overshoots."""

_WIDE = 65535 / 255
"""A 16-bit value divided by this is the 8-bit value of the same brightness."""


@dataclass(frozen=True)
class NativeView:
    """How a source's own pipeline brings an image to the native size: resized, then cropped.

    Args:
        resize: an int is the length of the smaller side, ``(h, w)`` the size itself; None keeps it.
        crop: the size ``(h, w)`` that is kept in the middle; None keeps all.
        resampling: ``"pillow"``, or what torch resizes: ``"bytes"``, ``"floats"``, or bytes as
            floats that are ``"rounded"`` again (torchvision's first transforms). The results differ
            by one of 255.
        antialias: whether torch smooths what it makes smaller; Pillow always does.
        rounded: whether a crop in the middle of an odd rest begins at the nearest even pixel, as
            torchvision's does, rather than at the upper left one.
    """

    resize: int | Pair | None = None
    crop: Pair | None = None
    resampling: Resampling = "pillow"
    antialias: bool = True
    rounded: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "resize", _checked_resize(self.resize))
        if self.crop is not None:
            object.__setattr__(self, "crop", checked_size(self.crop, "crop", PreprocessError))
        check_choice("resampling", self.resampling, get_args(Resampling), PreprocessError)

    def of(self, pixels: NDArray[Any], interpolation: str) -> NDArray[Any]:
        """Pixels ``(H, W, C)``, resized and cropped."""
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)  # (C, H, W)
        if self.resize is not None:
            image = self._resized(image, list(self._size(pixels.shape[:2])), interpolation)
        if self.crop is not None:
            image = self._cropped(image, self.crop)
        return image.permute(1, 2, 0).numpy()

    def _size(self, size: Sequence[int]) -> Pair:
        """The size that torchvision resizes to, which cuts off what is not a whole pixel."""
        height, width = size
        side = self.resize
        if not isinstance(side, int):
            assert side is not None
            return side
        return (
            (side, int(side * width / height))
            if height <= width
            else (int(side * height / width), side)
        )

    def _resized(self, image: Tensor, size: list[int], interpolation: str) -> Tensor:
        mode = InterpolationMode(interpolation)
        if self.resampling == "pillow" and image.dtype == torch.uint8:
            planes = [
                F.pil_to_tensor(F.resize(F.to_pil_image(plane), size, mode)) for plane in image
            ]
            return torch.cat(planes)
        if self.resampling in ("floats", "rounded"):
            resized = F.resize(image.float(), size, mode, antialias=self.antialias)
            whole = self.resampling == "rounded" and image.dtype == torch.uint8
            return resized.clamp(0, 255).round() if whole else resized
        return F.resize(image, size, mode, antialias=self.antialias)

    def _cropped(self, image: Tensor, size: Pair) -> Tensor:
        rest = [n - s for n, s in zip(image.shape[1:], size)]
        if self.rounded or min(rest) < 0:
            return F.center_crop(image, list(size))
        return F.crop(image, rest[0] // 2, rest[1] // 2, *size)


@dataclass(frozen=True)
class Preprocess:
    """``(image * scale - mean) / std`` per channel, after an optional resize.

    Args:
        mean: one number per channel of the network, in its channel order and after scaling; one
            number stands for a single grey channel.
        std: likewise.
        scale: factor on the values. Scales from 1/256 to 1/127, and 1 with means between 1 and 255
            (caffe), are for values from 0 to 255: 16-bit values are then divided by 257, and other
            values need `value_range`. Any other scale, such as 1/10000, takes the values of the
            image as they are.
        channel_order: ``"RGB"``, or ``"BGR"`` for caffe-style models.
        resize: None keeps the image's size (dense use); an int is the length of the smaller side;
            ``(h, w)`` is the size itself.
        interpolation: ``"bilinear"``, ``"bicubic"``, ``"nearest"`` or ``"lanczos"``.
        value_range: ``(low, high)``, the values of images of more than 8 bits that count as 0 and
            255 before `scale`; values outside are neither clipped nor refused. ``uint8`` pixels are
            from 0 to 255 in any case. None takes the range that `scale` implies: 0 to 65535 for
            16-bit values, with a warning where all lie below a quarter of it; 0 to 1 for floats,
            with a warning, where none lies far outside.
        view: how the pipeline that this was read from brings an image to the native size. Dense
            use leaves it out; `at_native_size` and the center crop of `fcvgg.evaluate` apply it.
            It does not count where two are compared.
        mpp: micrometres of a pixel of the images that the network was trained on; None if unknown.
            `fcvgg.stream` takes the level of a slide that has such pixels, or warns.

    >>> Preprocess.imagenet()
    Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), ...)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    channel_order: ChannelOrder = "RGB"
    resize: int | Pair | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] = "bilinear"
    value_range: tuple[float, float] | None = None
    view: NativeView | None = field(default=None, compare=False, repr=False)
    mpp: float | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = tuple(value) if isinstance(value, Iterable) else (value,)
            object.__setattr__(self, name, tuple(_number(v, name) for v in numbers))
        _number(self.scale, "scale")
        if len(self.mean) != len(self.std) or not self.mean:
            raise PreprocessError(
                "mean and std must have one value per channel each, got "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if not all(map(isfinite, self.mean)):
            raise PreprocessError(f"mean must be finite, got {self.mean}")
        if not all(v > 0 and isfinite(v) for v in self.std):
            raise PreprocessError(f"std must be positive, got {self.std}")
        if not (isfinite(self.scale) and self.scale > 0):
            raise PreprocessError(f"scale must be positive, got {self.scale}")
        check_choice("channel_order", self.channel_order, ("RGB", "BGR"), PreprocessError)
        if self.channel_order == "BGR" and self.channels == 4:
            raise PreprocessError("channel_order must be 'RGB' for 4 channels, got 'BGR'")
        object.__setattr__(self, "resize", _checked_resize(self.resize))
        check_choice("interpolation", self.interpolation, INTERPOLATIONS, PreprocessError)
        object.__setattr__(self, "value_range", checked_range(self.value_range))
        if self.mpp is not None:
            object.__setattr__(self, "mpp", _number(self.mpp, "mpp"))
            if not (isfinite(self.mpp) and self.mpp > 0):
                raise PreprocessError(
                    f"mpp must be a positive number of micrometres per pixel, got {self.mpp}"
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
                values from -1 to 1; ``"unit"``, from 0 to 1; ``"none"``, values as they are, from
                0 to 255 for 8 bits.
            channels: of the network.

        Raises:
            PreprocessError: if the name is unknown, or the preprocessing is for other channels.
        """
        check_choice("preprocess", name, PRESETS, PreprocessError)
        mean, std, scale, order = PRESETS[name]
        if len(mean) not in (1, channels):
            raise PreprocessError(
                f"preprocess must be for the network's {channels} channels, got {name!r} for "
                f"{len(mean)}; give mean and std"
            )
        several = channels // len(mean)
        return cls(mean * several, std * several, scale=scale, channel_order=order)

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def takes_bytes(self) -> bool:
        """Whether scale, mean and std are for values from 0 to 255."""
        if self.scale == 1:
            return all(1 < v <= 255 for v in self.mean)
        least, most = _BYTE_SCALES
        return least <= self.scale <= most

    def units(
        self, values: NDArray[Any], dtype: Any = None, name: str = "the image"
    ) -> NDArray[Any]:
        """Values of pixels as `scale` takes them: ``uint8`` as they are, others as float32.

        Args:
            values: the values of pixels, of any shape.
            dtype: what the image holds, where `values` have been cast since.
            name: what a message calls the image.

        Raises:
            ImageError: if the range of the values is unknown.
        """
        dtype = values.dtype if dtype is None else np.dtype(dtype)
        if dtype == np.uint8:
            return values
        wide = np.float32 if dtype.itemsize <= (2 if dtype.kind in "iu" else 4) else np.float64
        if self.value_range is not None and dtype.kind in "iuf":
            low, high = self.value_range
            with np.errstate(over="ignore", invalid="ignore"):  # values that stand for no data
                values = (values.astype(wide) - wide(low)) * wide(255 / (high - low))
        elif dtype.kind == "f" and self.takes_bytes:
            self._check_unit_range(values, dtype, name)
            values = values.astype(wide, copy=False) * wide(255)
        elif dtype.kind not in "iuf" or (self.takes_bytes and dtype != np.uint16):
            raise ImageError(
                f"{name} holds {dtype}, which has no known range; pass uint8 (H, W, C), or "
                "value_range=(low, high) or a scale= of its own to fcvgg.Preprocess"
            )
        elif self.takes_bytes:
            values = values / np.float32(_WIDE)
        with np.errstate(over="ignore"):
            return values.astype(np.float32, copy=False)

    def assumes_range(self, dtype: Any) -> bool:
        """Whether 16-bit values are assumed to have their whole range, or floats that to 1."""
        known = dtype != np.uint16 and np.dtype(dtype).kind != "f"
        return not known and self.value_range is None and self.takes_bytes

    @staticmethod
    def _check_unit_range(values: NDArray[Any], dtype: Any, name: str) -> None:
        """Refuse floats that clearly lie outside the range from 0 to 1; NaN has no data."""
        known = np.isfinite(values)
        low = values.min(where=known, initial=0)
        high = values.max(where=known, initial=0)
        if low < -_BEYOND or high > 1 + _BEYOND:
            raise ImageError(
                f"{name} must hold floats from 0 to 1, got {dtype} from {low:.6g} to {high:.6g}; "
                "pass uint8 (H, W, C), or value_range=(low, high) or a scale= of its own to "
                "fcvgg.Preprocess"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """The input ``(1, C, H, W)`` of an image in the mode of the network's channels.

        Raises:
            PreprocessError: if the image has other channels than `mean`.
        """
        self._check_mode(image)
        pixels = np.asarray(self.resized(image))
        return self.normalized(pixels if pixels.dtype == np.uint8 else self.units(pixels))

    def _check_mode(self, image: Image.Image) -> None:
        if not isinstance(image, Image.Image):
            raise PreprocessError(
                f"the image must be a PIL image, got {type(image).__name__}; net.score_map and "
                "net.classify take files, arrays and tensors"
            )
        if len(image.getbands()) != self.channels:
            raise PreprocessError(
                f"the image must have the preprocessing's {self.channels} channels, got mode "
                f"{image.mode}; convert it first"
            )

    def at_native_size(self, image: Image.Image) -> Tensor:
        """The input ``(1, C, h, w)`` that the source's own pipeline makes of an image: its `view`.

        Raises:
            PreprocessError: if the image has other channels than `mean`.
        """
        self._check_mode(image)
        pixels = np.asarray(image)
        return self.native_input(pixels if pixels.dtype == np.uint8 else self.units(pixels))

    def native_input(self, pixels: NDArray[Any]) -> Tensor:
        """`normalized` of what `view` shows of pixels ``(H, W, C)`` or ``(H, W)``."""
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        shown = pixels if self.view is None else self.view.of(pixels, self.interpolation)
        return self.normalized(shown)

    def resized(self, image: Image.Image) -> Image.Image:
        height, width = self.resized_size((image.height, image.width))
        if (width, height) == image.size:
            return image
        return image.resize((width, height), INTERPOLATIONS[self.interpolation])

    def resized_size(self, size: Pair) -> Pair:
        """The size ``(h, w)`` to which `resize` brings an image."""
        if isinstance(self.resize, int):
            return size_of_side(size, self.resize)
        return size if self.resize is None else self.resize

    def normalized(self, pixels: NDArray[Any]) -> Tensor:
        """The input ``(1, C, H, W)``, float32, of pixels ``(H, W, C)`` or ``(H, W)``.

        They are ``uint8``, or floats as `units` gives them.
        """
        values = torch.from_numpy(np.array(pixels)).float()
        values = values[..., None] if values.ndim == 2 else values  # (H, W, C)
        if self.channel_order == "BGR":
            values = values.flip(-1)
        values = (values * self.scale - _row(self.mean)) / _row(self.std)
        return values.permute(2, 0, 1)[None].contiguous()  # (1, C, H, W)


PreprocessLike = Preprocess | str | Mapping[str, Any] | Callable[..., Any]
"""What users give for preprocessing: one, a preset's name, or transforms of another library."""


def size_of_side(size: Pair, side: int) -> Pair:
    """A size with its smaller side of length `side`, the aspect ratio kept."""
    factor = side / min(size)
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def resized_to_side(image: Image.Image, side: int, interpolation: str = "bilinear") -> Image.Image:
    """The image with its smaller side of length `side`, the aspect ratio kept."""
    height, width = size_of_side((image.height, image.width), side)
    return image.resize((width, height), INTERPOLATIONS[interpolation])


def encoded_preprocess(preprocess: Preprocess | None) -> dict[str, Any] | None:
    """A `Preprocess` as plain data; what older versions do not know is there only if it is set."""
    if preprocess is None:
        return None
    data = asdict(preprocess)
    return {k: v for k, v in data.items() if k not in _LATER or v is not None}


def decoded_preprocess(data: Mapping[str, Any] | None) -> Preprocess | None:
    """The `Preprocess` of `encoded_preprocess`, or `PreprocessError` if it is not usable."""
    if data is None:
        return None
    if not isinstance(data, Mapping) or not {"mean", "std"} <= data.keys():
        raise PreprocessError(f"preprocess must be an object with mean and std, got {data!r}")
    known = {one.name for one in fields(Preprocess)}
    values = _with_tuples(data, known)
    view = values.get("view")
    if view is not None:
        if not isinstance(view, Mapping):
            raise PreprocessError(f"view must be an object with resize and crop, got {view!r}")
        values["view"] = NativeView(**_with_tuples(view, {one.name for one in fields(NativeView)}))
    return Preprocess(**values)  # a broken file fails in its checks


def _with_tuples(data: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}


def checked_range(value_range: Any) -> tuple[float, float] | None:
    """A range of values, or `PreprocessError`."""
    if value_range is None:
        return None
    try:
        low, high = (float(v) for v in value_range)
    except (TypeError, ValueError):
        low = high = 0.0
    if not (isfinite(low) and isfinite(high) and low != high):
        raise PreprocessError(
            f"value_range must be two different numbers (low, high), got {value_range!r}"
        )
    return low, high


def _checked_resize(resize: Any) -> int | Pair | None:
    if resize is None:
        return None
    height, width = checked_size(resize, "resize", PreprocessError)
    if max(height, width) > _LARGEST_RESIZE:
        raise PreprocessError(
            f"resize must be at most {_LARGEST_RESIZE} pixels, got {resize!r}; pass resize=None to "
            "keep the size of large images"
        )
    return (height, width) if isinstance(resize, Iterable) else height


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise PreprocessError(f"{name} must hold numbers, got {value!r}") from error


def _row(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
