"""Block-wise execution: large maps cost no more than their arithmetic.

The first layers of a classifier make its largest maps: 67 MB each for a VGG at 512 pixels. The
system maps and zeroes memory of that size at every call, which takes longer than some of the
layers. So the leading layers run block by block, a block being the layers up to one that strides,
and each block runs in strips of rows that stay in the processor's cache. The halo of a strip, a few
rows, is computed twice. The numbers are those of the whole map, up to oneDNN's rounding.
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

from fcvgg.geometry import KernelGeometry, Pair
from fcvgg.rewriting.rules.registry import is_positional, sliding_of
from fcvgg.rewriting.sliding import Part, Sliding

CHANNELS_LAST = {torch.float32, torch.bfloat16}
"""The dtypes for which oneDNN's convolutions are faster with the channels last."""

_WHOLE_BYTES = 32 * 1024**2
"""Maps below this size are computed whole: above, glibc maps new memory for every allocation."""

_WHOLE_ELEMENTS = 8 * 1024**2
"""The same in elements, which decides in half precision: larger maps leave the cache."""

_STRIP_BYTES = 4 * 1024**2
"""The largest map of a strip, per thread."""

_LEAST_ROWS = 16
"""Output rows of a strip at least, or the halo costs too much, as far as `_MOST_BYTES` allows."""

_MOST_BYTES = 26 * 1024**2
"""Of a strip's largest map without its halo, which must stay below `_WHOLE_BYTES` with it."""

_MOST_SHAPES = 64
"""Shapes of images for which a network keeps its blocks' strips."""

Map = tuple[int, int, int]
"""Channels, height and width of a map."""


def run(network: Any, images: Tensor, blockwise: BlockwiseGraph | None = None) -> Any:
    """``network(images)``, in the memory format and in the order that is fastest on a CPU.

    Args:
        blockwise: what was read from a network that never changes, so that no call reads it again.
    """
    if images.device.type != "cpu" or is_traced() or not isinstance(network, fx.GraphModule):
        return network(images)
    if images.dtype in CHANNELS_LAST:
        images = images.contiguous(memory_format=torch.channels_last)
    if torch.is_grad_enabled():
        return network(images)
    if blockwise is None or blockwise.has_hooks():
        blocks, rest = _sized_blocks(_blocks(network), images), None
    else:
        blocks, rest = blockwise.sized_blocks(images), blockwise.rest
    if not blocks:
        return network(images)
    x = images
    for block in blocks:
        x = run_block(block, x)
    return _run_after(network, blocks[-1].layers[-1].node, x) if rest is None else rest(x)


def is_traced() -> bool:
    """Whether torch records operations, so that no value may be looked at."""
    return (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch._C._get_tracing_state() is not None
    )


@dataclass(frozen=True)
class ChainLayer:
    """A layer of the leading chain of a network.

    Attributes:
        node: the layer's node in the network's graph.
        sliding: how it computes a part of its map; None where it works on each position alone.
        call: computes the whole map.
    """

    node: fx.Node
    sliding: Sliding | None
    call: Callable[[Tensor], Tensor]

    @property
    def height(self) -> KernelGeometry:
        return KernelGeometry() if self.sliding is None else self.sliding.windows[0]

    @property
    def width(self) -> KernelGeometry:
        return KernelGeometry() if self.sliding is None else self.sliding.windows[1]


@dataclass(frozen=True)
class Strip:
    """The rows `outputs` of a block's output, computed from the rows `inputs` of its input.

    Attributes:
        calls: compute, layer by layer, the rows that the next layer reads.
    """

    inputs: Pair
    calls: tuple[Callable[[Tensor], Tensor], ...]
    outputs: Pair


@dataclass(frozen=True)
class SizedBlock:
    """A block, the layers up to one that strides, for images of one shape.

    Attributes:
        layers: of the block, in order.
        size: ``(H, W)`` of its output.
        strips: from top to bottom; empty where the block is computed whole.
    """

    layers: Sequence[ChainLayer]
    size: Pair
    strips: tuple[Strip, ...]


