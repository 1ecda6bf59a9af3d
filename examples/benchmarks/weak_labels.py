"""Training on a whole image with one label: gradients, time and memory of `net.streamed`.

    pip install 'fcvgg[bench]' && pip install lightstream lightning   # the latter for its rows only
    python examples/benchmarks/weak_labels.py
    python examples/benchmarks/weak_labels.py --rows 2048 16384 --cols 512 --ways streamed
    python examples/benchmarks/weak_labels.py --report examples/benchmarks/weak_labels.md

The network is ResNet-18 with random weights and two classes, in float32, with batch norm in
evaluation mode; the image is noise, and the loss the cross-entropy of the mean over all positions.
One step is a forward and a backward pass. Every way runs in a process of its own:

- ``whole``: the network on the whole image, and autograd;
- ``streamed``: `fcvgg.FullyConvolutional.streamed`;
- ``lightstream``: lightstream 1.x (https://github.com/DIAGNijmegen/lightstream), which cuts the
  image into tiles that overlap. It moves the network to a GPU after it has measured what tiles
  lose; an attribute of its constructor keeps it on the CPU. There its backward pass failed with
  tiles of 512 and 640 pixels, and ran with 1280.

The error is the largest of any convolution's gradient from float64's, relative to that gradient's
largest value; gradients of batch norm are left out, since lightstream freezes it. Time is the
processor's, the least of some steps; memory what the operating system says that a step added at
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
from pathlib import Path
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
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for height in arguments.rows:
            for way in arguments.ways:
                rows.append(run_child(arguments, height, way, folder))
                print(rows[-1], flush=True)
    text = f"# Gradients of whole images\n\n{about(arguments)}\n\n{table(rows)}\n"
    print(text)
    if arguments.report:
        arguments.report.write_text(text)


def run_child(arguments: argparse.Namespace, height: int, way: str, folder: str) -> Figures:
    """One way's figures, measured in a process of its own; the first one leaves float64's."""
    command = [sys.executable, __file__, "--child", way, "--folder", folder]
    command += ["--rows", str(height), "--cols", str(arguments.cols)]
    command += ["--memory", arguments.memory, "--tile", str(arguments.tile)]
    command += ["--threads", str(arguments.threads), "--steps", str(arguments.steps)]
    command += ["--exact"] if arguments.exact else []
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{way} failed at {height} rows")
    figures: Figures = json.loads(result.stdout.splitlines()[-1])
    return figures


# -- one measurement ------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace) -> Figures:
    """Run one way in this process."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=2).eval()
    (height,), way = arguments.rows, arguments.child
    image = torch.randn(3, height, arguments.cols)
    step = {"whole": whole, "streamed": streamed, "lightstream": lightstream}[way](model, arguments)
    if way != "lightstream":  # which has run a tile while it was made
        step(image[:, :256, :256])  # libraries load, threads start
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, seconds = status("VmRSS"), []
    for _ in range(arguments.steps):
        start = time.process_time()
        convolutions = step(image)
        seconds.append(time.process_time() - start)
    added = status("VmHWM") - before
    figures = {"way": way, "rows": height, "cols": arguments.cols, "added": added}
    figures["per_megapixel"] = min(seconds) / (height * arguments.cols / 1e6)
    if arguments.exact:
        expected = exact_gradients(image, Path(arguments.folder) / f"{height}.pt")
        pairs = zip(expected, convolutions, strict=True)
        figures["error"] = max(relative_error(*pair) for pair in pairs)
    return figures


def whole(model: nn.Module, _: argparse.Namespace) -> Any:
    """A step of the network on the whole image, which gives the convolutions' gradients."""

    def step(image: Tensor) -> list[Tensor]:
        model.zero_grad()
        F.cross_entropy(model(image[None]), LABEL.to(image.device)).backward()
        return convolution_gradients(model)

    return step


def streamed(model: nn.Module, arguments: argparse.Namespace) -> Any:
    """A step by `net.streamed`."""
    net = fcvgg.convert(model, input_size=224, head="position", verify=False)

    def step(image: Tensor) -> list[Tensor]:
        net.zero_grad()
        scores = net.streamed(image, memory=arguments.memory).mean((2, 3))
        F.cross_entropy(scores, LABEL).backward()
        return convolution_gradients(net)

    return step


def lightstream(model: nn.Module, arguments: argparse.Namespace) -> Any:
    """A step by lightstream's tiles, as its Lightning module makes it."""
    from lightstream.core.constructor import StreamingConstructor

    head = model.fc
    assert isinstance(head, nn.Module)
    trunk = nn.Sequential(*list(model.children())[:-2])
    with contextlib.redirect_stdout(io.StringIO()):
        constructor = StreamingConstructor(
            trunk,
            arguments.tile,
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
    """Those of ResNet-18's 20 convolutions; a fully connected layer may have become another."""
    found = [p.grad for p in model.parameters() if p.ndim == 4][:20]
    return [gradient.clone() for gradient in found if gradient is not None]


def exact_gradients(image: Tensor, path: Path) -> list[Tensor]:
    """Those of the whole image in float64, computed once for all ways."""
    if not path.exists():
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=2).eval().double()
        torch.save(whole(model, argparse.Namespace())(image.double()), path)
    found: list[Tensor] = torch.load(path)
    return found


def relative_error(expected: Tensor, found: Tensor) -> float:
    """The largest difference, in the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


# -- the report -----------------------------------------------------------------------------------


def about(arguments: argparse.Namespace) -> str:
    """How the figures were measured."""
    return (
        f"ResNet-18, {arguments.cols} columns, a forward and a backward pass; {machine()}; "
        f"{arguments.threads} thread(s); `net.streamed` with memory={arguments.memory!r}, "
        f"lightstream with tiles of {arguments.tile} pixels."
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
        memory = f"{row['added'] / 2**20:,.0f} MiB"
        lines.append(f"| {row['rows']} | {row['way']} | {shown} | {memory} | {error} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Gradients of whole images, three ways.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1920])
    parser.add_argument("--cols", type=int, default=1280, help="(%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--memory", default="1GiB", help="for net.streamed (%(default)s)")
    parser.add_argument("--tile", type=int, default=1280, help="of lightstream (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="that are timed (%(default)s)")
    parser.add_argument(
        "--exact", action=argparse.BooleanOptionalAction, default=True, help="compare with float64"
    )
    parser.add_argument("--report", type=Path, help="also write the table there")
    parser.add_argument("--folder", default=".", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
