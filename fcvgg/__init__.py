"""Turn a trained VGG-kind classifier into the equivalent fully convolutional network.

>>> net = fcvgg.convert(torchvision.models.vgg16())   # same weights, any input size
>>> net(images)                                       # (N, C, H, W) -> (N, K, h, w)
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fcvgg.boxes import ScoredBox
from fcvgg.conversion import convert
from fcvgg.effective_field import EffectiveReceptiveField, effective_receptive_field
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
from fcvgg.optimization import OptimizedNetwork, optimize
from fcvgg.preprocessing import Preprocess
from fcvgg.score_map import ScoreMap
from fcvgg.streaming import stream
from fcvgg.strip_sources import open_image
from fcvgg.transfer import (
    Features,
    GeometryChanges,
    LayerNames,
    Probe,
    features_upto,
    for_input_size,
    freeze_,
    geometry_changes,
    insert_after,
    layer_names,
    loss_for,
    parameter_groups,
    plot_features,
    probe,
    replace_head,
    replace_layers,
    trainable_parameters,
    unfreeze_,
)
from fcvgg.verification import Equivalence, verify
from fcvgg.window_comparison import WindowComparison, compare_windows

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CaptureError",
    "CategoryError",
    "ConversionError",
    "DatasetError",
    "EffectiveReceptiveField",
    "Equivalence",
    "EquivalenceError",
    "Evaluation",
    "FcvggError",
    "Features",
    "FullyConvolutional",
    "Geometry",
    "GeometryChanges",
    "GeometryError",
    "Heatmap",
    "ImageError",
    "InputSizeError",
    "LayerNames",
    "LayerTable",
    "LoadError",
    "MissingExtraError",
    "OptimizedNetwork",
    "Preprocess",
    "PreprocessError",
    "Probe",
    "RefusedLayerError",
    "ScoreMap",
    "ScoredBox",
    "UnsupportedLayerError",
    "VGGFeatures",
    "WindowComparison",
    "compare_windows",
    "convert",
    "effective_receptive_field",
    "evaluate",
    "features_upto",
    "for_input_size",
    "freeze_",
    "geometry_changes",
    "insert_after",
    "layer_names",
    "load",
    "loss_for",
    "open_image",
    "optimize",
    "parameter_groups",
    "plot_features",
    "probe",
    "receptive_fields",
    "replace_head",
    "replace_layers",
    "stream",
    "trainable_parameters",
    "unfreeze_",
    "verify",
]

if find_spec("sklearn") is None:  # so that ``from fcvgg import *`` works without the extra
    __all__.remove("VGGFeatures")

if TYPE_CHECKING:
    from fcvgg.transfer.estimators import VGGFeatures


def __getattr__(name: str) -> Any:
    """`VGGFeatures`, which derives from scikit-learn's classes, is made where it is asked for."""
    if name == "VGGFeatures":
        from fcvgg.transfer.estimators import VGGFeatures

        return VGGFeatures
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
