"""Which scores of a cell a stream keeps: all, some classes, the best one or the best five."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fcvgg.categories import class_index
from fcvgg.choices import Average
from fcvgg.errors import ArgumentError
from fcvgg.network import FullyConvolutional
from fcvgg.probability import (
    average_of_cells,
    cells_with_data,
    normalized,
    require_classes,
    require_probabilities,
)
from fcvgg.results.score_map import ScoreMap, labels_of

_TOP = 5


@dataclass(frozen=True)
class Selection:
    """Which scores of a cell are kept: all, some classes, the best one or the best five."""

    kind: str
    indices: tuple[int, ...]
    count: int
    activation: str

    @classmethod
    def of(cls, classes: Any, net: FullyConvolutional, output: int) -> Selection:
        """The selection that the argument `classes` of `stream` asks for.

        Raises:
            ArgumentError: if it is of another kind.
            CategoryError: if a class is unknown.
        """
        count = net.program.classes[output]
        activation = net.activation_of(output)
        if classes is None:
            return cls("scores", tuple(range(count)), count, activation)
        if isinstance(classes, str):
            if classes not in ("argmax", "top5"):
                raise ArgumentError(
                    "classes must be 'argmax', 'top5', or a sequence of class indices and names, "
                    f"got {classes!r}"
                )
            require_classes(activation)
            if classes == "argmax" and count == 1:  # or it would fail after the first strip
                require_probabilities(activation)
            return cls(classes, (), count, activation)
        if not isinstance(classes, Iterable):
            raise ArgumentError(
                f"classes must be a sequence of class indices and names, got {classes!r}; pass "
                f"[{classes!r}]"
            )
        names = net.categories if output == 0 else None
        indices = tuple(class_index(c, names, count) for c in classes)
        if not indices or len(set(indices)) < len(indices):
            raise ArgumentError(
                f"classes must name at least one class and none twice, got {list(classes)}"
            )
        return cls("scores", indices, count, activation)

    @property
    def lead(self) -> tuple[int, ...]:
        """The result's dimensions before the rows and columns."""
        top = min(_TOP, self.count)
        kept = len(self.indices) + self.normalized
        return {"scores": (kept,), "argmax": (), "top5": (2, top)}[self.kind]

    @property
    def whole(self) -> bool:
        return self.indices == tuple(range(self.count))

    @property
    def normalized(self) -> bool:
        """Whether one more channel holds the log-sum-exp over all classes.

        Without it the probabilities of the kept classes could not be computed.
        """
        return self.kind == "scores" and not self.whole and self.activation == "logits"

    def dtype(self, scores: torch.dtype) -> torch.dtype:
        if self.kind == "argmax":
            return torch.int64
        # half precision holds neither all class indices nor a log-sum-exp to enough digits
        exact = self.kind == "top5" or self.normalized
        return torch.float32 if exact and scores.itemsize < 4 else scores

    def __call__(self, scores: Tensor) -> Tensor:
        """What is kept of scores ``(K, h, w)``, of shape ``(*lead, h, w)``."""
        if self.kind == "argmax":
            return labels_of(scores, self.activation)  # (h, w)
        if self.kind == "top5":
            unknown = ~cells_with_data(scores)  # (h, w)
            best, indices = scores.to(self.dtype(scores.dtype)).topk(min(_TOP, self.count), 0)
            indices = indices.masked_fill(unknown, -1).to(best)
            return torch.stack([indices, best.masked_fill(unknown, torch.nan)])  # (2, 5, h, w)
        if self.whole:
            return scores
        kept = scores[list(self.indices)]  # (classes, h, w)
        if not self.normalized:
            return kept
        kept, scores = (values.to(self.dtype(scores.dtype)) for values in (kept, scores))
        return torch.cat([kept, scores.logsumexp(0, keepdim=True)])  # (classes + 1, h, w)


@dataclass(frozen=True, eq=False, repr=False)
class ScoreMapOfSomeClasses(ScoreMap):
    """A `ScoreMap` that lacks classes, so that a softmax over it would be wrong.

    Attributes:
        normalizer: of logits, the log-sum-exp ``(h, w)`` over all classes, which makes the
            probabilities of the kept classes exact.
    """

    normalizer: Tensor | None = None

    def probabilities(self) -> Tensor:
        """The probabilities of the kept classes, among all classes, in every cell."""
        if self.activation != "logits":
            return super().probabilities()
        assert self.normalizer is not None
        # the softmax over all classes, from the normaliser instead of the classes that are gone
        return normalized(self.scores, self.normalizer).masked_fill(~self.has_data, torch.nan)

    def predict(self, average: Average = "scores") -> Tensor:
        """The probabilities of the kept classes, averaged over the cells.

        Logits cannot be averaged without the classes that were not kept, so for maps of logits the
        probabilities are averaged, whatever `average` says.
        """
        if self.activation != "logits":
            return super().predict(average)
        return average_of_cells(self.probabilities(), self.scores)
