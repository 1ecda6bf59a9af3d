"""New heads, frozen layers and learning rates by layer."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Functional, GlobalPooled, SmallVGG, images, narrow_vgg, native_error, seeded
from torch import nn

import fcvgg


def kinds(model: nn.Sequential) -> list[str]:
    return [type(m).__name__ for m in model]


# -- heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg11", "vgg13_bn"])
def test_a_new_head_has_the_layers_asked_for(name: str) -> None:
    model = seeded(narrow_vgg, name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new = fcvgg.replace_head(model, 3, (20, 12), dropout=0.25)
    assert kinds(new.classifier) == [*["Linear", "ReLU", "Dropout"] * 2, "Linear"]
    shapes = [tuple(m.weight.shape) for m in new.classifier if isinstance(m, nn.Linear)]
    assert shapes == [(20, 32 * 49), (12, 20), (3, 12)]
    assert {m.p for m in new.classifier if isinstance(m, nn.Dropout)} == {0.25}
    assert list(dict(new.classifier.named_children())) == list("0123456")
    assert all(
        torch.equal(v, before[f"features.{k}"]) for k, v in new.features.state_dict().items()
    )
    assert native_error(new, fcvgg.convert(new)) < 1e-12
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_default_head_is_vggs() -> None:
    with torch.device("meta"):
        model = narrow_vgg("vgg11")
    new = fcvgg.replace_head(model, 5)
    shapes = [tuple(m.weight.shape) for m in new.classifier if isinstance(m, nn.Linear)]
    assert shapes == [(4096, 32 * 49), (4096, 4096), (5, 4096)]


def test_only_the_last_layer() -> None:
    model = seeded(SmallVGG)
    new = fcvgg.replace_head(model, 9, hidden=None)
    changed = [
        k
        for k, v in new.state_dict().items()
        if v.shape != model.state_dict()[k].shape or not torch.equal(v, model.state_dict()[k])
    ]
    assert changed == ["classifier.6.weight", "classifier.6.bias"]
    assert kinds(new.classifier) == kinds(model.classifier)
    assert new.classifier[6].out_features == 9


def test_only_the_last_layer_of_any_model() -> None:
    new = fcvgg.replace_head(seeded(GlobalPooled), 2, hidden=None)
    assert new.fc.out_features == 2
    assert native_error(new, fcvgg.convert(new, input_size=40)) < 1e-12


def test_a_plain_sequential_keeps_what_is_before_its_head() -> None:
    model = seeded(
        lambda: nn.Sequential(*SmallVGG().features, nn.Flatten(), *SmallVGG().classifier)
    )
    new = fcvgg.replace_head(model, 4, hidden=(6,))
    flatten = kinds(new).index("Flatten")
    assert kinds(new)[flatten + 1 :] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert native_error(new, fcvgg.convert(new)) < 1e-12


def test_log_softmax_and_the_loss_that_goes_with_it() -> None:
    model = seeded(SmallVGG)
    plain = fcvgg.replace_head(model, 4, hidden=(8,))
    log = fcvgg.replace_head(model, 4, hidden=(8,), log_softmax=True)
    assert isinstance(fcvgg.loss_for(plain), nn.CrossEntropyLoss)
    assert isinstance(fcvgg.loss_for(log), nn.NLLLoss)
    assert fcvgg.convert(log).activation == "log_probabilities"
    log.load_state_dict(plain.state_dict())
    batch, labels = images(3, 3, 32, 32), torch.tensor([0, 1, 3])
    losses = [fcvgg.loss_for(m)(m(batch), labels) for m in (plain, log)]
    assert torch.allclose(*losses, rtol=1e-12)


@pytest.mark.parametrize("ending", [nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid()])
@pytest.mark.parametrize("log", [False, True])
def test_an_ending_after_the_last_layer_goes(ending: nn.Module, log: bool) -> None:
    model = seeded(SmallVGG)
    model.classifier.append(ending)
    new = fcvgg.replace_head(model, 3, hidden=None, log_softmax=log)
    assert kinds(new.classifier)[6:] == ["Linear", *["LogSoftmax"] * log]


class Apart(nn.Module):
    """Two fully connected layers as attributes of a module whose forward calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.hidden(self.conv(x).mean((2, 3))))


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_the_only_layer_of_a_module_of_ones_own(hidden: tuple[int, ...]) -> None:
    model = seeded(GlobalPooled)
    new = fcvgg.replace_head(model, 5, hidden)
    layers = [x for x in fcvgg.layer_names(new) if x.role == "fc"]
    assert len(layers) == len(hidden) + 1
    assert new(images(1, 3, 32, 32)).shape == (1, 5)
    assert isinstance(new.fc, nn.Sequential if hidden else nn.Linear)


