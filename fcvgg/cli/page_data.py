"""What the viewer's page is given of a network and of its maps, for ``serve`` and ``page``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fcvgg.cli.console import note, say

if TYPE_CHECKING:
    from fcvgg.network import FullyConvolutional
    from fcvgg.results.score_map import ScoreMap

_LEAST_SIDE = 256
"""Pixels; networks with small windows are for parts of photographs."""

_BUDGET = 64 * 2**20
"""Bytes of packed probabilities in an answer; of a finer map the classes with high peaks."""

_FINER = 3
"""Smaller output strides that the page offers at most."""

_LARGEST_SIDE = 4096


def network_data(net: FullyConvolutional, title: str) -> dict[str, Any]:
    """What the page knows of a network before it has a map.

    Raises:
        FcvggError: if the network has no probabilities or no preprocessing.
    """
    from fcvgg.images.lazy.input import checked_preprocess
    from fcvgg.probability import require_probabilities
    from fcvgg.results.web_page import geometry_data, scale_data

    require_probabilities(net.activation)
    checked_preprocess(net.preprocess, net.in_channels)
    return {
        "title": title,
        "usual_side": usual_side(net),
        **scale_data(net.num_classes, net.activation),
        **geometry_data(net.geometry, layers_of(net)),
    }


def layers_of(net: FullyConvolutional) -> list[tuple[str, int]]:
    """The layers that widen what a cell sees, by name, with their steps in the geometry."""
    records = net.program.records
    return [(r.name, r.step) for r in records if not all(w.is_identity for w in r.windows)]


def usual_side(net: FullyConvolutional) -> int:
    """The smaller side at which a larger image is first shown: two windows, to see its parts."""
    return max(2 * min(net.input_size), _LEAST_SIDE)


class Maps:
    """Computes the page's maps, at every output stride by a network of its own.

    Args:
        load: the network at an output stride, or at its own if None.
        title: of the page.

    Attributes:
        network: what the page knows before an image is opened.
    """

    def __init__(self, load: Callable[[int | None], FullyConvolutional], title: str):
        from fcvgg.conversion import output_strides

        self._load = load
        net = load(None)
        self.network = network_data(net, title)
        own = max(net.geometry.stride)
        self.strides = [own, *[n for n in output_strides(net.program) if n < own][:_FINER]]
        self._networks = {own: faster(net)}

    def answer(self, upload: bytes, side: int | None, stride: int | None) -> dict[str, Any]:
        """The map's data of an image file.

        Raises:
            FcvggError: if it cannot be read or computed.
        """
        from fcvgg.results.web_page import map_data

        net = self._network(stride or self.strides[0])
        score_map, side = self._score_map(net, upload, side)
        found = map_data(score_map, layers=layers_of(net), budget=_BUDGET)
        largest = 2 * usual_side(net)
        return {**found, "side": side, "largest_side": largest, "strides": self.strides}

    def _network(self, stride: int) -> FullyConvolutional:
        from fcvgg.errors import ArgumentError

        if stride not in self.strides:
            raise ArgumentError(
                f"stride must be one of {', '.join(map(str, self.strides))}, got {stride}"
            )
        if stride not in self._networks:
            self._networks[stride] = self._load(stride)
        return self._networks[stride]

    def _score_map(
        self, net: FullyConvolutional, upload: bytes, side: int | None
    ) -> tuple[ScoreMap, int]:
        """The map at a smaller side, or at the usual one if None, and that side."""
        import io

        from fcvgg.errors import ArgumentError
        from fcvgg.images.reading import read_picture

        assert net.preprocess is not None
        picture = read_picture(io.BytesIO(upload), net.preprocess)
        side = side or min(usual_side(net), *picture.size)
        if side > _LARGEST_SIDE:
            raise ArgumentError(f"side must be at most {_LARGEST_SIDE} pixels, got {side}")
        return net.score_map(picture, scale=side), side


def faster(net: FullyConvolutional) -> FullyConvolutional:
    """The optimised network where it is faster at the page's usual size, else the given one."""
    from fcvgg.errors import FcvggError
    from fcvgg.optimization.networks import optimize
    from fcvgg.optimization.timing import time_in_turns

    side = usual_side(net)
    try:
        fast = optimize(net)
        plain, quick = time_in_turns({"plain": net, "optimized": fast}, net, side, repeat=2)
    except FcvggError as error:
        note(f"the network runs as it is: {error}")
        return net
    gains = quick.seconds < plain.seconds
    say(
        f"one map of {side}x{side} pixels: {plain.seconds:.2f} s, optimised "
        f"{quick.seconds:.2f} s; {'the optimised' if gains else 'the plain'} network is used"
    )
    return fast if gains else net
