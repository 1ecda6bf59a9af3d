"""Time, memory and exactness of streaming, against the ways people cut large images today.

    python examples/benchmarks/streaming.py                        # 1024 and 2048 rows
    python examples/benchmarks/streaming.py --rows 1024 2048 4096 8192 --memory 1GiB

Every way runs in a process of its own on the same noise: ``whole`` is the network on the whole
image, ``stream`` is `fcvgg.stream`, ``tiles`` runs 1024-pixel tiles whose halo makes them exact
away from the borders (and cells beside the tiles' borders see zeros where pixels are),
and ``monai`` is its `sliding_window_inference` if MONAI is installed. The memory is what the
operating system counts; the difference is the largest from ``whole``, relative to its largest
score. The network is VGG-16 with random weights; ``--width`` divides its channels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.vgg import VGG, cfgs, make_layers

import fcvgg

WAYS = ("whole", "stream", "tiles", "monai")
TILE = 1024
CLASSES = 10


def main() -> None:
    """Run every way at every height and print a table."""
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(measured(arguments, arguments.child, arguments.rows[0])))
        return
    print(f"{'rows':>6} {'way':>7} {'CPU s':>7} {'s':>7} {'MiB added':>10} {'difference':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for rows in arguments.rows:
            for way in WAYS:
                if way == "whole" and rows > arguments.whole_up_to:
                    continue
                show(folder, rows, way, run_child(arguments, folder, rows, way))


def run_child(
    arguments: argparse.Namespace, folder: str, rows: int, way: str
) -> dict[str, float] | None:
    """One way's figures, measured in a process of its own; None where it cannot run."""
    command = [sys.executable, __file__, "--child", way, "--folder", folder]
    command += ["--rows", str(rows), "--cols", str(arguments.cols), "--width", str(arguments.width)]
    command += ["--memory", arguments.memory, "--threads", str(arguments.threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if result.returncode else json.loads(result.stdout.splitlines()[-1])


def show(folder: str, rows: int, way: str, figures: dict[str, float] | None) -> None:
    """Print one line of the table."""
    if figures is None:
        print(f"{rows:>6} {way:>7}   did not run (not installed, or too little memory)")
        return
    whole, own = (Path(folder) / f"{name}-{rows}.npy" for name in ("whole", way))
    difference = "-"
    if whole.exists():
        a, b = np.load(whole), np.load(own)
        difference = (
            f"{np.abs(a - b).max() / np.abs(a).max():.1e}" if a.shape == b.shape else "size"
        )
    print(
        f"{rows:>6} {way:>7} {figures['cpu']:>7.1f} {figures['seconds']:>7.1f} "
        f"{figures['added'] / 2**20:>10.0f} {difference:>11}",
        flush=True,
    )


def measured(arguments: argparse.Namespace, way: str, rows: int) -> dict[str, float]:
    """Run one way in this process."""
    torch.set_num_threads(arguments.threads)
    net = fcvgg.convert(model(arguments.width), verify=False)
    image = torch.from_numpy(noise(rows, arguments.cols))
    net.score_map(image[:, :256, :256])
    Path("/proc/self/clear_refs").write_text("5")
    before, cpu, start = status("VmRSS"), time.process_time(), time.perf_counter()
    scores = run(net, way, image, arguments.memory)
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "added": status("VmHWM") - before,
    }
    np.save(Path(arguments.folder) / f"{way}-{rows}.npy", scores.numpy())
    return figures


def run(net: fcvgg.FullyConvolutional, way: str, image: Tensor, memory: str) -> Tensor:
    """The scores ``(K, h, w)`` of a preprocessed image by one of `WAYS`."""
    if way == "whole":
        return net.score_map(image).scores
    if way == "stream":
        return fcvgg.stream(net, image, memory=memory).scores
    return tiled(net, image) if way == "tiles" else with_monai(net, image)


@torch.no_grad()
def tiled(net: fcvgg.FullyConvolutional, image: Tensor) -> Tensor:
    """Tiles that overlap by a window less a stride, so that every cell lies in one."""
    stride, window = net.geometry.stride[0], net.geometry.window[0]
    step = (TILE - window) // stride + 1
    h, w = net.output_size(image.shape[1:])
    scores = torch.empty(CLASSES, h, w)
    for row in range(0, h, step):
        for col in range(0, w, step):
            y, x = row * stride, col * stride
            cells = net(image[None, :, y : y + TILE, x : x + TILE])[0, :, :step, :step]
            part = scores[:, row : row + step, col : col + step]
            part[:] = cells[:, : part.shape[1], : part.shape[2]]
    return scores


@torch.no_grad()
def with_monai(net: fcvgg.FullyConvolutional, image: Tensor) -> Tensor:
    """MONAI's tiles, blended where they overlap; they need a map as large as its input."""
    from monai.inferers import sliding_window_inference  # type: ignore

    def predictor(tile: Tensor) -> Tensor:
        cells: Tensor = net(tile)
        return nn.functional.interpolate(cells, tile.shape[2:])

    pixels: Any = sliding_window_inference(image[None], TILE, 1, predictor, overlap=0.25)
    return nn.functional.interpolate(pixels, net.output_size(image.shape[1:]))[0]


def model(width: int) -> nn.Module:
    """VGG-16 with 1/`width` of its channels and one fully connected layer."""
    torch.manual_seed(0)
    narrow = [v if v == "M" else int(v) // width for v in cfgs["D"]]
    with torch.device("meta"):
        vgg = VGG(nn.Sequential(), init_weights=False)
    vgg.features = make_layers(narrow)  # type: ignore[arg-type]
    vgg.classifier = nn.Sequential(nn.Linear(512 // width * 49, CLASSES))
    return vgg.eval()


def noise(rows: int, cols: int) -> np.ndarray[Any, Any]:
    """A preprocessed image ``(3, H, W)``."""
    generator = np.random.default_rng(0)
    return generator.standard_normal((3, rows, cols), np.float32)


def status(key: str) -> int:
    """A figure of this process's memory in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Streaming against other ways.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--cols", type=int, default=2048, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=1, help="divides the channels (%(default)s)")
    parser.add_argument("--memory", default="1GiB", help="for fcvgg.stream (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--whole-up-to", type=int, default=4096, help="rows (%(default)s)")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
