"""The one lister: every file of a folder is found or listed, and parts are never classes."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fcvgg.errors import DatasetError
from fcvgg.images.datasets import class_files, class_folders, parts_of
from fcvgg.images.files import NO_IMAGE, Unreadable, image_endings, image_files, left_out
from fcvgg.names import readable

KINDS = {
    **{"jpg": "JPEG", "JPG": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "jpe": "JPEG"},
    **{"png": "PNG", "bmp": "BMP", "gif": "GIF", "ppm": "PPM", "tif": "TIFF", "TIFF": "TIFF"},
    **{"webp": "WEBP", "jp2": "JPEG2000", "avif": "AVIF", "tga": "TGA", "ico": "ICO"},
}


def picture(path: Path, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (9, 99, 200)).save(path, kind)
    return path


def text(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("P1 is a name, and no image")
    return path


def names(paths: object, folder: Path) -> list[str]:
    return [
        os.path.relpath(getattr(p, "name", p) if isinstance(p, Unreadable) else p, folder)
        for p in paths
    ]  # type: ignore[attr-defined]


# -- names ------------------------------------------------------------------------------------


@given(st.text(st.characters(codec=None)))
def test_readable_names_are_one_line_of_utf_8(name: str) -> None:
    shown = readable(name)
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    assert readable(shown) == shown


def test_bytes_controls_and_directions_are_escaped_and_letters_stay() -> None:
    assert readable(os.fsdecode(b"h\xe4user.png")) == "h\\xe4user.png"
    assert readable("a\tb\nc\x1b[31m\u202egnp") == "a\\tb\\nc\\x1b[31m\\u202egnp"
    for plain in ("häuser.png", "a b|c*d", "日本", "👩‍🔬.jpg", "nb\u00a0sp"):
        assert readable(plain) == plain
    assert readable(Path("a/b")) == "a/b"


# -- files ------------------------------------------------------------------------------------


def test_whatever_pillow_decodes_is_an_image(tmp_path: Path) -> None:
    for ending, kind in KINDS.items():
        picture(tmp_path / f"x.{ending}", kind)
    listed = image_files(tmp_path)
    assert sorted(p.suffix[1:] for p in listed.images) == sorted(KINDS)
    assert listed.skipped == ()
    assert {".tif", ".tiff", ".jfif", ".avif", ".jp2"} <= image_endings()
    assert not {".pdf", ".eps", ".h5", ".xml", ""} & image_endings()


def test_other_endings_are_decided_by_content(tmp_path: Path) -> None:
    for name in ("photo", "photo.jpg_large", "scan.jpg?size=2", "photo.JPG~"):
        picture(tmp_path / name, "JPEG")
    for name in ("README", "notes.txt", "labels.xml", "model.h5", "empty"):
        text(tmp_path / name)
    (tmp_path / "empty").write_bytes(b"")
    listed = image_files(tmp_path)
    assert names(listed.images, tmp_path) == [
        "photo",
        "photo.JPG~",
        "photo.jpg_large",
        "scan.jpg?size=2",
    ]
    assert names(listed.skipped, tmp_path) == [
        "README",
        "empty",
        "labels.xml",
        "model.h5",
        "notes.txt",
    ]
    assert {one.reason for one in listed.skipped} == {NO_IMAGE}
    assert all(one.passed_over for one in listed.skipped)
    assert str(listed.skipped[0]) == f"{tmp_path}/README: not a readable image"


def test_hidden_files_are_listed_and_leftovers_are_not(tmp_path: Path) -> None:
    picture(tmp_path / "_DSC0001.JPG", "JPEG")
    picture(tmp_path / "_deep" / "a.png")
    picture(tmp_path / ".hidden.png")
    picture(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.png")
    for leftover in ("Thumbs.db", ".DS_Store", "desktop.ini", "._photo.jpg", "__MACOSX/._a.png"):
        text(tmp_path / leftover)
    picture(tmp_path / "__MACOSX" / "a.png")
    listed = image_files(tmp_path)
    assert names(listed.images, tmp_path) == ["_DSC0001.JPG", "_deep/a.png"]
    assert [str(one) for one in listed.skipped] == [
        f"{tmp_path}/.hidden.png: a hidden file",
        f"{tmp_path}/.ipynb_checkpoints: a hidden folder",
    ]


def test_links_are_followed_once_and_never_round(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data / "a" / "1.png")
    picture(data / "z" / "2.png")
    picture(tmp_path / "elsewhere" / "3.png")
    (data / "a" / "up").symlink_to(data)
    (data / "a" / "again").symlink_to(data / "z")
    (data / "far").symlink_to(tmp_path / "elsewhere")
    (data / "link.png").symlink_to(data / "a" / "1.png")
    (data / "nothing.png").symlink_to(tmp_path / "absent.png")
    (data / "self.png").symlink_to(data / "self.png")
    listed = image_files(data)
    assert names(listed.images, data) == ["link.png", "a/1.png", "far/3.png", "z/2.png"]
    assert {os.path.relpath(one.name, data): one.reason for one in listed.skipped} == {
        "a/again": "a link to a folder that is listed already",
        "a/up": "a link to a folder that it lies in",
        "nothing.png": "a link to nothing",
        "self.png": "a link to nothing",
    }


def test_a_link_to_the_folder_itself_is_no_class(tmp_path: Path) -> None:
    classes(tmp_path / "data", "a", "b")
    (tmp_path / "data" / "all").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "a" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    found = class_files(tmp_path / "data")
    assert found.classes == ("a", "b")
    assert [str(one) for one in found.skipped] == [
        f"{tmp_path}/data/all: a link to a folder that it lies in",
        f"{tmp_path}/data/a/out/back: a link to a folder that it lies in",
    ]


PLACES = st.lists(st.sampled_from(["a", "_b", "c.png", "h\udce4", "d e"]), max_size=3)
ENDINGS = st.sampled_from([".png", ".JPG", ".Jfif", ".xml", "", ".png.txt", "~"])
STEMS = st.sampled_from(["x", "_y", "z w", "\udcfc", ".hidden", "._left", "|*", "n\n"])


@given(st.sets(st.tuples(PLACES.map(tuple), STEMS, ENDINGS), max_size=12))
def test_every_file_is_found_or_listed_once(files: set[tuple[tuple[str, ...], str, str]]) -> None:
    with TemporaryDirectory() as made:
        folder = Path(made)
        written = set()
        for place, stem, ending in files:
            path = folder.joinpath(*place, stem + ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                path.write_bytes(b"no image")
                written.add(path)
        listed = image_files(folder)
        skipped = [Path(one.name) for one in listed.skipped]
        assert len({*listed.images, *skipped}) == len(listed.images) + len(skipped)
        left = {path for path in written if path.name.startswith("._")}
        assert {*listed.images, *skipped} == written - left
        endings = {".png", ".jpg", ".jfif"}
        assert all(path.suffix.lower() in endings for path in listed.images)
        assert list(listed.images) == sorted(listed.images, key=lambda p: (str(p.parent), p.name))


def test_pipes_and_sockets_do_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    listed = image_files(tmp_path)
    server.close()
    assert listed.images == ()
    assert [one.reason for one in listed.skipped] == ["a pipe, socket or device"] * 2


def test_folders_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "2.png")
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    listed = image_files(tmp_path)
    assert names(listed.images, tmp_path) == ["a/1.png"]
    (skipped,) = listed.skipped
    assert str(skipped) == f"{tmp_path}/b cannot be listed: Permission denied"
    with pytest.raises(DatasetError, match="b cannot be listed: Permission denied"):
        image_files(tmp_path / "b")


def test_the_summary_counts_by_ending_and_reason() -> None:
    skipped = [Unreadable(f"d/{i}.xyz", NO_IMAGE, True) for i in range(16)]
    assert left_out(skipped, 8) == ("16 of 24 files left out: 16 .xyz (not a readable image)")
    skipped += [Unreadable("d/a.JPG", "it is broken"), Unreadable("d/.x", "a hidden file", True)]
    assert left_out(skipped, 8).endswith(
        "16 .xyz (not a readable image), 1 .jpg (could not be read), 1 without an ending "
        "(a hidden file)"
    )
    many = [Unreadable(f"d/a.e{i}", NO_IMAGE, True) for i in range(9)]
    assert left_out(many, 0).endswith(", 4 others")
    assert left_out([], 3) == ""


# -- classes and parts ------------------------------------------------------------------------


def classes(folder: Path, *names: str, count: int = 1) -> Path:
    for name in names:
        for i in range(count):
            picture(folder / name / f"{i}.png")
    return folder


def test_what_lies_beside_class_folders_is_listed(tmp_path: Path) -> None:
    classes(tmp_path, "a", "b")
    text(tmp_path / "README.md")
    picture(tmp_path / "loose.png")
    text(tmp_path / "a" / "notes.txt")
    found = class_files(tmp_path)
    assert found.classes == ("a", "b")
    assert [str(one) for one in found.skipped] == [
        f"{tmp_path}/loose.png: an image outside the class folders",
        f"{tmp_path}/README.md: not a readable image",
        f"{tmp_path}/a/notes.txt: not a readable image",
    ]


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("valid", ["valid", "val", "Validation", "validate", "DEV", "eval"])
def test_parts_are_known_by_name(tmp_path: Path, train: str, valid: str) -> None:
    for part in (train, valid, "Testing"):
        classes(tmp_path / part, "a", "b")
    text(tmp_path / "labels.csv")
    parts = parts_of(tmp_path)
    assert parts is not None
    assert (parts.train, parts.valid, parts.test) == (
        *(tmp_path / train, tmp_path / valid, tmp_path / "Testing"),
    )
    assert parts.evaluation_part() == tmp_path / "Testing"
    assert [Path(one.name).name for one in parts.skipped] == ["labels.csv"]
    found = class_folders(tmp_path)
    assert found.folder == tmp_path / train
    assert found.classes == ("a", "b")
    assert all(train in path.parts for path in found.paths)
    assert [Path(one.name).name for one in found.skipped] == ["labels.csv"]


def test_a_test_part_without_class_folders_does_not_judge(tmp_path: Path) -> None:
    classes(tmp_path / "train", "a", "b")
    picture(tmp_path / "test" / "1.png")
    parts = parts_of(tmp_path)
    assert parts is not None
    message = (
        "must have a part test or valid with class folders, got train and test; pass .*train to "
        "evaluate on it$"
    )
    with pytest.raises(DatasetError, match=message):
        parts.evaluation_part()
    classes(tmp_path / "val", "a", "b")
    parts = parts_of(tmp_path)
    assert parts is not None
    assert parts.evaluation_part() == tmp_path / "val"


def test_of_two_parts_for_one_end_the_usual_name_counts(tmp_path: Path) -> None:
    for part in ("train", "eval", "val", "extra"):
        classes(tmp_path / part, "a", "b")
    parts = parts_of(tmp_path)
    assert parts is not None
    assert parts.valid == tmp_path / "val"
    assert [str(one) for one in parts.skipped] == [
        f"{tmp_path}/{name}: a folder that is not a part" for name in ("eval", "extra")
    ]
    classes(tmp_path / "training", "a", "b")
    with pytest.raises(DatasetError, match=r"one part to train on, got 'train', 'training'$"):
        parts_of(tmp_path)


def test_classes_may_be_called_like_parts(tmp_path: Path) -> None:
    classes(tmp_path, "car", "train")
    assert parts_of(tmp_path) is None
    picture(tmp_path / "train" / "more" / "deep.png")
    assert parts_of(tmp_path) is None
    assert class_folders(tmp_path).classes == ("car", "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["fold1/a/1.png", "fold1/b/1.png", "fold2/a/1.png", "fold2/b/1.png", "fold2/c/1.png"],
            "data must hold classes, or parts called train, valid and test, got 'fold1', 'fold2', "
            "which all hold the folders 'a', 'b'; rename them, or pass one of them",
        ),
        (
            ["a/train/1.png", "a/val/1.png", "b/train/1.png", "b/val/1.png"],
            "data must hold its parts above the classes, such as data/train/a/photo.jpg, got "
            "'train', 'val' in every class folder",
        ),
        (
            ["seg_train/seg_train/a/1.png", "seg_test/seg_test/a/1.png", "seg_pred/seg_pred/1.png"],
            "data must hold classes, or parts called train, valid and test, got 'seg_pred', "
            "'seg_test', 'seg_train', which hold folders only; rename them, or pass one of",
        ),
        (
            ["train/1.png", "test/1.png"],
            "data must hold images such as test/CLASS/photo.jpg, got parts without class folders, "
            "'test', 'train'",
        ),
        (
            ["train/steam/1.png", "train/diesel/1.png", "car/1.png"],
            "data must hold classes, or parts called train, valid and test, got the part train "
            "next to 'car'; rename it, or move them",
        ),
        (
            ["val/a/1.png", "val/b/1.png"],
            "data must have a part to train on, got val; pass data/val to train on it",
        ),
        (
            ["images/1.png", "Masks/1.png"],
            "data must have one folder per class, got 'Masks', 'images'; pass images with masks",
        ),
        (
            ["train/images/1.png", "train/masks/1.png", "val/images/1.png", "val/masks/1.png"],
            "data/train must have one folder per class, got 'images', 'masks'; pass images with "
            "masks to fcvgg.train_fcn",
        ),
        (
            ["mri/a/1.png", "mri/b/1.png"],
            "data must have two or more class folders, got one, mri; to use the folders in it, "
            "pass data/mri",
        ),
    ],
)
def test_parts_under_other_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in files:
        picture(Path("data") / name)
    with pytest.raises(DatasetError) as caught:
        class_folders("data")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_nested_classes_stay_classes(tmp_path: Path) -> None:
    for place in ("animal/cat", "animal/dog", "vehicle/car", "vehicle/bus"):
        picture(tmp_path / place / "1.png")
    assert class_folders(tmp_path).labels == (0, 0, 1, 1)
    tiny = tmp_path / "tiny"
    for name in ("n01", "n02"):
        picture(tiny / name / "images" / "1.png")
        text(tiny / name / "boxes.txt")
    assert class_folders(tiny).classes == ("n01", "n02")


def test_class_folders_say_why_they_give_no_image(tmp_path: Path) -> None:
    classes(tmp_path, "a")
    for i in range(3):
        text(tmp_path / "b" / f"{i}.tif")
    text(tmp_path / "b" / "notes.xml")
    message = (
        r"the class folder .*b must hold readable images, got 3 that cannot be read: 0\.tif .*: "
        r"1 of 4 files left out: 1 \.xml \(not a readable image\)$"
    )
    with pytest.raises(DatasetError, match=message):
        class_folders(tmp_path)
    for path in (tmp_path / "b").glob("*.tif"):
        path.unlink()
    message = (
        r"b must hold readable images, got other files: 1 of 1 files left out: 1 \.xml \(not a"
    )
    with pytest.raises(DatasetError, match=message):
        class_folders(tmp_path)
    (tmp_path / "only").mkdir()
    (tmp_path / "b").rename(tmp_path / "only" / "b")
    message = (
        r"only must hold images such as only/b/photo\.jpg, got none \(1 of 1 files left "
        r"out: 1 \.xml \(not a "
    )
    with pytest.raises(DatasetError, match=message):
        class_files(tmp_path / "only")


def test_class_folders_of_names_in_other_encodings(tmp_path: Path) -> None:
    classes(tmp_path, "a")
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/h\xe4user")
    classes(tmp_path, "a", "z\n|")
    found = class_folders(tmp_path)
    assert found.classes == ("a", "h\\xe4user", "z\\n|")
    assert found.counts == {"a": 1, "h\\xe4user": 1, "z\\n|": 1}
    assert all(path.is_file() for path in found.paths)
