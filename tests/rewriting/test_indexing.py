"""Channels and classes chosen by a constant index: as in the source, streamed, saved, exported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import images, relative_error, sliding_window
from torch import Tensor, nn

import fcvgg

ORDER = [2, 0, 1, 1]
MASK = [True, False, True, True, False, True]


class Indexed(nn.Module):
    """An unpadded net, 12 pixels, whose features or scores pass through an index."""

    def __init__(self, features: Callable | None = None, scores: Callable | None = None):
        super().__init__()
        self.features, self.scores = features, scores
        self.conv = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.register_buffer("order", torch.tensor(ORDER))
        self.register_buffer("mask", torch.tensor(MASK))
        channels = 6 if features is None else features(self, torch.zeros(1, 6, 5, 5)).shape[1]
        self.fc = nn.Linear(channels * 25, 6)

    def forward(self, x: Tensor) -> Tensor:
        f = self.conv(x)
        f = f if self.features is None else self.features(self, f)
        z = self.fc(f.flatten(1))
        return z if self.scores is None else self.scores(self, z)


INDICES = {
    "buffer": lambda s, v: v[:, s.order],
    "mask": lambda s, v: v[:, s.mask],
    "list": lambda s, v: v[:, [2, 0]],
    "mask written out": lambda s, v: v[:, MASK],
    "tensor": lambda s, v: v[:, torch.tensor([5, 1, 1])],
    "ellipsis": lambda s, v: v[:, [0, 3], ...],
    "negative": lambda s, v: v[:, [-1, -2]],
    "slice": lambda s, v: v[:, 1:5:2],
    "index_select": lambda s, v: torch.index_select(v, 1, s.order),
    "method": lambda s, v: v.index_select(1, s.order),
    "flip": lambda s, v: v.flip(1),
    "twice": lambda s, v: v[:, s.order][:, [3, 0]],
}


def converted(**where: Callable) -> tuple[nn.Module, fcvgg.FullyConvolutional]:
    torch.manual_seed(0)
    model = Indexed(**where).double().eval()
    return model, fcvgg.convert(model, input_size=12)


def windows_of(model: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
    """The source on every window, ``(N, K, h, w)``: the oracle."""
    rows = [
        torch.stack(
            [model(images[:, :, 2 * i : 2 * i + 12, 2 * j : 2 * j + 12]) for j in range(size[1])],
            -1,
        )
        for i in range(size[0])
    ]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("place", ["features", "scores"])
@pytest.mark.parametrize("name", INDICES)
def test_a_cell_is_the_source_on_its_window(name: str, place: str) -> None:
    model, net = converted(**{place: INDICES[name]})
    images = torch.randn(2, 3, 18, 20, dtype=torch.float64)
    with torch.no_grad():
        maps = net(images)
        expected = windows_of(model, images, net.output_size((18, 20)))
    torch.testing.assert_close(maps, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", INDICES)
def test_indexed_maps_are_streamed_and_saved(name: str, tmp_path, monkeypatch) -> None:
    _, net = converted(features=INDICES[name], scores=INDICES["flip"])
    image = torch.randn(3, 61, 44, dtype=torch.float64)
    with torch.no_grad():
        whole = net(image[None])[0]
    monkeypatch.setattr("fcvgg.streaming.strip_plan._STRIP_BYTES", 1)  # a row at a time
    streamed = fcvgg.stream(net, image).scores
    torch.testing.assert_close(streamed, whole, rtol=1e-12, atol=1e-12)
    again = fcvgg.load(net.save(tmp_path / "bundle"))
    with torch.no_grad():
        torch.testing.assert_close(again(image[None])[0], whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["buffer", "mask", "list", "flip"])
def test_indexed_maps_are_exported(name: str, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = Indexed(features=INDICES[name], scores=INDICES[name]).eval()
    written = fcvgg.convert(model, input_size=12).export(tmp_path / "net.onnx")
    assert written.check.startswith("checked at ")


@pytest.mark.parametrize(
    "index",
    [lambda s, v: v[[0, 0]], lambda s, v: v[:, v.argmax(1)]],
    ids=["images", "values"],
)
def test_what_is_not_a_choice_of_channels_is_refused(index: Callable) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2))
    model.add_module("index", Chosen(index))
    model.add_module("flat", nn.Flatten())
    model.add_module("fc", nn.LazyLinear(2))
    try:
        model(torch.zeros(2, 3, 12, 12))
    except RuntimeError:
        pytest.fail("the source itself must run")
    with pytest.raises(fcvgg.FcvggError) as caught:
        fcvgg.convert(model.eval(), input_size=12)
    assert "\n" not in str(caught.value)


def test_rows_of_the_window_before_a_fully_connected_layer_are_its_only_inputs() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2))
    model = nn.Sequential(*trunk, Chosen(lambda s, v: v[:, :, [0, 1]]), nn.Flatten())
    model.append(nn.Linear(6 * 2 * 5, 2))
    net = fcvgg.convert(model.double().eval(), input_size=12)
    batch = images(2, 3, 15, 17)
    assert relative_error(net(batch).detach(), sliding_window(model, net, batch)) <= 1e-12


class Chosen(nn.Module):
    def __init__(self, index: Callable):
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self.index(self, x)
