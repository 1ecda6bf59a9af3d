"""Arguments and options that several commands take, and how their text is read."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fcvgg.network import FullyConvolutional

MODEL_HELP = (
    "A torchvision name, timm:NAME, a checkpoint (with --arch), an .onnx or Keras file, a folder "
    "that 'fcvgg convert' wrote, or 'demo'."
)

Images = Annotated[
    list[Path], typer.Argument(metavar="IMAGE", help="Image files.", show_default=False)
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help=MODEL_HELP,
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        "-w",
        metavar="NAME|PATH",
        help="Weights for a torchvision name: DEFAULT or another of torchvision's, which are "
        "downloaded, or a checkpoint.",
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="NAME",
        help="The torchvision name of a checkpoint's architecture.",
        show_default=False,
    ),
]
OutputStride = Annotated[
    int | None,
    typer.Option(
        "--output-stride",
        metavar="N",
        min=1,
        help="Pixels between cells, a power of two below the net's own; finer is slower.",
        show_default=False,
    ),
]
OutputFolder = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        file_okay=False,
        help="The folder to write to; made if absent.",
        show_default="the current folder",
    ),
]


def loaded(model: str, **options: Any) -> FullyConvolutional:
    """The network that `fcvgg.load` gives.

    Raises:
        LoadError: in which keyword arguments are named as the command line's options.
    """
    from fcvgg.errors import LoadError
    from fcvgg.loading import load

    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub announces downloads on stdout
            return load(model, **options)
    except LoadError as error:
        raise LoadError(_with_option_names(str(error))) from error


def lengths(text: str | None, option: str) -> list[int] | None:
    """Positive numbers of pixels, from ``256,384,512``."""
    return None if text is None else [_length(part, option) for part in text.split(",")]


def size(text: str | None, option: str) -> tuple[int, int] | None:
    """``(h, w)`` from ``512`` or ``480x640``."""
    if text is None:
        return None
    parts = [_length(part, option) for part in text.lower().split("x")]
    if len(parts) > 2:
        raise typer.BadParameter(
            f"{text!r} is no size; expected N or HxW such as 480x640", param_hint=option
        )
    return parts[0], parts[-1]


def _with_option_names(message: str) -> str:
    """A message of the library, ``arch='vgg16'`` in it become ``--arch 'vgg16'``."""
    message = re.sub(r"\b(arch|weights)=(?=')", r"--\1 ", message)
    return re.sub(r"\barch=", "--arch", message)


def _length(text: str, option: str) -> int:
    if not (text.strip().isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is no positive number of pixels", param_hint=option)
    return int(text)
