"""What is trained of a network, and which strategy suits how many images of what kind.

The literature on transfer learning distinguishes these cases by the size of the data set and by the
similarity of its images to those that the network was trained on (the CS231n course notes on
transfer learning, https://cs231n.github.io/transfer-learning; Yosinski et al., "How transferable
are features in deep neural networks?", 2014, https://arxiv.org/abs/1411.1792).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fcvgg.choices import Resize, Strategy
from fcvgg.errors import ArgumentError, ConversionError, InputSizeError, check_choice
from fcvgg.finetuning.images import checked_resize
from fcvgg.finetuning.pretrained import Pretrained
from fcvgg.geometry import Pair, checked_size
from fcvgg.images.datasets import LabelledFiles
from fcvgg.rewriting.native_size import infer_input_size
from fcvgg.transfer.freezing import freeze_, parameter_groups, unfreeze_
from fcvgg.transfer.heads import WEIGHT_STD, fully_connected, replace_head
from fcvgg.transfer.input_sizes import for_input_size
from fcvgg.transfer.naming import LayerNames, NamedLayer, layer_names

STRATEGIES = get_args(Strategy)

FEW, MANY = 100, 500
"""Training images per class: fewer than the first are few, the second or more are many."""

MEANINGS = {
    "linear": "all features are frozen and one linear layer is trained",
    "partial": "the early layers are frozen, the later ones and the head are trained",
    "all": "every layer is trained, the early ones more slowly",
    "svm": "early features are frozen, and a linear support vector machine is fitted to them",
    "scratch": "every layer is trained from random weights",
}

SCRATCH_RATES = {"adamw": 3e-4, "sgd": 1e-2}
"""Learning rates for random weights; VGG's was 0.01."""

EPOCHS = {"linear": 100}
"""Default epochs of strategies whose epochs cost little, since features are computed once."""

LEAST_STEPS = 300
"""Steps that the default epochs come to at least: few images make few steps in 30 epochs."""

_NEW_RATE = 1e-3
"""The least rate of new layers for AdamW. On VGG16's pool5 for three sets of four or five classes
it gave 94 to 100 % in 6 epochs, where 1e-4 gave 36 to 81 %, and a linear machine 75 to 95 %."""

_STEPS = {"adamw": 0.3, "sgd": 1.0}
_LARGEST_RATE = 1e-2
"""How far the first step of a new layer moves its output, and a limit; see `new_layer_rate`."""

_FEATURES_RATE, _DECAY = 0.1, 0.5
"""The rate of the last block relative to the head, and of every block relative to the next."""

_PROBED, _FOLDS, _MARGIN = 120, 3, 0.02
"""Images and folds that measure similarity, and the least margin by which early features must be
better; the standard error is used where it is larger."""


@dataclass(frozen=True)
class Recipe:
    """What is done with the network and the images.

    Args:
        strategy: ``"linear"``, ``"partial"``, ``"all"``, ``"svm"``, ``"scratch"``, or ``"auto"`` to
            choose among them by the number of images and their similarity.
        similar: whether the images are similar to those that the network was trained on; None
            measures it for ``"auto"``.
        freeze_upto: for ``"partial"`` the last frozen layer, for ``"svm"`` the layer whose features
            are used; a name such as ``"pool3"``. The pool at half depth when None.
        hidden: widths of new hidden layers before the last, ``()`` for one linear layer on the
            features; None keeps the fully connected layers except the last.
        size: another input size, an int or ``(h, w)``; the network's own when None.
        resize: ``"resize"`` or ``"center-crop"``.
        augment: vary the training images; by default if a convolution is trained. Frozen layers
            are computed once for images that do not vary.
        cache: memory for what the frozen layers give, bytes or text such as ``"2GiB"``; more goes
            to a file in the run's folder while it trains. 0 computes them in every epoch.
        class_weights: None, or ``"balanced"`` for classes of very different sizes.
        valid_fraction: the share that is held out if the folder has no ``valid``.

    Raises:
        ArgumentError: if a value is unknown.
    """

    strategy: Strategy = "auto"
    similar: bool | None = None
    freeze_upto: str | None = None
    hidden: Sequence[int] | None = None
    size: int | Pair | None = None
    resize: Resize = "resize"
    augment: bool | None = None
    cache: int | str = "2GiB"
    class_weights: Literal["balanced"] | None = None
    valid_fraction: float = 0.2

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, STRATEGIES)
        object.__setattr__(self, "resize", checked_resize(self.resize))
        check_choice("class_weights", self.class_weights, (None, "balanced"))
        if self.freeze_upto is not None and self.strategy not in ("auto", "partial", "svm"):
            raise ArgumentError(
                "freeze_upto must go with strategy='partial' or 'svm', got strategy="
                f"{self.strategy!r}"
            )
        if self.strategy == "linear" and self.hidden:
            raise ArgumentError(
                f"hidden must be () or None for strategy='linear', got {tuple(self.hidden)}; "
                "use strategy='partial'"
            )


