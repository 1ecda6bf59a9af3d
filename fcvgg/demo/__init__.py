"""A small face detector in the shape of VGG, packaged with its weights and one test photograph."""

from __future__ import annotations

from importlib import resources
from io import BytesIO

import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor, nn

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
