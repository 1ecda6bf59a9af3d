"""The files of a training run: written atomically, and read only by the run that wrote them."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fcvgg.errors import FcvggError, LoadError, TrainingError, one_line
from fcvgg.support.atomic import atomic_file, checked_folder
from fcvgg.training.settings import Settings

BEST, LAST, HISTORY = "best.ckpt", "last.ckpt", "history.csv"
RUN_KEY = "fcvgg_run"
"""The key in a checkpoint under which the run is described that it belongs to."""


def check_new(folder: Path, names: Iterable[str], resume: bool) -> None:
    """Refuse to write over another run.

    Raises:
        TrainingError: if the folder has one of the names, and the run is not to be resumed.
        ArgumentError: if the folder is named like a file.
    """
    checked_folder(folder, "folder")
    found = next((name for name in names if (folder / name).exists()), None)
    if found is not None and not resume:
        raise TrainingError(
            f"{folder} already holds a run ({found}); resume it, or choose another folder"
        )


def describe_run(identity: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What run this is, as a checkpoint gives it back, where tuples have become lists."""
    plain = {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in identity.items()}
    return {"identity": plain, "settings": settings.fixed}


def read_run(folder: Path, run: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """The last checkpoint of a run in its folder, or None if there is none.

    Raises:
        TrainingError: if there is one, and the run is not to be resumed.
        LoadError: if it belongs to another run, or is broken.
    """
    last = folder / LAST
    if not last.exists():
        return None
    check_new(folder, (LAST,), resume)
    content = read_checkpoint(last)
    found = content.get(RUN_KEY)
    if not isinstance(found, dict):
        raise LoadError(f"{last} does not hold a training run of fcvgg; choose another folder")
    for kind in ("identity", "settings"):
        for name, value in run[kind].items():
            was = found[kind].get(name)
            if was != value:
                raise LoadError(
                    f"{last} belongs to another run: its {name.replace('_', ' ')} is {was!r}, not "
                    f"{value!r}; resume with the same, or choose another folder"
                )
    return content


def check_fits(content: Mapping[str, Any], model: nn.Module, path: Path) -> None:
    """Refuse a checkpoint of weights alone, or of a network with other layers.

    Raises:
        LoadError: if no run can go on from it, or a parameter is missing or has another shape.
    """
    if "callbacks" not in content:
        raise LoadError(f"{path} holds weights only, from which no run can go on; restore {LAST}")
    saved, own = (
        {name: tuple(tensor.shape) for name, tensor in state.items()}
        for state in (content["state_dict"], model.state_dict())
    )
    for name in {**saved, **own}:
        was, here = saved.get(name, "absent"), own.get(name, "absent")
        if was != here:
            raise LoadError(
                f"{path} does not fit the network: {name} is {was} there and {here} here; resume "
                "with the same network"
            )


def write_checkpoint(checkpoint: Any, path: Path) -> None:
    """Write what torch.save takes, atomically.

    Raises:
        TrainingError: if the disk is full or the folder cannot be written.
        KeyboardInterrupt: on Ctrl-C.
    """
    kept = f"; the one before is kept, {path}" if path.exists() else ""
    try:
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError, FcvggError) as error:
        # torch's writer ends in a RuntimeError, whose context is the cause
        causes = list(_causes(error))
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            raise KeyboardInterrupt from error
        failed = next((cause for cause in causes if isinstance(cause, OSError)), None)
        reason = one_line(error) if failed is None else failed.strerror
        full = failed is not None and failed.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "the disk is full" if full else "it could not be written"
        raise TrainingError(
            f"cannot save the checkpoint {path}: {what} ({reason}){kept}; "
            "make room and resume the run"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote, on the CPU.

    Raises:
        LoadError: if there is no such file, or it is broken.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise LoadError(f"there is no checkpoint {path}") from error
    except Exception as error:  # a broken file can lead the unpickler anywhere
        raise LoadError(f"{path} is a broken checkpoint: {one_line(error)[:200]}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} must hold a checkpoint, got {type(content).__name__}")
    return content


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
