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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fcvgg.errors import CaptureError, ConversionError, InputSizeError, one_line
from fcvgg.rewriting.rebinding import rebound
from fcvgg.support.module_state import dtype_of

BATCH = 2
"""Images in the traced batch. Two, so that a reshape that moves pixels into the batch shows."""


class ModeQuestions:
    """The modules whose Python code branched on their mode while it was traced."""

    def __init__(self) -> None:
        self.places: set[str] = set()
        self.paused = False

    def note(self, place: str) -> None:
        if not self.paused:
            self.places.add(place)


class FollowsTraining(int):
    """Stands for ``self.training`` while a model is traced, recognisable as an argument.

    Functional dropout and batch norm receive the mode as a plain bool; this lets the converted
    network pass its own mode on instead of the one at the time of conversion. A branch on the mode
    is noted in `questions`, since the graph holds one of its sides only.
    """

    questions: ModeQuestions | None = None
    place: str = ""

    @classmethod
    def of(cls, mode: bool, questions: ModeQuestions, place: str) -> FollowsTraining:
        """The mode of the module at `place`."""
        flag = cls(mode)
        flag.questions, flag.place = questions, place
        return flag

    def __bool__(self) -> bool:
        if self.questions is not None:
            self.questions.note(self.place)
        return int(self) != 0

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __ne__(self, other: object) -> bool:
        return bool(self) != other

    __hash__ = int.__hash__


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
    """A traced model: its graph, with every node's value on the meta device, and its constants.

    Attributes:
        asked: the modules whose code branched on their mode.
        training_only: the modules that compute something in training mode only and give back what
            they get in evaluation mode. The graph calls them as they are.
    """

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        size: tuple[int, int],
        channels: int,
        asked: frozenset[str],
        training_only: frozenset[str],
    ):
        self.graph = graph
        self.root = root
        self.size = size
        self.channels = channels
        self.asked = asked
        self.training_only = training_only
        self.other_channels: tuple[int, ...] = ()

    def require_channels(self) -> None:
        """Refuse images whose channels the graph leaves open.

        Raises:
            CaptureError: if the model runs with several numbers of them.
        """
        if self.other_channels:
            *some, last = map(str, self.other_channels)
            raise CaptureError(
                "the channels of the images cannot be inferred: the model runs with "
                f"{', '.join(some)} and {last}; pass in_channels=, 3 for RGB images"
            )

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
        channels: the image's channels; found by what the graph does with them when None.

    Raises:
        CaptureError: if the model branches on values or cannot be traced for another reason.
        InputSizeError: if the model asserts another size.
    """
    if channels is not None:
        captured = _traced(model, size, is_leaf, channels)
        wrong = _failing_convolution(captured)
        if wrong is not None:
            raise CaptureError(
                f"in_channels={channels} does not fit the model: {describe(wrong)} fails with "
                f"'{one_line(wrong.meta['error'])}'; pass the channels of its images"
            )
        return captured
    first = input_channels(model)
    captured = _traced(model, size, is_leaf, first)
    if _starts_with_convolution(captured):
        return captured
    tried = {first: captured}
    for count in _USUAL_CHANNELS:
        if count not in tried:
            try:
                tried[count] = _traced(model, size, is_leaf, count)
            except (CaptureError, InputSizeError):
                continue
    fitting = sorted(n for n, made in tried.items() if _failing_convolution(made) is None)
    if not fitting:
        return captured
    captured = tried[_likeliest(first, fitting)]
    captured.other_channels = () if _is_certain(first, fitting) else tuple(fitting)
    return captured


_USUAL_CHANNELS = (1, 2, 3, 4)
_RGB = 3


def _likeliest(first: int, fitting: Sequence[int]) -> int:
    """The channels of the images, of the numbers with which the model runs."""
    return first if first in fitting else fitting[0]


def _is_certain(first: int, fitting: Sequence[int]) -> bool:
    """Whether the numbers with which a model runs leave one that images can have.

    Of one channel, a buffer of several makes several, so one fits as well as the true number.
    Where three fit and fewer do not, further channels are not read.

    Args:
        first: what the first convolution takes.
    """
    if first in fitting:
        return first >= _RGB or set(fitting) <= {1, first}
    return len(fitting) == 1 or fitting[0] == _RGB


def _convolutions(captured: Captured) -> Iterator[fx.Node]:
    for node in captured.graph.nodes:
        if node.op == "call_module":
            if isinstance(captured.root.get_submodule(str(node.target)), nn.Conv2d):
                yield node
        elif node.target in (nn.functional.conv2d, torch.conv2d):
            yield node


def _starts_with_convolution(captured: Captured) -> bool:
    """Whether the images enter a convolution as they are, which fixes their channels."""
    images = next(iter(captured.graph.nodes), None)
    return images is not None and any(
        node.args[:1] == (images,) and "error" not in node.meta for node in _convolutions(captured)
    )


def _failing_convolution(captured: Captured) -> fx.Node | None:
    """The node that shows that the images have other channels, if any does.

    That is a convolution of other channels, or what fails before the first convolution.
    """
    reached = False
    for node in _convolutions(captured):
        if "error" in node.meta and _takes_other_channels(node, captured.root):
            return node
        reached = reached or "value" in node.meta
    return None if reached else captured.failure()


def _takes_other_channels(node: fx.Node, root: nn.Module) -> bool:
    x, *rest = node.args
    given = x.meta["value"].shape[1] if isinstance(x, fx.Node) else 0
    if node.op == "call_module":
        return bool(given != root.get_submodule(str(node.target)).in_channels)
    weight = node.kwargs.get("weight", rest[0] if rest else None)
    return isinstance(weight, fx.Node) and given % weight.meta["value"].shape[1] != 0


def unfollowed_branches(
    model: nn.Module, captured: Captured, is_leaf: Callable[[nn.Module], bool]
) -> tuple[str, ...]:
    """The modules whose branches on their mode make another graph in training mode.

    A graph holds one side of such a branch, so it does not follow ``train()``. Empty where both
    sides compute the same, like that of an auxiliary head which was taken out.
    """
    asked = captured.asked - captured.training_only
    if not asked:
        return ()
    try:
        other = _traced(
            model, captured.size, is_leaf, captured.channels, True, captured.training_only
        )
        same = _computation(captured) == _computation(other)
    except (CaptureError, InputSizeError):
        same = False
    return () if same else tuple(sorted(asked))


def _computation(captured: Captured) -> list[Any]:
    """What the outputs are computed by, as data that compares."""
    places: dict[fx.Node, int] = {}
    needed = _ancestors(captured.graph)

    def plain(argument: Any) -> Any:
        return ("result", places[argument]) if isinstance(argument, fx.Node) else argument

    steps: list[Any] = []
    for node in captured.graph.nodes:
        if node not in needed:
            continue
        args, kwargs = node.args, node.kwargs
        if node.target is nn.functional.batch_norm and _is_in_batch_norm(node, captured.root):
            # torch's own forward computes the mode that it passes; the rule passes it on
            kwargs = {**dict(zip(_BATCH_NORM, args)), **kwargs, "training": None}
            args = ()
        arguments = fx.node.map_aggregate((args, kwargs), plain)  # type: ignore[arg-type]
        steps.append((node.op, str(node.target), repr(arguments)))
        places[node] = len(places)
    return steps


_BATCH_NORM = tuple(inspect.signature(nn.functional.batch_norm).parameters)


def _is_in_batch_norm(node: fx.Node, root: nn.Module) -> bool:
    owner = root.get_submodule(str(node.meta.get("owner", "")))
    return isinstance(owner, nn.modules.batchnorm._BatchNorm)


def _ancestors(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the outputs depend on, with those that change them in place."""
    changing: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if isinstance(node.meta.get("changes"), fx.Node):
            changing.setdefault(node.meta["changes"], []).append(node)
    found: set[fx.Node] = set()
    ends = [node for node in graph.nodes if node.op == "output"]
    while ends:
        node = ends.pop()
        if node not in found:
            found.add(node)
            ends += [*node.all_input_nodes, *changing.get(node, [])]
    return found


