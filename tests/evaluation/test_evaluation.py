"""The paper's evaluation protocols against plain loops over the FC model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from nets import GlobalPooled, Headed, SmallVGG, images, seeded
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

import fcvgg
from fcvgg.evaluation.cropping import GRID, centre_crop, grid_crops, ten_crops
from fcvgg.images.batching import run_in_batches

CLASSES = ("apple", "pear", "plum", "sloe", "fig", "date", "lime")
PREPROCESS = fcvgg.Preprocess((0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
CLOSE = 1e-6
"""Probabilities are float32."""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = seeded(SmallVGG, classes=len(CLASSES))
    last = model.classifier[-1]
    with torch.no_grad():  # scores that differ between images more than between classes
        last.bias.sub_(
            torch.cat([model(PREPROCESS(picture(i, 32, 32)).double()) for i in range(9)]).mean(0)
        )
        for parameter in (last.weight, last.bias):
            parameter.mul_(40)
    return model


@pytest.fixture(scope="module")
def net(model: nn.Module) -> fcvgg.FullyConvolutional:
    return fcvgg.convert(model, preprocess=PREPROCESS, categories=CLASSES)


def picture(seed: int, height: int = 48, width: int = 61) -> Image.Image:
    rng = np.random.default_rng(seed)
    colour, spread = rng.uniform(0, 255, 3), rng.uniform(5, 90)
    blocks = rng.normal(colour, spread, (6, 7, 3)).clip(0, 255)
    return Image.fromarray(blocks.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Image.Image, int]]:
    sizes = [(48, 61), (40, 40), (64, 45), (48, 61), (33, 90)]
    return [(picture(i, *sizes[i % 5]), (i * 3) % len(CLASSES)) for i in range(12)]


# -- net.classify ---------------------------------------------------------------------------------


def dense_probabilities(
    net: fcvgg.FullyConvolutional, image: Image.Image, scales, flip: bool, average: str
) -> Tensor:
    """One image, one scale, one orientation at a time."""
    rows = []
    for scale in scales or [min(image.size)]:
        factor = scale / min(image.size)
        size = [round(n * factor) for n in image.size]
        for mirror in (False, True) if flip else (False,):
            shown = image.resize(size, Image.Resampling.BILINEAR)
            if mirror:
                shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            scores = net(PREPROCESS(shown).double())[0]
            if average == "scores":
                rows.append(scores.mean((1, 2)).softmax(0))
            else:
                rows.append(scores.softmax(0).mean((1, 2)))
    return torch.stack(rows).mean(0)


@pytest.mark.parametrize("average", ["scores", "probabilities"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [None, (40,), (32, 44, 57)])
@torch.no_grad()
def test_classify_groups_by_size_and_changes_nothing(net, pairs, scales, flip, average) -> None:
    pictures = [image for image, _ in pairs]
    got = net.classify(pictures, scales=scales, flip=flip, average=average)
    expected = [dense_probabilities(net, p, scales, flip, average) for p in pictures]
    torch.testing.assert_close(got, torch.stack(expected).float(), rtol=0, atol=CLOSE)
    assert got.dtype == torch.float32


def test_a_scale_below_the_window_pads(net) -> None:
    image = images(3, 20, 26)
    padded = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    padded[:, :, 6:26, 3:29] = image
    expected = net(padded)[0, :, 0, 0].softmax(0).float()
    torch.testing.assert_close(net.classify(image, scales=[20])[0], expected, rtol=0, atol=CLOSE)


def test_equal_sizes_run_together_and_memory_stays_bounded(monkeypatch) -> None:
    monkeypatch.setattr("fcvgg.images.batching.BATCH_PIXELS", 40)
    monkeypatch.setattr("fcvgg.images.batching._HELD_BATCHES", 2)
    sizes = [(4, 4), (4, 5), (4, 4), (4, 5), (9, 9), (4, 4), (2, 3), (4, 4), (1, 1)]
    inputs = [(i, i == 6, torch.full((1, 1, *s), float(i))) for i, s in enumerate(sizes)]
    taken: list[int] = []
    run: list[int] = []
    batches = []

    def source() -> Iterator:
        for key, group, image in inputs:
            taken.append(key)
            held = [i for i in taken if i not in run]
            assert sum(sizes[i][0] * sizes[i][1] for i in held) <= 2 * 40 + 81
            yield key, group, image

    def mean(group: bool, batch: Tensor) -> Tensor:
        batches.append((group, tuple(batch.shape)))
        run.extend(int(image.flatten()[0]) for image in batch)
        return batch.mean((1, 2, 3))

    results = dict(run_in_batches(source(), mean))
    assert {key: value.item() for key, value in results.items()} == {i: float(i) for i in range(9)}
    assert (False, (2, 1, 4, 4)) in batches
    assert (False, (2, 1, 4, 5)) in batches
    assert all(n == 1 or n * h * w <= 40 for _, (n, _, h, w) in batches)


# -- crops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (47, 61), (60, 33), (32, 50), (20, 40), (9, 7)])
def test_crops_are_placed_as_torchvision_places_them(size: tuple[int, int]) -> None:
    image = images(1, 3, *size)
    whole = image
    if min(size) < 32:  # torchvision pads the centre crop alone
        missing = [max(32 - n, 0) for n in size]
        top, left = (n // 2 for n in missing)
        whole = TF.pad(image, [left, top, missing[1] - left, missing[0] - top])
    assert torch.equal(centre_crop(image, (32, 32)), TF.center_crop(whole, [32, 32]))
    expected = TF.ten_crop(whole, [32, 32])  # the mirror images come last
    got = list(ten_crops(image, (32, 32)))
    # torchvision mirrors the image, not the crop, which moves the corners and the centre's rounding
    expected = [e for i in range(5) for e in (expected[i], expected[i].flip(-1))]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_grid_covers_the_image_from_corner_to_corner() -> None:
    image = torch.arange(50 * 70.0).reshape(1, 1, 50, 70)
    crops = list(grid_crops(image, (32, 24)))
    assert len(crops) == 2 * GRID**2 == 50
    corners = [int(crop[0, 0, 0, 0]) for crop in crops[::2]]
    tops, lefts = [0, 4, 9, 14, 18], [0, 12, 23, 34, 46]  # linspace over 18 and 46, rounded
    assert corners == [70 * top + left for top in tops for left in lefts]
    assert all(torch.equal(a.flip(-1), b) for a, b in zip(crops[::2], crops[1::2]))
    seen = torch.cat([crop.flatten() for crop in crops]).unique()
    assert len(seen) == 50 * 70


# -- evaluate -------------------------------------------------------------------------------------


def crop_probabilities(
    model: nn.Module, image: Image.Image, scale: int, crops: Callable
) -> list[Tensor]:
    """The FC model on every crop, one by one."""
    factor = scale / min(image.size)
    size = [round(n * factor) for n in image.size]
    pixels = PREPROCESS(image.resize(size, Image.Resampling.BILINEAR)).double()
    return [model(crop)[0].softmax(0) for crop in crops(pixels, (32, 32))]


def oracle(model, net, image, protocol: str, scales, flip: bool, average: str) -> Tensor:
    if protocol == "dense":
        return dense_probabilities(net, image, scales, flip, average)
    if protocol == "dense+multi-crop":
        both = [oracle(model, net, image, p, scales, flip, average) for p in protocol.split("+")]
        return (both[0] + both[1]) / 2
    if protocol == "resize":
        pixels = PREPROCESS(image.resize((32, 32), Image.Resampling.BILINEAR)).double()
        rows = [model(x)[0].softmax(0) for x in ((pixels, pixels.flip(-1)) if flip else (pixels,))]
        return torch.stack(rows).mean(0)
    crops = {
        "ten-crop": ten_crops,
        "multi-crop": grid_crops,
        "center-crop": lambda x, s: (
            (centre_crop(x, s), centre_crop(x, s).flip(-1)) if flip else (centre_crop(x, s),)
        ),
    }[protocol]
    rows = [row for scale in scales for row in crop_probabilities(model, image, scale, crops)]
    return torch.stack(rows).mean(0)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(40,), (32, 50)])
@torch.no_grad()
def test_every_protocol_equals_a_loop_over_the_fc_model(model, net, pairs, scales, flip) -> None:
    result = fcvgg.evaluate(net, pairs, protocols="all", scales=scales, flip=flip)
    labels = torch.tensor([label for _, label in pairs])
    for row in result:
        expected = torch.stack(
            [oracle(model, net, image, row.protocol, scales, flip, "scores") for image, _ in pairs]
        )
        first = expected.argmax(1)
        confusion = torch.zeros(7, 7, dtype=torch.int64)
        for label, predicted in zip(labels.tolist(), first.tolist()):
            confusion[label, predicted] += 1
        assert torch.equal(row.confusion, confusion), row.protocol
        assert row.top1 == pytest.approx((first == labels).float().mean().item(), abs=1e-6)
        among = (expected.topk(5).indices == labels[:, None]).any(1)
        assert row.top5 == pytest.approx(among.float().mean().item(), abs=1e-6)
    counts = {r.protocol: r.views for r in result}
    n, f = len(scales), 1 + flip
    assert counts == {
        "center-crop": n * f,
        "resize": f,
        "ten-crop": 10 * n,
        "dense": n * f,
        "multi-crop": 50 * n,
        "dense+multi-crop": 50 * n + n * f,
    }


def test_predictions_spread_over_classes(net, pairs) -> None:
    """Or the tests above could not tell protocols apart."""
    result = fcvgg.evaluate(net, pairs, scales=(40,), protocols=("dense", "multi-crop"))
    assert all((r.confusion.sum(0) > 0).sum() >= 3 for r in result)


def test_per_class_figures_follow_from_the_confusion_matrix(net, pairs) -> None:
    result = fcvgg.evaluate(net, pairs, protocols="dense", average="probabilities")
    row = result["dense"]
    matrix = row.confusion.double()
    assert sum(c.images for c in row.classes) == len(pairs) == result.images
    for c in row.classes:
        hit = matrix[c.index, c.index].item()
        recall = hit / matrix[c.index].sum().item()
        named = matrix[:, c.index].sum().item()
        precision = hit / named if named else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
        assert (c.precision, c.recall, c.f1) == pytest.approx((precision, recall, f1), abs=1e-6)
        assert c.name == CLASSES[c.index]
        assert c.images == matrix[c.index].sum()


def test_crops_through_the_fc_model_give_the_same(model, net, pairs) -> None:
    names = ("center-crop", "resize", "ten-crop")
    ours = fcvgg.evaluate(net, pairs, protocols=names)
    theirs = fcvgg.evaluate(net, pairs, protocols=names, model=model)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.confusion, b.confusion)
        assert (a.top1, a.top5) == (b.top1, b.top5)


def test_the_usual_scale_is_eight_sevenths_of_the_native_size(net, pairs) -> None:
    assert fcvgg.evaluate(net, pairs[:2])["dense"].scales == (37,)  # 32 * 256 / 224 = 36.6


def test_the_spelling_of_earlier_versions_is_taken(net, pairs) -> None:
    result = fcvgg.evaluate(net, pairs[:2], protocols=("centre-crop", "center-crop"), scales=[40])
    assert [r.protocol for r in result] == ["center-crop"]
    assert result["centre-crop"] is result["center-crop"]


def test_same_padding_and_finer_strides_crop_at_the_proved_cell(model, pairs) -> None:
    expected = fcvgg.evaluate(
        fcvgg.convert(model, preprocess=PREPROCESS), pairs, protocols="center-crop", scales=[40]
    )
    for options in ({"padding": "same"}, {"output_stride": 2, "padding": "same"}):
        other = fcvgg.convert(model, preprocess=PREPROCESS, **options)
        got = fcvgg.evaluate(other, pairs, protocols="center-crop", scales=[40])
        assert torch.equal(got["center-crop"].confusion, expected["center-crop"].confusion)


def test_a_global_pooled_net_at_a_native_size_beyond_its_window(pairs) -> None:
    model = seeded(GlobalPooled, classes=7)
    net = fcvgg.convert(model, input_size=37, preprocess=PREPROCESS)
    ours = fcvgg.evaluate(net, pairs, protocols="center-crop", scales=[41])
    theirs = fcvgg.evaluate(net, pairs, protocols="center-crop", scales=[41], model=model)
    assert torch.equal(ours["center-crop"].confusion, theirs["center-crop"].confusion)


def test_a_network_of_one_class_is_judged_as_absent_and_present(pairs) -> None:
    net = fcvgg.convert(
        seeded(Headed, nn.Sequential(nn.Flatten(), nn.Linear(288, 1))),
        preprocess=PREPROCESS,
        categories=["fruit"],
    )
    labelled = [(image, 0) for image, _ in pairs]
    row = fcvgg.evaluate(net, labelled, protocols="dense", scales=[30])["dense"]
    present = sum(float(net.classify(image, scales=[30])[0, 0]) > 0.5 for image, _ in pairs)
    assert row.confusion.shape == (2, 2)
    assert row.confusion.sum() == len(pairs)
    assert row.confusion[:, 1].sum() == present
    assert row.top5 is None


# -- datasets -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three of the seven categories, named in other ways, and files that are no images."""
    data = tmp_path / "data"
    for i, name in enumerate(("Plum", "apple", "fig")):
        (data / name / "more").mkdir(parents=True)
        for j in range(3):
            picture(10 * i + j).save(data / name / f"{j}.png")
        picture(10 * i + 7).save(data / name / "more" / "deep.JPG")
        (data / name / "notes.txt").write_text("no image")
    (data / ".cache").mkdir()
    return data


