"""How a layer that reads several positions computes a part of its map.

A rule of a layer kind (`fcvgg.rewriting.rules.registry.LayerKind.slides`) gives the `Sliding` of a
layer from its settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fcvgg.geometry import KernelGeometry, KernelPair, Pair


def pair_of(value: Any) -> Pair:
    """The height's and the width's value of a setting, where one number stands for both."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    return (int(values[0]), int(values[-1]))


def windows_of(
    kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> KernelPair:
    """Windows of both axes from torch's settings of a layer; the stride is the kernel when None."""
    kernel, dilation = pair_of(kernel), pair_of(dilation)
    stride = pair_of(stride) if stride not in (None, (), []) else kernel
    if isinstance(padding, str):
        # torch puts the odd one of the padding at the end
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation)]
        pads = [(n // 2, n - n // 2) for n in total]
    else:
        pads = [(p, p) for p in pair_of(padding)]
    height, width = (
        KernelGeometry(kernel[i], stride[i], dilation[i], *pads[i], ceil_mode=ceil_mode)
        for i in (0, 1)
    )
    return height, width


@dataclass(frozen=True)
class Part:
    """The part of a map that is computed: half-open ranges of its rows and columns.

    Attributes:
        rows: output rows.
        cols: output columns.
        size: ``(H, W)`` of the layer's whole input.
        pads_width: whether the layer pads the width itself, since it is given all columns.
        pads_height: whether it pads both ends of the height too, and so gives rows beyond `rows`.
    """

    rows: Pair
    cols: Pair
    size: Pair
    pads_width: bool = False
    pads_height: bool = False

    def padding(self, windows: KernelPair) -> Pair:
        """What the layer itself pads at both ends of the height and of the width."""
        height, width = windows
        return (
            height.before if self.pads_height else 0,
            width.before if self.pads_width else 0,
        )


@dataclass(frozen=True)
class Sliding:
    """A layer that slides a window, applied to what the windows of some outputs cover.

    Attributes:
        windows: along the height and the width.
        run: computes outputs from a region of the input that is padded already, so that the first
            window starts at its first element and the last ends at its last; but for what the
            `Part` says that the layer pads.
        channels: output channels; None keeps the input's.
        multiplies: output channels per channel of the input, where `channels` is None.
        border: how positions outside the map are filled: ``"constant"``, ``"reflect"``,
            ``"replicate"``.
        value: the constant of the border.
        pads_width: whether `run` can pad the width as torch does where all columns are given.
        pads_height: whether it can pad both ends of the height, too.
        columns: elements per output position that an explicit gathering of windows takes.
        weights: elements of the weights.
        gathers: whether the windows of at most `GEMM_CELLS` outputs are gathered at a time.
        indexes: whether the layer also makes an int64 index for every output.
        into: writes the outputs into a map ``(N, C, h, w)`` and may overwrite its input; of a layer
            that pads nothing and keeps channels and dtype. None where there is only `run`.
    """

    windows: KernelPair
    run: Callable[[Tensor, Part], Tensor]
    channels: int | None = None
    multiplies: int = 1
    border: str = "constant"
    value: float = 0.0
    pads_width: bool = False
    pads_height: bool = False
    columns: int = 0
    weights: int = 0
    gathers: bool = False
    indexes: bool = False
    into: Callable[[Tensor, Tensor], None] | None = None
