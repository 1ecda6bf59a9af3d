"""``fcvgg heatmap``: an overlay for every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from fcvgg.choices import BoxKind, Combine, PolygonKind
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
    from fcvgg.results.boxes import ScoredBox
    from fcvgg.results.heatmap import Heatmap
    from fcvgg.results.score_map import ScoreMap

_LISTED = 5
"""Classes of a map of labels that are named, the most frequent ones."""

MANY_WINDOWS = 2.5
"""Windows along the smaller side above which the network sees an image in parts, not whole."""

NAME = "heatmap"
ENDINGS = ("-heatmap.png", "-figure.png", "-scores.npz", "-heatmap.geojson")
_ENDINGS_OF_MAPS = ("-heatmap.ome.tif", "-labels.png", "-labels.ome.tif")
EXAMPLES = (
    "fcvgg heatmap dog.jpg",
    "fcvgg heatmap *.jpg --target 'golden retriever' --output heatmaps",
    "fcvgg heatmap dog.jpg --weights vgg16.pth --scale 512",
    "fcvgg heatmap photos --scales 256,384 --boxes 0.5 --csv peaks.csv",
    "fcvgg heatmap dog.jpg --boxes regions,0.8 --legend",
    "fcvgg heatmap scores.zarr --target tumour",
    "fcvgg heatmap rose.jpg -w own.pth --categories names.txt --preprocess tf",
    "fcvgg heatmap portrait.jpg --model demo --target face --scale 160",
)


@dataclass(frozen=True)
class _Boxes:
    """Which boxes are drawn: arguments of `Heatmap.boxes`."""

    kind: BoxKind = "windows"
    threshold: float = 0.5

    def of(self, heatmap: Heatmap, iou_threshold: float | None) -> list[ScoredBox]:
        limit = {} if iou_threshold is None else {"iou_threshold": iou_threshold}
        return heatmap.boxes(self.threshold, kind=self.kind, **limit)


def wanted_boxes(text: str) -> _Boxes:
    """Boxes from ``0.5``, ``regions``, or ``regions,0.8``."""
    kind, share = _kind_and_share(text, get_args(BoxKind))
    return _Boxes(cast(BoxKind, kind), share)


def wanted_polygons(text: str) -> dict[str, Any]:
    """Options of `ScoreMap.to_geojson` from ``0.5``, ``cells``, or ``regions,0.8``."""
    kind, share = _kind_and_share(text, get_args(PolygonKind))
    return {"kind": kind, "threshold": share}


def _kind_and_share(text: str, kinds: Sequence[str]) -> tuple[str, float]:
    """A kind, the first one if none is given, and a probability."""
    kind, _, threshold = text.partition(",") if text[:1].isalpha() else (kinds[0], "", text)
    try:
        share = float(threshold or _Boxes.threshold)
    except ValueError:
        share = -1
    if kind not in kinds or not 0 <= share <= 1:
        raise typer.BadParameter(
            f"{text!r} is not {', '.join(kinds)} or a probability in [0, 1]; expected such as "
            "regions,0.8"
        )
    return kind, share


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
    Any,
    typer.Option(
        "--boxes",
        metavar="KIND,P",
        parser=wanted_boxes,
        help="Draw boxes where the class has at least probability P: windows (of cells) or regions "
        "(of connected pixels). P alone draws windows, and KIND alone takes 0.5.",
        show_default=False,
    ),
]
Geojson = Annotated[
    Any,
    typer.Option(
        "--geojson",
        metavar="KIND,P",
        parser=wanted_polygons,
        help="Also write NAME-heatmap.geojson for QuPath and geographic systems: regions or cells "
        "where the class has at least probability P. P alone gives regions, and KIND alone takes "
        "0.5.",
        show_default=False,
    ),
]
IouThreshold = Annotated[
    float | None,
    typer.Option(
        "--iou-threshold",
        metavar="X",
        min=0,
        max=1,
        help="Largest intersection over union of a window with a more probable one.",
        show_default="that of Heatmap.boxes",
    ),
]
Legend = Annotated[
    bool, typer.Option("--legend", help="Write the heatmap with its class, peak and colour bar.")
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
    geojson: Geojson = None,
    iou_threshold: IouThreshold = None,
    legend: Legend = False,
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
    the result is a thumbnail and a pyramidal OME-TIFF of the slide's size; of the class of every
    cell where the map holds those, or with --figure labels.
    """
    slides, others = split(images)
    found = images_in(others, recursive, own=(*ENDINGS, *_ENDINGS_OF_MAPS))
    images = list(found)
    roots = {**{slide: slide.parent for slide in slides}, **found}
    overlays = OutputFiles(roots, output, "-heatmap.png")
    shown = show_slides(slides, target, overlays, geojson, labels=figure == "labels")
    if not images:
        _note_unused(context)
        exit_if_any_failed(slides, shown)
        return
    _check_scales(scale, scales, figure != "none" or scores or geojson is not None)
    check_any_exists(images)
    net = network.load(output_stride=output_stride)
    if net.activation == "values" and (scales is not None or boxes is not None):
        raise ArgumentError("--scales and --boxes are for probabilities; leave them out for values")
    maker = _Maker(net, _index(net, target), ImageOpener(bands, nodata), scale, scales, combine)
    look = {"cmap": cmap, "grey": not colour} | ({} if alpha is None else {"alpha": alpha})
    folder(output)
    further = [OutputFiles(roots, output, ending) for ending in ENDINGS[1:]]
    pictures = _Pictures((overlays, *further), look, legend, figure, scores, geojson)

    def show(image: Path) -> dict[str, Any]:
        folder(overlays.path_for(image).parent)
        made = maker.heatmap_of(image)
        if boxes is not None and isinstance(made, _Shown):
            made = replace(made, boxes=boxes.of(made.heatmap, iou_threshold))
        files = pictures.save(made)
        result = {**made.as_data(), "files": list(map(str, files))}
        if as_json:
            say_json(result)
        elif csv is None:
            say(made.in_words(boxes))
            for file in files:
                say_wrote(file)
        return result

    written = for_each_image(images, "heatmaps", show)
    if csv is not None:
        of_values = net.activation == "values"
        measured = ["value", "lowest", "highest"] if of_values else ["probability", "peak"]
        names = ["image", "index", "category", *measured, "y", "x"]
        write_csv(csv, names, ([row[name] for name in names] for row in written))
    exit_if_any_failed([*slides, *images], [*shown, *written])


