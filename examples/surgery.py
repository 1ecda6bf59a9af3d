"""Take a trained network apart by layer names, put it together anew, and convert what comes out.

Runs offline in seconds: it takes the packaged face detector, a VGG in miniature, and photographs
that scikit-image ships (``pip install 'fcvgg[examples]'``).

1. Two 3x3 convolutions become one 5x5 that is given their product's weights, and see the same.
2. The features up to a pool get a new head, for textures, which is fitted on real photographs.
3. The new classifier is moved to another input size, with its head resampled or at random.
4. It is converted, and labels a mosaic of textures that it has not seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from skimage import data
from torch import Tensor, nn

import fcvgg
from fcvgg.demo import MEAN, STD, demo_model

CLASSES = ("brick", "grass", "gravel")
SIZE = 64


def main() -> None:
    """Run the four steps and write the mosaic's label map beside its picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("surgery.png"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

    detector = demo_model()
    print("1. two 3x3 convolutions become one 5x5")
    edited = fcvgg.replace_layers(detector, "conv1_1", "conv1_2", merged(detector))
    print(fcvgg.geometry_changes(detector, edited))

    print("\n2. features up to pool2, and a new head for textures")
    classifier = texture_classifier(detector)
    print(fcvgg.layer_names(classifier))
    seen, labels = crops(SIZE, left=True)
    unseen, truth = crops(SIZE, left=False)
    fit_head(classifier, seen, labels)
    print(
        f"accuracy on unseen halves of the photographs: {accuracy(classifier, unseen, truth):.2f}"
    )

    print("\n3. the same classifier for other sizes, before any training")
    for size in (48, 56, 80):
        scaled, truth = crops(size, left=False)
        for init in ("resample", "random"):
            moved = fcvgg.for_input_size(classifier, size, init=init)
            print(f"{size} pixels, {init}: accuracy {accuracy(moved, scaled, truth):.2f}")

    print("\n4. converted, on a mosaic")
    net = fcvgg.convert(
        classifier, categories=CLASSES, preprocess=fcvgg.Preprocess(MEAN, STD), output_stride=4
    )
    print(net.equivalence)
    mosaic, where = textures_mosaic()
    score_map = net.score_map(mosaic)
    found = score_map.resample().argmax(0).numpy()
    print(f"{(found == where).mean():.1%} of the mosaic's pixels are labelled right")
    save(mosaic, found, arguments.output)
    print(f"wrote {arguments.output}")


def merged(model: nn.Module) -> nn.Conv2d:
    """One 5x5 convolution that does what conv1_1 and conv1_2 do, but for the ReLU between them."""
    features = fcvgg.features_upto(model, "conv1_2")
    first, second = features.conv1_1, features.conv1_2
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    assert first.bias is not None
    assert second.bias is not None
    new = nn.Conv2d(first.in_channels, second.out_channels, 5, padding=2)
    new.weight.data = F.conv_transpose2d(second.weight.data, first.weight.data)
    new.bias.data = second.bias.data + second.weight.data.sum((2, 3)) @ first.bias.data  # type: ignore
    return new


def texture_classifier(model: nn.Module) -> nn.Sequential:
    """The first two blocks, frozen, under one fully connected layer."""
    features = fcvgg.features_upto(model, "pool2")
    cells = SIZE // features.geometry.stride[0]
    classifier = nn.Sequential(
        features, nn.Flatten(), nn.Linear(features.out_channels * cells**2, len(CLASSES))
    )
    return fcvgg.freeze_(classifier, upto="pool2").eval()


def crops(size: int, left: bool, count: int = 24) -> tuple[Tensor, Tensor]:
    """Preprocessed crops ``(N, 3, size, size)`` of one half of each photograph, and their classes.

    A size other than 64 shows the same pixels enlarged, as a camera with more pixels would.
    """
    rng = np.random.default_rng(0)
    images = []
    for name in CLASSES:
        photograph = getattr(data, name)()
        for _ in range(count):
            y, x = rng.integers(0, 512 - SIZE), rng.integers(0, 256 - SIZE)
            x += 0 if left else 256
            images.append(photograph[y : y + SIZE, x : x + SIZE])
    grey = torch.from_numpy(np.stack(images)).float()[:, None] / 255  # (N, 1, 64, 64)
    scaled = F.interpolate(grey, (size, size), mode="bicubic", antialias=True)
    labels = torch.arange(len(CLASSES)).repeat_interleave(count)
    return ((scaled - MEAN[0]) / STD[0]).expand(-1, 3, -1, -1), labels


def fit_head(classifier: nn.Sequential, images: Tensor, labels: Tensor) -> None:
    """Fit what is not frozen, the last layer, by a few steps of L-BFGS."""
    parameters = fcvgg.parameter_groups(classifier, {"head": 1.0})[0]["params"]
    loss_of = fcvgg.loss_for(classifier)
    optimiser = torch.optim.LBFGS(parameters, max_iter=30, line_search_fn="strong_wolfe")
    features, head = classifier[0], classifier[1:]
    with torch.no_grad():
        rows = features(images)  # frozen, so once is enough

    def closure() -> Tensor:
        optimiser.zero_grad()
        penalty = sum((p**2).sum() for p in parameters)
        loss: Tensor = loss_of(head(rows), labels) + 0.01 * penalty
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose highest score is their class's."""
    return float((model(images).argmax(1) == labels).float().mean())


def textures_mosaic() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Three stripes of the photographs' unseen halves ``(256, 384)``, and each pixel's class."""
    stripes = [getattr(data, name)()[128:384, 320:448] for name in CLASSES]
    return np.concatenate(stripes, 1), np.repeat(np.arange(3), 128)[None].repeat(256, 0)


def save(mosaic: NDArray[np.uint8], found: NDArray[np.int64], path: Path) -> None:
    """The mosaic and its labels side by side."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(mosaic, cmap="gray")
    left.set_title("mosaic: " + ", ".join(CLASSES))
    colours = colormaps["viridis"].resampled(len(CLASSES))
    shown = right.imshow(found, cmap=colours, vmin=-0.5, vmax=len(CLASSES) - 0.5)
    right.set_title("labels")
    bar = figure.colorbar(shown, ax=right, ticks=range(len(CLASSES)), fraction=0.035)
    bar.ax.set_yticklabels(CLASSES)
    for ax in (left, right):
        ax.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    main()
