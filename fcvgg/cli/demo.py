"""``fcvgg demo``: the packaged net on the packaged photograph, and one of ImageNet's on others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType

from fcvgg.cli.console import folder, note, say, say_wrote
from fcvgg.cli.options import OutputFolder
from fcvgg.cli.reports import ReportTable, by, equivalence_report, geometry_report, titled

if TYPE_CHECKING:
    from fcvgg.results.heatmap import Heatmap
    from fcvgg.results.score_map import ScoreMap

NAME = "demo"
EXAMPLES = ("fcvgg demo", "fcvgg demo --output pictures")

TARGET = "face"
FIGURE = "fcvgg-demo.png"
OVERLAY = "fcvgg-demo-overlay.png"
IMAGENET_FIGURE = "fcvgg-demo-imagenet.jpg"


def run(output: OutputFolder = Path()) -> None:
    """Find the face in the packaged photograph; no download needed.

    With the extra 'demo', also a cat, a cup and a rocket, by a network trained on ImageNet.
    """
    from fcvgg.demo import SCALES, demo_photograph
    from fcvgg.loading import load
    from fcvgg.results.figures import save_figure, side_by_side

    output = folder(output)
    net = load("demo")
    say(equivalence_report(net))
    say()
    say(geometry_report(net))
    say()
    photograph = demo_photograph()
    maps = {scale: net.score_map(photograph, scale=scale) for scale in SCALES}
    heatmaps = {scale: score_map.heatmap(TARGET) for scale, score_map in maps.items()}
    best = max(heatmaps, key=lambda scale: _peak(heatmaps[scale]))
    say(_report(maps, heatmaps, best))
    y, x = heatmaps[best].peak
    say(
        f"most like a {TARGET}: pixel (y, x) = ({y}, {x}), with probability "
        f"{_peak(heatmaps[best]):.3f} at scale {best}"
    )
    say_wrote(heatmaps[best].save(output / OVERLAY))
    say_wrote(save_figure(side_by_side(maps[best], TARGET), output / FIGURE))
    say()
    _show_imagenet(output)


def _show_imagenet(output: Path) -> None:
    """Find the classes of photographs with the ImageNet network, if its packages are installed."""
    from fcvgg.demo import IMAGENET, SHOWN, imagenet_photographs
    from fcvgg.errors import MissingExtraError
    from fcvgg.loading import load
    from fcvgg.results.figures import gallery, save_figure

    try:
        photographs = imagenet_photographs()
        net = load(IMAGENET, head="position")
    except MissingExtraError:
        note("pip install 'fcvgg[demo]' adds photographs of ImageNet's classes to this demo")
        return
    say(equivalence_report(net))
    say()
    maps = [net.score_map(photographs[name]) for name in SHOWN]
    rows = []
    for name, score_map in zip(SHOWN, maps):
        heatmap = score_map.heatmap(name)
        size, cells = by(score_map.image_size), by(score_map.scores.shape[1:])
        rows.append((name, size, cells, f"{_peak(heatmap):.3f}", f"{heatmap.peak}"))
    headings = ("class", "pixels", "positions", "peak", "at (y, x)")
    say(
        titled(
            "EfficientNet-Lite0's classes, in one pass each", ReportTable(headings, rows, left=1)
        )
    )
    say_wrote(save_figure(gallery(maps, SHOWN), output / IMAGENET_FIGURE))


def _peak(heatmap: Heatmap) -> float:
    return float(heatmap.values[heatmap.peak])


def _report(maps: dict[int, ScoreMap], heatmaps: dict[int, Heatmap], best: int) -> RenderableType:
    height, width = maps[best].image_size
    headings = ("smaller side", "cells", f"peak of {TARGET!r}", "at (y, x) of the photograph")
    rows = []
    for scale, heatmap in heatmaps.items():
        cells = by(maps[scale].scores.shape[1:])
        rows.append((f"{scale}", cells, f"{_peak(heatmap):.3f}", f"{heatmap.peak}"))
    marked = list(heatmaps).index(best)
    return titled(
        f"The whole photograph of {height}x{width} pixels, one pass per scale",
        ReportTable(headings, rows, left=0, marked=marked),
    )
