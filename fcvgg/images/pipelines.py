"""Preprocessing written for other libraries, read as a `Preprocess`.

Taken are torchvision's weight transforms and compositions, timm's data configuration and
transforms, and the image processors of transformers. They are recognised by name, so that none of
the libraries is imported. What is read is then tried: pipeline and `Preprocess` have to give the
same values for one image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import floor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from fcvgg.errors import PreprocessError, one_line
from fcvgg.images.preprocessing import (
    INTERPOLATIONS,
    PRESETS,
    ChannelOrder,
    NativeView,
    Preprocess,
    PreprocessLike,
    Resampling,
    decoded_preprocess,
)

_TOLERANCE = 1e-5
"""Largest difference between a pipeline and what was read of it, of values of a few units."""

_LARGEST_TRIED = 640
"""Pixels of a side up to which resizing is tried."""

_TO_TENSOR = ("ToTensor", "MaybeToTensor", "PILToTensor", "MaybePILToTensor", "ToImage")
"""Steps that show that a pipeline begins with a PIL image."""

_NEUTRAL = ("Identity", "ToPureTensor", "RGB", "ConvertToRGB")
"""Steps that leave RGB of 8 bits as it is."""

_KNOWN_FLAGS = frozenset(
    f"do_{what}"
    for what in (
        *("resize", "center_crop", "rescale", "normalize", "convert_rgb", "flip_channel_order"),
        "reduce_labels",  # of masks
    )
)
"""What a processor of transformers may do to an image."""

_WARPED_FROM = 384
"""Smaller side from which transformers' `crop_pct` means that images are squeezed, not cropped."""

_CROP_PCT = 0.875
"""timm's share of the image that is kept where a data configuration does not say."""

_REMEDY = "pass fcvgg.Preprocess(mean, std)"


def given_preprocess(value: Any, channels: int) -> Preprocess | None:
    """The preprocessing that a caller gave for a network of some channels.

    Args:
        value: a `Preprocess`, a preset's name, or what `fcvgg.convert` takes from other libraries.

    Raises:
        PreprocessError: if it is none of these, has a random or unknown step, or is for other
            channels.
    """
    if isinstance(value, str):
        return Preprocess.preset(value, channels)
    if value is None or isinstance(value, Preprocess):
        return value
    read = _read(value, channels)
    if read.channels != channels:
        raise PreprocessError(
            f"preprocess must be for the network's {channels} channels, got {read.channels} in "
            f"{_name(value)}; {_REMEDY} with one value per channel"
        )
    return read


def check_preprocess(value: Any) -> None:
    """Refuse what is no preprocessing before any work is done; the channels are unknown yet."""
    if isinstance(value, str):
        Preprocess.preset(value, len(PRESETS[value][0]) if value in PRESETS else 1)
    elif value is not None and not isinstance(value, Preprocess):
        _read(value, None)


def is_pipeline(value: Any) -> bool:
    """Whether a value is preprocessing, ours or another library's, rather than a function."""
    return isinstance(value, (Preprocess, Mapping)) or _library(value) is not None


class TakesPreprocess(nn.Module):
    """A network with the attribute `preprocess`, None unless it was given."""

    _preprocess: Preprocess | None = None

    @property
    def preprocess(self) -> Preprocess | None:
        """How images become input, or None."""
        return self._preprocess

    @preprocess.setter
    def preprocess(self, value: PreprocessLike | None) -> None:
        self._preprocess = given_preprocess(value, self._channels_of_images())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "preprocess":  # torch would register transforms that are modules as a layer
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _channels_of_images(self) -> int:
        raise NotImplementedError


def _read(value: Any, channels: int | None) -> Preprocess:
    pipeline = value
    if isinstance(value, partial) and _library(value.func) == "torchvision":
        pipeline = value()  # ``weights.transforms`` without parentheses
    elif _library(value) == "torchvision" and hasattr(value, "transforms") and _is_weights(value):
        pipeline = value.transforms()
    if isinstance(pipeline, Mapping):
        return _of_mapping(pipeline, channels)
    library = _library(pipeline)
    if library is None or isinstance(pipeline, type):
        raise PreprocessError(
            "preprocess must be a fcvgg.Preprocess, such as fcvgg.Preprocess(mean, std), or one of "
            f"{', '.join(map(repr, PRESETS))}, or transforms of torchvision, timm or transformers, "
            f"got {_name(value)}"
        )
    if library == "transformers":
        return _of_processor(pipeline, channels)
    if type(pipeline).__name__ == "PretrainedCfg":
        return _of_mapping(pipeline.to_dict(), channels)
    if type(pipeline).__name__ in ("ImageClassification", "SemanticSegmentation"):
        return _of_preset(pipeline, channels)
    return _of_steps(pipeline, channels)


