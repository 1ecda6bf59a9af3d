"""Files that somebody made to do harm: one line, in seconds, without the memory they ask for."""

import json
import os
import shutil
import time
import zipfile
from functools import partial
from itertools import pairwise

import h5py
import numpy as np
import onnx
import pytest
import torch
import zarr
from command_line import run
from fuzz import (
    keras_config,
    make_bundle,
    make_hdf5,
    make_keras,
    make_store,
    make_zarr,
    pixels,
    tiny_net,
)
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fcvgg
from fcvgg.images.preprocessing import Preprocess
from fcvgg.names import readable
from fcvgg.serialization.shape_budget import ShapeBudget, check_affordable
from fcvgg.serialization.tensor_table import CONFIG, TENSORS
from fcvgg.sources import assembly
from fcvgg.sources.checkpoints import read_state
from fcvgg.streaming import score_store, store_description
from fcvgg.streaming.job import StreamJob
from fcvgg.streaming.resumption import open_or_create_store
from fcvgg.streaming.score_store import is_store, open_store
from fcvgg.support import untrusted

SECONDS = 30
"""The slowest of these takes three on an idle machine."""

ESCAPES = "\x1b]0;x\x07\x9b31m\r\u202e\u2066\u200f\x7f\x00\u2028end"


def refused(read, match, error=fcvgg.FcvggError):
    """What `read` raises: one line that can be printed, soon."""
    started = time.monotonic()
    with pytest.raises(error, match=match) as caught:
        read()
    message = str(caught.value)
    assert readable(message) == message
    assert len(message) < 4_000
    assert time.monotonic() - started < SECONDS


# -- bundles --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def bundle(whole_bundle, tmp_path):
    return shutil.copytree(whole_bundle, tmp_path / "bundle")


def edited(bundle, change):
    config = json.loads((bundle / CONFIG).read_text())
    change(config)
    (bundle / CONFIG).write_text(json.dumps(config))


IMAGES = {"node": "images"}


def call(name, target, *args, op="call_function", **kwargs):
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def inserted(*nodes):
    """A change that puts nodes after the input; nothing takes their values."""

    def change(config):
        config["graph"][1:1] = nodes

    return change


def doubled(times, target="torch.cat"):
    """Every value twice the one before it."""
    nodes, last = [], IMAGES
    for i in range(times):
        args = ([last, last], 1) if target == "torch.cat" else (last, last)
        nodes.append(call(f"d{i}", target, *args))
        last = {"node": f"d{i}"}
    return nodes


UNBOUND = call("parts", "unbind", IMAGES, 1, op="call_method")
PARTS = {"node": "parts"}


def joined(times):
    nodes, last = [UNBOUND], PARTS
    for i in range(times):
        nodes.append(call(f"j{i}", "operator.concat", last, last))
        last = {"node": f"j{i}"}
    return nodes


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([call("a", "operator.mul", "text", 10**9)], "node a must compute from values"),
        ([call("a", "operator.pow", 10**6, 10**6)], "node a must compute from values"),
        ([call("a", "operator.concat", [1], [2])], "node a must compute from values"),
        ([call("a", "operator.mul", [IMAGES], 10**9)], "with tensors and numbers"),
        ([call("a", "operator.mul", {"tuple": [IMAGES]}, 10**9)], "with tensors and numbers"),
        ([UNBOUND, call("a", "operator.mul", PARTS, 10**9)], "with tensors and numbers"),
        ([UNBOUND, call("a", "operator.imul", PARTS, 10**9)], "with tensors and numbers"),
        ([UNBOUND, call("a", "operator.add", PARTS, PARTS)], "with tensors and numbers"),
        (joined(24), "number of values of the bundle's node j\\d+ must be at most"),
        ([call("a", "operator.getitem", "text", IMAGES)], "with tensors and numbers"),
        ([call("a", "operator.pow", IMAGES, 10**400)], "does not run"),
        (doubled(24), "at most 67,108,864 elements in a value"),
        (doubled(60), "at most 67,108,864 elements in a value"),
        ([call("a", "F.pad", IMAGES, [10**9] * 4)], "does not run|elements in a value"),
        ([call("a", "F.pad", IMAGES, [1, 1, 1, 1], "loud")], "does not run: Unrecognised padding"),
        ([call("a", "F.pad", IMAGES, "four")], "does not run"),
        (
            [*doubled(13), call("p", "unbind", {"node": "d12"}, 1, op="call_method")],
            "at most 4,096 parts of a value",
        ),
        (
            [*doubled(13), call("p", "split", {"node": "d12"}, 1, 1, op="call_method")],
            "at most 4,096 parts of a value",
        ),
        ([call("self", "relu", IMAGES, op="call_method")], "got 'self'"),
        (
            [call(f"n{i}", "relu", IMAGES, op="call_method") for i in range(4000)],
            "number of 'graph' entries must be at most 3,000",
        ),
        (
            [call(f"n{i}", "relu", IMAGES, op="call_method") for i in range(200_000)],
            "must be at most 8.4 MB",
        ),
    ],
    ids=range(21),
)
def test_a_graph_makes_no_values_of_its_own_and_keeps_to_its_budget(bundle, nodes, message):
    edited(bundle, inserted(*nodes))
    refused(lambda: fcvgg.load(bundle), message, fcvgg.LoadError)


