"""Everything about a stream but how it is cut into strips."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fcvgg.errors import ArgumentError
from fcvgg.geometry import Axis, Geometry, Pair
from fcvgg.images.lazy.input import strip_reader
from fcvgg.images.lazy.opening import strip_source
from fcvgg.images.lazy.source import StripSource
from fcvgg.inference.missing import missing_pixels
from fcvgg.inference.stages import stages_of
from fcvgg.network import FullyConvolutional
from fcvgg.results.score_map import ScoreMap
from fcvgg.streaming.selection import ScoreMapOfSomeClasses, Selection
from fcvgg.streaming.strip_plan import (
    Layout,
    StripPlan,
    estimated_peak,
    itemsize_of,
    plan_strips,
    readable,
)
from fcvgg.support.module_state import device_of, dtype_of


@dataclass(frozen=True)
class StreamJob:
    """Everything about a stream but how it is cut into strips."""

    net: FullyConvolutional
    source: StripSource
    read: Callable[[Pair, Pair], Tensor]
    selection: Selection
    layout: Layout
    output: int

    @classmethod
    def prepared(
        cls, net: Any, source: Any, classes: Any, rows: Any, output: int = 0, nodata: Any = None
    ) -> StreamJob:
        """Check the arguments of `stream`."""
        if not isinstance(net, FullyConvolutional):
            whole = callable(getattr(net, "predict", None)) and hasattr(net, "backbone")
            raise ArgumentError(
                f"net must be a converted network, got {type(net).__name__}; "
                + (
                    "an FCN is not streamed: its predict(image) labels a whole image"
                    if whole
                    else "pass fcvgg.convert(model)"
                )
            )
        if output not in range(len(net.program.classes)):
            raise ArgumentError(
                f"output={output!r} is unknown; the network has {len(net.program.classes)}"
            )
        image = strip_source(source, net.in_channels, nodata)
        selection = Selection.of(classes, net, output)
        size = tuple(max(n, axis.window) for n, axis in zip(image.size, net.geometry.axes))
        height, width = net.output_size(image.size)
        layout = Layout(
            stages_of(net.layers, net.in_channels, output),
            (size[0], size[1]),
            _checked_rows(rows, height),
            (0, width),
            itemsize_of(net.compute_dtype),
        )
        read = strip_reader(image, net.preprocess, net.in_channels)
        return cls(net, image, read, selection, layout, output)

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's."""
        (top, bottom), (left, right) = self.layout.rows, self.layout.cols
        return (*self.selection.lead, bottom - top, right - left)

    @property
    def dtype(self) -> torch.dtype:
        return self.selection.dtype(dtype_of(self.net))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the result."""
        *lead, _, width = self.shape
        return int(np.prod([*lead, width])) * itemsize_of(self.dtype)

    @property
    def categories(self) -> tuple[str, ...] | None:
        names = self.net.categories if self.output == 0 else None
        if names is None or self.selection.kind != "scores":
            return names
        return tuple(names[i] for i in self.selection.indices)

    @property
    def geometry(self) -> Geometry:
        """The result's, in the image's pixels; its row 0 is the first row asked for."""
        placed = self.net.geometry.placed(self.source.size)
        return Geometry(_from_row(placed.height, self.layout.rows[0]), placed.width)

    def plan(self, memory: int, beside: int) -> StripPlan:
        """How to stream within `memory` bytes, of which `beside` are taken already."""
        beside += self.source.resident
        return plan_strips(self.layout, memory, beside, self.source.column_bytes)

    def peak(self, strip_bytes: int, block: int, beside: int) -> int:
        """The bytes that strips and blocks of columns of these sizes need."""
        beside += self.source.resident
        return beside + estimated_peak(self.layout, strip_bytes, block, self.source.column_bytes)

    def strip(self, rows: Pair, cols: Pair) -> tuple[Tensor, Tensor | None]:
        """Rows and columns of the network's input, which is padded below the window.

        Returns:
            the input ``(1, C, h, w)``, and where it lacks finite values and holds zeros instead,
            bool ``(1, 1, h, w)``; None if nowhere.
        """
        (top, _), (left, _) = self.net.geometry.padding_for(self.source.size)
        height, width = self.source.size
        y = (min(max(rows[0] - top, 0), height), min(max(rows[1] - top, 0), height))
        x = (min(max(cols[0] - left, 0), width), min(max(cols[1] - left, 0), width))
        device, dtype = device_of(self.net), self.net.compute_dtype
        if y[0] == y[1] or x[0] == x[1]:
            shape = (1, self.net.in_channels, rows[1] - rows[0], cols[1] - cols[0])
            return torch.zeros(shape, device=device, dtype=dtype), None
        pixels = self.read(y, x).to(device, dtype)
        missing = missing_pixels(pixels)
        if missing is not None:
            pixels = pixels.masked_fill(missing, 0)
        # with the channels last oneDNN is faster, and a row of a map is one piece of memory
        last = device.type == "cpu" and pixels.element_size() <= 4
        order = torch.channels_last if last else torch.contiguous_format
        pixels = pixels.contiguous(memory_format=order)
        around = (x[0] + left - cols[0], cols[1] - x[1] - left)
        around = (*around, y[0] + top - rows[0], rows[1] - y[1] - top)  # type: ignore[assignment]
        if not any(around):
            return pixels, missing
        return F.pad(pixels, around), None if missing is None else F.pad(missing, around)


def plan_in_memory(job: StreamJob, memory: int) -> StripPlan:
    """The plan where the map is kept in memory too.

    Raises:
        ArgumentError: if there is none.
    """
    result_bytes = job.row_bytes * job.shape[-2]
    try:
        return job.plan(memory, result_bytes)
    except ArgumentError as error:
        if result_bytes < memory // 4:
            raise
        raise ArgumentError(
            f"{error}, of which the map itself takes {readable(result_bytes)}; write it to disk "
            "with out=, or keep fewer classes"
        ) from error


def as_result(job: StreamJob, result: Tensor) -> Any:
    """A finished map as `stream` returns it."""
    if job.selection.kind != "scores":
        return result
    known: dict[str, Any] = {
        "geometry": job.geometry,
        "image_size": job.source.size,
        "input_size": job.source.size,
        "categories": job.categories,
        "activation": job.selection.activation,
    }
    if job.selection.whole:
        return ScoreMap(scores=result, **known)
    if not job.selection.normalized:
        return ScoreMapOfSomeClasses(scores=result, **known)
    return ScoreMapOfSomeClasses(scores=result[:-1], normalizer=result[-1], **known)


def _checked_rows(rows: Any, height: int) -> Pair:
    if rows is None:
        return 0, height
    try:
        first, end = (operator.index(n) for n in rows)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"rows={rows!r} is no range; expected whole numbers (first, end)"
        ) from error
    if not 0 <= first < end <= height:
        raise ArgumentError(
            f"rows={(first, end)} is no range of the map's {height} rows; "
            f"expected 0 <= first < end <= {height}"
        )
    return first, end


def _from_row(axis: Axis, row: int) -> Axis:
    return replace(axis, origin=axis.origin + row * axis.stride)
