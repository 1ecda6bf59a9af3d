"""Train from labels of whole images, and see where in the image the evidence lies.

    pip install '.[train,examples]'
    python examples/slide_labels.py                 # two minutes
    python examples/slide_labels.py --quick         # too little to learn, in seconds

Mosaics are made of photographs that scikit-image ships: grass, gravel and stained tissue, in grey
and with equal mean and contrast. Half of them hold a small patch of brick, and that a mosaic does
is all that training is told. The network gives a map of scores, a pooling head makes one score of
it, and `net.streamed` gives the gradients of the whole image in bounded memory, whatever its size.
Training sees the upper halves of the photographs, the test mosaics are made of the lower halves.
The convolutions begin as those of the packaged face detector, the first four of them frozen.

It prints how many of the test mosaics are labelled right, and how well the maps, whose cells had no
labels, tell brick from the rest; the figure shows both.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from textures import TEST, TRAIN, Region, bent, mosaic, textures
from torch import Tensor, nn

import fcvgg
from fcvgg.training import TopSharePool

BATCH = 4


@dataclass(frozen=True)
class Slide:
    """A mosaic: the image ``(H, W)``, and the pixels that are brick."""

    image: NDArray[np.uint8]
    brick: NDArray[np.bool_]

    @property
    def label(self) -> Tensor:
        return torch.tensor([[float(self.brick.any())]])


def main() -> None:
    """Train, test, and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--epochs", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--slides", type=int, default=32, help="to train on (%(default)s)")
    parser.add_argument("--side", type=int, default=320, help="pixels, 512 at most (%(default)s)")
    parser.add_argument("--memory", default="256MiB", help="of net.streamed (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("slide_labels.png"))
    parser.add_argument("--quick", action="store_true", help="too little of everything, in seconds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs, arguments.slides, arguments.side = 1, 4, 160

    torch.manual_seed(0)
    net = fcvgg.convert(
        texture_net(), preprocess=fcvgg.load("demo").preprocess, categories=["brick"]
    )
    pool = TopSharePool(0.03)  # of the cells, which a small patch covers
    train(net, pool, slides(TRAIN, arguments.slides, arguments.side), arguments)
    test = slides(TEST, max(arguments.slides // 2, 2), arguments.side)
    report(net, pool, test)
    save_figure(net, test, arguments.output)
    print(f"wrote {arguments.output}")


# -- data -----------------------------------------------------------------------------------------


def slides(region: Region, count: int, side: int) -> list[Slide]:
    """Mosaics of one region of the photographs, every second one with a patch of brick."""
    halves = [np.vstack([half, half[::-1]]) for half in textures(region)]  # 512 x 512, mirrored
    brick, grass, gravel, tissue = halves
    found = []
    for i in range(count):
        rng = np.random.default_rng((region.top, i))
        image, _ = mosaic([grass, gravel, tissue, gravel], side, rng)
        radius = rng.uniform(36, 48) if i % 2 else 0
        y, x = np.mgrid[:side, :side] + bent(side, rng) - rng.uniform(50, side - 50, (2, 1, 1))
        patch = y**2 + x**2 < radius**2
        top, left = (rng.integers(n - side + 1) for n in brick.shape)
        image = np.where(patch, brick[top : top + side, left : left + side], image)
        found.append(Slide(image, patch))
    return found


# -- training -------------------------------------------------------------------------------------


def texture_net() -> nn.Module:
    """The convolutions of the demo's network under a new head with one score."""
    model = fcvgg.demo.demo_model()
    fcvgg.freeze_(model, upto="pool2")
    model.classifier = nn.Sequential(nn.Linear(64 * 4 * 4, 32), nn.ReLU(True), nn.Linear(32, 1))
    return model


def train(
    net: fcvgg.FullyConvolutional,
    pool: nn.Module,
    data: list[Slide],
    arguments: argparse.Namespace,
) -> None:
    """A plain loop; each slide's graph is gone before the next slide."""
    wanted = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in wanted if "classifier" in name], "lr": 3e-3},
        {"params": [p for name, p in wanted if "classifier" not in name], "lr": 3e-4},
    ]
    optimiser = torch.optim.AdamW(groups)
    net.train()
    start = time.perf_counter()
    for epoch in range(arguments.epochs):
        losses = []
        for batch in torch.randperm(len(data)).split(BATCH):
            optimiser.zero_grad()
            for i in batch:
                scores = pool(net.streamed(data[i].image, memory=arguments.memory))  # (1, 1)
                loss = F.binary_cross_entropy_with_logits(scores, data[i].label)
                (loss / len(batch)).backward()
                losses.append(loss.item())
            optimiser.step()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, {seconds:.0f} s", flush=True)
    net.eval()


# -- what was learnt ------------------------------------------------------------------------------


@torch.no_grad()
def report(net: fcvgg.FullyConvolutional, pool: nn.Module, data: list[Slide]) -> None:
    """Print the labels that are right, and how well cells with brick are told from the others."""
    maps = [net.score_map(slide.image).scores[None] for slide in data]
    right = [(pool(m) > 0) == (slide.label > 0) for m, slide in zip(maps, data)]
    print(f"accuracy: {np.mean(right):.1%} of {len(data)} mosaics")
    positive = [(m, slide) for m, slide in zip(maps, data) if slide.label > 0]
    scores = torch.cat([m.flatten() for m, _ in positive])
    brick = torch.cat([cells_with_brick(net, slide).flatten() for _, slide in positive])
    print(f"evidence: AUC {auc(scores, brick):.3f} over {len(brick)} cells, {brick.sum()} on brick")


def cells_with_brick(net: fcvgg.FullyConvolutional, slide: Slide) -> Tensor:
    """Whether the pixel in the middle of each cell is brick, bool ``(h, w)``."""
    h, w = net.output_size(slide.brick.shape)
    y, x = (
        [int(net.geometry.centre_of(i, i)[axis]) for i in range(n)] for axis, n in ((0, h), (1, w))
    )
    return torch.from_numpy(slide.brick[np.ix_(y, x)])


def auc(scores: Tensor, positive: Tensor) -> float:
    """How often a cell with brick has a higher score than one without."""
    ranks = scores.argsort().argsort().double() + 1
    count, others = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def save_figure(net: fcvgg.FullyConvolutional, data: list[Slide], path: Path) -> None:
    """Test mosaics, the true patches outlined, above the probabilities of brick."""
    import matplotlib.pyplot as plt

    shown = data[: 8 if len(data) >= 8 else 2]
    figure, axes = plt.subplots(
        2, len(shown), figsize=(1.9 * len(shown), 4), layout="constrained", squeeze=False
    )
    for (above, below), slide in zip(axes.T, shown):
        heatmap = net.heatmap(slide.image, "brick")
        above.imshow(slide.image, cmap="gray", vmin=0, vmax=255)
        below.imshow(heatmap.overlay())
        above.set_title("brick" if slide.brick.any() else "none", fontsize="medium")
        below.set_title(f"peak {heatmap.values.max():.2f}", fontsize="medium")
        for axis in (above, below):
            axis.axis("off")
            if slide.brick.any():
                axis.contour(slide.brick, [0.5], colors="tab:orange", linewidths=1.5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