BINS = {"kind": "avg", "window": [1, 1], "bins": [10**9, 10**9]}
TAPS = {"kernel_size": [10**9, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [0, 0]}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("nn.LocalResponseNorm", {"size": 10**9}, "elements in a value"),
        ("nn.ZeroPad2d", {"padding": [10**9] * 4}, "does not run|elements in a value|no rule"),
        ("fcvgg.modules.BinnedPool2d", BINS, "at most 30,000 operations"),
        ("fcvgg.modules.DilatedAvgPool2d", TAPS, "at most 30,000 operations"),
        ("nn.MaxPool2d", {"kernel_size": "wide"}, "does not run|cannot be made"),
        ("nn.Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": 3}, "lacks the tensor"),
    ],
)
def test_a_layer_keeps_to_the_budget(bundle, kind, settings, message):
    edited(bundle, lambda c: c["layers"].update({"2": {"type": kind, "settings": settings}}))
    refused(lambda: fcvgg.load(bundle), message, fcvgg.LoadError)


@pytest.mark.parametrize("name", ["graph", "code", "training", "meta"])
def test_a_layer_has_no_name_of_the_network_itself(bundle, name):
    relu = {"type": "nn.ReLU", "settings": {}}
    edited(bundle, lambda c: c["layers"].update({name: relu}))
    refused(lambda: fcvgg.load(bundle), "cannot hold the name", fcvgg.LoadError)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize": 30_000}, "resize must be at most 4096 pixels"),
        ({"resize": 10**9}, "resize must be at most 4096 pixels"),
        ({"resize": [3, 30_000]}, "resize must be at most 4096 pixels"),
        ({"mean": ["a", "b", "c"]}, "mean must hold numbers, got 'a'"),
        ({"mean": [10**400, 1, 1]}, "mean must hold numbers"),
        ({"std": [[1], 1, 1]}, "std must hold numbers"),
        ({"scale": "x"}, "scale must hold numbers"),
        ({"interpolation": ["bilinear"]}, "interpolation must be "),
        ({"channel_order": ["RGB"]}, "channel_order must be "),
    ],
)
def test_preprocessing_of_a_file_is_checked(bundle, values, message):
    edited(bundle, lambda c: c["preprocess"].update(values))
    refused(lambda: fcvgg.load(bundle), message, fcvgg.LoadError)


def test_preprocessing_says_what_is_wrong():
    refused(lambda: Preprocess("abc", (1, 1, 1)), "mean must hold numbers", fcvgg.PreprocessError)
    assert Preprocess((np.float32(0.5),), (1,), resize=4096).resize == 4096


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/dev/zero", "must be a regular file"),
        ("/etc/hosts", "must be a file in .*, got a link out of it"),
        ("/", "must be a regular file"),
    ],
)
@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_bundle_reads_its_own_files_alone(bundle, name, target, message):
    (bundle / name).unlink()
    (bundle / name).symlink_to(target)
    refused(lambda: fcvgg.load(bundle), message, fcvgg.LoadError)


def test_a_pipe_for_a_description_does_not_hang(bundle):
    (bundle / CONFIG).unlink()
    os.mkfifo(bundle / CONFIG)
    refused(lambda: fcvgg.load(bundle), "must be a regular file", fcvgg.LoadError)


