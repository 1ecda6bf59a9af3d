"""One record per layer kind: a user's own layers, and the table as a whole."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Headed, Lambda, images, relative_error, seeded, sliding_window
from torch import Tensor, nn

import fcvgg
from fcvgg.inference import blocks
from fcvgg.rewriting import rules
from fcvgg.rewriting.modules import TrainingFlag
from fcvgg.rewriting.rules import attributes, pointwise, register, rule
from fcvgg.rewriting.rules.elementwise import act_elementwise
from fcvgg.rewriting.rules.registry import KINDS, LayerKind, role_of
from fcvgg.serialization import graph_data
from fcvgg.streaming.execution import bands
from fcvgg.streaming.job import StreamJob
from fcvgg.streaming.strip_plan import StripPlan

OWN = {target: kind for target, kind in KINDS.items() if kind.in_bundle}
"""The package's own kinds, whatever tests and other modules register."""


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """The registry as it was, after a test that registers layers of its own."""
    kept = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(kept)


class Sinc(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x) + torch.special.erfcx(x)  # neither of which has a rule


def register_sinc(**known: Any) -> None:
    """Rules of a user's for a layer of two forms, as if the package had none."""
    KINDS.pop(torch.sinc, None)

    @rule(Sinc, torch.sinc, positional=True, **known)
    def sinc(build: Any, call: Any, x: Any) -> Any:
        return act_elementwise(build, call, x)


def with_layer(layer: Any, after: Any = None) -> fcvgg.FullyConvolutional:
    """A network without padding, of native size 14, with a layer after its first convolution."""

    def make() -> nn.Module:
        between = layer if isinstance(layer, nn.Module) else Lambda(layer)
        return nn.Sequential(
            *(nn.Conv2d(3, 4, 3), between, nn.Conv2d(4, 4, 3), after or nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(100, 3)),
        )

    model = seeded(make)
    net = fcvgg.convert(model, input_size=14)
    batch = images(1, 3, 23, 19)
    torch.testing.assert_close(net(images(2, 3, 14, 14)).flatten(1), model(images(2, 3, 14, 14)))
    assert relative_error(sliding_window(model, net, batch), net(batch)) <= 1e-12
    return net


def streams(net: fcvgg.FullyConvolutional) -> None:
    """Strips of few rows give what the whole image gives."""
    image = images(3, 61, 35)
    job = StreamJob.prepared(net, image, None, None)
    plan = StripPlan(1 << 12, (job.workload.cols,), 0, 1 << 30)
    with torch.no_grad():
        expected = net(image[None])[0]
        parts = list(bands(job, plan, plan.blocks[0], job.workload.rows, lambda _: None))
    assert len(parts) > 1
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


# -- a user's own layers --------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [Sinc(), torch.sinc], ids=["module", "function"])
def test_a_positional_layer_of_the_users_streams_and_is_fused(layer: Any) -> None:
    register_sinc()
    net = with_layer(layer)
    streams(net)
    (block,) = blocks._blocks(net.network)
    assert len(block) == 4
    assert block[1].sliding is None


@pytest.mark.parametrize("layer", [Sinc(), torch.sinc], ids=["module", "function"])
def test_a_layer_that_is_not_said_to_be_positional_is_not_streamed(layer: Any) -> None:
    register_sinc()
    net = with_layer(layer)
    register(Sinc, torch.sinc, positional=False)
    with pytest.raises(fcvgg.UnsupportedLayerError, match=r"\([sS]inc\) cannot be streamed"):
        streams(net)
    assert blocks._blocks(net.network) == []


def test_a_parametrized_layer_streams_like_a_plain_one() -> None:
    streams(with_layer(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))))


def test_a_function_has_the_role_of_its_module() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), Lambda(F.gelu), nn.Flatten(), nn.Linear(16, 4), nn.GELU()),
    )
    names = fcvgg.layer_names(fcvgg.convert(model, input_size=4))
    assert names.names == ("conv1_1", "gelu1_1", "fc6", "gelu6")
    assert names.find("gelu") is names.find("gelu1_1")


def test_a_users_function_is_in_a_bundle_where_its_rule_says_so(tmp_path: Any) -> None:
    register_sinc()
    net = with_layer(torch.sinc)
    with pytest.raises(fcvgg.FcvggError, match=r"calls sinc, which a bundle cannot hold; do it in"):
        net.save(tmp_path / "refused")
    register(torch.sinc, in_bundle=True)
    bundle = net.save(tmp_path / "held")
    image = images(1, 3, 20, 20)
    torch.testing.assert_close(fcvgg.load(bundle)(image), net(image))
    register(torch.sinc, in_bundle=None)
    with pytest.raises(fcvgg.LoadError, match=r"calls 'torch.sinc', which no bundle may call"):
        fcvgg.load(bundle)


def test_a_users_class_is_loaded_unless_its_rule_says_otherwise(tmp_path: Any) -> None:
    register_sinc()
    net = with_layer(Sinc())
    bundle = net.save(tmp_path / "held")
    image = images(1, 3, 20, 20)
    torch.testing.assert_close(fcvgg.load(bundle)(image), net(image))
    register(Sinc, in_bundle=False)
    with pytest.raises(fcvgg.LoadError, match=r"Sinc, which this fcvgg has no rule for; register"):
        fcvgg.load(bundle)


def test_a_users_rule_in_place_of_the_packages_may_read_the_module() -> None:
    @rule(nn.MaxPool2d)
    def max_pool2d(build: Any, call: Any, x: Any) -> Any:
        kernel = call.module.kernel_size
        return build.window(call, build.as_map(x, call), rules.windows_of(kernel), pools="max")

    net = with_layer(nn.Identity(), after=nn.MaxPool2d(2))
    streams(net)


