"""Run a converted network over strips of rows: exact, and no position computed twice.

`stages_of` reads the network's graph as a list of `Stage`: windows that slide, and operations that
work on every position by itself. `Schedule` says in whole numbers which rows every stage computes
when which strip of the image has come. `LineBuffers` does it: every stage keeps the last rows of
its input that later outputs need, pads at the true borders of its map only, and hands on what it
could finish; where branches join, the rows that came first wait.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fcvgg.capture import operation_name
from fcvgg.errors import UnsupportedLayerError
from fcvgg.geometry import Pair, Window
from fcvgg.layers.strips import Part, Sliding, is_positional, sliding_of

_RELUS = {F.relu, torch.relu, "relu"}

_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


# -- the network as stages ------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One operation of the network on maps.

    Attributes:
        name: of its node.
        inputs: the stages that it reads; stage 0 is the image.
        channels: of its output.
        sliding: its window; None where it works on every position by itself.
        call: computes such an operation from its inputs.
        in_place: whether its output takes the place of its input.
        is_relu: whether it is a ReLU, which can write its output where it is wanted.
    """

    name: str
    inputs: tuple[int, ...]
    channels: int
    sliding: Sliding | None = None
    call: Callable[[Sequence[Tensor]], Tensor] | None = None
    in_place: bool = False
    is_relu: bool = False


def stages_of(network: fx.GraphModule, in_channels: int, output: int = 0) -> list[Stage]:
    """The stages that one output of a converted network needs; the last one computes it.

    Raises:
        UnsupportedLayerError: if a node can not be computed strip by strip; it is named.
    """
    return _StageReader(network, in_channels).read(output)


class _StageReader:
    def __init__(self, network: fx.GraphModule, in_channels: int):
        self._network = network
        self._constants: dict[fx.Node, Any] = {}
        self._stages = [Stage("images", (), in_channels)]
        self._places: dict[fx.Node, int] = {}

    def read(self, output: int) -> list[Stage]:
        nodes = list(self._network.graph.nodes)
        result = nodes[-1].args[0]
        wanted = result[output] if isinstance(result, (tuple, list)) else result
        self._needed = _ancestors(wanted)
        for node in nodes:
            if node.op == "placeholder":
                self._places[node] = 0
            elif node in self._needed:
                self._add(node)
        place = self._places[wanted]
        if place != len(self._stages) - 1:  # its value was changed in place afterwards
            self._stages = self._stages[: place + 1]
        return self._stages

    def _add(self, node: fx.Node) -> None:
        if not any(fed in self._places for fed in node.all_input_nodes):
            self._constants[node] = self._value(node)
            return
        module = None
        if node.op == "call_module":
            module = self._network.get_submodule(str(node.target))
        sliding = sliding_of(node, module, self._constants.get)
        if sliding is not None:
            self._places[node] = self._append(node, sliding=sliding)
        elif is_positional(type(module) if module is not None else node.target):
            self._add_positional(node, module)
        else:
            kind = type(module).__name__ if module is not None else operation_name(node)
            raise UnsupportedLayerError(
                f"{node.name} ({kind}) cannot be streamed: there is no rule how it computes a "
                "strip of its map; register one with fcvgg.layers.strips.strip_rule"
            )

    def _add_positional(self, node: fx.Node, module: nn.Module | None) -> None:
        changed = _changed_in_place(node, module)
        shared = changed is not None and len([u for u in changed.users if u in self._needed]) > 1
        call = self._call(node, module, changed if shared else None)
        place = self._append(
            node,
            call=call,
            in_place=changed is not None and not shared,
            is_relu=type(module) is nn.ReLU or node.target in _RELUS,
        )
        self._places[node] = place
        if changed is not None and shared:  # readers from here on see the changed value
            self._places[changed] = place

    def _append(self, node: fx.Node, **settings: Any) -> int:
        maps = [fed for fed in node.all_input_nodes if fed in self._places]
        inputs = tuple(self._places[fed] for fed in maps)
        channels = self._channels(node, inputs, settings.get("sliding"))
        self._stages.append(Stage(node.name, inputs, channels, **settings))
        return len(self._stages) - 1

    def _channels(self, node: fx.Node, inputs: tuple[int, ...], sliding: Sliding | None) -> int:
        fed = [self._stages[i].channels for i in inputs]
        if sliding is not None:
            return sliding.channels or fed[0] * sliding.multiplies
        if node.target in (torch.cat, torch.concat, torch.concatenate):
            return sum(fed)
        if node.target == "narrow":
            return int(node.args[3])  # type: ignore[arg-type]
        if node.target is torch.index_select:
            return len(self._constants[node.args[2]])  # type: ignore[index]
        return max(fed)

    def _call(
        self, node: fx.Node, module: nn.Module | None, kept: fx.Node | None
    ) -> Callable[[Sequence[Tensor]], Tensor]:
        """The node's operation on values of its map inputs; `kept` is copied before."""
        maps = [fed for fed in node.all_input_nodes if fed in self._places]
        constants = {
            fed: self._constants[fed] for fed in node.all_input_nodes if fed not in self._places
        }
        target: Any = module if module is not None else node.target

        def call(values: Sequence[Tensor]) -> Tensor:
            known = {**constants, **dict(zip(maps, values))}
            if kept is not None:
                known[kept] = known[kept].clone()
            args, kwargs = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda a: known[a] if isinstance(a, fx.Node) else a
            )  # type: ignore
            if node.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

        return call

    def _value(self, node: fx.Node) -> Any:
        """The value of a node that does not depend on the image."""
        if node.op == "get_attr":
            value: Any = self._network
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        args, kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: self._constants[a] if isinstance(a, fx.Node) else a
        )  # type: ignore
        if node.op == "call_module":
            return self._network.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    ends = [node]
    while ends:
        end = ends.pop()
        if end not in found:
            found.add(end)
            ends.extend(end.all_input_nodes)
    return found


