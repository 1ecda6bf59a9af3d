"""Functions of torch written out in simpler ones, which the rules know.

torch has several names for one operation, and functions that are a line of others. While a model is
traced, each call of a function in `WRITTEN_OUT` runs what stands here in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _addmm(input: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = torch.matmul(a, b)
    product = product if alpha == 1 else product * alpha
    return product + (input if beta == 1 else input * beta)


def _cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    products = F.normalize(x1, dim=dim, eps=eps) * F.normalize(x2, dim=dim, eps=eps)
    return products.sum(dim)


def _pairwise_distance(
    x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Any:
    return torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim)


def _cdist(x1: Any, x2: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def _norm(
    input: Any,
    p: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    out: None = None,
    dtype: Any = None,
) -> Any:
    order = 2.0 if p in (None, "fro") else p
    return torch.linalg.vector_norm(input, order, dim, keepdim)


def _linalg_norm(
    x: Any,
    ord: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    out: None = None,
    dtype: Any = None,
) -> Any:
    # with an order, torch computes the norm of a matrix over two dimensions, such as its largest
    # singular value
    of_matrix = x.dim() == 2 if dim is None else isinstance(dim, Sequence) and len(dim) == 2
    if of_matrix and ord not in (None, "fro"):
        raise NotImplementedError(f"a norm of matrices of order {ord!r}")
    return torch.linalg.vector_norm(x, 2 if ord in (None, "fro") else ord, dim, keepdim)


def _std(*args: Any, **kwargs: Any) -> Any:
    return torch.sqrt(torch.var(*args, **kwargs))


def _lerp(input: Any, end: Any, weight: Any) -> Any:
    return input + weight * (end - input)


def _clamp_min(input: Any, min: Any) -> Any:
    return torch.clamp(input, min=min) if not isinstance(min, Tensor) else torch.maximum(input, min)


def _clamp_max(input: Any, max: Any) -> Any:
    return torch.clamp(input, max=max) if not isinstance(max, Tensor) else torch.minimum(input, max)


def _addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    return input + tensor1 * tensor2 * value


def _addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    return input + tensor1 / tensor2 * value


def _tensordot(a: Any, b: Any, dims: Any = 2, out: None = None) -> Any:
    """The last dimensions of a with the first of b, or lists of them, as one einsum."""
    if isinstance(dims, int):
        dims = list(range(a.dim() - dims, a.dim())), list(range(dims))
    mine, theirs = ([d % x.dim() for d in ds] for ds, x in zip(dims, (a, b)))
    first = [chr(97 + i) for i in range(a.dim())]
    second = [chr(65 + i) for i in range(b.dim())]
    for i, j in zip(mine, theirs):
        second[j] = first[i]
    left = [c for i, c in enumerate(first) if i not in mine]
    left += [c for j, c in enumerate(second) if j not in theirs]
    return torch.einsum(f"{''.join(first)},{''.join(second)}->{''.join(left)}", a, b)


def _pools(name: str) -> Callable[..., Any]:
    """A pool of the last dimension whose window is all of it."""

    def pool(
        input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, *rest: Any, **names: Any
    ) -> Any:
        size = kernel_size[0] if isinstance(kernel_size, Sequence) else kernel_size
        if int(size) != input.shape[-1] or padding not in (0, (0,), [0]):
            raise NotImplementedError(f"{name}_pool1d of a part of the positions")
        return input.mean(-1, True) if name == "avg" else input.amax(-1, True)

    return pool


def _softmin(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return torch.softmax(-input, dim, dtype)


def _bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    products = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)  # (N, I * J)
    return F.linear(products, weight.flatten(1), bias)


def _min(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if isinstance(dim, Tensor):
        return torch.minimum(input, dim)
    values, indices = torch.max(-input, dim, keepdim)
    return -values, indices


# Not here: functions whose simpler ones saturate (glu has a sigmoid). `fcvgg.verify` divides what
# goes into softmaxes and sigmoids by a temperature, and must find them in source and network alike.
WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    **{
        alias: getattr(torch, name)
        for name, aliases in {
            "mul": "multiply",
            "sub": "subtract",
            "div": "divide true_divide",
            "neg": "negative",
            "acos": "arccos",
            "asin": "arcsin",
            "atan": "arctan",
            "atan2": "arctan2",
            "asinh": "arcsinh",
            "atanh": "arctanh",
            "abs": "absolute",
            "clamp": "clip",
            "matmul": "mm bmm mv linalg_matmul",
            "cat": "concat concatenate",
            "gt": "greater",
            "ge": "greater_equal",
            "lt": "less",
            "le": "less_equal",
            "movedim": "moveaxis",
            "transpose": "swapaxes swapdims",
        }.items()
        for alias in aliases.split()
    },
    "addmm": _addmm,
    "addmv": _addmm,
    "baddbmm": _addmm,
    "bilinear": _bilinear,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "cdist": _cdist,
    "clamp_max": _clamp_max,
    "clamp_min": _clamp_min,
    "cosine_similarity": _cosine_similarity,
    "dot": lambda a, b: (a * b).sum(-1),
    "hypot": lambda a, b: torch.sqrt(a * a + b * b),
    "lerp": _lerp,
    "linalg_norm": _linalg_norm,
    "log10": lambda x: torch.log(x) * 0.43429448190325182765,
    "log2": lambda x: torch.log(x) * 1.44269504088896340736,
    "logaddexp": lambda a, b: torch.logsumexp(torch.stack((a, b), -1), -1),
    "max_pool1d": _pools("max"),
    "avg_pool1d": _pools("avg"),
    "min": _min,
    "norm": _norm,
    "pairwise_distance": _pairwise_distance,
    "rsub": lambda a, b, alpha=1: b - a * alpha,
    "softmin": _softmin,
    "std": _std,
    "std_mean": lambda x, *a, **k: (_std(x, *a, **k), _mean_like_var(x, *a, **k)),
    "tensordot": _tensordot,
    "var_mean": lambda x, *a, **k: (torch.var(x, *a, **k), _mean_like_var(x, *a, **k)),
}
"""By the name of a function or method, what computes the same."""


def _mean_like_var(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, correction: Any = None
) -> Any:
    return x.mean(dim, keepdim)
