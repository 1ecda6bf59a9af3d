"""`FCN`: a converted classifier as a network that labels every pixel, and its folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.categories import distinct_names, one_per_class
from fcvgg.choices import Variant
from fcvgg.errors import ArgumentError, FcvggError, LoadError, check_choice, check_integer, one_line
from fcvgg.images.pipelines import TakesPreprocess, check_preprocess
from fcvgg.images.preprocessing import (
    PreprocessLike,
    decoded_preprocess,
    encoded_preprocess,
)
from fcvgg.images.reading import ImageLike, prepare
from fcvgg.loading import load
from fcvgg.network import FullyConvolutional
from fcvgg.probability import cells_with_data
from fcvgg.results.label_map import IGNORE_INDEX, LabelMap
from fcvgg.segmentation.backbone import (
    MapSource,
    map_sources,
    return_maps_,
    with_first_map,
    without_classifier,
)
from fcvgg.segmentation.upsampling import PIXELS, BilinearUpsampling
from fcvgg.serialization.saved_files import (
    read_description,
    read_tensors,
    saved_folder,
    write_description,
    write_tensors,
)
from fcvgg.support.atomic import checked_folder
from fcvgg.support.module_state import device_of, dtype_of, evaluating

VARIANTS: dict[str, int] = {"32s": 0, "16s": 1, "8s": 2}
"""The number of finer maps that a variant scores as well; named for VGG's strides."""

CONFIG = "fcn.json"
SCORES = "scores.safetensors"
BACKBONE = "backbone"

_FORMAT = 1
_BACKBONE_PREFIX = "backbone."


class Score(nn.Module):
    """Scores of every cell of a map: a 1x1 convolution that starts at zero.

    The map is divided by `magnitude` first, 1 unless `FCN.calibrate_` measured it: pool3 of a VGG
    may be a hundred times as large as fc7, and would learn that much faster.
    """

    magnitude: Tensor

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, num_classes, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.register_buffer("magnitude", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x / self.magnitude)


