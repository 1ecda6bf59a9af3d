"""Reading Keras files as torch classifiers: `.keras`, and `.h5` with or without an architecture.

A file is read with h5py and json alone: Keras is not imported, and nothing in the file is run.
The layers become torch layers under their own names by the table in `fcvgg.sources.keras_layers`.
Maps are kept channels first; `Flatten` restores Keras's order, height, width, channels.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from torch import Tensor

from fcvgg.errors import FcvggError, LoadError, one_line
from fcvgg.preprocessing import Preprocess
from fcvgg.sources.assembly import Assembled, scores_of
from fcvgg.sources.extras import imported

SUFFIXES = (".keras", ".h5", ".hdf5")
EXTRA = "keras"

CAFFE = Preprocess.preset("caffe")
"""What keras.applications' VGG16 and VGG19 were trained with."""

_APPLICATIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
"""The convolutions in each block of the models in keras.applications."""
_HEAD = ("fc1", "fc2", "predictions")
_IMAGENET_CLASSES = 1000

_MODELS = ("Sequential", "Functional", "Model")


class KerasModel(Assembled):
    """A classifier that a Keras file describes."""


@dataclass(frozen=True)
class Layer:
    """A layer as the file's architecture describes it.

    Attributes:
        path: its name, after those of the models that it lies in.
        kind: Keras's class.
        config: its settings.
        inputs: the names of the layers it takes its values from, within its model.
    """

    path: tuple[str, ...]
    kind: str
    config: Mapping[str, Any]
    inputs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path[-1]

    def get(self, name: str, default: Any = None) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def __str__(self) -> str:
        return f"{'/'.join(self.path)} ({self.kind})"


@dataclass(frozen=True)
class Value:
    """A value in the assembled model: its name there, and how many dimensions it has."""

    name: str
    rank: int


class Weights:
    """The arrays of a Keras file by layer, in Keras's order (kernel, bias; gamma, beta, ...)."""

    def __init__(self, group: Any, origin: str):
        self._group = group
        self._origin = origin
        self._by_name = "layer_names" in group.attrs  # as Keras wrote .h5 before version 3
        self.aliases: dict[str, str] = {}
        """The file's own names of layers that have others in the architecture."""

    def of(self, path: Sequence[str], layers: Sequence[Layer]) -> list[Any]:
        """The arrays of the layer at `path`; `layers` are all layers of its model."""
        path = [self.aliases.get(path[0], path[0]), *path[1:]]
        if self._by_name:
            return self._named(path)
        return self._counted(path, layers)

    def layer_names(self) -> list[str]:
        """The layers that hold weights, in order; convolutions first where the file has none."""
        if self._by_name:
            names = [_text(name) for name in self._group.attrs["layer_names"]]
            return [n for n in names if n in self._group and self._weight_names(self._group[n])]
        layers = self._group["layers"]
        return [
            _text(layers[key]["vars"].attrs.get("name", key))
            for key in sorted(layers, key=_counted_key)
            if "vars" in layers[key] and len(layers[key]["vars"])
        ]

    def _weight_names(self, group: Any) -> list[str]:
        return [_text(name) for name in group.attrs.get("weight_names", ())]

    def _named(self, path: Sequence[str]) -> list[Any]:
        """By the layer's name; those of a model within the model stand in one list."""
        group = self._group.get(path[0])
        if group is None:
            return []
        names = self._weight_names(group)
        if len(path) > 1:
            order = ("kernel", "gamma", "bias", "beta", "moving_mean", "moving_variance")
            names = [n for n in names if n.split("/")[-2:-1] == [path[-1]]]
            kinds = [n.split("/")[-1].partition(":")[0] for n in names]
            ranks = [order.index(k) if k in order else len(order) for k in kinds]
            names = [name for _, name in sorted(zip(ranks, names), key=lambda pair: pair[0])]
        return [np.asarray(group[name]) for name in names]

    def _counted(self, path: Sequence[str], layers: Sequence[Layer]) -> list[Any]:
        """By the class and its count, as Keras 3 does, or by the name where the file has it."""
        group: Any = self._group
        for depth in range(len(path)):
            inside = [layer for layer in layers if layer.path[:depth] == tuple(path[:depth])]
            siblings = _unique_at(inside, depth)
            group = self._child(group.get("layers", {}), path[depth], siblings)
            if group is None:
                return []
        variables = group.get("vars", {})
        return [np.asarray(variables[str(i)]) for i in range(len(variables))]

    def _child(self, group: Any, name: str, siblings: Mapping[str, str]) -> Any:
        named = {
            _text(child["vars"].attrs["name"]): child
            for child in group.values()
            if "vars" in child and "name" in child["vars"].attrs
        }
        if named:
            return named.get(name)
        counted: Counter[str] = Counter()
        keys = {}
        for sibling, kind in siblings.items():
            base = _snake_case(kind)
            keys[sibling] = f"{base}_{counted[base]}" if counted[base] else base
            counted[base] += 1
        return group.get(keys.get(name, name), group.get(name))


