"""Saving a converted network as data, and reading it back without running code from the file.

A bundle is a folder in the convention of the Hugging Face hub: ``model.safetensors`` holds every
tensor and ``config.json`` everything else, the rewritten graph included. The graph is a list of
calls; what they may call is looked up among the layers and functions that fcvgg has rules for, so a
file can name operations but bring none.
"""

from __future__ import annotations

import inspect
import json
import operator
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from fcvgg import modules as own_modules
from fcvgg.capture import one_line
from fcvgg.errors import FcvggError, LoadError
from fcvgg.geometry import Geometry, Window
from fcvgg.graph import graph_module
from fcvgg.layers.registry import RULES, class_of
from fcvgg.preprocessing import Preprocess
from fcvgg.program import LayerRecord, Program

CONFIG = "config.json"
TENSORS = "model.safetensors"

_FORMAT = 1
_LISTED = 4


# -- a network's description ----------------------------------------------------------------------


def describe_program(program: Program) -> dict[str, Any]:
    """The graph, the layers it calls and what is known of them, as plain data."""
    network = program.network
    return {
        "graph": _encoded_graph(network.graph),
        "layers": {name: _encoded_layer(name, layer) for name, layer in _called(network)},
        "buffers_outside_checkpoints": sorted(_not_persistent(network)),
        "aliases": sorted(program.aliases),
        "frozen": [name for name, p in network.named_parameters() if not p.requires_grad],
        "geometry": program.geometry.to_dict(),
        "activations": list(program.activations),
        "classes": list(program.classes),
        "in_channels": program.in_channels,
        "records": [asdict(record) for record in program.records],
    }


