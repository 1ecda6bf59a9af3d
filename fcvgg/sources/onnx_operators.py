"""What each ONNX operator is in torch: the table that `fcvgg.sources.onnx_file` reads by.

A function receives the graph and a node of it, and adds the layer or step that computes the node.
https://onnx.ai/onnx/operators/
"""

# ruff: noqa: D103  (a function is named for the operator it adds)

from __future__ import annotations

import operator as python
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.geometry import Pair
from fcvgg.sources import layers, padding
from fcvgg.sources.layers import (
    as_tensor,
    divided_into,
    folded,
    hard_sigmoid,
    joined,
    subtracted_from,
)
from fcvgg.sources.onnx_graph import Graph, Node
from fcvgg.support import untrusted

Operator = Callable[[Graph, Node], None]

OPERATORS: dict[str, Operator] = {}
"""From an operator's name to the function that adds it to a model."""


reads = layers.registering(OPERATORS)
"""Registers a function for operators of these names."""


# -- layers -------------------------------------------------------------------------------------


@reads("Conv")
def conv(graph: Graph, node: Node) -> None:
    weight = graph.tensor(node, 1)
    if weight.ndim != 4:
        graph.refuse(node, f"has a weight of {weight.ndim} dimensions instead of 4")
    kernel, stride, dilation = _windows(graph, node, tuple(weight.shape[2:]))
    fixed, source = _padded(graph, node, kernel, stride, dilation, 0.0)
    bias = graph.tensor(node, 2) if node.has_input(2) else None
    groups = node.get("group", 1)
    layer = layers.convolution(weight, bias, stride, fixed, dilation, groups)
    graph.layer(node, layer, source)


@reads("Gemm")
def gemm(graph: Graph, node: Node) -> None:
    if node.get("transA", 0) or not graph.is_traced(node, 0):
        graph.refuse(node, "multiplies from the left")
    weight = np.asarray(graph.constant(node, 1), dtype=np.float32)
    weight = weight if node.get("transB", 0) else weight.T  # (O, C)
    bias = graph.constant(node, 2)
    _add_linear(graph, node, weight, bias, node.get("alpha", 1.0), node.get("beta", 1.0))


@reads("MatMul")
def matmul(graph: Graph, node: Node) -> None:
    if not graph.is_traced(node, 0) or graph.is_traced(node, 1):
        graph.refuse(node, "multiplies values that are both computed from the image")
    weight = np.asarray(graph.constant(node, 1), dtype=np.float32)
    if weight.ndim != 2:
        graph.refuse(node, f"multiplies by a value of shape {weight.shape}")
    # exporters write a fully connected layer as MatMul and Add; as one layer it has a bias, which
    # checkpoints and a replaced head rely on
    add = graph.following(node, "Add")
    bias = None
    if add is not None:
        other = next(name for name in [*add.inputs, ""] if name != node.outputs[0])
        value = graph.constants.get(other)
        if value is not None and value.ndim <= 2 and value.size == weight.shape[1]:
            bias = value.reshape(-1)
            graph.absorb(node, add)
    _add_linear(graph, node, weight.T, bias)


def _add_linear(
    graph: Graph, node: Node, weight: Any, bias: Any, alpha: float = 1.0, beta: float = 1.0
) -> None:
    scaled = as_tensor(weight if alpha == 1 else weight * np.float32(alpha))  # (O, C)
    row = None
    if bias is not None:
        row = as_tensor(np.asarray(bias, dtype=np.float32) * np.float32(beta))
        if row.numel() not in (1, len(scaled)):
            graph.refuse(node, f"adds a value of shape {tuple(row.shape)}, one per image,")
        row = row.reshape(-1).expand(len(scaled)).clone()  # (O,)
    graph.layer(node, layers.linear(scaled, row))


@reads("BatchNormalization")
def batch_normalization(graph: Graph, node: Node) -> None:
    if node.get("training_mode", 0) or node.get("spatial", 1) == 0:
        graph.refuse(node, "normalises by the batch or by position")
    scale, shift, mean, variance = (graph.tensor(node, i) for i in range(1, 5))
    rank = 2 if graph.rank(node.inputs[0]) == 2 else 4
    epsilon, momentum = node.get("epsilon", 1e-5), node.get("momentum", 0.9)
    layer = layers.batch_norm(rank, scale, shift, mean, variance, epsilon, momentum)
    graph.layer(node, layer)


