"""Fine-tuning: folders, strategies and their choice, the whole path, its report and its command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from nets import GlobalPooled, SmallVGG, seeded
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import fcvgg
from fcvgg.cli import app
from fcvgg.demo import MEAN, STD, demo_model
from fcvgg.errors import (
    ArgumentError,
    ConversionError,
    DatasetError,
    InputSizeError,
    LoadError,
    PreprocessError,
    TrainingError,
)
from fcvgg.finetuning import report, strategies
from fcvgg.finetuning.classification import Classification
from fcvgg.finetuning.frozen_trunk import find_trunk
from fcvgg.finetuning.images import ImageRows
from fcvgg.finetuning.outputs import InputOf, stored_outputs
from fcvgg.finetuning.pretrained import Pretrained, load_pretrained
from fcvgg.finetuning.strategies import (
    Choice,
    Recipe,
    choose_strategy,
    new_layer_rate,
    prepare_model,
    rates,
)
from fcvgg.finetuning.svm import fit_svm
from fcvgg.images.datasets import LabelledFiles, split_folders
from fcvgg.images.pictures import Picture
from fcvgg.images.reading import read_picture
from fcvgg.training import Settings
from fcvgg.training.normalization import check_batches
from fcvgg.training.sampling import SeededItems
from fcvgg.training.settings import balanced_weights

mpl.use("Agg")
skimage_data = pytest.importorskip("skimage.data")

CLASSES = ("brick", "grass", "gravel")
PREPROCESS = fcvgg.Preprocess(MEAN, STD)
SIZE = (32, 32)


def write_patches(folder: Path, count: int, left: bool, names: Any = CLASSES) -> Path:
    """Real texture patches of 40 pixels from one half of each photograph, as class folders."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            y, x = rng.integers(0, 472), rng.integers(0, 216) + (0 if left else 256)
            patch = getattr(skimage_data, name)()[y : y + 40, x : x + 40]
            Image.fromarray(patch).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("textures")
    write_patches(folder / "train", 12, left=True)
    write_patches(folder / "val", 4, left=False)
    return folder


@pytest.fixture(scope="module")
def files(textures: Path) -> LabelledFiles:
    return split_folders(textures).train


@pytest.fixture
def with_report() -> None:
    """For tests that read the report."""


@pytest.fixture(autouse=True)
def _without_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures take most of a short run's time."""
    if "with_report" not in request.fixturenames:
        monkeypatch.setattr("fcvgg.finetuning.report.write_report", lambda result: None)


def tuned(textures: Path, folder: Path, **options: Any) -> fcvgg.FineTuned:
    model = options.pop("model", "demo")
    options = {"epochs": 2, "batch_size": 12, "hidden": (), **options}
    return fcvgg.finetune(textures, model, folder, **options)


# -- folders ----------------------------------------------------------------------------------


def test_train_and_val_folders(textures: Path) -> None:
    found = split_folders(textures)
    assert found.classes == CLASSES
    assert found.counts == dict.fromkeys(CLASSES, (12, 4))
    assert found.origin == f"held out are the images of {textures / 'val'}"
    assert found.skipped == ()
    assert all("train" in p.parts for p in found.train.paths)


