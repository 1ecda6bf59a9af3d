"""How the layers of a converted network compute a part of their map, for `fcvgg.streaming`.

What stands in a converted graph either slides a window, and its record gives a `Sliding`, or works
on every position by itself. The records are those of `fcvgg.rewriting.rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fcvgg.rewriting.program import Windows
from fcvgg.rewriting.rules.registry import is_positional, register, sliding_of
from fcvgg.rewriting.sliding import Part, Sliding, windows_of

__all__ = ["Part", "Sliding", "Windows", "is_positional", "sliding_of", "strip_rule", "windows_of"]

StripRule = Callable[..., Sliding]


def strip_rule(*targets: Any) -> Callable[[StripRule], StripRule]:
    """Register how module classes or functions of converted graphs compute a part of a map.

    It is the field `slides` of their record. The rule gets the module, or the arguments of the
    function without the map itself.
    """

    def decorated(function: StripRule) -> StripRule:
        register(*targets, slides=function)
        return function

    return decorated
