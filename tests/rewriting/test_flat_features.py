"""Layers on the flattened features, before the first fully connected one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from nets import (
    Headed,
    Lambda,
    assert_restored,
    images,
    native_error,
    relative_error,
    seeded,
    sliding_window,
)
from torch import Tensor, nn

import fcvgg

ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels, rows, columns": lambda x: x.flatten(1),
    "columns, rows, channels": lambda x: x.permute(0, 3, 2, 1).flatten(1),
    "stacked slices": lambda x: torch.cat([x[:, 4:], x[:, :4]], 1).flatten(1),
}

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(288),
    "batch norm without parameters": lambda: nn.BatchNorm1d(288, affine=False),
    "layer norm": lambda: nn.LayerNorm(288),
    "batch norm, activation and dropout": lambda: nn.Sequential(
        nn.BatchNorm1d(288), nn.LeakyReLU(0.2), nn.Dropout(0.0)
    ),
}


def flat(norm: nn.Module, flatten: Callable[[Tensor], Tensor] = ORDERS["channels, rows, columns"]):
    """A net of native size 24 without padding whose features are normalised after flattening."""
    head = Lambda(lambda x, norm, fc: fc(norm(flatten(x))), norm, nn.Linear(288, 4))
    return Headed(head, pads=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_cell_is_the_model_on_its_window(norm: str, order: str) -> None:
    model = seeded(lambda: flat(NORMS[norm](), ORDERS[order]))
    net = fcvgg.convert(model)
    assert net.input_size == (30, 30)
    assert native_error(model, net) <= 1e-12
    batch = images(2, 3, 43, 38)
    assert relative_error(sliding_window(model, net, batch), net(batch)) <= 1e-12
    assert list(net.state_dict()) == list(model.state_dict())


def test_as_functions() -> None:
    def head(x: Tensor, norm: nn.BatchNorm1d, fc: nn.Linear) -> Tensor:
        x = F.batch_norm(x.flatten(1), norm.running_mean, norm.running_var, norm.weight)
        return fc(F.layer_norm(x, (288,)))

    model = seeded(lambda: Headed(Lambda(head, nn.BatchNorm1d(288), nn.Linear(288, 4)), pads=0))
    net = fcvgg.convert(model)
    batch = images(1, 3, 40, 40)
    assert relative_error(sliding_window(model, net, batch), net(batch)) <= 1e-12


def test_it_trains_as_the_model_does() -> None:
    model = seeded(lambda: flat(NORMS["batch norm"]()))
    net = fcvgg.convert(model, copy=True)
    batch = images(5, 3, 30, 30)
    for module in (model, net):
        module.train()
        module(batch).square().sum().backward()
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(net.state_dict()[name], buffer, rtol=1e-12, atol=1e-12)
    own = dict(net.network.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = own[name].grad.reshape(parameter.shape)
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-10)


def test_denser_and_padded_maps() -> None:
    model = seeded(lambda: flat(NORMS["batch norm"]()))
    dense = fcvgg.convert(model, output_stride=2)
    batch = images(1, 3, 36, 35)
    assert relative_error(sliding_window(model, dense, batch), dense(batch)) <= 1e-12
    same = fcvgg.convert(model, padding="same")
    row, col = same.native_cell
    native = batch[..., :30, :30]
    assert relative_error(model(native), same(native)[:, :, row, col]) <= 1e-12


def test_it_is_saved_streamed_and_exported(tmp_path: Path) -> None:
    model = seeded(lambda: flat(NORMS["batch norm"]()), dtype=torch.float32)
    net = fcvgg.convert(model)
    batch = images(1, 3, 61, 45, dtype=torch.float32)
    expected = net(batch).detach()
    assert_restored(net, fcvgg.load(net.save(tmp_path / "flat")), batch)
    streamed = fcvgg.stream(net, batch[0].numpy(), memory="32MiB").scores
    torch.testing.assert_close(torch.as_tensor(streamed), expected[0], rtol=1e-5, atol=1e-5)
    session = onnxruntime.InferenceSession(net.export(tmp_path / "flat.onnx"))
    (scores,) = session.run(None, {"images": batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-5)
    table = fcvgg.receptive_fields(net)
    assert table["head.layers.0"].kernel == (6, 6)


MAXIMA: dict[str, Callable[[Tensor], Tensor]] = {
    "columns, then rows": lambda x: x.max(3)[0].max(2)[0],
    "values by name": lambda x: x.max(dim=-1).values.max(dim=-1, keepdim=True).values.flatten(1),
    "function over positions": lambda x: torch.max(x.flatten(2), 2)[0],
    "changed in place": lambda x: x.max(3).values.tanh_().max(2).values,
    "of two maps": lambda x: torch.max(x, -0.3 * x).amax((2, 3)),
}


def unpacked(x: Tensor) -> Tensor:
    values, _ = x.flatten(2).max(-1)
    return values


@pytest.mark.parametrize("pool", [*MAXIMA.values(), unpacked], ids=[*MAXIMA, "unpacked"])
def test_global_maxima_by_tensor_max(pool: Callable[[Tensor], Tensor]) -> None:
    head = Lambda(lambda x, fc: fc(pool(x)), nn.Linear(8, 4))
    model = seeded(lambda: Headed(head, pads=0))
    net = fcvgg.convert(model, input_size=22)
    batch = images(2, 3, 30, 27)
    assert relative_error(sliding_window(model, net, batch), net(batch)) <= 1e-12