def _check_scales(scale: int | None, scales: Any, of_one_map: bool) -> None:
    if scale is not None and scales is not None:
        raise ArgumentError("--scale and --scales exclude each other; give one of the two")
    if scales is not None and of_one_map:
        raise ArgumentError(
            "--figure, --scores and --geojson show one score map; use --scale, not --scales"
        )


class _Maker:
    """Makes a class's heatmap of every image, the top class's where `index` is None."""

    def __init__(
        self,
        net: FullyConvolutional,
        index: int | None,
        opener: ImageOpener,
        scale: int | None,
        scales: Sequence[int] | None,
        combine: Combine,
    ):
        self.net, self.index, self.opener = net, index, opener
        self.scale, self.scales, self.combine = scale, scales, combine
        self.size_note = SizeNote(net)

    def heatmap_of(self, image: Path) -> _Shown | _Values:
        source = self.opener.open(image)
        if self.scales is not None:
            prediction = self.net.classify(source, scales=self.scales)[0]  # (K,)
            chosen = int(prediction.argmax()) if self.index is None else self.index
            heatmap = self.net.heatmap(source, chosen, scales=self.scales, combine=self.combine)
            return _Shown(image, prediction, chosen, heatmap)
        score_map = self.net.score_map(source, scale=self.scale)
        if self.scale is None:
            self.size_note.print_once(image, score_map.input_size)
        self.size_note.print_if_flat(score_map)
        score_map = replace(score_map, could_have_positions=False)  # which has been said
        if score_map.activation == "values":
            score_map.require_data()
            return _Values(image, score_map, self.index)
        return _shown(image, score_map, self.index)


@dataclass(frozen=True)
class _Shown:
    """A heatmap and what is said of it; `factor` is how much smaller it is than the image."""

    image: Path
    prediction: Tensor
    index: int
    heatmap: Heatmap
    factor: float = 1.0
    score_map: ScoreMap | None = None
    boxes: Sequence[ScoredBox] | None = None

    def as_data(self) -> dict[str, Any]:
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
        if self.boxes is not None:
            names = ("top", "left", "bottom", "right", "score")
            data["boxes"] = [
                dict(zip(names, (*(round(n * self.factor) for n in box[:4]), box.score)))
                for box in self.boxes
            ]
        return data

    def in_words(self, wanted: _Boxes | None) -> str:
        found, counted = self.as_data(), ""
        if wanted is not None and self.boxes is not None:
            noun = "box" if len(self.boxes) == 1 else "boxes"
            counted = f", {len(self.boxes)} {noun} of {wanted.threshold:g} and more"
        return (
            f"{self.image}: {found['category']} ({self.index}), probability "
            f"{found['probability']:.3f} averaged over the image, peak {found['peak']:.3f} at "
            f"(y, x) = ({found['y']}, {found['x']}){counted}"
        )


