"""Training on a whole image with one label: gradients, time and memory of `net.streamed`.

    pip install 'fcvgg[bench]' && pip install lightstream lightning   # the latter for its rows only
    python examples/benchmarks/weak_labels.py
    python examples/benchmarks/weak_labels.py --rows 2048 8192 --cols 512 --ways streamed --no-exact
    python examples/benchmarks/weak_labels.py --turns --dtype float64 --rows 1920

The network is ResNet-18 (or VGG-11's convolutions) with random weights, a global average pool and a
linear layer of two classes, batch norm in evaluation mode; the image is noise, and the loss the
cross-entropy of the mean over all positions. One step is a forward and a backward pass. Every way
runs in a process of its own, where the memory it adds is measured, or with ``--turns`` all in one
process, which takes a step of each in turn:

- ``whole``: the network on the whole image, and autograd;
- ``streamed``: `fcvgg.FullyConvolutional.streamed`, once for each of ``--memory``;
- ``lightstream``: lightstream 1.x (https://github.com/DIAGNijmegen/lightstream), which cuts the
  image into tiles that overlap. It moves the network to a GPU after it has measured what tiles
  lose; an attribute of its constructor keeps it on the CPU. There its backward pass failed with
  tiles of 512, 640 and 768 pixels, and ran with 1280.

The error is the largest of any convolution's gradient from float64's, relative to that gradient's
largest value; gradients of batch norm are left out, since lightstream freezes it. Time is the
processor's, the median of some steps; memory what the operating system says that a step added at
most.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fcvgg
from machine import machine
from streaming import status

WAYS = ("whole", "streamed", "lightstream")
LABEL = torch.tensor([1])

Figures = dict[str, Any]


def main() -> None:
    """Run every way in turn and print the table."""
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(measured(arguments)))
        return
    rows: list[Figures] = []
    processes = [list(arguments.ways)] if arguments.turns else [[way] for way in arguments.ways]
    with tempfile.TemporaryDirectory() as folder:
        for height in arguments.rows:
            for ways in processes:
                found = run_child(height, ways, folder)
                print(*found, sep="\n", flush=True)
                rows += found
    text = f"# Gradients of whole images\n\n{about(arguments)}\n\n{table(rows)}\n"
    print(text)
    if arguments.report:
        arguments.report.write_text(text)


def run_child(height: int, ways: list[str], folder: str) -> list[Figures]:
    """The figures of some ways, measured in one process; the first one leaves float64's."""
    command = [sys.executable, *sys.argv, "--child", "--folder", folder]
    command += ["--rows", str(height), "--ways", *ways]  # the last of an option counts
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{', '.join(ways)} failed at {height} rows")
    figures: list[Figures] = json.loads(result.stdout.splitlines()[-1])
    return figures


# -- one process ----------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace) -> list[Figures]:
    """Take steps of the given ways in turn."""
    torch.set_num_threads(arguments.threads)
    (height,) = arguments.rows
    dtype = getattr(torch, arguments.dtype)
    steps = steps_of(arguments, dtype)
    torch.manual_seed(1)
    image = torch.randn(3, height, arguments.cols).to(dtype)
    for way, step in steps.items():
        if way != "lightstream":  # which has run a tile while it was made
            step(image[:, :256, :256])  # libraries load, threads start
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = status("VmRSS")
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    found = {}
    for _ in range(arguments.steps):
        for way, step in steps.items():
            start = time.process_time()
            found[way] = step(image)
            seconds[way].append(time.process_time() - start)
    added = status("VmHWM") - before
    rows: list[Figures] = []
    for way in steps:
        rows.append({"way": way, "rows": height})
        rows[-1]["per_megapixel"] = median(seconds[way]) / (height * arguments.cols / 1e6)
        if len(steps) == 1:
            rows[-1]["added"] = added
        if arguments.exact:
            expected = exact_gradients(image, arguments)
            pairs = zip(expected, found[way], strict=True)
            rows[-1]["error"] = max(relative_error(*pair) for pair in pairs)
    return rows


