"""Checks of arguments, whose messages all read alike: what a value must be, and what it is."""

from __future__ import annotations

from collections.abc import Collection
from math import isfinite
from typing import Any

from fcvgg.errors import ArgumentError


def check_choice(name: str, value: Any, known: Collection[Any]) -> None:
    """Refuse a value that is not one of those known.

    Raises:
        ArgumentError: if it is not.
    """
    if value not in known:
        raise ArgumentError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")


def check_integer(name: str, value: Any, least: int) -> None:
    """Refuse what is not an integer of at least `least`.

    Raises:
        ArgumentError: if it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_rate(name: str, value: Any) -> None:
    """Refuse what is not a finite number of at least 0.

    Raises:
        ArgumentError: if it is not.
    """
    if not isinstance(value, (int, float)) or not isfinite(value) or value < 0:
        raise ArgumentError(f"{name} must be a finite number of at least 0, got {value!r}")
