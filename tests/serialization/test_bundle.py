"""A saved network comes back bit for bit, and a broken bundle as one clear line."""

import copy
import json
import shutil

import pytest
import torch
from nets import assert_restored
from safetensors.torch import load, load_file, save_file
from torch import nn

import fcvgg
from fcvgg.rewriting.rules import pointwise
from fcvgg.rewriting.rules.registry import KINDS, LayerKind
from fcvgg.serialization import graph_data, saved_files
from fcvgg.serialization.tensor_table import CONFIG, TENSORS, checksum


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
    assert_restored(net, restored, images)
    assert restored.geometry == net.geometry
    assert restored.categories == net.categories
    assert restored.preprocess == net.preprocess
    assert restored.equivalence == net.equivalence
    assert restored.input_size == net.input_size == (16, 16)
    assert [restored.activation_of(i) for i in (0, 1)] == ["log_probabilities", "sigmoid"]
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
    assert_restored(net, restored, image)
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
    torch.testing.assert_close(*losses)
    grads = [dict(n.network.named_parameters())["hidden.weight"].grad for n in (net, restored)]
    torch.testing.assert_close(*grads)


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
    with pytest.raises(fcvgg.FcvggError, match="exists and is not a bundle of fcvgg"):
        net.save(tmp_path / "notes")
    assert (tmp_path / "notes" / "precious.txt").read_text() == "keep"
    with pytest.raises(fcvgg.FcvggError, match="there is no folder"):
        net.save(tmp_path / "absent" / "bundle")


