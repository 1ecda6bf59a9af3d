"""int8: a converted network quantised by NNCF and run by OpenVINO.

The quantiser learns the range of every map from images, and rounds weights and maps to 8 bits.
A few layers suffer from that more than all others together, the first depthwise ones of a small
network above all. Where the two networks name other classes too often, those layers stay in
float32: every layer is quantised alone, and the ones that change the scores most are left out,
half as many again at each try.
"""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fcvgg.errors import EquivalenceError
from fcvgg.optimization.engines import EngineNetwork, openvino_runner
from fcvgg.optimization.onednn import has_amx
from fcvgg.optimization.samples import expected_maps, middle, sample_images
from fcvgg.results.agreement import Agreement, agreement_of
from fcvgg.rewriting.outputs import flattened
from fcvgg.support.extras import imported

if TYPE_CHECKING:
    from fcvgg.network import FullyConvolutional

_EXTRA = "quantize"

_MOST_PASSES = 64
"""Passes in which ranges are learnt: every image as it is, then more of `_VIEWS` of all."""

_RANKING_IMAGES = 4
"""Images on which layers are quantised alone."""

_RANKING_PIXELS = 1 << 16
"""Pixels of the middle of each, two to four windows of 224."""

_VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda image: image,
    lambda image: image.flip(3),
    lambda image: image.rot90(1, (2, 3)),
    lambda image: image.roll(1, 1),
    lambda image: -image,
    lambda image: 1.5 * image,
    lambda image: -1.5 * image,
)
"""What is made of an image ``(1, C, H, W)`` to learn ranges, which a few images do not show.

EfficientNet-Lite0, calibrated on three of six photographs: the share of cells of the other three
that keep their class rises from 0.69 to 0.86, and from 0.91 to 0.97 the other way round.
"""

_LAYERS = ("Convolution", "GroupConvolution", "MatMul")
"""OpenVINO's types of operations with weights that are quantised."""

_QUIET = Lock()
"""Held while NNCF's settings are changed, or two threads would restore what the other has set."""


def quantized(
    net: FullyConvolutional, calibrate: Any, least_agreement: float | None
) -> tuple[EngineNetwork, Agreement]:
    """A network in int8 with float32 images and scores, and how far it is from `net`.

    Args:
        net: in float32 on the CPU.
        calibrate: images as for ``net.classify``.
        least_agreement: the share of cells that must keep their top class, or None.

    Raises:
        EquivalenceError: if fewer do, with up to half of the layers, or the only one, in float32.
        ImageError: if there is no image, or one cannot be used.
        MissingExtraError: if OpenVINO, NNCF or what exports to ONNX is not installed.
    """
    _import_packages()
    images = sample_images(net, calibrate, "calibrate")
    expected = expected_maps(net, images, "calibrate")
    images = [torch.nan_to_num(image, 0, 0, 0) for image in images]
    with tempfile.TemporaryDirectory(prefix="fcvgg-") as folder:
        path = net.export(Path(folder) / "network.onnx")
        exact = imported("openvino", _EXTRA).Core().read_model(str(path))
        rounded = _rounded(
            exact, _views(images), lambda of: net._padded(of[1](of[0])).contiguous().numpy()
        )
        layers = {layer.get_friendly_name(): _weights_of(layer) for layer in _layers_of(exact)}

        def attempt(kept: Sequence[str]) -> tuple[EngineNetwork, Agreement]:
            run = openvino_runner(_with_layers_in_float(rounded, kept), torch.float32)
            network = EngineNetwork(run, len(net.program.classes))
            got = [flattened(network(image))[0] for image in images]
            names = tuple(layers[name] for name in kept)
            agreement = agreement_of(
                expected, got, net._activations, len(layers), names, of_calibration=True
            )
            return network, agreement

        ranked: list[str] = []
        best: Agreement | None = None
        for count in _tries(len(layers)):
            if count == 1:
                parts = [net._padded(middle(x, _RANKING_PIXELS)).numpy() for x in _spread(images)]
                ranked = _ranked(exact, rounded, list(layers), parts)
            made, agreement = attempt(ranked[:count])
            if least_agreement is None or agreement.top1 >= least_agreement:
                return made, agreement
            if best is None or agreement.top1 > best.top1:
                best = agreement
    raise EquivalenceError(
        f"the int8 network must give least_agreement={least_agreement:g} of the cells the plain "
        f"network's top class, got {best}; calibrate on more images such as it will see, "
        "lower least_agreement (None takes any), or use torch.bfloat16 or torch.float32"
    )


