"""Arguments and options that several commands take, and how their text is read."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from fcvgg.errors import ArgumentError
from fcvgg.support.atomic import checked_file, checked_folder

if TYPE_CHECKING:
    from fcvgg.images.lazy.source import StripSource
    from fcvgg.images.preprocessing import Preprocess
    from fcvgg.network import FullyConvolutional


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
        help="Pixels between cells, fewer than the network's own: for VGG 16, 8, 4, 2 or 1. Half "
        "as many take about four times as long.",
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
        callback=output_folder(),
        show_default="the current folder",
    ),
]


_PANEL = "Own models"
"""The part of a command's help for models that publish nothing about themselves."""

InputSize = Annotated[
    str | None,
    typer.Option(
        "--input-size",
        metavar="N|HxW",
        help="The native size: that of the images the model was trained on.",
        show_default="the weights' own, or inferred",
        rich_help_panel=_PANEL,
    ),
]
Bands = Annotated[
    str | None,
    typer.Option(
        "--bands",
        metavar="NUMBERS",
        help="The channels to take, counted from 0 and in the model's order, such as 3,2,1.",
        show_default="all",
    ),
]
Nodata = Annotated[
    str | None,
    typer.Option(
        "--nodata",
        metavar="NUMBER|file",
        help="Pixels of this value are left out of the scores; 'file' takes the value that the "
        "file declares.",
        show_default="none",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, mps, as in torch."
    ),
]


