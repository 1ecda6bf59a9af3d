"""Names of files as text that every terminal, table and report can hold."""

from __future__ import annotations

import unicodedata

_DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text around them."""

_UNSEEN = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, surrogates, and separators of lines."""


def readable(name: object) -> str:
    r"""A name on one line, as UTF-8 can hold it.

    Control characters are written as escapes. So are bytes that are not UTF-8, which Python gives
    as surrogates: old archives hold names in other encodings.

    >>> readable("h\udce4user\n.png")
    'h\\xe4user\\n.png'
    """
    text = str(name)
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _UNSEEN and character not in _DIRECTIONS:
        return character
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
