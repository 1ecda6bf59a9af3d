"""What is read as a model's computation: its forward, wherever it was set; its images' channels."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import EXACT, images, native_error, relative_error, seeded
from torch import Tensor, nn

import fcvgg


class Plain(nn.Module):
    """Native size 12: a convolution, a ReLU, a pool, and a fully connected layer on 6 x 3 x 3."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 6, 3, padding=1)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(4)
        self.fc = nn.Linear(54, 4)
        self.device = torch.device("cpu")

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(self.pool(self.act(self.conv(x))).flatten(1)) * scale


class Patched(Plain):
    """The forward of its class no longer runs, as in the package pretrainedmodels."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.classifier(x)


def as_method(model: nn.Module) -> None:
    model.forward = MethodType(lambda self, x: self.fc(self.pool(self.conv(x)).flatten(1)), model)


def as_partial(model: nn.Module) -> None:
    model.forward = functools.partial(model.forward, scale=2.0)


def as_lambda(model: nn.Module) -> None:
    old = model.forward
    model.forward = lambda x: old(x) * 2


def as_wrapper(model: nn.Module) -> None:
    def shifted(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            return forward(*args, **kwargs) + 1

        return wrapper

    model.forward = shifted(model.forward)


def as_default(model: nn.Module) -> None:
    def forward(x: Tensor, own: nn.Module = model, old: Any = model.forward) -> Tensor:
        return old(x) + own.fc.bias

    model.forward = forward


def as_callable(model: nn.Module) -> None:
    class Doubled:
        def __init__(self, forward: Callable[..., Tensor]) -> None:
            self.forward = forward

        def __call__(self, x: Tensor) -> Tensor:
            return 2 * self.forward(x)

    model.forward = Doubled(model.forward)


def without_grad(model: nn.Module) -> None:
    model.forward = torch.no_grad()(model.forward)


def compiled_forward(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def twice(model: nn.Module) -> None:
    as_lambda(model)
    as_wrapper(model)


def on_convolution(model: nn.Module) -> None:
    as_lambda(model.conv)


def on_head(model: nn.Module) -> None:
    old = model.fc.forward
    model.fc.forward = lambda x: old(torch.relu(x)) * 3


def on_activation(model: nn.Module) -> None:
    act = model.act
    model.act = nn.Identity()
    model.squash = lambda x: torch.tanh(act(x))
    model.inner = act
    model.forward = MethodType(
        lambda self, x: self.fc(self.pool(self.squash(self.conv(x))).flatten(1)), model
    )


def by_other_methods(model: nn.Module) -> None:
    model.features = MethodType(lambda self, x: self.pool(self.act(self.conv(x))), model)
    model.logits = MethodType(lambda self, x: self.fc(x.flatten(1)), model)
    model.forward = MethodType(lambda self, x: self.logits(self.features(x)), model)


PATCHES = [
    *(as_method, as_partial, as_lambda, as_wrapper, as_default, as_callable, without_grad, twice),
    *(compiled_forward, on_convolution, on_head, on_activation, by_other_methods),
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_forward_set_on_the_instance_is_what_is_converted(
    patch: Callable[[nn.Module], None], verify: bool
) -> None:
    model = seeded(Plain)
    patch(model)
    own = dict(vars(model))
    net = fcvgg.convert(model, input_size=12, verify=verify, copy=True)
    assert native_error(model, net) <= EXACT[torch.float64]
    assert vars(model) == own  # the source keeps its functions
    before = model(images(2, 3, 12, 12))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(images(2, 3, 12, 12)), before, rtol=0, atol=0)


@pytest.mark.parametrize("verify", [True, False])
def test_the_class_forward_need_not_run(verify: bool) -> None:
    model = seeded(Patched)
    by_other_methods(model)
    net = fcvgg.convert(model, verify=verify)
    assert net.input_size == (12, 12)
    assert native_error(model, net) <= EXACT[torch.float64]


GLOBAL_MODEL = seeded(Plain)
GLOBAL_FORWARD = GLOBAL_MODEL.forward


def test_a_function_that_finds_the_model_among_the_globals() -> None:
    model = GLOBAL_MODEL
    model.forward = lambda x: GLOBAL_FORWARD(x) + GLOBAL_MODEL.fc.bias
    net = fcvgg.convert(model, verify=False)
    assert native_error(model, net) <= EXACT[torch.float64]


def test_a_patched_model_is_converted_within_another_one() -> None:
    inner = seeded(Plain)
    as_lambda(inner)
    model = nn.Sequential(inner, nn.Softmax(1)).eval()
    assert native_error(model, fcvgg.convert(model, verify=False)) <= EXACT[torch.float64]


class CalledOtherwise(Plain):
    """What the class does around forward is a part of the model's answer."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(torch.relu(x)) * 2


