"""Streaming: strip by strip the network gives what it gives on the whole image."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from filelock import FileLock
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nets import (
    Functional,
    GlobalPooled,
    Lambda,
    SmallVGG,
    images,
    narrow_vgg,
    relative_error,
    seeded,
)
from torch import Tensor, nn

import fcvgg
from fcvgg.errors import FcvggError
from fcvgg.inference.line_buffers import LineBuffers
from fcvgg.inference.schedule import AxisRanges, Schedule
from fcvgg.inference.stages import stages_of
from fcvgg.streaming import resumption, strip_plan
from fcvgg.streaming.job import StreamJob
from fcvgg.streaming.score_store import is_store, open_store
from fcvgg.streaming.strip_plan import Workload
from fcvgg.support.memory_text import parsed_memory, rounded_up, size_text

pytest.importorskip("zarr")

EXACT = 1e-12


@torch.no_grad()
def in_strips(
    net: Any,
    x: Tensor,
    strip: int,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    every: int = 1,
    first: int | None = None,
    multiple: int = 1,
) -> Tensor:
    """The map by the executor itself, with strips of a given height."""
    stages = stages_of(net.network, net.in_channels)
    h, w = net.output_size(x.shape[2:])
    rows = rows or (0, h)
    height = AxisRanges(stages, 0, x.shape[2], rows)
    width = AxisRanges(stages, 1, x.shape[3], cols or (0, w))
    schedule = Schedule(stages, height, strip, [every] * len(stages), [multiple] * len(stages))
    buffers = LineBuffers(schedule, width, rows[0] if first is None else first)
    bands = []
    while not buffers.finished:
        (top, bottom), (left, right) = buffers.image_rows, buffers.image_cols
        bands.append(buffers.push(x[:, :, top:bottom, left:right].clone()))
    return torch.cat([band for band in bands if band is not None], 2)


# -- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "image"),
    [
        ("alexnet", None, (231, 290)),
        ("resnet18", 64, (107, 93)),
        ("resnet50", 64, (75, 70)),
        ("densenet121", 64, (100, 71)),
        ("googlenet", 96, (131, 101)),
        ("squeezenet1_1", 96, (131, 101)),
        ("mobilenet_v2", 64, (131, 101)),
        ("shufflenet_v2_x0_5", 64, (131, 101)),
    ],
)
@torch.no_grad()
def test_published_architectures(name: str, size: int | None, image: tuple[int, int]) -> None:
    more = {"init_weights": False} if name == "googlenet" else {}
    model = seeded(getattr(torchvision.models, name), num_classes=5, **more)
    net = fcvgg.convert(model, input_size=size, verify=False)
    x = images(1, 3, *image)
    expected = net(x)
    assert relative_error(expected, in_strips(net, x, 17)) <= EXACT
    assert relative_error(expected, in_strips(net, x, 40, every=3)) <= EXACT


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
@torch.no_grad()
def test_vgg_in_both_precisions(name: str) -> None:
    model = seeded(narrow_vgg, name)
    x = images(1, 3, 301, 263)
    net = fcvgg.convert(model, verify=False)
    assert relative_error(net(x), fcvgg.stream(net, x).scores[None]) <= EXACT
    single = fcvgg.convert(model.float(), verify=False)
    assert relative_error(single(x.float()), fcvgg.stream(single, x.float()).scores[None]) <= 1e-5


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("output_stride", [None, 4, 2, 1])
@torch.no_grad()
def test_every_output_stride_and_padding(output_stride: int | None, padding: str) -> None:
    options: dict[str, Any] = {"output_stride": output_stride, "padding": padding}
    for model, size in ((seeded(SmallVGG, bn=True), None), (seeded(GlobalPooled), 32)):
        if isinstance(model, SmallVGG) and output_stride == 4:
            options["output_stride"] = None
        net = fcvgg.convert(model, input_size=size, verify=False, **options)
        x = images(1, 3, 61, 47)
        for strip in (1, 6, 33):
            assert relative_error(net(x), in_strips(net, x, strip)) <= EXACT


@torch.no_grad()
def test_functions_and_several_outputs() -> None:
    net = fcvgg.convert(seeded(Functional), input_size=28)
    x = images(1, 3, 57, 41)
    assert relative_error(net(x), in_strips(net, x, 5)) <= EXACT


class InPlace(nn.Module):
    """Values that are changed in place after, and before, somebody else reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 6, 5, padding=2)
        self.right = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        left = self.left(x)
        changed = torch.relu_(x)
        total = left
        total += self.right(x)
        total += changed
        return self.fc(total.mean((2, 3)))


