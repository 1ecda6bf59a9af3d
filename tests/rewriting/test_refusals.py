"""What cannot be converted exactly is refused, by name and with a message that is true."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import Headed, Lambda, SmallVGG, SqueezeExcited, images, seeded
from torch import Tensor, nn

import fcvgg
from fcvgg.rewriting.rules import pointwise, rule
from fcvgg.rewriting.rules.elementwise import act_elementwise
from fcvgg.rewriting.rules.registry import KINDS, REFUSED


def refused(model: Any, match: str, error: type = fcvgg.ConversionError, **options: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        fcvgg.convert(model, **options)
    assert isinstance(caught.value, fcvgg.FcvggError)
    assert "\n" not in str(caught.value)


def headed(call: Callable[..., Any], *layers: nn.Module) -> nn.Module:
    """A trunk with 6x6x8 features at 24x24 and a head given as a function."""
    return seeded(Headed, Lambda(call, *layers))


# -- layers that mix positions --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("efficientnet_b0", r"features\.1\.0\.block\.1 \(SqueezeExcitation\) is refused: squeeze"),
        ("mobilenet_v3_small", r"\(SqueezeExcitation\) is refused: squeeze-and-excitation pools"),
        ("vit_b_32", r"\(MultiheadAttention\) is refused: attention mixes all positions"),
        ("swin_t", r"refused: "),
    ],
)
def test_torchvision_models_that_mix_positions(name: str, message: str) -> None:
    with torch.device("meta"):  # weights do not matter
        model = getattr(torchvision.models, name)().eval()
    refused(model, message, fcvgg.RefusedLayerError, input_size=224)


def test_squeeze_and_excitation_written_by_hand() -> None:
    refused(
        seeded(SqueezeExcited),
        r"mul \(.*combines a map with a value pooled over all its positions, as squeeze-and-excit",
        fcvgg.RefusedLayerError,
        input_size=32,
    )


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)])
def test_norms_whose_statistics_mix_positions(norm: nn.Module) -> None:
    refused(
        seeded(Headed, nn.Sequential(norm, nn.Flatten(), nn.Linear(288, 4))),
        rf"head\.0 \({type(norm).__name__}\) is refused: its statistics mix all positions",
        fcvgg.RefusedLayerError,
        input_size=24,
    )


@pytest.mark.parametrize(
    ("call", "layers", "message"),
    [
        (
            lambda x, fc: fc(F.group_norm(x, 2).flatten(1)),
            [nn.Linear(288, 4)],
            r"group_norm \(group_norm in head\) is refused: its statistics",
        ),
        (
            lambda x, fc: fc(F.batch_norm(x, None, None, training=True).flatten(1)),
            [nn.Linear(288, 4)],
            r"batch_norm .* is refused: it normalises by the statistics of the batch",
        ),
        (
            lambda x, norm, fc: fc(norm(x).flatten(1)),
            [nn.BatchNorm2d(8, track_running_stats=False), nn.Linear(288, 4)],
            r"head\.layers\.0 \(BatchNorm2d\) is refused: it normalises by the statistics",
        ),
        (
            lambda x, fc: fc(F.interpolate(x, size=(4, 4)).flatten(1)),
            [nn.Linear(128, 4)],
            r"interpolate \(.*\) is refused: it resizes \(6, 6\) positions to \(4, 4\), not by a",
        ),
        (
            lambda x, up, fc: fc(up(x).mean((2, 3))),
            [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Linear(8, 4)],
            r"head\.layers\.0 \(Upsample\) is refused: it aligns the corners, so that every",
        ),
        (
            lambda x, up, fc: fc(up(x).mean((2, 3))),
            [nn.Upsample(scale_factor=3), nn.Linear(8, 4)],
            r"\(Upsample\) is refused: it enlarges a map of stride 4 by 3, so that positions lie",
        ),
        (
            lambda x, fc: fc(
                (x.flatten(2) @ (x.flatten(2).transpose(1, 2) @ x.flatten(2)).softmax(2)).flatten(1)
            ),
            [nn.Linear(288, 4)],
            r"matmul \(.*\) is refused: products of values \(attention\) mix positions",
        ),
        (
            lambda x, fc: fc(x.roll(1, 2).flatten(1)),
            [nn.Linear(288, 4)],
            r"roll \(Tensor.roll in head\) is refused: shuffling or rolling positions",
        ),
        (
            lambda x, fc: fc(x.flatten(1)).argmax(1),
            [nn.Linear(288, 4)],
            r"argmax \(.*\) is refused: the scores of all classes must come out",
        ),
    ],
)
def test_functions_and_layers_that_are_known_to_break_it(call, layers, message: str) -> None:
    refused(headed(call, *layers), message, fcvgg.RefusedLayerError, input_size=24)


@pytest.mark.parametrize(
    ("call", "layers", "message"),
    [
        (
            lambda x, over, back, fc: fc((x.flatten(2) + back(over(x.flatten(2)))).flatten(1)),
            [nn.Linear(36, 2), nn.Linear(2, 36), nn.Linear(288, 4)],
            r"head\.layers\.0 \(Linear\) mixes positions or tells them apart, .*\(N, 8, 2\)",
        ),
        (
            lambda x, conv, fc: fc(conv(x.reshape(x.size(0), 4, 12, 6)).flatten(1)),
            [nn.Conv2d(4, 2, 3, padding=1), nn.Linear(144, 4)],
            r"head\.layers\.0 \(Conv2d\) mixes positions: along its axis the value \(N, 4, 12, 6\)",
        ),
        (
            lambda x, conv, fc: fc(conv(x.transpose(2, 3)).flatten(1)),
            [nn.Conv2d(8, 2, 3, padding=1), nn.Linear(72, 4)],
            r"head\.layers\.0 \(Conv2d\) needs a map \(N, C, H, W\), but got .* were moved",
        ),
        (
            lambda x, norm, fc: fc(norm(x.flatten(2)).flatten(1)),
            [nn.LayerNorm(36), nn.Linear(288, 4)],
            r"head\.layers\.0 \(LayerNorm\) mixes positions",
        ),
        (
            lambda x, norm, fc: fc(norm(x[:, :, 1:].flatten(1))),
            [nn.BatchNorm1d(240), nn.Linear(240, 4)],
            r"head\.layers\.0 \(BatchNorm1d\) mixes positions",
        ),
        (
            lambda x, fc: fc(x.flatten(2).max(2)[1].to(x.dtype)),
            [nn.Linear(8, 4)],
            r"to \(Tensor\.to in head\) takes the indices of a maximum, which depend on the map's",
        ),
        (
            lambda x, fc: fc((x / x.max()).amax((2, 3))),
            [nn.Linear(8, 4)],
            r"max_1 \(Tensor\.max in head\) reduces over the images of the batch",
        ),
        (
            lambda x, fc: fc(F.dropout(x).flatten(1)),
            [nn.Linear(288, 4)],
            r"dropout \(dropout in head\) drops at random in evaluation mode too \(training=True",
        ),
        (
            lambda x, fc: fc(torch.special.i0(x).flatten(1)),
            [nn.Linear(288, 4)],
            r"special_i0 \(special_i0 in head\) is a function without a rule; see fcvgg.rew",
        ),
        (
            lambda x, layer, fc: fc(layer(x).flatten(1)),
            [nn.LPPool2d(2, 2), nn.Linear(72, 4)],
            r"head\.layers\.0 \(LPPool2d\) is a layer without a rule; see fcvgg.rewriting.rules",
        ),
        (
            lambda x, conv, fc: fc(conv(x).flatten(1)),
            [nn.Conv2d(8, 2, 3, padding=1, padding_mode="circular"), nn.Linear(72, 4)],
            r"\(Conv2d\) pads circularly: cells at one border would see the opposite one",
        ),
        (
            lambda x, pool, fc: fc(pool(x)[0].flatten(1)),
            [nn.MaxPool2d(2, return_indices=True), nn.Linear(72, 4)],
            r"\(MaxPool2d\) returns indices, which depend on the map's size",
        ),
        (
            lambda x, fc: fc(F.conv2d(x, x[0:1]).flatten(1)),
            [nn.Linear(2, 4)],
            r"getitem \(getitem in head\) takes some images of the batch, or mixes them",
        ),
        (
            lambda x, fc: F.linear(fc(x.flatten(1)), x.flatten(1)[:, :4]),
            [nn.Linear(288, 4)],
            r"linear \(linear in head\) has weights computed from the image, as dynamic",
        ),
    ],
)
def test_what_does_not_keep_cells_apart(call, layers, message: str) -> None:
    refused(headed(call, *layers), message, input_size=24)


def test_a_parameter_shaped_by_position() -> None:
    class Positioned(Headed):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(8, 4, 6))
            self.position = nn.Parameter(torch.randn(1, 8, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.trunk(x) + self.position).flatten(1)

    refused(
        seeded(Positioned),
        r"add .* mixes positions or tells them apart, .* and head \(Conv2d\) works on a map",
        fcvgg.UnsupportedLayerError,
        input_size=24,
    )


def test_branches_of_different_strides() -> None:
    model = headed(
        lambda x, a, b, fc: fc((a(x) + b(x)).flatten(1)),
        *(nn.MaxPool2d(2), nn.Conv2d(8, 8, 4), nn.Linear(72, 4)),
    )
    refused(model, r"add .*joins branches with different strides \[\(4, 4\), \(8, 8\)\]")


# -- control flow ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, fc: fc((x if x.sum() > 0 else -x).flatten(1)),
            r"control flow on values: the model branches on gt \(gt in head\); branches may depend",
        ),
        (
            lambda x, fc: fc((x * float(x.mean())).flatten(1)),
            r"control flow on values: the model turns mean .* into a number with float\(\)",
        ),
        (
            lambda x, fc: fc((x * x.amax().item()).flatten(1)),
            r"control flow on values: .* into a number with Tensor.item",
        ),
        (
            lambda x, fc: fc(x.flatten(1)) if not torch.any(x.isnan()) else x,
            r"control flow on values: the model branches on any_1",
        ),
    ],
)
def test_control_flow_on_values(call, message: str) -> None:
    refused(headed(call, nn.Linear(288, 4)), message, fcvgg.CaptureError, input_size=24)


def test_control_flow_on_shapes_and_on_the_mode_is_taken_at_the_native_size() -> None:
    def head(x, fc):
        if x.shape[-1] == 6 and len(x.shape) == 4 and x.dim() == 4 and not x.is_cuda:
            x = F.relu(x)
        for _ in range(x.size(2) // 3):
            x = x * 2
        return fc(x.flatten(1))

    net = fcvgg.convert(headed(head, nn.Linear(288, 4)))
    assert net.input_size == (24, 24)
    assert net.equivalence.passed


def test_a_forward_that_takes_more_than_images() -> None:
    class Two(SmallVGG):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + y

    refused(
        seeded(Two),
        r"cannot be traced: .*missing 1 required positional argument: 'y'; it must",
        fcvgg.CaptureError,
    )


# -- no classifier --------------------------------------------------------------------------------


def test_a_model_without_a_head() -> None:
    refused(
        seeded(lambda: SmallVGG().features),
        r"its output is \(N, 12, 8, 8\), a map; expected scores \(N, K\); fcvgg\.finetune gives",
        input_size=32,
    )
    refused(
        seeded(lambda: SmallVGG().features), r"no fully connected or global-pool head: its output"
    )


def test_a_model_whose_output_is_no_tensor() -> None:
    model = headed(lambda x, fc: (fc(x.flatten(1)), "label"), nn.Linear(288, 4))
    refused(model, r"returns str as output 1 where class scores are expected; wrap", input_size=24)


def test_a_model_with_an_output_that_is_no_scores() -> None:
    model = headed(lambda x, fc: 3, nn.Linear(288, 4))
    refused(model, "returns int where class scores are expected", input_size=24)


def test_outputs_on_different_grids() -> None:
    model = headed(
        lambda x, a, b: (a(x.mean((2, 3))), b(F.max_pool2d(x, 2).mean((2, 3)))),
        *(nn.Linear(8, 4), nn.Linear(8, 4)),
    )
    refused(model, r"outputs lie on different grids of cells; convert one head", input_size=24)


def test_what_is_no_model() -> None:
    refused(SmallVGG, r"must be a torch.nn.Module, got the class SmallVGG")
    refused("vgg16", r"must be a torch.nn.Module, got str; load names and files with fcvgg.load")
    refused({"weight": 1}, r"must be a torch.nn.Module, got dict")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_scripted_model() -> None:
    model = seeded(SmallVGG)
    refused(torch.jit.script(model), r"the model is scripted \(torch.jit\), and its Python code")
    traced = torch.jit.trace(model, images(1, 3, 32, 32))
    refused(traced, r"the model is scripted \(torch.jit\)")


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))
    refused(model, r"lazy layers whose parameters are not initialised yet; run it once on an image")


def test_weights_that_an_own_hook_computes() -> None:
    def build() -> nn.Module:
        layer = nn.Linear(288, 4)
        layer.weight_raw = layer._parameters.pop("weight")
        layer.weight = layer.weight_raw.detach().abs()
        layer.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.weight_raw.abs()))
        return Headed(nn.Sequential(nn.Flatten(), layer))

    refused(seeded(build), r"head\.1 \(Linear\) has a weight that a hook computes; expected a hook")


def test_options_that_are_no_options() -> None:
    model = seeded(SmallVGG)
    refused(
        model,
        r"padding must be 'valid' or 'same', got 'full'",
        fcvgg.FcvggError,
        padding="full",
    )
    refused(
        model,
        r"activation must be 'logits' \(before a softmax, .*, got 'softmax'",
        fcvgg.FcvggError,
        activation="softmax",
    )
    for stride in (0, -2, 1.5, "2"):
        refused(
            model,
            r"output_stride must be a positive integer, got",
            fcvgg.FcvggError,
            output_stride=stride,
        )


# -- the checks of `verify` -----------------------------------------------------------------------


@contextmanager
def rules(*targets: Any) -> Iterator[None]:
    """The registry as it was, after a test that registers wrong rules."""
    kept, refusals = dict(KINDS), dict(REFUSED)
    try:
        yield
    finally:
        for table, before in ((KINDS, kept), (REFUSED, refusals)):
            table.clear()
            table.update(before)


def test_the_translation_check_finds_a_layer_that_mixes_positions() -> None:
    model = seeded(Headed, nn.Sequential(nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 4)))
    with rules():
        pointwise(nn.GroupNorm)
        report = fcvgg.verify(model, fcvgg.convert(model, verify=False))
        assert report.max_rel_error <= 1e-12
        assert report.translation_error > 1e-3
        assert not report.passed
        assert str(report).startswith("NOT EQUIVALENT at 24x24")
        refused(
            model,
            r"does not move with the image: shifting the input by one stride changes its interior",
            fcvgg.EquivalenceError,
        )


class Ramp(nn.Module):
    """Adds the absolute position, whatever the size of the map."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[2], dtype=x.dtype, device=x.device)[:, None] / 10