def labels_of(evaluation: fcvgg.Evaluation) -> dict[str, int]:
    return {c.name: c.images for c in evaluation.results[0].classes}


def test_folders_are_matched_to_categories_by_name(net, folder) -> None:
    result = fcvgg.evaluate(net, folder, protocols="dense")
    assert labels_of(result) == {"apple": 4, "plum": 4, "fig": 4}
    assert result.by_order == ()
    by_path = fcvgg.evaluate(net, str(folder), protocols="dense")
    assert torch.equal(by_path["dense"].confusion, result["dense"].confusion)


def test_an_image_folder_gives_what_its_path_gives(net, folder) -> None:
    (folder / ".cache" / "x").mkdir()
    expected = fcvgg.evaluate(net, folder)
    picture(1).save(folder / ".cache" / "hidden.png")  # torchvision takes it for a class
    for part in folder.glob(".cache/*"):
        part.rmdir() if part.is_dir() else part.unlink()
    (folder / ".cache").rmdir()
    for transform in (None, lambda image: image):
        got = fcvgg.evaluate(net, ImageFolder(str(folder), transform=transform))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.confusion, b.confusion)


def test_folders_of_other_names_are_taken_in_order_and_it_says_so(net, folder, tmp_path) -> None:
    other = tmp_path / "wnids"
    for i in range(7):
        (other / f"n0{i}").mkdir(parents=True)
        picture(i).save(other / f"n0{i}" / "a.png")
    result = fcvgg.evaluate(net, other, protocols="dense")
    assert labels_of(result) == dict.fromkeys(CLASSES, 1)
    assert "classes matched by their order: n00 = apple, n01 = pear" in str(result)
    nameless = fcvgg.convert(seeded(SmallVGG, classes=7), preprocess=PREPROCESS)
    assert labels_of(fcvgg.evaluate(nameless, other)) == {f"class {i}": 1 for i in range(7)}


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2), torch.tensor([2]), "plum"])
def test_kinds_of_labels(net, label) -> None:
    result = fcvgg.evaluate(net, [(picture(0), label)], protocols="dense")
    assert labels_of(result) == {"plum": 1}


