"""The command line, run in this process on tiny images, as a user would see it."""

import json
import re
import subprocess
import sys
import urllib.error
from dataclasses import dataclass

import h5py
import numpy as np
import pytest
import torch
import torchvision
from command_line import run as invoked
from PIL import Image
from typer.main import get_command

import fcvgg
from fcvgg.cli import app
from fcvgg.cli.reports import count
from fcvgg.demo import SCALES, SHOWN, demo_model, demo_photograph

COMMANDS = ("demo", "heatmap", "classify", "evaluate", "info", "convert", "probe", "stream")
COMMANDS += ("bench", "finetune", "segment-train", "segment", "serve", "page")


@dataclass
class Ran:
    status: int
    out: str
    err: str


def run(*args, columns=200):
    result = invoked(*args, columns=columns)
    return Ran(result.exit_code, result.stdout, result.stderr)


def fails(*args):
    """The one line that a failing run prints on stderr."""
    ran = run(*args)
    assert ran.status == 2
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("fcvgg: error: ")
    return lines[0].removeprefix("fcvgg: error: ")


def usage_error(*args):
    ran = run(*args)
    assert ran.status == 2
    assert "Traceback" not in ran.err
    return ran.err


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def images(folder):
    """Two small photographs, 40x48 and 64x36."""
    photograph = demo_photograph()
    photograph.resize((48, 40)).save(folder / "one.png")
    photograph.resize((36, 64)).save(folder / "two.jpg")
    return folder / "one.png", folder / "two.jpg"


