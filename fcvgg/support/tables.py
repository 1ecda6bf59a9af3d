"""Tables as plain text, for printing results without a terminal's colours."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of text in aligned columns, the first `left` of them flush left.

    >>> print(text_table([("layer", "size"), ("conv1", "3")]))
    layer  size
    conv1     3
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
