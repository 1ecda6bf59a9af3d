"""The classifier that fine-tuning starts from, with its preprocessing and native size."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fcvgg.conversion import unwrapped
from fcvgg.errors import ArgumentError, ConversionError, InputSizeError, PreprocessError
from fcvgg.geometry import Pair, checked_size
from fcvgg.images.pipelines import check_preprocess, given_preprocess, is_pipeline
from fcvgg.images.preprocessing import Preprocess, PreprocessLike
from fcvgg.loading import read_source
from fcvgg.rewriting.capture import capture, input_channels
from fcvgg.rewriting.native_size import infer_input_size
from fcvgg.rewriting.rules import is_known
from fcvgg.sources import torchvision_model
from fcvgg.support.module_state import dtype_of


@dataclass(frozen=True)
class Pretrained:
    """A trained classifier in float32.

    Attributes:
        model: the classifier; not changed by fine-tuning.
        name: the name or path that it was loaded by, or its class.
        preprocess: how images become its input.
        native: its native size ``(h, w)``.
    """

    model: nn.Module
    name: str
    preprocess: Preprocess
    native: Pair


def load_pretrained(
    model: nn.Module | str | Path,
    weights: str | Path | None,
    preprocess: PreprocessLike | None,
    size: int | Pair | None,
) -> Pretrained:
    """The classifier of a name, a file or a module.

    Args:
        model: a classifier, or a name or file as for `fcvgg.load`.
        weights: as for `fcvgg.load`.
        preprocess: how images become input, or a function that gives it for a number of channels
            and, if it takes a second argument, the source's preprocessing; the source's when None.
        size: the native size of a classifier whose native size cannot be inferred.

    Raises:
        ArgumentError: if `model` is a bundle.
        PreprocessError: if the preprocessing is unknown.
        InputSizeError: if the native size cannot be inferred and `size` is None.
    """
    by_channels: Any = preprocess if callable(preprocess) and not is_pipeline(preprocess) else None
    if by_channels is None:
        check_preprocess(preprocess)
    known: dict[str, Any] = {}
    if isinstance(model, (str, Path)):
        name = str(model)
        if name not in ("demo", *torchvision_model.names()) and Path(name).is_dir():
            raise ArgumentError(
                f"model must be a classifier, got {name}, a converted network; its head cannot be "
                "replaced, so pass its source model, or its name and weights"
            )
        classifier, known = read_source(name, None, weights)
    else:
        classifier = unwrapped(model)
        name = type(classifier).__name__
    channels = input_channels(classifier)
    if by_channels is not None:
        arguments = channels, known.get("preprocess")
        preprocess = by_channels(*arguments[: len(signature(by_channels).parameters)])
    used = given_preprocess(preprocess, channels) or known.get("preprocess")
    if used is None:
        raise PreprocessError(
            f"the preprocessing of {name} is unknown; pass preprocess=fcvgg.Preprocess(mean, std), "
            "the one it was trained with"
        )
    if dtype_of(classifier) != torch.float32:  # as images and new layers are
        classifier = copy.deepcopy(classifier).float()
    native = _native(classifier, known.get("input_size"), size)
    _check_output(classifier, native)
    return Pretrained(classifier, name, used, native)


def _check_output(model: nn.Module, size: Pair) -> None:
    """Refuse a container of scores before anything is trained.

    Raises:
        ArgumentError: if the model returns anything but one tensor.
    """
    with suppress(ConversionError):  # which the new head or the conversion reports in its own words
        outputs = capture(model, size, is_known).outputs
        if not outputs.is_tensor:
            raise ArgumentError(
                f"model must return one tensor of scores to be trained, got a {outputs.kind} from "
                f"{type(model).__name__}; wrap it in a module that returns the scores alone"
            )


def _native(model: nn.Module, known: int | Pair | None, size: int | Pair | None) -> Pair:
    if known is not None:
        return checked_size(known)
    try:
        return infer_input_size(model)
    except InputSizeError:
        if size is None:
            raise InputSizeError(
                f"the native size of {type(model).__name__} cannot be inferred; pass "
                "size=, the size to train at"
            ) from None
        return checked_size(size)
