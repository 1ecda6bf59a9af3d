"""An exported network gives the same maps in other runtimes, at sizes it was not traced at."""

import json

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fcvgg
import fcvgg.rewriting.rules.registry
import fcvgg.serialization.exporting

SIZES = {"native": (32, 32), "odd": (45, 33), "large": (96, 120)}
"""Native gives one cell, which torch.export would guard against."""


@pytest.fixture(scope="module")
def net():
    return fcvgg.load("demo", verify=False)


@pytest.fixture(scope="module")
def onnx_file(net, tmp_path_factory):
    return net.export(tmp_path_factory.mktemp("export") / "demo.onnx")


@pytest.fixture(scope="module")
def pt2_file(net, tmp_path_factory):
    return net.export(tmp_path_factory.mktemp("export") / "demo.pt2")


def images_of(size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_onnxruntime_agrees(net, onnx_file, size, batch):
    images = images_of(size, batch)
    session = onnxruntime.InferenceSession(onnx_file)
    (scores,) = session.run(None, {"images": images.numpy()})
    assert scores.shape == (batch, 2, *net.output_size(size))
    torch.testing.assert_close(torch.from_numpy(scores), net(images).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_openvino_reads_the_onnx_and_agrees(net, onnx_file, size):
    images = images_of(size)
    compiled = openvino.compile_model(onnx_file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    scores = compiled(images.numpy())[0]
    torch.testing.assert_close(
        torch.from_numpy(np.array(scores)), net(images).detach(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_torch_export_agrees(net, pt2_file, size, batch):
    images = images_of(size, batch)
    program = torch.export.load(pt2_file).module()
    torch.testing.assert_close(program(images), net(images), rtol=1e-4, atol=1e-4)


def test_one_onnx_file_with_metadata(net, onnx_file):
    assert [path.name for path in onnx_file.parent.iterdir()] == ["demo.onnx"]
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model)
    entries = {p.key: json.loads(p.value) for p in model.metadata_props if "fcvgg." in p.key}
    assert entries["fcvgg.stride"] == [8, 8]
    assert entries["fcvgg.window"] == [32, 32]
    assert entries["fcvgg.offset"] == [-14, -14]
    assert entries["fcvgg.categories"] == ["background", "face"]
    assert entries["fcvgg.preprocess"]["mean"] == [0.5, 0.5, 0.5]
    assert fcvgg.Geometry.from_dict(entries["fcvgg.geometry"]) == net.geometry


def test_free_dimensions_have_names(onnx_file):
    graph = onnx.load(onnx_file).graph
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (graph.input[0], graph.output[0])
    ]
    assert shapes[0] == ["batch", 3, "height", "width"]
    assert shapes[1][:2] == ["batch", 2]
    assert "height//8" in shapes[1][2]


def test_torch_export_carries_the_metadata(pt2_file):
    entries = {"fcvgg.categories": ""}
    torch.export.load(pt2_file, extra_files=entries)
    assert json.loads(entries["fcvgg.categories"]) == ["background", "face"]


def test_several_outputs_have_names(tmp_path):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.one, self.two = nn.Linear(16, 2), nn.Linear(16, 3)

        def forward(self, x):
            x = self.conv(x).flatten(1)
            return self.one(x), self.two(x)

    net = fcvgg.convert(TwoHeads().eval(), input_size=4)
    session = onnxruntime.InferenceSession(net.export(tmp_path / "two.onnx"))
    assert [output.name for output in session.get_outputs()] == ["scores_0", "scores_1"]


def test_export_keeps_the_mode(tmp_path):
    net = fcvgg.load("demo", verify=False).train()
    net.export(tmp_path / "demo.pt2")
    assert all(module.training for module in net.modules())


def test_an_unknown_ending_is_refused(net, tmp_path):
    with pytest.raises(fcvgg.FcvggError, match=r"in .onnx or .pt2, got 'demo.tflite'"):
        net.export(tmp_path / "demo.tflite")
    with pytest.raises(fcvgg.FcvggError, match="there is no folder"):
        net.export(tmp_path / "absent" / "demo.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(net, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(fcvgg.MissingExtraError, match=r"pip install 'fcvgg\[onnx\]'"):
        net.export(tmp_path / "demo.onnx")
    assert list(tmp_path.iterdir()) == []


class Normed(nn.Module):
    """Local response normalisation, as a layer and as a function, and scores that are unknown."""

    def __init__(self, size: int):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.LocalResponseNorm(size, alpha=0.5, k=2.0)
        self.size = size
        self.fc = nn.Linear(8 * 6 * 6, 4)

    def forward(self, x):
        x = self.norm(self.conv(x).relu())
        x = F.local_response_norm(x, self.size, beta=0.5, alpha=0.3)
        return self.fc(x.flatten(1)).softmax(1) * 2 - 1


@pytest.mark.parametrize("size", [3, 4])
def test_local_response_normalisation(size, tmp_path):
    torch.manual_seed(0)
    net = fcvgg.convert(Normed(size).eval(), input_size=8)
    path = net.export(tmp_path / "normed.onnx")
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("LRN") == (2 if size == 3 else 0)
    images = torch.randn(3, 3, 11, 13)
    (scores,) = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), net(images).detach(), rtol=1e-5, atol=1e-6)


def test_what_was_exported_loads_back(tmp_path):
    torch.manual_seed(0)
    net = fcvgg.convert(Normed(5).eval(), input_size=8, categories=list("abcd"))
    assert net.activation == "unknown"
    back = fcvgg.load(net.export(tmp_path / "normed.onnx"))
    assert back.activation == "unknown"
    assert back.categories == net.categories
    assert back.equivalence.passed
    assert back.geometry == net.geometry
    images = torch.randn(2, 3, 11, 13)
    torch.testing.assert_close(back(images), net(images), rtol=1e-6, atol=1e-6)


# -- every layer kind, in onnxruntime and in torch.export's module ---------------------------------

ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(2.0), nn.SELU(), nn.CELU(2.0), nn.GELU()),
    *(nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Tanh(), nn.Softplus(3, 1)),
    *(nn.Softsign(), nn.RReLU(), nn.Softshrink(), nn.Hardshrink(), nn.Tanhshrink()),
    *(nn.Hardtanh(-0.2, 0.3), nn.Sigmoid(), nn.Hardsigmoid(), nn.LogSigmoid(), nn.PReLU(4)),
    *(nn.Threshold(0.1, -2), nn.Softmax2d(), nn.BatchNorm2d(4), nn.LocalResponseNorm(4)),
    *(nn.Dropout(), nn.AlphaDropout(), nn.Dropout2d(), nn.ChannelShuffle(2)),
]
FUNCTIONS = [
    *(F.rrelu, F.logsigmoid, torch.erf, torch.sign, torch.square, torch.exp, torch.neg, torch.abs),
    *(lambda x: x.abs().log1p(), lambda x: (x.abs() + 1).rsqrt(), lambda x: x.abs().sqrt()),
    *(lambda x: torch.max(x, -0.3 * x), lambda x: torch.minimum(x, 0.3 * x), lambda x: 1 - x),
    *(lambda x: torch.where(x > 0.1, x, x * 0.2), lambda x: x.masked_fill(x < 0.05, 0.0)),
    *(lambda x: x.clamp(-0.1, 0.2), lambda x: x.abs() ** 1.5, lambda x: F.normalize(x, dim=1)),
    *(lambda x: x[:, [3, 1, 0, 2]], lambda x: x.flip(1), lambda x: x / 3 + 0.5),
    lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2),
]


