"""Reading Keras files as torch classifiers: `.keras`, and `.h5` with or without an architecture.

A file is read with h5py and json alone: Keras is not imported, and nothing in the file is run.
The layers become torch layers under their own names by the table in `fcvgg.sources.keras_layers`.
Maps are kept channels first; `Flatten` restores Keras's order, height, width, channels.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torchvision

from fcvgg.errors import LoadError
from fcvgg.geometry import checked_size
from fcvgg.images.preprocessing import Preprocess
from fcvgg.sources import hdf5_file
from fcvgg.sources.assembly import scores_of
from fcvgg.sources.keras_layers import LAYERS, OPERATIONS
from fcvgg.sources.keras_model import Builder, KerasModel, Layer, Result, Value, Weights, text_of
from fcvgg.support import untrusted
from fcvgg.support.extras import imported

SUFFIXES = (".keras", ".h5", ".hdf5")
EXTRA = "keras"

CAFFE = Preprocess.preset("caffe")
"""What keras.applications' VGG16 and VGG19 were trained with."""

_APPLICATIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
"""The convolutions in each block of the models in keras.applications."""
_HEAD = ("fc1", "fc2", "predictions")
_IMAGENET_CLASSES = 1000

_MODELS = ("Sequential", "Functional", "Model")


def read(
    path: str | Path, arch: str | None = None, headless: bool = False
) -> tuple[KerasModel, dict[str, Any]]:
    """The classifier in a Keras file, and what is known of its input.

    Args:
        arch: ``"vgg16"`` or ``"vgg19"`` for a file of weights alone whose layers do not have the
            names of keras.applications.
        headless: take VGG's weights without the fully connected layers; the model gives a map.

    Raises:
        LoadError: if the file is absent, broken, holds no weights, or a layer is not supported.
        MissingExtraError: if h5py is not installed.
    """
    path = Path(path)
    with untrusted.reading(path, "a Keras file"), _opened(path) as (config, file, version):
        weights = Weights(_weights_within(file, path), str(path))
        if config is None:
            config = _application(_recognised(weights, arch, path, headless), weights)
        return _assemble(config, weights, path, version)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any] | None, Any, int]]:
    """The architecture, if the file has one, the HDF5 file of the weights, and Keras's version."""
    h5py = imported("h5py", EXTRA)
    if not path.is_file():
        raise LoadError(f"{path} must be a Keras file, got none of that name")
    config = None
    version = "3"
    content: Any = path
    allowed = untrusted.allowed_bytes(path)
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            untrusted.check_members(archive, path)
            described = untrusted.read_member(archive, "config.json", untrusted.CONFIG_BYTES)
            if "metadata.json" in archive.namelist():
                about = untrusted.read_member(archive, "metadata.json", untrusted.CONFIG_BYTES)
                version = str(untrusted.parsed_json(about).get("keras_version", version))
            content = io.BytesIO(untrusted.read_member(archive, "model.weights.h5", allowed))
        config = untrusted.parsed_json(described)
    problem = hdf5_file.check(path, allowed)
    if problem is not None:
        raise LoadError(problem)
    with h5py.File(content, "r") as file:
        if "model_config" in file.attrs:
            config = untrusted.parsed_json(text_of(file.attrs["model_config"]))
            version = text_of(file.attrs.get("keras_version", version))
        yield config, file, 2 if version.startswith(("1.", "2.")) else 3


def _weights_within(file: Any, path: Path) -> Any:
    group = file.get("model_weights", file)
    if "layer_names" in group.attrs or "layers" in group:
        return group
    raise LoadError(
        f"{path} must hold the weights of a Keras model ('model_weights', the attribute "
        f"'layer_names' or 'layers'), got {', '.join(file) or 'an empty file'}"
    )


def _assemble(
    config: Mapping[str, Any], weights: Weights, path: Path, version: int
) -> tuple[KerasModel, dict[str, Any]]:
    layers = list(islice(_layers_of(config, ()), untrusted.MOST_NODES + 1))
    untrusted.check_count(len(layers), f"{path}: the number of layers")
    builder = Builder(str(path), weights, layers, version)
    for layer in layers:
        if layer.kind not in LAYERS and layer.kind not in _MODELS:
            raise LoadError(
                f"{path}: the layer {layer} is not supported; "
                "fcvgg.sources.keras_layers.LAYERS has those that are"
            )
    image = Value("images", 4)
    outputs = _run(builder, config, (), [image], LAYERS)
    scores = []
    for i, output in enumerate(outputs):
        name = f"scores#{i}"
        builder.model.add_step(scores_of, (output.name,), name)
        scores.append(name)
    builder.model.finish(scores)
    return builder.model, _settings(layers, config, builder)


