"""Callbacks of a training run, where Lightning's own do not do the job."""

from __future__ import annotations

import csv
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from fcvgg.errors import TrainingError
from fcvgg.support.atomic import atomic_file
from fcvgg.support.progress import progress_bar
from fcvgg.training.checkpoints import BEST, HISTORY, LAST, RUN_KEY, write_checkpoint
from fcvgg.training.sampling import mixed_seed

_LOSS_READ_EVERY = 16
"""Steps between two reads of a loss on a GPU, each of which waits for the device."""

_COLUMNS = 79
_SHORT = {"accuracy": "acc", "pixel accuracy": "acc", "mean iou": "mIoU"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Atomic writes of checkpoints, so that a failure keeps the one before."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))


class Determinism(Callback):
    """Seeds dropout and the like at every step, so that a resumed run draws the same numbers."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(
            mixed_seed(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        )


class FiniteLoss(Callback):
    """Stops a run whose loss is not finite, before anything of it is saved.

    Lightning's ``EarlyStopping(check_finite=True)`` looks once an epoch and ends without an error.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._finite = torch.tensor(True)
        self._rates: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        # before the step, at whose end the schedule moves on
        self._rates = sorted({group["lr"] for group in trainer.optimizers[0].param_groups})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if loss is None:
            return
        self._finite = self._finite.to(loss.device) & torch.isfinite(loss.detach()).all()
        if loss.device.type == "cpu" or batch_idx % _LOSS_READ_EVERY == 0:
            self._check(trainer, f"step {batch_idx + 1} of epoch {trainer.current_epoch + 1}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        self._check(trainer, f"epoch {epoch}")
        for name, value in trainer.callback_metrics.items():
            if "loss" in name and not isfinite(value):
                self._stop(trainer, f"{float(value)} at the validation of epoch {epoch}")

    def _check(self, trainer: pl.Trainer, where: str) -> None:
        if not self._finite:
            self._stop(trainer, f"not finite at {where}")

    def _stop(self, trainer: pl.Trainer, found: str) -> None:
        last = self.folder / LAST
        kept = (
            f"the last good checkpoint is kept, {last} (epoch {trainer.current_epoch})"
            if last.exists()
            else "no epoch was finished, so there is no checkpoint"
        )
        rates = " to ".join(
            f"{rate:.3g}" for rate in dict.fromkeys((self._rates[0], self._rates[-1]))
        )
        raise TrainingError(
            f"the loss is {found}, with the learning rate {rates}; {kept}; choose a smaller lr"
        )


class History(Callback):
    """The logged values of every epoch, as plain numbers, in ``history.csv``.

    Lightning's `CSVLogger` begins an empty file when a run is resumed, and writes the values of
    training and validation in rows of their own.

    Args:
        folder: where ``history.csv`` is written after every epoch.
        monitor: the logged value that decides which epoch is the best.
        mode: ``"min"`` or ``"max"``: what is better.
    """

    def __init__(self, folder: Path, monitor: str, mode: str):
        self.folder = folder
        self.monitor = monitor
        self.mode = mode
        self.epochs: list[dict[str, float]] = []
        self._began = time.monotonic()
        self._rate = 0.0

    @property
    def best(self) -> dict[str, float]:
        """The first of the epochs with the best monitored value."""
        choose = min if self.mode == "min" else max
        return choose(self.epochs, key=lambda epoch: epoch[self.monitor])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._began = time.monotonic()
        self._rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        logged = dict(sorted(trainer.callback_metrics.items()))
        if self.monitor not in logged:
            raise TrainingError(
                f"monitor must be a value that the module logs, got {self.monitor!r}; "
                f"it logs {', '.join(logged)}"
            )
        self.epochs.append(
            {
                "epoch": trainer.current_epoch + 1,
                **{name: float(value) for name, value in logged.items()},
                "lr": self._rate,
                "seconds": time.monotonic() - self._began,
            }
        )
        if trainer.is_global_zero:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])

    def _write(self) -> None:
        names = list(dict.fromkeys(name for epoch in self.epochs for name in epoch))
        with (
            atomic_file(self.folder / HISTORY) as temporary,
            open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.epochs)


def epoch_line(
    values: Mapping[str, float], epochs: int | None, unprinted: tuple[str, ...] = ()
) -> str:
    """An epoch's values as one line, broken between values where it exceeds 79 columns.

    Args:
        values: by name, as in the history: ``epoch``, ``train_loss``, ``valid_loss`` and so on.
        epochs: the largest number of epochs.
        unprinted: prefixes of names that only the history has.
    """
    pieces = [f"epoch {int(values['epoch'])}/{epochs}"]
    last_part = ""
    for name, value in values.items():
        if name in ("epoch", "seconds", "lr") or name.startswith(unprinted):
            continue
        part, _, what = name.partition("_")  # train_loss, valid_loss, valid_accuracy
        words = what.replace("_", " ")
        piece = f"{_SHORT.get(words, words)} {value:.3f}".lstrip()
        pieces.append(piece if part == last_part else f" {part} {piece}")
        last_part = part
    pieces.append(f" {values['seconds']:.1f} s")
    held = " ".join(piece.replace(" ", "\xa0") for piece in pieces)  # a name and its value
    wrapped = textwrap.fill(
        held,
        _COLUMNS,
        subsequent_indent=" " * 2,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapped.replace("\xa0", " ")


class BestAndLast(ModelCheckpoint):
    """``last.ckpt`` after every epoch by Lightning, and ``best.ckpt`` with the best weights.

    The best epoch comes from the history: Lightning forgets its best value where the run's folder
    has moved. The best is written first: interrupted between the two, the run goes on from the
    epoch before and finds the same best again.

    Args:
        folder: where they go.
        run: what run this is, kept in ``last.ckpt``.
        history: gives the best epoch.
        lines: print a line on stderr for every epoch once it is kept.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], history: History, lines: bool):
        super().__init__(
            folder, Path(LAST).stem, enable_version_counter=False, save_on_train_epoch_end=True
        )
        self.folder = folder
        self.run = run
        self.history = history
        self.lines = lines

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        improved = self.history.best["epoch"] == trainer.current_epoch + 1
        # the main process decides, since saving waits for all and their values may differ
        if trainer.strategy.broadcast(improved):
            trainer.save_checkpoint(self.folder / BEST, weights_only=True)
        super().on_train_epoch_end(trainer, pl_module)
        if self.lines and trainer.is_global_zero:
            line = epoch_line(self.history.epochs[-1], trainer.max_epochs, pl_module.unprinted)
            print(line, file=sys.stderr)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[RUN_KEY] = {**self.run, "stopped": trainer.should_stop}

    def state_dict(self) -> dict[str, Any]:
        return {}  # Lightning's holds paths, which would be wrong where the folder has moved


class Bar(Callback):
    """The package's own bar on stderr over the steps of an epoch.

    Lightning's `TQDMProgressBar` writes on stdout, and its `RichProgressBar` changes Rich's global
    console.
    """

    def __init__(self) -> None:
        self._shown = ExitStack()
        self._advance: Callable[[float], None]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        name = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        bar = progress_bar(name, int(trainer.num_training_batches), trainer.is_global_zero)
        self._advance = self._shown.enter_context(bar)

    def on_train_batch_end(self, *args: Any) -> None:
        self._advance(1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._shown.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._shown.close()
