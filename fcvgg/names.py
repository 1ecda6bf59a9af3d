"""Names of files as text that every terminal, table and report can hold."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode's kinds of characters that steer a terminal or the order of its text, end a line, or are
no characters."""

_JOINERS = "\u200c\u200d"
"""Characters of kind Cf that words of several scripts, and emoji, are written with."""


def readable(name: object) -> str:
    r"""A name on one line, as UTF-8 can hold it.

    Control and direction characters are written as escapes. So are bytes that are not UTF-8, which
    Python gives as surrogates: old archives hold names in other encodings.

    >>> readable("h\udce4user\n.png")
    'h\\xe4user\\n.png'
    """
    text = str(name)
    return text if text.isprintable() else "".join(map(_escaped, text))


def web_address(name: str) -> str | None:
    """The web address that a name is, also where a path has lost a slash of it; None if it is none.

    >>> web_address("https:/example.org/a.png"), web_address("a.png")
    ('https://example.org/a.png', None)
    """
    found = re.fullmatch(r"(https?|ftp|s3|gs):/+(.*)", name)
    return found and f"{found[1]}://{found[2]}"


def counted(count: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "image"), counted(2, "image")
    ('1 image', '2 images')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def alternatives(values: Iterable[object]) -> str:
    """Values that an argument may take, for a message.

    >>> alternatives(["'max'", "'mean'"]), alternatives([".png"])
    ("'max' or 'mean'", '.png')
    """
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
