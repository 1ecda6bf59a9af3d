"""The command line's options for models that publish nothing about themselves."""

from __future__ import annotations

import json
import re
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from command_line import run
from PIL import Image

import fcvgg
from fcvgg import demo
from fcvgg.categories import read_categories
from fcvgg.cli.console import in_option_words
from fcvgg.cli.options import OwnModel
from fcvgg.demo import demo_photograph

DEVICE = "--device must be cpu, or a torch device that this machine has, such as cuda or mps"
COMMANDS = ("heatmap", "classify", "evaluate", "stream", "probe", "convert")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three classes of torchvision's smallest network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.squeezenet1_1(num_classes=3)
    path = tmp_path_factory.mktemp("own") / "own.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that name the checkpoint, beside a photograph and a list of names."""
    monkeypatch.chdir(tmp_path)
    demo_photograph().resize((80, 70)).save("one.png")
    Path("names.txt").write_text("cat\ndog\n\nnewt\n")
    return ["-m", str(checkpoint), "--arch", "squeezenet1_1", "--input-size", "64"]


@pytest.mark.parametrize(
    ("options", "preprocess"),
    [
        (["--preprocess", "tf"], fcvgg.Preprocess((0.5,) * 3, (0.5,) * 3)),
        (
            ["--preprocess", "caffe"],
            fcvgg.Preprocess(
                (103.939, 116.779, 123.68), (1.0,) * 3, scale=1.0, channel_order="BGR"
            ),
        ),
        (["--preprocess", "none"], fcvgg.Preprocess((0,) * 3, (1,) * 3, scale=1)),
        (["--mean", "0.1,0.2,0.3", "--std", "0.5"], fcvgg.Preprocess((0.1, 0.2, 0.3), (0.5,) * 3)),
        ([], fcvgg.Preprocess.imagenet()),
    ],
)
def test_names_and_preprocessing(
    own: list[str], checkpoint: Path, options: list[str], preprocess: fcvgg.Preprocess
) -> None:
    ran = run("classify", "one.png", *own, "--categories", "names.txt", *options, "--json")
    assert (ran.exit_code, ran.stderr) == (0, "")
    net = fcvgg.load(
        checkpoint,
        arch="squeezenet1_1",
        input_size=64,
        categories=("cat", "dog", "newt"),
        preprocess=preprocess,
    )
    expected = net.classify("one.png", scales=net.usual_scale)[0]
    got = {p["category"]: p["probability"] for p in json.loads(ran.stdout)["predictions"]}
    assert got == pytest.approx(dict(zip(net.categories, expected.tolist())), abs=1e-6)


def test_convert_keeps_them_in_the_bundle(own: list[str]) -> None:
    _, source, *options = own
    Path("names.json").write_text(json.dumps({"0": "cat", "1": "dog", "2": "newt"}))
    options += ["--categories", "names.json", "--preprocess", "unit", "--device", "cpu"]
    assert "No such option" in run("convert", source, *options, "-o", "made").stderr
    ran = run("convert", source, *options[:-2], "-o", "made")
    assert (ran.exit_code, ran.stderr) == (0, "")
    net = fcvgg.load("made")
    assert net.input_size == (64, 64)
    assert net.categories == ("cat", "dog", "newt")
    assert net.preprocess == fcvgg.Preprocess((0.0,) * 3, (1.0,) * 3)


def test_what_the_scores_are(own: list[str]) -> None:
    options = [*own, "--preprocess", "unit", "--json"]
    plain, single = (
        json.loads(run("classify", "one.png", *options, *more).stdout)["predictions"]
        for more in ([], ["--activation", "multi_label_classification"])
    )
    assert sum(p["probability"] for p in plain) == pytest.approx(1, abs=1e-5)
    logits = {p["index"]: log(p["probability"]) for p in plain}
    odds = {p["index"]: log(p["probability"] / (1 - p["probability"])) for p in single}
    differences = [odds[i] - logits[i] for i in logits]  # the softmax's one constant
    assert differences == pytest.approx([differences[0]] * 3, abs=1e-3)
    for value, message in (
        ("values", "the network's scores are values"),
        ("softmax", "--activation must be 'logits'"),
    ):
        ran = run("classify", "one.png", *options, "--activation", value)
        assert ran.exit_code == 2
        assert message in ran.stderr


