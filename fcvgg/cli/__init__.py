"""The command line ``fcvgg``.

Every command is a module of this package that holds one function; torch's slow parts are imported
inside the functions, so that help and usage errors come fast.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from fcvgg.cli import (
    bench,
    classify,
    convert,
    demo,
    evaluate,
    finetune,
    heatmap,
    info,
    page,
    probe,
    segment,
    segment_train,
    serve,
    stream,
)
from fcvgg.cli.console import Command, Commands, examples, paragraphs, reporting_errors, say
from fcvgg.cli.options import with_option_groups

app = typer.Typer(
    name="fcvgg",
    cls=Commands,
    help="Trained classifiers as fully convolutional networks: any input size, "
    "score maps, aligned heatmaps.",
    epilog=examples("fcvgg demo", "fcvgg heatmap photo.jpg --target 'tabby'", "fcvgg info vgg16"),
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; the console script ``fcvgg``."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # a line for every broken tag
    app(prog_name="fcvgg")


def _print_version(wanted: bool) -> None:
    if wanted:
        from fcvgg import __version__

        say(f"fcvgg {__version__}")
        raise typer.Exit


@app.callback()
def _fcvgg(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None: ...


for _module in (
    demo,
    heatmap,
    classify,
    evaluate,
    info,
    convert,
    serve,
    page,
    probe,
    stream,
    bench,
    finetune,
    segment_train,
    segment,
):
    _command = reporting_errors(with_option_groups(_module.run))
    app.command(
        _module.NAME,
        cls=Command,
        help=paragraphs(_module.run.__doc__),
        epilog=examples(*_module.EXAMPLES),
    )(_command)
