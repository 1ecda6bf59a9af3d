"""Turn a classifier into the equivalent fully convolutional network.

`convert` reads as the method does: unwrap the model, find its native size, share its parameters,
capture its graph, rewrite the head, and check the result against the source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from math import gcd
from typing import Any

import torch
from torch import nn

from fcvgg.capture import capture, sharing_twin
from fcvgg.errors import ArgumentError, ConversionError, GeometryError, InputSizeError
from fcvgg.geometry import Pair, checked_size
from fcvgg.layers import is_leaf, rule_for
from fcvgg.native_size import infer_input_size
from fcvgg.network import FullyConvolutional
from fcvgg.preprocessing import Preprocess
from fcvgg.program import Program
from fcvgg.rewriting import Rewriter
from fcvgg.verification import check


def convert(
    model: nn.Module,
    *,
    input_size: int | Iterable[int] | None = None,
    output_stride: int | None = None,
    padding: str = "valid",
    copy: bool = False,
    verify: bool = True,
    preprocess: Preprocess | str | None = None,
    categories: Sequence[str] | str | os.PathLike[str] | None = None,
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
        preprocess: how ``uint8`` images become the model's input, or the name of a preset such as
            ``"imagenet"``; see `Preprocess.preset`.
        categories: the K class names, or the path of a file with one name per line.
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
    try:
        program = _rewritten(
            model, sharing_twin(model, own=copy), size, output_stride, padding == "same"
        )
    except InputSizeError as error:
        if input_size is None:
            raise
        raise _with_fitting_size(error, model) from error
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
    _rewritten(model, sharing_twin(model), _checked_input_size(input_size), None, False)


def _rewritten(
    model: nn.Module, modules: nn.Module, size: Pair, output_stride: int | None, same: bool
) -> Program:
    program = Rewriter(capture(model, size, is_leaf), modules, output_stride, same).run(rule_for)
    stride = program.geometry.stride
    if output_stride is not None and stride != (output_stride, output_stride):
        native = _rewritten(model, sharing_twin(model), size, None, same)
        *others, last = map(str, output_strides(native))
        listed = f"{', '.join(others)} or {last}" if others else last
        raise ConversionError(
            f"output_stride must be one that the network's layers come to, {listed}, "
            f"got {output_stride}"
        )
    return program


def output_strides(program: Program) -> list[int]:
    """The output strides that a network of native stride can be converted with, its own first."""
    layers = {program.geometry.upto(record.step).stride for record in program.records}

    def reached(axis: int, wanted: int) -> int:
        stride = before = 1
        for after in sorted({strides[axis] for strides in layers}):
            stride *= gcd(after // before, max(wanted // stride, 1))
            before = after
        return stride

    largest = max(program.geometry.stride)
    found = (n for n in range(largest, 0, -1) if largest % n == 0)
    return [n for n in found if all(reached(axis, n) == n for axis in (0, 1))]


def _with_fitting_size(error: InputSizeError, model: nn.Module) -> InputSizeError:
    """The error about the size that a caller gave, with one that fits."""
    reason = str(error).partition("; pass ")[0]
    try:
        height, width = infer_input_size(model)
    except ConversionError:
        return InputSizeError(f"{reason}; pass another input_size")
    fitting = height if height == width else (height, width)
    return InputSizeError(f"{reason}; pass input_size={fitting}, which the head is made for")


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
