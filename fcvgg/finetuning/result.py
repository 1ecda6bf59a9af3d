"""`FineTuned`: the result of a run, and how good it is."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
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
"""Folders of a run: the bundle and the report."""

_HEATMAP_WINDOWS = 1.5
"""The smaller side of a photograph for a heatmap, relative to the size of training."""

_NAMED = 8
"""The most classes whose accuracies are all printed."""


@dataclass(frozen=True)
class FineTuned:
    """The result of `finetune`; its text is a summary.

    Attributes:
        net: the converted network, verified against `model`.
        model: the trained classifier, in evaluation mode.
        folder: the run's folder.
        source: the name of the network that training started from.
        choice: the strategy, and why.
        recipe: what was done with the network and the images.
        settings: how it was trained.
        classes: the class names.
        counts: the numbers of training and held-out images of every class.
        skipped: files of the folder that were left out, and why.
        origin: how the held-out images were chosen.
        size: ``(h, w)`` at which it was trained.
        training: epochs and checkpoints; None for ``"svm"``, which has none.
        frozen: what was done with the frozen layers, in one phrase; ``""`` where all are trained.
        valid: the held-out images.
        probabilities: of the classes ``(N, K)`` for every held-out image.
        trained: the number of parameters that were trained.
        parameters: the number of all parameters.
        seconds: the duration of this call.
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
    frozen: str
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

        Training images were seen whole at `size`, so a photograph is brought near that: at its own
        size its details would be larger than any that the network was trained on.
        """
        scale = round(_HEATMAP_WINDOWS * max(self.size))
        model = shlex.quote(str(self.model_path))
        return f"fcvgg heatmap photo.jpg --model {model} --scale {scale}"

    @property
    def confusion(self) -> NDArray[Any]:
        """Counts of held-out images ``(K, K)``, by class in rows and by prediction in columns."""
        table = np.zeros((len(self.classes),) * 2, np.int64)
        np.add.at(table, (self.valid.labels, self.probabilities.argmax(1)), 1)
        return table

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
            f"{self.size[0]}x{self.size[1]} pixels in {self.seconds:.0f} s{self._epochs()}"
            + (self.frozen and f"; {self.frozen}"),
            f"held out: {right} of {held_out} images right ({self.accuracy:.1%}), "
            + self._by_class(),
            str(self.net.equivalence),
        ]
        if self.training is not None and self.training.still_improving and self.accuracy < 1:
            lines.append(
                "still improving at the last epoch; more epochs or a larger rate may do better "
                "(epochs and lr, --epochs and --lr)"
            )
        predicted = set(self.probabilities.argmax(1).tolist())
        if len(predicted) == 1 < len(set(self.valid.labels)):
            lines.insert(
                3,
                f"every held-out image was classified as {self.classes[predicted.pop()]}: the "
                "network does not tell the classes apart; train for more epochs, or with another "
                "lr or strategy",
            )
        return "\n".join(lines)

    def _by_class(self) -> str:
        shares = sorted(self.class_accuracy.items(), key=lambda item: item[1])
        named = self.class_accuracy.items() if len(shares) <= _NAMED else shares[:3]
        what = "" if len(shares) <= _NAMED else "the least: "
        return what + ", ".join(f"{name} {share:.0%}" for name, share in named)

    def _epochs(self) -> str:
        if self.training is None:
            return ""
        run = self.training
        early = ", stopped early" if run.stopped_early else ""
        count = len(run.history)
        return f", {count} epoch{'s' * (count != 1)}{early}, best after epoch {run.best_epoch}"
