"""Class names and indices."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from fcvgg.errors import CategoryError
from fcvgg.support import untrusted

_LISTED = 5


def read_categories(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The class names in a text file, one per line and in the order of the scores, or in JSON.

    JSON holds a list of names, or an object of them by index (``{"0": "cat", "1": "dog"}``).

    Raises:
        CategoryError: if the file cannot be read as that, or holds no names.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            names = _names_in(untrusted.parsed_json(text))
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CategoryError(
            f"the categories in {path} cannot be read: {reason}; write one name per line, or a "
            "list of names in JSON"
        ) from error
    if not names:
        raise CategoryError(
            f"{path} must hold categories, one name per line or in JSON, got an empty file"
        )
    return tuple(names)


def _names_in(content: Any) -> list[str]:
    """The names of a list, or of an object by index.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(content, dict):
        try:
            content = [content[str(index)] for index in range(len(content))]
        except KeyError as error:
            raise ValueError(f"it has no index {error}") from error
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError("it is not a list of names")
    return content


def one_per_class(
    names: Sequence[str] | str | os.PathLike[str] | None, classes: int, order: str
) -> tuple[str, ...] | None:
    """Class names as a network keeps them, or None.

    Args:
        names: the names, or the path of their file.
        classes: the number of classes.
        order: what gives the names their order, for the message.

    Raises:
        CategoryError: if the number is another, or the file cannot be read.
    """
    if isinstance(names, os.PathLike):
        names = read_categories(names)
    elif isinstance(names, str) and _is_path(names, classes):
        try:
            names = read_categories(names)
        except CategoryError as error:
            raise CategoryError(
                f"categories={names!r} is taken for the path of a file: {error}, or pass a list of "
                "names"
            ) from error
    if isinstance(names, bytes) or not (names is None or isinstance(names, Iterable)):
        raise CategoryError(
            f"categories must be a sequence of names or the path of their file, got {names!r}; "
            "pass one name per class"
        )
    names = None if names is None else tuple(names)
    if names is not None and len(names) != classes:
        raise CategoryError(
            f"categories must be {classes} names, one per class in the order of the {order}, got "
            f"{len(names)}"
        )
    return names


def _is_path(text: str, classes: int) -> bool:
    """Whether text names a file: a letter for each class is a sequence of names."""
    return len(text) != classes or os.path.exists(text)


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names that identify a class; some of ImageNet's do not, such as "crane".

    Raises:
        CategoryError: if one is empty or is not unique.
    """
    names = tuple(map(str, names))
    wrong = next((n for i, n in enumerate(names) if not n.strip() or n in names[:i]), None)
    if wrong is not None:
        got = f"{wrong!r} twice" if wrong.strip() else f"the empty name {wrong!r}"
        raise CategoryError(f"categories must be one different name per class, got {got}")
    return names


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
                f"class must be an index from 0 to {classes - 1} or a name, got {target}"
            )
        return int(target) % classes
    if not isinstance(target, str):
        raise CategoryError(f"class must be an index or a category name, got {target!r}")
    if categories is None:
        raise CategoryError(
            f"class must be an index from 0 to {classes - 1} for a network without category names, "
            f"got {target!r}; pass an index, or categories= to convert or load"
        )
    return _named(target, categories)


def class_given(text: str, categories: Sequence[str] | None) -> int | str:
    """A class given as text: a number is an index, unless a category has that name."""
    named = categories is not None and text in categories
    return int(text) if text.isdecimal() and not named else text


def _named(target: str, categories: Sequence[str]) -> int:
    folded = [name.casefold() for name in categories]
    wanted = target.casefold()
    # the strictest kind of match that finds anything decides
    for matches in (
        [i for i, name in enumerate(categories) if name == target],
        [i for i, name in enumerate(folded) if name == wanted],
        [i for i, name in enumerate(folded) if wanted and wanted in name],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise CategoryError(
                f"class must match one category, got {target!r}, which matches "
                f"{_listed(matches, categories)}; pass the whole name or the index"
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
