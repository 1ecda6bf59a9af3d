"""An ONNX graph on its way to a torch model.

Nodes without the image in them are computed once with onnx's reference implementation; every other
node becomes a step of an `Assembled` model by the table in `fcvgg.sources.onnx_operators`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fcvgg.errors import FcvggWarning, LoadError, one_line
from fcvgg.names import readable
from fcvgg.sources.assembly import Assembled, scores_of
from fcvgg.sources.layers import as_tensor
from fcvgg.sources.onnx_constants import EXTRA, claimed_bytes, compute, evaluate, is_foldable
from fcvgg.support.extras import imported
from fcvgg.support.memory_text import size_text

_IMAGE_CHANNELS = (1, 3, 4)
_CONSTANTS = 640 << 20
"""Bytes that constants may take in any file; onnx ships a VGG-19 whose weights are computed."""

_EXPANSION = 8
"""How many times the size of its weights a file's constants may take."""

_SHAPE_OPERATORS = ("Shape", "Size")
_DOMAINS = ("", "ai.onnx")

_INDEXING = ("ArgMax", "ArgMin", "TopK")
_PASSING = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


class OnnxModel(Assembled):
    """A classifier that an ONNX file describes."""


class Node:
    """A node of the graph with its attributes as Python values."""

    def __init__(self, proto: Any):
        onnx = imported("onnx", EXTRA)
        self.proto = proto
        self.operator: str = proto.op_type
        self.inputs: list[str] = list(proto.input)
        self.outputs: list[str] = list(proto.output)
        self.name: str = proto.name or next(iter(proto.output), "")
        self._attributes = {
            a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute if a.type
        }

    def get(self, name: str, default: Any = None) -> Any:
        value = self._attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has_input(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] != ""

    def __str__(self) -> str:
        return f"{self.operator} (node {self.name!r})"


