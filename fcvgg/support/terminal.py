"""The console that everything is printed on: names from files never reach the terminal raw."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fcvgg.names import readable


class VisibleConsole(Console):
    """A console on which names from files show as `readable` writes them, each in one line."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        shown = _visible_text(renderable) if isinstance(renderable, Text) else renderable
        return super().render(shown, options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(readable(text), **options)


def _visible_text(text: Text) -> Text:
    if text.plain.isprintable():
        return text
    shown = text.blank_copy()
    for i, character in enumerate(text.plain):
        written = readable(character)
        shown.append_text(text[i] if written == character else Text(written))
    return shown
