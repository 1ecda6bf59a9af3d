"""All eight VGGs of torchvision, fully connected against converted, at 224x224 pixels.

    python examples/equivalence.py            # full size: up to 0.6 GB, one model at a time
    python examples/equivalence.py --small    # a sixteenth of the channels

Nothing is downloaded: the weights are random, which makes the two no easier to tell apart.
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

import fcvgg

CONFIGURATIONS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
NAMES = [name + suffix for name in CONFIGURATIONS for suffix in ("", "_bn")]
SIZE = 224


def main() -> None:
    """Convert every model, compare and time both."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    images = torch.randn(arguments.images, 3, SIZE, SIZE)
    print("model      parameters   largest error   relative   top-1    FC ms   converted ms")
    for name in NAMES:
        model = (narrow if arguments.small else torchvision.models.get_model)(name).eval()
        net = fcvgg.convert(model, input_size=SIZE, verify=False)
        report = fcvgg.verify(model, net, images)
        if not report.passed:
            raise SystemExit(f"{name}: {report}")
        print(
            f"{name:9}  {sum(p.numel() for p in model.parameters()):11,}   "
            f"{report.max_abs_error:13.1e}   {report.max_rel_error:8.1e}   "
            f"{report.top1_agreement:5.0%}   "
            f"{milliseconds(model, images):6.1f}   {milliseconds(net, images):12.1f}",
            flush=True,
        )
    print(f"all {len(NAMES)} agree on {len(images)} images")


def narrow(name: str, share: int = 16) -> nn.Module:
    """A VGG with 1/`share` of the channels, as deep as torchvision's."""
    layers = cfgs[CONFIGURATIONS[name.removesuffix("_bn")]]
    channels = [c if isinstance(c, str) else c // share for c in layers]
    width = 4096 // share
    return nn.Sequential(
        make_layers(channels, batch_norm=name.endswith("_bn")),
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        *(nn.Linear(512 // share * 49, width), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(width, width), nn.ReLU(), nn.Dropout()),
        nn.Linear(width, 1000),
    )


@torch.no_grad()
def milliseconds(model: nn.Module, images: Tensor, runs: int = 5) -> float:
    """The time of the fastest forward pass."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="The eight VGGs of torchvision, before and after.")
    parser.add_argument("--small", action="store_true", help="narrow models, in seconds")
    parser.add_argument("--images", type=int, default=2, help="how many (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
