"""``fcvgg segment-train``: a network that labels every pixel, from images with masks."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fcvgg.cli.console import note_skipped, resumable, say, say_next, say_wrote
from fcvgg.cli.options import (
    BatchSize,
    ClassWeights,
    Model,
    OwnModel,
    Resume,
    RunFolder,
    Weighting,
    Weights,
    load_network,
    names,
    size,
    training_option,
)

NAME = "segment-train"
EXAMPLES = (
    "fcvgg segment-train labelled --classes road,house,tree --weights vgg16.pth -o 32s",
    "fcvgg segment-train labelled --classes road,house,tree --variant 16s --init-from 32s/fcn "
    "-w vgg16.pth -o 16s",
    "fcvgg segment photo.jpg --fcn 16s/fcn",
)


class Variant(str, Enum):
    """Down to which stride maps are scored."""

    fcn32s = "32s"
    fcn16s = "16s"
    fcn8s = "8s"


Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="Folder with images/NAME.jpg and masks/NAME.png, or with parts such as train and val "
        "that are such folders. A mask holds class indices, and 255 for pixels to ignore.",
        show_default=False,
    ),
]
ClassNames = Annotated[
    Any,
    typer.Option(
        "--classes",
        "-c",
        metavar="NAME,NAME,...",
        parser=names,
        help="Class names, in the order of their indices.",
        show_default=False,
    ),
]
VariantName = Annotated[
    Variant, typer.Option("--variant", help="Stride of the finest map that is scored.")
]
InitFrom = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Trained network of the same model and a coarser variant to start from.",
        show_default="the model alone",
    ),
]
FreezeUpto = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER",
        help="Last layer that is not trained, such as pool4.",
        show_default="all layers are trained",
    ),
]
Crop = Annotated[
    Any,
    training_option(
        metavar="N|HxW",
        parser=size,
        help="Size of random crops to train on.",
        show_default="whole images",
    ),
]
Epochs = Annotated[int, training_option(metavar="N", min=1, help="Number of epochs.")]
LearningRate = Annotated[
    float, training_option("--lr", metavar="X", help="Learning rate of AdamW.")
]
BackboneRate = Annotated[
    float | None,
    training_option(
        "--backbone-lr",
        metavar="X",
        help="Learning rate of the pretrained layers.",
        show_default="as --lr",
    ),
]
Seed = Annotated[
    int,
    training_option(metavar="N", min=0, help="Seed of the split, sampling, crops and dropout."),
]


def run(
    data: Data,
    classes: ClassNames,
    model: Model = "vgg16",
    weights: Weights = "DEFAULT",
    variant: VariantName = Variant.fcn32s,
    init_from: InitFrom = None,
    output: RunFolder = Path("segmented"),
    freeze_upto: FreezeUpto = None,
    resume: Resume = False,
    crop: Crop = None,
    class_weights: Weighting = ClassWeights.none,
    epochs: Epochs = 30,
    batch_size: BatchSize = 4,
    lr: LearningRate = 1e-3,
    backbone_lr: BackboneRate = None,
    seed: Seed = 0,
    own: OwnModel = OwnModel(),
) -> None:
    """Train a network to label every pixel, from images with masks.

    The run's folder gets 'fcn', which 'fcvgg segment' takes, the best and the last checkpoint, and
    history.csv. The best epoch has the highest mean IoU on held-out images.
    """
    from fcvgg.segmentation.network import FCN
    from fcvgg.segmentation.training import train_fcn
    from fcvgg.training import Settings
    from fcvgg.transfer.freezing import freeze_

    settings = Settings(epochs=epochs, optimizer="adamw", lr=lr, batch_size=batch_size, seed=seed)
    net = load_network(model, own, weights=weights)
    if freeze_upto is not None:
        freeze_(net, freeze_upto)
    coarser = None if init_from is None else FCN.load(init_from)
    fcn = FCN(net, len(classes), variant.value, init_from=coarser, categories=classes)
    with resumable(output):
        done = train_fcn(
            fcn,
            data,
            output,
            settings=settings,
            crop=crop,
            class_weights=class_weights.argument,
            backbone_lr=backbone_lr,
            resume=resume,
            progress=True,
        )
    note_skipped(done.skipped, done.images)
    if done.run.resumed_after:
        say(f"resumed after epoch {done.run.resumed_after}")
    say(f"FCN-{variant.value}, epoch {done.run.best_epoch} of {epochs}: {done.metrics}")
    say_wrote(output / "fcn")
    say_next(f"fcvgg segment photo.jpg --fcn {output / 'fcn'}")