def test_kinds_of_images_and_of_datasets(net, folder) -> None:
    path = folder / "fig" / "0.png"
    upright = Image.open(path).convert("RGB")
    tensor = PREPROCESS(upright)[0]
    kinds = [path, str(path), upright, np.asarray(upright), tensor]

    class Plain:
        def __getitem__(self, i: int):
            return kinds[i], 4

        def __len__(self) -> int:
            return len(kinds)

    for dataset in (Plain(), ((kind, 4) for kind in kinds), [[kind, 4] for kind in kinds]):
        result = fcvgg.evaluate(net, dataset, protocols="center-crop", scales=[48])
        assert labels_of(result) == {"fig": 5}
        assert (result["center-crop"].confusion.sum(0) > 0).sum() == 1


def test_unreadable_images_are_counted_listed_and_not_fatal(net, folder) -> None:
    expected = fcvgg.evaluate(net, folder)
    (folder / "fig" / "broken.png").write_bytes((folder / "fig" / "0.png").read_bytes()[:60])
    (folder / "Plum" / "text.jpg").write_text("no image")
    result = fcvgg.evaluate(net, folder)
    assert result.images == expected.images == 12
    assert [Path(u.name).name for u in result.unreadable] == ["text.jpg", "broken.png"]
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a.confusion, b.confusion)
    lines = str(result).splitlines()
    assert lines[-3] == "of these, 2 images could not be read:"
    assert "text.jpg is not an image that Pillow can read" in lines[-2]
    assert "broken.png" in lines[-1]
    written = json.loads(result.to_json())
    assert [u["name"] for u in written["unreadable"]] == [
        str(folder / "Plum" / "text.jpg"),
        str(folder / "fig" / "broken.png"),
    ]
    assert lines[-4] == (
        "6 of 18 files left out: 3 .txt (not a readable image), 1 without an ending (a hidden "
        "folder), 1 .jpg (could not be read), 1 .png (could not be read)"
    )
    assert len(result.skipped) == len(written["skipped"]) == 6
    assert set(result.unreadable) < set(result.skipped)
    one = replace(result, images=1, unreadable=result.unreadable[:1], skipped=result.unreadable[:1])
    assert one.remarks()[0] == "1 image"
    assert one.remarks()[-2] == "1 image could not be read and was left out:"


