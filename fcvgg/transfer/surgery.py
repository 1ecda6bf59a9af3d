"""Replacing and inserting layers by name, in a copy of the model."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fcvgg.errors import ArgumentError, ConversionError, FcvggError, one_line
from fcvgg.evaluation.layer_table import short
from fcvgg.geometry import Pair
from fcvgg.rewriting.capture import capture
from fcvgg.rewriting.rules import is_known
from fcvgg.support.module_state import device_of, dtype_of
from fcvgg.support.tables import text_table
from fcvgg.transfer.extraction import map_geometries
from fcvgg.transfer.naming import LayerNames, NamedLayer, layer_names
from fcvgg.transfer.sources import source_of

_LOG = logging.getLogger("fcvgg")


def replace_layers(model: nn.Module, first: str, last: str, new: nn.Module) -> nn.Module:
    """A copy of the model in which `new` stands for the layers from `first` to `last`.

    Both named layers and what lies between them go, also activations and batch norms; what follows
    `last`, such as its activation, stays. ``replace_layers(vgg, "conv1_1", "conv1_2",
    nn.Conv2d(3, 64, 5, padding=2))`` puts one 5x5 convolution for two 3x3. With batch norm, name
    ``"bn1_2"`` as the last to have its statistics go too.

    The other layers keep their weights and their keys in ``state_dict``: those of `new` are new
    (``features.0_2_new.weight``), so the source's checkpoint still fits with ``strict=False``. What
    the layers see before and after, `geometry_changes` tells; the last map's is logged too (logger
    "fcvgg", INFO).

    Args:
        model: a model whose named layers stand in one `nn.Sequential`, or a converted network. It
            is not changed.
        first: a canonical name, Keras name or module path.
        last: likewise; may be the same layer.
        new: the module to put there, as it is (not copied).

    Raises:
        ArgumentError: if a name is unknown, or `last` comes before `first`.
        ConversionError: if the new layers do not fit: the message names the layer, what it got and
            what it takes.
    """
    _check_module(new)
    names = layer_names(source_of(model))
    start, end = names.find(first), names.find(last)
    if names.layers.index(start) > names.layers.index(end):
        raise ArgumentError(
            f"first must not come after last in the model, got {first!r} and {last!r}; swap them"
        )
    place = _Place.of(names, start, end, alone=True)
    _check_fit(names, start.node.all_input_nodes[0], end, new)
    key = "_".join(dict.fromkeys((place.keys[0], place.keys[-1])))
    return _edited(names, place, f"{key}_new", new, kept=False)


def insert_after(model: nn.Module, layer: str, new: nn.Module) -> nn.Module:
    """A copy of the model with `new` after a layer: between it and the one that follows.

    ``insert_after(vgg, "relu3_3", nn.Dropout2d(0.2))``. All other layers keep weights and keys; see
    `replace_layers` for what is checked.

    Args:
        model: a model whose named layer stands in an `nn.Sequential`, or a converted network. It is
            not changed.
        layer: a canonical name, Keras name or module path; Keras's convolutions hold their
            activation, so that `new` comes after it.
        new: the module to put there, as it is (not copied).
    """
    _check_module(new)
    names = layer_names(source_of(model))
    end = names.end_of(layer)
    place = _Place.of(names, end, end)
    _check_fit(names, end.node, end, new)
    return _edited(names, place, f"{place.keys[-1]}_after", new, kept=True)


@dataclass(frozen=True)
class LayerChange:
    """What one layer sees before and after surgery; None where it has no such layer.

    Each is ``(receptive field, output stride, offset)``, pairs ``(h, w)`` in pixels.
    """

    path: str
    kind: str
    before: tuple[Pair, Pair, Pair] | None
    after: tuple[Pair, Pair, Pair] | None

    @property
    def changed(self) -> bool:
        return self.before != self.after


class GeometryChanges(Sequence[LayerChange]):
    """The layers with a window, before and after surgery; printing shows a table."""

    def __init__(self, rows: Sequence[LayerChange]):
        self.rows = tuple(rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def same(self) -> bool:
        """Whether every layer that stayed sees what it saw."""
        return not any(row.changed for row in self.rows if row.before and row.after)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("layer", "kind", "receptive field", "stride", "offset")]
        for row in self.rows:
            table.append((row.path, row.kind, *(_change(row, i) for i in range(3))))
        return text_table(table, left=5)


def geometry_changes(before: nn.Module, after: nn.Module) -> GeometryChanges:
    """What every layer of a map sees in two models, matched by the layers' paths.

    Args:
        before: a model.
        after: the model that `replace_layers` or `insert_after` made of it.
    """
    old, new = _fields(before), _fields(after)
    return GeometryChanges(
        [
            LayerChange(
                path,
                (new.get(path) or old[path])[0],
                old[path][1] if path in old else None,
                new[path][1] if path in new else None,
            )
            for path in _merged(list(old), list(new))
        ]
    )


def _merged(old: list[str], new: list[str]) -> list[str]:
    """The paths of both; between common ones first what went, then what came."""
    # a path of both is an anchor: what stands before it in either list is placed before it
    merged: list[str] = []
    came: list[str] = []
    for path in new:
        if path not in old:
            came.append(path)
            continue
        at = old.index(path)
        merged += [*old[:at], *came, path]
        old, came = old[at + 1 :], []
    return [*merged, *old, *came]


def _fields(model: nn.Module) -> dict[str, tuple[str, tuple[Pair, Pair, Pair]]]:
    return {
        layer.path or layer.name: (layer.kind, (g.receptive_field, g.stride, g.offset))
        for layer, g in map_geometries(model)
    }


def _change(row: LayerChange, index: int) -> str:
    def text(value: tuple[Pair, Pair, Pair] | None) -> str:
        return "-" if value is None else short(value[index])

    before, after = text(row.before), text(row.after)
    return before if before == after else f"{before} -> {after}"


# -- the place --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Neighbouring children of one `nn.Sequential`, or one child of another module."""

    parent: str
    keys: tuple[str, ...]

    @classmethod
    def of(
        cls, names: LayerNames, first: NamedLayer, last: NamedLayer, alone: bool = False
    ) -> _Place:
        """Where two layers stand; `alone` lets a single one stand in a module of any kind."""
        for layer in (first, last):
            if not layer.path:
                raise ConversionError(
                    f"{layer.name} is a call of {layer.kind} in the model's forward, not a "
                    "module; surgery needs layers that stand in an nn.Sequential"
                )
        parents = [layer.path.rpartition(".")[0] for layer in (first, last)]
        if parents[0] != parents[1]:
            raise ConversionError(
                f"{first.name} ({first.path}) and {last.name} ({last.path}) stand in different "
                "modules; surgery needs both in one nn.Sequential"
            )
        parent = names.root.get_submodule(parents[0])
        if not isinstance(parent, nn.Sequential) and not (alone and first is last):
            raise ConversionError(
                f"{first.name} ({first.path}) stands in a {type(parent).__name__}, whose forward "
                "calls it by name; surgery needs an nn.Sequential"
            )
        keys = [key for key, _ in parent.named_children()]
        ends = [keys.index(layer.path.rpartition(".")[2]) for layer in (first, last)]
        return cls(parents[0], tuple(keys[ends[0] : ends[1] + 1]))


