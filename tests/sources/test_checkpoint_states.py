"""Checkpoints as training scripts leave them: entries, prefixes, averages, and objects beside."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import uuid
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import fcvgg
from fcvgg.sources import checkpoints


class Net(nn.Module):
    """A classifier of two layers with a batch norm between."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.classifier = nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return Net(3).state_dict()


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor + 1 for name, tensor in state.items()}


def found(tmp_path, content: Any, weights: str = "DEFAULT") -> Any:
    torch.save(content, tmp_path / "a.ckpt")
    return checkpoints.state_of(tmp_path / "a.ckpt", Net(), "classifier", weights)


def assert_is(place: Any, state: dict[str, Any]) -> None:
    assert place.state.keys() == state.keys()
    for name, tensor in state.items():
        assert_close(place.state[name], tensor, atol=0, rtol=0)


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "model.", "net.", "backbone.", "encoder.", "module.", "_orig_mod.", "network."),
        *("model._orig_mod.", "_orig_mod.module.", "task.model.backbone.", "0."),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_the_one_prefix_that_fits_is_found_and_named(tmp_path, state, prefix, beside) -> None:
    keys = prefixed(state, prefix)
    if beside:
        extra = {"criterion.pos_weight": torch.ones(3), "train_acc.tp": torch.zeros(3)}
        counters = {
            f"{prefix}features.0.total_ops": torch.zeros(1),
            f"{prefix}total_params": torch.ones(1),
        }
        keys = {**extra, **keys, **counters}
    place = found(tmp_path, {"state_dict": keys, "epoch": 3})
    assert_is(place, state)
    assert (place.entry, place.prefix) == ("state_dict", prefix)
    if prefix and not beside:
        assert place.described() == f"state_dict, prefix {prefix!r}"


def test_parts_that_were_compiled_alone(tmp_path, state) -> None:
    keys = {name.replace("features.", "features._orig_mod."): v for name, v in state.items()}
    assert_is(found(tmp_path, prefixed(keys, "model.")), state)


@pytest.mark.parametrize(
    "entry",
    [
        *("state_dict", "model_state_dict", "model_state", "model", "weights", "params"),
        *("network", "net", "model/state_dict", "checkpoint/model/params", "my_own_name"),
    ],
)
def test_entries(tmp_path, state, entry) -> None:
    content: Any = state
    for name in reversed(entry.split("/")):
        content = {"epoch": 1, name: content}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
    assert_is(found(tmp_path, {**content, "optimizer": optimizer}), state)