@torch.no_grad()
def test_in_place_operations_keep_their_order() -> None:
    net = fcvgg.convert(seeded(InPlace), input_size=16, verify=False)
    x = images(1, 3, 31, 23)
    for strip in (1, 7, 31):
        assert relative_error(net(x.clone()), in_strips(net, x, strip)) <= EXACT


class InPlaceOnAView(nn.Module):
    """A layer works in place on what lies, in strips at least, in memory that others read."""

    def __init__(self, view: nn.Module):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 6, 5, padding=2)
        self.view = view
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        left = self.left(x)
        return self.fc((left + self.view(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "view",
    [
        nn.Sequential(nn.Dropout(), nn.ReLU(inplace=True)),
        nn.Sequential(nn.ZeroPad2d((0, 0, 1, 1)), nn.ReLU(inplace=True), nn.Conv2d(6, 6, (3, 1))),
    ],
    ids=["dropout", "pad"],
)
@torch.no_grad()
def test_in_place_operations_leave_what_others_wait_for(view: nn.Module) -> None:
    net = fcvgg.convert(seeded(InPlaceOnAView, view), input_size=16, verify=False)
    x = images(1, 3, 31, 23)
    for strip in (1, 2, 7, 31):
        assert relative_error(net(x.clone()), in_strips(net, x, strip)) <= EXACT


class RandomNet(nn.Module):
    """Layers and branches by a drawn recipe, before a global pool."""

    def __init__(self, recipe: list[tuple[str, dict[str, Any]]]):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(2, 4, 3, padding=1)]
        for kind, options in recipe:
            layers.append(_layer(kind, options))
        self.layers = nn.ModuleList(layers)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(torch.tanh(x).mean((2, 3)))


class Branches(nn.Module):
    """The sum and concatenation of branches whose kernels differ and whose sizes agree."""

    def __init__(self, a: int, b: int, stride: int):
        super().__init__()
        self.a = nn.Conv2d(4, 2, a, stride, a // 2)
        self.b = nn.Conv2d(4, 2, b, stride, b // 2)
        self.c = nn.Conv2d(4, 4, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1) + self.c(x)


def _layer(kind: str, options: dict[str, Any]) -> nn.Module:
    if kind == "branches":
        return Branches(**options)
    if kind == "pad":
        return nn.ZeroPad2d(tuple(options["pads"]))
    return {
        "conv": lambda: nn.Conv2d(4, 4, **options),
        "max": lambda: nn.MaxPool2d(**options),
        "avg": lambda: nn.AvgPool2d(**options),
        "bn": lambda: nn.BatchNorm2d(4),
    }[kind]()


@st.composite
def recipes(draw: Any) -> list[tuple[str, dict[str, Any]]]:
    recipe: list[tuple[str, dict[str, Any]]] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "conv", "max", "avg", "branches", "pad", "bn"]))
        kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        options: dict[str, Any] = {}
        if kind == "conv":
            mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate"]))
            options = {"kernel_size": kernel, "stride": stride, "padding_mode": mode}
            options["dilation"] = draw(st.integers(1, 2))
            options["padding"] = draw(st.integers(0, 2))
            if stride == 1 and draw(st.booleans()):
                options["padding"] = "same"
        elif kind in ("max", "avg"):
            options = {"kernel_size": kernel, "stride": stride, "ceil_mode": draw(st.booleans())}
            options["padding"] = draw(st.integers(0, kernel // 2))
            if kind == "max":
                options["dilation"] = draw(st.integers(1, 2))
            else:
                options["count_include_pad"] = draw(st.booleans())
        elif kind == "branches":
            options = {"a": draw(st.sampled_from([1, 3, 5])), "b": draw(st.sampled_from([3, 7]))}
            options["stride"] = draw(st.integers(1, 2))
        elif kind == "pad":
            options = {"pads": draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))}
        recipe.append((kind, options))
    return recipe


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=recipes(), data=st.data())
@torch.no_grad()
def test_random_nets_in_random_strips(recipe: Any, data: Any) -> None:
    try:
        net = fcvgg.convert(seeded(RandomNet, recipe), input_size=40, verify=False)
        x = images(1, 2, data.draw(st.integers(40, 75)), data.draw(st.integers(40, 60)))
        expected = net(x)
    except (FcvggError, RuntimeError):
        assume(False)
    strip, every = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    multiple = data.draw(st.integers(1, 3))
    got = in_strips(net, x, strip, every=every, multiple=multiple)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= EXACT * scale
    h, w = expected.shape[2:]
    top = data.draw(st.integers(0, h - 1))
    bottom = data.draw(st.integers(top + 1, h))
    left = data.draw(st.integers(0, w - 1))
    right = data.draw(st.integers(left + 1, w))
    part = in_strips(net, x, strip, (top, bottom), (left, right), every, multiple=multiple)
    assert (part - expected[:, :, top:bottom, left:right]).abs().max() <= EXACT * scale
    resumed = in_strips(net, x, strip, every=every, first=top, multiple=multiple)
    assert torch.equal(resumed, got[:, :, top:])


