"""Early features under a linear support vector machine, as one network (extra ``sklearn``)."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fcvgg.finetuning.images import ImageRows
from fcvgg.finetuning.outputs import outputs_of
from fcvgg.support.extras import imported
from fcvgg.transfer.extraction import features_upto

_ITERATIONS = 20_000
_FOLDS = 3
_SHARPNESS = np.geomspace(0.05, 20, 200)


def fit_svm(
    model: nn.Module,
    images: ImageRows,
    layer: str,
    *,
    balanced: bool = False,
    seed: int = 0,
    **execution: Any,
) -> nn.Module:
    """A classifier: the layers up to `layer`, their average over positions, and one linear layer.

    The linear layer holds what scikit-learn's `LinearSVC` learnt on the standardised features, with
    the standardisation folded in, so its scores are the machine's decision values times one factor
    (for two classes, minus and plus half the one decision value). The factor makes their softmax
    fit held-out folds; it changes no decision.

    Args:
        model: the pretrained classifier.
        images: the training images, not augmented.
        layer: the name of the layer whose features are used.
        balanced: weight classes inversely to their sizes.
        seed: the seed of the machine and the folds.
        execution: as for `outputs_of`.
    """
    svm, pipeline, preprocessing, exceptions = (
        imported(f"sklearn.{name}", "sklearn")
        for name in ("svm", "pipeline", "preprocessing", "exceptions")
    )
    classifier = nn.Sequential(
        OrderedDict(
            features=features_upto(model, layer),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    ).eval()
    outputs = outputs_of(classifier, images, f"features of {layer}", **execution)
    rows = torch.cat([rows.cpu() for rows, _ in outputs]).numpy()  # (N, C)
    labels = np.array(images.files.labels)
    machine = pipeline.make_pipeline(
        preprocessing.StandardScaler(),
        svm.LinearSVC(
            class_weight="balanced" if balanced else None, max_iter=_ITERATIONS, random_state=seed
        ),
    )
    with warnings.catch_warnings():
        # a machine that has not fully converged is still useful
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        machine.fit(rows, labels)
        factor = _sharpness(machine, rows, labels, seed)
    classifier.add_module("classifier", _linear(machine[0], machine[1], factor))
    return classifier


def _linear(scaler: Any, machine: Any, factor: float) -> nn.Linear:
    """The machine's decision on features that are not standardised, computed in float64."""
    # w @ (x - mean) / scale + b = (w / scale) @ x + b - (w / scale) @ mean
    weight = machine.coef_ / scaler.scale_  # (K, C), or (1, C) for two classes
    bias = machine.intercept_ - weight @ scaler.mean_
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight * factor))
        layer.bias.copy_(torch.from_numpy(bias * factor))
    return layer


def _sharpness(machine: Any, rows: NDArray[Any], labels: NDArray[Any], seed: int) -> float:
    """The factor on the decision values whose softmax best fits held-out folds."""
    selection = imported("sklearn.model_selection", "sklearn")
    if np.bincount(labels).min() < _FOLDS:
        return 1.0
    folds = selection.StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    decided = selection.cross_val_predict(
        machine, rows, labels, cv=folds, method="decision_function"
    )
    scores = torch.from_numpy(decided)
    if scores.ndim == 1:
        scores = torch.stack([-scores, scores], 1) / 2
    truth = torch.from_numpy(labels)
    losses = [nn.functional.cross_entropy(scores * float(s), truth).item() for s in _SHARPNESS]
    return float(_SHARPNESS[int(np.argmin(losses))])
