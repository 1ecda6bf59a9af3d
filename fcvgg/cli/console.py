"""What the commands share: how they print, show progress, go through images and fail."""

from __future__ import annotations

import csv
import functools
import inspect
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from fcvgg.errors import DatasetError, FcvggError, FcvggWarning, ImageError
from fcvgg.names import readable
from fcvgg.support.atomic import atomic_file
from fcvgg.support.progress import live_console, progress_bar
from fcvgg.support.terminal import VisibleConsole

if TYPE_CHECKING:
    from fcvgg.images.files import Unreadable

BAD_INPUT = 2
"""Exit status on an error that the user can mend."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

_LISTED = 20
"""Images that cannot be read and are named one by one."""

_PIPED_WIDTH = 200
"""Columns of a table that no terminal limits."""

_PANELS_WIDTH = 80
"""Columns that the panels of a help take."""

STDIN = Path("-")
"""The image that is read from standard input."""

Result = TypeVar("Result")


def output() -> Console:
    """The console on stdout, or that of a bar on the same screen, above which lines then appear.

    It is made for each call, since tests and pipes exchange the stream.
    """
    live = live_console()
    if live is not None and sys.stdout.isatty():
        return live
    limited = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = None if limited else _PIPED_WIDTH
    return VisibleConsole(width=width)


def say(line: RenderableType = "") -> None:
    """Print a table or a line; a terminal breaks it between words, so that paths stay whole."""
    _print(output(), readable(line) if isinstance(line, str) else line)


def say_whole(label: str, style: str, text: str) -> None:
    """Print a path or a command after its label on one line, however long, to be copied."""
    output().print(Text.assemble((f"{label} ", style), readable(text)), soft_wrap=True)


def say_json(value: object) -> None:
    """Print plain data as one line of JSON, in which control characters stand as escapes."""
    text = json.dumps(value, ensure_ascii=False)
    plain = (c if readable(c) == c else json.dumps(c)[1:-1] for c in text)
    output().print(Text("".join(plain)), soft_wrap=True)  # above a bar on the same screen


def say_wrote(path: Path) -> None:
    """Print where a result was written."""
    say_whole("wrote", "green", str(path))


def say_next(command: str) -> None:
    """Print the command to run next."""
    say_whole("next:", "cyan", command)


def complain(message: object) -> None:
    """Print one line on stderr, whatever the message holds."""
    words = in_option_words(readable(" ".join(str(message).split())))
    line = Text.assemble(("fcvgg: error: ", "bold red"), words)
    _print(_errors(), line)


def note(message: object) -> None:
    """Print a note on stderr, in one line."""
    line = Text.assemble(("fcvgg: ", "bold yellow"), readable(" ".join(str(message).split())))
    _print(_errors(), line)


def note_skipped(files: Sequence[Unreadable], used: int) -> None:
    """Print a note on stderr on the files of a folder that were left out.

    Images that cannot be read have a line each; a last line counts all files by their reason.
    """
    from fcvgg.images.files import left_out

    failed = [file for file in files if not file.passed_over]
    lines = [f"skipped {' '.join(str(file).split())}" for file in failed[:_LISTED]]
    if len(failed) > _LISTED:
        lines.append(f"skipped {len(failed) - _LISTED} more that cannot be read")
    for line in [*lines, *[left_out(files, used)] * bool(files)]:
        note(line)


def examples(*commands: str) -> str:
    """The foot of a command's help."""
    # a blank line is the only line break that every version of Typer keeps
    lines = [f"[dim]$[/dim] {escape(command)}" for command in commands]
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


def paragraphs(documentation: str | None) -> str:
    """A docstring for Typer, which would keep the line breaks within paragraphs."""
    parts = inspect.cleandoc(documentation or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)


class _PlainWhereNarrow:
    """A help without panels on a narrow terminal, where they would cut options off."""

    epilog: Any
    rich_markup_mode: Any

    def get_help(self, ctx: Any) -> str:
        columns = shutil.get_terminal_size().columns
        if columns >= _PANELS_WIDTH:
            return super().get_help(ctx)  # type: ignore[misc, no-any-return]
        self.rich_markup_mode = None
        self.epilog = Text.from_markup(self.epilog).plain
        formatter = ctx.make_formatter()
        formatter.width = max(columns - 2, 50)
        self.format_help(ctx, formatter)  # type: ignore[attr-defined]
        return formatter.getvalue().rstrip()


class Command(_PlainWhereNarrow, TyperCommand):
    """A command whose help suits the terminal."""


class Commands(_PlainWhereNarrow, TyperGroup):
    """The commands, of which the same holds."""


