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

from fcvgg.errors import ArgumentError, MissingExtraError, TrainingError, check_choice, one_line
from fcvgg.support.locking import locked
from fcvgg.training.checkpoints import (
    BEST,
    LAST,
    RUN_KEY,
    check_fits,
    describe_run,
    read_checkpoint,
    read_run,
)
from fcvgg.training.sampling import EpochSampler, SeededItems
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

from fcvgg.training.callbacks import (
    AtomicCheckpointIO,
    Bar,
    BestAndLast,
    Determinism,
    FiniteLoss,
    History,
)

_LIGHTNING = ("pytorch_lightning", "lightning_fabric", "lightning", "torchmetrics")


@dataclass(frozen=True)
class TrainingRun:
    """The result of a training run.

    Attributes:
        folder: the run's folder: ``best.ckpt``, ``last.ckpt``, ``history.csv``.
        history: for every epoch the values that the module logged, and ``epoch`` (from 1), ``lr``
            and ``seconds``.
        best_epoch: the epoch of the best weights, from 1.
        best_value: the monitored value of that epoch.
        monitor: the name of the monitored value.
        stopped_early: whether it stopped because the value no longer improved.
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
    def still_improving(self) -> bool:
        """Whether the monitored value was still getting better when the epochs were over.

        Its best is then among the last tenth of the epochs, and a tenth better than halfway.
        """
        if self.stopped_early or self.best_epoch <= 0.9 * len(self.history):
            return False
        halfway = self.history[(len(self.history) - 1) // 2][self.monitor]
        return abs(halfway - self.best_value) > 0.1 * abs(halfway)

    @property
    def best_path(self) -> Path:
        """The checkpoint with the best weights, under ``"state_dict"``."""
        return self.folder / BEST

    @property
    def last_path(self) -> Path:
        """The checkpoint that a resumed run goes on from."""
        return self.folder / LAST


class TrainingModule(pl.LightningModule):  # type: ignore[misc]
    """A Lightning module whose optimiser follows the `Settings` that `fit` gives it.

    Subclasses write `training_step` and `validation_step`, and log what is monitored.
    """

    settings: Settings = Settings()

    unprinted: tuple[str, ...] = ()
    """Prefixes of logged names that ``history.csv`` has and the printed lines leave out."""

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups; by default one, of all trainable parameters."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        return optimizer_and_schedule(self.groups(), self.settings, steps)


def fit(
    module: TrainingModule,
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
    """Train a Lightning module, keep its best and last state, and leave it with the best weights.

    Interrupted and resumed, a run ends with the weights of one that was not (bit for bit on the
    CPU; on a GPU as far as its kernels are deterministic): sampling and augmentation depend on
    seed, epoch and index, dropout on seed, epoch and step, and a resumed run goes on after the last
    finished epoch. The global random state is restored.

    Args:
        module: a Lightning module that logs `monitor` in validation.
        train: a map-style dataset; its items may draw random numbers from torch.
        valid: a map-style dataset, read in order.
        settings: how to train.
        folder: where ``best.ckpt``, ``last.ckpt`` and ``history.csv`` go; made if absent.
        monitor: the logged value that decides the best epoch and early stopping.
        mode: ``"min"`` or ``"max"``: what is better.
        identity: what else must be the same to resume, such as architecture and classes; plain
            values.
        resume: go on from ``last.ckpt`` if the folder has one.
        collate: makes a batch of a list of items; torch's default if None.
        progress: show a bar, and print a line for every epoch, on stderr.

    Raises:
        TrainingError: if the loss is not finite, a checkpoint cannot be written, another run is
            using the folder, or it holds a run and `resume` is False.
        LoadError: if the folder's run is another one, or its checkpoint is broken.
        ArgumentError: if Lightning refuses the settings.
        KeyboardInterrupt: on Ctrl-C; the last finished epoch is kept.
    """
    check_choice("mode", mode, ("min", "max"))
    run = describe_run(identity or {}, settings)
    history = History(Path(folder), monitor, mode)
    with run_folder(folder) as folder:
        begun = read_run(folder, run, resume)
        if begun is not None:
            check_fits(begun, module, folder / LAST)
            # read here too: a run that is complete does not reach Lightning, which would restore it
            history.load_state_dict(begun["callbacks"][history.state_key])
        done = len(history.epochs)
        module.settings = settings
        if done < settings.epochs and not (begun and begun[RUN_KEY]["stopped"]):
            kept = BestAndLast(folder, run, history, lines=progress)
            callbacks = [Determinism(settings.seed), FiniteLoss(folder), history, kept]
            if settings.patience is not None:
                callbacks.append(
                    EarlyStopping(
                        monitor, patience=settings.patience, mode=mode, check_finite=False
                    )
                )
            if progress:
                callbacks.append(Bar())
            loaders = _Loaders(train, valid, settings, collate)
            _train(module, loaders, callbacks, folder / LAST if begun else None)
        module.load_state_dict(read_checkpoint(folder / BEST)["state_dict"])
    module.trainer = None
    module.eval()
    return TrainingRun(
        folder=folder,
        history=tuple(history.epochs),
        best_epoch=int(history.best["epoch"]),
        best_value=history.best[monitor],
        monitor=monitor,
        stopped_early=len(history.epochs) < settings.epochs,
        resumed_after=done,
    )


def _train(
    module: TrainingModule, loaders: _Loaders, callbacks: list[Any], checkpoint: Path | None
) -> None:
    """Run Lightning, from a checkpoint on if there is one, and leave the process as it was."""
    resumed: dict[str, Any] = {}
    if checkpoint is not None:
        resumed = {"ckpt_path": str(checkpoint), "weights_only": True}
    module.train()  # Lightning takes the modes that it finds
    with _quiet(), _own_random_state(), _python_interrupts():
        _trainer(module.settings, callbacks).fit(module, datamodule=loaders, **resumed)


class _Loaders(pl.LightningDataModule):  # type: ignore[misc]
    """The data loaders, created for every epoch with the order of that epoch."""

    def __init__(self, train: Any, valid: Any, settings: Settings, collate: Any):
        super().__init__()
        self.train = train
        self.valid = valid
        self.settings = settings
        self.options: dict[str, Any] = {
            "batch_size": settings.batch_size,
            "num_workers": settings.workers,
            "collate_fn": collate,
        }

    def train_dataloader(self) -> DataLoader[Any]:
        settings = self.settings
        assert self.trainer is not None
        # a last batch of one image is dropped: batch norm cannot train on it
        share = -(-len(self.train) // self.trainer.world_size)
        alone = share > settings.batch_size and share % settings.batch_size == 1
        return DataLoader(
            SeededItems(self.train, settings.seed),
            sampler=EpochSampler(self.train, settings.seed, self.trainer.current_epoch),
            drop_last=alone and settings.batch_size > 1,
            **self.options,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.valid, **self.options)


def _trainer(settings: Settings, callbacks: list[Any]) -> pl.Trainer:
    try:
        return pl.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            precision=settings.lightning_precision,  # type: ignore[arg-type]
            max_epochs=settings.epochs,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=False,
            benchmark=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            reload_dataloaders_every_n_epochs=1,  # each epoch has an order of its own
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"cannot train with accelerator={settings.accelerator!r}, "
            f"devices={settings.devices!r}, precision={settings.precision!r}: {one_line(error)}"
        ) from error


def is_main_process() -> bool:
    """Whether this is the process that writes, of several that train together."""
    return not getattr(rank_zero_only, "rank", 0)


@contextlib.contextmanager
def run_folder(folder: str | Path) -> Iterator[Path]:
    """The folder of a run, made if it is absent and locked against other runs.

    Raises:
        TrainingError: if it cannot be made, or another run is using it.
    """
    folder = Path(folder)
    if not is_main_process():  # the main process holds it for all
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"cannot make the folder {folder} for the run: {error.strerror or error}"
        ) from error
    with locked(folder, TrainingError):
        yield folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's tips and warnings; the levels of its loggers are restored."""
    loggers = [
        logging.getLogger(name)
        for name in list(logging.root.manager.loggerDict)
        if name.partition(".")[0] in _LIGHTNING
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for module in _LIGHTNING:
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
def _python_interrupts() -> Iterator[None]:
    """Ctrl-C raises `KeyboardInterrupt`; Lightning would exit the process and ignore the next."""
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