def test_a_foreign_folder_with_a_config_is_no_bundle(net, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    (tmp_path / "pytorch_model.bin").write_text("weights")
    with pytest.raises(fcvgg.FcvggError, match="exists and is not a bundle of fcvgg"):
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

    monkeypatch.setattr("fcvgg.serialization.bundle.write_tensors", full)
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
        (lambda b: (b / CONFIG).unlink(), "must be a bundle of fcvgg, got none with config.json"),
        (lambda b: (b / CONFIG).write_text('{"library_name": "fc'), "config.json is broken"),
        (lambda b: (b / CONFIG).write_text("{}"), "must have library_name 'fcvgg', got None"),
        (
            lambda b: edited(b, lambda c: c.update(format=99)),
            "must have format 2, got 99; upgrade fcvgg",
        ),
        (lambda b: edited(b, lambda c: c.pop("graph")), "does not describe a network"),
        (lambda b: edited(b, lambda c: c["graph"].pop(3)), "must be plain data or nodes before"),
        (
            lambda b: edited(b, lambda c: call_a_function(c, "os.system")),
            "calls 'os.system', which no bundle may call",
        ),
        (
            lambda b: edited(b, lambda c: c["layers"]["conv1"].update(type="evil.Layer")),
            "layer conv1 is a evil.Layer, which this fcvgg has no rule for",
        ),
        (lambda b: (b / TENSORS).unlink(), "must hold model.safetensors, got none"),
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


def tensors_in(bundle):
    """The tensors of a bundle, in memory: mapped ones change with a file that is overwritten."""
    return load((bundle / TENSORS).read_bytes())


def test_missing_and_misshapen_tensors_are_named(bundle):
    tensors = tensors_in(bundle)
    save_file({k: v for k, v in tensors.items() if k != "conv2.weight"}, bundle / TENSORS)
    with pytest.raises(fcvgg.LoadError, match=r"lacks 1 tensors: conv2\.weight"):
        fcvgg.load(bundle)
    save_file({**tensors, "conv2.weight": torch.zeros(6, 6, 5, 5)}, bundle / TENSORS)
    with pytest.raises(
        fcvgg.LoadError, match=r"conv2.weight in .* got float32 of shape \(6, 6, 5, 5\)"
    ):
        fcvgg.load(bundle)


def addresses(net):
    return {tensor.data_ptr() % 64 for tensor in net.network.state_dict().values()}


def test_loaded_tensors_are_aligned_like_those_of_torch(bundle):
    """Or torch may choose other kernels, whose sums differ in their last bits."""
    assert addresses(fcvgg.load(bundle)) == {0}


def test_a_file_that_safetensors_wrote_is_aligned_too(net, bundle):
    save_file(tensors_in(bundle), bundle / TENSORS, {"format": "pt"})
    image = torch.randn(2, 3, 20, 24)
    loaded = fcvgg.load(bundle)
    assert addresses(loaded) == {0}
    assert_restored(net, loaded, image)


@pytest.mark.parametrize("dtype", list(saved_files._DTYPES))
def test_tensors_of_every_dtype_are_written_for_safetensors_to_read(tmp_path, dtype):
    tensors = {
        "odd": torch.arange(5).to(dtype),
        "large": torch.arange(512).view(2, 256).to(dtype),
        "number": torch.tensor(1).to(dtype),
        "empty": torch.ones(0, 3, dtype=dtype),
    }
    path = tmp_path / "a.safetensors"
    saved_files.write_tensors(path, tensors)
    for found in (load_file(path), saved_files.read_tensors(path)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert load_file(path)["large"].data_ptr() % 64 == 0  # whatever lies around it


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"z must be of a dtype .*, got torch\.complex64"):
        saved_files.write_tensors(tmp_path / "a", {"z": torch.ones(1, dtype=torch.complex64)})


def test_the_native_size_of_a_bundle_is_decided(bundle):
    with pytest.raises(fcvgg.ArgumentError, match="input_size must be left out for a converted"):
        fcvgg.load(bundle, input_size=64)
    assert fcvgg.load(bundle, verify=False).equivalence.passed  # nothing to verify again


def test_weights_and_arch_are_refused(bundle):
    with pytest.raises(fcvgg.LoadError, match=r"weights must be left out for .*, got 'other\.pth'"):
        fcvgg.load(bundle, weights="other.pth")
    with pytest.raises(fcvgg.LoadError, match="arch='vgg11' must come with a checkpoint"):
        fcvgg.load(bundle, arch="vgg11")


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
    assert_restored(net, fcvgg.load(net.save(tmp_path / "bundle")), image)


def test_bundles_copy(bundle, tmp_path):
    moved = shutil.copytree(bundle, tmp_path / "moved")
    image = torch.randn(1, 3, 16, 16)
    assert_restored(fcvgg.load(bundle), fcvgg.load(moved), image)


# -- files that somebody made ---------------------------------------------------------------------


def refused(bundle, message):
    """One line that says what is wrong, and nothing else."""
    with pytest.raises(fcvgg.LoadError, match=message) as caught:
        fcvgg.load(bundle)
    assert "\n" not in str(caught.value)


def node(config, op):
    return next(n for n in config["graph"] if n["op"] == op)


def rename_layer(config, old, new):
    config["layers"][new] = config["layers"].pop(old)
    config["tensors"] = {
        name.replace(f"{old}.", f"{new}."): entry for name, entry in config["tensors"].items()
    }
    for call in config["graph"]:
        if call["target"] == old:
            call["target"] = new


def read_tensor(config, target):
    node(config, "get_attr")["target"] = target


@pytest.mark.parametrize(
    ("inject", "message"),
    [
        (
            lambda c, code: node(c, "placeholder").update(target=f"images=({code})"),
            "input of the bundle's graph must be 'images', got",
        ),
        (
            lambda c, code: node(c, "call_function")["kwargs"].update({f"a=({code}), b": 1}),
            "must be named by identifiers, got",
        ),
        (
            lambda c, code: rename_layer(c, "pool", f'pool") if {code} else ("'),
            "cannot hold the name",
        ),
        (
            lambda c, code: read_tensor(c, f'a") if {code} else ("'),
            "must read tensors of its own, got",
        ),
        (
            lambda c, code: c["tensors"].update({f'a"), {code}, ("': c["tensors"]["scale"]}),
            "cannot hold the name",
        ),
        (
            lambda c, code: node(c, "call_module").update(name=f"x, y={code}"),
            "must be new identifiers, got",
        ),
        (lambda c, code: node(c, "call_method").update(target=f"view or {code}"), "may call"),
    ],
    ids=["placeholder", "kwargs", "layer", "get_attr", "tensor", "name", "method"],
)
def test_no_name_in_a_file_becomes_code(bundle, inject, message, tmp_path):
    trace = tmp_path / "executed"
    # fx splits a path at its dots, so the code has none
    name = "".join(f"chr({ord(c)})+" for c in str(trace))[:-1]
    edited(bundle, lambda c: inject(c, f"open({name}, chr(119))"))
    try:
        refused(bundle, message)
    finally:
        assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["graph"].insert(0, {**c["graph"][0], "name": "more"}), "2 inputs and 1 out"),
        (lambda c: c["graph"].append({**c["graph"][-1], "name": "more"}), "1 inputs and 2 out"),
        (lambda c: c["graph"].pop(), "1 inputs and 0 outputs"),
        (lambda c: rename_layer(c, "pool", "__class__"), "cannot hold the name '__class__'"),
        (lambda c: rename_layer(c, "pool", "lambda"), "cannot hold the name 'lambda'"),
        (lambda c: read_tensor(c, "_modules"), "must read tensors of its own, got '_modules'"),
        (lambda c: node(c, "call_module").update(target="pool.forward"), "does not describe"),
        (lambda c: node(c, "call_module")["kwargs"].update(other=1), "does not take: .*'other'"),
        (
            lambda c: node(c, "call_module").update(kwargs={"class": 1}),
            "named by identifiers, got 'class'",
        ),
        (lambda c: c["layers"]["conv1"]["settings"].update(stride=[0]), "cannot be made|not run"),
        (lambda c: c["layers"]["conv1"]["settings"].update(stride={"tuple": [3, 3]}), "network"),
        (lambda c: c["classes"].reverse(), "must be .* by its geometry and classes, got"),
        (lambda c: c.update(in_channels=4), "does not run"),
        (
            lambda c: c["geometry"]["height"].update(steps=[]),
            "must have a list of 1 to 10,000 steps",
        ),
        (
            lambda c: c["geometry"]["width"]["steps"][0]["window"].update(stride=1.5),
            "known integers",
        ),
        (lambda c: c.update(aliases=["nothing"]), "aliases must be layers of the bundle, got"),
        (lambda c: c.update(graph=json.loads("[" * 200 + "]" * 200)), "not describe a network"),
    ],
    ids=range(17),
)
def test_a_description_that_does_not_hold_together_is_refused(bundle, change, message):
    edited(bundle, change)
    refused(bundle, message)


