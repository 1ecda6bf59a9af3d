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
    images_in,
    say,
    say_wrote,
)
from fcvgg.cli.options import (
    Bands,
    Device,
    ImageOpener,
    Images,
    Nodata,
    OutputFolder,
    Recursive,
    checked_device,
)

NAME = "segment"
ENDINGS = ("-labels.png", "-overlay.png")
EXAMPLES = ("fcvgg segment photo.jpg --fcn segmented/fcn --output labels",)


Fcn = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Folder 'fcn' that 'fcvgg segment-train' wrote.", show_default=False
    ),
]


def run(
    images: Images,
    fcn: Fcn,
    output: OutputFolder = Path(),
    device: Device = "cpu",
    bands: Bands = None,
    nodata: Nodata = None,
    recursive: Recursive = False,
) -> None:
    """Predict the class of every pixel.

    For every image NAME, NAME-labels.png holds the class indices and NAME-overlay.png shows them.
    """
    from fcvgg.results.figures import save_figure
    from fcvgg.segmentation.network import FCN

    network = FCN.load(fcn).to(checked_device(device))
    place = folder(output)
    found = images_in(images, recursive, own=ENDINGS)
    images, opener = list(found), ImageOpener(bands, nodata)
    labels, overlays = (OutputFiles(found, place, ending) for ending in ENDINGS)

    def label(image: Path) -> Path:
        indices, overlay = labels.path_for(image), overlays.path_for(image)
        folder(indices.parent)
        label_map = network.predict(opener.open(image))
        shares = sorted(label_map.shares.items(), key=lambda item: -item[1])
        say(f"{image}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares if share))
        say_wrote(label_map.save(indices))
        say_wrote(save_figure(label_map.figure(), overlay))
        return overlay

    exit_if_any_failed(images, for_each_image(images, "label maps", label))