@dataclass(frozen=True)
class _Values:
    """What a regression gives for an image; `index` is of one output, None for the first few."""

    image: Path
    score_map: ScoreMap
    index: int | None

    def figure(self) -> Any:
        from fcvgg.results.figures import value_grid

        if self.index is None:
            return self.score_map.plot()
        return value_grid(self.score_map, [self.index])

    def as_data(self) -> dict[str, Any]:
        from fcvgg.results.figures import output_name

        index = self.index or 0
        known = self.score_map.has_data
        cells = self.score_map.scores[index].float().cpu()  # (h, w)
        place = int(cells.masked_fill(~known, float("-inf")).argmax())
        row, col = divmod(place, cells.shape[1])
        rows, cols = _centres(self.score_map)
        return {
            "image": str(self.image),
            "index": index,
            "category": output_name(self.score_map, index),
            "value": float(self.score_map.average()[index]),
            "lowest": float(cells[known].min()),
            "highest": float(cells[known].max()),
            "y": int(rows[row]),
            "x": int(cols[col]),
            "values": self.score_map.average().tolist(),
        }

    def in_words(self, _: _Boxes | None) -> str:
        found = self.as_data()
        more = len(found["values"]) - 1
        others = f" ({more} more in the picture, or --target)" if more and not self.index else ""
        return (
            f"{self.image}: {found['category']} ({found['index']}), value {found['value']:.4g} "
            f"averaged over the image, from {found['lowest']:.4g} to {found['highest']:.4g} at "
            f"(y, x) = ({found['y']}, {found['x']}){others}"
        )


def _shown(image: Path, score_map: ScoreMap, index: int | None) -> _Shown:
    """The heatmap of a class, the top one if None, at a size that fits into memory."""
    from fcvgg.results.interpolation import MOST_PIXELS

    prediction = score_map.predict()
    chosen = int(prediction.argmax()) if index is None else index
    height, width = score_map.image_size
    factor = max((height * width / MOST_PIXELS) ** 0.5, 1)
    heatmap = score_map.heatmap(chosen, size=(int(height / factor), int(width / factor)))
    return _Shown(image, prediction, chosen, heatmap, factor, score_map)


@dataclass(frozen=True)
class _Pictures:
    """Writes what is shown of an image to files whose names end as `ENDINGS`.

    Attributes:
        files: the names for each of `ENDINGS`.
        look: options of `Heatmap.overlay`.
        legend: write the overlay with its legend.
        figure: what the figure shows, or "none".
        scores: write the scores.
        geojson: options of `ScoreMap.to_geojson`, to write polygons.
    """

    files: tuple[OutputFiles, ...]
    look: dict[str, Any]
    legend: bool
    figure: str
    scores: bool
    geojson: dict[str, Any] | None

    def save(self, made: _Shown | _Values) -> list[Path]:
        from fcvgg.results.figures import save_figure

        overlay, figure, scores, polygons = (each.path_for(made.image) for each in self.files)
        if isinstance(made, _Values):
            written = [save_figure(made.figure(), overlay)]
            return written + [_save_scores(made.score_map, scores)] * self.scores
        look = {**self.look, "boxes": made.boxes or ()}
        written = [made.heatmap.save(overlay, legend=self.legend, **look)]
        if self.scores and made.score_map is not None:
            written.append(_save_scores(made.score_map, scores))
        if self.geojson is not None and made.score_map is not None:
            made.score_map.to_geojson(polygons, target=made.index, **self.geojson)
            written.append(polygons)
        if self.figure != "none":
            written.append(save_figure(self._drawn(made, look), figure))
        return written

    def _drawn(self, made: _Shown, look: dict[str, Any]) -> Any:
        if self.figure == "heatmap" or made.score_map is None:
            return made.heatmap.plot(**look).figure
        if self.figure == "classes":
            return made.score_map.plot()
        return made.score_map.plot_labels().figure


