"""A terminal in this process: what a user sees of a command, bar and results together."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

COLUMNS = 80

_PARTS = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


@dataclass
class Terminal:
    """What was written to a pseudo-terminal, and what then stands on its screen."""

    raw: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def screen(self) -> list[str]:
        """The lines that remain on 80 columns, without the last empty ones."""
        rows, row, col = [""], 0, 0
        for match in _PARTS.finditer(self.raw):
            argument, command, carriage, feed, text = match.groups()
            if carriage:
                col = 0
            elif feed:
                row += 1
                rows += [""] * (row + 1 - len(rows))
            elif text:
                for character in text:
                    if col == COLUMNS:
                        row, col = row + 1, 0
                        rows += [""] * (row + 1 - len(rows))
                    rows[row] = rows[row].ljust(col)[:col] + character + rows[row][col + 1 :]
                    col += 1
            elif command == "A":
                row = max(row - int(argument or 1), 0)
            elif command == "K":
                rows[row] = "" if argument == "2" else rows[row][:col]
            else:  # colours, and the cursor shown or hidden
                assert command in "mhl", match[0]
        while rows and not rows[-1].strip():
            rows.pop()
        return [line.rstrip() for line in rows]


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, *streams: str) -> Iterator[Terminal]:
    """Let these streams (``"stdout"``, ``"stderr"``) be one terminal for a while."""
    import pty

    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", str(COLUMNS)), ("LINES", "24")):
        monkeypatch.setenv(name, value)
    shown, master, slave = Terminal(), *pty.openpty()
    parts: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # nobody writes any more
                return
            if not data:
                return
            parts.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(slave, "w", encoding="utf-8") as screen, monkeypatch.context() as patch:
            for name in streams:
                patch.setattr(sys, name, screen)
            yield shown
            screen.flush()
    finally:
        reader.join(10)
        os.close(master)
        shown.raw = b"".join(parts).decode()
