"""Reading checkpoints: the parameters of a model whose architecture is known elsewhere."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fcvgg.errors import LoadError, one_line
from fcvgg.sources import inert, states
from fcvgg.support import untrusted

_log = logging.getLogger(__name__)

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pth.tar", ".safetensors")

Entries = dict[str, dict[str, Tensor]]
"""What a file holds: tensors by name, under the name of their entry."""

_REASON = 200

_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")
"""How torch's safe unpickler names an object other than a tensor."""


def read_state(path: str | Path, entries: Entries | None = None) -> dict[str, Tensor]:
    """The tensors of a file of torch.save or safetensors, by the names that it gives them.

    They are those of the largest entry that holds tensors. Pickled code is never run.

    Args:
        path: the file.
        entries: what `read_entries` gave of it, where it is read already.

    Raises:
        LoadError: if the file is absent, broken, holds code, or holds no tensors.
    """
    path = Path(path)
    state = max((entries or read_entries(path)).values(), key=len)
    _check_tensors(state, path)
    return state


def state_of(
    path: str | Path,
    bare: nn.Module,
    head: str,
    weights: str | Path | None = states.DEFAULT,
    entries: Entries | None = None,
) -> states.Place:
    """The state in a file that is an architecture's, without prefix; where it was found is said.

    Args:
        path: of a file of torch.save or safetensors; pickled code is never run.
        bare: the architecture, which may be without values.
        head: its last layer, of which any number of classes fits.
        weights: ``"ema"`` for averaged weights, or the name of one of several states.
        entries: as for `read_state`.

    Raises:
        LoadError: as `read_state`, or if several states fit, or none that was asked for. A state
            that is near is given, and whoever loads it says what is missing.
    """
    path = Path(path)
    choice = states.DEFAULT if weights is None else str(weights)
    held = entries or read_entries(path)
    place = states.find_state(held, bare.state_dict(), head, choice, str(path))
    _check_tensors(place.state, path)
    if place.described():
        _log.info("%s: the state is %s", path, place.described())
    return place


def read_entries(path: str | Path) -> Entries:
    """The entries of a file that hold tensors by name, or `LoadError` if it has none."""
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"there is no checkpoint {path}; expected a file in {', '.join(SUFFIXES)}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    entries = states.entries_of(content)
    if not entries:
        raise LoadError(
            f"{path} must hold tensors by name, or an entry 'state_dict' or 'model_state_dict' or "
            f"'model' of them, got {type(content).__name__}"
        )
    return entries


def classes_in(state: Mapping[str, Tensor], layer: str, own: Tensor, arch: str) -> int:
    """The outputs of an architecture's last layer, in a checkpoint.

    Args:
        state: of the checkpoint.
        layer: the last layer's name.
        own: its weight, for any number of classes.
        arch: the architecture's name.

    Raises:
        LoadError: if the checkpoint has no such weight, or one of another shape.
    """
    weight = state.get(f"{layer}.weight")
    if weight is None:
        raise LoadError(
            f"the checkpoint does not fit {arch}: it must hold {layer}.weight, of the last layer, "
            f"got {states.listed(list(state))}; fcvgg.finetune gives features alone a new head"
        )
    if (
        weight.ndim < 2
        or not len(weight)
        or states.as_linear(weight, own).shape[1:] != own.shape[1:]
    ):
        wanted = ("classes", *own.shape[1:])
        raise LoadError(
            f"the checkpoint does not fit {arch}: {layer}.weight must have the shape "
            f"({', '.join(map(str, wanted))}), got {tuple(weight.shape)}"
        )
    return len(weight)