def test_json_of_any_depth_is_one_line(bundle):
    (bundle / CONFIG).write_text("[" * 100_000)
    refused(bundle, "config.json is broken")


@pytest.mark.parametrize(
    "name", ["source", "input_size", "activation", "categories", "preprocess", "equivalence"]
)
def test_a_missing_setting_is_named(bundle, name):
    edited(bundle, lambda c: c.pop(name))
    refused(bundle, f"config.json lacks '{name}'")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", 3),
        ("input_size", [16]),
        ("input_size", "16"),
        ("input_size", [16, -1]),
        ("activation", "loud"),
        ("activation", ["logits"]),
        ("categories", ["one"]),
        ("categories", [1, 2, 3, 4]),
        ("preprocess", 3),
        ("preprocess", {"mean": [0.5]}),
        ("preprocess", {"mean": [0.5], "std": [0.0]}),
        ("preprocess", {"mean": {"a": 1}, "std": [1]}),
        ("equivalence", 3),
        ("equivalence", {"passed": True}),
        ("activations", ["logits", "loud"]),
    ],
)
def test_a_setting_that_is_junk_is_named(bundle, name, value):
    edited(bundle, lambda c: c.update({name: value}))
    refused(bundle, name.removesuffix("s") if name == "activations" else name)


def test_a_report_that_is_junk_is_named(bundle):
    edited(bundle, lambda c: c["equivalence"].update(tolerance="low"))
    refused(bundle, "equivalence.tolerance must be .*, got 'low'")