def _layers_of(config: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Layer]:
    """All layers of a model and of the models within, in order."""
    kind = config.get("class_name")
    if kind not in _MODELS:
        raise LoadError(
            f"the architecture must be one of {', '.join(_MODELS)}, since others are code, got "
            f"{kind!r}"
        )
    inner = config["config"]
    described = inner if isinstance(inner, list) else inner["layers"]  # a list before Keras 2.2.3
    previous: tuple[Any, ...] = ()
    for entry in described:
        settings = entry["config"]
        own = settings.get("name") if isinstance(settings, dict) else None
        name = str(entry.get("name") or own)
        nodes = entry.get("inbound_nodes") or [[]]
        calls = (previous,) if kind == "Sequential" else tuple(map(_arguments, nodes))
        within = settings if isinstance(settings, dict) else {}
        yield Layer((*path, name), entry["class_name"], within, calls)
        previous = (Result(name, 0),)
        if entry["class_name"] in _MODELS:
            yield from _layers_of(entry, (*path, name))


def _arguments(node: Any) -> tuple[Any, ...]:
    """What a layer is called on: results of layers, and in Keras 3 numbers, slices and the like."""
    if isinstance(node, Mapping) and "args" in node:  # Keras 3
        return tuple(_argument(value) for value in (*node["args"], *node["kwargs"].values()))
    return tuple(_results(node))


def _argument(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_argument, value))
    kind = value.get("class_name") if isinstance(value, Mapping) else None
    if kind == "__keras_tensor__":
        name, place, *_ = value["config"]["keras_history"]
        return Result(str(name), int(place))
    if kind == "__tensor__":
        return np.asarray(value["config"]["value"], dtype=np.float32)
    if kind == "__slice__":
        limits = (value["config"].get(name) for name in ("start", "stop", "step"))
        return slice(*(None if n is None else int(n) for n in limits))
    return ... if kind == "__ellipsis__" else value


def _results(nodes: Any) -> Iterator[Result]:
    """The results of layers named in a node, as Keras 2 writes it, or among a model's outputs."""
    if isinstance(nodes, list):
        if len(nodes) >= 3 and isinstance(nodes[0], str) and isinstance(nodes[1], int):
            yield Result(nodes[0], nodes[1])
        else:
            for inner in nodes:
                yield from _results(inner)


def _run(
    builder: Builder,
    config: Mapping[str, Any],
    path: tuple[str, ...],
    images: list[Value],
    table: Mapping[str, Any],
) -> list[Value]:
    """Add a model's layers in order; models within it likewise."""
    entries = config["config"] if isinstance(config["config"], list) else config["config"]["layers"]
    inside = [x for x in builder.layers if x.path[:-1] == path]
    values: dict[Result, Value] = {}
    # Keras 2 counts the places of a model from one, of which there is only one mostly
    only = {x.name: Result(x.name, 0) for x in inside if len(x.calls) == 1}
    entered = 0
    waiting = [
        (x, entry, place, _named(call, only))
        for x, entry in zip(inside, entries)
        for place, call in enumerate(x.calls)
    ]
    # a file lists the layers of a functional model in any order that Keras made them in
    while waiting:
        ready = next(
            (i for i, (*_, call) in enumerate(waiting) if values.keys() >= set(_flat(call))), None
        )
        if ready is None:
            layer, *_, call = waiting[0]
            missing = {result.layer for result in _flat(call) if result not in values}
            raise LoadError(
                f"{builder.origin}: the inputs of {layer} must be layers before it, got "
                f"{', '.join(sorted(missing))}"
            )
        layer, entry, place, call = waiting.pop(ready)
        inputs = [values[result] for result in _flat(call)]
        # the first layer of a Sequential model takes the images without an InputLayer
        if layer.kind == "InputLayer" or not inputs:
            if entered >= len(images):
                raise builder.refuse(layer, "is a second input")
            inputs = [images[entered]]
            call = (Result(layer.name, place),)
            values[call[0]] = inputs[0]
            entered += 1
        builder.begin(layer)
        if layer.kind in _MODELS:
            results = _run(builder, entry, layer.path, inputs, table)
            if len(results) != 1:
                raise builder.refuse(layer, "has several outputs")
            result = results[0]
        elif layer.kind in OPERATIONS:
            result = table[layer.kind](builder, layer, *_filled(call, values))
        else:
            result = table[layer.kind](builder, layer, *inputs)
        values[Result(layer.name, place)] = result
    if config["class_name"] == "Sequential":
        return [values[Result(inside[-1].name, 0)]]
    return [values[only.get(r.layer, r)] for r in _results(config["config"]["output_layers"])]


def _flat(call: Any) -> Iterator[Result]:
    """The results of layers among arguments."""
    if isinstance(call, Result):
        yield call
    elif isinstance(call, tuple):
        for inner in call:
            yield from _flat(inner)


