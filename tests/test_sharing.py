"""The network shares the source's parameters, and the source does not notice."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from nets import (
    Functional,
    GlobalPooled,
    Headed,
    Lambda,
    SmallVGG,
    assert_restored,
    images,
    native_error,
    relative_error,
    seeded,
)
from torch import Tensor, nn

import fcvgg

MEGABYTE = 1 << 20


def storages(*modules: nn.Module) -> dict[int, int]:
    """Address and bytes of every storage that the modules' tensors lie in."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


MEASURED = """
import gc, json, sys
import torch, torchvision
import fcvgg

def storages(tensors):
    found = (t.untyped_storage() for t in tensors if t.device.type == "cpu")
    return {s.data_ptr(): s.nbytes() for s in found}

def living():
    gc.collect()
    return storages(t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))

def peak():  # of this process; ru_maxrss would begin with that of the process that started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
tiny = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 2))
fcvgg.convert(tiny.eval(), verify=False)  # what is imported and cached at first use
with torch.device("meta"):
    model = torchvision.models.vgg16().eval()
model.to_empty(device="cpu")  # 528 MB that nobody touches: a copy would, and so raise the peak
before, highest = living(), peak()
net = fcvgg.convert(model, verify=False, copy="copy" in sys.argv)
touched = peak() - highest
new = sum(size for place, size in living().items() if place not in before)
print(json.dumps({"new": new, "touched": touched}))
"""


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc"
)


