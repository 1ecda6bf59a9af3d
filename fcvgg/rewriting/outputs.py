"""The form in which a model returns its outputs: one tensor, or a tree of containers of tensors.

A graph computes a flat tuple of maps. `flattened` takes a value that Python code returns apart,
and `Form.filled` puts other values into containers of the same form: a dict of vectors becomes a
dict of maps.
"""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fcvgg.rewriting.marks import FeatureSize

_SCALARS = (type(None), bool, int, float)


class OutputFormError(Exception):
    """An output is neither a tensor nor a container of tensors.

    Attributes:
        value: what it is.
        place: where it was found, by keys joined with dots; empty for the whole.
    """

    def __init__(self, value: Any, place: str):
        super().__init__(place)
        self.value = value
        self.place = place


@dataclasses.dataclass(frozen=True)
class Form:
    """One node of the tree: a tensor, a plain value such as None, or a container.

    Attributes:
        kind: ``"map"``, ``"value"``, ``"tuple"``, ``"list"``, ``"dict"``, ``"fields"`` (a
            NamedTuple or a dataclass).
        keys: of a container's parts: indices, the keys of a dict, the names of fields.
        parts: the forms of a container's parts.
        value: the plain value, or the name of the class with fields.
        cls: the class with fields; None after loading, when a NamedTuple of its name stands for it.
    """

    kind: str
    keys: tuple[Any, ...] = ()
    parts: tuple[Form, ...] = ()
    value: Any = None
    cls: type | None = dataclasses.field(default=None, compare=False)

    @property
    def is_tensor(self) -> bool:
        return self.kind == "map"

    def names(self, prefix: str = "") -> list[str]:
        """The tensors' names, keys joined with dots: ``"age"``, ``"scores.0"``; ``""`` of one."""
        if self.kind == "map":
            return [prefix]
        pairs = zip(self.keys, self.parts)
        return [n for key, part in pairs for n in part.names(f"{prefix}.{key}".lstrip("."))]

    def filled(self, values: Sequence[Any], records: bool = True) -> Any:
        """The containers with these values in place of the tensors.

        Args:
            records: give dataclasses as such; torch's exporters know NamedTuples only.
        """
        return self._filled(iter(values), records)

    def _filled(self, values: Iterator[Any], records: bool) -> Any:
        if self.kind == "map":
            return next(values)
        if self.kind == "value":
            return self.value
        parts = [part._filled(values, records) for part in self.parts]
        if self.kind == "dict":
            return dict(zip(self.keys, parts))
        if self.kind == "fields":
            cls = self.cls
            if cls is None or (dataclasses.is_dataclass(cls) and not records):
                cls = _named_tuple(self.value, self.keys)
            return cls(**dict(zip(self.keys, parts)))
        return tuple(parts) if self.kind == "tuple" else parts

    def to_data(self) -> Any:
        """The form as JSON holds it."""
        if self.kind in ("map", "value"):
            return {self.kind: self.value}
        parts = [[key, part.to_data()] for key, part in zip(self.keys, self.parts)]
        return {self.kind: parts, **({"name": self.value} if self.kind == "fields" else {})}


TENSOR = Form("map")


def _named_tuple(name: str, fields: Sequence[str]) -> Any:
    return namedtuple(name, fields)  # type: ignore[misc] # names that only a file knows


def tuple_of(count: int) -> Form:
    """The form of a tuple of tensors."""
    return Form("tuple", tuple(range(count)), (TENSOR,) * count)


def flattened(value: Any, place: str = "") -> tuple[list[Tensor], Form]:
    """The tensors that a model returns, in order, and the form in which it returns them.

    Raises:
        OutputFormError: if it returns something else too.
    """
    if isinstance(value, Tensor):
        return [value], TENSOR
    # a number that was computed from the size of the features is another one at another size
    if isinstance(value, _SCALARS) and not isinstance(value, FeatureSize):
        return [], Form("value", value=value)
    kind, items, name, cls = _parts_of(value, place)
    tensors: list[Tensor] = []
    forms = []
    for key, part in items:
        found, form = flattened(part, f"{place}.{key}".lstrip("."))
        tensors += found
        forms.append(form)
    return tensors, Form(kind, tuple(key for key, _ in items), tuple(forms), name, cls)


def _parts_of(value: Any, place: str) -> tuple[str, list[tuple[Any, Any]], str | None, type | None]:
    cls = type(value)
    if dataclasses.is_dataclass(cls):  # before dicts: the outputs of transformers are both
        fields = [f.name for f in dataclasses.fields(cls) if f.init]
        return "fields", [(n, getattr(value, n)) for n in fields], cls.__name__, cls
    if isinstance(value, tuple) and hasattr(cls, "_fields"):
        return "fields", list(zip(cls._fields, value)), cls.__name__, cls
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        return "dict", list(value.items()), None, None
    if isinstance(value, (tuple, list)):
        return "tuple" if isinstance(value, tuple) else "list", list(enumerate(value)), None, None
    raise OutputFormError(value, place)


def form_of_data(data: Any) -> Form:
    """What `Form.to_data` wrote.

    Raises:
        ValueError: if it is not of that kind.
    """
    kind = next((k for k in data if k != "name"), None) if isinstance(data, dict) else None
    content: Any = data[kind] if kind is not None else None
    if kind == "map":
        return TENSOR
    if kind == "value" and isinstance(content, _SCALARS):
        return Form("value", value=content)
    pairs = isinstance(content, list) and all(isinstance(p, list) and len(p) == 2 for p in content)
    if kind not in ("tuple", "list", "dict", "fields") or not pairs:
        raise ValueError(f"no form of outputs: {data!r}")
    keys = tuple(key for key, _ in content)
    name = data.get("name")
    if not all(isinstance(key, (str, int)) for key in keys):
        raise ValueError(f"keys {keys!r} are no strings and integers")
    if kind == "fields":
        _named_tuple(str(name), tuple(map(str, keys)))  # raises ValueError where Python has none
    return Form(kind, keys, tuple(form_of_data(part) for _, part in content), name)
