"""Layers that enlarge or shrink a map by whole factors: exact at strides of the coarser map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import EXACT, images, native_error, relative_error, seeded, sliding_window
from torch import Tensor, nn

import fcvgg

NATIVE = 18
LIMIT = 10 * EXACT[torch.float64]


class TwoScales(nn.Module):
    """A map of stride 1, joined with an enlarged one of stride 2: 4 x 16 x 16 positions of each."""

    def __init__(
        self, enlarge: Callable[[nn.Module, Tensor, Tensor], Tensor], stride: int, padding: int
    ) -> None:
        super().__init__()
        self.enlarge = enlarge
        self.fine = nn.Conv2d(3, 4, 3, padding=padding)
        self.coarse = nn.Conv2d(4, 4, 1)
        self.transposed = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.wide = nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, groups=2)
        self.uneven = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)
        self.grown = nn.Conv2d(4, 16, 1)
        self.last = nn.Conv2d(4, 6, 3, stride=stride, padding=padding)
        self.fc = nn.Linear(self.last(torch.zeros(1, 4, 16 + 2 * padding, 16)).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x).relu()
        enlarged = self.enlarge(self, self.coarse(F.max_pool2d(fine, 2)).relu(), fine)
        return self.fc(self.last(fine + enlarged).relu().flatten(1))


ENLARGING: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "nearest": (lambda m, x, fine: F.interpolate(x, scale_factor=2), True),
    "to the other's size": (lambda m, x, fine: F.interpolate(x, fine.shape[-2:]), True),
    "nn.Upsample": (lambda m, x, fine: nn.Upsample(scale_factor=(2, 2))(x), True),
    "bilinear": (lambda m, x, fine: F.interpolate(x, scale_factor=2, mode="bilinear"), False),
    "bicubic": (lambda m, x, fine: F.interpolate(x, scale_factor=2, mode="bicubic"), False),
    "transposed": (lambda m, x, fine: m.transposed(x), True),
    "transposed, wide": (lambda m, x, fine: m.wide(x), False),
    "transposed, uneven": (lambda m, x, fine: m.uneven(x), False),
    "pixel shuffle": (lambda m, x, fine: F.pixel_shuffle(m.grown(x), 2), True),
}
"""How the coarser map is enlarged, and whether nothing at its border is made up."""


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("name", ENLARGING)
def test_enlarged_maps(name: str, stride: int, padding: int) -> None:
    enlarge, plain = ENLARGING[name]
    model = seeded(TwoScales, enlarge, stride, padding)
    if padding:
        with torch.no_grad():
            features = model.last(torch.zeros(1, 4, NATIVE, NATIVE, dtype=torch.float64)).numel()
        model.fc = nn.Linear(features, 3, dtype=torch.float64)
    net = fcvgg.convert(model, input_size=NATIVE)
    assert net.geometry.stride == (2, 2)
    assert native_error(model, net) <= LIMIT
    assert net.equivalence is not None
    assert net.equivalence.translation_error <= LIMIT
    batch = images(2, 3, 29, 32)  # the coarser map leaves out a row of the finer one
    with torch.no_grad():
        got = net(batch)
        if plain and not padding and stride == 2:
            assert relative_error(sliding_window(model, net, batch), got) <= LIMIT
        else:
            assert _error_of_interior_cells(net, batch, got) <= LIMIT
    streamed = fcvgg.stream(net, batch[:1], rows=(1, got.shape[2]), memory="26MiB").scores
    torch.testing.assert_close(streamed, got[0, :, 1:], rtol=1e-12, atol=1e-12)


def _error_of_interior_cells(net: fcvgg.FullyConvolutional, batch: Tensor, got: Tensor) -> float:
    """Each cell that sees no padding, against the network on an image that begins elsewhere."""
    larger = F.pad(batch, (4, 7, 6, 3), value=0.3)  # by strides before the image
    moved = net(larger)[:, :, 3:, 2:][:, :, : got.shape[2], : got.shape[3]]
    inside = torch.from_numpy(~net.geometry.touches_padding(batch.shape[2:]))
    inside = inside & torch.ones(got.shape[2:], dtype=torch.bool)
    return relative_error(moved[..., inside], got[..., inside]) if inside.any() else 0.0


def test_the_cell_sees_what_the_gradient_says() -> None:
    model = seeded(TwoScales, ENLARGING["bilinear"][0], 2, 0)
    net = fcvgg.convert(model, input_size=NATIVE)
    image = images(1, 3, 60, 60).requires_grad_()
    net(image)[0, :, 8, 8].abs().sum().backward()
    assert image.grad is not None
    seen = image.grad[0].abs().sum(0) > 0
    top, left, bottom, right = net.geometry.receptive_field_of(8, 8)
    rows, cols = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1]) + 1) == (top, bottom)
    assert (int(cols[0]), int(cols[-1]) + 1) == (left, right)


def test_a_larger_output_stride_dilates_and_a_smaller_one_is_refused() -> None:
    def enlarge(m: nn.Module, x: Tensor, fine: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2)

    class Deeper(TwoScales):
        def forward(self, x: Tensor) -> Tensor:
            fine = self.fine(x).relu()
            fine = fine + self.enlarge(self, self.coarse(F.max_pool2d(fine, 2)), fine)
            return self.fc(F.max_pool2d(self.last(fine).relu(), 2).flatten(1))

    model = seeded(Deeper, enlarge, 2, 0)
    model.fc = nn.Linear(96, 3, dtype=torch.float64)
    net = fcvgg.convert(model, input_size=20, output_stride=2)
    batch = images(1, 3, 27, 25)
    with torch.no_grad():
        assert relative_error(sliding_window(model, net, batch), net(batch)) <= LIMIT
    with pytest.raises(
        fcvgg.ConversionError, match=r"output_stride=1 cannot be exact .* stride 2;"
    ):
        fcvgg.convert(model, input_size=20, output_stride=1)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"scale_factor": 0.5}, 2),
        ({"scale_factor": 0.5, "mode": "bilinear"}, 2),
        ({"size": (6, 6), "mode": "bilinear"}, 3),
        ({"size": (6, 6), "mode": "area"}, 3),
        ({"scale_factor": 0.25, "mode": "nearest-exact"}, 4),
        ({"scale_factor": 0.25, "mode": "bilinear", "align_corners": False}, 4),
    ],
)
def test_shrunk_images(settings: dict[str, object], factor: int) -> None:
    class Shrinking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)
            self.fc = nn.Linear(5 * (NATIVE // factor - 2) ** 2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(F.interpolate(x, **settings)).relu().flatten(1))

    model = seeded(Shrinking)
    net = fcvgg.convert(model, input_size=NATIVE)
    batch = images(2, 3, 31, 27)
    assert net.geometry.stride == (factor, factor)
    with torch.no_grad():
        got = net(batch)
        assert relative_error(sliding_window(model, net, batch), got) <= LIMIT
    streamed = fcvgg.stream(net, batch[:1], memory="26MiB").scores
    torch.testing.assert_close(streamed, got[0], rtol=1e-12, atol=1e-12)


def test_bundles_exports_and_missing_pixels(tmp_path: Path) -> None:
    model = seeded(TwoScales, ENLARGING["bilinear"][0], 2, 1)
    model.fc = nn.Linear(486, 3, dtype=torch.float64)
    net = fcvgg.convert(model, input_size=NATIVE)
    batch = images(1, 3, 40, 44)
    loaded = fcvgg.load(net.save(tmp_path / "bundle"))
    torch.testing.assert_close(loaded(batch), net(batch), rtol=0, atol=0)
    assert loaded.geometry == net.geometry
    batch[0, 0, 30, 10] = torch.nan
    whole = net(batch)[0]
    torch.testing.assert_close(fcvgg.stream(net, batch).scores, whole, equal_nan=True)
    missing = whole.isnan().any(0)
    for row, col in missing.nonzero().tolist():
        top, left, bottom, right = net.geometry.receptive_field_of(row, col)
        assert top <= 30 < bottom
        assert left <= 10 < right
    assert 0 < int(missing.sum()) < missing.numel()
