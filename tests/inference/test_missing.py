"""Pixels that are not finite: exactly the cells that see them are NaN, whatever computes."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nets import SmallVGG, Unpadded, images, seeded
from torch import Tensor, nn

import fcvgg
from fcvgg.inference import blocks
from fcvgg.inference.missing import missing_pixels
from fcvgg.optimization.onednn import has_bfloat16
from fcvgg.rewriting.rules.registry import KINDS, LayerKind
from fcvgg.streaming.execution import bands
from fcvgg.streaming.job import StreamJob
from fcvgg.streaming.strip_plan import StripPlan

NAN, INF = float("nan"), float("inf")


class Dilated(nn.Module):
    """Kernels smaller than their spacing: gaps between the pixels that a cell reads."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, dilation=3, padding=2), nn.ReLU6(), nn.MaxPool2d(2, 3)),
            *(nn.Conv2d(4, 6, (1, 3), stride=2), nn.LeakyReLU(), nn.MaxPool2d(3, 1, 1, 2)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3))
        self.head(self.features(torch.zeros(1, 3, 40, 40)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Bordered(nn.Module):
    """Borders that repeat or mirror the map, beyond what the kernel at the border reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"),
            *(nn.Hardswish(), nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
            nn.Conv2d(4, 4, 3, padding=2, padding_mode="replicate"),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
        self.head(self.features(torch.zeros(1, 3, 24, 24)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Crossed(nn.Module):
    """Two branches that read a row and a column: the cell sees a cross and not a box."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Conv2d(3, 5, (1, 7), padding=(0, 3))
        self.col = nn.Conv2d(3, 4, (7, 1), padding=(3, 0))
        self.fc = nn.Linear(9 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.row(x)), F.relu(self.col(x))], 1)
        return self.fc(F.max_pool2d(x, 4, 4).flatten(1))


NETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "padded": (SmallVGG, {}),
    "dense": (SmallVGG, {"output_stride": 1}),
    "same": (SmallVGG, {"padding": "same"}),
    "unpadded": (Unpadded, {}),
    "branches": (nets.GlobalPooled, {"input_size": 24}),
    "functional": (nets.Functional, {}),
    "gaps": (Dilated, {"input_size": 40}),
    "borders": (Bordered, {"input_size": 24}),
    "cross": (Crossed, {"input_size": 16}),
}


@cache
def made(name: str, dtype: torch.dtype = torch.float64) -> fcvgg.FullyConvolutional:
    model, options = NETS[name]
    return fcvgg.convert(seeded(model, dtype=dtype), **options)


@pytest.fixture(scope="module", params=NETS)
def net(request) -> fcvgg.FullyConvolutional:
    return made(request.param)


@torch.no_grad()
def oracle(net: fcvgg.FullyConvolutional, batch: Tensor) -> Tensor:
    """Plain propagation in float64: NaN in all channels runs through the layers, one by one."""
    bad = ~batch.isfinite().all(1, keepdim=True)
    seen = net.network(batch.masked_fill(bad, NAN).clone()).isnan().any(1, keepdim=True)
    return net.network(batch.masked_fill(bad, 0).clone()).masked_fill(seen, NAN)


