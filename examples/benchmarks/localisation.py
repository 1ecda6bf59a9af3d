"""Where is the evidence? The grid pointing game on mosaics of photographs, for maps of classes.

    pip install 'fcvgg[bench,examples]'
    python examples/benchmarks/localisation.py --output localisation

Photographs whose class the network names stand in mosaics of 2x2 and 3x3; a map of one class should
lie in the tile of its photograph ("Towards Better Understanding Attribution Methods", Rao et al.,
https://arxiv.org/abs/2205.10435). The score is the share of the map that lies there, and how often
its highest value does. All methods run on the same network, EfficientNet-Lite0 with its ImageNet
weights; maps are those that each package returns, on the mosaic's pixels, without what lies below
0. Those of fcvgg are probabilities, for which the classes compete at every cell; others have one
class alone. Methods take turns; the memory of each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor

import fcvgg
from fcvgg.demo import imagenet_categories, imagenet_model, imagenet_photographs
from fcvgg.optimization.timing import CLOCKS
from machine import machine, peak_bytes

Map = NDArray[np.float32]
Run = Callable[[Tensor, Sequence[int]], list[Map]]
"""Maps ``(H, W)`` of some classes on an input ``(1, 3, H, W)``, none below 0."""

TILE = 224
GRIDS = (2, 3)
LAYER = "bn2"
"""The network's last features, after their activation, which class activation maps weigh."""


# -- methods --------------------------------------------------------------------------------------


def of_fcvgg(**options: Any) -> Callable[[], Run]:
    """All classes' probabilities in one pass, of which some are laid on the pixels."""

    def make() -> Run:
        net = fcvgg.convert(imagenet_model(), input_size=TILE, verify=False, **options)

        def run(image: Tensor, classes: Sequence[int]) -> list[Map]:
            score_map = net.score_map(image)
            return [score_map.heatmap(k).values for k in classes]

        return run

    return make


def of_grad_cam(method: str) -> Callable[[], Run]:
    """A method of pytorch-grad-cam, a pass for each class."""

    def make() -> Run:
        import pytorch_grad_cam  # type: ignore[import-untyped]
        from pytorch_grad_cam.utils.model_targets import (  # type: ignore[import-untyped]
            ClassifierOutputTarget,
        )

        model = imagenet_model()
        cam = getattr(pytorch_grad_cam, method)(model, [model.get_submodule(LAYER)])
        return lambda image, classes: [cam(image, [ClassifierOutputTarget(k)])[0] for k in classes]

    return make


def of_torchcam(method: str, **options: Any) -> Callable[[], Run]:
    """A method of torchcam, a pass for each class."""

    def make() -> Run:
        from torchcam import methods

        model = imagenet_model()
        cam = getattr(methods, method)(model, LAYER, **options)

        def run(image: Tensor, classes: Sequence[int]) -> list[Map]:
            found = []
            for k in classes:
                scores = model(image.clone().requires_grad_())
                # as they are, cut off at 0: CAM scores less if its lowest value is taken for 0
                (small,) = cam(k, scores, normalized=False)  # (1, h, w)
                whole = F.interpolate(small[None].detach(), image.shape[2:], mode="bilinear")
                found.append(whole[0, 0].clamp(min=0).numpy())
            return found

        return run

    return make


METHODS: dict[str, Callable[[], Run]] = {
    "fcvgg, positions": of_fcvgg(head="position"),
    "fcvgg, positions, output stride 16": of_fcvgg(head="position", output_stride=16),
    "fcvgg, windows": of_fcvgg(),
    "torchcam CAM": of_torchcam("CAM", fc_layer="classifier"),
    "torchcam Grad-CAM": of_torchcam("GradCAM"),
    "torchcam Grad-CAM++": of_torchcam("GradCAMpp"),
    "torchcam Layer-CAM": of_torchcam("LayerCAM"),
    "pytorch-grad-cam Grad-CAM": of_grad_cam("GradCAM"),
    "pytorch-grad-cam Grad-CAM++": of_grad_cam("GradCAMPlusPlus"),
    "pytorch-grad-cam XGrad-CAM": of_grad_cam("XGradCAM"),
    "pytorch-grad-cam HiRes-CAM": of_grad_cam("HiResCAM"),
    "pytorch-grad-cam Layer-CAM": of_grad_cam("LayerCAM"),
}


