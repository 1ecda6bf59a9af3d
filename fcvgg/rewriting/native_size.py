"""The native size of a model: what its graph tells of the size it was made for."""

from __future__ import annotations

from torch import nn

from fcvgg.errors import ConversionError, InputSizeError
from fcvgg.geometry import LARGEST_SIZE, Pair, smallest_size
from fcvgg.rewriting.capture import capture
from fcvgg.rewriting.map_builder import Boundary, MapBuilder
from fcvgg.rewriting.rewriter import Rewriter
from fcvgg.rewriting.rules import is_known, kind_for
from fcvgg.rewriting.twins import sharing_twin

_TRIAL_SIZES = (224, 1024)
"""Sizes at which a model is traced to find its native size: the usual one, and a large one."""


def infer_input_size(model: nn.Module, in_channels: int | None = None) -> Pair:
    """The smallest square size at which the model's graph runs and keeps the batch.

    Args:
        in_channels: the channels of the images; found by the graph when None.

    Raises:
        InputSizeError: if the graph does not determine it.
    """
    failure: Exception | None = None
    for trial in _TRIAL_SIZES:
        try:
            captured = capture(model, (trial, trial), is_known, in_channels)
            build = MapBuilder(captured, sharing_twin(model))
        except InputSizeError as error:
            failure = error
            continue
        try:
            Rewriter(captured, build).run(kind_for)
        except InputSizeError as error:
            failure = error
        except ConversionError:
            captured.require_channels()  # which may be what the layer suffers from
            raise
        if build.boundary is not None:
            return _size_at(build.boundary, build)
    reason = f": {str(failure).partition('; pass ')[0]}" if failure else ""
    raise InputSizeError(
        f"the native size cannot be inferred from {type(model).__name__}{reason}; "
        "pass input_size=, the size it was trained at"
    )


def _size_at(boundary: Boundary, build: MapBuilder) -> Pair:
    """The smallest square input whose features are what the head asks for."""
    place, wants = boundary.place, boundary.wants
    if wants is None:
        raise InputSizeError(
            f"{place} takes features of any size, so the native size is not determined; "
            "pass input_size=, the size the model was trained at (often 224)"
        )
    height, width = build.steps.geometry_at(boundary.cells.step).axes
    channels = boundary.cells.extent[0]

    def enough(size: int) -> bool:
        h, w = height.cells(size), width.cells(size)
        if isinstance(wants, int):
            return channels * h * w >= wants
        return h >= wants[0] and w >= wants[1]

    size = smallest_size(enough)
    if size is None:
        raise InputSizeError(
            f"no input gives {place} its features: it would be larger than {LARGEST_SIZE} pixels"
        )
    h, w = height.cells(size), width.cells(size)
    if (channels * h * w if isinstance(wants, int) else (h, w)) != wants:
        expected = f"{wants} features" if isinstance(wants, int) else f"features of size {wants}"
        raise InputSizeError(
            f"no square input gives {place} the {expected} it takes: {size} pixels give "
            f"{channels}x{h}x{w}; pass input_size=(height, width)"
        )
    return size, size