def reporting_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A command that ends with one line and an exit status where fcvgg raises an error."""

    @functools.wraps(command)
    def reporting(*args: Any, **kwargs: Any) -> None:
        try:
            with _warnings_as_notes():
                command(*args, **kwargs)
        except FcvggError as error:
            complain(error)
            raise typer.Exit(BAD_INPUT) from error
        except KeyboardInterrupt as error:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from error

    return reporting


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """fcvgg's own warnings are notes, without the file and line that they come from."""
    usual = warnings.showwarning

    def show(message: Any, category: type[Warning], *place: Any, **rest: Any) -> None:
        if issubclass(category, FcvggWarning):
            note(message)
        else:
            usual(message, category, *place, **rest)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


@contextmanager
def resumable(run: Path) -> Iterator[None]:
    """Training in a folder; when interrupted, a line says how to resume it."""
    try:
        yield
    except KeyboardInterrupt:
        if not (run / "last.ckpt").exists():
            raise
        complain(f"interrupted; finished epochs are kept in {run}, and --resume continues")
        raise typer.Exit(INTERRUPTED) from None


def for_each_image(
    images: Sequence[Path], what: str, work: Callable[[Path], Result]
) -> list[Result]:
    """The results of `work` on every image, with a progress bar for several.

    An image that cannot be used is reported and left out, and the rest still run; the command then
    ends with `exit_if_any_failed`. Any other error ends the run.
    """
    results, failed = [], list[str]()
    screen = output() if sys.stdout.isatty() else _errors()
    with progress_bar(what, len(images), shown=len(images) > 1, console=screen) as advance:
        for image in images:
            try:
                results.append(_within_memory(image, work))
            except ImageError as error:
                named = str(image) in str(error)  # a network knows no name of its image
                failed.append(str(error) if named else f"{image}: {error}")
                if len(images) <= _LISTED:
                    complain(failed[-1])
            advance(1)
    if len(images) > _LISTED:  # the lines of many images would scroll them away
        for line in failed:
            complain(line)
    return results