@torch.no_grad()
def test_the_channels_stay_last_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order at one border would be that of all later layers, and costs a tenth."""
    net = fcvgg.convert(seeded(SmallVGG).float(), verify=False)
    strides: list[int] = []
    original = LineBuffers._compute

    def looking(self: LineBuffers, i: int, first: int, end: int) -> Tensor:
        rows = original(self, i, first, end)
        strides.append(rows.stride(1))
        return rows

    monkeypatch.setattr(LineBuffers, "_compute", looking)
    monkeypatch.setattr(strip_plan, "_STRIP_BYTES", 1 << 18)
    x = images(1, 3, 6000, 40).float()
    assert relative_error(net(x), fcvgg.stream(net, x).scores[None]) <= 1e-5
    assert set(strides) == {1}
    assert len(strides) > 100


@torch.no_grad()
def test_no_position_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    net = fcvgg.convert(seeded(SmallVGG), verify=False)
    computed: dict[int, list[tuple[int, int]]] = {}
    original = LineBuffers._compute

    def counting(self: LineBuffers, i: int, first: int, end: int) -> Tensor:
        computed.setdefault(i, []).append((first, end))
        return original(self, i, first, end)

    monkeypatch.setattr(LineBuffers, "_compute", counting)
    in_strips(net, images(1, 3, 90, 40), 11)
    for ranges in computed.values():
        assert ranges[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))


def test_layers_that_wait_for_strips_wait_together() -> None:
    net = fcvgg.convert(seeded(narrow_vgg, "vgg11"), verify=False, input_size=224)
    stages = stages_of(net.network, net.in_channels)
    rows, cols = net.output_size((8192, 512))
    workload = Workload(stages, (8192, 512), (0, rows), (0, cols))
    schedule = workload.schedule(1 << 20, (0, cols))
    arrived = (np.arange(len(schedule.ends)) + 1) * schedule.strip
    spoken_for = (schedule.ends[:, -1] - 1) * 32 + 224  # by the cells that are computed
    assert len(arrived) == 64
    assert (np.diff(schedule.ends[:, -1]) > 0).sum() == 4
    assert cols == 10
    assert (schedule.ends[:-1, -1] % 40 == 0).all()
    assert (arrived - spoken_for).max() <= 17 * schedule.strip + 40 * 32


def test_a_layer_without_a_rule_is_named() -> None:
    net = fcvgg.convert(seeded(SmallVGG), verify=False)
    net.network.add_module("features_2", nn.Fold((1, 1), 1))
    net.network.get_submodule("features").add_module("2", nn.Fold((1, 1), 1))
    with pytest.raises(FcvggError, match=r"features_2 \(Fold\) cannot be streamed"):
        fcvgg.stream(net, images(3, 40, 40))


# -- the public function --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net() -> Any:
    preprocess = fcvgg.Preprocess.imagenet()
    return fcvgg.convert(seeded(SmallVGG), preprocess=preprocess, categories=list("abcde"))


def photograph(height: int, width: int, channels: int = 3) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(5).integers(0, 256, (height, width, channels))
    return noise.astype(np.uint8)


def test_the_score_map_is_that_of_the_whole_image(net: Any) -> None:
    image = photograph(131, 90)
    expected, got = net.score_map(image), fcvgg.stream(net, image)
    assert relative_error(expected.scores, got.scores) <= EXACT
    assert got.geometry == expected.geometry
    assert (got.image_size, got.input_size) == (expected.image_size, expected.input_size)
    assert got.categories == net.categories
    assert np.allclose(got.heatmap("b").values, expected.heatmap("b").values, atol=1e-12)


@pytest.mark.parametrize("size", [(10, 90), (90, 10), (5, 7), (1, 1)])
def test_images_below_the_window_are_padded_alike(net: Any, size: tuple[int, int]) -> None:
    image = photograph(*size)
    expected, got = net.score_map(image), fcvgg.stream(net, image)
    assert relative_error(expected.scores, got.scores) <= EXACT
    assert got.geometry == expected.geometry


def test_classes(net: Any) -> None:
    image = photograph(80, 60)
    whole = fcvgg.stream(net, image)
    some = fcvgg.stream(net, image, classes=["d", 0])
    torch.testing.assert_close(some.scores, whole.scores[[3, 0]])
    assert some.categories == ("d", "a")
    assert repr(some).startswith("ScoreMap(2 classes, ")
    torch.testing.assert_close(some.probabilities(), whole.probabilities()[[3, 0]])
    torch.testing.assert_close(some.predict(), whole.predict("probabilities")[[3, 0]])
    expected = whole.heatmap("d").values
    np.testing.assert_allclose(some.heatmap("d").values, expected, rtol=0, atol=1e-6)
    one = fcvgg.stream(net, image, classes=["d"])  # whose logits alone would be a sigmoid's
    assert torch.equal(one.label_map() == 0, whole.probabilities()[3] > 0.5)
    labels = fcvgg.stream(net, image, classes="argmax")
    assert labels.dtype == torch.int64
    assert torch.equal(labels, whole.label_map())
    top = fcvgg.stream(net, image, classes="top5")
    assert top.shape == (2, 5, *labels.shape)
    assert torch.equal(top[0, 0].long(), labels)
    torch.testing.assert_close(top[1], whole.scores.sort(0, descending=True).values)


class CountingArray:
    """An array-like that notes which rows are read."""

    def __init__(self, array: np.ndarray[Any, Any]):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.rows: list[tuple[int, int]] = []

    def __getitem__(self, key: Any) -> Any:
        self.rows.append((key[0].start, key[0].stop))
        return self.array[key]


def test_rows_read_only_what_they_need(net: Any) -> None:
    image = photograph(200, 50)
    whole = fcvgg.stream(net, image)
    counting = CountingArray(image)
    got = fcvgg.stream(net, counting, rows=(20, 23))
    assert relative_error(whole.scores[:, 20:23], got.scores) <= EXACT
    top = net.geometry.receptive_field_of(20, 0)[0]
    bottom = net.geometry.receptive_field_of(22, 0)[2]
    assert min(first for first, _ in counting.rows) == top
    assert max(end for _, end in counting.rows) == bottom
    assert sum(end - first for first, end in counting.rows) == bottom - top
    assert got.geometry.centre_of(0, 0) == net.geometry.centre_of(20, 0)


def test_little_memory_gives_the_same_in_blocks_of_columns(net: Any) -> None:
    image = photograph(64, 3000)
    whole = net.score_map(image).scores
    least = _least(net, image)
    tight = fcvgg.stream(net, image, memory=least)
    assert relative_error(whole, tight.scores) <= EXACT
    job = StreamJob.prepared(net, image, None, None)
    assert len(job.plan(parsed_memory(least), job.row_bytes * job.shape[-2]).blocks) > 1


def _least(net: Any, image: np.ndarray[Any, Any]) -> str:
    with pytest.raises(FcvggError, match="memory must be at least") as caught:
        fcvgg.stream(net, image, memory="1MiB")
    text = str(caught.value).split("memory must be at least ")[1].split(" to ")[0]
    assert parsed_memory(text) > 1 << 20
    return text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "lots"}, "memory must be a number of bytes or text .*, got 'lots'"),
        ({"memory": 0}, "memory must be a number of bytes .*, got 0"),
        ({"memory": -5}, "memory must be a number of bytes .*, got -5"),
        (
            {"rows": (5, 5)},
            r"rows must be \(first, end\) with 0 <= first < end <= .*, got \(5, 5\)",
        ),
        ({"rows": (0, 10**6)}, r"the rows of the map, got \(0, 1000000\)"),
        ({"rows": 7}, r"rows must be whole numbers \(first, end\), got 7"),
        ({"rows": (1.5, 3)}, r"rows must be whole numbers \(first, end\), got \(1.5, 3\)"),
        ({"classes": "best"}, "classes must be 'argmax', 'top5', or a sequence .*, got 'best'"),
        ({"classes": []}, "classes must name at least one class and none twice"),
        ({"classes": ["a", 0]}, "none twice, got"),
        (
            {"classes": 0},
            r"classes must be a sequence of class indices and names, got 0; pass \[0\]",
        ),
        ({"classes": ["dog"]}, "dog"),
        ({"classes": [9]}, "9"),
        ({"output": 1}, "output must be 0, the only one, got 1"),
    ],
)
def test_unusable_options(net: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FcvggError, match=message):
        fcvgg.stream(net, photograph(60, 40), **options)


def test_one_class_whose_scores_are_unknown_is_refused_before_any_work(net: Any) -> None:
    single = fcvgg.convert(
        nn.Sequential(seeded(SmallVGG, classes=1), nn.Sigmoid(), Lambda(lambda x: x * 2)),
        verify=False,
        preprocess=net.preprocess,
    )
    assert single.activation == "unknown"
    counting = CountingArray(photograph(60, 40))
    with pytest.raises(FcvggError, match="what the scores are cannot be read off the model"):
        fcvgg.stream(single, counting, classes="argmax")
    assert not counting.rows
    assert fcvgg.stream(single, counting).scores.shape[0] == 1


def test_a_model_that_is_not_converted() -> None:
    with pytest.raises(FcvggError, match=r"converted network, got SmallVGG; pass fcvgg.convert"):
        fcvgg.stream(SmallVGG(), photograph(60, 40))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("512mib", 512 << 20), (77, 77)]
)
def test_amounts_of_memory(text: Any, size: int) -> None:
    assert parsed_memory(text) == size


def test_modes_are_given_back_and_progress_is_shown(
    net: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    net.train()
    net.network.get_submodule("features").eval()
    modes = [m.training for m in net.modules()]
    fcvgg.stream(net, photograph(60, 40), progress=True)
    assert modes == [m.training for m in net.modules()]
    net.eval()
    shown = capsys.readouterr().err
    assert "streaming" in shown
    assert "MP/s" in shown


# -- on disk --------------------------------------------------------------------------------------


def test_the_map_on_disk(net: Any, tmp_path: Path) -> None:
    image = photograph(300, 200)
    store = fcvgg.stream(net, image, out=tmp_path / "map.zarr")
    whole = fcvgg.stream(net, image)
    np.testing.assert_allclose(store.array[:], whole.scores.numpy(), rtol=1e-5, atol=1e-6)
    assert store.complete
    assert is_store(tmp_path / "map.zarr")
    description = json.loads((tmp_path / "map.zarr" / "zarr.json").read_text())["attributes"]
    assert description["fcvgg"]["categories"] == list("abcde")
    assert fcvgg.Geometry.from_dict(description["fcvgg"]["geometry"]) == whole.geometry
    assert [p.name for p in tmp_path.iterdir()] == ["map.zarr"]


@pytest.mark.parametrize("classes", ["argmax", "top5", ["c"]])
def test_kinds_of_maps_on_disk(net: Any, tmp_path: Path, classes: Any) -> None:
    image = photograph(90, 60)
    store = fcvgg.stream(net, image, out=tmp_path / "map.zarr", classes=classes, rows=(2, 9))
    got = fcvgg.stream(net, image, classes=classes, rows=(2, 9))
    expected = got if isinstance(got, Tensor) else got.scores
    np.testing.assert_allclose(store.array[:], expected.numpy(), rtol=1e-5, atol=1e-6)


def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many strips and chunks, also for a small image."""
    monkeypatch.setattr(resumption, "_CHUNK_ROWS", 4)
    monkeypatch.setattr("fcvgg.streaming.strip_plan._STRIP_BYTES", 30_000)
    monkeypatch.setattr("fcvgg.streaming.strip_plan._LEAST_BYTES", 30_000)
    monkeypatch.setattr("fcvgg.streaming.strip_plan._POSITIONS", 1)