def test_links_within_a_bundle_and_the_hubs_cache_are_followed(bundle, tmp_path):
    (bundle / CONFIG).rename(bundle / "real.json")
    (bundle / CONFIG).symlink_to("real.json")
    assert fcvgg.load(bundle).categories == ("cat", "dog", "bird")
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate((CONFIG, TENSORS)):
        shutil.copy(bundle / name, blobs / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert fcvgg.load(snapshot).categories == ("cat", "dog", "bird")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["geometry"]["height"]["steps"][0]["window"].update(kernel=10**30),
        lambda c: c["geometry"]["height"]["steps"][0]["window"].update(stride=10**12),
        lambda c: c["geometry"]["height"].update(steps=c["geometry"]["height"]["steps"] * 9000),
        lambda c: c["geometry"]["height"].update(
            steps=[{"window": {"stride": 1 << 20}, "inputs": [i - 1]} for i in range(300)]
        ),
        lambda c: c["geometry"].update(width=3),
        lambda c: c["geometry"]["width"].update(context=-1),
        lambda c: c["geometry"]["width"].update(steps=[[1]]),
    ],
    ids=range(7),
)
def test_geometry_of_a_file_has_sizes_of_networks(bundle, change):
    edited(bundle, change)
    refused(lambda: fcvgg.load(bundle), "geometry", fcvgg.LoadError)


# -- checkpoints ----------------------------------------------------------------------------------


def holding_itself():
    content = {"epoch": 1}
    content["state_dict"] = content
    return content


HEAD = "classifier.6.weight"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (holding_itself, "must hold tensors by name"),
        (lambda: {HEAD: torch.zeros(1).expand(10**8, 4096)}, "must hold at most 67.1 MB"),
        (lambda: {HEAD: torch.zeros(10**8, 4096, device="meta")}, "which is without values"),
        (lambda: {HEAD: torch.zeros(2, 4096).to_sparse()}, "which is sparse"),
        (lambda: {HEAD: torch.zeros(2, 4096).to_sparse_csr()}, "which is sparse"),
        (
            lambda: {HEAD: torch.quantize_per_tensor(torch.zeros(2, 9), 0.1, 0, torch.quint8)},
            "which is quantised",
        ),
        (lambda: {HEAD: torch.zeros(2, 4096, dtype=torch.complex64)}, "of torch.complex64"),
        (lambda: {HEAD: torch.nested.nested_tensor([torch.zeros(2)])}, "which is nested"),
        (lambda: {HEAD: torch.tensor(1.0)}, r"must have the shape \(classes, 4096\), got \(\)"),
        (lambda: {HEAD: torch.zeros(10**6, dtype=torch.uint8)}, "must have the shape"),
        (lambda: {HEAD: torch.zeros(0, 4096)}, "must have the shape"),
        (lambda: {HEAD: torch.zeros(2, 4096)}, "21 missing"),
        (lambda: {f"a{ESCAPES}": torch.zeros(2)}, r"a\\x1b\]0;x\\x07\\x9b31m"),
        (lambda: {"a" * 10**6: torch.zeros(2)}, r"aaa\[\.\.\.\]aaa"),
    ],
    ids=range(14),
)
def test_a_checkpoint_holds_plain_arrays_of_its_own_size(tmp_path, make, message):
    torch.save(make(), tmp_path / "a.pth")
    refused(lambda: fcvgg.load(tmp_path / "a.pth", arch="vgg11"), message, fcvgg.LoadError)


def test_weights_of_another_kind_are_not_cast_in_silence(tmp_path):
    model = nn.Linear(3, 2)
    torch.save({"weight": torch.ones(2, 3, dtype=torch.int8), "bias": torch.ones(2)}, "a.pth")
    from fcvgg.sources.checkpoints import load_into

    state = read_state("a.pth")
    os.remove("a.pth")
    refused(lambda: load_into(model, state, "a.pth"), "weight of torch.int8 instead of")


