"""Record a model's computation while its Python code runs on tensors without data.

The model runs as it is, on tensors of the meta device: real `torch.Tensor` objects, so that any
Python code works that computes with shapes, types and devices. A `TorchFunctionMode` sees every
call of torch's API and writes it into a graph; a module that has a rule is recorded as one call.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.jit import ScriptFunction
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from fcvgg.errors import CaptureError
from fcvgg.rewriting.decompositions import WRITTEN_OUT
from fcvgg.rewriting.marks import FeatureSize, FollowsTraining, ModeQuestions
from fcvgg.rewriting.outputs import Form, OutputFormError, flattened, tuple_of
from fcvgg.rewriting.torch_calls import (
    CASTS,
    IN_PLACE,
    LIKE,
    NEW,
    NOT_OVERRIDDEN,
    NUMBERS,
    OF_DEVICES,
    OF_GRADIENTS,
    OPERATORS,
    QUESTIONS,
    REFLECTED,
)
from fcvgg.support.module_state import in_mode


class ShapeUnknownError(Exception):
    """Python asked for the shape of a value that could not be computed at this size."""


class Unknown(Tensor):
    """A value that does not run at this size, or is computed from one that does not."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class Recorder(TorchFunctionMode):
    """Runs a model without data and records its calls.

    A node keeps its value in ``node.meta["value"]``, or in ``node.meta["error"]`` why it fails at
    this size. Recording goes on after a failure while Python needs no shape of what is unknown.

    Args:
        root: the model's twin without data. Its modules' `forward` is wrapped while it runs.
        is_known: whether a module, a function or the name of a method has a rule. Known modules
            are not looked into; unknown functions that are written in Python are.
        training_only: paths of modules that are recorded as one call, with a rule or without.
    """

    def __init__(
        self,
        root: nn.Module,
        is_known: Callable[[Any], bool],
        questions: ModeQuestions,
        training_only: set[str],
    ):
        super().__init__()
        self.root = root
        self.graph = fx.Graph()
        self.training_only = training_only
        self.outputs: Form = tuple_of(0)
        self._is_known = is_known
        self._questions = questions
        self._paused = False
        self._owners: list[str] = [""]
        self._failed = ""
        self._autocast = _autocast_state()
        # tensors are found by their id, which holds only while they live: all are kept
        self._nodes: dict[int, fx.Node] = {}
        self._parts: dict[int, tuple[fx.Node, int]] = {}
        named = [*root.named_parameters(), *root.named_buffers()]
        self._named = {id(tensor): name for name, tensor in named}
        self._kept: list[Any] = [tensor for _, tensor in named]
        self._open: list[FunctionType] = []

    def record(self, images: Tensor) -> None:
        """Run the model on `images` ``(N, C, H, W)`` of the meta device."""
        node = self.graph.placeholder("images")
        node.meta["value"] = images
        self._nodes[id(images)] = node
        # a graph module's own call prints the code where an error comes from
        run = (
            nn.Module.__call__
            if isinstance(self.root, fx.GraphModule)
            else type(self.root).__call__
        )
        with self._wrapped_modules(), _scripts_as_written(), _plain_gradient_modes(), self:
            result = run(self.root, images)
            tensors, self.outputs = self._returned(result)
            nodes = tuple(map(self._node_of, tensors))
            self.graph.output(nodes[0] if self.outputs.is_tensor else nodes)

    @staticmethod
    def _returned(result: Any) -> tuple[list[Tensor], Form]:
        try:
            tensors, form = flattened(result)
            if tensors:
                return tensors, form
            wrong, place = result, ""
        except OutputFormError as error:
            wrong, place = error.value, error.place
        what = "None" if wrong is None else type(wrong).__name__
        raise CaptureError(
            f"the model returns {what}{f' as output {place}' if place else ''} where class scores "
            "are expected; wrap it so that it returns tensors (N, K), alone or in tuples, lists, "
            "dicts, NamedTuples or dataclasses"
        )

    def place(self) -> str:
        """Where recording stopped, as the beginning of a message."""
        last = next(iter(reversed(self.graph.nodes)), None)
        within = f"in {self._failed}" if self._failed else ""
        after = f"after {describe(last)}" if last is not None and last.op[:4] == "call" else ""
        return f"{within}{', ' if within and after else ''}{after}: " if within or after else ""

    # -- modules ----------------------------------------------------------------------------------

    @contextmanager
    def _wrapped_modules(self) -> Iterator[None]:
        own: list[tuple[nn.Module, Any]] = []
        try:
            for path, module in list(self.root.named_modules()):
                own.append((module, vars(module).get("forward")))
                vars(module)["forward"] = self._wrapped(path, module)
            yield
        finally:
            for module, forward in own:
                if forward is None:
                    vars(module).pop("forward")
                else:
                    vars(module)["forward"] = forward

    def _wrapped(self, path: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward
        if "_orig_mod" in module._modules:  # what torch.compile makes of a module
            forward = module.get_submodule("_orig_mod").__call__
        looked_into = runs_own_forward(module) or module._forward_pre_hooks  # compute its weights
        whole = path != "" and (
            path in self.training_only or (self._is_known(module) and not looked_into)
        )

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._paused:
                return forward(*args, **kwargs)
            self._owners.append(path)
            try:
                if whole:
                    return self._call("call_module", path, forward, args, kwargs)
                result = forward(*args, **kwargs)
            except Exception:
                self._failed = self._failed or path
                raise
            finally:
                self._owners.pop()
            unchanged = len(args) == 1 and result is args[0] and not kwargs
            if path and unchanged and self._works_in_training(path, module, result):
                self.training_only.add(path)
                return self._call("call_module", path, forward, args, kwargs)
            return result

        return call

    def _works_in_training(self, path: str, module: nn.Module, x: Any) -> bool:
        """Whether a module takes a map to one of its shape in training mode, holding no data."""
        if self._questions.places.isdisjoint(_within(path, module)):
            return False
        if (
            not isinstance(x, Tensor)
            or isinstance(x, Unknown)
            or x.ndim != 4
            or module.state_dict()
        ):
            return False
        try:
            with in_mode(module, True), self._unrecorded():
                made = module(x.clone())
                return isinstance(made, Tensor) and made.shape == x.shape
        except Exception:
            return False

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """What modules call, read and ask meanwhile is computed and not recorded."""
        before = self._paused, self._questions.paused
        self._paused = self._questions.paused = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._paused, self._questions.paused = before

    # -- functions --------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused or not self._is_traced((args, kwargs)):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            return self._attribute(func, name, args)
        # a function of torch's that is a line of others is recorded as those, which have rules;
        # a rule that a user registered for it comes first
        written = WRITTEN_OUT.get(name)
        if written is not None and not (self._is_known(func) or self._is_known(name)):
            with self:
                return written(*args, **kwargs)
        if is_tensor_method_or_property(func) or getattr(Tensor, name, None) is func:
            return self._method(func, name, args, kwargs)
        if not args and "input" in kwargs:
            # F.relu(input=x): torch's first argument, which rules take in its place
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        if self._opens(func, func):
            return self._opened(func, args, kwargs)
        return self._call("call_function", func, func, args, kwargs)

    def _method(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        if name in QUESTIONS:
            return self._shape_answer(func, x, args, kwargs)
        if name in NUMBERS:
            return self._number(func, name, x)
        if name in OF_GRADIENTS:
            return x
        if name in CASTS:
            return self._cast(name, args, kwargs)
        if name in LIKE:  # x.view_as(y)
            return self._call(
                "call_method", name[:-3], getattr(Tensor, name[:-3]), (x, *args[1].shape), {}
            )
        if name in NEW:
            return NEW[name](*args[1:], **{"dtype": x.dtype, **kwargs, "device": "cpu"})
        if name == "__iter__":
            return iter([x[i] for i in range(len(x))])
        if name in REFLECTED:
            return self._call("call_function", REFLECTED[name], func, args[::-1], kwargs, args)
        if name == "__setitem__":
            return self._call("call_function", operator.setitem, func, args, kwargs, anew=True)
        if name in IN_PLACE and not kwargs and len(args) == 2:
            return self._call("call_function", IN_PLACE[name], func, args, kwargs, anew=True)
        if name in OPERATORS and not kwargs and len(args) < 3:
            return self._call("call_function", OPERATORS[name], func, args, kwargs)
        if self._opens(func, name):
            return self._opened(func, args, kwargs)
        return self._call("call_method", name, func, args, kwargs)

    def _opens(self, func: Any, target: Any) -> bool:
        """Whether a function is looked into: one of torch's, in Python, that has no rule."""
        return (
            isinstance(func, FunctionType)
            and func.__module__.partition(".")[0] == "torch"
            and not self._is_known(target)
            and func not in self._open
        )

    def _opened(self, func: FunctionType, args: Any, kwargs: Any) -> Any:
        """Run the body of a function of torch's, which would otherwise ask for this mode again."""
        body = FunctionType(
            func.__code__,
            {**func.__globals__, **NOT_OVERRIDDEN},
            func.__name__,
            func.__defaults__,
            func.__closure__,
        )
        body.__kwdefaults__ = func.__kwdefaults__
        self._open.append(func)
        try:
            with self:  # torch took the mode away for this call; the body's calls are recorded
                return body(*args, **kwargs)
        finally:
            self._open.pop()

    def _attribute(self, func: Any, name: str, args: tuple[Any, ...]) -> Any:
        x = args[0]
        attribute = getattr(func.__self__, "__name__", "")
        if name == "__set__":
            if attribute == "requires_grad":
                return None
            raise CaptureError(
                f"the model sets the {attribute} of {self._described(x)}; assign the value to a "
                "new name"
            )
        if attribute in OF_DEVICES:
            return OF_DEVICES[attribute]
        if attribute == "data":
            return self._call("call_method", "detach", Tensor.detach, (x,), {})
        if attribute in ("T", "mT", "H", "mH"):
            with self:
                return x.transpose(-2, -1)
        return self._shape_answer(func, x, args, {})

    def _shape_answer(self, func: Any, x: Tensor, args: Any, kwargs: Any) -> Any:
        """What is known of a value without its data."""
        if isinstance(x, Unknown):
            raise ShapeUnknownError
        answer = func(*args, **kwargs)
        # only of maps: the sizes of vectors do not follow from the size of the image
        marks = id(x) in self._nodes and x.ndim == 4
        if marks and isinstance(answer, torch.Size):
            return torch.Size([*answer[:2], *map(FeatureSize, answer[2:])])
        if marks and func is Tensor.size:
            dim = args[1] if args[1:] else kwargs["dim"]
            return FeatureSize(answer) if dim % 4 > 1 else answer
        return answer

    def _number(self, func: Any, name: str, x: Tensor) -> Any:
        if isinstance(x, Unknown):
            raise ShapeUnknownError
        if not x.is_meta:
            return func(x)
        if name == "__bool__":
            raise CaptureError(
                f"control flow on values: the model branches on {self._described(x)}; "
                "branches may depend on shapes and on the mode only"
            )
        what = f"{name.strip('_')}()" if name.startswith("__") else f"Tensor.{name}"
        raise CaptureError(
            f"control flow on values: the model turns {self._described(x)} into a number with "
            f"{what}; the graph may depend on shapes and on the mode only"
        )

    def _cast(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``x.to(...)`` without devices and layouts: the network runs where its images lie."""
        x, dtype = args[0], None
        if isinstance(x, Unknown):
            raise ShapeUnknownError
        for argument in (*args[1:], *kwargs.values()):
            if isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, Tensor):
                dtype = argument.dtype
            elif isinstance(argument, str) and name == "type":
                dtype = torch.empty(0).type(argument).dtype
        if id(x) not in self._nodes and id(x) not in self._parts and id(x) not in self._named:
            return x if dtype is None else x.to(dtype)  # a tensor that forward made
        if kwargs.get("copy"):
            x = self._call("call_method", "clone", Tensor.clone, (x,), {})
        if dtype in (None, x.dtype):  # what the source is cast to, the network may be cast from
            return x
        return self._call("call_method", "to", Tensor.to, (x, dtype), {})

    # -- nodes ------------------------------------------------------------------------------------

    def _is_traced(self, arguments: Any) -> bool:
        """Whether a call takes values of the model, and not only tensors that its code made."""
        known = (self._nodes, self._parts, self._named)
        return any(id(x) in tensors for x in _tensors(arguments) for tensors in known)

    def _call(
        self,
        op: str,
        target: Any,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run_args: tuple[Any, ...] | None = None,
        anew: bool = False,
    ) -> Any:
        """Record a call and give what it returns, without data.

        Args:
            run_args: what `run` takes where that differs from the node's arguments.
            anew: the node makes a new value where `run` changes one in place.
        """
        self._check_autocast()
        node_args, node_kwargs = self._as_nodes((args, kwargs))
        made = self.graph.create_node(op, target, node_args, node_kwargs)
        made.meta["owner"] = self._owners[-1]
        if anew:
            made.meta["anew"] = True
        if op == "call_module":
            made.meta["module_type"] = type(self.root.get_submodule(target)).__name__
        return self._computed(made, run, args if run_args is None else run_args, kwargs)

    def _computed(self, node: fx.Node, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The value of a node, which is kept in it, or an unknown one."""
        given = _tensors((args, kwargs))
        # what is computed from an unknown value is unknown too: Python goes on until it asks for
        # a shape, so that the graph holds as much as possible of what the head asks for
        if any(isinstance(x, Unknown) for x in given):
            return self._unknown(node)
        nodes = [self._node_of(x) for x in given]
        args, kwargs = _on_meta(args, node), _on_meta(kwargs, node)
        moved = _tensors((args, kwargs))
        versions = [x._version for x in moved]
        try:
            with self._unrecorded():
                result = run(*args, **kwargs)
        except Exception as error:
            node.meta["error"] = error
            return self._unknown(node)
        # torch counts the changes of every tensor, which tells in-place calls of any spelling
        changed = next((i for i, x in enumerate(moved) if x._version != versions[i]), None)
        if changed is None and given and self._works_in_place(node):
            changed = 0
        node.meta["changes"] = None if changed is None else nodes[changed]
        if changed is None and isinstance(result, Tensor) and any(result is x for x in given):
            with self._unrecorded():  # a value of its own, on the same memory
                result = result.view_as(result)
        if changed is not None:  # what reads the value from here on sees the change
            self._nodes[id(given[changed])] = node
        elif not _tensors(result):
            self.graph.erase_node(node)
            return result
        node.meta["value"] = given[changed] if result is None and changed is not None else result
        self._track(node, result)
        return result

    def _works_in_place(self, node: fx.Node) -> bool:
        """Whether a layer changes its input, also if it does so in training mode only."""
        if node.op == "call_module":
            return bool(getattr(self.root.get_submodule(str(node.target)), "inplace", False))
        return bool(_argument(node, "inplace"))

    def _track(self, node: fx.Node, result: Any) -> None:
        self._kept.append(result)
        if isinstance(result, Tensor):
            self._nodes[id(result)] = node
        elif isinstance(result, (tuple, list)):
            self._parts.update({id(part): (node, i) for i, part in enumerate(result)})

    def _unknown(self, node: fx.Node) -> Unknown:
        value = torch.empty(0, device="meta").as_subclass(Unknown)
        self._kept.append(value)
        self._nodes[id(value)] = node
        return value

    def _as_nodes(self, arguments: Any) -> Any:
        return fx.node.map_aggregate(arguments, self._as_node)

    def _as_node(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._node_of(argument)
        if isinstance(argument, (bool, int, float, complex, str)) or argument is None:
            return argument
        if type(argument).__module__ == "numpy" and hasattr(argument, "shape") and argument.shape:
            return self._node_of(torch.as_tensor(argument))
        if isinstance(argument, Integral):
            return int(argument)
        return float(argument) if isinstance(argument, Real) else argument

    def _node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a value, of a parameter or buffer of the model, or of a literal."""
        if id(tensor) in self._nodes:
            return self._nodes[id(tensor)]
        if id(tensor) in self._parts:
            whole, index = self._parts.pop(id(tensor))
            node = self.graph.call_function(operator.getitem, (whole, index))
            node.meta.update(value=tensor, owner=whole.meta["owner"], changes=None)
        else:
            node = self.graph.get_attr(self._named.get(id(tensor)) or self._literal(tensor))
            node.meta["value"] = tensor.to("meta")
            if not tensor.is_floating_point() and not tensor.is_meta:
                node.meta["index"] = tensor.cpu()
        self._kept.append(tensor)
        self._nodes[id(tensor)] = node
        return node

    def _literal(self, tensor: Tensor) -> str:
        """The name of a tensor that forward made, kept on the root as fx does."""
        if isinstance(tensor, nn.Parameter):
            raise CaptureError(
                f"forward uses a parameter of shape {tuple(tensor.shape)} that is not one of the "
                "model's; assign the module that holds it to an attribute of the model"
            )
        number = 0
        while hasattr(self.root, f"_tensor_constant{number}"):
            number += 1
        setattr(self.root, f"_tensor_constant{number}", tensor)
        return f"_tensor_constant{number}"

    def _described(self, tensor: Tensor) -> str:
        return describe(self._node_of(tensor))

    def _check_autocast(self) -> None:
        if _autocast_state() != self._autocast:
            owner = self._owners[-1]
            raise CaptureError(
                f"forward{f' of {owner}' if owner else ''} runs under torch.autocast, which a "
                "graph does not hold; convert the model without it, and use autocast around the "
                "network"
            )


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a forward was set on the module itself, which runs in place of its class's."""
    return "forward" in vars(module)


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


@contextmanager
def _scripts_as_written() -> Iterator[None]:
    """Scripted functions run the Python code that they were made from, which a mode sees."""
    compiled = ScriptFunction.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        written = getattr(self, "_torchdynamo_inline", None)
        if written is None:
            raise CaptureError(
                f"forward calls {self.name}, a scripted function (torch.jit) whose Python code is "
                "gone; call the function that it was scripted from"
            )
        return written(*args, **kwargs)

    ScriptFunction.__call__ = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        ScriptFunction.__call__ = compiled  # type: ignore[method-assign]


@contextmanager
def _plain_gradient_modes() -> Iterator[None]:
    """Gradient modes in forward change no value: they take the mode as a bool, or do nothing.

    Tensors of inference mode have no version counter, which tells in-place calls.
    """
    set_grad, inference = torch.set_grad_enabled, torch.inference_mode
    before = set_grad.__init__, inference.__enter__, inference.__exit__

    def init(self: Any, mode: Any) -> None:
        before[0](self, int(mode) != 0)

    set_grad.__init__ = init  # type: ignore[method-assign]
    inference.__enter__ = inference.__exit__ = lambda *_: None  # type: ignore
    try:
        yield
    finally:
        set_grad.__init__ = before[0]  # type: ignore[method-assign]
        inference.__enter__, inference.__exit__ = before[1:]  # type: ignore[method-assign]


def _tensors(arguments: Any) -> list[Tensor]:
    found: list[Tensor] = []
    fx.node.map_aggregate(arguments, lambda a: found.append(a) if isinstance(a, Tensor) else None)
    return found


def _on_meta(arguments: Any, node: fx.Node) -> Any:
    """Arguments without data, but for indices, whose values decide shapes."""
    keeps = node.target in (operator.getitem, operator.setitem)

    def moved(argument: Any) -> Any:
        if isinstance(argument, FollowsTraining):
            return False
        if not isinstance(argument, Tensor) or argument.is_meta:
            return argument
        return argument if keeps and not argument.is_floating_point() else argument.to("meta")

    arguments = fx.node.map_aggregate(arguments, moved)
    if keeps and isinstance(arguments, tuple):
        return (arguments[0], _index(arguments[1]), *arguments[2:])
    return arguments


def _index(index: Any) -> Any:
    """Lists of numbers as tensors with data, which torch would put on the meta device."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    if isinstance(index, list) and all(isinstance(i, int) for i in index):
        return torch.tensor(list(index))
    return index


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of a function of torch's that is written in Python, by name or by position."""
    if name in node.kwargs or node.op != "call_function":
        return node.kwargs.get(name)
    try:
        return inspect.signature(node.target).bind(*node.args).arguments.get(name)  # type: ignore
    except (TypeError, ValueError):
        return None


def _autocast_state() -> tuple[bool, ...]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _within(path: str, module: nn.Module) -> set[str]:
    """The paths of a module and of those in it."""
    return {f"{path}.{name}".rstrip(".") for name, _ in module.named_modules()}