class Graph:
    """An ONNX graph on its way to a torch model; operators add their steps through it."""

    def __init__(self, proto: Any, path: Path):
        self.path = path
        self.proto = proto.graph
        self.opset = next((o.version for o in proto.opset_import if o.domain in _DOMAINS), 1)
        nodes = [Node(node) for node in self.proto.node]
        self.outputs = _scores(nodes, [output.name for output in self.proto.output], path)
        self.nodes = _needed(nodes, self.outputs)
        self.constants = self._stored()
        self.image = self._image_input()
        self.size, self.batch, self.channels_last = self._image_layout()
        self.uses = Counter(name for node in self.nodes for name in node.inputs)
        self.uses.update(self.outputs)
        self.ranks = _ranks(proto)
        self.model = OnnxModel("images")
        self._folded = 0
        self._allowed = _CONSTANTS + _EXPANSION * proto.ByteSize()
        self._traced: set[str] = set()
        self._shapes: set[str] = set()
        self._absorbed: set[int] = set()
        self._layers: dict[str, Tensor] = {}

    # -- reading ----------------------------------------------------------------------------------

    def assemble(self, operators: Mapping[str, Any]) -> OnnxModel:
        """The model that runs every node on the image."""
        self._check_operators(operators)
        self._enter()
        for node in self.nodes:
            if id(node) in self._absorbed:
                continue
            self._check_inputs(node)
            traced = [name for name in node.inputs if name in self._traced]
            shaped = [name for name in node.inputs if name in self._shapes]
            # three kinds of nodes: on the image's values, on numbers computed from its size, which
            # every run computes, and on constants alone, which are computed once, here
            if traced and node.operator not in _SHAPE_OPERATORS:
                if shaped and node.operator not in ("Reshape", "Expand"):
                    self.refuse(node, "mixes the image with numbers computed from its size")
                self._add(node, operators[node.operator])
                self._traced.update(node.outputs)
            elif traced or shaped:
                self._add_shape_step(node)
            else:
                self._fold(node)
        outputs = []
        for output in self.outputs:
            if output not in self._traced:
                raise LoadError(
                    f"{self.path}: the output {output!r} must be class scores, got values "
                    "that do not depend on the image"
                )
            name = f"{output}/scores"
            self.model.add_step(scores_of, (output,), name)
            outputs.append(name)
        self.model.finish(outputs)
        return self.model

    def _add(self, node: Node, operator: Any) -> None:
        try:
            operator(self, node)
        except LoadError as error:
            message = str(error)
            if message.startswith(str(self.path)):
                raise
            raise LoadError(f"{self.path}: {message}") from error
        except Exception as error:  # a node can lack an input or attribute, or have one of any kind
            raise LoadError(
                f"{self.path}: {node} is malformed: {type(error).__name__}: {one_line(error)}"
            ) from error

    def _enter(self) -> None:
        """The image as the file wants it: channels last where its input has them there."""
        if self.channels_last:
            self.model.add_step(torch.permute, ("images",), self.image, dims=(0, 2, 3, 1))
        else:
            self.model.image = self.image
        self._traced.add(self.image)

    def _check_operators(self, operators: Mapping[str, Any]) -> None:
        """Name the first operator that the image passes through and that is not in the table."""
        traced = {self.image}
        for node in self.nodes:
            if not traced.intersection(node.inputs):
                if not is_foldable(node.proto):
                    self._unsupported(node)
                continue
            known = node.operator in operators and node.proto.domain in _DOMAINS
            if node.operator in _SHAPE_OPERATORS:
                continue  # what follows is arithmetic on numbers
            if not known:
                self._unsupported(node)
            traced.update(node.outputs)

    def _unsupported(self, node: Node) -> None:
        domain = f"{node.proto.domain}." if node.proto.domain not in _DOMAINS else ""
        raise LoadError(
            f"{self.path}: the operator {domain}{node} is not supported; "
            "fcvgg.sources.onnx_operators.OPERATORS has those that are"
        )

    def _check_inputs(self, node: Node) -> None:
        for name in node.inputs:
            if name and not (
                name in self._traced or name in self._shapes or name in self.constants
            ):
                raise LoadError(f"{self.path}: {node} takes {name!r}, which the file does not hold")

    def _add_shape_step(self, node: Node) -> None:
        """A step that computes numbers from the size of every image."""
        data = node.proto.SerializeToString()
        present = [name for name in dict.fromkeys(node.inputs) if name]
        for name in present:
            if name in self.constants:
                self.model.add_constant(name, self.constants[name])
        if node.operator in _SHAPE_OPERATORS:
            self.model.add_step(
                shape_of,
                present,
                node.outputs[0],
                start=node.get("start", 0),
                end=node.get("end"),
                total=node.operator == "Size",
            )
        else:
            self.model.add_step(
                evaluate, present, node.outputs, node=data, opset=self.opset, names=tuple(present)
            )
        self._shapes.update(node.outputs)

    def _fold(self, node: Node) -> None:
        present = [name for name in dict.fromkeys(node.inputs) if name]
        known = {name: self.constants[name] for name in present}
        with self._explained(f"{node} cannot be computed"):
            self._folded += claimed_bytes(node.proto, self.opset, known)
        # a node of a few bytes may ask for gigabytes, so its claim is added up before it runs
        if self._folded > self._allowed:
            raise LoadError(
                f"{self.path}: {node} must give values that fit the file, whose constants would "
                f"take {size_text(self._folded)} of {size_text(self._allowed)}"
            )
        with self._explained(f"{node} cannot be computed"):
            results = compute(known, node.proto.SerializeToString(), self.opset)
        results = results if isinstance(results, tuple) else (results,)
        self.constants.update(zip(node.outputs, results))

    def _stored(self) -> dict[str, Any]:
        onnx = imported("onnx", EXTRA)
        stored = {}
        for tensor in self.proto.initializer:
            with self._explained(f"the tensor {tensor.name!r} is broken"):
                stored[tensor.name] = onnx.numpy_helper.to_array(tensor)
        if self.proto.sparse_initializer:
            raise LoadError(f"{self.path} stores sparse tensors, which are not supported")
        return stored

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Errors about a part of the graph, which onnx raises of any class, name the part."""
        try:
            yield
        except Exception as error:
            raise LoadError(f"{self.path}: {what}: {one_line(error)}") from error

    # -- the image --------------------------------------------------------------------------------

    def _image_input(self) -> str:
        inputs = [i for i in self.proto.input if i.name not in self.constants]
        if len(inputs) != 1:
            names = ", ".join(repr(i.name) for i in inputs) or "none"
            raise LoadError(
                f"{self.path} must have one input, a batch of images, got {len(inputs)} ({names})"
            )
        return str(inputs[0].name)

    def _image_layout(self) -> tuple[tuple[int, int] | None, int | None, bool]:
        """The native size, the batch where they are fixed, and whether channels come last."""
        found = next(i for i in self.proto.input if i.name == self.image)
        sizes = [
            d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
            for d in found.type.tensor_type.shape.dim
        ]
        if len(sizes) not in (0, 4):
            raise LoadError(
                f"{self.path}: the input {self.image!r} must be images (N, C, H, W) or "
                f"(N, H, W, C), got {len(sizes)} dimensions"
            )
        batch, *rest = sizes or [None] * 4
        # TensorFlow's exporters transpose an input (N, H, W, C) at once, whose sizes may be open
        to_first = any(
            node.operator == "Transpose"
            and self.image in node.inputs
            and list(node.get("perm", ())) == [0, 3, 1, 2]
            for node in self.nodes
        )
        last = rest[2] in _IMAGE_CHANNELS and rest[0] not in _IMAGE_CHANNELS
        channels_last = last or (to_first and rest[0] not in _IMAGE_CHANNELS)
        height, width = rest[:2] if channels_last else rest[1:]
        size = (height, width) if height and width else None
        return size, batch, channels_last

    # -- what operators ask for -------------------------------------------------------------------

    def refuse(self, node: Node, why: str) -> None:
        raise LoadError(f"{self.path}: the operator {node} {why}, which is not supported")

    def is_traced(self, node: Node, index: int) -> bool:
        return node.has_input(index) and node.inputs[index] in self._traced

    def constant(self, node: Node, index: int, default: Any = None) -> Any:
        """An input that must not depend on the image, as an array; `default` where it is absent."""
        if not node.has_input(index):
            return default
        name = node.inputs[index]
        if name not in self.constants:
            self.refuse(node, f"takes its input {name!r} from the image instead of a constant")
        return self.constants[name]

    def numbers(self, node: Node, index: int, attribute: str) -> tuple[int, ...] | None:
        """Numbers that older opsets have as an attribute and newer ones as an input."""
        value = node.get(attribute)
        if value is None:
            value = self.constant(node, index)
        return None if value is None else tuple(int(n) for n in np.ravel(value))

    def tensor(self, node: Node, index: int) -> Tensor:
        """A constant input as a parameter's float32 tensor."""
        name = node.inputs[index]
        if name not in self._layers:
            self._layers[name] = as_tensor(self.constant(node, index))
        return self._layers[name]

    def operand(self, node: Node, index: int) -> Any:
        """The name of an input to a step; constants become buffers, or numbers if they are one."""
        name = node.inputs[index]
        if name in self._traced:
            return name
        value = self.constant(node, index)
        if not self.model.knows(name):
            self.model.add_constant(name, float(value) if value.size == 1 else as_tensor(value))
        return name

    def layer(self, node: Node, layer: nn.Module, source: str | None = None) -> None:
        """A layer of torch in the node's place, under the name of its weight or its node."""
        weight = node.inputs[1] if len(node.inputs) > 1 else ""
        named = weight.endswith(".weight") and weight in self.constants
        name = self.model.add_layer(weight.removesuffix(".weight") if named else node.name, layer)
        self.model.add_step(name, (source or node.inputs[0],), node.outputs[0])

    def step(self, node: Node, function: Any, /, *inputs: str, **settings: Any) -> None:
        self.model.add_step(function, inputs or (node.inputs[0],), node.outputs[0], **settings)

    def rank(self, name: str) -> int:
        return self.ranks.get(name, 4)

    def following(self, node: Node, operator: str) -> Node | None:
        """The node that alone takes this one's result, if it is of that operator."""
        output = node.outputs[0]
        if self.uses[output] != 1:
            return None
        found = next((n for n in self.nodes if output in n.inputs), None)
        return found if found is not None and found.operator == operator else None

    def absorb(self, node: Node, following: Node) -> None:
        """Let this node compute the following one's result too."""
        self._absorbed.add(id(following))
        node.outputs = following.outputs


