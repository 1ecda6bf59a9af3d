"""Arguments and options that several commands take, and how their text is read.

An option whose text means something else, such as a size or a list, has a parser, so that a command
gets what it works with; what a parser refuses is a usage error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from fcvgg.cli.completion import complete_arch, complete_model
from fcvgg.errors import ArgumentError
from fcvgg.support.atomic import CSV_ENDINGS, checked_file, checked_folder

if TYPE_CHECKING:
    from fcvgg.images.lazy.source import StripSource
    from fcvgg.images.preprocessing import Preprocess
    from fcvgg.network import FullyConvolutional

# -- the text of options --------------------------------------------------------------------------


def names(text: str) -> list[str]:
    """Names from ``cat, dog``."""
    return [name.strip() for name in text.split(",") if name.strip()]


def lengths(text: str, option: str | None = None) -> list[int]:
    """Numbers of pixels from ``256,384,512``; `option` is named in errors outside a parser."""
    return [_positive(part, option) for part in text.split(",")]


def size(text: str) -> tuple[int, int]:
    """``(h, w)`` from ``512`` or ``480x640``."""
    parts = [_positive(part) for part in text.lower().split("x")]
    if len(parts) > 2:
        raise typer.BadParameter(f"{text!r} is not a size; expected N or HxW, such as 480x640")
    return parts[0], parts[-1]


def side_or_size(text: str) -> int | tuple[int, int]:
    """The smaller side from ``512``, or ``(h, w)`` from ``480x640``."""
    height, width = size(text)
    return (height, width) if "x" in text.lower() else height


def numbers(text: str) -> tuple[float, ...]:
    """Numbers from ``0.485,0.456,0.406``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers; expected such as 0.485,0.456,0.406"
        ) from error


def limits(text: str) -> tuple[float, float]:
    """Two different numbers from ``0,4095``."""
    values = numbers(text)
    if len(values) != 2 or values[0] == values[1]:
        raise typer.BadParameter(f"{text!r} is not two different numbers LOW,HIGH")
    return values[0], values[1]


def channels(text: str) -> list[int]:
    """Channel indices from ``3,2,1``."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of channel indices; expected such as 2,1,0"
        ) from error


def nodata_value(text: str) -> float | str:
    """A number, or ``"file"``."""
    try:
        return text if text == "file" else float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a number nor 'file'") from error


def _positive(text: str, option: str | None = None) -> int:
    if not (text.strip().isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is not a positive integer", param_hint=option)
    return int(text)


def output_name(check: Callable[[Path], Any]) -> Callable[[Path | None], Path | None]:
    """The callback of an option that says where to write: what `check` refuses ends the command.

    It is called before the command, so that nothing is loaded or computed for a name that is wrong.
    """

    def checked(path: Path | None) -> Path | None:
        from fcvgg.cli.console import BAD_INPUT, complain

        try:
            if path is not None:
                check(path)
        except ArgumentError as error:
            complain(error)
            raise typer.Exit(BAD_INPUT) from error
        return path

    return checked


def output_folder(*endings: str) -> Callable[[Path | None], Path | None]:
    """The callback of ``--output`` where it names a folder to write."""
    return output_name(lambda path: checked_folder(path, "--output", endings))


def output_file(*endings: str) -> Callable[[Path | None], Path | None]:
    """The callback of ``--output`` where it names a file to write."""
    return output_name(lambda path: checked_file(path, "--output", endings))


def csv_file(path: Path | None) -> Path | None:
    """The callback of ``--csv``."""
    return output_name(lambda file: checked_file(file, "--csv", CSV_ENDINGS))(path)


# -- options of several commands ------------------------------------------------------------------

MODEL_HELP = (
    "Network: a torchvision name, timm:NAME, a checkpoint (with --arch), an .onnx or Keras file, a "
    "folder written by 'fcvgg convert', hf:USER/NAME, 'demo', or 'demo:imagenet' (extra 'demo')."
)

Images = Annotated[
    list[Path],
    typer.Argument(
        metavar="IMAGE",
        help="Image files, folders of them, or - for standard input.",
        show_default=False,
    ),
]
Recursive = Annotated[
    bool, typer.Option("--recursive", "-r", help="Also take the images of folders in folders.")
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object a line for each image instead of text."),
]
Model = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        "-w",
        metavar="NAME|PATH",
        help="Weights of a torchvision model: their name, such as DEFAULT (downloaded), or a "
        "checkpoint file. 'ema' for the averaged weights of a checkpoint.",
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        autocompletion=complete_arch,
        help="A checkpoint's architecture: a torchvision name, or your own class or function that "
        "makes the model, such as mymodel:MyNet for the class MyNet in mymodel.py.",
        show_default=False,
    ),
]
Csv = Annotated[
    Path | None,
    typer.Option(
        "--csv",
        metavar="FILE",
        dir_okay=False,
        help="Table to write instead of printing, with a header line.",
        callback=csv_file,
        show_default=False,
    ),
]
OutputStride = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Pixels between neighbouring cells: 16, 8, 4, 2 or 1 for VGG. Halving it takes about "
        "four times as long.",
        show_default="the network's own",
    ),
]
MapHead = Annotated[
    Literal["window", "position"] | None,
    typer.Option(
        "--head",
        metavar="KIND",
        help="What a cell is: window, or position, a finer map of networks that end in a global "
        "average pool, such as a ResNet.",
        show_default="window, or the bundle's own",
    ),
]
OutputFolder = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        file_okay=False,
        help="Folder to write to; created if absent.",
        callback=output_folder(),
        show_default="the current folder",
    ),
]
Scales = Annotated[
    Any,
    typer.Option(
        "--scales",
        "-s",
        metavar="N,N,...",
        parser=lengths,
        help="Smaller sides, in pixels, to rescale every image to; probabilities are averaged over "
        "them.",
        show_default="8/7 of the native size: 256 for 224",
    ),
]
Flip = Annotated[bool, typer.Option("--flip", help="Average with the mirrored image.")]
Bands = Annotated[
    Any,
    typer.Option(
        metavar="N,N,...",
        parser=channels,
        help="Channels to read, counted from 0, in the order the model takes them, such as 3,2,1.",
        show_default="all",
    ),
]
Nodata = Annotated[
    Any,
    typer.Option(
        metavar="X|file",
        parser=nodata_value,
        help="Pixel value to leave out of the scores; 'file' takes the value that the file "
        "declares.",
        show_default="none",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="Torch device to compute on: cpu, cuda, cuda:1 or mps.")
]

# -- options of the commands that train -----------------------------------------------------------

training_option = functools.partial(typer.Option, rich_help_panel="Training")
"""An option in the part of a command's help that says how the network is trained."""

