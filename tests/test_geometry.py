"""Geometry against brute force (windows slid one by one) and against gradients of real nets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fcvgg
from fcvgg.geometry import IMAGE, Axis, Geometry, KernelGeometry, Step, checked_size

# -- brute force ----------------------------------------------------------------------------------


def slid(window: KernelGeometry, size: int) -> list[range]:
    """The input positions that each output of a window reads, padding included, by torch's rule."""
    free = size + window.before + window.after - window.span
    starts, start = [], 0
    while start <= free or (window.ceil_mode and start < free + window.stride):
        if window.ceil_mode and start and start >= size + window.before:
            break
        starts.append(start - window.before)
        start += window.stride
    return [range(s, s + window.span, window.dilation) for s in starts]


def simulated(axis: Axis, size: int, padding: tuple[int, int] = (0, 0)) -> list[tuple[set, bool]]:
    """What each cell reads of an image of `size`: its pixels, and whether it reads any padding."""
    before, after = padding
    image = [({i}, not 0 <= i < size) for i in range(-before, size + after)]
    computed: list[list[tuple[set, bool]]] = []
    for step in axis.steps:
        branches = [image if i == IMAGE else computed[i] for i in step.inputs]
        outputs = []
        extent = min(map(len, branches))
        for positions in slid(step.window, extent) if extent else []:
            read = [branch[p] for branch in branches for p in positions if 0 <= p < len(branch)]
            pixels = set().union(*(pixels for pixels, _ in read))
            outside = any(p < 0 or p >= len(branches[0]) for p in positions)
            outputs.append((pixels, outside or any(touched for _, touched in read)))
        computed.append(outputs)
    return computed[-1]


