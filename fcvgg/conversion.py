"""Turn a classifier into the equivalent fully convolutional network.

`convert` reads as the method does: unwrap the model, find its native size, share its parameters,
capture its graph, rewrite the head, and check the result against the source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import gcd
from typing import Any, Literal

import torch
from torch import nn

from fcvgg.errors import ArgumentError, ConversionError, InputSizeError, check_choice, one_line
from fcvgg.geometry import Pair, checked_size
from fcvgg.images.pipelines import check_preprocess
from fcvgg.images.preprocessing import PreprocessLike
from fcvgg.names import alternatives
from fcvgg.network import FullyConvolutional
from fcvgg.rewriting.capture import Captured, capture, unfollowed_branches
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.modes import match_modes, training_mode_of
from fcvgg.rewriting.native_size import infer_input_size
from fcvgg.rewriting.outputs import flattened
from fcvgg.rewriting.program import Program, TrainingMode, same_grid
from fcvgg.rewriting.rewriter import Rewriter
from fcvgg.rewriting.rules import is_known, kind_for
from fcvgg.rewriting.rules.relatives import relative_named
from fcvgg.rewriting.size_numbers import check_numbers
from fcvgg.rewriting.twins import sharing_twin, without_wrappers
from fcvgg.support.module_state import device_of, dtype_of, evaluating, listed
from fcvgg.verification import check, check_activation


def convert(
    model: nn.Module,
    *,
    input_size: int | Iterable[int] | None = None,
    output_stride: int | None = None,
    padding: Literal["valid", "same"] | None = None,
    head: Literal["window", "position"] | None = None,
    copy: bool = False,
    verify: bool = True,
    preprocess: PreprocessLike | None = None,
    categories: Sequence[str] | str | os.PathLike[str] | None = None,
    activation: str | None = None,
    in_channels: int | None = None,
) -> FullyConvolutional:
    """Turn a trained classifier into the equivalent fully convolutional network.

    Fully connected layers become convolutions with the same weights, a global pool becomes a pool
    over the window, and layers on vectors become layers on channels (VGG paper, section 3.2,
    https://arxiv.org/abs/1409.1556). At the native size the network gives the model's scores; on a
    larger image it gives a map of them.

    Args:
        model: a classifier ``(N, C, H, W) -> (N, K)`` with a fully connected or global-pool head,
            or a tuple of such outputs. A network that `convert` or `fcvgg.load` gave gets another
            output stride or padding. It is not changed.
        input_size: the native size, an int or ``(h, w)``. None infers the smallest square size at
            which the graph runs and keeps the batch; a global pool takes any size and needs it.
        output_stride: input pixels between cells, a power of two below the native stride: strides
            beyond become dilation, with the same weights. None keeps the native stride, or that of
            a network.
        padding: ``"valid"``, the default, or ``"same"`` to pad the first layer of the head so that
            the map has as many cells as the features before it. None keeps that of a network.
        head: ``"window"``, the default, scores a whole native window in every cell. ``"position"``
            scores every position of the features before a global average pool (class activation
            maps): at the native size the average of the map, or of the native window's positions
            where `output_stride` puts others in between, is the model's score. The scores are those
            before a softmax or sigmoid that ends the model.
        copy: own the parameters. By default the network shares their storage: no memory is spent,
            and training or loading one changes both. A flatten in another order than torch's takes
            a permuted copy of that one weight, which then is not shared; ``net.half()`` and
            ``net.to()`` another dtype or device end the sharing.
        verify: run model and network at the native size, and the network on a shifted larger
            input, and raise on a mismatch. The report is kept as ``net.equivalence``.
        preprocess: how ``uint8`` images become the model's input: a `fcvgg.Preprocess`; the name of
            a preset such as ``"imagenet"`` (`Preprocess.preset`); transforms of torchvision
            (``weights.transforms()``, ``Compose`` of either version); timm's data configuration or
            transforms; or an image processor of transformers. Of the last three, the resize and
            crop are kept apart, as `Preprocess.view`: images keep their size.
        categories: the K class names, or the path of a file with one name per line.
        activation: what the scores are; read off the graph when None. ``"logits"`` go through a
            softmax (one class: a sigmoid), ``"independent_logits"`` through a sigmoid for each
            class (trained by BCEWithLogitsLoss), ``"probabilities"`` and ``"log_probabilities"``
            are after a softmax, ``"sigmoid"`` is after a sigmoid for each class, and ``"values"``
            (regression) have no probabilities. Scores in a range that the graph does not show are
            tried on the images that `verify` runs, and on larger values. ``"unknown"`` is found
            where the model computes on after its softmax or sigmoid.
        in_channels: the channels of the images; found by what the graph does with them when None.

    Raises:
        ConversionError: if the model cannot be converted exactly; the message names the layer.
        EquivalenceError: if `verify` finds that the two disagree.
        PreprocessError: if `preprocess` is none of these, or has a random or unknown step.
        ArgumentError: if an option is not what it must be, or scores are outside the range that
            `activation` says.
    """
    check_preprocess(preprocess)
    described: Any = {"preprocess": preprocess, "categories": categories, "activation": activation}
    if isinstance(model, FullyConvolutional):
        _check_undecided(input_size=input_size, in_channels=in_channels)
        how = {"output_stride": output_stride, "padding": padding, "copy": copy, "verify": verify}
        return _converted_again(model, {"head": head, **how, **described})
    padding, head = padding or "valid", head or "window"
    _check_options(padding, head, output_stride, in_channels)
    model = unwrapped(model)
    form = {"same": padding == "same", "positions": head == "position"}
    size, program = _program_of(model, input_size, in_channels, output_stride, copy, **form)
    net = FullyConvolutional(program, input_size=size, source=type(model).__name__, **described)
    if verify:
        _verify(model, net)
    return net


def _verify(model: nn.Module, net: FullyConvolutional) -> None:
    """Check a network and what its scores are said to be; the report is kept with it."""
    _check_data(model)
    net.equivalence = check(model, net)
    check_activation(net)


def _program_of(
    model: nn.Module,
    input_size: int | Iterable[int] | None,
    in_channels: int | None,
    output_stride: int | None,
    copy: bool,
    **form: bool,
) -> tuple[Pair, Program]:
    """The native size of a model, and the program that its graph at that size becomes."""
    with relative_named(model):
        size = _native_size(model, input_size, in_channels)
        with _fitting_size_named(model, input_size, in_channels):
            captured = capture(model, size, is_known, in_channels)
            modules = sharing_twin(model, own=copy)
            return size, _rewrite(captured, model, modules, output_stride, **form)


def _check_undecided(**given: Any) -> None:
    """Refuse what was decided when a network was converted."""
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(
                f"{name} must be left out for a converted network, which was made for one, got "
                f"{value!r}; convert its source model"
            )


def _converted_again(net: FullyConvolutional, options: dict[str, Any]) -> FullyConvolutional:
    """The network with another output stride or padding, from the classifier that it stands for.

    Args:
        options: of `convert`; the network's own where they are None.
    """
    classifier, geometry = net.classifier(), net.geometry
    kept = net.head == "window" and any(axis.context_start for axis in geometry.axes)
    own = {
        "output_stride": geometry.stride[0] if len(set(geometry.stride)) == 1 else None,
        "padding": "same" if kept else "valid",
        "head": net.head,
    }
    given = {name: value for name, value in options.items() if value is not None}
    known = {"preprocess": net.preprocess, "categories": net.categories, **own, **given}
    size = geometry.crop if net.head == "window" else net.input_size
    if options["verify"]:
        _check_stands_for(net, classifier, size)
    made = convert(classifier, input_size=size, in_channels=net.in_channels, **known)
    if known["padding"] == "same":
        # a head that begins with a pool may look like one that begins with the layer after it
        as_before: dict[str, Any] = {
            "input_size": size,
            "in_channels": net.in_channels,
            "verify": False,
            **own,
        }
        like = convert(classifier, **as_before) if kept else made
        padded = any(axis.context_start for axis in made.geometry.axes)
        if not padded or (kept and not same_grid(like.geometry, geometry)):
            raise ConversionError(
                f"padding='same' cannot be made of the head of {net.source}, which begins with a "
                "pool; pass padding='valid', or convert its source model"
            )
    program = replace(
        made.program,
        aliases=made.program.aliases | net.program.aliases,
        outputs=net.program.outputs,
        training_mode=net.program.training_mode,
    )
    again = FullyConvolutional(
        program,
        input_size=net.input_size,
        preprocess=made.preprocess,
        categories=made.categories,
        source=net.source,
    )
    if known["head"] == net.head:  # else they may be those before a softmax
        again._activations = net._activations
    if options["activation"] is not None:
        again.activation = options["activation"]
    again.equivalence = made.equivalence
    return again


@torch.no_grad()
def _check_stands_for(net: FullyConvolutional, classifier: nn.Module, size: Pair) -> None:
    """Refuse a classifier that does not give a network's scores.

    Raises:
        ConversionError: if it does not run at the size of a cell's crop, or gives other scores.
    """
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(2, net.in_channels, *size, generator=noise)
    images = images.to(device_of(net), dtype_of(net))
    with evaluating(net), evaluating(classifier):
        expected = net.native_scores(net(images))
        try:
            found = flattened(classifier(images))[0]
        except RuntimeError as error:
            raise ConversionError(
                f"{net.source} must give one cell on the crop that a cell stands for to be "
                f"converted again, got {one_line(error)}; convert its source model"
            ) from error
    for a, b in zip(expected, found):
        if a.shape != b.shape or float((a - b).abs().max()) > 1e-3 * float(a.abs().max()):
            raise ConversionError(
                f"{net.source} cannot be converted again: its layers give other scores on the crop "
                "that a cell stands for; convert its source model"
            )


def check_convertible(model: nn.Module, input_size: int | Iterable[int]) -> None:
    """Raise what `convert` would raise about a model's layers; its weights are not looked at.

    Raises:
        ConversionError: if the model cannot be converted exactly; the message names the layer.
    """
    model = unwrapped(model)
    with relative_named(model):
        captured = capture(model, _native_size(model, input_size), is_known)
        _rewrite(captured, model, sharing_twin(model))


def _rewrite(
    captured: Captured,
    model: nn.Module,
    modules: nn.Module,
    output_stride: int | None = None,
    **form: bool,
) -> Program:
    """The program of a captured model, which calls `modules` in place of the model's own.

    Raises:
        ConversionError: if a layer cannot be rewritten exactly, the layers do not come to
            `output_stride`, or the model trains in a way that its graph does not show.
    """
    captured.require_channels()
    build = MapBuilder(captured, modules, output_stride, **form)
    rewriter = Rewriter(captured, build)
    program = rewriter.run(kind_for)
    if rewriter.crop != captured.size:
        # numbers that the model computed from its features' size hold at the native size only
        check_numbers(captured, model, rewriter.crop)
    if output_stride is not None and program.geometry.stride != (output_stride, output_stride):
        # rewritten at the native stride, the network tells which strides its layers come to
        again = capture(model, captured.size, is_known, captured.channels)
        native = _rewrite(again, model, sharing_twin(model), **form)
        raise ConversionError(
            "output_stride must be one that the network's layers come to, "
            f"{alternatives(output_strides(native))}, got {output_stride}"
        )
    match_modes(program.network, model)
    unfollowed = (*unfollowed_branches(model, captured, is_known), *build.mode_dependent)
    training_mode = training_mode_of(model, program.network, unfollowed)
    _check_followed(model, training_mode)
    return replace(program, training_mode=training_mode)


def _check_followed(model: nn.Module, training_mode: TrainingMode) -> None:
    places = [n for n in training_mode.unfollowed if model.get_submodule(n).training]
    if places:
        raise ConversionError(
            f"{listed(places, type(model).__name__)} computes something else in training mode, in "
            "which the model is; call model.eval() before converting"
        )


def _check_data(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ConversionError(
                f"{name} is on the meta device, without data; move the model with model.to_empty("
                "device='cpu') and load its weights before converting, or pass verify=False"
            )


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


def _native_size(
    model: nn.Module, input_size: int | Iterable[int] | None, in_channels: int | None = None
) -> Pair:
    if input_size is None:
        return infer_input_size(model, in_channels)
    return checked_size(input_size, "input_size", InputSizeError)


@contextmanager
def _fitting_size_named(
    model: nn.Module, input_size: Any, in_channels: int | None
) -> Iterator[None]:
    """Errors about the size that a caller gave name one that fits."""
    try:
        yield
    except InputSizeError as error:
        if input_size is None:
            raise
        reason = str(error).partition("; pass ")[0]
        try:
            height, width = infer_input_size(model, in_channels)
        except ConversionError:
            raise InputSizeError(f"{reason}; pass another input_size") from error
        fitting = height if height == width else (height, width)
        raise InputSizeError(
            f"{reason}; pass input_size={fitting}, which the head is made for"
        ) from error


def _check_options(
    padding: str, head: str, output_stride: int | None, in_channels: int | None
) -> None:
    check_choice("padding", padding, ("valid", "same"))
    check_choice("head", head, ("window", "position"))
    if output_stride is not None and (not isinstance(output_stride, int) or output_stride < 1):
        raise ArgumentError(f"output_stride must be a positive integer, got {output_stride!r}")
    if in_channels is not None and (type(in_channels) is not int or in_channels < 1):
        raise ArgumentError(f"in_channels must be a positive integer, got {in_channels!r}")


def unwrapped(model: Any) -> nn.Module:
    """The model inside DataParallel, compiled wrappers and ultralytics' ``YOLO``."""
    model = without_wrappers(model)
    if isinstance(model, FullyConvolutional):
        raise ConversionError("the model is fully convolutional already; pass its source model")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError(
            "the model is scripted (torch.jit), and its Python code is gone; "
            "pass the nn.Module it was scripted from"
        )
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        remedy = "load names and files with fcvgg.load"
        if isinstance(model, torch.export.ExportedProgram):
            remedy = "pass the nn.Module it was exported from"
        raise ConversionError(f"model must be a torch.nn.Module, got {what}; {remedy}")
    return model