def test_an_archive_that_inflates_is_refused_before_it_does(tmp_path):
    torch.save({"a": torch.zeros(20_000_000)}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    refused(lambda: read_state(tmp_path / "a.pth"), "must hold at most .* of members")


# -- HDF5 and Keras -------------------------------------------------------------------------------


def with_weights(folder, replace):
    """A Keras file whose first kernel is made by `replace`, which is given its group and name."""
    path = make_hdf5(folder)
    with h5py.File(path, "r+") as file:
        group = file["model_weights/conv/conv"]
        del group["weight_0:0"]
        replace(group, "weight_0:0")
    return path


SHAPE = (3, 3, 3, 4)


def external(group, name):
    place = f"{group.file.filename}.bin"
    np.ones(SHAPE, "f4").tofile(place)
    group.create_dataset(name, SHAPE, "f4", external=[(place, 0, 432)])


def external_link(group, name):
    place = f"{group.file.filename}.other"
    with h5py.File(place, "w") as other:
        other["a"] = np.ones(SHAPE, "f4")
    group[name] = h5py.ExternalLink(place, "/a")


def soft_link(group, name):
    group[name] = h5py.SoftLink("/model_weights/conv/conv/weight_1:0")


def virtual(group, name):
    place = f"{group.file.filename}.other"
    with h5py.File(place, "w") as other:
        other["a"] = np.ones(SHAPE, "f4")
    layout = h5py.VirtualLayout(SHAPE, "f4")
    layout[:] = h5py.VirtualSource(place, "a", SHAPE)
    group.create_virtual_dataset(name, layout)


def claimed(group, name):
    group.create_dataset(name, (10**6, 750_000), "f4", chunks=(64, 64))[0, 0] = 1


def compressed(group, name):
    zeros = np.zeros((25, 10**6), "f4")
    group.create_dataset(name, data=zeros, compression="gzip", chunks=(1, 10**6))


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (external, "got external storage"),
        (external_link, "got a external link|got an external link"),
        (soft_link, "got a soft link"),
        (virtual, "got a virtual dataset"),
        (claimed, "arrays must take at most"),
        (lambda g, n: g.create_dataset(n, (10**6, 750_000), "f4"), "got none stored for"),
        (compressed, "arrays must take at most"),
        (lambda g, n: g.create_dataset(n, data=np.ones(SHAPE, "c8")), "must hold real numbers"),
        (lambda g, n: g.create_dataset(n, data=["text"]), "must hold real numbers"),
        (
            lambda g, n: g.create_dataset(n, data=np.array([g.ref], dtype=h5py.ref_dtype)),
            "must hold real numbers",
        ),
        (lambda g, n: g.create_group(n), "must hold arrays, got a Group"),
    ],
    ids=range(11),
)
def test_hdf5_holds_numbers_of_its_own(tmp_path, replace, message):
    path = with_weights(tmp_path, replace)
    refused(lambda: fcvgg.load(path), message, fcvgg.LoadError)


def test_hdf5_that_hangs_the_library_is_left_after_a_while(tmp_path, monkeypatch):
    path = make_hdf5(tmp_path)
    monkeypatch.setattr("fcvgg.sources.hdf5_file._SECONDS", 0.01)
    refused(lambda: fcvgg.load(path), "reading it took more than", fcvgg.LoadError)


def keras_file(folder, change=lambda config: None, **members):
    """A ``.keras`` file with another configuration or other members."""
    whole = make_keras(folder)
    config = keras_config()
    change(config["config"]["layers"])
    with zipfile.ZipFile(whole) as archive:
        weights = archive.read("model.weights.h5")
    path = folder / "changed.keras"
    held = {"config.json": json.dumps(config), "model.weights.h5": weights, **members}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5"])
def test_members_that_inflate_are_refused(tmp_path, name):
    path = keras_file(tmp_path, **{name: bytes(100_000_000)})
    refused(lambda: fcvgg.load(path), "must hold at most .* of members", fcvgg.LoadError)


def test_a_configuration_is_of_bounded_size_and_depth(tmp_path):
    path = keras_file(tmp_path, **{"config.json": b" " * 9_000_000})
    refused(lambda: fcvgg.load(path), "config.json must be at most 8.4 MB", fcvgg.LoadError)
    path = keras_file(tmp_path, **{"config.json": b"[" * 100_000})
    refused(lambda: fcvgg.load(path), "nested too deep", fcvgg.LoadError)


def repeated(layers):
    layers[2:2] = [
        {"class_name": "ReLU", "config": {"name": f"r{i}"}} for i in range(untrusted.MOST_NODES)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[1]["config"].update(dilation_rate=[10**9] * 2), "dilation_rate of the layer"),
        (lambda x: x[1]["config"].update(strides=[10**9] * 2), "strides of the layer"),
        (lambda x: x[1]["config"].update(strides=[0, 0]), "strides of the layer"),
        (lambda x: x[1]["config"].update(dilation_rate=["a", 1]), "dilation_rate of the layer"),
        (lambda x: x[2]["config"].update(pool_size=[10**9] * 2), "pool_size of the layer"),
        (
            lambda x: x[0]["config"].update(batch_shape=[None, 20_000, 20_000, 3]),
            "must take at most 67,108,864 elements",
        ),
        (
            lambda x: x[0]["config"].update(batch_shape=[None, 10**12, 10**12, 3]),
            "must take at most 67,108,864 elements|does not run",
        ),
        (
            lambda x: x[0]["config"].update(batch_shape=[None, "a", 8, 3]),
            "size must be a positive int or",
        ),
        (repeated, "number of layers must be at most"),
        (lambda x: x[1].update(class_name=ESCAPES), r"conv \(\\x1b"),
    ],
    ids=range(10),
)
def test_a_keras_configuration_keeps_to_the_budget(tmp_path, change, message):
    path = keras_file(tmp_path, change)
    refused(lambda: fcvgg.load(path), message)