def write_csv(path: Path, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table, whole or not at all, and print where.

    Raises:
        FcvggError: if it cannot be written.
    """
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(headings)
        writer.writerows([readable(x) if isinstance(x, Path) else x for x in row] for row in rows)
    say_wrote(path)


def check_any_exists(images: Sequence[Path]) -> None:
    """Refuse paths of which none exists, before a network is loaded or even downloaded.

    Raises:
        ImageError: if no path exists.
    """
    from fcvgg.images.lazy.source import absent

    if not any(image == STDIN or os.path.exists(image) for image in images):
        raise ImageError(absent(", ".join(map(str, images)) or "given"))


def images_in(paths: Sequence[Path], recursive: bool, own: Sequence[str] = ()) -> dict[Path, Path]:
    """The image files of a command, each with the folder that results are named relative to.

    A folder stands for the images in it; files that are no images are listed on stderr.

    Args:
        paths: files and folders, `STDIN` among them.
        recursive: also take the images of folders in folders.
        own: endings of names that the command itself writes, which are left out of folders.

    Raises:
        ImageError: if a folder cannot be listed or has no images.
    """
    from fcvgg.images.files import contents, image_files
    from fcvgg.images.lazy.opening import is_zarr

    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir() or is_zarr(path):
            found.setdefault(path, path.parent)
            continue
        try:
            listed = image_files(path) if recursive else contents(path)
        except DatasetError as error:
            raise ImageError(str(error)) from error
        inside = [image for image in listed.images if not image.name.endswith(tuple(own))]
        if not inside:
            remedy = "" if recursive else "; --recursive also takes those of the folders in it"
            raise ImageError(f"the folder {path} has no images{remedy}")
        note_skipped(listed.skipped, len(inside))
        found.update({image: path for image in inside if image not in found})
    return found


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


def _print(console: Console, line: RenderableType) -> None:
    if not isinstance(line, (str, Text)):
        console.print(line)
        return
    text = line if isinstance(line, Text) else Text(line)
    for part in _broken(text, console.width) if console.is_terminal else [text]:
        console.print(part, soft_wrap=True)


def _broken(text: Text, width: int) -> list[Text]:
    """The text as lines that end between words; a word longer than a line stays whole."""
    parts: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        plain, begin, breaks = line.plain, 0, []
        for word in re.finditer(r"\S+", plain):
            if plain[begin : word.start()].strip() and cell_len(plain[begin : word.end()]) > width:
                begin = word.start()
                breaks.append(begin)
        parts += line.divide(breaks)
    for part in parts:
        part.rstrip()
    return parts


def _errors() -> Console:
    """The console on stderr, or that of a bar on the same screen."""
    live = live_console()
    if live is not None and sys.stderr.isatty():
        return live
    return VisibleConsole(stderr=True)


def _within_memory(image: Path, work: Callable[[Path], Result]) -> Result:
    try:
        return work(image)
    except (MemoryError, RuntimeError) as error:
        # torch raises RuntimeError for the CPU, its subclass OutOfMemoryError for a GPU
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ImageError(
            f"{image} does not fit into memory at this size; choose a smaller scale"
        ) from error


# -- where results go -----------------------------------------------------------------------------


class OutputFiles:
    """One file for each image, named after it, such that none takes the place of another.

    Args:
        images: all images of the run; where they have folders, the files lie in folders as they do.
        folder: where the files go.
        ending: of their names, which begin with the image's stem: ``"-heatmap.png"``.
    """

    def __init__(self, images: Sequence[Path] | Mapping[Path, Path], folder: Path, ending: str):
        self.folder = folder
        self.roots = images if isinstance(images, Mapping) else {}
        self.ending = ending
        self.inputs = {image.resolve(): image for image in images}
        self.owners: dict[Path, Path] = {}
        for image in images:
            self.owners.setdefault(self._name(image), image)

    def path_for(self, image: Path) -> Path:
        """The path of an image's file.

        Raises:
            ImageError: if it is that of another image of this run, or of an input.
        """
        path = self._name(image)
        owner = self.owners[path]
        if owner != image:
            raise ImageError(
                f"{image} and {owner} would both be written to {path}; "
                "run them apart, each with its own --output"
            )
        if path.resolve() in self.inputs:
            raise ImageError(
                f"the {path.stem.rpartition('-')[2]} of {image} would overwrite the input {path}; "
                "choose another --output"
            )
        return path

    def _name(self, image: Path) -> Path:
        root = self.roots.get(image, image.parent)
        stem = "stdin" if image == STDIN else image.stem
        return self.folder / image.parent.relative_to(root) / f"{stem}{self.ending}"


# -- messages of the library ----------------------------------------------------------------------

_PHRASES = (
    ("preprocess=fcvgg.Preprocess(mean, std)", "--preprocess, or --mean and --std"),
    (", your own nn.Module or a function that makes it", " or package.module:callable"),
    (" to convert or load", ""),
    (" to fcvgg.convert", ""),
    ("; pass uint8 (H, W, C), or value_range=", "; pass value_range="),
    ("; pass uint8 (H, W, C)", "; save it as 8 bits"),
    (" or a scale= of its own to fcvgg.Preprocess", ""),
    (" to fcvgg.Preprocess", ""),
    (", or a tensor", ""),
    ("classes=[name]", "--classes NAME"),
    (
        "with fcvgg.stream, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file",
        "with fcvgg stream",
    ),
    ("choose a smaller lr", "choose a smaller --lr"),
    (
        "download it and pass its path",
        "download it, or pipe it into this command with - as the image",
    ),
    ("resume it, or", "pass --resume, or"),
)
"""Phrases that only hold in Python, and what stands for them on the command line."""

_KEYWORDS = (
    *("activation", "arch", "average", "bands", "batch_size", "cache", "categories", "classes"),
    *("class_weights", "classifier", "crop", "devices", "epochs", "folds", "freeze_upto", "hidden"),
    *("input_size", "layers", "level", "lr", "memory", "nodata", "optimizer", "output_stride"),
    *("patience", "pooling", "precision", "protocols", "resize", "scales", "seed", "size"),
    *("strategy", "valid_fraction", "value_range", "weights", "workers"),
)
"""Arguments of the library that are options; those with another name are in `_RENAMED`."""

_RENAMED = {"value_range": "range", "hidden": "head"}
_KEYWORD = re.compile(
    rf"(?<![\w.-])({'|'.join(_KEYWORDS)})(?:=(?:\(([^()]*)\)|(?=(.?)))|(?= must\b))"
)


def in_option_words(message: str) -> str:
    """A message of the library in the words of the command line: ``--arch 'x'`` for ``arch='x'``.

    >>> in_option_words("pass input_size=, the size it was trained at")
    'pass --input-size, the size it was trained at'
    >>> in_option_words("fcvgg.open_image(path, bands=(0, 1, 2)) chooses some")
    '--bands 0,1,2 chooses some'
    """
    for phrase, words in _PHRASES:
        message = message.replace(phrase, words)
    message = re.sub(r"fcvgg\.open_image\(path, (\w+=(?:\([^)]*\)|[^()]*))\)", r"\1", message)
    message = _KEYWORD.sub(_option, message)
    return re.sub(r"(?<![-.])\binput_size\b", "--input-size", message)


def _option(found: re.Match[str]) -> str:
    """An option for a keyword of the library, with its value as it is typed."""
    name, values, following = found.groups()
    option = f"--{_RENAMED.get(name, name).replace('_', '-')}"
    if values is not None:
        numbers = [value.strip() for value in values.split(",") if value.strip()]
        joined = ("x" if name in ("input_size", "size", "crop") else ",").join(numbers)
        words = {"heightxwidth": "HxW", "hxw": "HxW", "low,high": "LOW,HIGH"}
        return f"{option} {words.get(joined, joined)}"
    if following is None:  # "NAME must be": an English word where the sentence goes on before it
        return option if found.start() == 0 or "_" in name else name
    if name == "weights" and following != "'":
        return found[0]  # such as weights=PATH, after which the option is named too
    return f"{option} " if re.match(r"[\w'.-]", following) else option
