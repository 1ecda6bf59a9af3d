"""Every error that fcvgg raises on purpose.

A message is one line: ``<name> must be <what>, got <value>; <remedy>``. All classes derive from
`FcvggError`, so one ``except`` catches them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import isfinite
from typing import Any

from fcvgg.names import alternatives, readable

_LONGEST = 2_000
"""Characters of a message; names in files may be of any length."""

_LONGEST_WORD = 400
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")


def _bounded(text: str) -> str:
    """Text without the middle of words, and of itself, where they are long."""
    text = _LONG_WORD.sub(lambda word: _shortened(word[0], _LONGEST_WORD), text)
    return _shortened(text, _LONGEST)


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest * 2 // 3]}[...]{text[-longest // 3 :]}"


class FcvggError(Exception):
    """Base of every error that fcvgg raises on purpose.

    Its message is one line of bounded length, whatever the names in it hold.
    """

    def __init__(self, *args: object):
        super().__init__(*(_message(a) if isinstance(a, str) else a for a in args))


def _message(text: str) -> str:
    return readable(_bounded(re.sub(r"[ \t]*\n\s*", " ", text.strip())))


class FcvggWarning(UserWarning):
    """What a user should know of a result that is given all the same."""


class ConversionError(FcvggError):
    """The model cannot be turned into a fully convolutional network."""


class CaptureError(ConversionError):
    """The model's computation cannot be read as a graph, or does not run at the input size."""


class UnsupportedLayerError(ConversionError):
    """A layer or function that has no rule, or whose result would not stay a cell."""


class RefusedLayerError(UnsupportedLayerError):
    """A layer that is known, and known to break the equivalence."""


class InputSizeError(ConversionError):
    """The native input size is not determined by the graph, or does not fit the model."""


class EquivalenceError(ConversionError):
    """The converted network does not give the source model's answer."""


class GeometryError(FcvggError, ValueError):
    """A size, point or cell index that the geometry has no answer for."""


class ArgumentError(FcvggError, ValueError):
    """An option whose value is not one of those accepted."""


class ImageError(FcvggError):
    """A file, array or tensor that cannot be used as an image."""


class PreprocessError(FcvggError):
    """Preprocessing is unknown, or its values are not usable."""


class CategoryError(FcvggError, LookupError):
    """A class index or name that the network does not have."""

    __str__ = Exception.__str__  # KeyError, a sibling, quotes its message; this one stays plain


class DatasetError(FcvggError):
    """Something that cannot be used as labelled images, or has none."""


class LoadError(FcvggError):
    """A model or checkpoint that cannot be loaded."""


class TrainingError(FcvggError):
    """Training cannot begin or go on; what was good is kept."""


class MissingExtraError(FcvggError, ImportError):
    """An optional dependency is not installed."""


def check_choice(
    name: str, value: Any, choices: Iterable[Any], error: type[FcvggError] = ArgumentError
) -> None:
    """Refuse a value that is not one of those that an argument takes.

    Raises:
        FcvggError: of the class `error`.
    """
    choices = tuple(choices)
    if value not in choices:
        raise error(f"{name} must be {alternatives(map(repr, choices))}, got {value!r}")


def check_share(name: str, value: float) -> None:
    """Refuse a number outside [0, 1].

    Raises:
        ArgumentError: naming the argument.
    """
    if not 0 <= value <= 1:
        raise ArgumentError(f"{name} must be in [0, 1], got {value}")


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


def one_line(error: BaseException) -> str:
    """The first line of an error's message, as `readable` shows it."""
    return readable(_bounded((str(error).strip() or type(error).__name__).splitlines()[0]))
