"""What a stream computes, before it is cut into strips: the network, the image and the cells."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from math import log, nan, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcvgg.errors import ArgumentError
from fcvgg.geometry import Geometry, Pair
from fcvgg.images.lazy.opening import strip_source
from fcvgg.images.lazy.source import StripSource
from fcvgg.inference.line_buffers import length, same_bits
from fcvgg.inference.missing import sees_whole_field
from fcvgg.inference.schedule import Schedule
from fcvgg.inference.stages import stages_of
from fcvgg.inference.strip_input import StripInput
from fcvgg.network import FullyConvolutional
from fcvgg.results.score_map import ScoreMap
from fcvgg.streaming.bands import Band, rows_lost, strips_of
from fcvgg.streaming.interest import Interest
from fcvgg.streaming.selection import ScoreMapOfSomeClasses, Selection
from fcvgg.streaming.strip_plan import StripPlan, Workload, estimated_peak, plan_strips
from fcvgg.support.memory_text import size_text
from fcvgg.support.module_state import device_of, dtype_of, evaluating


@dataclass(frozen=True)
class StreamJob:
    """What a stream computes, before it is cut into strips."""

    net: FullyConvolutional
    input: StripInput
    selection: Selection
    workload: Workload
    output: int
    interest: Interest | None = None

    @classmethod
    def prepared(
        cls,
        net: Any,
        source: Any,
        classes: Any,
        rows: Any,
        output: int | str = 0,
        nodata: Any = None,
        where: Any = None,
        fill: Any = None,
        mpp: float | None = None,
        interest: Interest | None = None,
    ) -> StreamJob:
        """The job that the arguments of `stream` ask for; `interest` stands for where and fill.

        Raises:
            ArgumentError: if one of them cannot be used.
        """
        if not isinstance(net, FullyConvolutional):
            is_fcn = callable(getattr(net, "predict", None)) and hasattr(net, "backbone")
            remedy = "call its predict(image)" if is_fcn else "pass fcvgg.convert(model)"
            raise ArgumentError(
                f"net must be a converted network, got {type(net).__name__}; {remedy}"
            )
        output = net.output_index(output)
        trained = None if net.preprocess is None else net.preprocess.mpp
        image = strip_source(source, net.in_channels, nodata, mpp, trained)
        selection = Selection.of(classes, net, output)
        strips = StripInput.of(net, image)
        height, width = net.output_size(image.size)
        workload = Workload(
            stages_of(net.layers, net.in_channels, output),
            strips.size,
            _checked_rows(rows, height),
            (0, width),
            net.compute_dtype.itemsize,
        )
        _check_fill(fill, where, selection)
        job = cls(net, strips, selection, workload, output, interest)
        return job if interest is not None else replace(job, interest=job._interest(where, fill))

    def _interest(self, where: Any, fill: Any) -> Interest | None:
        """The cells to compute; None for all."""
        geometry, (top, bottom) = self.net.geometry, self.workload.rows
        image, placed = self.source, geometry.placed(self.source.size)
        interest = None
        if where is not None:
            size = self.net.output_size(image.size)
            interest = Interest.of(where, fill, image, placed, size, (top, bottom))
        # cells without data hold NaN as those outside do, unless these are filled
        if image.left_out is None or fill is not None:
            return interest
        if not sees_whole_field(self.workload.stages, geometry):
            return interest
        whole = interest or Interest(np.ones((bottom - top, self.shape[-1]), np.bool_))
        return whole.with_data(image, placed, (top, bottom))

    @property
    def source(self) -> StripSource:
        return self.input.source

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``(..., h, w)`` of the result."""
        (top, bottom), (left, right) = self.workload.rows, self.workload.cols
        return (*self.selection.lead, bottom - top, right - left)

    @property
    def dtype(self) -> torch.dtype:
        return self.selection.dtype(dtype_of(self.net))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the result."""
        *lead, _, width = self.shape
        return prod([*lead, width]) * self.dtype.itemsize

    @property
    def categories(self) -> tuple[str, ...] | None:
        names = self.net.categories if self.output == 0 else None
        if names is None or self.selection.kind != "scores":
            return names
        return tuple(names[i] for i in self.selection.indices)

    @property
    def geometry(self) -> Geometry:
        """Of the result, in the image's pixels; its row 0 is the first row asked for."""
        placed = self.net.geometry.placed(self.source.size)
        height = placed.height
        origin = height.origin + self.workload.rows[0] * height.stride
        return Geometry(replace(height, origin=origin), placed.width)

    @property
    def blank(self) -> Tensor:
        """What a cell that is not computed holds, ``(*lead, 1, 1)``."""
        fill = None if self.interest is None else self.interest.fill
        missing = -1 if self.selection.kind == "argmax" else nan
        value = torch.full((*self.selection.lead, 1, 1), missing, dtype=self.dtype)
        if fill is not None:
            value.fill_(fill)
            if self.selection.normalized:  # as if all classes held the fill
                value[-1] += log(self.selection.count)
        elif self.selection.kind == "top5":
            value[0] = -1
        return value.to(device_of(self.net))

    def bands(self, block: Pair, strip_bytes: int) -> list[Band]:
        """The rows of cells of a block of columns that are computed, each with its columns.

        Both count from the first row and column of the map.
        """
        if self.interest is None:
            return [(self.workload.rows, [block])]
        known, key = self.interest.known, (block, strip_bytes)
        if key not in known:
            schedule = self.workload.schedule(strip_bytes, block)
            field, stride = self.net.geometry.receptive_field, self.net.geometry.stride
            lost = rows_lost(schedule, stride[0]), max(field[1] / stride[1] - 1, 0.0)
            found = self.interest.bands(
                block, lost, lambda bands: self._agree(schedule, block, self._placed(bands, block))
            )
            known[key] = self._placed(found, block)
        return known[key]

    def _placed(self, bands: list[Band], block: Pair) -> list[Band]:
        """Bands of a block, counted from the first row and column of the map."""
        top, left = self.workload.rows[0], block[0]
        return [
            ((top + first, top + end), [(left + a, left + b) for a, b in ranges])
            for (first, end), ranges in bands
        ]

    def _agree(self, schedule: Schedule, block: Pair, bands: list[Band]) -> bool:
        """Whether the cells of all ranges of columns have the bits of whole rows."""
        ranges = sorted({cols for _, ranges in bands for cols in ranges if cols != block})
        strips = sorted({n for rows, _ in bands for n in strips_of(schedule, rows)})
        widths = {tuple(map(length, w.ranges)): w for w in map(self.workload.width, ranges)}
        like = torch.empty(0, dtype=self.net.compute_dtype, device=device_of(self.net))
        whole = self.workload.width(block)
        with evaluating(self.net), torch.no_grad():
            return same_bits(schedule, strips, whole, list(widths.values()), like)

    def plan(self, memory: int, taken: int) -> StripPlan:
        """How to stream within `memory` bytes, of which `taken` are in use already."""
        taken += self.source.resident
        return plan_strips(self.workload, memory, taken, self.source.column_bytes)

    def peak(self, strip_bytes: int, block: int, taken: int) -> int:
        """The bytes that strips and blocks of columns of these sizes need, with those `taken`."""
        taken += self.source.resident
        return taken + estimated_peak(self.workload, strip_bytes, block, self.source.column_bytes)