def test_the_translation_check_finds_a_layer_that_depends_on_the_position() -> None:
    model = seeded(Headed, nn.Sequential(Ramp(), nn.Flatten(), nn.Linear(288, 4)))
    with rules():
        pointwise(Ramp)
        refused(model, r"does not move with the image", fcvgg.EquivalenceError)


def test_a_wrong_rule_is_found_at_the_native_size() -> None:
    model = seeded(SmallVGG)
    with rules():

        @rule(nn.ReLU)
        def wrong(build, call, x):
            return (
                build.features(call, x, 0) if x.positions == 1 else act_elementwise(build, call, x)
            )

        refused(
            model,
            r"differs from the model at \(32, 32\) by .* of the largest score, more than 1e-12",
            fcvgg.EquivalenceError,
        )
    assert fcvgg.convert(model).equivalence.passed


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(output: int, value: float) -> None:
    model = headed(
        lambda x, a, b: (a(x.flatten(1)), b(x.flatten(1))), nn.Linear(288, 4), nn.Linear(288, 2)
    )
    with torch.no_grad():
        model.head.layers[output].weight[1, 2] = value
    refused(
        model,
        r"scores are not finite at the native size: "
        rf"head\.layers\.{output}\.weight holds values that are not finite; check the checkpoint",
        fcvgg.EquivalenceError,
    )


