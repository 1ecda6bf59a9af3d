"""Run a converted network over strips of rows: exact, and no position computed twice.

By a `fcvgg.inference.schedule.Schedule`, every operation keeps the last rows of its input that
later outputs need, pads at the true borders of its map only, and hands on the rows that it could
finish. Where branches join, the rows that came first wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fcvgg.geometry import Pair
from fcvgg.inference.missing import places_within, readers_of_stages
from fcvgg.inference.schedule import AxisRanges, Reach, Schedule
from fcvgg.inference.stages import Stage
from fcvgg.rewriting.modules import GEMM_CELLS
from fcvgg.rewriting.sliding import Part, Sliding


class LineBuffers:
    """Computes the cells of one range of columns while strips of the image come in.

    Args:
        schedule: which rows are computed at which strip.
        width: the sizes and ranges along the width.
        row: the first row of cells that is wanted.
        before: called before operations with the bytes that their gathered windows take.
        reuses: whether the memory of rows that were read is written again, which `state` and
            autograd do not allow.
    """

    def __init__(
        self,
        schedule: Schedule,
        width: AxisRanges,
        row: int,
        before: Callable[[int], None] = lambda needed: None,
        reuses: bool = True,
    ):
        self._before = before
        self._reuses = reuses
        self._schedule = schedule
        self._stages = schedule.stages
        self._height, self._width = schedule.height, width
        self.strip, self._done = schedule.restart_at(row)  # the end of every operation's rows
        self._row = row
        self._readers: list[list[tuple[int, int]]] = [[] for _ in self._stages]
        self._waiting: list[list[WaitingRows]] = []  # for every operation and input
        for i, stage in enumerate(self._stages):
            waiting = [WaitingRows(self._done[fed], reuses) for fed in stage.inputs]
            self._waiting.append(waiting)
            if self._height.ranges[i] == (0, 0):  # nothing needs the operation
                continue
            for place, fed in enumerate(stage.inputs):
                self._readers[fed].append((i, place))

    @property
    def finished(self) -> bool:
        return self.strip == self.strips

    @property
    def stages(self) -> Sequence[Stage]:
        return self._stages

    @property
    def strips(self) -> int:
        return len(self._schedule.ends)

    @property
    def next_cells(self) -> Pair:
        """The rows of cells that the next strip finishes."""
        return self._done[-1], int(self._schedule.ends[self.strip, -1])

    @property
    def image_rows(self) -> Pair:
        """The rows of the image that come next."""
        return self._done[0], int(self._schedule.ends[self.strip, 0])

    @property
    def image_cols(self) -> Pair:
        """The columns of the image that are needed."""
        return self._width.ranges[0]

    def push(self, strip: Tensor) -> Tensor | None:
        """The rows of cells that the next strip of the image finishes, in order; None if none.

        Args:
            strip: ``(1, C, rows, cols)``, preprocessed, of `image_rows` and `image_cols`; it may be
                overwritten.
        """
        ends = self._schedule.ends[self.strip]
        cells = self._hand_on(0, strip, int(ends[0]))
        del strip  # the readers have it, and its memory is free once they have computed
        for i in range(1, len(self._stages)):
            end = int(ends[i])
            if end > self._done[i]:
                self._before(self._gathered_bytes(i, end))
                cells = self._hand_on(i, self._compute(i, self._done[i], end), end)
        self.strip += 1
        return cells

    def narrow(self, width: AxisRanges) -> None:
        """Go on with fewer columns of every map, within those so far."""
        for stage, inputs in zip(self._stages, self._waiting):
            for fed, waiting in zip(stage.inputs, inputs):
                waiting.narrow(self._width.ranges[fed], width.ranges[fed])
        self._width = width

    def state(self) -> BufferState:
        """All that the next strips need of the earlier ones."""
        held = [
            ((i, place), waiting.start, waiting.joined())
            for i, inputs in enumerate(self._waiting)
            for place, waiting in enumerate(inputs)
        ]
        return BufferState(
            self.strip,
            tuple(self._done),
            {place: start for place, start, _ in held},
            {place: rows for place, _, rows in held if rows is not None},
        )

    def restore(self, state: BufferState) -> None:
        """Go on from a state of buffers with the same schedule."""
        self.strip, self._done = state.strip, list(state.done)
        for (i, place), start in state.starts.items():
            waiting = self._waiting[i][place]
            waiting.start = start
            rows = state.rows.get((i, place))
            waiting.pieces = [] if rows is None else [rows]

    def _gathered_bytes(self, i: int, end: int) -> int:
        """Bytes of the windows that an operation gathers for its next rows."""
        sliding = self._stages[i].sliding
        if sliding is None or not sliding.gathers:
            return 0
        first, last = self._width.ranges[i]
        cells = min((end - self._done[i]) * (last - first), GEMM_CELLS)
        return cells * sliding.columns * self._waiting[i][0].pieces[0].element_size()

    def _hand_on(self, i: int, rows: Tensor, end: int) -> Tensor | None:
        """Give rows up to `end` to the operation's readers; wanted cells are returned."""
        first, self._done[i] = self._done[i], end
        if not self._writes_into_reader(i):
            for reader, place in self._readers[i]:
                self._waiting[reader][place].append(rows)
        if i < len(self._stages) - 1 or end <= self._row:
            return None
        return rows[:, :, max(self._row - first, 0) :]

    def _compute(self, i: int, first: int, end: int) -> Tensor:
        """The rows ``[first, end)`` of an operation, ``(1, C, rows, cols)``."""
        stage = self._stages[i]
        if stage.sliding is not None:
            return self._slide(i, stage.sliding, first, end)
        if self._writes_into_reader(i):
            rows = self._take(i, 0, (first, end), end)
            reader, _ = self._readers[i][0]
            return torch.clamp_min(rows, 0, out=self._waiting[reader][0].extended(rows))
        cols = self._width.ranges[i]
        taken = []
        for place, fed in enumerate(stage.inputs):
            rows = self._take(i, place, (first, end), end)
            taken.append(_narrowed(rows, self._width.ranges[fed], cols))
            del rows
        if stage.in_place and self._is_waiting(taken[0]):
            taken[0] = taken[0].clone()
        assert stage.call is not None
        return stage.call(taken)

    def _take(self, i: int, place: int, rows: Pair, keep: int) -> Tensor:
        """Rows of one input of an operation; those before `keep` are dropped."""
        return self._waiting[i][place].take(*rows, keep, self._done[self._stages[i].inputs[place]])

    def _is_waiting(self, rows: Tensor) -> bool:
        """Whether rows lie in memory that other operations still wait to read.

        The network may hand on its input as its output, as dropout does, and a strip that needs no
        border is handed on where the network would pad a copy.
        """
        memory = rows.untyped_storage().data_ptr()
        return any(
            piece.untyped_storage().data_ptr() == memory
            for inputs in self._waiting
            for waiting in inputs
            for piece in waiting.pieces
        )

    def _writes_into_reader(self, i: int) -> bool:
        """Whether an operation writes its rows right after those that wait for its only reader.

        That saves the copy by which the reader would join them; it must read them in this strip.
        """
        if not self._reuses or not self._stages[i].is_relu or len(self._readers[i]) != 1:
            return False
        (reader, _), fed = self._readers[i][0], self._stages[i].inputs[0]
        return (
            self._stages[reader].sliding is not None
            and self._width.ranges[fed] == self._width.ranges[i]
            and self._schedule.ends[self.strip, reader] > self._done[reader]
            and bool(self._waiting[reader][0].pieces)
        )

    def _slide(self, i: int, sliding: Sliding, first: int, end: int) -> Tensor:
        """A layer's rows ``[first, end)``, from the rows and columns that its kernel reads.

        Positions outside the map are added only at its true borders. The layer pads the width
        itself where it is given all columns, which saves a copy.
        """
        fed = self._stages[i].inputs[0]
        height = self._height.reaches[i]
        keep = int(self._schedule.kept[self.strip, i])
        x = self._take(i, 0, height.needs(first, end), min(keep, self._done[fed]))
        return _slid(sliding, x, height, (first, end), self._width, i, fed)