def test_a_keras_file_cut_anywhere_is_one_line(tmp_path):
    data = make_keras(tmp_path).read_bytes()
    path = tmp_path / "cut.keras"
    for end in (0, 1, 100, len(data) // 2, len(data) - 30, len(data) - 1):
        path.write_bytes(data[:end])
        refused(lambda: fcvgg.load(path), "cannot be read as a Keras file", fcvgg.LoadError)


# -- ONNX -----------------------------------------------------------------------------------------


def onnx_file(folder, *nodes, last="images", size=(8, 8), stored=(), functions=(), metadata=()):
    """A classifier behind `nodes`, which give `last`."""
    numbers = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(numbers.normal(size=(4, 3, 3, 3)).astype("f4"), "w"),
        numpy_helper.from_array(numbers.normal(size=(2, 4)).astype("f4"), "fc"),
    ]
    held = [tensor for tensor in weights if tensor.name not in [s.name for s in stored]]
    chain = [
        *nodes,
        helper.make_node("Conv", [last, "w"], ["c"], "conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "fc"], ["scores"], transB=1),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, *size])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 2])
    graph = helper.make_graph(chain, "graph", [images], [scores], [*held, *stored])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=8)
    for key, value in metadata:
        entry = model.metadata_props.add()
        entry.key, entry.value = f"fcvgg.{key}", value
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def nested_functions(depth):
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    relu = helper.make_node("Relu", ["x"], ["y"])
    functions = [helper.make_function("own", "f0", ["x"], ["y"], [relu], opsets)]
    for i in range(1, depth + 1):
        twice = [helper.make_node(f"f{i - 1}", [a], [b], domain="own") for a, b in ("xt", "ty")]
        functions.append(helper.make_function("own", f"f{i}", ["x"], ["y"], twice, opsets))
    return functions


def test_functions_of_onnx_are_put_in_place_within_a_limit(tmp_path):
    def expanded(depth):
        node = helper.make_node(f"f{depth}", ["images"], ["q"], domain="own")
        return onnx_file(tmp_path, node, last="q", functions=nested_functions(depth))

    assert fcvgg.load(expanded(3)).input_size == (8, 8)
    refused(lambda: fcvgg.load(expanded(30)), "number of nodes must be at most", fcvgg.LoadError)
    node = helper.make_node("r", ["x"], ["y"], domain="own")
    opsets = [helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "r", ["x"], ["y"], [node], opsets)
    node = helper.make_node("r", ["images"], ["q"], domain="own")
    path = onnx_file(tmp_path, node, last="q", functions=[function])
    refused(lambda: fcvgg.load(path), "functions that call themselves", fcvgg.LoadError)


def identities(count):
    names = ["images", *(f"i{i}" for i in range(count))]
    return [helper.make_node("Identity", [a], [b]) for a, b in pairwise(names)]


def test_long_chains_are_read_or_refused(tmp_path):
    path = onnx_file(tmp_path, *identities(50_000), last="i49999")
    refused(lambda: fcvgg.load(path), "number of nodes must be at most 3,000", fcvgg.LoadError)
    path = onnx_file(tmp_path, *identities(2_000), last="i1999")
    assert fcvgg.load(path).equivalence.passed


def constant(kind, stored, *more):
    """Nodes that add the mean of a constant to the image."""
    names = [tensor.name for tensor in stored]
    nodes = [*more, helper.make_node(kind, names, ["k"])]
    nodes.append(helper.make_node("ReduceMean", ["k"], ["m"], keepdims=0))
    return [*nodes, helper.make_node("Add", ["images", "m"], ["q"])], stored


def array(name, values, dtype="i8"):
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def doubling():
    nodes = [helper.make_node("Concat", ["z"] * 2, ["z0"], axis=0)]
    nodes += [helper.make_node("Concat", [f"z{i}"] * 2, [f"z{i + 1}"], axis=0) for i in range(40)]
    nodes.append(helper.make_node("ReduceMean", ["z40"], ["m"], keepdims=0))
    return [*nodes, helper.make_node("Add", ["images", "m"], ["q"])], [array("z", [1, 1], "f4")]


@pytest.mark.parametrize(
    "made",
    [
        constant("ConstantOfShape", [array("a", [10**6, 10**6])]),
        constant("Expand", [array("a", [1], "f4"), array("b", [10**6, 10**6])]),
        constant("Tile", [array("a", [1], "f4"), array("b", [10**12])]),
        constant("Range", [array(n, v, "f4") for n, v in zip("abc", (0, 1e12, 1))]),
        constant("Mul", [array("a", np.ones((10**5, 1)), "f4"), array("b", np.ones(10**5), "f4")]),
        constant("Pad", [array("a", [1], "f4"), array("b", [0, 10**12])]),
        doubling(),
    ],
    ids=range(7),
)
def test_constants_are_computed_only_if_they_fit_the_file(tmp_path, made):
    nodes, stored = made
    path = onnx_file(tmp_path, *nodes, last="q", stored=stored)
    refused(lambda: fcvgg.load(path), "must give values that fit the file", fcvgg.LoadError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (20_000, 20_000)}, "must take at most 67,108,864 elements"),
        ({"size": (10**6, 10**6)}, "must take at most 67,108,864 elements"),
        ({"metadata": [("input_size", "[1000000, 1000000]")]}, "must take at most"),
        ({"metadata": [("input_size", "1e999")]}, "metadata is broken"),
        ({"metadata": [("input_size", "[0, 8]")]}, "metadata is broken"),
        ({"metadata": [("categories", "[" * 900 + "]" * 900)]}, "must be a list of names"),
        ({"metadata": [("categories", "[" * 90_000)]}, "metadata is broken"),
        ({"metadata": [("categories", "[1, 2]")]}, "must be a list of names"),
        (
            {"metadata": [("categories", '["a"]')]},
            "categories must be 2 names, one per class .*, got 1",
        ),
        ({"metadata": [("activation", "[[1]]")]}, "activation must be a name"),
        ({"metadata": [("preprocess", '{"mean": [1], "std": "x"}')]}, "metadata is broken"),
        ({"stored": [array("w", np.ones((10**5, 3, 1, 1)), "f4")]}, "fc|malformed|does not run"),
        ({"stored": [array("w", np.ones((4, 3, 3, 3)), "c8")]}, "weights must be real numbers"),
    ],
    ids=range(13),
)
def test_what_an_onnx_file_says_of_itself_is_checked(tmp_path, options, message):
    path = onnx_file(tmp_path, **options)
    refused(lambda: fcvgg.load(path), message)


