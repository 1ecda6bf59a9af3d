"""Differentiable score maps of images larger than memory.

The image runs through `LineBuffers` strip by strip without an autograd graph; what the buffers hold
between strips is remembered. The backward pass goes through the strips from the last to the first:
it computes each once more, with a graph, from what the buffers held before it, and hands the
gradient of that on to the strip before. No position is computed twice with a graph, and the
gradients are those of the whole image.

It is gradient checkpointing ("Training Deep Nets with Sublinear Memory Cost",
https://arxiv.org/abs/1604.06174) over rows of the image, for the purpose of "Streaming
convolutional neural networks for end-to-end learning with multi-megapixel images"
(https://arxiv.org/abs/1911.04432).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import ceil, isqrt
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from fcvgg.errors import ArgumentError, TrainingError
from fcvgg.geometry import Pair
from fcvgg.inference.line_buffers import BufferState, LineBuffers, MissingCells
from fcvgg.inference.memory import trimmer_above
from fcvgg.inference.schedule import AxisRanges, Schedule
from fcvgg.inference.stages import Stage, stages_of
from fcvgg.inference.strip_input import StripInput
from fcvgg.support.memory_text import rounded_up, size_text
from fcvgg.support.module_state import listed

_GRAPH = 3.5
"""Bytes that a strip's graph takes, in those of its maps: the maps themselves, the gradients of
some, and the workspace of the largest layer."""

_FIXED = 64 << 20
"""Bytes in addition: the libraries' own buffers, the allocator's gaps."""

_STATES = 0.1
"""Share of the graph that states of the buffers may take before strips are computed once more, so
that memory does not grow with the number of strips."""

_LARGEST_STRIP = 512
"""Rows of the image in a strip: more of them make it no faster."""

Gradients = dict[tuple[int, int], Tensor]
"""Gradients of the rows that buffers hold, by operation and input."""


def streamed_map(net: Any, pixels: StripInput, output: int, memory: int) -> Tensor:
    """The map ``(1, K, h, w)`` of an image, differentiable with respect to the parameters.

    Raises:
        ArgumentError: if `memory` is too little; the message states the least.
        TrainingError: if batch norm is in training mode.
    """
    _check_norms(net)
    scores: Tensor = _Streamed.apply(StreamedMap(net, pixels, output, memory), *net.parameters())
    return scores


class _Streamed(torch.autograd.Function):
    """The map as one operation on the parameters, so that hooks and optimisers work as usual."""

    @staticmethod
    def forward(ctx: Any, streamed: StreamedMap, *parameters: nn.Parameter) -> Tensor:
        ctx.streamed = streamed
        ctx.save_for_backward(*parameters)  # torch then notices if they change before the backward
        return streamed.scores()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scores: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        parameters = [p for p, wanted in zip(ctx.saved_tensors, needed) if wanted]
        found = iter(ctx.streamed.gradients(scores, parameters))
        return None, *(next(found) if wanted else None for wanted in needed)


class StreamedMap:
    """The score map of one image and, after it, the gradients of the parameters.

    The map is cut into blocks of columns where strips of the whole width do not fit into `memory`;
    each block is streamed by itself.
    """

    def __init__(self, net: Any, pixels: StripInput, output: int, memory: int):
        self._net, self._pixels, self._output = net, pixels, output
        self._size = net.output_size(pixels.source.size)  # (h, w) of the map
        self._plan = _plan(self._stages(), pixels, self._size, memory)
        # as late as the bound allows: trimming at most operations takes a quarter of the time
        self._give_back = trimmer_above(memory - _FIXED // 2)
        self._autocast = _autocast_of(pixels.device)
        self._held: dict[tuple[int, int], BufferState] = {}  # by block and strip
        self._random: dict[tuple[int, int], Any] = {}

    def scores(self) -> Tensor:
        """The whole map, without a graph."""
        result: Tensor | None = None
        self._missing = torch.zeros(1, 1, *self._size, dtype=torch.bool, device=self._pixels.device)
        for block, cols in enumerate(self._plan.blocks(self._size[1])):
            buffers, missing = self._buffers(cols)
            while not buffers.finished:
                self._remember(block, buffers)
                rows, pixels, unknown = self._read(buffers)
                cells = buffers.push(pixels)
                masked = missing.push(unknown)
                if cells is None:
                    continue
                if result is None:
                    result = cells.new_empty(1, cells.shape[1], *self._size)
                result[:, :, rows[0] : rows[1], cols[0] : cols[1]] = cells
                if masked is not None:
                    self._missing[:, :, rows[0] : rows[1], cols[0] : cols[1]] = masked
        torch.clear_autocast_cache()  # torch 2.7 reuses weights that are cast without a graph
        assert result is not None  # an image of any size has at least one cell
        return result.masked_fill(self._missing, torch.nan) if self._missing.any() else result

    def gradients(self, scores: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """The parameters' gradients, given the gradient of the map."""
        scores = scores.masked_fill(self._missing, 0)
        totals: list[Tensor | None] = [None] * len(parameters)
        trainable = _trainable(self._net.layers)
        for block, cols in enumerate(self._plan.blocks(self._size[1])):
            after: Gradients = {}
            for strip in self._backwards(block, cols):
                self._give_back(0)
                found, after = self._strip_gradients(
                    block, strip, cols, scores, after, parameters, trainable
                )
                for i, gradient in enumerate(found):
                    total = totals[i]
                    if gradient is not None:
                        totals[i] = gradient if total is None else total.add_(gradient)
        return totals

    def _strip_gradients(
        self,
        block: int,
        strip: int,
        cols: Pair,
        scores: Tensor,
        after: Gradients,
        parameters: Sequence[nn.Parameter],
        trainable: set[str],
    ) -> tuple[Sequence[Tensor | None], Gradients]:
        """The strip's part of the parameters' gradients, and those of what buffers held before it.

        `after` are the gradients of what buffers hold after it.
        """
        with torch.enable_grad():  # what is computed from parameters belongs to the graph
            buffers, _ = self._buffers(cols)
        before = self._held[block, strip]
        buffers.restore(before)
        rows, pixels, _ = self._read(buffers)
        given = scores[:, :, rows[0] : rows[1], cols[0] : cols[1]]
        if not after and not given.any():  # a loss of few cells needs few strips
            return [None] * len(parameters), {}
        stages = buffers.stages
        leaves = {
            place: held.detach().requires_grad_()
            for place, held in before.rows.items()
            if stages[stages[place[0]].inputs[place[1]]].name in trainable
        }
        with torch.enable_grad(), _repeated(self._random.get((block, strip)), self._autocast):
            # copies, since an operation may write into what it reads
            held = {place: x.clone() for place, x in {**before.rows, **leaves}.items()}
            buffers.restore(BufferState(before.strip, before.done, before.starts, held))
            cells = buffers.push(pixels)
            kept = buffers.state().rows
        results = [(kept[place], gradient) for place, gradient in after.items()]
        if cells is not None:
            results.append((cells, given))
        found = torch.autograd.grad(
            [x for x, _ in results],
            [*parameters, *leaves.values()],
            [gradient for _, gradient in results],
            allow_unused=True,
        )
        earlier = zip(leaves, found[len(parameters) :])
        return found[: len(parameters)], {place: g for place, g in earlier if g is not None}

    def _stages(self) -> list[Stage]:
        return stages_of(self._net.layers, self._net.in_channels, self._output)

    def _buffers(self, cols: Pair) -> tuple[LineBuffers, MissingCells]:
        """Line buffers for a block of columns, at its first strip."""
        stages = self._stages()
        schedule, width = _schedule(stages, self._pixels, self._size, cols, self._plan.strip)
        buffers = LineBuffers(schedule, width, 0, self._give_back, reuses=False)
        return buffers, MissingCells(schedule, width, 0)

    def _read(self, buffers: LineBuffers) -> tuple[Pair, Tensor, Tensor | None]:
        """The rows of cells that the next strip finishes, its pixels, and which are missing."""
        pixels, missing = self._pixels.strip(buffers.image_rows, buffers.image_cols)
        return buffers.next_cells, pixels, missing

    def _remember(self, block: int, buffers: LineBuffers) -> None:
        """Keep what the next strip begins with: of every strip, or of every `every`-th one."""
        place = block, buffers.strip
        if self._net.training:
            self._random[place] = _random_state(self._pixels.device)
        if buffers.strip % self._plan.every == 0:
            self._held[place] = buffers.state()

    def _backwards(self, block: int, cols: Pair) -> Iterator[int]:
        """The strips of a block from the last to the first, each with its state in `_held`."""
        buffers, _ = self._buffers(cols)
        strips = buffers.strips
        for first in reversed(range(0, strips, self._plan.every)):
            buffers.restore(self._held[block, first])
            end = min(first + self._plan.every, strips)
            with torch.no_grad():
                for strip in range(first + 1, end):  # states that were not kept
                    with _repeated(self._random.get((block, strip - 1)), self._autocast):
                        buffers.push(self._read(buffers)[1])
                    self._held[block, strip] = buffers.state()
            for strip in reversed(range(first, end)):
                yield strip
                if strip > first:  # the others serve further backward passes, by retain_graph
                    del self._held[block, strip]