def test_probabilities_have_no_loss() -> None:
    model = seeded(SmallVGG)
    model.classifier.append(nn.Softmax(1))
    message = "the model ends in probabilities (prob, Softmax), and cross entropy would take a"
    with pytest.raises(fcvgg.ConversionError, match=re.escape(message)):
        fcvgg.loss_for(model)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (SmallVGG, {"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
        (SmallVGG, {"num_classes": 2.0}, "num_classes must be an integer of at least 1, got 2.0"),
        (SmallVGG, {"hidden": (8, 0)}, "hidden must be positive layer widths, got (8, 0); () giv"),
        (SmallVGG, {"hidden": 8}, "hidden must be positive layer widths, got 8; () gives on"),
        (SmallVGG, {"dropout": 1}, "dropout must be at least 0 and below 1, got 1"),
        (Functional, {}, "fc6 is linear; only nn.Linear layers can be replaced"),
        (
            Apart,
            {},
            "the fully connected layers of Apart (hidden, fc) do not stand in one nn.Sequential; "
            "pass hidden=None to replace the last one only",
        ),
        (
            GlobalPooled,
            {"hidden": None, "log_softmax": True},
            "fc6 (fc) stands in a GlobalPooled, whose forward ends as it does; log_softmax=True "
            "needs an nn.Sequential",
        ),
    ],
)
def test_heads_that_cannot_be(build, arguments, message) -> None:
    with pytest.raises(fcvgg.FcvggError, match=f"^{re.escape(message)}"):
        fcvgg.replace_head(build(), **{"num_classes": 3, **arguments})


# -- freezing ---------------------------------------------------------------------------------


def changed_by_a_step(model: nn.Module, reference: dict[str, torch.Tensor]) -> set[str]:
    """The canonical names of layers whose tensors a training step changed."""
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(images(2, 3, 224, 224)).square().mean().backward()
    optimiser.step()
    names = {x.path: x.name for x in fcvgg.layer_names(model) if x.path}
    return {
        names[key.rpartition(".")[0]]
        for key, value in model.state_dict().items()
        if not torch.equal(value.flatten(), reference[key].flatten())
    }


@pytest.mark.parametrize(
    "through",
    [
        lambda m: m,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: fcvgg.convert(m, copy=True),
    ],
    ids=["itself", "copied", "pickled", "converted"],
)
def test_frozen_layers_and_statistics_stay_through_training(through) -> None:
    model = seeded(narrow_vgg, "vgg11_bn")
    assert fcvgg.freeze_(model, upto="pool3") is model
    reference = {k: v.clone() for k, v in model.state_dict().items()}
    trained = {
        x.name for x in fcvgg.layer_names(model) if x.block in (4, 5) and x.role in "conv bn"
    }
    assert changed_by_a_step(through(model), reference) == trained | {"fc6", "fc7", "fc8"}