@reads("MaxPool")
def max_pool(graph: Graph, node: Node) -> None:
    _one_result(graph, node)
    kernel, stride, dilation = _windows(graph, node)
    fixed, source = _padded(graph, node, kernel, stride, dilation, -torch.inf, pool=True)
    ceil = bool(node.get("ceil_mode", 0))
    graph.layer(node, nn.MaxPool2d(kernel, stride, fixed, dilation, ceil_mode=ceil), source)


@reads("AveragePool")
def average_pool(graph: Graph, node: Node) -> None:
    kernel, stride, dilation = _windows(graph, node)
    if dilation != (1, 1):
        graph.refuse(node, f"is dilated by {dilation}")
    mode, ceil = node.get("auto_pad", "NOTSET"), bool(node.get("ceil_mode", 0))
    counted = bool(node.get("count_include_pad", 0))
    if mode.startswith("SAME") and not counted:
        lower = mode == "SAME_LOWER"
        graph.step(node, padding.average_same, kernel=kernel, stride=stride, lower=lower)
        return
    before, after = _pads(node)
    if before != after and not counted:
        graph.refuse(node, f"pads {before} and {after} without counting the padding")
    fixed, source = _padded(graph, node, kernel, stride, dilation, 0.0, pool=True)
    graph.layer(node, nn.AvgPool2d(kernel, stride, fixed, ceil, counted), source)


@reads("GlobalAveragePool", "GlobalMaxPool")
def global_pool(graph: Graph, node: Node) -> None:
    kind = nn.AdaptiveMaxPool2d if "Max" in node.operator else nn.AdaptiveAvgPool2d
    graph.layer(node, kind(1))


@reads("GlobalLpPool")
def global_lp_pool(graph: Graph, node: Node) -> None:
    order = float(node.get("p", 2))
    graph.step(node, torch.linalg.vector_norm, ord=order, dim=(2, 3), keepdim=True)


@reads("LRN")
def lrn(graph: Graph, node: Node) -> None:
    size = node.get("size")
    if size % 2 == 0:
        graph.refuse(node, f"has the even size {size}, which torch centres elsewhere")
    layer = nn.LocalResponseNorm(
        size, node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    )
    graph.layer(node, layer)


@reads("Dropout")
def dropout(graph: Graph, node: Node) -> None:
    _one_result(graph, node)
    ratio = node.get("ratio")
    if ratio is None:
        ratio = graph.constant(node, 1, 0.5)
    graph.layer(node, nn.Dropout(float(np.ravel(ratio)[0])))


def _one_result(graph: Graph, node: Node) -> None:
    if any(graph.uses[name] for name in node.outputs[1:]):
        graph.refuse(node, "gives a second result (indices or a mask) that is used")
    node.outputs = node.outputs[:1]


def _windows(graph: Graph, node: Node, kernel: Any = None) -> tuple[Pair, Pair, Pair]:
    kernel = node.get("kernel_shape", kernel)
    if len(kernel) != 2:
        graph.refuse(node, f"has a kernel of {len(kernel)} dimensions")
    stride, dilation = node.get("strides", (1, 1)), node.get("dilations", (1, 1))
    untrusted.numbers_within(map(int, (*kernel, *stride, *dilation)), 1, f"a size of {node}")
    return _pair(kernel), _pair(stride), _pair(dilation)


def _pair(values: Any) -> Pair:
    height, width = values
    return int(height), int(width)


def _pads(node: Node) -> tuple[Pair, Pair]:
    top, left, bottom, right = node.get("pads", (0, 0, 0, 0))
    untrusted.numbers_within((top, left, bottom, right), 0, f"a padding of {node}")
    return (top, left), (bottom, right)


def _padded(
    graph: Graph,
    node: Node,
    kernel: Pair,
    stride: Pair,
    dilation: Pair,
    value: float,
    pool: bool = False,
) -> tuple[Pair, str | None]:
    """The padding that torch's layer does itself, and the value padded for it where it cannot."""
    mode = node.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return (0, 0), None
    padded = f"{node.outputs[0]}/padded"
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        fixed = padding.fixed_same_padding(kernel, stride, dilation)
        if fixed is not None:
            return fixed, None
        graph.model.add_step(
            *(padding.pad_same, (node.inputs[0],), padded),
            **{"kernel": kernel, "stride": stride, "dilation": dilation, "value": value},
            lower=mode == "SAME_LOWER",
        )
        return (0, 0), padded
    before, after = _pads(node)
    # torch's layers pad both ends alike, and its pools by half a kernel at most
    if before == after and not (pool and any(2 * p > k for p, k in zip(before, kernel))):
        return before, None
    if node.get("ceil_mode", 0):
        graph.refuse(node, f"pads {before} and {after} and rounds its size up")
    pads = (before[1], after[1], before[0], after[0])
    graph.model.add_step(F.pad, (node.inputs[0],), padded, pad=pads, mode="constant", value=value)
    return (0, 0), padded


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}


