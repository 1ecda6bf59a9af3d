"""Which of torch's functions and methods do more, or less, than compute a new value.

Tables for `fcvgg.rewriting.tracing`, by the name under which a function mode sees a call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

QUESTIONS = frozenset(
    {
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "__len__", "element_size"),
        *("is_floating_point", "is_complex", "is_contiguous", "storage_offset", "__repr__"),
        *("__format__", "__hash__", "is_signed", "is_inference"),
    }
)
"""Methods that ask for what is known of a value without its data."""

NUMBERS = frozenset(
    {
        *("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"),
        *("__array__", "__complex__", "is_nonzero", "__contains__"),
    }
)
"""Methods that need the data of a value, which it does not have while it is traced."""

OF_GRADIENTS = frozenset({"requires_grad_", "retain_grad", "register_hook"})

LIKE = frozenset({"view_as", "reshape_as", "expand_as"})

CASTS = frozenset({"to", "type_as", "cpu", "cuda", "type"})

NEW: dict[str, Callable[..., Tensor]] = {
    "new_tensor": torch.tensor,
    "new_zeros": torch.zeros,
    "new_ones": torch.ones,
    "new_full": torch.full,
    "new_empty": torch.empty,
}

OF_DEVICES = {"device": torch.device("cpu"), "is_cuda": False, "is_cpu": True, "is_meta": False}

OPERATORS: dict[str, Callable[..., Any]] = {
    **{
        spelling: getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "pow", "neg", "matmul", "gt", "ge", "lt", "le", "eq", "ne"),
            *("truediv", "floordiv", "mod", "pos"),
        )
        for spelling in (name, f"__{name}__")
    },
    **{f"__{name}__": getattr(operator, name) for name in ("getitem", "setitem", "invert", "abs")},
    **{f"__{name}__": getattr(operator, f"{name}_") for name in ("and", "or")},
    "div": operator.truediv,
    "positive": operator.pos,
}
"""Methods that stand for an operator of Python: ``x + y`` calls ``Tensor.add``."""

REFLECTED: dict[str, Callable[..., Any]] = {
    f"__r{name}__": getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "pow", "matmul", "floordiv", "mod")
} | {"__rdiv__": operator.truediv}

IN_PLACE: dict[str, Callable[..., Any]] = {
    name: made
    for base, made in (
        ("add", operator.add),
        ("sub", operator.sub),
        ("mul", operator.mul),
        ("div", operator.truediv),
        ("truediv", operator.truediv),
    )
    for name in (f"{base}_", f"__i{base}__")
}
"""Methods of ``x += y``, which become ``x + y``: views of x follow by what they share with it."""

# what a function of torch's asks before it runs its own body: whether a mode or subclass acts
NOT_OVERRIDDEN = {
    name: lambda *_: False
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
}
