"""From scores to probabilities, by what the scores are."""

from __future__ import annotations

import torch
from torch import Tensor

from fcvgg.errors import ArgumentError
from fcvgg.names import alternatives

ACTIVATIONS = {
    "logits": "before a softmax, or of one class before a sigmoid",
    "probabilities": "after a softmax",
    "log_probabilities": "after a log-softmax",
    "sigmoid": "after a sigmoid for each class",
    "independent_logits": "before a sigmoid for each class, as of BCEWithLogitsLoss",
    "values": "of a regression, without probabilities",
}
"""What scores can be."""

BOUNDED = ("probabilities", "log_probabilities", "sigmoid")
"""Those whose scores lie in a range."""

UNKNOWN = "unknown"
"""What the scores are where the model computes on with its probabilities: they are mapped as they
are, without probabilities or heatmaps."""

_SPELLINGS = {
    "single_label_classification": "logits",
    "multi_label_classification": "independent_logits",
    "multilabel": "independent_logits",
    "multilabel_logits": "independent_logits",
    "regression": "values",
}
"""Names that transformers and torchmetrics have for the same."""

_ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""How far outside [0, 1] rounding takes probabilities; 1e-3 in other dtypes."""


def checked_activation(value: object) -> str:
    """The name of what scores are; names of other libraries are taken too.

    Raises:
        ArgumentError: if it is unknown.
    """
    name = _SPELLINGS.get(value, value) if isinstance(value, str) else value
    if not isinstance(name, str) or name not in (*ACTIVATIONS, UNKNOWN):
        kinds = (f"{kind!r} ({what})" for kind, what in ACTIVATIONS.items())
        raise ArgumentError(f"activation must be {alternatives(kinds)}, got {value!r}")
    return name


def require_classes(activation: str) -> None:
    """Refuse scores that do not compare classes.

    Raises:
        ArgumentError: if they are values.
    """
    if activation == "values":
        raise ArgumentError(
            "the network's scores are values (activation='values'), which have no classes, "
            "probabilities or heatmaps; 'fcvgg heatmap IMAGE' shows the values, 'fcvgg stream "
            "IMAGE -o values.zarr' writes them, and in Python net.score_map(image) has them as "
            "scores, average(), resample() and plot()"
        )


def require_probabilities(activation: str) -> None:
    """Refuse scores that probabilities cannot be computed from.

    Raises:
        ArgumentError: if they are values, or what they are is not known.
    """
    require_classes(activation)
    if activation == UNKNOWN:
        raise ArgumentError(
            "what the scores are cannot be read off the model, which computes on after its softmax "
            f"or sigmoid; pass activation= to fcvgg.convert: {alternatives(map(repr, ACTIVATIONS))}"
        )


def chance_level(classes: int, activation: str) -> float:
    """The probability that says nothing about a class.

    It is ``1 / classes`` where the classes share the probability, and one half for a class alone or
    one that has a sigmoid of its own.
    """
    shared = activation not in ("sigmoid", "independent_logits")
    return 1 / classes if shared and classes > 1 else 0.5


def to_probabilities(scores: Tensor, activation: str, dim: int = 0) -> Tensor:
    """Probabilities of raw scores, never soft-maxed twice; in float32 at least.

    Logits of a single class go through a sigmoid, since a softmax over one class is always 1.

    Raises:
        ArgumentError: if what the scores are is not known, if they are values, or if scores that
            are said to be probabilities are not.
    """
    activation = checked_activation(activation)
    require_probabilities(activation)
    # half precision would round the sum of a softmax over many classes
    rounding = _ROUNDING.get(scores.dtype, 1e-3)
    scores = upcast(scores)
    if activation == "logits" and scores.shape[dim] > 1:
        return torch.softmax(scores, dim)
    if activation in ("logits", "independent_logits"):
        return torch.sigmoid(scores)
    if activation == "log_probabilities":
        return _within(scores, float("-inf"), 0.0, rounding, activation).exp()
    return _within(scores, 0.0, 1.0, rounding, activation)


def final_scores(scores: Tensor, function: str) -> Tensor:
    """Scores ``(N, K)`` after the softmax, log_softmax or sigmoid that ends a model, or ``""``."""
    if function == "sigmoid":
        return torch.sigmoid(scores)
    return getattr(torch, function)(scores, 1) if function else scores  # type: ignore[no-any-return]


def _within(scores: Tensor, low: float, high: float, rounding: float, activation: str) -> Tensor:
    """Scores clamped to their range, which rounding may exceed; NaN stays."""
    wrong = (scores < low - rounding) | (scores > high + rounding)
    if wrong.any():
        found = scores[wrong]
        worst = found.min() if (found < low).any() else found.max()
        expected = "at most 0" if activation == "log_probabilities" else "in [0, 1]"
        raise ArgumentError(
            f"scores must be {expected} where activation={activation!r}, got {worst.item():.4g}; "
            "pass activation='logits' or 'independent_logits' (one sigmoid for each class) to "
            "fcvgg.convert for scores before their softmax or sigmoid, or 'values'"
        )
    return scores.clamp(low, high)


def normalized(logits: Tensor, normalizer: Tensor) -> Tensor:
    """Probabilities of some classes' logits ``(..., h, w)``, by the log-sum-exp over all."""
    return (logits - normalizer).exp()


def average_over_space(scores: Tensor, activation: str, average: str) -> Tensor:
    """One prediction ``(K,)`` of a map ``(K, h, w)``, as probabilities; NaN without any data."""
    if average == "scores" and activation in ("logits", "independent_logits"):
        return to_probabilities(average_of_cells(upcast(scores)), activation)
    return average_of_cells(to_probabilities(scores, activation), scores)


def cells_with_data(scores: Tensor, dim: int = 0) -> Tensor:
    """The cells, bool ``(h, w)``, whose scores ``(K, h, w)`` say something.

    None of them is NaN or plus infinity, and one at least is finite: minus infinity is what some
    models give classes that they exclude.
    """
    return (scores < torch.inf).all(dim) & (scores > -torch.inf).any(dim)


def average_of_cells(maps: Tensor, scores: Tensor | None = None) -> Tensor:
    """The average ``(K,)`` of maps ``(K, h, w)`` over the cells with data; NaN if there is none.

    Args:
        maps: of the scores or of what was made of them.
        scores: which tell where there is data; `maps` when None.
    """
    # the common case, without NaN, needs no mask and no second pass
    average = maps.mean((1, 2))
    if bool(average.isfinite().all()):
        return average
    known = cells_with_data(maps if scores is None else scores)
    return maps.masked_fill(~known, 0).sum((1, 2)) / known.sum()


class MeanOfViews:
    """The mean of an image's probabilities over those of its views that have data."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._views = 0

    def add(self, probabilities: Tensor) -> None:
        """Count the probabilities ``(K,)`` of one more view; NaN where it has no data."""
        known = bool(probabilities.isfinite().all())
        probabilities = probabilities if known else torch.zeros_like(probabilities)
        self._sum = probabilities if self._sum is None else self._sum + probabilities
        self._views += known

    def value(self) -> Tensor:
        """The mean ``(K,)``, float32 on the CPU; NaN where no view has data."""
        assert self._sum is not None
        return (self._sum / (self._views or torch.nan)).float().cpu()


def upcast(values: Tensor) -> Tensor:
    """Values of half precision as float32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
