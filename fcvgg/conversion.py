"""Turn a classifier into the equivalent fully convolutional network.

`convert` reads as the method does: unwrap the model, find its native size, share its parameters,
capture its graph, rewrite the head, and check the result against the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcvgg.capture import capture, twin_of
from fcvgg.errors import ArgumentError, ConversionError, GeometryError, InputSizeError
from fcvgg.geometry import Pair, checked_size
from fcvgg.layers import is_leaf, rule_for
from fcvgg.network import FullyConvolutional
from fcvgg.preprocessing import Preprocess
from fcvgg.program import Program
from fcvgg.rewriting import Boundary, Rewriter
from fcvgg.verification import check

_TRIAL_SIZES = (224, 1024)
"""Sizes at which a model is traced to find its native size: the usual one, and a large one."""


def convert(
    model: nn.Module,
    *,
    input_size: int | Iterable[int] | None = None,
    output_stride: int | None = None,
    padding: str = "valid",
    copy: bool = False,
    verify: bool = True,
    preprocess: Preprocess | None = None,
    categories: Sequence[str] | None = None,
    activation: str | None = None,
) -> FullyConvolutional:
    """Turn a trained classifier into the equivalent fully convolutional network.

    Fully connected layers become convolutions with the same weights, a global pool becomes a pool
    over the window, and layers on vectors become layers on channels (VGG paper, section 3.2,
    https://arxiv.org/abs/1409.1556). At the native size the network gives the model's scores; on a
    larger image it gives a map of them.

    Args:
        model: a classifier ``(N, C, H, W) -> (N, K)`` with a fully connected or global-pool head,
            or a tuple of such outputs. It is not changed.
        input_size: the native size, an int or ``(h, w)``. None infers the smallest square size at
            which the graph runs and keeps the batch; a global pool takes any size and needs it.
        output_stride: input pixels between cells, a power of two below the native stride: strides
            beyond become dilation, with the same weights. None keeps the native stride.
        padding: ``"valid"``, or ``"same"`` to pad the first layer of the head so that the map has
            as many cells as the features before it.
        copy: own the parameters. By default the network shares their storage: no memory is spent,
            and training or loading one changes both. A flatten in another order than torch's takes
            a permuted copy of that one weight, which then is not shared; ``net.half()`` and
            ``net.to()`` another dtype or device end the sharing.
        verify: run model and network at the native size, and the network on a shifted larger
            input, and raise on a mismatch. The report is kept as ``net.equivalence``.
        preprocess: how ``uint8`` images become the model's input.
        categories: the K class names.
        activation: what the scores are, ``"logits"``, ``"probabilities"``,
            ``"log_probabilities"`` or ``"sigmoid"``; read off the graph when None, and
            ``"unknown"`` if the model computes on after its softmax or sigmoid.

    Raises:
        ConversionError: if the model cannot be converted exactly; the message names the layer.
        EquivalenceError: if `verify` finds that the two disagree.
    """
    _check_options(padding, output_stride)
    model = unwrapped(model)
    size = _checked_input_size(input_size) if input_size is not None else infer_input_size(model)
    program = _rewritten(model, _twin(model, copy), size, output_stride, padding == "same")
    net = FullyConvolutional(
        program,
        input_size=size,
        preprocess=preprocess,
        categories=categories,
        activation=activation,
        source=type(model).__name__,
    )
    if verify:
        net.equivalence = check(model, net)
    return net


def check_convertible(model: nn.Module, input_size: int | Iterable[int]) -> None:
    """Raise what `convert` would raise about a model's layers; its weights are not looked at.

    Raises:
        ConversionError: if the model cannot be converted exactly; the message names the layer.
    """
    model = unwrapped(model)
    _rewritten(model, _twin(model), _checked_input_size(input_size), None, False)


def infer_input_size(model: nn.Module) -> Pair:
    """The smallest square size at which the model's graph runs and keeps the batch.

    Raises:
        InputSizeError: if the graph does not determine it.
    """
    failure: Exception | None = None
    for trial in _TRIAL_SIZES:
        try:
            rewriter = Rewriter(capture(model, (trial, trial), is_leaf), _twin(model))
        except InputSizeError as error:
            failure = error
            continue
        try:
            rewriter.run(rule_for)
        except InputSizeError as error:
            failure = error
        if rewriter.boundary is not None:
            return _size_at(rewriter.boundary, rewriter)
    reason = f": {str(failure).partition('; pass ')[0]}" if failure else ""
    raise InputSizeError(
        f"the native size cannot be inferred from {type(model).__name__}{reason}; "
        "pass input_size=, the size it was trained at"
    )


def _size_at(boundary: Boundary, rewriter: Rewriter) -> Pair:
    """The smallest square input whose features are what the head asks for."""
    place, wants = boundary.place, boundary.wants
    if wants is None:
        raise InputSizeError(
            f"{place} takes features of any size, so the native size is not determined; "
            "pass input_size=, the size the model was trained at (often 224)"
        )
    height, width = rewriter.steps.geometry_at(boundary.cells.step).axes
    channels = boundary.cells.extent[0]

    def enough(size: int) -> bool:
        h, w = height.cells(size), width.cells(size)
        if isinstance(wants, int):
            return channels * h * w >= wants
        return h >= wants[0] and w >= wants[1]

    try:
        size = _smallest(enough)
    except GeometryError as error:
        raise InputSizeError(f"no input gives {place} its features: {error}") from error
    h, w = height.cells(size), width.cells(size)
    if (channels * h * w if isinstance(wants, int) else (h, w)) != wants:
        expected = f"{wants} features" if isinstance(wants, int) else f"features of size {wants}"
        raise InputSizeError(
            f"no square input gives {place} the {expected} it takes: {size} pixels give "
            f"{channels}x{h}x{w}; pass input_size=(height, width)"
        )
    return size, size


def _smallest(enough: Any) -> int:
    """The smallest size for which a monotone condition holds."""
    low, high = 1, 1
    while not enough(high):
        low, high = high + 1, high * 2
        if high > 1 << 20:
            raise GeometryError("the input would be larger than 1048576 pixels")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _rewritten(
    model: nn.Module, modules: nn.Module, size: Pair, output_stride: int | None, same: bool
) -> Program:
    program = Rewriter(capture(model, size, is_leaf), modules, output_stride, same).run(rule_for)
    stride = program.geometry.stride
    if output_stride is not None and stride != (output_stride, output_stride):
        raise ConversionError(
            f"output_stride={output_stride} cannot be reached: the network's strides allow "
            f"{stride}; choose a divisor of the native stride"
        )
    return program


def _check_options(padding: str, output_stride: int | None) -> None:
    if padding not in ("valid", "same"):
        raise ArgumentError(f"padding={padding!r} is unknown; expected 'valid' or 'same'")
    if output_stride is not None and (not isinstance(output_stride, int) or output_stride < 1):
        raise ArgumentError(f"output_stride={output_stride!r} is no positive integer")


def _checked_input_size(input_size: int | Iterable[int]) -> Pair:
    try:
        return checked_size(input_size)
    except (GeometryError, TypeError) as error:
        raise InputSizeError(
            f"input_size={input_size!r} is not a size; expected a positive int or (h, w)"
        ) from error


def unwrapped(model: Any) -> nn.Module:
    """The model inside DataParallel and compiled wrappers."""
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        else:
            break
    if isinstance(model, FullyConvolutional):
        raise ConversionError("the model is fully convolutional already; pass its source model")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError(
            "the model is scripted (torch.jit), and its Python code is gone; "
            "pass the nn.Module it was scripted from"
        )
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ConversionError(
            f"convert takes a torch.nn.Module, got {what}; load names and files with fcvgg.load"
        )
    return model


def _twin(model: nn.Module, own: bool = False) -> nn.Module:
    """The model's modules anew, with parameters and buffers of their own or on shared storage."""

    def data(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if own else tensor.detach()

    memo: dict[int, Any] = {
        **{id(p): nn.Parameter(data(p), p.requires_grad) for p in model.parameters()},
        **{id(b): data(b) for b in model.buffers()},
    }
    return twin_of(model, memo)
