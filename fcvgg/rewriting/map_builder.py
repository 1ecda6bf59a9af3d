"""Maps in the new graph: their layouts, geometry and records. What rules work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fcvgg.errors import ConversionError, UnsupportedLayerError
from fcvgg.geometry import Geometry, KernelGeometry, KernelPair, Pair
from fcvgg.rewriting.capture import Captured
from fcvgg.rewriting.emission import Call, Emitter
from fcvgg.rewriting.layouts import Cells, channels_along, chosen_channels, with_channels
from fcvgg.rewriting.modules import BinnedPool2d, cut_to
from fcvgg.rewriting.program import LayerRecord, Steps


@dataclass(frozen=True)
class Boundary:
    """Where the head begins: the last map before it and the extent that the head asks for.

    `wants` is ``(h, w)`` where a pool fixes it, a number of features where a fully connected layer
    does, and None where a global pool takes any size.
    """

    cells: Cells
    wants: Pair | int | None
    place: str


class MapBuilder(Emitter):
    """Emits operations on maps, and keeps the geometry step of every map and a record of layers.

    Args:
        captured: the source's graph at its native size.
        modules: the tree of modules that the new graph calls, and that holds the parameters.
        output_stride: input pixels between cells that strides beyond are turned into dilation for.
        same: pad the head's first window so that the map keeps the size of the features.
        positions: leave global averages out, so that the map holds scores of single positions.
    """

    def __init__(
        self,
        captured: Captured,
        modules: nn.Module,
        output_stride: int | None = None,
        same: bool = False,
        positions: bool = False,
    ):
        super().__init__(captured, modules)
        self.boundary: Boundary | None = None
        self.records: list[LayerRecord] = []
        self.steps = Steps()
        self.positions = positions
        self.mode_dependent: list[str] = []
        self.kernels: set[tuple[str, Pair]] = set()
        self._output_stride = output_stride
        self._same = same
        self._gathered: Cells | None = None
        self._tells_apart = ""  # the layer that made the window's elements one cell's
        self._joins: dict[int, tuple[fx.Node, tuple[fx.Node, ...]]] = {}

    # -- layouts ----------------------------------------------------------------------------------

    def as_map(self, cells: Any, call: Call) -> Cells:
        """The value as a map ``(C, H, W)``; a selection of channels is emitted where needed."""
        cells = self._expect_cells(cells, call)
        if cells.is_map:
            return cells
        # A permutation of channels is a map too, once the channels are put in the layout's order.
        if len(cells.dims) == 3:
            settled = self.features(call, cells, 0)
            if settled.is_map:
                return settled
        self._refuse_cells(cells, call)
        raise UnsupportedLayerError(
            f"{call} needs a map (N, C, H, W), but got a value of shape "
            f"{cells.shape} whose elements were moved; "
            "only element-wise layers and the fully connected layer may follow such a reshape"
        )

    def features(self, call: Any, cells: Any, axis: int) -> Cells:
        """The value with all its channels, in order, along one axis of the layout."""
        cells = self._expect_cells(cells, call)
        if not -len(cells.dims) <= axis < len(cells.dims):
            raise UnsupportedLayerError(f"{call} works on axis {axis}, which mixes images")
        channels = channels_along(cells, axis)
        if channels is None:
            self._refuse_cells(cells, call)
            raise UnsupportedLayerError(
                f"{call} mixes positions: along its axis the value {cells.shape} "
                "does not run over channels; a cell of the map would not stay a cell"
            )
        if torch.equal(channels, torch.arange(cells.extent[0])):
            return cells
        # From here on the map itself has the order that only the layout had.
        return with_channels(cells, axis, len(channels), node=self.chosen(cells.node, channels))

    def _refuse_cells(self, cells: Cells, call: Any) -> None:
        """Refuse to treat a cell's elements as a map, naming the layer that took it apart."""
        if self._tells_apart and cells.positions == 1:
            raise UnsupportedLayerError(
                f"{self._tells_apart} mixes positions or tells them apart, so that all of "
                f"{cells.shape} is one cell's, and {call} works on a map of them; a cell of the "
                "map would not stay a cell"
            )

    def one_cell(self, place: Any) -> None:
        """Note a layer after which the window's elements are one cell's."""
        self._tells_apart = self._tells_apart or str(place)

    def whole(self, cells: Cells) -> Cells:
        """The value on a map of the channels that it holds, where it holds them at all positions.

        A value of other elements is returned as it is.
        """
        chosen = None if cells.fills_window else chosen_channels(cells)
        if chosen is None:
            return cells
        channels, layout = chosen
        extent = (len(channels), *cells.extent[1:])
        node = self.chosen(cells.node, channels)
        return replace(cells, node=node, extent=extent, moved=layout)

    def chosen(self, node: fx.Node, channels: Tensor) -> fx.Node:
        """Emit the choice of some channels: a slice where it is one."""
        first, count = int(channels[0]), len(channels)
        # A slice is a view, and an exported graph shows it as one; an index would copy the map.
        if torch.equal(channels, torch.arange(first, first + count)):
            return self.graph.call_method("narrow", (node, 1, first, count))
        return self.select(node, channels)

    def _expect_cells(self, value: Any, call: Any) -> Cells:
        if isinstance(value, Cells):
            return value
        raise UnsupportedLayerError(
            f"{call} takes {type(value).__name__.lower()} where a value computed from the image "
            "is expected"
        )

    # -- branches ---------------------------------------------------------------------------------

    def join(self, cells: Sequence[Cells], call: Call, node: fx.Node) -> int:
        """The step of an operation over several maps, whose cells must lie on one grid.

        Args:
            node: the operation in the new graph.
        """
        # The head's padding shifts its cells, so that those of one branch would meet others'
        # there.
        if len({c.margin for c in cells}) > 1:
            raise ConversionError(
                f"{call} joins branches that padding='same' pads differently; use padding='valid'"
            )
        cells = self._on_one_stride(cells, node)
        step = self.steps.join((c.step for c in cells), str(call))
        if len({c.step for c in cells}) > 1:  # else the step is that of the maps, not of this join
            self._joins[step] = node, tuple(c.node for c in cells)
        return step

    def _on_one_stride(self, cells: Sequence[Cells], node: fx.Node) -> list[Cells]:
        """Cells of pooled stages on the grid of the coarsest, of which the finer ones skip some."""
        strides = [self.steps.stride_at(c.step) for c in cells]
        coarse = max(y for y, _ in strides), max(x for _, x in strides)
        made = []
        for branch, (y, x) in zip(cells, strides):
            skip = coarse[0] // y, coarse[1] // x
            divides = (y * skip[0], x * skip[1]) == coarse
            if skip != (1, 1) and divides and branch.positions == 1:
                with self.graph.inserting_before(node):
                    taken = self._skipping(branch, skip, node.name)
                node.replace_input_with(branch.node, taken.node)
                branch = taken
            made.append(branch)
        return made

    def whole_periods(self, cells: Cells) -> Cells:
        """The cells that stand where the whole network moves with the image.

        An enlarged map has further positions, whose values depend on where they lie between those
        of the coarser map, so that a crop's would differ.

        Raises:
            ConversionError: if the cells are positions, since the mean of those that are left would
                not be the window's score.
        """
        stride, period = self.steps.stride_at(cells.step), self.steps.period_at(cells.step)
        if stride == period:
            return cells
        if self.positions:
            raise ConversionError(
                f"head='position' must have features of which each moves with the image, got some "
                f"every {stride[0]} x {stride[1]} pixels that were enlarged from every "
                f"{period[0]} x {period[1]}; use head='window'"
            )
        skip = period[0] // stride[0], period[1] // stride[1]
        return replace(self._skipping(cells, skip, "outputs"), average=None)

    def _skipping(self, cells: Cells, skip: Pair, place: str) -> Cells:
        node = self.graph.call_function(torch.max_pool2d, (cells.node, (1, 1)), {"stride": skip})
        windows = KernelGeometry(stride=skip[0]), KernelGeometry(stride=skip[1])
        return replace(cells, node=node, step=self.steps.add(windows, (cells.step,), place))

    def cut_branches(self, geometry: Geometry) -> None:
        """Cut branches to one size before they join, where some input gives them different ones.

        A pool that drops the odd row and a convolution that pads it are alike at the native size.
        Both count from the first row, so what the longer has in addition lies at its end.
        """
        for step in sorted(self.steps.differing_joins(geometry)):
            node, branches = self._joins[step]
            with self.graph.inserting_before(node):
                for branch in dict.fromkeys(branches):
                    others = tuple(other for other in branches if other is not branch)
                    cut = self.graph.call_function(cut_to, (branch, *others))
                    node.replace_input_with(branch, cut)

    # -- layers -----------------------------------------------------------------------------------

    def record(
        self, call: Call, kind: str, windows: KernelPair, result: Cells, multiply_adds: int = 0
    ) -> None:
        self.records.append(
            LayerRecord(
                name=call.name,
                kind=kind,
                windows=windows,
                step=result.step,
                channels=result.extent[0],
                parameters=call.parameters(),
                multiply_adds_per_position=multiply_adds,
            )
        )

    def window(
        self,
        call: Call,
        x: Cells,
        windows: KernelPair,
        emit: Callable[[KernelPair, bool], fx.Node] | None = None,
        multiply_adds: int = 0,
        kind: str | None = None,
        pools: str | None = None,
        extent: tuple[int, int, int] | None = None,
    ) -> Cells:
        """A layer that slides a kernel: convolution or pool.

        `emit` receives the windows as they must be on this map, and whether they differ from the
        source's because strides before it, or its own, became dilation; when None, the source's
        call is repeated, and a layer that must be dilated is refused. `pools` is how a pool makes
        one value of many, ``"avg"``, ``"max"`` or ``"other"``; other layers make new scores.
        `extent` is that of the result where the source's value has another shape.
        """
        dense, dilation = self._densified(call, x, windows)
        extent = extent or tuple(call.node.meta["value"].shape[1:])
        # The source's own result at the native size checks the geometry that the rule states.
        _check_extent(call, windows, x.extent[1:], extent[1:])
        if emit is None and dense != windows:
            raise UnsupportedLayerError(
                f"{call} has no dilated form; convert without output_stride"
            )
        # `pooling` tells a global pool from a stage of the trunk by the kernels before it.
        self.kernels.add((kind or call.kind, (windows[0].kernel, windows[1].kernel)))
        node = self.repeat(call, x) if emit is None else emit(dense, dense != windows)
        step = self.steps.add(dense, (x.step,), str(call))
        unseen = self._unseen(x, windows, extent[1:])
        result = Cells(node, step, extent, dilation=dilation, margin=x.margin, unseen=unseen)
        if pools is not None:
            result = result.pooled_from(x, pools)
        self.record(call, kind or call.kind, dense, result, multiply_adds)
        return result

    def _unseen(self, x: Cells, windows: KernelPair, outputs: Sequence[int]) -> Pair:
        """Pixels at the end of the native image that are left out once a layer has run.

        Where strides do not divide, a layer leaves out what its last window does not reach; of
        that, padding is no loss.
        """
        unseen = []
        for axis, (window, size, cells) in enumerate(zip(windows, x.extent[1:], outputs)):
            # the positions after the last window's end, in units of this layer's input
            rest = size * window.repeats + window.before - window.span - (cells - 1) * window.stride
            pixels = self.steps.stride_at(x.step)[axis] * x.dilation[axis]
            unseen.append(x.unseen[axis] + max(rest, 0) * pixels // window.repeats)
        return unseen[0], unseen[1]

    def _densified(self, call: Call, x: Cells, windows: KernelPair) -> tuple[KernelPair, Pair]:
        """The windows on this map, with strides beyond the output stride taken out."""
        dense, dilations = [], []
        for window, spread, stride in zip(windows, x.dilation, self.steps.stride_at(x.step)):
            # The stride that a cell grid of `output_stride` still allows; the rest becomes dilation
            # of all that follows, so that each output of the source is one of the outputs here.
            allowed = window.stride
            if self._output_stride is not None:
                allowed = gcd(window.stride, max(self._output_stride // stride, 1))
            if window.ceil_mode and (spread > 1 or allowed != window.stride):
                raise ConversionError(
                    f"output_stride={self._output_stride} cannot be exact at {call}: ceil_mode "
                    "rounds the size up, which a dilated pool does not; use a larger output_stride"
                )
            if window.repeats > 1 and spread > 1:
                raise ConversionError(
                    f"output_stride={self._output_stride} cannot be exact at {call}, which "
                    f"enlarges a map of stride {stride * spread}; use at least that"
                )
            dense.append(
                replace(
                    window,
                    stride=allowed,
                    dilation=window.dilation * spread,
                    before=window.before * spread,
                    after=window.after * spread,
                )
            )
            # neighbours in the source's result lie this far apart on the dense map
            dilations.append(spread * (window.stride // allowed))
        return (dense[0], dense[1]), (dilations[0], dilations[1])

    # -- the head ---------------------------------------------------------------------------------

    def begin_head(self, cells: Cells, wants: Pair | int | None, call: Any) -> None:
        """Note the first layer that asks for a certain size of the features."""
        if self._gathered is not None and cells.positions == 1:
            cells = self._gathered  # whose channels follow from the size
        if self.boundary is None:
            self.boundary = Boundary(cells, wants, str(call))

    def gathered(self, cells: Cells, place: Any) -> Cells:
        """The value with every element of the window as a channel of each cell.

        What then treats the window as a whole (a norm, a softmax over its positions) works along
        the channels of each cell, exactly: ``C*h*w`` numbers for each.
        """
        x = self.whole(cells)
        if x.positions == 1:
            return x
        self.one_cell(place)
        if self._gathered is None:
            self._gathered = x
        x, windows = self.head_window(place, x, x.extent[1:])
        step = self.steps.add(windows, (x.step,), str(place))
        bins = x.extent[1:]
        name = f"{place.node.name}_windows" if isinstance(place, Call) else "windows"
        node = self.emit_new_module(name, BinnedPool2d("max", bins, bins, x.dilation), x)
        # element k of the window is channel k now, so the layout holds as it is
        extent = (x.elements, 1, 1)
        return replace(x, node=node, step=step, extent=extent, moved=x.layout, dilation=(1, 1))

    def head_window(self, call: Any, x: Cells, extent: Pair) -> tuple[Cells, KernelPair]:
        """The window of the head over a map, padded first if the map is to keep its size.

        Padding is done once, for all positions that the head takes, so that a cell at the border is
        the head on features with zeros around them.
        """
        kernel = (
            KernelGeometry(extent[0], dilation=x.dilation[0]),
            KernelGeometry(extent[1], dilation=x.dilation[1]),
        )
        if not self._same or x.margin is not None or x.positions == 1:
            return x, kernel
        # A window of n positions loses (n - 1) * dilation of them; the odd one is added at the end,
        # as torch's padding="same" adds it.
        more = [(n - 1) * d for n, d in zip(x.extent[1:], x.dilation)]
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in more)
        stride = self.steps.stride_at(x.step)
        # in pixels, since cell 0 now stands that far before the image
        margin = (top * stride[0], left * stride[1])
        node = self.graph.call_function(F.pad, (x.node, (left, right, top, bottom)))
        windows = KernelGeometry(before=top, after=bottom), KernelGeometry(before=left, after=right)
        step = self.steps.add(windows, (x.step,), str(call))
        return replace(x, node=node, step=step, margin=margin), kernel


def _check_extent(
    call: Call, windows: KernelPair, size: Sequence[int], found: Sequence[int]
) -> None:
    """The geometry of a rule must give the size that the source's layer gives."""
    expected = tuple(window.output_size(n) for window, n in zip(windows, size))
    if tuple(found) != expected:
        raise UnsupportedLayerError(
            f"{call} makes {tuple(found)} positions of {tuple(size)}, where the windows of its "
            f"rule make {expected}; give its rule all that its size depends on"
        )