def steps_of(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """A step of each way, with a network of its own."""
    steps: dict[str, Any] = {}
    for way in arguments.ways:
        if way == "streamed":
            for memory in arguments.memory:
                steps[f"{way}, {memory}"] = streamed(network(arguments.model, dtype), memory)
        elif way == "whole":
            steps[way] = partial(whole, network(arguments.model, dtype))
        else:
            steps[way] = lightstream(network(arguments.model, dtype), arguments.tile)
    return steps


def network(name: str, dtype: torch.dtype) -> nn.Sequential:
    """Features, their mean, and a linear layer; always of the same weights."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name)
    children = list(model.children())
    features = children[0] if name.startswith("vgg") else nn.Sequential(*children[:-2])
    parts = features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 2)
    return nn.Sequential(*parts).eval().to(dtype)


def whole(model: nn.Module, image: Tensor) -> list[Tensor]:
    """A step of the network on the whole image, which gives the convolutions' gradients."""
    model.zero_grad()
    F.cross_entropy(model(image[None]), LABEL).backward()
    return convolution_gradients(model)


def streamed(model: nn.Module, memory: str) -> Any:
    """A step by `net.streamed`."""
    net = fcvgg.convert(model, input_size=224, head="position", verify=False)

    def step(image: Tensor) -> list[Tensor]:
        net.zero_grad()
        scores = net.streamed(image, memory=memory).mean((2, 3))
        F.cross_entropy(scores, LABEL).backward()
        return convolution_gradients(net)

    return step


def lightstream(model: nn.Sequential, tile: int) -> Any:
    """A step by lightstream's tiles, as its Lightning module makes it."""
    from lightstream.core.constructor import StreamingConstructor

    trunk, head = model[0], model[-1]
    with contextlib.redirect_stdout(io.StringIO()):
        constructor = StreamingConstructor(
            trunk,
            tile,
            verbose=False,
            normalize_on_gpu=False,
            add_keep_modules=[nn.BatchNorm2d],
        )
        constructor.statistics_on_cpu = False  # which would move the network to a GPU afterwards
        tiles = constructor.prepare_streaming_model().eval()

    def step(image: Tensor) -> list[Tensor]:
        tiles.zero_grad()
        features = tiles(image[None]).requires_grad_()
        F.cross_entropy(head(features.mean((2, 3))), LABEL).backward()
        tiles.backward(image[None], features.grad)
        return convolution_gradients(tiles)

    return step


def convolution_gradients(model: nn.Module) -> list[Tensor]:
    """Those of the features' convolutions; the fully connected layer may have become another."""
    found = [p.grad for p in model.parameters() if p.ndim == 4 and len(p) > 2]
    return [gradient.clone() for gradient in found if gradient is not None]


def exact_gradients(image: Tensor, arguments: argparse.Namespace) -> list[Tensor]:
    """Those of the whole image in float64, computed once for all ways."""
    path = Path(arguments.folder) / f"{image.shape[1]}.pt"
    if not path.exists():
        torch.save(whole(network(arguments.model, torch.float64), image.double()), path)
    found: list[Tensor] = torch.load(path)
    return found


def relative_error(expected: Tensor, found: Tensor) -> float:
    """The largest difference, in the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


# -- the report -----------------------------------------------------------------------------------


def about(arguments: argparse.Namespace) -> str:
    """How the figures were measured."""
    return (
        f"{arguments.model}, {arguments.dtype}, {arguments.cols} columns, a forward and a backward "
        f"pass; {machine()}; {arguments.threads} thread(s); lightstream with tiles of "
        f"{arguments.tile} pixels."
    )


def table(rows: list[Figures]) -> str:
    """The figures as Markdown; times as ratios to the whole image's of the same height."""
    lines = ["| rows | way | processor's time | memory added | error |", "|---|---|---|---|---|"]
    own = {row["rows"]: row["per_megapixel"] for row in rows if row["way"] == "whole"}
    for row in rows:
        seconds = row["per_megapixel"]
        base = own.get(row["rows"])
        shown = f"{seconds:.2f} s per megapixel" if base is None else f"{seconds / base:.2f}"
        error = f"{row['error']:.0e}" if "error" in row else ""
        memory = f"{row['added'] / 2**20:,.0f} MiB" if "added" in row else ""
        lines.append(f"| {row['rows']} | {row['way']} | {shown} | {memory} | {error} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Gradients of whole images, three ways.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1920])
    parser.add_argument("--cols", type=int, default=1280, help="(%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--model", choices=("resnet18", "vgg11"), default="resnet18")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--turns", action="store_true", help="all ways in one process, in turn")
    parser.add_argument("--memory", nargs="+", default=["1GiB"], help="for net.streamed (1GiB)")
    parser.add_argument("--tile", type=int, default=1280, help="of lightstream (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="that are timed (%(default)s)")
    parser.add_argument(
        "--exact", action=argparse.BooleanOptionalAction, default=True, help="compare with float64"
    )
    parser.add_argument("--report", type=Path, help="also write the table there")
    parser.add_argument("--folder", default=".", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
