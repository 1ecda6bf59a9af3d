"""A graph of calls and the layers that it calls as plain data, for the file of a bundle.

A file can name what is to be called but bring nothing of its own:

- functions and Tensor methods come from the fixed lists below, whatever rules are registered;
- layers are those of torch and fcvgg that have rules, and module classes for which this process
  has registered a rule: who registers a class lets files construct it with settings of theirs;
- what fx writes into the source of ``forward`` is checked: the names of values and of keyword
  arguments are identifiers, and the graph reads no attributes but the layers and tensors listed.
"""

from __future__ import annotations

import inspect
import keyword
import operator
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from fcvgg.errors import FcvggError, LoadError, one_line
from fcvgg.rewriting import modules as own_modules
from fcvgg.rewriting.program import Network
from fcvgg.rewriting.rules.registry import KINDS, class_of

INPUT = "images"
"""The name of the graph's one input."""

_SPACES = {
    "torch": torch,
    "F": F,
    "operator": operator,
    "torchvision.ops": torchvision.ops,
    "fcvgg": own_modules,
}

_FUNCTIONS = {
    "torch": """
        abs add amax cat celu channel_shuffle chunk clamp clamp_ clip clip_ clone concat
        concatenate conv2d detach div erf exp flatten flip fliplr flipud ge gt
        index_select layer_norm le log log1p log_softmax lt masked_fill max max_pool2d
        maximum mean minimum moveaxis movedim mul narrow neg permute pow prelu ravel
        relu relu_ reshape rrelu rsqrt select selu sigmoid sigmoid_ sign softmax split
        sqrt square squeeze sub sum swapaxes swapdims tanh tanh_ tensor_split threshold
        transpose unbind unflatten unsqueeze where cos sin nan_to_num ones_like reciprocal
        zeros_like""",
    "F": """
        adaptive_avg_pool2d adaptive_max_pool2d alpha_dropout avg_pool2d batch_norm celu
        channel_shuffle conv2d dropout dropout2d elu elu_ feature_alpha_dropout gelu hardsigmoid
        hardswish hardtanh layer_norm leaky_relu leaky_relu_ linear local_response_norm
        log_softmax logsigmoid max_pool2d mish normalize pad prelu relu relu6 relu_ rrelu selu
        sigmoid silu softmax softplus softsign tanh threshold hardshrink softshrink""",
    "operator": """
        abs add concat ge getitem gt iadd imul isub itruediv le lt mul neg pos pow sub truediv""",
    "torchvision.ops": "stochastic_depth",
    "fcvgg": "cut_to window_linear",
}
"""The functions that a graph may call: they compute tensors from tensors and do nothing else."""

_METHODS = """
    abs add add_ amax bfloat16 chunk clamp clamp_ clip clip_ clone contiguous detach div
    div_ double erf exp flatten flip fliplr flipud float ge gt half index_select le log
    log1p log_softmax lt masked_fill max maximum mean minimum moveaxis movedim mul mul_
    narrow neg permute pow prelu ravel relu relu_ reshape rsqrt select sigmoid sigmoid_ sign
    softmax split sqrt square squeeze squeeze_ sub sub_ sum swapaxes swapdims tanh tanh_
    tensor_split to transpose type type_as unbind unflatten unsqueeze unsqueeze_ view where
    cos sin nan_to_num reciprocal hardshrink"""
"""The Tensor methods that a graph may call."""

_TORCH_VALUES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, (torch.dtype, torch.memory_format))
}

_OWN_LAYERS = "fcvgg.modules"
"""What files call the module of the package's own layers, wherever it is now."""

_OPERATIONS = ("placeholder", "get_attr", "call_module", "call_function", "call_method", "output")


# -- names ----------------------------------------------------------------------------------------

_OF_MODULES = frozenset(dir(Network(nn.Module(), fx.Graph())))
"""The attributes of the module that runs a graph, which no layer or tensor can have."""


def is_plain_path(name: Any) -> bool:
    """Whether a dotted name may be that of a layer or tensor: ``features.0.weight``."""
    parts = name.split(".") if isinstance(name, str) else ["", ""]
    return parts[0] not in _OF_MODULES and all(
        re.fullmatch(r"[A-Za-z0-9_]+", part)
        and not part.startswith("__")
        and not keyword.iskeyword(part)
        for part in parts
    )


def _is_plain_name(name: Any) -> bool:
    own = name in ("self", "cls")  # what generated source calls the network
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name) and not own


# -- layers ---------------------------------------------------------------------------------------


