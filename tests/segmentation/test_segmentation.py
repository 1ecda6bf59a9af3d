"""Dense networks: upsampling against ScoreMap's, alignment, training, files and folders."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import (
    Functional,
    GlobalPooled,
    Headed,
    SmallVGG,
    Unpadded,
    assert_restored,
    images,
    narrow_vgg,
    seeded,
)
from PIL import Image
from torch import Tensor, nn

import fcvgg
from fcvgg.geometry import IMAGE, Axis, Geometry, KernelGeometry, Step
from fcvgg.segmentation.backbone import return_maps_, with_first_map
from fcvgg.segmentation.mask_folders import MaskedImages, read_mask, train_and_valid
from fcvgg.segmentation.module import SegmentationModule
from fcvgg.segmentation.network import VARIANTS
from fcvgg.segmentation.training import _checked_weights
from fcvgg.segmentation.upsampling import PIXELS, BilinearUpsampling
from fcvgg.training import Settings

CLASSES = ("dark", "light")
PLAIN = fcvgg.Preprocess((0.0,) * 3, (1.0,) * 3)


def axis_of(stride: int, kernel: int, before: int, after: int) -> Axis:
    return Axis((Step(KernelGeometry(kernel, stride, before=before, after=after), (IMAGE,)),))


def geometry_of(*window: int) -> Geometry:
    return Geometry(axis_of(*window), axis_of(*window))


def small_fcn(
    variant: str = "8s", model: nn.Module | None = None, padding: str = "same", **options: Any
) -> fcvgg.FCN:
    """A tiny FCN whose score layers are not zero."""
    net = fcvgg.convert(model or seeded(SmallVGG), preprocess=PLAIN)
    fcn = fcvgg.FCN(net, len(CLASSES), variant, padding=padding, **options)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for score in fcn.scores.values():
            nn.init.normal_(score.conv.weight, std=0.3)
            nn.init.normal_(score.conv.bias, std=0.3)
    return fcn


# -- upsampling -------------------------------------------------------------------------------


axes = st.builds(
    axis_of, st.integers(1, 9), st.integers(1, 12), st.integers(0, 6), st.integers(0, 6)
)
extents = st.tuples(st.integers(1, 5), st.integers(1, 5))
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(height=axes, width=axes, cells=extents, size=sizes)
def test_bilinear_kernels_give_what_score_maps_resample_to(
    height: Axis, width: Axis, cells: tuple[int, int], size: tuple[int, int]
) -> None:
    geometry = Geometry(height, width)
    scores = images(1, 2, *cells)
    expected = fcvgg.ScoreMap(scores[0], geometry, size, size).resample()
    upsampling = BilinearUpsampling(2, geometry, PIXELS, dtype=torch.float64)
    torch.testing.assert_close(upsampling(scores, size)[0], expected, rtol=0, atol=1e-12)


def test_upsampling_to_a_finer_grid_interpolates_at_its_centres() -> None:
    coarse, fine = geometry_of(8, 8, 0, 0), geometry_of(4, 3, 1, 1)  # centres 3.5 + 8i, 4i
    ramp = torch.arange(4.0, dtype=torch.float64) * 8 + 3.5
    maps = ramp.expand(1, 1, 4, 4)
    made = BilinearUpsampling(1, coarse, fine, dtype=torch.float64)(maps, (8, 8))[0, 0]
    expected = (torch.arange(8.0, dtype=torch.float64) * 4).clamp(3.5, 27.5)
    torch.testing.assert_close(made[2], expected, rtol=0, atol=1e-12)


def test_a_stride_that_does_not_divide_is_refused() -> None:
    with pytest.raises(fcvgg.GeometryError, match=r"must divide that of the cells, 6, got 4"):
        BilinearUpsampling(1, geometry_of(6, 6, 0, 0), geometry_of(4, 4, 0, 0))


# -- the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_has_the_size_of_every_input(variant: str, padding: str) -> None:
    fcn = small_fcn(variant, padding=padding).eval()
    for size in [(1, 1), (3, 50), (31, 33), (64, 48), (77, 40)]:
        assert fcn(images(2, 3, *size)).shape == (2, 2, *size)


@pytest.mark.parametrize(
    ("model", "size", "names"),
    [
        (seeded(narrow_vgg, "vgg11"), None, ("fc7", "pool4", "pool3")),
        (seeded(narrow_vgg, "vgg16_bn"), None, ("fc7", "pool4", "pool3")),
        (seeded(SmallVGG), None, ("fc7", "pool1", "conv1_1")),
        (seeded(Unpadded), None, ("fc6", "conv2_1", "pool1")),
        (seeded(GlobalPooled), 64, ("avgpool", "pool1", "conv1_1")),
        (seeded(Headed, nn.Sequential(nn.Flatten(), nn.Linear(288, 4))), 24, ("pool2", "pool1")),
    ],
    ids=["vgg11", "vgg16_bn", "small", "unpadded", "resnet-like", "one-layer-head"],
)
def test_the_maps_scored_are_those_of_half_and_quarter_the_stride(
    model: nn.Module, size: int | None, names: tuple[str, ...]
) -> None:
    variant = ("32s", "16s", "8s")[len(names) - 1]
    for padding in ("same", "valid"):
        net = fcvgg.convert(model, input_size=size, verify=False)
        fcn = fcvgg.FCN(net, 3, variant, padding=padding).eval()
        assert tuple(source.name for source in fcn.sources) == names
        strides = [source.geometry.stride[0] for source in fcn.sources]
        assert strides == [strides[0] // 2**i for i in range(len(names))]
        batch = images(1, 3, 71, 90)
        for source, found in zip(fcn.sources, fcn.backbone(batch)):
            assert found.shape[1] == source.channels
            padded = [max(n, w) for n, w in zip((71, 90), fcn.backbone.geometry.window)]
            assert tuple(found.shape[2:]) == source.geometry.output_size(padded)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (seeded(SmallVGG), None),
        (seeded(narrow_vgg, "vgg11"), None),
        (seeded(narrow_vgg, "vgg11"), 448),
        (seeded(Unpadded, extent=(2, 4)), (25, 41)),
        (seeded(GlobalPooled), 64),
        (seeded(Headed, nn.Sequential(nn.Flatten(), nn.Linear(288, 6), nn.Linear(6, 4))), 24),
    ],
    ids=["small", "vgg11", "dilated-fc6", "not-square", "resnet-like", "two-layer-head"],
)
def test_the_heads_window_is_padded_as_convert_does(model: nn.Module, size: Any) -> None:
    """Two ways to one network: padded here, or converted with padding."""
    nets = [
        fcvgg.convert(model, input_size=size, padding=p, verify=False) for p in ("valid", "same")
    ]
    ours, theirs = (fcvgg.FCN(net, 3).eval().backbone for net in nets)
    assert ours.geometry.window == theirs.geometry.window
    assert ours.geometry.offset == theirs.geometry.offset
    batch = images(1, 3, 80, 97)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs(batch), rtol=0, atol=1e-12)
    kept = fcvgg.FCN(nets[0], 3, padding="valid").backbone.geometry
    assert kept.window == nets[0].geometry.window


def test_the_score_of_fc7_is_the_classifiers_when_it_has_its_weights() -> None:
    """The oracle: FCN-32s with the classifier's last layer is the aligned map of the network."""
    net = fcvgg.convert(seeded(SmallVGG))
    fcn = fcvgg.FCN(net, 5, "32s", padding="valid").eval()
    last = fcvgg.layer_names(net)["fc8"].path
    layer = net.network.get_submodule(last)
    fcn.scores["fc7"].conv.weight.data = layer.weight.data.clone()
    fcn.scores["fc7"].conv.bias.data = layer.bias.data.clone()
    for size in [(64, 64), (47, 70), (20, 40)]:
        batch = images(1, 3, *size)
        with torch.no_grad():
            expected = net.score_map(batch).resample()
            torch.testing.assert_close(fcn(batch)[0], expected, rtol=0, atol=1e-10)