def test_info_takes_the_native_size(own: list[str]) -> None:
    _, source, *options = own
    ran = run("info", source, *options[:-1], "96x64")
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert re.search(r"native size +96x64", ran.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_them_in_a_part_of_their_own(command: str) -> None:
    text = run(command, "--help").stdout
    *_, panel = text.partition("Your own model")
    options = ("--input-size", "--categories", "--preprocess", "--mean", "--std", "--activation")
    for option in options:
        assert option in panel, (command, option)
    assert ("--device" in text) == (command != "convert")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--categories", "absent.txt"],
            "the categories in absent.txt cannot be read: No such file or directory; write one",
        ),
        (["--categories", "empty.txt"], "empty.txt must hold categories, one name per line"),
        (["--categories", "short.txt"], "--categories must be 3 names, one per class"),
        (["--categories", "bad.json"], "the categories in bad.json cannot be read: it has no inde"),
        (["--categories", "one.png"], "the categories in one.png cannot be read: 'utf-8' codec ca"),
        (["--mean", "0.5"], "--mean and --std go together; give both"),
        (["--mean", "0.5", "--std", "0"], "std must be positive, got (0.0,)"),
        (["--mean", "1,2", "--std", "1"], "--mean must be 1 number or 3, one for each channel o"),
        (
            ["--preprocess", "unit", "--mean", "0", "--std", "1"],
            "--preprocess and --mean exclude each other; give one of the two",
        ),
        (["--preprocess", "torch"], "preprocess must be 'imagenet', 'caffe', "),
        (["--device", "gpu"], f"{DEVICE}, got 'gpu' (Expected one of cpu, cuda, "),
        (["--device", "cuda:99"], f"{DEVICE}, got 'cuda:99' ("),
        (["--device", "meta"], f"{DEVICE}, got 'meta' ("),
        (["--input-size", "5"], "the model does not run at input size (5, 5): features.5 (MaxPo"),
    ],
)
def test_what_cannot_be_used_is_one_line(own: list[str], options: list[str], message: str) -> None:
    Path("empty.txt").write_text("\n")
    Path("short.txt").write_text("cat\n")
    Path("bad.json").write_text('{"1": "cat"}')
    ran = run("classify", "one.png", *own, *options)
    assert ran.exit_code == 2
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1, ran.stderr
    assert ran.stderr.startswith(f"fcvgg: error: {message}")


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--mean", "a,b", "'a,b' is not a list of numbers; expected such as 0.485,0.456,0.406"),
        ("--range", "5", "'5' is not two different numbers LOW,HIGH"),
        ("--bands", "red", "'red' is not a list of channel indices; expected such as 2,1,0"),
        ("--nodata", "none", "'none' is neither a number nor 'file'"),
        ("--scales", "big", "'big' is not a positive integer"),
        ("--input-size", "5x5x5", "'5x5x5' is not a size; expected N or HxW, such as 480x640"),
    ],
)
def test_text_that_an_option_cannot_read_is_a_usage_error(
    option: str, text: str, message: str
) -> None:
    ran = run("classify", "one.png", option, text)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert f"Invalid value for '{option}'" in ran.stderr
    assert message in " ".join(ran.stderr.split())


def test_a_bundle_keeps_its_native_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fcvgg.load("demo").save("made")
    ran = run("info", "made", "--input-size", "64")
    assert ran.exit_code == 2
    assert "--input-size must be left out for a converted network" in ran.stderr


def test_code_of_the_users_makes_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_nets.py").write_text(
        "from fcvgg.demo import demo_model\nclass Nets:\n    build = staticmethod(demo_model)\n"
    )
    torch.save(demo.demo_model().state_dict(), "own.pth")
    ran = run("convert", "own.pth", "--arch", "own_nets:Nets.build", "-o", "made")
    assert ran.exit_code == 0, ran.stderr
    assert fcvgg.load("made").equivalence.passed
    ran = run("convert", "own.pth", "-o", "other")
    assert (
        "own.pth holds parameters only; pass --arch, a torchvision name such as 'vgg16' or "
        "package.module:callable\n"
    ) in ran.stderr
    for name, reason in (("none:Net", "ModuleNotFoundError"), ("own_nets:Net", "AttributeError")):
        ran = run("convert", "own.pth", "--arch", name, "-o", "other")
        assert ran.exit_code == 2
        assert f"got '{name}', which cannot be imported ({reason}: " in ran.stderr


def test_preprocessing_for_other_channels() -> None:
    grey = OwnModel(preprocess="tf").preprocess_for(1)
    assert grey == fcvgg.Preprocess((0.5,), (0.5,))
    with pytest.raises(
        fcvgg.PreprocessError,
        match=r"^preprocess must be for the network's 1 channels, got 'imagenet' for",
    ):
        fcvgg.Preprocess.preset("imagenet", 1)


