"""`load`: a converted network from a name or a file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fcvgg import checkpoints, demo
from fcvgg.bundle import decoded_preprocess, read_bundle
from fcvgg.capture import one_line
from fcvgg.conversion import convert
from fcvgg.errors import LoadError
from fcvgg.network import FullyConvolutional
from fcvgg.preprocessing import Preprocess
from fcvgg.sources import keras_file, onnx_file, timm_model
from fcvgg.verification import Equivalence

DEFAULT_WEIGHTS = "DEFAULT"


def load(
    source: str | Path,
    *,
    arch: str | None = None,
    weights: str | Path | None = DEFAULT_WEIGHTS,
    preprocess: Preprocess | None = None,
    categories: Sequence[str] | None = None,
    input_size: int | Iterable[int] | None = None,
    **options: Any,
) -> FullyConvolutional:
    """A verified fully convolutional network from a name or a file.

    Args:
        source: ``"demo"``, the small face detector that the package ships; a torchvision name such
            as ``"vgg16"``; ``"timm:NAME"``; an ``.onnx`` file; a Keras file ``.keras`` or ``.h5``;
            a bundle that ``net.save`` wrote; or a checkpoint ``.pt``, ``.pth`` or
            ``.safetensors``, with `arch`.
        arch: the torchvision name of a checkpoint's architecture. The number of classes is read
            from the file. ``"vgg16"`` or ``"vgg19"`` for Keras weights whose layers have names of
            their own.
        weights: for a name: ``"DEFAULT"`` or another name of torchvision's weights, which it
            downloads; the path of a checkpoint; or None for random weights.
        preprocess: how images become input; the weights' own when None.
        categories: the class names; the weights' own when None.
        input_size: the native size; the weights' own when None.
        options: as for `fcvgg.convert`.

    Raises:
        LoadError: if it cannot be found, read or does not fit.
        MissingExtraError: if it takes an optional package that is not installed.
        ConversionError: if the model cannot be converted.
    """
    name = str(source)
    if name not in _names() and Path(source).is_dir():
        unused = {"input_size": input_size, **options}
        return _from_bundle(Path(source), preprocess, categories, unused)
    if arch is not None and not name.endswith((*checkpoints.SUFFIXES, *keras_file.SUFFIXES)):
        raise LoadError(f"arch={arch!r} goes with a checkpoint, got {name!r}; pass one of the two")
    own_weights = (*checkpoints.SUFFIXES, onnx_file.SUFFIX, *keras_file.SUFFIXES)
    if (name == "demo" or name.endswith(own_weights)) and weights not in (None, DEFAULT_WEIGHTS):
        raise LoadError(f"{name!r} comes with its weights, got weights={str(weights)!r}; pass none")
    model: nn.Module
    if name == "demo":
        model, found = demo.demo_model(), _demo_settings()
    elif name.endswith(checkpoints.SUFFIXES):
        model, found = _from_checkpoint(Path(source), arch)
    elif name.startswith(timm_model.PREFIX):
        model, found = timm_model.read(name.removeprefix(timm_model.PREFIX), weights)
    elif name.endswith(onnx_file.SUFFIX):
        model, found = onnx_file.read(name, input_size, options.get("verify", True))
    elif name.endswith(keras_file.SUFFIXES):
        model, found = keras_file.read(name, arch)
    elif weights is None or not str(weights).endswith(checkpoints.SUFFIXES):
        model, found = _from_torchvision(name, weights)
    else:
        _check_name(name)
        model, found = _from_checkpoint(Path(weights), name)
    settings = {"preprocess": preprocess, "categories": categories, "input_size": input_size}
    found.update({key: value for key, value in settings.items() if value is not None})
    return convert(model, **{**found, **options})


def _from_bundle(
    path: Path,
    preprocess: Preprocess | None,
    categories: Sequence[str] | None,
    unused: dict[str, Any],
) -> FullyConvolutional:
    """The network of a bundle, as it was saved: nothing is converted, and the report is kept."""
    given = [name for name, value in unused.items() if value is not None]
    if given:
        raise LoadError(
            f"{path} is a converted network, to which {', '.join(given)} cannot be applied; "
            "convert its source model anew"
        )
    program, saved = read_bundle(path)
    net = FullyConvolutional(
        program,
        input_size=tuple(saved["input_size"]),
        preprocess=preprocess or decoded_preprocess(saved["preprocess"]),
        categories=categories or saved["categories"],
        activation=saved["activation"],
        source=saved["source"],
    )
    if saved["equivalence"] is not None:
        report = {**saved["equivalence"], "input_size": tuple(saved["input_size"])}
        net.equivalence = Equivalence(**report)
    return net


def _demo_settings() -> dict[str, Any]:
    return {
        "preprocess": Preprocess(demo.MEAN, demo.STD),
        "categories": demo.CATEGORIES,
        "input_size": demo.WINDOW,
    }


def _from_torchvision(name: str, weights: Any) -> tuple[nn.Module, dict[str, Any]]:
    _check_name(name)
    if weights is None:
        return _built(name), _settings_of(_published_weights(name))
    try:
        entry = torchvision.models.get_model_weights(name)[str(weights).split(".")[-1]]
    except KeyError as error:
        names = [w.name for w in torchvision.models.get_model_weights(name)]
        raise LoadError(
            f"{name} has no weights {str(weights)!r}; expected {', '.join(names)}, DEFAULT or the "
            f"path of a checkpoint ({', '.join(checkpoints.SUFFIXES)})"
        ) from error
    try:
        model = torchvision.models.get_model(name, weights=entry, progress=True)
    except (OSError, RuntimeError) as error:
        raise LoadError(
            f"the weights {entry} could not be downloaded ({one_line(error)}); download "
            f"{entry.url} elsewhere and pass weights=PATH (--weights PATH), or use the demo model"
        ) from error
    return model.eval(), _settings_of(entry)


def _from_checkpoint(path: Path, arch: str | None) -> tuple[nn.Module, dict[str, Any]]:
    state = checkpoints.read_state(path)
    if arch is None:
        raise LoadError(
            f"{path} holds parameters only; pass arch=, its architecture's name such as 'vgg16'"
        )
    _check_name(arch)
    classes = _classes_in(state, arch)
    model = _built(arch, num_classes=classes)
    checkpoints.load_into(model, state, str(path))
    settings = _settings_of(_published_weights(arch))
    if settings.get("categories") and len(settings["categories"]) != classes:
        del settings["categories"]
    return model.eval(), settings


def _built(name: str, **options: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", True)
    return torchvision.models.get_model(name, weights=None, **options).eval()  # type: ignore[no-any-return]


def _classes_in(state: dict[str, Tensor], arch: str) -> int:
    """The number of classes: the outputs of the architecture's last layer, in this checkpoint."""
    with torch.device("meta"):
        names = [
            name
            for name, module in _built(arch).named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        ]
    weight = state.get(f"{names[-1]}.weight")
    if weight is None:
        raise LoadError(
            f"the checkpoint does not fit {arch}: it has no {names[-1]}.weight, the last layer; "
            f"it has {', '.join(list(state)[:4])}, ..."
        )
    return weight.shape[0]


def _published_weights(name: str) -> Any:
    return torchvision.models.get_model_weights(name)["DEFAULT"]


def _settings_of(weights: Any) -> dict[str, Any]:
    """Preprocessing, categories and native size of torchvision's published weights.

    The resize and crop of classification are left out: a dense network takes the whole image.
    """
    transforms = weights.transforms()
    return {
        "preprocess": Preprocess(tuple(transforms.mean), tuple(transforms.std)),
        "categories": weights.meta["categories"],
        "input_size": transforms.crop_size[0],
    }


def _check_name(name: str) -> None:
    known = _names()
    if name not in known[1:]:
        near = difflib.get_close_matches(name, known, 4, 0.5)
        raise LoadError(
            f"there is no model {name!r}; expected 'demo', a torchvision name"
            f"{' (near: ' + ', '.join(near) + ')' if near else ''} or timm:NAME, a file .onnx, "
            f".keras or .h5, or a checkpoint ({', '.join(checkpoints.SUFFIXES)}) with arch="
        )


def _names() -> list[str]:
    return ["demo", *torchvision.models.list_models(module=torchvision.models)]