class Builder:
    """A Keras architecture on its way to a torch model; layers add their steps through it."""

    def __init__(self, origin: str, weights: Weights, layers: Sequence[Layer]):
        self.origin = origin
        self.layers = layers
        self.model = KerasModel("images")
        self._weights = weights

    def weights(self, layer: Layer, shapes: Mapping[str, tuple[int | None, ...]]) -> list[Any]:
        """The layer's arrays by the shapes expected (None for any size), or an error."""
        arrays = self._weights.of(layer.path, self.layers)
        if len(arrays) < len(shapes):
            raise LoadError(
                f"{self.origin} holds {len(arrays)} weights of {layer} instead of {len(shapes)} "
                f"({', '.join(shapes)})"
            )
        for (name, shape), array in zip(shapes.items(), arrays):
            if array.ndim != len(shape) or any(
                n is not None and n != m for n, m in zip(shape, array.shape)
            ):
                wanted = tuple("any" if n is None else n for n in shape)
                raise LoadError(
                    f"{self.origin}: the {name} of {layer} has shape {array.shape} instead of "
                    f"{str(wanted).replace(chr(39), '')}"
                )
        return [np.asarray(array, dtype=np.float32) for array in arrays[: len(shapes)]]

    def refuse(self, layer: Layer, why: str) -> LoadError:
        return LoadError(f"{self.origin}: the layer {layer} {why}, which is not supported")

    def step(
        self, layer: Layer, target: Any, *inputs: Value, rank: int | None = None, **settings: Any
    ) -> Value:
        """A step that computes a new value from others."""
        base = "/".join(layer.path)
        number = sum(base in step.outputs[0] for step in self.model.steps)
        value = Value(f"{base}#{number}", inputs[0].rank if rank is None else rank)
        self.model.add_step(target, [v.name for v in inputs], value.name, **settings)
        return value

    def constant(self, layer: Layer, name: str, value: Tensor) -> Value:
        full = f"{'/'.join(layer.path)}/{name}"
        self.model.add_constant(full, value)
        return Value(full, value.ndim)

    def layer(self, layer: Layer, module: Any, x: Value, rank: int | None = None) -> Value:
        name = self.model.add_layer(".".join(layer.path), module)
        return self.step(layer, name, x, rank=rank)


def read(path: str | Path, arch: str | None = None) -> tuple[KerasModel, dict[str, Any]]:
    """The classifier in a Keras file, and what is known of its input.

    Args:
        arch: ``"vgg16"`` or ``"vgg19"`` for a file of weights alone whose layers do not have the
            names of keras.applications.

    Raises:
        LoadError: if the file is absent, broken, holds no weights, or a layer is not supported.
        MissingExtraError: if h5py is not installed.
    """
    path = Path(path)
    with _opened(path) as (config, file):
        try:
            weights = Weights(_weights_within(file, path), str(path))
            if config is None:
                config = _application(_recognised(weights, arch, path), weights)
            return _assembled(config, weights, path)
        except FcvggError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:
            raise LoadError(
                f"{path} is no readable Keras file: {type(error).__name__}: {one_line(error)}"
            ) from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any] | None, Any]]:
    """The architecture, if the file has one, and the HDF5 file that holds the weights."""
    h5py = imported("h5py", EXTRA)
    if not path.is_file():
        raise LoadError(f"there is no Keras file {path}")
    config = None
    try:
        content: Any = path
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))
                content = io.BytesIO(archive.read("model.weights.h5"))
        file = h5py.File(content, "r")
        if "model_config" in file.attrs:
            config = json.loads(_text(file.attrs["model_config"]))
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
        raise LoadError(f"{path} is no readable Keras file: {one_line(error)}") from error
    with file:
        yield config, file


def _weights_within(file: Any, path: Path) -> Any:
    group = file.get("model_weights", file)
    if "layer_names" in group.attrs or "layers" in group:
        return group
    raise LoadError(
        f"{path} holds no weights of a Keras model: expected 'model_weights', the attribute "
        f"'layer_names' or 'layers'; it has {', '.join(file) or 'nothing'}"
    )


def _assembled(
    config: Mapping[str, Any], weights: Weights, path: Path
) -> tuple[KerasModel, dict[str, Any]]:
    from fcvgg.sources.keras_layers import LAYERS

    layers = list(_layers_of(config, ()))
    builder = Builder(str(path), weights, layers)
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
            f"the architecture is a {kind!r}; expected one of {', '.join(_MODELS)}, since others "
            "are code"
        )
    inner = config["config"]
    described = inner if isinstance(inner, list) else inner["layers"]  # a list before Keras 2.2.3
    previous: tuple[str, ...] = ()
    for entry in described:
        settings = entry["config"]
        own = settings.get("name") if isinstance(settings, dict) else None
        name = str(entry.get("name") or own)
        nodes = entry.get("inbound_nodes")
        inputs = previous if kind == "Sequential" else tuple(_sources(nodes))
        if isinstance(nodes, list) and len(nodes) > 1:
            raise LoadError(
                f"the layer {name} is called at {len(nodes)} places, which is not supported"
            )
        within = settings if isinstance(settings, dict) else {}
        yield Layer((*path, name), entry["class_name"], within, inputs)
        previous = (name,)
        if entry["class_name"] in _MODELS:
            yield from _layers_of(entry, (*path, name))


