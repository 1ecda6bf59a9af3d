"""Checking a converted network against its source model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fcvgg.errors import ArgumentError, EquivalenceError, ImageError, one_line
from fcvgg.geometry import Axis
from fcvgg.network import FullyConvolutional
from fcvgg.probability import BOUNDED, to_probabilities
from fcvgg.results.equivalence import Equivalence
from fcvgg.rewriting.modes import mode_differences
from fcvgg.rewriting.outputs import flattened
from fcvgg.rewriting.twins import has_hooks, without_wrappers
from fcvgg.support.module_state import device_of, dtype_of, evaluating, listed, state_kept

_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_TRANSLATION_FACTOR = 10
"""Libraries choose other kernels for other sizes, so shifted maps differ by more rounding."""

_LARGER = 10
"""How much larger values show the range of scores: a bias may hide it for those of usual size."""


@torch.no_grad()
def verify(
    model: nn.Module,
    net: FullyConvolutional,
    images: Tensor | None = None,
    *,
    tolerance: float | None = None,
    seed: int = 0,
) -> Equivalence:
    """Compare a converted network with its source, and with itself on a shifted input.

    The numbers are compared in evaluation mode, since dropout and its like are random; that the two
    are in the same mode, module by module, is checked apart. Modes, buffers and the state of
    torch's random numbers are afterwards what they were.

    Args:
        model: the source model.
        net: what `fcvgg.convert` made of it.
        images: preprocessed images ``(N, C, h, w)`` of the native size; noise if None.
        tolerance: allowed error relative to the largest score; by the dtype when None (1e-12 for
            float64, 1e-5 for float32).
        seed: of the noise.

    Returns:
        the report; it does not raise on a mismatch.

    Raises:
        ArgumentError: if one of the two is not a model, or their outputs differ in shape.
        ImageError: if the images are not of the native size, or the network does not take them.
    """
    _check_models(model, net)
    if images is None:
        images = _noise((2, net.in_channels, *net.input_size), net, seed)
    net._check_images(images)
    net._check_dtype(images)
    if tuple(images.shape[2:]) != tuple(net.input_size):
        raise ImageError(
            f"images must have the native size {net.input_size}, (N, C, h, w), got "
            f"{tuple(images.shape)}"
        )
    tolerance = _usual_tolerance(net) if tolerance is None else tolerance
    with evaluating(model), evaluating(net), _undisturbed(model, net):
        plain, seen = _compare(model, net, images, tolerance, seed, 1.0)
        found = [plain]
        # Scores behind a saturated softmax would agree whatever feeds it, so both are run again at
        # a temperature that brings its logits apart. Below 1 nothing saturates.
        if seen.largest > 1:
            tempered, seen = _compare(model, net, images, tolerance, seed, seen.largest)
            found += [tempered] if seen.seen else []
    other_modes = _other_modes(model, net)
    # each figure is the worst of both runs: one of them alone may hide a wrong layer
    relative = _worst([differences.relative for differences in found])
    shifted = _worst([differences.shifted for differences in found])
    agreement = min(differences.agreement for differences in found)
    return Equivalence(
        max_abs_error=plain.absolute,
        max_rel_error=relative,
        tolerance=tolerance,
        top1_agreement=agreement,
        translation_error=shifted,
        passed=(
            relative <= tolerance
            and shifted <= tolerance * _TRANSLATION_FACTOR
            and agreement == 1
            and not other_modes
        ),
        input_size=net.input_size,
        images=len(images),
        other_modes=other_modes,
    )


def _usual_tolerance(net: FullyConvolutional) -> float:
    """By the network's dtype, or the coarsest one that its layers cast to."""
    graph = getattr(net.network, "graph", None)
    nodes = graph.nodes if isinstance(graph, fx.Graph) else ()
    cast = (a for n in nodes for a in n.args if isinstance(a, torch.dtype) and a.is_floating_point)
    return max(_TOLERANCES.get(dtype, 1e-5) for dtype in (dtype_of(net), *cast))