def test_an_interrupted_run_resumes_with_identical_bits(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_strips(monkeypatch)
    image = photograph(400, 60)
    fcvgg.stream(net, image, out=tmp_path / "whole.zarr")

    class Interrupting(CountingArray):
        def __getitem__(self, key: Any) -> Any:
            if key[0].start > 200 and key[0].stop - key[0].start > 1:
                raise KeyboardInterrupt
            return super().__getitem__(key)

    with pytest.raises(KeyboardInterrupt):
        fcvgg.stream(net, Interrupting(image), out=tmp_path / "map.zarr")
    finished = open_store(tmp_path / "map.zarr").finished[0]
    assert 20 < finished < 80
    counting = CountingArray(image)
    fcvgg.stream(net, counting, out=tmp_path / "map.zarr")
    assert min(a for a, b in counting.rows if b - a > 1) > 4 * finished - 80
    whole, resumed = (open_store(tmp_path / f"{name}.zarr") for name in ("whole", "map"))
    assert np.array_equal(whole.array[:], resumed.array[:])
    again = CountingArray(image)
    fcvgg.stream(net, again, out=tmp_path / "map.zarr")
    assert all(b - a == 1 for a, b in again.rows)  # only to see that it is the same image


def test_a_killed_process_loses_nothing_that_was_finished(net: Any, tmp_path: Path) -> None:
    net.save(tmp_path / "net")
    np.save(tmp_path / "image.npy", photograph(600, 60))
    script = textwrap.dedent(
        """
        import sys
        import numpy as np
        import torch
        import fcvgg
        from fcvgg.streaming import resumption, score_store, strip_plan

        torch.set_num_threads(1)
        resumption._CHUNK_ROWS = 4
        strip_plan._STRIP_BYTES = strip_plan._LEAST_BYTES = 30_000
        strip_plan._POSITIONS = 1
        folder, name, slow = sys.argv[1:]
        if slow == "slow":
            mark = score_store.ScoreStore.mark
            def marking(self, block, rows):
                mark(self, block, rows)
                print(rows, flush=True)
                sys.stdin.readline()
            score_store.ScoreStore.mark = marking
        net = fcvgg.load(f"{folder}/net")
        image = np.load(f"{folder}/image.npy", mmap_mode="r")
        fcvgg.stream(net, image, out=f"{folder}/{name}.zarr")
        """
    )

    def started(name: str, pace: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), name, pace],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    whole = started("whole", "fast")
    with started("map", "slow") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(5):
            finished = int(process.stdout.readline())
            process.stdin.write("\n")
            process.stdin.flush()
        process.send_signal(signal.SIGKILL)
    assert open_store(tmp_path / "map.zarr").finished[0] >= finished == 20
    with started("map", "fast") as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    with whole:
        whole.communicate(timeout=60)
    expected, resumed = (open_store(tmp_path / f"{name}.zarr") for name in ("whole", "map"))
    assert resumed.complete
    assert np.array_equal(expected.array[:], resumed.array[:])


