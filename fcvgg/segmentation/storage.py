"""A dense network as a folder: a bundle of its backbone, its score layers, and its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fcvgg import untrusted
from fcvgg.errors import FcvggError, LoadError, one_line
from fcvgg.files import checked_folder, folder_written_whole
from fcvgg.loading import load
from fcvgg.preprocessing import decoded_preprocess, encoded_preprocess
from fcvgg.segmentation.backbone import giving_first
from fcvgg.serialization.bundle import write_bundle

if TYPE_CHECKING:
    from fcvgg.segmentation.network import FCN

CONFIG = "fcn.json"
SCORES = "scores.safetensors"
BACKBONE = "backbone"

_FORMAT = 1
_BACKBONE_PREFIX = "backbone."


def write_fcn(fcn: FCN, path: Path) -> Path:
    """Write the folder; one already there is replaced when the new one is whole.

    Files that somebody put into it, such as a README, stay.
    """
    checked_folder(path, "path")
    if path.exists() and not (path / CONFIG).is_file():
        raise FcvggError(f"{path} exists and is no folder of an FCN; choose another name")
    config = {
        "format": _FORMAT,
        "variant": fcn.variant,
        "num_classes": fcn.num_classes,
        "learn_upsampling": fcn.learn_upsampling,
        "categories": fcn.categories,
        "preprocess": encoded_preprocess(fcn.preprocess),
    }
    own = {k: v for k, v in fcn.state_dict().items() if not k.startswith(_BACKBONE_PREFIX)}
    try:
        with folder_written_whole(path, (CONFIG, SCORES, BACKBONE)) as folder:
            _write_backbone(fcn, folder / BACKBONE)
            save_file({k: v.contiguous() for k, v in own.items()}, folder / SCORES)
            (folder / SCORES).chmod(0o644)
            (folder / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n")
    except (SafetensorError, ValueError) as error:
        raise FcvggError(f"cannot write {path}: {one_line(error)}") from error
    return path


def _write_backbone(fcn: FCN, path: Path) -> None:
    backbone = fcn.backbone
    program = giving_first(backbone.program) if len(fcn.sources) > 1 else backbone.program
    settings = {
        "source": backbone.source,
        "input_size": list(backbone.input_size),
        "activation": backbone.activation,
        "categories": None,
        "preprocess": encoded_preprocess(backbone.preprocess),
        "equivalence": None,
    }
    write_bundle(path, program, settings)


def read_fcn(cls: type[FCN], path: Path) -> FCN:
    """The network of a folder that `write_fcn` wrote.

    Raises:
        LoadError: if it is none, or is broken.
    """
    try:
        data = untrusted.read_bytes(path / CONFIG, untrusted.CONFIG_BYTES, within=path)
        config = untrusted.parsed_json(data)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LoadError(f"{path} is no folder of an FCN: it holds no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path / CONFIG} is broken: {one_line(error)}") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise LoadError(f"{path / CONFIG} is not of format {_FORMAT}; upgrade fcvgg or save anew")
    if not (path / BACKBONE).is_dir():
        raise LoadError(f"{path} is broken: it has no folder {BACKBONE}")
    backbone = load(path / BACKBONE)
    try:
        untrusted.check_regular(path / SCORES, within=path)
        state = load_file(path / SCORES)
        count, variant, learned = _settings(config)
        if not any(count in tensor.shape for tensor in state.values()):
            raise LoadError(f"{CONFIG} has {count} classes, which no tensor of {SCORES} has")
        fcn = cls._of(backbone, count, variant, learned)
        fcn.categories = config["categories"]
        fcn.preprocess = decoded_preprocess(config["preprocess"])
        kept = {k: v for k, v in fcn.state_dict().items() if k.startswith(_BACKBONE_PREFIX)}
        fcn.load_state_dict({**kept, **state})
    except Exception as error:  # a description can be wrong in any way
        raise LoadError(f"{path} does not describe an FCN: {one_line(error)}") from error
    return fcn.eval()


def _settings(config: dict[str, Any]) -> tuple[int, str, bool]:
    count, variant, learned = (config[k] for k in ("num_classes", "variant", "learn_upsampling"))
    if type(count) is not int or count < 1 or type(learned) is not bool:
        raise LoadError(f"{CONFIG} has {count!r} classes and learn_upsampling {learned!r}")
    return count, variant, learned
