"""Read a model's computation as a graph whose every value has a known shape.

`capture` traces with `torch.fx` while it computes every value's shape on the meta device at one
input size, so that Python code which asks for shapes gets numbers, branches on shapes are taken
as they are at that size, and nothing is computed. The model is not touched: a twin without data
is traced in its place.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from fcvgg.errors import CaptureError, ConversionError, InputSizeError, one_line
from fcvgg.placement import dtype_of

BATCH = 2
"""Images in the traced batch. Two, so that a reshape that moves pixels into the batch shows."""


class FollowsTraining(int):
    """Stands for ``self.training`` while a model is traced: false, and recognisable as an argument.

    Functional dropout and batch norm receive the mode as a plain bool; this lets the converted
    network pass its own mode on instead of the one at the time of conversion.
    """


class FeatureSize(int):
    """A number that a model computes from the height or width of its features.

    A pool of that size is a global one; the same number written out need not be.
    """

    def __add__(self, other: int) -> int:
        return _of_features(int.__add__(self, other))

    def __sub__(self, other: int) -> int:
        return _of_features(int.__sub__(self, other))

    def __mul__(self, other: int) -> int:
        return _of_features(int.__mul__(self, other))

    def __floordiv__(self, other: int) -> int:
        return _of_features(int.__floordiv__(self, other))

    __radd__, __rmul__ = __add__, __mul__


def _of_features(number: Any) -> Any:
    return FeatureSize(number) if isinstance(number, int) else number  # also NotImplemented


class Captured:
    """A traced model: its graph, with every node's value on the meta device, and its constants."""

    def __init__(self, graph: fx.Graph, root: nn.Module, size: tuple[int, int], channels: int):
        self.graph = graph
        self.root = root
        self.size = size
        self.channels = channels

    def failure(self) -> fx.Node | None:
        """The first node that does not run at the captured size."""
        return next((node for node in self.graph.nodes if "error" in node.meta), None)

    def require_success(self) -> None:
        node = self.failure()
        if node is not None:
            height, width = self.size
            raise InputSizeError(
                f"the model does not run at input size ({height}, {width}): {describe(node)} fails "
                f"with '{one_line(node.meta['error'])}'; pass the model's native size as input_size"
            )


def capture(
    model: nn.Module,
    size: tuple[int, int],
    is_leaf: Callable[[nn.Module], bool],
    channels: int | None = None,
) -> Captured:
    """Trace `model` for images of `size` ``(H, W)``.

    A node that fails at this size keeps its error in ``node.meta["error"]`` and no value; tracing
    goes on while Python needs no shape of what is unknown.

    Args:
        is_leaf: whether a module has a rule of its own and is not looked into.
        channels: the image's channels; read off the first convolution when None.

    Raises:
        CaptureError: if the model branches on values or cannot be traced for another reason.
        InputSizeError: if the model asserts another size.
    """
    captured = _traced(model, size, is_leaf, channels or input_channels(model))
    read = _channels_read(captured) if channels is None else None
    return _traced(model, size, is_leaf, read) if read is not None else captured


def _traced(
    model: nn.Module, size: tuple[int, int], is_leaf: Callable[[nn.Module], bool], channels: int
) -> Captured:
    twin = _without_data(model, is_leaf)
    tracer = _ShapeTracer(is_leaf, (BATCH, channels, *size), dtype_of(model))
    try:
        graph = tracer.trace(twin)
    except _ShapeUnknownError as stop:
        graph = stop.graph
    except CaptureError:
        raise
    except AssertionError as error:
        raise InputSizeError(
            f"the model refuses input size {size}: {one_line(error)}; "
            "pass the model's native size as input_size"
        ) from error
    except Exception as error:
        raise CaptureError(
            f"the model's forward cannot be traced with torch.fx: {one_line(error)}; "
            "it must be a function of one image batch without control flow on values"
        ) from error
    return Captured(graph, tracer.root, size, channels)


