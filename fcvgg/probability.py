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


def average_over_space(scores: Tensor, activation: str, average: str) -> Tensor:
    """One prediction ``(K,)`` of a map ``(K, h, w)``, as probabilities."""
    if average == "scores" and activation == "logits":
        return to_probabilities(widened(scores).mean((1, 2)), activation)
    return to_probabilities(scores, activation).mean((1, 2))


def widened(values: Tensor) -> Tensor:
    """Values of half precision as float32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
