"""Reading an ONNX file as a torch classifier.

The graph is read with the `onnx` package, nodes without the image in them are computed once with
its reference implementation, and every other node becomes a step of an `Assembled` model by the
table in `fcvgg.sources.onnx_operators`. (`onnx2torch`, the kept library for this, cannot be used:
it passes shapes on as tensors, which torch.fx cannot trace, and wants every weight stored.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fcvgg.errors import (
    FcvggWarning,
    GeometryError,
    LoadError,
    MissingExtraError,
    one_line,
)
from fcvgg.geometry import checked_size
from fcvgg.images.preprocessing import decoded_preprocess
from fcvgg.names import readable
from fcvgg.serialization.runtime import onnx_runner
from fcvgg.serialization.shape_budget import check_affordable
from fcvgg.sources.onnx_constants import EXTRA
from fcvgg.sources.onnx_graph import Graph, OnnxModel
from fcvgg.sources.onnx_operators import OPERATORS
from fcvgg.support import untrusted
from fcvgg.support.extras import imported
from fcvgg.support.memory_text import size_text

SUFFIX = ".onnx"

PREPROCESS_KEY = "fcvgg.preprocess"
"""Metadata: a `fcvgg.Preprocess` as JSON, by `preprocessing.encoded_preprocess`."""
CATEGORIES_KEY = "fcvgg.categories"
"""Metadata: JSON list of the class names."""
INPUT_SIZE_KEY = "fcvgg.input_size"
"""Metadata: JSON list ``[h, w]``, the native size."""
TAKES_KEY = "fcvgg.takes"
"""Metadata: ``"images"``, or ``"pixels"`` where the file preprocesses."""
ACTIVATION_KEY = "fcvgg.activation"
"""Metadata: JSON of what the scores are, as `fcvgg.convert` takes it."""

_EXTERNAL_TWICE = 4
"""How many times the tensors of a file may name the same bytes of another one."""

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
    with untrusted.reading(path, "an ONNX file"):
        proto = _parsed(path)
        graph = Graph(proto, path)
        model = graph.assemble(OPERATORS)
    settings = _settings(proto, graph)
    size = settings.get("input_size") if input_size is None else input_size
    if check and size is not None:
        _compare_with_runtime(proto, graph, model, size)
    return model, settings


def _parsed(path: Path) -> Any:
    onnx = imported("onnx", EXTRA)
    if not path.is_file():
        raise LoadError(f"{path} must be an ONNX file, got none of that name")
    proto = onnx.load(path, load_external_data=False)
    _load_external_data(proto, path)
    if proto.functions:
        _check_expansion(proto, path)
        proto = imported("onnx.inliner", EXTRA).inline_local_functions(proto)
    if not proto.graph.node or not proto.graph.output:
        raise LoadError("its graph is empty")
    untrusted.check_count(len(proto.graph.node), f"{path}: the number of nodes")
    return proto


def _load_external_data(proto: Any, path: Path) -> None:
    """Read the tensors that lie in files of the same folder, if these hold what is claimed."""
    helper = imported("onnx.external_data_helper", EXTRA)
    external = [t for t in _tensors_in(proto.graph) if helper.uses_external_data(t)]
    external += [t for f in proto.functions for t in _tensors_in(f) if helper.uses_external_data(t)]
    if not external:
        return
    claimed = 0
    sizes: dict[Path, int] = {}
    # many tensors may name the same bytes of one file, so what they claim is added up
    for tensor in external:
        info = helper.ExternalDataInfo(tensor)
        file = path.parent / info.location
        try:
            untrusted.check_regular(file, within=path.parent)
        except OSError as error:
            raise LoadError(f"{path} lacks the file of its weights, {file}: {error}") from error
        sizes[file] = file.stat().st_size
        claimed += info.length if info.length is not None else sizes[file] - (info.offset or 0)
    allowed = _EXTERNAL_TWICE * sum(sizes.values())
    if claimed > allowed:
        raise LoadError(
            f"{path} must take at most {size_text(allowed)} from the files of its "
            f"weights, got {size_text(claimed)}"
        )
    helper.load_external_data_for_model(proto, str(path.parent))


def _tensors_in(graph: Any) -> Iterator[Any]:
    """The tensors of a graph or function, those of its nodes' attributes and graphs included."""
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        yield from getattr(current, "initializer", ())
        for node in current.node:
            for attribute in node.attribute:
                yield from (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else ()))
                graphs = [attribute.g] if attribute.HasField("g") else []
                waiting += [*graphs, *attribute.graphs]


