"""What `speed.py` runs side by side: fcvgg, and what a user could pick instead.

A contender is made from the classifier and gives a function of images ``(N, C, H, W)`` whose result
is the score map ``(N, K, h, w)``, or None where its result is of another kind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fcvgg.conversion import convert
from fcvgg.errors import FcvggError, MissingExtraError
from fcvgg.network import FullyConvolutional
from fcvgg.optimization.networks import optimize
from fcvgg.optimization.onednn import has_bfloat16
from fcvgg.support.extras import imported

Run = Callable[[Tensor], Any]
Make = Callable[[nn.Module, int, int], Run]

_CROPS = 8
"""Crops of the sliding window that are classified at a time."""


class ContenderError(FcvggError):
    """A contender failed in one case, or its process ended."""


@dataclass(frozen=True)
class Contender:
    """One way to score an image densely.

    Attributes:
        name: in tables.
        make: gives what runs, from the classifier, its native size and the images' size; raises
            `FcvggError` where it cannot.
        comparable: whether the result is the same score map, so that its error means something.
        native_only: whether it takes images of the native size only.
        by_crops: whether it classifies the crop of every cell.
    """

    name: str
    make: Make
    comparable: bool = True
    native_only: bool = False
    by_crops: bool = False


def _plain(model: nn.Module, native: int, size: int) -> Run:
    return _converted(model, native)


def _optimised(**options: Any) -> Make:
    def make(model: nn.Module, native: int, size: int) -> Run:
        if options.get("dtype") == torch.bfloat16 and not has_bfloat16():
            raise FcvggError("the processor has no bfloat16")
        if options.get("engine"):
            imported("onnxscript", "onnx")
        net = optimize(_converted(model, native), size=size, **options)
        net.release()
        return net

    return make


def _int8(model: nn.Module, native: int, size: int) -> Run:
    """Every layer in int8: what random weights lose does not say what trained ones do."""
    net = optimize(
        _converted(model, native),
        dtype=torch.int8,
        calibrate=_noise(size),
        least_agreement=None,
    )
    net.release()
    return net


def _openvino_int8(model: nn.Module, native: int, size: int) -> Run:
    """The exported file, quantised by NNCF as it comes and run by OpenVINO."""
    imported("onnxscript", "onnx")
    nncf, openvino = (imported(name, "quantize") for name in ("nncf", "openvino"))
    with tempfile.TemporaryDirectory() as folder:
        path = _converted(model, native).export(Path(folder) / "network.onnx")
        exported = openvino.Core().read_model(str(path))
        network = nncf.quantize(exported, nncf.Dataset([_noise(size).numpy()]))
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.Core().compile_model(network, "CPU", options)
    return lambda images: torch.from_numpy(compiled(images.numpy())[compiled.outputs[0]].copy())


def _noise(size: int) -> Tensor:
    """An image to calibrate on, of the kind that is timed."""
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def _converted(model: nn.Module, native: int) -> FullyConvolutional:
    return convert(model, input_size=native, verify=False)


def _classifier(model: nn.Module, native: int, size: int) -> Run:
    return model


def _usual_recipe(model: nn.Module, native: int, size: int) -> Run:
    """FC weights copied into convolutions by hand, as in most repositories."""
    features, linears = _parts(model)
    channels = [layer.out_channels for layer in features.modules() if isinstance(layer, nn.Conv2d)]
    layers: list[nn.Module] = []
    for i, linear in enumerate(linears):
        kernel = 1 if i else round((linear.in_features / channels[-1]) ** 0.5)
        conv = nn.Conv2d(linear.in_features // kernel**2, linear.out_features, kernel)
        conv.weight.data.copy_(linear.weight.data.view_as(conv.weight))
        conv.bias.data.copy_(linear.bias.data)  # type: ignore[union-attr]
        layers += [conv, nn.ReLU(inplace=True), nn.Dropout()]
    return nn.Sequential(features, *layers[:-2]).eval()


def _timm(model: nn.Module, native: int, size: int) -> Run:
    """The VGG of timm, which has convolutions for fc6 and fc7; its last layer on every cell."""
    timm = imported("timm", "bench")
    features, linears = _parts(model)
    depth = {8: "vgg11", 10: "vgg13", 13: "vgg16", 16: "vgg19"}
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in features.modules())
    widths = [linear.in_features for linear in linears]
    if convolutions not in depth or widths != [25088, 4096, 4096]:
        raise FcvggError("it is not one of the VGGs that timm has")
    net = timm.create_model(depth[convolutions], num_classes=linears[-1].out_features).eval()
    net.features.load_state_dict(features.state_dict())
    for target, linear in zip((net.pre_logits.fc1, net.pre_logits.fc2, net.head.fc), linears):
        target.weight.data.copy_(linear.weight.data.view_as(target.weight))
        target.bias.data.copy_(linear.bias.data)

    def run(images: Tensor) -> Tensor:
        maps = net.pre_logits(net.forward_features(images))
        return net.head.fc(maps.movedim(1, -1)).movedim(-1, 1)

    return run


def _sliding_window(model: nn.Module, native: int, size: int) -> Run:
    """The classifier on the crop of every cell."""
    net = _converted(model, native)

    def run(images: Tensor) -> Tensor:
        rows, cols = net.output_size(images.shape[2:])
        boxes = [net.geometry.window_of(row, col) for row in range(rows) for col in range(cols)]
        crops = [images[:, :, top:bottom, left:right] for top, left, bottom, right in boxes]
        scores = [
            model(torch.cat(crops[i : i + _CROPS])).unflatten(0, (-1, len(images)))
            for i in range(0, len(crops), _CROPS)
        ]
        return torch.cat(scores).movedim(0, -1).unflatten(-1, (rows, cols))

    return run


def _monai(model: nn.Module, native: int, size: int) -> Run:
    """MONAI's sliding window, which blends the scores of the windows over each position."""
    inferers = imported("monai.inferers", "bench")
    stride = _converted(model, native).geometry.stride[0]
    side = native // stride

    def spread(crops: Tensor) -> Tensor:
        return model(crops)[:, :, None, None].repeat(1, 1, side, side)

    def run(images: Tensor) -> Any:
        return inferers.sliding_window_inference(
            images, (native, native), _CROPS, spread, overlap=1 - stride / native
        )

    return run


