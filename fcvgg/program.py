"""A rewritten model as data: the graph that runs, and what is known of its layers."""

from __future__ import annotations

from dataclasses import dataclass

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
class Program:
    """A rewritten model: what `fcvgg.network.FullyConvolutional` runs and knows of itself."""

    network: fx.GraphModule
    geometry: Geometry
    activations: tuple[str, ...]
    classes: tuple[int, ...]
    in_channels: int
    records: tuple[LayerRecord, ...]
    aliases: frozenset[str]