def _check_expansion(proto: Any, path: Path) -> None:
    """Refuse functions that call each other until their nodes, put in place, are too many."""
    functions = {(f.domain, f.name): f for f in proto.functions}
    expanded: dict[tuple[str, str], tuple[int, int]] = {}

    def measured(nodes: Any) -> tuple[int, int]:
        """Nodes and bytes, where the functions called are measured."""
        counts = [
            expanded.get((n.domain, n.op_type), (1, 0 if small else n.ByteSize()))
            for small, n in ((len(n.attribute) == 0, n) for n in nodes)
        ]
        return sum(n for n, _ in counts), sum(size for _, size in counts)

    # the innermost functions first: ten that call each other ten times expand to 10^10 nodes, which
    # is known from the counts alone
    waiting = dict(functions)
    while waiting:
        ready = [
            key
            for key, function in waiting.items()
            if not any((n.domain, n.op_type) in waiting for n in function.node)
        ]
        if not ready:
            raise LoadError(f"{path} has functions that call themselves")
        for key in ready:
            expanded[key] = measured(waiting.pop(key).node)
    count, size = measured(proto.graph.node)
    untrusted.check_count(count, f"{path}: the number of nodes")
    untrusted.check_claim(size, path, "nodes")


def _settings(proto: Any, graph: Graph) -> dict[str, Any]:
    """What the file says: its own metadata where fcvgg wrote it, and the input's fixed size."""
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    if metadata.get(TAKES_KEY) == '"pixels"':
        raise LoadError(
            f"{graph.path} must take preprocessed images, got one that preprocesses pixels itself; "
            "export the network without preprocess=True to load it again"
        )
    settings: dict[str, Any] = {}
    if graph.size is not None:
        settings["input_size"] = graph.size
    try:
        if PREPROCESS_KEY in metadata:
            data = untrusted.parsed_json(metadata[PREPROCESS_KEY])
            settings["preprocess"] = decoded_preprocess(data)
        if CATEGORIES_KEY in metadata:
            names = untrusted.parsed_json(metadata[CATEGORIES_KEY])
            if names is not None and not (
                isinstance(names, list) and all(isinstance(name, str) for name in names)
            ):
                raise ValueError("categories must be a list of names")
            settings["categories"] = None if names is None else tuple(names)
        if INPUT_SIZE_KEY in metadata:
            settings["input_size"] = checked_size(untrusted.parsed_json(metadata[INPUT_SIZE_KEY]))
        activation = untrusted.parsed_json(metadata.get(ACTIVATION_KEY, "null"))
        if not isinstance(activation, (str, type(None))):
            raise ValueError(f"activation must be a name, got {activation!r}")
        settings["activation"] = activation
    except Exception as error:  # metadata can be wrong in any way
        raise LoadError(f"{graph.path}: its fcvgg metadata is broken: {one_line(error)}") from error
    return {key: value for key, value in settings.items() if value is not None}


@torch.no_grad()
def _compare_with_runtime(proto: Any, graph: Graph, model: OnnxModel, size: Any) -> None:
    """Raise if onnxruntime, where it is installed and runs the file, gives other scores."""
    path = graph.path
    # whatever fails before both have given scores is for convert to report, in its own words
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    numbers = torch.Generator().manual_seed(0)
    try:
        images = (graph.batch or 1, channels, *checked_size(size))
    except GeometryError:
        return  # convert will say what is wrong with the size
    check_affordable(model, images, path)
    try:
        inputs = torch.rand(images, generator=numbers)
        got = model(inputs)
    except Exception:
        return  # convert will say what is wrong with the model
    feed = inputs.permute(0, 2, 3, 1) if graph.channels_last else inputs
    try:
        expected = _run(proto, graph, feed.numpy())
    except MissingExtraError:
        return
    except Exception as error:  # onnxruntime's own: they have no class in common
        warnings.warn(
            f"{readable(path)} was read, but not compared with onnxruntime, which cannot run it: "
            f"{one_line(error)}",
            FcvggWarning,
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


def _run(proto: Any, graph: Graph, images: Any) -> Sequence[Any]:
    """The scores of onnxruntime, which is given the nodes that they depend on alone."""
    whole = len(graph.nodes) == len(proto.graph.node)
    model = graph.path if whole else _without_others(proto, graph).SerializeToString()
    return onnx_runner(model)(images)


def _without_others(proto: Any, graph: Graph) -> Any:
    kept = [node.proto for node in graph.nodes]
    reduced = type(proto)()
    reduced.CopyFrom(proto)
    del reduced.graph.node[:]
    reduced.graph.node.extend(kept)
    outputs = [output for output in proto.graph.output if output.name in graph.outputs]
    del reduced.graph.output[:]
    reduced.graph.output.extend(outputs)
    return reduced