def test_another_map_is_not_overwritten(net: Any, tmp_path: Path) -> None:
    out = tmp_path / "map.zarr"
    image = photograph(60, 50)
    fcvgg.stream(net, image, out=out)
    before = open_store(out).array[:]
    other = fcvgg.convert(seeded(SmallVGG), verify=False, copy=True, preprocess=net.preprocess)
    other.categories = net.categories
    with torch.no_grad():
        next(other.parameters()).add_(1)
    for wrong, picture, message in (
        (net, photograph(60, 51), "its image size is"),
        (net, 255 - image, "its image, or the preprocessing or range of its values, is different"),
        (other, image, "its weights is"),
    ):
        with pytest.raises(FcvggError, match=f"exists and holds another score map: {message}"):
            fcvgg.stream(wrong, picture, out=out)
    with pytest.raises(FcvggError, match="holds another score map: its kind is"):
        fcvgg.stream(net, image, out=out, classes="argmax")
    assert np.array_equal(open_store(out).array[:], before)
    (tmp_path / "other").mkdir()
    with pytest.raises(FcvggError, match="must be a score map that"):
        fcvgg.stream(net, image, out=tmp_path / "other")
    with pytest.raises(FcvggError, match="there is no folder"):
        fcvgg.stream(net, image, out=tmp_path / "absent" / "map.zarr")