def load_into(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a state into a model of the same architecture; nothing is loaded if it does not fit.

    A converted network's state fits its source too, if the source flattens in torch's order.

    Raises:
        LoadError: naming what is missing, unexpected or of another shape.
    """
    state = fitting(model, state, origin)
    model.load_state_dict(state, strict=False)


def built_with(
    state: Mapping[str, Tensor], build: Callable[..., nn.Module], origin: str, **options: Any
) -> nn.Module:
    """A model that `build` makes with a state; one that does not fit takes no memory.

    Raises:
        LoadError: as `load_into`.
    """
    fitting(without_values(build, **options), state, origin)
    model = build(**options).eval()
    load_into(model, state, origin)
    return model


def without_values(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A model to look at: on the meta device, if its builder can do without values."""
    try:
        with torch.device("meta"):
            return build(**options).eval()
    except (NotImplementedError, RuntimeError):  # a RegNet computes its widths in tensors
        return build(**options).eval()


def fitting(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """A state in the shapes of a model of the same architecture, which may be without values.

    Raises:
        LoadError: naming what is missing, unexpected, of another shape or of another kind.
    """
    own = model.state_dict()
    state = {name: states.as_linear(tensor, own.get(name)) for name, tensor in state.items()}
    missing = [name for name in own if name not in state and not name.endswith("batches_tracked")]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    misread = [
        f"{name} of {state[name].dtype} instead of {own[name].dtype}"
        for name in own
        if name in state and own[name].is_floating_point() and not state[name].is_floating_point()
    ]
    problems = [
        f"{len(names)} {what}: {states.listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("of another kind", misread),
        )
        if names
    ]
    if problems:
        raise LoadError(
            f"{origin} does not fit {type(model).__name__} ({'; '.join(problems)}); "
            "check the architecture's name"
        )
    return state


def _check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not plain arrays, or that take more memory than the file holds."""
    untrusted.check_count(len(state), f"{path}: the number of tensors", 4 * untrusted.MOST_NODES)
    claimed = 0
    for name, tensor in state.items():
        kinds = {
            "quantised": tensor.is_quantized,
            "without values": tensor.is_meta,
            "nested": tensor.is_nested,
            "sparse": tensor.layout != torch.strided,
            f"of {tensor.dtype}": tensor.is_complex(),
        }
        found = [kind for kind, holds in kinds.items() if holds]
        if found:
            raise LoadError(
                f"{path} must hold plain arrays of real numbers, got {name}, which is "
                f"{' and '.join(found)}; save the dense, dequantised values"
            )
        claimed += tensor.numel() * tensor.element_size()
    untrusted.check_claim(claimed, path, "tensors")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # of safetensors, or of torch, for a dtype that it does not know
        raise LoadError(f"{path} cannot be read as safetensors: {one_line(error)}") from error


def _read_pickle(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(16)
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle of old
        what = f"one that begins with {start!r}" if start else "an empty one"
        raise LoadError(f"{path} must be a file of torch.save, got {what}; download it again")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                untrusted.check_members(archive, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, which broken files show
            with torch.serialization.safe_globals([*inert.SAFE_GLOBALS]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except LoadError:
        raise
    except Exception as error:  # a broken file can lead the unpickler anywhere
        raise LoadError(f"{path} {_complaint(error)}") from error


def _complaint(error: Exception) -> str:
    found = _FORBIDDEN.search(str(error))
    if found is not None:
        return (
            f"holds a Python object ({found[1]}) as well as tensors; opening it could run code, so "
            "it is refused; save model.state_dict() instead, and pass arch=, a torchvision name, "
            "your own nn.Module or a function that makes it"
        )
    if "TorchScript" in str(error):
        return (
            "holds a scripted model; save torch.jit.load(path).state_dict() with torch.save, and "
            "pass arch=, a torchvision name, your own nn.Module or a function that makes it"
        )
    if isinstance(error, pickle.UnpicklingError):
        return "is broken, or a pickle that torch.save did not write; save model.state_dict() again"
    reason = one_line(error).split(". ")[0].strip(" .")[:_REASON]
    return f"is a broken checkpoint: {type(error).__name__} ({reason})"
