"""Keras files against Keras's own predictions, made by `keras_nets` in a process of its own."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import fcvgg
from fcvgg.sources import keras_file
from fcvgg.sources.keras_layers import channels_of

TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras")
    script = Path(__file__).parents[1].joinpath("keras_nets.py")
    environment = {**os.environ, "KERAS_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert made.returncode == 0, f"keras_nets.py needs keras and h5py: {made.stderr[-2000:]}"
    return folder


def predictions(folder, name):
    saved = np.load(folder / f"{name}.npz")
    images = torch.from_numpy(saved["images"]).permute(0, 3, 1, 2).contiguous()  # (N, C, H, W)
    return images, torch.from_numpy(saved["scores"])


def assert_predicts_as_keras(net, images, expected):
    with torch.no_grad():
        scores = net(images)
    assert scores.shape == (*expected.shape, 1, 1)
    assert_close(scores.flatten(1), expected, **TOLERANCE)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize(
    "name",
    [
        *("sequential", "functional", "strided", "nested", "grey", "vgg16"),
        *("operations", "shared", "emotion", "scaled"),
        *("convnext", "densenet", "mobilenet", "mobilenetv2"),
    ],
)
def test_whole_model_predicts_as_keras(folder, name, suffix):
    images, expected = predictions(folder, name)
    net = fcvgg.load(folder / f"{name}{suffix}")
    assert net.input_size == tuple(images.shape[2:])
    assert net.equivalence.passed
    assert_predicts_as_keras(net, images, expected)


@pytest.mark.parametrize("file", ["vgg16.weights.h5", "vgg16_only.h5"])
def test_weights_alone_of_vgg16_are_recognised(folder, file):
    images, expected = predictions(folder, "vgg16")
    net = fcvgg.load(folder / file, input_size=32)
    assert_predicts_as_keras(net, images, expected)


@pytest.mark.parametrize("file", ["renamed.weights.h5", "renamed_only.h5"])
def test_weights_alone_with_other_names_need_arch(folder, file):
    with pytest.raises(fcvgg.LoadError, match="pass arch='vgg16'"):
        fcvgg.load(folder / file)
    with pytest.raises(fcvgg.LoadError, match="weights of the 19 layers of vgg19, got those of 16"):
        fcvgg.load(folder / file, arch="vgg19")
    images, expected = predictions(folder, "renamed")
    net = fcvgg.load(folder / file, arch="vgg16", input_size=32)
    assert net.preprocess is None
    assert_predicts_as_keras(net, images, expected)


def test_files_of_old_keras_name_weights_otherwise(folder, tmp_path):
    """The files that keras.applications distributes call a kernel ``block1_conv1_W_1:0``."""
    old = tmp_path / "vgg16_weights_tf_dim_ordering_tf_kernels.h5"
    with h5py.File(folder / "vgg16_only.h5") as new, h5py.File(old, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in new.attrs["layer_names"]]
        for layer in new.attrs["layer_names"]:
            group = file.create_group(layer)
            names = new[layer].attrs["weight_names"]
            renamed = [f"{layer}_{kind}_1:0" for kind in "Wb"][: len(names)]
            group.attrs["weight_names"] = [name.encode() for name in renamed]
            for name, other in zip(names, renamed):
                group[other] = new[layer][name][()]
    images, expected = predictions(folder, "vgg16")
    assert_predicts_as_keras(fcvgg.load(old, input_size=32), images, expected)


@pytest.mark.parametrize("file", ["vgg16.keras", "vgg16.h5", "vgg16.weights.h5", "vgg16_only.h5"])
def test_imagenet_vgg16_brings_caffe_preprocessing_and_categories(folder, file):
    net = fcvgg.load(folder / file, input_size=32)
    assert net.preprocess == fcvgg.Preprocess(
        (103.939, 116.779, 123.68), (1, 1, 1), scale=1, channel_order="BGR"
    )
    assert net.categories[:2] == ("tench", "goldfish")


def test_caffe_preprocessing_is_that_of_keras(folder):
    """keras.applications.vgg16.preprocess_input: RGB to BGR, then the mean of each channel off."""
    pixels = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3) * 20
    expected = pixels[..., ::-1].astype(np.float32) - (103.939, 116.779, 123.68)
    got = keras_file.CAFFE.normalized(pixels)[0].permute(1, 2, 0)
    assert_close(got, torch.from_numpy(expected.astype(np.float32)), **TOLERANCE)


def test_other_models_have_no_preprocessing(folder):
    net = fcvgg.load(folder / "sequential.keras")
    assert net.preprocess is None
    assert net.categories is None


@pytest.mark.parametrize("part", [slice(None, None, -1), slice(1, None), slice(-1, 0, -2)])
def test_channels_are_sliced_as_by_numpy(part):
    images = torch.arange(24.0).reshape(1, 4, 2, 3)
    expected = torch.from_numpy(images.numpy()[:, part].copy())
    assert_close(channels_of(images, part.start, part.stop, part.step), expected)


def test_layers_keep_their_names(folder):
    model, _ = keras_file.read(folder / "sequential.h5")
    names = {name.rpartition(".")[0] for name in model.state_dict()}
    assert {"conv_a", "norm_a", "scores"} <= names
    assert type(model.get_submodule("conv_a")) is torch.nn.Conv2d


def test_larger_image_gives_a_map(folder):
    net = fcvgg.load(folder / "sequential.keras")
    with torch.no_grad():
        scores = net(torch.zeros(1, 3, 40, 33))
    assert scores.shape == (1, 5, *net.output_size((40, 33)))


def test_keras_is_not_imported(folder):
    load = f"fcvgg.load({str(folder / 'grey.keras')!r})"
    code = f"import fcvgg, sys; {load}; print('keras' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_code_in_a_file_is_named_and_not_run(folder):
    with pytest.raises(fcvgg.LoadError, match=r"layer lambda\w* \(Lambda\) is not supported"):
        fcvgg.load(folder / "code.keras")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_truncated_file(folder, tmp_path, suffix, kept):
    data = (folder / f"sequential{suffix}").read_bytes()
    broken = tmp_path / f"broken{suffix}"
    broken.write_bytes(data[: int(len(data) * kept)])
    assert_one_line(broken, "cannot be read as a Keras file")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_corrupt_file(tmp_path, suffix):
    broken = tmp_path / f"broken{suffix}"
    broken.write_bytes(np.random.default_rng(0).bytes(5000))
    assert_one_line(broken, "cannot be read as a Keras file")


def test_absent_file(tmp_path):
    assert_one_line(tmp_path / "absent.h5", "absent.h5 must be a Keras file, got none")


def test_archive_without_weights(folder, tmp_path):
    broken = tmp_path / "broken.keras"
    with (
        zipfile.ZipFile(folder / "sequential.keras") as whole,
        zipfile.ZipFile(broken, "w") as part,
    ):
        part.writestr("config.json", whole.read("config.json"))
    assert_one_line(broken, "cannot be read as a Keras file")


def test_h5_that_holds_no_weights(folder, tmp_path):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["measurements"] = np.arange(3)
    assert_one_line(other, "must hold the weights of a Keras model.*got measurements")
    assert_one_line(folder / "empty.weights.h5", "must hold weights, got empty layers only")


def test_missing_and_misshapen_weights_are_named(folder, tmp_path):
    copy = tmp_path / "copy.h5"
    copy.write_bytes((folder / "sequential.h5").read_bytes())
    with h5py.File(copy, "a") as file:
        group = file["model_weights/scores"]
        (kernel,) = [name for name in group.attrs["weight_names"] if "kernel" in name]
        del group[kernel]
        group[kernel] = np.zeros((3, 5), np.float32)
    # 3 features where the layer before gives 10: found when the model is converted
    with pytest.raises(fcvgg.FcvggError, match="scores"):
        fcvgg.load(copy)
    with h5py.File(copy, "a") as file:
        del file["model_weights/conv_a"]
    assert_one_line(copy, r"must hold 2 weights of conv_a \(Conv2D\) \(kernel, bias\), got 0")


def test_trunk_without_a_head(folder, tmp_path):
    headless = tmp_path / "notop.h5"
    with h5py.File(folder / "vgg16_only.h5") as whole, h5py.File(headless, "w") as file:
        names = [n for n in whole.attrs["layer_names"] if n.startswith("block")]
        file.attrs["layer_names"] = names
        for name in names:
            whole.copy(name, file)
    assert_one_line(headless, "without its fully connected layers")


def test_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(fcvgg.MissingExtraError, match=r"pip install 'fcvgg\[keras\]'"):
        fcvgg.load(folder / "grey.keras")


def assert_one_line(path, match):
    with pytest.raises(fcvgg.LoadError, match=match) as caught:
        fcvgg.load(path)
    assert "\n" not in str(caught.value)