def test_one_folder_is_split_by_class_and_seed(textures: Path) -> None:
    splits = [split_folders(textures / "train", 0.25, seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0].valid.paths != splits[2].valid.paths
    for found in splits:
        assert found.counts == dict.fromkeys(CLASSES, (9, 3))
        assert not set(found.train.paths) & set(found.valid.paths)
        for files in (found.train, found.valid):
            assert all(p.parent.name == CLASSES[k] for p, k in zip(files.paths, files.labels))
    assert split_folders(textures / "train", 0.01).counts["brick"] == (11, 1)
    assert split_folders(textures / "train", 0.99).counts["brick"] == (1, 11)


def test_train_alone_is_split(tmp_path: Path) -> None:
    write_patches(tmp_path / "train", 3, left=True)
    assert split_folders(tmp_path).counts["brick"] == (2, 1)


def test_a_test_folder_is_no_class_and_not_looked_at(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("test", 2)):
        write_patches(tmp_path / part, count, left=part == "train")
    found = split_folders(tmp_path)
    assert found.counts == dict.fromkeys(CLASSES, (3, 1))
    assert all("test" not in p.parts[-3] for p in (*found.train.paths, *found.valid.paths))


def test_parts_by_any_usual_name(tmp_path: Path) -> None:
    for part, count in (("Training", 4), ("Dev", 2), ("Testing", 2)):
        write_patches(tmp_path / part, count, left=True)
    (tmp_path / "labels.csv").write_text("brick")
    found = split_folders(tmp_path)
    assert found.classes == CLASSES
    assert found.counts == dict.fromkeys(CLASSES, (4, 2))
    assert found.origin == (
        f"held out are the images of {tmp_path / 'Dev'}; {tmp_path / 'Testing'} is kept for testing"
    )
    assert [Path(one.name).name for one in found.skipped] == ["labels.csv"]


def test_every_kind_of_image_is_used_or_listed(tmp_path: Path) -> None:
    write_patches(tmp_path, 2, left=True)
    for ending, kind in (("jfif", "JPEG"), ("avif", "AVIF"), ("JP2", "JPEG2000"), ("tif", "TIFF")):
        Image.new("RGB", (40, 40)).save(tmp_path / "brick" / f"x.{ending}", kind)
    for ending in ("xyz", "xml"):
        (tmp_path / "brick" / f"x.{ending}").write_text("no image")
    found = split_folders(tmp_path)
    assert sum(found.counts["brick"]) == 6
    assert [str(one) for one in found.skipped] == [
        f"{tmp_path}/brick/x.{ending}: not a readable image" for ending in ("xml", "xyz")
    ]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_patches(tmp_path, 2, left=True, names=("brick", "grass"))
    (tmp_path / "brick").rename(tmp_path / "train")
    assert split_folders(tmp_path).classes == ("grass", "train")


def test_unreadable_images_are_skipped_and_listed(tmp_path: Path) -> None:
    write_patches(tmp_path, 4, left=True)
    (tmp_path / "grass" / "00.png").write_bytes(b"no image")
    found = split_folders(tmp_path)
    assert found.counts["grass"] == (2, 1)
    (skipped,) = found.skipped
    assert "00.png is not an image that Pillow can read" in str(skipped)


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    one = write_patches(tmp_path / "one", 2, left=True, names=("brick",))
    with pytest.raises(DatasetError, match="must have two or more class folders, got one, brick"):
        split_folders(one)
    (one / "grass").mkdir()
    with pytest.raises(DatasetError, match=r"grass must hold readable images, got an empty folder"):
        split_folders(one)
    few = write_patches(tmp_path / "few", 1, left=True)
    with pytest.raises(DatasetError, match="the class 'brick' must have two or more images, of "):
        split_folders(few)
    other = tmp_path / "other"
    write_patches(other / "train", 1, left=True, names=("brick", "grass"))
    write_patches(other / "valid", 1, left=True, names=("brick", "gravel"))
    message = (
        r"to validate on must have the same class folders, got grass only in .*train and gravel "
        r"only in .*valid$"
    )
    with pytest.raises(DatasetError, match=message):
        split_folders(other)
    (other / "train").rename(other / "learn")
    message = "got the part valid next to 'learn'; rename it, or move them"
    with pytest.raises(DatasetError, match=message):
        split_folders(other)
    with pytest.raises(ArgumentError, match=r"^valid_fraction must be between 0 and 1, got 1"):
        split_folders(few, 1)
    with pytest.raises(DatasetError, match=r"absent must be a folder .*, got nothing"):
        split_folders(tmp_path / "absent")


# -- images -----------------------------------------------------------------------------------


def test_resize_and_centre_crop(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    files = LabelledFiles((tmp_path / "wide.png",), (1,))
    plain = fcvgg.Preprocess((0,) * 3, (1,) * 3)
    squeezed, label = ImageRows(files, plain, (20, 20), "resize")[0]
    assert label == 1
    assert squeezed.shape == (3, 20, 20)
    assert 0.3 < squeezed.mean() < 0.37
    cropped, _ = ImageRows(files, plain, (20, 20), "center-crop")[0]
    assert cropped.min() == 1
    taller, _ = ImageRows(files, plain, (30, 15), "centre-crop")[0]
    assert taller.shape == (3, 30, 15)
    with pytest.raises(ArgumentError, match="resize must be 'resize' or 'center-crop', got 'crop'"):
        ImageRows(files, plain, (20, 20), "crop")


@given(*[st.integers(1, 90)] * 2, *[st.integers(1, 60)] * 2)
def test_a_centre_crop_has_no_border(height: int, width: int, rows: int, cols: int) -> None:
    images = ImageRows(LabelledFiles((), ()), PREPROCESS, (rows, cols), "centre-crop")
    cropped = images.fitted(Picture(np.full((height, width, 1), 255, np.uint8)))
    assert cropped.size == (rows, cols)
    assert cropped.pixels.min() == 255


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_augmentation_depends_on_seed_epoch_and_index(files: LabelledFiles, channels: int) -> None:
    preprocess = fcvgg.Preprocess((0.5,) * channels, (0.25,) * channels)
    images = SeededItems(ImageRows(files, preprocess, (24, 32), augment=True), 0)
    one = images[1, 0][0]
    assert one.shape == (channels, 24, 32)
    torch.testing.assert_close(one, images[1, 0][0], rtol=0, atol=0)
    assert not torch.equal(one, images[2, 0][0])


def test_balanced_weights_count_every_class_the_same() -> None:
    weights = balanced_weights((3, 1))
    torch.testing.assert_close(weights, torch.tensor([4 / 6, 4 / 2]))
    labels = torch.tensor([0, 0, 0, 1])
    assert weights[labels][labels == 0].sum() == weights[labels][labels == 1].sum()


# -- strategies -------------------------------------------------------------------------------


def choose(files: LabelledFiles, **options: Any) -> Choice:
    return choose_strategy(Recipe(**options), demo_source(), files)


def demo_source() -> Pretrained:
    return Pretrained(demo_model(), "demo", PREPROCESS, SIZE)


def test_auto_measures_likeness_of_few_images(files: LabelledFiles) -> None:
    """The demo's last hidden layer knows faces; its early convolutions know textures."""
    choice = choose(files)
    assert choice.strategy == "svm"
    assert choice.reason.startswith("12 training images per class are few (below 100) and features")
    assert "of relu7 tell them apart worse than those of pool2 (" in choice.reason
    assert "features of pool3 tell them apart " in choose(files, hidden=()).reason


@pytest.mark.parametrize(("hidden", "size"), [((), (48, 48)), (None, SIZE)])
def test_likeness_is_measured_at_the_size_that_is_trained(
    files: LabelledFiles, monkeypatch: pytest.MonkeyPatch, hidden: Any, size: Any
) -> None:
    class AskedError(Exception):
        pass

    def probed(*_: Any, **options: Any) -> None:
        raise AskedError(options["size"])

    monkeypatch.setattr("fcvgg.transfer.probing.probe", probed)
    with pytest.raises(AskedError) as asked:
        choose(files, hidden=hidden, size=48)
    assert asked.value.args == (size,)


def test_auto_finds_faces_similar_to_faces(tmp_path: Path) -> None:
    crops = (skimage_data.lfw_subset() * 255).clip(0, 255).astype(np.uint8)
    paths = tuple(tmp_path / f"{i}.png" for i in range(24))
    for i, path in enumerate(paths):
        Image.fromarray(crops[i if i < 12 else 100 + i]).resize(SIZE).save(path)
    choice = choose(LabelledFiles(paths, (0,) * 12 + (1,) * 12))
    assert choice.strategy == "linear"
    assert "features of relu7 tell them apart no worse than those of pool2 (" in choice.reason


def test_auto_by_number_and_by_what_the_user_says(
    files: LabelledFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(files, similar=True).strategy == "linear"
    different = choose(files, similar=False)
    assert different.strategy == "svm"
    assert "the images are called different, so early features are frozen" in different.reason
    assert choose(files, freeze_upto="pool1").strategy == "partial"
    hidden = choose(files, similar=True, hidden=(16,))  # random layers must not be frozen
    assert hidden.strategy == "partial"
    assert hidden.reason.startswith("since hidden layers are requested: the early layers")
    varied = choose(files, similar=False, augment=True)  # nor can a machine be given varied images
    assert varied.strategy == "partial"
    assert "a support vector machine cannot be fitted to features that vary" in varied.reason
    assert choose(files, strategy="scratch").reason.startswith("as requested: every layer is train")
    monkeypatch.setattr(strategies, "FEW", 10)
    medium = choose(files, similar=False)
    assert medium.strategy == "partial"
    assert "12 training images per class are neither few nor many" in medium.reason
    monkeypatch.setattr(strategies, "MANY", 12)
    many = choose(files, similar=False)
    assert many.strategy == "all"
    assert "are many (from 12), so every layer is trained, the early ones more" in many.reason


def test_too_few_to_measure(files: LabelledFiles) -> None:
    two = LabelledFiles(files.paths[:2] + files.paths[12:14], (0, 0, 1, 1))
    choice = choose(two)
    assert choice.strategy == "linear"
    assert "too few to measure their similarity" in choice.reason


CHANGED = {
    "linear": {"classifier.6"},
    "partial": {"features.10", "features.12", "classifier.0", "classifier.3", "classifier.6"},
    "all": None,
    "scratch": None,
}


@pytest.mark.parametrize("strategy", CHANGED)
def test_what_is_trained(textures: Path, tmp_path: Path, strategy: str) -> None:
    source = demo_model()
    result = tuned(
        textures,
        tmp_path,
        model=source,
        preprocess=PREPROCESS,
        strategy=strategy,
        hidden=None,
        epochs=1,
    )
    assert all(p.requires_grad for p in source.parameters())
    before, after = demo_model().state_dict(), result.model.state_dict()
    assert all(torch.equal(before[k], v) for k, v in source.state_dict().items())
    changed = {
        name.rpartition(".")[0]
        for name, value in after.items()
        if value.shape != before[name].shape or not torch.equal(before[name], value)
    }
    assert changed == (CHANGED[strategy] or {name.rpartition(".")[0] for name in before})
    assert result.trained == sum(
        p.numel() for n, p in result.model.named_parameters() if n.rpartition(".")[0] in changed
    )
    with torch.no_grad():
        images = ImageRows(result.valid, PREPROCESS, SIZE)
        batch = torch.stack([image for image, _ in images])
        expected = result.model(batch).softmax(1)
        native = result.net(batch)[:, :, 0, 0].softmax(1)
    torch.testing.assert_close(torch.from_numpy(result.probabilities), expected)
    torch.testing.assert_close(native, expected, rtol=1e-5, atol=1e-6)
    assert result.net.equivalence is not None
    assert result.net.equivalence.passed


@pytest.mark.parametrize("strategy", ["linear", "svm"])
def test_other_precisions_are_trained_in_single(
    textures: Path, tmp_path: Path, strategy: str
) -> None:
    source = demo_model().double()
    options: dict[str, Any] = {"model": source, "preprocess": PREPROCESS, "strategy": strategy}
    result = tuned(textures, tmp_path, **options)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert {p.dtype for p in source.parameters()} == {torch.float64}


def test_scratch_starts_at_random(files: LabelledFiles) -> None:
    models = [prepare_model(demo_source(), "scratch", Recipe(), 3, seed) for seed in (0, 0, 1)]
    weights = [model.features[0].weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], demo_model().features[0].weight)
    assert 0.08 < weights[0].std() < 0.16  # sqrt(2 / (16 * 9)) = 0.118


def test_rates_fall_towards_the_image() -> None:
    model = prepare_model(demo_source(), "all", Recipe(), 3, 0)
    found = {group["name"]: group["lr"] for group in rates(model, "all", 1.0, None)}
    assert found == pytest.approx(
        {"block1": 0.025, "block2": 0.05, "block3": 0.1, "fc8": 1.0, "rest": 0.1}
    )
    new = prepare_model(demo_source(), "all", Recipe(hidden=(8,)), 3, 0)
    found = {group["name"]: group["lr"] for group in rates(new, "all", 1.0, (8,))}
    assert found == pytest.approx(
        {"block1": 0.025, "block2": 0.05, "block3": 0.1, "fc6": 1.0, "fc7": 1.0}
    )


def test_the_rate_of_new_layers() -> None:
    """SGD's moves scores as far whatever the features' scale; AdamW's is larger for small ones."""
    rows = torch.rand(8, 100, generator=torch.Generator().manual_seed(0))
    for scale in (10.0, 1000.0):
        lr = new_layer_rate(rows * scale, "sgd")
        assert float(lr * (rows * scale).square().sum(1).mean()) == pytest.approx(1.0, rel=0.05)
        assert new_layer_rate(rows * scale, "adamw") == 1e-3
    small = new_layer_rate(rows, "adamw")
    assert float(small * rows.abs().sum(1).mean()) == pytest.approx(0.3, rel=0.05)
    assert new_layer_rate(rows * 1e-6, "adamw") == 1e-2


def test_few_images_get_more_epochs_unless_told(
    textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcvgg.finetuning.finetuning.LEAST_STEPS", 100)
    options: dict[str, Any] = {"strategy": "partial", "freeze_upto": "pool3", "hidden": ()}
    result = fcvgg.finetune(textures, "demo", tmp_path / "run", patience=1, **options)
    assert result.settings.epochs == 50  # of 2 steps each


def test_training_that_still_improves_says_so(linear: fcvgg.FineTuned) -> None:
    assert linear.training is not None
    said = "still improving at the last epoch; more epochs or a larger rate may do better"

    def text(*losses: float, right: bool = False) -> str:
        history = tuple({"epoch": i + 1, "valid_loss": x} for i, x in enumerate(losses))
        best = min(losses)
        assert linear.training is not None
        run = replace(
            linear.training,
            history=history,
            best_epoch=losses.index(best) + 1,
            best_value=best,
            stopped_early=False,
        )
        perfect = np.eye(3)[list(linear.valid.labels)]
        probabilities = perfect if right else np.roll(perfect, 1, 1)
        return str(replace(linear, training=run, probabilities=probabilities))

    assert said in text(1.3, 1.1, 1.0, 0.8)
    assert said not in text(1.3, 1.1, 1.0, 0.8, right=True)
    assert said not in text(1.3, 0.8, 0.79, 0.78)
    assert said not in text(1.3, 1.1, 0.8, 0.9)


def test_cached_features_give_what_the_whole_model_gives(files: LabelledFiles) -> None:
    model = prepare_model(demo_source(), "linear", Recipe(), 3, 0).train()
    last = model.classifier[6]
    images = ImageRows(files, PREPROCESS, SIZE)
    upto = InputOf(model, last)
    cached = stored_outputs(upto, images, "", batch_size=7, device=torch.device("cpu"))
    assert model.training
    rows, labels = cached.tensors
    assert labels.tolist() == list(files.labels)
    with torch.no_grad():
        expected = model.eval()(torch.stack([image for image, _ in images]))
        torch.testing.assert_close(last(rows), expected)


class Residual(nn.Module):
    """A shared activation, a sum, and functions and constants between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.1))
        self.convs = nn.ModuleList(nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8, 8))
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8 * 8 * 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third, fourth = self.convs
        x = self.relu(first((x - self.mean) * 2))
        y = self.relu(second(x))
        y += x
        y = F.max_pool2d(y, 2)
        y = self.relu(fourth(self.relu(third(y)) + y))
        return self.fc(self.drop(F.max_pool2d(y, 2).flatten(1)))


FROZEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "vgg": ("demo", {"freeze_upto": "pool3", "hidden": (8,)}),
    "within a block": ("demo", {"freeze_upto": "relu2_1"}),
    "before dropout": ("demo", {"freeze_upto": "fc6"}),
    "batch norm": (seeded(SmallVGG, dtype=torch.float32, bn=True), {"freeze_upto": "pool1"}),
    "residual": (seeded(Residual, dtype=torch.float32), {"freeze_upto": "convs.1", "size": 32}),
}


@pytest.mark.parametrize("case", FROZEN)
def test_frozen_layers_computed_once_train_the_same_weights(
    textures: Path, tmp_path: Path, case: str
) -> None:
    model, options = FROZEN[case]
    given = {"model": model, "augment": False, "strategy": "partial", "hidden": None, **options}
    if model != "demo":
        given["preprocess"] = PREPROCESS
    kept, on_disk, again = (
        tuned(textures, tmp_path / f"{n}", cache=cache, **given)
        for n, cache in enumerate(("1GiB", 1, 0))
    )
    assert "the frozen layers were computed once for each image (" in kept.frozen
    assert kept.frozen.endswith("MiB in memory)")
    assert on_disk.frozen.endswith("MiB on disk)")
    assert not list((tmp_path / "1").glob(".features*"))
    assert again.frozen == "the frozen layers were computed in every epoch, as asked"
    assert again.frozen in str(again)
    for other in (kept, on_disk):
        for name, value in again.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[name], value, rtol=0, atol=1e-6)
        assert not any("forward" in vars(m) for m in other.model.modules())


def test_the_trunk_ends_before_what_trains_or_varies() -> None:
    net = seeded(Residual, dtype=torch.float32)
    fcvgg.freeze_(net, "convs.1")
    trunk = find_trunk(net, SIZE, 3)
    assert trunk is not None
    assert (trunk.layer, trunk.calls) == ("relu", {"convs.0": [(8, 32, 32)]})  # the sum needs it
    fcvgg.freeze_(net, "convs.3")
    trunk = find_trunk(net, SIZE, 3)
    assert trunk is not None
    assert trunk.layer == "drop"
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trunk.skipped() as after:
        torch.testing.assert_close(after(trunk.upto(images)), net.eval()(images))
    assert find_trunk(fcvgg.unfreeze_(net), SIZE, 3) is None


def test_features_that_the_disk_does_not_hold_are_computed_again(
    textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    options: dict[str, Any] = {"strategy": "partial", "augment": False, "epochs": 1, "cache": 1}
    result = tuned(textures, tmp_path, **options)
    assert result.frozen.startswith(
        "the frozen layers were computed in every epoch, since their features take 0."
    )


def test_images_vary_by_default_where_convolutions_train(textures: Path, tmp_path: Path) -> None:
    head = tuned(textures, tmp_path / "head", strategy="partial", freeze_upto="pool3")
    assert head.recipe.augment is False
    assert "in memory" in head.frozen
    more = tuned(textures, tmp_path / "more", strategy="partial", freeze_upto="pool2", epochs=1)
    assert more.recipe.augment is True
    assert more.frozen.endswith("in every epoch, since the training images vary")


def test_frozen_batch_norm_keeps_its_statistics(textures: Path, tmp_path: Path) -> None:
    source = seeded(SmallVGG, dtype=torch.float32, bn=True)
    before = source.state_dict()["features.1.running_mean"].clone()
    result = tuned(
        textures,
        tmp_path / "frozen",
        model=source,
        preprocess=PREPROCESS,
        strategy="partial",
        freeze_upto="pool1",
        hidden=None,
        epochs=1,
    )
    assert torch.equal(result.model.features[1].running_mean, before)
    free = tuned(
        textures,
        tmp_path / "free",
        model=source,
        preprocess=PREPROCESS,
        strategy="all",
        hidden=None,
        epochs=1,
    )
    assert not torch.equal(free.model.features[1].running_mean, before)


def test_dropout_before_a_frozen_trunks_last_layer_is_off() -> None:
    model = prepare_model(demo_source(), "linear", Recipe(), 3, 0)
    module = Classification(model, nn.CrossEntropyLoss(), 3, frozen=True).train()
    assert module.training
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("classes", [2, 3])
def test_svm_is_scikit_learns_machine(files: LabelledFiles, classes: int) -> None:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    places = [i for i, label in enumerate(files.labels) if label < classes]
    part = LabelledFiles(
        tuple(files.paths[i] for i in places), tuple(files.labels[i] for i in places)
    )
    images = ImageRows(part, PREPROCESS, SIZE)
    cpu = torch.device("cpu")
    model = fit_svm(demo_model(), images, "pool2", seed=3, batch_size=16, device=cpu)
    assert isinstance(model, nn.Sequential)
    batch = torch.stack([image for image, _ in images])
    pooled = fcvgg.features_upto(demo_model(), "pool2")(batch).mean((2, 3))
    torch.testing.assert_close(model[:-1](batch), pooled)
    rows = pooled.detach().numpy()
    machine = make_pipeline(StandardScaler(), LinearSVC(max_iter=20_000, random_state=3))
    decided = machine.fit(rows, part.labels).decision_function(rows)
    with torch.no_grad():
        scores = model(torch.stack([image for image, _ in images])).double().numpy()
    got = scores[:, 1] - scores[:, 0] if classes == 2 else scores
    factor = (got * decided).sum() / (decided**2).sum()
    assert factor > 0
    np.testing.assert_allclose(got, factor * decided, atol=1e-4 * np.abs(got).max())
    assert (scores.argmax(1) == machine.predict(rows)).all()
    net = fcvgg.convert(model, input_size=SIZE)  # the check is convert's own
    assert net.geometry.stride == (4, 4)


# -- the whole path ---------------------------------------------------------------------------

LINEAR: dict[str, Any] = {"strategy": "linear", "epochs": 25}


@pytest.fixture(scope="module")
def linear(textures: Path, tmp_path_factory: pytest.TempPathFactory) -> fcvgg.FineTuned:
    return tuned(textures, tmp_path_factory.mktemp("runs") / "linear", **LINEAR)


def test_a_network_that_names_one_class_only_says_so(linear: fcvgg.FineTuned) -> None:
    said = (
        "every held-out image was classified as grass: the network does not tell the classes apart"
    )
    assert said not in str(linear)
    same = np.tile([0.3, 0.4, 0.3], (len(linear.valid), 1))
    same[:, linear.classes.index("grass")] = 0.9
    assert said in str(replace(linear, probabilities=same))


def test_textures_are_learnt(linear: fcvgg.FineTuned) -> None:
    assert linear.choice.strategy == "linear"
    assert linear.accuracy >= 0.75
    assert linear.confusion.sum(1).tolist() == [4, 4, 4]
    assert linear.accuracy == np.trace(linear.confusion) / 12
    assert linear.class_accuracy["brick"] == linear.confusion[0, 0] / 4
    assert linear.training is not None
    best = linear.training.history[linear.training.best_epoch - 1]
    assert best["valid_accuracy"] == pytest.approx(linear.accuracy)
    first, second, third, fourth = str(linear).splitlines()
    assert first == "demo, strategy linear: as requested: " + strategies.MEANINGS["linear"]
    assert second.startswith("3,075 of 75,155 parameters trained at 32x32 pixels in ")
    assert third.startswith(f"held out: {round(linear.accuracy * 12)} of 12 images right (")
    assert fourth.startswith("equivalent at 32x32 on 2 images")


def test_the_bundle_loads_and_sees_textures(linear: fcvgg.FineTuned) -> None:
    net = fcvgg.load(linear.model_path)
    assert net.categories == CLASSES
    assert net.input_size == SIZE
    picture = np.concatenate([getattr(skimage_data, n)()[300:400, 300:400] for n in CLASSES], 1)
    score_map = net.score_map(picture)
    expected = linear.net.score_map(picture).scores
    torch.testing.assert_close(score_map.scores, expected, rtol=1e-5, atol=1e-5)
    third = score_map.label_map().shape[1] // 3
    assert (score_map.label_map()[:, 1 : third - 1] == 0).float().mean() > 0.6


def test_the_report(linear: fcvgg.FineTuned) -> None:
    folder = linear.report_path.parent
    names = {"confusion.png", "curves.png", "mistakes.png", "report.md"}
    assert {p.name for p in folder.iterdir()} == names
    text = linear.report_path.read_text()
    for name in sorted(names - {"report.md"}):
        assert f"]({name})" in text
        with Image.open(folder / name) as figure:
            assert min(figure.size) > 300
    for line in str(linear).splitlines():
        assert line in text
    assert "| brick | 12 | 4 | " in text
    assert "| optimizer | adamw |" in text
    assert "| freeze_upto | None |" in text


def test_heatmaps_of_images_of_one_window_cover_more_than_their_middle() -> None:
    net = fcvgg.load("demo")
    picture = read_picture(np.zeros((32, 48, 3), np.uint8), net.preprocess)
    heatmap = net.score_map(report._scaled(picture, net)).heatmap("face")
    assert min(heatmap.coverage.any(axis).mean() for axis in (0, 1)) > 0.55


@pytest.mark.usefixtures("with_report")
def test_names_of_any_bytes_train_and_are_reported(tmp_path: Path) -> None:
    """Latin-1 as old archives unpack, and what Markdown, terminals and mathtext take for marks."""
    data = write_patches(tmp_path / "data", 4, left=True, names=("brick", "grass"))
    for i in range(4):
        odd = os.fsencode(data / "brick") + b"/h\xe4|user\n$_{%d.png" % i
        os.rename(data / "brick" / f"{i:02}.png", odd)
    os.rename(data / "grass", os.fsencode(data) + b"/gr\xe4s|*$x\x1b[31m")
    result = tuned(data, tmp_path / "run", **{**LINEAR, "epochs": 2})
    name = r"gr\xe4s|*$x\x1b[31m"
    assert result.classes == ("brick", name)
    assert fcvgg.load(result.model_path).categories == ("brick", name)
    text = result.report_path.read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.split("\n"))
    shown = r"gr\\xe4s\|\*$x\\x1b\[31m"
    assert f"\n| {shown} | 3 | 1 | " in text
    assert text.startswith(f"# demo for brick, {shown}\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") - line.count(r"\|") for line in rows} == {3, 5}  # 2 or 4 columns
    assert any(r"h\\xe4\|user\\n$_{" in line for line in rows)
    again = tuned(data, tmp_path / "run", **{**LINEAR, "epochs": 2}, resume=True)
    assert again.training is not None
    assert again.training.resumed_after == 2


@pytest.mark.parametrize("strategy", ["all", "partial", "scratch"])
def test_batches_too_small_for_batch_norm_are_refused_before_training(
    textures: Path, tmp_path: Path, strategy: str
) -> None:
    head = [nn.Flatten(), nn.Linear(512, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)]
    blocks = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4)]
    model = nn.Sequential(*blocks, *head).eval()
    options: dict[str, Any] = {"model": model, "preprocess": PREPROCESS, "size": 32, "hidden": None}
    options.update(strategy=strategy, freeze_upto="pool1" if strategy == "partial" else None)
    message = (
        r"^batch_size=1 cannot train BatchNorm1d in \d, which gets one value per channel of 1 "
        r"image of 32x32 pixels; use batch_size=2 or more$"
    )
    with pytest.raises(ArgumentError, match=message):
        tuned(textures, tmp_path / "run", batch_size=1, **options)
    assert not list((tmp_path / "run").iterdir())
    two = tuned(textures, tmp_path / "two", batch_size=2, **{**options, "epochs": 1})
    assert two.training is not None


def test_batches_of_one_train_what_has_many_values(textures: Path, tmp_path: Path) -> None:
    maps = seeded(SmallVGG, dtype=torch.float32, bn=True)
    options: dict[str, Any] = {"preprocess": PREPROCESS, "hidden": None, "epochs": 1}
    result = tuned(textures, tmp_path, model=maps, strategy="all", batch_size=1, **options)
    assert result.training is not None


def test_trying_batch_norm_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.BatchNorm1d(12)).eval()
    model[1].train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    check_batches(model, 9, 3, (2, 2), Settings(batch_size=4))
    wrong = [(9, Settings(batch_size=1)), (1, Settings()), (4, Settings(devices=4))]
    for count, settings in wrong:
        with pytest.raises(
            ArgumentError, match=r"cannot train BatchNorm1d in 3, which .* 1 image "
        ):
            check_batches(model, count, 3, (2, 2), settings)
    with pytest.raises(ArgumentError, match="2 images of 1x1 pixels; train at a larger size"):
        check_batches(nn.InstanceNorm2d(3), 9, 3, (1, 1), Settings())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == [False, False, True, False, False]
    assert torch.equal(torch.get_rng_state(), state)


def test_another_size_weights_and_optimiser(textures: Path, tmp_path: Path) -> None:
    result = tuned(
        textures,
        tmp_path,
        strategy="partial",
        size=(48, 40),
        hidden=(16,),
        class_weights="balanced",
        resize="centre-crop",
        optimizer="sgd",
        precision="bf16-mixed",
        augment=False,
        epochs=1,
    )
    assert result.net.input_size == (48, 40)
    assert result.size == (48, 40)
    assert [layer.name for layer in fcvgg.layer_names(result.model)][-3:] == [
        "relu6",
        "drop6",
        "fc7",
    ]


def test_head_that_is_kept_is_resampled_to_another_size(textures: Path, tmp_path: Path) -> None:
    result = tuned(textures, tmp_path, strategy="linear", size=40, hidden=None)
    assert result.net.input_size == (40, 40)
    assert torch.equal(result.model.classifier[3].weight, demo_model().classifier[3].weight)


class Ending(nn.Module):
    """SmallVGG and a function of its scores."""

    def __init__(self, function: Any):
        super().__init__()
        self.net = SmallVGG(classes=3)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.net(x))


@pytest.mark.parametrize(
    ("function", "strategy", "activation"),
    [
        (lambda x: x.log_softmax(1), "all", "log_probabilities"),
        (lambda x: x.softmax(1), "linear", "probabilities"),
    ],
)
def test_heads_of_probabilities(
    textures: Path, tmp_path: Path, function: Any, strategy: str, activation: str
) -> None:
    model = seeded(Ending, function, dtype=torch.float32)
    options: dict[str, Any] = {"model": model, "preprocess": PREPROCESS, "strategy": strategy}
    result = tuned(textures, tmp_path, hidden=None, epochs=1, **options)
    assert result.net.activation == activation
    with torch.no_grad():
        image = ImageRows(result.valid, PREPROCESS, SIZE)[0][0]
        given = result.model(image[None])[0]
    expected = given.exp() if activation == "log_probabilities" else given
    torch.testing.assert_close(torch.from_numpy(result.probabilities[0]), expected)


def test_heads_whose_classes_do_not_exclude_each_other(textures: Path, tmp_path: Path) -> None:
    model = seeded(Ending, torch.sigmoid, dtype=torch.float32)
    options: dict[str, Any] = {"model": model, "preprocess": PREPROCESS, "strategy": "linear"}
    with pytest.raises(ConversionError, match="the model ends in a sigmoid for each class, so"):
        tuned(textures, tmp_path, hidden=None, **options)


def test_a_global_pool_needs_a_size(textures: Path, tmp_path: Path) -> None:
    model = seeded(GlobalPooled, dtype=torch.float32)
    options: dict[str, Any] = {"model": model, "preprocess": PREPROCESS, "hidden": None}
    message = "the native size of GlobalPooled cannot be inferred; pass size=, the size to train at"
    with pytest.raises(InputSizeError, match=message):
        tuned(textures, tmp_path, **options)
    result = tuned(textures, tmp_path, size=32, epochs=1, **options)
    assert result.choice.strategy == "linear"
    assert "their similarity to the network's own images cannot be measured" in str(result)
    assert result.net.input_size == (32, 32)


def test_a_global_pool_keeps_its_head_at_another_size() -> None:
    model = seeded(GlobalPooled, dtype=torch.float32)
    source = Pretrained(model, "pooled", PREPROCESS, (224, 224))
    new = prepare_model(source, "linear", Recipe(size=48), 3, 0)
    assert new.fc.weight.shape == (3, 12)
    assert fcvgg.convert(new, input_size=48).output_size((48, 48)) == (1, 1)


class Described(nn.Module):
    """Scores by name, as research code returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.demo = demo_model()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.demo(x)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"strategy": "best"},
            ArgumentError,
            "strategy must be 'auto', 'linear', .*, got 'best'",
        ),
        ({"epoch": 3}, ArgumentError, "options must be some of strategy, .*, got epoch"),
        (
            {"class_weights": "rare"},
            ArgumentError,
            "class_weights must be None or 'balanced', got 'rare'",
        ),
        ({"resize": "no"}, ArgumentError, "resize must be 'resize' or 'center-crop', got 'no'"),
        (
            {"strategy": "all", "freeze_upto": "pool1"},
            ArgumentError,
            "freeze_upto must go with strategy='partial' or 'svm', got strategy='all'",
        ),
        (
            {"strategy": "linear", "hidden": (9,)},
            ArgumentError,
            r"hidden must be \(\) or None for strategy='linear', got \(9,\); use strategy=",
        ),
        (
            {"strategy": "partial", "freeze_upto": "pool9"},
            ArgumentError,
            "the model has no layer 'pool9'",
        ),
        (
            {"strategy": "partial", "freeze_upto": "fc6"},
            ArgumentError,
            "freeze_upto must leave a layer to train, got 'fc6', the last one",
        ),
        (
            {"strategy": "svm", "augment": True},
            ArgumentError,
            "augment must be False or None for the strategy svm",
        ),
        (
            {"size": 4, "strategy": "all"},
            ConversionError,
            r"size must be at least \(8, 8\), of which pool3 gives one position, got \(4, 4\)",
        ),
        ({"epochs": 0}, ArgumentError, "epochs must be an integer of at least 1, got 0"),
        ({"model": "vgg61"}, LoadError, "there is no model 'vgg61'"),
        (
            {"model": demo_model()},
            PreprocessError,
            "the preprocessing of DemoNet is unknown; pass",
        ),
        (
            {"model": Described(), "preprocess": "unit"},
            ArgumentError,
            "model must return one tensor of scores to be trained, got a dict from Described; wrap",
        ),
        (
            {"strategy": "all", "optimizer": "sgd", "lr": 1e12},
            TrainingError,
            "the loss is not finite at step . of epoch 1, with the learning rate 2.33e[+]10 to 9",
        ),
    ],
)
def test_what_cannot_be_done(
    textures: Path, tmp_path: Path, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        tuned(textures, tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("run/*"))


class Sized(nn.Module):
    """A network that takes one size, which its message does not name."""

    def __init__(self, size: int, pooled: bool):
        super().__init__()
        self.size = size
        self.net = GlobalPooled() if pooled else SmallVGG(classes=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2:] == (self.size, self.size)
        return self.net(x)


@pytest.mark.parametrize(("size", "pooled"), [(32, False), (40, True), (96, True)])
def test_a_model_that_asserts_its_size(
    textures: Path, tmp_path: Path, size: int, pooled: bool
) -> None:
    model = seeded(lambda: Sized(size, pooled), dtype=torch.float32)
    options = {"model": model, "preprocess": PREPROCESS, "hidden": None, "epochs": 1}
    result = tuned(
        textures, tmp_path, size=size, strategy="partial", freeze_upto="conv1_1", **options
    )
    assert result.net.input_size == (size, size)
    if size != 40:  # which is not among the usual ones that are tried
        assert "conv1_1" in fcvgg.layer_names(model).names


@pytest.mark.parametrize("part", ["model", "features"])
def test_a_checkpoint_without_its_classifier_gets_a_new_head(
    textures: Path, tmp_path: Path, part: str
) -> None:
    source = torchvision.models.vgg11()
    kept = source if part == "model" else source.features
    state = {k: v for k, v in kept.state_dict().items() if "classifier" not in k}
    torch.save(state, tmp_path / "no-top.pth")
    options: dict[str, Any] = {"weights": tmp_path / "no-top.pth", "size": 64, "epochs": 1}
    result = tuned(
        textures, tmp_path / "run", model="vgg11", strategy="linear", hidden=None, **options
    )
    assert torch.equal(result.model.features[0].weight, source.features[0].weight)
    assert [x.name for x in fcvgg.layer_names(result.model) if x.role == "fc"] == ["fc6"]
    assert result.net.input_size == (64, 64)
    with pytest.raises(LoadError, match=r"the last layer, got .*; fcvgg.finetune gives features"):
        fcvgg.load(tmp_path / "no-top.pth", arch="vgg11")
    del state[next(iter(state))]
    torch.save(state, tmp_path / "no-top.pth")
    with pytest.raises(LoadError, match=r"1 missing: features.0.weight"):
        tuned(textures, tmp_path / "broken", model="vgg11", **options)


def test_pooled_features_get_a_linear_head() -> None:
    pooled = torch.nn.Sequential(demo_model().features, torch.nn.AdaptiveAvgPool2d(1))
    for model in (pooled, torch.nn.Sequential(pooled, torch.nn.Flatten())):
        source = load_pretrained(model, None, PREPROCESS, 48)
        assert source.headless
        assert source.model.classifier[0].in_features == 64
        new = fcvgg.replace_head(source.model, 3, ())
        assert new(torch.rand(2, 3, 48, 48)).shape == (2, 3)


def test_a_resnet_without_its_last_layer_gets_one(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torchvision.models.resnet18(num_classes=1).state_dict()
    torch.save({k: v for k, v in state.items() if k[:3] != "fc."}, tmp_path / "no-top.pth")
    source = load_pretrained("resnet18", tmp_path / "no-top.pth", None, 32)
    assert source.headless
    new = fcvgg.replace_head(source.model, 3, ())
    assert torch.equal(new.conv1.weight, state["conv1.weight"])
    assert new.fc.weight.shape == (3, 512)


def test_features_alone_get_a_head_for_the_size(textures: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": demo_model().features, "preprocess": PREPROCESS}
    result = tuned(
        textures, tmp_path, size=48, hidden=(8,), strategy="partial", epochs=1, **options
    )
    assert result.net.input_size == (48, 48)
    assert result.model.classifier[0].weight.shape == (8, 64 * 6 * 6)


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "partial", "freeze_upto": "pool2", "hidden": (8,)},
        {"strategy": "all", "hidden": None},
        {"strategy": "partial", "size": 40, "hidden": None},
    ],
)
def test_a_bundle_trains_as_its_source_does(
    textures: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    net = fcvgg.convert(demo_model(), preprocess=PREPROCESS)
    net.save(tmp_path / "bundle")
    source = tuned(textures, tmp_path / "source", epochs=1, **options)
    for name, model in (("file", tmp_path / "bundle"), ("network", net)):
        result = tuned(textures, tmp_path / name, model=model, epochs=1, **options)
        found, expected = result.model.state_dict(), source.model.state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)
        np.testing.assert_allclose(result.probabilities, source.probabilities, atol=1e-5)


