"""``fcvgg heatmap``: an overlay for every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fcvgg.cli.console import (
    OutputFiles,
    check_any_exists,
    complain,
    exit_if_any_failed,
    folder,
    for_each_image,
    note,
    say,
    say_wrote,
)
from fcvgg.cli.options import (
    Bands,
    ImageOpener,
    Images,
    NetworkOptions,
    Nodata,
    OutputFolder,
    OutputStride,
)

if TYPE_CHECKING:
    from fcvgg.network import FullyConvolutional
    from fcvgg.results.score_map import ScoreMap

MANY_WINDOWS = 2.5
"""Windows along the smaller side above which the network sees an image in parts, not whole."""

NAME = "heatmap"
EXAMPLES = (
    "fcvgg heatmap dog.jpg",
    "fcvgg heatmap *.jpg --target 'golden retriever' --output heatmaps",
    "fcvgg heatmap dog.jpg --weights vgg16.pth --scale 512",
    "fcvgg heatmap scores.zarr --target tumour",
    "fcvgg heatmap rose.jpg -w own.pth --categories names.txt --preprocess tf",
    "fcvgg heatmap portrait.jpg --model demo --target face --scale 160",
)


Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        metavar="NAME|INDEX",
        help="Class to show: its name, a unique part of it, or its index.",
        show_default="the image's top class",
    ),
]
Scale = Annotated[
    int | None,
    typer.Option(
        "--scale",
        "-s",
        metavar="N",
        min=1,
        help="Smaller side, in pixels, to rescale every image to.",
        show_default="the image's size",
    ),
]


def run(
    context: typer.Context,
    images: Images,
    network: NetworkOptions = NetworkOptions(),
    target: Target = None,
    output: OutputFolder = Path(),
    scale: Scale = None,
    bands: Bands = None,
    nodata: Nodata = None,
    output_stride: OutputStride = None,
) -> None:
    """Overlay one class's heatmap on every image.

    The heatmap shows where the network sees the class. For a score map that 'fcvgg stream' wrote,
    the result is a thumbnail and a pyramidal OME-TIFF of the slide's size.
    """
    overlays = OutputFiles(images, output, "-heatmap.png")
    slides, images = split(images)
    shown = show_slides(slides, target, overlays)
    if not images:
        _note_unused(context)
        exit_if_any_failed(slides, shown)
        return
    check_any_exists(images)
    net = network.load(output_stride=output_stride)
    index = _index(net, target)
    folder(output)
    opener, size_note = ImageOpener(bands, nodata), SizeNote(net)

    def show(image: Path) -> Path:
        score_map = net.score_map(opener.open(image), scale=scale)
        if scale is None:
            size_note.print_once(image, score_map.input_size)
        size_note.print_if_flat(score_map)
        score_map = replace(score_map, could_have_positions=False)  # which has been said
        return _show(image, score_map, index, overlays.path_for(image))

    written = for_each_image(images, "heatmaps", show)
    exit_if_any_failed([*slides, *images], [*shown, *written])


class SizeNote:
    """Says, once in a run, that an image is many windows large, so that its parts are recognised.

    Args:
        net: what is run on the images.
    """

    def __init__(self, net: FullyConvolutional):
        self.net = net
        self.printed = self.flat_printed = False

    def print_once(self, image: Path, size: tuple[int, int]) -> None:
        """Print the line, unless it was printed, for a large image run at `size` ``(H, W)``."""
        windows = [pixels / w for pixels, w in zip(size, self.net.input_size)]
        count = min(windows)
        if count <= MANY_WINDOWS or self.printed:
            return
        self.printed = True
        extent = "high" if count == windows[0] else "wide"
        note(
            f"{image} is {count:.0f} windows {extent}, and the network recognises what fits into "
            f"one; --scale {self.net.usual_scale} shows the image whole"
        )

    def print_if_flat(self, score_map: ScoreMap) -> None:
        """Print, unless it was printed, that a map of positions can be had in place of one cell."""
        if score_map.is_flat and not self.flat_printed:
            self.flat_printed = True
            note(
                "the map has one cell, the whole window, so its heatmap is one value everywhere; "
                "--head position gives a map of positions"
            )


def _show(image: Path, score_map: ScoreMap, index: int | None, path: Path) -> Path:
    """Write the heatmap of a class, the top one if None, and say what it shows."""
    from fcvgg.results.interpolation import MOST_PIXELS

    prediction = score_map.predict()
    shown = int(prediction.argmax()) if index is None else index
    height, width = score_map.image_size
    factor = max((height * width / MOST_PIXELS) ** 0.5, 1)
    heatmap = score_map.heatmap(shown, size=(int(height / factor), int(width / factor)))
    y, x = (int(n * factor) for n in heatmap.peak)
    say(
        f"{image}: {heatmap.label} ({shown}), probability {float(prediction[shown]):.3f} averaged "
        f"over the image, peak {heatmap.values[heatmap.peak]:.3f} at (y, x) = ({y}, {x})"
    )
    say_wrote(heatmap.save(path))
    return path


def _note_unused(context: typer.Context) -> None:
    """Say which of the given options have no effect, since all that is shown are score maps."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in ("images", "target", "output")
        and getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    ]
    if given:
        note(f"a score map is shown as it was streamed, without {', '.join(given)}")


def _index(net: FullyConvolutional, target: str | None) -> int | None:
    from fcvgg.categories import class_given, class_index

    if target is None:
        return None
    return class_index(class_given(target, net.categories), net.categories, net.num_classes)


# -- score maps that ``fcvgg stream`` wrote -------------------------------------------------------


def split(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The paths that are streamed score maps, and the others."""
    from fcvgg.streaming.score_store import is_store

    slides = [path for path in paths if is_store(path)]
    return slides, [path for path in paths if path not in slides]


def show_slides(slides: Sequence[Path], target: str | None, overlays: OutputFiles) -> list[Path]:
    """Write the pictures of streamed score maps; those that cannot be used are reported.

    Returns:
        the maps that were shown.
    """
    from fcvgg.errors import FcvggError

    pyramids = OutputFiles(slides, overlays.folder, "-heatmap.ome.tif")
    shown = []
    for path in slides:
        try:
            _show_slide(path, target, overlays.path_for(path), pyramids.path_for(path))
            shown.append(path)
        except FcvggError as error:
            complain(error)
    return shown


def _show_slide(path: Path, target: str | None, overlay: Path, pyramid: Path) -> None:
    import numpy as np

    from fcvgg.categories import class_given
    from fcvgg.errors import ImageError
    from fcvgg.streaming.score_store import open_store
    from fcvgg.streaming.slide_maps import SlideMap

    store = open_store(path)
    given = None if target is None else class_given(target, store.description["categories"])
    slide = SlideMap(store, given)
    try:
        source = slide.source()
    except ImageError as error:
        complain(f"{error}; the overlay is drawn without the image")
        source = None
    heatmap = slide.heatmap(source)
    height, width = slide.image_size
    found = f"highest probability {float(np.nanmax(slide.cells)):.3f}"
    if store.description["kind"] == "argmax":
        found = f"the best class of {float(np.nanmean(slide.cells)):.1%} of the cells"
    say(f"{path}: {heatmap.label} ({slide.index}), {height}x{width} pixels, {found}")
    folder(overlay.parent)
    say_wrote(heatmap.save(overlay))
    say_wrote(slide.save_pyramid(pyramid))
