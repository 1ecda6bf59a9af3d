"""`load`: a converted network from a name or a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from fcvgg import demo
from fcvgg.conversion import convert
from fcvgg.errors import ArgumentError, GeometryError, LoadError
from fcvgg.geometry import checked_size
from fcvgg.images.pipelines import check_preprocess
from fcvgg.images.preprocessing import Preprocess, PreprocessLike
from fcvgg.network import FullyConvolutional
from fcvgg.rewriting.capture import input_channels
from fcvgg.serialization import hub
from fcvgg.serialization.bundle import read_bundle
from fcvgg.serialization.shape_budget import ShapeBudget, check_affordable, largest_verified
from fcvgg.sources import checkpoints, keras_file, onnx_file, timm_model, torchvision_model
from fcvgg.verification import check

DEFAULT_WEIGHTS = "DEFAULT"


def load(
    source: str | Path,
    *,
    arch: str | None = None,
    weights: str | Path | None = DEFAULT_WEIGHTS,
    preprocess: PreprocessLike | None = None,
    categories: Sequence[str] | str | os.PathLike[str] | None = None,
    input_size: int | Iterable[int] | None = None,
    **options: Any,
) -> FullyConvolutional:
    """A verified fully convolutional network from a name or a file.

    Args:
        source: ``"demo"``, the small face detector that the package ships; a torchvision name such
            as ``"vgg16"``; ``"timm:NAME"``, also ``"timm:hf-hub:user/name"``; an ``.onnx`` file; a
            Keras file ``.keras`` or ``.h5``; a bundle that ``net.save`` wrote, or
            ``"hf:user/name"`` or ``"hf:user/name@revision"`` for one that ``net.push_to_hub``
            wrote; or a checkpoint ``.pt``, ``.pth`` or ``.safetensors``, with `arch`.
        arch: the torchvision name of a checkpoint's architecture. The number of classes is read
            from the file. ``"vgg16"`` or ``"vgg19"`` for Keras weights whose layers have names of
            their own.
        weights: for a name: ``"DEFAULT"`` or another name of torchvision's weights, which it
            downloads; the path of a checkpoint; or None for random weights.
        preprocess: how images become input, as for `fcvgg.convert`; the weights' own when None.
        categories: the class names, or the path of a file with one name per line; the weights' own
            when None.
        input_size: the native size; the weights' own when None.
        options: as for `fcvgg.convert`.

    Raises:
        LoadError: if it cannot be found, read or does not fit.
        ArgumentError: if an option is unknown.
        MissingExtraError: if it takes an optional package that is not installed.
        ConversionError: if the model cannot be converted.
    """
    return load_with_source(
        source,
        arch=arch,
        weights=weights,
        preprocess=preprocess,
        categories=categories,
        input_size=input_size,
        **options,
    )[1]


def load_with_source(
    source: str | Path,
    *,
    arch: str | None = None,
    weights: str | Path | None = DEFAULT_WEIGHTS,
    preprocess: PreprocessLike | None = None,
    categories: Sequence[str] | str | os.PathLike[str] | None = None,
    input_size: int | Iterable[int] | None = None,
    **options: Any,
) -> tuple[nn.Module | None, FullyConvolutional]:
    """The source model and the network that `load` gives; None for a bundle, which has no source.

    The arguments and errors are those of `load`.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise LoadError(
            "source must be a name such as 'vgg16' or 'demo', or the path of a file or bundle, got "
            f"{type(source).__name__}; convert an nn.Module with fcvgg.convert"
        )
    _check_options(options)
    check_preprocess(preprocess)
    name = str(source)
    _refuse_address(name)
    if name.startswith(hub.PREFIX):
        unused = {"arch": arch, "input_size": input_size, **options}
        unused["weights"] = None if weights == DEFAULT_WEIGHTS else weights
        folder = hub.download_bundle(name.removeprefix(hub.PREFIX))
        return None, _from_bundle(folder, preprocess, categories, unused)
    bundle = name not in ("demo", *torchvision_model.names()) and Path(source).is_dir()
    parameters_only = name.endswith((*checkpoints.SUFFIXES, *keras_file.SUFFIXES)) and not bundle
    if arch is not None and not parameters_only:
        raise LoadError(
            f"arch={arch!r} must come with a checkpoint, got {name!r}; pass one of the two"
        )
    own_weights = (*checkpoints.SUFFIXES, onnx_file.SUFFIX, *keras_file.SUFFIXES)
    has_weights = bundle or name == "demo" or name.endswith(own_weights)
    if has_weights and weights not in (None, DEFAULT_WEIGHTS):
        raise LoadError(
            f"weights must be left out for {name!r}, which holds its own, got {str(weights)!r}"
        )
    if bundle:
        unused = {"input_size": input_size, **options}
        return None, _from_bundle(Path(source), preprocess, categories, unused)
    model, found = read_source(name, arch, weights, input_size, options.get("verify", True))
    settings = {"preprocess": preprocess, "categories": categories, "input_size": input_size}
    found.update({key: value for key, value in settings.items() if value is not None})
    if not name.endswith((onnx_file.SUFFIX, *keras_file.SUFFIXES)):
        return model, convert(model, **{**found, **options})
    return model, _convert_within_budget(model, {**found, **options}, name)


