"""`finetune`: from a folder of images to a trained, converted and verified network."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fcvgg.errors import ArgumentError
from fcvgg.finetuning.pretrained import load_pretrained
from fcvgg.finetuning.result import MODEL, FineTuned
from fcvgg.finetuning.strategies import (
    EPOCHS,
    LEAST_STEPS,
    SCRATCH_RATES,
    Recipe,
    choose_strategy,
    size_of,
    with_augment,
)
from fcvgg.images.datasets import split_folders
from fcvgg.images.preprocessing import PreprocessLike
from fcvgg.images.reading import check_usable
from fcvgg.loading import DEFAULT_WEIGHTS
from fcvgg.training.settings import Settings
from fcvgg.transfer.naming import traced_at

if TYPE_CHECKING:
    from fcvgg.finetuning.job import Job, Trained

_DEFAULTS: dict[str, Any] = {"optimizer": "adamw", "patience": 10}
"""Where fine-tuning differs from `Settings`: AdamW adapts to the scale of features."""


def finetune(
    data: str | Path,
    model: nn.Module | str | Path = "vgg16",
    folder: str | Path = "finetuned",
    *,
    weights: str | Path | None = DEFAULT_WEIGHTS,
    preprocess: PreprocessLike | None = None,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> FineTuned:
    """Train a classifier for the classes of a folder; convert, verify, save and evaluate it.

    The strategies are the cases that the literature on transfer learning distinguishes
    (https://cs231n.github.io/transfer-learning, https://arxiv.org/abs/1411.1792).

    Args:
        data: a folder with one folder of images per class, or with parts that hold such folders,
            such as ``train`` and ``valid``; a part ``test`` is not used. See
            `fcvgg.images.datasets`. Files that cannot be read as images are left out and listed.
        model: a classifier or converted network, or a name, file or bundle as for `fcvgg.load`.
            Features alone, such as a file saved without the classifier, get a new head. It is not
            changed.
        folder: the run's folder: ``model`` (the bundle), ``report``, ``best.ckpt``, ``last.ckpt``
            and ``history.csv``; for ``"svm"`` without ``best.ckpt`` and ``history.csv``.
        weights: as for `fcvgg.load`.
        preprocess: how images become input, or a function that gives it for a number of channels;
            the source's own when None.
        resume: finish an interrupted run of the same arguments; it ends with the same weights, bit
            for bit on a CPU.
        progress: show bars, and print a line for every epoch, on stderr.
        options: fields of `fcvgg.Recipe` (`strategy`, `size`, `hidden`, `augment`, ...) and of
            `fcvgg.training.Settings` (`epochs`, `lr`, `batch_size`, `seed`, ...). `lr` by default
            is 1e-3 for new layers or, where their features are small or the optimiser is SGD,
            follows the features' size; `optimizer` is ``"adamw"``, `patience` 10,
            `epochs` 30 (100 for ``"linear"``), or what comes to 300 steps.

    Raises:
        DatasetError: if the folder holds no such images.
        ArgumentError: if an option is unknown or out of range, or the batches are too small for the
            model's batch normalisation.
        LoadError: if the source cannot be loaded, or the folder's run is another one.
        ConversionError: if the model's head cannot be replaced, or the result not be converted.
        TrainingError: if training must stop, such as by a loss that is not finite.
        MissingExtraError: if the extra ``train`` is not installed.
    """
    # these need Lightning
    from fcvgg.finetuning.job import Job, train
    from fcvgg.finetuning.report import write_report
    from fcvgg.training.checkpoints import LAST, check_new
    from fcvgg.training.loop import is_main_process, run_folder

    began = time.monotonic()
    recipe, given = _options(options)
    check_new(Path(folder), (LAST, MODEL), resume)
    found = split_folders(data, recipe.valid_fraction, given.get("seed", 0))
    if recipe.strategy == "scratch" and weights == DEFAULT_WEIGHTS:
        weights = None
    source = load_pretrained(model, weights, preprocess, recipe.size)
    for path in (*found.train.paths, *found.valid.paths):
        check_usable(path, source.preprocess)
    if source.headless and recipe.hidden is None:
        recipe = replace(recipe, hidden=())  # all fully connected layers are new
    with traced_at(size_of(recipe, source.native)), run_folder(folder) as place:
        choice = choose_strategy(recipe, source, found.train)
        recipe = with_augment(recipe, choice.strategy, source)
        settings = _settings(given, choice.strategy, len(found.train))
        measure_rate = "lr" not in given and choice.strategy != "scratch"
        job = Job(source, recipe, choice, settings, measure_rate, found, place, resume, progress)
        result = _evaluate(job, train(job), began)
        if is_main_process():
            result.net.save(result.model_path)
            write_report(result)
    return result


def _evaluate(job: Job, trained: Trained, began: float) -> FineTuned:
    """Convert and verify a trained classifier, and try it on the held-out images."""
    from fcvgg.finetuning.outputs import probabilities_of

    model = trained.model
    net = job.convert(model, verify=True)
    probabilities = probabilities_of(model, job.valid, net.activation, **job.execution)
    return FineTuned(
        net=net,
        model=model,
        folder=job.folder,
        source=job.source.name,
        choice=job.choice,
        recipe=job.recipe,
        settings=trained.settings,
        classes=job.found.classes,
        counts=job.found.counts,
        skipped=job.found.skipped,
        origin=job.found.origin,
        size=job.size,
        training=trained.run,
        frozen=trained.frozen,
        valid=job.found.valid,
        probabilities=probabilities.numpy(),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=time.monotonic() - began,
    )


def _options(options: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and the settings that are given."""
    names = {kind: [f.name for f in fields(kind)] for kind in (Recipe, Settings)}
    known = [*names[Recipe], *names[Settings]]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ArgumentError(f"options must be some of {', '.join(known)}, got {', '.join(unknown)}")
    recipe, given = ({k: v for k, v in options.items() if k in own} for own in names.values())
    Settings(**given)  # refused before anything is read
    return Recipe(**recipe), given


def _settings(given: dict[str, Any], strategy: str, images: int) -> Settings:
    """Those that are given, and defaults by strategy and number of training images."""
    defaults = dict(_DEFAULTS)
    steps = -(-images // given.get("batch_size", Settings.batch_size))
    defaults["epochs"] = max(EPOCHS.get(strategy, Settings.epochs), -(-LEAST_STEPS // steps))
    if strategy == "scratch":
        defaults["lr"] = SCRATCH_RATES[given.get("optimizer", defaults["optimizer"])]
    return Settings(**{**defaults, **given})
