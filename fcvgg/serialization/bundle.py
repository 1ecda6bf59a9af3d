"""Saving a converted network as data, and reading it back without running code from the file.

A bundle is a folder in the convention of the Hugging Face hub: ``model.safetensors`` holds every
tensor and ``config.json`` everything else, the rewritten graph included (`fcvgg.graph_data`). The
graph is a list of calls; what they may call is looked up in a fixed list of functions and among the
layers of torch and fcvgg, so a file can name operations but bring none. Module classes of the
user's own are loaded only where the user registered their rule in this process; whoever registers a
class lets bundles construct it with arguments of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fcvgg.errors import FcvggError, LoadError, PreprocessError, one_line
from fcvgg.geometry import Pair, checked_size
from fcvgg.images.preprocessing import Preprocess, decoded_preprocess
from fcvgg.results.equivalence import Equivalence
from fcvgg.rewriting.program import Program
from fcvgg.serialization.program_data import (
    checked_activation,
    describe_program,
    rebuilt_program,
)
from fcvgg.serialization.tensor_table import (
    CONFIG,
    TENSORS,
    check_path,
    checked_tensors,
    described_tensors,
    entry_of,
)
from fcvgg.support import untrusted
from fcvgg.support.atomic import checked_folder, folder_written_whole

_FORMAT = 2


# -- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a bundle says beside the program: how images come in and what the scores are."""

    source: str
    input_size: Pair
    activation: str
    categories: tuple[str, ...] | None
    preprocess: Preprocess | None
    equivalence: Equivalence | None


def _settings(config: Mapping[str, Any], classes: int) -> Settings:
    for field in fields(Settings):
        if field.name not in config:
            raise LoadError(f"{CONFIG} lacks {field.name!r}")
    source, names = config["source"], config["categories"]
    if not isinstance(source, str):
        raise LoadError(f"{CONFIG} has source {source!r}; expected a name")
    if names is not None and not (
        isinstance(names, list) and len(names) == classes and all(isinstance(n, str) for n in names)
    ):
        raise LoadError(f"{CONFIG} has no categories, one name for each of the {classes} classes")
    return Settings(
        source=source,
        input_size=_input_size(config["input_size"]),
        activation=checked_activation(config["activation"]),
        categories=None if names is None else tuple(names),
        preprocess=_checked_preprocess(config["preprocess"]),
        equivalence=_equivalence(config["equivalence"]),
    )


def _input_size(value: Any) -> Pair:
    try:
        return checked_size(value if isinstance(value, list) else ())
    except (FcvggError, TypeError) as error:
        raise LoadError(f"{CONFIG} has input_size {value!r}; expected [height, width]") from error


def _checked_preprocess(data: Any) -> Preprocess | None:
    try:
        return decoded_preprocess(data)
    except PreprocessError as error:
        raise LoadError(f"{CONFIG} has a preprocess that is none: {one_line(error)}") from error


def _equivalence(data: Any) -> Equivalence | None:
    """The report of the check against the source."""
    if data is None:
        return None
    names = (field.name for field in fields(Equivalence) if field.name != "other_modes")
    kinds: dict[str, Any] = {
        **dict.fromkeys(names, (int, float)),
        "passed": bool,
        "images": int,
        "input_size": list,
    }
    if not isinstance(data, dict) or data.keys() != kinds.keys():
        raise LoadError(f"{CONFIG} has no equivalence of {', '.join(kinds)}")
    for name, kind in kinds.items():
        if not isinstance(data[name], kind) or (isinstance(data[name], bool) and kind is not bool):
            raise LoadError(f"{CONFIG} has an equivalence whose {name} is {data[name]!r}")
    return Equivalence(**{**data, "input_size": _input_size(data["input_size"])})


# -- files ----------------------------------------------------------------------------------------


def write_bundle(
    path: Path, program: Program, settings: Mapping[str, Any], replaceable: bool = True
) -> None:
    """Write a bundle to a new folder; a bundle already there is replaced when the new one is whole.

    Raises:
        FcvggError: if `path` is something else than a bundle, has the ending of another format, or
            cannot be written.
    """
    checked_folder(path, "path", remedy=", or net.export for .onnx and .pt2")
    if path.exists() and not (replaceable and is_bundle(path)):
        raise FcvggError(f"{path} exists and is no bundle of fcvgg; choose another name")
    config = {"library_name": "fcvgg", "format": _FORMAT, **settings, **describe_program(program)}
    table, tensors = described_tensors(program.network)
    for name in (*config["layers"], *table):
        check_path(name, FcvggError)
    config["tensors"] = {name: entry.to_dict() for name, entry in table.items()}
    try:
        with folder_written_whole(path, (CONFIG, TENSORS)) as folder:
            save_file(tensors, folder / TENSORS, {"format": "pt"})
            (folder / TENSORS).chmod(0o644)
            (folder / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n")
    except (SafetensorError, ValueError) as error:
        raise FcvggError(f"cannot write {path}: {one_line(error)}") from error


def read_bundle(path: Path) -> tuple[Program, Settings]:
    """The program and the settings of a bundle.

    Raises:
        LoadError: if it is no bundle, is broken, or its tensors do not fit.
    """
    config = _read_config(path / CONFIG)
    try:
        untrusted.check_regular(path / TENSORS, within=path)
        tensors = load_file(path / TENSORS)
    except FileNotFoundError as error:
        raise LoadError(f"{path} holds no {TENSORS}; a bundle is {CONFIG} and {TENSORS}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path / TENSORS} is broken: {one_line(error)}") from error
    try:
        for part in ("graph", "layers", "records"):
            what = f"{path / CONFIG}: the number of {part!r} entries"
            untrusted.check_count(len(config[part]), what)
        what = f"{path / CONFIG}: the number of tensors"
        untrusted.check_count(len(config["tensors"]), what, 4 * untrusted.MOST_NODES)
        table = {name: entry_of(name, data) for name, data in config["tensors"].items()}
        program = rebuilt_program(config, table, checked_tensors(table, tensors))
        return program, _settings(config, program.classes[0])
    except LoadError:
        raise
    except Exception as error:  # a description can be wrong in any way
        reason = f"it lacks {error}" if type(error) is KeyError else repr(error)
        raise LoadError(f"{path / CONFIG} does not describe a network: {reason}") from error


def is_bundle(path: str | Path) -> bool:
    """Whether a path is a folder that `write_bundle` wrote."""
    try:
        data = untrusted.read_bytes(Path(path) / CONFIG, untrusted.CONFIG_BYTES)
        config = untrusted.parsed_json(data)
    except (LoadError, OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("library_name") == "fcvgg"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = untrusted.read_bytes(path, untrusted.CONFIG_BYTES, within=path.parent)
        config = untrusted.parsed_json(data, _no_number)
    except FileNotFoundError as error:
        raise LoadError(f"{path.parent} is no bundle: it holds no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} is broken: {one_line(error)}") from error
    if not isinstance(config, dict) or config.get("library_name") != "fcvgg":
        raise LoadError(f"{path} is not fcvgg's: expected library_name 'fcvgg'")
    if config.get("format") != _FORMAT:
        raise LoadError(
            f"{path} has format {config.get('format')!r}, and this version of fcvgg reads "
            f"{_FORMAT}; upgrade fcvgg, or save the network anew if the format is older"
        )
    return config


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
