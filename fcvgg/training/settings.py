"""How a network is trained: what does not depend on the task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Any

import torch
from torch import Tensor

from fcvgg.errors import ArgumentError

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("auto", "32", "bf16-mixed", "16-mixed")

_MOMENTUM = 0.9


@dataclass(frozen=True)
class Settings:
    """How a network is trained.

    Args:
        epochs: at most so many times through the training images.
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adamw"``.
        lr: the learning rate, where a parameter group has none of its own.
        weight_decay: as for torch's optimisers.
        cosine: let every learning rate fall to 0 along half a cosine, step by step.
        patience: stop after so many epochs without a better monitored value; None never stops.
        batch_size: images per step, on every device.
        workers: processes that read images; 0 reads in this one. It does not change the result.
        seed: of batch order, augmentation and dropout.
        precision: ``"32"``, ``"bf16-mixed"`` or ``"16-mixed"``; ``"auto"`` is bf16-mixed
            on a GPU that has it, else 32.
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"`` and others of Lightning.
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
        _check_one_of("optimizer", self.optimizer, OPTIMIZERS)
        _check_one_of("precision", self.precision, PRECISIONS)
        for name, least in (("epochs", 1), ("batch_size", 1), ("workers", 0), ("seed", 0)):
            _check_integer(name, getattr(self, name), least)
        if self.patience is not None:
            _check_integer("patience", self.patience, 1)
        for name in ("lr", "weight_decay"):
            _check_rate(name, getattr(self, name))
        devices = self.devices
        if not (devices == "auto" or (str(devices).isdecimal() and int(devices) > 0)):
            raise ArgumentError(f"devices={devices!r} is none; expected 'auto' or an integer >= 1")

    @property
    def lightning_precision(self) -> str:
        """`precision` in Lightning's words, ``"auto"`` resolved for this machine."""
        if self.precision == "auto":
            gpu = self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
            return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported(False) else "32-true"
        return "32-true" if self.precision == "32" else str(self.precision)

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
        settings: for the optimiser and its rates.
        steps: how many there will be in all epochs, for the cosine.
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


def _check_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(f"{name}={value!r} is unknown; expected one of {', '.join(known)}")


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name}={value!r} is out of range; expected an integer >= {least}")


def _check_rate(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not isfinite(value) or value < 0:
        raise ArgumentError(f"{name}={value!r} is out of range; expected a number >= 0")