def _sources(nodes: Any) -> Iterator[str]:
    """The layers named in an inbound node, as Keras 2 or 3 writes it."""
    if isinstance(nodes, Mapping):
        history = nodes.get("keras_history")
        if history is not None:
            yield str(history[0])
        else:
            for inner in nodes.values():
                yield from _sources(inner)
    elif isinstance(nodes, list):
        if len(nodes) >= 3 and isinstance(nodes[0], str) and isinstance(nodes[1], int):
            yield nodes[0]
        else:
            for inner in nodes:
                yield from _sources(inner)


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
    sequential = config["class_name"] == "Sequential"
    values: dict[str, Value] = {}
    entered = 0
    waiting = list(zip(inside, entries))
    while waiting:
        ready = next((i for i, (x, _) in enumerate(waiting) if set(x.inputs) <= set(values)), None)
        if ready is None:
            raise LoadError(f"{builder.origin}: {waiting[0][0]} takes what no layer gives")
        layer, entry = waiting.pop(ready)
        inputs = [values[name] for name in layer.inputs]
        if layer.kind == "InputLayer" or not inputs:
            if entered >= len(images):
                raise builder.refuse(layer, "is a second input")
            image = images[entered]
            entered += 1
            inputs = [image]
        if layer.kind in _MODELS:
            results = _run(builder, entry, layer.path, inputs, table)
            if len(results) != 1:
                raise builder.refuse(layer, "has several outputs")
            values[layer.name] = results[0]
        else:
            values[layer.name] = table[layer.kind](builder, layer, *inputs)
    if sequential:
        return [values[inside[-1].name]]
    return [values[name] for name in _sources(config["config"]["output_layers"])]


def _settings(
    layers: Sequence[Layer], config: Mapping[str, Any], builder: Builder
) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    shape = _input_shape(layers, config)
    if shape is not None:
        if len(shape) != 4:
            raise LoadError(
                f"{builder.origin} takes input of shape {tuple(shape)}; expected (N, H, W, C)"
            )
        if shape[1] and shape[2]:
            settings["input_size"] = (int(shape[1]), int(shape[2]))
    if _is_application(layers):
        settings["preprocess"] = CAFFE
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


def _is_application(layers: Sequence[Layer]) -> bool:
    """Whether these are the layers of VGG16 or VGG19 with ImageNet's classes."""
    weighted = [x.name for x in layers if x.kind in ("Conv2D", "Dense")]
    known = any(weighted == _names(blocks) for blocks in _APPLICATIONS.values())
    return known and layers[-1].get("units") == _IMAGENET_CLASSES


def _recognised(weights: Weights, arch: str | None, path: Path) -> str:
    """The architecture of a file of weights alone."""
    found = set(weights.layer_names())
    if not found:
        raise LoadError(f"{path} holds no weights: all of its layers are empty")
    for name, blocks in _APPLICATIONS.items():
        if found == set(_names(blocks)):
            return name
        if found == set(_names(blocks)) - set(_HEAD):
            raise LoadError(
                f"{path} holds {name} without its fully connected layers (include_top=False); "
                "expected the weights of the whole classifier"
            )
    if arch in _APPLICATIONS:
        names, expected = weights.layer_names(), _names(_APPLICATIONS[arch])
        if len(names) != len(expected):
            raise LoadError(
                f"{path} holds weights of {len(names)} layers, where {arch} has {len(expected)}"
            )
        weights.aliases = dict(zip(expected, names))
        return arch
    raise LoadError(
        f"{path} holds weights alone (layers {', '.join(sorted(found)[:4])}, ...); expected a file "
        "with its architecture (model.save), or the weights of keras.applications' VGG16 or VGG19 "
        "(pass arch='vgg16' or 'vgg19' where the layers have other names)"
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
    add("Flatten", "flatten")
    for name in _HEAD:
        add("Dense", name, activation="softmax" if name == "predictions" else "relu")
    model = {"class_name": "Sequential", "config": {"name": arch, "layers": entries}}
    arrays = weights.of(("predictions",), list(_layers_of(model, ())))
    if arrays:
        entries[-1]["config"]["units"] = int(arrays[0].shape[-1])
    return model


# -- small helpers --------------------------------------------------------------------------------


def _unique_at(layers: Sequence[Layer], depth: int) -> dict[str, str]:
    """The names at one depth of the tree and their classes, in order."""
    return {x.path[depth]: x.kind for x in layers if len(x.path) == depth + 1}


def _snake_case(name: str) -> str:
    """A class's name as Keras 3 writes it into its files."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _counted_key(name: str) -> tuple[str, int]:
    """Orders ``conv2d``, ``conv2d_1``, ..., ``conv2d_10``, ``dense``."""
    base, _, number = name.rpartition("_")
    return (base, int(number)) if number.isdigit() else (name, 0)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