def with_augment(recipe: Recipe, strategy: str, source: Pretrained) -> Recipe:
    """The recipe with its default for `augment`: whether any convolution is trained."""
    if recipe.augment is not None:
        return recipe
    trained = strategy in ("all", "scratch")
    if strategy == "partial":
        names = layer_names(source.model)
        upto = names.end_of(recipe.freeze_upto or middle_pool(names))
        trained = any(x.role == "conv" for x in names.layers[names.layers.index(upto) + 1 :])
    return replace(recipe, augment=trained)


@dataclass(frozen=True)
class Choice:
    """A strategy and, in one sentence, the reason for it."""

    strategy: str
    reason: str


def choose_strategy(recipe: Recipe, source: Pretrained, files: LabelledFiles) -> Choice:
    """The recipe's strategy, or the one that suits the training images."""
    if recipe.strategy != "auto":
        return Choice(recipe.strategy, f"as requested: {MEANINGS[recipe.strategy]}")
    if recipe.freeze_upto is not None:
        return Choice("partial", f"since freeze_upto is given: {MEANINGS['partial']}")
    per_class = len(files) / len(set(files.labels))
    amount = f"{per_class:.0f} training images per class are"
    if per_class >= MANY:
        return Choice(
            "all",
            f"{amount} many (from {MANY}), so {MEANINGS['all']}; pretrained weights are the better "
            "start even for images of another kind",
        )
    if recipe.hidden:
        return Choice("partial", f"since hidden layers are requested: {MEANINGS['partial']}")
    similar, why = (
        (recipe.similar, f"the images are called {'similar' if recipe.similar else 'different'}")
        if recipe.similar is not None
        else _measure_similarity(recipe, source, files)
    )
    if per_class >= FEW:
        return Choice(
            "partial", f"{amount} neither few nor many, and {why}, so {MEANINGS['partial']}"
        )
    strategy = "linear" if similar else "svm"
    if strategy == "svm" and recipe.augment:
        strategy = "partial"
        why = f"{why}, and a support vector machine cannot be fitted to features that vary"
    return Choice(strategy, f"{amount} few (below {FEW}) and {why}, so {MEANINGS[strategy]}")