def test_categories_in_a_list_of_json_and_behind_a_byte_order_mark(tmp_path: Path) -> None:
    listed, marked = tmp_path / "names.json", tmp_path / "names.txt"
    listed.write_text('["a, b", "ü"]', encoding="utf-8")
    marked.write_text("a, b\r\nü\r\n", encoding="utf-8-sig")
    assert read_categories(listed) == read_categories(marked) == ("a, b", "ü")
    listed.write_text('"cat"')
    with pytest.raises(
        fcvgg.CategoryError, match=r"cannot be read: it is not a list of names; write"
    ):
        read_categories(listed)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("pass input_size=, the size", "pass --input-size, the size"),
        ("pass input_size=(height, width)", "pass --input-size HxW"),
        ("arch='x' goes with; pass arch=, its", "--arch 'x' goes with; pass --arch, its"),
        ("or categories= to convert or load", "or --categories"),
        ("pass the value, such as nodata=0", "pass the value, such as --nodata 0"),
        ("memory=1MiB is too little", "--memory 1MiB is too little"),
        ("memory='a' is no amount", "--memory 'a' is no amount"),
        ("bands must be from 0 to 3", "--bands must be from 0 to 3"),
        ("fcvgg.open_image(path, bands=(0, 1)) chooses some", "--bands 0,1 chooses some"),
        ("stream with classes=[name]", "stream with --classes NAME"),
        (
            "no known range; pass uint8 (H, W, C), or value_range=(low, high) or a scale= of its "
            "own to fcvgg.Preprocess",
            "no known range; pass --range LOW,HIGH",
        ),
        ("classes must be names", "--classes must be names"),
        ("all classes must be names", "all classes must be names"),
        ("x.jpg: output_stride must be 8", "x.jpg: --output-stride must be 8"),
        ("pass size=(h, w), or pooling='avg'", "pass --size HxW, or --pooling 'avg'"),
        ("hidden must be () or None", "--head must be () or None"),
        ("pass weights=PATH (--weights PATH)", "pass weights=PATH (--weights PATH)"),
    ],
)
def test_messages_name_options(message: str, words: str) -> None:
    assert in_option_words(message) == words


def test_a_regression_is_shown_as_values(own: list[str], checkpoint: Path) -> None:
    given = [*own, "--activation", "values"]
    ran = run("heatmap", "one.png", *given, "--target", "1", "--csv", "values.csv", "--scores")
    assert (ran.exit_code, ran.stderr) == (0, "")
    net = fcvgg.load(checkpoint, arch="squeezenet1_1", input_size=64, activation="values")
    net.preprocess = fcvgg.Preprocess.imagenet()
    score_map = net.score_map("one.png")
    names, row = (line.split(",") for line in Path("values.csv").read_text().splitlines())
    found = dict(zip(names, row))
    assert list(found)[:6] == ["image", "index", "category", "value", "lowest", "highest"]
    assert found["category"] == "output 1"
    assert float(found["value"]) == pytest.approx(float(score_map.average()[1]), rel=1e-4)
    assert float(found["highest"]) == pytest.approx(float(score_map.scores[1].max()), rel=1e-4)
    written = np.load("one-scores.npz")["scores"]
    torch.testing.assert_close(torch.from_numpy(written), score_map.scores)
    with Image.open("one-heatmap.png") as picture:
        assert picture.width > picture.height  # the photograph, the values and a colour bar
    ran = run("heatmap", "one.png", *given)
    assert "output 0 (0), value " in ran.stdout
    assert "(2 more in the picture, or --target)" in ran.stdout
    titles = [ax.get_title() for ax in score_map.plot().axes if ax.get_title()]
    assert [title.partition(":")[0] for title in titles[1:]] == ["output 0", "output 1", "output 2"]
    ran = run("heatmap", "one.png", *given, "--boxes", "0.5")
    assert (ran.exit_code, "are for probabilities" in ran.stderr) == (2, True)


def test_a_model_of_ones_own_is_fine_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tinynet.py").write_text(
        "from torch import nn\n\n\n"
        "class Tiny(nn.Sequential):\n"
        "    def __init__(self, num_classes=4):\n"
        "        trunk = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()\n"
        "        super().__init__(*trunk, nn.Linear(4 * 49, num_classes))\n"
    )
    for i, name in enumerate(("a", "b")):
        Path("photos", name).mkdir(parents=True)
        for j in range(5):
            noise = np.random.default_rng((i, j)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(Path("photos", name, f"{j}.png"))
    options = ["--arch", "tinynet:Tiny", "--preprocess", "unit", "--size", "16", "--epochs", "1"]
    ran = run("finetune", "photos", *options)
    assert ran.exit_code == 2
    assert "--weights must be a checkpoint of --arch tinynet:Tiny, got none" in ran.stderr
    from tinynet import Tiny  # type: ignore[import-not-found]

    torch.save(Tiny().state_dict(), "tiny.pth")
    ran = run("finetune", "photos", *options, "-w", "tiny.pth", "-s", "linear", "-o", "run")
    assert ran.exit_code == 0, ran.stderr
    ran = run("heatmap", "photos/a/0.png", "-m", "run/model", "-t", "a", "-o", "maps")
    assert (ran.exit_code, Path("maps/0-heatmap.png").is_file()) == (0, True)
