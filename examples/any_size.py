"""One network, five image sizes: a table of what comes out, and a figure.

    python examples/any_size.py

The demo net was trained on windows of 32x32 pixels. Converted, it takes any part of the packaged
photograph, also one below its window, which is padded with zeros.
"""

from __future__ import annotations

import argparse
import time

import torch
from matplotlib.figure import Figure
from PIL import Image

import fcvgg
from fcvgg.demo import demo_photograph

SIZES = [(24, 24), (32, 32), (57, 90), (96, 160), (160, 160)]
"""``(height, width)``: below the window, the window itself, and above it."""

SIDE = 160
"""At this size of the photograph the face fits the window."""

FACE = (39, 71)
"""``(y, x)`` of the face's middle then."""


def main() -> None:
    """Run the network at every size and draw what it finds."""
    arguments = parse_arguments()
    net = fcvgg.load("demo")
    net(torch.zeros(1, 3, 32, 32))  # the first call is slower
    photograph = demo_photograph().resize((SIDE, SIDE))
    figure = Figure(figsize=(16, 3.2), layout="constrained")
    panels = figure.subplots(1, len(SIZES), width_ratios=[w / h for h, w in SIZES])
    print("image      map     first centre    face, mean  face, peak  at          ms")
    for size, axes in zip(SIZES, panels):
        image = cut(photograph, size)
        started = time.perf_counter()
        score_map = net.score_map(image)
        milliseconds = 1000 * (time.perf_counter() - started)

        cells = tuple(score_map.scores.shape[1:])
        assert cells == net.output_size(size)
        heatmap = score_map.heatmap("face")
        peak = heatmap.values[heatmap.peak]
        mean = score_map.predict("probabilities")[1]
        print(
            f"{by(size):9}  {by(cells):6}  {score_map.geometry.centre_of(0, 0)!s:14}  "
            f"{mean:10.3f}  {peak:10.3f}  {heatmap.peak!s:10}  {milliseconds:4.1f}"
        )
        heatmap.plot(axes, bar=axes is panels[-1]).set_title(
            f"{by(size)} pixels, {by(cells)} cells"
        )
    figure.savefig(arguments.output, dpi=100)
    print(f"wrote {arguments.output}")


def cut(photograph: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The part of the photograph that has this size and the face in it."""
    top, left = (min(max(f - n // 2, 0), SIDE - n) for f, n in zip(FACE, size))
    return photograph.crop((left, top, left + size[1], top + size[0]))


def by(pair: tuple[int, ...]) -> str:
    """``(24, 32)`` as ``24x32``."""
    return f"{pair[0]}x{pair[1]}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="One network at five image sizes.")
    parser.add_argument("--output", default="any_size.png", help="the figure (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