def _measure_similarity(
    recipe: Recipe, source: Pretrained, files: LabelledFiles
) -> tuple[bool, str]:
    """Whether late features separate the classes as well as early ones do, and the finding.

    Late features, those that a new last layer would get, are specific to the images that the
    network was trained on. Where early ones are clearly better, the images are of another kind.
    """
    from fcvgg.transfer.probing import probe

    labels = np.array(files.labels)
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < _FOLDS:
        return True, "too few to measure their similarity to the network's own images"
    rng = np.random.default_rng(0)
    share = max(_PROBED // len(classes), _FOLDS)
    places = [
        int(i)
        for label in classes
        for i in rng.permutation(np.flatnonzero(labels == label))[:share]
    ]
    try:
        names = layer_names(source.model)
        early, late = middle_pool(names), _fed_to_new(names, recipe)
        probed = probe(
            source.model,
            [files.paths[i] for i in places],
            [files.labels[i] for i in places],
            layers=[early, late],
            folds=_FOLDS,
            # fully connected layers that are kept run at their own size only
            size=source.native if recipe.hidden is None else size_of(recipe, source.native),
            preprocess=source.preprocess,
        )
    except (ArgumentError, ConversionError):
        return True, "their similarity to the network's own images cannot be measured on its layers"
    found = {row.layer: row.mean for row in probed.rows}
    mean = (found[late] + found[early]) / 2
    error = (mean * (1 - mean) / len(places)) ** 0.5
    similar = found[late] >= found[early] - max(error, _MARGIN)
    verb = "no worse than" if similar else "worse than"
    return similar, (
        f"features of {late} tell them apart {verb} those of {early} "
        f"({found[late]:.0%} and {found[early]:.0%} of held-out images right)"
    )


def _fed_to_new(names: LayerNames, recipe: Recipe) -> str:
    """The layer whose output the first new layer gets, dropout and flattening aside."""
    layers = fully_connected(names)
    new = layers[-1] if recipe.hidden is None else layers[0]
    before = names.layers[: names.layers.index(new)]
    return next(x.name for x in reversed(before) if x.role not in ("drop", "flatten", "avgpool"))


def prepare_model(
    source: Pretrained, strategy: str, recipe: Recipe, classes: int, seed: int
) -> nn.Module:
    """A copy of a classifier with a new head, at the recipe's size, frozen as the strategy demands.

    For all strategies except ``"svm"``, which has a model of its own. The new weights depend on the
    seed only.

    Raises:
        ConversionError: if the head cannot be replaced.
        ArgumentError: if `Recipe.freeze_upto` names no layer, or the last one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = replace_head(source.model, classes, recipe.hidden)
        size = size_of(recipe, source.native)
        if size != source.native and not _takes_any_size(new):
            # kept fully connected layers are resampled; new ones start from random weights
            new = for_input_size(new, size, init="resample" if recipe.hidden is None else "random")
        if strategy == "scratch":
            _initialize_(new)
    names = layer_names(new)
    unfreeze_(new)
    if strategy == "linear":
        last = names.layers.index(fully_connected(names)[-1])
        freeze_(new, names.layers[last - 1].name)
    if strategy == "partial":
        freeze_(new, recipe.freeze_upto or middle_pool(names))
    if not any(p.requires_grad for p in new.parameters()):
        raise ArgumentError(
            f"freeze_upto must leave a layer to train, got {recipe.freeze_upto!r}, the last one"
        )
    return new


def _takes_any_size(model: nn.Module) -> bool:
    """Whether a global pool precedes the head, so that the head fits any size."""
    try:
        infer_input_size(model)
    except InputSizeError:
        return True
    return False


def size_of(recipe: Recipe, native: Pair) -> Pair:
    """``(h, w)`` at which the network is trained."""
    return native if recipe.size is None else checked_size(recipe.size)


def middle_pool(names: LayerNames) -> str:
    """The pool at half depth, the third of five.

    Raises:
        ArgumentError: if there is none.
    """
    pools = [layer.name for layer in names if layer.role == "pool" and layer.block]
    if not pools:
        raise ArgumentError(
            "the model has no pool layer among its features; name a layer in freeze_upto="
        )
    return pools[(len(pools) - 1) // 2]


def rates(
    model: nn.Module, strategy: str, lr: float, hidden: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Parameter groups: new layers learn fast, early layers slowly, since they are general."""
    if strategy in ("linear", "scratch"):
        return parameter_groups(model, {}, lr=lr)
    # The rate halves with every block towards the image: early features are general and need
    # little change. Fully connected layers that are kept get the rate of the last block.
    names = layer_names(model)
    blocks = sorted({x.block for x in names if x.block and x.role == "conv"})
    by_block = {
        f"block{block}": lr * _FEATURES_RATE * _DECAY ** (len(blocks) - 1 - i)
        for i, block in enumerate(blocks)
    }
    new = {layer.name: lr for layer in new_layers(names, hidden)}
    return parameter_groups(model, {**by_block, **new}, lr=lr * _FEATURES_RATE)


def new_layers(names: LayerNames, hidden: Sequence[int] | None) -> list[NamedLayer]:
    """The fully connected layers of a prepared model that are new."""
    layers = fully_connected(names)
    return layers[-1:] if hidden is None else layers


def new_layer_rate(rows: Tensor, optimizer: str) -> float:
    """A learning rate for new layers that suits the size of their features ``(N, D)``.

    AdamW's first step moves every weight by the rate, and so an output by the rate times the sum of
    the features' magnitudes; SGD's moves it by up to the rate times the sum of their squares. SGD
    must not move it far; AdamW finds its way back, so its rate is larger for small features only.
    It has two digits, so that a resumed run gets the same one despite rounding of features.
    """
    sizes = rows.abs() if optimizer == "adamw" else rows.square()
    size = float(sizes.sum(1).mean())
    rate = min(float(f"{_STEPS[optimizer] / max(size, 1e-6):.1e}"), _LARGEST_RATE)
    return max(rate, _NEW_RATE) if optimizer == "adamw" else rate


def _initialize_(model: nn.Module) -> None:
    """Set random weights: convolutions as He et al. 2015, fully connected layers as VGG."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(module.weight, 0, WEIGHT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(getattr(module, "reset_parameters", None), MethodType):
            module.reset_parameters()  # type: ignore[operator]
