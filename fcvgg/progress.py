"""A progress bar on stderr; Rich is imported where one is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    what: str, total: float | None, shown: bool = True, rate: str | None = None
) -> Iterator[Callable[[float], None]]:
    """Gives what to call with the number of steps that were done.

    Args:
        what: the steps' name.
        total: how many there will be, if that is known.
        shown: False draws nothing.
        rate: the unit of the steps done in a second, such as ``"MP/s"``, which is then shown in
            place of their number.
    """
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        """Steps per second."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.2f} {rate}" if task.speed else f"- {rate}")

    counted = (MofNCompleteColumn(),) if rate is None else (TaskProgressColumn(), RateColumn())
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), *counted),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