def test_resuming_another_run(linear: fcvgg.FineTuned, textures: Path) -> None:
    run = linear.folder
    with pytest.raises(TrainingError, match="already holds a run"):
        tuned(textures, run, **LINEAR)
    with pytest.raises(LoadError, match="its strategy is 'linear', not 'all'"):
        tuned(textures, run, strategy="all", resume=True)
    with pytest.raises(LoadError, match="its training images is 36, not 27"):
        tuned(textures / "train", run, resume=True, strategy="linear", valid_fraction=0.25)
    other = type("demo", (fcvgg.demo.DemoNet,), {})().eval()  # the same name, random weights
    with pytest.raises(LoadError, match=r"its pretrained weights is '\w+', not '\w+'; resume with"):
        tuned(textures, run, model=other, preprocess=PREPROCESS, resume=True, **LINEAR)
    other_input = {**LINEAR, "preprocess": fcvgg.Preprocess((0,) * 3, (1,) * 3)}
    with pytest.raises(
        LoadError, match=r'its preprocessing is "Preprocess\(mean=\(0.5, 0.5, 0.5\)'
    ):
        tuned(textures, run, resume=True, **other_input)
    with pytest.raises(LoadError, match="its strategy is 'linear', not 'svm'"):
        tuned(textures, run, strategy="svm", resume=True)
    again = tuned(textures, run, resume=True, **LINEAR)
    assert torch.equal(again.model.classifier[0].weight, linear.model.classifier[0].weight)


