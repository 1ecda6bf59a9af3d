"""The same network for another input size: features kept, fully connected layers rebuilt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fcvgg.conversion import convert
from fcvgg.errors import (
    ConversionError,
    InputSizeError,
    check_choice,
    check_integer,
    one_line,
)
from fcvgg.geometry import Pair, checked_size
from fcvgg.rewriting.capture import BATCH, capture
from fcvgg.rewriting.modules import WindowLinear
from fcvgg.rewriting.native_size import infer_input_size
from fcvgg.rewriting.rules import is_known
from fcvgg.transfer.extraction import map_geometries
from fcvgg.transfer.heads import copied_without, fully_connected, new_linear
from fcvgg.transfer.naming import LayerNames, NamedLayer, layer_names
from fcvgg.transfer.sources import source_of

_ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def for_input_size(
    model: nn.Module,
    size: int | Iterable[int],
    *,
    num_classes: int | None = None,
    init: Literal["random", "resample"] = "random",
) -> nn.Module:
    """A copy of a classifier for images of another size, of the same kind as the source.

    The features keep their weights. The first fully connected layer becomes as wide as the features
    of the new size are, and an adaptive pool before it lets them through; convert the result with
    ``input_size=size``.

    Args:
        model: a classifier that `fcvgg.convert` takes, or a converted network. It is not changed,
            and shares nothing with the result.
        size: the new native size, an int or ``(h, w)``.
        num_classes: as many scores in the new last layer; None keeps the source's number.
        init: where the FC layers start. ``"random"``: weights from N(0, 0.01), biases 0.
            ``"resample"``: the source's, fc6 with its kernels resampled to the new extent (see
            `resampled_kernels`); with `num_classes`, the last layer starts at random.

    Raises:
        InputSizeError: if the features would vanish; the message names the least size.
        ArgumentError: if an argument is out of range.
        ConversionError: if the head cannot be rebuilt; the message names the layer.
    """
    height, width = checked_size(size, error=InputSizeError)
    check_choice("init", init, ("random", "resample"))
    if num_classes is not None:
        check_integer("num_classes", num_classes, 1)
    model = source_of(model)
    names = layer_names(model)
    layers = fully_connected(names)
    _check_features(model, (height, width))
    # With "resample", only the first layer depends on the size; with "random", all are replaced.
    new = copied_without(model, [x.path for x in layers[: 1 if init == "resample" else None]])
    _open_pool(new, names, (height, width))
    first = model.get_submodule(layers[0].path)
    _put(new, layers[0], _features_at(new, layers[0], (height, width)), first)
    if init == "random":
        for layer in layers[1:]:
            old = model.get_submodule(layer.path)
            assert isinstance(old, nn.Linear)
            _put(new, layer, old.in_features, old)
    else:
        _resample(model, new, layers[0].path, (height, width))
    if num_classes is not None:
        last = layers[-1]
        linear = new.get_submodule(last.path)
        assert isinstance(linear, nn.Linear)
        if linear.out_features != num_classes:
            _put(new, last, linear.in_features, linear, num_classes)
    return new


def resampled_kernels(kernels: Tensor, extent: Pair) -> Tensor:
    """FC kernels ``(O, C, h, w)`` for a feature map of another extent.

    The new layer does what the old one would do on the features resampled to the old extent: with
    the resampling written as a matrix, ``old = R @ new`` per axis, the kernels become ``R.T @
    kernels``. So the scale is right by construction. R interpolates bilinearly, with the triangle
    widened where it shrinks (antialiasing), since then every new feature has a share; its rows sum
    to 1, so a constant feature map gives the response that it gave. At the same extent R is the
    identity.
    """
    down, across = (
        _resampling(new, old).to(kernels) for new, old in zip(extent, kernels.shape[2:])
    )
    return torch.einsum("ocij,ia,jb->ocab", kernels, down, across)


def _resampling(source: int, target: int) -> Tensor:
    """The matrix ``(target, source)`` that resamples `source` values in a row to `target`."""
    # torch's antialiasing is wrong for images one pixel wide, so whole rows are resampled
    basis = torch.eye(source, dtype=torch.float64)[None, None]
    rows = F.interpolate(
        basis, (target, source), mode="bilinear", align_corners=False, antialias=target < source
    )[0, 0]
    return rows / rows.sum(1, keepdim=True)  # (target, source)


# -- the new head's shape ---------------------------------------------------------------------


def _check_features(model: nn.Module, size: Pair) -> None:
    """The features must not vanish."""
    geometries = map_geometries(model)
    if not geometries:
        raise ConversionError(f"{type(model).__name__} has no convolution before its head")
    layer, geometry = geometries[-1]
    least = geometry.window
    if any(n < m for n, m in zip(size, least)):
        raise InputSizeError(
            f"size must be at least {least}, of which {layer.name} gives one position, got {size}, "
            f"where the features vanish; pass {least[0] if least[0] == least[1] else least} or "
            "more, to which images are enlarged"
        )


def _open_pool(new: nn.Module, names: LayerNames, size: Pair) -> None:
    """Let an adaptive pool before the head give as many positions as the features have."""
    for layer in names:
        pool = new.get_submodule(layer.path) if layer.path else None
        if layer.role in ("avgpool", "maxpool") and pool is None:
            raise ConversionError(
                f"{layer.name} is a call of {layer.kind} in the model's forward, whose size is "
                "fixed there; for_input_size needs it as a module"
            )
        if isinstance(pool, _ADAPTIVE) and pool.output_size not in (1, (1, 1)):
            fed = _node_of(new, layer, size).all_input_nodes[0].meta["value"]
            pool.output_size = tuple(fed.shape[2:])


def _features_at(new: nn.Module, layer: NamedLayer, size: Pair) -> int:
    """How many features come to the first fully connected layer at an input size."""
    node = _node_of(new, layer, size)
    fed = node.all_input_nodes[0]
    value = fed.meta.get("value")
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[0] != BATCH:
        reason = one_line(fed.meta["error"]) if "error" in fed.meta else "it mixes images"
        raise ConversionError(
            f"{fed.name} before {layer.name} does not give one row per image at input size {size} "
            f"({reason}); write it as torch.flatten(x, 1)"
        )
    return int(value.shape[1])


def _node_of(model: nn.Module, layer: NamedLayer, size: Pair) -> fx.Node:
    for node in capture(model, size, is_known).graph.nodes:
        if node.op == "call_module" and node.target == layer.path:
            return node
    raise ConversionError(f"{layer.name} ({layer.path}) is not reached at input size {size}")


def _put(
    new: nn.Module, layer: NamedLayer, inputs: int, like: nn.Module, outputs: int | None = None
) -> None:
    """A new linear layer in place of a named one, in `like`'s dtype, device and mode."""
    assert isinstance(like, nn.Linear)
    linear = new_linear(inputs, like.out_features if outputs is None else outputs, like)
    if like.bias is None:
        linear.bias = None  # type: ignore[assignment]
    parent, _, key = layer.path.rpartition(".")
    setattr(new.get_submodule(parent) if parent else new, key, linear)