class BlockwiseGraph:
    """The blocks of a network that never changes, and the rest of its graph, read once.

    Reading them at every call costs more than it seems: between two layers the caches are full of
    maps, and Python takes several times as long as elsewhere. Copies and pickles give None, since
    the blocks belong to one network.
    """

    def __init__(self, network: fx.GraphModule):
        self._blocks = _blocks(network)
        self.rest = _graph_after(network, self._blocks[-1][-1].node) if self._blocks else network
        self._modules = list(network.modules())
        self._known: dict[Any, list[SizedBlock]] = {}

    def sized_blocks(self, x: Tensor) -> list[SizedBlock]:
        """The leading blocks for images like `x`; empty where they are too small for them."""
        key = x.shape, x.dtype, torch.get_num_threads()
        known = self._known  # replaced as a whole, since other threads may read it
        if key not in known:
            kept = {} if len(known) >= _MOST_SHAPES else known
            self._known = known = {**kept, key: _sized_blocks(self._blocks, x)}
        return known[key]

    def has_hooks(self) -> bool:
        """Whether a hook was added to a layer since the network was read."""
        return any(map(_has_hooks, self._modules))

    def __reduce__(self) -> Any:
        return type(None), ()


# -- the rest of the graph ------------------------------------------------------------------------


def _run_after(network: fx.GraphModule, last: fx.Node, x: Tensor) -> Any:
    """The graph's output, computed from the output `x` of a node of its leading chain."""
    known: dict[fx.Node, Any] = {}
    for node in network.graph.nodes:
        known[node] = None
        if node is last:
            break
    known[last] = x
    return fx.Interpreter(network).run(initial_env=known)