@pytest.mark.parametrize("form", ["module", "function"])
def test_the_example_of_the_guide(form: str) -> None:
    lines = inspect.cleandoc(str(rules.__doc__)).splitlines()
    example = [line for line in lines if line.startswith("    ") or not line]
    exec(textwrap.dedent("\n".join(example)), {**vars(rules), "F": F, "nn": nn})
    pool = {"module": nn.LPPool2d(2, 2), "function": lambda x: F.lp_pool2d(x, 2, 2)}[form]
    net = with_layer(nn.Identity(), after=pool if form == "module" else Lambda(pool))
    streams(net)
    assert role_of(nn.LPPool2d) == role_of(F.lp_pool2d) == "pool"
    with pytest.raises(fcvgg.UnsupportedLayerError, match="has no dilated form; convert without"):
        fcvgg.convert(
            seeded(lambda: nn.Sequential(nn.LPPool2d(2, 2), nn.Flatten(), nn.Linear(48, 2))),
            input_size=8,
            output_stride=1,
        )


def test_a_rule_must_state_the_size_of_its_output() -> None:
    @rule(nn.LPPool2d, arguments=attributes("kernel_size", "stride"))
    def lp_pool2d(build: Any, call: Any, x: Any, kernel_size: Any, stride: Any) -> Any:
        windows = rules.windows_of(kernel_size, stride)
        return build.window(call, build.as_map(x, call), windows, pools="other")

    model = nn.Sequential(nn.LPPool2d(2, 3, ceil_mode=True), nn.Flatten(), nn.Linear(27, 2))
    with pytest.raises(
        fcvgg.UnsupportedLayerError,
        match=r"makes \(3, 3\) positions of \(8, 8\), where the windows of its rule make \(2, 2\)",
    ):
        fcvgg.convert(model, input_size=8)


def test_a_rule_that_takes_the_place_of_another_keeps_the_rest_of_the_record() -> None:
    @rule(nn.ReLU)
    def relu(build: Any, call: Any, x: Any) -> Any:
        return act_elementwise(build, call, x)

    kind = KINDS[nn.ReLU]
    assert kind.rewrite is relu
    assert kind.positional
    assert kind.role == "relu"
    assert KINDS[F.relu].rewrite is act_elementwise
    with pytest.raises(TypeError, match="unexpected keyword argument 'pointwise'"):
        pointwise(nn.ReLU, pointwise=True)


# -- the table ------------------------------------------------------------------------------------


def test_every_kind_of_a_converted_graph_can_be_streamed() -> None:
    for target, kind in OWN.items():
        assert kind.positional or not kind.elementwise, target
        assert not (kind.positional and kind.slides), target
        if kind.rewrite is None:
            on_no_map = target in (TrainingFlag, torch._weight_norm)  # which computes weights
            assert kind.positional or kind.slides or on_no_map, target


def test_what_a_bundle_may_hold_is_found_by_its_name() -> None:
    functions = set(graph_data.functions().values())
    classes = set(graph_data._layer_classes().values())
    for target, kind in OWN.items():
        assert not isinstance(target, str) or target not in functions
        if isinstance(target, type):
            assert target in classes
        elif not isinstance(target, str):
            assert target in functions
        assert kind.in_bundle is True
    for name, cls in graph_data._layer_classes().items():
        assert name.rpartition(".")[2] == cls.__name__


def test_rules_take_the_arguments_of_their_modules() -> None:
    for target, kind in OWN.items():
        if kind.arguments is None or not isinstance(target, type):
            continue
        example = make(target)
        given = kind.arguments(example)
        for function, first in ((kind.rewrite, (None, None, None)), (kind.slides, ())):
            if function is not None:
                inspect.signature(function).bind(*first, **given)


def make(cls: type[nn.Module]) -> nn.Module:
    """A layer, each of whose required arguments is 1, or two of them where a kernel is a pair."""
    names = inspect.signature(cls).parameters.values()
    needed = [p.name for p in names if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    own = cls.__module__.startswith("fcvgg")
    kernels = ("kernel_size", "stride", "padding", "dilation")
    return cls(*((1, 1) if own and name in kernels else 1 for name in needed))


FORMS = [
    (cls, function)
    for cls in OWN
    if isinstance(cls, type)
    for name in [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()]
    for function in {getattr(F, n, None) for n in (name, name.replace("_", ""))}
    if function in OWN
]


def test_the_forms_are_found() -> None:
    assert len(FORMS) >= 30
    assert {(nn.MaxPool2d, F.max_pool2d), (nn.ReLU, F.relu), (nn.Linear, F.linear)} <= set(FORMS)


@pytest.mark.parametrize(("cls", "function"), FORMS, ids=lambda form: form.__name__)
def test_the_forms_of_a_layer_agree(cls: Any, function: Any) -> None:
    module, call = KINDS[cls], KINDS[function]
    for field in ("slides", "positional", "elementwise", "has_extent", "role"):
        assert getattr(module, field) == getattr(call, field), field


def test_a_record_without_a_rule_is_refused_like_an_unknown_layer() -> None:
    KINDS[Sinc] = LayerKind(positional=True)
    model = Headed(nn.Sequential(Sinc(), nn.Flatten(), nn.Linear(288, 4)))
    with pytest.raises(fcvgg.UnsupportedLayerError, match=r"bessel_j0.* is a function without"):
        fcvgg.convert(model, input_size=24)