@dataclass(frozen=True)
class _Differences:
    """Between model and network, and between the maps of an input and of the shifted one."""

    absolute: float
    relative: float
    agreement: float
    shifted: float


def _compare(
    model: nn.Module,
    net: FullyConvolutional,
    images: Tensor,
    tolerance: float,
    seed: int,
    temperature: float,
) -> tuple[_Differences, Temperature]:
    """The differences at a temperature, and what the network's saturating functions were given."""
    # each gets images of its own, since a first layer may work in place
    with Temperature(temperature):
        expected = _outputs(_scored(model, images.clone()))
    # the network is measured, not the model: in another engine its functions are not seen, and
    # dividing those of the model alone would compare two different computations
    with Temperature(temperature) as seen:
        got = net.native_scores(net(images.clone()))  # (N, K) each
    with Temperature(temperature):
        shifted = _translation_error(net, seed)
    # (N, K) each: models give (N,) for one class too, or (N, K, 1, 1)
    expected = [scores.reshape(len(scores), -1) for scores in expected]
    _check_shapes(expected, got)
    errors = [_largest(a - b) for a, b in zip(expected, got)]
    differences = _Differences(
        absolute=_worst(errors),
        relative=_worst([error / _scale(a) for a, error in zip(expected, errors)]),
        agreement=min(_agreement(a, b, tolerance * _scale(a)) for a, b in zip(expected, got)),
        shifted=shifted,
    )
    return differences, seen


def check(model: nn.Module, net: FullyConvolutional) -> Equivalence:
    """The report of `verify`.

    Raises:
        EquivalenceError: if it did not pass, saying why.
    """
    report = verify(model, net)
    if report.passed:
        return report
    # the likeliest cause first: other modes and broken weights change all that follows
    if report.other_modes:
        raise EquivalenceError(
            f"{listed(report.other_modes)} of the network is in another mode than in the model, so "
            "they give other scores; put both in one mode with .eval() or .train()"
        )
    if report.max_rel_error != report.max_rel_error:  # not a number
        raise EquivalenceError(
            f"the model's scores are not finite at the native size{_not_finite(model)}; "
            "check the checkpoint"
        )
    if report.max_rel_error > report.tolerance:
        raise EquivalenceError(
            f"the converted network differs from the model at {report.input_size} by "
            f"{report.max_rel_error:.1e} of the largest score, more than {report.tolerance:.0e}; "
            f"{_remedy(model)}, or pass verify=False to look at the network"
        )
    if report.top1_agreement < 1:
        raise EquivalenceError(
            f"the converted network names other classes than the model at {report.input_size}, for "
            f"{1 - report.top1_agreement:.0%} of images whose scores do not tie; "
            f"{_remedy(model)}, or pass verify=False to look at the network"
        )
    raise EquivalenceError(
        "the map does not move with the image: shifting the input by one stride changes its "
        f"interior by {report.translation_error:.1e} of the largest score; some layer mixes all "
        "positions or depends on them, and its cells would be wrong at every other size"
    )


@torch.no_grad()
def check_activation(net: FullyConvolutional, seed: int = 0) -> None:
    """Refuse a range of scores that the graph does not show and that scores of noise leave.

    Raises:
        ArgumentError: if the graph ends in logits and scores lie outside the range that
            ``net.activation`` says.
    """
    if net.program.activations[0] != "logits" or net.activation not in BOUNDED:
        return
    noise = _noise((2, net.in_channels, *net.input_size), net, seed)  # (N, C, H, W)
    with evaluating(net), _undisturbed(net):
        # both signs, since a ReLU may hide what the other one does
        for factor in (1, _LARGER, -_LARGER):
            to_probabilities(_outputs(net(noise * factor))[0], net.activation, dim=1)


