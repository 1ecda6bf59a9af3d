"""Functions that a model's `forward` calls, as layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fcvgg.rewriting.marks import FollowsTraining


class Operation(nn.Module):
    """A function that a model's `forward` calls, as a layer."""

    def __init__(self, target: Callable[..., Any] | str, args: Any, kwargs: Any):
        super().__init__()
        self.target = target
        self.args = args
        self.kwargs = kwargs

    def forward(self, x: Tensor) -> Any:
        follow = self._following
        args = [follow(a) for a in self.args]
        kwargs = {k: follow(a) for k, a in self.kwargs.items()}
        if isinstance(self.target, str):
            return getattr(x, self.target)(*args, **kwargs)
        return self.target(x, *args, **kwargs)

    def _following(self, argument: Any) -> Any:
        return self.training if isinstance(argument, FollowsTraining) else argument

    def extra_repr(self) -> str:
        name = self.target if isinstance(self.target, str) else self.target.__name__
        return ", ".join(map(str, [name, *self.args, *self.kwargs.items()]))