# -- tensors --------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Weights that no layer declares, channels in reverse, a buffer, and a permuted flatten."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.register_buffer("shift", torch.rand(1))
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = self.norm(torch.relu(nn.functional.conv2d(x, self.w, padding=1)) + self.shift)
        return self.head(x.flip(1).sigmoid().permute(0, 2, 3, 1).flatten(1))


class ChannelsLast(Functional):
    def forward(self, x):
        x = nn.functional.conv2d(x, self.w, padding=1)
        return self.head(self.norm(x.flip(1)).permute(0, 2, 3, 1).flatten(1))


@pytest.fixture(params=[Functional, ChannelsLast])
def functional(request, tmp_path):
    torch.manual_seed(0)
    net = fcvgg.convert(request.param().eval(), input_size=4)
    return net, net.save(tmp_path / "functional")


def test_tensors_of_no_layer_come_back_as_they_were(functional):
    net, bundle = functional
    restored = fcvgg.load(bundle)
    images = torch.randn(2, 3, 9, 7)
    assert_restored(net, restored, images)
    assert [n for n, _ in restored.named_parameters()] == [n for n, _ in net.named_parameters()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("w"), "lacks 1 tensors: w"),
        (
            lambda t: t.update(more=torch.ones(2)),
            "must hold the tensors in config.json alone, got 1 tensors: more",
        ),
        (
            lambda t: t.update(w=t["w"][:, :, :2].clone()),
            r"w in .*, got float32 of shape \(4, 3, 2, 3\)",
        ),
        (lambda t: t.update(w=t["w"].half()), "w in .* must be float32 of .*, got float16"),
        (
            lambda t: t.update({"head.column_order": t["head.column_order"].flip(0)}),
            "head.column_order in .* must hold the values that were saved",
        ),
    ],
    ids=["missing", "unknown", "misshapen", "half", "reversed"],
)
def test_the_file_holds_just_the_tensors_that_were_saved(functional, change, message):
    _, bundle = functional
    tensors = tensors_in(bundle)
    change(tensors)
    save_file(tensors, bundle / TENSORS)
    refused(bundle, message)


@pytest.mark.parametrize("turned", [lambda o: o.flip(0), lambda o: o * 0, lambda o: o + 1])
def test_a_changed_order_is_refused_whatever_the_table_says(tmp_path, turned):
    net = fcvgg.convert(ChannelsLast().eval(), input_size=4)
    bundle = net.save(tmp_path / "bundle")
    tensors = tensors_in(bundle)
    orders = [n for n in tensors if n.startswith("channel_order")]
    assert orders
    tensors.update({name: turned(tensors[name]) for name in orders})
    save_file(tensors, bundle / TENSORS)
    refused(bundle, "channel_order.* must hold the values that were saved")

    def agree(config):
        for name in orders:
            config["tensors"][name]["crc32"] = checksum(tensors[name])

    edited(bundle, agree)
    order = tensors[orders[0]]
    if order.max() >= len(order):  # else it is another network, which may choose one twice
        refused(bundle, "must be indices from 0 to 3")


# -- what may be called ---------------------------------------------------------------------------


def test_every_function_with_a_rule_can_be_saved():
    known = set(graph_data.functions().values())
    shipped = {
        target
        for target in KINDS
        if callable(target) and not isinstance(target, type) and target.__module__ != __name__
    }
    assert shipped <= known
    methods = {t for t in KINDS if isinstance(t, str) and hasattr(torch.Tensor, t)}
    assert methods <= graph_data.methods()


def test_registering_a_rule_does_not_widen_what_files_may_call(bundle, monkeypatch):
    monkeypatch.setitem(KINDS, torch.save, LayerKind())
    monkeypatch.setitem(KINDS, "numpy", LayerKind())
    edited(bundle, lambda c: call_a_function(c, "torch.save"))
    refused(bundle, "calls 'torch.save', which no bundle may call")
    edited(bundle, lambda c: node(c, "call_function").update(op="call_method", target="numpy"))
    refused(bundle, "calls 'Tensor.numpy', which no bundle may call")


class Cubed(nn.Module):
    def forward(self, x):
        return x**3


