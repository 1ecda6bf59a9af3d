"""Turn a trained VGG-kind classifier into the equivalent fully convolutional network.

>>> net = fcvgg.convert(torchvision.models.vgg16())   # same weights, any input size
>>> net(images)                                       # (N, C, H, W) -> (N, K, h, w)
"""

from fcvgg.conversion import convert
from fcvgg.errors import (
    ArgumentError,
    CaptureError,
    CategoryError,
    ConversionError,
    DatasetError,
    EquivalenceError,
    FcvggError,
    GeometryError,
    ImageError,
    InputSizeError,
    LoadError,
    MissingExtraError,
    PreprocessError,
    RefusedLayerError,
    UnsupportedLayerError,
)
from fcvgg.evaluation import Evaluation, evaluate
from fcvgg.geometry import Geometry
from fcvgg.heatmap import Heatmap
from fcvgg.layer_table import LayerTable, receptive_fields
from fcvgg.loading import load
from fcvgg.network import FullyConvolutional
from fcvgg.preprocessing import Preprocess
from fcvgg.score_map import ScoreMap
from fcvgg.verification import Equivalence, verify

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CaptureError",
    "CategoryError",
    "ConversionError",
    "DatasetError",
    "Equivalence",
    "EquivalenceError",
    "Evaluation",
    "FcvggError",
    "FullyConvolutional",
    "Geometry",
    "GeometryError",
    "Heatmap",
    "ImageError",
    "InputSizeError",
    "LayerTable",
    "LoadError",
    "MissingExtraError",
    "Preprocess",
    "PreprocessError",
    "RefusedLayerError",
    "ScoreMap",
    "UnsupportedLayerError",
    "convert",
    "evaluate",
    "load",
    "receptive_fields",
    "verify",
]
