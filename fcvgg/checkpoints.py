"""Reading checkpoints: the parameters of a model whose architecture is known elsewhere."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fcvgg.errors import LoadError, one_line

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pth.tar", ".safetensors")

_NESTED = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_LISTED = 4

_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")
"""How torch's safe unpickler names an object that is no tensor."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save or safetensors, by name.

    Entries that hold the state beside other things (``state_dict``, ``model``) are opened, prefixes
    of wrappers (``module.``) removed. Pickled code is never run.

    Raises:
        LoadError: if the file is absent, broken, holds code, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"there is no checkpoint {path}; expected a file in {', '.join(SUFFIXES)}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return _without_prefixes(_state_within(content, path))


def load_into(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a state into a model of the same architecture; nothing is loaded if it does not fit.

    A converted network's state fits its source too, if the source flattens in torch's order.

    Raises:
        LoadError: naming what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    state = {name: _as_linear(tensor, own.get(name)) for name, tensor in state.items()}
    missing = [name for name in own if name not in state and not name.endswith("batches_tracked")]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise LoadError(
            f"{origin} does not fit {type(model).__name__} ({'; '.join(problems)}); "
            "check the architecture's name"
        )
    model.load_state_dict(state, strict=False)


def _as_linear(tensor: Tensor, own: Tensor | None) -> Tensor:
    """A convolution's weight as the fully connected one that it was, if that is what fits."""
    fits = own is not None and own.ndim == 2 and tensor.ndim == 4
    return tensor.flatten(1) if fits else tensor


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path} is no readable safetensors file: {one_line(error)}") from error


def _read_pickle(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(16)
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle of old
        what = f"it begins with {start!r}" if start else "it is empty"
        raise LoadError(f"{path} is no file of torch.save: {what}; was it downloaded whole?")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, which broken files show
            with torch.serialization.safe_globals(_inert()):
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can lead the unpickler anywhere
        raise LoadError(f"{path} {_complaint(error)}") from error


def _inert() -> list[Any]:
    """What training scripts keep beside the state and what is plain data: numbers, options."""
    scalar = np.float64(0).__reduce__()[0]  # type: ignore[index]  # what unpickles a number
    kinds = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    return [scalar, np.dtype, *kinds, argparse.Namespace]


def _complaint(error: Exception) -> str:
    found = _FORBIDDEN.search(str(error))
    if found is not None:
        return (
            f"holds a Python object ({found[1]}) beside tensors; opening it could run code, so it "
            "is refused; save model.state_dict() instead"
        )
    if "TorchScript" in str(error):
        return "holds a scripted model; save model.state_dict() instead"
    if isinstance(error, pickle.UnpicklingError):
        return "is broken, or a pickle that torch.save did not write; save model.state_dict() anew"
    reason = one_line(error).split(". ")[0].strip(" .")
    return f"is a broken checkpoint: {type(error).__name__} ({reason})"


def _state_within(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        inner = next((content[k] for k in _NESTED if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            if tensors:
                return tensors
            break
        content = inner
    raise LoadError(
        f"{path} holds no state of a model: expected tensors by name, or an entry "
        f"{' or '.join(repr(name) for name in _NESTED[:3])}; got {type(content).__name__}"
    )


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES * 2:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