def test_own_functions_are_refused_and_own_layers_load_where_registered(tmp_path, monkeypatch):
    for target in (torch.sinc, Cubed):
        monkeypatch.setitem(KINDS, target, LayerKind())
        pointwise(target)

    class Own(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.head = nn.Linear(48, 2)

        def forward(self, x):
            x = torch.sinc(x) if self.layer is None else self.layer(x)
            return self.head(x.flatten(1))

    net = fcvgg.convert(Own(None).eval(), input_size=4)
    with pytest.raises(fcvgg.FcvggError, match=r"calls sinc, which a bundle cannot hold; do it in"):
        net.save(tmp_path / "function")
    net = fcvgg.convert(Own(Cubed()).eval(), input_size=4)
    bundle = net.save(tmp_path / "layer")
    images = torch.randn(1, 3, 5, 5)
    assert_restored(net, fcvgg.load(bundle), images)
    monkeypatch.delitem(KINDS, Cubed)
    refused(bundle, "Cubed, which this fcvgg has no rule for; register its rule")


class Gated(nn.Module):
    """A gate with a parameter for every channel, whose number it does not keep."""

    def __init__(self, channels):
        super().__init__()
        self.gate = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x):
        return x * torch.sigmoid(self.gate * x)


def test_an_own_layer_must_keep_what_makes_it_again(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, Gated, LayerKind())
    pointwise(Gated)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Gated(4), nn.Flatten(), nn.Linear(16, 2)).eval()
    net = fcvgg.convert(model, input_size=4)
    with pytest.raises(fcvgg.FcvggError, match=r"1 \(Gated\) must keep its argument channels"):
        net.save(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    net.network.get_submodule("1").channels = 4
    assert_restored(net, fcvgg.load(net.save(tmp_path / "bundle")), torch.randn(1, 3, 7, 6))


def test_a_name_that_no_bundle_holds_is_refused_as_it_is_saved(tmp_path):
    model = nn.Sequential()
    model.add_module("conv-1", nn.Conv2d(3, 4, 3))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(16, 2))
    net = fcvgg.convert(model.eval(), input_size=4)
    with pytest.raises(fcvgg.FcvggError, match=r"cannot hold the name 'conv-1'.*rename the layer"):
        net.save(tmp_path / "bundle")


# -- a layer at several places --------------------------------------------------------------------


class Again(nn.Module):
    """One fully connected layer over the whole window, and then over its own scores."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(torch.relu(self.fc(torch.relu(self.conv(x)).flatten(1))))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", ["converted", "copied", "cast", "saved"])
def test_a_layer_called_twice_takes_a_checkpoint_at_both_places(assign, way, tmp_path):
    torch.manual_seed(0)
    net = fcvgg.convert(Again().eval(), input_size=4, copy=True)
    if way == "copied":
        net = copy.deepcopy(net)
    if way == "cast":
        net = net.double().float()
    if way == "saved":
        net = fcvgg.load(net.save(tmp_path / "bundle"))
    other = Again().eval()
    for state in (other.state_dict(), fcvgg.convert(other, input_size=4).state_dict()):
        net.load_state_dict({k: v.clone() for k, v in state.items()}, assign=assign)
        images = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(net(images).flatten(1), other(images))
    names = [name for name, _ in net.network.named_parameters(remove_duplicate=False)]
    assert names == [name for name, _ in other.named_parameters()]  # both places read one weight


def test_a_network_without_values_takes_a_checkpoint_by_assignment():
    other = Again().eval()
    with torch.device("meta"):
        model = Again().eval()
    net = fcvgg.convert(model, input_size=4, verify=False)
    net.load_state_dict(other.state_dict(), assign=True)
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(net(images).flatten(1), other(images))


def test_the_names_of_layers_in_files_do_not_follow_the_modules(tmp_path):
    """Bundles name the package's own layers by a name of the format; older files hold it too."""
    net = fcvgg.load("demo")
    config = json.loads((net.save(tmp_path / "bundle") / CONFIG).read_text())
    assert "fcvgg.modules.WindowLinear" in json.dumps(config)
