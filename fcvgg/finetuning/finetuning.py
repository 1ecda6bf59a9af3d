"""`finetune`: from a folder of images to a trained, converted and verified network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fcvgg.conversion import convert, unwrapped
from fcvgg.datasets import Unreadable
from fcvgg.errors import ArgumentError, InputSizeError, PreprocessError
from fcvgg.finetuning.images import (
    ImageRows,
    LabelledFiles,
    SplitFolders,
    balanced_weights,
    split_folders,
)
from fcvgg.finetuning.strategies import (
    EPOCHS,
    MEANINGS,
    SCRATCH_RATES,
    Choice,
    Recipe,
    chosen,
    middle_pool,
    new_layer_rate,
    new_layers,
    prepared,
    rates,
    size_of,
)
from fcvgg.geometry import Pair
from fcvgg.loading import DEFAULT_WEIGHTS, read_source
from fcvgg.native_size import infer_input_size
from fcvgg.network import FullyConvolutional
from fcvgg.preprocessing import Preprocess
from fcvgg.sources import torchvision_model
from fcvgg.training.settings import Settings
from fcvgg.transfer.feature_cache import digest_of
from fcvgg.transfer.heads import loss_for
from fcvgg.transfer.naming import layer_names

if TYPE_CHECKING:
    from fcvgg.finetuning.tasks import Classification
    from fcvgg.training.loop import TrainingRun

MODEL, REPORT = "model", "report"
"""Folders of a run: the bundle, and what it is judged by."""

_DEFAULTS: dict[str, Any] = {"optimizer": "adamw", "patience": 10}
"""Where fine-tuning differs from `Settings`: AdamW does not mind how large features are."""


_MEASURED = 32
"""Images whose features tell the learning rate of a new layer."""

_DIGITS = 12

_NAMED = 8
"""Classes whose accuracies stand in one line."""


@dataclass(frozen=True)
class FineTuned:
    """What `finetune` made; printing tells it.

    Attributes:
        net: the converted network, verified against `model`.
        model: the trained classifier, in evaluation mode.
        folder: the run's folder.
        source: the name of the network that it started from.
        choice: the strategy, and why.
        recipe: what was done.
        settings: how it was trained.
        classes: the class names.
        counts: images to train on, and held out, of every class.
        skipped: files that could not be read, and why.
        origin: how the held-out images came about.
        size: ``(h, w)`` at which it was trained.
        training: epochs and checkpoints; None for ``"svm"``, which has none.
        valid: the held-out images.
        probabilities: of the classes ``(N, K)`` for every held-out image.
        trained: how many parameters were trained.
        parameters: how many there are.
        seconds: how long this call took.
    """

    net: FullyConvolutional
    model: nn.Module
    folder: Path
    source: str
    choice: Choice
    recipe: Recipe
    settings: Settings
    classes: tuple[str, ...]
    counts: dict[str, tuple[int, int]]
    skipped: tuple[Unreadable, ...]
    origin: str
    size: Pair
    training: TrainingRun | None
    valid: LabelledFiles
    probabilities: NDArray[Any]
    trained: int
    parameters: int
    seconds: float

    @property
    def model_path(self) -> Path:
        """The bundle, for `fcvgg.load` and ``--model``."""
        return self.folder / MODEL

    @property
    def report_path(self) -> Path:
        """The report, in Markdown."""
        return self.folder / REPORT / "report.md"

    @property
    def confusion(self) -> NDArray[Any]:
        """Counts of held-out images ``(K, K)``, by class in rows and by prediction in columns."""
        from fcvgg.sources.extras import imported

        metrics = imported("torchmetrics.functional.classification", "train")
        predicted = torch.from_numpy(self.probabilities).argmax(1)
        truth = torch.tensor(self.valid.labels)
        return metrics.multiclass_confusion_matrix(predicted, truth, len(self.classes)).numpy()

    @property
    def accuracy(self) -> float:
        """The share of held-out images whose most probable class is theirs."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def class_accuracy(self) -> dict[str, float]:
        """`accuracy` of every class."""
        table = self.confusion
        return {n: float(table[i, i] / table[i].sum()) for i, n in enumerate(self.classes)}

    def __repr__(self) -> str:
        return (
            f"FineTuned({self.source!r}, {self.choice.strategy}, {len(self.classes)} classes, "
            f"accuracy {self.accuracy:.3f}, {str(self.model_path)!r})"
        )

    def __str__(self) -> str:
        held_out = len(self.valid)
        right = round(self.accuracy * held_out)
        lines = [
            f"{self.source}, strategy {self.choice.strategy}: {self.choice.reason}",
            f"{self.trained:,} of {self.parameters:,} parameters trained at "
            f"{self.size[0]}x{self.size[1]} pixels in {self.seconds:.0f} s{self._epochs()}",
            f"held out: {right} of {held_out} images right ({self.accuracy:.1%}), "
            + self._by_class(),
            str(self.net.equivalence),
        ]
        return "\n".join(lines)

    def _by_class(self) -> str:
        shares = sorted(self.class_accuracy.items(), key=lambda item: item[1])
        named = self.class_accuracy.items() if len(shares) <= _NAMED else shares[:3]
        what = "" if len(shares) <= _NAMED else "the least: "
        return what + ", ".join(f"{name} {share:.0%}" for name, share in named)

    def _epochs(self) -> str:
        if self.training is None:
            return ""
        run = self.training
        early = ", stopped early" if run.stopped_early else ""
        return f", {len(run.history)} epochs{early}, best after epoch {run.best_epoch}"


