"""``fcvgg finetune``: from a folder of images to a network for its classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from fcvgg.choices import Optimizer, Precision, Strategy
from fcvgg.cli.console import resumable, say, say_next, say_wrote, tell_skipped
from fcvgg.cli.options import (
    BALANCED_HELP,
    TRAINING,
    BatchSize,
    ClassWeights,
    OwnPreprocess,
    Resume,
    RunFolder,
    Weights,
)
from fcvgg.cli.options import size as size_of

if TYPE_CHECKING:
    from fcvgg.finetuning.result import FineTuned

NAME = "finetune"
EXAMPLES = (
    "fcvgg finetune photos",
    "fcvgg finetune photos --strategy partial --freeze-upto pool3 --epochs 20 -o birds",
    "fcvgg finetune photos --weights vgg16.pth --size 160 --head linear --resume -o birds",
    "fcvgg heatmap photo.jpg --model birds/model",
)

_IMAGES = "Images"


def run(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder with one folder of images per class, or with parts such as train and "
            "val that hold such folders.",
            show_default=False,
        ),
    ],
    arch: Annotated[
        str,
        typer.Option(
            "--arch",
            "-a",
            metavar="NAME",
            help="The network to start from: a torchvision name, timm:NAME, an .onnx or Keras "
            "file, or 'demo'.",
        ),
    ] = "vgg16",
    weights: Weights = "DEFAULT",
    output: RunFolder = Path("finetuned"),
    strategy: Annotated[
        Strategy,
        typer.Option(
            "--strategy",
            "-s",
            help="What is trained: one linear layer, the later layers, all, a support vector "
            "machine on early features, or all from scratch; auto chooses and says why.",
        ),
    ] = "auto",
    similar: Annotated[
        bool | None,
        typer.Option(
            "--similar/--different",
            help="For auto: whether the images resemble those the network was trained on.",
            show_default="measured",
        ),
    ] = None,
    freeze_upto: Annotated[
        str | None,
        typer.Option(
            "--freeze-upto",
            metavar="LAYER",
            help="The last frozen layer (partial), or the layer whose features are used (svm).",
            show_default="the pool at half depth",
        ),
    ] = None,
    head: Annotated[
        str,
        typer.Option(
            "--head",
            metavar="last|linear|N,N",
            help="The layers that are new: the last one, one linear layer on the features, or "
            "hidden layers of these widths and a last one.",
        ),
    ] = "last",
    resume: Resume = False,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="N|HxW",
            help="The input size to train at.",
            show_default="the network's own",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    resize: Annotated[
        Literal["resize", "center-crop", "centre-crop"],
        typer.Option(
            "--resize",
            metavar="resize|center-crop",  # centre-crop is an older spelling
            help="How images come to that size.",
            rich_help_panel=_IMAGES,
        ),
    ] = "resize",
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment",
            help="Vary the training images: crops, mirroring, colours.",
            show_default="where features are trained",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    valid_fraction: Annotated[
        float,
        typer.Option(
            "--valid-fraction",
            metavar="X",
            help="The share of the images held out where there is no valid folder.",
            rich_help_panel=_IMAGES,
        ),
    ] = 0.2,
    class_weights: Annotated[
        ClassWeights,
        typer.Option(
            "--class-weights",
            help=BALANCED_HELP,
            rich_help_panel=_IMAGES,
        ),
    ] = "none",
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            metavar="N",
            min=1,
            help="The largest number of epochs.",
            show_default="30, for linear 100",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    batch_size: BatchSize = 32,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            metavar="X",
            help="Learning rate of the new layers; the others get less.",
            show_default="by the features",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    optimizer: Annotated[
        Optimizer,
        typer.Option("--optimizer", rich_help_panel=TRAINING, help="The optimizer: AdamW or SGD."),
    ] = "adamw",
    cosine: Annotated[
        bool,
        typer.Option(
            "--cosine/--constant",
            help="Let the learning rate fall along a cosine.",
            rich_help_panel=TRAINING,
        ),
    ] = True,
    patience: Annotated[
        int,
        typer.Option(
            "--patience",
            metavar="N",
            min=0,
            help="Stop after N epochs without a better loss; 0 never stops.",
            rich_help_panel=TRAINING,
        ),
    ] = 10,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            help="Seed of the split, new weights, order, augmentation and dropout.",
            rich_help_panel=TRAINING,
        ),
    ] = 0,
    precision: Annotated[
        Precision,
        typer.Option(
            "--precision",
            help="Arithmetic; auto is bf16-mixed on a GPU that has it, else 32.",
            rich_help_panel=TRAINING,
        ),
    ] = "auto",
    devices: Annotated[
        str,
        typer.Option(
            "--devices",
            metavar="N|auto",
            help="Number of GPUs, or auto for all.",
            rich_help_panel=TRAINING,
        ),
    ] = "1",
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            metavar="N",
            min=0,
            help="Number of processes that read images.",
            rich_help_panel=TRAINING,
        ),
    ] = 0,
    own: OwnPreprocess = OwnPreprocess(),
) -> None:
    """Train a network for a folder of images, and convert it.

    The run's folder gets the network ('model', for the other commands), a report with curves,
    confusion matrix and the worst mistakes, and checkpoints, from which --resume finishes an
    interrupted run.
    """
    from fcvgg.finetuning.finetuning import finetune

    options: dict[str, Any] = {
        "strategy": strategy,
        "similar": similar,
        "freeze_upto": freeze_upto,
        "hidden": _hidden(head),
        "size": size_of(size, "--size"),
        "resize": resize,
        "augment": augment,
        "class_weights": None if class_weights == "none" else class_weights,
        "valid_fraction": valid_fraction,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "cosine": cosine,
        "patience": patience or None,
        "seed": seed,
        "precision": precision,
        "devices": int(devices) if devices.isdecimal() else devices,
        "workers": workers,
    }
    options.update({k: v for k, v in (("epochs", epochs), ("lr", lr)) if v is not None})
    own.check()
    with resumable(output):
        result = finetune(
            data,
            arch,
            output,
            weights=weights,
            preprocess=own.preprocess_for,
            resume=resume,
            progress=True,
            **options,
        )
    _tell(result)


def _tell(result: FineTuned) -> None:
    tell_skipped(result.skipped, sum(map(sum, result.counts.values())))
    run = result.training
    if run is not None and run.resumed_after:
        say(f"resumed after epoch {run.resumed_after}")
    say(Text(f"strategy {result.choice.strategy}: {result.choice.reason}"))
    say(_table(result))
    for line in str(result).splitlines()[1:]:
        say(line)
    say_wrote(result.model_path)
    say_wrote(result.report_path)
    say_next(result.heatmap_command)


def _table(result: FineTuned) -> Table:
    table = Table(
        title="Held-out images",
        title_style="bold",
        title_justify="left",
        box=None,
        header_style="cyan",
    )
    table.add_column("class")
    for heading in ("to train on", "held out", "right"):
        table.add_column(heading, justify="right")
    for name, share in result.class_accuracy.items():
        train, valid = result.counts[name]
        table.add_row(name, f"{train}", f"{valid}", f"{share:.1%}")
    return table


def _hidden(head: str) -> tuple[int, ...] | None:
    if head in ("last", "linear"):
        return None if head == "last" else ()
    parts = head.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"{head!r} is no head; expected last, linear or widths such as 512,256",
            param_hint="--head",
        )
    return tuple(int(part) for part in parts)