def test_a_head_of_functions_is_scored_like_one_of_modules(tmp_path: Path) -> None:
    """`F.linear` with the model's parameters becomes a function in the converted network too."""
    net = fcvgg.convert(seeded(Functional), input_size=28)
    head = [layer.name for layer in fcvgg.layer_names(net) if not layer.block]
    assert head == ["fc6", "tanh6", "fc7", "prob"]
    fcn = fcvgg.FCN(net, 3, "16s", padding="valid").eval()
    assert [source.name for source in fcn.sources] == ["fc6", "conv1_1"]
    assert "fc2" not in fcn.backbone.state_dict()
    weight = net.network.get_parameter("fc2").detach()[:3, :, None, None]
    fcn.scores["fc6"].conv.weight.data = weight.clone()
    batch = images(1, 3, 61, 47)
    with torch.no_grad():
        hidden = torch.nn.functional.conv2d(fcn.backbone(batch)[0], weight)
        # log_softmax leaves differences of scores as they are
        differences = (hidden - hidden[:, :1])[0]
        expected = net(batch)[0, :3] - net(batch)[0, :1]
        torch.testing.assert_close(differences, expected, rtol=0, atol=1e-12)
    assert_restored(fcn, fcvgg.FCN.load(fcn.save(tmp_path / "fcn")), batch)


