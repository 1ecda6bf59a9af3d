"""`load`: a converted network from a name or a file."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fcvgg import demo
from fcvgg.conversion import convert
from fcvgg.errors import ArgumentError, GeometryError, LoadError, one_line
from fcvgg.geometry import checked_size
from fcvgg.images.pipelines import check_preprocess
from fcvgg.images.preprocessing import PreprocessLike
from fcvgg.names import web_address
from fcvgg.network import FullyConvolutional
from fcvgg.rewriting.capture import input_channels
from fcvgg.serialization import hub
from fcvgg.serialization.bundle import read_bundle
from fcvgg.serialization.shape_budget import ShapeBudget, check_affordable, largest_verified
from fcvgg.sources import checkpoints, keras_file, onnx_file, timm_model, torchvision_model
from fcvgg.verification import check

DEFAULT_WEIGHTS = "DEFAULT"

Architecture = str | nn.Module | Callable[..., nn.Module]
"""What a checkpoint's parameters are loaded into."""


def load(
    source: str | Path,
    *,
    arch: Architecture | None = None,
    weights: str | Path | None = DEFAULT_WEIGHTS,
    preprocess: PreprocessLike | None = None,
    categories: Sequence[str] | str | os.PathLike[str] | None = None,
    input_size: int | Iterable[int] | None = None,
    **options: Any,
) -> FullyConvolutional:
    """A verified fully convolutional network from a name or a file.

    Args:
        source: ``"demo"``, the small face detector that the package ships; ``"demo:imagenet"``,
            EfficientNet-Lite0 with the weights of the extra ``[demo]``; a torchvision name such as
            ``"vgg16"``; ``"timm:NAME"``, also ``"timm:hf-hub:user/name"``; an ``.onnx`` file; a
            Keras file ``.keras`` or ``.h5``; a bundle that ``net.save`` wrote, or
            ``"hf:user/name"`` or ``"hf:user/name@revision"`` for one that ``net.push_to_hub``
            wrote; or a checkpoint ``.pt``, ``.pth`` or ``.safetensors``, with `arch`.
        arch: a checkpoint's architecture: a torchvision name, for which the number of classes is
            read from the file; a module, into which the parameters are loaded; or a class or
            function that makes one without arguments, or from ``num_classes=``. ``"vgg16"`` or
            ``"vgg19"`` for Keras weights whose layers have names of their own.
        weights: for a name: ``"DEFAULT"`` or another name of torchvision's weights, which it
            downloads; the path of a checkpoint; or None for random weights. For a checkpoint that
            holds several states: ``"ema"`` for the averaged ones, or a name that the error lists.
        preprocess: how images become input, as for `fcvgg.convert`; the weights' own when None.
        categories: the class names, or the path of a file with one name per line; the weights' own
            when None.
        input_size: the native size; the weights' own when None.
        options: as for `fcvgg.convert`. A bundle, too, gets another output stride or padding.

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
    arch: Architecture | None = None,
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
    on_hub = name.startswith(hub.PREFIX)
    names = (*demo.MODELS, *torchvision_model.names())
    bundle = on_hub or (name not in names and Path(source).is_dir())
    parameters_only = name.endswith((*checkpoints.SUFFIXES, *keras_file.SUFFIXES)) and not bundle
    if arch is not None and not parameters_only:
        chosen = repr(arch) if isinstance(arch, str) else _name_of(arch)
        raise LoadError(
            f"arch={chosen} must come with a checkpoint, got {name!r}; pass one of the two"
        )
    own_weights = (onnx_file.SUFFIX, *keras_file.SUFFIXES)
    has_weights = bundle or name in demo.MODELS or name.endswith(own_weights)
    if has_weights and weights not in (None, DEFAULT_WEIGHTS):
        raise LoadError(
            f"weights must be left out for {name!r}, which holds its own, got {str(weights)!r}"
        )
    settings = {"preprocess": preprocess, "categories": categories, "input_size": input_size}
    given = {key: value for key, value in settings.items() if value is not None}
    if bundle:
        folder = hub.download_bundle(name.removeprefix(hub.PREFIX)) if on_hub else Path(source)
        return None, _from_bundle(folder, {**given, **options})
    model, found = read_source(name, arch, weights, input_size, options.get("verify", True))
    place = found.pop("found", "")
    found.update(given)
    if not name.endswith((onnx_file.SUFFIX, *keras_file.SUFFIXES)):
        net = convert(model, **{**found, **options})
        net.source += f" ({place})" if place else ""
        return model, net
    return model, _convert_within_budget(model, {**found, **options}, name)


def _refuse_address(name: str) -> None:
    """Say what to do with a web address, which a path may have lost a slash of."""
    address = web_address(name)
    if address is None:
        return
    host, _, rest = address.partition("://")[2].partition("/")
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:/|/tree/([\w.-]+)/?)?", rest)
    if host in ("huggingface.co", "hf.co") and on_hub is not None:
        revision = f"@{on_hub[2]}" if on_hub[2] else ""
        remedy = f"pass '{hub.PREFIX}{on_hub[1]}{revision}'"
    else:
        remedy = "download the file and pass its path"
    raise LoadError(f"source must be a name or a path, got the address {address!r}; {remedy}")


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
    arch: Architecture | None = None,
    weights: str | Path | None = DEFAULT_WEIGHTS,
    input_size: int | Iterable[int] | None = None,
    verify: bool = True,
    headless: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """The classifier of a name or file, and what is known of it, as options of `fcvgg.convert`.

    The arguments are those of `load`; a bundle is not a classifier but a network. With `headless`
    a file of features alone is taken too: its classifier is random, or the model gives a map.
    """
    if name in demo.MODELS:
        return demo.read(name)
    if name.endswith(checkpoints.SUFFIXES):
        if arch is None or isinstance(arch, str):
            return torchvision_model.read_checkpoint(Path(name), arch, weights, headless)
        return _own_model(Path(name), arch, weights)
    if name.startswith(timm_model.PREFIX):
        return timm_model.read(name.removeprefix(timm_model.PREFIX), weights)
    if name.endswith(onnx_file.SUFFIX):
        return onnx_file.read(name, input_size, verify)
    if name.endswith(keras_file.SUFFIXES):
        if not isinstance(arch, str | None):
            raise LoadError(
                f"arch must be 'vgg16' or 'vgg19' for Keras files, got {_name_of(arch)}"
            )
        return keras_file.read(name, arch, headless)
    return torchvision_model.read(name, weights, headless)


def _check_options(options: dict[str, Any]) -> None:
    own = [name for name in signature(load).parameters if name not in ("source", "options")]
    further = [name for name in signature(convert).parameters if name not in ("model", *own)]
    unknown = [name for name in options if name not in further]
    if unknown:
        near = difflib.get_close_matches(unknown[0], (*own, *further), 1)
        if near:
            raise ArgumentError(f"load has no option {unknown[0]!r}; did you mean {near[0]!r}?")
        raise ArgumentError(
            f"options of load must be among {', '.join((*own, *further))}, got {', '.join(unknown)}"
        )


def _own_model(
    path: Path, arch: nn.Module | Callable[..., nn.Module], weights: str | Path | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The user's own model with the parameters of a file, and where in it they were found.

    Raises:
        LoadError: if the file cannot be read or does not fit, or `arch` makes no model.
    """
    entries = checkpoints.read_entries(path)
    if isinstance(arch, nn.Module):
        model = arch
    else:
        model = made_by(arch, checkpoints.read_state(path, entries))
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    place = checkpoints.state_of(path, model, layers[-1] if layers else "", weights, entries)
    checkpoints.load_into(model, place.state, str(path))
    return model.eval(), {"found": place.described()}


