"""A score map as a page to explore: one HTML file, and the data that every page starts with."""

from __future__ import annotations

import base64
import html
import io
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcvgg.categories import class_index, class_name
from fcvgg.errors import ArgumentError
from fcvgg.geometry import Axis, Geometry, KernelGeometry
from fcvgg.probability import chance_level
from fcvgg.results.colours import HELD, colour_table, opacity_table, probability_ticks
from fcvgg.results.drawing import resized
from fcvgg.viewer.document import document

if TYPE_CHECKING:
    from fcvgg.results.score_map import ScoreMap

BUDGET = 600_000
"""Bytes that the packed probabilities of a file may take: with the image it stays below 1 MB."""

_LARGEST = 1024
"""Longer side of the image in a page, in pixels; the map keeps the image's own coordinates."""

_QUALITY = 85
"""Of the image as a JPEG file."""

_FLOORS = 0.1, 0.001
"""Smaller probabilities are written as 0: those below a tenth of chance and 0.001 both."""

_STEPS = 16382
"""Steps of a probability's logarithm: 6e-4 of its value at 1000 classes."""

_LEAST_BYTES = 0.25
"""Bytes that a packed probability takes at least, to begin with a number of classes near the one
that fits."""

Layers = Sequence[tuple[str, int]]
"""Layers to show, each with its number among the steps of a geometry."""


def page_of(score_map: ScoreMap, classes: Iterable[int | str] | None, layers: Layers = ()) -> str:
    """A score map as one HTML document that needs no other file.

    Args:
        score_map: what is shown.
        classes: indices or names; as many of the most probable as fit the size of a file when None.
        layers: the layers whose receptive fields are shown; all of the geometry's when empty.
    """
    return document("file", map_data(score_map, classes, layers), "fcvgg score map")


