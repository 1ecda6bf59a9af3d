"""Options of the commands that train: ``fcvgg finetune`` and ``fcvgg segment-train``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fcvgg.cli.options import output_folder

TRAINING = "Training"
"""The part of a command's help that says how is trained."""

RunFolder = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        file_okay=False,
        help="The run's folder; made if absent.",
        callback=output_folder(),
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Finish the interrupted run in the folder.")]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", metavar="N", min=1, help="Images per step.", rich_help_panel=TRAINING
    ),
]


class ClassWeights(str, Enum):
    """How classes count in the loss."""

    none = "none"
    balanced = "balanced"

    @property
    def argument(self) -> str | None:
        """What the library calls it."""
        return None if self is ClassWeights.none else self.value


BALANCED_HELP = "balanced: rare classes count as much as frequent ones."