def averaging(model: nn.Module) -> nn.Module:
    """The model with positive weights and average pools: a cell depends on all that it sees."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding)
                setattr(module, name, pool)
            elif isinstance(child, (nn.Conv2d, nn.Linear)):
                nn.init.constant_(child.weight, 0.01)
    return model


@pytest.mark.parametrize(
    ("model", "size", "extent"),
    [
        (averaging(seeded(narrow_vgg, "vgg11", width=64)), None, 420),
        (averaging(seeded(GlobalPooled)), 64, 150),
        (averaging(seeded(Unpadded)), None, 90),
    ],
    ids=["vgg11", "resnet-like", "unpadded"],
)
def test_every_scored_map_lies_where_its_gradients_do(
    model: nn.Module, size: int | None, extent: int
) -> None:
    """The oracle of alignment: the pixels that change a cell are its receptive field."""
    net = fcvgg.convert(model, input_size=size, verify=False)
    for padding in ("same", "valid"):
        fcn = fcvgg.FCN(net, 2, "8s", padding=padding).eval()
        for i, source in enumerate(fcn.sources):
            batch = torch.ones(1, 3, extent, extent + 17, dtype=torch.float64, requires_grad=True)
            found = fcn.backbone(batch)[i]
            row, col = (n // 2 for n in found.shape[2:])
            found[0, :, row, col].sum().backward()
            assert batch.grad is not None
            seen = batch.grad[0].abs().sum(0).nonzero()
            top, left, bottom, right = source.geometry.receptive_field_of(row, col)
            expected = [max(top, 0), max(left, 0), min(bottom, extent), min(right, extent + 17)]
            first, last = seen.amin(0).tolist(), seen.amax(0).tolist()
            assert [*first, *(n + 1 for n in last)] == expected


class Brightness(nn.Module):
    """Passes brightness through: convolutions that copy, average pools, a head that averages."""

    def __init__(self, kernel: int = 3, pools: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(pools):
            conv = nn.Conv2d(1, 1, kernel, padding=kernel // 2, bias=False)
            nn.init.zeros_(conv.weight)
            conv.weight.data[..., kernel // 2, kernel // 2] = 1
            layers += [conv, nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2))
        nn.init.constant_(self.head[1].weight, 0.25)
        nn.init.zeros_(self.head[1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def brightness_fcn(variant: str, padding: str) -> fcvgg.FCN:
    """Scores one class by brightness less one half, and the other by zero, on its finest map."""
    net = fcvgg.convert(Brightness().double().eval())
    fcn = fcvgg.FCN(net, 2, variant, padding=padding).eval()
    finest = fcn.scores[fcn.sources[-1].name]
    finest.conv.weight.data[1] = 1
    finest.conv.bias.data[1] = -0.5
    return fcn


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("edge", [40, 48, 53])
def test_an_edge_of_the_image_is_an_edge_of_the_labels(
    variant: str, padding: str, edge: int
) -> None:
    """A cell averages the pixels around its centre, so the labels change where the image does."""
    fcn = brightness_fcn(variant, padding)
    image = torch.zeros(1, 1, 96, 96, dtype=torch.float64)
    image[..., edge:] = 1
    with torch.no_grad():
        across = fcn(image)[0].argmax(0)
        down = fcn(image.mT)[0].argmax(0)
    assert torch.equal(across, down.T)
    found = (across[48] == 0).sum().item()
    # averages over a window of w pixels cross one half within a fraction of the stride
    assert abs(found - edge) <= fcn.sources[-1].geometry.stride[0] / 4
    # padding="same" puts zeros below the image, which the last row of cells averages in
    assert (across[:80] == across[48]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_moving_the_image_by_the_stride_moves_the_inner_labels(variant: str) -> None:
    model = seeded(SmallVGG)
    fcn = small_fcn(variant, model).eval()
    stride = fcn.backbone.geometry.stride[0]
    image = images(1, 3, 120, 120 + stride)
    with torch.no_grad():
        first, moved = fcn(image[..., :-stride]), fcn(image[..., stride:])
    inner = slice(44, 76)  # further than half the receptive field from every border
    expected = first[..., inner, stride:][..., inner]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(moved[..., inner, inner], expected, rtol=0, atol=1e-10)


def test_pixels_of_a_small_image_lie_where_they_do_on_its_padded_form() -> None:
    fcn = small_fcn("8s", padding="valid").eval()
    image = images(1, 3, 20, 25)
    (top, bottom), (left, right) = fcn.backbone.geometry.padding_for((20, 25))
    padded = nn.functional.pad(image, (left, right, top, bottom))
    with torch.no_grad():
        expected = fcn(padded)[..., top : top + 20, left : left + 25]
        torch.testing.assert_close(fcn(image), expected)


def test_score_layers_start_at_zero_and_gradients_reach_all() -> None:
    net = fcvgg.convert(seeded(SmallVGG, bn=True))
    fresh = fcvgg.FCN(net, 3, "8s").train()
    assert not fresh(images(1, 3, 40, 40)).any()
    fcn = small_fcn("8s", seeded(SmallVGG, bn=True)).train()
    fcn(images(2, 3, 40, 40)).square().sum().backward()
    without = [name for name, p in fcn.named_parameters() if p.grad is None or not p.grad.any()]
    # a bias before a batch norm has no effect in training
    assert [n for n in without if n != "backbone.network.features.0.bias"] == []
    assert any("upsamplings" in name for name, _ in fcn.named_parameters())
    fixed = fcvgg.FCN(net, 3, "8s", learn_upsampling=False)
    assert not any("upsamplings" in name for name, _ in fixed.named_parameters())


def test_the_source_is_untouched_and_shares_only_if_asked() -> None:
    model = seeded(SmallVGG)
    net = fcvgg.convert(model)
    before = copy.deepcopy(net.state_dict())
    batch = images(1, 3, 40, 40)
    expected = net(batch)
    own = fcvgg.FCN(net, 3, "16s")
    shared = fcvgg.FCN(net, 3, "16s", copy=False)
    assert torch.equal(net(batch), expected)
    assert list(net.state_dict()) == list(before)
    storage = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not any(p.untyped_storage().data_ptr() in storage for p in own.parameters())
    assert all(p.untyped_storage().data_ptr() in storage for p in shared.backbone.parameters())
    assert "classifier.6.weight" not in own.backbone.state_dict()


def test_shared_weights_are_not_overwritten_by_a_starting_point() -> None:
    model = seeded(SmallVGG)
    before = copy.deepcopy(model.state_dict())
    net = fcvgg.convert(model)
    coarse = fcvgg.FCN(net, 2, copy=False)
    fcvgg.FCN(net, 2, "16s", copy=False, init_from=coarse)  # the same weights: nothing to change
    trained = fcvgg.FCN(net, 2)
    with torch.no_grad():
        next(trained.backbone.parameters()).add_(1)
    with pytest.raises(
        fcvgg.ArgumentError, match=r"init_from must have the network.s weights .* copy=True"
    ):
        fcvgg.FCN(net, 2, "16s", copy=False, init_from=trained)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_frozen_layers_stay_frozen() -> None:
    net = fcvgg.freeze_(fcvgg.convert(seeded(SmallVGG, bn=True)), "pool1")
    for shares in (False, True):
        fcn = fcvgg.FCN(net, 2, "16s", copy=not shares).train()
        before = {name: b.clone() for name, b in fcn.backbone.named_buffers()}
        assert any("running_mean" in name for name in before)
        fcn(images(2, 3, 40, 40)).sum().backward()
        for name, buffer in fcn.backbone.named_buffers():
            assert torch.equal(buffer, before[name]), name
        trained = {name for name, p in fcn.backbone.named_parameters() if p.grad is not None}
        assert not any("features.0" in name or "features.1" in name for name in trained)
        assert any("classifier" in name for name in trained)


def test_a_finer_variant_starts_from_a_coarser_ones_weights() -> None:
    net = fcvgg.convert(seeded(SmallVGG))
    coarse = small_fcn("32s").eval()
    fine = fcvgg.FCN(net, 2, "8s", init_from=coarse).eval()
    state = fine.state_dict()
    assert all(torch.equal(state[key], value) for key, value in coarse.state_dict().items())
    batch = images(1, 3, 64, 64)
    with torch.no_grad():
        # interpolated in three steps in place of one, since the new score layers are zero
        difference = (fine(batch) - coarse(batch)).abs().max()
        assert 0 < difference < 0.2 * coarse(batch).std()
    with pytest.raises(
        fcvgg.ArgumentError, match="got FCN-8s of 2 classes for FCN-32s of 2, where scores"
    ):
        fcvgg.FCN(net, 2, "32s", init_from=fine)
    with pytest.raises(
        fcvgg.ArgumentError, match=r"init_from must be a coarser or equal .* for FCN-32s of 3"
    ):
        fcvgg.FCN(net, 3, "32s", init_from=coarse)
    with pytest.raises(
        fcvgg.ArgumentError, match=r"init_from must be a trained fcvgg.FCN, got Linear"
    ):
        fcvgg.FCN(net, 3, "32s", init_from=nn.Linear(1, 1))  # type: ignore[arg-type]


def test_what_cannot_be_built_is_said_in_one_line() -> None:
    net = fcvgg.convert(seeded(SmallVGG))
    with pytest.raises(fcvgg.ArgumentError, match="variant must be '32s', '16s' or '8s', got '4s'"):
        fcvgg.FCN(net, 3, "4s")
    with pytest.raises(
        fcvgg.ArgumentError, match="padding must be 'same' or 'valid', got 'reflect'"
    ):
        fcvgg.FCN(net, 3, padding="reflect")
    with pytest.raises(
        fcvgg.ArgumentError, match="net must be a converted network, got SmallVGG; pass"
    ):
        fcvgg.FCN(seeded(SmallVGG), 3)  # type: ignore[arg-type]
    with pytest.raises(
        fcvgg.ArgumentError, match="num_classes must be an integer of at least 1, got 0"
    ):
        fcvgg.FCN(net, 0)
    with pytest.raises(fcvgg.ArgumentError, match="num_classes must be 2 to 255, got 1; add"):
        fcvgg.FCN(net, 1)
    with pytest.raises(
        fcvgg.CategoryError, match=r"categories must be one different name per class, got 'a' twice"
    ):
        fcvgg.FCN(net, 3, categories=("a", "b", "a"))
    with pytest.raises(
        fcvgg.CategoryError, match=r"^categories='abc' is taken for the path of a f"
    ):
        fcvgg.FCN(net, 2, categories="abc")
    with pytest.raises(
        fcvgg.CategoryError, match=r"categories must be 2 names, one per class .*, got 3"
    ):
        fcvgg.FCN(net, 2, categories=("a", "b", "c"))
    one_pool = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(16, 2)
    )
    tripled = fcvgg.convert(one_pool.eval())
    with pytest.raises(fcvgg.ArgumentError, match=r"no map of stride 1.5 .*\(its strides are 1, 3"):
        fcvgg.FCN(tripled, 2, "16s")

    class Two(SmallVGG):
        def forward(self, x: Tensor) -> Any:
            scores = super().forward(x)
            return scores, scores

    with pytest.raises(fcvgg.ArgumentError, match="net must have one output, got 2"):
        fcvgg.FCN(fcvgg.convert(seeded(Two)), 2)


def test_calibration_divides_by_the_size_of_each_map_once() -> None:
    fcn = fcvgg.FCN(fcvgg.convert(seeded(SmallVGG)), 2, "16s")
    batch = images(2, 3, 40, 40)
    maps = fcn.backbone(batch)
    fcn.calibrate_(batch)
    for score, features in zip(fcn.scores.values(), maps):
        torch.testing.assert_close(score.magnitude, features.square().mean().sqrt())
    fcn.scores["fc7"].conv.weight.data.fill_(1)
    fcn.calibrate_(10 * batch)
    assert fcn.scores["fc7"].magnitude == maps[0].square().mean().sqrt()
    assert fcn.scores["pool1"].magnitude != maps[1].square().mean().sqrt()


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_network_is_restored_bit_for_bit(variant: str, tmp_path: Path) -> None:
    learned = variant != "8s"
    fcn = small_fcn(variant, categories=CLASSES, learn_upsampling=learned).eval()
    fcn.save(tmp_path / "fcn")
    again = fcvgg.FCN.load(fcn.save(tmp_path / "fcn"))
    batch = images(1, 3, 45, 37)
    assert_restored(fcn, again, batch)
    assert (again.variant, again.categories, again.preprocess) == (variant, CLASSES, PLAIN)
    assert not [p for p in tmp_path.iterdir() if p.name != "fcn"]
    (tmp_path / "fcn" / "README.md").write_text("trained on Monday")
    assert (fcn.save(tmp_path / "fcn") / "README.md").read_text() == "trained on Monday"


def test_what_cannot_be_saved_or_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    fcn = small_fcn("16s")
    (tmp_path / "other").mkdir()
    with pytest.raises(fcvgg.FcvggError, match="other exists and is not the folder of an FCN"):
        fcn.save(tmp_path / "other")
    with pytest.raises(fcvgg.FcvggError, match="there is no folder"):
        fcn.save(tmp_path / "none" / "fcn")
    with pytest.raises(
        fcvgg.LoadError, match=r"other must be the folder of an FCN, got none with fcn.json"
    ):
        fcvgg.FCN.load(tmp_path / "other")
    (tmp_path / "plain").write_text("")
    with pytest.raises(fcvgg.LoadError, match=r"plain must be the folder of an FCN"):
        fcvgg.FCN.load(tmp_path / "plain")
    config = fcn.save(tmp_path / "fcn") / "fcn.json"
    good = json.loads(config.read_text())
    for change, message in [
        ({"variant": "4s"}, "describe an FCN: variant must be '32s'"),
        ({"num_classes": 3}, "describe an FCN: "),
        ({"num_classes": "x"}, "must hold a positive num_classes, .* got 'x'"),
        ({"format": 9}, "must have format 1"),
        ({"preprocess": [1]}, "describe an FCN: "),
        ({"preprocess": {"mean": "abc", "std": [1, 1, 1]}}, "describe an FCN: mean must hold"),
    ]:
        config.write_text(json.dumps({**good, **change}))
        with pytest.raises(fcvgg.LoadError, match=message) as caught:
            fcvgg.FCN.load(tmp_path / "fcn")
        assert "\n" not in str(caught.value)
    config.write_text("{")
    with pytest.raises(fcvgg.LoadError, match=r"fcn.json is broken"):
        fcvgg.FCN.load(tmp_path / "fcn")
    config.write_text(json.dumps(good))
    backbone = tmp_path / "fcn" / "backbone"
    shutil.rmtree(backbone)
    torch.save({"of": "another kind"}, backbone)
    with pytest.raises(fcvgg.LoadError, match="fcn is broken: it has no folder backbone"):
        fcvgg.FCN.load(tmp_path / "fcn")


# -- label maps -------------------------------------------------------------------------------


def test_predict_gives_labels_of_the_images_own_size(tmp_path: Path) -> None:
    fcn = small_fcn("8s", categories=CLASSES)
    fcn.preprocess = fcvgg.Preprocess((0.0,) * 3, (1.0,) * 3, resize=32)
    pixels = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    label_map = fcn.train().predict(pixels)
    assert label_map.labels.shape == (45, 60)
    assert fcn.training
    assert sum(label_map.shares.values()) == pytest.approx(1)
    assert "LabelMap(45x60 pixels, 2 classes:" in repr(label_map)


def test_a_label_map_is_drawn_and_saved(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 255], [1, 1, 0]])
    picture = Image.new("RGB", (3, 2), (100, 100, 100))
    label_map = fcvgg.LabelMap(labels, CLASSES, picture)
    assert label_map.shares == {"dark": 0.4, "light": 0.6}
    coloured = np.asarray(label_map.coloured())
    assert len({tuple(c) for c in coloured.reshape(-1, 3).tolist()}) == 3
    overlay = np.asarray(label_map.overlay())
    assert overlay[0, 2].tolist() == [100, 100, 100]
    assert overlay[0, 0].tolist() != overlay[0, 1].tolist()
    assert np.array_equal(fcvgg.LabelMap(labels, CLASSES).overlay(), coloured)
    assert np.array_equal(read_mask(label_map.save(tmp_path / "labels.png")), labels)
    assert label_map._repr_png_().startswith(b"\x89PNG")
    ax = label_map.plot()
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts == ["dark (40%)", "light (60%)"]
    with pytest.raises(fcvgg.ArgumentError, match=r"^alpha must be in \[0, 1\], got 2$"):
        label_map.overlay(2)
    with pytest.raises(fcvgg.ImageError, match=r"path must be a name in .png, got 'labels.jpg'"):
        label_map.save(tmp_path / "labels.jpg")


def test_metrics_are_those_counted_by_hand() -> None:
    truth = np.array([[0, 0, 1], [1, 2, 255]])
    found = np.array([[0, 1, 1], [1, 1, 0]])
    metrics = fcvgg.label_metrics([(found, truth)], ("a", "b", "c", "d"))
    assert metrics.pixel_accuracy == pytest.approx(3 / 5)
    assert metrics.iou["a"] == pytest.approx(1 / 2)
    assert metrics.iou["b"] == pytest.approx(2 / 4)
    assert metrics.iou["c"] == 0
    assert np.isnan(metrics.iou["d"])
    assert metrics.mean_iou == pytest.approx(1 / 3)
    assert str(metrics).startswith("mean IoU 0.333, pixel accuracy 0.600 (a 0.500")
    mirrored = [(found[:, ::-1], truth[:, ::-1])]
    assert fcvgg.label_metrics(mirrored, ("a", "b", "c", "d")).mean_iou == metrics.mean_iou
    with pytest.raises(
        fcvgg.DatasetError, match="the masks must label at least one pixel, got 255"
    ):
        fcvgg.label_metrics([(found, np.full((2, 3), 255))], ("a", "b", "c"))


def test_labels_that_cannot_be_compared_are_refused_in_one_line() -> None:
    truth, found = np.array([[0, 1, 255]]), np.array([[0, 1, 255]])
    assert fcvgg.label_metrics([(found, truth)], "ab").mean_iou == 1  # ignored whatever it is
    for pair, names, message in [
        ((np.array([[0, 255, 1]]), truth), "ab", "predicted labels must be 0 to 1, or .*, got 255"),
        ((found * 0, np.array([[0, 7, 1]])), "ab", "true labels must be 0 to 1, or 255 .*, got 7"),
        (
            (found[:, :2], truth),
            "ab",
            r"must have the shape of the true ones, \(1, 3\), got \(1, 2\)",
        ),
        (
            (found, truth),
            ("a", " "),
            "categories must be one different name per class, got the empty",
        ),
    ]:
        with pytest.raises(fcvgg.FcvggError, match=message):
            fcvgg.label_metrics([pair], names)


# -- folders ----------------------------------------------------------------------------------


def write_masked(folder: Path, count: int = 6, side: int = 40, seed: int = 0) -> Path:
    """Noisy images of a dark and a light part, and their masks, one of them with a palette."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        labels = np.zeros((side, side + i), np.uint8)
        labels[:, rng.integers(10, side - 10) :] = 1
        if i % 2:
            labels = labels[:, ::-1]
        grey = rng.normal(60 + 120 * labels, 15).clip(0, 255).astype(np.uint8)
        Image.fromarray(grey).convert("RGB").save(folder / "images" / f"{i}.png")
        mask = Image.fromarray(np.ascontiguousarray(labels))
        if i == 1:
            mask.putpalette([0, 0, 0, 255, 0, 0])
        mask.save(folder / "masks" / f"{i}.png")
    return folder