def _refuse_address(name: str) -> None:
    """Say what to do with a web address, which a path may have lost a slash of."""
    found = re.match(r"(?:https?|ftp|s3|gs):/+([^/]*)/*(.*)", name)
    if found is None:
        return
    host, rest = found.groups()
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:/|/tree/([\w.-]+)/?)?", rest)
    if host in ("huggingface.co", "hf.co") and on_hub is not None:
        revision = f"@{on_hub[2]}" if on_hub[2] else ""
        remedy = f"pass '{hub.PREFIX}{on_hub[1]}{revision}'"
    else:
        remedy = "download the file and pass its path"
    raise LoadError(f"source must be a name or a path, got the address {name!r}; {remedy}")


def _convert_within_budget(
    model: nn.Module, options: dict[str, Any], origin: str
) -> FullyConvolutional:
    """The network of a model that a file describes, which is run only if it is affordable."""
    verify = options.pop("verify", True)
    if options.get("input_size") is not None:
        with suppress(GeometryError):  # convert will say what is wrong with the size
            size = checked_size(options["input_size"])
            check_affordable(model, (1, input_channels(model), *size), origin)
    with ShapeBudget(origin, sized=False):
        net = convert(model, verify=False, **options)
    size = largest_verified(net.geometry, net.input_size) if verify else net.geometry.window
    check_affordable(net.network, (1, net.in_channels, *size), origin)
    if verify:
        net.equivalence = check(model, net)
    return net


def read_source(
    name: str,
    arch: str | None = None,
    weights: str | Path | None = DEFAULT_WEIGHTS,
    input_size: int | Iterable[int] | None = None,
    verify: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """The classifier of a name or file, and what is known of it, as options of `fcvgg.convert`.

    The arguments are those of `load`; a bundle is not a classifier but a network.
    """
    if name == "demo":
        preprocess = Preprocess(demo.MEAN, demo.STD)
        known = {"categories": demo.CATEGORIES, "input_size": demo.WINDOW, "preprocess": preprocess}
        return demo.demo_model(), known
    if name.endswith(checkpoints.SUFFIXES):
        return torchvision_model.read_checkpoint(Path(name), arch)
    if name.startswith(timm_model.PREFIX):
        return timm_model.read(name.removeprefix(timm_model.PREFIX), weights)
    if name.endswith(onnx_file.SUFFIX):
        return onnx_file.read(name, input_size, verify)
    if name.endswith(keras_file.SUFFIXES):
        return keras_file.read(name, arch)
    return torchvision_model.read(name, weights)


def _check_options(options: dict[str, Any]) -> None:
    own = [name for name in signature(load).parameters if name not in ("source", "options")]
    further = [name for name in signature(convert).parameters if name not in ("model", *own)]
    unknown = [name for name in options if name not in further]
    if unknown:
        raise ArgumentError(
            f"options of load must be among {', '.join((*own, *further))}, got {', '.join(unknown)}"
        )


def _from_bundle(
    path: Path,
    preprocess: PreprocessLike | None,
    categories: Sequence[str] | str | os.PathLike[str] | None,
    unused: dict[str, Any],
) -> FullyConvolutional:
    """The network of a bundle, as it was saved: nothing is converted, and the report is kept."""
    own = ("verify", "head")
    given = [name for name, value in unused.items() if value is not None and name not in own]
    program, saved = read_bundle(path)
    if unused.get("head") not in (None, program.head):
        given.append(f"head={unused['head']!r}")
    if given:
        raise LoadError(
            f"{path} is a converted network, to which {', '.join(given)} cannot be applied; "
            "convert its source model again"
        )
    net = FullyConvolutional(
        program,
        input_size=saved.input_size,
        preprocess=saved.preprocess if preprocess is None else preprocess,
        categories=categories or saved.categories,
        activation=saved.activation,
        source=saved.source,
    )
    net.equivalence = saved.equivalence
    return net
