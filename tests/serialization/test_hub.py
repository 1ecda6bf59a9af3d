"""Networks on the Hugging Face hub: its own client against a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import huggingface_hub
import huggingface_hub.constants
import pytest
import timm
import torch
from hub_server import TOKEN, serving
from safetensors.torch import save
from torch.testing import assert_close

import fcvgg

# of the client's transport, about the client's own call
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The client's settings point to the server; they are read from the environment at import."""
    constants = huggingface_hub.constants
    with serving() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # the server stores files whole; the oldest clients do so in any case
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="module")
def net():
    return fcvgg.load("demo")


def assert_same(got, expected):
    images = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(got(images), expected(images), atol=0, rtol=0)


def test_a_network_comes_back_from_the_hub(hub, net):
    address = net.push_to_hub("owner/demo", license="mit")
    assert address == f"{hub.endpoint}/owner/demo"
    assert sorted(hub.files("owner/demo")) == ["README.md", "config.json", "model.safetensors"]
    loaded = fcvgg.load("hf:owner/demo")
    assert_same(loaded, net)
    assert loaded.categories == net.categories
    assert loaded.equivalence == net.equivalence


def test_the_model_card_is_parsed_by_the_hub(hub, net, tmp_path):
    net.push_to_hub("owner/demo", license="mit")
    card = huggingface_hub.ModelCard.load("owner/demo")
    assert card.data.library_name == "fcvgg"
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "image-classification"
    assert {"fcvgg", "fully-convolutional"} <= set(card.data.tags)
    facts = card.data.to_dict()["fcvgg"]
    assert facts["window"] == list(net.geometry.window)
    assert facts["stride"] == list(net.geometry.stride)
    assert facts["categories"] == 2
    assert "| Window | 32 x 32 pixels |" in card.text
    assert f"largest difference {net.equivalence.max_abs_error:.2g}" in card.text
    saved = huggingface_hub.ModelCard.load(net.save(tmp_path / "bundle") / "README.md")
    assert saved.data.license == "unknown"


def test_odd_names_do_not_break_the_card(tmp_path):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    net = fcvgg.convert(torch.nn.Sequential(*layers, torch.nn.Linear(4, 2)), input_size=8)
    net.source = 'a: "b" | c'
    path = net.save(tmp_path / "bundle", license='odd: "licence"')
    card = huggingface_hub.ModelCard.load(path / "README.md")
    assert card.data.license == 'odd: "licence"'


def test_a_card_that_the_user_changed_stays(net, tmp_path):
    card = net.save(tmp_path / "bundle") / "README.md"
    written = card.read_text()
    card.write_text(written + "edited\n")
    net.save(tmp_path / "bundle")
    assert card.read_text() == written
    card.write_text("# My own card\n")
    net.save(tmp_path / "bundle")
    assert card.read_text() == "# My own card\n"


def test_revisions(hub, net):
    net.push_to_hub("owner/demo")
    torch.manual_seed(0)
    other = fcvgg.load("demo", categories=("no", "yes"))
    other.push_to_hub("owner/demo@second")
    assert fcvgg.load("hf:owner/demo").categories == net.categories
    assert fcvgg.load("hf:owner/demo@second").categories == ("no", "yes")
    commit = hub.branches["owner/demo"]["second"]
    assert fcvgg.load(f"hf:owner/demo@{commit}").categories == ("no", "yes")
    assert_refused("hf:owner/demo@third", "has no such revision; check the name after '@'")


def test_loaded_again_without_a_connection(hub, net, monkeypatch):
    net.push_to_hub("owner/demo")
    fcvgg.load("hf:owner/demo")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(fcvgg.load("hf:owner/demo"), net)
    assert_refused("hf:owner/other", "the hub could not be reached .*check the connection")


def test_another_hub_is_named_by_the_environment(hub, net, tmp_path):
    net.push_to_hub("owner/demo")
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", "import fcvgg; print(fcvgg.load('hf:owner/demo').categories)"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == str(net.categories), run.stderr


