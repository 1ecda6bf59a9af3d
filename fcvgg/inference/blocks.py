"""Run a network so that large maps cost no more than their arithmetic.

The first layers of a classifier make its largest maps: 67 MB each for a VGG at 512 pixels. Memory
of that size is fetched from the system and cleared anew at every call, which takes longer than
some of the layers. Here a large trunk runs block by block (the layers up to a pool), and each block
in strips of rows that stay in the processor's cache; the halo of a strip, a few rows, is computed
twice. Layer by layer the numbers are the same as on the whole map, up to the library's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as hooks

from fcvgg.geometry import Pair, Window
from fcvgg.inference.memory import keep_freed_maps
from fcvgg.inference.sliding import STRIP_RULES, Part, Sliding, is_positional, sliding_of

CHANNELS_LAST = {torch.float32, torch.bfloat16}
"""The dtypes for which oneDNN's convolutions are faster with the channels last."""

_WHOLE_BYTES = 32 * 1024**2
"""Maps below this size are computed whole: beyond, glibc maps every allocation anew."""

_WHOLE_ELEMENTS = 8 * 1024**2
"""The same for their elements, which counts in half precision: larger maps leave the cache."""

_STRIP_BYTES = 4 * 1024**2
"""The largest map of a strip, per thread."""

_LEAST_ROWS = 16
"""Output rows of a strip at least, or the halo costs too much."""

_MOST_SCHEDULES = 64
"""Shapes of images whose schedules a network keeps."""


def run(network: Any, images: Tensor, plan: Plan | None = None) -> Any:
    """``network(images)``, in the layout and in the order that is fastest here.

    Args:
        plan: of a network that stays as it is, so that it is not read anew at every call.
    """
    if images.device.type != "cpu" or is_traced() or not isinstance(network, fx.GraphModule):
        return network(images)
    if images.dtype in CHANNELS_LAST:
        images = images.contiguous(memory_format=torch.channels_last)
    if torch.is_grad_enabled():
        return network(images)
    if plan is None or plan.is_watched():
        blocks = _blocks(network)
        return _by_blocks(network, images, _schedules(blocks, images), None)
    return _by_blocks(network, images, plan.schedules(images), plan.rest)


def is_traced() -> bool:
    """Whether torch records operations, so that no value may be looked at."""
    return (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch._C._get_tracing_state() is not None
    )


@dataclass(frozen=True)
class Link:
    """A layer of the leading chain.

    Attributes:
        node: in the network's graph.
        sliding: how it computes a part of its map; None where it works on each position.
        call: computes the whole map.
    """

    node: fx.Node
    sliding: Sliding | None
    call: Callable[[Tensor], Tensor]

    @property
    def height(self) -> Window:
        return Window() if self.sliding is None else self.sliding.windows[0]

    @property
    def width(self) -> Window:
        return Window() if self.sliding is None else self.sliding.windows[1]


@dataclass(frozen=True)
class Strip:
    """A block's output rows `made`, computed from the rows `given` of its input.

    Attributes:
        layers: what every layer but the last one computes of the rows of the one before.
        last: the same of the last one.
    """

    given: Pair
    layers: tuple[Callable[[Tensor], Tensor], ...]
    last: Callable[[Tensor], Tensor]
    made: Pair


@dataclass(frozen=True)
class Schedule:
    """How a block, the layers up to one that strides, computes maps of one shape.

    Attributes:
        block: the layers.
        size: ``(H, W)`` of its output.
        is_large: whether its maps are worth keeping when they are freed.
        strips: from top to bottom; none where the block is computed whole.
    """

    block: Sequence[Link]
    size: Pair
    is_large: bool
    strips: tuple[Strip, ...]


class Plan:
    """How a network runs that stays as it is: graph and shapes are read once, not at every call.

    Between two layers the processor's caches are full of maps, and what Python does there takes
    several times as long as elsewhere. Copies and pickles of a plan are None, since it belongs to
    one network.
    """

    def __init__(self, network: fx.GraphModule):
        self._blocks = _blocks(network)
        self.rest = _after(network, self._blocks[-1][-1].node) if self._blocks else network
        self._watchable = list(network.modules())
        self._known: dict[Any, list[Schedule] | None] = {}

    def schedules(self, x: Tensor) -> list[Schedule] | None:
        """Of the leading blocks for such images; None where they are too small for them."""
        key = x.shape, x.dtype, torch.get_num_threads()
        known = self._known  # replaced as a whole, since other threads may read it
        if key not in known:
            kept = {} if len(known) >= _MOST_SCHEDULES else known
            self._known = known = {**kept, key: _schedules(self._blocks, x)}
        return known[key]

    def is_watched(self) -> bool:
        """Whether a hook was added since."""
        return any(map(_has_hooks, self._watchable))

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> None:
    return None


