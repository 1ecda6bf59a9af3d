"""A torch classifier assembled step by step, as a file describes it.

An `Assembled` model runs its steps in order; each calls one of its layers or a function on named
values. It holds ordinary torch layers under the file's own names, and its `forward` may ask for
shapes, so `fcvgg.convert` reads it like any other model.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """One call: of the layer of that name, or of a function."""

    target: str | Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


class Assembled(nn.Module):
    """Layers and functions, called in order on named values.

    Args:
        image: the name of the value that `forward` receives.
    """

    def __init__(self, image: str):
        super().__init__()
        self.image = image
        self.steps: list[Step] = []
        self._constants: dict[str, Any] = {}
        self._buffers_of: dict[str, str] = {}
        self._outputs: tuple[str, ...] = ()
        self._done_with: list[tuple[str, ...]] = []

    def add_layer(self, name: str, layer: nn.Module) -> str:
        """Hold a layer under the name nearest to the wanted one that is free; gives that name."""
        parts = name.split(".")
        # the file's own dotted name where it can be that of a module, so that checkpoints fit
        proper = not any(map(keyword.iskeyword, parts))  # a graph's code has names, not keywords
        proper = proper and all(re.fullmatch(r"\w+", part) for part in parts)
        proper = proper and self._has_room(name)
        name = self._free(name if proper else plain_name(name))
        parent: nn.Module = self
        *path, child = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(child, layer.eval())
        return name

    def add_constant(self, name: str, value: Any) -> None:
        """Make a value known that does not depend on the image; tensors become buffers."""
        if isinstance(value, Tensor):
            buffer = self._free(plain_name(name))
            self.register_buffer(buffer, value)
            self._buffers_of[name] = buffer
        else:
            self._constants[name] = value

    def knows(self, name: str) -> bool:
        """Whether a constant of that name was added."""
        return name in self._constants or name in self._buffers_of

    def is_number(self, name: str) -> bool:
        """Whether it is a constant other than a tensor."""
        return name in self._constants

    def add_step(
        self,
        target: str | Callable[..., Any],
        inputs: Iterable[str],
        outputs: str | Iterable[str],
        /,
        **settings: Any,
    ) -> None:
        outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        self.steps.append(Step(target, tuple(inputs), outputs, settings))

    def finish(self, outputs: Iterable[str]) -> None:
        """State what comes out, and from that which values are not needed after each step."""
        self._outputs = tuple(outputs)
        later = set(self._outputs)
        self._done_with = []
        # from the end, where it is known what is read later: forward drops the rest, as a list of
        # all values would hold every map of the network at once
        for step in reversed(self.steps):
            self._done_with.append(tuple({*step.inputs, *step.outputs} - later))
            later.update(step.inputs)
        self._done_with.reverse()
        self.eval()

    def forward(self, images: Tensor) -> Any:
        values: dict[str, Any] = {self.image: images}
        for step, done_with in zip(self.steps, self._done_with):
            arguments = [self._value(name, values) for name in step.inputs]
            run = self.get_submodule(step.target) if isinstance(step.target, str) else step.target
            result = run(*arguments, **step.settings)
            if len(step.outputs) == 1:
                result = (result,)
            values.update(zip(step.outputs, result))
            for name in done_with:
                values.pop(name, None)
        results = tuple(self._value(name, values) for name in self._outputs)
        return results[0] if len(results) == 1 else results

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        if name in values:
            return values[name]
        if name in self._buffers_of:
            return getattr(self, self._buffers_of[name])
        return self._constants[name]

    def _free(self, name: str) -> str:
        """The name, or with a number where a layer, buffer or attribute has it already."""
        owner, _, child = name.rpartition(".")
        try:
            place = self.get_submodule(owner)
        except AttributeError:
            return name
        candidate, number = child, 1
        while hasattr(place, candidate):
            number += 1
            candidate = f"{child}_{number}"
        return f"{owner}.{candidate}" if owner else candidate

    def _has_room(self, name: str) -> bool:
        """Whether the modules on the way to a dotted name are there to hold others, or not yet."""
        place: nn.Module = self
        for part in name.split(".")[:-1]:
            if part not in place._modules:
                return not hasattr(place, part)
            place = place.get_submodule(part)
            if type(place) is not nn.Module:
                return False
        return True


def plain_name(name: str) -> str:
    """A name that a module's attribute may have."""
    plain = re.sub(r"\W+", "_", name).strip("_") or "value"
    return f"{plain}_" if keyword.iskeyword(plain) else plain


def scores_of(output: Tensor) -> Tensor:
    """A classifier's output as ``(N, K)``: trailing dimensions of size 1 are dropped."""
    if output.ndim > 2 and all(n == 1 for n in output.shape[2:]):
        return torch.flatten(output, 1)
    return output