def test_frozen_norms_stay_in_evaluation_mode_and_thaw() -> None:
    model = seeded(narrow_vgg, "vgg11_bn")
    fcvgg.freeze_(fcvgg.freeze_(model, upto="block2_pool"), upto="conv2_1").train()
    norms = {
        x.name: model.get_submodule(x.path) for x in fcvgg.layer_names(model) if x.role == "bn"
    }
    assert [n for n, m in norms.items() if not m.training] == ["bn1_1", "bn2_1"]
    assert model.features[3].training  # a pool has nothing to freeze
    fcvgg.unfreeze_(model, downto="conv2_1")
    assert [n for n, m in norms.items() if not m.training] == ["bn1_1"]
    assert not model.features[0].weight.requires_grad
    assert model.features[4].weight.requires_grad
    fcvgg.unfreeze_(model)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not model.eval().features[1].training


def test_trainable_parameters_and_info_agree(tmp_path, capsys) -> None:
    from fcvgg.cli import app

    model = fcvgg.freeze_(seeded(narrow_vgg, "vgg11", dtype=torch.float32), upto="pool4")
    counts = fcvgg.trainable_parameters(model)
    assert {name for name, count in counts.items() if not count} == {
        *("conv1_1", "conv2_1", "conv3_1", "conv3_2", "conv4_1", "conv4_2"),
    }
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    net = fcvgg.convert(model)
    assert fcvgg.trainable_parameters(net) == counts
    net.save(tmp_path / "net")
    app(["info", str(tmp_path / "net")], standalone_mode=False)
    printed = capsys.readouterr().out
    assert f"of which {sum(counts.values()):,} trainable" in printed
    assert len(re.findall(r"Conv2d .* no ", printed)) == 6


def test_layers_that_are_functions_freeze_too() -> None:
    model = seeded(Functional)
    for tree in (model, fcvgg.convert(model, input_size=28)):
        fcvgg.freeze_(tree, upto="fc6")
        frozen = {name.split(".")[-1] for name, p in tree.named_parameters() if not p.requires_grad}
        assert frozen == {"kernel", "norm_weight", "fc1", "bias1"}
        assert fcvgg.trainable_parameters(tree) == {
            **{"conv1_1": 0, "bn1_1": 0, "fc6": 0, "fc7": model.fc2.numel()},
        }
        (group,) = fcvgg.parameter_groups(tree, {"fc7": 0.1})
        assert [p.numel() for p in group["params"]] == [model.fc2.numel()]
        fcvgg.unfreeze_(tree, downto="bn1_1")
        assert [p.requires_grad for p in tree.parameters()].count(False) == 1
        fcvgg.unfreeze_(tree)
        assert all(p.requires_grad for p in tree.parameters())


def test_freezing_an_unknown_layer() -> None:
    message = (
        "the model has no layer 'pool6' (near: pool2, pool1); "
        "fcvgg.layer_names(model) lists them all"
    )
    with pytest.raises(fcvgg.ArgumentError, match=f"^{re.escape(message)}$"):
        fcvgg.freeze_(SmallVGG(), upto="pool6")


# -- parameter groups -------------------------------------------------------------------------


def test_groups_by_layer_block_and_head() -> None:
    model = narrow_vgg("vgg11_bn")
    fcvgg.freeze_(model, upto="pool1")
    rates = {"features": 1e-5, "block5": 1e-4, "block5_conv2": 1e-3, "head": 1e-2}
    groups = fcvgg.parameter_groups(model, rates)
    assert [(g["name"], g["lr"]) for g in groups] == list(rates.items())
    got = {g["name"]: {id(p) for p in g["params"]} for g in groups}
    f, c = model.features, model.classifier
    assert got["block5_conv2"] == {id(p) for p in f[25].parameters()}
    assert got["block5"] == {id(p) for i in (22, 23, 26) for p in f[i].parameters()}
    assert got["head"] == {id(p) for p in c.parameters()}
    everything = [p for g in groups for p in g["params"]]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len({id(p) for p in everything}) == len(everything)
    torch.optim.SGD(groups, lr=1.0, momentum=0.9)