def finetune(
    data: str | Path,
    model: nn.Module | str | Path = "vgg16",
    folder: str | Path = "finetuned",
    *,
    weights: str | Path | None = DEFAULT_WEIGHTS,
    preprocess: Preprocess | None = None,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> FineTuned:
    """Train a classifier for the classes of a folder, and convert, verify, save and judge it.

    The strategies are the cases that the literature on transfer tells apart
    (https://cs231n.github.io/transfer-learning, https://arxiv.org/abs/1411.1792).

    Args:
        data: a folder with one folder of images per class; or with ``train`` and ``valid`` (or
            ``val``) that hold such folders. Files that cannot be read are skipped and listed.
        model: a classifier, or a name or file as for `fcvgg.load`. It is not changed.
        folder: the run: ``model`` (the bundle), ``report``, ``best.ckpt``, ``last.ckpt`` and
            ``history.csv``.
        weights: as for `fcvgg.load`.
        preprocess: how images become input; the source's own when None.
        resume: finish an interrupted run of the same arguments; it ends with the same weights, bit
            for bit on a CPU.
        progress: show bars, and print a line for every epoch, on stderr.
        options: fields of `fcvgg.Recipe` (`strategy`, `size`, `hidden`, `augment`, ...: what is
            done) and of `fcvgg.training.Settings` (`epochs`, `lr`, `batch_size`, `seed`, ...: how
            it is trained). `lr` by default follows the size of the features that the new layers
            get; `optimizer` is ``"adamw"``, `patience` 10, `epochs` 30 (100 for ``"linear"``).

    Raises:
        DatasetError: if the folder holds no such images.
        ArgumentError: if an option is unknown or out of range.
        LoadError: if the source cannot be had, or the run to resume is another's.
        ConversionError: if the model's head cannot be replaced, or the result not be converted.
        TrainingError: if training must stop, such as by a loss that is not finite.
        MissingExtraError: if the extra ``train`` is not installed.
    """
    from fcvgg.finetuning.report import write_report
    from fcvgg.training.loop import LAST, check_new, is_main_process, made_folder

    began = time.monotonic()
    recipe, given = _options(options)
    check_new(Path(folder), (LAST, MODEL), resume)
    found = split_folders(data, recipe.valid_fraction, given.get("seed", 0))
    if recipe.strategy == "scratch" and weights == DEFAULT_WEIGHTS:
        weights = None
    source = _source(model, weights, preprocess, recipe)
    choice = chosen(recipe, source.model, found.train, source.preprocess, source.native)
    settings = _settings(given, choice.strategy)
    size = size_of(recipe, source.native)
    train, valid = (
        ImageRows(files, source.preprocess, size, recipe.resize, augment)
        for files, augment in (
            (found.train, recipe.augmented(choice.strategy)),
            (found.valid, False),
        )
    )
    folder = made_folder(Path(folder))
    run: TrainingRun | None = None
    if choice.strategy == "svm":
        trained = _fit_svm(source, train, recipe, settings, progress)
    else:
        trained = prepared(
            source.model, choice, recipe, len(found.classes), source.native, settings.seed
        )
        _converted(trained, size, source.preprocess, found.classes, verify=False)  # or refuse now
        identity = _identity(source, recipe, choice, size, found)
        if choice.strategy != "scratch" and "lr" not in given:
            settings = replace(settings, lr=_measured_rate(trained, train, recipe, settings))
        run = _fit(
            trained, train, valid, recipe, choice, settings, folder, identity, resume, progress
        )
    trained.eval()
    net = _converted(trained, size, source.preprocess, found.classes, verify=True)
    counted = [p.numel() for p in trained.parameters() if p.requires_grad]
    result = FineTuned(
        net=net,
        model=trained,
        folder=folder,
        source=source.name,
        choice=choice,
        recipe=recipe,
        settings=settings,
        classes=found.classes,
        counts=found.counts,
        skipped=found.skipped,
        origin=found.origin,
        size=size,
        training=run,
        valid=found.valid,
        probabilities=_probabilities(trained, valid, settings, progress).numpy(),
        trained=sum(counted),
        parameters=sum(p.numel() for p in trained.parameters()),
        seconds=time.monotonic() - began,
    )
    if is_main_process():
        net.save(result.model_path)
        write_report(result)
    return result


@dataclass(frozen=True)
class _Source:
    """The pretrained classifier, and what is known of it."""

    model: nn.Module
    name: str
    preprocess: Preprocess
    native: Pair


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
    epochs = {"epochs": EPOCHS[strategy]} if strategy in EPOCHS else {}
    settings = Settings(**{**_DEFAULTS, **epochs, **given})
    if strategy == "scratch" and "lr" not in given:
        return replace(settings, lr=SCRATCH_RATES[settings.optimizer])
    return settings  # the rate of the others follows their features


def _source(
    model: nn.Module | str | Path,
    weights: str | Path | None,
    preprocess: Preprocess | None,
    recipe: Recipe,
) -> _Source:
    known: dict[str, Any] = {}
    if isinstance(model, (str, Path)):
        name = str(model)
        if name not in ("demo", *torchvision_model.names()) and Path(name).is_dir():
            raise ArgumentError(
                f"{name} is a converted network, whose head cannot be replaced; pass its source "
                "model, or its name and weights"
            )
        classifier, known = read_source(name, None, weights)
    else:
        classifier = unwrapped(model)
        name = type(classifier).__name__
    preprocess = preprocess or known.get("preprocess")
    if preprocess is None:
        raise PreprocessError(
            f"the preprocessing of {name} is unknown; pass preprocess=fcvgg.Preprocess(mean, std), "
            "the one it was trained with"
        )
    return _Source(classifier, name, preprocess, _native(classifier, known, recipe))


def _native(model: nn.Module, known: dict[str, Any], recipe: Recipe) -> Pair:
    size = known.get("input_size")
    if size is not None:
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    try:
        return infer_input_size(model)
    except InputSizeError:
        if recipe.size is None:
            raise InputSizeError(
                f"{type(model).__name__} takes images of any size; pass size=, the size to train at"
            ) from None
        return size_of(recipe, (0, 0))


def _identity(
    source: _Source, recipe: Recipe, choice: Choice, size: Pair, found: SplitFolders
) -> dict[str, Any]:
    """What an interrupted run must have in common with the one that finishes it."""
    return {
        "architecture": source.name,
        "strategy": choice.strategy,
        "classes": found.classes,
        "input_size": size,
        "freeze_upto": recipe.freeze_upto,
        "hidden": recipe.hidden,
        "resize": recipe.resize,
        "augment": recipe.augmented(choice.strategy),
        "class_weights": recipe.class_weights,
        "training_images": len(found.train),
        "held_out_images": len(found.valid),
        "files": _digest_of_files(found),
        "pretrained_weights": digest_of(source.model)[:_DIGITS],
    }


def _digest_of_files(found: SplitFolders) -> str:
    """What tells the images of one run from those of another: their names and sizes."""
    seen = [
        f"{path.parent.name}/{path.name} {path.stat().st_size}"
        for path in (*found.train.paths, *found.valid.paths)
    ]
    return sha256("\n".join(seen).encode()).hexdigest()[:_DIGITS]


def _fit_svm(
    source: _Source, train: ImageRows, recipe: Recipe, settings: Settings, progress: bool
) -> nn.Module:
    from fcvgg.finetuning.svm import fitted_svm

    if recipe.augment:
        raise ArgumentError("the strategy svm computes features once; it goes without augment")
    model = fitted_svm(
        source.model,
        train,
        recipe.freeze_upto or middle_pool(layer_names(source.model)),
        balanced=recipe.class_weights == "balanced",
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=progress,
    )
    head = model.get_submodule("classifier")
    model.requires_grad_(False)
    head.requires_grad_(True)
    return model


def _fit(
    model: nn.Module,
    train: ImageRows,
    valid: ImageRows,
    recipe: Recipe,
    choice: Choice,
    settings: Settings,
    folder: Path,
    identity: dict[str, Any],
    resume: bool,
    progress: bool,
) -> TrainingRun:
    """Train the model in place; of one with frozen features only the last layer is run."""
    from fcvgg.finetuning.tasks import frozen_features
    from fcvgg.training.loop import fit

    linear = choice.strategy == "linear"
    task: Classification
    images: tuple[Any, Any] = (train, valid)
    if linear and not recipe.augmented("linear"):
        last = _new_layers(model, recipe)[-1]
        task = _task(last, nn.CrossEntropyLoss(), train, recipe, None, still=True)
        images = tuple(  # type: ignore[assignment]
            frozen_features(
                model,
                last,
                part,
                what,
                batch_size=settings.batch_size,
                device=_device(settings),
                progress=progress,
            )
            for part, what in ((train, "to train on"), (valid, "held out"))
        )
    else:

        def groups(lr: float) -> list[dict[str, Any]]:
            return rates(model, choice.strategy, lr, recipe.hidden)

        task = _task(model, loss_for(model), train, recipe, groups, still=linear)
    return fit(task, *images, settings, folder, identity=identity, resume=resume, progress=progress)


def _measured_rate(model: nn.Module, train: ImageRows, recipe: Recipe, settings: Settings) -> float:
    """The learning rate that suits the features of some images."""
    from fcvgg.finetuning.tasks import frozen_features

    files = train.files
    places = np.linspace(0, len(files) - 1, min(len(files), _MEASURED)).astype(int)
    some = LabelledFiles(
        tuple(files.paths[i] for i in places), tuple(files.labels[i] for i in places)
    )
    rows, _ = frozen_features(
        model,
        _new_layers(model, recipe)[0],
        ImageRows(some, train.preprocess, train.size, train.resize),
        "of some",
        batch_size=settings.batch_size,
        device=_device(settings),
    ).tensors
    return new_layer_rate(rows, settings.optimizer)


def _new_layers(model: nn.Module, recipe: Recipe) -> list[nn.Module]:
    names = layer_names(model)
    return [names.root.get_submodule(x.path) for x in new_layers(names, recipe.hidden)]


def _task(
    model: nn.Module,
    loss: nn.Module,
    train: ImageRows,
    recipe: Recipe,
    groups: Callable[[float], list[dict[str, Any]]] | None,
    still: bool,
) -> Classification:
    from fcvgg.finetuning.tasks import Classification

    labels = train.files.labels
    classes = max(labels) + 1  # every class has images
    weights = balanced_weights(labels, classes) if recipe.class_weights == "balanced" else None
    return Classification(model, loss, classes, weights=weights, groups=groups, still=still)


def _converted(
    model: nn.Module,
    size: Pair,
    preprocess: Preprocess,
    classes: tuple[str, ...],
    verify: bool,
    **options: Any,
) -> FullyConvolutional:
    return convert(
        model,
        input_size=size,
        preprocess=replace(preprocess, resize=None),
        categories=classes,
        verify=verify,
        **options,
    )


def _probabilities(
    model: nn.Module, valid: ImageRows, settings: Settings, progress: bool
) -> Tensor:
    from fcvgg.finetuning.tasks import probabilities_of

    device = _device(settings)
    return probabilities_of(
        model, valid, batch_size=settings.batch_size, device=device, progress=progress
    )


def _device(settings: Settings) -> torch.device:
    gpu = settings.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


__all__ = ["MEANINGS", "FineTuned", "finetune"]
