"""torchvision's classifiers: with the weights it publishes, or with those of a checkpoint."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fcvgg.conversion import check_convertible
from fcvgg.errors import LoadError, one_line
from fcvgg.images.pipelines import given_preprocess
from fcvgg.sources import checkpoints


def read(name: str, weights: Any, headless: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """A torchvision classifier with downloaded weights, those of a checkpoint, or random ones.

    `headless` is as for `read_checkpoint`.

    Raises:
        LoadError: if there is no such model, or its weights cannot be had.
        ConversionError: if it cannot be converted, where its weights would have to be downloaded.
    """
    check_name(name)
    if str(weights).endswith(checkpoints.SUFFIXES):
        return read_checkpoint(Path(weights), name, headless=headless)
    if weights is None:
        return _built(name), _settings_of(_published_weights(name))
    try:
        entry = torchvision.models.get_model_weights(name)[str(weights).split(".")[-1]]
    except KeyError as error:
        names = [w.name for w in torchvision.models.get_model_weights(name)]
        raise LoadError(
            f"weights must be {', '.join(names)}, DEFAULT or the path of a checkpoint "
            f"({', '.join(checkpoints.SUFFIXES)}) for {name}, got {str(weights)!r}"
        ) from error
    if not _is_downloaded(entry.url):
        check_convertible(
            checkpoints.without_values(_built, name=name), _settings_of(entry)["input_size"]
        )
    try:
        model = torchvision.models.get_model(name, weights=entry, progress=True)
    except (OSError, RuntimeError) as error:
        raise LoadError(
            f"the weights {entry} could not be downloaded ({one_line(error)}); download "
            f"{entry.url} elsewhere and pass weights=PATH (--weights PATH), or use the demo model"
        ) from error
    return model.eval(), _settings_of(entry)


def read_checkpoint(
    path: Path, arch: str | None, weights: str | Path | None = None, headless: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """A torchvision classifier with the parameters of a file, which tells its number of classes.

    Args:
        path: the file.
        arch: the architecture's name.
        weights: which of several states, as for `checkpoints.state_of`.
        headless: take a file without fully connected layers, which then are random.

    Raises:
        LoadError: if the file is absent or broken, or does not fit the architecture.
    """
    if arch is None:
        checkpoints.read_state(path)
        raise LoadError(
            f"{path} holds parameters only; pass arch=, a torchvision name such as 'vgg16', your "
            "own nn.Module or a function that makes it"
        )
    check_name(arch)
    bare = checkpoints.without_values(_built, name=arch)
    head, layer = [
        (name, module)
        for name, module in bare.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ][-1]
    entries = checkpoints.read_entries(path)
    if headless:
        state = checkpoints.read_state(path, entries)
        if not any(name.endswith(f"{layer}.weight") for name in state for layer in _linear(bare)):
            return _with_random_head(state, arch, str(path))
    place = checkpoints.state_of(path, bare, head, weights, entries)
    classes = checkpoints.classes_in(place.state, head, layer.weight, arch)
    model = checkpoints.built_with(place.state, _built, str(path), name=arch, num_classes=classes)
    settings = _settings_of(_published_weights(arch))
    if settings.get("categories") and len(settings["categories"]) != classes:
        del settings["categories"]
    return model, {**settings, "found": place.described()}


def _linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _with_random_head(
    state: dict[str, Tensor], arch: str, origin: str
) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier with the features of a file, also of one that holds ``model.features`` alone."""
    model = _built(arch)
    own = model.state_dict()
    if not state.keys() & own.keys():
        state = {f"features.{name}": tensor for name, tensor in state.items()}
    layers = [f"{name}.{kind}" for name in _linear(model) for kind in ("weight", "bias")]
    checkpoints.load_into(model, {**{name: own[name] for name in layers}, **state}, origin)
    settings = _settings_of(_published_weights(arch))
    return model, {**settings, "categories": None, "headless": True}


def _built(name: str, **options: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", True)
    return torchvision.models.get_model(name, weights=None, **options).eval()  # type: ignore[no-any-return]


def _is_downloaded(url: str) -> bool:
    """Whether torch.hub has a file already, in its cache."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file()


def _published_weights(name: str) -> Any:
    return torchvision.models.get_model_weights(name)["DEFAULT"]


def _settings_of(weights: Any) -> dict[str, Any]:
    """Preprocessing, categories and native size of torchvision's published weights.

    The resize and crop of classification are kept apart: a dense network takes the whole image.
    """
    transforms = weights.transforms()
    return {
        "preprocess": given_preprocess(transforms, 3),
        "categories": weights.meta["categories"],
        "input_size": transforms.crop_size[0],
    }


def check_name(name: str) -> None:
    """Refuse a name that no classifier of torchvision's has.

    Raises:
        LoadError: listing the near ones.
    """
    known = names()
    if name not in known and Path(name).is_file():
        remedy = "save its parameters with torch.save(model.state_dict(), path)"
        if name.endswith(".pt2"):
            remedy = "save torch.export.load(path).state_dict with torch.save, or the model as ONNX"
        raise LoadError(
            f"{name} must be a file .onnx, .keras or .h5, or a checkpoint "
            f"({', '.join(checkpoints.SUFFIXES)}) with arch=; {remedy}"
        )
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "demo"], 4, 0.5)
        raise LoadError(
            f"there is no model {name!r}; expected 'demo', a torchvision name"
            f"{' (near: ' + ', '.join(near) + ')' if near else ''} or timm:NAME, the folder of a "
            f"bundle, a file .onnx, .keras or .h5, or a checkpoint "
            f"({', '.join(checkpoints.SUFFIXES)}) with arch="
        )


def names() -> list[str]:
    """The names of torchvision's classifiers."""
    return torchvision.models.list_models(module=torchvision.models)
