"""Which modules are in training mode: the source's, and those that stand for them.

A converted network has the source's modules under their names, and further ones of its own that
belong to one of them. `source_names` tells which, so that modes can be set and compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fcvgg.rewriting.modules import TrainingFlag
from fcvgg.rewriting.program import TrainingMode
from fcvgg.rewriting.twins import bare_twin

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
    modes = _modes(model)
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, source in source_names(modules, modes).items():
        modules[name].training = modes[source]


def mode_differences(network: nn.Module, model: nn.Module) -> list[str]:
    """The modules of the source that a converted network has in the other mode."""
    modes = _modes(model)
    modules = dict(network.named_modules(remove_duplicate=False))
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
    if not any(map(_has_own_train, model.modules())):
        return TrainingMode(unfollowed=unfollowed)
    training, evaluation = _tried(model, True), _tried(model, False)
    names = [name for name, _ in network.named_modules(remove_duplicate=False)]
    pairs = source_names(names, _modes(model)).items()
    still, lively = (
        frozenset(name for name, source in pairs if source in tried.exceptions)
        for tried in (training, evaluation)
    )
    further = tuple(name for name in training.changed if name not in unfollowed)
    return TrainingMode(still, lively, training.frozen, (*unfollowed, *further))


def _has_own_train(module: nn.Module) -> bool:
    return type(module).train is not nn.Module.train or "train" in vars(module)


@dataclass(frozen=True)
class _Tried:
    """What a model's ``train`` did to a copy of it.

    Attributes:
        exceptions: the modules that it put in the other mode than torch's own would.
        frozen: the parameters that it took the gradient from.
        changed: the modules of which it changed more than modes, such as weights merged for
            inference; a graph does not hold what they compute then.
    """

    exceptions: frozenset[str]
    frozen: frozenset[str]
    changed: tuple[str, ...]


def _tried(model: nn.Module, mode: bool) -> _Tried:
    twin, plain = bare_twin(model), bare_twin(model)
    trained = {name for name, p in twin.named_parameters() if p.requires_grad}
    before = {name: _settings(module) for name, module in twin.named_modules()}
    try:
        twin.train(mode)
        nn.Module.train(plain, mode)
    except Exception:  # it needs data, so what it does is not known
        return _Tried(frozenset(), frozenset(), ("",))
    modes = _modes(plain)
    return _Tried(
        exceptions=frozenset(n for n, own in _modes(twin).items() if own != modes.get(n)),
        frozen=frozenset(n for n, p in twin.named_parameters() if not p.requires_grad) & trained,
        changed=tuple(n for n, m in twin.named_modules() if _settings(m) != before.get(n)),
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """A module's attributes that are plain values, but for its mode."""
    plain = (bool, int, float, str, type(None))
    named = vars(module).items()
    return {name: v for name, v in named if isinstance(v, plain) and name != "training"}


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: m.training for name, m in model.named_modules(remove_duplicate=False)}