def _parts(model: nn.Module) -> tuple[nn.Module, list[nn.Linear]]:
    features = getattr(model, "features", None)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if features is None or len(linears) != 3:
        raise FcvggError(f"{type(model).__name__} is not torchvision's VGG, which it is made for")
    return features, linears


PLAIN = "fcvgg"

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(PLAIN, _plain),
        Contender("fcvgg optimised", _optimised()),
        Contender("fcvgg optimised bf16", _optimised(dtype=torch.bfloat16)),
        Contender("fcvgg optimised int8", _int8),
        Contender("onnxruntime", _optimised(engine="onnxruntime")),
        Contender("OpenVINO f32", _optimised(engine="openvino")),
        Contender("OpenVINO bf16", _optimised(engine="openvino", dtype=torch.bfloat16)),
        Contender("OpenVINO int8", _openvino_int8),
        Contender("usual recipe", _usual_recipe),
        Contender("timm", _timm),
        Contender("FC model", _classifier, native_only=True),
        Contender("FC sliding window", _sliding_window, comparable=False, by_crops=True),
        Contender("MONAI sliding window", _monai, comparable=False, by_crops=True),
    )
}
"""By name, in the order of the table."""


def classifier(model: str) -> tuple[nn.Module, int]:
    """A torchvision model with random weights, the same at every call, and its native size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = torchvision.models.get_model(model, weights=None).eval()
    return source, 299 if model == "inception_v3" else 224


def made(name: str, model: nn.Module, native: int, size: int) -> Run:
    """What a contender runs on images of a size.

    Raises:
        FcvggError: that says why there is none.
    """
    try:
        return CONTENDERS[name].make(model, native, size)
    except MissingExtraError:
        raise
    except (FcvggError, KeyError) as error:
        raise FcvggError(f"not for this model: {error}") from error
