"""Every fast path against the plain network, layer by layer and as a whole.

The oracle is the same arithmetic in float64, or the network's graph run node by node. Tolerances
are relative to the largest value: 1e-5 for float32 that only changes the order of sums, 1e-4 for
Winograd's transforms, 5e-2 for bfloat16.
"""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nets import (
    Functional,
    GlobalPooled,
    Headed,
    SmallVGG,
    Unpadded,
    images,
    narrow_vgg,
    relative_error,
    seeded,
)
from torch import nn

import fcvgg
from fcvgg.errors import (
    ArgumentError,
    EquivalenceError,
    FcvggError,
    ImageError,
    MissingExtraError,
)
from fcvgg.inference import blocks, memory
from fcvgg.optimization import fused, fusion, measuring, onednn, products, winograd
from fcvgg.optimization import networks as optimization
from fcvgg.rewriting import modules

REORDERED = 1e-5
WINOGRAD = 1e-4
BFLOAT16 = 5e-2

needs_packing = pytest.mark.skipif(not onednn.has_packing(), reason="torch has no oneDNN here")
needs_bfloat16 = pytest.mark.skipif(
    not optimization.has_bfloat16(), reason="the processor has no bfloat16"
)


MODELS = {
    "narrow VGG-16 with batch norm": (lambda: narrow_vgg("vgg16_bn", width=64), 224),
    "SmallVGG": (lambda: SmallVGG(bn=True), 32),
    "functional, log-softmax": (Functional, 28),
    "global pool, shortcut": (GlobalPooled, 64),
    "unpadded, tanh": (Unpadded, None),
    "layer norm and PReLU": (
        lambda: Headed(nn.Sequential(nn.Flatten(), nn.Linear(288, 9), nn.LayerNorm(9), nn.PReLU())),
        24,
    ),
}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def small():
    """A SmallVGG with batch norm in float32: native size 32, 8x8 features."""
    model = seeded(SmallVGG, bn=True, dtype=torch.float32)
    return fcvgg.convert(model, input_size=32)


@pytest.fixture
def wide():
    """A VGG-11 with 128 channels and more where Winograd applies; native size 64."""

    def build():
        layers = [nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(128 * 64, 16), nn.BatchNorm1d(16), nn.ReLU()]
        return nn.Sequential(*layers, nn.Dropout(), nn.Linear(16, 5))

    return fcvgg.convert(seeded(build, dtype=torch.float32), input_size=32)


def error_at(net, fast, *shape):
    batch = images(*shape, dtype=torch.float32)
    return relative_error(net(batch), fast(batch))


# -- fc6 by the grid: one cell, gathered windows, blocks of them, convolution ---------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("dilation", "size"), [((1, 1), (7, 6)), ((2, 3), (12, 15))])
@pytest.mark.parametrize("cells", [1, 4, 7, 1000])
def test_gathered_windows_equal_a_convolution(monkeypatch, cells, dilation, size, count):
    monkeypatch.setattr(modules, "GEMM_CELLS", cells)
    x = images(count, 3, *size)
    weight, bias = images(5, 3, 4, 3, seed=2), images(1, 5, 1, 1, seed=3).flatten()
    expected = F.conv2d(x, weight, bias, dilation=dilation)
    got = modules.window_linear(x, weight, bias, dilation)
    assert relative_error(expected, got) < 1e-13


def test_a_single_cell_is_the_fully_connected_product():
    x, weight = images(2, 3, 4, 4), images(5, 3, 4, 4, seed=2)
    got = modules.window_linear(x, weight, None, (1, 1))
    assert torch.equal(got.flatten(1), F.linear(x.flatten(1), weight.flatten(1)))


def test_gathered_windows_in_channels_last_order():
    x, weight = images(1, 3, 6, 6), images(5, 3, 4, 4, seed=2)
    columns = weight.permute(0, 2, 3, 1).flatten(1)
    got = modules.by_windows(x, (4, 4), (1, 1), lambda r: r @ columns.T, channels_last=True)
    assert relative_error(F.conv2d(x, weight), got) < 1e-13


def test_many_cells_with_gradients_are_a_convolution(monkeypatch):
    monkeypatch.setattr(modules, "GEMM_CELLS", 2)
    monkeypatch.setattr(modules, "by_windows", None)  # would keep every window
    with torch.enable_grad():
        x = images(1, 3, 6, 6, requires_grad=True)
        modules.window_linear(x, images(5, 3, 4, 4, seed=2), None, (1, 1)).sum().backward()
    assert x.grad is not None


# -- strips ---------------------------------------------------------------------------------------


