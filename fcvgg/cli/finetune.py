"""``fcvgg finetune``: from a folder of images to a network for its classes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.text import Text

from fcvgg.choices import Optimizer, Precision, Strategy
from fcvgg.cli.completion import complete_model
from fcvgg.cli.console import note_skipped, resumable, say, say_next, say_wrote
from fcvgg.cli.options import (
    BatchSize,
    OwnPreprocess,
    Resume,
    RunFolder,
    Weighting,
    Weights,
    own_classifier,
    size,
    training_option,
)
from fcvgg.cli.reports import ReportTable, titled

if TYPE_CHECKING:
    from fcvgg.finetuning.result import FineTuned

NAME = "finetune"
EXAMPLES = (
    "fcvgg finetune photos",
    "fcvgg finetune photos --strategy partial --freeze-upto pool3 --epochs 20 -o birds",
    "fcvgg finetune photos --weights vgg16.pth --size 160 --head linear --resume -o birds",
    "fcvgg finetune photos --arch mymodel:MyNet --weights my.pth --preprocess imagenet",
    "fcvgg heatmap photo.jpg --model birds/model",
)


# -- options --------------------------------------------------------------------------------------


def hidden_widths(head: str) -> tuple[int, ...] | None:
    """Widths of hidden layers: None for ``last``, ``()`` for ``linear``, from ``512,256``."""
    if head in ("last", "linear"):
        return None if head == "last" else ()
    parts = head.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"{head!r} is not a head; expected last, linear or widths such as 512,256"
        )
    return tuple(int(part) for part in parts)


_image_option = functools.partial(typer.Option, rich_help_panel="Images")

Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="Folder with one folder of images per class, or with parts such as train and val that "
        "hold such folders.",
        show_default=False,
    ),
]
Architecture = Annotated[
    str,
    typer.Option(
        "--arch",
        "-a",
        metavar="NAME",
        autocompletion=complete_model,
        help="Network to start from: a torchvision name, timm:NAME, an .onnx or Keras file, "
        "'demo', or your own class or function, such as mymodel:MyNet (with --weights).",
    ),
]
StrategyName = Annotated[
    Strategy,
    typer.Option(
        "--strategy",
        "-s",
        help="Layers to train: a new linear layer (linear), the later layers (partial), all of "
        "them (all, or scratch from random weights), or a support vector machine on early features "
        "(svm); auto chooses and gives its reason.",
    ),
]
Similar = Annotated[
    bool | None,
    typer.Option(
        "--similar/--different",
        help="Whether the images resemble those that the network was trained on (for auto).",
        show_default="measured",
    ),
]
FreezeUpto = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER",
        help="Last frozen layer (partial), or the layer whose features are used (svm).",
        show_default="the pool at half depth",
    ),
]
Head = Annotated[
    Any,
    typer.Option(
        metavar="last|linear|N,N",
        parser=hidden_widths,
        help="New layers: the last one, one linear layer on the features, or hidden layers of "
        "these widths and a last one.",
    ),
]
TrainingSize = Annotated[
    Any,
    _image_option(
        "--size",
        metavar="N|HxW",
        parser=size,
        help="Input size to train at.",
        show_default="the network's own",
    ),
]
ResizeMode = Annotated[
    Literal["resize", "center-crop", "centre-crop"],
    _image_option(
        "--resize",
        metavar="resize|center-crop",  # centre-crop is an older spelling
        help="Method that brings images to the input size: resize the whole image, or crop its "
        "center.",
    ),
]
Augment = Annotated[
    bool | None,
    _image_option(
        "--augment/--no-augment",
        help="Vary the training images by random crops, mirroring and colours.",
        show_default="where a convolution is trained",
    ),
]
Cache = Annotated[
    str,
    training_option(
        metavar="SIZE",
        help="Memory for the features of frozen layers, which are computed once where images do "
        "not vary; larger ones go to a file. 0 computes them in every epoch.",
    ),
]
ValidFraction = Annotated[
    float,
    _image_option(
        metavar="X",
        help="Fraction of the images to hold out if the data has no validation folder.",
    ),
]
Epochs = Annotated[
    int | None,
    training_option(
        metavar="N",
        min=1,
        help="Maximum number of epochs.",
        show_default="30 (100 for linear), or enough for 300 steps",
    ),
]
LearningRate = Annotated[
    float | None,
    training_option(
        "--lr",
        metavar="X",
        help="Learning rate of the new layers; pretrained layers get a smaller one.",
        show_default="0.001, or from the scale of the features",
    ),
]
OptimizerName = Annotated[Optimizer, training_option("--optimizer", help="Optimizer.")]
Cosine = Annotated[
    bool,
    training_option(
        "--cosine/--constant", help="Learning rate schedule: a cosine to zero, or constant."
    ),
]
Patience = Annotated[
    int,
    training_option(
        metavar="N",
        min=0,
        help="Number of epochs without a lower validation loss after which training stops; 0 never "
        "stops early.",
    ),
]
Seed = Annotated[
    int,
    training_option(
        metavar="N",
        min=0,
        help="Seed of the split, new weights, sampling, augmentation and dropout.",
    ),
]
Arithmetic = Annotated[
    Precision,
    training_option(
        "--precision",
        help="Floating-point precision; auto is bf16-mixed on a GPU that supports it, else 32.",
    ),
]
Devices = Annotated[
    str, training_option(metavar="N|auto", help="Number of GPUs; auto uses all of them.")
]
Workers = Annotated[
    int, training_option(metavar="N", min=0, help="Number of processes that read images.")
]

# -- the command ----------------------------------------------------------------------------------


def run(
    data: Data,
    arch: Architecture = "vgg16",
    weights: Weights = "DEFAULT",
    output: RunFolder = Path("finetuned"),
    strategy: StrategyName = "auto",
    similar: Similar = None,
    freeze_upto: FreezeUpto = None,
    head: Head = "last",
    resume: Resume = False,
    size: TrainingSize = None,
    resize: ResizeMode = "resize",
    augment: Augment = None,
    valid_fraction: ValidFraction = 0.2,
    class_weights: Weighting = "none",
    epochs: Epochs = None,
    batch_size: BatchSize = 32,
    lr: LearningRate = None,
    optimizer: OptimizerName = "adamw",
    cosine: Cosine = True,
    patience: Patience = 10,
    seed: Seed = 0,
    precision: Arithmetic = "auto",
    devices: Devices = "1",
    workers: Workers = 0,
    cache: Cache = "2GiB",
    own: OwnPreprocess = OwnPreprocess(),
) -> None:
    """Fine-tune a classifier on a folder of images.

    The run's folder gets the converted network ('model', for the other commands), a report with
    learning curves, confusion matrix and the worst mistakes, and checkpoints, from which --resume
    finishes an interrupted run.
    """
    from fcvgg.finetuning.finetuning import finetune

    options = {
        "strategy": strategy,
        "similar": similar,
        "freeze_upto": freeze_upto,
        "hidden": head,
        "size": size,
        "resize": resize,
        "augment": augment,
        "class_weights": None if class_weights == "none" else class_weights,
        "valid_fraction": valid_fraction,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "optimizer": optimizer,
        "cosine": cosine,
        "seed": seed,
        "precision": precision,
        "devices": devices,
        "workers": workers,
        "cache": cache,
    }
    given = {name: value for name, value in options.items() if value is not None}
    own.check()
    with resumable(output):
        result = finetune(
            data,
            own_classifier(arch, weights, strategy == "scratch"),
            output,
            weights=weights,
            preprocess=own.preprocess_for,
            resume=resume,
            progress=True,
            patience=patience or None,
            **given,
        )
    _report(result)


def _report(result: FineTuned) -> None:
    note_skipped(result.skipped, sum(map(sum, result.counts.values())))
    run = result.training
    if run is not None and run.resumed_after:
        say(f"resumed after epoch {run.resumed_after}")
    say(Text(f"strategy {result.choice.strategy}: {result.choice.reason}"))
    say(_class_table(result))
    for line in str(result).splitlines()[1:]:
        say(line)
    say_wrote(result.model_path)
    say_wrote(result.report_path)
    say_next(result.heatmap_command)


def _class_table(result: FineTuned) -> RenderableType:
    rows = [
        (name, *map(str, result.counts[name]), f"{share:.1%}")
        for name, share in result.class_accuracy.items()
    ]
    return titled(
        "Held-out images", ReportTable(("class", "to train on", "held out", "right"), rows)
    )