def _traced(
    model: nn.Module,
    size: tuple[int, int],
    is_leaf: Callable[[nn.Module], bool],
    channels: int,
    training: bool = False,
    training_only: frozenset[str] = frozenset(),
) -> Captured:
    """Trace the model as it computes in one mode.

    Args:
        training_only: modules that are called as they are, also where they could be looked into.
    """
    questions = ModeQuestions()
    twin = _without_data(model, is_leaf, training, questions)
    tracer = _ShapeTracer(
        is_leaf, (BATCH, channels, *size), dtype_of(model), questions, set(training_only)
    )
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
            f"the model's forward cannot be traced with torch.fx: {tracer.place()}"
            f"{type(error).__name__}: {one_line(error)}; it must be a function of one image batch "
            "without control flow on values, computed by submodules of the model"
        ) from error
    return Captured(
        *(graph, tracer.root, size, channels),
        frozenset(questions.places),
        frozenset(tracer.training_only),
    )


def input_channels(model: nn.Module) -> int:
    """Channels of the first convolution in the order of definition; 3 if there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return next((p.shape[1] for p in model.parameters() if p.ndim == 4), 3)


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


_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torch.nn.quantized", "torchao.")


def without_wrappers(model: Any) -> Any:
    """The model inside DataParallel and compiled wrappers."""
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        else:
            break
    return model


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
                raise ConversionError(
                    f"{name} ({type(module).__name__}) has a {attribute} that a hook computes; make"
                    " it a parameter first with torch.nn.utils.remove_weight_norm, "
                    "remove_spectral_norm or prune.remove"
                )
    hooks: dict[int, Any] = {
        id(getattr(module, hook)): OrderedDict() for module in model.modules() for hook in _HOOKS
    }
    copies = {**memo, **hooks}
    try:
        twin = copy.deepcopy(model, copies)
    except Exception as error:
        raise ConversionError(
            f"the modules of {type(model).__name__} cannot be copied: "
            f"{_uncopied(model, {**memo, **hooks})}{one_line(error)}; "
            "delete what cannot be copied, or set it to None, before converting"
        ) from error
    if not isinstance(twin, nn.Module):
        raise ConversionError(
            f"the modules of {type(model).__name__} cannot be copied: its __deepcopy__ returns "
            f"{type(twin).__name__}; expected a module"
        )
    _align(model, twin, copies)
    return twin


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
    return twin_of(model, memo)


def _without_data(
    model: nn.Module,
    is_leaf: Callable[[nn.Module], bool],
    training: bool,
    questions: ModeQuestions,
) -> nn.Module:
    """A copy on the meta device, in one mode, that remembers where it reads its mode."""
    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise CaptureError(
            "the model has lazy layers whose parameters are not initialised yet; "
            "run it once on an image of its native size first"
        )
    twin = bare_twin(model)
    for name, module in twin.named_modules():
        # torch's own layers insist on a bool; only traced code can pass the mode on
        leaf = is_leaf(module) and not _runs_own_forward(module)
        flag = False if leaf else FollowsTraining.of(training, questions, name)
        module.training = flag  # type: ignore[assignment]
    return twin


def _runs_own_forward(module: nn.Module) -> bool:
    """Whether a forward was set on the module itself, which runs in place of its class's."""
    return "forward" in vars(module)


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
    return False if isinstance(argument, FollowsTraining) else argument


