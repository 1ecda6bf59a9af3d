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