def pool(**attributes):
    return helper.make_node("MaxPool", ["images"], ["q"], kernel_shape=[2, 2], **attributes)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("LRN", ["images"], ["q"], size=10**9 + 1), "elements in a value"),
        (helper.make_node("Pad", ["images", "pads"], ["q"]), "elements in a value"),
        (pool(dilations=[10**9] * 2), "must be an integer from 1 to 65,536, got 1000000000"),
        (pool(strides=[10**9] * 2), "must be an integer from 1 to 65,536, got 1000000000"),
        (pool(pads=[10**9] * 4), "must be an integer from 0 to 65,536, got 1000000000"),
        (helper.make_node(f"Odd{ESCAPES}", ["images"], ["q"], ESCAPES), r"Odd\\x1b\]0;x\\x07"),
        (helper.make_node("Odd" * 10**5, ["images"], ["q"]), r"the operator Odd.*\[\.\.\.\]"),
    ],
    ids=range(7),
)
def test_an_onnx_node_keeps_to_the_budget(tmp_path, node, message):
    pads = array("pads", [0, 0, 10**6, 10**6] * 2)
    path = onnx_file(tmp_path, node, last="q", stored=[pads])
    refused(lambda: fcvgg.load(path), message, fcvgg.LoadError)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../outside.bin", "got a link out of it|must be a file in"),
        ("link.bin", "must be a file in .*, got a link out of it"),
        ("pipe.bin", "must be a regular file"),
        ("absent.bin", "lacks the file of its weights"),
        ("short.bin", "must take at most|cannot be read as an ONNX file|is broken"),
    ],
)
def test_external_weights_lie_in_regular_files_of_the_folder(tmp_path, location, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(432))
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    os.mkfifo(folder / "pipe.bin")
    (folder / "short.bin").write_bytes(bytes(8))
    path = onnx_file(folder)
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location, offset=0, length=432)
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    refused(lambda: fcvgg.load(path), message, fcvgg.LoadError)


