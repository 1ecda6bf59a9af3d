"""What watches a training run: whole checkpoints, its history, and losses that are not finite."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping
from math import inf, isfinite
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from fcvgg.errors import TrainingError
from fcvgg.support.atomic import written_whole
from fcvgg.training.checkpoints import BEST, HISTORY, LAST, RUN_KEY, state_and_run, write_checkpoint
from fcvgg.training.sampling import mixed_seed

_LOOKED_AT_EVERY = 16
"""Steps between two looks at a loss on a device, each of which waits for it."""


class WholeFiles(TorchCheckpointIO):
    """Checkpoints written under a temporary name, so that a failure keeps the one before."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))


class Determinism(Callback):
    """Seeds dropout and the like anew at every step, so that a resumed run draws the same."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(
            mixed_seed(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        )


class FiniteLoss(Callback):
    """Stops a run whose loss is not finite, before anything of it is saved."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._finite: torch.Tensor | None = None
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
        finite = torch.isfinite(loss.detach()).all()
        self._finite = finite if self._finite is None else self._finite & finite
        if loss.device.type == "cpu" or batch_idx % _LOOKED_AT_EVERY == 0:
            self._check(trainer, f"step {batch_idx + 1} of epoch {trainer.current_epoch + 1}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        self._check(trainer, f"epoch {epoch}")
        for name, value in trainer.callback_metrics.items():
            if "loss" in name and not isfinite(float(value)):
                self._stop(trainer, f"the validation of epoch {epoch}", float(value))

    def _check(self, trainer: pl.Trainer, where: str) -> None:
        if self._finite is not None and not bool(self._finite):
            self._stop(trainer, where, None)

    def _stop(self, trainer: pl.Trainer, where: str, value: float | None) -> None:
        rates = self._rates
        last = self.folder / LAST
        kept = (
            f"the last good checkpoint is kept, {last} (epoch {trainer.current_epoch})"
            if last.exists()
            else "no epoch was finished, so there is no checkpoint"
        )
        found = "not finite" if value is None else f"{value}"
        raise TrainingError(
            f"the loss is {found} at {where}, with the learning rate "
            f"{' to '.join(f'{r:.3g}' for r in (rates[:1] + rates[-1:] if rates[1:] else rates))}; "
            f"{kept}; choose a smaller lr"
        )


class History(Callback):
    """The logged values of every epoch, as plain numbers; a resumed run goes on with them.

    Args:
        folder: where ``history.csv`` is written after every epoch.
        lines: print a line for every epoch on stderr.
    """

    def __init__(self, folder: Path, lines: bool):
        self.folder = folder
        self.lines = lines
        self.epochs: list[dict[str, float]] = []
        self._began = time.monotonic()
        self._rate = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._began = time.monotonic()
        self._rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.epochs.append(
            {
                "epoch": trainer.current_epoch + 1,
                **dict(sorted(values.items())),
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
            written_whole(self.folder / HISTORY) as temporary,
            open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.epochs)

    def tell(self, epochs: int | None, unprinted: tuple[str, ...] = ()) -> None:
        """Print the last epoch's line, if lines are wanted, without names that begin so."""
        if self.lines:
            print(epoch_line(self.epochs[-1], epochs, unprinted), file=sys.stderr)


_COLUMNS = 79
_SHORT = {"accuracy": "acc", "pixel accuracy": "acc", "mean iou": "mIoU"}


def epoch_line(
    values: Mapping[str, float], epochs: int | None, unprinted: tuple[str, ...] = ()
) -> str:
    """An epoch's values as a line that no terminal breaks: beyond 79 columns, as several.

    Args:
        values: by name, as in the history: ``epoch``, ``train_loss``, ``valid_loss`` and so on.
        epochs: how many there are at most.
        unprinted: beginnings of names that are left to the history, as the learning rate is.
    """
    lines = [f"epoch {int(values['epoch'])}/{epochs}"]
    part = ""
    for name, value in values.items():
        if name in ("epoch", "seconds", "lr") or name.startswith(unprinted):
            continue
        before, _, what = name.partition("_")  # train_loss, valid_loss, valid_accuracy
        words = what.replace("_", " ")
        piece = f"{_SHORT.get(words, words)} {value:.3f}".lstrip()
        _append(lines, f" {piece}" if before == part else f"  {before} {piece}")
        part = before
    _append(lines, f"  {values['seconds']:.1f} s")
    return "\n".join(lines)


def _append(lines: list[str], piece: str) -> None:
    """Add a piece to the last line, or to a further one where it does not fit."""
    if len(lines[-1]) + len(piece) <= _COLUMNS:
        lines[-1] += piece
    else:
        lines.append(f"   {piece}")


class BestAndLast(Checkpoint):
    """``last.ckpt`` with all it takes to go on, and ``best.ckpt`` with the best weights.

    The best is written first: interrupted between the two, the run goes on from the epoch before
    and finds the same best again.

    Args:
        folder: where they go.
        monitor: the logged value that tells the best epoch.
        mode: ``"min"`` or ``"max"``.
        run: what run this is, kept in both.
        history: tells of an epoch once it is kept, so that no epoch told of is lost.
    """

    def __init__(
        self, folder: Path, monitor: str, mode: str, run: Mapping[str, Any], history: History
    ):
        self.folder = folder
        self.monitor = monitor
        self.mode = mode
        self.run = dict(run)
        self.history = history
        self.best_value = inf if mode == "min" else -inf
        self.best_epoch = 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics))
            raise TrainingError(f"the task logs no {self.monitor!r}; it logs {logged}")
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best_value if self.mode == "min" else value > self.best_value:
            self.best_value, self.best_epoch = value, trainer.current_epoch + 1
            if trainer.is_global_zero:
                write_checkpoint(state_and_run(pl_module, self.run), self.folder / BEST)
        trainer.save_checkpoint(self.folder / LAST)
        if trainer.is_global_zero:
            self.history.tell(trainer.max_epochs, pl_module.unprinted)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[RUN_KEY] = {**self.run, "stopped": trainer.should_stop}

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]
        self.best_epoch = state_dict["best_epoch"]


class Bar(Callback):
    """A bar on stderr over the steps of an epoch, where that is a terminal."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        if not console.is_terminal or not trainer.is_global_zero:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False
        )
        self._progress.start()
        self._task = self._progress.add_task("training")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._progress is not None:
            name = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            steps = int(trainer.num_training_batches)
            self._progress.reset(self._task, description=name, total=steps)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._progress is not None:
            self._progress.advance(self._task)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
