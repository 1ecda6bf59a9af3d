"""Show where a photograph looks like a class.

    python examples/heatmap.py
    python examples/heatmap.py photo.jpg --model vgg16 --target tabby

Without a photograph the packaged one is searched for a face, offline. `--model` takes whatever
`fcvgg.load` takes: a torchvision name, a checkpoint with `--arch`, a file of another framework.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import fcvgg
from fcvgg.demo import demo_photograph


def main() -> None:
    """Load a network, map a photograph, write the overlay."""
    arguments = parse_arguments()
    net = fcvgg.load(arguments.model, arch=arguments.arch, weights=arguments.weights)
    if arguments.side and net.preprocess:
        net.preprocess = replace(net.preprocess, resize=arguments.side)

    score_map = net.score_map(arguments.photo or demo_photograph())
    print(f"{net.source} makes {score_map.input_size} pixels to {score_map.scores.shape} scores")
    for name, probability in score_map.top(3):
        print(f"  {probability:6.1%}  {name}")

    heatmap = score_map.heatmap(arguments.target)
    y, x = heatmap.peak
    print(f"most like {heatmap.label!r} at (y, x) = ({y}, {x}): {heatmap.values[y, x]:.1%}")
    print(f"wrote {heatmap.save(arguments.output)}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Show where a photograph looks like a class.")
    parser.add_argument("photo", nargs="?", help="an image file (default: the packaged one)")
    parser.add_argument("--model", default="demo", help="what fcvgg.load takes (%(default)s)")
    parser.add_argument("--arch", help="the architecture of a checkpoint")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision's name, or a checkpoint")
    parser.add_argument("--target", help="a class name or part of it (default: the top class)")
    parser.add_argument("--side", type=int, help="rescale the smaller side to so many pixels first")
    parser.add_argument("--output", default="heatmap.png", help="where to write (%(default)s)")
    arguments = parser.parse_args()
    if arguments.photo is None:  # at 128 pixels the face is as large as the demo's window
        arguments.target = arguments.target or "face"
        arguments.side = arguments.side or 128
    return arguments


if __name__ == "__main__":
    try:
        main()
    except fcvgg.FcvggError as error:
        sys.exit(f"error: {error}")
