"""Seeing what goes into softmaxes and sigmoids, where their results no longer tell.

Far from zero these functions are flat: a softmax whose largest logit leads by 40 is 1 for that
class and 0 for the others to the last digit, whatever the logits are exactly. Divided by a
temperature of their own size, the same values come out apart from each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

_FLAT = {
    *(_aten._softmax, _aten._log_softmax, _aten.exp, _aten.exp_),
    *(_aten.sigmoid, _aten.sigmoid_, _aten.log_sigmoid_forward, _aten.tanh, _aten.tanh_),
    *(_aten.hardsigmoid, _aten.hardsigmoid_),
}
"""Functions that are flat, or steeper than what goes in, far from zero."""

_CUT = {_aten.clamp, _aten.clamp_, _aten.hardtanh, _aten.hardtanh_}
"""Functions that are sigmoids or tanhs of straight lines where they cut off at 1."""


class Temperature(TorchDispatchMode):
    """While active, divides what goes into saturating functions by a temperature.

    It works below the modules, on torch's own operations, so a source model and its converted
    network are changed alike however they are written. What other engines compute is not seen.

    Args:
        value: the temperature; 1 changes nothing.

    Attributes:
        seen: how many calls of saturating functions there were.
        largest: the largest finite absolute value that went into them.
    """

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.value = value
        self.seen = 0
        self.largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _saturates(func.overloadpacket, args) and not _is_captured():
            x, *rest = args
            self.seen += 1
            self.largest = max(self.largest, _largest(x))
            if self.value != 1:
                in_place = func.overloadpacket.__name__.endswith("_")
                args = (x.div_(self.value) if in_place else x / self.value, *rest)
        return func(*args, **(kwargs or {}))


def _saturates(operation: Any, args: tuple[Any, ...]) -> bool:
    if operation in _CUT:
        return tuple(map(_number, args[1:])) in ((0, 1), (-1, 1))
    return operation in _FLAT


def _number(bound: Any) -> Any:
    """A bound as a number, also where a tensor repeats it; None where that holds several."""
    if not isinstance(bound, Tensor):
        return bound
    values = bound.unique()
    return values.item() if len(values) == 1 else None


def _largest(x: Tensor) -> float:
    finite = x.detach().double().abs().nan_to_num(0, 0, 0)
    return finite.max().item() if finite.numel() else 0.0


def _is_captured() -> bool:
    """Whether the calls are recorded for later replays, which are not to depend on this one."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