def _by_blocks(
    network: fx.GraphModule,
    x: Tensor,
    schedules: list[Schedule] | None,
    rest: Callable[[Tensor], Any] | None,
) -> Any:
    """The leading blocks here, and the rest of the graph as it stands."""
    if not schedules:
        return network(x)
    for schedule in schedules:
        x = computed(schedule, x)
    if rest is not None:
        return rest(x)
    return _interpreted(network, schedules[-1].block[-1].node, x)


def _interpreted(network: fx.GraphModule, last: fx.Node, x: Tensor) -> Any:
    """The graph from the output of a node of its leading chain on."""
    known: dict[fx.Node, Any] = {}
    for node in network.graph.nodes:
        known[node] = None
        if node is last:
            break
    known[last] = x
    del x
    return fx.Interpreter(network).run(initial_env=known)


def _after(network: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    """The same as a network of its own, which shares the modules."""
    graph = fx.Graph()
    made = {last: graph.placeholder("x")}
    leading = {last}
    for node in reversed(network.graph.nodes):
        if node in leading:
            leading.update(node.all_input_nodes)
    for node in network.graph.nodes:
        if node not in leading:
            made[node] = graph.node_copy(node, made.__getitem__)
    return fx.GraphModule(network, graph)


def _blocks(network: fx.GraphModule) -> list[list[Link]]:
    """The leading chain of layers, cut after each that strides; nothing after the last such cut."""
    if _has_hooks(network):
        return []
    node = next(n for n in network.graph.nodes if n.op == "placeholder")
    blocks: list[list[Link]] = []
    block: list[Link] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        link = _link(network, node)
        if link is None or (not block and link.sliding is None):  # it may write into its input
            break
        block.append(link)
        if link.height.stride > 1:
            blocks.append(block)
            block = []
    return blocks


def _link(network: fx.GraphModule, node: fx.Node) -> Link | None:
    """A node of the chain; None where the chain ends."""
    if len(node.all_input_nodes) != 1 or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    target: Any = node.target
    module: nn.Module | None = None
    if node.op == "call_module":
        module = network.get_submodule(target)
        if module.training or _has_hooks(module):
            return None
    kind = type(module) if module is not None else target
    if kind in STRIP_RULES:
        sliding = sliding_of(node, module, lambda _: None)
        if sliding is None or not sliding.pads_width or sliding.border != "constant":
            return None
        if any(w.before != w.after or w.ceil_mode for w in sliding.windows):
            return None
        return Link(node, sliding, _call_of(node, module))
    return Link(node, None, _call_of(node, module)) if is_positional(kind) else None


def _call_of(node: fx.Node, module: nn.Module | None) -> Callable[[Tensor], Tensor]:
    """What a node computes from a whole map."""
    target: Any = node.target
    if module is not None:
        return module
    if node.op == "call_function":
        return lambda x: target(x, *node.args[1:], **node.kwargs)
    return lambda x: getattr(x, target)(*node.args[1:], **node.kwargs)


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches a module, who must see it called once with its whole map."""
    own = module._forward_hooks or module._forward_pre_hooks
    everywhere = hooks._global_forward_hooks or hooks._global_forward_pre_hooks  # type: ignore
    return bool(own or everywhere)


def _maps(block: Sequence[Link], shape: Sequence[int]) -> list[tuple[int, int, int]]:
    """``(C, H, W)`` of the block's input and of every layer's output."""
    maps = [(shape[1], shape[2], shape[3])]
    for link in block:
        channels, height, width = maps[-1]
        if link.sliding is not None:
            channels = link.sliding.channels or channels * link.sliding.multiplies
        maps.append((channels, link.height.output_size(height), link.width.output_size(width)))
    return maps


def _schedules(blocks: Sequence[Sequence[Link]], x: Tensor) -> list[Schedule] | None:
    """Of every block for such images; None where a map would have nothing left."""
    schedules: list[Schedule] = []
    shape: Sequence[int] = x.shape
    for block in blocks:
        maps = _maps(block, shape)
        shape = len(x), *maps[-1]
        if min(shape) < 1:
            return None
        schedules.append(_schedule(block, maps, len(x), x.element_size()))
    return schedules


def _schedule(
    block: Sequence[Link], maps: Sequence[tuple[int, int, int]], images: int, itemsize: int
) -> Schedule:
    """Whole, or image by image in strips of rows where the maps are large."""
    elements = images * max(map(prod, maps[1:]))
    size = maps[-1][1:]
    is_large = elements * itemsize >= _STRIP_BYTES
    if elements < _WHOLE_ELEMENTS and elements * itemsize < _WHOLE_BYTES:
        return Schedule(block, size, is_large, ())
    rows = _rows_of_a_strip(maps, itemsize)
    firsts = range(0, size[0], rows)
    strips = tuple(_strip(block, maps, (first, min(first + rows, size[0]))) for first in firsts)
    return Schedule(block, size, is_large, strips)


def computed(schedule: Schedule, x: Tensor) -> Tensor:
    """A block's output."""
    if schedule.is_large:
        keep_freed_maps()
    if not schedule.strips:
        return _whole(schedule.block, schedule.size, x)
    result: Tensor | None = None
    for i in range(len(x)):
        for strip in schedule.strips:
            part = x[i : i + 1, :, slice(*strip.given)]
            for layer in strip.layers:
                part = layer(part)
            write = _writer(schedule.block[-1], part, x)
            if write is None:
                part = strip.last(part)
            if result is None:
                result = _empty(len(x), schedule.size, part)
            place = result[i : i + 1, :, slice(*strip.made)]
            if write is None:
                place.copy_(part)
            else:
                write(part, place)
    assert result is not None
    return result


def _whole(block: Sequence[Link], size: Pair, x: Tensor) -> Tensor:
    *layers, last = block
    made = x
    for link in layers:
        made = link.call(made)
    write = _writer(last, made, x)
    if write is None:
        return last.call(made)
    result = _empty(len(x), size, made)
    write(made, result)
    return result


def _empty(images: int, size: Pair, like: Tensor) -> Tensor:
    """A map with the channels and the dtype of another one."""
    shape = (images, like.shape[1], *size)
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)