def _library(value: Any) -> str | None:
    """The library whose preprocessing a value is."""
    module = (value if isinstance(value, type) else type(value)).__module__
    for library in ("torchvision", "timm", "transformers"):
        if module.startswith(f"{library}."):
            return library
    return "torchvision" if type(value) is nn.Sequential else None


def _is_weights(value: Any) -> bool:
    return any(base.__name__ == "WeightsEnum" for base in type(value).__mro__)


def _name(value: Any) -> str:
    """What a message calls a value."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    if isinstance(value, (int, float, str, bytes, tuple, list)):
        return repr(value)
    return type(value).__name__


# -- what the steps of a pipeline come to ---------------------------------------------------------


@dataclass
class _Reading:
    """What the steps read so far do to the values from 0 to 255 of a PIL image or tensor."""

    state: Resampling
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    order: ChannelOrder = "RGB"
    interpolation: str = "bilinear"
    view: NativeView | None = None
    grey: bool = False
    normalized: bool = False

    def rescale(self, factor: float) -> None:
        """Multiply all values."""
        if not self.normalized:
            self.scale *= factor
            return
        self.std = tuple(s / factor for s in self.std)

    def subtract_and_divide(self, mean: Any, std: Any) -> None:
        """Normalise once more: ``(x - mean) / std``."""
        later = [_numbers(mean), _numbers(std)]
        several = max(len(self.mean), *map(len, later))
        m1, s1, m2, s2 = (
            values * several if len(values) == 1 else values
            for values in (self.mean, self.std, *later)
        )
        self.mean = tuple(a + b * c for a, b, c in zip(m1, s1, m2))
        self.std = tuple(a * b for a, b in zip(s1, s2))
        self.normalized = True

    def preprocess(self, channels: int | None) -> Preprocess:
        several = channels if channels and len(self.mean) == 1 and not self.grey else 1
        return Preprocess(
            self.mean * several,
            self.std * several,
            scale=self.scale,
            channel_order=self.order,
            interpolation=self.interpolation,  # type: ignore[arg-type]  # checked there
            view=self.view,
        )


def _of_preset(transforms: Any, channels: int | None) -> Preprocess:
    """Of the transforms that torchvision publishes with weights."""
    reading = _Reading("pillow", scale=1 / 255, interpolation=_interpolation(transforms))
    reading.subtract_and_divide(transforms.mean, transforms.std)
    resize, crop = (getattr(transforms, f"{what}_size", None) for what in ("resize", "crop"))
    reading.view = NativeView(_side(resize), _pair(crop), antialias=bool(transforms.antialias))
    return _tried(reading, transforms, channels)


def _of_steps(pipeline: Any, channels: int | None) -> Preprocess:
    """Of a composition of steps, or of a single one."""
    steps = list(_flattened(pipeline))
    with_pil = any(type(step).__name__ in _TO_TENSOR for step in steps)
    reading = _Reading("pillow" if with_pil else "bytes")
    for step in steps:
        _take(reading, step)
    if reading.state != "floats":
        raise PreprocessError(
            "preprocess must make floats of pixels, got steps that end with whole numbers; add "
            "ToTensor() or ToDtype(torch.float32, scale=True)"
        )
    start = _as_tensor if not with_pil else None
    return _tried(reading, pipeline, channels, start)


def _flattened(pipeline: Any) -> Iterator[Any]:
    """The steps of a composition, of those within it too."""
    name = type(pipeline).__name__
    if name == "Compose":
        inner: Iterable[Any] = pipeline.transforms
    elif type(pipeline) is nn.Sequential:
        inner = pipeline
    else:
        yield pipeline
        return
    for step in inner:
        yield from _flattened(step)


def _take(reading: _Reading, step: Any) -> None:
    """Add a step, or refuse it by its name."""
    name = type(step).__name__
    known = _library(step) in ("torchvision", "timm") or type(step) is nn.Identity
    if known and name in _NEUTRAL:
        return
    if known and name in _STEPS:
        _STEPS[name](reading, step)
        return
    raise PreprocessError(
        "preprocess must have only steps that resize, crop at the centre, scale or normalise, got "
        f"{_name(step)}, which is random or unknown; leave it out, or {_REMEDY}"
    )


def _to_tensor(reading: _Reading, step: Any) -> None:
    if reading.state != "floats":
        reading.scale, reading.state = reading.scale / 255, "floats"


def _to_bytes(reading: _Reading, step: Any) -> None:
    if reading.state == "pillow":
        reading.state = "bytes"


def _to_dtype(reading: _Reading, step: Any) -> None:
    dtype = step.dtype
    if isinstance(dtype, Mapping):  # by the types of inputs
        dtype = dtype.get(tv_tensors.Image, dtype.get("others"))
    if not isinstance(dtype, torch.dtype):
        raise PreprocessError(
            f"preprocess must convert to one dtype, got {type(step).__name__} to {dtype!r}; pass "
            "torch.float32"
        )
    if dtype.is_floating_point:
        if reading.state != "floats" and getattr(step, "scale", True):
            reading.scale /= 255
        reading.state = "floats"
    elif dtype != torch.uint8 or reading.state == "floats":
        raise PreprocessError(
            f"preprocess must convert pixels to floats, got {type(step).__name__} to {dtype}; pass "
            "torch.float32"
        )


def _normalize(reading: _Reading, step: Any) -> None:
    if reading.state != "floats":
        raise PreprocessError(
            "preprocess must make floats of pixels before Normalize, got Normalize alone; add "
            "ToTensor() or ToDtype(torch.float32, scale=True) before it"
        )
    reading.subtract_and_divide(step.mean, step.std)


def _resize(reading: _Reading, step: Any) -> None:
    if getattr(step, "max_size", None) is not None:
        raise PreprocessError(
            f"preprocess must resize to a size, got Resize(max_size={step.max_size}); leave it out"
        )
    if reading.view is not None:
        raise PreprocessError(
            "preprocess must resize once, and before it crops, got another Resize; leave it out"
        )
    reading.interpolation = _interpolation(step)
    smooth = getattr(step, "antialias", True) is not False
    state = reading.state
    if state == "bytes" and type(step).__module__ == "torchvision.transforms.transforms":
        state = "rounded"
    reading.view = NativeView(_side(step.size), None, state, smooth)


def _center_crop(reading: _Reading, step: Any) -> None:
    view = reading.view or NativeView()
    if view.crop is not None:
        raise PreprocessError(
            "preprocess must crop once, got another CenterCrop; leave one of them out"
        )
    reading.view = replace(view, crop=_pair(step.size))


def _grey(reading: _Reading, step: Any) -> None:
    if step.num_output_channels != 1:
        raise PreprocessError(
            "preprocess must keep colours or make one channel of them, got Grayscale("
            f"{step.num_output_channels}); pass grey images, or Grayscale(1) for a grey network"
        )
    if reading.state != "pillow":
        raise PreprocessError(
            "preprocess must turn a PIL image grey, got Grayscale after it is a tensor; move it to "
            "the front"
        )
    reading.grey = True


_STEPS: dict[str, Callable[[_Reading, Any], None]] = {
    **dict.fromkeys(("ToTensor", "MaybeToTensor"), _to_tensor),
    **dict.fromkeys(("PILToTensor", "MaybePILToTensor", "ToImage"), _to_bytes),
    **dict.fromkeys(("ConvertImageDtype", "ToDtype"), _to_dtype),
    "Normalize": _normalize,
    "Resize": _resize,
    "CenterCrop": _center_crop,
    "Grayscale": _grey,
}
"""What the steps of torchvision and timm do, by the names of their classes."""


# -- configurations -------------------------------------------------------------------------------


def _of_mapping(config: Mapping[str, Any], channels: int | None) -> Preprocess:
    """Of timm's data configuration, transformers' configuration, or `Preprocess`'s own arguments.

    timm's ``crop_mode="border"`` pads images, and has no `NativeView`.
    """
    own = {one.name for one in fields(Preprocess)}
    if {"mean", "std"} <= config.keys() <= own:
        return decoded_preprocess(config)  # type: ignore[return-value]  # None of None alone
    if "image_mean" in config or "do_normalize" in config:
        return _of_attributes(config, "pillow", "the configuration", channels)
    if not {"mean", "std"} <= config.keys():
        raise PreprocessError(
            "preprocess must be a configuration with mean and std, got a dict of "
            f"{', '.join(map(str, list(config)[:8])) or 'nothing'}; {_REMEDY}"
        )
    reading = _Reading("pillow", scale=1 / 255)
    reading.interpolation = str(config.get("interpolation") or "bilinear")
    reading.subtract_and_divide(config["mean"], config["std"])
    crop = _pair((config.get("input_size") or (None,))[1:])
    if crop is not None:
        share = config.get("crop_pct") or _CROP_PCT
        height, width = (floor(n / share) for n in crop)
        mode = config.get("crop_mode") or "center"
        if mode == "squash":
            reading.view = NativeView((height, width), crop)
        elif mode == "center" and height == width:
            reading.view = NativeView(height, crop)
    return reading.preprocess(channels)


def _of_processor(processor: Any, channels: int | None) -> Preprocess:
    """Of an image processor of transformers."""
    processor = getattr(processor, "image_processor", processor)
    if isinstance(getattr(processor, "data_config", None), Mapping):
        return _of_mapping(processor.data_config, channels)  # of timm
    name = type(processor).__name__
    if not hasattr(processor, "do_normalize") and not hasattr(processor, "do_rescale"):
        raise PreprocessError(
            f"preprocess must be an image processor of transformers, got {name}; pass "
            "AutoImageProcessor.from_pretrained(name)"
        )
    bases = {base.__name__ for base in type(processor).__mro__}
    first_fast = "BaseImageProcessorFast" in bases  # of transformers 4, which crops as torchvision
    fast = first_fast or "TorchvisionBackend" in bases
    found = {key: getattr(processor, key, None) for key in dir(processor)}
    read = _of_attributes(found, "bytes" if fast else "pillow", name, channels)
    if read.view is not None:
        read = replace(read, view=replace(read.view, rounded=first_fast))
    whole = partial(processor, do_resize=False, do_center_crop=False)
    _check_same(replace(read, view=None), _pixel_values(whole), name)
    if not _is_same(read, _pixel_values(processor)):  # it resizes in a way of its own
        return replace(read, view=None)
    return read


def _of_attributes(
    found: Mapping[str, Any], state: Resampling, name: str, channels: int | None
) -> Preprocess:
    """Of the settings of an image processor."""
    flags = [key for key, value in found.items() if key.startswith("do_") and value is True]
    unknown = sorted(set(flags) - _KNOWN_FLAGS)
    if unknown:
        raise PreprocessError(
            f"preprocess must resize, crop at the centre, scale and normalise only, got {name} "
            f"with {', '.join(unknown)}; set it to False, or {_REMEDY}"
        )
    reading = _Reading(state)
    if "do_rescale" in flags:
        reading.rescale(found.get("rescale_factor") or 1 / 255)
        if found.get("rescale_offset"):
            reading.subtract_and_divide(1.0, 1.0)
    if "do_normalize" in flags:
        reading.subtract_and_divide(found["image_mean"], found["image_std"])
        if found.get("include_top"):  # EfficientNet's second division
            reading.subtract_and_divide(0.0, found["image_std"])
    if len(reading.mean) == 1:
        reading.mean, reading.std = reading.mean * 3, reading.std * 3
    if "do_flip_channel_order" in flags:
        reading.order = "BGR"
    if "do_resize" in flags or "do_center_crop" in flags:
        reading.interpolation = _resample_name(found.get("resample"))
        resize, crop = _processor_sizes(found, flags)
        reading.view = NativeView(resize, crop, state, rounded=False)
    return reading.preprocess(channels)


def _processor_sizes(found: Mapping[str, Any], flags: Sequence[str]) -> tuple[Any, Any]:
    """What a processor resizes images to, and crops of them."""
    resize = _processor_size(found.get("size")) if "do_resize" in flags else None
    crop = _processor_size(found.get("crop_size")) if "do_center_crop" in flags else None
    if isinstance(crop, int):
        crop = (crop, crop)
    share = found.get("crop_pct")
    if isinstance(resize, int) and share:
        square = (resize, resize)
        resize, crop = (square, crop) if resize >= _WARPED_FROM else (int(resize / share), square)
    return resize, crop


def _processor_size(size: Any) -> Any:
    """A size of transformers: the smaller side, or height and width."""
    if isinstance(size, int) or size is None:
        return size
    known = dict(size) if isinstance(size, Mapping) else vars(size)
    if known.get("height") and known.get("width"):
        return known["height"], known["width"]
    return known.get("shortest_edge")


def _resample_name(resample: Any) -> str:
    if resample is None:
        return "bilinear"
    names = {int(value): name for name, value in INTERPOLATIONS.items()}
    number = getattr(resample, "value", resample)
    return names.get(number, str(number)) if isinstance(number, int) else str(number)


# -- whether it was read rightly ------------------------------------------------------------------


def _tried(
    reading: _Reading,
    pipeline: Callable[[Any], Any],
    channels: int | None,
    start: Callable[[Image.Image], Any] | None = None,
) -> Preprocess:
    """The preprocessing that was read, after it gave what the pipeline gives."""
    read = reading.preprocess(channels)

    def run(image: Image.Image) -> Any:
        return pipeline(image if start is None else start(image))

    if read.channels in (1, 3):  # as PIL images have
        _check_same(read, run, type(pipeline).__name__)
    return read


def _check_same(read: Preprocess, pipeline: Callable[[Image.Image], Any], name: str) -> None:
    if not _is_same(read, pipeline):
        raise PreprocessError(
            f"preprocess must give (pixels * scale - mean) / std, got other values from {name}; "
            f"{_REMEDY}"
        )


def _is_same(read: Preprocess, pipeline: Callable[[Image.Image], Any]) -> bool:
    """Whether a pipeline gives what was read of it, for an image of an odd size."""
    view = read.view or NativeView()
    sides = [max(np.ravel(n)) for n in (view.resize, view.crop) if n is not None]
    side = min(int(max(sides, default=24)), _LARGEST_TRIED)
    shape = (side * 6 // 5 | 1, side * 7 // 5 | 1, read.channels)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(noise.squeeze(2) if read.channels == 1 else noise)
    try:
        theirs = torch.as_tensor(np.asarray(pipeline(image))).float()
    except Exception as error:
        raise PreprocessError(
            f"preprocess must take an image, got {type(error).__name__}: {one_line(error)}; "
            f"{_REMEDY}"
        ) from error
    ours = read.at_native_size(image)[0]
    size = max(1.0, float(ours.abs().max()))
    return theirs.shape == ours.shape and bool(
        torch.allclose(theirs, ours, rtol=0, atol=_TOLERANCE * size)
    )


def _pixel_values(processor: Callable[..., Any]) -> Callable[[Image.Image], Any]:
    return lambda image: processor(images=image, return_tensors="np")["pixel_values"][0]


def _as_tensor(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels).permute(2, 0, 1)


# -- values ---------------------------------------------------------------------------------------


def _numbers(values: Any) -> tuple[float, ...]:
    """Numbers of a list, array or tensor; those of float32 as they were typed."""
    if isinstance(values, Tensor):
        values = values.cpu().numpy()
    return tuple(float(str(v)) for v in np.ravel(np.asarray(values)))


def _interpolation(step: Any) -> str:
    mode = getattr(step.interpolation, "value", step.interpolation)
    return "nearest" if mode == "nearest-exact" else str(mode)


def _side(size: Any) -> Any:
    """The smaller side that torchvision resizes to, or height and width; None for none."""
    if size is None or isinstance(size, int):
        return size
    sizes = tuple(int(n) for n in size)
    return sizes[0] if len(sizes) == 1 else sizes


def _pair(size: Any) -> Any:
    side = _side(size)
    return None if side is None or side == () else (side, side) if isinstance(side, int) else side