def test_every_kind_of_image_of_a_folder_is_evaluated(net, tmp_path) -> None:
    kinds = {"jfif": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "TIF": "TIFF", "ppm": "PPM"}
    (tmp_path / "apple").mkdir()
    for ending, kind in kinds.items():
        picture(1).save(tmp_path / "apple" / f"x.{ending}", kind)
    picture(1).save(tmp_path / "apple" / "no-ending", "PNG")
    (tmp_path / "__MACOSX" / "apple").mkdir(parents=True)
    (tmp_path / "apple" / "._x.jpg").write_text("left by the system")
    result = fcvgg.evaluate(net, tmp_path, protocols="dense")
    assert labels_of(result) == {"apple": 6}
    assert result.skipped == ()


@pytest.mark.parametrize(
    ("parts", "used"),
    [
        (("Train", "Valid", "Testing"), "Testing"),
        (("train", "val"), "val"),
        (("training", "dev"), "dev"),
    ],
)
def test_of_a_dataset_in_parts_the_one_to_test_on_is_used(net, folder, parts, used) -> None:
    data = folder.parent / "parts"
    for part in parts:
        shutil.copytree(folder, data / part)
    (data / "readme.txt").write_text("about")
    result = fcvgg.evaluate(net, data, protocols="dense")
    expected = fcvgg.evaluate(net, folder, protocols="dense")
    assert torch.equal(result["dense"].confusion, expected["dense"].confusion)
    assert result.part == data / used
    assert str(result.skipped[0]) == f"{data}/readme.txt: not a readable image"
    assert f"those of the part {data / used}" in str(result).splitlines()
    assert json.loads(result.to_json())["part"] == str(data / used)
    for part in parts[1:]:
        shutil.rmtree(data / part)
    message = f"must have a part test or valid with class folders, got {parts[0]}; pass .* to eval"
    with pytest.raises(fcvgg.DatasetError, match=message):
        fcvgg.evaluate(net, data)