def rebuilt_program(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Program:
    """The program that `describe_program` described, holding `tensors`.

    Raises:
        LoadError: if the description names what fcvgg does not know, or tensors do not fit.
    """
    tree = nn.Module()
    for name, layer in description["layers"].items():
        _put(tree, name, _decoded_layer(name, layer))
    _fill(tree, tensors, set(description["buffers_outside_checkpoints"]))
    for name in description["frozen"]:
        tree.get_parameter(name).requires_grad_(False)
    graph = _decoded_graph(description["graph"])
    return Program(
        network=graph_module(tree.eval(), graph),
        geometry=Geometry.from_dict(description["geometry"]),
        activations=tuple(description["activations"]),
        classes=tuple(description["classes"]),
        in_channels=description["in_channels"],
        records=tuple(_record(record) for record in description["records"]),
        aliases=frozenset(description["aliases"]),
    )


# -- files ----------------------------------------------------------------------------------------


def write_bundle(
    path: Path, program: Program, settings: Mapping[str, Any], replaceable: bool = True
) -> None:
    """Write a bundle to a new folder; a bundle already there is replaced when the new one is whole.

    Raises:
        FcvggError: if `path` is something else than a bundle, or cannot be written.
    """
    if path.exists() and not (replaceable and is_bundle(path)):
        raise FcvggError(f"{path} exists and is no bundle of fcvgg; choose another name")
    if not path.parent.is_dir():
        raise FcvggError(f"cannot write {path}: there is no folder {path.parent}")
    config = {"library_name": "fcvgg", "format": _FORMAT, **settings, **describe_program(program)}
    tensors, shared = _unique_tensors(program.network)
    config["shared_tensors"] = shared
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            save_file(tensors, folder / TENSORS, {"format": "pt"})
            (folder / TENSORS).chmod(0o644)
            (folder / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n")
            folder.chmod(0o755)
            _take_place(folder, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise FcvggError(f"cannot write {path}: {one_line(error)}") from error


def read_bundle(path: Path) -> tuple[Program, dict[str, Any]]:
    """The program and the settings of a bundle.

    Raises:
        LoadError: if it is no bundle, is broken, or its tensors do not fit.
    """
    config = _read_config(path / CONFIG)
    try:
        tensors = load_file(path / TENSORS)
    except FileNotFoundError as error:
        raise LoadError(f"{path} holds no {TENSORS}; a bundle is {CONFIG} and {TENSORS}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path / TENSORS} is broken: {one_line(error)}") from error
    try:
        for name, twin in config["shared_tensors"].items():
            if twin in tensors:
                tensors[name] = tensors[twin]
        return rebuilt_program(config, tensors), config
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise LoadError(f"{path / CONFIG} does not describe a network: {error!r}") from error


def is_bundle(path: str | Path) -> bool:
    """Whether a path is a folder that `write_bundle` wrote."""
    try:
        config = json.loads((Path(path) / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("library_name") == "fcvgg"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise LoadError(f"{path.parent} is no bundle: it holds no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} is broken: {one_line(error)}") from error
    if not isinstance(config, dict) or config.get("library_name") != "fcvgg":
        raise LoadError(f"{path} is not fcvgg's: expected library_name 'fcvgg'")
    if config.get("format") != _FORMAT:
        raise LoadError(
            f"{path} has format {config.get('format')!r}, and this version of fcvgg reads "
            f"{_FORMAT}; upgrade fcvgg"
        )
    return config


def _take_place(folder: Path, path: Path) -> None:
    """Give a finished folder its name; the bundle that had it is removed only then.

    Files that somebody put beside the bundle's own, such as a README, stay.
    """
    if not path.exists():
        folder.rename(path)
        return
    old = path.with_name(f".{path.name}-replaced")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    try:
        folder.rename(path)
    except OSError:
        old.rename(path)
        raise
    for added in old.iterdir():
        if added.name not in (CONFIG, TENSORS):
            added.rename(path / added.name)
    shutil.rmtree(old, ignore_errors=True)


# -- tensors --------------------------------------------------------------------------------------


def _named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def _unique_tensors(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, and for further names of one the name it is kept under."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in _named_tensors(network):
        if id(tensor) in names:
            shared[name] = names[id(tensor)]
        else:
            names[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    pointers: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in list(tensors.items()):  # views of one storage
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and pointers.setdefault(key, name) != name:
            tensors[name] = tensor.clone()
    return tensors, shared


def _not_persistent(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_buffers()} - set(network.state_dict())


def _fill(tree: nn.Module, tensors: Mapping[str, Tensor], transient: set[str]) -> None:
    """Give the layers their tensors, and make places for those that no layer declares."""
    expected = dict(_named_tensors(tree))
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise LoadError(
            f"{TENSORS} lacks {len(missing)} tensors: {', '.join(missing[:_LISTED])}"
            f"{', ...' if len(missing) > _LISTED else ''}"
        )
    for name, tensor in expected.items():
        if name.rpartition(".")[2] != "column_order" and tensors[name].shape != tensor.shape:
            raise LoadError(
                f"{TENSORS} holds {name} of shape {tuple(tensors[name].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
    parameters = {name for name, t in expected.items() if isinstance(t, nn.Parameter)}
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        owner_name, _, child = name.rpartition(".")
        owner = _owner(tree, owner_name)
        is_buffer = name in transient or (name in expected and name not in parameters)
        if is_buffer or not tensor.is_floating_point():
            owner.register_buffer(child, tensor, persistent=name not in transient)
        else:
            owner.register_parameter(child, made.setdefault(id(tensor), nn.Parameter(tensor)))


def _put(tree: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, child = name.rpartition(".")
    _owner(tree, owner).add_module(child, layer)


def _owner(tree: nn.Module, name: str) -> nn.Module:
    """The module of that path, with plain modules made on the way."""
    for child in filter(None, name.split(".")):
        if child not in tree._modules:
            tree.add_module(child, nn.Module())
        tree = tree.get_submodule(child)
    return tree


# -- layers ---------------------------------------------------------------------------------------


def _layer_classes() -> dict[str, type[nn.Module]]:
    """Every layer that a bundle may hold, by its name in the file."""
    classes = [target for target in RULES if isinstance(target, type)]
    classes += [
        cls
        for cls in vars(own_modules).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module)
    ]
    return {_class_name(cls): cls for cls in classes if issubclass(cls, nn.Module)}


def _class_name(cls: type) -> str:
    space = "nn" if cls.__module__.startswith("torch.nn.modules") else cls.__module__
    return f"{space}.{cls.__qualname__}"


def _called(network: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    names = dict.fromkeys(str(n.target) for n in network.graph.nodes if n.op == "call_module")
    return ((name, network.get_submodule(name)) for name in names)


def _encoded_layer(name: str, layer: nn.Module) -> dict[str, Any]:
    if nn.utils.parametrize.is_parametrized(layer):
        raise FcvggError(
            f"{name} ({type(layer).__name__}) has parametrized weights, which a bundle cannot "
            "hold; call torch.nn.utils.parametrize.remove_parametrizations before convert"
        )
    settings = {}
    kind = class_of(layer)
    for key in _settings_of(kind):
        value = getattr(layer, key, None)
        settings[key] = value is not None if key == "bias" else _encoded(value, name)
    return {"type": _class_name(kind), "settings": settings}


def _decoded_layer(name: str, data: Mapping[str, Any]) -> nn.Module:
    cls = _layer_classes().get(data["type"])
    if cls is None:
        raise LoadError(
            f"the bundle's layer {name} is a {data['type']}, which this fcvgg has no rule for; "
            "register its rule (see fcvgg.layers) before loading"
        )
    allowed = _settings_of(cls)
    settings = {k: _decoded(v, {}) for k, v in data["settings"].items() if k in allowed}
    if "device" in inspect.signature(cls).parameters:
        settings["device"] = "meta"
    return cls(**settings)


def _settings_of(cls: type) -> list[str]:
    """The arguments that make a layer: torch keeps each as an attribute of the same name."""
    skipped = {"device", "dtype", "init", "column_order", "num_batches_tracked"}
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    arguments = inspect.signature(cls).parameters.values()
    return [a.name for a in arguments if a.kind in named and a.name not in skipped]


# -- the graph ------------------------------------------------------------------------------------

_OWN_FUNCTIONS: tuple[Callable[..., Any], ...] = (own_modules.window_linear, torch.index_select)


def _functions() -> dict[str, Callable[..., Any]]:
    """Every function that a bundle's graph may call, by its name in the file."""
    spaces = {"torch": torch, "F": F, "operator": operator, "torchvision.ops": torchvision.ops}
    known = {target for target in RULES if callable(target) and not isinstance(target, type)}
    found = {
        f"{space}.{name}": getattr(module, name)
        for space, module in spaces.items()
        for name in dir(module)
        if not name.startswith("__") and _hashable_in(getattr(module, name), known)
    }
    found.update({f"fcvgg.{function.__name__}": function for function in _OWN_FUNCTIONS})
    return found


def _hashable_in(value: Any, known: set[Any]) -> bool:
    try:
        return value in known
    except TypeError:
        return False


_OWN_METHODS = {"narrow", "reshape", "movedim"}


def _methods() -> set[str]:
    return {target for target in RULES if isinstance(target, str)} | _OWN_METHODS


def _encoded_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    names = {function: name for name, function in reversed(_functions().items())}
    return [_encoded_node(node, names) for node in graph.nodes]


def _encoded_node(node: fx.Node, names: Mapping[Callable[..., Any], str]) -> dict[str, Any]:
    target = node.target
    if callable(target):
        if target not in names:
            raise FcvggError(
                f"{node.name} calls {getattr(target, '__name__', target)}, which a bundle cannot "
                "hold; register a rule for it (see fcvgg.layers)"
            )
        target = names[target]
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": [_encoded(a, node.name) for a in node.args],
        "kwargs": {k: _encoded(v, node.name) for k, v in node.kwargs.items()},
    }


def _decoded_graph(nodes: list[Mapping[str, Any]]) -> fx.Graph:
    graph, made = fx.Graph(), dict[str, fx.Node]()
    functions, methods = _functions(), _methods()
    for data in nodes:
        op, target = data["op"], data["target"]
        if op == "call_function":
            if target not in functions:
                raise LoadError(f"the bundle calls {target!r}, which fcvgg has no rule for")
            target = functions[target]
        elif op == "call_method" and target not in methods:
            raise LoadError(f"the bundle calls Tensor.{target}, which fcvgg has no rule for")
        elif op not in ("placeholder", "get_attr", "call_module", "call_method", "output"):
            raise LoadError(f"the bundle's graph has an unknown operation {op!r}")
        args = tuple(_decoded(a, made) for a in data["args"])
        kwargs = {k: _decoded(v, made) for k, v in data["kwargs"].items()}
        made[data["name"]] = graph.create_node(op, target, args, kwargs, data["name"])
    graph.lint()
    return graph


# -- values ---------------------------------------------------------------------------------------


def _encoded(value: Any, place: str) -> Any:
    """A call's argument as JSON; what JSON lacks becomes an object with one key."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and value in (torch.inf, -torch.inf):
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


def _decoded(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decoded(v, nodes) for v in content)
    if kind == "slice":
        return slice(*(_decoded(v, nodes) for v in content))
    if kind == "torch":
        found = getattr(torch, content)
        if isinstance(found, (torch.dtype, torch.memory_format)):
            return found
    raise LoadError(f"the bundle holds an unknown value {value!r}")


def _record(data: Mapping[str, Any]) -> LayerRecord:
    windows = tuple(Window(**window) for window in data["windows"])
    return LayerRecord(**{**data, "windows": windows})


def encoded_preprocess(preprocess: Preprocess | None) -> dict[str, Any] | None:
    """A `Preprocess` as plain data."""
    return None if preprocess is None else asdict(preprocess)


def decoded_preprocess(data: Mapping[str, Any] | None) -> Preprocess | None:
    """The `Preprocess` of `encoded_preprocess`."""
    if data is None:
        return None
    known = {field.name for field in fields(Preprocess)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
    return Preprocess(**values)  # type: ignore[arg-type]  # a broken file fails in its checks