# -- zarr and stored maps -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [3, "x", [1], [[1]], {"a": 1}, None, [None], True])
@pytest.mark.parametrize("key", ["axes", "datasets"])
def test_ome_metadata_of_other_types(tmp_path, key, value):
    path = make_zarr(tmp_path)
    file = path / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["attributes"]["ome"]["multiscales"][0][key] = value
    file.write_text(json.dumps(metadata))
    try:
        fcvgg.open_image(path).read((0, 4), (0, 4))
    except fcvgg.ImageError as error:
        message = str(error)
    else:
        message = ""
    assert readable(message) == message


@pytest.mark.parametrize("value", [3, "x", [1], {"multiscales": 3}, {"multiscales": [3]}, [[]]])
def test_ome_attributes_of_other_types(tmp_path, value):
    path = make_zarr(tmp_path)
    zarr.open_group(str(path), mode="r+").attrs["ome"] = value
    refused(lambda: fcvgg.open_image(path), r"image\.zarr", fcvgg.ImageError)


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def store(whole_store, tmp_path):
    return shutil.copytree(whole_store, tmp_path / "scores.zarr")


def described(store, change, name=""):
    file = store / name / "zarr.json"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))


STRANGE = [None, True, -1, 0.5, 10**30, "x", [], [[]], {}, [-1, 2], [0, 10**12], {"height": 3}]
NEEDED = [
    *("kind", "geometry", "image_size", "rows", "classes", "all_classes", "categories"),
    *("activation", "source", "level", "strip_bytes", "blocks"),
]


@pytest.mark.parametrize("field", NEEDED)
def test_a_stored_map_is_described_whole(store, field):
    described(store, lambda m: m["attributes"]["fcvgg"].pop(field))
    refused(lambda: open_store(store), f"the description lacks '{field}'")


LENIENT = {"True": ("all_classes",), "x": ("source",), "[]": ("bands",)}
"""What a field may be instead of what it was."""


def set_field(field, value, metadata):
    metadata["attributes"]["fcvgg"][field] = value


@pytest.mark.parametrize(
    "field", [*NEEDED, "format", "pixel_size", "bands", "nodata", "num_classes", "full_size"]
)
def test_a_stored_map_is_described_by_values_of_their_kinds(whole_store, tmp_path, field):
    optional = field in ("source", "categories", "bands", "pixel_size", "nodata")
    for i, value in enumerate(STRANGE):
        store = shutil.copytree(whole_store, tmp_path / f"{i}.zarr")
        described(store, partial(set_field, field, value))
        if (value is None and optional) or field in LENIENT.get(str(value), ()):
            assert open_store(store).heatmap(0).values.shape == (40, 52)
        else:
            refused(partial(open_store, store), "broken score map")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(shape=[3, 10**6, 10**6]), "the array must be of 3 dimensions"),
        (lambda m: chunked(m, [3, 10**6, 10**6]), "chunks must be of at most"),
        (lambda m: chunked(m, [3, 10**6, 10**6], [1, 1, 1]), "shards must be of at most"),
        (lambda m: m.update(data_type="int64"), "broken|must be a score map"),
        (lambda m: m.update(node_type="group"), "must be a score map"),
    ],
)
def test_the_array_of_a_stored_map_fits_its_description(store, change, message):
    described(store, change, "0")
    refused(lambda: open_store(store), message)
    refused(lambda: fcvgg.stream(tiny_net(), pixels(), out=store), message)


def chunked(metadata, shard, chunk=None):
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = shard
    metadata["codecs"][0]["configuration"]["chunk_shape"] = chunk or shard


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["attributes"]["fcvgg"].update(image_size=[10**9, 10**9]), "must"),
        (lambda m: m.update(attributes=[1]), "must be a score map"),
        (lambda m: m.update(node_type="array"), "must be a score map"),
    ],
)
def test_the_group_of_a_stored_map_describes_it(store, change, message):
    described(store, change)
    refused(lambda: open_store(store), message)
    refused(lambda: fcvgg.stream(tiny_net(), pixels(), out=store), message)