def test_parts_are_not_taken_for_classes_of_a_torchvision_folder(folder) -> None:
    data = folder.parent / "parts"
    for part in ("train", "test"):
        shutil.copytree(folder, data / part)
    two = fcvgg.convert(seeded(SmallVGG, classes=2), preprocess=PREPROCESS)
    message = "the folders of the dataset must be classes, got the parts 'test', 'train'; pass one"
    with pytest.raises(fcvgg.DatasetError, match=message):
        fcvgg.evaluate(two, ImageFolder(str(data)))


def test_names_of_any_bytes_are_matched_listed_and_written(net, folder, tmp_path) -> None:
    odd = os.fsencode(folder / "fig") + b"/h\xe4user\n.png"
    os.rename(folder / "fig" / "0.png", odd)
    (folder / "fig" / os.fsdecode(b"kl\xe4r.png")).write_text("no image")
    result = fcvgg.evaluate(net, folder, protocols="dense")
    assert labels_of(result) == {"apple": 4, "plum": 4, "fig": 4}
    assert str(result).encode("utf-8").endswith(b"Pillow can read; convert it to PNG or JPEG")
    assert "/fig/kl\\xe4r.png is not an image" in str(result)
    result.to_json(tmp_path / "evaluation.json")
    written = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    (unreadable,) = written["unreadable"]
    assert os.fsencode(unreadable["name"]).endswith(b"/fig/kl\xe4r.png")
    os.rename(folder / "fig", os.fsencode(folder) + b"/f\xefg")
    categories = [r"f\xefg" if name == "fig" else name for name in CLASSES]
    odd_net = fcvgg.convert(
        seeded(SmallVGG, classes=7), preprocess=PREPROCESS, categories=categories
    )
    assert labels_of(fcvgg.evaluate(odd_net, folder, protocols="dense"))[r"f\xefg"] == 4