def _changed_in_place(node: fx.Node, module: nn.Module | None) -> fx.Node | None:
    """The node whose value an operation changes instead of making a new one."""
    first = next(iter(node.all_input_nodes))
    if module is not None:
        return first if getattr(module, "inplace", False) else None
    if node.op == "call_method":
        return first if str(node.target).endswith("_") else None
    if node.target in _IN_PLACE or getattr(node.target, "__name__", "").endswith("_"):
        return first
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore
    except (TypeError, ValueError):  # built in, and then without such an argument
        return None
    return first if bound.arguments.get("inplace", False) else None


# -- which rows and columns -----------------------------------------------------------------------


@dataclass(frozen=True)
class Reach:
    """What a stage's outputs read along one axis of an input with `size` positions."""

    window: Window
    size: int
    mirrors: bool = False

    def raw(self, first: int, end: int) -> Pair:
        """The positions, padding included, that outputs ``[first, end)`` read."""
        start = first * self.window.stride - self.window.before
        return start, (end - 1) * self.window.stride - self.window.before + self.window.span

    def needs(self, first: int, end: int) -> Pair:
        """The positions of the input that outputs ``[first, end)`` read: at least one."""
        low, high = self.raw(first, end)
        if self.mirrors and low < 0:
            high = max(high, self.window.before + 1)
        if self.mirrors and high > self.size:
            low = min(low, self.size - 1 - self.window.after)
        low = min(max(low, 0), self.size - 1)
        return low, max(min(high, self.size), low + 1)

    def kept_from(self, first: NDArray[np.int64], end: int) -> NDArray[np.int64]:
        """From where on outputs ``[first, end)`` need their input; for many values of `first`."""
        low = first * self.window.stride - self.window.before
        if self.mirrors and self.raw(end - 1, end)[1] > self.size:
            low = np.minimum(low, self.size - 1 - self.window.after)
        return np.clip(low, 0, self.size)

    def finished(self, available: NDArray[np.int64], first: int, end: int) -> NDArray[np.int64]:
        """The end of those outputs of ``[first, end)`` that inputs up to `available` allow."""
        window = self.window
        done = (available + window.before - window.span) // window.stride + 1
        least = min(self.size, window.before + 1) if self.mirrors else 1
        done = np.where(available >= least, np.clip(done, first, end), first)
        return np.where(available >= self.needs(first, end)[1], end, done)


class Extents:
    """The size of every stage's map along one axis, and the part of it that is computed.

    Args:
        axis: 0 for the height, 1 for the width.
        size: of the image, not below the window.
        outputs: the half-open range of cells that is asked for.
    """

    def __init__(self, stages: Sequence[Stage], axis: int, size: int, outputs: Pair):
        self.sizes = [size]
        self.reaches: list[Reach] = [Reach(Window(), size)]
        for stage in stages[1:]:
            fed = min(self.sizes[i] for i in stage.inputs)
            sliding = stage.sliding
            window = Window() if sliding is None else sliding.windows[axis]
            mirrors = sliding is not None and sliding.border != "constant"
            self.reaches.append(Reach(window, fed, mirrors))
            self.sizes.append(window.output_size(fed))
        self.ranges = demanded(stages, self.reaches, outputs)


