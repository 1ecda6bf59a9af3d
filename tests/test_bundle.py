"""A saved network comes back bit for bit, and a broken bundle as one clear line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fcvgg
from fcvgg.bundle import CONFIG, TENSORS


class ManyOperations(nn.Module):
    """Functions, constants, a permuted flatten, two heads and a layer called twice."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm1d(10)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.hidden = nn.Linear(6 * 4 * 4, 10)
        self.first = nn.Linear(10, 4)
        self.second = nn.Linear(10, 2)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(nn.functional.leaky_relu(self.conv2(x), 0.2)) * self.scale + 0.1
        x = nn.functional.dropout(x.permute(0, 2, 3, 1).flatten(1), 0.3, self.training)
        x = nn.functional.gelu(self.norm(self.hidden(x)))
        return nn.functional.log_softmax(self.first(x), dim=1), self.second(x).sigmoid()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return fcvgg.convert(
        ManyOperations().eval(),
        preprocess=fcvgg.Preprocess((0.4, 0.5, 0.6), 3 * (0.2,), channel_order="BGR", resize=20),
        categories=("a", "b", "c", "d"),
    )


@pytest.fixture
def bundle(net, tmp_path):
    return net.save(tmp_path / "bundle")


def test_restores_bit_for_bit(net, bundle):
    restored = fcvgg.load(bundle)
    images = torch.randn(2, 3, 23, 30)
    for saved, loaded in zip(net(images), restored(images), strict=True):
        assert torch.equal(saved, loaded)
    assert restored.geometry == net.geometry
    assert restored.categories == net.categories
    assert restored.preprocess == net.preprocess
    assert restored.equivalence == net.equivalence
    assert restored.input_size == net.input_size == (16, 16)
    assert [restored.activation_of(i) for i in (0, 1)] == ["log_probabilities", "sigmoid"]
    assert restored.state_dict().keys() == net.state_dict().keys()
    assert str(fcvgg.receptive_fields(restored)) == str(fcvgg.receptive_fields(net))


@pytest.mark.parametrize(
    "options",
    [{}, {"output_stride": 2}, {"padding": "same"}],
    ids=["plain", "output_stride", "same"],
)
def test_restores_the_demo_converted_with(options, tmp_path):
    net = fcvgg.load("demo", verify=False, **options)
    restored = fcvgg.load(net.save(tmp_path / "demo"))
    image = torch.randn(1, 3, 50, 41)
    assert torch.equal(net(image), restored(image))
    assert restored.geometry == net.geometry


def test_restored_network_trains_as_the_saved_one(net, bundle):
    restored = fcvgg.load(bundle)
    images = torch.randn(3, 3, 16, 16)
    losses = []
    for network in (net, restored):
        network.train()
        torch.manual_seed(1)
        loss = sum(maps.square().mean() for maps in network(images))
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    grads = [dict(n.network.named_parameters())["hidden.weight"].grad for n in (net, restored)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_fc_weights_go_back_into_the_source(net, bundle):
    source = ManyOperations().eval()
    source.load_state_dict(fcvgg.load(bundle).classifier_state_dict())
    images = torch.randn(2, 3, 16, 16)
    for scores, maps in zip(source(images), net(images), strict=True):
        torch.testing.assert_close(scores[..., None, None], maps, rtol=1e-5, atol=1e-6)


def test_given_settings_replace_the_saved_ones(bundle):
    preprocess = fcvgg.Preprocess.imagenet()
    restored = fcvgg.load(bundle, preprocess=preprocess, categories="wxyz")
    assert restored.preprocess == preprocess
    assert restored.categories == ("w", "x", "y", "z")


def test_saving_again_replaces_the_bundle(net, bundle):
    with torch.no_grad():
        net.network.get_parameter("scale").add_(1)
    net.save(bundle)
    assert torch.equal(fcvgg.load(bundle).state_dict()["scale"], net.state_dict()["scale"])
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]


