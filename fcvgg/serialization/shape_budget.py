"""A limit on what a model from a file may compute, kept while its shapes are computed.

A model is run on tensors without values, which take no memory, and every operation's result is
counted. So a small file whose layers multiply into terabytes, or into days of work, is refused
before anything is computed.
"""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fcvgg.errors import LoadError
from fcvgg.geometry import Geometry, Pair
from fcvgg.support.module_state import dtype_of

_LARGEST_VALUE = 1 << 26
"""Elements of a value that one image takes; VGG-16's largest at 1024x1024 has as many."""

_ALL_VALUES = 1 << 30
"""Elements of all values together; a VGG-16 has 30 million at 224x224."""

_FLOPS = 1 << 39
"""Of one image; a VGG-16 takes 3.1e10 at 224x224."""

_OPERATIONS = 30_000
"""Operations on one image; a DenseNet-201 takes 1,000."""

_TRACED_OPERATIONS = 10 * _OPERATIONS
"""Operations while a model is traced, at several sizes."""

_PIECES = 4_096
"""Parts that one operation may split a value into."""


class ExhaustedError(LoadError):
    """A model from a file that would take more than its budget."""


class ShapeBudget(TorchDispatchMode):
    """Counts operations on tensors without values, and stops where they become too many.

    Args:
        origin: what messages call the model.
        sized: whether to count elements and arithmetic too, at a size that will be run; without,
            only what shapes cost to compute.

    Raises:
        ExhaustedError: from the operation that exceeds the budget.
    """

    def __init__(self, origin: object, sized: bool = True):
        super().__init__()
        self._origin = origin
        self._sized = sized
        self._operations = 0
        self._elements = 0
        self._flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._operations += 1
        most = _OPERATIONS if self._sized else _TRACED_OPERATIONS
        self._check(self._operations, most, "operations", func)
        self._check(_pieces(func, args, kwargs), _PIECES, "parts of a value", func)
        if func._schema.name == "aten::arange":  # the order of features, which has values
            numbers = [n for n in args if isinstance(n, (int, float))]
            self._check(int(max(numbers, default=0)), _LARGEST_VALUE, "features", func)
        result = func(*args, **kwargs)
        returned = func._schema.returns
        # views take no memory of their own
        shared = bool(returned) and returned[0].alias_info is not None  # a view, or in place
        if self._sized and not shared:
            results = result if isinstance(result, (tuple, list)) else (result,)
            for value in results:
                if isinstance(value, Tensor) and value.device.type == "meta":
                    self.count(value.numel(), func)
            flops = flop_registry.get(func._overloadpacket)
            if flops is not None:
                self._flops += flops(*args, **kwargs, out_val=result)
                self._check(self._flops, _FLOPS, "arithmetic operations", func)
        return result

    def count(self, elements: int, func: Any) -> None:
        """Count a value, which an operation or the place of that name gives."""
        self._check(elements, _LARGEST_VALUE, "elements in a value", func)
        self._elements += elements
        self._check(self._elements, _ALL_VALUES, "elements in all values", func)

    def _check(self, found: int, most: int, what: str, func: Any) -> None:
        if found > most:
            place = func if isinstance(func, str) else func._schema.name.removeprefix("aten::")
            raise ExhaustedError(
                f"{self._origin} must take at most {most:,} {what} for an image, got {found:,} at "
                f"{place}; build the model in torch and pass it to fcvgg.convert if it is to be "
                "trusted"
            )


def _pieces(func: Any, args: Any, kwargs: Any) -> int:
    """How many tensors an operation gives for one, where its arguments do not list them."""
    name = func._schema.name
    if name not in ("aten::unbind", "aten::split"):
        return 0
    value = args[0]
    dim = kwargs.get("dim", args[-1] if len(args) == (2 if name == "aten::unbind" else 3) else 0)
    size = value.shape[dim]
    if name == "aten::unbind":
        return int(size)
    part = kwargs.get("split_size", args[1] if len(args) > 1 else size)
    return -(-int(size) // part) if isinstance(part, int) and part > 0 else 0


def check_affordable(model: nn.Module, shape: tuple[int, ...], origin: object) -> None:
    """Refuse a model that would take too much memory or time on images ``(N, C, H, W)``.

    What does not run here for another reason is left to whoever runs it.

    Raises:
        LoadError: if so.
    """
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {}
    # the copy gets tensors without values, so that it costs nothing whatever the model holds
    for tensor in tensors:
        bare = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if is_parameter else bare
    twin = copy.deepcopy(model, memo).eval()
    height, width = shape[2:]
    budget = ShapeBudget(f"{origin} at {height}x{width} pixels")
    budget.count(prod(shape), "its input")
    try:
        with torch.no_grad(), budget:
            images = torch.empty(shape, dtype=dtype_of(model), device="meta")
            twin(images)
    except LoadError:
        raise
    except Exception:
        pass


def largest_verified(geometry: Geometry, native: Pair) -> Pair:
    """The largest of the images that verification runs: native, and shifted along each axis."""
    tall, wide = (axis.interior(size)[0] + axis.stride for axis, size in zip(geometry.axes, native))
    return max(native, (tall, native[1]), (native[0], wide), key=prod)
