"""Preprocessing of torchvision, timm and transformers, against what they themselves give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
import torchvision.models as zoo
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

import fcvgg
from fcvgg.images.pipelines import given_preprocess
from fcvgg.images.preprocessing import NativeView, decoded_preprocess, encoded_preprocess
from fcvgg.loading import load_with_source

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FLOAT = {"dtype": torch.float32, "scale": True}
CONFIG = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": MEAN, "std": STD}


def photograph(height: int = 151, width: int = 219, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).normal(0, 20, (height, width, 3))
    waves = np.stack([np.sin(y / 9) + np.cos(x / 7), np.sin(x / 20) * 2, np.cos(x * y / 999)], 2)
    return Image.fromarray((waves * 60 + 127 + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def classifier(channels: int = 3) -> nn.Sequential:
    """Window 8, stride 4."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 2)).eval()


PIPELINES: dict[str, Any] = {
    "weights": zoo.VGG11_Weights.DEFAULT.transforms(),
    "bicubic weights": zoo.EfficientNet_B0_Weights.DEFAULT.transforms(),
    "tensor after Pillow": v1.Compose(
        [v1.Resize(64), v1.CenterCrop(56), v1.ToTensor(), v1.Normalize(MEAN, STD)]
    ),
    "squeezed": v1.Compose(
        [v1.Resize((60, 40), interpolation=InterpolationMode.BICUBIC), v1.ToTensor()]
    ),
    "floats resized without antialias": v1.Compose(
        [v1.ToTensor(), v1.Resize(50, antialias=False), v1.Normalize([0.5], [0.5])]
    ),
    "bytes resized by v1": v1.Compose(
        [
            v1.PILToTensor(),
            v1.Resize(99),
            v1.ConvertImageDtype(torch.float),
            v1.CenterCrop((80, 70)),
        ]
    ),
    "bytes resized by v2": v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(64),
            v2.CenterCrop(56),
            v2.ToDtype(**FLOAT),
            v2.Normalize(MEAN, STD),
        ]
    ),
    "values to 255": v2.Compose(
        [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
            v2.Normalize([123.7, 116.3, 103.5], [58.0] * 3),
        ]
    ),
    "floats of images alone": v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    ),
    "normalised twice": v2.Compose(
        [
            *(v2.ToImage(), v2.ToDtype(**FLOAT), v2.Normalize(MEAN, STD), v2.Resize(77)),
            *(v2.Normalize([0.1, 0.2, 0.3], [2.0] * 3), v2.ToPureTensor()),
        ]
    ),
    "nested": v1.Compose([v1.Compose([v1.Resize(64), v1.CenterCrop(50)]), v1.ToTensor()]),
    "of timm": timm.data.create_transform((3, 64, 64), crop_pct=0.9, interpolation="bicubic"),
    "squeezed by timm": timm.data.create_transform((3, 64, 64), crop_pct=1.0, crop_mode="squash"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_read_to_rounding(name: str) -> None:
    """Its own resize and crop of an odd photograph, and its values at any size."""
    pipeline, image = PIPELINES[name], photograph()
    read = given_preprocess(pipeline, 3)
    assert read is not None
    torch.testing.assert_close(
        read.at_native_size(image)[0], pipeline(image).as_subclass(Tensor), rtol=0, atol=1e-6
    )
    assert read.resize is None  # dense use keeps the size of the image
    assert read(image).shape == (1, 3, 151, 219)


def test_the_values_at_the_native_size_are_the_official_ones() -> None:
    net = fcvgg.convert(classifier(), preprocess=zoo.VGG11_Weights.DEFAULT.transforms())
    assert net.preprocess is not None
    assert net.preprocess.view == NativeView(resize=256, crop=(224, 224))
    official = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])
    image = photograph(8, 8)
    torch.testing.assert_close(net.preprocess(image)[0], official(image), rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = net(official(image)[None])[0]
    torch.testing.assert_close(net.score_map(image).scores, expected, rtol=1e-5, atol=1e-6)


def test_modules_of_tensors() -> None:
    pipeline = nn.Sequential(
        v1.Resize(64), v1.ConvertImageDtype(torch.float), v1.Normalize(MEAN, STD)
    )
    read, image = given_preprocess(pipeline, 3), photograph()
    assert read is not None
    torch.testing.assert_close(
        read.at_native_size(image)[0], pipeline(as_tensor(image)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "weights", [zoo.VGG11_Weights.DEFAULT, zoo.VGG11_Weights.DEFAULT.transforms]
)
def test_weights_stand_for_their_transforms(weights: Any) -> None:
    expected = given_preprocess(zoo.VGG11_Weights.DEFAULT.transforms(), 3)
    assert given_preprocess(weights, 3) == expected


def test_one_mean_stands_for_every_channel_as_in_torchvision() -> None:
    pipeline = v1.Compose([v1.ToTensor(), v1.Normalize([0.5], [0.25])])
    assert given_preprocess(pipeline, 3) == fcvgg.Preprocess((0.5,) * 3, (0.25,) * 3)
    assert given_preprocess(pipeline, 1) == fcvgg.Preprocess(0.5, 0.25)


def test_a_grey_network() -> None:
    pipeline = v1.Compose([v1.Grayscale(), v1.ToTensor(), v1.Normalize([0.5], [0.25])])
    net = fcvgg.convert(classifier(1), preprocess=pipeline)
    assert net.preprocess == fcvgg.Preprocess(0.5, 0.25)
    image = photograph(9, 12)
    with torch.no_grad():
        expected = net(pipeline(image)[None])[0]
    torch.testing.assert_close(net.score_map(image).scores, expected, rtol=1e-5, atol=1e-6)


# -- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"crop_pct": 0.9}, {"crop_mode": "squash", "crop_pct": 1.0}, {"mean": (0.5,) * 3}],
    ids=str,
)
def test_timms_data_configuration(changes: dict[str, Any]) -> None:
    config = timm.data.resolve_data_config({**CONFIG, **changes})
    read, image = given_preprocess(config, 3), photograph()
    assert read is not None
    official = timm.data.create_transform(**config)(image)
    torch.testing.assert_close(read.at_native_size(image)[0], official, rtol=0, atol=1e-6)
    assert fcvgg.convert(classifier(), preprocess=config).preprocess == read


def test_timms_own_configuration_of_a_model() -> None:
    config = timm.models.get_pretrained_cfg("vgg16")
    read = given_preprocess(config, 3)
    assert read == given_preprocess(config.to_dict(), 3) == fcvgg.Preprocess(MEAN, STD)
    assert read.view == NativeView(resize=256, crop=(224, 224))


def test_timms_border_has_no_view() -> None:
    read = given_preprocess({**CONFIG, "crop_mode": "border"}, 3)
    assert read is not None
    assert read.view is None
    assert read == fcvgg.Preprocess(MEAN, STD, interpolation="bicubic")


# -- transformers ---------------------------------------------------------------------------------

SIZES = {"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 48}}
PROCESSORS = {
    "ViT": {"size": {"height": 40, "width": 48}},
    "ConvNext": {"size": {"shortest_edge": 56}, "crop_pct": 0.875},
    "CLIP": SIZES,
    "MobileViT": SIZES,
    "MobileNetV2": SIZES,
    "EfficientNet": {"size": {"height": 40, "width": 48}, "rescale_offset": True},
    "Beit": {"size": {"height": 40, "width": 48}},
    "Bit": SIZES,
}


@pytest.mark.parametrize("of", ["", "Pil"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_transformers_image_processors(name: str, of: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, f"{name}ImageProcessor{of}", None)
    if kind is None:
        pytest.skip("this version of transformers has one kind only")
    processor, image = kind(**PROCESSORS[name]), photograph()
    read = given_preprocess(processor, 3)
    assert read is not None
    theirs = processor(images=image, return_tensors="np")["pixel_values"][0]
    torch.testing.assert_close(
        read.at_native_size(image)[0], torch.from_numpy(np.array(theirs)), rtol=0, atol=1e-6
    )
    assert fcvgg.convert(classifier(), preprocess=processor).preprocess == read


def test_a_processor_that_resizes_in_its_own_way_has_no_view() -> None:
    transformers = pytest.importorskip("transformers")
    processor, image = transformers.LevitImageProcessor(), photograph()
    read = given_preprocess(processor, 3)
    assert read is not None
    assert read.view is None
    whole = processor(images=image, do_resize=False, do_center_crop=False, return_tensors="np")
    torch.testing.assert_close(
        read(image)[0], torch.from_numpy(whole["pixel_values"][0]), rtol=0, atol=1e-6
    )


def test_a_processors_other_steps_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(
        fcvgg.PreprocessError, match=r"got DonutImageProcessor\w* with do_pad, do_thumbnail; set it"
    ):
        given_preprocess(transformers.DonutImageProcessor(), 3)


def test_a_class_of_processors_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(fcvgg.PreprocessError, match=r"got the class ViTImageProcessor$"):
        given_preprocess(transformers.ViTImageProcessor, 3)


def test_a_processors_configuration() -> None:
    config = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    config |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_resize": True, "resample": 3}
    read = given_preprocess({**config, "size": {"height": 9, "width": 8}}, 3)
    assert read is not None
    assert (read.mean, read.std, read.interpolation) == ((0.5,) * 3, (0.25,) * 3, "bicubic")
    assert read.view is not None
    assert read.view.resize == (9, 8)


# -- what is refused ------------------------------------------------------------------------------

TENSOR = [v1.ToTensor(), v1.Normalize(MEAN, STD)]


def halved(image: Tensor) -> Tensor:
    return image / 2


class Subclass(v1.Normalize):
    def forward(self, tensor: Tensor) -> Tensor:
        return super().forward(tensor) * 2


REFUSED: dict[str, tuple[Any, str]] = {
    "a flip": (
        v1.Compose([v1.RandomHorizontalFlip(), *TENSOR]),
        r"preprocess must have only steps that resize, .*, got RandomHorizontalFlip, which is "
        r"random or unknown; leave it out, or pass fcvgg\.Preprocess\(mean, std\)",
    ),
    "Lambda": (
        v1.Compose([v1.ToTensor(), v1.Lambda(halved)]),
        r".* got Lambda, which is random or",
    ),
    "a function": (
        v1.Compose([v1.ToTensor(), halved]),
        r".* got the function halved, which is ran",
    ),
    "a subclass": (v1.Compose([v1.ToTensor(), Subclass(MEAN, STD)]), r".* got Subclass, which is "),
    "one of several": (
        v2.Compose([v2.RandomApply([v2.ColorJitter()])]),
        r".* got RandomApply, whi",
    ),
    "a step alone": (v1.ColorJitter(0.5), r".* got ColorJitter, which is random or unknown"),
    "timm's training": (
        timm.data.create_transform((3, 64, 64), is_training=True),
        r".* got RandomResizedCropAndInterpolation, which is random",
    ),
    "a network": (classifier(), r".* got Conv2d, which is random or unknown"),
    "no floats": (
        v1.Compose([v1.PILToTensor()]),
        r"preprocess must make floats of pixels, got step",
    ),
    "Normalize alone": (
        v1.Normalize(MEAN, STD),
        r".* before Normalize, got Normalize alone; add T",
    ),
    "grey of three": (
        v1.Compose([v1.Grayscale(3), *TENSOR]),
        r".*, got Grayscale\(3\); pass grey ",
    ),
    "a longest side": (
        v1.Compose([v1.Resize(64, max_size=99), *TENSOR]),
        r"preprocess must resize to a size, got Resize\(max_size=99\); leave it out",
    ),
    "a resize of the crop": (
        v1.Compose([v1.CenterCrop(64), v1.Resize(50), *TENSOR]),
        r"preprocess must resize once, and before it crops, got another Resize; leave it out",
    ),
    "two crops": (
        v1.Compose([v1.CenterCrop(64), v1.CenterCrop(50), *TENSOR]),
        r"preprocess must crop once, got another CenterCrop; leave one of them out",
    ),
    "whole numbers": (
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.int64)]),
        r"preprocess must convert pixels to floats, got ToDtype to torch\.int64; pass torch",
    ),
    "an interpolation": (
        v1.Compose([v1.Resize(64, InterpolationMode.BOX), *TENSOR]),
        r"interpolation must be 'nearest', .*, got 'box'",
    ),
    "channels": (
        v1.Compose([v1.ToTensor(), v1.Normalize([1, 2], [1, 1])]),
        r"preprocess must be for the network's 3 channels, got 2 in Compose; pass fcvgg",
    ),
    "grey for colours": (
        v1.Compose([v1.Grayscale(), v1.ToTensor()]),
        r"preprocess must be for the network's 3 channels, got 1 in Compose",
    ),
    "no configuration": ({"crop_pct": 0.9}, r".* mean and std, got a dict of crop_pct; pass fcvgg"),
    "text": ({"mean": "a", "std": "b"}, r"mean must hold numbers, got 'a'"),
    "a number": (42, r"preprocess must be a fcvgg\.Preprocess, .*, got 42$"),
    "a class": (
        v1.Normalize,
        r"preprocess must be a fcvgg\.Preprocess, .*, got the class Normalize",
    ),
    "a lambda": (lambda image: image, r"preprocess must be a .*, got the function <lambda>"),
    "an array": (np.zeros(3), r"preprocess must be a .*, got ndarray"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_steps_that_are_refused(name: str) -> None:
    pipeline, message = REFUSED[name]
    with pytest.raises(fcvgg.PreprocessError, match=f"^{message}") as caught:
        given_preprocess(pipeline, 3)
    assert "\n" not in str(caught.value)


def _fcn(preprocess: Any) -> Any:
    return fcvgg.FCN(fcvgg.load("demo"), 2, preprocess=preprocess)


WAYS_IN: dict[str, Callable[[Any], Any]] = {
    "convert": lambda given: fcvgg.convert(classifier(), preprocess=given),
    "load": lambda given: fcvgg.load("demo", preprocess=given),
    "load, before a file": lambda given: fcvgg.load("absent.onnx", preprocess=given),
    "load_with_source": lambda given: load_with_source("demo", preprocess=given),
    "finetune": lambda given: fcvgg.finetune(Path("images"), "demo", "run", preprocess=given),
    "FCN": _fcn,
    "features": lambda given: fcvgg.VGGFeatures("demo", preprocess=given).fit(["images/a/0.png"]),
    "attribute": lambda given: setattr(fcvgg.load("demo"), "preprocess", given),
}
UNUSABLE = (42, (0.5, 0.5), v1.Compose([v1.RandomHorizontalFlip(), *TENSOR]))


@pytest.mark.parametrize("way", WAYS_IN)
def test_every_way_in_checks_at_once(tmp_path: Path, monkeypatch: Any, way: str) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            photograph(70, 70).save(tmp_path / "images" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    for unusable in UNUSABLE:
        with pytest.raises(fcvgg.PreprocessError, match=r"^preprocess must "):
            WAYS_IN[way](unusable)


def test_a_module_is_not_registered_as_a_layer() -> None:
    net = fcvgg.convert(classifier())
    before = list(net.state_dict())
    net.preprocess = zoo.VGG11_Weights.DEFAULT.transforms()
    assert isinstance(net.preprocess, fcvgg.Preprocess)
    assert list(net.state_dict()) == before
    assert not any(isinstance(module, v1.Normalize) for module in net.modules())
    fcn = fcvgg.FCN(fcvgg.load("demo"), 2)
    fcn.preprocess = zoo.VGG11_Weights.DEFAULT.transforms()
    assert fcn.preprocess == net.preprocess


# -- afterwards -----------------------------------------------------------------------------------


def test_a_bundle_keeps_the_view(tmp_path: Path) -> None:
    net = fcvgg.convert(classifier(), preprocess=PIPELINES["bytes resized by v2"])
    net.save(tmp_path / "net")
    kept = fcvgg.load(tmp_path / "net").preprocess
    assert kept is not None
    assert net.preprocess is not None
    assert (kept, kept.view) == (net.preprocess, net.preprocess.view)
    assert kept.view == NativeView(64, (56, 56), "bytes")
    changed = fcvgg.load(tmp_path / "net", preprocess=CONFIG)
    assert changed.preprocess == given_preprocess(CONFIG, 3)


@pytest.mark.parametrize("view", [7, {"resize": "large"}, {"resampling": "best"}], ids=str)
def test_a_broken_view_is_refused(view: Any) -> None:
    data = encoded_preprocess(fcvgg.Preprocess.imagenet())
    assert data is not None
    assert "view" not in data  # which older versions do not know
    with pytest.raises(fcvgg.PreprocessError, match=r"(view|resize|resampling) must be"):
        decoded_preprocess({**data, "view": view})


def test_the_center_crop_of_an_evaluation_is_the_official_one(tmp_path: Path) -> None:
    """Resized to 11 (13 by the usual rule), and cut off rather than rounded."""
    pytest.importorskip("torchmetrics")
    pipeline = v1.Compose([v1.Resize(11), v1.CenterCrop(8), *TENSOR])
    model = classifier()
    images = [photograph(20 + 3 * i, 31 + i) for i in range(12)]
    with torch.no_grad():
        scores = torch.cat([model(pipeline(image)[None]) for image in images])
        model[-1].bias -= scores.mean(0)  # so that both classes occur
        top = [int(model(pipeline(image)[None]).argmax()) for image in images]
    net = fcvgg.convert(model, preprocess=pipeline, categories=("a", "b"))
    assert len(set(top)) == 2
    found = fcvgg.evaluate(net, list(zip(images, top)), protocols="center-crop").results[0]
    assert (found.top1, found.scales, found.views) == (1.0, (11,), 1)


def test_fine_tuning_takes_a_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    for name, grey in (("a", 0), ("b", 255)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (12, 12), grey).save(tmp_path / "images" / name / f"{i}.png")
    net = fcvgg.finetune(
        tmp_path / "images",
        classifier(),
        tmp_path / "run",
        preprocess=v1.Compose(TENSOR),
        **{"strategy": "linear", "epochs": 1, "batch_size": 2},
    ).net
    assert net.preprocess == fcvgg.Preprocess(MEAN, STD)


def test_a_partial_of_something_else_is_refused() -> None:
    with pytest.raises(fcvgg.PreprocessError, match=r"^preprocess must be a .*, got partial$"):
        given_preprocess(partial(halved), 3)
