"""Modes: those of copies, those that `train()` sets, and what `verify` says of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import EXACT, images, relative_error, seeded
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import StochasticDepth

import fcvgg
from fcvgg.verification import check


class Trunk(nn.Module):
    """Convolution, batch norm, ReLU and a pool: 12 pixels to 6 x 3 x 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.bn(self.conv(x))))


class Small(nn.Module):
    """The trunk, what `between` makes of its maps, and a fully connected layer with dropout."""

    def __init__(self, between: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.between = between()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(54, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.between(self.trunk(x)).flatten(1)))


class OnExtractor(nn.Module):
    """The usual recipe on torchvision's feature extractors, whose copies lose their modes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = create_feature_extractor(Trunk().eval(), {"pool": "maps"})
        self.fc = nn.Linear(54, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x)["maps"].flatten(1))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = OnExtractor()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class ForgetsItsMode(Trunk):
    """A copy is a new trunk: other weights, in training mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ForgetsItsMode:
        return type(self)()


def extractor() -> nn.Module:
    return create_feature_extractor(Small().eval(), ["fc"])


def forgetful() -> nn.Module:
    model = Small()
    model.trunk = ForgetsItsMode()
    return model


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("owns", [False, True])
@pytest.mark.parametrize("build", [OnExtractor, Nested, extractor, forgetful])
def test_a_network_is_in_the_modes_of_its_source(
    build: Callable[[], nn.Module], owns: bool
) -> None:
    model = seeded(build)
    batch = images(2, 3, 12, 12)
    with torch.no_grad():
        expected = model(batch)
        expected = expected["fc"] if isinstance(expected, dict) else expected
        before = state_of(model)
        net = fcvgg.convert(model, input_size=12, copy=owns)
        got = net(batch)
    got = got["fc"] if isinstance(got, dict) else got
    assert relative_error(expected, got[:, :, 0, 0]) <= EXACT[torch.float64]
    assert not any(module.training for module in net.modules())
    assert not any(module.training for module in model.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_large_extractor_keeps_its_scores_and_its_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            resnet = torchvision.models.resnet18(weights=None)
            self.body = create_feature_extractor(resnet, {"layer1": "f"})
            self.head = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)["f"].mean((2, 3)))

    model = seeded(Net)
    batch = images(2, 3, 48, 48)
    with torch.no_grad():
        expected, before = model(batch), state_of(model)
        got = fcvgg.convert(model, input_size=48)(batch)[:, :, 0, 0]
    assert relative_error(expected, got) <= EXACT[torch.float64]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_mixed_modes_are_kept_module_by_module() -> None:
    model = seeded(OnExtractor)
    model.train()
    model.body.bn.eval()
    modes = modes_of(model)
    net = fcvgg.convert(model, input_size=12)
    assert modes_of(model) == modes
    assert {name: modes_of(net.network)[name] for name in modes} == modes
    assert not net.network.get_submodule("body.bn").training


def test_conversion_leaves_the_source_alone() -> None:
    model = seeded(Small).train()
    calls: list[int] = []
    handle = model.fc.register_forward_hook(lambda *_: calls.append(1))
    model(images(2, 3, 12, 12)).sum().backward()
    before, modes = state_of(model), modes_of(model)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    numbers = torch.get_rng_state()
    fcvgg.convert(model)
    assert modes_of(model) == modes
    assert list(model.fc._forward_hooks) == [handle.id]
    assert torch.equal(torch.get_rng_state(), numbers)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=0, atol=0)


