"""Which scores of a cell a stream keeps: all, some classes, the best one or the best five."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fcvgg.categories import class_index
from fcvgg.errors import ArgumentError, CategoryError
from fcvgg.network import FullyConvolutional
from fcvgg.probability import cells_with_data, to_probabilities
from fcvgg.score_map import ScoreMap, best_classes
from fcvgg.streaming.strip_plan import (
    itemsize_of,
)

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
        """Read the argument `classes` of `stream`.

        Raises:
            ArgumentError: if it is none.
            CategoryError: if a class is unknown.
        """
        count = net.program.classes[output]
        activation = net.activation_of(output)
        if classes is None:
            return cls("scores", tuple(range(count)), count, activation)
        if isinstance(classes, str):
            if classes not in ("argmax", "top5"):
                raise ArgumentError(
                    f"classes={classes!r} is unknown; expected 'argmax', 'top5', or a sequence of "
                    "class indices and names"
                )
            if classes == "argmax" and count == 1:  # what cannot be told is said before the work
                to_probabilities(torch.zeros(1), activation)
            return cls(classes, (), count, activation)
        if not isinstance(classes, Iterable):
            raise ArgumentError(
                f"classes={classes!r} is no sequence; expected class indices and names, such as "
                f"[{classes!r}]"
            )
        names = net.categories if output == 0 else None
        indices = tuple(class_index(c, names, count) for c in classes)
        if not indices or len(set(indices)) < len(indices):
            raise ArgumentError(f"classes={list(classes)} names no class, or one twice")
        return cls("scores", indices, count, activation)

    @property
    def lead(self) -> tuple[int, ...]:
        """The result's dimensions before the rows and columns."""
        top = min(_TOP, self.count)
        return {"scores": (len(self.indices),), "argmax": (), "top5": (2, top)}[self.kind]

    @property
    def whole(self) -> bool:
        return self.indices == tuple(range(self.count))

    def dtype(self, scores: torch.dtype) -> torch.dtype:
        if self.kind == "argmax":
            return torch.int64
        return torch.float32 if self.kind == "top5" and itemsize_of(scores) < 4 else scores

    def __call__(self, scores: Tensor) -> Tensor:
        """What is kept of scores ``(K, h, w)``."""
        if self.kind == "argmax":
            return best_classes(scores, self.activation)
        if self.kind == "top5":
            unknown = ~cells_with_data(scores)
            best, indices = scores.to(self.dtype(scores.dtype)).topk(min(_TOP, self.count), 0)
            return torch.stack(
                [indices.masked_fill(unknown, -1).to(best), best.masked_fill(unknown, torch.nan)]
            )
        return scores if self.whole else scores[list(self.indices)]


class ScoreMapOfSomeClasses(ScoreMap):
    """A `ScoreMap` that lacks classes, so that a softmax over it would be wrong."""

    def probabilities(self) -> Tensor:
        """The class probabilities of every cell, where they do not depend on other classes."""
        self._require_probabilities()
        return super().probabilities()

    def predict(self, average: str = "scores") -> Tensor:
        """The classes' probabilities, where they do not depend on other classes."""
        self._require_probabilities()
        return super().predict(average)

    def _require_probabilities(self) -> None:
        if self.activation == "logits":
            raise CategoryError(
                "the score map holds some of the classes, and probabilities need the logits of all;"
                " stream with classes=None"
            )
