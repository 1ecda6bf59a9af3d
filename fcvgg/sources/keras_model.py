"""A Keras architecture on its way to a torch model: layers, their weights, and what they become.

The table of layers, `fcvgg.sources.keras_layers`, adds to a `Builder`; `fcvgg.sources.keras_file`
reads the file.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fcvgg.errors import LoadError
from fcvgg.sources.assembly import Assembled
from fcvgg.sources.hdf5_file import read_array
from fcvgg.support import untrusted


class KerasModel(Assembled):
    """A classifier that a Keras file describes."""


@dataclass(frozen=True)
class Result:
    """What a layer gives at one of its places, as the file's architecture refers to it."""

    layer: str
    place: int


@dataclass(frozen=True)
class Layer:
    """A layer as the file's architecture describes it.

    Attributes:
        path: its name, after those of the models that it lies in.
        kind: Keras's class.
        config: its settings.
        calls: what it is called on, at each of its places in its model.
    """

    path: tuple[str, ...]
    kind: str
    config: Mapping[str, Any]
    calls: tuple[tuple[Any, ...], ...]

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
        self._names: dict[str, dict[str, str]] = {}  # of the layers in each group, with their keys
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
            names = [text_of(name) for name in self._group.attrs["layer_names"]]
            return [n for n in names if n in self._group and self._weight_names(self._group[n])]
        layers = self._group["layers"]
        return [
            text_of(layers[key]["vars"].attrs.get("name", key))
            for key in sorted(layers, key=_counted_key)
            if "vars" in layers[key] and len(layers[key]["vars"])
        ]

    def _weight_names(self, group: Any) -> list[str]:
        return [text_of(name) for name in group.attrs.get("weight_names", ())]

    def _named(self, path: Sequence[str]) -> list[Any]:
        """By the layer's name; those of a model within the model stand in one list."""
        group = self._group.get(path[0])
        if group is None:
            return []
        names = self._weight_names(group)
        if len(path) > 1:
            # an inner model lists the weights of all its layers, trainable ones first; a layer's
            # own are picked by its name and put in the order of a layer that stands alone
            order = (
                *("depthwise_kernel", "pointwise_kernel", "kernel", "gamma", "alpha", "bias"),
                *("beta", "moving_mean", "moving_variance"),
            )
            names = [n for n in names if n.split("/")[-2:-1] == [path[-1]]]
            kinds = [n.split("/")[-1].partition(":")[0] for n in names]
            ranks = [order.index(k) if k in order else len(order) for k in kinds]
            names = [name for _, name in sorted(zip(ranks, names), key=lambda pair: pair[0])]
        return [read_array(group[name]) for name in names]

    def _counted(self, path: Sequence[str], layers: Sequence[Layer]) -> list[Any]:
        """By the class and its count, as Keras 3 does, or by the name where the file has it."""
        group: Any = self._group
        # every model on the way numbers its layers on its own: conv2d, conv2d_1, dense, ...
        for depth in range(len(path)):
            inside = [layer for layer in layers if layer.path[:depth] == tuple(path[:depth])]
            siblings = _unique_at(inside, depth)
            group = self._child(group.get("layers", {}), path[depth], siblings)
            if group is None:
                return []
        variables = group.get("vars", {})
        return [read_array(variables[str(i)]) for i in range(len(variables))]

    def _child(self, group: Any, name: str, siblings: Mapping[str, str]) -> Any:
        place = getattr(group, "name", "")
        if place not in self._names:
            self._names[place] = {
                text_of(child["vars"].attrs["name"]): key
                for key, child in group.items()
                if "vars" in child and "name" in child["vars"].attrs
            }
        named = self._names[place]
        # newer files hold the layers' names; in older ones only their order tells them apart
        if named:
            return group[named[name]] if name in named else None
        counted: Counter[str] = Counter()
        keys = {}
        for sibling, kind in siblings.items():
            base = _snake_case(kind)
            keys[sibling] = f"{base}_{counted[base]}" if counted[base] else base
            counted[base] += 1
        return group.get(keys.get(name, name), group.get(name))


class Builder:
    """A Keras architecture on its way to a torch model; layers add their steps through it."""

    def __init__(self, origin: str, weights: Weights, layers: Sequence[Layer], version: int = 3):
        self.origin = origin
        self.layers = layers
        self.version = version  # of Keras, which changed what some activations compute
        self.model = KerasModel("images")
        self._weights = weights
        self._taken = 0
        self._steps: Counter[str] = Counter()
        self._modules: dict[tuple[str, int], str] = {}
        self._called: Counter[str] = Counter()

    def begin(self, layer: Layer) -> None:
        """Before each call of a layer: it finds the modules that an earlier one has made."""
        self._called[".".join(layer.path)] = 0

    def weights(self, layer: Layer, shapes: Mapping[str, tuple[int | None, ...]]) -> list[Any]:
        """The layer's arrays by the shapes expected (None for any size), or an error."""
        arrays = self._weights.of(layer.path, self.layers)
        if len(arrays) < len(shapes):
            raise LoadError(
                f"{self.origin} must hold {len(shapes)} weights of {layer} ({', '.join(shapes)}), "
                f"got {len(arrays)}"
            )
        for (name, shape), array in zip(shapes.items(), arrays):
            if array.ndim != len(shape) or any(
                n is not None and n != m for n, m in zip(shape, array.shape)
            ):
                wanted = tuple("any" if n is None else n for n in shape)
                raise LoadError(
                    f"{self.origin}: the {name} of {layer} must have shape "
                    f"{str(wanted).replace(chr(39), '')}, got {array.shape}"
                )
        found = [np.asarray(array, dtype=np.float32) for array in arrays[: len(shapes)]]
        self._taken += sum(array.nbytes for array in found)
        if os.path.exists(self.origin):
            untrusted.check_claim(self._taken, self.origin, "weights")
        return found

    def refuse(self, layer: Layer, why: str) -> LoadError:
        return LoadError(f"{self.origin}: the layer {layer} {why}, which is not supported")

    def step(
        self, layer: Layer, target: Any, *inputs: Value, rank: int | None = None, **settings: Any
    ) -> Value:
        """A step that computes a new value from others."""
        base = "/".join(layer.path)
        value = Value(f"{base}#{self._steps[base]}", inputs[0].rank if rank is None else rank)
        self._steps[base] += 1
        self.model.add_step(target, [v.name for v in inputs], value.name, **settings)
        return value

    def constant(self, layer: Layer, name: str, value: Tensor) -> Value:
        full = f"{'/'.join(layer.path)}/{name}"
        self.model.add_constant(full, value)
        return Value(full, value.ndim)

    def number(self, layer: Layer, value: float) -> Value:
        """A number that a step takes."""
        name = f"{'/'.join(layer.path)}/number#{value!r}"
        self.model.add_constant(name, value)
        return Value(name, 0)

    def layer(
        self, layer: Layer, module: Any, x: Value, rank: int | None = None, part: str = ""
    ) -> Value:
        """A step that calls the layer's module; one that is called at several places is shared."""
        base = ".".join(layer.path)
        key = base, self._called[base]
        self._called[base] += 1
        if key not in self._modules:
            self._modules[key] = self.model.add_layer(f"{base}.{part}" if part else base, module)
        return self.step(layer, self._modules[key], x, rank=rank)


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


def text_of(value: Any) -> str:
    """A name that h5py gives as text or as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