def measured(*arguments: str) -> dict[str, int]:
    """What converting VGG-16 takes in bytes, in a process whose peak nothing else has raised."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_proc
def test_converting_vgg16_allocates_less_than_a_megabyte() -> None:
    took = measured()
    assert took["new"] < MEGABYTE  # in tensors that are alive
    assert took["touched"] < 32 * MEGABYTE  # at the highest, graphs included


@needs_proc
def test_a_copy_shows_in_what_is_measured() -> None:
    took = measured("copy")
    assert took["new"] > 500 * MEGABYTE
    assert took["touched"] > 500 * MEGABYTE


def test_vgg16_lies_in_its_sources_storage() -> None:
    with torch.device("meta"):
        model = torchvision.models.vgg16().eval()
    model.to_empty(device="cpu")
    net = fcvgg.convert(model, verify=False)
    assert storages(net).keys() == storages(model).keys()
    assert net.geometry.window == (224, 224)
    assert net.geometry.stride == (32, 32)
    assert net.geometry.receptive_field == (404, 404)
    assert net.geometry.offset == (-90, -90)
    assert net.output_size(512) == (10, 10)
    last_pool = fcvgg.receptive_fields(net)["features.30"]
    assert last_pool.receptive_field == (212, 212)


@pytest.mark.parametrize("build", [SmallVGG, Functional, GlobalPooled])
def test_every_parameter_and_buffer_lies_in_the_sources_storage(build: type) -> None:
    model = seeded(build)
    net = fcvgg.convert(model, input_size=28 if build is Functional else 32)
    state = net.state_dict()
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert state[name].data_ptr() == tensor.data_ptr(), name
    mine, others = {id(p) for p in net.parameters()}, {id(p) for p in model.parameters()}
    assert not mine & others


def test_a_permuted_flatten_copies_that_one_weight() -> None:
    model = seeded(
        Headed,
        Lambda(
            lambda x, a, b: b(a(x.permute(0, 2, 3, 1).flatten(1))),
            *(nn.Linear(288, 6), nn.Linear(6, 4)),
        ),
    )
    net = fcvgg.convert(model)
    state = net.state_dict()
    copied = [k for k, v in model.state_dict().items() if state[k].data_ptr() != v.data_ptr()]
    assert copied == ["head.layers.0.weight"]


def everything(model: nn.Module) -> dict[str, Any]:
    """What a conversion could spoil."""
    return {
        "parameters": {
            n: (id(p), p.data_ptr(), p.shape, p.dtype, p.requires_grad, p.stride())
            for n, p in model.named_parameters()
        },
        "buffers": {n: (id(b), b.data_ptr(), b.shape) for n, b in model.named_buffers()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "types": {n: type(m) for n, m in model.named_modules()},
        "hooks": {n: list(m._forward_hooks.values()) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


@pytest.mark.parametrize("options", [{}, {"copy": True}, {"output_stride": 2, "padding": "same"}])
def test_the_source_is_untouched(options: dict[str, Any]) -> None:
    model = seeded(SmallVGG, bn=True)
    model.train()
    model.features.eval()  # mixed modes stay mixed
    model.classifier[0].weight.requires_grad_(False)
    seen: list[tuple[int, ...]] = []
    model.features[0].register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape)))
    before, state = everything(model), copy.deepcopy(model.state_dict())
    net = fcvgg.convert(model, verify=False, **options)
    assert everything(model) == before
    assert seen == []
    net(images(1, 3, 40, 40))
    assert seen == []  # the hook watches the source
    fcvgg.verify(model, net)
    assert everything(model) == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    modes = {name: module.training for name, module in net.network.named_modules()}
    assert {name: modes[name] for name in before["modes"]} == before["modes"]
    assert not net.network.get_parameter("classifier.0.weight").requires_grad
    assert net.network.get_parameter("classifier.3.weight").requires_grad


def test_modes_casts_and_gradients_of_the_network_leave_the_source_alone() -> None:
    model = seeded(SmallVGG)
    expected = model(images(1, 3, 32, 32))
    net = fcvgg.convert(model)
    net.train()
    assert not any(m.training for m in model.modules())
    net.requires_grad_(False)
    assert all(p.requires_grad for p in model.parameters())
    net.float()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model(images(1, 3, 32, 32)), expected)


def test_training_one_changes_both_unless_copied() -> None:
    for own in (False, True):
        model = seeded(SmallVGG)
        net = fcvgg.convert(model, copy=own)
        assert native_error(model, net) <= 1e-12
        with torch.no_grad():
            net.network.classifier[0].weight.mul_(2)
        difference = native_error(model, net, 1) if not own else None
        assert difference is None or difference <= 1e-12
        shared = storages(model).keys() & storages(net).keys()
        assert bool(shared) != own


def test_tied_parameters_stay_tied() -> None:
    class Tied(SmallVGG):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Sequential(
                *(nn.Linear(768, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)),
            )
            self.classifier[4].weight = self.classifier[2].weight
            self.features[4].bias = self.classifier[0].bias = nn.Parameter(torch.ones(6))
            self.features[4] = nn.Conv2d(8, 12, 3, padding=1, bias=False)

    model = seeded(Tied)
    for own in (False, True):
        net = fcvgg.convert(model, copy=own)
        layers = net.network.classifier
        assert layers[2].weight is layers[4].weight
        assert len(list(net.parameters())) == len(list(model.parameters()))
        net.float()
        assert layers[2].weight is layers[4].weight
        assert net.network.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("build", [SmallVGG, Functional, GlobalPooled])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_and_pickles_of_the_network(build: type, again: Any) -> None:
    model = seeded(build)
    model.unused = nn.Linear(2, 2).double()
    net = fcvgg.convert(model, input_size=28 if build is Functional else 32)
    twin = again(again(net))
    batch = images(2, 3, 45, 52)
    assert_restored(net, twin, batch)
    assert not storages(net).keys() & storages(twin).keys()
    assert list(twin.state_dict()) == list(model.state_dict())
    assert (twin.geometry, twin.input_size, twin.equivalence) == (
        net.geometry,
        net.input_size,
        net.equivalence,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    twin.load_state_dict(model.state_dict())
    assert native_error(model, twin) <= 1e-12
    twin.train()
    assert not net.training


class RowsFirst(Headed):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).permute(0, 2, 3, 1).flatten(1))


def test_copies_of_a_network_with_a_permuted_flatten() -> None:
    model = seeded(RowsFirst, nn.Linear(288, 4))
    net = fcvgg.convert(model)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert list(twin.state_dict()) == list(model.state_dict())
        with torch.no_grad():
            model.head.weight.mul_(1.5)
        twin.load_state_dict(model.state_dict())
        assert native_error(model, twin) <= 1e-12


# -- checkpoints ----------------------------------------------------------------------------------

ORDERS = {
    "channels, rows, columns": lambda x: x.flatten(1),
    "rows, columns, channels": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "columns, rows, channels": lambda x: x.permute(0, 3, 2, 1).flatten(1),
}


@pytest.mark.parametrize("flatten", ORDERS.values(), ids=ORDERS.keys())
def test_a_checkpoint_of_the_source_loads(flatten: Any) -> None:
    def build() -> nn.Module:
        layers = nn.Linear(288, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        return Headed(Lambda(lambda x, a, n, b: b(torch.tanh(n(a(flatten(x))))), *layers))

    net = fcvgg.convert(seeded(build), copy=True)
    other = build().double().eval()  # other weights
    assert relative_error(other(images(1, 3, 24, 24)), net(images(1, 3, 24, 24)).flatten(1)) > 0.01
    result = net.load_state_dict(other.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert native_error(other, net) <= 1e-12
    again = fcvgg.convert(seeded(build), copy=True)
    again.load_state_dict(net.state_dict())  # its own, with convolutional shapes
    assert native_error(other, again) <= 1e-12


def test_a_checkpoint_of_a_module_around_the_source_loads() -> None:
    class Lit(nn.Module):
        """As a LightningModule holds its model."""

        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(5, dtype=torch.float64))

    source = Lit(SmallVGG().double().eval())
    around = Lit(fcvgg.convert(seeded(SmallVGG), copy=True))
    assert list(around.state_dict()) == list(source.state_dict())
    around.load_state_dict(source.state_dict())
    assert native_error(source.model, around.model) <= 1e-12


def test_strict_loading_names_what_is_wrong() -> None:
    model = seeded(SmallVGG)
    net = fcvgg.convert(model, copy=True)
    state = model.state_dict()
    del state["classifier.0.weight"]
    state["classifier.9.weight"] = torch.ones(3)
    with pytest.raises(RuntimeError) as caught:
        net.load_state_dict(state)
    assert 'Missing key(s) in state_dict: "classifier.0.weight"' in str(caught.value)
    assert 'Unexpected key(s) in state_dict: "classifier.9.weight"' in str(caught.value)
    result = net.load_state_dict(state, strict=False)
    assert result.missing_keys == ["classifier.0.weight"]
    assert result.unexpected_keys == ["classifier.9.weight"]
    with pytest.raises(RuntimeError, match=r"size mismatch for .*classifier\.6\.weight"):
        net.load_state_dict({**model.state_dict(), "classifier.6.weight": torch.ones(3, 3)})


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_misshapen_tensor_is_named_as_in_the_source(prefix: str) -> None:
    net = fcvgg.convert(seeded(SmallVGG), copy=True)
    state = net.state_dict(prefix=prefix)
    state[f"{prefix}features.0.weight"] = torch.ones(3)
    holder = nn.ModuleDict({"model": net}) if prefix else net
    with pytest.raises(RuntimeError, match=rf"size mismatch for {prefix}features\.0\.weight: copy"):
        holder.load_state_dict(state)
