"""The tensors of a network as a table of names, shapes and dtypes, for the file of a bundle.

The file must hold just the tensors that the table lists, so that none is missing, unknown, of
another kind, or in another order than the graph was made for.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fcvgg.errors import FcvggError, LoadError
from fcvgg.serialization.graph_data import is_plain_path

CONFIG = "config.json"
TENSORS = "model.safetensors"

_LISTED = 4

_OF_PARAMETERS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_OF_BUFFERS = (*_OF_PARAMETERS, torch.int64, torch.int32, torch.uint8, torch.bool)

_KINDS = ("parameter", "frozen", "buffer", "constant")


@dataclass(frozen=True)
class TensorEntry:
    """What a bundle says of one tensor.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        kind: a ``"parameter"``, a ``"frozen"`` one, a ``"buffer"``, or a ``"constant"``: a buffer
            outside of checkpoints, which belongs to the structure of the network.
        same_as: the name that the very tensor is kept under, if it has several.
        view_of: the tensor of another shape whose memory it is.
        crc32: of a constant's bytes, so that no other order of channels takes its place.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    same_as: str | None = None
    view_of: str | None = None
    crc32: int | None = None

    @property
    def twin(self) -> str | None:
        """The name in the file that the values are kept under, if it is another one."""
        return self.same_as or self.view_of

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        known = {k: v for k, v in asdict(self).items() if v is not None}
        return {**known, "dtype": _dtype_name(self.dtype), "shape": list(self.shape)}