def test_a_folder_that_another_run_uses_is_refused(textures: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path.with_name(f".{tmp_path.name}.lock")):
        ran = run(textures, "--arch", "demo", "--strategy", "svm", "-o", tmp_path)
    said = f"{tmp_path} is in use by another run; wait for it to end, or choose another folder"
    assert (ran.exit_code, ran.stderr) == (2, f"fcvgg: error: {said}\n")


def test_a_machine_is_a_run_as_others_are(textures: Path, tmp_path: Path) -> None:
    first = tuned(textures, tmp_path, strategy="svm")
    assert first.training is None
    with pytest.raises(TrainingError, match=r"already holds a run \(last.ckpt\)"):
        tuned(textures, tmp_path, strategy="svm")
    with pytest.raises(LoadError, match="its strategy is 'svm', not 'linear'"):
        tuned(textures, tmp_path, resume=True, **LINEAR)
    again = tuned(textures, tmp_path, strategy="svm", resume=True)
    np.testing.assert_allclose(again.probabilities, first.probabilities, rtol=1e-5, atol=1e-6)


# -- the command ------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["finetune", *map(str, arguments)])


def test_help_tells_the_options() -> None:
    text = run("--help").stdout
    for option in ("--arch", "--weights", "--strategy", "--freeze-upto", "--size", "--resume"):
        assert option in text
    for panel in ("Images", "Training", "Examples"):
        assert panel in text


