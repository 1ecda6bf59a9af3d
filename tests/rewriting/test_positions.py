"""``head="position"``: scores of single positions, whose mean over a window is its score."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import EXACT, GlobalPooled, Headed, Lambda, SmallVGG, images, relative_error, seeded
from PIL import Image
from torch import Tensor, nn

import fcvgg
from fcvgg.errors import ArgumentError, ConversionError, RefusedLayerError
from fcvgg.results.score_map import warn_of_one_cell

EIGHT = EXACT[torch.float64]


def positions_of(model: nn.Module, size: int, **options: Any) -> Any:
    """The network of positions, verified."""
    net = fcvgg.convert(model, input_size=size, head="position", **options)
    assert net.equivalence.passed
    return net


@torch.no_grad()
def window_means(net: Any, x: Tensor) -> Tensor:
    """The mean of the map over every native window, ``(N, K, h, w)``."""
    maps = net(x)
    height, width = net.program.average
    for dim, axis in ((2, height), (3, width)):
        maps = maps.unfold(dim, axis.span, 1)[..., :: axis.dilation].mean(-1)
    return maps


def assert_means_are_window_scores(model: nn.Module, size: int, **options: Any) -> Any:
    """At every cell of a larger image, for an image in float64; the network of positions."""
    windows = fcvgg.convert(model, input_size=size, verify=False, **options)
    # the shifted images of verification are as large as the receptive field: 2000 pixels and more
    net = fcvgg.convert(model, input_size=size, head="position", verify=False, **options)
    x = images(2, 3, 2 * size + 5, 2 * size - 9)
    with torch.no_grad():
        expected = windows(x)  # (N, K, h, w)
    assert min(expected.shape[2:]) > 2
    assert relative_error(expected, window_means(net, x)) <= EIGHT
    return net


# -- published architectures ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("resnet18", 96), ("densenet121", 96), ("mobilenet_v2", 96), ("googlenet", 96)),
        *(("squeezenet1_1", 96), ("shufflenet_v2_x0_5", 64), ("regnet_x_400mf", 64)),
        *(("mnasnet0_5", 64), ("inception_v3", 107)),
    ],
)
def test_means_over_windows_are_the_windows_scores(name: str, size: int) -> None:
    more = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = seeded(getattr(torchvision.models, name), num_classes=5, **more)
    net = assert_means_are_window_scores(model, size)
    x = images(2, 3, size, size)
    with torch.no_grad():
        assert relative_error(model(x), net(x).mean((2, 3))) <= EIGHT


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet10t"])
def test_networks_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    assert_means_are_window_scores(seeded(timm.create_model, name, num_classes=5), 96)


@pytest.mark.parametrize("output_stride", [16, 8, 4])
def test_any_output_stride(output_stride: int) -> None:
    model = seeded(torchvision.models.resnet18, num_classes=5)
    net = assert_means_are_window_scores(model, 64, output_stride=output_stride)
    assert net.geometry.stride == (output_stride, output_stride)
    assert net.output_size(64) == (64 // output_stride,) * 2


def test_a_resnet_has_seven_by_seven_positions_at_its_native_size() -> None:
    model = seeded(torchvision.models.resnet18, num_classes=5, dtype=torch.float32)
    net = positions_of(model, 224)
    score_map = net.score_map(images(1, 3, 224, 224, dtype=torch.float32))
    assert tuple(score_map.scores.shape) == (5, 7, 7)
    x = images(1, 3, 224, 224, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(score_map.average(), model(x)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.classify(x)[0], model(x)[0].softmax(0), rtol=1e-4, atol=1e-6)


def test_it_is_the_class_activation_map() -> None:
    """The weights of the last layer times the features, which torchcam computes by hooks."""
    methods = pytest.importorskip("torchcam.methods")
    model = seeded(torchvision.models.resnet18, num_classes=5)
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        maps = positions_of(model, 224)(x)[0] - model.fc.bias[:, None, None]  # (5, 7, 7)
    with methods.CAM(model, "layer4", "fc", enable_hooks=True) as extractor:
        scores = model(x)
        for k in range(5):
            (expected,) = extractor(k, scores, normalized=False)
            torch.testing.assert_close(expected[0], maps[k], rtol=1e-10, atol=1e-10)


# -- where the cells are --------------------------------------------------------------------------


def test_cells_stand_for_tiles_around_their_centres() -> None:
    geometry = positions_of(seeded(torchvision.models.resnet18), 64).geometry
    assert (geometry.stride, geometry.window) == ((32, 32), (1, 1))
    assert geometry.centre_of(1, 2) == (32, 64)
    assert geometry.window_of(1, 2) == (16, 48, 48, 80)  # 32 pixels about 32 and 64
    assert geometry.receptive_field == (435, 435)


def test_a_position_depends_on_its_receptive_field_and_moves_with_the_image() -> None:
    net = positions_of(seeded(GlobalPooled), 32)
    x = images(1, 3, 96, 96).requires_grad_()
    net(x)[0, 0, 3, 4].backward()
    rows, cols = (x.grad[0].abs().sum(0).sum(dim).nonzero() for dim in (1, 0))
    top, left, bottom, right = net.geometry.receptive_field_of(3, 4)
    assert (int(rows.min()), int(rows.max()) + 1) == (top, bottom)
    assert (int(cols.min()), int(cols.max()) + 1) == (left, right)
    assert net.equivalence.translation_error <= 10 * EIGHT


def test_images_below_the_native_size_are_not_padded() -> None:
    model = seeded(GlobalPooled)
    net = positions_of(model, 64)
    x = images(1, 3, 40, 24)
    with torch.no_grad():
        assert relative_error(model(x), net(x).mean((2, 3))) <= EIGHT


# -- heads ----------------------------------------------------------------------------------------

HEADS: dict[str, Callable[[], nn.Module]] = {
    "adaptive pool": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 5)
    ),
    "pool of the full kernel": lambda: nn.Sequential(
        nn.AvgPool2d(6), nn.Flatten(), nn.Linear(8, 5)
    ),
    "pool of the features' size": lambda: Lambda(
        lambda x, fc: fc(F.avg_pool2d(x, x.size()[2:]).view(x.size(0), -1)), nn.Linear(8, 5)
    ),
    "mean": lambda: Lambda(lambda x, fc: fc(x.mean((2, 3))), nn.Linear(8, 5)),
    "mean in two steps": lambda: Lambda(lambda x, fc: fc(x.mean(3).mean(2)), nn.Linear(8, 5)),
    "mean of flattened positions": lambda: Lambda(
        lambda x, fc: fc(x.flatten(2).mean(-1)), nn.Linear(8, 5)
    ),
    "mean of channels last": lambda: Lambda(
        lambda x, fc: fc(x.permute(0, 2, 3, 1).mean((1, 2))), nn.Linear(8, 5)
    ),
    "sum, divided": lambda: Lambda(lambda x, fc: fc(x.sum((2, 3)) / 36), nn.Linear(8, 5)),
    "sum": lambda: Lambda(lambda x, fc: fc(x.sum((2, 3))), nn.Linear(8, 5)),
    "pool in one dimension": lambda: Lambda(
        lambda x, fc: fc(F.adaptive_avg_pool1d(x.flatten(2), 1).flatten(1)), nn.Linear(8, 5)
    ),
    "batch norm": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 5)
    ),
    "linear layers alone": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6, False), nn.Linear(6, 5)
    ),
    "1x1 convolution": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1), nn.Flatten()
    ),
    "pool last": lambda: nn.Sequential(
        nn.Dropout(), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "pool of probabilities": lambda: nn.Sequential(
        nn.Conv2d(8, 5, 1), nn.Softmax(1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "arithmetic": lambda: Lambda(
        lambda x, fc, scale: scale(fc(x.mean((2, 3))) * 2 - 1) / 3 + fc(x.mean((2, 3))),
        *(nn.Linear(8, 5), nn.Linear(5, 5)),
    ),
    "two layers joined": lambda: Lambda(
        lambda x, a, b: torch.cat([a(x.mean((2, 3))), b(x.mean((2, 3)))], 1),
        *(nn.Linear(8, 2), nn.Linear(8, 3)),
    ),
    "product": lambda: Lambda(lambda x, fc: x.mean((2, 3)) @ fc.weight.t(), nn.Linear(8, 5)),
}


@pytest.mark.parametrize("head", HEADS)
def test_affine_heads_commute_with_the_average(head: str) -> None:
    net = assert_means_are_window_scores(seeded(lambda: Headed(HEADS[head]())), 24)
    assert net.activation == ("probabilities" if head == "pool of probabilities" else "logits")


FINALS: dict[str, tuple[nn.Module, str]] = {
    "softmax": (nn.Softmax(1), "logits"),
    "log_softmax": (nn.LogSoftmax(1), "logits"),
    "sigmoid": (nn.Sigmoid(), "independent_logits"),
}


@pytest.mark.parametrize("final", FINALS)
def test_the_scores_are_those_before_a_softmax_or_sigmoid(final: str) -> None:
    last, activation = FINALS[final]
    model = seeded(
        lambda: Headed(nn.Sequential(*HEADS["adaptive pool"]().children(), last))  # type: ignore
    )
    net = positions_of(model, 24)
    assert net.activation == activation
    x = images(2, 3, 24, 24)
    plain = copy.deepcopy(model)
    plain.head = plain.head[:-1]
    with torch.no_grad():
        assert relative_error(plain(x), net(x).mean((2, 3))) <= EIGHT
        assert relative_error(model(x), net.native_scores(net(x))[0]) <= EIGHT
    assert not any(n.op == "call_module" and n.target == "head.4" for n in net.network.graph.nodes)


def test_several_outputs() -> None:
    head = Lambda(
        lambda x, a, b: {"kind": a(x.mean((2, 3))), "age": b(x.mean((2, 3)))},
        *(nn.Linear(8, 4), nn.Linear(8, 1)),
    )
    net = positions_of(seeded(lambda: Headed(head)), 24)
    assert {k: tuple(v.shape) for k, v in net(images(1, 3, 24, 24)).items()} == {
        "kind": (1, 4, 6, 6),
        "age": (1, 1, 6, 6),
    }


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layers with a ReLU between": (
        lambda: nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
        ),
        r"head\.3 \(ReLU\) does not commute with the global average before it.*head='window'",
    ),
    "layer norm": (
        lambda: nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 5)
        ),
        r"head\.2 \(LayerNorm\) does not commute",
    ),
    "a function": (
        lambda: Lambda(lambda x, fc: fc(F.normalize(x.mean((2, 3)))), nn.Linear(8, 5)),
        r"normalize.* does not commute",
    ),
    "a product of two averages": (
        lambda: Lambda(lambda x, fc: fc(x.mean((2, 3)) * x.mean((2, 3))), nn.Linear(8, 5)),
        r"mul.* does not commute",
    ),
    "computed on after its softmax": (
        lambda: Lambda(lambda x, fc: fc(x.mean((2, 3))).softmax(1) * 2, nn.Linear(8, 5)),
        r"mul.* does not commute",
    ),
    "joined with a maximum": (
        lambda: Lambda(
            lambda x, fc: fc(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)), nn.Linear(16, 5)
        ),
        r"cat.* does not commute",
    ),
    "a maximum": (
        lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        r"must have a global average pool.*head\.0 \(AdaptiveMaxPool2d\) takes",
    ),
    "fully connected": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 5)),
        r"must have a global average pool.*head\.1 \(Linear\) takes its window as a whole; use "
        r"head='window', with a smaller output_stride or padding='same'",
    ),
    "a pool to several bins": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
        r"must have a global average pool.*head\.0 \(AdaptiveAvgPool2d\) takes",
    ),
}


@pytest.mark.parametrize("head", REFUSED)
def test_heads_that_do_not_commute_are_refused_by_name(head: str) -> None:
    build, message = REFUSED[head]
    model = seeded(lambda: Headed(build()))
    with pytest.raises(ConversionError, match=message) as caught:
        fcvgg.convert(model, input_size=24, head="position")
    assert "\n" not in str(caught.value)
    windows = fcvgg.convert(model, input_size=24)  # and still convert to windows
    assert not windows.program.could_have_positions


def test_pools_of_different_stages_are_refused() -> None:
    """Their positions lie on different grids, so no position has all of them."""

    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            fine = self.fine(x)
            pooled = [fine.mean((2, 3)), self.coarse(fine).mean((2, 3))]
            return self.fc(torch.cat(pooled, 1))

    with pytest.raises(RefusedLayerError, match=r"cat.* does not commute"):
        fcvgg.convert(seeded(Stages), input_size=16, head="position")


def test_a_vgg_is_refused_and_another_word_too() -> None:
    with pytest.raises(ConversionError, match=r"classifier\.0 \(Linear\) takes its window"):
        fcvgg.convert(seeded(SmallVGG), head="position")
    with pytest.raises(ArgumentError, match="head must be 'window' or 'position', got 'cam'"):
        fcvgg.convert(seeded(GlobalPooled), input_size=32, head="cam")  # type: ignore[arg-type]


def test_a_wrong_map_does_not_pass_verification() -> None:
    model = seeded(GlobalPooled)
    net = positions_of(model, 32)
    with torch.no_grad():
        other = copy.deepcopy(model)
        other.fc.bias[0] += 1
    assert not fcvgg.verify(other, net).passed


# -- what else works with it ----------------------------------------------------------------------


def test_a_batch_norm_after_the_pool_keeps_the_network_from_training() -> None:
    """Its statistics would be those of positions, where the model takes those of averages."""
    model = seeded(lambda: Headed(HEADS["batch norm"]()))
    with pytest.raises(fcvgg.TrainingError, match=r"head\.2"):
        positions_of(model, 24).train()
    fcvgg.convert(model, input_size=24).train()
    with pytest.raises(ConversionError, match=r"head\.2 computes something else in training mode"):
        fcvgg.convert(model.train(), input_size=24, head="position")


def test_gradients_reach_the_shared_parameters() -> None:
    model = seeded(GlobalPooled)
    net = positions_of(model, 32)
    net(images(1, 3, 48, 48)).sum().backward()
    expected = dict(model.named_parameters())
    assert {k: v.data_ptr() for k, v in net.network.named_parameters() if k != "fc.weight"} == {
        k: v.data_ptr() for k, v in expected.items() if k != "fc.weight"
    }
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_bundle_holds_the_head(tmp_path: Path) -> None:
    model = seeded(lambda: Headed(nn.Sequential(HEADS["adaptive pool"](), nn.Softmax(1))))
    net = positions_of(model, 24, output_stride=2)
    again = fcvgg.load(net.save(tmp_path / "bundle"))
    assert (again.head, again.geometry) == ("position", net.geometry)
    x = images(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(net(x), again(x))
        assert fcvgg.verify(model, again).passed
        assert relative_error(model(x), again.native_scores(again(x))[0]) <= EIGHT
    assert fcvgg.load(tmp_path / "bundle", head="position").head == "position"
    windows = fcvgg.load(tmp_path / "bundle", head="window")
    with torch.no_grad():
        expected = fcvgg.convert(model, input_size=24, output_stride=2)(images(1, 3, 40, 33))
        torch.testing.assert_close(windows(images(1, 3, 40, 33)), expected)


def test_streaming_gives_the_same_map() -> None:
    net = positions_of(seeded(GlobalPooled), 32)
    x = images(1, 3, 203, 190)
    with torch.no_grad():
        expected = net(x)[0]
    got = fcvgg.stream(net, x, memory="64MiB")
    assert relative_error(expected, got.scores) <= EIGHT


def test_an_optimised_network_is_compared_by_its_averages() -> None:
    model = seeded(GlobalPooled, dtype=torch.float32)
    net = positions_of(model, 32)
    fast = fcvgg.optimize(net)
    assert fast.equivalence.passed
    x = images(1, 3, 70, 61, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
def test_exported_files_hold_the_map_of_positions(ending: str, tmp_path: Path) -> None:
    if ending == ".onnx":
        pytest.importorskip("onnxruntime")
    net = positions_of(seeded(GlobalPooled, dtype=torch.float32), 32)
    assert "max error" in net.export(tmp_path / f"net{ending}").check


@pytest.mark.parametrize("last", [None, nn.Softmax(1)])
def test_means_over_windows_of_positions_are_compared_with_crops(last: nn.Module | None) -> None:
    from fcvgg.evaluation.window_comparison import compare_windows

    model = seeded(GlobalPooled)
    model = model if last is None else nn.Sequential(model, last)
    x = images(1, 3, 64, 72)
    found = compare_windows(model, positions_of(model, 32), x)
    expected = compare_windows(model, fcvgg.convert(model, input_size=32), x)
    torch.testing.assert_close(found.dense.scores, expected.dense.scores, rtol=EIGHT, atol=EIGHT)
    assert found.dense.activation == ("logits" if last is None else "probabilities")
    assert str(found) == str(expected)
    if last is None:
        means = window_means(positions_of(model, 32), x)[0]
        torch.testing.assert_close(found.dense.scores, means, rtol=EIGHT, atol=EIGHT)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_positions_of_enlarged_features_are_refused(mode: str) -> None:
    """Every second one lies between the coarser ones, and would have another value in a crop."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.MaxPool2d(4),
            nn.Upsample(scale_factor=2, mode=mode),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        )
    )
    message = r"got some every 2 x 2 pixels that were enlarged from every 4 x 4; use head='window'"
    with pytest.raises(ConversionError, match=message):
        fcvgg.convert(model, input_size=32, head="position")
    net = fcvgg.convert(model, input_size=32)
    assert net.geometry.stride == (4, 4)
    assert not net.program.could_have_positions  # so that nothing offers them


# -- the offer ------------------------------------------------------------------------------------


def test_a_flat_heatmap_offers_positions_once() -> None:
    warn_of_one_cell.cache_clear()
    picture = Image.new("RGB", (32, 32), "grey")
    model = seeded(GlobalPooled, dtype=torch.float32)
    options: Any = {"input_size": 32, "preprocess": "unit"}
    net = fcvgg.convert(model, **options)
    with pytest.warns(UserWarning, match="one cell.*head='position' of fcvgg.convert") as caught:
        shown = [net.heatmap(picture, k) for k in (0, 1)]
    assert [float(heatmap.values.std()) for heatmap in shown] == pytest.approx([0, 0], abs=1e-6)
    assert len(caught) == 1
    warn_of_one_cell.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.heatmap(picture.resize((80, 80)), 0)  # several cells
        net.heatmap(picture, 0, scales=(32, 64))  # one scale of several cells
        fcvgg.convert(model, head="position", **options).heatmap(picture, 0)
        vgg = seeded(SmallVGG, dtype=torch.float32)
        fcvgg.convert(vgg, preprocess="unit").heatmap(picture, 0)  # which has none to offer
