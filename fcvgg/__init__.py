"""Turn a trained VGG-kind classifier into the equivalent fully convolutional network.

>>> net = fcvgg.convert(torchvision.models.vgg16())   # same weights, any input size
>>> net(images)                                       # (N, C, H, W) -> (N, K, h, w)
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fcvgg.conversion import convert as convert
    from fcvgg.errors import ArgumentError as ArgumentError
    from fcvgg.errors import CaptureError as CaptureError
    from fcvgg.errors import CategoryError as CategoryError
    from fcvgg.errors import ConversionError as ConversionError
    from fcvgg.errors import DatasetError as DatasetError
    from fcvgg.errors import EquivalenceError as EquivalenceError
    from fcvgg.errors import FcvggError as FcvggError
    from fcvgg.errors import GeometryError as GeometryError
    from fcvgg.errors import ImageError as ImageError
    from fcvgg.errors import InputSizeError as InputSizeError
    from fcvgg.errors import LoadError as LoadError
    from fcvgg.errors import MissingExtraError as MissingExtraError
    from fcvgg.errors import PreprocessError as PreprocessError
    from fcvgg.errors import RefusedLayerError as RefusedLayerError
    from fcvgg.errors import TrainingError as TrainingError
    from fcvgg.errors import UnsupportedLayerError as UnsupportedLayerError
    from fcvgg.evaluation.effective_field import EffectiveReceptiveField as EffectiveReceptiveField
    from fcvgg.evaluation.effective_field import (
        effective_receptive_field as effective_receptive_field,
    )
    from fcvgg.evaluation.layer_table import LayerTable as LayerTable
    from fcvgg.evaluation.layer_table import receptive_fields as receptive_fields
    from fcvgg.evaluation.protocols import Evaluation as Evaluation
    from fcvgg.evaluation.protocols import evaluate as evaluate
    from fcvgg.evaluation.window_comparison import WindowComparison as WindowComparison
    from fcvgg.evaluation.window_comparison import compare_windows as compare_windows
    from fcvgg.finetuning.finetuning import finetune as finetune
    from fcvgg.finetuning.result import FineTuned as FineTuned
    from fcvgg.finetuning.strategies import Recipe as Recipe
    from fcvgg.geometry import Geometry as Geometry
    from fcvgg.images.lazy.opening import open_image as open_image
    from fcvgg.images.preprocessing import Preprocess as Preprocess
    from fcvgg.loading import load as load
    from fcvgg.network import FullyConvolutional as FullyConvolutional
    from fcvgg.optimization.networks import OptimizedNetwork as OptimizedNetwork
    from fcvgg.optimization.networks import optimize as optimize
    from fcvgg.results.boxes import ScoredBox as ScoredBox
    from fcvgg.results.equivalence import Equivalence as Equivalence
    from fcvgg.results.heatmap import Heatmap as Heatmap
    from fcvgg.results.label_map import LabelMap as LabelMap
    from fcvgg.results.score_map import ScoreMap as ScoreMap
    from fcvgg.segmentation.mask_folders import MaskFolder as MaskFolder
    from fcvgg.segmentation.mask_folders import mask_folder as mask_folder
    from fcvgg.segmentation.metrics import SegmentationMetrics as SegmentationMetrics
    from fcvgg.segmentation.metrics import label_metrics as label_metrics
    from fcvgg.segmentation.network import FCN as FCN
    from fcvgg.segmentation.training import DenseTraining as DenseTraining
    from fcvgg.segmentation.training import evaluate_fcn as evaluate_fcn
    from fcvgg.segmentation.training import train_fcn as train_fcn
    from fcvgg.streaming.execution import stream as stream
    from fcvgg.transfer import Features as Features
    from fcvgg.transfer import GeometryChanges as GeometryChanges
    from fcvgg.transfer import LayerNames as LayerNames
    from fcvgg.transfer import Probe as Probe
    from fcvgg.transfer import features_upto as features_upto
    from fcvgg.transfer import for_input_size as for_input_size
    from fcvgg.transfer import freeze_ as freeze_
    from fcvgg.transfer import geometry_changes as geometry_changes
    from fcvgg.transfer import insert_after as insert_after
    from fcvgg.transfer import layer_names as layer_names
    from fcvgg.transfer import loss_for as loss_for
    from fcvgg.transfer import parameter_groups as parameter_groups
    from fcvgg.transfer import plot_features as plot_features
    from fcvgg.transfer import probe as probe
    from fcvgg.transfer import replace_head as replace_head
    from fcvgg.transfer import replace_layers as replace_layers
    from fcvgg.transfer import trainable_parameters as trainable_parameters
    from fcvgg.transfer import unfreeze_ as unfreeze_
    from fcvgg.transfer.estimators import VGGFeatures as VGGFeatures
    from fcvgg.verification import verify as verify

_PUBLIC: dict[str, tuple[str, ...]] = {
    "results.boxes": ("ScoredBox",),
    "conversion": ("convert",),
    "evaluation.effective_field": (
        "EffectiveReceptiveField",
        "effective_receptive_field",
    ),
    "errors": (
        "ArgumentError",
        "CaptureError",
        "CategoryError",
        "ConversionError",
        "DatasetError",
        "EquivalenceError",
        "FcvggError",
        "GeometryError",
        "ImageError",
        "InputSizeError",
        "LoadError",
        "MissingExtraError",
        "PreprocessError",
        "RefusedLayerError",
        "TrainingError",
        "UnsupportedLayerError",
    ),
    "evaluation.protocols": (
        "Evaluation",
        "evaluate",
    ),
    "finetuning.finetuning": ("finetune",),
    "finetuning.result": ("FineTuned",),
    "finetuning.strategies": ("Recipe",),
    "geometry": ("Geometry",),
    "results.heatmap": ("Heatmap",),
    "evaluation.layer_table": (
        "LayerTable",
        "receptive_fields",
    ),
    "loading": ("load",),
    "network": ("FullyConvolutional",),
    "optimization.networks": (
        "OptimizedNetwork",
        "optimize",
    ),
    "images.preprocessing": ("Preprocess",),
    "results.score_map": ("ScoreMap",),
    "results.label_map": ("LabelMap",),
    "segmentation.mask_folders": (
        "MaskFolder",
        "mask_folder",
    ),
    "segmentation.metrics": (
        "SegmentationMetrics",
        "label_metrics",
    ),
    "segmentation.network": ("FCN",),
    "segmentation.training": (
        "DenseTraining",
        "evaluate_fcn",
        "train_fcn",
    ),
    "streaming.execution": ("stream",),
    "images.lazy.opening": ("open_image",),
    "transfer": (
        "Features",
        "GeometryChanges",
        "LayerNames",
        "Probe",
        "features_upto",
        "for_input_size",
        "freeze_",
        "geometry_changes",
        "insert_after",
        "layer_names",
        "loss_for",
        "parameter_groups",
        "plot_features",
        "probe",
        "replace_head",
        "replace_layers",
        "trainable_parameters",
        "unfreeze_",
    ),
    "transfer.estimators": ("VGGFeatures",),
    "results.equivalence": ("Equivalence",),
    "verification": ("verify",),
    "evaluation.window_comparison": (
        "WindowComparison",
        "compare_windows",
    ),
}
"""The public names by the module that holds them.

A name is imported where it is first asked for: torch and torchvision take seconds to import, which
``fcvgg --help`` should not, and VGGFeatures needs scikit-learn, which is optional.
"""

_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}

_MODULES = ("demo", "distributed", "errors", "evaluation", "segmentation", "training", "transfer")
"""Modules with further names that users call."""

__all__ = sorted(_HOMES)

if find_spec("sklearn") is None:  # so that ``from fcvgg import *`` works without the extra
    __all__.remove("VGGFeatures")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"fcvgg.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"fcvgg.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(n for n in globals() if n.startswith("__"))})
