"""Amounts of memory as users read and write them."""

from __future__ import annotations

import re

import numpy as np

from fcvgg.errors import ArgumentError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS.update({f"{unit}I": 1 << 10 * i for i, unit in enumerate("KMGT", 1)})


def size_text(size: float) -> str:
    """A number of bytes for a message: ``3.0 TB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def parsed_memory(memory: int | str) -> int:
    """Bytes, from a number of them or text such as ``"512MiB"`` or ``"2GB"``.

    Raises:
        ArgumentError: if it is neither.
    """
    if isinstance(memory, (int, np.integer)) and not isinstance(memory, bool) and memory > 0:
        return int(memory)
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", memory.upper())
        if match and match[2] in _UNITS and float(match[1]) > 0:
            return round(float(match[1]) * _UNITS[match[2]])
    raise ArgumentError(
        f"memory must be a number of bytes or text such as '512MiB' or '2GB', got {memory!r}"
    )


def rounded_up(size: int) -> int:
    """Bytes, rounded up to two digits, so that the text of a message is enough."""
    step = 10 ** max(len(str(size)) - 2, 0)
    return -(-size // step) * step