def input_channels(model: nn.Module) -> int:
    """Channels of the first convolution in the order of definition; 3 if there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return next((p.shape[1] for p in model.parameters() if p.ndim == 4), 3)


def _channels_read(captured: Captured) -> int | None:
    """The channels that the first convolution called takes, if it failed for want of them."""
    for node in captured.graph.nodes:
        if node.op == "call_module":
            layer = captured.root.get_submodule(str(node.target))
            if isinstance(layer, nn.Conv2d):
                wrong = "error" in node.meta and layer.in_channels != captured.channels
                return layer.in_channels if wrong else None
    return None


def describe(node: fx.Node) -> str:
    """A node as its author knows it: ``features.0 (Conv2d)`` or ``flatten (in classifier)``."""
    if node.op == "call_module":
        return f"{node.target} ({node.meta['module_type']})"
    owner = node.meta.get("owner", "")
    return f"{node.name} ({operation_name(node)}{f' in {owner}' if owner else ''})"


def operation_name(node: fx.Node) -> str:
    """The name of a node's function or method: ``torch.flatten``, ``Tensor.view``."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks watch, and may change, what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def twin_of(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of the modules without their hooks, which belong to whoever watches the source.

    Args:
        memo: by `id`, what stands in the copy for the parameters and buffers.

    Raises:
        ConversionError: if hooks compute weights, or the modules cannot be copied.
    """
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            parts = any(part.startswith(f"{attribute}_") for part in module._parameters)
            if isinstance(value, Tensor) and parts and module._forward_pre_hooks:
                raise ConversionError(
                    f"{name} ({type(module).__name__}) has a {attribute} that a hook computes; make"
                    " it a parameter first with torch.nn.utils.remove_weight_norm, "
                    "remove_spectral_norm or prune.remove"
                )
    hooks: dict[int, Any] = {
        id(getattr(module, hook)): OrderedDict() for module in model.modules() for hook in _HOOKS
    }
    try:
        return copy.deepcopy(model, {**memo, **hooks})
    except Exception as error:
        raise ConversionError(
            f"the modules of {type(model).__name__} cannot be copied: "
            f"{_uncopied(model, {**memo, **hooks})}{one_line(error)}; "
            "delete what cannot be copied, or set it to None, before converting"
        ) from error


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


def _without_data(model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> nn.Module:
    """A copy on the meta device, in evaluation mode, that remembers where it reads its mode."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise CaptureError(
            "the model has lazy layers whose parameters are not initialised yet; "
            "run it once on an image of its native size first"
        )
    memo: dict[int, Any] = {}
    for tensor in tensors:
        # what an index gives has no shape without its values
        meta = tensor.detach().to("meta" if tensor.is_floating_point() else tensor.device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
    twin = twin_of(model, memo)
    for module in twin.modules():
        # torch's own layers insist on a bool; only traced code can pass the mode on
        module.training = False if is_leaf(module) else FollowsTraining(False)  # type: ignore
    return twin


def storages_of(value: Any) -> set[int]:
    """Which memory a value's tensors lie in."""
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor)}


def _version(node: fx.Node) -> int:
    """How often a value, or one that shares its memory, was changed in place."""
    value = node.meta["value"]
    return value._version if isinstance(value, Tensor) else 0


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of a function of torch's that is written in Python, by name or by position."""
    if name in node.kwargs or node.op != "call_function":
        return node.kwargs.get(name)
    try:
        return inspect.signature(node.target).bind(*node.args).arguments.get(name)  # type: ignore
    except (TypeError, ValueError):
        return None


def _known(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return argument.meta["value"]
    return bool(argument) if isinstance(argument, FollowsTraining) else argument


def _known_index(index: Any) -> Any:
    """What a value is indexed by: integers and booleans with their values, which decide shapes."""
    if isinstance(index, tuple):
        return tuple(map(_known_index, index))
    if isinstance(index, list) and all(isinstance(i, int) for i in index):
        return torch.tensor(list(index))
    if isinstance(index, fx.Node) and "index" in index.meta:
        return index.meta["index"]
    return fx.node.map_aggregate(index, _known)


class _ShapeUnknownError(Exception):
    """Python asked for the shape of a value that could not be computed at this size."""

    def __init__(self, graph: fx.Graph):
        super().__init__()
        self.graph = graph


class _ShapeTracer(fx.Tracer):
    """Traces as fx does and computes every node's value on the meta device on the way."""

    def __init__(
        self,
        is_leaf: Callable[[nn.Module], bool],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ):
        super().__init__()
        self._is_leaf = is_leaf
        self._images = torch.empty(shape, dtype=dtype, device="meta")
        self._computing = False

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._computing:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # buffers too: fx would compute with them at once, and here they have no data
        name = None if self._computing else self._tensor_names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    @cached_property
    def _tensor_names(self) -> dict[int, str]:
        named = chain(self.root.named_parameters(), self.root.named_buffers())
        return {id(tensor): name for name, tensor in named}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # Only the images are traced: further arguments of forward keep their defaults.
        images = self.create_proxy("placeholder", "images", (), {})
        return root_fn, [self.root, images]

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **names: Any
    ) -> fx.Node:
        if kind == "call_function" and not args and "input" in kwargs:
            # F.relu(input=x): torch's first argument, which rules take in its place
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        node = super().create_node(kind, target, args, kwargs, *more, **names)
        if self.module_stack:
            node.meta["owner"] = next(reversed(self.module_stack.values()))[0]
        if kind == "call_module":
            node.meta["module_type"] = type(self.root.get_submodule(target)).__name__
        self._compute(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ShapedProxy(node, self)

    def _compute(self, node: fx.Node) -> None:
        """Set ``node.meta["value"]``, or ``node.meta["error"]`` where it fails or is not known."""
        if node.op == "output":
            return
        if any("value" not in fed.meta for fed in node.all_input_nodes):
            return
        self._computing = True  # what a layer calls and reads meanwhile is not recorded
        versions = [(fed, _version(fed)) for fed in node.all_input_nodes]
        try:
            with torch.no_grad():
                node.meta["value"] = self._run(node)
            node.meta["changes"] = self._changed(node, versions)
        except Exception as error:
            node.meta["error"] = error
        finally:
            self._computing = False

    def _changed(self, node: fx.Node, versions: list[tuple[fx.Node, int]]) -> fx.Node | None:
        """The value that a node changes in place, also if it does so in training only."""
        first = next(iter(node.args), None)
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        inplace = getattr(module, "inplace", False) or _argument(node, "inplace")
        if inplace and isinstance(first, fx.Node):
            return first
        return next((fed for fed, before in versions if _version(fed) != before), None)

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._images
        if node.op == "get_attr":
            value: Any = self.root
            for name in str(node.target).split("."):
                value = getattr(value, name)
            if isinstance(value, Tensor) and not value.is_floating_point():
                node.meta["index"] = value.cpu()
            return value.to("meta") if isinstance(value, Tensor) else value
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _known)  # type: ignore
        if node.target is operator.getitem:
            args = (args[0], _known_index(node.args[1]))
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def value_of(self, proxy: fx.Proxy) -> Any:
        node = proxy.node
        if "value" not in node.meta:
            raise _ShapeUnknownError(self.graph)
        return node.meta["value"]

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = self.value_of(obj)
        if isinstance(value, Tensor):
            raise CaptureError(
                f"control flow on values: the model branches on {describe(obj.node)}; "
                "branches may depend on shapes and on the mode only"
            )
        return bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self.value_of(obj)
        if isinstance(value, (Tensor, tuple, list)):
            return iter([operator.getitem(obj, i) for i in range(len(value))])  # type: ignore
        raise CaptureError(f"the model iterates over {describe(obj.node)}, which is no sequence")