# -- what fits into memory ------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphPlan:
    """How a map is computed with a graph within a memory bound.

    Attributes:
        strip: rows of the image in a strip.
        every: after how many strips a state of the buffers is kept; those between are computed
            once more.
        block: columns of cells in a block.
        peak: the bytes that it takes at most, by estimate.
    """

    strip: int
    every: int
    block: int
    peak: int

    def blocks(self, width: int) -> list[Pair]:
        """The blocks of a map's columns."""
        return [(n, min(n + self.block, width)) for n in range(0, width, self.block)]


def _plan(stages: list[Stage], pixels: StripInput, size: Pair, memory: int) -> GraphPlan:
    """The widest blocks, then the highest strips that fit."""
    block, least = size[1], 0.0
    while True:
        first = (size[1] - block) // 2
        cols = first, first + block
        strip = _LARGEST_STRIP
        while strip:
            schedule, width = _schedule(stages, pixels, size, cols, strip)
            graph, state = _graph_and_state(schedule, width, pixels.dtype.itemsize)
            every, states = _states_kept(
                len(schedule.ends), _STATES * _GRAPH * graph / max(state, 1)
            )
            least = _FIXED + _GRAPH * graph + state * states
            if least <= memory:
                return GraphPlan(strip, every, block, int(least))
            strip = strip // 2 if strip > 1 else 0
        if block == 1:
            break
        block = ceil(block / 2)
    raise ArgumentError(
        f"memory must be at least {size_text(rounded_up(int(least)))} for the graph of a strip, "
        f"got {size_text(memory)}"
    )