def test_a_mask_folder_is_read_with_its_counts(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "data")
    (folder / "images" / "2.png").write_bytes(b"no image")
    found = fcvgg.mask_folder(folder, CLASSES)
    assert [p.name for p in found.images] == [f"{i}.png" for i in (0, 1, 3, 4, 5)]
    assert sum(found.counts) == sum(40 * (40 + i) for i in (0, 1, 3, 4, 5))
    assert len(found.skipped) == 1
    assert "2.png is not an image" in str(found.skipped[0])
    assert fcvgg.mask_folder(folder, 2).categories == ("0", "1")


def test_images_and_masks_are_turned_as_their_exif_entry_says(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "data", 2)
    image, mask = folder / "images" / "1.png", folder / "masks" / "1.png"
    upright = np.asarray(Image.open(mask))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    for path in (image, mask):
        picture = Image.open(path)
        picture.load()
        picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=turned)
    assert np.array_equal(read_mask(mask), upright)
    assert len(fcvgg.mask_folder(folder, CLASSES)) == 2
    Image.fromarray(np.rot90(upright)).save(mask)
    with pytest.raises(fcvgg.DatasetError, match="must have a label for each pixel of the upright"):
        fcvgg.mask_folder(folder, CLASSES)


@pytest.mark.parametrize(
    ("place", "table", "categories"),
    [
        ("labelmap.txt", "# label:color_rgb:parts:actions\nDark:0,0,9::\nlight:9,0,0::\n", CLASSES),
        ("masks/class_dict.csv", "name,r,g,b\nlight,9,0,0\ndark,0,0,9\nVoid,1,2,3\n", CLASSES),
        ("labelmap.txt", "a:0,0,9::\nb:9,0,0::\n", 2),
    ],
)
def test_masks_of_colours_are_read_by_their_table(
    tmp_path: Path, place: str, table: str, categories: Any
) -> None:
    folder = write_masked(tmp_path / "data", 3)
    masks = [folder / "masks" / f"{i}.png" for i in range(3)]
    labels = [read_mask(mask) for mask in masks]
    colours = np.array([(0, 0, 9), (9, 0, 0)], np.uint8)
    for mask, indices in zip(masks[:2], labels):  # the last keeps its indices
        Image.fromarray(colours[indices]).save(mask)
    (folder / place).write_text(table)
    found = fcvgg.mask_folder(folder, categories)
    for i, expected in enumerate(labels):
        assert np.array_equal(found.labels(i), expected)
    if "Void" in table:
        Image.fromarray(np.full((40, 40, 3), (1, 2, 3), np.uint8)).save(masks[0])
        assert set(fcvgg.mask_folder(folder, categories).labels(0).ravel()) == {255}
    Image.fromarray(np.full((40, 40, 3), (7, 7, 8), np.uint8)).save(masks[0])
    with pytest.raises(fcvgg.DatasetError, match=r"0\.png has the colour \(7, 7, 8\), which the "):
        fcvgg.mask_folder(folder, categories)


