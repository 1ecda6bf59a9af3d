"""Which modules are in training mode: the source's, and those that stand for them.

A converted network has the source's modules under their names, and further ones of its own that
belong to one of them. `source_names` tells which, so that modes can be set and compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from fcvgg.capture import bare_twin
from fcvgg.errors import ConversionError, one_line
from fcvgg.modules import TrainingFlag
from fcvgg.program import TrainingMode

_FURTHER_CALL = re.compile(r"_call\d+$")
"""How the rewriter names further instances of a layer that is called at several places."""


def source_names(names: Iterable[str], sources: Iterable[str]) -> dict[str, str]:
    """The module of the source that each module of a converted network stands for or belongs to."""
    known = {name: name for name in sources}
    flat = {name.replace(".", "_"): name for name in known}
    found: dict[str, str] = {}
    for name in names:
        owner = name
        while owner and owner not in known:
            owner = flat.get(_FURTHER_CALL.sub("", owner), owner.rpartition(".")[0])
        found[name] = owner
    return found


def match_modes(network: nn.Module, model: nn.Module) -> None:
    """Put every module of a converted network in the mode of the source's."""
    modes = {name: module.training for name, module in model.named_modules()}
    modules = dict(network.named_modules())
    for name, source in source_names(modules, modes).items():
        modules[name].training = modes[source]


def mode_differences(network: nn.Module, model: nn.Module) -> list[str]:
    """The modules of the source that a converted network has in the other mode."""
    modes = {name: module.training for name, module in model.named_modules()}
    modules = dict(network.named_modules())
    pairs = source_names(modules, modes).items()
    different = {
        source
        for name, source in pairs
        if (name == source or isinstance(modules[name], TrainingFlag))
        and modules[name].training != modes[source]
    }
    return [name for name in modes if name in different]


def training_mode_of(
    model: nn.Module, network: nn.Module, unfollowed: tuple[str, ...]
) -> TrainingMode:
    """What ``train()`` and ``eval()`` of a model do, tried on a copy, in the network's names."""
    if type(model).train is nn.Module.train and "train" not in vars(model):
        return TrainingMode(unfollowed=unfollowed)
    names = [name for name, _ in network.named_modules()]
    pairs = source_names(names, [name for name, _ in model.named_modules()]).items()
    still, lively = (
        frozenset(name for name, source in pairs if source in exceptions)
        for exceptions in (_exceptions(model, True), _exceptions(model, False))
    )
    return TrainingMode(still, lively, unfollowed)


def _exceptions(model: nn.Module, mode: bool) -> frozenset[str]:
    """The modules that the model's own ``train`` puts in the other mode than torch's would."""
    twin, plain = bare_twin(model), bare_twin(model)
    try:
        twin.train(mode)
    except Exception as error:
        raise ConversionError(
            f"train({mode}) of {type(model).__name__} fails on a copy without data: "
            f"{one_line(error)}; set modes only in it, or remove it before converting"
        ) from error
    nn.Module.train(plain, mode)
    modes = {name: module.training for name, module in plain.named_modules()}
    return frozenset(
        name for name, module in twin.named_modules() if module.training != modes.get(name)
    )