def _named(call: Any, only: Mapping[str, Result]) -> Any:
    """Arguments in which each result is the one that there is of a layer called once."""
    if isinstance(call, tuple):
        return tuple(_named(inner, only) for inner in call)
    return only.get(call.layer, call) if isinstance(call, Result) else call


def _filled(call: Any, values: Mapping[Result, Value]) -> Any:
    """Arguments with values in place of results."""
    if isinstance(call, tuple):
        return tuple(_filled(inner, values) for inner in call)
    return values[call] if isinstance(call, Result) else call


def _settings(
    layers: Sequence[Layer], config: Mapping[str, Any], builder: Builder
) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    shape = _input_shape(layers, config)
    if shape is not None:
        if len(shape) != 4:
            raise LoadError(
                f"{builder.origin}: the input must have shape (N, H, W, C), got {tuple(shape)}"
            )
        if shape[1] and shape[2]:
            settings["input_size"] = checked_size(shape[1:3])
    if _is_application(layers) or _is_application(layers, headless=True):
        settings["preprocess"] = CAFFE
    if _is_application(layers):
        weights = torchvision.models.VGG16_Weights.IMAGENET1K_V1
        settings["categories"] = tuple(weights.meta["categories"])
    return settings


def _input_shape(layers: Sequence[Layer], config: Mapping[str, Any]) -> Any:
    for layer in layers:
        for key in ("batch_shape", "batch_input_shape"):
            if layer.get(key) is not None:
                return layer.get(key)
    return config.get("build_config", {}).get("input_shape")


# -- keras.applications ---------------------------------------------------------------------------


def _names(blocks: Sequence[int]) -> list[str]:
    convolutions = [
        f"block{block}_conv{i}"
        for block, count in enumerate(blocks, 1)
        for i in range(1, count + 1)
    ]
    return [*convolutions, *_HEAD]


def _is_application(layers: Sequence[Layer], headless: bool = False) -> bool:
    """Whether these are the layers of VGG16 or VGG19 with ImageNet's classes, or without a head."""
    weighted = [x.name for x in layers if x.kind in ("Conv2D", "Dense")]
    if headless:
        return any([*weighted, *_HEAD] == _names(blocks) for blocks in _APPLICATIONS.values())
    known = any(weighted == _names(blocks) for blocks in _APPLICATIONS.values())
    return known and layers[-1].get("units") == _IMAGENET_CLASSES


def _recognised(weights: Weights, arch: str | None, path: Path, headless: bool) -> str:
    """The architecture of a file of weights alone."""
    found = set(weights.layer_names())
    if not found:
        raise LoadError(f"{path} must hold weights, got empty layers only")
    for name, blocks in _APPLICATIONS.items():
        if found == set(_names(blocks)):
            return name
        if found == set(_names(blocks)) - set(_HEAD):
            if headless:
                return name
            raise LoadError(
                f"{path} must hold the weights of the whole classifier, got {name} without its "
                "fully connected layers (include_top=False); fcvgg.finetune gives it a new head"
            )
    if arch in _APPLICATIONS:
        names, expected = weights.layer_names(), _names(_APPLICATIONS[arch])
        if len(names) != len(expected):
            raise LoadError(
                f"{path} must hold the weights of the {len(expected)} layers of {arch}, got those "
                f"of {len(names)}"
            )
        weights.aliases = dict(zip(expected, names))
        return arch
    raise LoadError(
        f"{path} must hold its architecture (model.save), or the weights of keras.applications' "
        f"VGG16 or VGG19, got weights alone (layers {', '.join(sorted(found)[:4])}, ...); pass "
        "arch='vgg16' or 'vgg19' where the layers have other names"
    )


def _application(arch: str, weights: Weights) -> dict[str, Any]:
    """The architecture of VGG16 or VGG19 as Keras would write it, sized by the file's weights."""
    entries: list[dict[str, Any]] = []

    def add(kind: str, name: str, **config: Any) -> None:
        entries.append({"class_name": kind, "config": {"name": name, **config}})

    for block, count in enumerate(_APPLICATIONS[arch], 1):
        for i in range(1, count + 1):
            settings = {"kernel_size": [3, 3], "padding": "same", "activation": "relu"}
            add("Conv2D", f"block{block}_conv{i}", **settings)
        add("MaxPooling2D", f"block{block}_pool", pool_size=[2, 2], strides=[2, 2])
    head = _HEAD if set(_HEAD) & set(weights.layer_names()) or weights.aliases else ()
    if head:
        add("Flatten", "flatten")
    for name in head:
        add("Dense", name, activation="softmax" if name == "predictions" else "relu")
    model = {"class_name": "Sequential", "config": {"name": arch, "layers": entries}}
    arrays = head and weights.of(("predictions",), list(_layers_of(model, ())))
    if arrays:
        entries[-1]["config"]["units"] = int(arrays[0].shape[-1])
    return model