# -- the old head's weights -------------------------------------------------------------------


@torch.no_grad()
def _resample(model: nn.Module, new: nn.Module, path: str, size: Pair) -> None:
    """Give `new`'s first fully connected layer the source's weights at the new extent.

    Both are seen through their conversion, where the weights are kernels in the order of the map,
    so that any flatten order is right.
    """
    native = _native_size(model)
    old = convert(model, input_size=native, verify=False).network.get_submodule(path)
    net = convert(new, input_size=size, verify=False)
    window = net.network.get_submodule(path)
    assert isinstance(old, WindowLinear)
    assert isinstance(window, WindowLinear)
    if old.in_channels != window.in_channels:
        raise ConversionError(
            f"{path} sees {old.in_channels} channels at {native} and {window.in_channels} at "
            f"{size}, so its kernels cannot be resampled; use init='random'"
        )
    extent = (window.kernel_size[0], window.kernel_size[1])
    kernels = resampled_kernels(old.weight, extent)  # (O, C, h, w)
    window.weight.data = kernels.to(window.weight)
    linear = new.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    linear.weight.copy_(window.fc_weight())
    if linear.bias is not None and old.bias is not None:
        linear.bias.copy_(old.bias)


def _native_size(model: nn.Module) -> Pair:
    try:
        return infer_input_size(model)
    except InputSizeError as error:
        raise InputSizeError(
            f"init='resample' needs the source's native size, which is not determined ({error}); "
            "use init='random'"
        ) from error