def _slid(
    sliding: Sliding,
    x: Tensor,
    height: Reach,
    rows: Pair,
    width: AxisRanges,
    i: int,
    fed: int,
) -> Tensor:
    """The rows of layer `i` for the columns of a width, from the rows that they need of `fed`."""
    across, out_cols = width.reaches[i], width.ranges[i]
    cols = across.needs(*out_cols)
    x = _narrowed(x, width.ranges[fed], cols)  # (1, C, rows, cols)
    whole = out_cols == (0, width.sizes[i]) and cols == (0, across.size)
    pads_width = sliding.pads_width and whole
    wanted_cols = cols if pads_width else across.window.reads(*out_cols)
    x = _bordered(x, sliding, height.needs(*rows), height.window.reads(*rows), height.size, 2)
    x = _bordered(x, sliding, cols, wanted_cols, across.size, 3)
    return sliding.run(x, Part(rows, out_cols, (height.size, across.size), pads_width))


def same_bits(
    schedule: Schedule,
    strips: Sequence[int],
    whole: AxisRanges,
    parts: Sequence[AxisRanges],
    like: Tensor,
) -> bool:
    """Whether every operation gives the same bits for some columns as for all of them.

    Libraries choose by the size of a map how they sum, and so the last bits. Every operation is run
    on random numbers with the rows of these strips, once for all columns and once for each part.

    Args:
        whole: the sizes and ranges of all columns.
        parts: of some of them.
        like: a tensor of the network's dtype and device.
    """
    if not parts:
        return True
    generator = torch.Generator().manual_seed(0)
    last = like.device.type == "cpu" and like.element_size() <= 4  # as `StripInput` gives strips
    order = torch.channels_last if last else torch.contiguous_format
    computed = (schedule.ends - schedule.starts)[list(strips)]
    for i, stage in enumerate(schedule.stages[1:], 1):
        if stage.is_relu:
            continue
        for count in np.unique(computed[:, i][computed[:, i] > 0]):
            chosen = np.flatnonzero(computed[:, i] == count)
            strip = strips[chosen[len(chosen) // 2]]
            rows = int(schedule.starts[strip, i]), int(schedule.ends[strip, i])
            low, high = schedule.height.reaches[i].needs(*rows)
            maps = []
            for fed in stage.inputs:
                shape = 1, schedule.stages[fed].channels, high - low, length(whole.ranges[fed])
                values = torch.rand(shape, generator=generator, dtype=torch.float32)
                maps.append(values.to(like).contiguous(memory_format=order))
            expected = _operated(schedule, i, rows, whole, whole, maps)
            for part in parts:
                got = _operated(schedule, i, rows, whole, part, maps)
                if not torch.equal(got, _narrowed(expected, whole.ranges[i], part.ranges[i])):
                    return False
    return True


def _operated(
    schedule: Schedule,
    i: int,
    rows: Pair,
    whole: AxisRanges,
    part: AxisRanges,
    maps: Sequence[Tensor],
) -> Tensor:
    """The rows of an operation for the columns of a part, from maps of all columns."""
    stage = schedule.stages[i]
    given = [
        _narrowed(x, whole.ranges[fed], part.ranges[fed]) for fed, x in zip(stage.inputs, maps)
    ]
    # line buffers hand on maps of their own, which an operation may change
    owned = [x.clone() for x in given]
    if stage.sliding is not None:
        reach = schedule.height.reaches[i]
        return _slid(stage.sliding, owned[0], reach, rows, part, i, stage.inputs[0])
    assert stage.call is not None
    cols = [_narrowed(x, part.ranges[fed], part.ranges[i]) for fed, x in zip(stage.inputs, owned)]
    return stage.call(cols)


def length(span: Pair) -> int:
    """The number of positions in a half-open range."""
    return span[1] - span[0]


@dataclass(frozen=True)
class BufferState:
    """What line buffers hold between two strips.

    Attributes:
        strip: the number of the next one.
        done: the end of every operation's rows.
        starts: by operation and input, the first row that waits.
        rows: the rows ``(1, C, rows, cols)`` that wait, where there are any.
    """

    strip: int
    done: tuple[int, ...]
    starts: dict[tuple[int, int], int]
    rows: dict[tuple[int, int], Tensor]


class WaitingRows:
    """Rows of a map that wait for one reader: consecutive pieces ``(N, C, rows, cols)``."""

    def __init__(self, start: int, reuses: bool = True):
        self.start = start
        self._reuses = reuses
        self.pieces: list[Tensor] = []
        self._kept: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        self.pieces.append(rows)

    def narrow(self, held: Pair, wanted: Pair) -> None:
        """Keep the columns `wanted` of the columns `held`, as a copy that frees the others."""
        if wanted != held:
            cols = {3: length(wanted)}
            self.pieces = [_empty(p, cols).copy_(_narrowed(p, held, wanted)) for p in self.pieces]

    def joined(self) -> Tensor | None:
        """All rows that wait, if any."""
        if len(self.pieces) > 1:
            self.pieces = [_joined(self.pieces)]
        return self.pieces[0] if self.pieces else None

    def extended(self, like: Tensor) -> Tensor:
        """Room for further rows, shaped as `like`, right after those that wait."""
        count, rows = sum(p.shape[2] for p in self.pieces), like.shape[2]
        held = _empty(like, {2: count + rows})
        torch.cat(self.pieces, 2, out=held.narrow(2, 0, count))
        self.pieces = [held]
        return held.narrow(2, count, rows)

    def take(self, first: int, end: int, keep: int, arrived: int) -> Tensor:
        """Rows ``[first, end)`` of those that came, which end at `arrived`.

        Rows before `keep` are dropped. The others are copied, since a view would hold the memory of
        all.
        """
        if len(self.pieces) == 1 and first == self.start and end == arrived == keep:
            self.start = keep
            return self.pieces.pop()  # whatever its memory format is
        held = self.pieces[0] if len(self.pieces) == 1 else _joined(self.pieces)
        self.pieces = []
        taken = held.narrow(2, first - self.start, end - first)
        keep = min(max(keep, self.start), arrived)
        if keep < arrived:
            self.pieces = [self._copied(held.narrow(2, keep - self.start, arrived - keep))]
        self.start = keep
        return taken

    def _copied(self, rows: Tensor) -> Tensor:
        """A copy of rows that are kept, in the memory of those that were kept before.

        Small blocks of memory that are held for long would be scattered among the large ones, and
        the gaps between them could not join.
        """
        if not self._reuses:
            return rows.clone()
        kept, memory = self._kept, rows.untyped_storage().data_ptr()
        if kept is None or kept.shape != rows.shape or kept.untyped_storage().data_ptr() == memory:
            kept = self._kept = _empty(rows, {})
        return kept.copy_(rows)


class MissingCells:
    """Which cells see a pixel that is not finite, while strips of the image come in.

    Nothing is computed before the first such pixel; the earlier strips are then made up for.

    Args:
        schedule: by which the cells themselves are computed.
        width: the sizes and ranges along the width.
        row: the first row of cells that is wanted.
    """

    def __init__(self, schedule: Schedule, width: AxisRanges, row: int):
        self._schedule, self._width, self._row = schedule, width, row
        self._buffers: LineBuffers | None = None
        self._skipped = 0

    def push(self, pixels: Tensor | None) -> Tensor | None:
        """The cells ``(1, 1, rows, cols)`` that the next strip finishes; None if all are finite.

        Args:
            pixels: bool ``(1, 1, rows, cols)``, the strip's pixels that are not finite, if any.
        """
        if self._buffers is None:
            if pixels is None:
                self._skipped += 1
                return None
            readers = [Stage("images", (), 1)]
            readers += [reader.stage() for reader in readers_of_stages(self._schedule.stages)]
            schedule = self._schedule.with_stages(readers)
            self._buffers = LineBuffers(schedule, self._width, self._row)
            for _ in range(self._skipped):
                self._buffers.push(self._all_finite(self._buffers, pixels.device))
            self._device = pixels.device
        if pixels is None:
            pixels = self._all_finite(self._buffers, self._device)
        return self._buffers.push(pixels)

    def narrow(self, width: AxisRanges) -> None:
        """Go on with fewer columns, within those so far."""
        self._width = width
        if self._buffers is not None:
            self._buffers.narrow(width)

    def _all_finite(self, buffers: LineBuffers, device: torch.device) -> Tensor:
        """A strip without such pixels."""
        shape = [end - first for first, end in (buffers.image_rows, buffers.image_cols)]
        return torch.zeros(1, 1, *shape, dtype=torch.bool, device=device)


# -- parts of maps --------------------------------------------------------------------------------


def _empty(like: Tensor, sizes: dict[int, int]) -> Tensor:
    """Room for a map with other sizes, with the channels last in memory where they are in `like`.

    torch's own guess (`empty_like`, `pad`) mistakes the memory format of maps with few rows, and
    all later layers would follow it.
    """
    shape = [sizes.get(dim, size) for dim, size in enumerate(like.shape)]
    last = like.stride(1) == 1 and like.shape[1] > 1
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces of rows as one; whole rows are copied where the channels lie last in memory."""
    if all(p.is_contiguous(memory_format=torch.channels_last) for p in pieces):
        return torch.cat([p.permute(0, 2, 3, 1) for p in pieces], 1).permute(0, 3, 1, 2)
    return torch.cat(list(pieces), 2)


def _narrowed(x: Tensor, held: Pair, wanted: Pair) -> Tensor:
    """The columns `wanted` of a part that holds the columns `held`."""
    return x if wanted == held else x.narrow(3, wanted[0] - held[0], wanted[1] - wanted[0])


def _bordered(x: Tensor, sliding: Sliding, held: Pair, wanted: Pair, size: int, dim: int) -> Tensor:
    """The positions `wanted` along one axis; those outside ``[0, size)`` are filled."""
    if wanted == held:
        return x
    if sliding.border != "constant":
        places = torch.arange(*wanted, device=x.device)
        return x.index_select(dim, places_within(places, size, sliding.border) - held[0])
    low, high = max(wanted[0], 0), min(wanted[1], size)
    inside = max(high - low, 0)
    x = x.narrow(dim, low - held[0] if inside else 0, inside)
    pads = (low - wanted[0], wanted[1] - high) if inside else (wanted[1] - wanted[0], 0)
    if pads == (0, 0):
        return x
    padded = _empty(x, {dim: wanted[1] - wanted[0]})
    for first, count in ((0, pads[0]), (pads[0] + inside, pads[1])):
        padded.narrow(dim, first, count).fill_(sliding.value)
    padded.narrow(dim, pads[0], inside).copy_(x)
    return padded