def test_saving_refuses_what_is_no_bundle(net, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("keep")
    with pytest.raises(fcvgg.FcvggError, match="exists and is no bundle of fcvgg"):
        net.save(tmp_path / "notes")
    assert (tmp_path / "notes" / "precious.txt").read_text() == "keep"
    with pytest.raises(fcvgg.FcvggError, match="there is no folder"):
        net.save(tmp_path / "absent" / "bundle")


def test_a_foreign_folder_with_a_config_is_no_bundle(net, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    (tmp_path / "pytorch_model.bin").write_text("weights")
    with pytest.raises(fcvgg.FcvggError, match="exists and is no bundle of fcvgg"):
        net.save(tmp_path)
    assert (tmp_path / "pytorch_model.bin").read_text() == "weights"


def test_files_beside_a_bundle_stay(net, bundle):
    (bundle / "README.md").write_text("a model card")
    net.save(bundle)
    assert (bundle / "README.md").read_text() == "a model card"


def test_frozen_parameters_stay_frozen(net, tmp_path):
    net.network.get_parameter("conv1.weight").requires_grad_(False)
    restored = fcvgg.load(net.save(tmp_path / "bundle"))
    frozen = [n for n, p in restored.network.named_parameters() if not p.requires_grad]
    assert frozen == ["conv1.weight"]


def test_a_failing_save_leaves_nothing(net, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fcvgg.bundle.save_file", full)
    with pytest.raises(fcvgg.FcvggError, match=r"cannot write .*No space left on device"):
        net.save(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def edited(bundle, change):
    config = json.loads((bundle / CONFIG).read_text())
    change(config)
    (bundle / CONFIG).write_text(json.dumps(config))


def call_a_function(config, target):
    node = next(n for n in config["graph"] if n["op"] == "call_function")
    node["target"] = target


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b / CONFIG).unlink(), "is no bundle: it holds no config.json"),
        (lambda b: (b / CONFIG).write_text('{"library_name": "fc'), "config.json is broken"),
        (lambda b: (b / CONFIG).write_text("{}"), "is not fcvgg's: expected library_name 'fcvgg'"),
        (lambda b: edited(b, lambda c: c.update(format=99)), "format 99, .* upgrade fcvgg"),
        (lambda b: edited(b, lambda c: c.pop("graph")), "does not describe a network"),
        (lambda b: edited(b, lambda c: c["graph"].pop(3)), "does not describe a network"),
        (
            lambda b: edited(b, lambda c: call_a_function(c, "os.system")),
            "calls 'os.system', which fcvgg has no rule for",
        ),
        (
            lambda b: edited(b, lambda c: c["layers"]["conv1"].update(type="evil.Layer")),
            "layer conv1 is a evil.Layer, which this fcvgg has no rule for",
        ),
        (lambda b: (b / TENSORS).unlink(), "holds no model.safetensors"),
        (lambda b: (b / TENSORS).write_bytes(b"\x08"), "model.safetensors is broken"),
        (
            lambda b: (b / TENSORS).write_bytes((b / TENSORS).read_bytes()[:-100]),
            "model.safetensors is broken",
        ),
    ],
    ids=range(11),
)
def test_a_broken_bundle_is_one_clear_line(bundle, damage, message):
    damage(bundle)
    with pytest.raises(fcvgg.LoadError, match=message) as caught:
        fcvgg.load(bundle)
    assert "\n" not in str(caught.value)


def test_missing_and_misshapen_tensors_are_named(bundle):
    tensors = load_file(bundle / TENSORS)
    save_file({k: v for k, v in tensors.items() if k != "conv2.weight"}, bundle / TENSORS)
    with pytest.raises(fcvgg.LoadError, match=r"lacks 1 tensors: conv2\.weight"):
        fcvgg.load(bundle)
    save_file({**tensors, "conv2.weight": torch.zeros(6, 6, 5, 5)}, bundle / TENSORS)
    with pytest.raises(fcvgg.LoadError, match=r"conv2.weight of shape \(6, 6, 5, 5\), expected"):
        fcvgg.load(bundle)


def test_options_of_conversion_are_refused(bundle):
    with pytest.raises(fcvgg.LoadError, match="to which output_stride cannot be applied"):
        fcvgg.load(bundle, output_stride=2)
    assert fcvgg.load(bundle, verify=False).equivalence.passed  # nothing to verify anew


def test_parametrized_weights_are_refused_with_the_remedy(tmp_path):
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(16, 2)
    )
    net = fcvgg.convert(model.eval(), input_size=4)
    with pytest.raises(fcvgg.FcvggError, match="remove_parametrizations"):
        net.save(tmp_path / "bundle")


def test_a_subclass_that_changes_nothing_is_saved_as_its_base(tmp_path):
    class PlainNorm(nn.BatchNorm2d):
        """A name of its own."""

    model = nn.Sequential(nn.Conv2d(3, 4, 3), PlainNorm(4), nn.Flatten(), nn.Linear(16, 2))
    net = fcvgg.convert(model.eval(), input_size=4)
    image = torch.randn(1, 3, 6, 6)
    assert torch.equal(fcvgg.load(net.save(tmp_path / "bundle"))(image), net(image))


def test_bundles_copy(bundle, tmp_path):
    moved = shutil.copytree(bundle, tmp_path / "moved")
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(fcvgg.load(moved)(image)[0], fcvgg.load(bundle)(image)[0])