def test_a_table_of_other_colours_is_refused(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "data", 2)
    (folder / "labelmap.txt").write_text("cat:1,2,3::\n")
    with pytest.raises(
        fcvgg.DatasetError, match=r"must list the colours of dark, light, got .*cat"
    ):
        fcvgg.mask_folder(folder, CLASSES)


def test_what_training_cannot_read_is_skipped_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_masked(tmp_path / "data", 4)
    (folder / "images" / "0.png").unlink()
    Image.fromarray(np.full((40, 40), 9, np.float32)).save(folder / "images" / "0.tiff")
    found = fcvgg.mask_folder(folder, CLASSES)
    assert "must hold floats from 0 to 1, got float32" in str(found.skipped[0])
    assert len(found) == 3
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(fcvgg.ImageError, match=r"masks.1.png must be smaller to be loaded whole"):
        read_mask(folder / "masks" / "1.png")


def test_a_folder_is_split_by_seed_or_as_it_is(tmp_path: Path) -> None:
    whole = write_masked(tmp_path / "whole")
    train, valid = train_and_valid(whole, CLASSES, share=0.3, seed=1)
    assert (len(train), len(valid)) == (4, 2)
    assert not set(train.images) & set(valid.images)
    assert train_and_valid(whole, CLASSES, 0.3, 1)[1].images == valid.images
    assert any(train_and_valid(whole, CLASSES, 0.3, s)[1].images != valid.images for s in (2, 3, 4))
    assert sum(train.counts) + sum(valid.counts) == sum(fcvgg.mask_folder(whole, 2).counts)
    write_masked(tmp_path / "split" / "train", 3)
    write_masked(tmp_path / "split" / "valid", 2)
    assert [len(part) for part in train_and_valid(tmp_path / "split", CLASSES)] == [3, 2]
    with pytest.raises(fcvgg.ArgumentError, match="valid_fraction must be between 0 and 1, got 1"):
        train_and_valid(whole, CLASSES, 1)


def test_bad_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "data")

    def refused(message: str, categories: Any = CLASSES, where: Path = folder) -> None:
        with pytest.raises(fcvgg.FcvggError, match=message) as caught:
            fcvgg.mask_folder(where, categories)
        assert "\n" not in str(caught.value)

    mask, image = folder / "masks" / "3.png", folder / "images" / "3.png"
    good = Image.open(mask)
    good.load()
    good.resize((30, 20)).save(mask)
    refused(r"the mask .*3.png must have a label for each pixel, 40x43 for .*3.png, got 20x30")
    labels = np.array(good)
    labels[5, 7] = 9
    Image.fromarray(labels).save(mask)
    refused(r"3.png holds the label 9 at \(y, x\) = \(5, 7\); expected 0 to 1, or 255")
    coloured = np.array(good.convert("RGB"))
    coloured[0, 0] = (255, 0, 9)
    Image.fromarray(coloured).save(mask)
    kinds = "expected class indices, grey or with a palette, as PNG, TIFF or BMP"
    refused(rf"3.png has mode RGB and 3 colours such as \(255, 0, 9\); {kinds}, or labelmap.txt")
    good.convert("LA").save(mask)
    assert len(fcvgg.mask_folder(folder, CLASSES)) == 6
    clear = np.stack([np.array(good), np.full(good.size[::-1], 254, np.uint8)], 2)
    Image.fromarray(clear).save(mask)
    refused(rf"the mask .*3.png has transparent pixels; {kinds}$")
    good.save(mask, "JPEG")  # whatever its name says
    refused(rf"the mask .*3.png is a JPEG, which may change labels; {kinds}$")
    mask.unlink()
    refused(r"there is no mask for .*images.3.png; expected .*masks.3.png")
    good.save(mask)
    good.save(mask.with_name("3_mask.tif"))
    refused(r"images.3.png has 2 masks, .*masks.3.png and .*masks.3_mask.tif; expected one")
    mask.with_name("3_mask.tif").unlink()
    image.rename(image.with_suffix(".bmp"))
    Image.new("RGB", (4, 4)).save(image)
    refused(r"3.bmp and .*3.png would have the same mask, 3.png; rename one")
    image.unlink()
    refused("categories must be the names of the classes or a number, got 'ab'", "ab")
    refused("got 'a' twice", ("a", "a"))
    refused("categories must be 2 to 255 classes, got 1", 1)
    refused("images does not exist; expected none/images/NAME.jpg", where=tmp_path / "none")
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    refused(r"all labelled pixels of .*data are of one class \(dark\); expected two or more")
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    refused(r"none of the 6 images in .*images can be read with its mask; the first: ")
    for path in (folder / "images").iterdir():
        path.unlink()
    refused(r"there are no images in .*images$")
    (folder / "images" / "0.xyz").write_text("no image")
    refused(r"no images in .*images \(1 of 1 files left out: 1 \.xyz \(not a readable image\)\)")