def test_the_rest_has_a_rate_of_its_own_or_is_named() -> None:
    model = SmallVGG()
    groups = fcvgg.parameter_groups(model, {"fc8": 1e-2}, lr=1e-4)
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [
        ("fc8", 1e-2, 2),
        ("rest", 1e-4, 8),
    ]
    message = "conv1_1, conv2_1, fc6, fc7 have no learning rate; name them or pass lr= for the rest"
    with pytest.raises(fcvgg.ArgumentError, match=f"^{re.escape(message)}$"):
        fcvgg.parameter_groups(model, {"fc8": 1e-2})


def test_parameters_of_no_named_layer_are_not_lost() -> None:
    class Scaled(SmallVGG):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    model = Scaled()
    groups = fcvgg.parameter_groups(model, {"features": 1e-3, "head": 1e-2}, lr=0.5)
    assert [(g["name"], len(g["params"])) for g in groups] == [
        ("features", 4),
        ("head", 6),
        ("rest", 1),
    ]
    assert fcvgg.trainable_parameters(model)[""] == 1
    with pytest.raises(fcvgg.ArgumentError, match=r"^parameters of no named layer have no lea"):
        fcvgg.parameter_groups(model, {"features": 1e-3, "head": 1e-2})


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"block7": 1e-3}, "the model has no block7; its blocks are block1, block2"),
        ({"conv7_1": 1e-3}, "the model has no layer 'conv7_1' (near: "),
        ({"head": -1}, "the learning rate of 'head' must be a finite number of at least 0, got -1"),
        (
            {"head": float("nan")},
            "the learning rate of 'head' must be a finite number of at least 0, got nan",
        ),
        (
            {"head": "1e-3"},
            "the learning rate of 'head' must be a finite number of at least 0, got '1e-3'",
        ),
    ],
)
def test_groups_that_cannot_be(rates, message) -> None:
    with pytest.raises(fcvgg.ArgumentError, match=f"^{re.escape(message)}"):
        fcvgg.parameter_groups(SmallVGG(), rates, lr=1e-3)


class Normed(nn.Module):
    """Batch norm of vectors, and functions between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Sequential(
            nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.conv(x)), 4)
        return self.head(x.flatten(1))


@pytest.mark.parametrize("hidden", [(7,), None])
def test_a_networks_head_is_replaced_as_its_sources(hidden: Any, tmp_path: Path) -> None:
    source = seeded(Normed, dtype=torch.float32)
    net = fcvgg.convert(source, input_size=16)
    net.save(tmp_path / "bundle")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for model in (source, net, fcvgg.load(tmp_path / "bundle")):
        torch.manual_seed(0)
        new = fcvgg.replace_head(model, 5, hidden).eval()
        fcvgg.freeze_(new, "conv1_1")
        assert not new.get_submodule("conv").weight.requires_grad
        results.append((new(images), list(new.state_dict())))
    for scores, keys in results[1:]:
        torch.testing.assert_close(scores, results[0][0])
        assert keys == results[0][1]
    assert fcvgg.convert(new, input_size=16).output_size((32, 32)) == (5, 5)


def test_layers_of_a_network_are_replaced_as_its_sources() -> None:
    source = fcvgg.demo.demo_model()
    net = fcvgg.convert(source, padding="same", output_stride=2)
    wide = nn.Conv2d(3, 16, 5, padding=2)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = []
    for model in (source, net):
        new = fcvgg.replace_layers(model, "conv1_1", "conv1_2", wide)
        new = fcvgg.insert_after(new, "relu2_1", nn.Dropout2d(0.2)).eval()
        made.append(new)
    assert made[0].state_dict().keys() == made[1].state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(made[0](images), made[1](images))
    smaller = fcvgg.for_input_size(net, 48, num_classes=4, init="resample")
    assert fcvgg.convert(smaller, input_size=48).geometry.window == (48, 48)


class Residual(nn.Module):
    """A sum of two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.fc(torch.max_pool2d(self.other(x) + x, 8).flatten(1))


def test_a_network_that_is_no_chain_gets_another_last_layer() -> None:
    net = fcvgg.convert(seeded(Residual, dtype=torch.float32), input_size=32)
    new = fcvgg.replace_head(net, 5, None)
    assert new.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