def _ranks(proto: Any) -> dict[str, int]:
    """The number of dimensions of the graph's values, as far as onnx infers them."""
    onnx = imported("onnx", EXTRA)
    slim = onnx.ModelProto()
    slim.CopyFrom(proto) if not proto.graph.initializer else _copy_without_weights(proto, slim)
    try:
        inferred = onnx.shape_inference.infer_shapes(slim).graph
    except Exception:  # a help only: what is not known is taken for a map
        return {}
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return {
        v.name: len(v.type.tensor_type.shape.dim)
        for v in values
        if v.type.tensor_type.HasField("shape")
    }


def _copy_without_weights(proto: Any, slim: Any) -> None:
    """A copy in which large tensors are inputs of known shape, so that it stays small."""
    onnx = imported("onnx", EXTRA)
    slim.ir_version = proto.ir_version
    slim.opset_import.extend(proto.opset_import)
    graph = slim.graph
    graph.name = proto.graph.name or "graph"
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    named = {i.name for i in proto.graph.input}
    for tensor in proto.graph.initializer:
        if np.prod(tensor.dims) <= 64:
            graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in named:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )


def _scores(nodes: Sequence[Node], outputs: list[str], path: Path) -> list[str]:
    """The outputs without those that say which class scores most, where there are others."""
    makers = {name: node for node in nodes for name in node.outputs}

    def is_index(name: str) -> bool:
        node = makers.get(name)
        while node is not None and node.operator in _PASSING and node.inputs:
            node = makers.get(node.inputs[0])
        return node is not None and node.operator in _INDEXING

    indices = [name for name in outputs if is_index(name)]
    scores = [name for name in outputs if name not in indices]
    if not scores or not indices:
        return outputs
    warnings.warn(
        f"{readable(path)}: the outputs {', '.join(map(readable, indices))} are left out, since "
        "they choose among classes; the scores are read",
        FcvggWarning,
        stacklevel=2,
    )
    return scores


def _needed(nodes: Sequence[Node], outputs: Iterable[str]) -> list[Node]:
    """The nodes that the outputs depend on, in order."""
    wanted = set(outputs)
    needed: list[Node] = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            needed.append(node)
            wanted.update(node.inputs)
    return needed[::-1]


def shape_of(x: Tensor, start: int, end: int | None, total: bool) -> Any:
    """The operators Shape and Size on an image's value, as numbers."""
    sizes = np.array(tuple(x.shape), dtype=np.int64)
    return np.array(sizes.prod()) if total else sizes[start:end]