@pytest.mark.parametrize("make", [threading.Lock, lambda: open(os.devnull)])  # noqa: SIM115
def test_a_model_that_holds_what_cannot_be_copied(make: Any) -> None:
    model = seeded(SmallVGG)
    model.features[3].held = held = make()
    refused(
        model,
        r"^the modules of SmallVGG cannot be copied: attribute features\.3\.held: cannot pickle "
        r".*; delete what cannot be copied, or set it to None, before converting$",
    )
    if hasattr(held, "close"):
        held.close()


def test_hooks_that_change_the_answer_are_named() -> None:
    model = seeded(SmallVGG)
    model.features[3].register_forward_hook(lambda module, args, output: output * 2)
    refused(
        model,
        r"differs from the model at .*; features\.3 has forward hooks, which conversion leaves "
        r"out: remove them, or do their work in forward, or pass verify=False",
        fcvgg.EquivalenceError,
    )


def test_a_part_changed_in_place_and_read_as_a_whole() -> None:
    def head(x, fc):
        x[:, :4].relu_()
        return fc(x.flatten(1))

    refused(
        headed(head, nn.Linear(288, 4)),
        r"relu_ \(.*\) changes a part of .* in place, which is read later as a whole; use the",
        fcvgg.UnsupportedLayerError,
    )


def test_verify_takes_images_of_the_native_size() -> None:
    model = seeded(SmallVGG)
    net = fcvgg.convert(model, verify=False)
    assert net.equivalence is None
    report = fcvgg.verify(model, net, images(4, 3, 32, 32), tolerance=1e-9)
    assert (report.images, report.tolerance, report.passed) == (4, 1e-9, True)
    with pytest.raises(
        fcvgg.FcvggError,
        match=r"images must have the native size \(32, 32\).* got \(1, 3, 40, 32\)",
    ):
        fcvgg.verify(model, net, images(1, 3, 40, 32))


def test_verify_tells_another_model_apart() -> None:
    net = fcvgg.convert(seeded(SmallVGG))
    other = SmallVGG().double()
    other.train()
    report = fcvgg.verify(other, net)
    assert not report.passed
    assert report.max_rel_error > 1e-2
    assert other.training


def test_a_layer_called_like_a_keyword_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.add_module("class", nn.Flatten())
    model.add_module("lambda", nn.Linear(16, 2))
    with pytest.raises(fcvgg.ConversionError, match="'lambda' must not be called like a keyword"):
        fcvgg.convert(model.eval(), input_size=4)