def _edited(names: LayerNames, place: _Place, key: str, new: nn.Module, kept: bool) -> nn.Module:
    """A copy of the model with other children at a place, checked to run as far as the source."""
    model = copy.deepcopy(names.root)
    old = model.get_submodule(place.parent) if place.parent else model
    if not isinstance(old, nn.Sequential):  # forward calls the layer by its name
        setattr(old, place.keys[0], new.train(old.training))
        _check_runs(names, model)
        return model
    # An nn.Sequential runs its children in order, so the container is filled again. Layers that
    # stay keep their keys, so that the source's checkpoint still fits.
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in old.named_children():
        if name not in place.keys or kept:
            children[name] = child
        if name == place.keys[-1]:
            children[_free(key, old)] = new.train(old.training)
    old._modules.clear()
    for name, child in children.items():
        old.add_module(name, child)
    _check_runs(names, model)
    _log_change(names, model)
    return model


def _free(name: str, parent: nn.Module) -> str:
    candidate, number = name, 1
    while candidate in parent._modules:
        number += 1
        candidate = f"{name}{number}"
    return candidate


# -- checks -----------------------------------------------------------------------------------


def _check_module(new: object) -> None:
    if not isinstance(new, nn.Module):
        raise ArgumentError(
            f"new must be a torch.nn.Module, got {type(new).__name__}; pass several as an "
            "nn.Sequential"
        )


