"""A rewritten model as data: the graph that runs, and what is known of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from fcvgg.geometry import Geometry, Window

Windows = tuple[Window, Window]
"""A layer along the height and along the width."""


@dataclass(frozen=True)
class LayerRecord:
    """What one layer of the converted network is; `step` is its place in the geometry."""

    name: str
    kind: str
    windows: Windows
    step: int
    channels: int
    parameters: int
    multiply_adds_per_position: int


@dataclass(frozen=True)
class TrainingMode:
    """What ``train()`` of the source does beyond setting one mode for all of its modules.

    Attributes:
        still: the modules that the source's ``train()`` leaves in evaluation mode, by name.
        lively: the modules that its ``eval()`` leaves in training mode.
        frozen: the parameters that its ``train()`` takes the gradient from.
        unfollowed: the modules that compute something in training mode that the graph does not
            hold; the network cannot be trained.
    """

    still: frozenset[str] = frozenset()
    lively: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    unfollowed: tuple[str, ...] = ()


def listed(places: Sequence[str], root: str = "", most: int = 3) -> str:
    """Names of modules for a message, the root's in place of an empty one."""
    names = ", ".join(name or root or "the model" for name in places[:most])
    return names + (f" and {len(places) - most} more" if len(places) > most else "")


@dataclass(frozen=True)
class Program:
    """A rewritten model: what `fcvgg.network.FullyConvolutional` runs and knows of itself."""

    network: fx.GraphModule
    geometry: Geometry
    activations: tuple[str, ...]
    classes: tuple[int, ...]
    in_channels: int
    records: tuple[LayerRecord, ...]
    aliases: frozenset[str]
    training_mode: TrainingMode = field(default=TrainingMode())