def test_a_buffer_that_counts_calls_is_not_counted_up() -> None:
    class Counting(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = seeded(Counting)
    net = fcvgg.convert(model)
    assert net.equivalence.passed
    assert model.calls.item() == 0


def test_a_copy_that_is_the_module_itself_is_refused() -> None:
    class Single(nn.Identity):
        def __deepcopy__(self, memo: dict[int, Any]) -> Single:
            return self

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(
        fcvgg.ConversionError, match=r"between \(Single\) returns the module itself"
    ):
        fcvgg.convert(seeded(Small, Single), input_size=12)


# -- training mode --------------------------------------------------------------------------------


class StillNorms(Small):
    """The usual override that keeps batch norms in evaluation mode."""

    def train(self, mode: bool = True) -> StillNorms:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class LivelyDropout(Small):
    """Monte Carlo dropout: on in evaluation mode too."""

    def train(self, mode: bool = True) -> LivelyDropout:
        super().train(mode)
        self.drop.train()
        return self


class Frozen(Small):
    def train(self, mode: bool = True) -> Frozen:
        super().train(False)
        return self


@pytest.mark.parametrize("build", [Small, StillNorms, LivelyDropout, Frozen])
def test_train_sets_the_modes_that_the_sources_train_sets(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = seeded(build)
    net = fcvgg.convert(model)
    net.save(tmp_path / "bundle")
    for network in (net, copy.deepcopy(net), fcvgg.load(tmp_path / "bundle")):
        for mode in (True, False):
            model.train(mode)
            assert network.train(mode) is network
            found, expected = modes_of(network.network), modes_of(model)
            assert {n: m for n, m in found.items() if n in expected} == {
                n: m for n, m in expected.items() if n in found
            }
            assert network.training == model.training


def test_dense_networks_follow_an_override_too() -> None:
    fcn = fcvgg.FCN(fcvgg.convert(seeded(StillNorms)), 2, "32s").train()
    modes = {name: m.training for name, m in fcn.named_modules() if name.endswith("trunk.bn")}
    assert modes
    assert not any(modes.values())
    noisy = fcvgg.FCN(fcvgg.convert(seeded(NoisyRoot)), 2, "32s")
    with pytest.raises(fcvgg.TrainingError, match="into training mode: NoisyRoot computes"):
        noisy.train()


def test_an_override_on_the_instance_is_followed() -> None:
    model = seeded(Small)

    def train(mode: bool = True) -> nn.Module:
        nn.Module.train(model, mode)
        model.trunk.bn.eval()
        return model

    model.train = train  # type: ignore[method-assign]
    net = fcvgg.convert(model).train()
    assert not net.network.get_submodule("trunk.bn").training
    assert net.network.get_submodule("trunk.conv").training
    assert not model.trunk.training  # the override ran on a copy


def test_parameters_that_train_freezes_are_frozen() -> None:
    class FrozenNorms(StillNorms):
        def train(self, mode: bool = True) -> FrozenNorms:
            super().train(mode)
            self.trunk.bn.requires_grad_(False)
            return self

    net = fcvgg.convert(seeded(FrozenNorms).requires_grad_(True))
    assert all(p.requires_grad for p in net.parameters())
    net.train()
    frozen = {name for name, p in net.network.named_parameters() if not p.requires_grad}
    assert frozen == {"trunk.bn.weight", "trunk.bn.bias"}


class Merged(nn.Linear):
    """A low-rank addition that ``eval()`` merges into the weight, as loralib does."""

    def __init__(self) -> None:
        super().__init__(54, 4)
        self.merged = False
        self.more = nn.Parameter(torch.ones(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + F.linear(x, self.more.expand(4, 54))

    def train(self, mode: bool = True) -> Merged:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.more if mode else self.more
            self.merged = not mode
        return self


def test_a_train_that_changes_more_than_modes_is_not_followed() -> None:
    model = Small()
    model.fc = Merged()
    model.double().eval()
    before = state_of(model)
    net = fcvgg.convert(model)
    assert net.equivalence.passed
    with pytest.raises(fcvgg.TrainingError, match=r"into training mode: fc computes something"):
        net.train()
    assert model.fc.merged
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_train_that_needs_data_is_not_followed() -> None:
    class NeedsData(Small):
        def train(self, mode: bool = True) -> NeedsData:
            assert self.fc.weight.sum().item() != 0
            return super().train(mode)

    net = fcvgg.convert(seeded(NeedsData))
    with pytest.raises(fcvgg.TrainingError, match=r"into training mode: NeedsData computes"):
        net.train()


def test_an_extractor_holds_the_graph_of_one_mode() -> None:
    class Functional(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.dropout(self.trunk(x).flatten(1), 0.5, self.training))

    class Plain(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.trunk(x).flatten(1))

    for build in (Plain, Functional):
        net = fcvgg.convert(create_feature_extractor(seeded(build), ["fc"]).eval(), input_size=12)
        if build is Plain:
            assert net.train().training
        else:
            with pytest.raises(fcvgg.TrainingError, match="into training mode: "):
                net.train()


def test_functions_follow_an_override_too() -> None:
    class Functional(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x).flatten(1)
            return self.fc(F.dropout(x, 0.5, self.training))

        def train(self, mode: bool = True) -> Functional:
            super().train(mode)
            self.training = False
            return self

    net = fcvgg.convert(seeded(Functional)).train()
    batch = images(2, 3, 12, 12)
    net.network.get_submodule("trunk.bn").eval()
    assert not net.training
    torch.testing.assert_close(net(batch), net(batch), rtol=0, atol=0)


class DropPath(nn.Module):
    """Stochastic depth of each image, as timm and many repositories write it."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * kept / (1 - self.p)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.randn_like(x)
        return x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.conv(x))


@pytest.mark.parametrize(
    "layer",
    [
        *(DropPath, Noise, Residual, lambda: nn.Sequential(Noise(), DropPath())),
        lambda: StochasticDepth(0.5, "row"),
    ],
)
def test_layers_of_training_mode_follow(layer: Callable[[], nn.Module]) -> None:
    model = seeded(Small, layer)
    net = fcvgg.convert(model, copy=True)
    batch = images(8, 3, 12, 12)
    assert native_difference(model, net, batch) <= EXACT[torch.float64]
    model.train().drop.eval()
    net.train().network.get_submodule("drop").eval()
    other = native_scores(net, batch, seed=4)
    first = native_scores(net, batch, seed=3)
    assert relative_error(native_scores(model, batch, seed=3), first) <= EXACT[torch.float64]
    assert relative_error(first, other) > 1e-3
    for parameter, other in zip(model.trunk.parameters(), net.network.trunk.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad)


def native_scores(model: nn.Module, batch: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    model.zero_grad()
    scores = model(batch).reshape(len(batch), -1)
    scores.square().sum().backward()
    return scores.detach()


@torch.no_grad()
def native_difference(model: nn.Module, net: nn.Module, batch: Tensor) -> float:
    return relative_error(model(batch), net(batch).reshape(len(batch), -1))


def test_layers_of_training_mode_leave_inference_as_it_is(tmp_path: Path) -> None:
    model = seeded(Small, lambda: nn.Sequential(Residual(), Noise()), dtype=torch.float32)
    net = fcvgg.convert(model)
    image = images(1, 3, 30, 26, dtype=torch.float32)
    expected = net(image)[0].detach()
    torch.testing.assert_close(fcvgg.stream(net, image[0]).scores, expected, rtol=1e-4, atol=1e-5)
    fast = fcvgg.optimize(net)(image)[0]
    torch.testing.assert_close(fast, expected, rtol=1e-3, atol=1e-4)
    net.save(tmp_path / "bundle")
    loaded = fcvgg.load(tmp_path / "bundle")
    torch.testing.assert_close(loaded(image)[0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(fcvgg.TrainingError, match=r"between\.0\.path, between\.1 computes"):
        loaded.train()


class NoisyRoot(Small):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.randn_like(x)
        return super().forward(x)


class NoisyBlock(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + torch.randn_like(x) if self.training else x)


class Auxiliary(Small):
    """A second head in training mode, which can be left out."""

    def __init__(self, auxiliary: bool) -> None:
        super().__init__()
        self.auxiliary = auxiliary

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        if self.training and self.auxiliary:
            return scores, scores
        return scores


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (NoisyRoot, "NoisyRoot"),
        (lambda: Small(NoisyBlock), "between"),
        (lambda: Auxiliary(True), "Auxiliary"),
    ],
)
def test_a_branch_of_training_mode_that_a_graph_cannot_hold(
    build: Callable[[], nn.Module], name: str, tmp_path: Path
) -> None:
    model = seeded(build)
    net = fcvgg.convert(model)  # whoever needs no training can have it
    net.save(tmp_path / "bundle")
    for network in (net, fcvgg.load(tmp_path / "bundle")):
        with pytest.raises(fcvgg.TrainingError, match=rf"into training mode: {name} computes"):
            network.train()
        assert not any(module.training for module in network.modules())
        assert network.eval() is network
    with pytest.raises(fcvgg.ConversionError, match=rf"{name} computes .*; call model.eval\(\)"):
        fcvgg.convert(model.train())


def test_a_branch_that_computes_the_same_is_followed() -> None:
    net = fcvgg.convert(seeded(Auxiliary, False)).train()
    assert net.training


def test_a_subclass_of_batch_norm_is_followed() -> None:
    class OwnNorm(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = seeded(Small, lambda: OwnNorm(6))
    net = fcvgg.convert(model, copy=True).train()
    model.train().drop.eval()
    net.network.get_submodule("drop").eval()
    batch = images(4, 3, 12, 12)
    assert native_difference(model, net, batch) <= EXACT[torch.float64]


# -- what verify says of modes --------------------------------------------------------------------


def test_verify_names_modules_in_another_mode() -> None:
    model = seeded(Small)
    net = fcvgg.convert(model)
    net.network.get_submodule("trunk.bn").train()
    report = fcvgg.verify(model, net)
    assert not report.passed
    assert report.other_modes == ("trunk.bn",)
    assert str(report).endswith("; in other modes: trunk.bn")
    assert net.network.get_submodule("trunk.bn").training
    with pytest.raises(
        fcvgg.EquivalenceError, match=r"trunk\.bn of the network is in another mode"
    ):
        check(model, net)


def test_verify_names_flags_of_functions_in_another_mode() -> None:
    class Functional(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.dropout(self.trunk(x).flatten(1), 0.5, self.training))

    model = seeded(Functional)
    net = fcvgg.convert(model)
    net.network.training_flag.train()
    assert fcvgg.verify(model, net).other_modes == ("Functional",)


def test_verify_takes_both_in_training_mode() -> None:
    model = seeded(Small)
    net = fcvgg.convert(model)
    model.train()
    net.train()
    before = state_of(model)
    report = fcvgg.verify(model, net)
    assert report.passed
    assert report.other_modes == ()
    assert all(module.training for module in model.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_verify_sees_training_mode_that_the_network_does_not_hold() -> None:
    model = seeded(NoisyRoot)
    net = fcvgg.convert(model)
    for module in (*model.modules(), *net.modules()):
        module.training = True
    assert fcvgg.verify(model, net).other_modes == ("NoisyRoot",)


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Hardtanh(0.0, 0.5, inplace=True)])
def test_a_first_layer_that_works_in_place_does_not_spoil_the_comparison(first: nn.Module) -> None:
    model = seeded(lambda: nn.Sequential(first, Small()))
    batch = images(2, 3, 12, 12)
    before = batch.clone()
    net = fcvgg.convert(model)
    assert net.equivalence.passed
    report = fcvgg.verify(model, net, batch)
    assert report.passed
    torch.testing.assert_close(batch, before, rtol=0, atol=0)


def test_verify_after_a_change_of_layout_and_of_the_weights() -> None:
    model = seeded(Small, dtype=torch.float32)
    net = fcvgg.convert(model, copy=True)
    net.to(memory_format=torch.channels_last)
    assert fcvgg.verify(model, net).passed
    with torch.no_grad():
        net.network.get_parameter("trunk.conv.weight").mul_(1.01)
    assert not fcvgg.verify(model, net).passed
