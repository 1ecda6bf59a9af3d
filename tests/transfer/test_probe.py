"""Accuracy by depth, its command, and the figure of a layer's maps."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from nets import GlobalPooled, SmallVGG, images, seeded
from PIL import Image
from typer.testing import CliRunner

import fcvgg
from fcvgg.cli import app
from fcvgg.demo import demo_photograph
from fcvgg.transfer import class_folders
from fcvgg.transfer.probing import LayerAccuracy

mpl.use("Agg")
pytest.importorskip("sklearn")
skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real face crops and other crops of the same photographs, as class folders."""
    folder = tmp_path_factory.mktemp("faces")
    crops = skimage_data.lfw_subset()
    for i, name in enumerate(("face", "other")):
        (folder / name).mkdir()
        for k in range(15):
            pixels = np.clip(crops[100 * i + k] * 255, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(folder / name / f"{k:02}.png")
    return folder


# -- probe ------------------------------------------------------------------------------------


def test_probe_is_cross_validation_of_a_pipeline(faces: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = class_folders(faces)
    net = fcvgg.load("demo")
    probe = fcvgg.probe(net, found.paths, found.labels, folds=3, seed=4)
    assert [row.layer for row in probe.rows] == ["pool1", "pool2", "pool3"]
    assert [row.features for row in probe.rows] == [16, 32, 64]
    pipeline = make_pipeline(
        fcvgg.VGGFeatures(net, "pool2"), StandardScaler(), LogisticRegression(max_iter=5000)
    )
    parts = StratifiedKFold(3, shuffle=True, random_state=4)
    expected = cross_val_score(pipeline, list(found.paths), found.labels, cv=parts)
    assert probe.rows[1].folds == tuple(expected)
    assert probe.chance == 0.5
    assert probe.images == 30
    assert probe.best.mean > 0.9


@pytest.mark.parametrize("classifier", ["logistic", "svm"])
def test_noise_is_not_learnt_and_brightness_is(classifier: str) -> None:
    model = seeded(SmallVGG, dtype=torch.float32)
    noise = images(24, 3, 16, 16, dtype=torch.float32)
    labels = np.arange(24) % 2
    random = fcvgg.probe(model, list(noise), labels, classifier=classifier, folds=4)
    assert all(row.mean < 0.85 for row in random.rows)
    bright = noise + torch.from_numpy(labels).float()[:, None, None, None] * 3
    learnt = fcvgg.probe(model, list(bright), labels, classifier=classifier, folds=4)
    assert all(row.mean > 0.95 for row in learnt.rows)


def test_the_table_and_the_figure() -> None:
    rows = (LayerAccuracy("pool1", 8, (0.5, 0.75)), LayerAccuracy("pool2", 12, (1.0, 0.75)))
    probe = fcvgg.Probe(rows, chance=0.5, images=16)
    assert probe.best is rows[1]
    assert str(probe).splitlines() == [
        "layer   features  accuracy  spread",
        "pool1          8     0.625   0.125",
        "pool2         12     0.875   0.125",
        "chance               0.500",
    ]
    ax = probe.plot()
    assert ax.get_title() == "16 images: best at pool2, 87.5%"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["pool1\n8", "pool2\n12"]
    assert ax.containers[0].lines[0].get_ydata().tolist() == [0.625, 0.875]


def test_the_bars_of_the_figure_stay_within_0_and_1() -> None:
    rows = (LayerAccuracy("pool1", 8, (1.0, 1.0, 0.7)), LayerAccuracy("pool2", 12, (0.0, 0.0, 0.3)))
    ax = fcvgg.Probe(rows, chance=0.5, images=16).plot()
    (bars,) = ax.containers[0].lines[2]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [
        [pytest.approx(rows[0].mean - rows[0].std), 1.0],
        [0.0, pytest.approx(rows[1].mean + rows[1].std)],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1]}, "labels must be as many as the 4 images, got 2"),
        ({"labels": [0] * 4}, "labels must be of two or more classes, got 1"),
        ({"folds": 1}, "folds must be an integer of at least 2, got 1"),
        ({"folds": 3}, "folds must be at most 2, the images of class 0, got 3; add images"),
        ({"classifier": "tree"}, "classifier must be 'logistic' or 'svm', got 'tree'"),
        ({"layers": ["pool7"]}, "the model has no layer 'pool7' (near: "),
        ({"layers": "pool1"}, "layers must be a sequence of names, got 'pool1'; pass [name]"),
    ],
)
def test_probes_that_cannot_be(change, message) -> None:
    arguments = {"labels": [0, 0, 1, 1], "folds": 2, **change}
    batch = list(images(4, 3, 16, 16, dtype=torch.float32))
    with pytest.raises(fcvgg.ArgumentError, match=f"^{re.escape(message)}"):
        fcvgg.probe(seeded(SmallVGG, dtype=torch.float32), batch, **arguments)