class Page:
    """A page in a notebook."""

    def __init__(self, text: str, height: int):
        self.text, self.height = text, height

    def _repr_html_(self) -> str:
        """A frame with the page in it, so that neither changes the other's look."""
        return (
            f'<iframe srcdoc="{html.escape(self.text)}" title="fcvgg score map" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )


# -- data -----------------------------------------------------------------------------------------


def map_data(
    score_map: ScoreMap,
    classes: Iterable[int | str] | None = None,
    layers: Layers = (),
    budget: int = BUDGET,
) -> dict[str, Any]:
    """What the page shows of a score map, as plain data; the arguments are those of `page_of`.

    Args:
        budget: bytes that the packed probabilities may take; of more classes than fit, those with
            the highest peaks are taken.

    Raises:
        ArgumentError: if the scores have no probabilities, or the cells of one class do not fit.
        CategoryError: if there is no such class.
        ImageError: if no cell has data.
    """
    score_map.require_data()
    probabilities = score_map.probabilities().float().cpu().numpy()  # (K, h, w)
    averages = score_map.predict().double().cpu().numpy()  # (K,)
    names, count = score_map.categories, len(averages)
    common = scale_data(count, score_map.activation)
    if classes is None:
        chosen, packed = _fitting(probabilities, common["chance"], budget)
    else:
        chosen = [class_index(given, names, count) for given in classes]
        packed = _packed(probabilities[chosen], common["chance"])
        if not chosen or len(packed["codes"]) > budget:
            raise ArgumentError(
                f"classes must be one or more whose probabilities fit {budget:,} bytes, got "
                f"{len(chosen)} of {probabilities[0].size:,} cells; choose fewer classes"
            )
    return {
        **common,
        **geometry_data(score_map.geometry, layers),
        "title": "fcvgg score map",
        "image": None if score_map.image is None else _encoded(score_map.image),
        "image_size": score_map.image_size,
        "input_size": score_map.input_size,
        "cells": probabilities.shape[1:],
        "classes": chosen,
        "names": [class_name(i, names) for i in chosen],
        "averages": averages[chosen].tolist(),
        "total": count,
        "packed": packed,
    }


def scale_data(classes: int, activation: str) -> dict[str, Any]:
    """The colours of probabilities for a number of classes, as plain data."""
    chance = chance_level(classes, activation)
    colours = np.concatenate([colour_table(), opacity_table()[:, None]], 1)  # (256, 4)
    return {
        "chance": chance,
        "ticks": probability_ticks(chance),
        "colours": _text(np.round(colours * 255).astype(np.uint8).tobytes()),
        "held": HELD,
    }


def geometry_data(geometry: Geometry, layers: Layers = ()) -> dict[str, Any]:
    """Where cells and the units of inner layers lie, as plain data."""
    shown = layers or [
        (_kernel_name([axis.steps[i].window for axis in geometry.axes]), i)
        for i in range(len(geometry.height.steps))
        if not all(axis.steps[i].window.is_identity for axis in geometry.axes)
    ]
    return {
        "axes": [_axis_data(axis) for axis in geometry.axes],
        "layers": [
            {"name": name, "axes": [_unit_data(axis, step) for axis in geometry.axes]}
            for name, step in shown
        ],
    }


def _axis_data(axis: Axis) -> dict[str, int]:
    return {
        "window": axis.window,
        "stride": axis.stride,
        "offset": axis.offset,
        "field": axis.receptive_field,
        "start": axis.window_of(0)[0],
        "crop": axis.crop,
    }


def _unit_data(axis: Axis, step: int) -> tuple[int, int, int]:
    """Stride, first pixel of unit 0 and receptive field of an inner layer."""
    inner = axis.upto(step)
    return inner.stride, axis.origin + inner.offset, inner.receptive_field


def _kernel_name(kernels: Sequence[KernelGeometry]) -> str:
    height, width = kernels
    stride = f", stride {height.stride}" if height.stride > 1 else ""
    return f"kernel {height.kernel}x{width.kernel}{stride}"


def _fitting(
    probabilities: NDArray[np.float32], chance: float, budget: int
) -> tuple[list[int], dict[str, Any]]:
    """The classes with the highest peaks, as many as fit, in their own order, and their codes."""
    peaks = np.nan_to_num(probabilities, nan=0).max((1, 2))
    order = np.argsort(-peaks, kind="stable")
    count = min(len(order), max(int(budget / _LEAST_BYTES / probabilities[0].size), 1))
    while True:
        chosen = sorted(order[:count].tolist())
        packed = _packed(probabilities[chosen], chance)
        size = len(packed["codes"])
        if size <= budget:
            return chosen, packed
        if count == 1:
            raise ArgumentError(
                f"the score map must have cells that fit {budget:,} bytes for one class, got "
                f"{probabilities[0].size:,}; use a larger stride or a smaller image"
            )
        count = max(min(int(count * budget / size * 0.95), count - 1), 1)


def _packed(probabilities: NDArray[np.float32], chance: float) -> dict[str, Any]:
    """Probabilities as codes of 16 bits: equal steps of their logarithm, down to `span` below 1.

    0 says that there is no data, 1 that it is below. High bytes come before all low bytes, which
    packs better.
    """
    span = -float(np.log(min(_FLOORS[0] * chance, _FLOORS[1])))
    with np.errstate(divide="ignore"):
        share = 1 + np.log(probabilities) / span
    codes = 1 + np.round(np.nan_to_num(share.clip(0, 1)) * _STEPS)
    codes = np.where(np.isnan(probabilities), 0, codes).astype(np.uint16).reshape(-1)
    halves = np.stack([codes >> 8, codes & 255]).astype(np.uint8)  # (2, n)
    return {"codes": _text(zlib.compress(halves.tobytes())), "span": span}


def _encoded(image: Image.Image) -> str:
    """The image as the URL of a JPEG file, reduced where it is large; transparency on white."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    factor = min(_LARGEST / max(image.size), 1)
    size = (max(round(image.height * factor), 1), max(round(image.width * factor), 1))
    file = io.BytesIO()
    resized(image, size).convert("RGB").save(file, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{_text(file.getvalue())}"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