@pytest.mark.parametrize(
    "build", [CalledOtherwise, lambda: nn.Sequential(CalledOtherwise(), nn.Tanh())]
)
def test_a_call_of_the_class_is_what_is_converted(build: Callable[[], nn.Module]) -> None:
    model = seeded(build)
    assert native_error(model, fcvgg.convert(model, verify=False)) <= EXACT[torch.float64]


def test_a_compiled_submodule_is_converted() -> None:
    model = seeded(Plain)
    model.conv = torch.compile(model.conv, backend="eager")
    net = fcvgg.convert(model)
    assert native_error(model, net) <= EXACT[torch.float64]
    assert net.state_dict().keys() == model.state_dict().keys()


# -- Python that asks torch's questions of values ------------------------------------------------


def after(change: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A model that changes the images before its own forward."""

    class Changed(Plain):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(change(self, x), scale)

    return Changed


def checked(model: nn.Module, x: Any) -> Tensor:
    if not isinstance(x, Tensor) or not torch.is_tensor(x) or type(x) is not Tensor:
        raise TypeError("expected a tensor")
    return x


def own_layer(model: nn.Module, x: Tensor) -> Tensor:
    return nn.ReLU()(x)


def by_numpy(model: nn.Module, x: Tensor) -> Tensor:
    return x[:, np.array([2, 1, 0])].view(-1, int(np.prod(x.shape[1:]))).view(x.shape)


IDIOMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "to the device of a layer": lambda m, x: x.to(m.fc.weight.device),
    "to the device of the first parameter": lambda m, x: x.to(next(m.parameters()).device),
    "to a device by name": lambda m, x: x.to("cpu").cpu(),
    "to a device kept on the model": lambda m, x: x.to(m.device),
    "to its own device": lambda m, x: x.to(x.device),
    "to the type of a weight": lambda m, x: x.type_as(m.fc.weight).to(m.fc.weight),
    "data": lambda m, x: x.data * 2,
    "new tensor": lambda m, x: x - x.new_tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1),
    "new zeros": lambda m, x: x + x.new_ones(1),
    "a tensor on the device of a parameter": lambda m, x: (
        x + torch.ones(1, device=next(m.parameters()).device)
    ),
    "zeros like": lambda m, x: torch.zeros_like(x) + x,
    "checked": checked,
    "a layer made in forward": own_layer,
    "indices and products of NumPy": by_numpy,
    "a list of flags": lambda m, x: torch.cat([x[:, [True, False, True]], x[:, [1]]], 1),
    "indices as a tensor": lambda m, x: x[:, torch.tensor([2, 1, 0])],
    "unbound methods": lambda m, x: torch.Tensor.mul(x, 2),
    "in place": lambda m, x: x.clone().add_(1).mul_(0.5),
    "reflected": lambda m, x: 1 - 2 / (3 + x.abs()) ** 2,
    "asserted": lambda m, x: torch._assert(x.dim() == 4, "expected images") or x,
}


@pytest.mark.parametrize("change", IDIOMS.values(), ids=IDIOMS.keys())
def test_what_is_computed_counts_and_not_how_it_is_written(
    change: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    model = seeded(after(change))
    net = fcvgg.convert(model)
    assert net.input_size == (12, 12)
    assert native_error(model, net) <= EXACT[torch.float64]


def changed_later(model: nn.Module, x: Tensor) -> Tensor:
    scale = torch.full((1, 3, 1, 1), 0.5, dtype=x.dtype)
    x = x * scale
    scale.mul_(3)
    scale += 1
    return x * scale


def counting(model: nn.Module, x: Tensor) -> Tensor:
    model.calls += 1
    return x * x.size(dim=1)


@pytest.mark.parametrize("change", [changed_later, counting])
def test_tensors_that_are_no_parameters_may_change(
    change: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    model = seeded(after(change))
    model.register_buffer("calls", torch.tensor(0))
    net = fcvgg.convert(model)
    assert native_error(model, net) <= EXACT[torch.float64]


def test_a_parameter_kept_on_the_layer_that_becomes_a_window(tmp_path: Path) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return Plain.forward(model, x) * 2 + model.fc.prior

    model = seeded(lambda: type("Prior", (Plain,), {"forward": forward})())
    model.fc.prior = nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64))
    net = fcvgg.convert(model)
    assert native_error(model, net) <= EXACT[torch.float64]
    assert net.state_dict().keys() == model.state_dict().keys()
    loaded = fcvgg.load(net.save(tmp_path / "bundle"))
    batch = images(1, 3, 20, 23)
    torch.testing.assert_close(loaded(batch), net(batch), rtol=1e-12, atol=1e-12)


def test_two_names_of_one_value_keep_their_values() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        other = F.dropout(x, 0.5, m.training)  # x itself, in evaluation mode
        other = F.relu(other.clone(), inplace=True)
        x = x + 0
        x += other
        return x

    model = seeded(after(forward))
    net = fcvgg.convert(model)
    assert native_error(model, net) <= EXACT[torch.float64]


# -- what is refused in one line ------------------------------------------------------------------


def foreign(model: nn.Module) -> None:
    other, old = nn.Conv2d(3, 3, 1).double(), model.forward
    model.forward = lambda x: old(other(x))


def under_autocast(model: nn.Module) -> None:
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)


def quantized(model: nn.Module) -> None:
    model.fc = torch.ao.nn.quantized.dynamic.Linear(54, 4)


def without_attribute(model: nn.Module) -> None:
    model.pool.forward = lambda x: model.nothing(x)


def without_data(model: nn.Module) -> None:
    old = model.forward
    model.forward = lambda x: old(x + torch.zeros(1, device="meta"))


def wrong_key(model: nn.Module) -> None:
    model.forward = lambda x: x + {}["missing"]


def kept_by_a_hook(model: nn.Module) -> None:
    """The head takes what the last pass left, as a model whose features a hook keeps."""
    kept: list[torch.Tensor] = []
    model.pool.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    model(torch.zeros(1, 3, 12, 12, dtype=torch.float64))
    model.forward = lambda x: model.fc(kept[-1].flatten(1))


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (
            foreign,
            r"^forward uses a parameter of shape \(3, 3, 1, 1\) that is not one of the model's; ",
        ),
        (under_autocast, r"^forward of conv runs under torch\.autocast, which a graph does not "),
        (quantized, r"^fc \(Linear\) is quantized; convert the model of floats it was made from"),
        (
            without_attribute,
            r"in pool, after act \(ReLU\): AttributeError: 'Plain' object has no a",
        ),
        (
            without_data,
            r"^forward makes a tensor on the meta device, without data; make it on the ",
        ),
        (
            kept_by_a_hook,
            r"^fc \(Linear\) takes a tensor that the model kept from an earlier pass, as for",
        ),
        (wrong_key, r"cannot be traced: KeyError: 'missing'; it must be a function"),
    ],
)
@pytest.mark.parametrize("size", [12, None])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_cannot_be_read_is_refused_in_one_line(
    patch: Callable[[nn.Module], None], message: str, size: int | None
) -> None:
    model = seeded(Plain)
    patch(model)
    with pytest.raises(fcvgg.ConversionError, match=message) as caught:
        fcvgg.convert(model, input_size=size, verify=False)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_submodule_is_refused() -> None:
    model = seeded(Plain)
    model.act = torch.jit.script(nn.ReLU())
    with pytest.raises(
        fcvgg.ConversionError, match=r"^act is scripted \(torch.jit\), and its Pyth"
    ):
        fcvgg.convert(model)


def test_a_model_without_data_is_not_verified() -> None:
    model = Plain().to("meta").eval()
    with pytest.raises(
        fcvgg.ConversionError, match=r"^conv\.weight is on the meta device.*verify="
    ):
        fcvgg.convert(model)
    assert fcvgg.convert(model, verify=False).input_size == (12, 12)


# -- devices and types ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        lambda model, x: x.to(next(model.parameters()).device),
        lambda model, x: x.to(model.device),
        lambda model, x: x.to(x.device),
        lambda model, x: x.to(device=model.device, dtype=model.fc.weight.dtype),
        lambda model, x: x.to(model.fc.weight),
        lambda model, x: x.to(memory_format=torch.channels_last),
        lambda model, x: x.type_as(model.fc.weight),
        lambda model, x: x.cpu(),
        lambda model, x: x.cuda() if next(model.parameters()).is_cuda else x,
    ],
)
def test_moves_to_a_device_are_passed_over(step: Callable[[Any, Tensor], Tensor]) -> None:
    class Moving(Plain):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(step(self, x))

    model = seeded(Moving)
    net = fcvgg.convert(model)
    assert native_error(model, net) <= EXACT[torch.float64]
    half = copy.deepcopy(net).float()
    assert half(images(1, 3, 12, 12, dtype=torch.float32)).dtype == torch.float32


# -- the images' channels -------------------------------------------------------------------------


class Stem(Plain):
    def __init__(self, stem: Callable[[Any, Tensor], Tensor], in_channels: int) -> None:
        super().__init__(in_channels)
        self.stem = stem
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(self.stem(self, x))


class ColourAndInfrared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Conv2d(3, 4, 3, padding=1)
        self.infrared = nn.Conv2d(1, 2, 3, padding=1)
        self.fc = nn.Linear(54, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([self.colour(x[:, :3]), self.infrared(x[:, 3:])], 1)
        return self.fc(F.max_pool2d(maps, 4).flatten(1))


@pytest.mark.parametrize(
    ("stem", "takes", "channels"),
    [
        (lambda _, x: x, 3, 3),
        (lambda _, x: x, 1, 1),
        (lambda _, x: x / 2, 2, 2),
        (lambda _, x: x / 2, 13, 13),
        (lambda model, x: x - model.mean, 3, 3),
        (lambda _, x: x[:, [2, 1, 0]], 3, 3),
        (lambda _, x: x[:, :3], 3, 3),
        (lambda _, x: torch.cat([x, x, x], 1), 3, 1),
        (lambda _, x: x[:, :1] * 0.3 + x[:, 1:2] * 0.6 + x[:, 2:3] * 0.1, 1, 3),
    ],
)
def test_channels_are_what_the_graph_takes(
    stem: Callable[[Any, Tensor], Tensor], takes: int, channels: int
) -> None:
    model = seeded(Stem, stem, takes)
    net = fcvgg.convert(model)
    assert net.in_channels == channels
    assert native_error(model, net) <= EXACT[torch.float64]


def test_channels_of_several_branches() -> None:
    assert fcvgg.convert(seeded(ColourAndInfrared)).in_channels == 4


@pytest.mark.parametrize(
    ("stem", "counts"),
    [
        (lambda _, x: x[:, :1], "1, 2, 3 and 4"),
        (lambda _, x: x[:, 1:2], "2, 3 and 4"),
        (lambda _, x: x.mean(1, keepdim=True), "1, 2, 3 and 4"),
    ],
)
def test_channels_that_the_graph_leaves_open_are_to_be_given(
    stem: Callable[[Any, Tensor], Tensor], counts: str
) -> None:
    model = seeded(Stem, stem, 1)
    message = (
        rf"^the channels of the images cannot be inferred: .* with {counts}; pass in_channels="
    )
    for size in (12, None):
        with pytest.raises(fcvgg.CaptureError, match=message):
            fcvgg.convert(model, input_size=size)


def test_one_channel_of_an_rgb_image_is_read() -> None:
    model = seeded(Stem, lambda _, x: x[:, :1], 1)
    net = fcvgg.convert(model, in_channels=3, preprocess=fcvgg.Preprocess((0,) * 3, (1,) * 3))
    assert net.in_channels == 3
    assert native_error(model, net) <= EXACT[torch.float64]
    picture = (images(12, 12, 3).abs() * 60).clamp(0, 255).byte()
    expected = model(picture.permute(2, 0, 1)[None].double() / 255)[0]
    got = net.score_map(picture.numpy()).scores[:, 0, 0]
    assert relative_error(expected, got.double()) <= EXACT[torch.float32]
    assert fcvgg.convert(model, in_channels=1).in_channels == 1


@pytest.mark.parametrize("value", [0, -1, "3", True, 3.0])
def test_in_channels_is_a_positive_integer(value: Any) -> None:
    with pytest.raises(fcvgg.ArgumentError, match=r"^in_channels must be a positive integer, got"):
        fcvgg.convert(seeded(Plain), in_channels=value)


def test_in_channels_must_fit() -> None:
    with pytest.raises(
        fcvgg.CaptureError, match=r"^in_channels=4 does not fit the model: conv \(Co"
    ):
        fcvgg.convert(seeded(Plain), in_channels=4)
