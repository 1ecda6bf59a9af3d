"""`fit`: the one path through PyTorch Lightning (extra ``train``)."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from fcvgg.errors import (
    ArgumentError,
    LoadError,
    MissingExtraError,
    one_line,
)
from fcvgg.training.checkpoints import (
    BEST,
    LAST,
    RUN_KEY,
    begun_run,
    check_fits,
    made_folder,
    read_checkpoint,
    run_of,
)
from fcvgg.training.sampling import EpochOrder, SeededItems
from fcvgg.training.settings import Settings, optimizer_and_schedule

try:
    import pytorch_lightning as pl
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from lightning_utilities.core.rank_zero import rank_zero_only
    from pytorch_lightning.callbacks import EarlyStopping
except ImportError as _error:
    raise MissingExtraError(
        f"training needs PyTorch Lightning, which cannot be imported ({_error}); install it with: "
        "pip install 'fcvgg[train]'"
    ) from _error

from fcvgg.training.callbacks import Bar, BestAndLast, Determinism, FiniteLoss, History, WholeFiles

_CHATTY = ("pytorch_lightning", "lightning_fabric", "lightning", "lightning.pytorch")


@dataclass(frozen=True)
class TrainingRun:
    """What a training run leaves.

    Attributes:
        folder: where its files lie: ``best.ckpt``, ``last.ckpt``, ``history.csv``.
        history: for every epoch the values that the task logged, and ``epoch`` (from 1), ``lr``
            and ``seconds``.
        best_epoch: the epoch of the best weights, from 1.
        best_value: the monitored value there.
        monitor: its name.
        stopped_early: whether it ended for want of a better value.
        resumed_after: how many epochs had been done before this call.
    """

    folder: Path
    history: tuple[dict[str, float], ...]
    best_epoch: int
    best_value: float
    monitor: str
    stopped_early: bool = False
    resumed_after: int = 0

    @property
    def best_path(self) -> Path:
        """The checkpoint with the best weights, under ``"state_dict"``."""
        return self.folder / BEST

    @property
    def last_path(self) -> Path:
        """The checkpoint that a resumed run goes on from."""
        return self.folder / LAST


class Task(pl.LightningModule):  # type: ignore[misc]
    """A Lightning module whose optimiser follows the `Settings` that `fit` gives it.

    Subclasses write `training_step` and `validation_step`, and log what is monitored.
    """

    settings: Settings = Settings()

    unprinted: tuple[str, ...] = ()
    """Beginnings of logged names that ``history.csv`` has and the printed lines leave out."""

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups; by default one, of all that trains."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        return optimizer_and_schedule(self.groups(), self.settings, steps)


def fit(
    task: Task,
    train: Any,
    valid: Any,
    settings: Settings,
    folder: str | Path,
    *,
    monitor: str = "valid_loss",
    mode: str = "min",
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    collate: Callable[[list[Any]], Any] | None = None,
    progress: bool = False,
) -> TrainingRun:
    """Train a task, keeping its best and its last state, and leave it with its best weights.

    Interrupted and resumed, a run ends with the weights of one that was not (bit for bit on the
    CPU; on a GPU as far as its kernels are deterministic): batch order and augmentation depend on
    seed, epoch and index, dropout on seed, epoch and step, and a resumed run goes on after the last
    epoch that was finished. The global random state is left as it was.

    Args:
        task: a Lightning module that logs `monitor` in validation.
        train: a map-style dataset; its items may draw random numbers from torch.
        valid: a map-style dataset, read in order.
        settings: how to train.
        folder: where ``best.ckpt``, ``last.ckpt`` and ``history.csv`` go; made if absent.
        monitor: the logged value by which the best epoch is chosen, and early stopping decides.
        mode: ``"min"`` or ``"max"``: what is better.
        identity: what else must be the same to resume, such as architecture and classes; plain
            values.
        resume: go on from ``last.ckpt`` if the folder has one.
        collate: makes a batch of a list of items; torch's default if None.
        progress: show a bar, and print a line for every epoch, on stderr.

    Raises:
        TrainingError: if the loss is not finite, a checkpoint cannot be written, or the folder
            holds a run and `resume` is False.
        LoadError: if the run to resume is another's, or its checkpoint is broken.
        ArgumentError: if Lightning refuses the settings.
        KeyboardInterrupt: on Ctrl-C; the last finished epoch is kept.
    """
    if mode not in ("min", "max"):
        raise ArgumentError(f"mode={mode!r} is unknown; expected 'min' or 'max'")
    folder = made_folder(Path(folder))
    run = run_of(identity or {}, settings)
    begun = begun_run(folder, run, resume)
    if begun is not None:
        if "callbacks" not in begun:
            raise LoadError(f"{folder / LAST} is of no run that can go on; choose another folder")
        check_fits(begun, task, folder / LAST)
    task.settings = settings
    task.train()  # Lightning takes the modes that it finds
    history = History(folder, progress)
    kept = BestAndLast(folder, monitor, mode, run, history)
    done = 0
    if begun is not None:
        done = int(begun["epoch"]) + 1
        history.load_state_dict(begun["callbacks"][history.state_key])
        kept.load_state_dict(begun["callbacks"][kept.state_key])
    stopped = begun is not None and bool(begun[RUN_KEY]["stopped"]) and done < settings.epochs
    if not stopped and done < settings.epochs:
        callbacks = [Determinism(settings.seed), FiniteLoss(folder), history, kept]
        if settings.patience is not None:
            callbacks.append(
                EarlyStopping(monitor, 0.0, settings.patience, False, mode, True, False)
            )
        if progress:
            callbacks.append(Bar())
        loaders = _Loaders(train, valid, settings, collate)
        with _quiet(), _own_random_state(), _whole_interrupts():
            trainer = _trainer(settings, folder, callbacks)
            trainer.fit(
                task,
                datamodule=loaders,
                ckpt_path=str(folder / LAST) if begun is not None else None,
                weights_only=True if begun is not None else None,
            )
            stopped = bool(trainer.should_stop) and len(history.epochs) < settings.epochs
    task.load_state_dict(read_checkpoint(folder / BEST)["state_dict"])
    task.trainer = None
    task.eval()
    return TrainingRun(
        folder,
        tuple(history.epochs),
        kept.best_epoch,
        kept.best_value,
        monitor,
        stopped,
        done,
    )


class _Loaders(pl.LightningDataModule):  # type: ignore[misc]
    """The loaders, made anew for every epoch."""

    def __init__(self, train: Any, valid: Any, settings: Settings, collate: Any):
        super().__init__()
        self.train = train
        self.valid = valid
        self.collate = collate
        self.settings = settings

    def train_dataloader(self) -> DataLoader[Any]:
        settings = self.settings
        assert self.trainer is not None
        # a last batch of one image is left out: batch norm cannot train on it
        share = -(-len(self.train) // self.trainer.world_size)
        alone = share > settings.batch_size and share % settings.batch_size == 1
        return DataLoader(
            SeededItems(self.train, settings.seed),
            sampler=EpochOrder(self.train, settings.seed, self.trainer.current_epoch),
            drop_last=alone and settings.batch_size > 1,
            **self._shared,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.valid, **self._shared)

    @property
    def _shared(self) -> dict[str, Any]:
        return {
            "batch_size": self.settings.batch_size,
            "num_workers": self.settings.workers,
            "collate_fn": self.collate,
        }


def _trainer(settings: Settings, folder: Path, callbacks: list[Any]) -> pl.Trainer:
    try:
        return pl.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices if settings.devices == "auto" else int(settings.devices),
            precision=settings.lightning_precision,  # type: ignore[arg-type]
            max_epochs=settings.epochs,
            callbacks=callbacks,
            plugins=[WholeFiles()],
            default_root_dir=folder,
            logger=False,
            benchmark=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            reload_dataloaders_every_n_epochs=1,  # so that each has its epoch's order
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"cannot train with accelerator={settings.accelerator!r}, "
            f"devices={settings.devices!r}, precision={settings.precision!r}: {one_line(error)}"
        ) from error


def is_main_process() -> bool:
    """Whether this is the process that writes, of several that train together."""
    return int(getattr(rank_zero_only, "rank", None) or 0) == 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's tips and warnings, and with matching levels afterwards."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    loggers += [
        logging.getLogger(name)
        for name in list(logging.root.manager.loggerDict)
        if name.startswith(tuple(f"{n}." for n in _CHATTY))
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for module in ("pytorch_lightning", "lightning_fabric", "torchmetrics"):
                warnings.filterwarnings("ignore", module=rf"{module}\b")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with (
        torch.random.fork_rng(devices=list(devices)),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        yield


@contextlib.contextmanager
def _whole_interrupts() -> Iterator[None]:
    """Ctrl-C as Python has it: Lightning exits the process and ignores further ones."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