class Sum(nn.Module):
    """The sum of what layers make of one map."""

    def __init__(self, layers, functions=()):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.functions = functions

    def forward(self, x):
        return sum(call(x) for call in (*self.layers, *self.functions))


def of(*layers, size=27):
    """A net of a convolution, the layers under test and a fully connected head."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), *layers).eval()
    features = trunk(torch.zeros(1, 3, size, size)).flatten(1).shape[1]
    model = nn.Sequential(*trunk, nn.Flatten(), nn.Linear(features, 3)).eval()
    return fcvgg.convert(model, input_size=size)


def check_export(net, path, in_openvino=False):
    """Run the exported file at three sizes, of which two are beyond the native."""
    written = net.export(path)
    assert written.check.startswith("checked at ")
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        engines = [lambda x: session.run(None, {"images": x.numpy()})[0]]
        if in_openvino:
            compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            engines.append(lambda x: np.array(compiled(x.numpy())[0]))
    else:
        engines = [torch.export.load(path).module()]
    for extra in ((0, 0), (13, 6), (20, 31)):
        size = [max(n, w) + e for n, w, e in zip(net.input_size, net.geometry.window, extra)]
        images = images_of(size)
        with torch.no_grad():
            expected = net(images)
            for engine in engines:
                got = torch.as_tensor(engine(images))
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


POOLS = {
    "divisor": nn.AvgPool2d(3, 2, divisor_override=1),
    "divisor and padding": nn.AvgPool2d(3, 2, 1, divisor_override=5),
    "divisor and padding left out": nn.AvgPool2d(3, 2, 1, False, False, divisor_override=5),
    "divisor and ceil mode": nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=5),
    "divisor, ceil mode and padding": nn.AvgPool2d((3, 2), 3, 1, True, divisor_override=5),
    "padding left out": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "ceil mode": nn.AvgPool2d(3, 2, ceil_mode=True),
    "ceil mode and padding": nn.AvgPool2d((2, 3), (3, 2), 1, True),
    "ceil mode and padding left out": nn.AvgPool2d((2, 3), (3, 2), 1, True, False),
    "maximum in ceil mode": nn.MaxPool2d(3, 2, ceil_mode=True),
    "maximum in ceil mode and padding": nn.MaxPool2d((2, 3), (3, 2), 1, ceil_mode=True),
    "maximum, dilated": nn.MaxPool2d(2, 3, 1, dilation=2, ceil_mode=True),
}
KINDS = {
    "activations": (Sum(ACTIVATIONS),),
    "functions": (Sum([], FUNCTIONS),),
    "paddings": (
        *(nn.ZeroPad2d((1, 2, 0, 1)), nn.ConstantPad2d(1, 2.5), nn.ReflectionPad2d((1, 2, 0, 1))),
        *(nn.ReplicationPad2d(2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        *(nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, 2, (1, 2), 2, 2)),
    ),
    "adaptive pool": (nn.AdaptiveAvgPool2d(5), nn.Conv2d(4, 4, 1), nn.AdaptiveMaxPool2d(2)),
    "norms": (nn.Flatten(), nn.LayerNorm(2500), nn.BatchNorm1d(2500)),
    **{name: (pool,) for name, pool in POOLS.items()},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_in_onnxruntime(kind, tmp_path):
    check_export(of(*KINDS[kind]), tmp_path / "net.onnx", in_openvino="divisor" in kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "divisor" not in kind])
def test_every_kind_of_layer_in_torch(kind, tmp_path):
    check_export(of(*KINDS[kind]), tmp_path / "net.pt2")


SUMS = {
    "sum": lambda x: x.sum((2, 3)),
    "sum of rows, then of columns": lambda x: x.sum(3).sum(2),
    "sum by the number of elements": lambda x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]),
    "pool": lambda x: F.avg_pool2d(x, x.shape[2:], divisor_override=7).flatten(1),
}


@pytest.mark.parametrize("pool", SUMS.values(), ids=SUMS.keys())
def test_sums_over_all_positions(pool, tmp_path):
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(pool(self.trunk(x)))

    torch.manual_seed(0)
    net = fcvgg.convert(Summed().eval(), input_size=24)
    check_export(net, tmp_path / "sums.onnx", in_openvino=True)
    assert fcvgg.load(tmp_path / "sums.onnx").equivalence.passed


# -- what an export says of itself -----------------------------------------------------------------


def test_a_file_that_gives_other_scores_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(fcvgg.serialization.exporting._FOR_ONNX, F.avg_pool2d, F.avg_pool2d)
    net = of(nn.AvgPool2d(3, 2, divisor_override=1))
    with pytest.raises(
        fcvgg.EquivalenceError,
        match=r"net.onnx gives other scores than the network at .* pixels, by .* of the largest",
    ):
        net.export(tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_run_is_said(net, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    written = net.export(tmp_path / "demo.onnx")
    assert written.check == ("not checked: onnxruntime is not installed; pip install 'fcvgg[onnx]'")
    assert written == tmp_path / "demo.onnx"
    assert written.stat().st_size > 800_000


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_what_torch_cannot_export_is_named(suffix, tmp_path, monkeypatch):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.igamma(x.abs() + 1, x.abs() + 0.5)

    class Sized(nn.ReLU):
        def forward(self, x):
            if torch.compiler.is_exporting():
                raise RuntimeError("no such size")
            return x

    for layer in (Odd, Sized):
        monkeypatch.setitem(
            fcvgg.rewriting.rules.registry.KINDS,
            layer,
            fcvgg.rewriting.rules.registry.LayerKind(
                rewrite=fcvgg.rewriting.rules.elementwise.act_elementwise
            ),
        )
    if suffix == ".onnx":
        with pytest.raises(fcvgg.FcvggError, match=r"^torch.onnx cannot write 1 \(Odd\): [^\n]*$"):
            of(Odd()).export(tmp_path / f"odd{suffix}")
    with pytest.raises(fcvgg.FcvggError, match=r"^torch.export cannot take 1 \(Sized\): [^\n]*$"):
        of(Sized()).export(tmp_path / f"sized{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_the_format_lacks_is_said_with_remedies(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)).bfloat16().eval()
    net = fcvgg.convert(model, input_size=8)
    with pytest.raises(
        fcvgg.FcvggError, match=r"cannot read the file: .*written, export to \.pt2, or cast"
    ) as caught:
        net.export(tmp_path / "a.onnx")
    assert str(tmp_path) not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