def _writer(link: Link, made: Tensor, given: Tensor) -> Callable[[Tensor, Tensor], None] | None:
    """What writes a block's last map into its place, and may overwrite the map before it.

    None where there is none, or where that map shares memory with what the block was given.
    """
    if link.sliding is None or link.sliding.into is None:
        return None
    shares = made.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return None if shares else link.sliding.into


def _rows_of_a_strip(maps: Sequence[tuple[int, int, int]], itemsize: int) -> int:
    height = maps[-1][1]
    row_bytes = max(map(prod, maps[1:])) * itemsize / height  # of the largest map, per output row
    fitting = int(_STRIP_BYTES * torch.get_num_threads() / row_bytes)
    return min(max(fitting, _LEAST_ROWS), height)


def _wanted(block: Sequence[Link], maps: Sequence[tuple[int, int, int]], rows: Pair) -> list[Pair]:
    """Rows ``[first, end)`` of a block's input and of every output, for these of the last one."""
    wanted = [rows]
    for link, (_, height, _) in zip(reversed(block), reversed(maps[:-1])):
        first, end = wanted[0]
        window = link.height
        low = first * window.stride - window.before
        high = (end - 1) * window.stride - window.before + window.span
        low = min(max(low, 0), height)
        wanted.insert(0, (low, max(min(high, height), low)))
    return wanted


def _strip(block: Sequence[Link], maps: Sequence[tuple[int, int, int]], rows: Pair) -> Strip:
    """Of these rows of the output: each layer on the rows that the next ones read."""
    wanted = _wanted(block, maps, rows)
    layers = [
        _on_rows(link, maps[i], maps[i + 1], wanted[i], wanted[i + 1])
        for i, link in enumerate(block)
    ]
    return Strip(wanted[0], tuple(layers[:-1]), layers[-1], rows)


def _on_rows(
    link: Link,
    given: tuple[int, int, int],
    made: tuple[int, int, int],
    have: Pair,
    want: Pair,
) -> Callable[[Tensor], Tensor]:
    """What computes the rows `want` of a layer's output from the rows `have` of its input."""
    if link.sliding is None:
        return link.call
    sliding, window = link.sliding, link.height
    above = have[0] - (want[0] * window.stride - window.before)
    below = (want[1] - 1) * window.stride - window.before + window.span - have[1]
    part = Part(want, (0, made[2]), (given[1], given[2]), pads_width=True)
    held = have[1] > have[0]
    if (above or below) and held and sliding.pads_height and window.stride == 1:
        # rows of zeros at both ends, of which one may be wrong, cost less than a padded copy
        padded = replace(part, pads_height=True)
        first, rows = window.before - above, want[1] - want[0]
        return lambda x: sliding.run(x, padded).narrow(2, first, rows)
    if above or below:
        pads = (0, 0, above, below)
        return lambda x: sliding.run(F.pad(x, pads, "constant", sliding.value), part)
    return lambda x: sliding.run(x, part)