@reads("Pad")
def pad(graph: Graph, node: Node) -> None:
    pads = graph.numbers(node, 1, "pads")
    mode = _PAD_MODES.get(node.get("mode", "constant"))
    if mode is None or pads is None or len(pads) != 8:
        graph.refuse(node, f"pads by {node.get('mode')!r} or a value other than a map")
        return
    if node.has_input(3):
        graph.refuse(node, "pads chosen axes")
    settings: dict[str, Any] = {"mode": mode}
    if mode == "constant":
        settings["value"] = float(np.ravel(graph.constant(node, 2, node.get("value", 0.0)))[0])
    before, after = pads[:4], pads[4:]
    if before[0] == after[0] == before[1] == after[1] == 0:
        amounts = (before[3], after[3], before[2], after[2])
        graph.step(node, F.pad, pad=amounts, **settings)
    elif before[0] == after[0] == before[3] == after[3] == 0:
        amounts = (before[2], after[2], before[1], after[1])
        graph.step(node, pad_channels_last, pad=amounts, **settings)
    else:
        graph.refuse(node, f"pads {pads}, more than rows and columns")


def pad_channels_last(x: Tensor, **settings: Any) -> Tensor:
    """Rows and columns of ``(N, H, W, C)`` padded."""
    return F.pad(x.permute(0, 3, 1, 2), **settings).permute(0, 2, 3, 1)


# -- shapes -------------------------------------------------------------------------------------


@reads("Reshape")
def reshape(graph: Graph, node: Node) -> None:
    settings = {"batch": graph.batch, "keeps_zeros": bool(node.get("allowzero", 0))}
    target = node.get("shape")
    if target is None and node.inputs[1] not in graph.constants:
        graph.step(node, reshaped, node.inputs[0], node.inputs[1], **settings)
        return
    sizes = graph.numbers(node, 1, "shape")
    graph.step(node, reshaped, target=sizes, **settings)


def reshaped(x: Tensor, target: Any, batch: int | None, keeps_zeros: bool) -> Tensor:
    """The operator Reshape; a batch that the file fixes becomes the batch there is."""
    sizes = [int(n) for n in target]
    if batch is not None and sizes and sizes[0] == batch:
        sizes[0] = x.shape[0]
    if not keeps_zeros:
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(tuple(sizes))


@reads("Flatten")
def flatten(graph: Graph, node: Node) -> None:
    if node.get("axis", 1) != 1:
        graph.refuse(node, f"flattens from dimension {node.get('axis')}, images included")
    graph.step(node, torch.flatten, start_dim=1)


@reads("Transpose")
def transpose(graph: Graph, node: Node) -> None:
    order = node.get("perm")
    if order is None:
        graph.refuse(node, "reverses all dimensions, images included")
    graph.step(node, torch.permute, dims=tuple(order))


@reads("Squeeze")
def squeeze(graph: Graph, node: Node) -> None:
    axes = graph.numbers(node, 1, "axes")
    if axes is None:
        graph.refuse(node, "drops whatever has size one, perhaps the images")
    graph.step(node, torch.squeeze, dim=axes)


@reads("Unsqueeze")
def unsqueeze(graph: Graph, node: Node) -> None:
    axes = graph.numbers(node, 1, "axes")
    assert axes is not None
    graph.step(node, unsqueezed, axes=axes)


