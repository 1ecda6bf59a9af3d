"""Saving a converted network as data, and reading it back without running code from the file.

A bundle is a folder in the convention of the Hugging Face hub: ``model.safetensors`` holds every
tensor and ``config.json`` everything else, the rewritten graph included; ``README.md`` is the model
card, which is not read. The graph is a list of
calls (`fcvgg.serialization.graph_data`); what they may call is looked up in a fixed list of
functions and among the layers of torch and fcvgg, so a file can name operations but bring none.
Module classes of the user's own are loaded only where the user registered their rule in this
process; whoever registers a class lets bundles construct it with arguments of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fcvgg.errors import FcvggError, LoadError, PreprocessError, one_line
from fcvgg.geometry import Pair, checked_size
from fcvgg.images.preprocessing import Preprocess, decoded_preprocess
from fcvgg.results.equivalence import Equivalence
from fcvgg.rewriting.program import Program
from fcvgg.serialization.model_card import CARD, UNKNOWN_LICENSE, is_own_card, model_card
from fcvgg.serialization.program_data import (
    checked_activation,
    describe_program,
    rebuild_program,
)
from fcvgg.serialization.saved_files import (
    read_description,
    read_tensors,
    saved_folder,
    write_description,
    write_tensors,
)
from fcvgg.serialization.tensor_table import (
    CONFIG,
    TENSORS,
    check_path,
    checked_tensors,
    describe_tensors,
    entry_of,
)
from fcvgg.support import untrusted
from fcvgg.support.atomic import checked_folder

_FORMAT = 2


# -- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a bundle says besides the program: how images come in and what the scores are."""

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
        raise LoadError(f"source must be a name in {CONFIG}, got {source!r}")
    if names is not None and not (
        isinstance(names, list) and len(names) == classes and all(isinstance(n, str) for n in names)
    ):
        raise LoadError(f"categories must be None or {classes} names in {CONFIG}, got {names!r}")
    return Settings(
        source=source,
        input_size=_input_size(config["input_size"]),
        activation=checked_activation(config["activation"]),
        categories=None if names is None else tuple(names),
        preprocess=_checked_preprocess(config["preprocess"]),
        equivalence=_equivalence(config["equivalence"]),
    )


def _input_size(value: Any) -> Pair:
    if not isinstance(value, list):
        raise LoadError(f"input_size must be [h, w] in {CONFIG}, got {value!r}")
    return checked_size(value, "input_size", LoadError)


def _checked_preprocess(data: Any) -> Preprocess | None:
    try:
        return decoded_preprocess(data)
    except PreprocessError as error:
        raise LoadError(f"the preprocess in {CONFIG} is broken: {one_line(error)}") from error


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
        raise LoadError(f"equivalence must hold {', '.join(kinds)} in {CONFIG}, got {data!r}")
    for name, kind in kinds.items():
        if not isinstance(data[name], kind) or (isinstance(data[name], bool) and kind is not bool):
            raise LoadError(f"equivalence.{name} must be of {kind} in {CONFIG}, got {data[name]!r}")
    return Equivalence(**{**data, "input_size": _input_size(data["input_size"])})


# -- files ----------------------------------------------------------------------------------------


def write_bundle(
    path: Path,
    program: Program,
    settings: Mapping[str, Any],
    replaceable: bool = True,
    license: str = UNKNOWN_LICENSE,
) -> None:
    """Write a bundle to a new folder; a bundle already there is replaced when the new one is whole.

    A model card of the user's own, that lies in it, stays.

    Raises:
        FcvggError: if `path` is something else than a bundle, has the ending of another format, or
            cannot be written.
    """
    checked_folder(path, "path", remedy=", or net.export for .onnx and .pt2")
    if path.exists() and not (replaceable and is_bundle(path)):
        raise FcvggError(f"{path} exists and is not a bundle of fcvgg; choose another name")
    config = {"library_name": "fcvgg", "format": _FORMAT, **settings, **describe_program(program)}
    table, tensors = describe_tensors(program.network)
    for name in (*config["layers"], *table):
        check_path(name, FcvggError)
    config["tensors"] = {name: entry.to_dict() for name, entry in table.items()}
    own = (CONFIG, TENSORS, *([CARD] if is_own_card(path / CARD) else []))
    with saved_folder(path, own) as folder:
        write_tensors(folder / TENSORS, tensors)
        write_description(folder / CONFIG, config)
        card = model_card(program.geometry, program.classes[0], settings, license)
        (folder / CARD).write_text(card)


def read_bundle(path: Path) -> tuple[Program, Settings]:
    """The program and the settings of a bundle.

    Raises:
        LoadError: if it is not a bundle, is broken, or its tensors do not fit.
    """
    config = _read_config(path / CONFIG)
    tensors = read_tensors(path / TENSORS)
    try:
        for part in ("graph", "layers", "records"):
            what = f"{path / CONFIG}: the number of {part!r} entries"
            untrusted.check_count(len(config[part]), what)
        what = f"{path / CONFIG}: the number of tensors"
        untrusted.check_count(len(config["tensors"]), what, 4 * untrusted.MOST_NODES)
        table = {name: entry_of(name, data) for name, data in config["tensors"].items()}
        program = rebuild_program(config, table, checked_tensors(table, tensors))
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
    config = read_description(path, "a bundle of fcvgg")
    library = config.get("library_name")
    if library != "fcvgg":
        raise LoadError(f"{path} must have library_name 'fcvgg', got {library!r}")
    if config.get("format") != _FORMAT:
        raise LoadError(
            f"{path} must have format {_FORMAT}, got {config.get('format')!r}; upgrade fcvgg, or "
            "save the network again if the format is older"
        )
    return config
