"""Read a model's computation as a graph whose every value has a known shape.

`capture` runs the model's Python on the meta device at one input size and records its calls
(`fcvgg.rewriting.tracing`), so that code which asks for shapes gets numbers, branches on shapes are
taken as they are at that size, and nothing is computed. The model is not touched: a twin without
data runs in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fcvgg.errors import CaptureError, InputSizeError, one_line
from fcvgg.rewriting.marks import FollowsTraining, ModeQuestions
from fcvgg.rewriting.outputs import Form
from fcvgg.rewriting.tracing import Recorder, ShapeUnknownError, describe, runs_own_forward
from fcvgg.rewriting.twins import bare_twin
from fcvgg.support.module_state import dtype_of

BATCH = 2
"""Images in the traced batch. Two, so that a reshape that moves pixels into the batch shows."""


_KEPT = "device meta"
"""What torch says of a tensor that was not computed in this pass: only parameters have no data."""


class Captured:
    """A traced model: its graph, with every node's value on the meta device, and its constants.

    Attributes:
        asked: the modules whose code branched on their mode.
        training_only: the modules that compute something in training mode only and give back what
            they get in evaluation mode. The graph calls them as they are.
        outputs: the form in which the model returns what the graph computes as a tuple.
    """

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        size: tuple[int, int],
        channels: int,
        asked: frozenset[str],
        training_only: frozenset[str],
        outputs: Form,
    ):
        self.graph = graph
        self.root = root
        self.size = size
        self.channels = channels
        self.asked = asked
        self.training_only = training_only
        self.outputs = outputs
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
    is_known: Callable[[Any], bool],
    channels: int | None = None,
) -> Captured:
    """Trace `model` for images of `size` ``(H, W)``.

    A node that fails at this size keeps its error in ``node.meta["error"]`` and no value; tracing
    goes on while Python needs no shape of what is unknown.

    Args:
        is_known: whether a module, a function or the name of a method has a rule of its own and is
            not looked into.
        channels: the image's channels; found by what the graph does with them when None.

    Raises:
        CaptureError: if the model branches on values or cannot be traced for another reason.
        InputSizeError: if the model asserts another size.
    """
    if channels is not None:
        captured = _traced(model, size, is_known, channels)
        wrong = _failing_convolution(captured)
        if wrong is not None:
            raise CaptureError(
                f"in_channels={channels} does not fit the model: {describe(wrong)} fails with "
                f"'{one_line(wrong.meta['error'])}'; pass the channels of its images"
            )
        return captured
    first = input_channels(model)
    captured = _traced(model, size, is_known, first)
    if _starts_with_convolution(captured):
        return captured
    tried = {first: captured}
    for count in _USUAL_CHANNELS:
        if count not in tried:
            try:
                tried[count] = _traced(model, size, is_known, count)
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
    model: nn.Module, captured: Captured, is_known: Callable[[Any], bool]
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
            model, captured.size, is_known, captured.channels, True, captured.training_only
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

    steps: list[Any] = [captured.outputs]
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
    is_known: Callable[[Any], bool],
    channels: int,
    training: bool = False,
    training_only: frozenset[str] = frozenset(),
) -> Captured:
    """Trace the model as it computes in one mode.

    Args:
        training_only: modules that are called as they are, also where they could be looked into.
    """
    questions = ModeQuestions()
    twin = _without_data(model, is_known, training, questions)
    recorder = Recorder(twin, is_known, questions, set(training_only))
    shape = (BATCH, channels, *size)
    try:
        recorder.record(torch.empty(shape, dtype=dtype_of(model), device="meta"))
    except ShapeUnknownError:
        pass  # the node that fails is in the graph
    except CaptureError:
        raise
    except AssertionError as error:
        raise InputSizeError(
            f"the model refuses input size {size}: {one_line(error)}; "
            "pass the model's native size as input_size"
        ) from error
    except Exception as error:
        raise CaptureError(
            f"the model's forward cannot be traced: {recorder.place()}"
            f"{type(error).__name__}: {one_line(error)}; it must be a function of one image batch "
            "without control flow on values, computed by submodules of the model"
        ) from error
    captured = Captured(
        *(recorder.graph, twin, size, channels),
        frozenset(questions.places),
        frozenset(recorder.training_only),
        recorder.outputs,
    )
    node = captured.failure()
    if node is not None and _KEPT in str(node.meta["error"]):
        raise CaptureError(
            f"{describe(node)} takes a tensor that the model kept from an earlier pass, as forward "
            "hooks keep features; return the features from their layers instead"
        )
    return captured


def input_channels(model: nn.Module) -> int:
    """Channels of the first convolution in the order of definition; 3 if there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return next((p.shape[1] for p in model.parameters() if p.ndim == 4), 3)


def _without_data(
    model: nn.Module,
    is_known: Callable[[Any], bool],
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
        leaf = is_known(module) and not runs_own_forward(module)
        flag = False if leaf else FollowsTraining.of(training, questions, name)
        module.training = flag  # type: ignore[assignment]
    return twin


def storages_of(value: Any) -> set[int]:
    """Which memory a value's tensors lie in."""
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor)}
