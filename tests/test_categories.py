"""Finding a class by index or name."""

from __future__ import annotations

import numpy as np
import pytest

import fcvgg
from fcvgg.categories import class_index, class_name, one_per_class
from fcvgg.demo import demo_model

NAMES = ("tabby", "tiger cat", "Siamese cat", "crane", "crane", "maillot", "café")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0, 0),
        (6, 6),
        (-1, 6),
        (-7, 0),
        (np.int64(2), 2),
        ("tabby", 0),
        ("TABBY", 0),
        ("siamese CAT", 2),
        ("tiger", 1),
        ("Sia", 2),
        ("CAFÉ", 6),
    ],
)
def test_a_class_is_found(target: int | str, expected: int) -> None:
    index = class_index(target, NAMES, len(NAMES))
    assert index == expected
    assert type(index) is int


def test_the_whole_name_wins_over_a_part() -> None:
    assert class_index("cat", ("wildcat", "Cat", "cat"), 3) == 2
    assert class_index("CAT", ("wildcat", "Cat"), 2) == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (7, r"class must be an index from 0 to 6 or a name, got 7$"),
        (-8, r"class must be an index from 0 to 6 or a name, got -8$"),
        (
            "cat",
            r"class must match one category, got 'cat', .* 'tiger cat' \(1\), 'Siamese cat' \(2\); "
            r"pass the whole name or the index$",
        ),
        ("crane", r"class must match one .* matches 'crane' \(3\), 'crane' \(4\); pass the whole"),
        ("tabbi", r"there is no category 'tabbi'; near: 'tabby' \(0\)$"),
        ("cranee", r"there is no category 'cranee'; near: 'crane' \(3\)$"),
        (
            "zeppelin",
            r"there is no category 'zeppelin'; there are 7: 'tabby' \(0\), 'tiger cat' \(1\), "
            r"'Siamese cat' \(2\), 'crane' \(3\), 'crane' \(4\), \.\.\.$",
        ),
        ("", r"there is no category ''; there are 7: 'tabby' \(0\)"),
        (1.0, r"class must be an index or a category name, got 1\.0$"),
        (True, r"class must be an index or a category name, got True$"),
        (None, r"class must be an index or a category name, got None$"),
    ],
)
def test_what_is_not_found_lists_what_is_near(target: object, message: str) -> None:
    with pytest.raises(fcvgg.CategoryError, match=f"^{message}"):
        class_index(target, NAMES, len(NAMES))  # type: ignore[arg-type]


def test_a_long_list_of_matches_is_cut() -> None:
    names = [f"cat {i}" for i in range(9)]
    with pytest.raises(fcvgg.CategoryError, match=r"'cat 4' \(4\), \.\.\.; pass the whole name"):
        class_index("cat", names, 9)


def test_a_name_needs_names() -> None:
    with pytest.raises(
        fcvgg.CategoryError,
        match=r"class must be an index from 0 to 4 for a network without category names, got 'cat'"
        r"; pass an index, or categories= to convert or load$",
    ):
        class_index("cat", None, 5)
    assert class_name(3, None) == "class 3"
    assert class_name(3, NAMES) == "crane"


def test_categories_are_given_by_the_path_of_their_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("sky\nface\n")
    assert fcvgg.load("demo", categories="names.txt").categories == ("sky", "face")
    net = fcvgg.convert(demo_model(), categories=tmp_path / "names.txt", verify=False)
    assert net.categories == ("sky", "face")
    assert fcvgg.FCN(net, 2, categories="names.txt").categories == ("sky", "face")
    with pytest.raises(
        fcvgg.CategoryError,
        match=r"^categories='face' is taken for the path of a file: the categories in face cannot "
        r"be read: No such file .*, or pass a list of names$",
    ):
        net.categories = "face"
    net.categories = "sf"  # a sequence of two names
    assert net.categories == ("s", "f")
    (tmp_path / "names.txt").write_text("sky\nface\nsea\n")
    with pytest.raises(
        fcvgg.CategoryError, match=r"categories must be 2 names, one per class .*, got 3"
    ):
        net.categories = "names.txt"


@pytest.mark.parametrize("names", [5, 0.5, b"ab", True])
def test_names_are_a_sequence_or_a_path(names: object) -> None:
    with pytest.raises(fcvgg.CategoryError, match=r"^categories must be a sequence of names or"):
        one_per_class(names, 2, "scores")  # type: ignore[arg-type]


def test_names_of_any_iterable() -> None:
    assert one_per_class((n for n in "ab"), 2, "scores") == ("a", "b")  # type: ignore[arg-type]
    assert one_per_class({"a": 1, "b": 2}.keys(), 2, "scores") == ("a", "b")  # type: ignore[arg-type]
