"""``fcvgg serve``: a local page on which a network's maps are explored."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fcvgg.cli.completion import complete_model
from fcvgg.cli.console import say
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
from fcvgg.cli.page_data import Maps

if TYPE_CHECKING:
    from fcvgg.network import FullyConvolutional

NAME = "serve"
EXAMPLES = (
    "fcvgg serve demo",
    "fcvgg serve vgg16 --port 9000",
    "fcvgg serve flowers-fcn --no-open",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model, show_default=False
    ),
]
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

    say(f"loading {model}")
    title = f"fcvgg: {Path(model).name}"
    maps = Maps(load, title)
    served = application(maps.network, maps.answer, title, host, int(limit * 2**20))
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
