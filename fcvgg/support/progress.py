"""A progress bar on the terminal; Rich is imported where one is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LIVE: list[Console] = []


def live_console() -> Console | None:
    """The console of the bar that is on the screen now, if there is one.

    Lines printed through it appear above the bar; printed past it they would run into the bar.
    """
    return _LIVE[-1] if _LIVE else None


@contextmanager
def progress_bar(
    what: str,
    total: float | None,
    shown: bool = True,
    rate: str | None = None,
    console: Console | None = None,
) -> Iterator[Callable[[float], None]]:
    """Gives what to call with the number of steps that were done.

    Args:
        what: the steps' name.
        total: how many there will be, if that is known.
        shown: False draws nothing.
        rate: the unit of the steps done in a second, such as ``"MP/s"``, which is then shown in
            place of their number.
        console: where the bar is drawn if that is a terminal; stderr when None.
    """
    if not shown:
        yield lambda done: None
        return
    from rich import progress
    from rich.text import Text

    from fcvgg.support.terminal import VisibleConsole

    class RateColumn(progress.ProgressColumn):
        """Steps per second."""

        def render(self, task: progress.Task) -> Text:
            return Text(f"{task.speed:.2f} {rate}" if task.speed else f"- {rate}")

    share = (progress.TaskProgressColumn(), RateColumn())
    columns = (
        *(progress.TextColumn("{task.description}"), progress.BarColumn()),
        *((progress.MofNCompleteColumn(),) if rate is None else share),
        *(progress.TimeElapsedColumn(), progress.TimeRemainingColumn()),
    )
    if console is None:
        console = VisibleConsole(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        _LIVE.append(console)
        try:
            yield lambda done: bar.advance(task, done)
        finally:
            _LIVE.pop()
