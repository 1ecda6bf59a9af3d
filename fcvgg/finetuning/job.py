"""A run of fine-tuning: its classifier, prepared and trained as the strategy asks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from fcvgg.conversion import convert
from fcvgg.errors import ArgumentError, ConversionError
from fcvgg.finetuning.classification import Classification
from fcvgg.finetuning.frozen_trunk import FrozenTrunk, find_trunk
from fcvgg.finetuning.images import ImageRows
from fcvgg.finetuning.outputs import InputOf, stored_outputs
from fcvgg.finetuning.pretrained import Pretrained
from fcvgg.finetuning.strategies import (
    Choice,
    Recipe,
    middle_pool,
    new_layer_rate,
    new_layers,
    prepare_model,
    rates,
    size_of,
)
from fcvgg.finetuning.svm import fit_svm
from fcvgg.geometry import Pair
from fcvgg.images.datasets import LabelledFiles, SplitFolders
from fcvgg.network import FullyConvolutional
from fcvgg.probability import UNKNOWN
from fcvgg.support.memory_text import parsed_memory
from fcvgg.training.checkpoints import LAST, RUN_KEY, describe_run, read_run, write_checkpoint
from fcvgg.training.loop import TrainingRun, fit, is_main_process
from fcvgg.training.normalization import check_batches
from fcvgg.training.settings import Settings, balanced_weights
from fcvgg.transfer.heads import loss_for
from fcvgg.transfer.image_features import digest_of
from fcvgg.transfer.naming import layer_names

_MEASURED = 32
"""Images whose features decide the learning rate of a new layer."""

_DIGITS = 12

_UNTRAINABLE = {
    "sigmoid": "in a sigmoid for each class",
    "independent_logits": "in a sigmoid for each class",
    "values": "in plain values",
    UNKNOWN: "past a softmax",
}
"""Endings of a model whose classes do not exclude each other, by activation."""


@dataclass(frozen=True)
class Job:
    """The inputs of a run.

    `measure_rate` lets the learning rate follow the features that the new layers get; `progress`
    shows bars and lines on stderr.
    """

    source: Pretrained
    recipe: Recipe
    choice: Choice
    settings: Settings
    measure_rate: bool
    found: SplitFolders
    folder: Path
    resume: bool
    progress: bool

    @property
    def strategy(self) -> str:
        """What is trained."""
        return self.choice.strategy

    @property
    def size(self) -> Pair:
        """``(h, w)`` of the network's input."""
        return size_of(self.recipe, self.source.native)

    @property
    def execution(self) -> dict[str, Any]:
        """How the classifier runs outside Lightning."""
        device = torch.device("cuda" if self.settings.on_gpu else "cpu")
        batch_size = self.settings.batch_size
        return {"batch_size": batch_size, "device": device, "progress": self.progress}

    @property
    def train(self) -> ImageRows:
        """The images to train on."""
        return self._images(self.found.train, bool(self.recipe.augment))

    @property
    def valid(self) -> ImageRows:
        """The images that are held out."""
        return self._images(self.found.valid)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What an interrupted run must have in common with the one that finishes it."""
        recipe, source = self.recipe, self.source
        return {
            "architecture": source.name,
            "strategy": self.strategy,
            "classes": self.found.classes,
            "input_size": self.size,
            "preprocessing": repr(source.preprocess),
            "freeze_upto": recipe.freeze_upto,
            "hidden": recipe.hidden,
            "resize": recipe.resize.replace("center", "centre"),  # as in earlier checkpoints
            "augment": bool(recipe.augment),
            "class_weights": recipe.class_weights,
            "training_images": len(self.found.train),
            "held_out_images": len(self.found.valid),
            "files": _digest_of_files(self.found),
            "pretrained_weights": digest_of(source.model)[:_DIGITS],
        }

    def convert(self, model: nn.Module, verify: bool) -> FullyConvolutional:
        """A classifier of the run, fully convolutional; images keep their size."""
        return convert(
            model,
            input_size=self.size,
            preprocess=replace(self.source.preprocess, resize=None),
            categories=self.found.classes,
            verify=verify,
        )

    def features(
        self, model: nn.Module, layer: nn.Module, images: Dataset[Any], what: str
    ) -> TensorDataset:
        """The inputs ``(N, D)`` of a fully connected layer for every image, with the labels."""
        return stored_outputs(InputOf(model, layer), images, what, **self.execution)

    def _images(self, files: LabelledFiles, augment: bool = False) -> ImageRows:
        return ImageRows(files, self.source.preprocess, self.size, self.recipe.resize, augment)


@dataclass(frozen=True)
class Trained:
    """The trained classifier of a run.

    Attributes:
        model: the classifier, in evaluation mode.
        settings: how it was trained.
        run: its epochs; None for ``"svm"``.
        frozen: what was done with the frozen layers, in one phrase; ``""`` where all are trained.
    """

    model: nn.Module
    settings: Settings
    run: TrainingRun | None
    frozen: str


def train(job: Job) -> Trained:
    """Train the classifier of a run."""
    if job.strategy == "svm":
        return Trained(_train_svm(job), job.settings, None, "")
    classes, seed = len(job.found.classes), job.settings.seed
    model = prepare_model(job.source, job.strategy, job.recipe, classes, seed)
    _check_scores(job.convert(model, verify=False))  # refused before any time is spent
    if job.strategy != "linear":
        channels = job.source.preprocess.channels
        check_batches(model, len(job.found.train), channels, job.size, job.settings)
    if job.measure_rate:
        job = replace(job, settings=replace(job.settings, lr=_measured_rate(model, job)))
    # the features of images that never vary are computed once, not in every epoch
    last_only = job.strategy == "linear" and not job.recipe.augment
    run, frozen = (_train_last if last_only else _train_all)(model, job)
    return Trained(model.eval(), job.settings, run, frozen)


def _check_scores(net: FullyConvolutional) -> None:
    """Refuse a head whose classes do not exclude each other."""
    found = _UNTRAINABLE.get(net.activation)
    if found is not None:
        raise ConversionError(
            f"the model ends {found}, so cross entropy does not train it; expected a head that "
            "ends in scores or a softmax"
        )


def _train_svm(job: Job) -> nn.Module:
    """Features and machine, computed again when resumed, but never over another run."""
    recipe = job.recipe
    if recipe.augment:
        raise ArgumentError(
            "augment must be False or None for the strategy svm, which computes features once, "
            "got True"
        )
    run = describe_run(job.identity, job.settings)
    read_run(job.folder, run, job.resume)
    model = fit_svm(
        job.source.model,
        job.train,
        recipe.freeze_upto or middle_pool(layer_names(job.source.model)),
        balanced=recipe.class_weights == "balanced",
        seed=job.settings.seed,
        **job.execution,
    )
    model.requires_grad_(False)
    model.get_submodule("classifier").requires_grad_(True)
    if is_main_process():
        write_checkpoint({"state_dict": model.state_dict(), RUN_KEY: run}, job.folder / LAST)
    return model


def _train_last(model: nn.Module, job: Job) -> tuple[TrainingRun, str]:
    """Train the last layer of a model in place, on features that are computed once."""
    last = _new_layers(model, job.recipe)[-1]
    train = job.features(model, last, job.train, "to train on")
    valid = job.features(model, last, job.valid, "held out")
    # the last layer gives logits, also where the model ends in a softmax
    run = _fit(last, nn.CrossEntropyLoss(), train, valid, job)
    return run, "the frozen layers were computed once for each image"


def _train_all(model: nn.Module, job: Job) -> tuple[TrainingRun, str]:
    """Train what is not frozen of a model in place."""
    loss = loss_for(model)
    groups = rates(model, job.strategy, job.settings.lr, job.recipe.hidden)
    trunk = find_trunk(model, job.size, job.source.preprocess.channels)
    if trunk is None:
        return _fit(model, loss, job.train, job.valid, job, groups), ""
    folder, said = _place_for_features(trunk, job)
    if said.startswith(_AGAIN):
        return _fit(model, loss, job.train, job.valid, job, groups), said
    train, valid = (
        trunk.features(images, what, folder, **job.execution)
        for images, what in ((job.train, "to train on"), (job.valid, "held out"))
    )
    with trunk.skipped() as run:
        return _fit(model, loss, train, valid, job, groups, run), said


_AGAIN = "the frozen layers were computed in every epoch"


def _place_for_features(trunk: FrozenTrunk, job: Job) -> tuple[Path | None, str]:
    """The folder for features that memory does not hold, and what is done with them, in words."""
    if job.recipe.augment:
        return None, f"{_AGAIN}, since the training images vary"
    size = trunk.bytes_per_image() * (len(job.found.train) + len(job.found.valid))
    amount = f"{size / 2**20:,.1f} MiB"
    limit = parsed_memory(job.recipe.cache) if job.recipe.cache not in (None, 0, "0") else 0
    if size <= limit:
        return None, f"the frozen layers were computed once for each image ({amount} in memory)"
    if limit and shutil.disk_usage(job.folder).free > 2 * size:
        return job.folder, f"the frozen layers were computed once for each image ({amount} on disk)"
    return None, f"{_AGAIN}, " + (f"since their features take {amount}" if limit else "as asked")


def _fit(
    model: nn.Module,
    loss: nn.Module,
    train: Any,
    valid: Any,
    job: Job,
    groups: list[dict[str, Any]] | None = None,
    run: Callable[[Tensor], Any] | None = None,
) -> TrainingRun:
    counts = [count for count, _ in job.found.counts.values()]
    module = Classification(
        model,
        loss,
        len(counts),
        weights=balanced_weights(counts) if job.recipe.class_weights == "balanced" else None,
        groups=groups,
        frozen=job.strategy == "linear",
        run=run,
    )
    return fit(
        module,
        train,
        valid,
        job.settings,
        job.folder,
        identity=job.identity,
        resume=job.resume,
        progress=job.progress,
    )


def _measured_rate(model: nn.Module, job: Job) -> float:
    """The learning rate that suits the features of some training images."""
    images = job._images(job.found.train)
    places = np.linspace(0, len(images) - 1, min(len(images), _MEASURED)).astype(int)
    first = _new_layers(model, job.recipe)[0]
    some = Subset(images, places.tolist())
    rows, _ = job.features(model, first, some, "to measure").tensors  # (N, D)
    return new_layer_rate(rows, job.settings.optimizer)


def _new_layers(model: nn.Module, recipe: Recipe) -> list[nn.Module]:
    names = layer_names(model)
    return [names.root.get_submodule(x.path) for x in new_layers(names, recipe.hidden)]


def _digest_of_files(found: SplitFolders) -> str:
    """A digest that differs for other images: of their names and sizes."""
    seen = [
        f"{path.parent.name}/{path.name} {path.stat().st_size}"
        for path in (*found.train.paths, *found.valid.paths)
    ]
    names = "\n".join(seen).encode("utf-8", "surrogateescape")  # not all names are UTF-8
    return sha256(names).hexdigest()[:_DIGITS]
