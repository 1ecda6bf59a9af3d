"""Run a converted network over strips of rows: exact, and no position computed twice.

By a `fcvgg.streaming.schedule.Schedule`, every operation keeps the last rows of its input that
later outputs need, pads at the true borders of its map only, and hands on what it could finish;
where branches join, the rows that came first wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fcvgg.geometry import Pair
from fcvgg.inference.missing import readers_of_stages
from fcvgg.inference.sliding import Part, Sliding
from fcvgg.inference.stages import Stage
from fcvgg.rewriting.modules import _GEMM_CELLS
from fcvgg.streaming.schedule import Extents, Schedule


class _Rows:
    """Rows of a map that wait for one reader: consecutive pieces ``(N, C, rows, cols)``."""

    def __init__(self, start: int):
        self.start = start
        self.pieces: list[Tensor] = []
        self._kept: Tensor | None = None

    @property
    def waits(self) -> bool:
        """Whether there are rows."""
        return bool(self.pieces)

    def append(self, rows: Tensor) -> None:
        self.pieces.append(rows)

    def extended(self, like: Tensor) -> Tensor:
        """Room for further rows, shaped as `like`, right after those that wait."""
        count = sum(p.shape[2] for p in self.pieces)
        rows = like.shape[2]
        held = _empty(like, {2: count + rows})
        place = 0
        for piece in self.pieces:
            held.narrow(2, place, piece.shape[2]).copy_(piece)
            place += piece.shape[2]
        self.pieces = [held]
        return held.narrow(2, count, rows)

    def take(self, first: int, end: int, keep: int, count: int) -> Tensor:
        """Rows ``[first, end)``; of all `count` rows that came, those before `keep` are dropped."""
        if len(self.pieces) == 1 and first == self.start and end == self.start + count == keep:
            self.start = keep
            return self.pieces.pop()  # in whatever order of dimensions
        skipped = first - self.start
        held = self.pieces[0] if len(self.pieces) == 1 else _joined(self.pieces)
        self.pieces = []
        taken = held.narrow(2, skipped, end - first)
        kept = min(max(keep - self.start, 0), count)
        if kept < count:  # a copy, which lets the rest go
            self.pieces = [self._copied(held.narrow(2, kept, count - kept))]
        self.start += kept
        return taken

    def _copied(self, rows: Tensor) -> Tensor:
        """A copy of rows that are kept, at the place of those that were kept before.

        Small blocks of memory that are held for long would be scattered among the large ones, and
        keep the gaps between them from joining.
        """
        kept, memory = self._kept, rows.untyped_storage().data_ptr()
        if kept is None or kept.shape != rows.shape or kept.untyped_storage().data_ptr() == memory:
            kept = self._kept = _empty(rows, {})
        return kept.copy_(rows)


def _empty(like: Tensor, sizes: dict[int, int]) -> Tensor:
    """Room for a map with other sizes, with the channels last in memory where they are in `like`.

    torch's own guess (`empty_like`, `pad`) mistakes the order of some rows of a map, and all layers
    after it would follow.
    """
    shape = [sizes.get(dim, size) for dim, size in enumerate(like.shape)]
    last = like.stride(1) == 1 and like.shape[1] > 1
    format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces of rows as one; whole rows are copied where the channels lie last in memory."""
    if all(p.is_contiguous(memory_format=torch.channels_last) for p in pieces):
        return torch.cat([p.permute(0, 2, 3, 1) for p in pieces], 1).permute(0, 3, 1, 2)
    return torch.cat(list(pieces), 2)