def demanded(
    stages: Sequence[Stage],
    reaches: Sequence[Reach],
    outputs: Pair,
    widened: Callable[[int, Pair], Pair] = lambda stage, needed: needed,
) -> list[Pair]:
    """The range of every stage's positions that the last stage's `outputs` need.

    `widened` may enlarge the range of a stage.
    """
    ranges: list[Pair | None] = [None] * len(stages)
    ranges[-1] = outputs
    for i in range(len(stages) - 1, -1, -1):
        needed = ranges[i]
        if needed is None:  # of no use for this output
            ranges[i] = (0, 0)
            continue
        needed = ranges[i] = widened(i, needed)
        low, high = reaches[i].needs(*needed)
        for fed in stages[i].inputs:
            other = ranges[fed]
            union = (low, high) if other is None else (min(low, other[0]), max(high, other[1]))
            ranges[fed] = union
    return [r for r in ranges if r is not None]


class Schedule:
    """Which rows every stage computes at which strip of the image.

    Args:
        stages: of the network.
        height: the sizes and ranges along the height.
        strip: rows of the image in a strip.
        least: for every stage, the rows for which it waits before it computes any; deep layers,
            whose rows are short, so use their weights for several rows at once.

    Attributes:
        ends: int64 ``(strips, stages)``: the end of the rows that are computed after each strip.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        height: Extents,
        strip: int,
        least: Sequence[int] | None = None,
    ):
        self.stages = stages
        self.height = height
        self.strip = strip
        first, end = height.ranges[0]
        self._first_strip = first // strip
        strips = -(-end // strip) - self._first_strip
        self.ends = np.zeros((strips, len(stages)), np.int64)
        bounds = (np.arange(self._first_strip, self._first_strip + strips) + 1) * strip
        self.ends[:, 0] = np.clip(bounds, first, end)
        for i, stage in enumerate(stages[1:], 1):
            low, high = height.ranges[i]
            available = self.ends[:, list(stage.inputs)].min(1)
            empty = [height.ranges[fed][0] for fed in stage.inputs]
            available = np.where(available > max(empty), available, 0)
            done = height.reaches[i].finished(available, low, high)
            if least is not None and least[i] > 1:
                done = np.where(done < high, done - (done - low) % least[i], high)
            self.ends[:, i] = done

    @cached_property
    def before(self) -> NDArray[np.int64]:
        """The end of the rows that were computed before each strip."""
        first = np.array([[low for low, _ in self.height.ranges]])
        return np.concatenate([first, self.ends[:-1]])

    def starts_for(self, row: int) -> tuple[int, list[int]]:
        """Where to begin so that `row` and all later ones come out with the same bits.

        Every stage then begins at a row where one of its strips begins, so that all strips are the
        same as in a run from the beginning.

        Returns:
            the number of the first strip, and every stage's first row.
        """

        def widened(stage: int, needed: Pair) -> Pair:
            bounds = self.before[:, stage]
            begun = bounds[bounds <= needed[0]]
            return int(begun[-1]) if len(begun) else needed[0], needed[1]

        last = self.height.ranges[-1][1]
        ranges = demanded(self.stages, self.height.reaches, (row, last), widened)
        starts = [low for low, _ in ranges]
        strip = int(np.searchsorted(self.ends[:, 0], starts[0], side="right"))
        return strip, starts

    def image_rows(self, strip: int) -> Pair:
        """The image's rows of a strip."""
        return int(self.before[strip, 0]), int(self.ends[strip, 0])


# -- the buffers ----------------------------------------------------------------------------------


class _Rows:
    """Rows of a map that wait for one reader: consecutive pieces ``(N, C, rows, cols)``."""

    def __init__(self, start: int):
        self.start = start
        self.pieces: list[Tensor] = []

    @property
    def waits(self) -> bool:
        """Whether there are rows."""
        return bool(self.pieces)

    def append(self, rows: Tensor) -> None:
        self.pieces.append(rows)

    def extended(self, like: Tensor) -> Tensor:
        """Room for further rows, shaped as `like`, right after those that wait."""
        count = sum(p.shape[2] for p in self.pieces)
        batch, channels, rows, cols = like.shape
        format = (
            torch.channels_last
            if like.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        shape = (batch, channels, count + rows, cols)
        held = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)
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
            self.pieces = [held.narrow(2, kept, count - kept).clone()]
        self.start += kept
        return taken


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
        between: called between operations.
    """

    def __init__(
        self,
        schedule: Schedule,
        width: Extents,
        row: int,
        between: Callable[[], None] = lambda: None,
    ):
        self._between = between
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
                cells = self._hand_on(i, self._compute(i, self._done[i], end), end)
                self._between()
        self.strip += 1
        return cells

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
        return stage.call(taken)

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
    around = (*pads, 0, 0) if dim == 3 else (0, 0, *pads)
    return F.pad(x, around, "constant", sliding.value)
