"""The files of a saved network: a description in JSON, and tensors as safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fcvgg.errors import FcvggError, LoadError, one_line
from fcvgg.support import untrusted
from fcvgg.support.atomic import atomic_folder

_ALIGNMENT = 64
"""Bytes to whose multiples torch's own allocations are aligned."""

_LENGTH = struct.Struct("<Q")
"""The length of the header, before it."""

_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}
"""What safetensors calls the dtypes."""


@contextmanager
def saved_folder(path: Path, own: Iterable[str]) -> Iterator[Path]:
    """A temporary folder for files named `own`, which takes its place when the block ends.

    Raises:
        FcvggError: if it cannot be written.
    """
    try:
        with atomic_folder(path, own) as folder:
            yield folder
    except (SafetensorError, ValueError) as error:
        raise FcvggError(f"cannot write {path}: {one_line(error)}") from error


def write_description(path: Path, data: Mapping[str, Any]) -> None:
    """Write what `read_description` reads."""
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors in the format of safetensors, so that a mapped file is aligned.

    The package safetensors writes the same format, but with a header of any multiple of 8 bytes and
    in the order of names, so that torch could not use the mapped values where they lie.

    Raises:
        ValueError: if the format has no such dtype.
    """
    # values whose bytes do not end at a multiple come last, where they shift no others
    ordered = sorted(tensors.items(), key=lambda item: item[1].nbytes % _ALIGNMENT != 0)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be of a dtype of safetensors, got {tensor.dtype}")
        start, end = end, end + tensor.nbytes
        shape, offsets = list(tensor.shape), [start, end]
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(_LENGTH.size + len(header)) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(_LENGTH.pack(len(header)))
        file.write(header)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)


def read_description(path: Path, what: str) -> dict[str, Any]:
    """The description in a folder, which anyone may have changed.

    Args:
        what: what the folder holds, for messages.

    Raises:
        LoadError: if it is absent, broken or not an object.
    """
    try:
        data = untrusted.read_bytes(path, untrusted.CONFIG_BYTES, within=path.parent)
        description = untrusted.parsed_json(data, _refuse_constant)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LoadError(f"{path.parent} must be {what}, got none with {path.name}") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} is broken: {one_line(error)}") from error
    if not isinstance(description, dict):
        raise LoadError(f"{path} must hold an object, got {type(description).__name__}")
    return description


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"numbers must be finite in JSON, got {name}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, at addresses like those that torch allocates.

    Raises:
        LoadError: if it is absent, broken, or a link out of its folder.
    """
    try:
        untrusted.check_regular(path, within=path.parent)
        return {name: _aligned(tensor) for name, tensor in load_file(path).items()}
    except FileNotFoundError as error:
        raise LoadError(f"{path.parent} must hold {path.name}, got none") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path} is broken: {one_line(error)}") from error


def _aligned(tensor: Tensor) -> Tensor:
    # Files of the package safetensors are not aligned where they are mapped. For such values torch
    # may choose other kernels, whose sums differ in their last bits from the saved network's.
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