@pytest.mark.parametrize(
    ("ending", "mode", "options"),
    [
        (".png", "RGB", {}),
        (".png", "RGBA", {}),
        (".png", "1", {}),
        (".png", "I;16", {}),
        (".PNG", "L", {"format": "PNG"}),
        (".tif", "L", {}),
        (".tiff", "F", {"compression": "tiff_lzw"}),
        (".tif", "I", {}),
        (".bmp", "RGB", {}),
        (".gif", "P", {}),
        ("_mask.png", "L", {}),
        ("-GT.tif", "L", {}),
        (".png.png", "L", {}),
        (".png_label.png", "L", {}),
    ],
)
def test_masks_of_any_unambiguous_kind(
    tmp_path: Path, ending: str, mode: str, options: dict[str, Any]
) -> None:
    folder = write_masked(tmp_path / "data", 3)
    expected = fcvgg.mask_folder(folder, CLASSES)
    truth = [expected.labels(i) for i in range(3)]
    for mask in expected.masks:
        labels = np.array(Image.open(mask))
        mask.unlink()
        if mode == "I;16":
            image = Image.fromarray(labels.astype(np.uint16))
        elif mode == "1":
            image = Image.fromarray(labels.astype(bool))
        else:
            image = Image.fromarray(labels).convert(mode)
        image.save(mask.with_name(mask.stem + ending), **options)
    found = fcvgg.mask_folder(folder, CLASSES)
    assert found.counts == expected.counts
    assert found.sizes == expected.sizes == ((40, 40), (40, 41), (40, 42))
    for i in range(3):
        assert found.labels(i).dtype == np.int64
        assert np.array_equal(found.labels(i), truth[i])


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("0.jpg", {}, "JPEG"),
        ("0.webp", {"lossless": True}, "WEBP"),
        ("0.jp2", {}, "JPEG2000"),
        ("0.tif", {"compression": "jpeg"}, "TIFF compressed as JPEG"),
    ],
)
def test_masks_whose_labels_may_have_changed(
    tmp_path: Path, name: str, options: dict[str, Any], kind: str
) -> None:
    folder = write_masked(tmp_path / "data", 2)
    mask = folder / "masks" / "0.png"
    Image.open(mask).convert("L").save(mask.with_name(name), **options)
    mask.unlink()
    message = rf"masks.{name} is a {kind}, which may change labels; expected class indices, grey or"
    with pytest.raises(fcvgg.DatasetError, match=message):
        fcvgg.mask_folder(folder, CLASSES)


def test_a_gif_holds_grey_values_whatever_their_order(tmp_path: Path) -> None:
    labels = np.array([[0, 2, 5, 255]] * 4, np.uint8)
    Image.fromarray(labels).save(tmp_path / "m.gif")  # with a palette of these four
    assert np.array_equal(read_mask(tmp_path / "m.gif"), labels)
    coloured = Image.fromarray((labels % 3).astype(np.uint8))
    coloured.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    coloured.save(tmp_path / "c.gif")
    with pytest.raises(fcvgg.DatasetError, match=r"c\.gif is a GIF of colours, whose order"):
        read_mask(tmp_path / "c.gif")
    coloured.save(tmp_path / "c.png")
    assert np.array_equal(read_mask(tmp_path / "c.png"), labels % 3)


def test_a_mask_is_one_picture(tmp_path: Path) -> None:
    mask = Image.fromarray(np.array([[0, 1]] * 2, np.uint8))
    mask.save(tmp_path / "m.tif", save_all=True, append_images=[mask])
    with pytest.raises(fcvgg.DatasetError, match=r"m\.tif must hold one picture, got several"):
        read_mask(tmp_path / "m.tif")
    mask.save(tmp_path / "m.tif", save_all=True, append_images=[mask.resize((1, 1))])
    assert read_mask(tmp_path / "m.tif").tolist() == [[0, 1]] * 2


def test_fractions_are_no_labels(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "m.tif")
    with pytest.raises(fcvgg.DatasetError, match=r"m\.tif holds fractions; expected class"):
        read_mask(tmp_path / "m.tif")


def test_every_file_is_paired_or_listed(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "data", 3)
    for part in ("images", "masks"):
        (folder / part / "more").mkdir()
        (folder / part / "2.png").rename(folder / part / "more" / "2.png")
        (folder / part / "Thumbs.db").write_text("left by the system")
        (folder / part / "._0.png").write_text("left by the system")
    (folder / "images" / "0.png").rename(folder / "images" / "0.jfif")  # a PNG under another name
    (folder / "images" / "notes.txt").write_text("no image")
    Image.new("L", (4, 4)).save(folder / "masks" / "alone.png")
    (folder / "images" / "thumbs").mkdir()
    Image.new("L", (4, 4)).save(folder / "images" / "thumbs" / "0.png")
    found = fcvgg.mask_folder(folder, CLASSES)
    assert [p.name for p in found.images] == ["0.jfif", "1.png", "2.png"]
    assert [p.name for p in found.masks] == ["0.png", "1.png", "2.png"]
    assert [str(one) for one in found.skipped] == [
        f"{folder}/images/notes.txt: not a readable image",
        f"{folder}/masks/alone.png: a mask of no image",
        f"{folder}/images/thumbs/0.png: there is no folder {folder}/masks/thumbs",
    ]


def remade(folder: Path, change: Any) -> None:
    """Write every mask of a folder again, changed."""
    for path in sorted(folder.rglob("masks/**/*.png")):
        Image.fromarray(change(np.array(Image.open(path))).astype(np.uint8)).save(path)