def windows(ceil: bool = True) -> st.SearchStrategy[KernelGeometry]:
    @st.composite
    def draw_window(draw: st.DrawFn) -> KernelGeometry:
        kernel, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 2))
        span = (kernel - 1) * dilation + 1
        padding = draw(st.integers(0, span // 2))
        return KernelGeometry(
            kernel=kernel,
            stride=draw(st.integers(1, 3)),
            dilation=dilation,
            before=padding,
            after=draw(st.sampled_from([padding, 0])),
            ceil_mode=ceil and draw(st.booleans()),
        )

    return draw_window()


def chain(*windows: KernelGeometry) -> Axis:
    return Axis(tuple(Step(window, (i - 1,)) for i, window in enumerate(windows)))


chains = st.lists(windows(), min_size=1, max_size=4).map(lambda ws: chain(*ws))


# -- one axis -------------------------------------------------------------------------------------


@given(windows(), st.integers(1, 30))
def test_output_size_is_torchs(window: KernelGeometry, size: int) -> None:
    assume(window.before == window.after)
    assume(window.ceil_mode or size + 2 * window.before >= window.span)
    image = torch.zeros(1, 1, size)
    if window.before > window.kernel // 2 or not window.ceil_mode:
        assume(not window.ceil_mode)
        kernel = torch.zeros(1, 1, window.kernel)
        expected = F.conv1d(image, kernel, None, window.stride, window.before, window.dilation)
    else:
        try:
            expected = F.max_pool1d(
                image, window.kernel, window.stride, window.before, window.dilation, ceil_mode=True
            )
        except RuntimeError:  # torch refuses an empty result
            assert window.output_size(size) == 0
            return
    assert window.output_size(size) == expected.shape[-1] == len(slid(window, size))


@given(chains, st.integers(1, 60))
def test_cells_are_those_of_windows_slid_one_by_one(axis: Axis, size: int) -> None:
    assert axis.cells(size) == len(simulated(axis, size))


@given(chains)
def test_output_size_never_falls_as_the_image_grows(axis: Axis) -> None:
    sizes = [axis.cells(size) for size in range(1, 80)]
    assert sizes == sorted(sizes)


@given(chains, st.integers(1, 6))
def test_smallest_input_is_the_first_size_with_that_many_cells(axis: Axis, cells: int) -> None:
    size = axis.smallest_input(cells)
    assert axis.cells(size) >= cells
    assert size == 1 or axis.cells(size - 1) < cells
    assert axis.window == axis.smallest_input(1)


@given(chains, st.integers(1, 60))
def test_a_cell_reads_what_its_receptive_field_says(axis: Axis, size: int) -> None:
    for cell, (pixels, touched) in enumerate(simulated(axis, size)):
        start, end = axis.span_of(cell)
        assert all(start <= pixel < end for pixel in pixels)
        if not touched:
            assert (min(pixels), max(pixels) + 1) == (start, end)


@given(chains, st.integers(1, 60))
def test_touches_padding_at_any_size(axis: Axis, size: int) -> None:
    expected = [touched for _, touched in simulated(axis, size, axis.padding_for(size))]
    assert axis.touches_padding(size).tolist() == expected


@given(chains, st.integers(0, 50), st.integers(-40, 0))
def test_the_cell_at_a_centre_is_the_cell(axis: Axis, cell: int, origin: int) -> None:
    axis = Axis(axis.steps, origin)
    assert axis.cell_at(axis.centre_of(cell)) == cell
    assert axis.cell_at(axis.centre_of(cell) + 0.49 * axis.stride) == cell
    assert axis.cell_at(axis.centre_of(0) - 10 * axis.stride) == 0


@given(chains, st.integers(0, 20))
def test_centre_window_and_field_move_by_one_stride_per_cell(axis: Axis, cell: int) -> None:
    assert axis.centre_of(cell + 1) - axis.centre_of(cell) == axis.stride
    for span in (axis.window_of, axis.span_of):
        assert span(cell + 1) == tuple(edge + axis.stride for edge in span(cell))
    start, end = axis.span_of(cell)
    assert axis.centre_of(cell) == (start + end - 1) / 2
    assert end - start == axis.receptive_field


@given(chains, st.integers(1, 60))
def test_an_image_below_the_window_is_centred_in_it(axis: Axis, size: int) -> None:
    before, after = axis.padding_for(size)
    placed = axis.placed(size)
    assert 0 <= after - before <= 1 or size >= axis.window
    assert size + before + after == max(size, axis.window)
    assert axis.output_size(size) == axis.cells(size + before + after) >= 1
    assert placed.centre_of(0) == axis.centre_of(0) - before
    assert placed.offset == axis.offset - before
    if size >= axis.window:
        assert placed == axis


def test_branches_join_to_the_union_of_their_fields() -> None:
    wide, narrow = (
        KernelGeometry(kernel=3, stride=2, before=1, after=1),
        KernelGeometry(kernel=1, stride=2),
    )
    steps = (
        Step(wide, (IMAGE,)),
        Step(KernelGeometry(3, before=1, after=1), (0,)),
        Step(narrow, (IMAGE,)),
    )
    axis = Axis((*steps, Step(KernelGeometry(), (1, 2))))  # a residual block that halves its input
    assert axis.upto(0).agree(axis.upto(2))
    assert (axis.stride, axis.receptive_field, axis.offset) == (2, 7, -3)
    for size in range(1, 20):
        assert axis.cells(size) == len(simulated(axis, size)) == (size + 1) // 2
        expected = [touched for _, touched in simulated(axis, size, axis.padding_for(size))]
        assert axis.touches_padding(size).tolist() == expected


def test_branches_that_differ_at_some_size_do_not_agree() -> None:
    floor, ceil = KernelGeometry(2, 2), KernelGeometry(2, 2, ceil_mode=True)
    assert chain(floor).sizes(8) == chain(ceil).sizes(8)
    assert not chain(floor).agree(chain(ceil))
    assert not chain(floor).agree(chain(KernelGeometry(2)))
    assert chain(KernelGeometry(3, before=1, after=1)).agree(chain(KernelGeometry()))


def test_a_kernel_beyond_every_image_is_an_error() -> None:
    with pytest.raises(fcvgg.GeometryError, match=r"no input up to 1048576 pixels gives 1 cell"):
        _ = chain(KernelGeometry(kernel=1 << 21)).window


# -- both axes ------------------------------------------------------------------------------------


@given(chains, chains)
def test_geometry_survives_a_file(height: Axis, width: Axis) -> None:
    geometry = Geometry(Axis(height.steps, -3, 7, 1), width)
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


@settings(max_examples=25)
@given(chains, chains, st.integers(1, 40), st.integers(1, 40))
def test_touches_padding_crosses_the_axes(height: Axis, width: Axis, h: int, w: int) -> None:
    geometry = Geometry(height, width)
    touched = geometry.touches_padding((h, w))
    assert touched.shape == geometry.output_size((h, w))
    rows, cols = height.touches_padding(h), width.touches_padding(w)
    assert all(touched[i, j] == (rows[i] or cols[j]) for i, j in np.ndindex(touched.shape))


def test_results_are_height_first() -> None:
    geometry = Geometry(
        chain(KernelGeometry(3, before=1, after=1), KernelGeometry(2, 2)),
        chain(KernelGeometry(5, 3)),
    )
    assert geometry.window == (2, 5)
    assert geometry.stride == (2, 3)
    assert geometry.receptive_field == (4, 5)
    assert geometry.offset == (-1, 0)
    assert geometry.output_size((10, 20)) == (5, 6)
    assert geometry.output_size(20) == (10, 6)
    assert geometry.receptive_field_of(1, 2) == (1, 6, 5, 11)
    assert geometry.window_of(1, 2) == (2, 6, 4, 11)
    assert geometry.centre_of(1, 2) == (2.5, 8.0)
    assert geometry.cell_at(2.5, 8.0) == (1, 2)
    assert geometry.padding_for((1, 2)) == ((0, 1), (1, 2))


@pytest.mark.parametrize("size", [0, -1, (0, 5), (1, 2, 3), (5,), 3.0, (2.5, 3), True, "ab", None])
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(fcvgg.GeometryError, match="size must be a positive int or"):
        checked_size(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(3, 4), [3, 4], torch.Size([3, 4]), np.array([3, 4])])
def test_sizes_come_in_every_usual_form(size: object) -> None:
    assert checked_size(size) == (3, 4)  # type: ignore[arg-type]
    assert checked_size(np.int64(7)) == (7, 7)  # type: ignore[arg-type]


# -- the numbers of known networks ----------------------------------------------------------------


def geometry_of(name: str, **options: object) -> Geometry:
    """Of a torchvision model without memory for its parameters."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    return fcvgg.convert(model, verify=False, **options).geometry  # type: ignore[arg-type]


def test_vgg16() -> None:
    geometry = geometry_of("vgg16")
    assert geometry.window == (224, 224)
    assert geometry.stride == (32, 32)
    assert geometry.receptive_field == (404, 404)
    assert geometry.offset == (-90, -90)
    assert geometry.output_size(512) == (10, 10)
    assert geometry.centre_of(0, 9) == (111.5, 399.5)
    assert geometry.window_of(1, 2) == (32, 64, 256, 288)
    assert geometry.receptive_field_of(1, 0) == (-58, -90, 346, 314)
    assert [geometry.output_size(n) for n in (1, 223, 224, 255)] == [(1, 1)] * 4
    assert geometry.output_size((256, 1023)) == (2, 25)
    assert not geometry.touches_padding(512)[3:7, 3:7].any()
    assert geometry.touches_padding(512).sum() == 10 * 10 - 4 * 4
    assert str(geometry) == (
        "window 224, stride 32, receptive field 404 from pixel (-90, -90), "
        "first centre (111.5, 111.5)"
    )


def test_vgg16_trained_at_240_has_the_same_cells() -> None:
    geometry = geometry_of("vgg16", input_size=240)
    assert geometry == geometry_of("vgg16")
    assert geometry.output_size(240) == (1, 1)


def test_vgg16_padded_to_keep_its_size() -> None:
    geometry = geometry_of("vgg16", padding="same")
    assert geometry.output_size(512) == (16, 16)
    assert geometry.centre_of(3, 3) == (111.5, 111.5)
    assert geometry.window_of(3, 3) == (0, 0, 224, 224)


def test_vgg16_at_a_finer_stride() -> None:
    geometry = geometry_of("vgg16", output_stride=8)
    assert geometry.stride == (8, 8)
    assert geometry.receptive_field == (404, 404)
    assert geometry.centre_of(0, 4) == (111.5, 143.5)


@pytest.mark.parametrize(
    ("name", "field_before_pool"), [("resnet18", 435), ("resnet34", 899), ("resnet50", 427)]
)
def test_resnets_sample_off_centre(name: str, field_before_pool: int) -> None:
    geometry = geometry_of(name, input_size=224)
    assert geometry.stride == (32, 32)
    assert geometry.receptive_field == (field_before_pool + 6 * 32,) * 2
    assert [geometry.centre_of(i, i) for i in range(3)] == [(32 * i + 96,) * 2 for i in range(3)]
    assert geometry.output_size(224) == (1, 1)
    assert geometry.output_size((256, 512)) == (2, 10)


def test_alexnet_at_its_last_pool() -> None:
    with torch.device("meta"):
        model = torchvision.models.alexnet()
    table = fcvgg.receptive_fields(model)
    assert table["features.12"].receptive_field == (195, 195)
    assert table["features.12"].output_stride == (32, 32)


# -- receptive fields measured by gradient --------------------------------------------------------


class Residual(nn.Module):
    """Two branches of unequal reach, added, then concatenated with their input."""

    def __init__(self, stride: int):
        super().__init__()
        self.long = nn.Sequential(
            nn.Conv2d(2, 2, 3, stride, 1), nn.Conv2d(2, 2, 5, padding=4, dilation=2)
        )
        self.short = nn.Conv2d(2, 2, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.long(x) + self.short(x), self.short(x)], 1)


LAYERS = st.sampled_from(
    [
        lambda: nn.Conv2d(2, 2, 3, padding=1),
        lambda: nn.Conv2d(2, 2, (5, 2), stride=(2, 1), padding=(1, 0)),
        lambda: nn.Conv2d(2, 2, 3, dilation=2),
        lambda: nn.Conv2d(2, 2, 3, padding="same"),
        lambda: nn.AvgPool2d(2),
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        lambda: nn.AvgPool2d(2, ceil_mode=True),
        lambda: nn.Sequential(Residual(2), nn.Conv2d(4, 2, 1)),
        lambda: nn.Sequential(Residual(1), nn.Conv2d(4, 2, 1)),
    ]
)


@settings(max_examples=30)
@given(st.lists(LAYERS, min_size=1, max_size=4), st.booleans(), st.data())
def test_receptive_fields_measured_by_gradient(
    builders: list, global_pool: bool, data: st.DataObject
) -> None:
    """All weights are positive, so no gradient cancels, and the extreme pixels always count."""
    features = nn.Sequential(nn.Conv2d(1, 2, 1), *(build() for build in builders))
    native = (30, 26)
    shape = features(torch.zeros(1, 1, *native)).shape[1:]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1)]
    model = nn.Sequential(
        features, *(head if global_pool else [nn.Flatten(), nn.Linear(shape.numel(), 1)])
    ).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1)
    net = fcvgg.convert(model, input_size=native, verify=False)

    size = data.draw(st.tuples(st.integers(20, 90), st.integers(20, 90)))
    image = torch.rand(1, 1, *size, dtype=torch.float64, requires_grad=True)
    scores = net(image)
    rows, cols = scores.shape[2:]
    assert (rows, cols) == net.output_size(size)
    geometry, touches = net.geometry.placed(size), net.geometry.touches_padding(size)
    for row, col in {(0, 0), (rows // 2, cols // 2), (rows - 1, cols - 1), (rows - 1, 0)}:
        (gradient,) = torch.autograd.grad(scores[0, 0, row, col], image, retain_graph=True)
        ys, xs = gradient[0, 0].nonzero(as_tuple=True)
        measured = (ys.min().item(), xs.min().item(), ys.max().item() + 1, xs.max().item() + 1)
        top, left, bottom, right = geometry.receptive_field_of(row, col)
        if not touches[row, col]:
            assert measured == (top, left, bottom, right)
        assert top <= measured[0] < measured[2] <= bottom
        assert left <= measured[1] < measured[3] <= right
