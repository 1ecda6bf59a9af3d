"""``fcvgg info``: what every layer sees and costs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table

from fcvgg.cli.completion import complete_model
from fcvgg.cli.console import output, say, say_json
from fcvgg.cli.options import MODEL_HELP, Arch, InputSize, OwnModel, load_network, size
from fcvgg.cli.reports import ReportTable, by, count, facts, geometry_report, titled
from fcvgg.support.atomic import VENDOR_ENDINGS

if TYPE_CHECKING:
    from fcvgg.evaluation.layer_table import LayerTable
    from fcvgg.network import FullyConvolutional

NAME = "info"
EXAMPLES = (
    "fcvgg info vgg16",
    "fcvgg info resnet18 --size 480x640",
    "fcvgg info vgg16 --json",
    "fcvgg info slide.svs",
)


_SLIDES = (".tif", ".tiff", ".zarr", *VENDOR_ENDINGS)

_LEAST_NAME = 12
_UNLIMITED = 10_000


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|SLIDE",
        help=f"{MODEL_HELP} Or a TIFF or OME-Zarr image.",
        autocompletion=complete_model,
        show_default=False,
    ),
]
ImageSize = Annotated[
    Any,
    typer.Option(
        "--size",
        metavar="N|HxW",
        parser=size,
        help="Image size at which outputs and costs are counted.",
        show_default="the native size",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")]

_SCENE = 1e4
"""Micrometres of a pixel from which an image is a scene, measured in metres."""


def run(
    model: ModelName,
    at: ImageSize = None,
    arch: Arch = None,
    input_size: InputSize = None,
    as_json: AsJson = False,
) -> None:
    """Show every layer's receptive field and cost; no download.

    For each layer: kernel and stride, receptive field, output size, parameters and multiply-adds.
    For each level of a TIFF or OME-Zarr image: its size and that of its pixels.
    """
    if Path(model).suffix.lower() in _SLIDES and Path(model).exists():
        _show_levels(Path(model), as_json)
        return
    from fcvgg.evaluation.layer_table import receptive_fields

    own = OwnModel(input_size=input_size)
    net = load_network(model, own, arch=arch, weights=None, verify=False)  # only to be described
    layers = receptive_fields(net, input_size=at)
    frozen = _frozen_layers(net, layers)
    if as_json:
        say_json(_as_data(model, net, layers, frozen))
        return
    say(_layer_table(f"{model} ({net.source})", layers, frozen))
    say()
    say(_totals(layers, frozen))
    say()
    say(geometry_report(net, layers.input_size))


def _show_levels(path: Path, as_json: bool) -> None:
    """The levels of an image, with the micrometres of a pixel where they are known."""
    from fcvgg.images.lazy.magnification import level_pixel_sizes
    from fcvgg.images.lazy.opening import open_image

    image = open_image(path)
    sizes = image.level_sizes or [image.size]
    pixels = [None] * len(sizes) if image.mpp is None else level_pixel_sizes(image)
    if as_json:
        levels = [{"size": size, "mpp": mpp} for size, mpp in zip(sizes, pixels)]
        say_json({"image": str(path), "channels": image.channels, "levels": levels})
        return
    rows = [
        (str(i), by(size), "not stated" if mpp is None else _length(mpp))
        for i, (size, mpp) in enumerate(zip(sizes, pixels))
    ]
    table = ReportTable(("level", "pixels", "size of a pixel"), rows)
    say(titled(f"{path}, {image.channels} channels of {image.dtype}", table))


def _length(micrometres: float) -> str:
    """The size of a pixel: micrometres on a slide, metres in a scene."""
    if micrometres >= _SCENE:
        return f"{micrometres / 1e6:.4g} m"
    return f"{micrometres:.4g} µm"


def _as_data(
    model: str, net: FullyConvolutional, table: LayerTable, frozen: set[str]
) -> dict[str, Any]:
    """What the tables show; sizes and points are ``[y, x]`` in pixels."""
    geometry = net.geometry
    return {
        "model": model,
        "source": net.source,
        "size": table.input_size,
        "layers": [{**asdict(row), "trainable": row.name not in frozen} for row in table],
        "parameters": table.parameters,
        "multiply_adds": table.multiply_adds,
        "geometry": {
            "input_size": net.input_size,
            "window": geometry.window,
            "stride": geometry.stride,
            "receptive_field": geometry.receptive_field,
            "offset": geometry.offset,
            "centre": geometry.centre_of(0, 0),
            "output_size": geometry.output_size(table.input_size),
        },
    }


def _frozen_layers(net: FullyConvolutional, table: LayerTable) -> set[str]:
    """The layers none of whose parameters is trained."""
    trained = [name for name, p in net.network.named_parameters() if p.requires_grad]
    return {
        row.name
        for row in table
        if row.parameters and not any(name.startswith(f"{row.name}.") for name in trained)
    }


def _layer_table(title: str, table: LayerTable, frozen: set[str]) -> RenderableType:
    """A row per layer; on a narrow terminal without some columns, and names without their start."""
    longest = max(len(row.name) for row in table)

    def excess(dropped: int, limit: int) -> int:
        return max(_excess(_rows(table, frozen, dropped, limit)), 0)

    dropped = 0
    while excess(dropped, _LEAST_NAME if dropped else longest) and dropped < len(_DROPPED):
        dropped += 1
    limit = max(longest - excess(dropped, longest), _LEAST_NAME)
    left_out = [name for name in _HEADINGS if name in _DROPPED[:dropped]]
    return titled(
        f"{title} at {by(table.input_size)} pixels",
        _rows(table, frozen, dropped, limit),
        "field: receptive field; jump: pixels between outputs; MACs: multiply-adds"
        + (f"\nnot shown at this width: {', '.join(left_out)}" if left_out else ""),
    )


_HEADINGS = ("kind", "kernel", "stride", "field", "jump", "output", "params", "train", "MACs")

_DROPPED = ("kind", "train", "stride", "kernel", "params", "MACs")
"""What a terminal that is too narrow does without, in this order."""


def _rows(table: LayerTable, frozen: set[str], dropped: int, limit: int) -> Table:
    """The rows without the first `dropped` of `_DROPPED`, with names of `limit` characters."""
    from fcvgg.evaluation.layer_table import short

    shown = Table(box=None, padding=(0, 1, 0, 0), header_style="cyan")
    shown.add_column("layer", no_wrap=True)
    kept = [name for name in _HEADINGS if name not in _DROPPED[:dropped]]
    for heading in kept:
        shown.add_column(heading, justify="left" if heading == "kind" else "right", no_wrap=True)
    for row in table:
        cells = {
            "kind": row.kind,
            "kernel": short(row.kernel)
            + (f" d{short(row.dilation)}" if max(row.dilation) > 1 else ""),
            "stride": short(row.stride),
            "field": short(row.receptive_field),
            "jump": short(row.output_stride),
            "output": f"{row.channels}x{by(row.output_size)}",
            "params": count(row.parameters) if row.parameters else "",
            "train": ("no" if row.name in frozen else "yes") if row.parameters else "",
            "MACs": count(row.multiply_adds) if row.multiply_adds else "",
        }
        name = row.name if len(row.name) <= limit else f"…{row.name[1 - limit :]}"
        shown.add_row(name, *(cells[heading] for heading in kept))
    return shown


def _excess(table: Table) -> int:
    """Columns that a table needs beyond what the terminal has."""
    console = output()
    unlimited = console.options.update(max_width=_UNLIMITED)
    return console.measure(table, options=unlimited).maximum - console.width


def _totals(table: LayerTable, frozen: set[str]) -> RenderableType:
    trainable = sum(row.parameters for row in table if row.name not in frozen)
    totals = {
        "layers": f"{len(table)} with a kernel or parameters",
        "parameters": f"{table.parameters:,}, of which {trainable:,} trainable",
        "multiply-adds": f"{table.multiply_adds:,}",
    }
    return titled("Totals", facts(totals))
