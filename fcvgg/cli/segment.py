"""``fcvgg segment``: the class of every pixel of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcvgg.cli.console import (
    OutputFiles,
    exit_if_any_failed,
    folder,
    for_each_image,
    say,
    say_wrote,
)
from fcvgg.cli.options import Device, Images, OutputFolder, checked_device

NAME = "segment"
EXAMPLES = ("fcvgg segment photo.jpg --fcn segmented/fcn --output labels",)


Fcn = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Folder 'fcn' that 'fcvgg segment-train' wrote.", show_default=False
    ),
]


def run(images: Images, fcn: Fcn, output: OutputFolder = Path(), device: Device = "cpu") -> None:
    """Predict the class of every pixel.

    For every image NAME, NAME-labels.png holds the class indices and NAME-overlay.png shows them.
    """
    from fcvgg.results.figures import save_figure
    from fcvgg.segmentation.network import FCN

    network = FCN.load(fcn).to(checked_device(device))
    place = folder(output)
    labels = OutputFiles(images, place, "-labels.png")
    overlays = OutputFiles(images, place, "-overlay.png")

    def label(image: Path) -> Path:
        indices, overlay = labels.path_for(image), overlays.path_for(image)
        found = network.predict(image)
        shares = sorted(found.shares.items(), key=lambda item: -item[1])
        say(f"{image}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares if share))
        say_wrote(found.save(indices))
        say_wrote(save_figure(found.figure(), overlay))
        return overlay

    exit_if_any_failed(images, for_each_image(images, "label maps", label))