@pytest.mark.usefixtures("with_report")
def test_the_command_from_folder_to_heatmap(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_patches(tmp_path / "photos", 6, left=True, names=("brick", "grass"))
    (tmp_path / "photos" / "brick" / "99.jpg").write_text("no image")
    for i in range(2):
        (tmp_path / "photos" / "grass" / f"{i}.xyz").write_text("no image")
    options = ("--arch", "demo", "--head", "linear", "--epochs", 2, "-o", "made")
    ran = run("photos", *options)
    assert ran.exit_code == 0, ran.output
    assert "strategy linear: 5 training images per class are few (below 100)" in ran.stdout
    assert "held out: " in ran.stdout
    assert "wrote made/model\nwrote made/report/report.md\n" in ran.stdout
    assert ran.stdout.endswith("next: fcvgg heatmap photo.jpg --model made/model --scale 48\n")
    assert "fcvgg: skipped photos/brick/99.jpg is not an image" in ran.stderr
    counted = "3 of 15 files left out: 2 .xyz (not a readable image), 1 .jpg (could not be"
    assert f"fcvgg: {counted} read)\n" in ran.stderr
    assert "epoch 2/2  train acc " in ran.stderr
    report = (tmp_path / "made/report/report.md").read_text()
    assert f"\n## Files left out\n\n{counted} read).\n" in report
    assert "\n- photos/grass/1.xyz: not a readable image\n" in report
    assert "\n- photos/brick/99.jpg is not an image that Pillow can read" in report
    skimage = Image.fromarray(skimage_data.brick()[:100, :150])
    skimage.save("photo.jpg")
    shown = CliRunner().invoke(app, ["heatmap", "photo.jpg", "--model", "made/model"])
    assert shown.exit_code == 0, shown.output
    assert "photo.jpg: brick (0)" in shown.stdout or "photo.jpg: grass (1)" in shown.stdout


def test_an_own_network_of_one_channel(textures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "grey.onnx"
    example = torch.zeros(1, 1, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(SmallVGG(in_channels=1).eval(), (example,), source, dynamo=False)
    options = (textures, "--arch", source, "--epochs", 1, "-o", tmp_path / "run")
    ran = run(*options)
    assert ran.exit_code == 2
    told = " ".join(ran.stderr.split())
    assert "is unknown; pass --preprocess, or --mean and --std, the one it was trained" in told
    ran = run(*options, "--mean", "0.4", "--std", "0.2")
    assert ran.exit_code == 0, ran.output
    net = fcvgg.load(tmp_path / "run" / "model")
    assert net.in_channels == 1
    assert net.preprocess == fcvgg.Preprocess((0.4,), (0.2,))
    ran = run(*options, "--mean", "0.4", "--resume")
    assert ran.stderr == "fcvgg: error: --mean and --std go together; give both\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--head", "wide"],
            "'wide' is not a head; expected last, linear or widths such as 512,256",
        ),
        (["--strategy", "partial", "--freeze-upto", "pool7"], "the model has no layer 'pool7'"),
        (
            ["--strategy", "all", "--freeze-upto", "pool1"],
            "--freeze-upto must go with --strategy 'partial' or 'svm'",
        ),
        (["--valid-fraction", "2"], "--valid-fraction must be between 0 and 1, got 2.0"),
        (["--devices", "none"], "devices must be 'auto' or an integer of at least 1, got 'none'"),
        (["--lr", "1e12", "--optimizer", "sgd", "--strategy", "all"], "choose a smaller --lr"),
    ],
)
def test_bad_options_are_one_line(
    textures: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    data = textures / "train"
    ran = run(data, "--arch", "demo", *options, "--epochs", 1, "-o", tmp_path / "run")
    assert ran.exit_code == 2
    assert message in " ".join(ran.stderr.replace("│", " ").split())
    assert ran.stdout == ""


def test_interrupted_the_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fcvgg.finetuning.finetuning.finetune", interrupted)
    ran = run(tmp_path, "-o", tmp_path)
    assert (ran.exit_code, ran.stderr) == (130, "fcvgg: error: interrupted\n")
    (tmp_path / "last.ckpt").touch()
    ran = run(tmp_path, "-o", tmp_path)
    assert ran.exit_code == 130
    assert ran.stderr.endswith(f"finished epochs are kept in {tmp_path}, and --resume continues\n")


def test_without_lightning_the_error_names_the_extra(
    textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    for name in ("training.loop", "finetuning.job", "finetuning.classification"):
        monkeypatch.delitem(sys.modules, f"fcvgg.{name}", raising=False)
    message = (
        r"^training needs PyTorch Lightning, which cannot be imported \(.*\); install it with: "
        r"pip install 'fcvgg\[train\]'$"
    )
    with pytest.raises(fcvgg.MissingExtraError, match=message):
        fcvgg.finetune(textures, "demo", tmp_path / "run")
    assert not (tmp_path / "run").exists()


COMMAND = ("--arch", "demo", "--strategy", "all", "--epochs", 3, "--batch-size", 12)
"""Six checkpoints if every epoch is the best, which small rates make it."""


@pytest.fixture(scope="module")
def whole(textures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    ran = run(textures, *COMMAND, "-o", folder)
    assert ran.exit_code == 0, ran.stderr
    return folder


TEARING = """
import io, os, signal, sys
import torch
from fcvgg.cli import main

save, torch_save = int(sys.argv.pop(1)), torch.save
saves = iter(range(1, save + 1))

def torn(content, file):
    whole = io.BytesIO()
    torch_save(content, whole)
    if next(saves) == save:
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    file.write(whole.getvalue())

torch.save = torn
torch.set_num_threads(1)  # as in tests
main()
"""
"""The command line, killed in the midst of its checkpoint of the number that comes first."""


@pytest.mark.parametrize("save", [4, 5])
def test_killed_and_resumed_ends_with_the_same_weights(
    textures: Path, tmp_path: Path, whole: Path, save: int
) -> None:
    """Without warning, half a checkpoint on the disk, in the midst of training all layers."""
    killed = tmp_path / "killed"
    options = [textures, *COMMAND, "-o", killed]
    command = [sys.executable, "-c", TEARING, str(save), "finetune", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(killed.glob(".*.ckpt"))) == 1  # what was torn, beside what is whole
    ran = run(*options, "--resume")
    assert ran.exit_code == 0, ran.stderr
    assert f"resumed after epoch {(save - 1) // 2}\n" in ran.stdout
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (torch.load(f / name, weights_only=True)["state_dict"] for f in (whole, killed))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    nets = [fcvgg.load(folder / "model").state_dict() for folder in (whole, killed)]
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
