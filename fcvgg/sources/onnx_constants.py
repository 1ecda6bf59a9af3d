"""Nodes of an ONNX graph whose inputs are known: what they give, and how much that is.

They are computed by onnx's reference implementation. How large a result is follows from onnx's
shape inference before it is computed, so that a node of a few bytes cannot fill the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from fcvgg.errors import LoadError
from fcvgg.support.extras import imported

EXTRA = "onnx"

_FOLDABLE = """
    Abs Add And ArgMax ArgMin BatchNormalization BitShift Cast CastLike Ceil Clip Concat
    Constant ConstantOfShape CumSum DequantizeLinear Div Dropout Equal Erf Exp Expand EyeLike
    Flatten Floor Gather GatherElements GatherND Gemm Greater GreaterOrEqual HardSigmoid
    Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log MatMul Max Mean Min Mod Mul Neg NonZero
    Not OneHot Or Pad Pow QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Round ScatterElements ScatterND
    Shape Sigmoid Sign Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile TopK
    Transpose Trilu Unsqueeze Where Xor"""
"""Operators that compute what they give by formulas on arrays, none of them by a long search."""

_DOMAINS = ("", "ai.onnx")

_SHOWN = 1024
"""Elements up to which shape inference sees a constant's values, such as the sizes of a Reshape."""

_LARGEST_RESULT = 8 << 20
"""Bytes of a result computed from an image's size."""


def is_foldable(node: Any) -> bool:
    """Whether a node may be computed before the image is known, or from its size."""
    plain = not any(
        a.HasField("g") or a.graphs or a.HasField("sparse_tensor") for a in node.attribute
    )
    return node.domain in _DOMAINS and node.op_type in _FOLDABLE.split() and plain


def claimed_bytes(node: Any, opset: int, known: Mapping[str, Any]) -> int:
    """The bytes that a node's results take, at most.

    Raises:
        LoadError: if they cannot be known.
    """
    onnx = imported("onnx", EXTRA)
    if node.op_type == "Constant":
        return int(node.ByteSize())
    arrays = {name: np.asarray(value) for name, value in known.items()}
    if node.op_type == "NonZero":
        return sum(array.size * max(array.ndim, 1) * 8 for array in arrays.values())
    kinds = {n: onnx.helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in arrays.items()}
    inputs = [
        onnx.helper.make_tensor_value_info(name, kinds[name], array.shape)
        for name, array in arrays.items()
    ]
    shown = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        for name, array in arrays.items()
        if array.size <= _SHOWN
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(node.output) if name]
    graph = onnx.helper.make_graph([node], "node", inputs, outputs, shown)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    inferred = onnx.shape_inference.infer_shapes(model).graph.output
    sizes = []
    for value in inferred:
        kind = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
        if not kind.HasField("shape") or any(d < 0 for d in dims):
            raise LoadError(
                f"the operator {node.op_type} (node {node.name!r}) gives constants of a size that "
                "cannot be known before they are computed, which is not supported"
            )
        item = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        sizes.append(prod(dims) * item)
    return sum(sizes)


def evaluate(*values: Any, node: bytes, opset: int, names: Iterable[str]) -> Any:
    """A node's result for numbers computed from an image's size.

    Raises:
        LoadError: if it would be large.
    """
    known = dict(zip(names, values))
    claimed = claimed_bytes(imported("onnx", EXTRA).NodeProto.FromString(node), opset, known)
    if claimed > _LARGEST_RESULT:
        raise LoadError(f"numbers computed from an image's size must be few, got {claimed:,} bytes")
    return compute(known, node, opset)


def compute(known: Mapping[str, Any], node: bytes, opset: int) -> Any:
    """A node's result for known inputs, by onnx's reference implementation."""
    results = _evaluator(node, opset).run(None, dict(known))
    return results[0] if len(results) == 1 else tuple(results)


@lru_cache(maxsize=512)
def _evaluator(node: bytes, opset: int) -> Any:
    onnx = imported("onnx", EXTRA)
    reference = imported("onnx.reference", EXTRA)
    proto = onnx.NodeProto.FromString(node)

    def untyped(names: Iterable[str]) -> list[Any]:
        return [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name]

    graph = onnx.helper.make_graph([proto], "node", untyped(proto.input), untyped(proto.output))
    opsets = [onnx.helper.make_opsetid("", opset)]
    return reference.ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets))
