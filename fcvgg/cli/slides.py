"""``fcvgg heatmap`` on what ``fcvgg stream`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fcvgg.cli.console import complain, folder, say, say_wrote
from fcvgg.cli.outputs import OutputFiles


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
            _show(path, target, overlays.path_for(path), pyramids.path_for(path))
            shown.append(path)
        except FcvggError as error:
            complain(error)
    return shown


def _show(path: Path, target: str | None, overlay: Path, pyramid: Path) -> None:
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
