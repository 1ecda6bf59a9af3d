"""The state of an architecture in a checkpoint: in which entry it lies, under which prefix.

A checkpoint holds states among other things (optimizers, metrics, averaged weights), and wrappers
put prefixes before their keys. A place fits where every tensor of the architecture is found in its
shape; one place is taken, and where several fit with other values, the user says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fcvgg.errors import LoadError

DEFAULT = "DEFAULT"
AVERAGED = "ema"
"""Asks for averaged weights, whatever the file calls them."""

_DEPTH = 8
"""How many entries are opened one within the other; a dictionary may hold itself."""

_MOST_ENTRIES = 1000
_LISTED = 4

_OTHER_ENTRIES = re.compile(r"optim|sched|scaler|loops")
"""Names of entries that hold tensors by name which are not those of a model."""

_AVERAGED = re.compile(r"(?:^|[/._])(?:ema|swa|averag)|_(?:ema|swa)(?:$|[/._])", re.I)
_LIGHTNING_PLAIN = "current_model_state"
"""What Lightning's weight averaging calls the weights in training; ``state_dict`` has the mean."""

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)

_FOREIGN = re.compile(
    r"(?:.*[._])?(?:total_ops|total_params|n_averaged|pos_weight|confmat|tp|fp|tn|fn)"
    r"|(?:.*[._])?(?:criterion|loss|loss_fn|metrics?|acc|accuracy|auroc|f1|precision|recall)\d*\..*"
)
"""Keys of losses, metrics and counters, which lie at a model's own level."""


@dataclass(frozen=True)
class Place:
    """Where a state lies.

    Attributes:
        entry: the names of the entries around it, joined by ``/``.
        prefix: before its keys.
        state: the tensors by their names without the prefix.
        averaged: whether the file says that they are the means of several steps.
    """

    entry: str
    prefix: str
    state: Mapping[str, Tensor]
    averaged: bool

    def __str__(self) -> str:
        return "/".join(part for part in (self.entry, self.prefix.rstrip(".")) if part)

    def described(self) -> str:
        """For a report; empty for a file that is the state."""
        prefix = f"prefix {self.prefix!r}" if self.prefix else ""
        return ", ".join(part for part in (self.entry, prefix) if part)


def entries_of(content: Any) -> dict[str, dict[str, Tensor]]:
    """Every dictionary of a checkpoint that holds tensors by name, by the entries around it.

    Of what Lightning's callbacks keep, only averages count; the rest describes the training.
    """
    entries = dict(_walked(content, "", 0, set(), [0]))
    return {
        name: tensors
        for name, tensors in entries.items()
        if not name.startswith("callbacks/") or _AVERAGED.search(name)
    }


def _walked(
    content: Any, name: str, depth: int, within: set[int], seen: list[int]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    seen[0] += 1
    if not isinstance(content, Mapping) or depth > _DEPTH or seen[0] > _MOST_ENTRIES:
        return
    if id(content) in within:
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield name, tensors
    for key, value in content.items():
        if isinstance(key, str) and not _OTHER_ENTRIES.match(key):
            inner = f"{name}/{key}" if name else key
            yield from _walked(value, inner, depth + 1, within | {id(content)}, seen)


def find_state(
    entries: Mapping[str, Mapping[str, Tensor]],
    own: Mapping[str, Tensor],
    head: str,
    choice: str,
    origin: str,
) -> Place:
    """The place that fits an architecture, or the nearest one, for whoever says what is wrong.

    Args:
        entries: the checkpoint's, as `entries_of` gives them.
        own: the architecture's tensors, which may be without values.
        head: its last layer, of which any number of classes fits.
        choice: ``"DEFAULT"``, ``"ema"`` for averaged weights, or a place as errors list them.
        origin: the file's name.

    Raises:
        LoadError: if several places fit, or none that was asked for.
    """
    places = [place for entry in entries for place in _places(entries, entry, own)]
    fit = [place for place in places if _fits(place.state, own, head)]
    asked = choice != DEFAULT
    if not fit and not asked:
        return max(places, key=lambda place: len(own.keys() & place.state.keys()))
    if choice == AVERAGED:
        chosen = [place for place in fit if place.averaged]
    elif asked:
        chosen = [place for place in fit if str(place) == choice.rstrip(".")]
    else:
        chosen = [place for place in fit if not place.averaged] or fit
    chosen = [p for i, p in enumerate(chosen) if not any(_equal(p, q) for q in chosen[:i])]
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(repr(str(place) or DEFAULT) for place in (chosen or fit)) or "none that fits"
    if chosen:
        raise LoadError(
            f"{origin} must hold one state that fits, got {len(chosen)} with other values: "
            f"{listed}; choose one by weights=NAME (--weights NAME)"
        )
    what = "averaged weights" if choice == AVERAGED else f"the state {choice!r}"
    raise LoadError(f"{origin} must hold {what} for weights={choice!r}, got {listed}")


def _places(
    entries: Mapping[str, Mapping[str, Tensor]], entry: str, own: Mapping[str, Tensor]
) -> Iterator[Place]:
    """The prefixes in an entry under which most of an architecture's names are found."""
    tensors = entries[entry]
    names: dict[str, set[str]] = {"": set()}
    for key in tensors:
        for start in (0, *(found.end() for found in re.finditer(r"\.", key))):
            if _plain(key[start:]) in own:
                names.setdefault(key[:start], set()).add(_plain(key[start:]))
    most = max(map(len, names.values()))
    # the longest first, so that a wrapper's prefix is named and not only passed over
    for prefix in sorted((p for p in names if len(names[p]) == most), key=len, reverse=True):
        under = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        exact = {name: tensor for name, tensor in under.items() if name in own}
        state = {**{_plain(name): tensor for name, tensor in under.items()}, **exact}
        # what lies at the model's own level is part of it, unless losses and metrics are known so
        state = {k: v for k, v in state.items() if k in own or not _FOREIGN.fullmatch(k)}
        averaged = _AVERAGED.search(f"{entry}/{prefix}") is not None
        averaged |= f"{prefix.removesuffix('module.')}n_averaged" in tensors
        averaged |= entry == "state_dict" and _LIGHTNING_PLAIN in entries
        yield Place(entry, prefix, state, averaged)


def _plain(name: str) -> str:
    """A name without the wrappers of parts that were compiled or distributed."""
    return _WRAPPERS.sub("", name)


def _fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor], head: str) -> bool:
    """Whether a state holds a model's tensors and nothing else, in its shapes."""
    needed = {name for name in own if not name.endswith("batches_tracked")}
    if not needed <= state.keys() <= own.keys():
        return False
    for name in needed:
        shape, wanted = as_linear(state[name], own[name]).shape, own[name].shape
        free = int(name.rpartition(".")[0] == head)  # the classes
        if len(shape) != len(wanted) or shape[free:] != wanted[free:]:
            return False
    return True


def as_linear(tensor: Tensor, own: Tensor | None) -> Tensor:
    """A convolution's weight as the fully connected one that it was, if that is what fits."""
    fits = own is not None and own.ndim == 2 and tensor.ndim == 4
    return tensor.flatten(1) if fits else tensor


def _equal(one: Place, other: Place) -> bool:
    return one.state.keys() == other.state.keys() and all(
        tensor is other.state[name]
        or (tensor.shape == other.state[name].shape and torch.equal(tensor, other.state[name]))
        for name, tensor in one.state.items()
    )


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
