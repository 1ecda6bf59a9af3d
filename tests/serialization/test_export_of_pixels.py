"""Files that take pixels and give probabilities agree with `score_map` in other runtimes."""

import json

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

import fcvgg

SIZES = [(32, 32), (45, 33), (96, 120)]


def pixels_of(size, channels=3):
    return np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)


def small_net(preprocess="imagenet", channels=3, classes=4, ends=(), activation=None):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()),
        *(nn.Linear(8 * 64, classes), *ends),
    )
    return fcvgg.convert(model.eval(), input_size=32, preprocess=preprocess, activation=activation)


def ran(path, pixels):
    """What onnxruntime, OpenVINO or torch make of pixels ``(N, H, W, C)``."""
    if path.suffix == ".pt2":
        with torch.no_grad():
            return [torch.export.load(path).module()(torch.from_numpy(pixels))]
    (there,) = onnxruntime.InferenceSession(path).run(None, {"pixels": pixels})
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [torch.from_numpy(there), torch.from_numpy(np.array(compiled(pixels)[0]))]


@pytest.fixture(scope="module", params=["demo.onnx", "demo.pt2"])
def demo(request, tmp_path_factory):
    net = fcvgg.load("demo", verify=False)
    path = tmp_path_factory.mktemp("pixels") / request.param
    return net, net.export(path, preprocess=True, probabilities=True)


@pytest.mark.parametrize("size", SIZES)
def test_probabilities_of_pixels(demo, size):
    net, path = demo
    pixels = pixels_of(size)
    wanted = net.score_map(pixels).probabilities()
    for found in ran(path, np.stack([pixels, pixels[::-1]])):
        torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"preprocess": "tf", "ends": [nn.Sigmoid()]},
        {"preprocess": "unit", "ends": [nn.LogSoftmax(1)], "channels": 1},
        {"preprocess": "caffe", "activation": "independent_logits"},
        {"preprocess": fcvgg.Preprocess((1, 2, 3, 4, 5), (9,) * 5, scale=0.1), "channels": 5},
    ],
    ids=["sigmoid", "log-softmax of grey", "independent BGR", "five bands"],
)
def test_every_preprocessing_and_kind_of_score(options, tmp_path):
    net = small_net(**options)
    path = net.export(tmp_path / "net.onnx", preprocess=True, probabilities=True)
    pixels = pixels_of((45, 33), net.in_channels)
    wanted = net.score_map(pixels).probabilities()
    for found in ran(path, pixels[None]):
        torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-5)


def test_the_file_says_what_it_takes_and_gives(tmp_path):
    path = small_net().export(tmp_path / "net.onnx", preprocess=True, probabilities=True)
    assert "max error" in path.check
    model = onnx.load(path)
    (taken,), (given,) = model.graph.input, model.graph.output
    assert taken.name == "pixels"
    assert taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    sides = [d.dim_param or d.dim_value for d in taken.type.tensor_type.shape.dim]
    assert sides == ["batch", "height", "width", 3]
    assert given.name == "probabilities"
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata["fcvgg.takes"] == "pixels"
    assert metadata["fcvgg.activation"] == "probabilities"
    with pytest.raises(fcvgg.LoadError, match="got one that preprocesses pixels itself"):
        fcvgg.load(path)


@pytest.mark.parametrize(
    ("activation", "classes", "expected"),
    [
        ("logits", 4, "probabilities"),
        ("logits", 1, "sigmoid"),
        ("independent_logits", 4, "sigmoid"),
    ],
)
def test_probabilities_of_images_load_back(activation, classes, expected, tmp_path):
    net = small_net(classes=classes, activation=activation)
    back = fcvgg.load(net.export(tmp_path / "net.onnx", probabilities=True))
    assert back.activation == expected
    assert back.preprocess == net.preprocess
    pixels = pixels_of((45, 33))
    torch.testing.assert_close(
        back.score_map(pixels).probabilities(),
        net.score_map(pixels).probabilities(),
        rtol=0,
        atol=1e-5,
    )


def test_what_a_file_cannot_do_is_refused(tmp_path):
    net = small_net(preprocess=None)
    with pytest.raises(fcvgg.FcvggError, match="but it has none; pass preprocess= to fcvgg"):
        net.export(tmp_path / "net.onnx", preprocess=True)
    net.preprocess = fcvgg.Preprocess.imagenet(resize=64)
    with pytest.raises(fcvgg.PreprocessError, match="must keep the size of images, got resize=64"):
        net.export(tmp_path / "net.onnx", preprocess=True)
    net.activation = "values"
    with pytest.raises(fcvgg.ArgumentError, match="which have no classes, probabilities"):
        net.export(tmp_path / "net.onnx", probabilities=True)
    assert list(tmp_path.iterdir()) == []