def ema_entries(state: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints with weights and their averages, as trainers write them."""
    mean = other(state)
    module = {"n_averaged": torch.tensor(7), **prefixed(mean, "module.")}
    return {
        "timm": {"state_dict": state, "state_dict_ema": mean},
        "openmmlab": {
            "state_dict": state,
            "ema_state_dict": mean,
        },
        "basicsr": {"params": state, "params_ema": mean},
        "torchvision": {"model": state, "model_ema": module},
        "lightning module": {
            "state_dict": {**prefixed(state, "model."), **prefixed(mean, "ema_model.module.")}
        },
        "averaged beside": {
            "state_dict": {**prefixed(state, "net."), **prefixed(module, "averaged_net.")}
        },
        "lightning callback": {
            "state_dict": prefixed(mean, "model."),
            "current_model_state": prefixed(state, "model."),
        },
        "state of a callback": {
            "state_dict": prefixed(state, "model._orig_mod."),
            "callbacks": {
                "EMACallback{'decay': 0.9}": {"weights": prefixed(mean, "model._orig_mod.")},
                "BestWeights": {"best": {name: tensor + 1 for name, tensor in state.items()}},
            },
        },
        "nested": {"model": {"ema": mean, "online": state}},
    }


@pytest.mark.parametrize("kind", ema_entries({}))
def test_averaged_weights_on_request(tmp_path, state, kind) -> None:
    content = ema_entries(state)[kind]
    assert_is(found(tmp_path, content), state)
    assert_is(found(tmp_path, content, "ema"), other(state))


def test_torchs_averaged_model(tmp_path) -> None:
    model = Net(3)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    for weights in ("DEFAULT", "ema"):  # it is all there is
        place = found(tmp_path, averaged.state_dict(), weights)
        assert_is(place, model.state_dict())
        assert place.averaged


def test_averaged_weights_that_are_not_there(tmp_path, state) -> None:
    with pytest.raises(
        fcvgg.LoadError, match=r"must hold averaged weights for weights='ema', got 'model'$"
    ):
        found(tmp_path, {"model": state}, "ema")


def test_several_states_are_listed_and_chosen_by_name(tmp_path, state) -> None:
    keys = {**prefixed(state, "student."), **prefixed(other(state), "teacher.")}
    match = (
        r"must hold one state that fits, got 2 with other values: 'state_dict/student', "
        r"'state_dict/teacher'; choose one by weights=NAME \(--weights NAME\)$"
    )
    with pytest.raises(fcvgg.LoadError, match=match):
        found(tmp_path, {"state_dict": keys})
    assert_is(found(tmp_path, {"state_dict": keys}, "state_dict/teacher"), other(state))
    with pytest.raises(
        fcvgg.LoadError, match="must hold the state 'third' for weights='third', got 'sta"
    ):
        found(tmp_path, {"state_dict": keys}, "third")
    with pytest.raises(fcvgg.LoadError, match="got 2 with other values: 'first', 'second'; choose"):
        found(tmp_path, {"first": state, "second": other(state)})


def test_equal_states_are_one(tmp_path, state) -> None:
    assert_is(found(tmp_path, {"model": state, "last": prefixed(state, "module.")}), state)


@pytest.mark.parametrize("extra", ["attention.weight", "features.2.weight", "head.bias"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_model_with_further_layers_is_not_loaded_by_half(tmp_path, state, extra, prefix) -> None:
    keys = prefixed({**state, extra: torch.zeros(4)}, prefix)
    place = found(tmp_path, keys)
    with pytest.raises(fcvgg.LoadError, match=f"1 unexpected: {extra}"):
        checkpoints.load_into(Net(3), place.state, "a.ckpt")


def test_a_missing_tensor_is_named_without_the_prefix(tmp_path, state) -> None:
    keys = prefixed(state, "model.")
    del keys["model.features.0.bias"]
    place = found(tmp_path, {**keys, "criterion.pos_weight": torch.ones(3)})
    with pytest.raises(fcvgg.LoadError, match=r"\(1 missing: features.0.bias\)"):
        checkpoints.load_into(Net(3), place.state, "a.ckpt")


INERT = {
    "paths": pathlib.PosixPath("/data/images"),
    "pure path": pathlib.PurePosixPath("a/b"),
    "array": np.arange(6.0).reshape(2, 3),
    "integers": np.arange(3),
    "texts": np.array(["cat", "dog"]),
    "objects": np.array([{"a": 1}, None], dtype=object),
    "scalar": np.float32(0.5),
    "dtype": np.dtype("int16"),
    "defaultdict": defaultdict(list, {"loss": [1.0, 0.5]}),
    "nested defaultdict": defaultdict(dict, {"a": {"b": np.int64(3)}}),
    "dates": [datetime.datetime(2024, 5, 6, 7), datetime.date(2024, 5, 6), datetime.timedelta(3)],
    "zone": datetime.datetime(2024, 5, 6, tzinfo=datetime.timezone.utc),
    "namespace": argparse.Namespace(lr=0.1, data=pathlib.PosixPath("/data")),
    "ordered": OrderedDict(a=1),
    "identifier": uuid.UUID(int=5),
    "frozen set": frozenset([1, 2]),
    "random state": np.random.RandomState(0).get_state(),
    "type": int,
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", INERT)
def test_plain_objects_beside_the_state(tmp_path, state, name, zipped) -> None:
    content = {"hyper_parameters": {"value": INERT[name]}, "state_dict": state}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert_is(checkpoints.state_of(tmp_path / "a.ckpt", Net(), "classifier"), state)


def test_a_state_in_a_defaultdict(tmp_path, state) -> None:
    assert_is(found(tmp_path, defaultdict(dict, {"model": state})), state)


def test_objects_beside_the_state_are_not_made(tmp_path, monkeypatch) -> None:
    """Their names stand for a class that keeps nothing, so that a file cannot call them."""
    torch.save({"when": datetime.date(2024, 1, 2), "w": torch.ones(1)}, tmp_path / "a.pt")
    content = checkpoints._read_pickle(tmp_path / "a.pt")
    assert type(content["when"]).__name__ == "Inert"


def test_load_names_the_place_and_takes_the_averages(tmp_path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=3).eval()
    plain = model.state_dict()
    mean = {name: tensor * 0.5 for name, tensor in plain.items()}
    content = {"state_dict": prefixed(plain, "model."), "state_dict_ema": mean}
    torch.save(content, tmp_path / "a.ckpt")
    options = {"arch": "squeezenet1_1", "input_size": 64}
    net = fcvgg.load(tmp_path / "a.ckpt", **options)
    assert net.source == "SqueezeNet (state_dict, prefix 'model.')"
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(net(images).flatten(1), model(images), atol=1e-5, rtol=1e-5)
        averaged = fcvgg.load(tmp_path / "a.ckpt", weights="ema", **options)
        model.load_state_dict(mean)
        assert_close(averaged(images).flatten(1), model(images), atol=1e-5, rtol=1e-5)
    assert averaged.source == "SqueezeNet (state_dict_ema)"
