"""``fcvgg heatmap`` on what ``fcvgg stream`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fcvgg.cli.console import folder, say, say_wrote


def show_slides(paths: Sequence[Path], target: str | None, output: Path) -> list[Path]:
    """Write the pictures of those paths that are streamed score maps; the others are returned."""
    from fcvgg.streaming.score_store import is_store, open_store
    from fcvgg.streaming.slide_maps import SlideMap

    others = []
    for path in paths:
        if not is_store(path):
            others.append(path)
            continue
        slide = SlideMap(open_store(path), _target(target))
        heatmap = slide.heatmap(slide.source())
        height, width = slide.image_size
        say(
            f"{path}: {heatmap.label} ({slide.index}), {height}x{width} pixels, "
            f"highest probability {float(slide.cells.max()):.3f}"
        )
        say_wrote(heatmap.save(folder(output) / f"{path.stem}-heatmap.png"))
        say_wrote(slide.save_pyramid(output / f"{path.stem}-heatmap.ome.tif"))
    return others


def _target(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text