def _translation_error(net: FullyConvolutional, seed: int) -> float:
    """The largest relative difference of interior cells between an input and the same shifted.

    One axis at a time, the other at its native size, since an interior cell needs a whole
    receptive field of image.
    """
    errors = []
    for dim, axis in ((2, net.geometry.height), (3, net.geometry.width)):
        size = list(net.input_size)
        extent, first = axis.interior(size[dim - 2])
        size[dim - 2] = extent + axis.stride  # one stride longer: its last `extent` are the shifted
        image = _noise((1, net.in_channels, *size), net, seed)  # (1, C, H, W)
        whole = _outputs(net(image.clone()))
        moved = _outputs(net(image.narrow(dim, axis.stride, extent).clone()))
        for a, b in zip(whole, moved):  # (1, K, h, w), where b may have a cell less along dim
            # cells near the border see padding, which does not move with the image
            last = min(_last_interior(axis, extent), b.shape[dim] - 1)
            cells = last - first + 1
            # cell i of the shifted image stands where cell i + 1 of the whole one does
            error = _largest(a.narrow(dim, first + 1, cells) - b.narrow(dim, first, cells))
            errors.append(error / _scale(a))
    return _worst(errors)


def _last_interior(axis: Axis, extent: int) -> int:
    return (extent - axis.receptive_field - axis.offset) // axis.stride


def _noise(shape: tuple[int, ...], net: nn.Module, seed: int) -> Tensor:
    # on the CPU whatever the device is, so that a seed gives the same images everywhere
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device_of(net), dtype_of(net))


def _outputs(value: Any) -> list[Tensor]:
    return flattened(value)[0]


def _check_models(model: Any, net: Any) -> None:
    if not isinstance(net, FullyConvolutional):
        raise ArgumentError(
            f"net must be a converted network, got {type(net).__name__}; pass the model first: "
            "fcvgg.verify(model, net)"
        )
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model must be the torch.nn.Module that was converted, got {type(model).__name__}"
        )


def _other_modes(model: nn.Module, net: FullyConvolutional) -> tuple[str, ...]:
    """The source's modules whose mode makes the network give other scores than the source."""
    source = without_wrappers(model)
    # an optimised network is compared with the plain one that it was made from
    if isinstance(source, FullyConvolutional):
        source = source.network
    modes = {name: module.training for name, module in source.named_modules()}
    unfollowed = [n for n in net.program.training_mode.unfollowed if modes.get(n, False)]
    different = (*mode_differences(net.network, source), *unfollowed)
    return tuple(name or type(source).__name__ for name in dict.fromkeys(different))


@contextmanager
def _undisturbed(*models: nn.Module) -> Iterator[None]:
    """Running the models leaves their buffers and torch's random numbers as they were."""
    # dropout in training mode draws from the global generators, those of every device in use
    devices = sorted({b.device.index or 0 for m in models for b in m.parameters() if b.is_cuda})
    with torch.random.fork_rng(devices), state_kept(*models):
        yield


def _scored(model: nn.Module, images: Tensor) -> Any:
    try:
        return model(images)
    except Exception as error:
        raise ArgumentError(
            f"model must be the net's own source, got a {type(model).__name__} that does not run "
            f"on images {tuple(images.shape)} of {images.dtype}: {one_line(error)}"
        ) from error


def _check_shapes(expected: list[Tensor], got: list[Tensor]) -> None:
    shapes = [[tuple(scores.shape) for scores in scored] for scored in (expected, got)]
    if shapes[0] != shapes[1]:
        raise ArgumentError(
            f"model must be the net's own source, got outputs {shapes[0]} where those of the net "
            f"are {shapes[1]}"
        )


def _agreement(expected: Tensor, got: Tensor, tie: float) -> float:
    """The share of images with the same top class, or with one whose score is `tie` below it."""
    if expected.shape[1] == 1:  # one class: the sign decides, and scores near 0 tie
        same = ((expected > 0) == (got > 0)) | (expected.abs() <= tie)
    else:
        chosen = expected.gather(1, got.argmax(1, keepdim=True))  # (N, 1)
        same = expected.amax(1, keepdim=True) - chosen <= tie  # (N, 1)
    return same.double().mean().item()