@pytest.fixture
def in_strips(monkeypatch):
    """Makes every block run in strips of one output row."""
    monkeypatch.setattr(blocks, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(blocks, "_STRIP_BYTES", 1)
    monkeypatch.setattr(blocks, "_LEAST_ROWS", 1)


@pytest.mark.parametrize("name", MODELS)
def test_strips_equal_the_whole_map(in_strips, name):
    model, size = MODELS[name]
    net = fcvgg.convert(seeded(model), input_size=size)
    batch = images(2, 3, net.geometry.window[0] + 37, net.geometry.window[1] + 10)
    assert relative_error(net.network(batch), net(batch)) < 1e-12


def test_strips_of_wide_maps_have_fewer_rows(monkeypatch):
    net = fcvgg.convert(seeded(SmallVGG), input_size=32)
    batch = images(1, 3, 90, 50)
    first = blocks.BlockwiseGraph(net.network)._blocks[0]
    largest = max(np.prod(size) for size in blocks._maps(first, batch.shape)[1:])
    per_row = largest * batch.element_size() / 45  # of the pool's 45 rows
    monkeypatch.setattr(blocks, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(blocks, "_STRIP_BYTES", 1)
    monkeypatch.setattr(blocks, "_MOST_BYTES", 3.5 * per_row)
    strips = blocks.BlockwiseGraph(net.network).sized_blocks(batch)[0].strips
    assert [last - first for first, last in (strip.outputs for strip in strips)] == [3] * 15
    assert relative_error(net.network(batch), net(batch)) < 1e-12


@needs_packing
def test_strips_with_relu_in_the_convolution(in_strips, small):
    batch = images(2, 3, 61, 45, dtype=torch.float32)
    assert relative_error(small.network(batch), small(batch)) < REORDERED


def test_strips_of_dilated_layers(in_strips):
    net = fcvgg.convert(seeded(SmallVGG), output_stride=1, input_size=32)
    batch = images(1, 3, 50, 41)
    assert relative_error(net.network(batch), net(batch)) < 1e-12


def test_strips_leave_the_images_alone(in_strips, small):
    batch = images(1, 3, 40, 40, dtype=torch.float32)
    kept = batch.clone()
    small(batch)
    assert torch.equal(batch, kept)


@needs_bfloat16
@pytest.mark.parametrize("first", [[], [nn.ReLU()], [nn.Dropout()]])
@pytest.mark.parametrize("whole_bytes", [0, 1 << 30])
def test_a_pool_that_comes_first_leaves_the_images_alone(monkeypatch, whole_bytes, first):
    monkeypatch.setattr(blocks, "_WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(blocks, "_STRIP_BYTES", 1)
    monkeypatch.setattr(blocks, "_LEAST_ROWS", 1)
    layers = [*first, nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 16, 5))
    net = fcvgg.convert(seeded(lambda: model, dtype=torch.float32), input_size=16)
    fast = fcvgg.optimize(net.bfloat16())
    batch = images(2, 3, 21, 40, dtype=torch.bfloat16)
    batch = batch.contiguous(memory_format=torch.channels_last)
    kept = batch.clone()
    assert relative_error(net(batch), fast(batch)) < BFLOAT16
    assert torch.equal(batch, kept)


class Sliced(nn.Module):
    """Half of a convolution's channels, with the ReLU before or after the cut."""

    def __init__(self, relu_first):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(4)
        self.features = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.fc = nn.Linear(6 * 16, 5)
        self.relu_first = relu_first

    def forward(self, x):
        x = F.relu(self.conv(x))[:, :4] if self.relu_first else self.conv(x)[:, :4]
        x = x if self.relu_first else F.relu(self.norm(x))
        return self.fc(self.features(F.max_pool2d(x, 2)).flatten(1))


@needs_bfloat16
@pytest.mark.parametrize("relu_first", [False, True])
@pytest.mark.parametrize("strips", [False, True])
def test_blocks_that_keep_some_channels(request, strips, relu_first):
    if strips:
        request.getfixturevalue("in_strips")
    net = fcvgg.convert(seeded(lambda: Sliced(relu_first), dtype=torch.float32), input_size=16)
    fast = fcvgg.optimize(net, dtype=torch.bfloat16)
    batch = images(2, 3, 33, 40, dtype=torch.float32)
    assert relative_error(net.network(batch), net(batch)) < REORDERED
    assert relative_error(net.network(batch), fast(batch)) < BFLOAT16


def test_shapes_are_read_once(monkeypatch, small):
    monkeypatch.setattr(blocks, "_MOST_SHAPES", 2)
    fast = copy.deepcopy(fcvgg.optimize(small))  # which has read no shape yet
    read = []
    real = blocks._sized_blocks
    monkeypatch.setattr(
        blocks,
        "_sized_blocks",
        lambda chain, x: read.append(tuple(x.shape[2:])) or real(chain, x),
    )
    for size in [(40, 40), (40, 40), (61, 45), (40, 40), (33, 70), (40, 40)]:
        batch = images(1, 3, *size, dtype=torch.float32)
        assert relative_error(small.network(batch), fast(batch)) < REORDERED
    assert read == [(40, 40), (61, 45), (33, 70), (40, 40)]  # the third one drops what was kept


def test_a_watched_layer_sees_its_whole_map(in_strips, small):
    seen = []
    layer = small.network.get_submodule("features.4")
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out.shape[2:]))
    small(images(1, 3, 40, 40, dtype=torch.float32))
    handle.remove()
    assert seen == [(20, 20)]


def test_only_optimising_changes_how_the_process_keeps_memory(in_strips, monkeypatch, small):
    asked = []
    monkeypatch.setattr(optimization, "keep_freed_maps", lambda: asked.append("optimize"))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("the C library was used"))
    small(images(1, 3, 61, 45, dtype=torch.float32))
    assert asked == []
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    fcvgg.optimize(small)
    assert asked == ["optimize"]


def test_training_runs_the_graph_as_it_is(in_strips, monkeypatch, small):
    small.train()
    monkeypatch.setattr(blocks, "run_block", None)
    with torch.enable_grad():
        small(images(2, 3, 40, 40, dtype=torch.float32)).sum().backward()
    small.eval()


# -- Winograd -------------------------------------------------------------------------------------


TILINGS = {k: winograd.window_tiling(k) for k in (5, 6, 7)} | {3: winograd.CONVOLUTION}
FORMS = [
    products.StackedKernels,
    pytest.param(products.GroupedKernels, marks=needs_packing),
]