def test_accents_written_apart_name_the_same_class(net, tmp_path) -> None:
    categories = ["caf\u00e9", *CLASSES[1:]]
    net = fcvgg.convert(seeded(SmallVGG, classes=7), preprocess=PREPROCESS, categories=categories)
    (tmp_path / "cafe\u0301").mkdir()
    picture(0).save(tmp_path / "cafe\u0301" / "0.png")
    assert labels_of(fcvgg.evaluate(net, tmp_path, protocols="dense")) == {"caf\u00e9": 1}


def test_a_dataset_whose_items_fail_to_read(net) -> None:
    class Failing:
        def __getitem__(self, i: int):
            if i == 1:
                raise OSError("truncated file")
            return picture(i), i

        def __len__(self) -> int:
            return 3

    result = fcvgg.evaluate(net, Failing(), protocols="dense")
    assert result.images == 2
    assert [str(u) for u in result.unreadable] == ["item 1: truncated file"]


def test_errors_of_folders(net, tmp_path) -> None:
    def refused(error: type[Exception], match: str, path: Path) -> None:
        with pytest.raises(error, match=match) as caught:
            fcvgg.evaluate(net, path)
        assert "\n" not in str(caught.value)

    refused(
        fcvgg.DatasetError,
        "absent must be a folder with one folder per class, got nothing",
        tmp_path / "absent",
    )
    (tmp_path / "file").write_text("")
    refused(
        fcvgg.DatasetError,
        "file must be a folder with one folder per class, got a file",
        tmp_path / "file",
    )
    refused(fcvgg.DatasetError, "must hold images in .*/CLASS/, got no folders", tmp_path)
    (tmp_path / "apple").mkdir()
    refused(fcvgg.DatasetError, "must hold images such as .*apple/photo.jpg, got none", tmp_path)
    (tmp_path / "apple" / "a.png").write_text("nothing")
    refused(fcvgg.DatasetError, "none of the dataset's 1 images can be used: .*a.png", tmp_path)
    (tmp_path / "apple" / "b.xyz").write_text("nothing")
    refused(fcvgg.DatasetError, r"a.png is not .*; 3 of 3 files left out: 1 .*1 \.xyz", tmp_path)
    (tmp_path / "apple" / "b.xyz").unlink()
    (tmp_path / "cherry").mkdir()
    refused(fcvgg.CategoryError, "the class 'cherry' must match one category .* got none", tmp_path)
    (tmp_path / "apple").rename(tmp_path / "rowan")
    refused(
        fcvgg.CategoryError,
        r"must have the network's 7 classes, 'apple', .*, got 2 \('cherry', 'rowan'\); name the",
        tmp_path,
    )


