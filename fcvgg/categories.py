"""Class names and indices."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from numbers import Integral

from fcvgg.errors import CategoryError

_LISTED = 5


def class_name(index: int, categories: Sequence[str] | None) -> str:
    """The name of a class, or ``class 7`` where there are no names."""
    return categories[index] if categories is not None else f"class {index}"


def class_index(target: int | str, categories: Sequence[str] | None, classes: int) -> int:
    """The index of a class given by index or name; case does not matter, nor does a unique part.

    Raises:
        CategoryError: if there is none or more than one; the message lists the near ones.
    """
    if isinstance(target, Integral) and not isinstance(target, bool):
        if not -classes <= target < classes:
            raise CategoryError(
                f"class {target} is out of range; the network has classes 0 to {classes - 1}"
            )
        return int(target) % classes
    if not isinstance(target, str):
        raise CategoryError(f"target {target!r} is no class; pass an index or a category name")
    if categories is None:
        raise CategoryError(
            f"the network has no category names, so {target!r} cannot be looked up; "
            f"pass an index from 0 to {classes - 1}, or categories= to convert or load"
        )
    return _named(target, categories)


def _named(target: str, categories: Sequence[str]) -> int:
    folded = [name.casefold() for name in categories]
    wanted = target.casefold()
    for matches in (
        [i for i, name in enumerate(categories) if name == target],
        [i for i, name in enumerate(folded) if name == wanted],
        [i for i, name in enumerate(folded) if wanted and wanted in name],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise CategoryError(
                f"category {target!r} is ambiguous: {_listed(matches, categories)}; "
                "pass the whole name or the index"
            )
    near = difflib.get_close_matches(wanted, dict.fromkeys(folded), _LISTED, 0.5)
    if near:
        hint = f"near: {_listed([folded.index(name) for name in near], categories)}"
    else:
        hint = f"there are {len(categories)}: {_listed(range(len(categories)), categories)}"
    raise CategoryError(f"there is no category {target!r}; {hint}")


def _listed(indices: Sequence[int], categories: Sequence[str]) -> str:
    names = [f"{categories[i]!r} ({i})" for i in indices[:_LISTED]]
    return ", ".join(names) + (", ..." if len(indices) > _LISTED else "")
