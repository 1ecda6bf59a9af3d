"""Reading checkpoints: the parameters of a model whose architecture is known elsewhere."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fcvgg.capture import one_line
from fcvgg.errors import LoadError

SUFFIXES = (".pt", ".pth", ".safetensors")

_NESTED = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_LISTED = 4


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt``, ``.pth`` or ``.safetensors`` file, by name.

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

    Raises:
        LoadError: naming what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
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
    model.load_state_dict(dict(state), strict=False)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path} is no readable safetensors file: {one_line(error)}") from error


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise LoadError(
                f"{path} holds pickled objects beside tensors, which would run code and are not "
                "opened; save model.state_dict() instead of the model"
            ) from error
        raise LoadError(f"{path} is no readable checkpoint: {one_line(error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise LoadError(f"{path} is no readable checkpoint: {one_line(error)}") from error


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