def called_layers(network: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    """The layers that a network's graph calls, with their names."""
    names = dict.fromkeys(str(n.target) for n in network.graph.nodes if n.op == "call_module")
    return ((name, network.get_submodule(name)) for name in names)


def encoded_layer(name: str, layer: nn.Module) -> dict[str, Any]:
    """The class of a layer and the arguments that make one of its kind."""
    if nn.utils.parametrize.is_parametrized(layer):
        raise FcvggError(
            f"{name} ({type(layer).__name__}) has parametrized weights, which a bundle cannot "
            "hold; call torch.nn.utils.parametrize.remove_parametrizations before convert"
        )
    if isinstance(layer, own_modules.TrainingOnly):  # code of the user's
        layer = nn.Identity()
    settings = {}
    kind = class_of(layer)
    for key in _settings_of(kind):
        value = getattr(layer, key, None)
        settings[key] = value is not None if key == "bias" else _encoded(value, name)
    return {"type": _class_name(kind), "settings": settings}


def decoded_layer(name: str, data: Mapping[str, Any]) -> nn.Module:
    """The layer of `encoded_layer`, without values in its tensors.

    Raises:
        LoadError: if its class is not known here, or cannot be made with those settings.
    """
    cls = _layer_classes().get(data["type"])
    if cls is None:
        raise LoadError(
            f"the bundle's layer {name} is a {data['type']}, which this fcvgg has no rule for; "
            "register its rule (see fcvgg.rewriting.rules) before loading"
        )
    allowed = _settings_of(cls)
    settings = {k: _decoded(v, {}) for k, v in data["settings"].items() if k in allowed}
    if "2d" in cls.__name__:
        _check_pairs(f"the bundle's layer {name} ({cls.__name__})", settings)
    if "device" in inspect.signature(cls).parameters:
        settings["device"] = "meta"
    try:
        return cls(**settings)
    except Exception as error:  # a user's class may fail in any way
        raise LoadError(
            f"the bundle's layer {name} cannot be made a {data['type']}: {one_line(error)}"
        ) from error


_LARGEST_NUMBER = 1 << 31


def _check_pairs(what: str, arguments: Mapping[Any, Any]) -> None:
    """Refuse kernels and the like that are no pairs, which torch sees only when it has values."""
    for name, value in arguments.items():
        count = 4 if name == "padding" and "Pad2d" in what else 2
        if not isinstance(value, (tuple, list)):
            continue
        numbers = all(v is None or (type(v) is int and abs(v) < _LARGEST_NUMBER) for v in value)
        if len(value) != count or not numbers:
            raise LoadError(
                f"{what} cannot be made with {name}={value!r}; expected a pair of integers"
            )


def _layer_classes() -> dict[str, type[nn.Module]]:
    """Every layer that a bundle may hold, by its name in the file."""
    rewritten = [target for target, kind in KINDS.items() if kind.rewrite is not None]
    classes = [*rewritten, *vars(own_modules).values()]
    return {
        _class_name(cls): cls
        for cls in classes
        if isinstance(cls, type) and issubclass(cls, nn.Module)
    }


def _class_name(cls: type) -> str:
    if cls.__module__.startswith("torch.nn.modules"):
        return f"nn.{cls.__qualname__}"
    space = _OWN_LAYERS if cls.__module__ == own_modules.__name__ else cls.__module__
    return f"{space}.{cls.__qualname__}"


def _settings_of(cls: type) -> list[str]:
    """The arguments that make a layer: torch keeps each as an attribute of the same name."""
    skipped = {"device", "dtype", "init", "column_order", "num_batches_tracked"}
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    arguments = inspect.signature(cls).parameters.values()
    return [a.name for a in arguments if a.kind in named and a.name not in skipped]


# -- the graph ------------------------------------------------------------------------------------


def functions() -> dict[str, Callable[..., Any]]:
    """Every function that a bundle's graph may call, by its name in the file."""
    return {
        f"{space}.{name}": getattr(_SPACES[space], name)
        for space, names in _FUNCTIONS.items()
        for name in names.split()
        if hasattr(_SPACES[space], name)  # not every version of torch has all
    }


def encoded_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """The calls of a graph, in order.

    Raises:
        FcvggError: if it calls what a bundle cannot hold.
    """
    names = {function: name for name, function in reversed(functions().items())}
    return [_encoded_node(node, names) for node in graph.nodes]


def _encoded_node(node: fx.Node, names: Mapping[Callable[..., Any], str]) -> dict[str, Any]:
    target = node.target
    if callable(target) and target in names:
        target = names[target]
    elif callable(target) or (node.op == "call_method" and target not in _METHODS.split()):
        raise FcvggError(
            f"{node.name} calls {getattr(target, '__name__', target)}, which a bundle cannot hold; "
            "do it in a module of a class that has a rule of its own (see fcvgg.rewriting.rules)"
        )
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": [_encoded(a, node.name) for a in node.args],
        "kwargs": {k: _encoded(v, node.name) for k, v in node.kwargs.items()},
    }


