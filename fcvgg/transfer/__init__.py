"""Transfer: a trained network for other sizes, classes and images, before it is converted.

- `input_sizes` and `heads`: the same features under new fully connected layers,
- `freezing`: which layers train, and how fast,
- `naming`, `extraction` and `surgery`: layers by name,
- `image_features`, `estimators`, `probing` and `feature_figures`: a layer's features for
  scikit-learn and for looking at.
"""

from typing import TYPE_CHECKING

import lazy_loader

from fcvgg.images.datasets import ClassFolders, class_folders
from fcvgg.transfer.extraction import Features, features_upto
from fcvgg.transfer.feature_figures import plot_features
from fcvgg.transfer.freezing import freeze_, parameter_groups, trainable_parameters, unfreeze_
from fcvgg.transfer.heads import loss_for, replace_head
from fcvgg.transfer.input_sizes import for_input_size
from fcvgg.transfer.naming import LayerNames, NamedLayer, layer_names
from fcvgg.transfer.probing import Probe, probe
from fcvgg.transfer.surgery import (
    GeometryChanges,
    geometry_changes,
    insert_after,
    replace_layers,
)

if TYPE_CHECKING:
    from fcvgg.transfer.estimators import VGGFeatures as VGGFeatures
else:  # imports scikit-learn, which is optional: on first use
    __getattr__ = lazy_loader.attach(__name__, submod_attrs={"estimators": ["VGGFeatures"]})[0]

__all__ = [
    "ClassFolders",
    "Features",
    "GeometryChanges",
    "LayerNames",
    "NamedLayer",
    "Probe",
    "class_folders",
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
]
