"""From scores to probabilities, by what the scores are."""

from __future__ import annotations

import torch
from torch import Tensor

from fcvgg.errors import ArgumentError

ACTIVATIONS = ("logits", "probabilities", "log_probabilities", "sigmoid")
"""What scores can be: before a softmax (one class: before a sigmoid), after a softmax, after a
log-softmax, after a sigmoid for each class."""

UNKNOWN = "unknown"
"""What the scores are where the model computes on with its probabilities. A network may have it;
nothing is made of such scores but maps of them."""


def to_probabilities(scores: Tensor, activation: str, dim: int = 0) -> Tensor:
    """Probabilities of raw scores, never soft-maxed twice; in float32 at least.

    Logits of a single class go through a sigmoid, since a softmax over one class is always 1.

    Raises:
        ArgumentError: if what the scores are is not known.
    """
    if activation == UNKNOWN:
        *names, last = map(repr, ACTIVATIONS)
        raise ArgumentError(
            "what the scores are cannot be read off the model, which computes on after its softmax "
            f"or sigmoid; pass activation= to fcvgg.convert: {', '.join(names)} or {last}"
        )
    scores = widened(scores)
    if activation == "logits":
        return torch.sigmoid(scores) if scores.shape[dim] == 1 else torch.softmax(scores, dim)
    return scores.exp() if activation == "log_probabilities" else scores


def normalized(logits: Tensor, normalizer: Tensor) -> Tensor:
    """Probabilities of some classes' logits ``(..., h, w)``, by the log-sum-exp over all."""
    return (logits - normalizer).exp()


def average_over_space(scores: Tensor, activation: str, average: str) -> Tensor:
    """One prediction ``(K,)`` of a map ``(K, h, w)``, as probabilities; NaN without any data."""
    if average == "scores" and activation == "logits":
        return to_probabilities(average_of_cells(widened(scores)), activation)
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


def widened(values: Tensor) -> Tensor:
    """Values of half precision as float32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
