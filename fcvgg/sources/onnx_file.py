"""Reading an ONNX file as a torch classifier.

The graph is read with the `onnx` package, nodes without the image in them are computed once with
its reference implementation, and every other node becomes a step of an `Assembled` model by the
table in `fcvgg.sources.onnx_operators`. (`onnx2torch`, the kept library for this, cannot be used:
it passes shapes on as tensors, which torch.fx cannot trace, and wants every weight stored.)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fcvgg.errors import FcvggError, LoadError, MissingExtraError, one_line
from fcvgg.geometry import checked_size
from fcvgg.preprocessing import decoded_preprocess
from fcvgg.sources.extras import imported
from fcvgg.sources.onnx_graph import EXTRA, MALFORMED, Graph, OnnxModel
from fcvgg.sources.onnx_operators import OPERATORS

SUFFIX = ".onnx"

PREPROCESS_KEY = "fcvgg.preprocess"
"""Metadata: a `fcvgg.Preprocess` as JSON, by `preprocessing.encoded_preprocess`."""
CATEGORIES_KEY = "fcvgg.categories"
"""Metadata: JSON list of the class names."""
INPUT_SIZE_KEY = "fcvgg.input_size"
"""Metadata: JSON list ``[h, w]``, the native size."""
ACTIVATION_KEY = "fcvgg.activation"
"""Metadata: JSON of what the scores are, as `fcvgg.convert` takes it."""

_TOLERANCE = 1e-4
"""Of the largest score, between the model read here and onnxruntime: two libraries' rounding."""


def read(
    path: str | Path, input_size: Any = None, check: bool = True
) -> tuple[OnnxModel, dict[str, Any]]:
    """The classifier in an ONNX file, and what the file says of its input.

    Where onnxruntime is installed and the native size is known, both are run on noise.

    Args:
        input_size: the native size, where the file leaves it open.
        check: whether to compare with onnxruntime.

    Raises:
        LoadError: if the file is absent, broken, holds an operator that is not supported (which is
            named), or gives other scores than in onnxruntime.
        MissingExtraError: if the package onnx is not installed.
    """
    path = Path(path)
    proto = _parsed(path)
    try:
        graph = Graph(proto, path)
        model = graph.assembled(OPERATORS)
    except MALFORMED as error:
        raise LoadError(
            f"{path} is no readable ONNX file: {type(error).__name__}: {one_line(error)}"
        ) from error
    settings = _settings(proto, graph)
    size = settings.get("input_size") if input_size is None else input_size
    if check and size is not None:
        _compare_with_runtime(path, graph, model, size)
    return model, settings


def _parsed(path: Path) -> Any:
    onnx = imported("onnx", EXTRA)
    if not path.is_file():
        raise LoadError(f"there is no ONNX file {path}")
    try:
        proto = onnx.load(path)
        if proto.functions:
            proto = imported("onnx.inliner", EXTRA).inline_local_functions(proto)
    except FcvggError:
        raise
    except Exception as error:
        raise LoadError(f"{path} is no readable ONNX file: {one_line(error)}") from error
    if not proto.graph.node or not proto.graph.output:
        raise LoadError(f"{path} is no readable ONNX file: it holds no graph")
    return proto


def _settings(proto: Any, graph: Graph) -> dict[str, Any]:
    """What the file says: its own metadata where fcvgg wrote it, and the input's fixed size."""
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    settings: dict[str, Any] = {}
    if graph.size is not None:
        settings["input_size"] = graph.size
    try:
        if PREPROCESS_KEY in metadata:
            settings["preprocess"] = decoded_preprocess(json.loads(metadata[PREPROCESS_KEY]))
        if CATEGORIES_KEY in metadata:
            names = json.loads(metadata[CATEGORIES_KEY])
            settings["categories"] = None if names is None else tuple(str(name) for name in names)
        if INPUT_SIZE_KEY in metadata:
            height, width = json.loads(metadata[INPUT_SIZE_KEY])
            settings["input_size"] = (int(height), int(width))
        settings["activation"] = json.loads(metadata.get(ACTIVATION_KEY, "null"))
    except (ValueError, TypeError, AttributeError, FcvggError) as error:
        raise LoadError(f"{graph.path}: its fcvgg metadata is broken: {one_line(error)}") from error
    return {key: value for key, value in settings.items() if value is not None}


@torch.no_grad()
def _compare_with_runtime(path: Path, graph: Graph, model: OnnxModel, size: Any) -> None:
    """Raise if onnxruntime, where it is installed and runs the file, gives other scores."""
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    numbers = torch.Generator().manual_seed(0)
    try:
        shape = (graph.batch or 1, channels, *checked_size(size))
        images = torch.rand(shape, generator=numbers)
        got = model(images)
    except (*MALFORMED, FcvggError):
        return  # convert will say what is wrong with the size or the model
    feed = images.permute(0, 2, 3, 1) if graph.channels_last else images
    try:
        expected = _run(path, feed.numpy())
    except MissingExtraError:
        return
    except Exception as error:  # onnxruntime's own: they have no class in common
        warnings.warn(
            f"{path} was read, but not compared with onnxruntime, which cannot run it: "
            f"{one_line(error)}",
            stacklevel=2,
        )
        return
    for theirs, ours in zip(expected, got if isinstance(got, tuple) else (got,)):
        scale = max(float(np.abs(theirs).max()), 1e-30)
        apart = float(np.abs(theirs.reshape(-1) - ours.numpy().reshape(-1)).max()) / scale
        if not apart <= _TOLERANCE:
            raise LoadError(
                f"{path} was read, but its scores differ from onnxruntime's by {apart:.1e} of the "
                f"largest (tolerance {_TOLERANCE:.0e}); please report the file"
            )


def _run(path: Path, images: Any) -> Sequence[Any]:
    runtime = imported("onnxruntime", EXTRA)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(images)})  # type: ignore[no-any-return]
