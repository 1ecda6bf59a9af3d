"""``fcvgg heatmap``: an overlay for every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fcvgg.choices import Combine
from fcvgg.cli.console import (
    OutputFiles,
    check_any_exists,
    complain,
    exit_if_any_failed,
    folder,
    for_each_image,
    images_in,
    note,
    say,
    say_json,
    say_wrote,
    write_csv,
)
from fcvgg.cli.options import (
    AsJson,
    Bands,
    Csv,
    ImageOpener,
    Images,
    NetworkOptions,
    Nodata,
    OutputFolder,
    OutputStride,
    Recursive,
    lengths,
)
from fcvgg.errors import ArgumentError
from fcvgg.support.atomic import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

    from fcvgg.network import FullyConvolutional
    from fcvgg.results.heatmap import Heatmap
    from fcvgg.results.score_map import ScoreMap

MANY_WINDOWS = 2.5
"""Windows along the smaller side above which the network sees an image in parts, not whole."""

NAME = "heatmap"
ENDINGS = ("-heatmap.png", "-figure.png", "-scores.npz")
EXAMPLES = (
    "fcvgg heatmap dog.jpg",
    "fcvgg heatmap *.jpg --target 'golden retriever' --output heatmaps",
    "fcvgg heatmap dog.jpg --weights vgg16.pth --scale 512",
    "fcvgg heatmap photos --scales 256,384 --boxes 0.5 --csv peaks.csv",
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


ManyScales = Annotated[
    Any,
    typer.Option(
        "--scales",
        metavar="N,N,...",
        parser=lengths,
        help="Smaller sides to rescale every image to, whose maps are combined.",
        show_default=False,
    ),
]
CombineBy = Annotated[
    Combine, typer.Option("--combine", help="How the maps of several scales become one.")
]
Boxes = Annotated[
    float | None,
    typer.Option(
        "--boxes",
        metavar="P",
        min=0,
        max=1,
        help="Draw boxes where the class has at least this probability.",
        show_default=False,
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        metavar="X",
        min=0,
        max=1,
        help="Largest opacity of colours.",
        show_default="that of Heatmap.overlay",
    ),
]
Colour = Annotated[
    bool, typer.Option("--colour", help="Keep the colours of the image under the heatmap.")
]
ColourMap = Annotated[
    str, typer.Option("--cmap", metavar="NAME", help="Colour map, by matplotlib's name.")
]
Figure = Annotated[
    Literal["none", "heatmap", "classes", "labels"],
    typer.Option(
        "--figure",
        help="Also write NAME-figure.png: the heatmap with a colour bar, the five top classes, or "
        "the class of every cell.",
    ),
]
Scores = Annotated[
    bool, typer.Option("--scores", help="Also write NAME-scores.npz: scores and cells' centres.")
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
    scales: ManyScales = None,
    combine: CombineBy = "max",
    boxes: Boxes = None,
    alpha: Alpha = None,
    cmap: ColourMap = "inferno",
    colour: Colour = False,
    figure: Figure = "none",
    scores: Scores = False,
    recursive: Recursive = False,
    csv: Csv = None,
    as_json: AsJson = False,
) -> None:
    """Overlay one class's heatmap on every image.

    The heatmap shows where the network sees the class. For a score map that 'fcvgg stream' wrote,
    the result is a thumbnail and a pyramidal OME-TIFF of the slide's size.
    """
    slides, others = split(images)
    found = images_in(others, recursive, own=ENDINGS)
    images = list(found)
    roots = {**{slide: slide.parent for slide in slides}, **found}
    overlays = OutputFiles(roots, output, "-heatmap.png")
    shown = show_slides(slides, target, overlays)
    if not images:
        _note_unused(context)
        exit_if_any_failed(slides, shown)
        return
    _check_scales(scale, scales, figure != "none" or scores)
    check_any_exists(images)
    net = network.load(output_stride=output_stride)
    index = _index(net, target)
    folder(output)
    opener, size_note = ImageOpener(bands, nodata), SizeNote(net)

    look: dict[str, Any] = {
        "cmap": cmap,
        "grey": not colour,
        **({} if alpha is None else {"alpha": alpha}),
    }
    further = {e: OutputFiles(roots, output, e) for e in ENDINGS[1:]}

    def show(image: Path) -> dict[str, Any]:
        path = overlays.path_for(image)
        folder(path.parent)
        source = opener.open(image)
        if scales is not None:
            prediction = net.classify(source, scales=scales)[0]
            chosen = int(prediction.argmax()) if index is None else index
            heatmap = net.heatmap(source, chosen, scales=scales, combine=combine)
            made = _Shown(image, prediction, chosen, heatmap, 1.0)
        else:
            score_map = net.score_map(source, scale=scale)
            if scale is None:
                size_note.print_once(image, score_map.input_size)
            size_note.print_if_flat(score_map)
            score_map = replace(score_map, could_have_positions=False)  # which has been said
            made = _shown(image, score_map, index)
        result = made.as_data(boxes)
        found_boxes = made.heatmap.boxes(boxes) if boxes is not None else ()
        files = [made.heatmap.save(path, boxes=found_boxes, **look)]
        if scores:
            files.append(_save_scores(score_map, further["-scores.npz"].path_for(image)))
        if figure != "none":
            drawn = _figure(figure, made, None if scales else score_map, found_boxes, look)
            files.append(save_figure(drawn, further["-figure.png"].path_for(image)))
        result["files"] = list(map(str, files))
        if as_json:
            say_json(result, indent=None)
        elif csv is None:
            say(made.in_words(boxes, len(found_boxes)))
            for file in files:
                say_wrote(file)
        return result

    from fcvgg.results.figures import save_figure

    written = for_each_image(images, "heatmaps", show)
    if csv is not None:
        names = ("image", "index", "category", "probability", "peak", "y", "x")
        write_csv(csv, names, ([row[name] for name in names] for row in written))
    exit_if_any_failed([*slides, *images], [*shown, *written])


def _check_scales(scale: int | None, scales: Any, of_one_map: bool) -> None:
    if scale is not None and scales is not None:
        raise ArgumentError("--scale and --scales exclude each other; give one of the two")
    if scales is not None and of_one_map:
        raise ArgumentError("--figure and --scores show one score map; use --scale, not --scales")


@dataclass(frozen=True)
class _Shown:
    """A heatmap and what is said of it; `factor` is how much smaller it is than the image."""

    image: Path
    prediction: Tensor
    index: int
    heatmap: Heatmap
    factor: float

    def as_data(self, threshold: float | None) -> dict[str, Any]:
        y, x = (int(n * self.factor) for n in self.heatmap.peak)
        data: dict[str, Any] = {
            "image": str(self.image),
            "index": self.index,
            "category": self.heatmap.label,
            "probability": float(self.prediction[self.index]),
            "peak": float(self.heatmap.values[self.heatmap.peak]),
            "y": y,
            "x": x,
        }
        if threshold is not None:
            names = ("top", "left", "bottom", "right", "score")
            factors = (self.factor,) * 4
            data["boxes"] = [
                dict(zip(names, (*(round(n * f) for n, f in zip(box, factors)), box[4])))
                for box in self.heatmap.boxes(threshold)
            ]
        return data

    def in_words(self, threshold: float | None, boxes: int) -> str:
        found = self.as_data(None)
        counted = "" if threshold is None else f", {boxes} boxes of {threshold:g} and more"
        return (
            f"{self.image}: {found['category']} ({self.index}), probability "
            f"{found['probability']:.3f} averaged over the image, peak {found['peak']:.3f} at "
            f"(y, x) = ({found['y']}, {found['x']}){counted}"
        )


def _shown(image: Path, score_map: ScoreMap, index: int | None) -> _Shown:
    """The heatmap of a class, the top one if None, at a size that fits into memory."""
    from fcvgg.results.interpolation import MOST_PIXELS

    prediction = score_map.predict()
    chosen = int(prediction.argmax()) if index is None else index
    height, width = score_map.image_size
    factor = max((height * width / MOST_PIXELS) ** 0.5, 1)
    heatmap = score_map.heatmap(chosen, size=(int(height / factor), int(width / factor)))
    return _Shown(image, prediction, chosen, heatmap, factor)


def _figure(
    kind: str, made: _Shown, score_map: Any, boxes: Sequence[Any], look: dict[str, Any]
) -> Any:
    if kind == "classes":
        return score_map.plot()
    if kind == "labels":
        return score_map.plot_labels().figure
    return made.heatmap.plot(boxes=boxes, **look).figure


def _save_scores(score_map: ScoreMap, path: Path) -> Path:
    """Write scores ``(K, h, w)``, the cells' centres in the image's pixels, and the class names."""
    import numpy as np

    rows, cols = score_map.scores.shape[1:]
    ends = zip(score_map.image_size, score_map.input_size)
    down, across = (pixels / run for pixels, run in ends)
    geometry = score_map.geometry
    y = [(geometry.centre_of(i, 0)[0] + 0.5) * down - 0.5 for i in range(rows)]
    x = [(geometry.centre_of(0, j)[1] + 0.5) * across - 0.5 for j in range(cols)]
    named: dict[str, Any] = (
        {} if score_map.categories is None else {"categories": list(score_map.categories)}
    )
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, scores=score_map.scores.float().cpu().numpy(), y=y, x=x, **named)
    return path


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
