"""`FineTuned`: what a run made, and how well it does."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fcvgg.finetuning.strategies import Choice, Recipe
from fcvgg.geometry import Pair
from fcvgg.images.datasets import LabelledFiles
from fcvgg.images.files import Unreadable
from fcvgg.network import FullyConvolutional
from fcvgg.training.settings import Settings

if TYPE_CHECKING:
    from fcvgg.training.loop import TrainingRun

MODEL, REPORT = "model", "report"
"""Folders of a run: the bundle, and what it is judged by."""

_HEATMAP_WINDOWS = 1.5
"""The smaller side of a photograph to look at, in sizes that the network was trained at."""

_NAMED = 8
"""Classes whose accuracies stand in one line."""


@dataclass(frozen=True)
class FineTuned:
    """What `finetune` made; printing tells it.

    Attributes:
        net: the converted network, verified against `model`.
        model: the trained classifier, in evaluation mode.
        folder: the run's folder.
        source: the name of the network that it started from.
        choice: the strategy, and why.
        recipe: what was done.
        settings: how it was trained.
        classes: the class names.
        counts: images to train on, and held out, of every class.
        skipped: files of the folder that were left out, and why.
        origin: how the held-out images came about.
        size: ``(h, w)`` at which it was trained.
        training: epochs and checkpoints; None for ``"svm"``, which has none.
        valid: the held-out images.
        probabilities: of the classes ``(N, K)`` for every held-out image.
        trained: how many parameters were trained.
        parameters: how many there are.
        seconds: how long this call took.
    """

    net: FullyConvolutional
    model: nn.Module
    folder: Path
    source: str
    choice: Choice
    recipe: Recipe
    settings: Settings
    classes: tuple[str, ...]
    counts: dict[str, tuple[int, int]]
    skipped: tuple[Unreadable, ...]
    origin: str
    size: Pair
    training: TrainingRun | None
    valid: LabelledFiles
    probabilities: NDArray[Any]
    trained: int
    parameters: int
    seconds: float

    @property
    def model_path(self) -> Path:
        """The bundle, for `fcvgg.load` and ``--model``."""
        return self.folder / MODEL

    @property
    def report_path(self) -> Path:
        """The report, in Markdown."""
        return self.folder / REPORT / "report.md"

    @property
    def heatmap_command(self) -> str:
        """A command that shows where the network sees a class in a photograph.

        Trained images were seen whole at `size`, so a photograph is brought near that: at its own
        size the network would see details larger than any that it was trained on.
        """
        scale = round(_HEATMAP_WINDOWS * max(self.size))
        model = shlex.quote(str(self.model_path))
        return f"fcvgg heatmap photo.jpg --model {model} --scale {scale}"

    @property
    def confusion(self) -> NDArray[Any]:
        """Counts of held-out images ``(K, K)``, by class in rows and by prediction in columns."""
        from fcvgg.support.extras import imported

        metrics = imported("torchmetrics.functional.classification", "train")
        predicted = torch.from_numpy(self.probabilities).argmax(1)
        truth = torch.tensor(self.valid.labels)
        return metrics.multiclass_confusion_matrix(predicted, truth, len(self.classes)).numpy()

    @property
    def accuracy(self) -> float:
        """The share of held-out images whose most probable class is theirs."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def class_accuracy(self) -> dict[str, float]:
        """`accuracy` of every class."""
        table = self.confusion
        return {n: float(table[i, i] / table[i].sum()) for i, n in enumerate(self.classes)}

    def __repr__(self) -> str:
        return (
            f"FineTuned({self.source!r}, {self.choice.strategy}, {len(self.classes)} classes, "
            f"accuracy {self.accuracy:.3f}, {str(self.model_path)!r})"
        )

    def __str__(self) -> str:
        held_out = len(self.valid)
        right = round(self.accuracy * held_out)
        lines = [
            f"{self.source}, strategy {self.choice.strategy}: {self.choice.reason}",
            f"{self.trained:,} of {self.parameters:,} parameters trained at "
            f"{self.size[0]}x{self.size[1]} pixels in {self.seconds:.0f} s{self._epochs()}",
            f"held out: {right} of {held_out} images right ({self.accuracy:.1%}), "
            + self._by_class(),
            *self._one_answer(),
            str(self.net.equivalence),
        ]
        return "\n".join(lines)

    def _by_class(self) -> str:
        shares = sorted(self.class_accuracy.items(), key=lambda item: item[1])
        named = self.class_accuracy.items() if len(shares) <= _NAMED else shares[:3]
        what = "" if len(shares) <= _NAMED else "the least: "
        return what + ", ".join(f"{name} {share:.0%}" for name, share in named)

    def _one_answer(self) -> list[str]:
        named = set(self.probabilities.argmax(1).tolist())
        if len(named) > 1 or len(set(self.valid.labels)) == 1:
            return []
        return [
            f"every held-out image was called {self.classes[named.pop()]}: the network does not "
            "tell the classes apart; train for more epochs, or with another lr or strategy"
        ]

    def _epochs(self) -> str:
        if self.training is None:
            return ""
        run = self.training
        early = ", stopped early" if run.stopped_early else ""
        count = len(run.history)
        return f", {count} epoch{'s' * (count != 1)}{early}, best after epoch {run.best_epoch}"
