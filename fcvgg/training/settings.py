"""How a network is trained: what does not depend on the task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcvgg.errors import ArgumentError, check_choice, check_integer, check_rate

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("auto", "32", "bf16-mixed", "16-mixed")

_MOMENTUM = 0.9


@dataclass(frozen=True)
class Settings:
    """How a network is trained.

    Args:
        epochs: the largest number of passes over the training images.
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adamw"``.
        lr: the learning rate of parameter groups that have none of their own.
        weight_decay: as for torch's optimizers.
        cosine: let every learning rate fall to 0 along half a cosine, step by step.
        patience: stop after this many epochs without a better monitored value; None never stops.
        batch_size: images per step, on every device.
        workers: processes that read images; 0 reads in this one. It does not change the result.
        seed: the seed of sampling, augmentation and dropout.
        precision: ``"32"``, ``"bf16-mixed"`` or ``"16-mixed"``; ``"auto"`` is bf16-mixed
            on a GPU that has it, else 32.
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"`` or another accelerator of Lightning.
        devices: how many, as for Lightning's `Trainer`; ``"auto"`` takes all.

    Raises:
        ArgumentError: if a value is out of range.
    """

    epochs: int = 30
    optimizer: str = "sgd"
    lr: float = 1e-3
    weight_decay: float = 5e-4
    cosine: bool = True
    patience: int | None = None
    batch_size: int = 32
    workers: int = 0
    seed: int = 0
    precision: str | int = "auto"
    accelerator: str = "auto"
    devices: int | str = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", str(self.precision))
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("precision", self.precision, PRECISIONS)
        for name, least in (("epochs", 1), ("batch_size", 1), ("workers", 0), ("seed", 0)):
            check_integer(name, getattr(self, name), least)
        if self.patience is not None:
            check_integer("patience", self.patience, 1)
        check_rate("lr", self.lr)
        check_rate("weight_decay", self.weight_decay)
        if self.devices != "auto":
            if not (str(self.devices).isdecimal() and int(self.devices) > 0):
                raise ArgumentError(
                    f"devices must be 'auto' or an integer of at least 1, got {self.devices!r}"
                )
            object.__setattr__(self, "devices", int(self.devices))

    @property
    def lightning_precision(self) -> str:
        """`precision` in Lightning's words, ``"auto"`` resolved for this machine."""
        if self.precision == "auto":
            return (
                "bf16-mixed" if self.on_gpu and torch.cuda.is_bf16_supported(False) else "32-true"
            )
        return "32-true" if self.precision == "32" else str(self.precision)

    @property
    def on_gpu(self) -> bool:
        """Whether training runs on a CUDA GPU of this machine."""
        return self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()

    @property
    def fixed(self) -> dict[str, Any]:
        """What must stay the same when an interrupted run goes on."""
        names = ("optimizer", "lr", "weight_decay", "cosine", "batch_size", "seed")
        return {name: getattr(self, name) for name in names}


def optimizer_and_schedule(
    parameters: Iterable[Tensor] | list[dict[str, Any]], settings: Settings, steps: int
) -> dict[str, Any]:
    """What a Lightning module's `configure_optimizers` returns.

    Args:
        parameters: parameters, or groups of them as `fcvgg.parameter_groups` makes.
        settings: for the optimizer and its rates.
        steps: the number of steps in all epochs, for the cosine.
    """
    rates: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, momentum=_MOMENTUM, **rates)
        if settings.optimizer == "sgd"
        else torch.optim.AdamW(parameters, **rates)
    )
    if not settings.cosine:
        return {"optimizer": optimizer}

    def factor(step: int) -> float:
        return 0.5 * (1 + cos(pi * min(step / max(steps, 1), 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    # by step and not by epoch: Lightning saves a checkpoint before it moves a schedule of epochs
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """The weight of every class in the loss, float32 ``(K,)``, so that all weigh the same in sum.

    Args:
        counts: how many samples each class has. The mean weight of a sample is 1, and a class
            without samples has the weight 0.
    """
    known = np.array(counts, np.float64)
    inverse = np.divide(known.sum(), known, out=np.zeros_like(known), where=known > 0)
    return torch.tensor(inverse / np.count_nonzero(known), dtype=torch.float32)