def _tries(layers: int) -> list[int]:
    """How many layers are left in float32 at each try: none, 1, 2, 3, 4, 6, ... and half at last.

    Of one layer that is the only one.
    """
    counts, most = [0], max(layers // 2, 1)
    while counts[-1] < most:
        counts.append(min(most, counts[-1] + max(counts[-1] // 2, 1)))
    return counts


def _views(images: Sequence[Tensor]) -> list[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """What ranges are learnt from, and how it is made of an image; view by view."""
    return list(islice(((image, view) for view in _VIEWS for image in images), _MOST_PASSES))


def _spread(images: Sequence[Tensor]) -> list[Tensor]:
    count = min(len(images), _RANKING_IMAGES)
    return [images[i * len(images) // count] for i in range(count)]


def _rounded(model: Any, images: Sequence[Any], read: Callable[[Any], Any]) -> Any:
    """A copy of a model of OpenVINO in which all weights and maps are rounded to 8 bits.

    `read` makes the array of each image, one at a time.

    Symmetric ranges ("performance") alone: with zero points OpenVINO 2026.4 crashes when images of
    another size come. Bias correction changes nothing here. Where sums of products of 8 bits
    overflow, NNCF rounds weights to 7.
    """
    nncf = imported("nncf", _EXTRA)
    ranges = imported("nncf.quantization.range_estimator", _EXTRA).RangeEstimatorParametersSet
    with _quiet():
        return nncf.quantize(
            model.clone(),
            nncf.Dataset(images, read),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(images),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix="disable" if _sums_have_32_bits() else "enable",
                disable_bias_correction=True,
                activations_range_estimator_params=ranges.MINMAX,
                backend_params={"compress_weights": False},
            ),
        )


def _ranked(exact: Any, rounded: Any, layers: Sequence[str], images: Sequence[Any]) -> list[str]:
    """Names of the layers, the one first whose rounding alone changes the scores most."""
    expected = _scores_of(exact, images)
    errors = {}
    for name in layers:
        got = _scores_of(_with_one_layer_rounded(rounded, name), images)
        errors[name] = sum(
            float(((a - b) ** 2).mean() / (a**2).mean().clip(min=1e-30))
            for a, b in zip(expected, got)
        )
    return sorted(layers, key=lambda name: -errors[name])


def _scores_of(model: Any, images: Sequence[Any]) -> list[Any]:
    """The maps of all images and outputs."""
    run = openvino_runner(model, torch.float32)
    return [scores for image in images for scores in run(image)]


def _layers_of(model: Any) -> list[Any]:
    """The operations with constant weights, in the order in which they run."""
    operations = (op for op in model.get_ordered_ops() if op.get_type_name() in _LAYERS)
    return [op for op in operations if _weights_of(op)]


def _weights_of(layer: Any) -> str:
    """The name of a layer's weights, or "" if they are computed from images."""
    node = layer.input_value(1).get_node()
    while node.get_type_name() in ("Reshape", "Convert", "Transpose", "FakeQuantize"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return ""
    return str(node.get_friendly_name()).removesuffix(".weight")


def _with_one_layer_rounded(model: Any, name: str) -> Any:
    """A copy of a quantised model in which only what a layer reads is rounded."""
    copy = model.clone()
    layer = next(op for op in copy.get_ordered_ops() if op.get_friendly_name() == name)
    rounded = {op.get_friendly_name() for _, op in _rounders_above(layer)}
    for op in copy.get_ordered_ops():
        if op.get_type_name() == "FakeQuantize" and op.get_friendly_name() not in rounded:
            for target in op.output(0).get_target_inputs():
                target.replace_source_output(op.input_value(0))
    return copy


def _with_layers_in_float(model: Any, names: Sequence[str]) -> Any:
    """A copy of a quantised model in which the layers of these names read what is not rounded."""
    copy = model.clone()
    for layer in copy.get_ordered_ops():
        if layer.get_friendly_name() in names:
            for target, rounder in _rounders_above(layer):
                target.replace_source_output(rounder.input_value(0))
    return copy


def _rounders_above(layer: Any) -> list[tuple[Any, Any]]:
    """What rounds a layer's weights and map, each after the input that reads it.

    Between it and the layer there may be padding or a pool, unless others read from those too.
    """
    found, waiting = [], list(layer.inputs())
    while waiting:
        target = waiting.pop()
        source = target.get_source_output()
        node = source.get_node()
        if node.get_type_name() == "FakeQuantize":
            found.append((target, node))
        elif node.get_type_name() not in _LAYERS and len(source.get_target_inputs()) == 1:
            waiting += node.inputs()
    return found


def _sums_have_32_bits() -> bool:
    """Whether the processor adds up products of 8 bits in 32, so that no sum overflows.

    x86 does with VNNI or AMX alone: without, it adds pairs of products in 16 bits, which saturate.
    Where torch does not know the processor, the answer is no.
    """
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # none in torch 2.7
    machine = str(known.get("architecture") or platform.machine()).lower()
    if machine not in ("x86_64", "amd64", "x86", "i386", "i686", "unknown", ""):
        return True
    if not known:
        return has_amx() or bool(getattr(torch.cpu, "_is_vnni_supported", bool)())
    return any(known.get(name) for name in ("avx_vnni", "avx512_vnni", "amx_int8"))


def _import_packages() -> None:
    """Import what is needed, NNCF without reports of its use to its makers.

    Raises:
        MissingExtraError: if one is not installed.
    """
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"  # read once, where it is imported
    try:
        with _errors_alone("torch.utils.cpp_extension"):
            for package in ("openvino", "nncf", "onnx", "onnxscript"):
                imported(package, _EXTRA)
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """NNCF without messages, warnings and progress bars, for one thread at a time.

    It has no switch for the bars, which are therefore made as rich makes disabled ones.
    """
    bars = imported("nncf.common.logging.track_progress", _EXTRA)
    with _QUIET, _errors_alone("nncf", "torch.utils.cpp_extension"):
        shown = bars.Progress
        bars.Progress = lambda *of, **options: shown(*of, **{**options, "disable": True})
        try:
            yield
        finally:
            bars.Progress = shown


@contextmanager
def _errors_alone(*loggers: str) -> Iterator[None]:
    """No Python warnings, and nothing below errors of these loggers."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