def _states_kept(strips: int, most: float) -> Pair:
    """After how many strips a state is kept, and the states at a time: `most`, or the fewest."""
    # those that are kept, and those between two of them while strips are computed once more
    counts = [ceil(strips / n) + (n - 1) for n in range(1, isqrt(strips) + 2)]
    fitting = [count for count in counts if count <= most]
    states = fitting[0] if fitting else min(counts)
    return counts.index(states) + 1, states


def _schedule(
    stages: list[Stage], pixels: StripInput, size: Pair, cols: Pair, strip: int
) -> tuple[Schedule, AxisRanges]:
    """Every operation computes all rows that it can at every strip: nothing waits in a graph."""
    height = AxisRanges(stages, 0, pixels.size[0], (0, size[0]))
    width = AxisRanges(stages, 1, pixels.size[1], cols)
    at_once = [1] * len(stages)
    return Schedule(stages, height, strip, at_once, at_once), width


def _graph_and_state(schedule: Schedule, width: AxisRanges, itemsize: int) -> Pair:
    """Bytes of all maps of the largest strip, and of what the buffers hold between strips."""
    stages = schedule.stages
    row_bytes = [
        stage.channels * (high - low) * itemsize for stage, (low, high) in zip(stages, width.ranges)
    ]
    made = [0 if stage.in_place else size for stage, size in zip(stages, row_bytes)]
    graph = ((schedule.ends - schedule.starts) * np.array(made)).sum(1).max()
    held = sum(
        rows * row_bytes[fed]
        for i in range(1, len(stages))
        for fed, rows in schedule.waiting_rows(i, schedule.ends[:, i], schedule.ends)
    )
    return int(graph), int(np.max(held))


# -- what the backward pass needs to know ---------------------------------------------------------


def _trainable(layers: fx.GraphModule) -> set[str]:
    """The nodes whose values depend on a parameter that requires a gradient."""
    own = {id(p) for p in layers.parameters() if p.requires_grad}
    found: set[str] = set()
    for node in layers.graph.nodes:
        values: list[Any] = []
        if node.op == "call_module":
            values = list(layers.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr":
            values = [attrgetter(str(node.target))(layers)]
        if any(id(v) in own for v in values) or any(n.name in found for n in node.all_input_nodes):
            found.add(node.name)
    return found


def _check_norms(net: Any) -> None:
    training = [
        name
        for name, module in net.layers.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    if net.training:
        training += [node.name for node in net.layers.graph.nodes if node.target is F.batch_norm]
    if training:
        raise TrainingError(
            "batch norm must be in evaluation mode in net.streamed, since a strip's statistics are "
            f"not the image's, got {listed(training)} in training mode; call net.eval(), or "
            "eval() of those layers after net.train()"
        )


def _random_state(device: torch.device) -> tuple[Tensor, Any]:
    return torch.get_rng_state(), get_device_states(torch.empty(0, device=device))


def _autocast_of(device: torch.device) -> AbstractContextManager[Any]:
    """The autocast settings of now, to be entered once more in the backward pass."""
    kind = device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


@contextmanager
def _repeated(
    state: tuple[Tensor, Any] | None, autocast: AbstractContextManager[Any]
) -> Iterator[None]:
    """Random numbers, such as dropout's, and dtypes as they were in the forward pass."""
    with autocast:
        if state is None:
            yield
            return
        cpu, (ids, states) = state
        with torch.random.fork_rng(ids):
            torch.set_rng_state(cpu)
            set_device_states(ids, states)
            yield