def test_masks_of_0_and_255_are_of_two_classes(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "data", 4)
    expected = fcvgg.mask_folder(folder, CLASSES)
    truth = [expected.labels(i) for i in range(4)]
    some = expected.part([1, 3])
    assert not expected.binary
    remade(folder, lambda labels: labels * 255)
    found = fcvgg.mask_folder(folder, CLASSES)
    assert found.binary
    assert found.counts == expected.counts
    assert found.part([1, 3]).counts == some.counts
    assert found.part([1, 3]).sizes == some.sizes == (expected.sizes[1], expected.sizes[3])
    assert all(np.array_equal(found.labels(i), truth[i]) for i in range(4))
    fcn = small_fcn("32s")
    assert torch.equal(MaskedImages(found, fcn)[2][1], torch.from_numpy(truth[2]))
    message = (
        r"the masks of .*data hold only 0 and 255, which is ignored; save the 3 classes as 0 to 2$"
    )
    with pytest.raises(fcvgg.DatasetError, match=message):
        fcvgg.mask_folder(folder, 3)
    one = folder / "masks" / "0.png"
    Image.fromarray(truth[0].astype(np.uint8)).save(one)  # a label 1: 255 is ignored again
    mixed = fcvgg.mask_folder(folder, CLASSES)
    assert not mixed.binary
    assert mixed.counts[1] == truth[0].sum()
    remade(folder, lambda labels: np.full_like(labels, 255))
    with pytest.raises(fcvgg.DatasetError, match=r"one class \(255, to be ignored\); expected two"):
        fcvgg.mask_folder(folder, CLASSES)


def test_what_255_means_is_one_thing_in_a_data_set(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_masked(tmp_path / part, 3)
    remade(tmp_path / "val", lambda labels: labels * 255)
    message = r"all labelled pixels of .*val are of one class \(dark\); .*; 255 is ignored"
    with pytest.raises(fcvgg.DatasetError, match=message):
        train_and_valid(tmp_path, CLASSES)
    parts = tuple(fcvgg.mask_folder(tmp_path / part, CLASSES) for part in ("train", "val"))
    with pytest.raises(fcvgg.DatasetError, match="255 must mean the same in both parts, got"):
        fcvgg.train_fcn(small_fcn(), parts, tmp_path / "run")
    remade(tmp_path / "train", lambda labels: labels * 255)
    assert all(part.binary for part in train_and_valid(tmp_path, CLASSES))


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (("train", "val"), [3, 2]),
        (("Train", "Validation", "Test"), [3, 2]),
        (("training", "dev", "testing"), [3, 2]),
        (("train",), [2, 1]),
        (("train", "test"), [2, 1]),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_parts_of_masked_images(
    tmp_path: Path, names: tuple[str, ...], counts: list[int], inside: bool
) -> None:
    data = tmp_path / "data"
    for i, name in enumerate(names):
        made = write_masked(tmp_path / f"made{i}" if inside else data / name, (3, 2, 4)[i], seed=i)
        for kind in ("images", "masks") if inside else ():
            (data / kind.title()).mkdir(parents=True, exist_ok=True)
            (made / kind).rename(data / kind.title() / name)
    found = train_and_valid(data, CLASSES, share=0.3)
    assert [len(part) for part in found] == counts
    used = {name for part in found for path in part.images for name in path.parts if name in names}
    assert used == {name for name in names if not name.lower().startswith("test")}
    assert not {*found[0].images} & {*found[1].images}
    assert all(one.labels(0).shape == one.sizes[0] for one in found)


def test_parts_without_one_to_train_on(tmp_path: Path) -> None:
    write_masked(tmp_path / "data" / "val")
    message = "data must have a part to train on, got val; pass .*val to train on it"
    with pytest.raises(fcvgg.DatasetError, match=message):
        train_and_valid(tmp_path / "data", CLASSES)
    message = (
        "data/images does not exist; expected data/images/NAME.jpg and data/masks/NAME.png, or "
        "such folders in data/train and data/valid"
    )
    with pytest.raises(fcvgg.DatasetError, match=message):
        fcvgg.mask_folder(tmp_path / "data", CLASSES)


# -- training ---------------------------------------------------------------------------------


def test_crops_and_flips_move_image_and_mask_together(tmp_path: Path) -> None:
    folder = fcvgg.mask_folder(write_masked(tmp_path / "data"), CLASSES)
    fcn = small_fcn("32s")
    samples = MaskedImages(folder, fcn, crop=(60, 24), flip=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [samples[i % 6] for i in range(24)]
    flipped = 0
    for i, (image, mask) in enumerate(drawn):
        assert image.shape == (3, 60, 24)
        assert type(image) is Tensor
        known = mask != 255
        assert known.sum() == 40 * 24  # the rest is padding
        assert not image[:, ~known].any()
        light = image.mean(0) > 120 / 255
        assert (light == (mask == 1))[known].float().mean() > 0.98
        row = mask[known.any(1)][0]
        if row[0] != row[-1]:  # both parts are in the crop: light is left in every other image
            flipped += bool(row[0] == 1) != bool(i % 2)
    assert 2 < flipped < 22
    unflipped = MaskedImages(folder, fcn, crop=(60, 24))
    assert all(unflipped[i][1].max() == 255 for i in range(6))


def test_score_layers_are_calibrated_on_as_much_as_they_train_on(tmp_path: Path) -> None:
    folder = fcvgg.mask_folder(write_masked(tmp_path / "data"), CLASSES)
    fcn = small_fcn("32s")
    assert MaskedImages(folder, fcn).middles(4).shape == (4, 3, 40, 40)
    middles = MaskedImages(folder, fcn, crop=(60, 24)).middles(3)
    assert middles.shape == (3, 3, 40, 24)
    assert middles.dtype == torch.float64
    whole = MaskedImages(folder, fcn)[2][0]  # 40x42
    torch.testing.assert_close(middles[2], whole[:, :, 9:33], rtol=0, atol=0)


SETTINGS = Settings(epochs=4, optimizer="adamw", lr=5e-3, batch_size=2, cosine=False)


def train(
    folder: Path,
    out: Path,
    epochs: int = 4,
    resume: bool = False,
    dtype: torch.dtype = torch.float32,
    preprocess: fcvgg.Preprocess = PLAIN,
    **options: Any,
) -> Any:
    net = fcvgg.convert(seeded(SmallVGG, dtype=dtype), preprocess=preprocess)
    fcn = fcvgg.FCN(net, 2, "16s", categories=CLASSES)
    chosen = replace(SETTINGS, epochs=epochs)
    return fcvgg.train_fcn(fcn, folder, out, settings=chosen, crop=32, resume=resume, **options)


def test_training_finds_the_parts_and_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "data", 8)
    whole = train(folder, tmp_path / "whole", class_weights="balanced", backbone_lr=1e-3)
    assert whole.metrics.mean_iou > 0.85
    assert whole.run.best_value == pytest.approx(whole.metrics.mean_iou, abs=1e-6)
    assert {"train_loss", "valid_iou_dark", "valid_pixel_accuracy"} <= whole.run.history[0].keys()
    again = fcvgg.FCN.load(tmp_path / "whole" / "fcn")
    image = next((folder / "images").iterdir())
    assert np.array_equal(again.predict(image).labels, whole.fcn.predict(image).labels)

    options: dict[str, Any] = {"class_weights": "balanced", "backbone_lr": 1e-3}
    train(folder, tmp_path / "parts", epochs=2, **options)
    resumed = train(folder, tmp_path / "parts", resume=True, **options)
    assert resumed.run.resumed_after == 2
    for name, value in whole.fcn.state_dict().items():
        assert torch.equal(resumed.fcn.state_dict()[name], value), name
    with pytest.raises(fcvgg.LoadError, match="its class weights is"):
        train(folder, tmp_path / "parts", resume=True, backbone_lr=1e-3)
    with pytest.raises(fcvgg.TrainingError, match="parts already holds a run"):
        train(folder, tmp_path / "parts", **options)
    with pytest.raises(fcvgg.LoadError, match="its starting weights is"):
        fcvgg.train_fcn(
            again, folder, tmp_path / "whole", settings=SETTINGS, crop=32, resume=True, **options
        )


def test_training_sees_images_of_the_size_that_predictions_do(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "data", 4)
    resizing = replace(PLAIN, resize=16)
    done = train(folder, tmp_path / "run", 1, preprocess=resizing, dtype=torch.float64)
    assert done.run.best_value == pytest.approx(done.metrics.mean_iou, abs=1e-6)
    assert done.fcn.preprocess == fcvgg.FCN.load(tmp_path / "run" / "fcn").preprocess == PLAIN
    assert next(done.fcn.parameters()).dtype == torch.float64


def test_the_backbone_learns_at_its_own_rate_and_frozen_layers_not_at_all() -> None:
    net = fcvgg.freeze_(fcvgg.convert(seeded(SmallVGG)), "pool1")
    fcn = fcvgg.FCN(net, 2, "16s")
    assert [group.get("lr") for group in SegmentationModule(fcn, None, None).groups()] == [
        None,
        None,
    ]
    new, pretrained = SegmentationModule(fcn, None, 1e-4).groups()
    assert "lr" not in new
    assert pretrained["lr"] == 1e-4
    expected = {id(p) for p in fcn.backbone.parameters() if p.requires_grad}
    assert {id(p) for p in pretrained["params"]} == expected
    rest = {id(p) for part in (fcn.scores, fcn.upsamplings) for p in part.parameters()}
    assert {id(p) for p in new["params"]} == rest


def test_balanced_weights_are_inverse_to_pixels_and_one_in_the_mean() -> None:
    weights = _checked_weights("balanced", (30, 10, 0))
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 2, 0]))
    assert float(weights @ torch.tensor([30.0, 10, 0])) / 40 == pytest.approx(1)