def is_ours(name: str) -> bool:
    """Whether one pass gives the maps of all classes."""
    return name.startswith("fcvgg")


# -- mosaics --------------------------------------------------------------------------------------


def tiles() -> dict[str, Image.Image]:
    """The middles of six photographs, scikit-image's and scikit-learn's, by the name of a class.

    scikit-learn's, of a palace and a daisy, are under CC BY 2.0 by danielbuechele and vultilion.
    """
    palace, daisy = map(Image.fromarray, load_sample_images().images)
    photographs = {**imagenet_photographs(), "palace": palace, "daisy": daisy}
    size = TILE, TILE
    return {k: ImageOps.fit(v, size, Image.Resampling.BICUBIC) for k, v in photographs.items()}


@dataclass(frozen=True)
class Mosaic:
    """Tiles in rows, each the name of a photograph's class; `targets` are those to be found."""

    side: int
    tiles: tuple[str, ...]
    targets: tuple[str, ...]

    def image(self, photographs: dict[str, Image.Image]) -> Image.Image:
        """The picture; photographs that come again are mirrored."""
        whole = Image.new("RGB", (self.side * TILE,) * 2)
        for place, name in enumerate(self.tiles):
            tile = photographs[name]
            if name in self.tiles[:place]:
                tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            whole.paste(tile, (place % self.side * TILE, place // self.side * TILE))
        return whole

    def within(self, values: Map, target: str) -> Map:
        """The part of a map that lies in a target's tile."""
        row, col = divmod(self.tiles.index(target), self.side)
        return values[row * TILE : (row + 1) * TILE, col * TILE : (col + 1) * TILE]


def mosaics(names: list[str], side: int) -> list[Mosaic]:
    """Mosaics in which every target stands once.

    2x2: every choice of four photographs, all of them targets. 3x3: every photograph three times,
    at every place twice, among the others in an order of chance.
    """
    chance = np.random.default_rng(0)
    if side == 2:
        orders = (chance.permutation(four) for four in combinations(names, 4))
        return [Mosaic(2, tuple(map(str, four)), tuple(map(str, four))) for four in orders]
    found = []
    for number, target in enumerate(names * 3):
        others = [name for name in names if name != target] * 2
        tiles = [str(name) for name in chance.permutation(others)[: side**2 - 1]]
        place = number % side**2
        found.append(Mosaic(side, (*tiles[:place], target, *tiles[place:]), (target,)))
    return found


# -- measurement ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one method reached on the mosaics of one grid.

    Attributes:
        share: the mean share of the map that lies in the target's tile.
        pointing: how often the highest value lies there.
        seconds: the median of a pass: all classes for fcvgg, one class for others.
        memory: bytes that a process of its own held at most.
    """

    method: str
    side: int
    targets: int
    share: float
    pointing: float
    seconds: float
    memory: int

    @property
    def seconds_per_class(self) -> float:
        return self.seconds / (len(imagenet_categories()) if is_ours(self.method) else 1)


def measure(side: int, photographs: dict[str, Image.Image], clock: Any) -> list[Row]:
    """The rows of all methods on one grid."""
    runs: dict[str, Run] = {}
    for name, make in METHODS.items():
        try:
            runs[name] = make()
        except ImportError as error:
            print(f"left out {name}: {error}")
    preprocess = fcvgg.Preprocess.preset("tf")
    shares: dict[str, list[float]] = {name: [] for name in runs}
    hits: dict[str, list[bool]] = {name: [] for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    indices = {name: imagenet_categories().index(name) for name in photographs}
    for mosaic in mosaics(list(photographs), side):
        image = preprocess(mosaic.image(photographs))
        for name, run in runs.items():
            targets = [mosaic.targets] if is_ours(name) else [[t] for t in mosaic.targets]
            for group in targets:
                start = clock()
                maps = run(image, [indices[t] for t in group])
                times[name].append(clock() - start)
                for target, values in zip(group, maps):
                    inside = mosaic.within(values, target)
                    shares[name].append(float(inside.sum() / max(values.sum(), 1e-12)))
                    hits[name].append(bool(inside.max() == values.max()))
    return [
        Row(
            method=name,
            side=side,
            targets=len(shares[name]),
            share=float(np.mean(shares[name])),
            pointing=float(np.mean(hits[name])),
            seconds=float(np.median(times[name])),
            memory=peak_memory(name, side),
        )
        for name in runs
    ]


def peak_memory(name: str, side: int) -> int:
    """Bytes that a new process holds at most while it makes a map."""
    command = [sys.executable, __file__, "--child", name, "--sides", str(side)]
    return int(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))


def measure_memory(name: str, side: int) -> None:
    """Run in a process of its own; prints the bytes."""
    run = METHODS[name]()
    for _ in range(2):
        run(torch.zeros(1, 3, side * TILE, side * TILE), [0])
    print(peak_bytes())


# -- reports --------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], about: str) -> str:
    """A table for each grid, the best first."""
    lines = ["# efficientnet-lite0: grid pointing game", "", about]
    for side in dict.fromkeys(row.side for row in rows):
        ranked = sorted((r for r in rows if r.side == side), key=lambda r: -r.share)
        lines += [
            *("", f"## {side}x{side}, {ranked[0].targets} targets, chance {1 / side**2:.2f}", ""),
            "| method | share in the right tile | peak in the right tile | a pass | per class | "
            "memory |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r.method} | {r.share:.3f} | {r.pointing:.2f} | {r.seconds:.2f} s | "
            f"{1000 * r.seconds_per_class:,.1f} ms | {r.memory / 1e6:,.0f} MB |"
            for r in ranked
        ]
    return "\n".join(lines) + "\n"


SHOWN = (
    *("fcvgg, positions", "fcvgg, windows"),
    *("torchcam CAM", "pytorch-grad-cam Grad-CAM", "pytorch-grad-cam Layer-CAM"),
)


def picture(photographs: dict[str, Image.Image], rows: Sequence[Row]) -> Figure:
    """Every target of one mosaic, a row of maps for each; those of others as their packages scale.

    Maps are shown from 0 to their own highest value, since most have no scale of their own.
    """
    mosaic = Mosaic(2, tuple(photographs)[:4], tuple(photographs)[:4])
    whole = mosaic.image(photographs)
    image = fcvgg.Preprocess.preset("tf")(whole)
    indices = [imagenet_categories().index(t) for t in mosaic.targets]
    shares = {row.method: row.share for row in rows if row.side == 2}
    figure = Figure((2 * len(SHOWN) + 1.8, 8.6), dpi=72, layout="constrained")
    axes = figure.subplots(len(mosaic.targets), len(SHOWN) + 1)
    for across, name in enumerate(SHOWN, 1):
        for down, values in enumerate(METHODS[name]()(image, indices)):
            ax = axes[down, across]
            ax.imshow(whole.convert("L"), cmap="gray", alpha=0.5)
            ax.imshow(values, cmap="inferno", vmin=0, alpha=0.75)
            if down == 0:
                title = name.replace(", ", "\n").replace("cam ", "cam\n")
                share = f"\n{shares[name]:.3f}" if name in shares else ""
                ax.set_title(f"{title}{share}", fontsize=9)
    for down, target in enumerate(mosaic.targets):
        axes[down, 0].imshow(whole)
        axes[down, 0].set_ylabel(target, fontsize=10)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return figure


def main() -> None:
    """Measure, print the tables and perhaps write them with data and a picture."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    sides = [int(n) for n in arguments.sides.split(",")]
    if arguments.child:
        measure_memory(arguments.child, sides[0])
        return
    photographs = tiles()
    clock = CLOCKS[arguments.clock]
    rows = [row for side in sides for row in measure(side, photographs, clock)]
    about = (
        f"{machine()}; threads: {arguments.threads}, {arguments.clock} time, medians of calls that "
        "take turns, memory of a process of its own. A pass of fcvgg gives the maps of all 1000 "
        "classes, one of the others that of one class."
    )
    text = markdown(rows, about)
    print(text)
    if arguments.output:
        data = {"about": about, "rows": [asdict(row) for row in rows]}
        arguments.output.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(text)
        picture(photographs, rows).savefig(arguments.output.with_suffix(".jpg"))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", default=",".join(map(str, GRIDS)), help="of the grids")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    parser.add_argument("--output", type=Path, help="a name for .md, .json and .jpg")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