def _largest(difference: Tensor) -> float:
    return difference.double().abs().max().item()


def _worst(errors: list[float]) -> float:
    """The largest; not a number if any is, which `max` would overlook."""
    return next((error for error in errors if error != error), max(errors))


def _scale(scores: Tensor) -> float:
    # scores of 0 alone would divide 0 by 0 where both agree
    return max(_largest(scores), torch.finfo(torch.float32).tiny)


def _remedy(model: nn.Module) -> str:
    """What may be done about another answer: hooks can change it, and are not converted."""
    hooked = [name for name, module in model.named_modules() if has_hooks(module)]
    if not hooked:
        return "please report the model"
    return (
        f"{hooked[0] or type(model).__name__} has forward hooks, which conversion leaves out: "
        "remove them, or do their work in forward"
    )


def _not_finite(model: nn.Module) -> str:
    names = [n for n, p in model.state_dict().items() if not torch.isfinite(p).all()]
    return f": {names[0]} holds values that are not finite" if names else ""


# -- seeing what goes into softmaxes and sigmoids -------------------------------------------------
# Far from zero these functions are flat: a softmax whose largest logit leads by 40 is 1 for that
# class and 0 for the others to the last digit, whatever the logits are exactly. Divided by a
# temperature of their own size, the same values come out apart from each other.

_aten = torch.ops.aten

_FLAT = {
    *(_aten._softmax, _aten._log_softmax, _aten.exp, _aten.exp_),
    *(_aten.sigmoid, _aten.sigmoid_, _aten.log_sigmoid_forward, _aten.tanh, _aten.tanh_),
    *(_aten.hardsigmoid, _aten.hardsigmoid_),
}
"""Functions that are flat far from zero, or grow so fast that one value decides the result."""

_CUT = {_aten.clamp, _aten.clamp_, _aten.hardtanh, _aten.hardtanh_}
"""Functions that are sigmoids or tanhs of straight lines where they cut off at 1."""


class Temperature(TorchDispatchMode):
    """While active, divides what goes into saturating functions by a temperature.

    It works below the modules, on torch's own operations, so a source model and its converted
    network are changed alike however they are written. What other engines compute is not seen.

    Args:
        value: the temperature; 1 changes nothing.

    Attributes:
        seen: how many calls of saturating functions there were.
        largest: the largest finite absolute value that went into them.
    """

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.value = value
        self.seen = 0
        self.largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _saturates(func.overloadpacket, args) and not _is_captured():
            x, *rest = args
            self.seen += 1
            self.largest = max(self.largest, _largest_value(x))
            if self.value != 1:
                # in-place functions must change the caller's own tensor
                in_place = func.overloadpacket.__name__.endswith("_")
                args = (x.div_(self.value) if in_place else x / self.value, *rest)
        return func(*args, **(kwargs or {}))


def _saturates(operation: Any, args: tuple[Any, ...]) -> bool:
    if operation in _CUT:
        # other bounds are those of ReLU6 and its like, whose values are not probabilities
        return tuple(map(_number, args[1:])) in ((0, 1), (-1, 1))
    return operation in _FLAT


def _number(bound: Any) -> Any:
    """A bound as a number, also where a tensor repeats it; None where that holds several."""
    if not isinstance(bound, Tensor):
        return bound
    values = bound.unique()
    return values.item() if len(values) == 1 else None


def _largest_value(x: Tensor) -> float:
    # a mask of -inf before a softmax does not measure the logits
    finite = x.detach().double().abs().nan_to_num(0, 0, 0)
    return finite.max().item() if finite.numel() else 0.0


def _is_captured() -> bool:
    """Whether the calls are recorded for later replays, which are not to depend on this one."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