def _graph_after(network: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    """The graph after a node of its leading chain, as a network that shares the modules."""
    graph = fx.Graph()
    copies = {last: graph.placeholder("x")}
    leading = {last}
    for node in reversed(network.graph.nodes):
        if node in leading:
            leading.update(node.all_input_nodes)
    for node in network.graph.nodes:
        if node not in leading:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(network, graph)


# -- the leading chain ----------------------------------------------------------------------------


def _blocks(network: fx.GraphModule) -> list[list[ChainLayer]]:
    """The leading chain of layers, cut after each that strides; nothing after the last such cut."""
    if _has_hooks(network):
        return []
    node = next(n for n in network.graph.nodes if n.op == "placeholder")
    blocks: list[list[ChainLayer]] = []
    block: list[ChainLayer] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        layer = _chain_layer(network, node)
        if layer is None or (not block and layer.sliding is None):  # it may write into its input
            break
        block.append(layer)
        if layer.height.stride > 1:
            blocks.append(block)
            block = []
    return blocks


def _chain_layer(network: fx.GraphModule, node: fx.Node) -> ChainLayer | None:
    """A node of the chain; None where the chain ends."""
    if len(node.all_input_nodes) != 1 or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    target: Any = node.target
    module: nn.Module | None = None
    if node.op == "call_module":
        module = network.get_submodule(target)
        if module.training or _has_hooks(module):
            return None
    sliding = sliding_of(node, module, lambda _: None)
    if sliding is not None:
        if not sliding.pads_width or sliding.border != "constant":
            return None
        if any(w.before != w.after or w.ceil_mode for w in sliding.windows):
            return None
        return ChainLayer(node, sliding, _call_of(node, module))
    return ChainLayer(node, None, _call_of(node, module)) if is_positional(node, module) else None


def _call_of(node: fx.Node, module: nn.Module | None) -> Callable[[Tensor], Tensor]:
    """What a node computes from a whole map."""
    target: Any = node.target
    if module is not None:
        return module
    if node.op == "call_function":
        return lambda x: target(x, *node.args[1:], **node.kwargs)
    return lambda x: getattr(x, target)(*node.args[1:], **node.kwargs)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a hook watches a module, which must then be called once with its whole map."""
    own = module._forward_hooks or module._forward_pre_hooks
    everywhere = hooks._global_forward_hooks or hooks._global_forward_pre_hooks  # type: ignore
    return bool(own or everywhere)


# -- blocks for images of one shape ---------------------------------------------------------------


def _sized_blocks(blocks: Sequence[Sequence[ChainLayer]], x: Tensor) -> list[SizedBlock]:
    """Every block for images like `x`; empty where a map would have nothing left."""
    sized: list[SizedBlock] = []
    shape: Sequence[int] = x.shape
    for layers in blocks:
        maps = _maps(layers, shape)
        shape = len(x), *maps[-1]
        if min(shape) < 1:
            return []
        sized.append(SizedBlock(layers, maps[-1][1:], _strips(layers, maps, x)))
    return sized


def _maps(layers: Sequence[ChainLayer], shape: Sequence[int]) -> list[Map]:
    """The block's input and every layer's output."""
    maps = [(shape[1], shape[2], shape[3])]
    for layer in layers:
        channels, height, width = maps[-1]
        if layer.sliding is not None:
            channels = layer.sliding.channels or channels * layer.sliding.multiplies
        maps.append((channels, layer.height.output_size(height), layer.width.output_size(width)))
    return maps


def _strips(layers: Sequence[ChainLayer], maps: Sequence[Map], images: Tensor) -> tuple[Strip, ...]:
    """Strips whose maps fit the cache; none where the whole maps are small."""
    largest = max(map(prod, maps[1:]))  # elements of one image
    elements, itemsize = len(images) * largest, images.element_size()
    if elements < _WHOLE_ELEMENTS and elements * itemsize < _WHOLE_BYTES:
        return ()
    height = maps[-1][1]
    per_row = largest * itemsize / height
    fitting = int(_STRIP_BYTES * torch.get_num_threads() / per_row)
    rows = max(fitting, min(_LEAST_ROWS, int(_MOST_BYTES / per_row)), 1)
    firsts = range(0, height, rows)
    return tuple(_strip(layers, maps, (first, min(first + rows, height))) for first in firsts)


def _strip(layers: Sequence[ChainLayer], maps: Sequence[Map], rows: Pair) -> Strip:
    """How rows of a block's output are computed, each layer on the rows that the next one reads."""
    wanted = [rows]  # of the block's input and every layer's output, found from the end
    for layer, (_, height, _) in zip(reversed(layers), reversed(maps[:-1])):
        low, high = layer.height.reads(*wanted[0])
        low = min(max(low, 0), height)
        wanted.insert(0, (low, max(min(high, height), low)))
    calls = [
        _call_on_rows(layer, maps[i], maps[i + 1], wanted[i], wanted[i + 1])
        for i, layer in enumerate(layers)
    ]
    return Strip(wanted[0], tuple(calls), rows)


def _call_on_rows(
    layer: ChainLayer, given: Map, made: Map, have: Pair, want: Pair
) -> Callable[[Tensor], Tensor]:
    """What computes the rows `want` of a layer's output from the rows `have` of its input.

    Rows that the kernel reads outside the map, `above` and `below`, are padded.
    """
    if layer.sliding is None:
        return layer.call
    sliding, window = layer.sliding, layer.height
    low, high = window.reads(*want)
    above, below = have[0] - low, high - have[1]
    part = Part(want, (0, made[2]), (given[1], given[2]), pads_width=True)
    held = have[1] > have[0]
    if (above or below) and held and sliding.pads_height and window.stride == 1:
        # the layer pads both ends, of which one may be wrong, and the surplus rows are cut off:
        # a few rows computed in vain cost less than a padded copy of the strip
        padded = replace(part, pads_height=True)
        first, rows = window.before - above, want[1] - want[0]
        return lambda x: sliding.run(x, padded).narrow(2, first, rows)
    if above or below:
        pads = (0, 0, above, below)
        return lambda x: sliding.run(F.pad(x, pads, "constant", sliding.value), part)
    return lambda x: sliding.run(x, part)


# -- running a block ------------------------------------------------------------------------------


def run_block(block: SizedBlock, x: Tensor) -> Tensor:
    """A block's output ``(N, K, H, W)``, whole or strip by strip for each image."""
    *_, last = block.layers
    if not block.strips:
        made = x
        for layer in block.layers[:-1]:
            made = layer.call(made)
        write = _writer(last, made, x)
        if write is None:
            return last.call(made)
        result = _empty(len(x), block.size, made)
        write(made, result)
        return result
    output: Tensor | None = None  # allocated once a strip shows the channels and the dtype
    for i in range(len(x)):
        for strip in block.strips:
            part = x[i : i + 1, :, slice(*strip.inputs)]  # (1, C, rows, W)
            *calls, last_call = strip.calls
            for call in calls:
                part = call(part)
            write = _writer(last, part, x)
            if write is None:
                part = last_call(part)
            if output is None:
                output = _empty(len(x), block.size, part)
            place = output[i : i + 1, :, slice(*strip.outputs)]
            if write is None:
                place.copy_(part)
            else:
                write(part, place)
    assert output is not None
    return output


def _writer(layer: ChainLayer, made: Tensor, x: Tensor) -> Callable[[Tensor, Tensor], None] | None:
    """What writes a block's last map into its place, and may overwrite the map before it.

    None where the layer has no such way, or where that map shares memory with the block's input.
    """
    if layer.sliding is None or layer.sliding.into is None:
        return None
    shares = made.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return None if shares else layer.sliding.into


def _empty(images: int, size: Pair, like: Tensor) -> Tensor:
    """Room for maps with the channels and the dtype of another one."""
    shape = (images, like.shape[1], *size)
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)