class LineBuffers:
    """Computes the cells of one range of columns while strips of the image come in.

    Args:
        schedule: which rows are computed at which strip.
        width: the sizes and ranges along the width.
        row: the first row of cells that is wanted.
        before: called before operations with the bytes that their gathered windows take.
    """

    def __init__(
        self,
        schedule: Schedule,
        width: Extents,
        row: int,
        before: Callable[[int], None] = lambda needed: None,
    ):
        self._before = before
        self._schedule = schedule
        self._stages = schedule.stages
        self._height, self._width = schedule.height, width
        self.strip, self._done = schedule.starts_for(row)
        self._row = row
        self._arrived = list(self._done)
        self._readers: list[list[tuple[int, int]]] = [[] for _ in self._stages]
        self._waiting: list[list[_Rows]] = []
        for i, stage in enumerate(self._stages):
            self._waiting.append([_Rows(self._done[fed]) for fed in stage.inputs])
            if self._height.ranges[i] == (0, 0):
                continue
            for place, fed in enumerate(stage.inputs):
                self._readers[fed].append((i, place))

    @property
    def finished(self) -> bool:
        return self.strip == len(self._schedule.ends)

    @property
    def image_rows(self) -> Pair:
        """The rows of the image that come next."""
        first, end = self._schedule.image_rows(self.strip)
        return max(first, self._done[0]), end

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
        del strip
        for i in range(1, len(self._stages)):
            end = int(ends[i])
            if end > self._done[i]:
                self._before(self._gathered(i, end))
                cells = self._hand_on(i, self._compute(i, self._done[i], end), end)
        self.strip += 1
        return cells

    def _gathered(self, i: int, end: int) -> int:
        """Bytes of the windows that an operation gathers for its next rows."""
        sliding = self._stages[i].sliding
        if sliding is None or not sliding.gathers:
            return 0
        first, last = self._width.ranges[i]
        cells = min((end - self._done[i]) * (last - first), _GEMM_CELLS)
        return cells * sliding.columns * self._waiting[i][0].pieces[0].element_size()

    def _hand_on(self, i: int, rows: Tensor, end: int) -> Tensor | None:
        first, self._done[i] = self._done[i], end
        if not self._is_placed(i):
            for reader, place in self._readers[i]:
                self._waiting[reader][place].append(rows)
        if i < len(self._stages) - 1 or end <= self._row:
            return None
        return rows[:, :, max(self._row - first, 0) :]

    def _compute(self, i: int, first: int, end: int) -> Tensor:
        stage = self._stages[i]
        if stage.sliding is not None:
            return self._slide(i, stage.sliding, first, end)
        assert stage.call is not None
        if self._is_placed(i):
            fed, waiting = stage.inputs[0], self._waiting[i][0]
            rows = waiting.take(first, end, end, self._done[fed] - waiting.start)
            reader, _ = self._readers[i][0]
            return torch.clamp_min(rows, 0, out=self._waiting[reader][0].extended(rows))
        cols = self._width.ranges[i]
        taken = []
        for fed, waiting in zip(stage.inputs, self._waiting[i]):
            rows = waiting.take(first, end, end, self._done[fed] - waiting.start)
            taken.append(_narrowed(rows, self._width.ranges[fed], cols))
            del rows
        if stage.in_place and self._is_waiting(taken[0]):
            taken[0] = taken[0].clone()
        return stage.call(taken)

    def _is_waiting(self, rows: Tensor) -> bool:
        """Whether rows lie in memory that others still wait to read.

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

    def _is_placed(self, i: int) -> bool:
        """Whether an operation writes its rows right after those that wait for its only reader.

        That saves the copy by which the reader would join them; it must read them in this strip.
        """
        if not self._stages[i].is_relu or len(self._readers[i]) != 1:
            return False
        (reader, _), fed = self._readers[i][0], self._stages[i].inputs[0]
        return (
            self._stages[reader].sliding is not None
            and self._width.ranges[fed] == self._width.ranges[i]
            and self._schedule.ends[self.strip, reader] > self._done[reader]
            and self._waiting[reader][0].waits
        )

    def _slide(self, i: int, sliding: Sliding, first: int, end: int) -> Tensor:
        fed, waiting = self._stages[i].inputs[0], self._waiting[i][0]
        height, width = self._height.reaches[i], self._width.reaches[i]
        rows, cols = height.needs(first, end), width.needs(*self._width.ranges[i])
        last = self._height.ranges[i][1]
        keep = int(height.kept_from(np.array(end), last)) if end < last else self._done[fed]
        x = waiting.take(*rows, keep, self._done[fed] - waiting.start)
        x = _narrowed(x, self._width.ranges[fed], cols)
        whole = self._width.ranges[i] == (0, self._width.sizes[i]) and cols == (0, width.size)
        pads_width = sliding.pads_width and whole
        wanted_cols = cols if pads_width else width.raw(*self._width.ranges[i])
        x = _bordered(x, sliding, rows, height.raw(first, end), height.size, 2)
        x = _bordered(x, sliding, cols, wanted_cols, width.size, 3)
        size = (height.size, width.size)
        part = Part((first, end), self._width.ranges[i], size, pads_width)
        return sliding.run(x, part)


class MissingCells:
    """Which cells see a pixel that is not finite, while strips of the image come in.

    Nothing is computed before the first such pixel; the strips before it are then made up for.

    Args:
        schedule: by which the cells themselves are computed.
        width: the sizes and ranges along the width.
        row: the first row of cells that is wanted.
    """

    def __init__(self, schedule: Schedule, width: Extents, row: int):
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
            self._device = pixels.device
            for _ in range(self._skipped):
                self._buffers.push(self._none(self._buffers))
        return self._buffers.push(self._none(self._buffers) if pixels is None else pixels)

    def _none(self, buffers: LineBuffers) -> Tensor:
        """A strip without such pixels."""
        shape = [end - first for first, end in (buffers.image_rows, buffers.image_cols)]
        return torch.zeros(1, 1, *shape, dtype=torch.bool, device=self._device)


def _narrowed(x: Tensor, held: Pair, wanted: Pair) -> Tensor:
    """The columns `wanted` of a part that holds the columns `held`."""
    return x if wanted == held else x.narrow(3, wanted[0] - held[0], wanted[1] - wanted[0])


def _bordered(x: Tensor, sliding: Sliding, held: Pair, wanted: Pair, size: int, dim: int) -> Tensor:
    """The positions `wanted` along one axis, of which those outside ``[0, size)`` are filled."""
    if wanted == held:
        return x
    low, high = max(wanted[0], 0), min(wanted[1], size)
    if sliding.border != "constant":
        places = torch.arange(*wanted, device=x.device)
        if sliding.border == "reflect":
            places = (size - 1) - ((size - 1) - places.abs()).abs()
        return x.index_select(dim, places.clamp(0, size - 1) - held[0])
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