# -- class folders ----------------------------------------------------------------------------


def test_unreadable_images_are_listed_and_skipped(faces: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "good.png")
    (tmp_path / "a" / "broken.png").write_text("no image")
    (tmp_path / "a" / "notes.txt").write_text("not looked at")
    found = class_folders(tmp_path)
    assert found.classes == ("a", "b")
    assert found.labels == (0, 1)
    assert found.counts == {"a": 1, "b": 1}
    assert [str(one) for one in found.skipped] == [
        f"{tmp_path}/a/notes.txt: not a readable image",
        f"{tmp_path}/a/broken.png is not an image that Pillow can read; convert it to PNG or JPEG",
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "/CLASS/, got no folders"),
        (["a/1.png"], "must have two or more class folders, got one, a"),
        (["a/1.png", "b/"], "/b must hold readable images, got an empty folder"),
        (
            ["a/1.png", "b/broken.png"],
            "/b must hold readable images, got 1 that cannot be read: broken.png ",
        ),
    ],
)
def test_folders_that_are_no_task(files, message, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("1.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        elif name.endswith("/"):
            (tmp_path / name).mkdir(exist_ok=True)
        else:
            (tmp_path / name).write_text("x")
    with pytest.raises(fcvgg.DatasetError, match=re.escape(message)):
        class_folders(tmp_path)


# -- the command ------------------------------------------------------------------------------


def test_the_command_prints_and_plots(faces: Path, tmp_path: Path) -> None:
    arguments = ["probe", str(faces), "--model", "demo", "--folds", "3", "--size", "32x32"]
    cache = ["--cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(app, [*arguments, *cache, "-o", str(tmp_path / "probe.png")])
    assert done.exit_code == 0, done.output
    assert "face: 15 images, other: 15 images" in done.output
    assert re.search(r"pool3 +64 +[01]\.\d{3} +0\.\d{3}", done.output)
    assert re.search(r"chance +0\.500", done.output)
    assert re.search(r"best: pool\d, [\d.]+% of held-out images right", done.output)
    with Image.open(tmp_path / "probe.png") as figure:
        assert figure.size == (720, 480)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 90


def test_the_command_takes_the_part_to_train_on(faces: Path, tmp_path: Path) -> None:
    shutil.copytree(faces, tmp_path / "data" / "Train")
    shutil.copytree(faces, tmp_path / "data" / "Test")
    (tmp_path / "data" / "Train" / "face" / "x.xyz").write_text("no image")
    arguments = ["probe", str(tmp_path / "data"), "--model", "demo", "--folds", "3"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "probe.png")])
    assert done.exit_code == 0, done.output
    assert f"{tmp_path}/data/Train: face: 15 images, other: 15 images" in done.stdout
    assert done.stderr == "fcvgg: 1 of 31 files left out: 1 .xyz (not a readable image)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent must be a folder with one folder per class, got nothing of that name"),
        (["FACES", "--layers", "conv9_1"], "the model has no layer 'conv9_1' (near: "),
        (
            ["FACES", "--folds", "40"],
            "--folds must be at most 15, the images of class 'face', got 40",
        ),
        (["FACES", "--size", "4"], "needs at least (8, 8); pass --size"),
        (["FACES", "--output", "absent/probe.png"], "cannot write absent/probe.png: there is no"),
    ],
)
def test_the_command_on_bad_input(arguments, message, faces: Path, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(faces) if a == "FACES" else a for a in arguments]
    done = CliRunner().invoke(app, ["probe", "--model", "demo", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.output


# -- the figure of maps -----------------------------------------------------------------------


def panels(figure):
    """The titled panels of a figure, with their values."""
    return {
        ax.get_title(): ax.get_images()[0].get_array()
        for ax in figure.axes
        if ax.get_title() and ax.get_images()
    }


@pytest.mark.parametrize("layer", ["conv1_2", "relu1_2", "block2_pool"])
def test_the_grid_shows_the_image_and_the_layers_maps(layer: str) -> None:
    net = fcvgg.load("demo")
    picture = demo_photograph().resize((60, 44))
    figure = fcvgg.plot_features(net, picture, layer, maps=[0, 5, 2], columns=2)
    shown = panels(figure)
    assert list(shown) == ["image", "0", "5", "2"]
    assert np.allclose(shown["image"], np.asarray(picture) / 255, atol=1e-6)
    with torch.no_grad():
        maps = fcvgg.features_upto(net, layer)(net.preprocess(picture))[0].numpy()
    for channel in (0, 5, 2):
        np.testing.assert_allclose(shown[str(channel)], maps[channel], rtol=1e-5, atol=1e-6)
    limits = {ax.get_images()[0].get_clim() for ax in figure.axes if ax.get_title().isdecimal()}
    assert len(limits) == 1  # one scale, so that maps compare
    ((low, high),) = limits
    assert low == (-high if layer == "conv1_2" else 0)
    assert figure.get_suptitle() == (
        f"{layer}: 3 of {len(maps)} maps of {maps.shape[1]} x {maps.shape[2]}"
    )


def test_the_maps_that_vary_most_are_chosen() -> None:
    model = seeded(SmallVGG, dtype=torch.float32)
    with torch.no_grad():
        model.features[0].weight[[1, 6]] *= 50
    batch = images(1, 3, 20, 20, dtype=torch.float32)
    assert list(panels(fcvgg.plot_features(model, batch, "conv1_1", maps=2))) == ["image", "1", "6"]
    assert len(panels(fcvgg.plot_features(model, batch, "conv1_1"))) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "conv9_1"}, "the model has no layer 'conv9_1' (near: "),
        ({"layer": "fc6"}, "layer must give a map (channels, rows, columns), got fc6 with (24,);"),
        ({"maps": 0}, "maps must be an integer of at least 1, got 0"),
        ({"maps": [3, 8]}, "maps must be a number of maps or channels from 0 to 7, got [3, 8]"),
        ({"columns": -1}, "columns must be an integer of at least 1, got -1"),
        (
            {"image": images(1, 3, 3, 9, dtype=torch.float32), "layer": "pool2"},
            "an image of (3, 9) pixels is too small for pool2; it needs (4, 4)",
        ),
        ({"image": "photo.jpg"}, "the network's preprocessing is unknown, so an image file"),
    ],
)
def test_figures_that_cannot_be(options, message) -> None:
    batch = images(1, 3, 32, 32, dtype=torch.float32)
    arguments = {"image": batch, "layer": "conv1_1", **options}
    with pytest.raises(fcvgg.FcvggError, match=f"^{re.escape(message)}"):
        fcvgg.plot_features(seeded(SmallVGG, dtype=torch.float32), **arguments)


def test_a_model_without_pools_has_to_name_layers() -> None:
    model = seeded(GlobalPooled, dtype=torch.float32)
    model.pool = torch.nn.Identity()
    batch = list(images(4, 3, 32, 32, dtype=torch.float32))
    message = r"^GlobalPooled has no pool layer; name the layers in layers="
    with pytest.raises(fcvgg.ConversionError, match=message):
        fcvgg.probe(model, batch, [0, 0, 1, 1], folds=2)
