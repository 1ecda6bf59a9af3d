"""The classifier that fine-tuning starts from, with its preprocessing and native size."""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fcvgg import demo
from fcvgg.errors import ArgumentError, ConversionError, InputSizeError, PreprocessError
from fcvgg.geometry import Pair, checked_size
from fcvgg.images.pipelines import check_preprocess, given_preprocess, is_pipeline
from fcvgg.images.preprocessing import Preprocess, PreprocessLike
from fcvgg.loading import load, read_source
from fcvgg.network import FullyConvolutional
from fcvgg.rewriting.capture import capture, input_channels
from fcvgg.rewriting.native_size import infer_input_size
from fcvgg.rewriting.rules import is_known
from fcvgg.serialization import hub
from fcvgg.sources import torchvision_model
from fcvgg.support.module_state import dtype_of
from fcvgg.transfer.naming import layer_names
from fcvgg.transfer.sources import source_of


@dataclass(frozen=True)
class Pretrained:
    """A trained classifier in float32.

    Attributes:
        model: the classifier; not changed by fine-tuning.
        name: the name or path that it was loaded by, or its class.
        preprocess: how images become its input.
        native: its native size ``(h, w)``.
        headless: whether its fully connected layers are random, since the source has none.
    """

    model: nn.Module
    name: str
    preprocess: Preprocess
    native: Pair
    headless: bool = False


def load_pretrained(
    model: nn.Module | str | Path,
    weights: str | Path | None,
    preprocess: PreprocessLike | None,
    size: int | Pair | None,
) -> Pretrained:
    """The classifier of a name, a file or a module.

    Args:
        model: a classifier or converted network, or a name, file or bundle as for `fcvgg.load`.
        weights: as for `fcvgg.load`.
        preprocess: how images become input, or a function that gives it for a number of channels
            and, if it takes a second argument, the source's preprocessing; the source's when None.
        size: the native size of a classifier whose native size cannot be inferred.

    Raises:
        PreprocessError: if the preprocessing is unknown.
        InputSizeError: if the native size cannot be inferred and `size` is None.
    """
    by_channels: Any = preprocess if callable(preprocess) and not is_pipeline(preprocess) else None
    if by_channels is None:
        check_preprocess(preprocess)
    known: dict[str, Any] = {}
    name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
    if isinstance(model, (str, Path)) and _is_bundle(name):
        model = load(model)
    if isinstance(model, FullyConvolutional):
        known = {"preprocess": model.preprocess, "input_size": model.input_size}
        name = model.source if name == "FullyConvolutional" else name
    if isinstance(model, (str, Path)):
        classifier, known = read_source(name, None, weights, headless=True)
    else:
        classifier = source_of(model)
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
    with_head, native = _with_head(classifier, known.get("input_size"), size)
    headless = with_head is not classifier or "headless" in known
    _check_output(with_head, native)
    return Pretrained(with_head, name, used, native, headless)


def _is_bundle(name: str) -> bool:
    named = name in (*demo.MODELS, *torchvision_model.names())
    return name.startswith(hub.PREFIX) or (not named and Path(name).is_dir())


_USUAL_SIZE = 224


def _with_head(
    model: nn.Module, known: int | Pair | None, size: int | Pair | None
) -> tuple[nn.Module, Pair]:
    """A classifier and its native size; features without a head get a linear layer on them.

    Such end in a map, or in a vector without a fully connected layer (a Keras file that was saved
    with ``include_top=False``, with and without its pool).
    """
    at = checked_size(size or known or _USUAL_SIZE)
    with suppress(ConversionError):  # what cannot be traced is reported in its own words
        captured = capture(model, at, is_known)
        results = next(n for n in captured.graph.nodes if n.op == "output").all_input_nodes
        value = results[0].meta.get("value") if captured.outputs.is_tensor else None
        ends_in_map = isinstance(value, Tensor) and value.ndim == 4 and value[0, 0].numel() > 1
        if isinstance(value, Tensor) and (
            ends_in_map or not any(x.role == "fc" for x in layer_names(model))
        ):
            head = nn.Linear(value[0].numel(), 1)
            parts = {"features": model, "flatten": nn.Flatten(), "classifier": nn.Sequential(head)}
            return nn.Sequential(OrderedDict(parts)).eval(), at
    return model, _native(model, known, size)


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