class TwoOutputs(nn.Module):
    """Two outputs over a pool that has no weights."""

    def __init__(self, pool: type[nn.Module]):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), pool(2))
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x).mean((2, 3))
        return self.first(x), self.second(x)


def test_maps_of_another_output_or_of_other_layers_are_not_continued(tmp_path: Path) -> None:
    image, out = images(3, 30, 30), tmp_path / "map.zarr"
    highest, average = (
        fcvgg.convert(seeded(TwoOutputs, pool), input_size=16, verify=False)
        for pool in (nn.MaxPool2d, nn.AvgPool2d)
    )
    fcvgg.stream(highest, image, out=out)
    with pytest.raises(FcvggError, match="holds another score map: its output is 0, not 1"):
        fcvgg.stream(highest, image, out=out, output=1)
    with pytest.raises(FcvggError, match="holds another score map: its network is"):
        fcvgg.stream(average, image, out=out)


def test_an_image_is_recognised_without_reading_whole_rows(net: Any, tmp_path: Path) -> None:
    image = photograph(40, 5000)

    class Wide(CountingArray):
        def __getitem__(self, key: Any) -> Any:
            assert key[1].stop - key[1].start <= 2500
            return super().__getitem__(key)

    options: dict[str, Any] = {"memory": _least(net, image), "classes": [0]}
    store = fcvgg.stream(net, Wide(image), out=tmp_path / "map.zarr", **options)
    assert len(store.blocks) > 1


