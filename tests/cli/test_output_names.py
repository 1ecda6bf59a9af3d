"""Names to write to: an ending that is another format's is refused before anything is computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import run
from hypothesis import given
from hypothesis import strategies as st

import fcvgg
import fcvgg.distributed
from fcvgg.demo import demo_photograph
from fcvgg.errors import ArgumentError, ImageError
from fcvgg.evaluation.protocols import Evaluation
from fcvgg.results.figures import save_figure
from fcvgg.support.atomic import checked_file, checked_folder

ENDINGS = (".tif", ".tiff", ".npy", ".npz", ".png", ".jpg", ".pt", ".pth", ".ckpt", ".h5")
ENDINGS += (".keras", ".onnx", ".pt2", ".safetensors", ".zip", ".csv", ".json", ".svg", ".TIF")


@pytest.fixture(scope="module")
def net():
    return fcvgg.load("demo", verify=False)


@given(st.sampled_from(ENDINGS), st.sampled_from(["", ".onnx", ".tar", ".v2"]))
def test_a_folder_never_has_the_name_of_a_file(ending, before):
    name = f"scores{before}{ending}"
    use = "scores.v2" if before == ".v2" else "scores"
    with pytest.raises(ArgumentError, match=f"out must be the name of a folder.* use '{use}'"):
        checked_folder(f"there/{name}", "out")
    with pytest.raises(ArgumentError, match=rf"folder in \.zarr, got '{name}'.* use '{use}\.zarr'"):
        checked_folder(name, "out", (".zarr",))


@pytest.mark.parametrize("name", ["scores", "scores.zarr", "vgg16-0.5", "run.v2", ".", "..", ".x"])
def test_other_names_are_a_folders(name):
    assert checked_folder(name, "out", (".zarr",)) == Path(name)


def test_a_folder_that_is_there_keeps_its_name(tmp_path):
    (tmp_path / "old.tif").mkdir()
    assert checked_folder(tmp_path / "old.tif", "out") == tmp_path / "old.tif"


def test_a_file_has_one_of_its_formats_endings():
    assert checked_file("a/map.PNG", "path", (".png",)) == Path("a/map.PNG")
    for name in ("map", "map.jpg", "png", "map.png.zip", ".png"):
        with pytest.raises(ArgumentError, match=f"path must be a name in .png, got '{name}'"):
            checked_file(name, "path", (".png",))
    with pytest.raises(ImageError, match=r"in \.png, \.jpg or \.npy, got 'a'"):
        checked_file("a", "path", (".png", ".jpg", ".npy"), ImageError)


FOLDERS = {
    "save": lambda net, path: net.save(path),
    "stream": lambda net, path: fcvgg.stream(net, "absent.tif", out=path),
    "distributed.stream": lambda net, path: fcvgg.distributed.stream(net, "absent.tif", out=path),
    "distributed.classify": lambda net, path: fcvgg.distributed.classify(net, "no.png", out=path),
    "finetune": lambda net, path: fcvgg.finetune("absent", "demo", path),
    "FCN.save": lambda net, path: fcvgg.FCN(net, 2).save(path),
    "train_fcn": lambda net, path: fcvgg.train_fcn(fcvgg.FCN(net, 2), "absent", path),
    "cache": lambda net, path: fcvgg.probe(net, ["a.png", "b.png"] * 5, [0, 1] * 5, cache=path),
}


@pytest.mark.parametrize("write", FOLDERS)
def test_every_writer_of_folders_refuses_at_once(net, tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ArgumentError, match=r"must be the name of a folder.*got 'my\.npz'"):
        FOLDERS[write](net, "my.npz")
    assert not list(tmp_path.iterdir())


FILES = {
    "export": lambda net, path: net.export(path),
    "heatmap": lambda net, path: net.heatmap(demo_photograph(), scales=64).save(path),
    "figure": lambda net, path: save_figure(None, path),
    "evaluation": lambda net, path: Evaluation((), 0, None, "scores").to_json(path),
    "labels": lambda net, path: fcvgg.LabelMap.save(None, path),
}


@pytest.mark.parametrize("name", ["my", "my.zarr", "my.h5", "my.pth"])
@pytest.mark.parametrize("write", FILES)
def test_every_writer_of_files_refuses_names_of_other_formats(net, tmp_path, write, name):
    with pytest.raises(
        (ArgumentError, ImageError), match=rf"path must be a name in .*got '{name}'"
    ):
        FILES[write](net, tmp_path / name)
    assert not list(tmp_path.iterdir())


COMMANDS = {
    ("stream", "absent.tif", "-o", "cls.tif"): "a folder in .zarr, got 'cls.tif'.*'cls.zarr'",
    ("convert", "absent.pth", "-o", "net.pth"): "a folder, got 'net.pth'.*use 'net', or a name in",
    ("convert", "demo", "-o", "my.onnx.zip"): "a folder, got 'my.onnx.zip'.*use 'my', or",
    ("heatmap", "absent.png", "-o", "map.png"): "a folder, got 'map.png'",
    ("segment", "absent.png", "--fcn", "absent", "-o", "labels.png"): "a folder, got 'labels.png'",
    ("demo", "-o", "demo.png"): "a folder, got 'demo.png'",
    ("bench", "-o", "speed.csv"): "a folder, got 'speed.csv'",
    ("finetune", "absent", "-o", "birds.pt"): "a folder, got 'birds.pt'",
    ("segment-train", "absent", "-c", "a,b", "-o", "x.zip"): "a folder, got 'x.zip'",
    ("evaluate", "absent", "-o", "scores.csv"): "must be a name in .json or .txt, got 'scores.csv'",
    ("probe", "absent", "-o", "probe.xyz"): "must be a name in .png, .*got 'probe.xyz'",
    ("probe", "absent", "--cache", "probe.npz"): "--cache must be the name of a folder",
}


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_refuses_before_it_loads_anything(tmp_path, monkeypatch, arguments):
    def load(*args, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fcvgg.loading.load", load)
    monkeypatch.chdir(tmp_path)
    ran = run(*arguments)
    assert (ran.exit_code, ran.stdout, len(ran.stderr.splitlines())) == (2, "", 1)
    assert re.search(COMMANDS[arguments], ran.stderr), ran.stderr
    assert not list(tmp_path.iterdir())