RunFolder = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        file_okay=False,
        help="Folder of the run; created if absent.",
        callback=output_folder(),
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Finish the interrupted run in the folder.")]
BatchSize = Annotated[int, training_option(metavar="N", min=1, help="Images per training step.")]
Weighting = Annotated[
    Literal["none", "balanced"],
    training_option(
        "--class-weights",
        help="Weights of the classes in the loss; balanced weighs rare classes as much as frequent "
        "ones.",
    ),
]

# -- models that publish nothing about themselves -------------------------------------------------

_model_option = functools.partial(typer.Option, rich_help_panel="Your own model")

InputSize = Annotated[
    Any,
    _model_option(
        "--input-size",
        metavar="N|HxW",
        parser=size,
        help="Native size: the size of the images that the model was trained on.",
        show_default="the weights' own, or inferred",
    ),
]


@dataclass(frozen=True)
class OwnPreprocess:
    """What a model's user knows of its preprocessing.

    A command whose `run` takes one, or an `OwnModel`, has its fields as options.
    """

    preprocess: Annotated[
        str | None,
        _model_option(
            metavar="NAME",
            help="Preprocessing of the images: imagenet, caffe (BGR minus means), tf (-1 to 1), "
            "unit (0 to 1) or none (values as they are).",
            show_default="the weights' own",
        ),
    ] = None
    mean: Annotated[
        Any,
        _model_option(
            metavar="X,X,X",
            parser=numbers,
            help="Means of the channels, for values from 0 to 1; with --std, instead of "
            "--preprocess.",
            show_default=False,
        ),
    ] = None
    std: Annotated[
        Any,
        _model_option(
            metavar="X,X,X",
            parser=numbers,
            help="Standard deviations of the channels, one for each or one for all; with --mean.",
            show_default=False,
        ),
    ] = None
    value_range: Annotated[
        Any,
        _model_option(
            "--range",
            metavar="LOW,HIGH",
            parser=limits,
            help="Pixel values of black and white in images of more than 8 bits, such as 0,4095.",
            show_default="0 to 65535 for 16 bits",
        ),
    ] = None
    trained_mpp: Annotated[
        float | None,
        _model_option(
            "--trained-mpp",
            metavar="X",
            help="Micrometres per pixel of the images that the model was trained on; kept in "
            "bundles, by which slides are streamed at that level.",
            show_default="unknown",
        ),
    ] = None

    def preprocess_for(self, channels: int, known: Preprocess | None = None) -> Preprocess | None:
        """The preprocessing for a network of some channels; None if none was given.

        Args:
            channels: of the network.
            known: its own preprocessing, which is kept as far as no option says otherwise.

        Raises:
            PreprocessError: if it is for other channels.
        """
        from fcvgg.images.preprocessing import checked_range

        checked_range(self.value_range)
        chosen = self._chosen(channels) or known
        given = {"value_range": self.value_range, "mpp": self.trained_mpp}
        given = {name: value for name, value in given.items() if value is not None}
        return chosen and replace(chosen, **given)

    def _chosen(self, channels: int) -> Preprocess | None:
        from fcvgg.errors import PreprocessError
        from fcvgg.images.preprocessing import Preprocess

        if self.preprocess is not None:
            return Preprocess.preset(self.preprocess, channels)
        if self.mean is None or self.std is None:
            return None
        for option, values in (("--mean", self.mean), ("--std", self.std)):
            if len(values) not in (1, channels):
                raise PreprocessError(
                    f"{option} must be 1 number or {channels}, one for each channel of the "
                    f"network, got {len(values)}"
                )
        mean, std = (values * (channels // len(values)) for values in (self.mean, self.std))
        return Preprocess(mean, std)

    def check(self) -> None:
        """Refuse options that contradict each other, before anything is loaded.

        Raises:
            FcvggError: if they do, or one names nothing.
        """
        if (self.mean is None) != (self.std is None):
            raise ArgumentError("--mean and --std go together; give both")
        if self.mean is not None and self.preprocess is not None:
            raise ArgumentError("--preprocess and --mean exclude each other; give one of the two")
        given = [len(values) for values in (self.mean, self.std) if values is not None]
        self.preprocess_for(max(given, default=3))


@dataclass(frozen=True)
class OwnModel(OwnPreprocess):
    """What a model's user knows of it: also its native size, class names and kind of scores."""

    input_size: InputSize = None
    categories: Annotated[
        Path | None,
        _model_option(
            metavar="FILE",
            help="Class names, in the order of the scores: one per line, or a list in JSON.",
            show_default="the weights' own",
        ),
    ] = None
    activation: Annotated[
        str | None,
        _model_option(
            metavar="KIND",
            help="Kind of the scores: logits (softmax), independent_logits (a sigmoid for each "
            "class), probabilities, log_probabilities, sigmoid (after one) or values (of a "
            "regression, which 'fcvgg heatmap' shows).",
            show_default="read off the model",
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Arguments of `fcvgg.load`.

        Raises:
            FcvggError: if an option cannot be used; before anything is loaded.
        """
        from fcvgg.categories import read_categories

        self.check()
        return {
            "input_size": self.input_size,
            "categories": None if self.categories is None else read_categories(self.categories),
        }


@dataclass(frozen=True)
class NetworkOptions(OwnModel):
    """The network that a command runs on images, and where it runs."""

    model: Model = "vgg16"
    weights: Weights = "DEFAULT"
    arch: Arch = None
    head: MapHead = None
    device: Device = "cpu"

    def load(self, **options: Any) -> FullyConvolutional:
        """The network; `options` and errors are as for `load_network`."""
        names = {"weights": self.weights, "arch": self.arch, **head_option(self.head)}
        return load_network(self.model, self, self.device, **names, **options)


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter of type `OwnPreprocess`, if it has one, is given by options.

    Typer reads a command's signature, so the dataclass's fields stand there in place of it.
    """
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    own = {n: h for n, h in hints.items() if isinstance(h, type) and issubclass(h, OwnPreprocess)}
    if not own:
        return command
    ((place, group),) = own.items()
    kinds = get_type_hints(group, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(f.name, keyword, default=f.default, annotation=kinds[f.name])
        for f in fields(group)
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        kept = parameter.replace(annotation=hints[parameter.name], kind=keyword)
        parameters += added if parameter.name == place else [kept]

    @functools.wraps(command)
    def taking_options(**arguments: Any) -> None:
        given = {option.name: arguments.pop(option.name) for option in added}
        command(**arguments, **{place: group(**given)})

    taking_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore
    taking_options.__annotations__ = {p.name: p.annotation for p in parameters}
    return taking_options


# -- networks and images --------------------------------------------------------------------------


def head_option(head: str | None) -> dict[str, str]:
    """The option of `fcvgg.load`; a bundle has its own where none is given."""
    return {} if head is None else {"head": head}


def load_network(
    model: str, own: OwnModel | None = None, device: str = "cpu", **options: Any
) -> FullyConvolutional:
    """The network that `fcvgg.load` gives, on a device.

    Raises:
        FcvggError: if it cannot be had; what an option says wrongly is found before the model is
            looked for.
    """
    from fcvgg.loading import load
    from fcvgg.probability import checked_activation
    from fcvgg.verification import check_activation

    own = own or OwnModel()
    place = checked_device(device)
    settings = own.settings()
    activation = None if own.activation is None else checked_activation(own.activation)
    if ":" in (options.get("arch") or ""):
        options["arch"] = imported(options["arch"])
    with contextlib.redirect_stdout(sys.stderr):  # torch.hub announces downloads on stdout
        net = load(model, **options, **settings)
    net.preprocess = own.preprocess_for(net.in_channels, net.preprocess)
    if activation is not None:  # also of a bundle, whose graph stays as it is
        net.activation = activation
        check_activation(net)
    return net.to(place)


def imported(name: str) -> Any:
    """What ``package.module:attribute`` names, in the current folder or installed.

    Raises:
        ArgumentError: if it cannot be imported.
    """
    from fcvgg.errors import one_line

    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m has it
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except Exception as error:  # the user's module may raise anything
        raise ArgumentError(
            f"--arch must be a torchvision name or package.module:callable, got {name!r}, which "
            f"cannot be imported ({type(error).__name__}: {one_line(error)})"
        ) from error


_PREFIXED = ("timm:", "hf:", "demo:")


def own_classifier(arch: str, weights: str, scratch: bool) -> Any:
    """The classifier of ``package.module:callable``, with a file's parameters; other names as is.

    Args:
        arch: as ``--arch`` gives it.
        weights: as ``--weights`` gives it.
        scratch: whether random weights are wanted.

    Raises:
        FcvggError: if there is no such callable, or the file cannot be read or does not fit.
    """
    from fcvgg.loading import DEFAULT_WEIGHTS, made_by, read_source

    if ":" not in arch or arch.startswith(_PREFIXED) or os.path.exists(arch):
        return arch
    make = imported(arch)
    if weights != DEFAULT_WEIGHTS:
        return read_source(weights, make)[0]
    if not scratch:
        raise ArgumentError(
            f"--weights must be a checkpoint of --arch {arch}, got none; pass its path, or "
            "--strategy scratch for random weights"
        )
    return made_by(make, {})


def checked_device(name: str) -> Any:
    """The torch device of a name.

    Raises:
        ArgumentError: if this machine has no such device.
    """
    import torch

    from fcvgg.errors import one_line

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a name that torch knows may have no device here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(
            f"--device must be cpu, or a torch device that this machine has, such as cuda or mps, "
            f"got {name!r} ({one_line(error)})"
        ) from error
    return device


class ImageOpener:
    """Opens the images of a command, and notes once that a declared nodata value is not used.

    Args:
        bands: as ``--bands`` gives them.
        nodata: as ``--nodata`` gives it.
    """

    def __init__(self, bands: list[int] | None, nodata: float | str | None):
        self._bands, self._nodata = bands, nodata
        self._noted = False

    def open(self, image: Path, level: int = 0, mpp: float | None = None) -> StripSource:
        """An image at a level of its pyramid, by its number or pixel size.

        Raises:
            ImageError: if it cannot be opened.
        """
        from fcvgg.cli.console import STDIN, note
        from fcvgg.images.lazy.opening import open_image

        given = io.BytesIO(sys.stdin.buffer.read()) if image == STDIN else image
        source = open_image(given, level, mpp=mpp, bands=self._bands, nodata=self._nodata)
        declared = source.nodata
        # NaN enters no score, whether it is declared or not
        unused = self._nodata is None and declared is not None and declared == declared
        if unused and not self._noted:
            self._noted = True
            note(
                f"{image} declares nodata {declared:g}, which is read as pixel values; "
                "--nodata file leaves it out"
            )
        return source
