"""Stream an image that no computer runs in one piece, and show what memory and time it took.

    python examples/gigapixel.py                   # 2048 x 2048 pixels, a minute
    python examples/gigapixel.py --side 16384      # 268 million pixels
    python examples/gigapixel.py --model vgg16 --target 'golden retriever' --memory 2GiB

The image is laid out of turned and mirrored copies of a photograph and written as a tiled TIFF.
Needs the packages of ``fcvgg[stream]``.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

import fcvgg
from fcvgg.demo import demo_photograph
from fcvgg.images.reading import read_image
from fcvgg.streaming.slide_maps import SlideMap
from fcvgg.support.atomic import atomic_file

TILE = 512


def main() -> None:
    """Make the image, stream it, write the pictures."""
    arguments = parse_arguments()
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    slide, side = folder / f"slide-{arguments.side}.tif", arguments.side
    if arguments.photo or not slide.exists():
        photograph = np.asarray(read_image(arguments.photo or demo_photograph()).convert("RGB"))
        with atomic_file(slide) as unfinished:
            tifffile.imwrite(
                unfinished,
                tiles(photograph, side),
                shape=(side, side, 3),
                dtype="uint8",
                tile=(TILE, TILE),
                photometric="rgb",
                compression="zlib",
                bigtiff=True,
            )
    print(f"{slide}: {side}x{side} pixels, {slide.stat().st_size / 1e6:.0f} MB")

    net = fcvgg.load(arguments.model)
    before, start = peak_memory(), time.perf_counter()
    out = folder / f"scores-{arguments.side}.zarr"
    store = fcvgg.stream(net, slide, out=out, memory=arguments.memory, progress=True)
    seconds, megapixels = time.perf_counter() - start, side * side / 1e6
    print(
        f"{store.array.shape} scores, {seconds:.1f} s, {seconds / megapixels:.3f} s per megapixel, "
        f"{(peak_memory() - before) / 2**20:.0f} MiB added to the process's peak"
    )
    target = arguments.target or ("face" if arguments.model == "demo" else None)
    slide_map = SlideMap(store, target)
    heatmap = slide_map.heatmap(slide_map.source())
    print(f"wrote {heatmap.save(folder / f'heatmap-{side}.png')}")
    print(f"wrote {detail(slide_map).save(folder / f'detail-{side}.png')}")
    print(f"wrote {slide_map.save_pyramid(folder / f'heatmap-{side}.ome.tif')}")


def detail(slide_map: SlideMap) -> fcvgg.Heatmap:
    """The surroundings of the highest cell, pixel by pixel."""
    row, col = np.unravel_index(slide_map.cells.argmax(), slide_map.cells.shape)
    centre = slide_map.geometry.centre_of(int(row), int(col))
    (top, bottom), (left, right) = (
        (max(min(int(place) - TILE, n - 2 * TILE), 0), min(max(int(place) + TILE, 2 * TILE), n))
        for place, n in zip(centre, slide_map.image_size)
    )
    values = slide_map.sampled(np.arange(top, bottom), np.arange(left, right))
    picture, source = None, slide_map.source()
    if source is not None:
        picture = Image.fromarray(source.read((top, bottom), (left, right)))
    return fcvgg.Heatmap(
        values, np.ones(values.shape, bool), slide_map.label, picture, chance=slide_map.chance
    )


def tiles(photograph: NDArray[Any], side: int) -> Iterator[NDArray[Any]]:
    """Tiles of a mosaic of the photograph, each place of which is turned in its own way."""
    scene = photograph[:TILE, :TILE]
    scene = np.pad(scene, [(0, TILE - n) for n in scene.shape[:2]] + [(0, 0)], mode="reflect")
    turns = np.random.default_rng(0)
    for _ in range((-(-side // TILE)) ** 2):
        turned = np.rot90(scene, int(turns.integers(4)))
        yield np.ascontiguousarray(turned[:, ::-1] if turns.integers(2) else turned)


def peak_memory() -> int:
    """The most that this process ever held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Stream an image larger than memory.")
    parser.add_argument("photo", nargs="?", help="a photograph (default: the packaged one)")
    parser.add_argument("--side", type=int, default=2048, help="pixels (%(default)s)")
    parser.add_argument("--model", default="demo", help="what fcvgg.load takes (%(default)s)")
    parser.add_argument(
        "--target",
        default=None,
        help="a class (default: the demo's face, else the best on average)",
    )
    parser.add_argument("--memory", default="512MiB", help="what may be added (%(default)s)")
    parser.add_argument("--output", default="gigapixel", help="a folder (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except fcvgg.FcvggError as error:
        sys.exit(f"error: {error}")
