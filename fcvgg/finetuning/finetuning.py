"""`finetune`: from a folder of images to a trained, converted and verified network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from fcvgg.errors import ArgumentError
from fcvgg.finetuning.pretrained import pretrained
from fcvgg.finetuning.result import MODEL, FineTuned
from fcvgg.finetuning.strategies import EPOCHS, SCRATCH_RATES, Recipe, chosen
from fcvgg.images.datasets import split_folders
from fcvgg.images.preprocessing import Preprocess
from fcvgg.images.reading import check_usable
from fcvgg.loading import DEFAULT_WEIGHTS
from fcvgg.training.settings import Settings

_DEFAULTS: dict[str, Any] = {"optimizer": "adamw", "patience": 10}
"""Where fine-tuning differs from `Settings`: AdamW does not mind how large features are."""


def finetune(
    data: str | Path,
    model: nn.Module | str | Path = "vgg16",
    folder: str | Path = "finetuned",
    *,
    weights: str | Path | None = DEFAULT_WEIGHTS,
    preprocess: Preprocess | str | Callable[..., Preprocess | None] | None = None,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> FineTuned:
    """Train a classifier for the classes of a folder, and convert, verify, save and judge it.

    The strategies are the cases that the literature on transfer tells apart
    (https://cs231n.github.io/transfer-learning, https://arxiv.org/abs/1411.1792).

    Args:
        data: a folder with one folder of images per class; or with parts that hold such folders,
            such as ``train`` and ``valid``, a ``test`` among them being left alone; see
            `fcvgg.images.datasets`. Files that are no images or cannot be read are left out and
            listed.
        model: a classifier, or a name or file as for `fcvgg.load`. It is not changed.
        folder: the run: ``model`` (the bundle), ``report``, ``best.ckpt``, ``last.ckpt`` and
            ``history.csv``; for ``"svm"`` without the best and the history.
        weights: as for `fcvgg.load`.
        preprocess: how images become input, or what tells it for a number of channels; the source's
            own when None.
        resume: finish an interrupted run of the same arguments; it ends with the same weights, bit
            for bit on a CPU.
        progress: show bars, and print a line for every epoch, on stderr.
        options: fields of `fcvgg.Recipe` (`strategy`, `size`, `hidden`, `augment`, ...: what is
            done) and of `fcvgg.training.Settings` (`epochs`, `lr`, `batch_size`, `seed`, ...: how
            it is trained). `lr` by default follows the size of the features that the new layers
            get; `optimizer` is ``"adamw"``, `patience` 10, `epochs` 30 (100 for ``"linear"``).

    Raises:
        DatasetError: if the folder holds no such images.
        ArgumentError: if an option is unknown or out of range, or the batches are too small for the
            model's batch normalisation.
        LoadError: if the source cannot be had, or the run to resume is another's.
        ConversionError: if the model's head cannot be replaced, or the result not be converted.
        TrainingError: if training must stop, such as by a loss that is not finite.
        MissingExtraError: if the extra ``train`` is not installed.
    """
    # these need Lightning
    from fcvgg.finetuning.fitting import Job, trained
    from fcvgg.finetuning.report import write_report
    from fcvgg.finetuning.tasks import probabilities_of
    from fcvgg.training.checkpoints import LAST, check_new, made_folder
    from fcvgg.training.loop import is_main_process

    began = time.monotonic()
    recipe, given = _options(options)
    check_new(Path(folder), (LAST, MODEL), resume)
    found = split_folders(data, recipe.valid_fraction, given.get("seed", 0))
    if recipe.strategy == "scratch" and weights == DEFAULT_WEIGHTS:
        weights = None
    source = pretrained(model, weights, preprocess, recipe.size)
    for path in (*found.train.paths, *found.valid.paths):
        check_usable(path, source.preprocess)
    choice = chosen(recipe, source.model, found.train, source.preprocess, source.native)
    job = Job(
        source,
        recipe,
        choice,
        _settings(given, choice.strategy),
        "lr" not in given and choice.strategy != "scratch",
        found,
        made_folder(Path(folder)),
        resume,
        progress,
    )
    classifier, settings, run = trained(job)
    net = job.converted(classifier, verify=True)
    probabilities = probabilities_of(
        classifier,
        job.valid,
        net.activation,
        batch_size=settings.batch_size,
        device=job.device,
        progress=progress,
    )
    result = FineTuned(
        net=net,
        model=classifier,
        folder=job.folder,
        source=source.name,
        choice=choice,
        recipe=recipe,
        settings=settings,
        classes=found.classes,
        counts=found.counts,
        skipped=found.skipped,
        origin=found.origin,
        size=job.size,
        training=run,
        valid=found.valid,
        probabilities=probabilities.numpy(),
        trained=sum(p.numel() for p in classifier.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in classifier.parameters()),
        seconds=time.monotonic() - began,
    )
    if is_main_process():
        net.save(result.model_path)
        write_report(result)
    return result


def _options(options: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """What is done, and what is said of how."""
    recipe_names = [f.name for f in fields(Recipe)]
    settings_names = [f.name for f in fields(Settings)]
    unknown = [name for name in options if name not in (*recipe_names, *settings_names)]
    if unknown:
        raise ArgumentError(
            f"finetune has no option {', '.join(unknown)}; expected some of "
            f"{', '.join((*recipe_names, *settings_names))}"
        )
    recipe = Recipe(**{k: v for k, v in options.items() if k in recipe_names})
    given = {k: v for k, v in options.items() if k in settings_names}
    Settings(**given)  # out of range? Say so before anything is read.
    return recipe, given


def _settings(given: dict[str, Any], strategy: str) -> Settings:
    """Those that are given, and defaults by strategy."""
    defaults = dict(_DEFAULTS)
    if strategy in EPOCHS:
        defaults["epochs"] = EPOCHS[strategy]
    if strategy == "scratch":
        defaults["lr"] = SCRATCH_RATES[given.get("optimizer", _DEFAULTS["optimizer"])]
    return Settings(**{**defaults, **given})
