"""``fcvgg segment-train``: a network that labels every pixel, from images with masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcvgg.choices import Variant
from fcvgg.cli.console import resumable, say, say_next, say_wrote, tell_skipped
from fcvgg.cli.options import (
    BALANCED_HELP,
    TRAINING,
    BatchSize,
    ClassWeights,
    Model,
    OwnModel,
    Resume,
    RunFolder,
    Weights,
    loaded,
)
from fcvgg.cli.options import size as size_of

NAME = "segment-train"
EXAMPLES = (
    "fcvgg segment-train labelled --classes road,house,tree --weights vgg16.pth -o 32s",
    "fcvgg segment-train labelled --classes road,house,tree --variant 16s --init-from 32s/fcn "
    "-w vgg16.pth -o 16s",
    "fcvgg segment photo.jpg --fcn 16s/fcn",
)


def run(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder with images/NAME.jpg and masks/NAME.png, or with parts such as train "
            "and val that are such folders. A mask holds class indices, and 255 where nothing "
            "counts.",
            show_default=False,
        ),
    ],
    classes: Annotated[
        str,
        typer.Option(
            "--classes",
            "-c",
            metavar="NAME,NAME",
            help="The classes' names, in the order of their indices.",
            show_default=False,
        ),
    ],
    model: Model = "vgg16",
    weights: Weights = "DEFAULT",
    variant: Annotated[
        Variant,
        typer.Option("--variant", help="The stride of the finest map that is scored."),
    ] = "32s",
    init_from: Annotated[
        Path | None,
        typer.Option(
            "--init-from",
            metavar="DIR",
            help="A trained network of the same model and a coarser variant to start from.",
            show_default="the model alone",
        ),
    ] = None,
    output: RunFolder = Path("segmented"),
    freeze_upto: Annotated[
        str | None,
        typer.Option(
            "--freeze-upto",
            metavar="LAYER",
            help="The last layer that is not trained, such as pool4.",
            show_default="all layers are trained",
        ),
    ] = None,
    resume: Resume = False,
    crop: Annotated[
        str | None,
        typer.Option(
            "--crop",
            metavar="N|HxW",
            help="Train on random parts of this size.",
            show_default="whole images",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    class_weights: Annotated[
        ClassWeights,
        typer.Option(
            "--class-weights",
            help=BALANCED_HELP,
            rich_help_panel=TRAINING,
        ),
    ] = "none",
    epochs: Annotated[
        int,
        typer.Option(
            "--epochs", metavar="N", min=1, help="Number of epochs.", rich_help_panel=TRAINING
        ),
    ] = 30,
    batch_size: BatchSize = 4,
    lr: Annotated[
        float,
        typer.Option("--lr", metavar="X", help="Learning rate of AdamW.", rich_help_panel=TRAINING),
    ] = 1e-3,
    backbone_lr: Annotated[
        float | None,
        typer.Option(
            "--backbone-lr",
            metavar="X",
            help="Learning rate of the model's own layers.",
            show_default="as --lr",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            help="Seed of the split, order, crops and dropout.",
            rich_help_panel=TRAINING,
        ),
    ] = 0,
    own: OwnModel = OwnModel(),
) -> None:
    """Train a network to label every pixel, from masks.

    The folder gets 'fcn', which 'fcvgg segment' takes, the best and the last checkpoint, and
    history.csv. The best epoch is that of the highest mean IoU on held-out images.
    """
    from fcvgg.segmentation.network import FCN
    from fcvgg.segmentation.training import train_fcn
    from fcvgg.training import Settings
    from fcvgg.transfer.freezing import freeze_

    settings = Settings(epochs=epochs, optimizer="adamw", lr=lr, batch_size=batch_size, seed=seed)
    names = [name.strip() for name in classes.split(",")]
    net = loaded(model, own, weights=weights)
    if freeze_upto is not None:
        freeze_(net, freeze_upto)
    coarser = None if init_from is None else FCN.load(init_from)
    fcn = FCN(net, len(names), variant, init_from=coarser, categories=names)
    with resumable(output):
        done = train_fcn(
            fcn,
            data,
            output,
            settings=settings,
            crop=size_of(crop, "--crop"),
            class_weights=None if class_weights == "none" else class_weights,
            backbone_lr=backbone_lr,
            resume=resume,
            progress=True,
        )
    tell_skipped(done.skipped, done.images)
    if done.run.resumed_after:
        say(f"resumed after epoch {done.run.resumed_after}")
    say(f"FCN-{variant}, epoch {done.run.best_epoch} of {epochs}: {done.metrics}")
    say_wrote(output / "fcn")
    say_next(f"fcvgg segment photo.jpg --fcn {output / 'fcn'}")