class _ShapedProxy(fx.Proxy):
    """A traced value that answers questions about its shape with numbers."""

    tracer: _ShapeTracer

    _CONSTANTS = frozenset({"shape", "ndim", "dtype", "is_cuda", "requires_grad"})
    _SHAPE_METHODS = frozenset({"size", "dim", "numel", "ndimension", "nelement", "stride"})
    _VALUE_METHODS = frozenset({"item", "tolist", "numpy"})

    def __getattr__(self, name: str) -> Any:
        if name in self._CONSTANTS:
            value = getattr(self.tracer.value_of(self), name)
            return _marked(value) if name == "shape" else value
        if name == "size":
            return self._size
        if name in self._SHAPE_METHODS:
            value = self.tracer.value_of(self)
            return lambda *args, **kwargs: getattr(value, name)(*args, **kwargs)
        if name == "device":
            return torch.device("cpu")
        if name in self._VALUE_METHODS:
            raise self._depends_on_values(f"Tensor.{name}")
        parts = self.node.meta.get("value")
        if isinstance(parts, tuple) and hasattr(parts, name):  # x.max(2).values
            named = getattr(parts, name)
            for i, part in enumerate(parts):
                if part is named:
                    return operator.getitem(self, i)  # type: ignore[call-overload]
        return super().__getattr__(name)

    def _size(self, dim: int | None = None) -> Any:
        value = self.tracer.value_of(self)
        sizes = _marked(value.size())
        return sizes if dim is None else sizes[dim]

    def __len__(self) -> int:
        return len(self.tracer.value_of(self))

    def __float__(self) -> float:
        raise self._depends_on_values("float()")

    def __int__(self) -> int:
        raise self._depends_on_values("int()")

    __index__ = __int__

    # fx would trace ``x += y`` as ``x = x + y``, after which other names of x keep the old value

    def __iadd__(self, other: Any) -> Any:
        return self._changed_to(self + other)

    def __isub__(self, other: Any) -> Any:
        return self._changed_to(self - other)

    def __imul__(self, other: Any) -> Any:
        return self._changed_to(self * other)

    def __itruediv__(self, other: Any) -> Any:
        return self._changed_to(self / other)

    def _changed_to(self, result: fx.Proxy) -> fx.Proxy:
        """A result in this value's place: where one shares the memory, it changes too."""
        own, meta = self.node.meta.get("value"), result.node.meta
        if isinstance(own, Tensor) and "value" in meta and meta["value"].shape == own.shape:
            meta.update(value=own, changes=self.node, anew=True)
        return result

    def _depends_on_values(self, what: str) -> CaptureError:
        return CaptureError(
            f"control flow on values: the model turns {describe(self.node)} into a number with "
            f"{what}; the graph may depend on shapes and on the mode only"
        )


def _marked(shape: torch.Size) -> torch.Size:
    """The shape of a map ``(N, C, H, W)`` with a height and width that tell where they are from."""
    if len(shape) != 4:
        return shape
    return torch.Size([*shape[:2], *map(FeatureSize, shape[2:])])
