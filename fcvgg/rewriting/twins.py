"""Copies of a model's modules: on the meta device, or on the storage of the model's parameters."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn

from fcvgg.errors import ConversionError, one_line
from fcvgg.rewriting.rebinding import rebound

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)


_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torch.nn.quantized", "torchao.")


def without_wrappers(model: Any) -> Any:
    """The model inside DataParallel, compiled wrappers and ultralytics' ``YOLO``."""
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif any(cls.__module__ == "ultralytics.engine.model" for cls in type(model).__mro__):
            # It reads image files and predicts by itself; the network is one of its attributes.
            model = model.model
        else:
            break
    return model


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks watch, and may change, what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def twin_of(model: nn.Module, memo: dict[int, Any], computes_weights: bool = False) -> nn.Module:
    """A copy of the modules without their hooks, which belong to whoever watches the source.

    Args:
        memo: by `id`, what stands in the copy for the parameters and buffers.
        computes_weights: keep the hooks of torch's that compute weights (weight norm, pruning).

    Raises:
        ConversionError: if other hooks compute weights, or the modules cannot be copied.
    """
    computed: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(
                f"{name or 'the model'} is scripted (torch.jit), and its Python code is gone; "
                "pass a model with the nn.Module it was scripted from"
            )
        if type(module).__module__.startswith(_QUANTIZED):
            raise ConversionError(
                f"{name or 'the model'} ({type(module).__name__}) is quantized; convert the model "
                "of floats it was made from, and use fcvgg.optimize on the network"
            )
        for attribute, value in vars(module).items():
            parts = any(part.startswith(f"{attribute}_") for part in module._parameters)
            if isinstance(value, Tensor) and parts and module._forward_pre_hooks:
                if not all(map(_is_of_torch, module._forward_pre_hooks.values())):
                    raise ConversionError(
                        f"{name} ({type(module).__name__}) has a {attribute} that a hook computes; "
                        "expected a hook of torch.nn.utils, or a parametrization"
                    )
                computed.setdefault(name, []).append(attribute)
    hooks: dict[int, Any] = {
        id(getattr(module, hook)): OrderedDict()
        for name, module in model.named_modules()
        for hook in _HOOKS
        if not (hook == "_forward_pre_hooks" and name in computed and computes_weights)
    }
    copies = {**memo, **hooks, **_kept_values(model, memo)}
    try:
        twin = copy.deepcopy(model, copies)
    except Exception as error:
        raise ConversionError(
            f"the modules of {type(model).__name__} cannot be copied: "
            f"{_uncopied(model, copies)}{one_line(error)}; "
            "delete what cannot be copied, or set it to None, before converting"
        ) from error
    if not isinstance(twin, nn.Module):
        raise ConversionError(
            f"the modules of {type(model).__name__} cannot be copied: its __deepcopy__ returns "
            f"{type(twin).__name__}; expected a module"
        )
    _align(model, twin, copies)
    for name, attributes in computed.items():
        for attribute in attributes:  # the value of an earlier run
            vars(twin.get_submodule(name)).pop(attribute)
    return twin


def _is_of_torch(hook: Any) -> bool:
    """Whether a hook is weight norm, spectral norm or a pruning of torch's."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def _kept_values(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """By `id`, what stands in a copy for attributes that torch does not copy.

    Values of an earlier run that modules keep, as ``self.last = x``, hang on to the graph of their
    gradient; scripted functions are used as they are.
    """
    found: dict[int, Any] = {}

    def look(value: Any, depth: int) -> None:
        if isinstance(value, Tensor) and id(value) not in memo and not value.is_leaf:
            found[id(value)] = value.detach()
        elif isinstance(value, torch.jit.ScriptFunction):
            found[id(value)] = value
        elif isinstance(value, (list, tuple, set)) and depth:
            for part in value:
                look(part, depth - 1)
        elif isinstance(value, dict) and depth:
            look(list(value.values()), depth)

    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                look(value, 3)
    return found


def _align(model: nn.Module, twin: nn.Module, copies: dict[int, Any]) -> None:
    """Give the modules of a copy what its ``__deepcopy__`` may have lost of the source's.

    Graph modules, such as torchvision's feature extractors, come back in training mode, and
    functions that were set on a module go on using what they were made for: the source.

    Args:
        copies: by `id`, what stands in the copy for the objects of the source.
    """
    sources = dict(model.named_modules(remove_duplicate=False))
    originals = {id(module) for module in sources.values()}
    found = dict(twin.named_modules(remove_duplicate=False))
    for name, module in found.items():
        if id(module) in originals:
            raise ConversionError(
                f"the modules of {type(model).__name__} cannot be copied: __deepcopy__ of "
                f"{name or 'the model'} ({type(module).__name__}) returns the module itself"
            )
    for name, source in sources.items():
        if name not in found:
            continue
        module = found[name]
        module.training = source.training
        copies[id(source)] = module
        graphs = isinstance(source, fx.GraphModule) and isinstance(module, fx.GraphModule)
        if graphs and module.code != source.code:  # that of the other mode
            module.graph = copy.deepcopy(source.graph)
        for own, given in (
            (module._parameters, source._parameters),
            (module._buffers, source._buffers),
        ):
            for key, tensor in given.items():
                if tensor is not None and own.get(key) is not None and id(tensor) in copies:
                    own[key] = copies[id(tensor)]
    for module in found.values():
        for name, value in vars(module).items():
            module.__dict__[name] = rebound(value, copies)


def sharing_twin(model: nn.Module, own: bool = False) -> nn.Module:
    """The model's modules anew, with parameters and buffers of their own or on shared storage."""

    def data(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if own else tensor.detach()

    memo: dict[int, Any] = {
        **{id(p): nn.Parameter(data(p), p.requires_grad) for p in model.parameters()},
        **{id(b): data(b) for b in model.buffers()},
    }
    return twin_of(model, memo)


def _uncopied(model: nn.Module, memo: dict[int, Any]) -> str:
    """The name of an attribute that cannot be copied, as the beginning of a message."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                if name != "_modules":
                    copy.deepcopy(value, dict(memo))
            except Exception:
                return f"attribute {f'{path}.{name}'.removeprefix('.')}: "
    return ""


def bare_twin(model: nn.Module) -> nn.Module:
    """A copy of the modules on the meta device, without data but that of integers."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        # what an index gives has no shape without its values
        meta = tensor.detach().to("meta" if tensor.is_floating_point() else tensor.device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
    return twin_of(model, memo, computes_weights=True)