def holed(net: fcvgg.FullyConvolutional, value: float) -> Tensor:
    """Two images, the second with one channel of some pixels not finite."""
    height, width = (w + 2 * s + 3 for w, s in zip(net.geometry.window, net.geometry.stride))
    batch = images(2, 3, height + 2, width + 9)
    batch[1, 1, 0, 0] = value
    batch[1, 2, height // 2 : height // 2 + 3, width // 3 : width // 3 + 4] = value
    return batch


def assert_same(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    assert got.isnan().any()
    scale = expected.nan_to_num(0).abs().max().item()
    torch.testing.assert_close(
        got.to(expected), expected, rtol=0, atol=tolerance * scale, equal_nan=True
    )


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@torch.no_grad()
def test_the_cells_that_see_it_are_nan_and_no_others(net, value: float) -> None:
    batch = holed(net, value)
    assert_same(net(batch), oracle(net, batch))
    assert net(batch)[0].isfinite().all()


@given(data=st.data(), name=st.sampled_from(sorted(NETS)))
@torch.no_grad()
def test_any_pixel_of_any_network(data: st.DataObject, name: str) -> None:
    net = made(name)
    batch = holed(net, NAN)[1:].nan_to_num(0)
    y, x = (data.draw(st.integers(0, n - 1)) for n in batch.shape[2:])
    batch[0, 0, y, x] = NAN
    expected = oracle(net, batch)
    got = net(batch)
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
    streamed = fcvgg.stream(net, batch[0], memory="64MiB").scores
    torch.testing.assert_close(streamed, expected[0], rtol=1e-9, atol=1e-9, equal_nan=True)


@torch.no_grad()
def test_below_the_window() -> None:
    net = made("padded")
    batch = images(1, 3, 9, 40)
    batch[0, 0, 3, 36] = NAN
    centred = F.pad(batch, (0, 0, 11, 12))
    assert_same(net(batch), oracle(net, centred))
    assert_same(fcvgg.stream(net, batch[0]).scores[None], oracle(net, centred))


def test_other_cells_do_not_know_which_value_it_was(net) -> None:
    with torch.no_grad():
        maps = [net(holed(net, value)) for value in (NAN, INF, -INF)]
    for other in maps[1:]:
        assert torch.equal(maps[0].nan_to_num(0), other.nan_to_num(0))


def test_gradients_pass_by() -> None:
    net = made("padded")
    batch = holed(net, NAN).requires_grad_()
    scores = net(batch)
    scores[~scores.isnan()].sum().backward()
    assert batch.grad is not None
    assert batch.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_training_is_left_alone() -> None:
    net = copy.deepcopy(made("padded")).train()
    assert net(holed(net, NAN))[1].isnan().any()


def test_networks_are_exported_and_vectorised_as_before() -> None:
    net = made("unpadded")
    batch = images(2, 3, *net.input_size)
    expected = net(batch)
    torch.testing.assert_close(torch.func.vmap(lambda x: net(x[None])[0])(batch), expected)
    exported = torch.export.export(net, (batch,)).module()
    torch.testing.assert_close(exported(batch), expected)
    assert copy.deepcopy(net).to("meta")(batch.to("meta")).shape == expected.shape


def check(fast: fcvgg.FullyConvolutional, name: str, dtype: torch.dtype, tolerance: float) -> None:
    plain = made(name)
    for value in (NAN, INF, -INF):
        batch = holed(plain, value)
        expected = oracle(plain, batch)
        assert_same(fast(batch.to(dtype)), expected, tolerance)
        if getattr(fast, "optimization", None) is None or fast.optimization.engine == "torch":
            streamed = fcvgg.stream(fast, batch[1].to(dtype), memory="64MiB").scores
            assert_same(streamed, expected[1], tolerance)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_a_network_in_single_precision(name: str) -> None:
    check(made(name, torch.float32), name, torch.float32, 1e-4)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_an_optimised_network(name: str) -> None:
    check(fcvgg.optimize(made(name, torch.float32)), name, torch.float32, 1e-4)


@torch.no_grad()
def test_an_optimised_network_whose_plain_one_is_gone() -> None:
    fast = fcvgg.optimize(made("padded", torch.float32))
    fast.release()
    check(pickle.loads(pickle.dumps(fast)), "padded", torch.float32, 1e-4)


@pytest.mark.skipif(not has_bfloat16(), reason="the processor has no bfloat16 arithmetic")
@pytest.mark.parametrize("name", ["padded", "branches", "gaps"])
@torch.no_grad()
def test_half_precision(name: str) -> None:
    check(fcvgg.optimize(made(name, torch.float32), dtype=torch.bfloat16), name, torch.float32, 0.1)
    plain = copy.deepcopy(made(name, torch.float32)).bfloat16()
    check(plain, name, torch.bfloat16, 0.1)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@torch.no_grad()
def test_another_runtime(engine: str) -> None:
    pytest.importorskip(engine)
    check(
        fcvgg.optimize(made("padded", torch.float32), engine=engine), "padded", torch.float32, 1e-4
    )


@torch.no_grad()
def test_by_winograd_and_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide layers and tiny strips, so that tiles and blocks are in use."""
    monkeypatch.setattr(blocks, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(blocks, "_WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(blocks, "_STRIP_BYTES", 1 << 16)
    monkeypatch.setattr(blocks, "_LEAST_ROWS", 2)

    def model() -> nn.Module:
        features = [nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1)]
        features += [nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*features, nn.Flatten(), nn.Linear(128 * 36, 4))

    exact = fcvgg.convert(seeded(model), input_size=12)
    plain = fcvgg.convert(seeded(model, dtype=torch.float32), input_size=12)
    fast = fcvgg.optimize(plain)
    assert fast.optimization.winograd
    batch = images(1, 3, 40, 44)
    batch[0, 0, 5, 7] = batch[0, 1, 30, 20] = NAN
    for net in (plain, fast):
        assert_same(net(batch.float()), oracle(exact, batch), 1e-4)
        assert_same(fcvgg.stream(net, batch[0].float()).scores, oracle(exact, batch)[0], 1e-4)


@pytest.mark.parametrize("rows", [None, (3, 13)])
def test_strips_made_up_for(rows: Any) -> None:
    """The first pixel that is not finite lies far down, in blocks of columns too."""
    net = made("padded", torch.float32)
    image = images(3, 150, 90, dtype=torch.float32)
    image[:, 70, 40:44] = NAN
    expected = oracle(made("padded"), image[None].double())[0]
    job = StreamJob.prepared(net, image, None, rows)
    width = net.output_size((150, 90))[1]
    first, end = job.workload.rows
    with torch.no_grad():
        for cols in ((0, width), (0, 7), (5, width)):
            plan = StripPlan(1 << 12, (cols,), 0, 1 << 30)
            parts = list(bands(job, plan, cols, (first, end), lambda _: None))
            assert len(parts) > 1
            assert_same(torch.cat(parts, 1), expected[:, first:end, cols[0] : cols[1]], 1e-4)


def test_finite_images_are_looked_at_once() -> None:
    assert missing_pixels(images(1, 3, 8, 8)) is None
    assert missing_pixels(torch.full((1, 3, 8, 8), 1e38)) is None  # whose sum overflows
    assert missing_pixels(torch.full((1, 3, 64, 64), 6e4, dtype=torch.float16)) is None


def test_a_layer_without_a_rule_for_strips_is_known_by_its_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = made("padded")
    batch = holed(net, NAN)
    expected = oracle(net, batch)
    monkeypatch.setitem(KINDS, nn.MaxPool2d, LayerKind())
    with torch.no_grad():
        assert_same(net(batch), expected)


def test_rows_of_a_resumed_stream_may_lack_data(tmp_path: Any) -> None:
    net = made("padded", torch.float32)
    image = images(3, 90, 60, dtype=torch.float32)
    image[:, 0] = NAN
    store = fcvgg.stream(net, image, out=tmp_path / "a.zarr")
    again = fcvgg.stream(net, image, out=tmp_path / "a.zarr")
    np.testing.assert_array_equal(again.array[:], store.array[:])
    with pytest.raises(fcvgg.FcvggError, match="holds another score map"):
        fcvgg.stream(net, image.nan_to_num(0), out=tmp_path / "a.zarr")