def _check_fit(names: LayerNames, source: fx.Node, end: NamedLayer, new: nn.Module) -> None:
    """The new layers take what comes to their place and give what the next layer takes."""
    for what, of in (("dtype", dtype_of), ("device", device_of)):
        theirs, ours = of(new), of(names.root)
        if next(new.parameters(), None) is not None and theirs != ours:
            raise ConversionError(
                f"the new layers have {what} {theirs}, and the model {ours}; "
                f"call new.to({str(ours) if what == 'dtype' else repr(str(ours))}) first"
            )
    fed, replaced = source.meta.get("value"), end.node.meta.get("value")
    if not isinstance(fed, Tensor) or not isinstance(replaced, Tensor):
        return  # the model does not run at the size it was traced at
    feeder = next((x.name for x in names if x.node is source), "the image")
    takes = _channels_taken(new)
    if takes is not None and takes != fed.shape[1]:
        raise ConversionError(
            f"the new layers take {takes} channels, but {feeder} gives {fed.shape[1]}; "
            f"expected {fed.shape[1]} input channels"
        )
    twin = copy.deepcopy(new).to("meta").eval()
    try:
        with torch.no_grad():
            result = twin(torch.empty(fed.shape, dtype=dtype_of(new), device="meta"))
    except Exception as error:
        raise ConversionError(
            f"the new layers do not run on what {feeder} gives, {tuple(fed.shape[1:])} per image: "
            f"{one_line(error)}"
        ) from error
    if not isinstance(result, Tensor) or result.ndim != replaced.ndim:
        got = tuple(result.shape[1:]) if isinstance(result, Tensor) else type(result).__name__
        raise ConversionError(
            f"the new layers give {got} per image after {feeder}; "
            f"expected {tuple(replaced.shape[1:])}"
        )
    if result.shape[1] != replaced.shape[1]:
        raise ConversionError(
            f"the new layers give {result.shape[1]} channels, but {_next_taker(names, end)} takes "
            f"{replaced.shape[1]}; expected {replaced.shape[1]} output channels"
        )


def _channels_taken(new: nn.Module) -> int | None:
    """What the first of the new layers takes, where it says so."""
    while isinstance(new, nn.Sequential) and len(new):
        new = new[0]
    settings = (getattr(new, n, None) for n in ("in_channels", "in_features", "num_features"))
    return next((value for value in settings if isinstance(value, int)), None)


def _next_taker(names: LayerNames, end: NamedLayer) -> str:
    for layer in names.layers[names.layers.index(end) + 1 :]:
        if layer.role in ("conv", "bn", "fc"):
            return f"{layer.name} ({layer.path or layer.kind})"
    return "the model's output"


def _check_runs(names: LayerNames, model: nn.Module) -> None:
    """Layers after the place still get what they take, at the size the source runs at."""
    if capture(names.root, names.size, is_known).failure() is not None:
        return
    failure = capture(model, names.size, is_known).failure()
    if failure is None:
        return
    after = layer_names(model)
    name = next((x.name for x in after if x.node.name == failure.name), failure.name)
    fed = failure.all_input_nodes[0].meta.get("value")
    got = f" got {tuple(fed.shape[1:])} per image and" if isinstance(fed, Tensor) else ""
    raise ConversionError(
        f"after surgery {name}{got} fails at input size {names.size}: "
        f"{one_line(failure.meta['error'])}; keep the map's size (padding, stride), or rebuild the "
        "head with fcvgg.for_input_size"
    )


def _log_change(names: LayerNames, model: nn.Module) -> None:
    if not _LOG.isEnabledFor(logging.INFO):
        return
    try:
        (_, before), (_, after) = (map_geometries(m)[-1] for m in (names.root, model))
    except (FcvggError, IndexError) as error:
        _LOG.info("surgery: the geometry of the last map is not known: %s", error)
        return
    _LOG.info("surgery: the last map's geometry was %s, and is %s", before, after)
