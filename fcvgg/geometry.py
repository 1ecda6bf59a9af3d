"""Where the cells of a score map lie on the image: integer arithmetic alone, no torch.

One axis is described by `Axis`, a chain (or a graph, for networks with branches) of steps, each
with the `KernelGeometry` of a layer. `Geometry` holds one axis for the height and one for the width
and answers in ``(h, w)`` pairs, ``(y, x)`` points and half-open ``(top, left, bottom, right)``
boxes. Points are pixel indices: the middle of the first pixel is 0.0. The arithmetic follows
"Computing Receptive Fields of Convolutional Neural Networks" (https://distill.pub/2019/computing-receptive-fields).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import floor, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcvgg.errors import FcvggError, GeometryError

Pair = tuple[int, int]
Box = tuple[int, int, int, int]

IMAGE = -1
"""The input of a step that reads the image itself."""

LARGEST_SIZE = 1 << 20
"""Pixels along one axis beyond which no smallest input is looked for."""


@dataclass(frozen=True)
class KernelGeometry:
    """What one layer does along one axis: a kernel that slides over zero- or edge-padded input.

    A layer that enlarges its map repeats each input position `repeats` times; kernel, stride and
    padding count the repeated positions.
    """

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    ceil_mode: bool = False
    repeats: int = 1

    @classmethod
    def from_dict(cls, data: Any) -> KernelGeometry:
        """The window of `dataclasses.asdict`, as a file has it.

        Raises:
            GeometryError: if its fields or values are not those of a window of a known layer.
        """
        if isinstance(data, dict) and data.keys() <= {field.name for field in fields(cls)}:
            window = cls(**data)
            positive = window.kernel, window.stride, window.dilation, window.repeats
            numbers = (*positive, window.before, window.after)
            known = all(type(n) is int and abs(n) <= LARGEST_SIZE for n in numbers)
            if known and min(positive) > 0 and type(window.ceil_mode) is bool:
                return window
        raise GeometryError(f"each window of the geometry must hold known integers, got {data!r}")

    @property
    def span(self) -> int:
        """(Repeated) input positions from the first to the last that one output position reads."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def is_identity(self) -> bool:
        return self == KernelGeometry()

    def reads(self, first: Any, end: Any) -> tuple[Any, Any]:
        """The input positions that outputs ``[first, end)`` read, padding included."""
        start = first * self.stride - self.before
        last = (end - 1) * self.stride - self.before + self.span - 1
        return start // self.repeats, last // self.repeats + 1

    def finished(self, available: Any) -> Any:
        """The end of the outputs that read no input position from `available` on."""
        return (available * self.repeats + self.before - self.span) // self.stride + 1

    def within(self, first: int, end: int) -> KernelGeometry:
        """The kernel on a map that holds just what outputs ``[first, end)`` read."""
        low, high = self.reads(first, end)
        before = low * self.repeats + self.before - first * self.stride
        after = (end - 1 - first) * self.stride + self.span - before - (high - low) * self.repeats
        return replace(self, before=before, after=after, ceil_mode=False)

    def output_size(self, size: int) -> int:
        """Output positions for `size` input positions, by torch's rule; 0 where none fits."""
        free = size * self.repeats + self.before + self.after - self.span
        if not self.ceil_mode:
            return max(free // self.stride + 1, 0)
        cells = -(-free // self.stride) + 1
        # like torch, drop a last window that would start in the padding after the input
        if (cells - 1) * self.stride >= size + self.before:
            cells -= 1
        return max(cells, 0)


KernelPair = tuple[KernelGeometry, KernelGeometry]
"""What a layer does along the height and along the width."""

Window = KernelGeometry  # the class's earlier name, for rules that users have written


@dataclass(frozen=True)
class Step:
    """A window over one earlier step, or the join of several (addition, concatenation)."""

    window: KernelGeometry
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """One axis of a network: its steps in order of computation, the last giving the cells.

    `origin` is the image pixel at which the network's input starts (negative where an image smaller
    than the window was padded). `context` is the extent of the source model's input that one cell
    stands for and `context_start` where that lies for cell 0. None is the window itself: it differs
    where padding or ceil mode make the window smaller than the native size, and where the map was
    padded to keep its size (``padding="same"``).
    """

    steps: tuple[Step, ...] = ()
    origin: int = 0
    context: int | None = None
    context_start: int = 0

    def sizes(self, size: int) -> list[int]:
        """Positions after each step for an input of `size`; 0 once the input is too small."""
        sizes: list[int] = []
        for step in self.steps:
            # a join has as many positions as the smallest of its inputs
            fed = [size if i == IMAGE else sizes[i] for i in step.inputs]
            sizes.append(step.window.output_size(min(fed)) if min(fed) > 0 else 0)
        return sizes

    def cells(self, size: int) -> int:
        """Cells for an unpadded input of `size`; 0 below the window."""
        return self.sizes(size)[-1] if self.steps else size

    def output_size(self, size: int) -> int:
        """Cells for an image of `size`, which is padded up to the window where it is smaller."""
        return self.cells(max(size, self.window))

    @cached_property
    def _fields(self) -> list[tuple[int, int, int]]:
        """``(stride, first, end)`` per step: position i reads pixels i*stride + [first, end)."""
        found: list[tuple[int, int, int]] = []
        for step in self.steps:
            found.append(_field_of(step, found))
        return found

    @property
    def stride(self) -> int:
        return self._fields[-1][0] if self.steps else 1

    @cached_property
    def period(self) -> int:
        """Pixels by which an image must move for all positions to move: the stride, or more.

        Positions of an enlarged map differ by their place between those of the coarser map.
        """
        periods: list[int] = []
        for step, (stride, _, _) in zip(self.steps, self._fields):
            periods.append(lcm(stride, *(periods[i] for i in step.inputs if i != IMAGE)))
        return periods[-1] if periods else 1

    @cached_property
    def _field(self) -> Pair:
        """``(first, end)``: cell i reads pixels i*stride + [first, end)."""
        if not self.steps:
            return 0, 1
        if all(step.window.repeats == 1 for step in self.steps):
            return self._fields[-1][1:]
        # What an enlarged position reads depends on its place, so that it is followed backwards.
        fields = []
        for cell in range(self.period // self.stride):
            low, high = self._pixels_of(cell)
            fields.append((low - cell * self.stride, high - cell * self.stride))
        return min(low for low, _ in fields), max(high for _, high in fields)

    def _pixels_of(self, cell: int) -> Pair:
        """The image's pixels that a cell depends on."""
        needed: dict[int, Pair] = {len(self.steps) - 1: (cell, cell + 1)}
        for i in range(len(self.steps) - 1, IMAGE, -1):
            if i in needed:
                low, high = self.steps[i].window.reads(*needed[i])
                for fed in self.steps[i].inputs:
                    other = needed.get(fed, (low, high))
                    needed[fed] = min(low, other[0]), max(high, other[1])
        return needed[IMAGE]

    @property
    def receptive_field(self) -> int:
        first, end = self._field
        return end - first

    @property
    def offset(self) -> int:
        """First image pixel that cell 0 depends on, padding included."""
        return self.origin + self._field[0]

    @cached_property
    def window(self) -> int:
        """The smallest input extent that gives one cell."""
        return self.smallest_input(1)

    def smallest_input(self, cells: int) -> int:
        """The smallest input extent that gives at least `cells` cells."""
        size = smallest_size(lambda extent: self.cells(extent) >= cells)
        if size is None:
            raise GeometryError(
                f"no input up to {LARGEST_SIZE} pixels gives {cells} cell(s); "
                "check the kernel sizes and paddings of the layers"
            )
        return size

    def span_of(self, cell: int) -> Pair:
        """Half-open range of image pixels that a cell depends on, padding included."""
        start = self.offset + cell * self.stride
        return start, start + self.receptive_field

    def interior(self, least: int) -> Pair:
        """The least input of `least` pixels or more with a cell that sees no padding, and it."""
        cell = max(-(self.offset // self.stride), 0)
        return max(self.span_of(cell)[1], least), cell

    @property
    def crop(self) -> int:
        """The extent of the crops that cells stand for."""
        return self.window if self.context is None else self.context

    def window_of(self, cell: int) -> Pair:
        """Half-open range of image pixels that a cell stands for: the crop of a sliding window."""
        start = self.origin + self.context_start + cell * self.stride
        return start, start + self.crop

    def centre_of(self, cell: float) -> float:
        return self.offset + (self.receptive_field - 1) / 2 + cell * self.stride

    def cell_at(self, point: float) -> int:
        """The cell whose centre is nearest; never below cell 0."""
        return max(round((point - self.centre_of(0)) / self.stride), 0)

    def padding_for(self, size: int) -> Pair:
        """Zeros before and after an input below the window, which is centred in it."""
        # the odd pixel goes to the end, as in torch's padding "same"
        missing = max(self.window - size, 0)
        return missing // 2, missing - missing // 2

    def placed(self, size: int) -> Axis:
        """The axis in the pixel coordinates of an image of `size`, padded where it is smaller."""
        return replace(self, origin=self.origin - self.padding_for(size)[0])

    def touches_padding(self, size: int) -> NDArray[np.bool_]:
        placed = self.placed(size)
        spans = [placed.span_of(cell) for cell in range(self.output_size(size))]
        return np.array([start < 0 or end > size for start, end in spans], dtype=bool)

    def upto(self, step: int) -> Axis:
        """The axis of an inner layer: everything up to and including `step`."""
        return Axis(self.steps[: step + 1])

    def agree(self, other: Axis) -> bool:
        """Whether two branches give the same number of cells at every input size.

        The number of cells is periodic, so one stride of sizes above the larger window decides.
        """
        if self.stride != other.stride:
            return False
        if self.stride > LARGEST_SIZE:
            raise GeometryError(
                f"the stride of branches that meet must be at most {LARGEST_SIZE:,} pixels, got "
                f"{self.stride:,}"
            )
        # above both windows, cells(size + stride) = cells(size) + 1 holds for either branch
        start = max(self.window, other.window)
        sizes = range(start, start + self.stride)
        return all(self.cells(size) == other.cells(size) for size in sizes)


@dataclass(frozen=True)
class Geometry:
    """How the cells of a score map lie on the image, height first.

    >>> geometry = fcvgg.convert(torchvision.models.vgg16()).geometry  # doctest: +SKIP
    >>> geometry.window, geometry.stride, geometry.receptive_field  # doctest: +SKIP
    ((224, 224), (32, 32), (404, 404))
    """

    height: Axis
    width: Axis

    @property
    def axes(self) -> tuple[Axis, Axis]:
        return self.height, self.width

    @property
    def window(self) -> Pair:
        """The smallest input extent ``(h, w)`` that gives one cell."""
        return self.height.window, self.width.window

    @property
    def crop(self) -> Pair:
        """The extent ``(h, w)`` of the crop that a cell stands for, see `window_of`.

        The window is smaller where padding or ceil mode let a smaller input give a cell too.
        """
        return self.height.crop, self.width.crop

    @property
    def stride(self) -> Pair:
        """Input pixels ``(h, w)`` between neighbouring cells."""
        return self.height.stride, self.width.stride

    @property
    def receptive_field(self) -> Pair:
        """Extent ``(h, w)`` of all input pixels that a cell depends on, padding included."""
        return self.height.receptive_field, self.width.receptive_field

    @property
    def offset(self) -> Pair:
        """First pixel ``(y, x)`` of cell 0's receptive field; negative where it is padding."""
        return self.height.offset, self.width.offset

    def output_size(self, size: Iterable[int] | int) -> Pair:
        """Cells ``(h, w)`` for an image of `size` pixels ``(H, W)``.

        Rows and columns past the last full window have no cell of their own: VGG gives 7 features,
        so one cell, for every extent from 224 to 255. (A padded network's receptive fields are
        larger than the window and may still reach them.) Below the window the image is padded up
        to it.

        Raises:
            GeometryError: if `size` is not one or two positive integers.
        """
        height, width = checked_size(size)
        return self.height.output_size(height), self.width.output_size(width)

    def window_of(self, row: int, col: int) -> Box:
        """Box of pixels that a cell stands for: the crop that a sliding window would take.

        It has the native size and starts at ``stride * (row, col)``, without the last rows and
        columns that the strides leave out of a native image (16 of 240 in a VGG).
        """
        return _box(*(axis.window_of(cell) for axis, cell in zip(self.axes, (row, col))))

    def receptive_field_of(self, row: int, col: int) -> Box:
        """Box of pixels that a cell depends on; it leaves the image where padding is seen."""
        return _box(*(axis.span_of(cell) for axis, cell in zip(self.axes, (row, col))))

    def centre_of(self, row: float, col: float) -> tuple[float, float]:
        """Point ``(y, x)`` in the middle of a cell's receptive field, in pixels."""
        return self.height.centre_of(row), self.width.centre_of(col)

    def cell_at(self, y: float, x: float) -> Pair:
        """Cell ``(row, col)`` whose centre is nearest to the point; never negative."""
        return self.height.cell_at(y), self.width.cell_at(x)

    def touches_padding(self, size: Iterable[int] | int) -> NDArray[np.bool_]:
        """Boolean map ``(h, w)`` of the cells whose receptive field leaves an image of `size`."""
        height, width = checked_size(size)
        rows = self.height.touches_padding(height)
        cols = self.width.touches_padding(width)
        return rows[:, None] | cols[None, :]

    def padding_for(self, size: Iterable[int] | int) -> tuple[Pair, Pair]:
        """Zeros ``((top, bottom), (left, right))`` around an image below the window."""
        height, width = checked_size(size)
        return self.height.padding_for(height), self.width.padding_for(width)

    def placed(self, size: Iterable[int] | int) -> Geometry:
        """The geometry in the pixel coordinates of an image of `size`.

        It differs from the geometry itself only below the window, where the image is padded.
        """
        height, width = checked_size(size)
        return Geometry(self.height.placed(height), self.width.placed(width))

    def upto(self, step: int) -> Geometry:
        """The geometry of an inner layer: everything up to and including `step`."""
        return Geometry(self.height.upto(step), self.width.upto(step))

    def standing_for(self, crop: Pair, margin: Pair | None) -> Geometry:
        """The geometry whose cells stand for crops of an extent.

        Cell 0's crop starts `margin` pixels before the image where padding let the map keep its
        size (``padding="same"``); None where the map was not padded.
        """
        placed = []
        for i, axis in enumerate(self.axes):
            if margin is not None:
                axis = replace(axis, context=crop[i], context_start=-margin[i])
            elif crop[i] != axis.window:
                axis = replace(axis, context=crop[i])
            placed.append(axis)
        return Geometry(*placed)

    def of_tiles(self) -> Geometry:
        """The geometry whose cells stand for tiles of one stride, around their centres."""
        height, width = (
            replace(a, context=a.stride, context_start=floor(a.centre_of(0) - (a.stride - 1) / 2))
            for a in self.axes
        )
        return Geometry(height, width)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for a file; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Geometry:
        """The geometry of `to_dict`, whatever a file makes of it.

        Raises:
            GeometryError: if a part is missing, of another kind, or beyond every known network's.
        """
        parts = _fields_of(data, ("height", "width"), "geometry")
        return cls(*(_axis_from_dict(parts[name], name) for name in ("height", "width")))

    def __str__(self) -> str:
        def pair(values: Pair) -> str:
            return f"{values[0]}" if values[0] == values[1] else f"{values[0]}x{values[1]}"

        y, x = self.centre_of(0, 0)
        return (
            f"window {pair(self.window)}, stride {pair(self.stride)}, receptive field "
            f"{pair(self.receptive_field)} from pixel {self.offset}, first centre ({y:g}, {x:g})"
        )


def smallest_size(enough: Callable[[int], bool]) -> int | None:
    """The smallest size from 1 to `LARGEST_SIZE` for which a monotone condition holds, if any."""
    low, high = 1, 1
    while not enough(high):  # double until an upper bound is known, then bisect
        low, high = high + 1, high * 2
        if high > LARGEST_SIZE:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def checked_size(
    size: Iterable[int] | int, name: str = "size", error: type[FcvggError] = GeometryError
) -> Pair:
    """An image size as ``(h, w)``, from one integer or two.

    Args:
        size: the value of an option.
        name: the option's name, for the message.
        error: the class of the error.

    Raises:
        FcvggError: of the class `error`, if it is not one or two positive integers.
    """
    try:
        values = tuple(size) if isinstance(size, Iterable) else (size, size)
    except TypeError:  # a tensor without dimensions says that it is iterable
        values = ()
    if len(values) != 2 or not all(
        isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v > 0 for v in values
    ):
        raise error(f"{name} must be a positive int or (h, w), got {size!r}")
    return int(values[0]), int(values[1])


def _field_of(step: Step, earlier: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """``(stride, first, end)`` of a step after the earlier ones.

    Branches that meet have one stride; their fields are united, as those of repeated positions.
    """
    fed = [(1, 0, 1) if i == IMAGE else earlier[i] for i in step.inputs]
    window = step.window
    stride, rest = divmod(fed[0][0], window.repeats)
    if rest:
        raise GeometryError(
            f"a map of stride {fed[0][0]} must be enlarged by one of its divisors, got "
            f"{window.repeats}: other positions lie between the image's pixels"
        )
    first = min(f for _, f, _ in fed) - (window.before + window.repeats - 1) * stride
    end = max(e for _, _, e in fed) + (window.span - 1 - window.before) * stride
    return stride * window.stride, first, end


def _box(rows: Pair, cols: Pair) -> Box:
    return rows[0], cols[0], rows[1], cols[1]


# -- descriptions in files ------------------------------------------------------------------------

_MOST_STEPS = 10_000
_FARTHEST = 1 << 40
"""Pixels beyond which no stride or receptive field of a file is believed."""


def _axis_from_dict(data: Any, name: str) -> Axis:
    data = _fields_of(data, ("steps",), f"geometry's {name}")
    described = data["steps"]
    if not isinstance(described, (list, tuple)) or not 0 < len(described) <= _MOST_STEPS:
        raise GeometryError(
            f"the geometry's {name} must have a list of 1 to {_MOST_STEPS:,} steps, got "
            f"{described!r}"
        )
    steps: list[Step] = []
    found: list[tuple[int, int, int]] = []
    for i, step in enumerate(described):
        steps.append(_step_from_dict(step, i))
        found.append(_field_of(steps[-1], found))
        farthest = max(map(abs, found[-1]))
        if farthest > _FARTHEST:
            raise GeometryError(
                f"the geometry's step {i} must reach at most {_FARTHEST:,} pixels, got {farthest:,}"
            )
    known = {key: data[key] for key in ("origin", "context", "context_start") if key in data}
    for key, value in known.items():
        whole = type(value) is int and abs(value) <= _FARTHEST and (key != "context" or value > 0)
        if not whole and not (key == "context" and value is None):
            raise GeometryError(f"the geometry's {key} must be an integer, got {value!r}")
    return Axis(tuple(steps), **known)


def _step_from_dict(data: Any, place: int) -> Step:
    data = _fields_of(data, ("window", "inputs"), f"geometry's step {place}")
    inputs = data["inputs"] if isinstance(data["inputs"], (list, tuple)) else ()
    if not inputs or any(type(k) is not int or not IMAGE <= k < place for k in inputs):
        raise GeometryError(
            f"the inputs of the geometry's step {place} must be earlier steps, got "
            f"{data['inputs']!r}"
        )
    return Step(KernelGeometry.from_dict(data["window"]), tuple(inputs))


def _fields_of(data: Any, names: Iterable[str], what: str) -> dict[str, Any]:
    missing = [n for n in names if not isinstance(data, dict) or n not in data]
    if missing:
        raise GeometryError(f"the {what} must have {' and '.join(names)}, got {data!r}")
    return dict(data)
