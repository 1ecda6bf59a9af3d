"""Turn a trained VGG-kind classifier into the equivalent fully convolutional network.

>>> net = fcvgg.convert(torchvision.models.vgg16())   # same weights, any input size
>>> net(images)                                       # (N, C, H, W) -> (N, K, h, w)

The names in front are listed here. The others are reached by topic: `fcvgg.transfer` (layers by
name, freezing, new heads, features), `fcvgg.segmentation`, `fcvgg.evaluation`, `fcvgg.errors`.
"""

import lazy_loader

__version__ = "0.1.0"
__docformat__ = "google"  # for pdoc

# The stub next to this file lists every name once. A name is imported where it is first used: torch
# and torchvision take seconds to import, for which ``fcvgg --help`` should not wait.
__getattr__ = lazy_loader.attach_stub(__name__, __file__)[0]

__all__ = [
    "Agreement",
    "Equivalence",
    "FcvggError",
    "FineTuned",
    "FullyConvolutional",
    "Geometry",
    "Heatmap",
    "LabelMap",
    "Preprocess",
    "ScoreMap",
    "convert",
    "evaluate",
    "finetune",
    "load",
    "open_image",
    "optimize",
    "receptive_fields",
    "stream",
    "verify",
]

_TOPICS = ("demo", "distributed", "errors", "evaluation", "segmentation", "training", "transfer")
"""Modules with further names that users call."""


def __dir__() -> list[str]:
    return sorted({*__all__, *_TOPICS, *(name for name in globals() if name.startswith("__"))})