def test_a_full_disk_keeps_what_is_finished(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zarr

    small_strips(monkeypatch)
    image, out = photograph(200, 50), tmp_path / "map.zarr"
    setitem = zarr.Array.__setitem__
    written = []

    def full(self: Any, key: Any, value: Any) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(key)
        setitem(self, key, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(FcvggError, match=r"No space left on device; 12 of \d+ rows are finished"):
        fcvgg.stream(net, image, out=out)
    monkeypatch.setattr(zarr.Array, "__setitem__", setitem)
    store = fcvgg.stream(net, image, out=out)
    assert np.abs(store.array[:] - net.score_map(image).scores.numpy()).max() <= 1e-12


def test_a_folder_is_written_by_one_run_at_a_time(net: Any, tmp_path: Path) -> None:
    image, out = photograph(400, 50), tmp_path / "map.zarr"
    with (
        FileLock(out.with_name(".map.zarr.lock")),
        pytest.raises(FcvggError, match="in use by another run; wait") as e,
    ):
        fcvgg.stream(net, image, out=out)
    assert "\n" not in str(e.value)
    assert not out.exists()
    store = fcvgg.stream(net, image, out=out)
    with (
        FileLock(out.with_name(".map.zarr.lock")),
        pytest.raises(FcvggError, match="in use by another run"),
    ):
        fcvgg.stream(net, image, out=out)
    assert store.complete
    assert open_store(out).complete  # reading needs no lock


def test_a_killed_run_leaves_a_folder_that_the_next_one_may_write(net: Any, tmp_path: Path) -> None:
    out = tmp_path / "map.zarr"
    code = (
        "import os, pathlib, sys; from fcvgg.support.locking import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(out)], check=False)
    assert [path.name for path in tmp_path.iterdir()] == [".map.zarr.lock"]
    assert fcvgg.stream(net, photograph(90, 50), out=out).complete
    assert [path.name for path in tmp_path.iterdir()] == ["map.zarr"]


def test_the_least_memory_of_a_message_suffices() -> None:
    for size in (1, 99, 101, 26_300_001, 1_040_000_000, 2_300_000_000, 5_010_000_000_000):
        text = size_text(rounded_up(size))
        assert size <= parsed_memory(text.removesuffix(" bytes")) <= 1.1 * size + 1


# -- memory ---------------------------------------------------------------------------------------

_PEAK = """
import sys
import numpy as np, torch
import fcvgg
from fcvgg.inference.line_buffers import LineBuffers
torch.set_num_threads(1)

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

net = fcvgg.load(sys.argv[1])
image = np.zeros((int(sys.argv[2]), 1024, 3), np.uint8)
image[:] = 7
fcvgg.stream(net, image[:64, :64], classes=[0])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
fcvgg.stream(net, image, classes=[0], memory=sys.argv[3])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_the_peak_stays_below_the_bound_and_does_not_grow_with_the_height(
    net: Any, tmp_path: Path
) -> None:
    net.save(tmp_path / "net")

    def peak(height: int) -> int:
        command = [sys.executable, "-c", _PEAK, str(tmp_path / "net"), str(height), "64MiB"]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    short, tall = peak(1024), peak(3072)
    assert max(short, tall) <= 64 << 20
    # the allocator's share varies by 13 MiB; a copy of the taller image would add 24 MiB
    assert tall <= 1.1 * short + (16 << 20)