@pytest.mark.parametrize("content", ["3", '{"finished": 3}', '{"finished": [-1]}', "[" * 10**5])
def test_the_progress_of_a_stored_map_is_checked(store, content):
    (store / "fcvgg-progress.json").write_text(content)
    refused(lambda: open_store(store), "fcvgg-progress.json is broken")


def test_finished_cells_are_those_that_the_files_hold(store, monkeypatch):
    monkeypatch.setattr(store_description, "_BELIEVED_CELLS", 10)
    assert open_store(store).complete
    monkeypatch.setattr(score_store, "_bytes_within", lambda _: 0)
    refused(lambda: open_store(store), "finished cells must be at most 4,096 per byte of its files")
    job = StreamJob.prepared(tiny_net(), pixels(), None, None)
    new, _ = open_or_create_store(
        job, store.with_name("new.zarr"), 1 << 30
    )  # which holds none as yet
    assert new.share == 0


def test_broken_chunks_are_one_line(store):
    chunk = next(f for f in (store / "0" / "c").rglob("*") if f.is_file())
    chunk.write_bytes(chunk.read_bytes()[:20])
    refused(lambda: open_store(store).heatmap(), "must hold whole chunks of numbers")


def test_a_pipe_for_the_metadata_of_a_store_does_not_hang(store):
    (store / "zarr.json").unlink()
    os.mkfifo(store / "zarr.json")
    assert not is_store(store)
    refused(lambda: open_store(store), "must be a score map")


# -- names ----------------------------------------------------------------------------------------


def test_control_and_direction_characters_are_written_out():
    assert readable("plain naïve 漢字 \u200d") == "plain naïve 漢字 \u200d"
    assert readable("a\x1b[31m\r\n\x9b\u202e\u2066\u200f\ud800") == (
        r"a\x1b[31m\r\n\x9b\u202e\u2066\u200f\ud800"
    )
    assert str(fcvgg.FcvggError(f"a{ESCAPES}")) == rf"a{readable(ESCAPES)}"
    assert str(fcvgg.CategoryError("a\nb")) == "a b"
    assert len(str(fcvgg.FcvggError("x " * 10**6))) < 3_000


def test_names_never_reach_the_terminal_raw(tmp_path):
    name = f"cat{ESCAPES}"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()
    net = fcvgg.convert(
        model, input_size=8, preprocess=Preprocess.imagenet(), categories=(name, "b\nforged")
    )
    bundle = net.save(tmp_path / "net")
    image = tmp_path / "photo\x1b[2J\u202e.png"
    from PIL import Image

    Image.fromarray(pixels()).save(image)
    for command in (
        ("classify", image, "--model", bundle),
        ("classify", image, "--model", bundle, "--json"),
        ("heatmap", image, "--model", bundle, "--target", "0", "--output", tmp_path / "h"),
        ("classify", tmp_path / "absent\x1b[2J\r.png", "--model", bundle),
        ("info", bundle),
    ):
        result = run(*command)
        printed = result.stdout + result.stderr
        lines = printed.splitlines()
        assert all(readable(line) == line for line in printed.split("\n")), command
        assert "forged" not in [line.strip() for line in lines]
    result = run("classify", image, "--model", bundle, "--json")
    found = json.loads(result.stdout)
    assert {p["category"] for p in found["predictions"]} == {name, "b\nforged"}


# -- the budget -----------------------------------------------------------------------------------


def test_the_budget_holds_what_networks_take():
    with torch.device("meta"):
        import torchvision

        model = torchvision.models.vgg16().eval()
    with torch.no_grad(), ShapeBudget("a VGG-16"):
        model(torch.empty(1, 3, 768, 768, device="meta"))
    refused(lambda: check_affordable(model, (1, 3, 4096, 4096), "it"), "it at 4096x4096 pixels")


def test_arithmetic_is_counted():
    with torch.device("meta"):
        layer = nn.Conv2d(512, 512, 15)
    image = torch.empty(1, 512, 128, 128, device="meta")

    @torch.no_grad()
    def counted():
        with ShapeBudget("it"):
            layer(image)

    refused(counted, "arithmetic operations", fcvgg.LoadError)


def test_layers_of_files_called_like_keywords_get_another_name() -> None:
    model = assembly.Assembled("image")
    for name, layer in (("class", nn.Conv2d(3, 4, 3)), ("a.if", nn.Flatten())):
        model.add_layer(name, layer)
    assert [name for name, _ in model.named_children()] == ["class_", "a_if"]