class FCN(TakesPreprocess):
    """Class scores for every pixel of images of any size (FCN-32s, FCN-16s, FCN-8s).

    The classifier's last layer is replaced by a score layer, zero at first, on the map before it
    (fc7 for VGG). ``"16s"`` also scores the map of half the stride (pool4), ``"8s"`` that of a
    quarter (pool3). Each sum of scores is brought to the next finer grid by a transposed
    convolution that starts as bilinear interpolation and learns; the last one, to the pixels, stays
    bilinear (Long, Shelhamer and Darrell, section 3, https://arxiv.org/abs/1411.4038).

    Nothing is padded by 100 pixels or cropped by numbers found by trial: the position of every map
    comes from the network's geometry, so scores lie on the pixels that they describe. Outside the
    outermost cells' centres the nearest cell's score is held.

    The head's window is padded with zeros by default, as by ``fcvgg.convert(padding="same")``: the
    cells of fc7 then coincide with those of pool5 and reach the image's border, and one cell of
    pool5 is enough (32 pixels for VGG). Without padding, cells begin half a window inside, and the
    outermost scores fill a wide margin. Images below the least size are padded with zeros, centred,
    and the result is cropped.

    Args:
        net: a converted network with a fully connected layer at its end and one output.
        num_classes: the number of classes of a pixel, 2 to 255.
        variant: ``"32s"``, ``"16s"`` or ``"8s"``. The names are those of VGG's strides; on a net of
            another stride s they score the maps of stride s, s/2 and s/4.
        padding: ``"same"``, or ``"valid"`` to leave the head's window as it was converted.
        copy: copy the parameters, the default, since dense training changes the features. False
            shares the net's storage, as `fcvgg.convert` does: training one then changes both.
        init_from: a coarser `FCN` of the same classes, whose weights are the initial ones, which is
            how the paper trains: 32s, then 16s, then 8s. With ``copy=False`` its backbone must have
            the net's weights.
        learn_upsampling: train the kernels between score layers.
        categories: the names of the classes, or the path of a file with one name per line.
        preprocess: how images become input, as for `fcvgg.convert`; the net's when None.

    Attributes:
        backbone: the network up to fc7, whose ``geometry`` places the coarsest scores.
        sources: the maps that are scored, coarsest first.
        scores: the score layers, by the canonical name of the layer that each one reads.

    Raises:
        ArgumentError: if the variant is unknown, or the network has no map that it needs.
        UnsupportedLayerError: if there is no map before a last fully connected layer.
    """

    def __init__(
        self,
        net: FullyConvolutional,
        num_classes: int,
        variant: Variant = "32s",
        *,
        padding: Literal["same", "valid"] = "same",
        copy: bool = True,
        init_from: FCN | None = None,
        learn_upsampling: bool = True,
        categories: Sequence[str] | str | os.PathLike[str] | None = None,
        preprocess: PreprocessLike | None = None,
    ):
        super().__init__()
        if not isinstance(net, FullyConvolutional):
            raise ArgumentError(
                f"net must be a converted network, got {type(net).__name__}; pass "
                "fcvgg.convert(model)"
            )
        check_choice("variant", variant, VARIANTS)
        check_choice("padding", padding, ("same", "valid"))
        check_integer("num_classes", num_classes, 1)
        check_preprocess(preprocess)
        if not 2 <= num_classes <= IGNORE_INDEX:
            raise ArgumentError(
                f"num_classes must be 2 to {IGNORE_INDEX}, got {num_classes}; add a class for "
                "everything else"
            )
        backbone = without_classifier(net, copy, padding == "same")
        self._build(backbone, num_classes, variant, learn_upsampling)
        self.categories = categories
        self.preprocess = net.preprocess if preprocess is None else preprocess
        if init_from is not None:
            self._load_coarser(init_from, shared=not copy)

    def _channels_of_images(self) -> int:
        return self.backbone.in_channels

    @classmethod
    def _of(
        cls, backbone: FullyConvolutional, num_classes: int, variant: str, learned: bool
    ) -> FCN:
        """A network on a backbone that has no classifier, for reading files."""
        check_choice("variant", variant, VARIANTS)
        fcn = cls.__new__(cls)
        nn.Module.__init__(fcn)
        fcn._build(backbone, num_classes, variant, learned)
        return fcn

    def _build(
        self, backbone: FullyConvolutional, num_classes: int, variant: str, learned: bool
    ) -> None:
        dtype = dtype_of(backbone)
        self.num_classes = num_classes
        self.variant = variant
        self.learn_upsampling = learned
        self.sources = map_sources(backbone, VARIANTS[variant])
        self.backbone = return_maps_(backbone, self.sources)
        self.training = backbone.training
        self.scores = nn.ModuleDict(
            {_key(source): Score(source.channels, num_classes) for source in self.sources}
        ).train(self.training)
        grids = [source.geometry for source in self.sources]
        self.upsamplings = nn.ModuleDict(
            {
                _key(finer): BilinearUpsampling(num_classes, cells, finer.geometry, learned, dtype)
                for cells, finer in zip(grids, self.sources[1:])
            }
        ).train(self.training)
        self.to_pixels = BilinearUpsampling(num_classes, grids[-1], PIXELS, dtype=dtype)
        self.to(device_of(backbone), dtype)

    def _load_coarser(self, coarser: FCN, shared: bool) -> None:
        """Take the weights of a variant that scores fewer maps.

        Raises:
            ArgumentError: if they do not fit.
        """
        if not isinstance(coarser, FCN):
            raise ArgumentError(
                f"init_from must be a trained fcvgg.FCN, got {type(coarser).__name__}"
            )
        state = coarser.state_dict()
        own = self.state_dict()
        wrong = [k for k, v in state.items() if k not in own or own[k].shape != v.shape]
        if wrong:
            raise ArgumentError(
                "init_from must be a coarser or equal variant of the same network and classes, got "
                f"FCN-{coarser.variant} of {coarser.num_classes} classes for FCN-{self.variant} of "
                f"{self.num_classes}, where {wrong[0]} does not fit"
            )
        backbone = [key for key in state if key.startswith(_BACKBONE_PREFIX)]
        if shared and not all(state[key].equal(own[key]) for key in backbone):
            raise ArgumentError(
                "init_from must have the network's weights where copy=False shares them, got "
                "others; pass copy=True"
            )
        self.load_state_dict(state, strict=False)

    @property
    def categories(self) -> tuple[str, ...] | None:
        """The names of the classes, or None."""
        return self._categories

    @categories.setter
    def categories(self, names: Sequence[str] | str | os.PathLike[str] | None) -> None:
        names = one_per_class(names, self.num_classes, "labels")
        self._categories = None if names is None else distinct_names(names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The categories, or the classes' numbers as text."""
        return self.categories or tuple(map(str, range(self.num_classes)))

    # -- scores -----------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``(N, num_classes, H, W)`` of preprocessed images ``(N, C, H, W)``."""
        maps = self.backbone(images)
        maps = maps if isinstance(maps, tuple) else (maps,)
        (top, bottom), (left, right) = self.backbone.geometry.padding_for(images.shape[2:])
        height, width = images.shape[2:]
        scores: Tensor | None = None
        for source, features in zip(self.sources, maps):
            own = self.scores[_key(source)](features)  # (N, K, h, w)
            if scores is not None:
                own = own + self.upsamplings[_key(source)](scores, own.shape[2:])
            scores = own
        assert scores is not None
        pixels = self.to_pixels(scores, (top + height + bottom, left + width + right))
        return pixels[..., top : top + height, left : left + width]

    def predict(self, image: ImageLike) -> LabelMap:
        """The most probable class of every pixel of one image.

        A pixel whose scores depend on values that are not finite gets `IGNORE_INDEX`.

        Args:
            image: as for `FullyConvolutional.score_map`.

        Raises:
            PreprocessError: if the image needs preprocessing and there is none.
            ImageError: if it cannot be used as an image.
        """
        prepared = prepare(image, self.preprocess, self.backbone.in_channels)
        pixels = prepared.tensor(self.preprocess).to(device_of(self), dtype_of(self))
        with torch.no_grad(), evaluating(self):
            scores = self(pixels)
        if scores.shape[2:] != prepared.size:  # preprocessing resized it
            scores = F.interpolate(scores, prepared.size, mode="bilinear", align_corners=False)
        labels = scores[0].argmax(0).masked_fill(~cells_with_data(scores[0]), IGNORE_INDEX)
        return LabelMap(
            labels=labels.cpu().numpy(),
            categories=self.class_names,
            image=prepared.picture,
        )

    @torch.no_grad()
    def calibrate_(self, images: Tensor) -> FCN:
        """Set every score layer's `Score.magnitude` to the root mean square of its map.

        Do this before training. Layers that have been trained keep theirs, so a variant that
        started from a coarser one calibrates only its new layers.

        Args:
            images: preprocessed ``(N, C, H, W)``.
        """
        with evaluating(self):
            maps = self.backbone(images.to(device_of(self), dtype_of(self)))
        for source, features in zip(self.sources, maps if isinstance(maps, tuple) else (maps,)):
            score = self.scores[_key(source)]
            assert isinstance(score, Score)
            if not score.conv.weight.any():
                magnitude = features.square().mean().sqrt()
                score.magnitude.copy_(magnitude if magnitude > 0 else torch.ones(()))
        return self

    # -- files ------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a folder that `FCN.load` restores bit for bit; it holds data, no code.

        A folder of an FCN already there is replaced once the new one is complete; files that
        somebody put into it, such as a README, stay.

        Raises:
            FcvggError: if `path` is something else than such a folder, or cannot be written.
        """
        path = checked_folder(path, "path")
        if path.exists() and not (path / CONFIG).is_file():
            raise FcvggError(f"{path} exists and is not the folder of an FCN; choose another name")
        config = {
            "format": _FORMAT,
            "variant": self.variant,
            "num_classes": self.num_classes,
            "learn_upsampling": self.learn_upsampling,
            "categories": self.categories,
            "preprocess": encoded_preprocess(self.preprocess),
        }
        own = {k: v for k, v in self.state_dict().items() if not k.startswith(_BACKBONE_PREFIX)}
        with saved_folder(path, (CONFIG, SCORES, BACKBONE)) as folder:
            with_first_map(self.backbone).save(folder / BACKBONE)
            write_tensors(folder / SCORES, {k: v.contiguous() for k, v in own.items()})
            write_description(folder / CONFIG, config)
        return path

    @classmethod
    def load(cls, path: str | Path) -> FCN:
        """The network of a folder that `save` wrote.

        Raises:
            LoadError: if it is not such a folder, or is broken.
        """
        path = Path(path)
        config = _read_config(path)
        if not (path / BACKBONE).is_dir():
            raise LoadError(f"{path} is broken: it has no folder {BACKBONE}")
        backbone = load(path / BACKBONE)
        try:
            state = read_tensors(path / SCORES)
            count, learned = config["num_classes"], config["learn_upsampling"]
            if type(count) is not int or count < 1 or type(learned) is not bool:
                raise LoadError(
                    f"{CONFIG} must hold a positive num_classes, and true or false for "
                    f"learn_upsampling, got {count!r} and {learned!r}"
                )
            if not any(count in tensor.shape for tensor in state.values()):
                raise LoadError(
                    f"num_classes must be that of the tensors in {SCORES}, got {count} in {CONFIG}"
                )
            fcn = cls._of(backbone, count, config["variant"], learned)
            fcn.categories = config["categories"]
            fcn.preprocess = decoded_preprocess(config["preprocess"])
            own = fcn.state_dict()
            kept = {key: own[key] for key in own if key.startswith(_BACKBONE_PREFIX)}
            fcn.load_state_dict({**kept, **state})
        except Exception as error:  # a description can be wrong in any way
            raise LoadError(f"{path} does not describe an FCN: {one_line(error)}") from error
        return fcn.eval()

    def extra_repr(self) -> str:
        read = ", ".join(f"{s.name} at stride {s.geometry.stride[0]}" for s in self.sources)
        return f"FCN-{self.variant}, {self.num_classes} classes, scoring {read}"


def _key(source: MapSource) -> str:
    return source.name.replace(".", "_")


def _read_config(path: Path) -> dict[str, Any]:
    config = read_description(path / CONFIG, "the folder of an FCN")
    if config.get("format") != _FORMAT:
        raise LoadError(
            f"{path / CONFIG} must have format {_FORMAT}, got {config.get('format')!r}; upgrade "
            "fcvgg, or save the network again if the format is older"
        )
    return config
