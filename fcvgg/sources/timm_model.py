"""timm's models by name, with timm's own weights and preprocessing."""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fcvgg.conversion import check_convertible
from fcvgg.errors import LoadError, one_line
from fcvgg.images.pipelines import given_preprocess
from fcvgg.images.preprocessing import INTERPOLATIONS
from fcvgg.serialization import hub
from fcvgg.sources import checkpoints
from fcvgg.support.extras import imported

PREFIX = "timm:"
HUB_PREFIXES = ("hf-hub:", "hf_hub:")
"""Before the names of models in repositories of the Hugging Face hub."""

EXTRA = "timm"
DEFAULT_WEIGHTS = "DEFAULT"

_LISTED = 4


def read(name: str, weights: str | Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """A timm model and its data config.

    Args:
        name: as in ``timm.list_models()``, with or without a pretrained tag (``vgg16.tv_in1k``), or
            ``"hf-hub:user/name"``.
        weights: ``"DEFAULT"`` for timm's own, which timm downloads, the path of a checkpoint, or
            None for random weights.

    Raises:
        LoadError: if there is no such model, or its weights cannot be had or do not fit.
        ConversionError: if timm's own weights are wanted for a model that cannot be converted.
        MissingExtraError: if timm is not installed.
    """
    timm = imported("timm", EXTRA)
    if name.startswith(HUB_PREFIXES):
        what = "a model of timm, which timm.models.push_to_hf_hub writes"
        with hub.explained(PREFIX + name, LoadError, what):
            hub.check_reachable(name.partition(":")[2])
            return _read(name, weights, timm)
    _check_name(name, timm)
    return _read(name, weights, timm)


def _read(name: str, weights: str | Path | None, timm: Any) -> tuple[nn.Module, dict[str, Any]]:
    if weights is None:
        model = timm.create_model(name, pretrained=False)
    elif Path(str(weights)).suffix in checkpoints.SUFFIXES:
        model = _from_checkpoint(name, Path(weights), timm)
    elif weights == DEFAULT_WEIGHTS:
        model = _pretrained(name, timm)
    else:
        raise LoadError(
            f"weights must be {DEFAULT_WEIGHTS}, None or the path of a checkpoint "
            f"({', '.join(checkpoints.SUFFIXES)}) for timm's {name}, got {str(weights)!r}; choose "
            "among timm's own by a tag in the name, such as timm:vgg16.tv_in1k"
        )
    return model.eval(), _settings(model, timm)


def _pretrained(name: str, timm: Any) -> nn.Module:
    _check_architecture(name, timm)
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # of timm, of the hub or of the network: many classes
        if name.startswith(HUB_PREFIXES):
            raise  # to be explained as an error of the hub
        raise LoadError(
            f"the weights of timm's {name} could not be downloaded ({one_line(error)}); pass "
            "weights=PATH (--weights PATH) of a checkpoint, or weights=None for random ones"
        ) from error


def _check_architecture(name: str, timm: Any) -> None:
    """Refuse what cannot be converted before its weights are downloaded."""
    model = checkpoints.without_values(partial(timm.create_model, name))
    if any(not parameter.is_meta for parameter in model.parameters()):
        return  # its builder needs values: convert will tell
    check_convertible(model, _settings(model, timm)["input_size"])


def _from_checkpoint(name: str, path: Path, timm: Any) -> nn.Module:
    build, options = partial(timm.create_model, name), dict[str, Any]()
    bare: Any = checkpoints.without_values(build)
    classifier = bare.pretrained_cfg.get("classifier")
    head = classifier if isinstance(classifier, str) else ""
    state = checkpoints.state_of(path, bare, head).state
    if f"{head}.weight" in state:
        own = bare.get_parameter(f"{head}.weight")
        options["num_classes"] = checkpoints.classes_in(state, head, own, name)
    return checkpoints.built_with(state, build, str(path), **options)


def _settings(model: nn.Module, timm: Any) -> dict[str, Any]:
    """timm's data config, of which resize and crop are kept apart from how images are read."""
    config = timm.data.resolve_model_data_config(model)
    if config["interpolation"] not in INTERPOLATIONS:
        config["interpolation"] = "bilinear"
    settings: dict[str, Any] = {
        "preprocess": given_preprocess(config, len(config["mean"])),
        "input_size": tuple(config["input_size"][1:]),
    }
    published: Any = model.pretrained_cfg
    names = published.get("label_names")
    subset = timm.data.infer_imagenet_subset(model)
    if names and len(names) == model.num_classes:
        described = published.get("label_descriptions") or {}
        settings["categories"] = tuple(str(described.get(label, label)) for label in names)
    elif subset:
        settings["categories"] = tuple(timm.data.ImageNetInfo(subset).label_descriptions())
    return settings


def _check_name(name: str, timm: Any) -> None:
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), _LISTED, 0.5)
    hint = f"near: {', '.join(near)}" if near else "timm.list_models() lists them"
    raise LoadError(f"timm has no model {name!r}; {hint}")