def entry_of(name: str, data: Mapping[str, Any]) -> TensorEntry:
    """The entry of `TensorEntry.to_dict`."""
    check_path(name, LoadError)
    values = {**data, "shape": tuple(data["shape"]), "dtype": _DTYPES.get(data["dtype"])}
    entry = TensorEntry(**values)
    if entry.dtype is None or entry.kind not in _KINDS:
        raise LoadError(
            f"the tensor {name} in {CONFIG} must be one of {', '.join(_KINDS)} of a known dtype, "
            f"got {entry.kind!r} of {data['dtype']!r}"
        )
    kinds = _OF_PARAMETERS if entry.kind in ("parameter", "frozen") else _OF_BUFFERS
    if entry.dtype not in kinds:
        raise LoadError(
            f"the {entry.kind} {name} in {CONFIG} must be of {', '.join(map(_dtype_name, kinds))}, "
            f"got {data['dtype']}"
        )
    if any(type(n) is not int or n < 0 for n in entry.shape):
        raise LoadError(f"the shape of {name} in {CONFIG} must be sizes, got {entry.shape}")
    return entry


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES = {_dtype_name(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


def check_path(name: Any, error: type[FcvggError]) -> None:
    """Raise `error` if no layer or tensor of a bundle may have that name."""
    if not is_plain_path(name):
        raise error(
            f"a bundle cannot hold the name {name!r}: names must be letters, digits and _, joined "
            "by dots, without a leading __ and other than keywords; rename the layer in the source "
            "model"
        )


def _named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def describe_tensors(network: nn.Module) -> tuple[dict[str, TensorEntry], dict[str, Tensor]]:
    """Every name with what is said of it, and every tensor once, under its first name."""
    table: dict[str, TensorEntry] = {}
    tensors: dict[str, Tensor] = {}
    places: dict[int, str] = {}
    memory: dict[tuple[int, ...], str] = {}
    persistent = network.state_dict().keys()
    for name, tensor in _named_tensors(network):
        # a tensor is stored under its first name: by the object for calls of one layer, and by the
        # memory for one that another window reshapes
        kind = "buffer" if name in persistent else "constant"
        if isinstance(tensor, nn.Parameter):
            kind = "parameter" if tensor.requires_grad else "frozen"
        place = places.setdefault(id(tensor), name)
        same_as = place if place != name else None
        view_of = None
        if same_as is None and tensor.is_contiguous():
            first = memory.setdefault(_extent(tensor), name)
            view_of = first if first != name else None
        if same_as is None and view_of is None:
            tensors[name] = tensor.detach().cpu().contiguous()
        check = checksum(tensor) if kind == "constant" else None
        shape = tuple(tensor.shape)
        table[name] = TensorEntry(shape, tensor.dtype, kind, same_as, view_of, check)
    used: set[int] = set()
    for name, tensor in tensors.items():  # parts of one memory, which the file holds one by one
        if tensor.untyped_storage().data_ptr() in used:
            tensors[name] = tensor.clone()
        elif tensor.numel():
            used.add(tensor.untyped_storage().data_ptr())
    return table, tensors


def _extent(tensor: Tensor) -> tuple[int, ...]:
    if not tensor.numel():
        return (id(tensor),)
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel()


def checksum(tensor: Tensor) -> int:
    """The CRC-32 of a tensor's bytes, row by row."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return zlib.crc32(data.numpy().tobytes())


def checked_tensors(
    table: Mapping[str, TensorEntry], found: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a file under all their names, if they are just those of the table.

    Raises:
        LoadError: naming what is missing, unknown, of another shape or dtype, or changed.
    """
    kept = {name for name, entry in table.items() if entry.twin is None}
    _refuse("lacks", sorted(kept - found.keys()))
    _refuse(f"must hold the tensors in {CONFIG} alone, got", sorted(found.keys() - kept))
    tensors: dict[str, Tensor] = {}
    for name, entry in table.items():
        if entry.twin is None:
            tensor = found[name]
        elif entry.twin in kept:
            tensor = found[entry.twin]
            tensor = tensor if entry.same_as else tensor.view(entry.shape)
        else:
            raise LoadError(
                f"{name} in {CONFIG} must share a tensor that the file holds, got {entry.twin!r}"
            )
        if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
            raise LoadError(
                f"{name} in {TENSORS} must be {_dtype_name(entry.dtype)} of shape {entry.shape}, "
                f"got {_dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}"
            )
        # orders of channels fit each other in shape, so only their values tell them apart
        if entry.kind == "constant" and checksum(tensor) != entry.crc32:
            raise LoadError(f"{name} in {TENSORS} must hold the values that were saved, got others")
        tensors[name] = tensor
    return tensors


def _refuse(what: str, names: list[str]) -> None:
    if names:
        listed = ", ".join(map(repr, names[:_LISTED])).replace("'", "")
        more = ", ..." if len(names) > _LISTED else ""
        raise LoadError(f"{TENSORS} {what} {len(names)} tensors: {listed}{more}")


def check_declared(tree: nn.Module, table: Mapping[str, TensorEntry]) -> None:
    """Refuse a table that does not fit what the layers declare."""
    for name, tensor in _named_tensors(tree):
        entry = table.get(name)
        if entry is None:
            raise LoadError(f"{CONFIG} lacks the tensor {name} of its layer")
        if entry.shape != tensor.shape:
            raise LoadError(
                f"the tensor {name} in {CONFIG} must have shape {tuple(tensor.shape)} by its "
                f"layer, got {entry.shape}"
            )
        if isinstance(tensor, nn.Parameter) != (entry.kind in ("parameter", "frozen")):
            what = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise LoadError(f"the tensor {name} in {CONFIG} must be a {what}, got a {entry.kind}")


def fill(tree: nn.Module, table: Mapping[str, TensorEntry], tensors: Mapping[str, Tensor]) -> None:
    """Give the layers their tensors, and make places for those that no layer declares."""
    made: dict[str, nn.Parameter] = {}
    for name, entry in table.items():
        owner_name, _, child = name.rpartition(".")
        owner = owner_of(tree, owner_name)
        if entry.kind in ("buffer", "constant"):
            tensor = tensors[entry.same_as or name]
            owner.register_buffer(child, tensor, persistent=entry.kind == "buffer")
            continue
        place = entry.same_as or name
        if place not in made:
            made[place] = nn.Parameter(tensors[place], entry.kind == "parameter")
        owner.register_parameter(child, made[place])


def owner_of(tree: nn.Module, name: str) -> nn.Module:
    """The module of that path, with plain modules made on the way."""
    for child in filter(None, name.split(".")):
        if child not in tree._modules:
            tree.add_module(child, nn.Module())
        tree = tree.get_submodule(child)
    return tree
