"""What the commands share: how they print, show progress, go through images and fail."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from fcvgg.cli.options import in_option_words
from fcvgg.errors import FcvggError, ImageError

BAD_INPUT = 2
"""Exit status on an error that the user can mend."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

_PIPED_WIDTH = 200
"""Columns of a table that no terminal limits."""

Result = TypeVar("Result")


def output() -> Console:
    """The console on stdout; made anew, since tests and pipes exchange the stream."""
    limited = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = None if limited else _PIPED_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def say(line: RenderableType = "") -> None:
    """Print one line, which is not broken so that paths stay whole, or a table."""
    output().print(line, soft_wrap=isinstance(line, (str, Text)))


def say_wrote(path: Path) -> None:
    """Print where a result was written."""
    say(Text.assemble(("wrote ", "green"), str(path)))


def complain(message: object) -> None:
    """Print one line on stderr, whatever the message holds."""
    words = in_option_words(" ".join(str(message).split()))
    line = Text.assemble(("fcvgg: error: ", "bold red"), words)
    _errors().print(line, soft_wrap=True)


def tell_skipped(files: Sequence[object]) -> None:
    """Print one line on stderr for every file that was left out, which is no error."""
    for file in files:
        words = " ".join(str(file).split())
        line = Text.assemble(("fcvgg: skipped ", "bold yellow"), words)
        _errors().print(line, soft_wrap=True)


def examples(*commands: str) -> str:
    """The foot of a command's help."""
    # a blank line is the only line break that every version of Typer keeps
    lines = [f"[dim]$[/dim] {escape(command)}" for command in commands]
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


def reporting_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A command that ends with one line and an exit status where fcvgg raises an error."""

    @functools.wraps(command)
    def reporting(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except FcvggError as error:
            complain(error)
            raise typer.Exit(BAD_INPUT) from error
        except KeyboardInterrupt as error:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from error

    return reporting


@contextmanager
def resumable(run: Path) -> Iterator[None]:
    """Training in a folder, which says when interrupted how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if not (run / "last.ckpt").exists():
            raise
        complain(f"interrupted; the epochs done are kept in {run}, --resume goes on")
        raise typer.Exit(INTERRUPTED) from None


def for_each_image(
    images: Sequence[Path], what: str, work: Callable[[Path], Result]
) -> list[Result]:
    """The results of `work` on every image, with a progress bar for several.

    An image that cannot be used is reported and left out, and the rest still run; the command then
    ends with `exit_if_any_failed`. Any other error ends the run.
    """
    results = []
    with _progress(len(images)) as progress:
        task = progress.add_task(what, total=len(images))
        for image in images:
            try:
                results.append(_within_memory(image, work))
            except ImageError as error:
                complain(error)
            progress.advance(task)
    return results


def check_any_exists(images: Sequence[Path]) -> None:
    """Refuse images of which none is there, before a network is loaded or even downloaded.

    Raises:
        ImageError: if so.
    """
    if not any(map(os.path.exists, images)):
        raise ImageError(f"there is no image file {', '.join(map(str, images))}")


def exit_if_any_failed(images: Sequence[Path], results: Sequence[object]) -> None:
    """End with `BAD_INPUT` where `for_each_image` left images out."""
    failed = len(images) - len(results)
    if failed and len(images) > 1:
        complain(f"{failed} of {len(images)} images could not be used")
    if failed:
        raise typer.Exit(BAD_INPUT)


def folder(path: Path) -> Path:
    """The folder for results, made if it is absent.

    Raises:
        FcvggError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FcvggError(f"cannot make the folder {path}: {error.strerror or error}") from error
    return path


def _errors() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def _progress(total: int) -> Progress:
    """A bar on the terminal: on stdout, above which results scroll, or stderr if that is piped."""
    console, errors = output(), _errors()
    if not console.is_terminal:
        console = errors
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
        disable=total < 2 or not console.is_terminal,
    )


def _within_memory(image: Path, work: Callable[[Path], Result]) -> Result:
    try:
        return work(image)
    except ImageError as error:
        if isinstance(error.__cause__, (MemoryError, RuntimeError)):
            raise ImageError(f"{image}: {error}") from error  # the network knows no name
        raise
    except (MemoryError, RuntimeError) as error:
        # torch raises RuntimeError for the CPU, its subclass OutOfMemoryError for a GPU
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ImageError(
            f"{image} does not fit into memory at this size; choose a smaller scale"
        ) from error