@dataclass(frozen=True)
class OwnPreprocess:
    """What a model's user knows of its preprocessing.

    A command whose `run` takes one, or an `OwnModel`, has its fields as options.
    """

    preprocess: Annotated[
        str | None,
        typer.Option(
            "--preprocess",
            metavar="NAME",
            help="How its images were prepared: imagenet, caffe (BGR minus means), tf (-1 to 1), "
            "unit (0 to 1) or none (as the values are).",
            show_default="the weights' own",
            rich_help_panel=_PANEL,
        ),
    ] = None
    mean: Annotated[
        str | None,
        typer.Option(
            "--mean",
            metavar="X,X,X",
            help="Means of the channels, of values from 0 to 1; with --std, for --preprocess.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    std: Annotated[
        str | None,
        typer.Option(
            "--std",
            metavar="X,X,X",
            help="Standard deviations of the channels, one for each or one for all; with --mean.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None

    value_range: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="LOW,HIGH",
            help="The values of images of more than 8 bits that count as black and white, such as "
            "0,4095 for 12 bits.",
            show_default="0 to 65535 for 16 bits",
            rich_help_panel=_PANEL,
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
        chosen = self._chosen(channels) or known
        if chosen is None or self.value_range is None:
            return chosen
        return replace(chosen, value_range=self._range())

    def _range(self) -> tuple[float, float] | None:
        from fcvgg.errors import ArgumentError

        if self.value_range is None:
            return None
        numbers = _numbers(self.value_range, "--range")
        if len(numbers) != 2 or numbers[0] == numbers[1]:
            raise ArgumentError(
                f"--range must be two different numbers LOW,HIGH, got {self.value_range!r}"
            )
        return numbers[0], numbers[1]

    def _chosen(self, channels: int) -> Preprocess | None:
        from fcvgg.errors import PreprocessError
        from fcvgg.images.preprocessing import Preprocess

        if self.preprocess is not None:
            return Preprocess.preset(self.preprocess, channels)
        if self.mean is None or self.std is None:
            return None
        mean, std = _numbers(self.mean, "--mean"), _numbers(self.std, "--std")
        for option, values in (("--mean", mean), ("--std", std)):
            if len(values) not in (1, channels):
                raise PreprocessError(
                    f"{option} has {len(values)} numbers and the network takes {channels} "
                    "channel(s); give one for each, or one for all"
                )
        return Preprocess(mean * (channels // len(mean)), std * (channels // len(std)))

    def check(self) -> None:
        """Refuse what cannot be used, before anything is loaded.

        Raises:
            FcvggError: if the options contradict each other, or are none.
        """
        from fcvgg.errors import ArgumentError

        if (self.mean is None) != (self.std is None):
            raise ArgumentError("--mean and --std go together; give both")
        if self.mean is not None and self.preprocess is not None:
            raise ArgumentError("--preprocess and --mean say the same; give one of the two")
        texts = (("--mean", self.mean), ("--std", self.std))
        self._range()
        given = [len(_numbers(text, option)) for option, text in texts if text is not None]
        self.preprocess_for(max(given, default=3))


@dataclass(frozen=True)
class OwnModel(OwnPreprocess):
    """What a model's user knows of it: also its native size, class names and kind of scores."""

    input_size: InputSize = None
    categories: Annotated[
        Path | None,
        typer.Option(
            "--categories",
            metavar="FILE",
            help="The class names: one per line in the order of the scores, or a list in JSON.",
            show_default="the weights' own",
            rich_help_panel=_PANEL,
        ),
    ] = None
    activation: Annotated[
        str | None,
        typer.Option(
            "--activation",
            metavar="KIND",
            help="What the scores are: logits (softmax), independent_logits (a sigmoid for each "
            "class), probabilities, log_probabilities, sigmoid (after one) or values (regression, "
            "for 'fcvgg convert' and 'fcvgg stream' only).",
            show_default="read off the model",
            rich_help_panel=_PANEL,
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
            "input_size": size(self.input_size, "--input-size"),
            "categories": None if self.categories is None else read_categories(self.categories),
        }


def with_own_model(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter of type `OwnPreprocess`, if it has one, is given by options."""
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    own = {n: h for n, h in hints.items() if isinstance(h, type) and issubclass(h, OwnPreprocess)}
    if not own:
        return command
    place, group = next(iter(own.items()))
    kinds = get_type_hints(group, include_extras=True)
    options = {f.name: f for f in fields(group)}

    @functools.wraps(command)
    def taking_options(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in options}
        command(**arguments, **{place: group(**given)})

    keyword = inspect.Parameter.KEYWORD_ONLY
    kept = [
        p.replace(annotation=hints[p.name], kind=keyword)
        for p in signature.parameters.values()
        if p.name != place
    ]
    added = [
        inspect.Parameter(name, keyword, default=f.default, annotation=kinds[name])
        for name, f in options.items()
    ]
    taking_options.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore
    taking_options.__annotations__ = {p.name: p.annotation for p in [*kept, *added]}
    return taking_options


def loaded(
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
    with contextlib.redirect_stdout(sys.stderr):  # torch.hub announces downloads on stdout
        net = load(model, **options, **settings)
    net.preprocess = own.preprocess_for(net.in_channels, net.preprocess)
    if activation is not None:  # also of a bundle, whose graph stays as it is
        net.activation = activation
        check_activation(net)
    return net.to(place)


def checked_device(name: str) -> Any:
    """The torch device of a name.

    Raises:
        ArgumentError: if this machine has no such device.
    """
    import torch

    from fcvgg.errors import ArgumentError, one_line

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(
            f"--device {name!r} cannot be used here ({one_line(error)}); expected cpu, or a device "
            "of torch's that this machine has, such as cuda or mps"
        ) from error
    return device


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


def _length(text: str, option: str) -> int:
    if not (text.strip().isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is no positive number of pixels", param_hint=option)
    return int(text)


def band_numbers(text: str | None) -> list[int] | None:
    """The channels that ``--bands`` names, from ``3,2,1``.

    Raises:
        ArgumentError: if they are no numbers.
    """
    from fcvgg.errors import ArgumentError

    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ArgumentError(
            f"--bands {text!r} is no list; expected numbers with commas between them, such as 2,1,0"
        ) from error


def nodata_value(text: str | None) -> float | str | None:
    """The value that ``--nodata`` names, or ``"file"``.

    Raises:
        ArgumentError: if it is neither.
    """
    if text in (None, "file"):
        return text
    try:
        return float(text)  # type: ignore[arg-type]
    except ValueError as error:
        raise ArgumentError(f"--nodata must be a number or 'file', got {text!r}") from error


class ImageOpener:
    """Opens the images of a command, and notes once that a declared nodata value is not used.

    Args:
        bands: as given to ``--bands``.
        nodata: as given to ``--nodata``.

    Raises:
        ArgumentError: if one of them cannot be read.
    """

    def __init__(self, bands: str | None, nodata: str | None):
        self._bands, self._nodata = band_numbers(bands), nodata_value(nodata)
        self._noted = False

    def open(self, image: Path, level: int = 0) -> StripSource:
        """An image at a level of its pyramid.

        Raises:
            ImageError: if it cannot be opened.
        """
        from fcvgg.cli.console import tell
        from fcvgg.images.lazy.opening import open_image

        source = open_image(image, level, bands=self._bands, nodata=self._nodata)
        declared = source.nodata
        # NaN enters no score, whether it is declared or not
        unused = self._nodata is None and declared is not None and declared == declared
        if unused and not self._noted:
            self._noted = True
            tell(
                f"{image} declares nodata {declared:g}, which is read as pixel values; "
                "--nodata file leaves it out"
            )
        return source


def _numbers(text: str, option: str) -> tuple[float, ...]:
    from fcvgg.errors import ArgumentError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentError(
            f"{option} {text!r} is no list of numbers; expected such as 0.485,0.456,0.406"
        ) from error


# -- options of the commands that train -----------------------------------------------------------

TRAINING = "Training"
"""The part of a command's help that says how is trained."""

RunFolder = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        file_okay=False,
        help="The run's folder; made if absent.",
        callback=output_folder(),
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Finish the interrupted run in the folder.")]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", metavar="N", min=1, help="Images per step.", rich_help_panel=TRAINING
    ),
]
ClassWeights = Literal["none", "balanced"]
"""How classes count in the loss; the library has None for none."""

BALANCED_HELP = "balanced: rare classes count as much as frequent ones."
