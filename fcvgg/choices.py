"""Values that options take by name, for the library, the command line and type checkers alike.

They are apart from the code that they choose, which imports torch: the command line's help must not
wait for it.
"""

from __future__ import annotations

from typing import Literal

Average = Literal["scores", "probabilities"]
"""What is averaged over the cells of a score map."""

Combine = Literal["max", "mean"]
"""How the maps of several scales become one."""

BoxKind = Literal["windows", "regions"]
"""What boxes of a heatmap surround: windows of cells, or connected pixels."""

PolygonKind = Literal["regions", "cells"]
"""What polygons of a score map show: cells that are connected by their edges, or a cell each."""

Protocol = Literal["center-crop", "resize", "ten-crop", "dense", "multi-crop", "dense+multi-crop"]
"""How an image is shown to a network that is evaluated."""

Strategy = Literal["auto", "linear", "partial", "all", "svm", "scratch"]
"""What is trained in fine-tuning."""

Resize = Literal["resize", "center-crop"]
"""How an image comes to the input size."""

Optimizer = Literal["sgd", "adamw"]
"""What updates the parameters."""

Precision = Literal["auto", "32", "bf16-mixed", "16-mixed"]
"""The arithmetic of training, by Lightning's names."""

Variant = Literal["32s", "16s", "8s"]
"""The stride of the finest map that an FCN scores."""

Pooling = Literal["avg", "max"]
"""How a map becomes one number per channel."""

Classifier = Literal["logistic", "svm"]
"""The linear classifier that is fitted to features."""

Timed = Literal[
    "source",
    "plain",
    "optimized",
    "optimized-bf16",
    "optimized-int8",
    "onnxruntime",
    "openvino",
    "openvino-bf16",
]
"""What ``fcvgg bench`` times: the classifier, and the networks made from it."""

Clock = Literal["wall", "cpu"]
"""The time that is counted: that which passes, or the processor's."""

_RENAMED = {"centre-crop": "center-crop"}


def current_spelling(name: str) -> str:
    """A value's name, also where it is given as earlier versions spelled it.

    >>> current_spelling("centre-crop")
    'center-crop'
    """
    return _RENAMED.get(name, name)
