"""Heatmaps side by side: all classes at once here, one class at a time by class activation maps.

    pip install 'fcvgg[bench]'
    python examples/benchmarks/heatmaps.py --size 512 --output heatmaps.md

The same classifier and the same image: `fcvgg` gives the probability maps of all K classes in one
evaluation; pytorch-grad-cam's and torchcam's Grad-CAM give one class's map, by a backward pass.
Contenders take turns; the memory of each is measured in a process of its own. The maps are not the
same quantity: scores of the classifier at every cell here, weighted activations there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

import fcvgg
from fcvgg.optimization.timing import CLOCKS
from machine import machine, peak_bytes

Run = Callable[[Tensor], object]

TARGET = 207


def all_classes(optimise: bool) -> Run:
    """The probability maps of all classes, resampled to pixels by none: ``(K, h, w)``."""
    net = fcvgg.convert(classifier(), input_size=224, verify=False)
    if optimise:
        net = fcvgg.optimize(net)
    return lambda image: net.score_map(image).probabilities()


def one_heatmap() -> Run:
    """One class's heatmap on the pixels, as the class activation maps below give it."""
    net = fcvgg.convert(classifier(), input_size=224, verify=False)
    return lambda image: net.heatmap(image, TARGET)


def grad_cam() -> Run:
    """pytorch-grad-cam, one class."""
    from pytorch_grad_cam import GradCAM  # type: ignore[import-untyped]
    from pytorch_grad_cam.utils.model_targets import (  # type: ignore[import-untyped]
        ClassifierOutputTarget,
    )

    model = classifier()
    cam = GradCAM(model=model, target_layers=[model.get_submodule("features.30")])
    return lambda image: cam(image, targets=[ClassifierOutputTarget(TARGET)])


def torch_cam() -> Run:
    """torchcam, one class."""
    from torchcam.methods import GradCAM

    model = classifier()
    cam = GradCAM(model, target_layer="features.30")
    return lambda image: cam(TARGET, model(image.clone().requires_grad_()))


def classifier() -> torch.nn.Module:
    """torchvision's VGG-16 with random weights, which cost the same."""
    return torchvision.models.vgg16(weights=None).eval()


CONTENDERS: dict[str, tuple[Callable[[], Run], int]] = {
    "fcvgg, all classes": (lambda: all_classes(False), 1000),
    "fcvgg optimised, all classes": (lambda: all_classes(True), 1000),
    "fcvgg, one heatmap on the pixels": (one_heatmap, 1),
    "pytorch-grad-cam, one class": (grad_cam, 1),
    "torchcam, one class": (torch_cam, 1),
}
"""What makes each, and of how many classes it gives maps."""


def main() -> None:
    """Measure, print a Markdown table and perhaps write it."""
    arguments = parse_arguments()
    clock = CLOCKS[arguments.clock]
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    if arguments.child:
        measure_memory(arguments.child, arguments.size)
        return
    image = torch.randn(1, 3, arguments.size, arguments.size)
    runs: dict[str, Run] = {}
    for name, (make, _) in CONTENDERS.items():
        try:
            runs[name] = make()
            runs[name](image)
        except ImportError as error:
            print(f"left out {name}: {error}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            time.sleep(0.05)
            start = clock()
            run(image)
            times[name].append(clock() - start)
    lines = [
        "# vgg16: heatmaps side by side",
        "",
        f"{machine()}; threads: {torch.get_num_threads()}, {arguments.clock} time, medians of "
        f"{arguments.repeats} calls that take turns, memory of a process of its own.",
        "",
        f"| {arguments.size}x{arguments.size} | time | quartiles | per class | memory |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in times.items():
        low, median, high = np.percentile(seconds, [25, 50, 75])
        per_class = median / CONTENDERS[name][1]
        memory = peak_memory(name, arguments.size)
        lines.append(
            f"| {name} | {median:.3f} s | {low:.3f} to {high:.3f} | {1000 * per_class:,.1f} ms | "
            f"{memory / 1e6:,.0f} MB |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


def peak_memory(name: str, size: int) -> int:
    """Bytes that a new process holds at most while it runs one contender."""
    command = [sys.executable, __file__, "--size", str(size), "--child", name]
    return int(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))


def measure_memory(name: str, size: int) -> None:
    """Run in a process of its own; prints the bytes."""
    run = CONTENDERS[name][0]()
    for _ in range(2):
        run(torch.zeros(1, 3, size, size))
    print(peak_bytes())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, help="a Markdown file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