def made_by(make: Callable[..., nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    """The model that a class or function makes, of as many classes as the state where it can be."""
    name = _name_of(make)
    if not callable(make):
        raise LoadError(
            f"arch must be a torchvision name, an nn.Module or a callable that makes it, got {name}"
        )
    heads = [tensor for tensor in state.values() if tensor.ndim >= 2]
    classes = {}
    with suppress(TypeError, ValueError):  # what is written in C has no signature
        if heads and "num_classes" in signature(make).parameters:
            classes = {"num_classes": len(heads[-1])}
    try:
        model = make(**classes)
    except Exception as error:  # code of the user's
        raise LoadError(
            f"arch must be a callable that makes the model without arguments, got {name}, which "
            f"fails ({type(error).__name__}: {one_line(error)}); pass a function that does"
        ) from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"arch must make a torch.nn.Module, got {_name_of(model)} from {name}")
    return model


def _name_of(value: Any) -> str:
    return getattr(value, "__qualname__", None) or f"an object of {type(value).__qualname__}"


def _from_bundle(path: Path, options: dict[str, Any]) -> FullyConvolutional:
    """The network of a bundle, with its report; converted again where the options ask for it.

    Args:
        options: as for `convert`; None for what the bundle says.
    """
    given = {name: value for name, value in options.items() if value is not None}
    program, saved = read_bundle(path)
    net = FullyConvolutional(
        program,
        input_size=saved.input_size,
        preprocess=given.pop("preprocess", saved.preprocess),
        categories=given.pop("categories", saved.categories),
        activation=given.pop("activation", saved.activation),
        source=saved.source,
    )
    net.equivalence = saved.equivalence
    given.pop("copy", None)  # nobody else holds the parameters
    verify = given.pop("verify", True)
    if given.get("head") == net.head:
        del given["head"]
    return convert(net, verify=verify, **given) if given else net