def test_without_a_connection(hub, monkeypatch):
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    assert_refused("hf:owner/demo", r"the hub could not be reached \(.*refused")
    assert_refused("timm:hf-hub:owner/demo", r"the hub could not be reached \(.*refused")
    assert time.monotonic() - began < 10  # the client itself tries for half a minute


@pytest.mark.parametrize("source", ["hf:owner/{}", "timm:hf-hub:owner/{}"])
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("absent", "does not exist or is private; check the name, or log in with 'hf auth login'"),
        ("private", "does not exist or is private; check the name, or log in"),
        ("gated", "is gated; accept its terms on its page, then log in"),
        ("empty", "must hold a .*, got none of its files"),
        ("a/b", "must be user/name or user/name@revision, got"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(hub, monkeypatch, source, name, match):
    monkeypatch.delenv("HF_TOKEN")
    hub.create("owner/private")
    hub.create("owner/empty")
    assert_refused(source.format(name), match)


def test_private_repositories_open_with_a_token(hub, net, monkeypatch):
    net.push_to_hub("owner/private", private=True)
    assert_same(fcvgg.load("hf:owner/private"), net)


def test_pushing_without_a_token_is_refused(hub, net, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(fcvgg.FcvggError, match="log in with 'hf auth login'") as caught:
        net.push_to_hub("owner/demo")
    assert "\n" not in str(caught.value)


def test_repositories_of_other_libraries_are_told_apart(hub):
    hub.commit("owner/timm", {"config.json": b'{"architecture": "vgg11", "pretrained_cfg": {}}'})
    assert_refused("hf:owner/timm", "got another model; pass timm:hf-hub:owner/timm")
    hub.commit("owner/vit", {"config.json": b'{"model_type": "vit"}'})
    assert_refused("hf:owner/vit", "load it with transformers and use fcvgg.convert")
    hub.commit("owner/other", {"config.json": b"[]"})
    assert_refused("hf:owner/other", "must hold an object")


def test_options_of_conversion_do_not_fit_a_bundle(hub, net):
    net.push_to_hub("owner/demo")
    assert_refused("hf:owner/demo", "arch='vgg16' must come with a checkpoint", arch="vgg16")


def test_timms_models_come_from_the_hub(hub):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    pretrained = {**model.pretrained_cfg, "num_classes": 3, "input_size": [3, 64, 64]}
    config = {
        **{"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": pretrained},
        **{"label_names": ["a", "b", "c"], "label_descriptions": {"a": "apple"}},
    }
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(model.state_dict()),
    }
    hub.commit("owner/fruit", files)
    net = fcvgg.load("timm:hf-hub:owner/fruit")
    assert net.categories == ("apple", "b", "c")
    assert net.input_size == (64, 64)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(net(images).flatten(1), model(images), atol=1e-5, rtol=0)


def test_missing_package_is_named(monkeypatch, net):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(fcvgg.MissingExtraError, match=r"pip install 'fcvgg\[hub\]'"):
        fcvgg.load("hf:owner/demo")
    with pytest.raises(fcvgg.MissingExtraError, match=r"pip install 'fcvgg\[hub\]'"):
        net.push_to_hub("owner/demo")


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("https://example.org/vgg16.pth", "download the file and pass its path"),
        ("https:/example.org/bundle", "download the file and pass its path"),
        ("s3://bucket/net.onnx", "download the file and pass its path"),
        ("https://huggingface.co/owner/demo", "pass 'hf:owner/demo'"),
        ("https://huggingface.co/owner/demo/tree/v2", "pass 'hf:owner/demo@v2'"),
    ],
)
def test_addresses_are_refused_in_one_line(address, remedy):
    whole = address.replace("https:/example", "https://example")  # as a path it has lost a slash
    assert_refused(address, f"must be a name or a path, got the address '{whole}'; {remedy}$")


def assert_refused(source, match, **options):
    with pytest.raises(fcvgg.LoadError, match=match) as caught:
        fcvgg.load(source, **options)
    assert "\n" not in str(caught.value)
