"""Blocks of positions that become channels, however that is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import images, native_error, relative_error, seeded, sliding_window
from torch import Tensor, nn

import fcvgg


class Stem(nn.Module):
    """Channels made of blocks between an unpadded convolution and a fully connected head."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 16):
        super().__init__()
        self.function = function
        self.first = nn.Conv2d(3, 4, 3)
        self.conv = nn.Conv2d(channels, 5, 2)
        self.fc = nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.function(self.first(x)))
        return self.fc(F.max_pool2d(x, 2).flatten(1))


def space_to_depth(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * 4, h // 2, w // 2)


def focus(x: Tensor) -> Tensor:
    parts = x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]
    return torch.cat(parts, 1)


def unfolded(x: Tensor) -> Tensor:
    h, w = x.shape[2] // 2, x.shape[3] // 2
    return F.unfold(x, 2, stride=2).view(len(x), 16, h, w)


WAYS = {
    "pixel unshuffle": (nn.PixelUnshuffle(2), 16),
    "space to depth": (space_to_depth, 16),
    "focus": (focus, 16),
    "unfold": (unfolded, 16),
    "overlapping windows": (
        lambda x: nn.Unfold((3, 2), padding=(1, 0), stride=2)(x).view(len(x), 24, 5, 5),
        24,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_blocks_of_positions_become_channels(way: str, tmp_path: Path) -> None:
    model = seeded(Stem, *WAYS[way])
    net = fcvgg.convert(model, input_size=12)
    assert native_error(model, net) <= 1e-12
    batch = images(2, 3, 21, 18)
    maps = net(batch)
    if way != "overlapping windows":  # which are padded
        assert relative_error(sliding_window(model, net, batch), maps) <= 1e-12
    net.save(tmp_path / "net.fcvgg")
    assert relative_error(maps, fcvgg.load(tmp_path / "net.fcvgg")(batch)) <= 1e-12
    streamed = torch.as_tensor(fcvgg.stream(net, batch[0]).scores)
    torch.testing.assert_close(streamed, maps[0], rtol=1e-12, atol=1e-12)


def test_blocks_at_a_finer_output_stride() -> None:
    model = seeded(Stem, *WAYS["space to depth"])
    net = fcvgg.convert(model, input_size=12)
    fine = fcvgg.convert(model, input_size=12, output_stride=1)
    batch = images(1, 3, 20, 20)
    for row in range(2):
        for col in range(2):
            cells = fine(batch)[:, :, row::4, col::4]
            expected = net(batch[:, :, row:, col:])[:, :, : cells.shape[2], : cells.shape[3]]
            assert relative_error(expected, cells) <= 1e-12


def test_one_block_of_all_positions_is_no_stride() -> None:
    """``(N, C*h*w, 1, 1)`` is how a head flattens: its cells lie as close as the features do."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).reshape(len(x), -1, 1, 1).flatten(1))

    net = fcvgg.convert(seeded(Flat))
    assert net.geometry.stride == (2, 2)


def test_blocks_are_exported(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    net = fcvgg.convert(seeded(Stem, *WAYS["focus"]).float(), input_size=12)
    net.export(tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    batch = images(1, 3, 17, 22, dtype=torch.float32)
    (scores,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    np.testing.assert_allclose(scores, net(batch).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_recurrent_layers_over_positions_are_refused() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn, self.fc = nn.Conv2d(3, 4, 3), nn.LSTM(4, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).mean(3).permute(0, 2, 1)
            return self.fc(self.rnn(x)[0].mean(1))

    with pytest.raises(fcvgg.UnsupportedLayerError, match=r"rnn \(LSTM\) is refused: a recurrent"):
        fcvgg.convert(seeded(Rows), input_size=12)
