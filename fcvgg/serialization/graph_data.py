"""A graph of calls and the layers that it calls as plain data, for the file of a bundle.

A file can name what is to be called but bring nothing of its own:

- functions and Tensor methods are those of the layer kinds that this package registers; one that
  a user registers is not among them but with ``in_bundle=True``;
- layers are those of torch and fcvgg that have rules, and module classes for which this process
  has registered a rule, but with ``in_bundle=False``: who registers a class lets files construct
  it with settings of theirs;
- what fx writes into the source of ``forward`` is checked: the names of values and of keyword
  arguments are identifiers, and the graph reads no attributes but the layers and tensors listed.
"""

from __future__ import annotations

import inspect
import keyword
import operator
import re
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from fcvgg.errors import FcvggError, LoadError, one_line
from fcvgg.rewriting import modules as own_modules
from fcvgg.rewriting.program import Network
from fcvgg.rewriting.rules.registry import KINDS, class_of, may_be_in_bundle

INPUT = "images"
"""The name of the graph's one input."""

_SPACES = {
    "torch": torch,
    "F": F,
    "operator": operator,
    "torchvision.ops": torchvision.ops,
    "fcvgg": own_modules,
}

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
        # torch's own layers lack deprecated arguments only
        if not hasattr(layer, key) and not _class_name(kind).startswith("nn."):
            raise FcvggError(
                f"{name} ({kind.__name__}) must keep its argument {key} as an attribute of that "
                f"name, since a bundle makes it from its settings; set self.{key} in its __init__"
            )
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
    """Refuse kernels and strides of another length, which torch sees only when it has values."""
    for name, value in arguments.items():
        count = 4 if name == "padding" and "Pad2d" in what else 2
        if not isinstance(value, (tuple, list)):
            continue
        numbers = all(v is None or (type(v) is int and abs(v) < _LARGEST_NUMBER) for v in value)
        if len(value) != count or not numbers:
            raise LoadError(
                f"{what} cannot be made: {name} must be {count} integers, got {value!r}"
            )


def _layer_classes() -> dict[str, type[nn.Module]]:
    """Every layer that a bundle may hold, by its name in the file."""
    return {
        _class_name(cls): cls
        for cls in KINDS
        if isinstance(cls, type) and issubclass(cls, nn.Module) and may_be_in_bundle(cls)
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
    """Every function that a bundle's graph may call, by its name in the file.

    They compute tensors from tensors and do nothing else. Torch's have a name in each module that
    they can be called from; a user's have that of the module that they are defined in.
    """
    named = {
        f"{space}.{name}": value
        for space, module in _SPACES.items()
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_function(value) and may_be_in_bundle(value)
    }
    known = set(named.values())
    own = [t for t in KINDS if _is_function(t) and t not in known and may_be_in_bundle(t)]
    return named | {f"{function.__module__}.{function.__qualname__}": function for function in own}


def _is_function(value: Any) -> bool:
    return callable(value) and isinstance(value, Hashable) and not isinstance(value, type)


def methods() -> set[str]:
    """The Tensor methods that a graph may call."""
    names = (t for t in KINDS if isinstance(t, str) and may_be_in_bundle(t))
    return {name for name in names if hasattr(Tensor, name)}


def encoded_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """The calls of a graph, in order.

    Raises:
        FcvggError: if it calls what a bundle cannot hold.
    """
    names: dict[Any, str] = {f: name for name, f in reversed(functions().items())}
    names.update({name: name for name in methods()})
    return [_encoded_node(node, names) for node in graph.nodes]


def _encoded_node(node: fx.Node, names: Mapping[Any, str]) -> dict[str, Any]:
    target = node.target
    if node.op in ("call_function", "call_method"):
        if target not in names:
            raise FcvggError(
                f"{node.name} calls {getattr(target, '__name__', target)}, which a bundle cannot "
                "hold; do it in a module of a class that has a rule, or register its rule with "
                "in_bundle=True (see fcvgg.rewriting.rules)"
            )
        target = names[target]
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
        LoadError: if it names anything else, or is not a graph with one input and one output.
    """
    graph, made = fx.Graph(), dict[str, fx.Node]()
    known = functions()
    for data in nodes:
        name, op, kwargs = data["name"], data["op"], data["kwargs"]
        if not _is_plain_name(name) or name in made:
            raise LoadError(f"names in the bundle's graph must be new identifiers, got {name!r}")
        wrong = next((key for key in kwargs if not _is_plain_name(key)), None)
        if wrong is not None:
            raise LoadError(
                f"arguments of the bundle's node {name} must be named by identifiers, got {wrong!r}"
            )
        target = _decoded_target(data, known, layers, tensors)
        args = tuple(_decoded(a, made) for a in data["args"])
        kwargs = {key: _decoded(value, made) for key, value in kwargs.items()}
        _check_arguments(name, op, layers[target] if op == "call_module" else target, args, kwargs)
        made[name] = graph.create_node(op, target, args, kwargs, name)
    ops = [node.op for node in graph.nodes]
    if (ops.count("placeholder"), ops.count("output"), ops[-1:]) != (1, 1, ["output"]):
        raise LoadError(
            "the bundle's graph must have one input and one output, which comes last, got "
            f"{ops.count('placeholder')} inputs and {ops.count('output')} outputs"
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
        raise LoadError(f"operations must be {', '.join(_OPERATIONS)} in a bundle, got {op!r}")
    if not isinstance(target, str):
        raise LoadError(f"the target of the bundle's node {name} must be a name, got {target!r}")
    if op == "call_function":
        if target not in known:
            raise LoadError(f"the bundle calls {target!r}, which no bundle may call")
        return known[target]
    if op == "call_method" and target not in methods():
        raise LoadError(f"the bundle calls {'Tensor.' + target!r}, which no bundle may call")
    if op == "call_module" and target not in layers:
        raise LoadError(f"the bundle calls the layer {target!r}, which it does not describe")
    if op == "get_attr" and target not in tensors:
        raise LoadError(f"the bundle's graph must read tensors of its own, got {target!r}")
    if op == "placeholder" and target != INPUT:
        raise LoadError(f"the input of the bundle's graph must be {INPUT!r}, got {target!r}")
    return "output" if op == "output" else target


def _check_arguments(name: str, op: str, target: Any, args: Any, kwargs: Any) -> None:
    """Refuse arguments that the call does not take, as far as its signature tells."""
    if op in ("placeholder", "get_attr") and (args or kwargs):
        raise LoadError(
            f"the bundle's node {name} must have no arguments, got {len((*args, *kwargs))}"
        )
    if op == "output":
        results = args[0] if len(args) == 1 else None
        results = results if isinstance(results, (tuple, list)) else (results,)
        if kwargs or not results or not all(isinstance(r, fx.Node) for r in results):
            raise LoadError(f"the bundle's node {name} must return the scores, got {args!r}")
    if op == "call_method" and not (args and isinstance(args[0], fx.Node)):
        raise LoadError(
            f"the bundle's node {name} must call Tensor.{target} on a value of the graph, got "
            f"{args[:1]!r}"
        )
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
    raise FcvggError(
        f"arguments of {place} must be plain data in a bundle, got {value!r} of "
        f"{type(value).__name__}"
    )


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
    raise LoadError(f"values in a bundle must be plain data or nodes before, got {value!r}")
