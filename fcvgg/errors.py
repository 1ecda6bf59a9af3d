"""Every error that fcvgg raises on purpose.

A message is one line that says what was wrong, what was found, what is accepted and, where there is
one, the remedy. All classes derive from `FcvggError`, so one ``except`` catches them.
"""

from __future__ import annotations


class FcvggError(Exception):
    """Base of every error that fcvgg raises on purpose."""


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

    __str__ = (
        Exception.__str__
    )  # LookupError's subclasses may quote the message; keep one plain line


class DatasetError(FcvggError):
    """Something that cannot be used as labelled images, or has none."""


class LoadError(FcvggError):
    """A model or checkpoint that cannot be loaded."""


class TrainingError(FcvggError):
    """Training cannot begin or go on; what was good is kept."""


class MissingExtraError(FcvggError, ImportError):
    """An optional dependency is not installed."""


class ContenderError(FcvggError):
    """A contender of a benchmark failed in one case, or its process ended."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