def decoded_graph(
    nodes: Sequence[Mapping[str, Any]], layers: Mapping[str, nn.Module], tensors: Container[str]
) -> fx.Graph:
    """The graph of `encoded_graph`, calling these layers and reading these tensors.

    Raises:
        LoadError: if it names anything else, or is no graph with one input and one output.
    """
    graph, made = fx.Graph(), dict[str, fx.Node]()
    known = functions()
    for data in nodes:
        name, op, kwargs = data["name"], data["op"], data["kwargs"]
        if not _is_plain_name(name) or name in made:
            raise LoadError(f"the bundle's graph has a node named {name!r}, which is no new name")
        wrong = next((key for key in kwargs if not _is_plain_name(key)), None)
        if wrong is not None:
            raise LoadError(f"the bundle's node {name} has an argument named {wrong!r}")
        target = _decoded_target(data, known, layers, tensors)
        args = tuple(_decoded(a, made) for a in data["args"])
        kwargs = {key: _decoded(value, made) for key, value in kwargs.items()}
        _check_arguments(name, op, layers[target] if op == "call_module" else target, args, kwargs)
        made[name] = graph.create_node(op, target, args, kwargs, name)
    ops = [node.op for node in graph.nodes]
    if (ops.count("placeholder"), ops.count("output"), ops[-1:]) != (1, 1, ["output"]):
        raise LoadError(
            f"the bundle's graph has {ops.count('placeholder')} inputs and {ops.count('output')} "
            "outputs; expected one of each, the output last"
        )
    graph.lint()
    return graph


def _decoded_target(
    data: Mapping[str, Any],
    known: Mapping[str, Callable[..., Any]],
    layers: Container[str],
    tensors: Container[str],
) -> Any:
    """What a node may call or read; the names that end in generated source are checked here."""
    op, name, target = data["op"], data["name"], data["target"]
    if op not in _OPERATIONS:
        raise LoadError(f"the bundle's graph has an unknown operation {op!r}")
    if not isinstance(target, str):
        raise LoadError(f"the bundle's node {name} has the target {target!r}, which is no name")
    if op == "call_function":
        if target not in known:
            raise LoadError(f"the bundle calls {target!r}, which no bundle may call")
        return known[target]
    if op == "call_method" and target not in _METHODS.split():
        raise LoadError(f"the bundle calls {'Tensor.' + target!r}, which no bundle may call")
    if op == "call_module" and target not in layers:
        raise LoadError(f"the bundle calls the layer {target!r}, which it does not describe")
    if op == "get_attr" and target not in tensors:
        raise LoadError(f"the bundle's graph reads {target!r}, which is no tensor of it")
    if op == "placeholder" and target != INPUT:
        raise LoadError(f"the bundle's graph takes {target!r}; expected {INPUT!r}")
    return "output" if op == "output" else target


def _check_arguments(name: str, op: str, target: Any, args: Any, kwargs: Any) -> None:
    """Refuse arguments that the call does not take, as far as its signature tells."""
    if op in ("placeholder", "get_attr") and (args or kwargs):
        raise LoadError(f"the bundle's node {name} takes no arguments, got {len((*args, *kwargs))}")
    if op == "output":
        results = args[0] if len(args) == 1 else None
        results = results if isinstance(results, (tuple, list)) else (results,)
        if kwargs or not results or not all(isinstance(r, fx.Node) for r in results):
            raise LoadError(f"the bundle's node {name} returns {args!r}; expected its scores")
    if op == "call_method" and not (args and isinstance(args[0], fx.Node)):
        raise LoadError(f"the bundle's node {name} calls Tensor.{target} on no value of the graph")
    if op == "call_function" and not _values_in((args, kwargs)):
        raise LoadError(
            f"the bundle's node {name} must compute from values of the graph, got numbers and "
            "names alone"
        )
    if op not in ("call_function", "call_module"):
        return
    if op == "call_function" and "2d" in getattr(target, "__name__", ""):
        _check_pairs(f"the bundle's node {name}", dict(enumerate(args)) | kwargs)
    try:
        signature = inspect.signature(target.forward if op == "call_module" else target)
    except (ValueError, TypeError):  # torch's own functions have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise LoadError(
            f"the bundle's node {name} has arguments that its call does not take: {error}"
        ) from error


def _values_in(arguments: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return bool(found)


# -- values ---------------------------------------------------------------------------------------


def _encoded(value: Any, place: str) -> Any:
    """A call's argument as JSON; what JSON lacks becomes an object with one key."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and str(value) in _FLOATS:
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_encoded(v, place) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [_encoded(v, place) for v in value]}
    if isinstance(value, slice):
        return {"slice": [_encoded(v, place) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    raise FcvggError(f"{place} has an argument {value!r} of {type(value).__name__}, not plain data")


_FLOATS = ("inf", "-inf", "nan")


def _decoded(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    content: Any = None
    kind, content = next(iter(value.items())) if len(value) == 1 else (None, None)
    if kind == "node" and content in nodes:
        return nodes[content]
    if kind == "float" and content in _FLOATS:
        return float(content)
    if kind == "tuple" and isinstance(content, list):
        return tuple(_decoded(v, nodes) for v in content)
    if kind == "slice" and isinstance(content, list) and len(content) == 3:
        return slice(*(_decoded(v, nodes) for v in content))
    if kind == "torch" and content in _TORCH_VALUES:
        return _TORCH_VALUES[content]
    raise LoadError(f"the bundle holds an unknown value {value!r}")