def test_what_is_ignored_neither_trains_nor_counts() -> None:
    fcn = small_fcn("16s").train()
    batch = images(2, 3, 40, 40)
    masks = torch.zeros(2, 40, 40, dtype=torch.int64)
    masks[0, :, 20:] = 1
    masks[1] = 255
    for weights in (None, torch.tensor([0.25, 2.0])):
        task = SegmentationModule(fcn.eval(), weights, None)
        alone, _ = task._loss([(batch[:1], masks[:1])])
        both, count = task._loss([(batch, masks)])
        apart, _ = task._loss([(batch[:1], masks[:1]), (batch[1:], masks[1:])])
        expected = nn.functional.cross_entropy(fcn(batch[:1]).float(), masks[:1], task.weights)
        for loss in (alone, both, apart):
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, check_dtype=False)
        assert count == 2
    nothing, _ = task._loss([(batch[1:], masks[1:])])
    nothing.backward()
    assert nothing == 0
    assert all(p.grad is None or not p.grad.any() for p in fcn.parameters())


def test_what_cannot_be_trained_is_said_in_one_line(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "data", 4)
    for options, message in [
        (
            {"class_weights": "even"},
            "class_weights must be None, 'balanced' or 2 numbers .*, got 'even'",
        ),
        (
            {"class_weights": [1.0]},
            r"class_weights must be .* 2 numbers of at least 0, .*, got \[1.0\]",
        ),
        ({"class_weights": ["a", "b"]}, r"class_weights must be .*, got \['a', 'b'\]"),
        ({"class_weights": [0, 0]}, r"one for each class and not all 0, got \[0, 0\]"),
        ({"backbone_lr": -1.0}, "backbone_lr must be a finite number of at least 0, got -1.0"),
        ({"valid_fraction": 2.0}, "valid_fraction must be between 0 and 1, got 2.0"),
        ({"valid_share": 2.0}, "valid_fraction must be between 0 and 1, got 2.0"),
    ]:
        with pytest.raises(fcvgg.ArgumentError, match=message):
            train(folder, tmp_path / "run", **options)
    fcn = small_fcn()
    with pytest.raises(
        fcvgg.ArgumentError, match=r"crop must be a positive int or \(h, w\), got 'x'"
    ):
        fcvgg.train_fcn(fcn, folder, tmp_path / "run", crop="x")
    three = fcvgg.mask_folder(folder, 3)
    with pytest.raises(
        fcvgg.ArgumentError, match=r"the masks must have the network.s 2 classes, got 3"
    ):
        fcvgg.train_fcn(fcn, (three, three), tmp_path / "run")
    whole = fcvgg.mask_folder(folder, CLASSES)
    for counts, message in [
        (((9, 0), (9, 9)), r"training masks are of one class \(dark\); expected two"),
        (((0, 0), (9, 9)), "all pixels of the 4 training masks are to be ignored; expected"),
        (((9, 9), (0, 0)), "all pixels of the 4 validation masks are to be ignored; label"),
    ]:
        parts = tuple(replace(whole, counts=part) for part in counts)
        with pytest.raises(fcvgg.DatasetError, match=message):
            fcvgg.train_fcn(fcn, parts, tmp_path / "run", class_weights="balanced")
    fcn.preprocess = None
    with pytest.raises(fcvgg.PreprocessError, match=r"set fcn\.preprocess"):
        fcvgg.train_fcn(fcn, folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batches_too_small_for_batch_norm_are_refused_before_training(tmp_path: Path) -> None:
    head = [nn.Linear(3 * 16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)]
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(4), nn.Flatten(), *head)
    net = fcvgg.convert(model.eval(), input_size=16, preprocess=PLAIN)
    folder = write_masked(tmp_path / "data", 4)

    def trained(crop: int | None, batch_size: int, out: str) -> Any:
        settings = replace(SETTINGS, epochs=1, batch_size=batch_size)
        fcn = fcvgg.FCN(net, 2, categories=CLASSES)
        return fcvgg.train_fcn(fcn, folder, tmp_path / out, settings=settings, crop=crop)

    message = (
        "^batch_size=1 cannot train BatchNorm2d in backbone.network.4, which gets one value per "
        "channel of 1 image of 4x4 pixels; use batch_size=2 or more$"
    )
    with pytest.raises(fcvgg.ArgumentError, match=message):
        trained(4, 1, "run")
    assert not (tmp_path / "run").exists()
    assert trained(4, 2, "two").images == 4
    assert trained(16, 1, "larger").images == 4
    for kind in ("images", "masks"):
        for i in range(4):
            path = folder / kind / f"{i}.png"
            Image.open(path).resize((4 - i % 2, 4), Image.Resampling.NEAREST).save(path)
    with pytest.raises(fcvgg.ArgumentError, match=r"batch_size=2 cannot .*; add images, or train"):
        trained(None, 2, "alone")


def test_a_geometry_that_does_not_fit_the_map_is_refused() -> None:
    fcn = small_fcn("16s")
    wrong = [replace(s, geometry=s.geometry.upto(0)) for s in fcn.sources]
    with pytest.raises(
        fcvgg.UnsupportedLayerError, match=r"the map of fc7 must be .* by its geometry, got"
    ):
        return_maps_(with_first_map(fcn.backbone), wrong)
