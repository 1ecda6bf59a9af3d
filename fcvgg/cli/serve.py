"""``fcvgg serve``: a local page on which a network's maps are explored."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fcvgg.cli.console import note, say
from fcvgg.cli.options import (
    MODEL_HELP,
    Arch,
    Device,
    MapHead,
    OwnModel,
    Weights,
    head_option,
    load_network,
)
from fcvgg.cli.page import layers_of, network_data, usual_side

if TYPE_CHECKING:
    from fcvgg.network import FullyConvolutional
    from fcvgg.results.score_map import ScoreMap

NAME = "serve"
EXAMPLES = (
    "fcvgg serve demo",
    "fcvgg serve vgg16 --port 9000",
    "fcvgg serve flowers-fcn --no-open",
)

_BUDGET = 64 * 2**20
"""Bytes of packed probabilities in an answer; of a finer map the classes with high peaks."""

_FINER = 3
"""Halvings of the output stride that the page offers."""

_LARGEST_SIDE = 4096

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
HostName = Annotated[
    str,
    typer.Option(
        "--host",
        metavar="ADDRESS",
        help="Address to listen on. Any other than the loopback lets other machines upload images.",
    ),
]
Port = Annotated[
    int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
]
Limit = Annotated[
    float, typer.Option(metavar="MB", min=0.001, help="Largest image file that may be uploaded.")
]
Opened = Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")]


def run(
    model: Model,
    host: HostName = "127.0.0.1",
    port: Port = 8417,
    limit: Limit = 50,
    open_browser: Opened = True,
    weights: Weights = "DEFAULT",
    arch: Arch = None,
    head: MapHead = None,
    device: Device = "cpu",
    own: OwnModel = OwnModel(),
) -> None:
    """Serve a page to explore any image's map; Ctrl-C ends it."""
    from fcvgg.viewer.server import application, listening_socket, run_server

    listener = listening_socket(host, port)
    names: dict[str, Any] = {"weights": weights, "arch": arch, **head_option(head)}

    def load(stride: int | None = None) -> FullyConvolutional:
        return load_network(model, own, device, output_stride=stride, **names)

    title = f"fcvgg: {Path(model).name}"
    maps = Maps(load)
    network = network_data(maps.net, title)
    served = application(network, maps.answer, title, host, int(limit * 2**20))
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}/"
    say(f"serving {model} at {url} until Ctrl-C")
    if open_browser:
        webbrowser.open(url)
    try:
        run_server(served, listener)
    except KeyboardInterrupt:
        say("ended")
    finally:
        listener.close()


class Maps:
    """Computes the page's maps, at every output stride by a network of its own.

    Args:
        load: the network at an output stride, or at its own if None.
    """

    def __init__(self, load: Callable[[int | None], FullyConvolutional]):
        self._load = load
        self.net = load(None)
        self.stride = max(self.net.geometry.stride)
        self._fast = {self.stride: faster(self.net)}
        self.strides = self._offered()

    def _offered(self) -> list[int]:
        """The output strides that the model has: the network's own, and halves of it if any."""
        from fcvgg.errors import FcvggError

        half = self.stride // 2
        if self.stride % 2:
            return [self.stride]
        try:
            self._fast[half] = self._load(half)
        except FcvggError:  # a model whose strides cannot be replaced by dilation
            return [self.stride]
        return [self.stride >> i for i in range(_FINER + 1) if self.stride % (1 << i) == 0]

    def answer(self, upload: bytes, side: int | None, stride: int | None) -> dict[str, Any]:
        """The map's data of an image file.

        Raises:
            FcvggError: if it cannot be read or computed.
        """
        from fcvgg.results.web_page import map_data

        net = self._network(stride or self.stride)
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
        if stride not in self._fast:
            self._fast[stride] = self._load(stride)
        return self._fast[stride]

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