@pytest.fixture
def no_network(monkeypatch):
    """A torchvision that can download nothing and has nothing in its cache."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_one_line_summary_and_examples_in_80_columns(command):
    ran = run(command, "--help", columns=80)
    assert ran.status == 0
    lines = [line.strip() for line in ran.out.splitlines() if line.strip()]
    assert lines[0].startswith(f"Usage: fcvgg {command}")
    assert lines[1].endswith(".")
    assert any("Options" in line or "Arguments" in line for line in lines[2:8])
    assert "Examples" in lines
    assert f"$ fcvgg {command}" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80


def test_help_lists_every_command_with_its_summary_on_one_line():
    ran = run("--help", columns=80)
    for command in COMMANDS:
        assert re.search(rf"│ {command} .*\. +│", ran.out), command


def test_no_command_shows_the_help():
    assert "Commands" in run().out


def test_version():
    assert run("--version").out == f"fcvgg {fcvgg.__version__}\n"


def test_the_module_runs_as_a_program():
    ran = subprocess.run(
        [sys.executable, "-m", "fcvgg", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout == f"fcvgg {fcvgg.__version__}\n"


def test_every_option_and_argument_says_what_it_is():
    for name, command in get_command(app).commands.items():
        assert set(COMMANDS) == set(get_command(app).commands)
        for parameter in command.params:
            text = getattr(parameter, "help", None)
            assert text, (name, parameter.name)
            assert re.match(r"[A-Z'-].*\.$", text), (name, text)


def test_an_unknown_command_is_a_usage_error():
    assert "No such command 'paint'" in usage_error("paint")


# -- demo -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "made"
    return run("demo", "--output", output, columns=80), output


def test_demo_reports_the_check_and_the_geometry(demo):
    ran, _ = demo
    net = fcvgg.load("demo")
    assert ran.status == 0
    assert ran.err == ""
    assert re.search(r"verdict +equivalent", ran.out)
    assert re.search(r"stride +8x8", ran.out)
    assert f"cell 0 from pixel {net.geometry.offset}" in ran.out
    assert max(map(len, ran.out.splitlines()[:-2])) <= 80


def test_demo_reports_the_peak_of_every_scale_and_the_best(demo):
    ran, _ = demo
    rows = re.findall(r"^ +(\d+) +\d+x\d+ +([\d.]+) +\((\d+), (\d+)\)", ran.out, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(SCALES)
    best = max(rows, key=lambda row: float(row[1]))
    assert f"({best[2]}, {best[3]}), with probability {best[1]} at scale {best[0]}" in ran.out


def test_demo_points_at_the_face(demo):
    ran, _ = demo
    y, x = map(int, re.search(r"pixel \(y, x\) = \((\d+), (\d+)\)", ran.out).groups())
    assert 70 <= y <= 190
    assert 170 <= x <= 275


def test_demo_shows_classes_of_imagenet(demo):
    ran, output = demo
    for name in SHOWN:
        assert name in ran.out
    with Image.open(output / "fcvgg-demo-imagenet.jpg") as figure:
        assert figure.width > 1000


def test_demo_without_its_extra_says_what_brings_it(tmp_path, monkeypatch):
    from fcvgg import demo as demo_module

    def absent():
        raise fcvgg.MissingExtraError("the package 'skimage' is needed")

    monkeypatch.setattr(demo_module, "imagenet_photographs", absent)
    ran = run("demo", "--output", tmp_path)
    assert ran.status == 0
    assert "pip install 'fcvgg[demo]' adds" in ran.err
    assert not (tmp_path / "fcvgg-demo-imagenet.jpg").exists()


def test_demo_writes_the_overlay_and_the_figure_and_says_where(demo):
    ran, output = demo
    for name in ("fcvgg-demo-overlay.png", "fcvgg-demo.png"):
        assert f"wrote {output / name}" in ran.out
    with Image.open(output / "fcvgg-demo-overlay.png") as overlay:
        assert overlay.size == demo_photograph().size
    with Image.open(output / "fcvgg-demo.png") as figure:
        assert figure.width > 2.5 * figure.height
    assert len(list(output.iterdir())) == 3


def test_demo_refuses_a_file_as_folder(images):
    assert "is a file" in usage_error("demo", "--output", images[0])


def test_a_folder_that_cannot_be_made(images):
    message = fails("demo", "--output", images[0] / "inside")
    assert message.startswith(f"cannot make the folder {images[0] / 'inside'}: ")


# -- heatmap --------------------------------------------------------------------------------------


def test_heatmap_prints_class_probability_and_peak_and_writes_an_overlay(images, folder):
    ran = run("heatmap", "one.png", "--model", "demo", "--target", "face", "--output", "new/maps")
    net = fcvgg.load("demo")
    score_map = net.score_map("one.png")
    heatmap = score_map.heatmap("face")
    y, x = heatmap.peak
    assert ran == Ran(
        0,
        f"one.png: face (1), probability {score_map.predict()[1]:.3f} averaged over the image, "
        f"peak {heatmap.values[y, x]:.3f} at (y, x) = ({y}, {x})\n"
        "wrote new/maps/one-heatmap.png\n",
        "",
    )
    with Image.open(folder / "new/maps/one-heatmap.png") as overlay:
        assert np.array_equal(np.asarray(overlay), np.asarray(heatmap.overlay()))


def test_heatmap_shows_the_top_class_by_default(images):
    net = fcvgg.load("demo")
    name = net.score_map("one.png").top(1)[0][0]
    assert run("heatmap", "one.png", "--model", "demo").out.startswith(f"one.png: {name} (")


@pytest.mark.parametrize("target", ["face", "FACE", "fac", "1"])
def test_heatmap_takes_a_class_by_name_part_or_index(images, target):
    assert "face (1)" in run("heatmap", "one.png", "-m", "demo", "--target", target).out


def test_heatmap_at_another_scale_refers_to_the_image_as_it_is(images, folder):
    demo_photograph().save("whole.png")
    ran = run("heatmap", "whole.png", "-m", "demo", "-t", "face", "--scale", 128)
    y, x = map(int, re.search(r"= \((\d+), (\d+)\)", ran.out).groups())
    assert 70 <= y <= 190
    assert 170 <= x <= 275
    with Image.open("whole-heatmap.png") as overlay:
        assert overlay.size == (512, 512)


def test_heatmap_takes_the_scale_in_place_of_the_preprocessings_size(images, folder):
    preprocess = fcvgg.Preprocess((0.5,) * 3, (0.25,) * 3, resize=40)
    fcvgg.load("demo", preprocess=preprocess).save(folder / "resizing")
    peaks = set()
    for scale in (40, 72, 100):
        out = run("heatmap", "one.png", "-m", "resizing", "-t", "face", "--scale", scale).out
        net = fcvgg.load("demo")
        heatmap = net.heatmap("one.png", "face", scales=[scale])
        y, x = heatmap.peak
        assert f"peak {heatmap.values[y, x]:.3f} at (y, x) = ({y}, {x})\n" in out
        peaks.add(out)
    assert len(peaks) == 3
    unscaled = run("heatmap", "one.png", "-m", "resizing", "-t", "face").out
    assert unscaled == run("heatmap", "one.png", "-m", "demo", "-t", "face", "--scale", 40).out


def test_heatmap_with_a_finer_stride(images):
    fine = run("heatmap", "one.png", "-m", "demo", "-t", "1", "--output-stride", 2).out
    assert fine != run("heatmap", "one.png", "-m", "demo", "-t", "1").out


def test_heatmap_reports_bad_images_and_goes_on(images, folder):
    (folder / "text.jpg").write_text("no image")
    ran = run("heatmap", "text.jpg", "one.png", "absent.png", "two.jpg", "-m", "demo")
    assert ran.status == 2
    assert ran.err.splitlines() == [
        "fcvgg: error: text.jpg is not an image that Pillow can read; convert it to PNG or JPEG",
        "fcvgg: error: there is no image file absent.png",
        "fcvgg: error: 2 of 4 images could not be used",
    ]
    assert (folder / "one-heatmap.png").exists()
    assert (folder / "two-heatmap.png").exists()


def test_heatmap_of_one_bad_image_prints_one_line(folder):
    assert fails("heatmap", "absent.png", "-m", "demo") == "there is no image file absent.png"


def test_heatmap_replaces_its_own_output(images, folder):
    for _ in range(2):
        assert run("heatmap", "one.png", "-m", "demo").status == 0
    assert len(list(folder.iterdir())) == 3


def test_heatmap_never_overwrites_an_input(images, folder):
    taken = folder / "one-heatmap.png"
    taken.write_bytes((folder / "two.jpg").read_bytes())
    before = taken.read_bytes()
    ran = run("heatmap", "one.png", "one-heatmap.png", "-m", "demo")
    assert ran.status == 2
    assert (
        "the heatmap of one.png would overwrite the input one-heatmap.png; choose another --output"
    ) in ran.err
    assert taken.read_bytes() == before


def test_heatmap_never_writes_two_images_to_one_name(images, folder):
    (folder / "other").mkdir()
    (folder / "other/one.png").write_bytes((folder / "one.png").read_bytes())
    ran = run("heatmap", "one.png", "other/one.png", "-m", "demo")
    assert ran.status == 2
    assert "other/one.png and one.png would both be written to one-heatmap.png" in ran.err
    assert "wrote one-heatmap.png" in ran.out


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("dog", "there is no category 'dog'; there are 2: 'background' (0), 'face' (1)"),
        ("7", "class must be an index from 0 to 1 or a name, got 7"),
        ("a", "class must match one category, got 'a', which matches 'background' (0), 'face' (1)"),
    ],
)
def test_a_wrong_class_is_reported_once(images, target, message):
    assert fails("heatmap", *images, "-m", "demo", "-t", target).startswith(message)


def test_missing_preprocessing_is_reported_once(images, folder):
    fcvgg.convert(demo_model(), input_size=32).save(folder / "bare")
    message = fails("heatmap", *images, "-m", folder / "bare", "-t", "1")
    assert message.startswith("the network's preprocessing is unknown")


def test_heatmap_needs_an_image():
    assert "Missing argument 'IMAGE'" in usage_error("heatmap")


def test_names_with_brackets_and_colons_are_printed_as_they_are(images, folder):
    (folder / "one.png").rename(folder / "[bold]:dog:.png")
    out = run("heatmap", "[bold]:dog:.png", "-m", "demo").out
    assert out.startswith("[bold]:dog:.png: ")
    assert "wrote [bold]:dog:-heatmap.png" in out


def test_an_image_too_large_for_memory_says_so(images, monkeypatch):
    def exhaust(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(fcvgg.FullyConvolutional, "score_map", exhaust)
    assert fails("heatmap", "one.png", "-m", "demo") == (
        "one.png does not fit into memory at this size; choose a smaller scale"
    )


# -- models ---------------------------------------------------------------------------------------


def test_weights_that_cannot_be_downloaded_say_what_to_pass(images, no_network):
    ran = run("heatmap", "one.png", "--model", "mobilenet_v2")
    assert ran.status == 2
    line = ran.err.splitlines()[-1]
    assert line.startswith("fcvgg: error: the weights MobileNet_V2_Weights.IMAGENET1K_V2 could not")
    assert "no network" in line
    assert re.search(r"download https://\S+\.pth elsewhere and pass .*--weights PATH", line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-m", "vgg17"), "there is no model 'vgg17'; expected 'demo', a torchvision name (near:"),
        (("-m", "my.pth"), "there is no checkpoint my.pth"),
        (("-m", "my.pth", "--arch", "vgg16"), "there is no checkpoint my.pth"),
        (("-w", "my.pth"), "there is no checkpoint my.pth"),
        (("-w", "LATEST"), "--weights must be IMAGENET1K_V1, IMAGENET1K_FEATURES, DEFAULT or"),
        (("--arch", "vgg11"), "--arch 'vgg11' must come with a checkpoint, got 'vgg16'"),
        (
            ("-m", "demo", "-w", "x.pt"),
            "--weights must be left out for 'demo', which holds its own, got 'x.pt'",
        ),
        (
            ("-m", "demo", "--output-stride", "3"),
            "--output-stride must be one that the network's",
        ),
    ],
)
def test_a_model_that_cannot_be_loaded(images, options, message):
    assert fails("heatmap", "one.png", *options).startswith(message)


def test_a_checkpoint_without_its_architecture_asks_for_the_option(images, folder):
    torch.save({"weight": torch.zeros(3)}, "own.pt")
    assert "pass --arch" in fails("heatmap", "one.png", "-m", "own.pt")


def test_a_checkpoint_with_its_architecture(images, folder):
    model = torchvision.models.squeezenet1_1(num_classes=3)
    torch.save(model.state_dict(), "own.pt")
    for options in (("-m", "own.pt", "--arch", "squeezenet1_1"), ("-m", "squeezenet1_1", "-w")):
        arguments = (*options, "own.pt") if options[-1] == "-w" else options
        ran = run("classify", "one.png", *arguments, "--json")
        assert ran.status == 0, ran.err
        predictions = json.loads(ran.out.splitlines()[0])["predictions"]
        assert sorted(p["index"] for p in predictions) == [0, 1, 2]
        assert {p["category"] for p in predictions} == {None}


# -- classify -------------------------------------------------------------------------------------


def test_classify_as_json_is_what_the_library_says(images):
    options = ("--scales", "40,64", "--flip", "--average", "probabilities")
    ran = run("classify", *images, "-m", "demo", *options, "--json")
    assert (ran.status, ran.err) == (0, "")
    net = fcvgg.load("demo")
    expected = net.classify(
        list(images), scales=[40, 64], flip=True, average="probabilities"
    ).tolist()
    results = [json.loads(line) for line in ran.out.splitlines()]
    assert [r["image"] for r in results] == [str(i) for i in images]
    for result, row in zip(results, expected, strict=True):
        assert {p["index"]: p["probability"] for p in result["predictions"]} == dict(enumerate(row))
        assert [p["category"] for p in result["predictions"]] == [
            net.categories[p["index"]] for p in result["predictions"]
        ]
        probabilities = [p["probability"] for p in result["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True)


def test_classify_prints_the_top_classes(images):
    ran = run("classify", *images, "-m", "demo", "--top", 1)
    net = fcvgg.load("demo")
    expected = []
    for image in images:
        (name, probability), *_ = net.score_map(image, scale=37).top(1)
        expected += [
            f"{image}, its smaller side at 37 pixels",
            f"{probability:.4f}  {name} ({net.categories.index(name)})",
        ]
    assert [line.strip() for line in ran.out.splitlines()] == expected


def probabilities(ran):
    """By class, of the first image that ``--json`` shows."""
    result = json.loads(ran.out.splitlines()[0])
    return [p["probability"] for p in sorted(result["predictions"], key=lambda p: p["index"])]


def test_classify_sees_a_large_image_whole_unless_told_otherwise(folder):
    demo_photograph().save("large.png")
    net = fcvgg.load("demo")
    assert net.usual_scale == 37
    for options, scales in ((), 37), (("--full-size",), None), (("--scales", "64"), 64):
        ran = run("classify", "large.png", "-m", "demo", "--json", *options)
        expected = net.classify("large.png", scales=scales)[0].tolist()
        assert probabilities(ran) == expected
        assert json.loads(ran.out.splitlines()[0])["scales"] == (
            None if scales is None else [scales]
        )
    assert fails("classify", "large.png", "-m", "demo", "--full-size", "--scales", "64") == (
        "--scales and --full-size exclude each other; give one of the two"
    )


def test_classify_leaves_the_size_to_a_preprocessing_that_resizes(images, folder):
    preprocess = fcvgg.Preprocess((0.5,) * 3, (0.25,) * 3, resize=72)
    net = fcvgg.load("demo", preprocess=preprocess)
    net.save(folder / "resizing")
    ran = run("classify", "one.png", "-m", "resizing", "--json")
    assert probabilities(ran) == net.classify("one.png")[0].tolist()


def test_heatmap_notes_once_that_images_are_many_windows_large(folder):
    demo_photograph().resize((300, 80)).save("two.png")
    demo_photograph().resize((96, 300)).save("three.png")
    demo_photograph().save("many.png")
    images = ("two.png", "three.png", "many.png")
    ran = run("heatmap", *images, "-m", "demo")
    assert ran.err == (
        "fcvgg: three.png is 3 windows wide, and the network recognises what fits into one; "
        "--scale 37 shows the image whole\n"
    )
    assert run("heatmap", *images, "-m", "demo", "--scale", "512").err == ""


def test_classify_as_json_leaves_bad_images_out(images):
    ran = run("classify", "absent.png", "one.png", "-m", "demo", "--json")
    assert ran.status == 2
    assert [r["image"] for r in map(json.loads, ran.out.splitlines())] == ["one.png"]
    assert ran.err.splitlines()[0] == "fcvgg: error: there is no image file absent.png"


def test_downloads_announced_on_stdout_leave_the_json_whole(images, monkeypatch):
    def announce(*args, **kwargs):
        print("Downloading: https://...")
        return load(*args, **kwargs)

    load = fcvgg.load
    monkeypatch.setattr("fcvgg.loading.load", announce)
    ran = run("classify", "one.png", "-m", "demo", "--json")
    assert json.loads(ran.out)
    assert "Downloading" in ran.err


@pytest.mark.parametrize("scales", ["256,x", "0", "-5", "", "3.5"])
def test_classify_refuses_scales_that_are_no_lengths(images, scales):
    error = usage_error("classify", "one.png", "-m", "demo", f"--scales={scales}")
    assert "Invalid value for '--scales'" in error
    assert "is not a positive integer" in error


def test_classify_refuses_an_unknown_average(images):
    assert "--average" in usage_error("classify", "one.png", "-m", "demo", "--average", "median")


# -- info -----------------------------------------------------------------------------------------


def test_info_of_vgg16_downloads_nothing_and_fits_80_columns(no_network):
    ran = run("info", "vgg16", columns=80)
    assert (ran.status, ran.err) == (0, "")
    rows = {line.split()[0]: line.split() for line in ran.out.splitlines() if line.strip()}
    assert rows["features.30"] == ["features.30", "MaxPool2d", "2", "2", "212", "32", "512x7x7"]
    assert (
        " ".join(rows["classifier.0"]) == "classifier.0 Linear 7 1 404 32 4096x1x1 103 M yes 103 M"
    )
    assert "138,357,544, of which 138,357,544 trainable" in ran.out
    assert "15,470,264,320" in ran.out  # the multiply-adds that torchvision states: 15.47 G
    assert re.search(r"receptive field +404x404, cell 0 from pixel \(-90, -90\)", ran.out)
    assert max(map(len, ran.out.splitlines())) <= 80


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 140])
def test_info_of_long_names_keeps_one_line_per_layer(columns):
    out = run("info", "densenet121", columns=columns).out
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[1].split()[0] == "layer"
    assert ("kind" in lines[1]) == (columns == 140)
    table = lines[2 : next(i for i, line in enumerate(lines) if line.startswith("field:"))]
    assert str(len(table)) in lines[lines.index("Totals") + 1]
    assert all("denselayer" not in line or line.startswith(("…", "feat")) for line in table)
    assert not any("…" in line[1:] for line in lines)  # no number is cut
    foot = " ".join(" ".join(lines[: lines.index("Totals")]).split())
    names = foot.partition("not shown at this width: ")[2]
    shown = lines[1].split()[1:]
    every = {"kind", "kernel", "stride", "field", "jump", "output", "params", "train", "MACs"}
    assert every == {*shown, *filter(None, names.split(", "))}


def test_info_at_another_size():
    out = run("info", "demo", "--size", "48x64").out
    net = fcvgg.load("demo")
    rows, cols = net.output_size((48, 64))
    assert re.search(rf"cells at 48x64 +{rows}x{cols}\s", out)
    assert f"2x{rows}x{cols}" in out
    assert f"{fcvgg.receptive_fields(net, input_size=(48, 64)).multiply_adds:,}" in out


def test_info_as_json_is_what_the_library_says():
    found = json.loads(run("info", "demo", "--size", "48x64", "--json").out)
    net = fcvgg.load("demo")
    table = fcvgg.receptive_fields(net, input_size=(48, 64))
    assert [row["name"] for row in found["layers"]] == [row.name for row in table]
    assert [row["multiply_adds"] for row in found["layers"]] == [r.multiply_adds for r in table]
    assert all(row["trainable"] for row in found["layers"] if row["parameters"])
    assert found["multiply_adds"] == table.multiply_adds
    assert found["size"] == [48, 64]
    assert found["geometry"]["output_size"] == list(net.output_size((48, 64)))
    assert found["geometry"]["centre"] == list(net.geometry.centre_of(0, 0))
    assert found["geometry"]["stride"] == list(net.geometry.stride)


def test_info_below_the_window_says_that_the_image_is_padded():
    out = run("info", "demo", "--size", 20).out
    assert re.search(r"cells at 20x20 +1x1, padded with zeros up to the window", out)


def test_info_shows_which_layers_are_frozen(monkeypatch):
    net = fcvgg.load("demo")
    for name, parameter in net.network.named_parameters():
        parameter.requires_grad = name.startswith("classifier")
    monkeypatch.setattr("fcvgg.loading.load", lambda *args, **options: net)
    out = run("info", "demo").out
    assert re.search(r"features\.0 .* no ", out)
    assert re.search(r"classifier\.0 .* yes ", out)
    trained = sum(p.numel() for p in net.network.parameters() if p.requires_grad)
    assert f"of which {trained:,} trainable" in out


@pytest.mark.parametrize("size", ["big", "0", "3x4x5"])
def test_info_refuses_a_size_that_is_none(size):
    assert "Invalid value for '--size'" in usage_error("info", "demo", "--size", size)


def test_info_of_a_bundle_a_checkpoint_and_an_onnx_file(folder):
    def totals(*arguments):
        ran = run("info", *arguments)
        assert (ran.status, ran.err) == (0, "")
        return (
            re.search(r"parameters +([\d,]+),", ran.out)[1],
            re.search(r"centre of cell 0 +(.*?) *\n", ran.out)[1],
        )

    model = torchvision.models.squeezenet1_1(num_classes=3)
    torch.save(model.state_dict(), "own.pt")
    parameters = f"{sum(p.numel() for p in model.parameters()):,}"
    assert totals("own.pt", "--arch", "squeezenet1_1")[0] == parameters
    expected = totals("demo")
    for name in ("faces", "faces.onnx"):
        assert run("convert", "demo", "-o", name).status == 0
    assert totals("faces") == expected
    stored = fcvgg.load("faces.onnx", input_size=32)
    assert totals("faces.onnx")[1] == expected[1]
    assert totals("faces.onnx")[0] == f"{sum(p.numel() for p in stored.parameters()):,}"


def test_info_of_a_keras_file(folder):
    layers = [
        ("InputLayer", {"name": "image", "batch_input_shape": [None, 16, 16, 3]}, {}),
        (
            "Conv2D",
            {"name": "conv", "filters": 4, "kernel_size": [3, 3], "activation": "relu"},
            {"kernel": (3, 3, 3, 4), "bias": (4,)},
        ),
        ("MaxPooling2D", {"name": "pool", "pool_size": [2, 2]}, {}),
        ("Flatten", {"name": "flat"}, {}),
        ("Dense", {"name": "scores", "units": 5}, {"kernel": (196, 5), "bias": (5,)}),
    ]
    described = [{"class_name": kind, "config": config} for kind, config, _ in layers]
    with h5py.File("net.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(
            {"class_name": "Sequential", "config": {"name": "net", "layers": described}}
        )
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = [config["name"] for _, config, _ in layers]
        for _, config, arrays in layers:
            group = weights.create_group(config["name"])
            group.attrs["weight_names"] = [f"{config['name']}/{name}:0" for name in arrays]
            for name, shape in arrays.items():
                group[f"{config['name']}/{name}:0"] = np.ones(shape, np.float32)
    ran = run("info", "net.h5")
    assert (ran.status, ran.err) == (0, "")
    assert re.search(r"native size +16x16", ran.out)
    assert re.search(rf"parameters +{3 * 9 * 4 + 4 + 4 * 49 * 5 + 5:,},", ran.out)


def test_info_names_the_layer_that_is_refused():
    message = fails("info", "mobilenet_v3_small")
    assert "(SqueezeExcitation) is refused: squeeze-and-excitation" in message


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10.0 K"),
        (36_928, "36.9 K"),
        (999_400, "999 K"),
        (999_600, "1.00 M"),
        (1_849_688_064, "1.85 G"),
        (5 * 10**15, "5000 T"),
    ],
)
def test_counts_are_short(number, text):
    assert count(number) == text


# -- convert --------------------------------------------------------------------------------------


def test_convert_checks_and_writes_a_network_that_the_commands_take(images, folder):
    ran = run("convert", "demo", "-o", "nets/faces")
    assert (ran.status, ran.err) == (0, "")
    assert re.search(r"verdict +equivalent", ran.out)
    assert "wrote nets/faces\n" in ran.out
    assert re.search(r"model\.safetensors: [\d,]+ bytes", ran.out)
    expected = run("heatmap", "one.png", "-m", "demo", "-t", "face").out
    assert run("heatmap", "one.png", "-m", "nets/faces", "-t", "face").out == expected
    assert "DemoNet" in run("info", "nets/faces").out


def test_convert_replaces_its_own_output(folder):
    for _ in range(2):
        assert run("convert", "demo", "-o", "faces").status == 0
    assert [path.name for path in folder.iterdir()] == ["faces"]


def test_convert_never_overwrites_anything_else(images, folder):
    (folder / "work").mkdir()
    (folder / "work/thesis.txt").write_text("years")
    (folder / "notes").write_text("weeks")
    for name in ("work", "notes"):
        assert fails("convert", "demo", "-o", name).startswith(f"{name} exists and is not a bundle")
    assert (folder / "notes").read_text() == "weeks"
    assert (folder / "work/thesis.txt").read_text() == "years"


def test_convert_with_a_finer_stride(folder):
    assert re.search(r"stride +2x2", run("convert", "demo", "--output-stride", 2, "-o", "f").out)
    assert re.search(r"stride +2x2", run("info", "f").out)


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
def test_convert_exports_by_the_ending(folder, ending):
    name = f"nets/faces{ending}"
    ran = run("convert", "demo", "-o", name)
    assert (ran.status, ran.err) == (0, "")
    assert re.search(r"verdict +equivalent", ran.out)
    assert f"wrote {name}\n" in ran.out
    written = folder / name
    assert f"  faces{ending}: {written.stat().st_size:,} bytes" in ran.out
    assert [path.name for path in (folder / "nets").iterdir()] == [written.name]
    images = torch.rand(2, 3, 40, 56)
    if ending == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])
        scores = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    else:
        scores = torch.export.load(str(written)).module()(images)
    torch.testing.assert_close(scores, fcvgg.load("demo")(images), rtol=0, atol=1e-4)


def test_convert_help_says_what_each_ending_gives():
    text = " ".join(run("convert", "--help").out.replace("│", " ").split())
    assert "a name in .onnx for ONNX or in .pt2 for torch.export, else a bundle" in text


def test_convert_never_overwrites_its_source(folder):
    assert run("convert", "demo", "-o", "faces.onnx").status == 0
    before = (folder / "faces.onnx").read_bytes()
    assert fails("convert", "faces.onnx", "-o", "./faces.onnx") == (
        "faces.onnx is the source, which would be lost; choose another --output"
    )
    assert (folder / "faces.onnx").read_bytes() == before


def test_convert_needs_an_output():
    assert "Missing option '--output'" in usage_error("convert", "demo")


# -- failing and progress -------------------------------------------------------------------------


def test_ctrl_c_ends_with_a_short_line(monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fcvgg.loading.load", interrupt)
    ran = run("info", "demo")
    assert (ran.status, ran.out, ran.err) == (130, "", "fcvgg: error: interrupted\n")


def test_a_message_of_several_lines_is_printed_as_one(monkeypatch):
    def fail(*args, **options):
        raise fcvgg.FcvggError("first\n  second " + "long " * 60)

    monkeypatch.setattr("fcvgg.loading.load", fail)
    assert fails("info", "demo").startswith("first second long long")


def test_a_bug_is_not_dressed_up_as_bad_input(images, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(fcvgg.FullyConvolutional, "score_map", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run("heatmap", "one.png", "-m", "demo")