@pytest.fixture
def winograd_from(monkeypatch):
    """Sets the tiles from which Winograd's algorithm is taken, which the machine decides else."""

    def set_sides(conv=4, window=4):
        sides = {3: conv}
        monkeypatch.setattr(
            fused, "least_gaining", lambda kind, tried, gains: sides.get(kind[0].kernel, window)
        )

    return set_sides


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at_a_time", [3, 1000])
@pytest.mark.parametrize("padding", [(0, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("size", [(7, 7), (9, 14), (16, 16), (8, 30)])
@pytest.mark.parametrize("kernel", TILINGS)
def test_winograd_equals_the_convolution(monkeypatch, kernel, size, padding, at_a_time, form):
    monkeypatch.setattr(winograd.Tiling, "tiles_at_a_time", lambda self, *_: at_a_time)
    monkeypatch.setattr(winograd, "_FEATURES", 2)
    x = images(3, 7, *size, dtype=torch.float32)
    weight = images(6, 7, kernel, kernel, seed=2, dtype=torch.float32)
    bias = images(1, 6, 1, 1, seed=3, dtype=torch.float32).flatten()
    tiling = TILINGS[kernel]
    kernels = tiling.kernels(weight, form)
    for relu in (False, True):
        exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
        got = winograd.winograd_convolution(tiling, x, kernels, bias, padding, relu)
        assert relative_error(exact.relu() if relu else exact, got.double()) < WINOGRAD


@pytest.mark.parametrize("form", FORMS)
def test_tiles_that_fill_up_change_nothing(monkeypatch, form):
    monkeypatch.setattr(form, "least_tiles", 40)
    x, weight = images(2, 5, 9, 14, dtype=torch.float32), images(6, 5, 3, 3, dtype=torch.float32)
    kernels = winograd.CONVOLUTION.kernels(weight, form)
    got = winograd.winograd_convolution(
        winograd.CONVOLUTION, x, kernels, torch.zeros(6), padding=(1, 1)
    )
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    assert relative_error(expected, got.double()) < WINOGRAD


@pytest.mark.parametrize("kernel", TILINGS)
def test_winograd_is_exact_up_to_rounding_in_float64(kernel):
    x, weight = images(1, 3, 9, 9), images(4, 3, kernel, kernel, seed=2)
    tiling = TILINGS[kernel]
    bias = torch.zeros(4, dtype=x.dtype)
    got = winograd.winograd_convolution(
        tiling, x, tiling.kernels(weight, products.StackedKernels), bias, (1, 1)
    )
    assert relative_error(F.conv2d(x, weight, padding=1), got) < 1e-12


@needs_packing
def test_winograd_at_every_window_of_fc6(winograd_from):
    winograd_from(window=4)
    layers = [nn.Conv2d(3, 128, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(128 * 49, 128), nn.ReLU(), nn.Linear(128, 5))
    net = fcvgg.convert(seeded(lambda: model, dtype=torch.float32), input_size=28)
    fast = fcvgg.optimize(net)
    assert fast.optimization.winograd == 1
    for shape in ((1, 3, 28, 28), (1, 3, 64, 60), (1, 3, 29, 200), (3, 3, 50, 61)):
        assert error_at(net, fast, *shape) < WINOGRAD
    large, tiny = (fcvgg.optimize(net, size=size) for size in (90, 28))
    assert (large.optimization.winograd, tiny.optimization.winograd) == (1, 0)
    assert large.optimization.packed_bytes > tiny.optimization.packed_bytes
    for shape in ((2, 3, 28, 28), (1, 3, 64, 60)):
        assert error_at(net, large, *shape) < WINOGRAD
        assert error_at(net, tiny, *shape) < REORDERED


@needs_packing
@pytest.mark.parametrize("form", FORMS)
def test_winograd_in_a_network(monkeypatch, winograd_from, form, wide):
    winograd_from(conv=4)
    monkeypatch.setattr(fused, "faster_kernels", lambda dtype: form)
    fast = fcvgg.optimize(wide)
    assert fast.optimization.winograd == 1
    assert error_at(wide, fast, 2, 3, 75, 60) < WINOGRAD


@needs_packing
def test_a_size_keeps_the_faster_form_of_the_weights_only(winograd_from, wide):
    winograd_from(conv=5)
    both, large, tiny = (fcvgg.optimize(wide, size=size) for size in (None, 64, 32))
    assert (both.optimization.winograd, large.optimization.winograd) == (1, 1)
    assert tiny.optimization.winograd == 0
    assert both.optimization.packed_bytes > large.optimization.packed_bytes
    assert large.optimization.packed_bytes > tiny.optimization.packed_bytes
    for fast in (large, tiny):
        assert error_at(wide, fast, 1, 3, 32, 32) < WINOGRAD
        assert error_at(wide, fast, 1, 3, 90, 70) < WINOGRAD


def test_winograd_is_given_up_where_its_error_is_too_large(monkeypatch, winograd_from, wide):
    winograd_from(conv=1)
    real = winograd.Tiling.kernels
    monkeypatch.setattr(
        winograd.Tiling, "kernels", lambda self, w, form: real(self, w * 1.01, form)
    )
    fast = fcvgg.optimize(wide)
    assert fast.optimization.winograd == 0
    assert fast.equivalence.passed


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_of_kernels_multiplies_alike(form):
    tiling = winograd.CONVOLUTION
    x = images(2, 5, 9, 14, dtype=torch.float32)
    weight, bias = images(130, 5, 3, 3, seed=2, dtype=torch.float32), torch.zeros(130)
    kernels = tiling.kernels(weight, form)
    assert kernels.nbytes == 36 * 5 * 130 * 4
    restored = pickle.loads(pickle.dumps(kernels))
    first, second = (
        winograd.winograd_convolution(tiling, x, k, bias, (1, 1)) for k in (kernels, restored)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6 * first.abs().max().item())


# -- what the machine decides ---------------------------------------------------------------------


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(measuring, "_KNOWN", {})


def test_the_least_size_is_measured_once_for_a_kind(nothing_known):
    asked = []

    def gains_at(size):
        asked.append(size)
        return size >= 5

    for _ in range(2):
        assert measuring.least_gaining("kind", (3, 4, 6, 8), gains_at) == 6
    assert asked == [3, 4, 6]
    assert measuring.least_gaining("other", (3, 4), gains_at) == float("inf")


def test_the_way_that_takes_less_of_the_threads_time_gains():
    small, large = torch.ones(10, 10), torch.ones(600, 600)
    threads = torch.get_num_threads()
    assert measuring.gains(lambda: small @ small, lambda: large @ large)
    assert not measuring.gains(lambda: large @ large, lambda: small @ small)
    # reading the weights that the cache holds here counts: 10 GB take longer than any product
    assert not measuring.gains(lambda: small @ small, lambda: large @ large, 10 * 1024**3)
    assert torch.get_num_threads() == threads


@needs_packing
@pytest.mark.parametrize("grouped", [False, True])
def test_the_faster_products_are_found_once(monkeypatch, grouped):
    asked = []
    monkeypatch.setattr(measuring, "gains", lambda *ways: asked.append(ways) or grouped)
    measuring._faster_kernels.cache_clear()
    expected = products.GroupedKernels if grouped else products.StackedKernels
    for _ in range(2):
        assert measuring.faster_kernels(torch.float32) is expected
    measuring._faster_kernels.cache_clear()
    ((first, second),) = asked
    for ours, theirs in zip(torch.cat(first(), 2).unbind(), torch.cat(second(), 2).unbind()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert measuring.faster_kernels(torch.float64) is products.StackedKernels


def test_the_number_of_threads_comes_back_after_an_error():
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        measuring.gains(lambda: 1 / 0, lambda: None)
    assert torch.get_num_threads() == threads


@needs_packing
@pytest.mark.parametrize("form", FORMS)
def test_autocast_leaves_winograd_in_float32(monkeypatch, winograd_from, form, wide):
    winograd_from(conv=4)
    monkeypatch.setattr(fused, "faster_kernels", lambda dtype: form)
    fast = fcvgg.optimize(wide)
    batch = images(1, 3, 75, 60, dtype=torch.float32)
    with torch.autocast("cpu"):
        cast = fast(batch)
    assert relative_error(wide(batch), cast) < WINOGRAD


@needs_packing
def test_another_default_dtype_changes_nothing(nothing_known, wide):
    batch = images(1, 3, 90, 70, dtype=torch.float32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        measuring._faster_kernels.cache_clear()
        fast = fcvgg.optimize(wide)
    finally:
        torch.set_default_dtype(before)
    assert relative_error(wide(batch), fast(batch)) < WINOGRAD


@needs_packing
def test_measuring_leaves_random_numbers_alone(nothing_known, wide):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measuring._faster_kernels.cache_clear()
    fcvgg.optimize(wide)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_a_layer_for_which_winograd_never_gains_holds_no_kernels(monkeypatch, wide):
    monkeypatch.setattr(fused, "least_gaining", lambda *_: float("inf"))
    fast = fcvgg.optimize(wide)
    assert fast.optimization.winograd == 0
    assert error_at(wide, fast, 1, 3, 90, 70) < REORDERED


@needs_packing
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("granted", [False, True])
def test_asking_for_huge_pages_changes_nothing_else(monkeypatch, packed, granted):
    asked = []
    real = memory._madvise()

    def madvise(first, length, advice):
        asked.append((first.value, length.value))
        return real(first, length, advice) if granted and real else -1

    monkeypatch.setattr(memory, "_madvise", lambda: madvise)
    weight = images(1, 1, 1200, 2048, dtype=torch.float32)[0, 0]
    held = torch.ops.mkldnn._reorder_linear_weight(weight, 10) if packed else weight.clone()
    assert memory.on_huge_pages(held) is held
    assert torch.equal(held.to_dense() if packed else held, weight)
    ((first, length),) = asked
    assert first % 4096 == length % 4096 == 0
    assert weight.nbytes - 2 * 4096 <= length <= weight.nbytes
    memory.on_huge_pages(weight[:10].contiguous())
    assert len(asked) == 1


# -- fc6 as a convolution over rows ----------------------------------------------------------------


@needs_bfloat16
@given(
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    across=st.integers(1, 9),
    count=st.integers(1, 2),
    relu=st.booleans(),
)
def test_rows_convolved_equal_every_window(kernel, grid, across, count, relu):
    size = (grid[0] + kernel[0] - 1, grid[1] + kernel[1] - 1)
    x = images(count, 32, *size, dtype=torch.bfloat16)
    weight, bias = images(16, 32, *kernel, seed=2), images(1, 16, 1, 1, seed=3).flatten()
    weight, bias = weight.bfloat16(), bias.bfloat16()
    expected = F.conv2d(x.double(), weight.double(), bias.double())
    expected = expected.relu() if relu else expected
    columns = weight.permute(0, 2, 3, 1).flatten(1)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(onednn, "_MOST_CELLS_ACROSS", across)
        layer = onednn.RowConvolution(columns, bias, kernel, grid, relu)
        got = layer(x.contiguous(memory_format=torch.channels_last))
    assert relative_error(expected, got.double()) < 2**-7  # the scores have 8 bits


@given(n=st.integers(1, 400), most=st.integers(1, 50))
def test_pieces_cover_the_grid_and_are_of_one_size(n, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "_MOST_CELLS_ACROSS", most)
        size, _ = onednn._piece((n, 1))
        starts, _ = onednn._starts((n, 1))
    assert size <= most
    assert {i for start in starts for i in range(start, start + size)} == set(range(n))
    assert len(starts) == -(-n // most)


@given(rows=st.integers(2, 11), cols=st.integers(1, 5), channels=st.integers(1, 4))
def test_halves_side_by_side_are_the_map(rows, cols, channels):
    x = images(1, channels, rows, cols)
    weight = images(3, channels, 3, 3, seed=2)
    both = onednn.halves(x)
    assert both.shape == (2, channels, -(-rows // 2) + 2, cols)
    scores = onednn.joined_halves(F.conv2d(both, weight, padding=(0, 1)), rows)
    torch.testing.assert_close(scores, F.conv2d(x, weight, padding=1), rtol=0, atol=1e-12)


@needs_bfloat16
@needs_packing
@pytest.mark.parametrize(
    ("options", "padding", "height"),
    [
        ({"padding": 1, "stride": 2}, (1, 1), 24),
        ({"padding": 2, "dilation": 2}, (2, 2), 24),
        ({"padding": 1, "groups": 2}, (1, 1), 24),
        ({"padding": 0}, (0, 0), 24),
        ({"padding": 1}, (0, 1), 24),  # in a strip, whose rows come padded
        ({"padding": 1}, (1, 1), 19),
        ({"padding": 1, "kernel_size": 1}, (1, 1), 24),
    ],
)
def test_layers_that_halves_are_not_for(monkeypatch, options, padding, height):
    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    monkeypatch.setattr(onednn, "_THREADS", torch.get_num_threads())
    monkeypatch.setattr(fused, "halves", None)
    conv = nn.Conv2d(16, 512, **{"kernel_size": 3, **options}).bfloat16()
    layer = fused.PackedConv2d(conv, conv.weight.detach(), conv.bias.detach(), relu=False)
    x = images(1, 16, height, 24, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    steps = (conv.stride, padding, conv.dilation, conv.groups)
    with torch.no_grad():
        expected = F.conv2d(x, conv.weight, conv.bias, *steps)
        assert relative_error(expected, layer.convolved(x, padding)) < 2**-7


def test_halves_are_for_one_map_in_bfloat16_on_two_threads(monkeypatch):
    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.zeros(1, 1, 32, 32, dtype=torch.bfloat16)
    assert onednn.gains_by_halves(x, 512)
    assert not onednn.gains_by_halves(x, 256)
    assert not onednn.gains_by_halves(x.float(), 512)
    assert not onednn.gains_by_halves(x.expand(2, -1, -1, -1), 512)
    assert not onednn.gains_by_halves(torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16), 512)
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert not onednn.gains_by_halves(x, 512)


@needs_bfloat16
def test_layers_by_halves(monkeypatch):
    """Those of 20 rows and more, even and odd ones."""
    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    monkeypatch.setattr(onednn, "_THREADS", torch.get_num_threads())
    monkeypatch.setattr(onednn, "_LEAST_CHANNELS", 8)
    net = fcvgg.convert(seeded(SmallVGG, dtype=torch.float32), input_size=32)
    fast = fcvgg.optimize(net, dtype=torch.bfloat16)
    calls = []
    real = fused.halves
    monkeypatch.setattr(fused, "halves", lambda x: calls.append(x.shape[2]) or real(x))
    for rows in (32, 57, 82):
        batch = images(1, 3, rows, 25, dtype=torch.float32)
        scores = fast(batch)
        monkeypatch.setattr(onednn, "_LEAST_ROWS", 1000)
        assert relative_error(fast(batch), scores) < 2**-7  # one rounding in 8 bits
        monkeypatch.setattr(onednn, "_LEAST_ROWS", 20)
        assert relative_error(net(batch), scores) < BFLOAT16
    assert set(calls) >= {57, 28, 41}
    assert min(calls) >= 20
    calls.clear()
    batch = images(2, 3, 57, 25, dtype=torch.float32)
    scores = fast(batch)  # a batch is shared among threads as it is
    assert calls == []
    assert relative_error(net(batch), scores) < BFLOAT16
    assert relative_error(fast(batch[:1]), scores[:1]) < 2**-7
    assert calls != []


@needs_bfloat16
@needs_packing
def test_weights_are_ordered_for_halves_and_for_batches(monkeypatch):
    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    monkeypatch.setattr(onednn, "_THREADS", torch.get_num_threads())
    conv = nn.Conv2d(8, 512, 3, padding=1).bfloat16()
    layer = fused.PackedConv2d(conv, conv.weight.detach(), conv.bias.detach(), relu=False)
    ordered = []
    real = layer._ordered
    monkeypatch.setattr(
        layer, "_ordered", lambda weight, shape: ordered.append(tuple(shape)) or real(weight, shape)
    )
    one, two = (images(n, 8, 32, 32, dtype=torch.bfloat16) for n in (1, 2))
    for x in (one, one, two, two, one):
        layer(x)
    assert ordered == [(2, 8, 18, 32), (2, 8, 32, 32), (2, 8, 18, 32)]


@needs_bfloat16
def test_fc6_of_the_size_that_was_asked_for(monkeypatch):
    """A 7x7 window over 128 channels at stride 4: 16x16 cells for images of 90 pixels."""
    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    layers = [nn.Conv2d(3, 128, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(128 * 49, 128), nn.ReLU(), nn.Linear(128, 5))
    net = fcvgg.convert(seeded(lambda: model, dtype=torch.float32), input_size=28)
    general = fcvgg.optimize(net, dtype=torch.bfloat16)
    fast = fcvgg.optimize(net, dtype=torch.bfloat16, size=90)
    weights = 128 * 128 * 49 * 2
    assert fast.optimization.packed_bytes == general.optimization.packed_bytes + weights

    calls = []
    convolved = onednn.RowConvolution.__call__
    monkeypatch.setattr(
        onednn.RowConvolution,
        "__call__",
        lambda layer, x: calls.append(x.shape) or convolved(layer, x),
    )
    assert error_at(net, fast, 1, 3, 90, 90) < BFLOAT16
    assert error_at(net, fast, 2, 3, 90, 90) < BFLOAT16
    assert calls == [(1, 128, 22, 22), (2, 128, 22, 22)]
    for shape in ((1, 3, 28, 28), (1, 3, 64, 60), (1, 3, 90, 94)):
        assert error_at(net, fast, *shape) < BFLOAT16
    assert len(calls) == 2

    small = fcvgg.optimize(net, dtype=torch.bfloat16, size=60)  # 9x9 cells
    calls.clear()  # making it compared both ways
    assert error_at(net, small, 1, 3, 60, 60) < BFLOAT16
    assert error_at(net, small, 2, 3, 60, 60) < BFLOAT16  # by products, which read weights once
    assert calls == [(1, 128, 15, 15)]

    monkeypatch.setattr(onednn, "_MOST_CELLS_ACROSS", 30)
    pieces = fcvgg.optimize(net, dtype=torch.bfloat16, size=(90, 211))  # 16x47 cells in two
    column = fcvgg.optimize(net, dtype=torch.bfloat16, size=(200, 28))  # 44x1 in two
    calls.clear()
    assert error_at(net, pieces, 1, 3, 90, 211) < BFLOAT16
    assert calls == [(1, 128, 22, 53)]
    assert column.optimization.packed_bytes == general.optimization.packed_bytes

    batch = images(1, 3, 90, 90, dtype=torch.float32)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(twin(batch), fast(batch))


@needs_bfloat16
def test_rows_that_give_other_scores_are_left_out(monkeypatch):
    """As they would on a processor or in a torch that orders weights in another way."""
    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    monkeypatch.setattr(onednn.RowConvolution, "__call__", lambda self, x: x.new_ones(1))
    layers = [nn.Conv2d(3, 128, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(128 * 49, 128))
    net = fcvgg.convert(seeded(lambda: model, dtype=torch.float32), input_size=28)
    fast = fcvgg.optimize(net, dtype=torch.bfloat16, size=90)
    assert error_at(net, fast, 1, 3, 90, 90) < BFLOAT16


@needs_bfloat16
@pytest.mark.parametrize(("amx", "grid"), [(True, (5, 6)), (False, (16, 16)), (True, (2, 90))])
def test_where_a_product_is_faster_than_rows(monkeypatch, amx, grid):
    monkeypatch.setattr(onednn, "has_amx", lambda: amx)
    assert not onednn.RowConvolution.suits(grid)
    assert not amx or onednn.RowConvolution.suits((16, 16))


# -- optimised networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_optimised_equals_plain(name, dtype):
    model, size = MODELS[name]
    net = fcvgg.convert(seeded(model, dtype=dtype), input_size=size)
    fast = fcvgg.optimize(net)
    height, width = net.geometry.window
    batch = images(2, 3, height + 41, width + 23, dtype=dtype)
    assert relative_error(net(batch), fast(batch)) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert fast.equivalence.passed
    assert fast.equivalence.tolerance == optimization.TOLERANCES[dtype]


@needs_bfloat16
@pytest.mark.parametrize("name", ["SmallVGG", "narrow VGG-16 with batch norm"])
def test_bfloat16_takes_and_gives_float32(name):
    model, size = MODELS[name]
    net = fcvgg.convert(seeded(model, dtype=torch.float32), input_size=size)
    fast = fcvgg.optimize(net, dtype=torch.bfloat16)
    assert error_at(net, fast, 1, 3, size + 33, size + 31) < BFLOAT16
    assert fast(torch.zeros(1, 3, size, size)).dtype == torch.float32
    assert fast.equivalence.tolerance == BFLOAT16


@needs_bfloat16
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("positive", [False, True])
def test_halving_pool_equals_max_pool(size, positive):
    x = images(2, 3, *size, dtype=torch.bfloat16)
    x[0, 0, 0, 0] = torch.inf
    x = x.relu() if positive else x
    assert torch.equal(fused.HalvingMaxPool2d(positive)(x), F.max_pool2d(x, 2))


@needs_bfloat16
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("positive", [False, True])
def test_halving_pool_writes_into_part_of_a_map(size, positive):
    x = images(2, 3, *size, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x = x.relu() if positive else x
    expected = F.max_pool2d(x, 2)
    height, width = expected.shape[2:]
    out = torch.full((2, 3, height + 2, width), torch.nan, dtype=torch.bfloat16)
    fused.HalvingMaxPool2d(positive).halve_into(x, out[:, :, 1:-1])
    assert torch.equal(out[:, :, 1:-1], expected)
    assert out[:, :, [0, -1]].isnan().all()


@needs_bfloat16
def test_only_pools_after_a_relu_compare_integers():
    layers = [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 16, 5))
    net = fcvgg.convert(seeded(lambda: model, dtype=torch.float32), input_size=24)
    fast = fcvgg.optimize(net, dtype=torch.bfloat16)
    pools = [m for m in fast.network.modules() if isinstance(m, fused.HalvingMaxPool2d)]
    assert [pool.positive for pool in pools] == [False, True]
    assert error_at(net, fast, 2, 3, 40, 33) < BFLOAT16


@needs_packing
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
)
def test_packed_weights_are_ordered_anew_for_other_widths(wide, dtype):
    fast = fcvgg.optimize(wide, dtype=dtype)
    tolerance = {torch.float32: WINOGRAD, torch.bfloat16: BFLOAT16}[dtype]
    for shape in ((1, 3, 32, 100), (8, 3, 40, 33), (1, 3, 32, 100), (2, 3, 70, 600)):
        assert error_at(wide, fast, *shape) < tolerance


@needs_bfloat16
def test_strips_in_bfloat16(in_strips, small):
    fast = fcvgg.optimize(small, dtype=torch.bfloat16)
    batch = images(2, 3, 61, 45, dtype=torch.float32)
    assert relative_error(fast.network(batch.bfloat16()).float(), fast(batch)) < 1e-2
    assert relative_error(small(batch), fast(batch)) < BFLOAT16


def test_batch_norm_and_relu_are_folded(small):
    fast = fcvgg.optimize(small)
    kinds = [type(m).__name__ for m in fast.network.modules()]
    assert not {"BatchNorm2d", "ReLU", "Dropout", "Identity"} & set(kinds)
    assert fast.optimization.layers == 5


def test_the_api_and_the_plain_network_stay(small, tmp_path):
    state = {name: value.clone() for name, value in small.state_dict().items()}
    fast = fcvgg.optimize(small)
    assert isinstance(fast, fcvgg.FullyConvolutional)
    assert fast.geometry == small.geometry
    assert fast.output_size(50) == small.output_size(50)
    batch = images(1, 3, 44, 44, dtype=torch.float32)
    assert torch.allclose(fast.classify(batch), small.classify(batch), atol=1e-5)
    assert fast.score_map(batch).scores.shape == small.score_map(batch).scores.shape
    assert fast.heatmap(batch, 1).values.shape == (44, 44)
    assert list(fast.state_dict()) == list(state)
    assert all(torch.equal(small.state_dict()[name], value) for name, value in state.items())
    assert fcvgg.load(fast.save(tmp_path / "bundle"))(batch).shape == fast(batch).shape


def test_small_images_are_padded_as_before(small):
    assert error_at(small, fcvgg.optimize(small), 1, 3, 20, 33) < REORDERED


@needs_packing
def test_an_optimised_network_streams(small):
    fast = fcvgg.optimize(small)
    image = images(3, 90, 52, dtype=torch.float32)
    expected = small(image[None])[0]
    got = fcvgg.stream(fast, image, memory="64MiB")
    assert relative_error(expected, got.scores) < REORDERED


@needs_bfloat16
def test_a_network_in_bfloat16_streams(small):
    fast = fcvgg.optimize(small, dtype=torch.bfloat16)
    image = images(3, 90, 52, dtype=torch.float32)
    expected = fast(image[None])[0]
    got = fcvgg.stream(fast, image, memory="64MiB").scores
    assert got.dtype == torch.float32
    assert relative_error(expected, got) < 2e-2


def test_a_network_of_an_engine_does_not_stream(small):
    fast = fcvgg.optimize(small, engine="onnxruntime")
    with pytest.raises(
        ArgumentError, match="which runs whole images only; stream the plain network"
    ):
        fcvgg.stream(fast, images(3, 90, 52, dtype=torch.float32))


def test_a_dtype_wider_than_the_networks(small):
    with pytest.raises(ArgumentError, match=r"must not be wider than the network's torch.float32"):
        fcvgg.optimize(small, dtype=torch.float64)


def test_whole_numbers_are_no_images_for_an_optimised_network(small):
    fast = fcvgg.optimize(small)
    with pytest.raises(ImageError, match=r"images must be of torch.float32, got torch.uint8"):
        fast(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))


def test_a_copy_shares_packed_weights_and_no_hooks(small):
    fast = fcvgg.optimize(small)
    twin = copy.deepcopy(fast)
    layers = [[m for m in net.modules() if isinstance(m, fused.Packed)] for net in (fast, twin)]
    for mine, other in zip(*layers):
        assert mine is not other
        assert mine._packed is other._packed
        assert mine._forward_hooks is not other._forward_hooks


def test_strips_that_lie_in_the_padding_alone(in_strips):
    model = nn.Sequential(nn.Conv2d(2, 3, 1, padding=2), nn.MaxPool2d(2))
    model.extend([nn.Flatten(), nn.Linear(3 * 4 * 4, 2)])
    net = fcvgg.convert(seeded(lambda: model), input_size=4, verify=False)
    x = images(1, 2, 9, 9)
    assert relative_error(net.network(x), net(x)) < 1e-12


def test_copies_and_pickles(small):
    fast = fcvgg.optimize(small)
    batch = images(1, 3, 40, 40, dtype=torch.float32)
    expected = fast(batch)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(twin(batch), expected)


def test_a_layer_of_an_optimised_network_can_be_watched(in_strips, small):
    fast = fcvgg.optimize(small)
    batch = images(1, 3, 40, 40, dtype=torch.float32)
    expected = fast(batch)
    seen = []
    layer = next(m for m in fast.network.modules() if isinstance(m, fused.FusedConv2d))
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out.shape[2:]))
    assert relative_error(expected, fast(batch)) < REORDERED
    handle.remove()
    assert seen == [(40, 40)]


def test_very_bright_pixels_are_finite(small):
    fast = fcvgg.optimize(small)
    batch = torch.full((1, 3, 32, 32), 1e36)
    assert batch.sum().isinf()
    assert fast(batch).isfinite().all() == small(batch).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("model", [SmallVGG, Unpadded])
def test_pixels_that_are_not_finite_show_where_they_are_seen(model, value):
    net = fcvgg.convert(seeded(model, dtype=torch.float32))
    height, width = net.geometry.window
    batch = images(2, 3, height + 40, width + 52, dtype=torch.float32)
    batch[1, 0, 7, height + 11] = value
    got = fcvgg.optimize(net)(batch)
    assert got[0].isfinite().all()
    rows, cols = net.output_size(batch.shape[2:])
    for row in range(rows):
        for col in range(cols):
            top, left, bottom, right = net.geometry.receptive_field_of(row, col)
            sees = top <= 7 < bottom and left <= height + 11 < right
            assert bool(got[1, :, row, col].isnan().all()) == sees
            assert bool(got[1, :, row, col].isfinite().all()) != sees


def test_releasing_the_plain_network(small):
    fast = fcvgg.optimize(small)
    fast.release()
    assert fast(torch.zeros(1, 3, 32, 32)).shape == (1, 5, 1, 1)
    with pytest.raises(FcvggError, match="the plain network was released; keep the one"):
        fast.state_dict()


def test_it_only_evaluates(small):
    fast = fcvgg.optimize(small)
    assert not fast.training
    assert fast.eval() is fast
    assert fast.to("cpu") is fast
    with pytest.raises(FcvggError, match=r"only evaluates; train the plain network \(net.plain\)"):
        fast.train()
    with pytest.raises(FcvggError, match="move or cast the plain network"):
        fast.double()
    with pytest.raises(FcvggError, match="load into the plain network"):
        fast.load_state_dict({})


def test_a_block_that_was_left_training_evaluates(small):
    small.train()
    fast = fcvgg.optimize(small)
    assert small.training
    small.eval()
    assert error_at(small, fast, 1, 3, 40, 40) < REORDERED


# -- every path on every kind of input, against the plain network in float64 -----------------------


PATHS = {
    "channels last": (lambda net: net, REORDERED),
    "packed, fused, Winograd": (lambda net: fcvgg.optimize(net), WINOGRAD),
    "packed for a size": (lambda net: fcvgg.optimize(net, size=44), WINOGRAD),
    "bfloat16": (lambda net: fcvgg.optimize(net, dtype=torch.bfloat16), BFLOAT16),
    "bfloat16 for a size": (
        lambda net: fcvgg.optimize(net, dtype=torch.bfloat16, size=61),
        BFLOAT16,
    ),
    "onnxruntime": (lambda net: fcvgg.optimize(net, engine="onnxruntime"), REORDERED),
    "openvino": (lambda net: fcvgg.optimize(net, engine="openvino"), REORDERED),
}

CASES = {
    "native size": ({}, (1, 32, 32)),
    "odd size": ({}, (1, 61, 45)),
    "batch of 8": ({}, (8, 50, 40)),
    "below the window": ({}, (2, 20, 33)),
    "output stride": ({"output_stride": 1}, (1, 41, 50)),
    "padding same": ({"padding": "same"}, (1, 48, 37)),
}


@pytest.fixture(scope="module")
def paths():
    """Networks of each path, made once for each way to convert."""
    made = {}

    def get(path, options):
        key = (path, *options.items())
        if key not in made:
            model = seeded(SmallVGG, bn=True, dtype=torch.float32)
            net = fcvgg.convert(model, input_size=32, **options)
            made[key] = PATHS[path][0](net) if path else net.double()
        return made[key]

    return get


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_equals_the_network_in_float64(paths, path, case):
    if "bfloat16" in path and not optimization.has_bfloat16():
        pytest.skip("the processor has no bfloat16")
    for package in {"onnx": ("onnxscript", "onnxruntime"), "open": ("onnxscript", "openvino")}.get(
        path[:4], ()
    ):
        pytest.importorskip(package)
    options, (count, height, width) = CASES[case]
    batch = images(count, 3, height, width, dtype=torch.float32)
    expected = paths(None, options)(batch.double())
    fast = paths(path, options)
    assert relative_error(expected, fast(batch).double()) < PATHS[path][1]
    assert fast.equivalence is None or fast.equivalence.passed


@needs_bfloat16
def test_openvino_in_bfloat16():
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    model, size = MODELS["narrow VGG-16 with batch norm"]
    net = fcvgg.convert(seeded(model, dtype=torch.float32), input_size=size)
    fast = fcvgg.optimize(net, engine="openvino", dtype=torch.bfloat16)
    assert 1e-5 < error_at(net, fast, 1, 3, size + 33, size + 31) < BFLOAT16


@pytest.mark.parametrize(("engine", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_an_engine_that_is_absent_is_named(monkeypatch, small, engine, extra):
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(MissingExtraError, match=rf"'{engine}'.* pip install 'fcvgg\[{extra}\]'"):
        fcvgg.optimize(small, engine=engine)


def test_a_network_that_differs_is_refused(monkeypatch, small):
    monkeypatch.setattr(fused.FusedConv2d, "forward", lambda self, x: self.convolved(x, (1, 1)) * 2)
    monkeypatch.setattr(blocks, "_blocks", lambda network: [])
    with pytest.raises(EquivalenceError, match=r"differs from the plain one by .* more than 1e-04"):
        fcvgg.optimize(small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"engine": "tensorrt"},
            "engine must be None, 'torch', 'onnxruntime' or 'openvino', got 'tensorrt'",
        ),
        (
            {"dtype": torch.int16},
            "dtype must be torch.float64, .* torch.bfloat16 or torch.int8, got torch.int16",
        ),
        ({"dtype": torch.float16}, "must not be torch.float16 on a CPU, .* use torch.bfloat16, or"),
    ],
)
def test_options_are_checked(small, options, message):
    with pytest.raises(ArgumentError, match=message):
        fcvgg.optimize(small, **options)


def test_bfloat16_is_refused_where_the_processor_lacks_it(monkeypatch, small):
    monkeypatch.setattr(optimization, "has_bfloat16", lambda: False)
    with pytest.raises(ArgumentError, match=r"must not be torch.bfloat16 on this processor"):
        fcvgg.optimize(small, dtype=torch.bfloat16)


def test_what_is_not_a_converted_network_is_refused(small):
    with pytest.raises(ArgumentError, match=r"got Linear; pass fcvgg.convert\(model\)"):
        fcvgg.optimize(nn.Linear(1, 1))
    with pytest.raises(ArgumentError, match="optimised already; pass the one it was made from"):
        fcvgg.optimize(fcvgg.optimize(small))


# -- CUDA ------------------------------------------------------------------------------------------


def test_a_network_on_the_meta_device_gives_the_shapes_of_a_gpu():
    """What a GPU would run: plain fused layers with the channels last."""
    net = fcvgg.convert(seeded(SmallVGG, bn=True, dtype=torch.float32), input_size=32)
    network = fusion.fused(net.network, torch.float16, fused.FusedConv2d, fused.FusedWindowLinear)
    batch = torch.zeros(2, 3, 60, 44, dtype=torch.float16, device="meta")
    batch = batch.contiguous(memory_format=torch.channels_last)
    scores = network.to("meta")(batch)
    assert scores.shape == (2, 5, *net.output_size((60, 44)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_runs_every_size():
    net = fcvgg.convert(seeded(SmallVGG, bn=True, dtype=torch.float32).cuda(), input_size=32)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float16, 2e-2)):
        fast = fcvgg.optimize(net, dtype=dtype)
        for size in (32, 50, 32):
            batch = images(2, 3, size, size, dtype=torch.float32).cuda()
            assert relative_error(net(batch), fast(batch)) < tolerance