def plan_in_memory(job: StreamJob, memory: int) -> StripPlan:
    """The plan where the map is kept in memory too.

    Raises:
        ArgumentError: if no plan fits.
    """
    result_bytes = job.row_bytes * job.shape[-2]
    try:
        return job.plan(memory, result_bytes)
    except ArgumentError as error:
        if result_bytes < memory // 4:
            raise
        raise ArgumentError(
            f"{error}; the map itself takes {size_text(result_bytes)}, so write it to disk with "
            "out=, or keep fewer classes"
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
        "full_size": job.source.full_size,
        "georeference": job.source.georeference,
    }
    if job.selection.whole:
        return ScoreMap(scores=result, **known)
    if job.selection.normalized:  # (classes + 1, h, w)
        known["normalizer"], result = result[-1], result[:-1]
    return ScoreMapOfSomeClasses(scores=result, **known)


def _check_fill(fill: Any, where: Any, selection: Selection) -> None:
    if fill is None:
        return
    if where is None or selection.kind == "top5":
        given = "for classes='top5'" if where is not None else "without where="
        raise ArgumentError(f"fill must be None {given}, got {fill!r}")
    if isinstance(fill, bool) or not isinstance(fill, (int, float)):
        raise ArgumentError(f"fill must be a number, got {fill!r}")
    if selection.kind == "argmax" and fill not in range(-1, selection.count):
        raise ArgumentError(
            f"fill must be a class from 0 to {selection.count - 1} or -1 for classes='argmax', got "
            f"{fill!r}"
        )


def _checked_rows(rows: Any, height: int) -> Pair:
    if rows is None:
        return 0, height
    try:
        first, end = (operator.index(n) for n in rows)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"rows must be whole numbers (first, end), got {rows!r}") from error
    if not 0 <= first < end <= height:
        raise ArgumentError(
            f"rows must be (first, end) with 0 <= first < end <= {height}, the rows of the map, "
            f"got {(first, end)}"
        )
    return first, end
