"""Every idiom converts exactly: the source on every window of an unpadded trunk is the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from einops.layers.torch import Rearrange, Reduce
from idioms import GREY, HEADS, NATIVE, STEMS, IdiomNet, Trunk, flat
from nets import EXACT, images, native_error, relative_error, seeded, sliding_window
from torch import Tensor, nn
from torch.nn.utils import prune

import fcvgg

WINDOWS = (NATIVE + 4, NATIVE + 8)
"""An image of 2 x 3 cells."""


def assert_exact(model: nn.Module, net: fcvgg.FullyConvolutional) -> Tensor:
    """Compare the map with the source on every window; the map ``(N, K, h, w)``."""
    batch = images(2, net.in_channels, *WINDOWS)
    with torch.no_grad():
        windows = sliding_window(lambda x: model(x).reshape(len(x), -1), net, batch)
        got = net(batch)
    assert got.shape[2:] == (2, 3)
    assert relative_error(windows, got) <= 10 * EXACT[torch.float64]
    return got


@pytest.mark.parametrize("name", HEADS)
def test_a_head_converts_streams_and_is_saved(name: str, tmp_path: Path) -> None:
    model = seeded(IdiomNet, HEADS[name])
    net = fcvgg.convert(model, input_size=NATIVE)
    assert native_error_of(model, net) <= 10 * EXACT[torch.float64]
    got = assert_exact(model, net)
    batch = images(2, 3, *WINDOWS)
    loaded = fcvgg.load(net.save(tmp_path / "bundle"))
    torch.testing.assert_close(loaded(batch), got, rtol=1e-11, atol=1e-11)
    streamed = fcvgg.stream(net, batch[:1], rows=(0, 2)).scores
    torch.testing.assert_close(streamed, got[0], rtol=1e-11, atol=1e-11)


def native_error_of(model: nn.Module, net: fcvgg.FullyConvolutional) -> float:
    """Also for scores without a largest class."""
    batch = images(3, net.in_channels, *net.input_size)
    with torch.no_grad():
        return relative_error(model(batch).reshape(3, -1), net(batch).reshape(3, -1))


@pytest.mark.parametrize("name", STEMS)
def test_a_stem_converts(name: str) -> None:
    model = seeded(IdiomNet, lambda m, f: m.fc(flat(f)), STEMS[name])
    assert_exact(model, fcvgg.convert(model, input_size=NATIVE))


@pytest.mark.parametrize("name", GREY)
def test_a_grey_image_as_three_channels(name: str) -> None:
    model = seeded(IdiomNet, lambda m, f: m.fc(flat(f)), GREY[name])
    assert_exact(model, fcvgg.convert(model, input_size=NATIVE, in_channels=1))


def test_colours_to_grey() -> None:
    for stem in (
        lambda m, x: x.mean(1, keepdim=True),
        lambda m, x: (x * x.new_tensor([0.3, 0.6, 0.1]).view(1, 3, 1, 1)).sum(1, keepdim=True),
    ):
        model = seeded(IdiomNet, lambda m, f: m.fc(flat(f)), stem, in_channels=1)
        assert_exact(model, fcvgg.convert(model, input_size=NATIVE, in_channels=3))


def hooked(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A layer whose weight a hook of torch's computes before each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return wrap(nn.Conv2d(8, 8, 1))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Dropout1d": lambda: nn.Sequential(nn.Flatten(2), nn.Dropout1d(0.3), nn.Flatten()),
    "Dropout3d": lambda: nn.Sequential(nn.Dropout3d(0.3), nn.Flatten()),
    "DropBlock2d": lambda: nn.Sequential(torchvision.ops.DropBlock2d(0.1, 3), nn.Flatten()),
    "StochasticDepth": lambda: nn.Sequential(
        torchvision.ops.StochasticDepth(0.1, "row"), nn.Flatten()
    ),
    "LayerNorm of the map": lambda: nn.Sequential(nn.LayerNorm([8, 4, 4]), nn.Flatten()),
    "LayerNorm of the window": lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(128)),
    "RMSNorm of the window": lambda: nn.Sequential(nn.Flatten(), nn.RMSNorm(128)),
    "GLU": lambda: nn.Sequential(nn.Conv2d(8, 16, 1), nn.GLU(1), nn.Flatten()),
    "AvgPool3d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0)), nn.Flatten()
    ),
    "AdaptiveAvgPool1d": lambda: nn.Sequential(
        *(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 128))
    ),
    "Conv1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Flatten()),
    "Rearrange": lambda: nn.Sequential(
        Rearrange("n c h w -> n h w c"), Rearrange("n h w c -> n (w c h)")
    ),
    "Reduce": lambda: nn.Sequential(Reduce("n c h w -> n c", "mean"), nn.Linear(8, 128)),
    "GroupNorm of the window": lambda: nn.Sequential(nn.Flatten(), nn.GroupNorm(4, 128)),
    "GroupNorm of vectors": lambda: nn.Sequential(
        *(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8, 128))
    ),
    "Linear over the positions": lambda: nn.Sequential(
        *(nn.Flatten(2), nn.Linear(16, 16), nn.ReLU(), nn.Flatten())
    ),
    "weight norm by a hook": lambda: nn.Sequential(hooked(nn.utils.weight_norm), nn.Flatten()),
    "spectral norm by a hook": lambda: nn.Sequential(hooked(nn.utils.spectral_norm), nn.Flatten()),
    "pruned": lambda: nn.Sequential(
        hooked(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), nn.Flatten()
    ),
    "compiled": lambda: torch.compile(
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten()), backend="eager"
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_converts(name: str, tmp_path: Path) -> None:
    model = seeded(lambda: IdiomNet(lambda m, f: m.fc(m.layer(f)), layer=LAYERS[name]()))
    net = fcvgg.convert(model, input_size=NATIVE)
    got = assert_exact(model, net)
    assert net.state_dict().keys() == model.state_dict().keys()
    loaded = fcvgg.load(net.save(tmp_path / "bundle"))
    torch.testing.assert_close(loaded(images(2, 3, *WINDOWS)), got, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["weight norm by a hook", "pruned"])
def test_weights_that_a_hook_computes_follow_their_parameters(name: str) -> None:
    model = seeded(lambda: IdiomNet(lambda m, f: m.fc(m.layer(f)), layer=LAYERS[name]()))
    net = fcvgg.convert(model, input_size=NATIVE)
    batch = images(2, 3, NATIVE, NATIVE)
    before = net(batch).detach()
    parameter = next(p for n, p in model.named_parameters() if n.startswith("layer.0.weight_"))
    with torch.no_grad():
        parameter.mul_(1.5)  # shared with the network
    assert not torch.allclose(net(batch), before)
    torch.testing.assert_close(net(batch).flatten(1), model(batch), rtol=1e-11, atol=1e-11)
    net(batch).sum().backward()
    ours = dict(net.named_parameters())
    assert all(
        p.grad is not None for n, p in ours.items() if n.endswith(("weight_g", "weight_orig"))
    )


def test_einops_functions_convert() -> None:
    model = seeded(IdiomNet, lambda m, f: m.fc(rearrange(f, "n c h w -> n (c h w)")))
    assert_exact(model, fcvgg.convert(model, input_size=NATIVE))


@pytest.mark.parametrize("name", ["Dropout1d", "Dropout3d"])
def test_dropout_of_channels_follows_the_mode(name: str) -> None:
    model = seeded(lambda: IdiomNet(lambda m, f: m.fc(m.layer(f)), layer=LAYERS[name]()))
    net = fcvgg.convert(model, input_size=NATIVE).train()
    batch = images(8, 3, NATIVE, NATIVE)
    assert not torch.equal(net(batch), net(batch))
    net.eval()
    torch.testing.assert_close(net(batch), net(batch), rtol=0, atol=0)


UNARY = [
    *("absolute", "asinh", "atan", "ceil", "clip", "cos", "cosh", "erf", "erfc", "exp2", "expm1"),
    *("floor", "frac", "negative", "positive", "reciprocal", "round", "sgn", "sin", "sinc", "sinh"),
    *("square", "tan", "tanh", "trunc"),
]


@pytest.mark.parametrize("space", [torch, Tensor])
@pytest.mark.parametrize("name", UNARY)
def test_an_element_wise_function_converts(name: str, space: Any) -> None:
    function = getattr(space, name)
    limits = {"min": 0.1, "max": 0.7} if name == "clip" else {}
    model = seeded(IdiomNet, lambda m, f: m.fc(function(flat(f) + 0.3, **limits)))
    assert native_error(model, fcvgg.convert(model, input_size=NATIVE)) <= 1e-11


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hypot": torch.hypot,
    "atan2": torch.atan2,
    "fmax": torch.fmax,
    "logaddexp": torch.logaddexp,
    "multiply": torch.multiply,
    "subtract": Tensor.subtract,
    "rsub": torch.rsub,
    "float_power": lambda a, b: torch.float_power(a.abs() + 1, b),
    "remainder": lambda a, b: a % (b.abs() + 1),
    "log2": lambda a, b: torch.log2(a.abs() + 1) + torch.log10(b.abs() + 1),
    "logical": lambda a, b: torch.logical_and(a > 0, b > 1).to(a.dtype) + a,
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b.abs() + 1, value=0.5),
    "where": lambda a, b: torch.where(a > 0.5, b, torch.zeros_like(a)),
}


@pytest.mark.parametrize("name", BINARY)
def test_a_function_of_two_values_converts(name: str) -> None:
    model = seeded(IdiomNet, lambda m, f: m.fc(BINARY[name](flat(f), flat(f) * 2 - 1)))
    assert native_error(model, fcvgg.convert(model, input_size=NATIVE)) <= 1e-11


class Siamese(nn.Module):
    """Two images of three channels each, one trunk for both."""

    def __init__(self, compare: Callable[..., Tensor]) -> None:
        super().__init__()
        self.trunk, self.compare = Trunk(), compare
        self.fc, self.fc8 = nn.Linear(128, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.compare(self, self.trunk(x[:, :3]), self.trunk(x[:, 3:]))


PAIRS: dict[str, Callable[..., Tensor]] = {
    "difference": lambda m, a, b: m.fc(flat((a - b).abs())),
    "halves": lambda m, a, b: m.fc(flat(torch.cat([a[:, :4], b[:, 4:]], 1))),
    "squared": lambda m, a, b: m.fc8((a.mean((2, 3)) - b.mean((2, 3))).pow(2)),
    "cosine": lambda m, a, b: F.cosine_similarity(flat(a), flat(b)),
    "cosine of pools": lambda m, a, b: F.cosine_similarity(a.mean((2, 3)), b.mean((2, 3)), dim=1),
    "distance": lambda m, a, b: F.pairwise_distance(a.mean((2, 3)), b.mean((2, 3))),
    "dot": lambda m, a, b: (a.mean((2, 3)) * b.mean((2, 3))).sum(1, keepdim=True),
    "Euclid": lambda m, a, b: torch.sqrt(((flat(a) - flat(b)) ** 2).sum(1) + 1e-6),
}


@pytest.mark.parametrize("name", PAIRS)
def test_branches_that_share_a_trunk(name: str) -> None:
    model = seeded(Siamese, PAIRS[name])
    assert_exact(model, fcvgg.convert(model, input_size=NATIVE, in_channels=6))


class Stages(nn.Module):
    """Features of two stages, of different strides, in one head."""

    def __init__(self, head: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), head
        self.fc, self.fc6, self.fc8 = nn.Linear(728, 4), nn.Linear(6, 4), nn.Linear(8, 4)
        self.fc14 = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.max_pool2d(F.relu(self.first(x)), 2)
        return self.head(self, a, F.max_pool2d(F.relu(self.second(a)), 2))


STAGES: dict[str, Callable[..., Tensor]] = {
    "pools joined": lambda m, a, b: m.fc14(torch.cat([a.mean((2, 3)), b.amax((2, 3))], 1)),
    "scores added": lambda m, a, b: m.fc6(a.mean((2, 3))) + m.fc8(b.mean((2, 3))),
    "flattened and joined": lambda m, a, b: m.fc(torch.cat([flat(a), flat(b)], 1)),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_different_strides(name: str, tmp_path: Path) -> None:
    model = seeded(Stages, STAGES[name])
    net = fcvgg.convert(model, input_size=NATIVE)
    assert tuple(net.geometry.stride) == (4, 4)
    got = assert_exact(model, net)
    batch = images(2, 3, *WINDOWS)
    loaded = fcvgg.load(net.save(tmp_path / "bundle"))
    torch.testing.assert_close(loaded(batch), got, rtol=1e-11, atol=1e-11)
    streamed = fcvgg.stream(net, batch[:1], rows=(0, 2)).scores
    torch.testing.assert_close(streamed, got[0], rtol=1e-11, atol=1e-11)


def test_spatial_attention_within_a_padded_trunk() -> None:
    def attention(m: Any, f: Tensor) -> Tensor:
        both = torch.cat((torch.max(f, 1)[0].unsqueeze(1), torch.mean(f, 1).unsqueeze(1)), dim=1)
        return m.fc8((f * torch.sigmoid(m.conv(both))).mean((2, 3)))

    model = seeded(lambda: IdiomNet(attention, conv=nn.Conv2d(2, 1, 3, padding=1)))
    net = fcvgg.convert(model, input_size=NATIVE)
    assert net.equivalence.passed
    assert native_error(model, net) <= EXACT[torch.float64]


def test_the_native_size_follows_from_a_layer_after_a_gathered_window() -> None:
    for head in (
        lambda m, f: m.fc(F.normalize(flat(f))),
        lambda m, f: F.normalize(flat(f)) @ m.matrix,
        lambda m, f: m.fc(flat(F.layer_norm(f, (8, 4, 4)))),
    ):
        assert fcvgg.convert(seeded(IdiomNet, head)).input_size == (NATIVE, NATIVE)
    with pytest.raises(fcvgg.InputSizeError, match=r"the native size .*; pass input_size="):
        fcvgg.convert(seeded(IdiomNet, lambda m, f: flat(f)))


# -- what Python does with models -----------------------------------------------------------------


def written(x: Tensor, scale: float = 2.0, inplace: bool = False) -> Tensor:
    if inplace:
        return x.mul_(scale)
    return F.mish(x) * scale + torch.nn.functional.hardtanh(x, 0.0, 6.0) / 6.0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_function_is_followed() -> None:
    scripted = torch.jit.script(written)
    model = seeded(IdiomNet, lambda m, f: m.fc(flat(m.act(scripted(f)))))
    model.act = scripted  # as an attribute it is no module, and torch does not copy it
    assert_exact(model, fcvgg.convert(model, input_size=NATIVE))
    assert torch.equal(scripted(torch.ones(2)), scripted(torch.ones(2)))  # compiled again


@pytest.mark.parametrize(
    "keep",
    [
        lambda m, f: setattr(m, "last", f),
        lambda m, f: setattr(m, "seen", {"features": [f], "more": (f, f * 2)}),
        lambda m, f: setattr(m, "history", [*getattr(m, "history", []), f]),
    ],
)
def test_values_kept_from_an_earlier_run(keep: Callable[[Any, Tensor], None]) -> None:
    def head(m: Any, f: Tensor) -> Tensor:
        keep(m, f)
        return m.fc(flat(f))

    model = seeded(IdiomNet, head)
    model(images(1, 3, NATIVE, NATIVE))  # with a gradient
    assert_exact(model, fcvgg.convert(model, input_size=NATIVE))


def test_a_lambda_over_the_module() -> None:
    model = seeded(lambda: IdiomNet(lambda m, f: m.fc(flat(m.act(f))), prelu=nn.PReLU(8)))
    model.act = lambda x: model.prelu(x)
    assert_exact(model, fcvgg.convert(model, input_size=NATIVE))


# -- what does not stay a cell --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            lambda m, f: m.fc(flat(f * f.mean((2, 3), keepdim=True).sigmoid())),
            r"combines a map with a value pooled over all its positions",
        ),
        (
            lambda m, f: m.fc(flat(f - f.mean((2, 3), keepdim=True))),
            r"combines a map with a value pooled over all its positions",
        ),
        (
            lambda m, f: m.fc(
                flat(f.flatten(2) @ (f.flatten(2).transpose(1, 2) @ f.flatten(2)).softmax(-1))
            ),
            r"is refused: products of values \(attention\) mix positions",
        ),
        (
            lambda m, f: m.fc(flat(F.max_pool2d(f * m.matrix.view(4, 8, 4, 4)[0], 3, 1, 1))),
            r"mul \(mul.*\) mixes positions or tells them apart, so that all of \(N, 8, "
            r"4, 4\) is one cell's, and max_pool2d.* works on a map of them",
        ),
        (
            lambda m, f: m.fc(flat(torch.fft.fft2(f).abs())),
            r"is refused: a Fourier transform mixes all positions",
        ),
        (
            lambda m, f: F.conv2d(
                f.reshape(1, -1, 4, 4), f.mean((2, 3)).view(-1, 1, 1, 1), groups=len(f) * 8
            ).view(-1, 128),
            r"reshape .* puts the images of the batch into channels, .*\(dynamic convolution\)",
        ),
        (
            lambda m, f: m.classify(
                flat(torch.cat([f, torch.ones(4, 4, dtype=f.dtype).expand(len(f), 1, 4, 4)], 1))
            ),
            r"cat .* joins a map \(N, 8, 4, 4\) with a constant .* that is shaped by position",
        ),
        (
            lambda m, f: m.fc(flat(f) / flat(f).norm()),
            r"reduces over the images of the batch",
        ),
        (
            lambda m, f: torch.linalg.norm(f, 2, (2, 3)) @ m.matrix[:8],
            r"NotImplementedError: a norm of matrices of order 2; it must be a function",
        ),
        (
            lambda m, f: torch.stack([m.fc(flat(f))] * 3),
            r"output has the shape \(3, N, 4\); expected the images first",
        ),
        (
            lambda m, f: torch.einsum("bd,dk,k->bk", flat(f), m.matrix, m.bias),
            r"einsum \(einsum.*\) computes 'bd,dk,k->bk'; expected one or two terms",
        ),
        (
            lambda m, f: F.conv2d(F.layer_norm(f, (8, 4, 4)), m.prototypes[:, :, None, None]),
            r"layer_norm \(layer_norm\) mixes positions or tells .*, and conv2d \(conv2d",
        ),
    ],
)
def test_what_mixes_cells_is_refused_in_one_line(head: Any, message: str) -> None:
    with pytest.raises(fcvgg.ConversionError, match=message) as caught:
        fcvgg.convert(seeded(IdiomNet, head), input_size=NATIVE)
    assert "\n" not in str(caught.value)
