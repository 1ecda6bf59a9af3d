"""How well a linear classifier does on the features of each layer (extra ``sklearn``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from fcvgg.choices import Classifier
from fcvgg.errors import ArgumentError, ConversionError, check_choice, check_integer
from fcvgg.support.extras import imported
from fcvgg.support.tables import text_table
from fcvgg.transfer.image_features import FeatureExtractor
from fcvgg.transfer.naming import layer_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLASSIFIERS = get_args(Classifier)
_ITERATIONS = 5000

_ABREAST = 60
"""Letters of the names of all layers that fit below the axes side by side."""


@dataclass(frozen=True)
class LayerAccuracy:
    """Cross-validated accuracy on one layer's features.

    Attributes:
        layer: its name.
        features: how many numbers an image gives.
        folds: the accuracy on every fold's held-out images.
    """

    layer: str
    features: int
    folds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.folds)

    @property
    def std(self) -> float:
        """Standard deviation over the folds."""
        return pstdev(self.folds)


@dataclass(frozen=True)
class Probe:
    """Accuracy by depth; printing shows a table.

    Attributes:
        rows: one per layer, from the image on.
        chance: the accuracy of always naming the most frequent class.
        images: how many there were.
    """

    rows: tuple[LayerAccuracy, ...]
    chance: float
    images: int

    @property
    def best(self) -> LayerAccuracy:
        """The layer with the highest mean accuracy, the first of equals."""
        return max(self.rows, key=lambda row: row.mean)

    @property
    def headings(self) -> tuple[str, ...]:
        """Of `cells`."""
        return ("layer", "features", "accuracy", "spread")

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, a row per layer and one for chance, under `headings`."""
        rows = [(r.layer, f"{r.features}", f"{r.mean:.3f}", f"{r.std:.3f}") for r in self.rows]
        return [*rows, ("chance", "", f"{self.chance:.3f}", "")]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy by depth, with the folds' standard deviation and the line of chance."""
        own = ax is None
        crowded = max(len(row.layer) for row in self.rows) * len(self.rows) > _ABREAST
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6, 5 if crowded else 4), dpi=120, layout="constrained").subplots()
        places = range(len(self.rows))
        ax.errorbar(
            places,
            [row.mean for row in self.rows],
            # no accuracy is outside of 0 to 1, so no bar is either
            [
                [min(row.std, row.mean) for row in self.rows],
                [min(row.std, 1 - row.mean) for row in self.rows],
            ],
            marker="o",
            capsize=4,
            label=f"mean and spread of {len(self.rows[0].folds)} folds",
        )
        ax.axhline(self.chance, color="grey", linestyle="--", label="most frequent class")
        between = ", " if crowded else "\n"
        names = [f"{row.layer}{between}{row.features}" for row in self.rows]
        turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        ax.set_xticks(places, names, **(turned if crowded else {}))
        ax.set_xlabel("layer, and its number of features")
        ax.set_ylabel("accuracy on held-out images")
        ax.set_ylim(0, 1.02)
        ax.grid(alpha=0.3)
        # below the figure, where no accuracy is: they are often all at the top
        figure: Any = ax.figure
        if own:
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
        else:
            ax.legend(loc="lower center", frameon=False)
        ax.set_title(f"{self.images} images: best at {self.best.layer}, {self.best.mean:.1%}")
        return ax

    def __str__(self) -> str:
        return text_table([self.headings, *self.cells()])


def probe(
    model: nn.Module | str | Path,
    images: Sequence[Any],
    labels: Sequence[Any],
    *,
    layers: Sequence[str] | None = None,
    classifier: Classifier = "logistic",
    folds: int = 5,
    seed: int = 0,
    **options: Any,
) -> Probe:
    """Cross-validated accuracy of a linear classifier on the features of each layer.

    It tells whether low, middle or high features suit a task, before anything is trained. Features
    are standardised on each fold's training images.

    Args:
        model: as for `fcvgg.VGGFeatures`.
        images: one image or path for every label.
        labels: the classes.
        layers: names of layers; all pool layers when None.
        classifier: ``"logistic"`` (logistic regression) or ``"svm"`` (`LinearSVC`).
        folds: how many parts of the images are held out in turn, stratified and shuffled.
        seed: of the shuffling.
        options: `pooling`, `size`, `preprocess`, `batch_size`, `cache`, `progress` and the others
            of `fcvgg.VGGFeatures`.

    Raises:
        ArgumentError: if an argument is out of range or the classes are too few or too small.
        MissingExtraError: if scikit-learn is not installed.
    """
    if isinstance(layers, str):
        raise ArgumentError(f"layers must be a sequence of names, got {layers!r}; pass [name]")
    labels = list(labels)
    counts = Counter(labels)
    _check(images, labels, counts, classifier, folds)
    imported("sklearn", "sklearn")
    if isinstance(model, (str, Path)):
        from fcvgg.loading import load

        model = load(model)
    extractor = FeatureExtractor(model, layers or pool_layers(model), **options)
    features = extractor.rows(images)
    return Probe(
        tuple(
            LayerAccuracy(name, rows.shape[1], _accuracies(rows, labels, classifier, folds, seed))
            for name, rows in features.items()
        ),
        chance=max(counts.values()) / len(labels),
        images=len(labels),
    )


def pool_layers(model: nn.Module) -> list[str]:
    """The names of a model's pool layers, from the image on."""
    found = [layer.name for layer in layer_names(model) if layer.role == "pool" and layer.block]
    if not found:
        raise ConversionError(
            f"{type(model).__name__} has no pool layer; name the layers in layers="
        )
    return found


def _accuracies(
    rows: Any, labels: Sequence[Any], classifier: str, folds: int, seed: int
) -> tuple[float, ...]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    linear = (
        LogisticRegression(max_iter=_ITERATIONS)
        if classifier == "logistic"
        else LinearSVC(max_iter=_ITERATIONS, random_state=seed)
    )
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    pipeline = make_pipeline(StandardScaler(), linear)
    return tuple(map(float, cross_val_score(pipeline, rows, labels, cv=parts)))


def _check(
    images: Sequence[Any],
    labels: Sequence[Any],
    counts: Counter[Any],
    classifier: str,
    folds: Any,
) -> None:
    if len(images) != len(labels):
        raise ArgumentError(
            f"labels must be as many as the {len(images)} images, got {len(labels)}"
        )
    check_choice("classifier", classifier, CLASSIFIERS)
    check_integer("folds", folds, 2)
    if len(counts) < 2:
        raise ArgumentError(f"labels must be of two or more classes, got {len(counts)}")
    rarest, count = min(counts.items(), key=lambda item: item[1])
    if count < folds:
        raise ArgumentError(
            f"folds must be at most {count}, the images of class {rarest!r}, got {folds}; add "
            "images, or use fewer folds"
        )