@pytest.mark.parametrize(
    ("dataset", "error", "match"),
    [
        ([], fcvgg.DatasetError, r"dataset must hold at least one \(image, label\), got none"),
        (iter([]), fcvgg.DatasetError, "none of the dataset's 0 images can be used"),
        (7, fcvgg.DatasetError, "dataset must be a folder, an ImageFolder or .*, got int"),
        (images(2, 3, 32, 32), fcvgg.DatasetError, "dataset must be .*, got Tensor"),
        ([picture(0)], fcvgg.DatasetError, r"item 0 of the dataset must be a pair .*, got Image"),
        ([(picture(0), 7)], fcvgg.CategoryError, "label of item 0 must be from 0 to 6, got 7"),
        ([(picture(0), -1)], fcvgg.CategoryError, "label of item 0 must be .*, got -1"),
        (
            [(picture(0), 1.5)],
            fcvgg.DatasetError,
            "label of item 0 must be a class index .*, got 1.5",
        ),
        ([(picture(0), "cherry")], fcvgg.CategoryError, "there is no category 'cherry'"),
        (
            [(images(4, 3, 32, 32), torch.arange(4))],
            fcvgg.DatasetError,
            "item 0 must have one label, got 4; pass the dataset itself, not a DataLoader",
        ),
    ],
)
def test_errors_of_datasets(net, dataset, error, match) -> None:
    with pytest.raises(error, match=match):
        fcvgg.evaluate(net, dataset)


def test_errors_of_options(net, pairs, monkeypatch) -> None:
    with pytest.raises(
        fcvgg.ArgumentError, match=r"protocols must be all, or some of center.*, got tencrop"
    ):
        fcvgg.evaluate(net, pairs, protocols=["dense", "tencrop"])
    with pytest.raises(fcvgg.ArgumentError, match=r"protocols must be all, .* got none"):
        fcvgg.evaluate(net, pairs, protocols=[])
    with pytest.raises(fcvgg.ArgumentError, match=r"scales must be smaller sides .*, got \[\]"):
        fcvgg.evaluate(net, pairs, scales=[])
    with pytest.raises(fcvgg.ArgumentError, match=r"flip must be True or False, got \[\]"):
        fcvgg.evaluate(net, pairs, flip=[])
    with pytest.raises(
        fcvgg.ArgumentError, match="average must be 'scores' or 'probabilities', got 'mean'"
    ):
        fcvgg.evaluate(net, pairs, average="mean")
    with pytest.raises(fcvgg.ImageError, match=r"scales must be positive .*, got 0"):
        fcvgg.evaluate(net, pairs, scales=[0])
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics", None)
    with pytest.raises(fcvgg.MissingExtraError, match=r"pip install 'fcvgg\[eval\]'"):
        fcvgg.evaluate(net, pairs)


# -- what is shown --------------------------------------------------------------------------------


def test_the_table_and_the_json(net, pairs, tmp_path) -> None:
    result = fcvgg.evaluate(net, pairs, protocols="all", scales=(32, 40))
    lines = str(result).splitlines()
    assert lines[0].split() == ["protocol", "input", "scales", "flip", "views", "top-1", "top-5"]
    assert lines[1].startswith("center-crop       center crop  32, 40  no ")
    assert lines[2].startswith("resize            resize       32x32   no ")
    assert lines[-1] == "12 images"
    assert len(lines) == 1 + 6 + 1
    path = tmp_path / "evaluation.json"
    text = result.to_json(path)
    assert json.loads(path.read_text()) == json.loads(text)
    data = json.loads(text)
    assert [p["protocol"] for p in data["protocols"]] == [r.protocol for r in result]
    dense = next(p for p in data["protocols"] if p["protocol"] == "dense")
    assert dense["top1"] == result["dense"].top1
    assert sum(count for _, _, count in dense["confusion"]) == 12
    assert all(result["dense"].confusion[i, j] == n for i, j, n in dense["confusion"])
    assert data["categories"] == list(CLASSES)
    table = result.class_table("dense").splitlines()
    assert table[0].split() == ["class", "images", "precision", "recall", "F1"]
    assert len(table) == 1 + len(result["dense"].classes)
    with pytest.raises(KeyError, match=r"protocol must be one of .*, got 'sliding'"):
        result["sliding"]


def test_progress_is_shown_on_stderr(net, pairs, capsys) -> None:
    fcvgg.evaluate(net, pairs[:2], protocols="resize", progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""


def test_the_networks_state_is_kept(model, pairs) -> None:
    net = fcvgg.convert(model, preprocess=PREPROCESS).train()
    fcvgg.evaluate(net, pairs[:2], protocols="all", model=model)
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert not model.training
