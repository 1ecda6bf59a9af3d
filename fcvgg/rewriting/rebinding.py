"""Functions that refer to copied objects in place of the originals.

`copy.deepcopy` takes functions as they are, so a function that was set on a module, such as
``model.forward = lambda x: model.fc(old(x))``, would go on calling the original modules after a
copy. `rebound` makes the same function on the copies.
"""

from __future__ import annotations

from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any


def rebound(value: Any, copies: dict[int, Any]) -> Any:
    """A function, method or partial on the copies, not compiled; any other value as it is.

    Args:
        copies: by `id`, what stands for the originals. Functions made here are added to it.
    """
    compiled = getattr(value, "_torchdynamo_orig_callable", None)
    if compiled is not None:  # torch.compile: the function computes what the original does
        value = compiled
    if isinstance(value, FunctionType):
        return _function(value, copies)
    if isinstance(value, MethodType):
        return _if_changed(
            value,
            (value.__func__, value.__self__),
            copies,
            lambda parts: MethodType(parts[0], parts[1]),
        )
    if isinstance(value, partial):
        parts = (value.func, *value.args, *value.keywords.values())
        count = 1 + len(value.args)
        return _if_changed(
            value,
            parts,
            copies,
            lambda new: partial(*new[:count], **dict(zip(value.keywords, new[count:]))),
        )
    return value


def _if_changed(value: Any, parts: tuple[Any, ...], copies: dict[int, Any], make: Any) -> Any:
    new = tuple(_referred(part, copies) for part in parts)
    return make(new) if any(a is not b for a, b in zip(parts, new)) else value


def _referred(value: Any, copies: dict[int, Any]) -> Any:
    """What a function refers to: a copy, a function on copies, or a collection of them."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return _if_changed(value, tuple(value), copies, type(value))
    if type(value) is dict:
        return _if_changed(value, tuple(value.values()), copies, lambda new: dict(zip(value, new)))
    return rebound(value, copies)


def _function(function: FunctionType, copies: dict[int, Any]) -> Any:
    if id(function) in copies:
        return copies[id(function)]
    copies[id(function)] = function  # for functions that refer to themselves
    cells = [_content(cell) for cell in function.__closure__ or ()]
    used = _globals_of(function)
    given = (cells, used, function.__defaults__ or (), function.__kwdefaults__ or {})
    new = tuple(_referred(part, copies) for part in given)
    if all(a is b for a, b in zip(given, new)):
        return function
    new_cells, new_globals, defaults, keywords = new
    changed = new_globals is not used
    made = FunctionType(
        function.__code__,
        {**function.__globals__, **new_globals} if changed else function.__globals__,
        function.__name__,
        tuple(defaults) or None,
        tuple(
            old if a is b else CellType(b)
            for old, a, b in zip(function.__closure__ or (), cells, new_cells)
        ),
    )
    made.__kwdefaults__ = keywords or None
    copies[id(function)] = made
    return made


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name without a value yet
        return None


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """The globals that a function reads; torch's own functions read no model there."""
    if (function.__module__ or "").partition(".")[0] == "torch":
        return {}
    return {n: function.__globals__[n] for n in _names(function.__code__, function.__globals__)}


def _names(code: CodeType, known: dict[str, Any]) -> list[str]:
    """The global names that a function reads, those of the functions inside it included."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return [n for n in code.co_names if n in known] + [n for c in inner for n in _names(c, known)]