def _save_scores(score_map: ScoreMap, path: Path) -> Path:
    """Write scores ``(K, h, w)``, the cells' centres in the image's pixels, and the class names."""
    import numpy as np

    y, x = _centres(score_map)
    named: dict[str, Any] = (
        {} if score_map.categories is None else {"categories": list(score_map.categories)}
    )
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, scores=score_map.scores.float().cpu().numpy(), y=y, x=x, **named)
    return path


def _centres(score_map: ScoreMap) -> tuple[list[float], list[float]]:
    """The rows and columns of the cells' centres, in the image's pixels."""
    rows, cols = score_map.scores.shape[1:]
    ends = zip(score_map.image_size, score_map.input_size)
    down, across = (pixels / run for pixels, run in ends)
    geometry = score_map.geometry
    y = [(geometry.centre_of(i, 0)[0] + 0.5) * down - 0.5 for i in range(rows)]
    x = [(geometry.centre_of(0, j)[1] + 0.5) * across - 0.5 for j in range(cols)]
    return y, x


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
        if parameter.name not in ("images", "target", "output", "figure", "geojson")
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


def show_slides(
    slides: Sequence[Path],
    target: str | None,
    overlays: OutputFiles,
    geojson: dict[str, Any] | None = None,
    labels: bool = False,
) -> list[Path]:
    """Write the pictures of streamed score maps; those that cannot be used are reported.

    Args:
        slides: the maps.
        target: a class; None for the most probable one, or for all where the map holds labels.
        overlays: the pictures' names.
        labels: show the class of every cell.

    Returns:
        the maps that were shown.
    """
    from fcvgg.errors import FcvggError

    polygons = OutputFiles(slides, overlays.folder, "-heatmap.geojson")
    shown = []
    for path in slides:
        try:
            _show_slide(path, target, overlays, labels)
            if geojson is not None:
                _save_polygons(path, target, polygons.path_for(path), geojson)
            shown.append(path)
        except FcvggError as error:
            complain(error)
    return shown


def _save_polygons(path: Path, target: str | None, file: Path, options: dict[str, Any]) -> None:
    from fcvgg.categories import class_given
    from fcvgg.streaming.score_store import open_store

    store = open_store(path)
    given = None if target is None else class_given(target, store.description["categories"])
    store.to_geojson(file, target=given, **options)
    say_wrote(file)


def _show_slide(path: Path, target: str | None, overlays: OutputFiles, labels: bool) -> None:
    import numpy as np
    from matplotlib.figure import Figure

    from fcvgg.categories import class_given
    from fcvgg.errors import ImageError
    from fcvgg.results.drawing import share_text
    from fcvgg.results.figures import save_figure
    from fcvgg.streaming.score_store import open_store
    from fcvgg.streaming.slide_maps import SlideLabels, SlideMap

    store = open_store(path)
    kind, names = store.description["kind"], store.description["categories"]
    slide: SlideLabels | SlideMap
    if labels or (target is None and kind != "scores"):
        slide = SlideLabels(store)
        best = [f"{name} {share_text(share)}" for name, share in slide.shares()]
        found = ", ".join(best[:_LISTED]) + (", ..." if len(best) > _LISTED else "")
    else:
        slide = SlideMap(store, None if target is None else class_given(target, names))
        found = f"highest probability {float(np.nanmax(slide.cells)):.3f}"
        if kind == "argmax":
            found = f"the best class of {float(np.nanmean(slide.cells)):.1%} of the cells"
        found = f"{slide.label} ({slide.index}), {found}"
    try:
        source = slide.source()
    except ImageError as error:
        complain(f"{error}; the overlay is drawn without the image")
        source = None
    height, width = slide.image_size
    say(f"{path}: {height}x{width} pixels, {found}")
    overlay = overlays.path_for(path)
    folder(overlay.parent)
    if isinstance(slide, SlideLabels):
        overlay = overlay.with_name(overlay.name.replace("-heatmap.", "-labels."))
        drawn: Any = slide.plot(source, make=Figure).figure
        say_wrote(save_figure(drawn, overlay))
    else:
        say_wrote(slide.heatmap(source).save(overlay))
    say_wrote(slide.save_pyramid(overlay.with_name(f"{overlay.stem}.ome.tif")))