def _autocast_state() -> tuple[bool, ...]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _within(path: str, module: nn.Module) -> set[str]:
    """The paths of a module and of those in it."""
    return {f"{path}.{name}".rstrip(".") for name, _ in module.named_modules()}


def _run_forward(model: nn.Module, images: Any) -> Any:
    return model.forward(images)


def _known_index(index: Any) -> Any:
    """What a value is indexed by: integers and booleans with their values, which decide shapes."""
    if isinstance(index, tuple):
        return tuple(map(_known_index, index))
    if isinstance(index, list) and all(isinstance(i, int) for i in index):
        return torch.tensor(list(index))
    if isinstance(index, fx.Node) and "index" in index.meta:
        return index.meta["index"]
    return fx.node.map_aggregate(index, _known)


def _call(model: nn.Module, images: Any) -> Any:
    return model(images)


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
        questions: ModeQuestions,
        training_only: set[str],
    ):
        super().__init__()
        self._is_leaf = is_leaf
        self._questions = questions
        self.training_only = training_only
        self._images = torch.empty(shape, dtype=dtype, device="meta")
        self._computing = False
        self._autocast = _autocast_state()
        self._failed = ""
        self._entry: Callable[..., Any] | None = None

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        own_call = type(root).__call__ is not nn.Module.__call__
        if own_call and not isinstance(root, fx.GraphModule):
            self._entry = _call
        elif _runs_own_forward(root) or not isinstance(type(root).forward, FunctionType):
            self._entry = _run_forward
        if self._entry is not None:
            self.traced_func_name = "__call__"  # fx wants a function of the class
        return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._computing:
            return forward(*args, **kwargs)
        if "_orig_mod" in m._modules:  # what torch.compile makes of a module
            return m.get_submodule("_orig_mod")(*args, **kwargs)
        paths = self.submodule_paths or {}
        if m not in paths:
            raise CaptureError(
                f"forward calls a {type(m).__name__} that is not a submodule of the model; assign "
                "it to an attribute of the model, so that its parameters are found"
            )
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self._failed = self._failed or paths[m]
            raise
        if self.is_leaf_module(m, "") or not (len(args) == 1 and result is args[0] and not kwargs):
            return result
        path = self.path_of_module(m)
        if self._questions.places.isdisjoint(_within(path, m)) or not self._works_in_training(
            m, result
        ):
            return result
        self.training_only.add(path)
        return self.create_proxy("call_module", path, args, kwargs)

    def _works_in_training(self, m: nn.Module, x: fx.Proxy) -> bool:
        """Whether a module takes a map to one of its shape in training mode, holding no data."""
        value = x.node.meta.get("value")
        if not isinstance(value, Tensor) or value.ndim != 4 or m.state_dict():
            return False
        modes = [(module, module.training) for module in m.modules()]
        try:
            for module, _ in modes:
                module.training = True
            with self._unrecorded():
                made = m(value.clone())
        except Exception:
            return False
        finally:
            for module, mode in modes:
                module.training = mode
        return isinstance(made, Tensor) and made.shape == value.shape

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """What modules call, read and ask meanwhile is computed and not recorded."""
        self._computing = self._questions.paused = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._computing = self._questions.paused = False

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
        if self.training_only and self.path_of_module(m) in self.training_only:
            return True
        return self._is_leaf(m) and not _runs_own_forward(m)

    def place(self) -> str:
        """Where tracing stopped, as the beginning of a message."""
        last = next(reversed(self.graph.nodes), None)
        within = f"in {self._failed}" if self._failed else ""
        after = f"after {describe(last)}" if last is not None and last.op[:4] == "call" else ""
        return f"{within}{', ' if within and after else ''}{after}: " if within or after else ""

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # Only the images are traced: further arguments of forward keep their defaults.
        images = self.create_proxy("placeholder", "images", (), {})
        return self._entry or root_fn, [self.root, images]

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **names: Any
    ) -> fx.Node:
        if _autocast_state() != self._autocast:
            owner = next(reversed(self.module_stack.values()))[0] if self.module_stack else ""
            raise CaptureError(
                f"forward{f' of {owner}' if owner else ''} runs under torch.autocast, which a "
                "graph does not hold; convert the model without it, and use autocast around the "
                "network"
            )
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
        versions = [(fed, _version(fed)) for fed in node.all_input_nodes]
        try:
            with self._unrecorded():
                node.meta["value"] = self._run(node)
                node.meta["changes"] = self._changed(node, versions)
        except Exception as error:
            node.meta["error"] = error

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
        if name in ("to", "type_as"):
            return self._cast
        if name in ("cpu", "cuda"):
            return lambda *args, **kwargs: self
        if name in self._VALUE_METHODS:
            raise self._depends_on_values(f"Tensor.{name}")
        parts = self.node.meta.get("value")
        if isinstance(parts, tuple) and hasattr(parts, name):  # x.max(2).values
            named = getattr(parts, name)
            for i, part in enumerate(parts):
                if part is named:
                    return operator.getitem(self, i)  # type: ignore[call-overload]
        return super().__getattr__(name)

    def _cast(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """``x.to(...)`` without devices and layouts: the network runs where its images lie."""
        own, dtype = self.tracer.value_of(self).dtype, None
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, torch.dtype):
                dtype = argument
            elif type(argument) is _ShapedProxy:
                dtype = self.tracer.value_of(argument).dtype
            elif isinstance(argument, Tensor):
                dtype = argument.dtype
        if kwargs.pop("copy", False):
            return self.clone() if dtype in (None, own) else self._cast(dtype)
        if dtype in (None, own):  # what the source is cast to, the network may be cast from
            return self
        return self.tracer.create_proxy("call_method", "to", (self, dtype), {})

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