def unsqueezed(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The operator Unsqueeze: dimensions of size one at these places of the result."""
    ndim = x.ndim + len(axes)
    for axis in sorted(a % ndim for a in axes):
        x = x.unsqueeze(axis)
    return x


@reads("Slice")
def slice_(graph: Graph, node: Node) -> None:
    starts, ends = graph.numbers(node, 1, "starts"), graph.numbers(node, 2, "ends")
    assert starts is not None
    assert ends is not None
    axes = graph.numbers(node, 3, "axes") or tuple(range(len(starts)))
    steps = graph.numbers(node, 4, "steps") or (1,) * len(starts)
    if any(step not in (1, -1) for step in steps):
        graph.refuse(node, f"takes steps {steps}")
    graph.step(node, sliced, parts=tuple(zip(starts, ends, axes, steps)))


def sliced(x: Tensor, parts: tuple[tuple[int, int, int, int], ...]) -> Tensor:
    """The operator Slice with steps of 1, or of -1 over the whole dimension."""
    for start, end, axis, step in parts:
        size = x.shape[axis]
        first, stop, step = slice(start, end, step).indices(size)
        if step == 1 and (first, stop) != (0, size):
            x = x.narrow(axis, first, stop - first)
        elif step == -1:
            x = x.flip(axis).narrow(axis, size - 1 - first, first - stop)
    return x


@reads("Gather")
def gather(graph: Graph, node: Node) -> None:
    indices, axis = graph.constant(node, 1), node.get("axis", 0)
    if not graph.is_traced(node, 0) or axis == 0:
        graph.refuse(node, "chooses among images, or rows of a table")
    if indices.ndim != 1:
        graph.refuse(node, f"takes indices of shape {indices.shape}")
    graph.step(node, gathered, indices=[int(n) for n in indices], axis=axis)


def gathered(x: Tensor, indices: list[int], axis: int) -> Tensor:
    """The entries of these indices along an axis, such as channels in another order."""
    return x[(slice(None),) * (axis % x.ndim) + (indices,)]


@reads("SpaceToDepth")
def space_to_depth(graph: Graph, node: Node) -> None:
    graph.step(node, unshuffled, block=node.get("blocksize"))


def unshuffled(x: Tensor, block: int) -> Tensor:
    """Blocks of pixels as channels; ONNX orders them by their place first, torch by channel."""
    channels = x.shape[1]
    order = [c * block**2 + place for place in range(block**2) for c in range(channels)]
    return F.pixel_unshuffle(x, block)[:, order]


@reads("DepthToSpace")
def depth_to_space(graph: Graph, node: Node) -> None:
    by_channel = node.get("mode", "DCR") == "CRD"
    graph.step(node, shuffled, block=node.get("blocksize"), by_channel=by_channel)


def shuffled(x: Tensor, block: int, by_channel: bool) -> Tensor:
    """Channels as blocks of pixels, ordered by channel first as in torch, or by place."""
    if not by_channel:
        channels = x.shape[1] // block**2
        x = x[:, [place * channels + c for c in range(channels) for place in range(block**2)]]
    return F.pixel_shuffle(x, block)


@reads("Split")
def split(graph: Graph, node: Node) -> None:
    sizes = graph.numbers(node, 1, "split")
    settings: dict[str, Any] = {"dim": node.get("axis", 0)}
    function: Callable[..., Any] = torch.chunk if sizes is None else torch.split
    if sizes is None:
        settings["chunks"] = len(node.outputs)
    else:
        settings["split_size_or_sections"] = list(sizes)
    graph.model.add_step(function, node.inputs[:1], node.outputs, **settings)


@reads("Concat")
def concat(graph: Graph, node: Node) -> None:
    if not all(graph.is_traced(node, i) for i in range(len(node.inputs))):
        graph.refuse(node, "joins the image's values with constants")
    graph.step(node, joined, *node.inputs, dim=node.get("axis", 1))


# -- arithmetic ---------------------------------------------------------------------------------


def _arithmetic(function: Callable[..., Any], reverse: Callable[..., Any]) -> Operator:
    def add(graph: Graph, node: Node) -> None:
        names = [graph.operand(node, i) for i in range(len(node.inputs))]
        if graph.is_traced(node, 0):
            graph.step(node, function, *names)
        else:  # the image's value leads, so that torch.fx sees the call
            graph.step(node, reverse, *names[::-1])

    return add


OPERATORS.update(
    Add=_arithmetic(python.add, python.add),
    Sub=_arithmetic(python.sub, subtracted_from),
    Mul=_arithmetic(python.mul, python.mul),
    Div=_arithmetic(python.truediv, divided_into),
)


OPERATORS.update(
    Greater=_arithmetic(python.gt, python.lt),
    GreaterOrEqual=_arithmetic(python.ge, python.le),
    Less=_arithmetic(python.lt, python.gt),
    LessOrEqual=_arithmetic(python.le, python.ge),
)


@reads("Where")
def where(graph: Graph, node: Node) -> None:
    if not graph.is_traced(node, 0):
        graph.refuse(node, "chooses by a constant")
    graph.step(node, torch.where, node.inputs[0], graph.operand(node, 1), graph.operand(node, 2))


@reads("Sum", "Max", "Min")
def combine(graph: Graph, node: Node) -> None:
    functions = {"Sum": torch.add, "Max": torch.maximum, "Min": torch.minimum}
    names = [graph.operand(node, i) for i in range(len(node.inputs))]
    if any(map(graph.model.is_number, names)) and node.operator != "Sum":
        graph.refuse(node, "compares with a number, as Clip does")
    graph.step(node, folded, *names, function=functions[node.operator])


@reads("Pow")
def power(graph: Graph, node: Node) -> None:
    exponent = graph.constant(node, 1)
    if not graph.is_traced(node, 0) or exponent.size != 1:
        graph.refuse(node, "has an exponent other than a number")
    graph.step(node, torch.pow, exponent=float(exponent))


_REDUCTIONS: dict[str, Any] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceL1": partial(torch.linalg.vector_norm, ord=1),
    "ReduceL2": partial(torch.linalg.vector_norm, ord=2),
}


@reads(*_REDUCTIONS)
def reduce(graph: Graph, node: Node) -> None:
    axes = graph.numbers(node, 1, "axes")
    if axes is None:
        graph.refuse(node, "reduces all dimensions, images included")
    keepdim = bool(node.get("keepdims", 1))
    graph.step(node, _REDUCTIONS[node.operator], dim=axes, keepdim=keepdim)


@reads("LpNormalization")
def lp_normalization(graph: Graph, node: Node) -> None:
    graph.step(node, F.normalize, p=float(node.get("p", 2)), dim=node.get("axis", -1))


@reads("Clip")
def clip(graph: Graph, node: Node) -> None:
    limits = [
        node.get(name) if node.get(name) is not None else graph.constant(node, i)
        for i, name in ((1, "min"), (2, "max"))
    ]
    low, high = (None if v is None else float(np.ravel(v)[0]) for v in limits)
    graph.step(node, torch.clamp, min=low, max=high)


@reads("Cast")
def cast(graph: Graph, node: Node) -> None:
    """Between kinds of floats nothing is done: the model runs in one precision, float32."""
    if node.get("to") not in (1, 10, 11, 16):  # FLOAT, FLOAT16, DOUBLE, BFLOAT16
        graph.refuse(node, "makes integers of the image's values")
    graph.step(node, same)


def same(x: Tensor) -> Tensor:
    """The value itself."""
    return x


# -- activations --------------------------------------------------------------------------------


def _activation(function: Callable[..., Any], **names: tuple[str, Any]) -> Operator:
    """A function of one value; `names` gives torch's arguments their attribute and default."""

    def add(graph: Graph, node: Node) -> None:
        graph.step(node, function, **{k: node.get(a, d) for k, (a, d) in names.items()})

    return add


OPERATORS.update(
    Relu=_activation(F.relu),
    Sigmoid=_activation(torch.sigmoid),
    Tanh=_activation(torch.tanh),
    LeakyRelu=_activation(F.leaky_relu, negative_slope=("alpha", 0.01)),
    Elu=_activation(F.elu, alpha=("alpha", 1.0)),
    Celu=_activation(F.celu, alpha=("alpha", 1.0)),
    Gelu=_activation(F.gelu, approximate=("approximate", "none")),
    HardSigmoid=_activation(hard_sigmoid, alpha=("alpha", 0.2), beta=("beta", 0.5)),
    HardSwish=_activation(F.hardswish),
    Mish=_activation(F.mish),
    Softplus=_activation(F.softplus),
    Softsign=_activation(F.softsign),
    Identity=_activation(same),
    Abs=_activation(torch.abs),
    Erf=_activation(torch.erf),
    Exp=_activation(torch.exp),
    Log=_activation(torch.log),
    Neg=_activation(python.neg),
    Sqrt=_activation(torch.sqrt),
)


@reads("PRelu")
def prelu(graph: Graph, node: Node) -> None:
    slope = graph.tensor(node, 1)
    if max(slope.shape, default=1) != slope.numel():
        graph.refuse(node, f"has slopes of shape {tuple(slope.shape)}, which depend on position")
    layer = nn.PReLU(slope.numel(), device="meta")
    layer.weight = nn.Parameter(slope.reshape(-1))
    graph.layer(node, layer)


@reads("Softmax", "LogSoftmax")
def softmax(graph: Graph, node: Node) -> None:
    function = torch.softmax if node.operator == "Softmax" else torch.log_softmax
    if graph.opset >= 13:
        graph.step(node, function, dim=node.get("axis", -1))
    elif node.get("axis", 1) == 1 or graph.rank(node.inputs[0]) == 2:
        graph.step(node, softmax_of_rest, function=function)
    else:
        graph.refuse(node, f"works along dimension {node.get('axis')} of a map")


def softmax_of_rest(x: Tensor, function: Callable[..., Any]) -> Tensor:
    """Softmax over all dimensions but the first, as before opset 13."""
    return function(x, 1) if x.ndim == 2 else function(x.flatten(1), 1).reshape(x.shape)
