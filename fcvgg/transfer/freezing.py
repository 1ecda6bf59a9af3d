"""Which layers train, and how fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from fcvgg.errors import ArgumentError, check_rate
from fcvgg.transfer.naming import LayerNames, NamedLayer, layer_names

Model = TypeVar("Model", bound=nn.Module)

_NORMS = (nn.modules.batchnorm._BatchNorm,)


def freeze_(model: Model, upto: str) -> Model:
    """Stop a layer and all before it from training, in place.

    Their parameters get no gradient. Batch norms also keep their statistics: each gets a ``train``
    of its own, which leaves it in evaluation mode when ``model.train()`` is called. Copies, pickles
    and `fcvgg.convert` keep it, a bundle does not, and `unfreeze_` removes it. Later layers are
    left as they are. ``fcvgg info`` and `trainable_parameters` show what is trained.

    Args:
        model: a classifier or converted network.
        upto: a canonical name (`fcvgg.layer_names`), such as ``"pool4"``, a Keras name or a path.

    Returns:
        the model itself.

    Raises:
        ArgumentError: if there is no such layer.
    """
    names = layer_names(model)
    frozen = names.layers[: names.layers.index(names.end_of(upto)) + 1]
    for layer in frozen:
        for parameter in names.parameters_of(layer):
            parameter.requires_grad_(False)
    for module in _modules(names, frozen):
        for norm in module.modules():
            if isinstance(norm, _NORMS):
                norm.eval()
                norm.train = partial(_stay_in_evaluation, norm)  # type: ignore
    return model


def unfreeze_(model: Model, downto: str | None = None) -> Model:
    """Let a layer and all after it train again, in place; all layers if None.

    Returns:
        the model itself.

    Raises:
        ArgumentError: if there is no such layer.
    """
    names = layer_names(model)
    first = 0 if downto is None else names.layers.index(names.find(downto))
    thawed = names.layers[first:]
    every = downto is None
    learned = model.parameters() if every else (p for x in thawed for p in names.parameters_of(x))
    for parameter in learned:
        parameter.requires_grad_(True)
    for module in [model] if every else _modules(names, thawed):
        for norm in module.modules():
            if getattr(norm.__dict__.get("train"), "func", None) is _stay_in_evaluation:
                del norm.train
                norm.train(model.training)
    return model


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """How many parameters train, by the layers' canonical names; 0 where a layer is frozen.

    Parameters of no named layer are under ``""``.
    """
    names = layer_names(model)
    seen: set[int] = set()
    counts: dict[str, int] = {}
    for layer, parameter in _owned(model, names):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            name = layer.name if layer else ""
            counts[name] = counts.get(name, 0) + parameter.numel() * parameter.requires_grad
    return counts


def parameter_groups(
    model: nn.Module, rates: Mapping[str, float], *, lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups with learning rates of their own, for any optimiser of torch.

    ``torch.optim.SGD(fcvgg.parameter_groups(model, {"block5": 1e-4, "head": 1e-3}, lr=1e-5))``

    Args:
        model: a classifier or converted network.
        rates: learning rates by layer (``"conv5_3"``, Keras names and paths too), by block
            (``"block5"``), or by ``"features"`` and ``"head"`` (the fully connected layers and
            those among them). The most precise name counts.
        lr: the rate of all other parameters; None if there must not be any.

    Returns:
        ``[{"params": [...], "lr": ..., "name": ...}, ...]`` in the order of `rates`, and ``"rest"``
        last. Frozen parameters are left out, and groups without any.

    Raises:
        ArgumentError: if a name or rate is unknown, or parameters are in no group and `lr` is None.
    """
    names = layer_names(model)
    keys = {name: _canonical(name, names) for name in rates}
    for name, rate in {**rates, **({} if lr is None else {"lr": lr})}.items():
        check_rate(f"the learning rate of {name!r}", rate)
    groups: dict[str, list[Tensor]] = {name: [] for name in [*rates, "rest"]}
    unnamed: dict[str, None] = {}
    seen: set[int] = set()
    for layer, parameter in _owned(model, names):
        if id(parameter) in seen or not parameter.requires_grad:
            continue
        seen.add(id(parameter))
        place = _group_of(layer, keys)
        groups[place or "rest"].append(parameter)
        if place is None:
            unnamed[layer.name if layer else "parameters of no named layer"] = None
    if lr is None and unnamed:
        raise ArgumentError(
            f"{', '.join(unnamed)} have no learning rate; name them or pass lr= for the rest"
        )
    every = {**rates, "rest": lr}
    return [
        {"params": parameters, "lr": every[name], "name": name}
        for name, parameters in groups.items()
        if parameters
    ]


def _stay_in_evaluation(norm: nn.Module, mode: bool = True) -> nn.Module:
    """The ``train`` of a frozen batch norm. A partial of it, since copies rebind that."""
    norm.training = False
    return norm


def _modules(names: LayerNames, layers: tuple[NamedLayer, ...]) -> Iterator[nn.Module]:
    return (names.root.get_submodule(x.path) for x in layers if x.path)


def _owned(model: nn.Module, names: LayerNames) -> Iterator[tuple[NamedLayer | None, nn.Parameter]]:
    """Every parameter with its layer, in order of computation; those of no layer last."""
    for layer in names:
        for parameter in names.parameters_of(layer):
            yield layer, parameter
    for parameter in model.parameters():
        yield None, parameter


def _canonical(name: str, names: LayerNames) -> str:
    """``"features"``, ``"head"``, ``"block3"``, or the canonical name of a layer."""
    blocks = {f"block{x.block}" for x in names if x.block}
    if name in ("features", "head") or name in blocks:
        return name
    if name.startswith("block") and name[5:].isdecimal():
        raise ArgumentError(f"the model has no {name}; its blocks are {', '.join(sorted(blocks))}")
    return names.find(name).name


def _group_of(layer: NamedLayer | None, keys: Mapping[str, str]) -> str | None:
    """The most precise of the user's names that a layer falls under."""
    if layer is None:
        return None
    places = (
        [layer.name, f"block{layer.block}", "features"] if layer.block else [layer.name, "head"]
    )
    found = {canonical: name for name, canonical in keys.items()}
    return next((found[place] for place in places if place in found), None)
