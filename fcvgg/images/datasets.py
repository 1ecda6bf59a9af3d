"""Labelled images: class folders, data sets, and images to train on and to judge by."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import ImageFolder

from fcvgg.categories import class_index
from fcvgg.errors import ArgumentError, CategoryError, DatasetError, ImageError, one_line
from fcvgg.images.files import Contents, Listing, among, contents, image_files, left_out
from fcvgg.images.files import Unreadable as Unreadable  # its earlier place, still imported from
from fcvgg.images.reading import image_size
from fcvgg.names import readable

_LISTED = 3


@dataclass(frozen=True)
class Labelled:
    """An image of a dataset, or where to read it, and its class's index."""

    name: str
    image: Any
    label: int


class LabelledImages:
    """A dataset's images with labels that are indices of a network's classes.

    Args:
        dataset: the path of a folder with one folder of images per class, or with parts that hold
            such folders; a torchvision `ImageFolder`; or any sequence or iterable of
            ``(image, label)``. A label is an index, or a category's name.
        categories: the network's class names, or None.
        classes: how many classes the network has.

    Class folders, and the names that a dataset gives as ``dataset.classes``, are matched to
    categories by name (case, ``_`` and ``-`` do not matter). Where none matches, as many folders as
    classes are taken in sorted order, as torchvision does. Of a data set in parts, the part to test
    on is taken, or else the one to validate on.

    Attributes:
        skipped: the files of a folder that are not taken for images, and why.
        part: the part of a data set that is taken; None if it has no parts.
        by_order: the class names that were matched in sorted order.

    Raises:
        DatasetError: if there is no such folder, there are no images, or it is no dataset.
        CategoryError: if the classes do not fit the network's.
    """

    def __init__(self, dataset: Any, categories: Sequence[str] | None, classes: int):
        self.categories = categories
        self.classes = classes
        self.by_order: tuple[str, ...] = ()
        self.skipped: tuple[Unreadable, ...] = ()
        self.part: Path | None = None
        self._samples: Sequence[tuple[str, int]] | None = None
        self._dataset = dataset
        self._indices: list[int] | None = None
        if isinstance(dataset, (str, os.PathLike)):
            parts = parts_of(Path(dataset))
            self.part = None if parts is None else parts.to_judge_by()
            found = class_files(self.part or Path(dataset))
            self.skipped = (*(parts.skipped if parts is not None else ()), *found.skipped)
            self._samples = [(str(path), label) for path, label in found.samples]
            self._indices = self._matched(found.classes)
        else:
            self._adopt(dataset)

    def _adopt(self, dataset: Any) -> None:
        if isinstance(dataset, Tensor) or not (
            isinstance(dataset, Iterable) or hasattr(dataset, "__getitem__")
        ):
            raise DatasetError(
                f"{type(dataset).__name__} is no dataset; expected a folder, an ImageFolder or "
                "pairs (image, label)"
            )
        names = getattr(dataset, "classes", None)
        if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
            self._indices = self._matched(list(names))
        untouched = not (
            getattr(dataset, "transforms", None) or getattr(dataset, "target_transform", None)
        )
        if isinstance(dataset, ImageFolder) and untouched:
            self._samples = dataset.samples
        if self.count == 0:
            raise DatasetError("the dataset is empty; expected at least one (image, label)")

    @property
    def count(self) -> int | None:
        """How many there are, if that is known beforehand."""
        if self._samples is not None:
            return len(self._samples)
        return len(self._dataset) if hasattr(self._dataset, "__len__") else None

    def __iter__(self) -> Iterator[Labelled | Unreadable]:
        if self._samples is not None:
            for path, label in self._samples:
                yield Labelled(path, path, self._label(label, path))
        elif hasattr(self._dataset, "__getitem__") and self.count is not None:
            for i in range(len(self._dataset)):
                try:
                    pair = self._dataset[i]
                except (ImageError, OSError, SyntaxError) as error:  # Pillow raises any of them
                    yield Unreadable(f"item {i}", _reason(error))
                else:
                    yield self._item(f"item {i}", pair)
        else:
            for i, pair in enumerate(self._dataset):
                yield self._item(f"item {i}", pair)

    def _item(self, name: str, pair: Any) -> Labelled:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DatasetError(
                f"{name} of the dataset is {type(pair).__name__}; expected a pair (image, label)"
            )
        image, label = pair
        if isinstance(image, (str, os.PathLike)):
            name = str(image)
        return Labelled(name, image, self._label(label, name))

    def _label(self, label: Any, name: str) -> int:
        if isinstance(label, Tensor):
            if label.numel() != 1:
                raise DatasetError(
                    f"{name} has {label.numel()} labels; pass the dataset itself, not a DataLoader"
                )
            label = label.item()
        if isinstance(label, str):
            return class_index(label, self.categories, self.classes)
        if not isinstance(label, Integral):
            raise DatasetError(
                f"the label of {name} is {label!r}; expected a class index or a category's name"
            )
        index = int(label)
        known = self.classes if self._indices is None else len(self._indices)
        if not 0 <= index < known:
            raise CategoryError(
                f"the label of {name} is {index}; the network has classes 0 to {self.classes - 1}"
            )
        return index if self._indices is None else self._indices[index]

    def _matched(self, names: Sequence[str]) -> list[int]:
        """The class index of every name."""
        places: dict[str, list[int]] = {}
        for i, category in enumerate(self.categories or ()):
            places.setdefault(_plain(category), []).append(i)
        found = [places.get(_plain(name), []) for name in names]
        if not any(found):
            return self._in_order(names)
        for name, indices in zip(names, found):
            if len(indices) != 1:
                what = "is no category of the network" if not indices else "names several of them"
                raise CategoryError(
                    f"the class {name!r} {what}; expected the folders to be named like its "
                    f"categories: {_some(self.categories or ())}"
                )
        return [indices[0] for indices in found]

    def _in_order(self, names: Sequence[str]) -> list[int]:
        if len(set(map(_role_of, names)) - {None}) > 1 and all(map(_role_of, names)):
            raise DatasetError(
                f"the classes of the dataset, {_some(names)}, are parts of a data set; pass one of "
                "them"
            )
        if len(names) != self.classes:
            wanted = "" if self.categories is None else f", which are {_some(self.categories)}"
            raise CategoryError(
                f"the dataset has {len(names)} classes ({_some(names)}) that do not fit the "
                f"network's {self.classes}{wanted}; name the folders like the categories, or have "
                "one folder for each class"
            )
        self.by_order = tuple(names)
        return list(range(len(names)))


# -- class folders --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassFiles:
    """The image files of class folders, which may or may not be readable.

    Attributes:
        folder: holds the class folders.
        places: the class folders, sorted.
        samples: every file with the place of its class.
        skipped: the files that were left out, and why.
    """

    folder: Path
    places: tuple[Path, ...]
    samples: tuple[tuple[Path, int], ...]
    skipped: tuple[Unreadable, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the class folders, as text that can be printed."""
        return tuple(readable(place.name) for place in self.places)


@dataclass(frozen=True)
class ClassFolders:
    """Image files that can be read, and their classes.

    Attributes:
        paths: the files, class by class.
        labels: the index into `classes` of each.
        classes: the names of the class folders, sorted. Control characters and bytes that are not
            UTF-8 stand there as escapes.
        skipped: the files that were left out, and why.
        folder: holds the class folders.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    skipped: tuple[Unreadable, ...] = ()
    folder: Path | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many images each class has."""
        count = Counter(self.labels)
        return {name: count[i] for i, name in enumerate(self.classes)}


def class_folders(folder: str | Path) -> ClassFolders:
    """The images of a folder with one folder per class; each is opened once.

    Args:
        folder: holds the class folders, or parts of a data set, of which the one to train on is
            taken.

    Raises:
        DatasetError: if there is no such folder, it has fewer than two class folders, one has no
            image that can be read, or the folders in it are no classes.
    """
    parts = parts_of(Path(folder))
    beside = () if parts is None else parts.skipped
    found = class_files(Path(folder) if parts is None else parts.to_learn_from())
    if len(found.classes) < 2:
        raise DatasetError(_one_class(found))
    read: list[tuple[Path, int]] = []
    unread: list[tuple[Unreadable, int]] = []
    for path, label in found.samples:
        try:
            image_size(path)
        except ImageError as error:
            unread.append((Unreadable(str(path), str(error)), label))
        else:
            read.append((path, label))
    labels = tuple(label for _, label in read)
    present = set(labels)
    for label, place in enumerate(found.places):
        if label not in present:
            failed = [one for one, other in unread if other == label]
            why = _why(failed, among(found.skipped, place))
            raise DatasetError(f"the class folder {place} gives no image: {why}")
    return ClassFolders(
        tuple(path for path, _ in read),
        labels,
        found.classes,
        (*beside, *found.skipped, *(one for one, _ in unread)),
        found.folder,
    )


def class_files(folder: Path) -> ClassFiles:
    """The class folders of a folder and their image files, by name and ending.

    Raises:
        DatasetError: if there is no such folder, it has no class folders, there are no images, or
            the folders in it look like parts of a data set.
    """
    found = _contents(folder, "a folder with one folder per class")
    if not found.folders:
        raise DatasetError(
            f"{folder} has no class folders; expected images in {folder.name}/CLASS/"
        )
    listed = [image_files(place) for place in found.folders]
    if len(found.folders) > 1:
        _check_classes(folder, found.folders, listed)
    samples = tuple((path, i) for i, one in enumerate(listed) for path in one.images)
    skipped = [*_outside(found), *(x for one in listed for x in one.skipped)]
    if not samples:
        passed = left_out(skipped, 0)
        raise DatasetError(
            f"there are no images under {folder}; expected files such as "
            f"{folder.name}/{found.folders[0].name}/photo.jpg" + (f" ({passed})" if passed else "")
        )
    return ClassFiles(folder, found.folders, samples, tuple(skipped))


def _contents(folder: Path, expected: str) -> Contents:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DatasetError(f"{folder} {what}; expected {expected}")
    return contents(folder)


def _outside(found: Contents) -> list[Unreadable]:
    """What lies beside class folders."""
    images = (Unreadable(str(p), "an image in no class folder", True) for p in found.images)
    return [*images, *found.skipped]


def _one_class(found: ClassFiles) -> str:
    (place,) = found.places
    inner = {path.relative_to(place).parts[:-1][:1] for path, _ in found.samples}
    hint = f"; to use the folders in it, pass {place}"
    return (
        f"{found.folder} has one class folder, {place.name}; expected two or more, one per class"
        + (hint if len(inner) > 1 else "")
    )


def _why(failed: Sequence[Unreadable], passed: Sequence[Unreadable]) -> str:
    """Why a class folder gives no image, by the first of its files."""
    if failed:
        path, name = readable(failed[0].name), readable(Path(failed[0].name).name)
        first = Unreadable(name, readable(failed[0].reason).replace(path, name))
        why = f"none of its {len(failed)} can be read: {first}"
    else:
        why = "its files are not used" if passed else "it is empty"
    return f"{why}: {left_out(passed, len(failed))}" if passed else why


def _check_classes(folder: Path, places: Sequence[Path], listed: Sequence[Listing]) -> None:
    """Refuse folders that are parts of a data set under other names than parts have.

    They hold folders and no images, and the same folders each; or their names speak of parts.
    Folders of images and of masks are no classes either.
    """
    names = {place.name.casefold() for place in places}
    if "images" in names and names <= _WITH_MASKS:
        raise DatasetError(
            f"{folder} holds {_some([p.name for p in places])}, which are no classes; expected one "
            "folder per class, or pass images with masks to fcvgg.train_fcn"
        )
    inner = [_inner_folders(place, one) for place, one in zip(places, listed)]
    if any(names is None for names in inner):
        return
    held = [names for names in inner if names]
    shared = sorted(set.intersection(*held)) if len(held) > 1 else []
    if len(shared) > 1:
        if all(map(_role_of, shared)):
            raise DatasetError(
                f"every class folder of {folder} holds the parts {_some(shared)}; expected the "
                f"parts above the classes: {folder.name}/{shared[0]}/{places[0].name}/photo.jpg"
            )
        raise DatasetError(
            f"{_some([p.name for p in places])} in {folder} all hold the folders {_some(shared)} "
            "and no images, so they are parts of a data set and no classes; "
            f"{_PARTS_EXPECTED}, or pass one of them"
        )
    speaking = {role for place in places for role in _roles_spoken_of(place.name)}
    if len(speaking) > 1:
        raise DatasetError(
            f"{_some([p.name for p in places])} in {folder} hold no images but folders, and look "
            f"like parts of a data set; {_PARTS_EXPECTED}, or pass one of them"
        )


def _inner_folders(place: Path, listing: Listing) -> set[str] | None:
    """The names of the folders in a folder that hold images; None if images lie beside them."""
    if listing.images and listing.images[0].parent == place:  # what lies nearest comes first
        return None
    return {path.relative_to(place).parts[0] for path in listing.images}


# -- parts of a data set --------------------------------------------------------------------------

_ROLES = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""What the parts of a data set are for, and what they are called, the more usual names first."""

_WITH_MASKS = frozenset({"images", "masks", "labels", "annotations"})
"""Folders of images with a label for every pixel, or with boxes."""

_PARTS_EXPECTED = "expected parts called train, valid and test"


@dataclass(frozen=True)
class Parts:
    """A data set in parts.

    Attributes:
        folder: holds them.
        train: the part to learn from, or None.
        valid: the part to choose by, or None.
        test: the part for the last judgement, or None.
        skipped: what lies beside the parts that are used.
    """

    folder: Path
    train: Path | None
    valid: Path | None
    test: Path | None
    skipped: tuple[Unreadable, ...] = ()

    @property
    def names(self) -> str:
        """What there is, for a message."""
        found = (self.train, self.valid, self.test)
        return " and ".join(part.name for part in found if part is not None)

    def to_learn_from(self) -> Path:
        """The part to train on.

        Raises:
            DatasetError: if there is none.
        """
        if self.train is None:
            raise DatasetError(
                f"{self.folder} has {self.names} and no train; expected a part to train on, or "
                f"pass {self.valid or self.test}"
            )
        return self.train

    def to_judge_by(self) -> Path:
        """The part to test on, or else the one to validate on.

        A part to test on that has no class folders, since its labels are kept back, does not count.

        Raises:
            DatasetError: if there is neither.
        """
        for part in (self.test, self.valid):
            if part is not None and contents(part).folders:
                return part
        raise DatasetError(
            f"{self.folder} has {self.names} and neither a test nor a valid with class folders; "
            f"expected a part to judge by, or pass {self.train}"
        )


def parts_of(folder: Path, holding: str = "folders") -> Parts | None:
    """The parts of a data set that a folder holds; None if it holds none.

    A folder that is called like a part is one if it holds no images but folders. So a class may be
    called ``train``, whose images lie directly in it, beside other classes.

    Args:
        folder: the data set.
        holding: what a part holds, ``"folders"`` or ``"images"``.

    Raises:
        DatasetError: if the folder does not exist, or what is in it is neither parts nor classes.
    """
    found = _contents(folder, "a folder with one folder per class")
    called = [place for place in found.folders if _role_of(place.name)]
    if not called:
        return None
    others = [place for place in found.folders if place not in called]
    others_used = [place for place in others if image_files(place).images]
    if holding == "folders":
        held = [contents(place) for place in called]
        parts = [bool(one.folders) and not (one.images and others_used) for one in held]
        if not any(parts):
            if len(called) > 1 and not others_used and any(one.images for one in held):
                raise DatasetError(
                    f"{folder} holds the parts {_some([p.name for p in called])}, and these images "
                    f"and no class folders; expected {called[0].name}/CLASS/photo.jpg"
                )
            return None
        called = [p for p, is_part in zip(called, parts) if is_part or not others_used]
    if others_used and len({_role_of(place.name) for place in called}) == 1:
        raise DatasetError(
            f"{folder} holds {called[0].name}, which looks like a part of a data set, and "
            f"{_some([p.name for p in others_used])}, which do not; {_PARTS_EXPECTED}, or class "
            "folders only"
        )
    chosen = {role: _chosen(folder, called, role) for role in _ROLES}
    beside = [place for place in found.folders if place not in chosen.values()]
    skipped = (Unreadable(str(place), "a folder beside the parts", True) for place in beside)
    return Parts(folder, **chosen, skipped=(*skipped, *_outside(found)))


def _chosen(folder: Path, called: Sequence[Path], role: str) -> Path | None:
    """The part of a role: of several the one of the more usual name."""
    names = _ROLES[role]
    parts = [place for place in called if _role_of(place.name) == role]
    parts.sort(key=lambda place: names.index(place.name.casefold()))
    if role == "train" and len(parts) > 1:
        raise DatasetError(
            f"{folder} holds {len(parts)} parts to train on, {_some([p.name for p in parts])}; "
            "expected one"
        )
    return parts[0] if parts else None


def _role_of(name: str) -> str | None:
    """What a part of this name is for; None if it is no part's name."""
    return next((role for role, names in _ROLES.items() if name.casefold() in names), None)


def _roles_spoken_of(name: str) -> set[str]:
    """What a name such as ``seg_train`` or ``val2017`` speaks of."""
    words = re.findall("[a-z]+", name.casefold())
    return {role for word in words if (role := _role_of(word)) is not None}


# -- text -----------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    composed = unicodedata.normalize("NFC", readable(name))  # macOS writes accents apart
    return composed.casefold().replace("_", " ").replace("-", " ").strip()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{readable(name)}'" for name in names[:_LISTED])
    return shown + (f", ... ({len(names)})" if len(names) > _LISTED else "")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow can read"
    return one_line(error)


# -- images to train on and to judge by -----------------------------------------------------------


@dataclass(frozen=True)
class LabelledFiles:
    """Image files and the index of their class."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class SplitFolders:
    """Images to train on and images to judge by.

    Attributes:
        train: the images that are learnt from.
        valid: the images that are held out.
        classes: the class names, sorted.
        skipped: the files that were left out, and why.
        origin: how the two came about, for a reader.
    """

    train: LabelledFiles
    valid: LabelledFiles
    classes: tuple[str, ...]
    skipped: tuple[Unreadable, ...]
    origin: str

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """How many images of every class there are to train on, and held out."""
        train, valid = Counter(self.train.labels), Counter(self.valid.labels)
        return {name: (train[i], valid[i]) for i, name in enumerate(self.classes)}


def split_folders(folder: str | Path, fraction: float = 0.2, seed: int = 0) -> SplitFolders:
    """The images of a folder, to train on and held out.

    Args:
        folder: holds parts to train on and to validate on, each with one folder per class; or a
            part to train on alone, or the class folders themselves, which are then split. A part to
            test on is left for the last judgement and not looked at. See `fcvgg.images.datasets`
            for the names of parts.
        fraction: the share of every class that is held out where the folder is split; at least one
            image.
        seed: of the split.

    Raises:
        DatasetError: if there are no two classes, one is empty or too small to be split, the two
            parts have other classes, or the folders are neither parts nor classes.
        ArgumentError: if `fraction` is none.
    """
    folder = Path(folder)
    if not 0 < fraction < 1:
        raise ArgumentError(f"valid_fraction={fraction} is no share; expected 0 < share < 1")
    parts = parts_of(folder)
    if parts is None:
        return _split(class_folders(folder), fraction, seed)
    train, valid = parts.to_learn_from(), parts.valid
    found = (
        _split(class_folders(train), fraction, seed)
        if valid is None
        else _given(class_folders(train), class_folders(valid), train, valid)
    )
    alone = "" if parts.test is None else f"; {parts.test} is left for the last judgement"
    return replace(found, skipped=(*parts.skipped, *found.skipped), origin=f"{found.origin}{alone}")


def _given(train: ClassFolders, valid: ClassFolders, *folders: Path) -> SplitFolders:
    if train.classes != valid.classes:
        only = [
            f"only {folder} has {', '.join(sorted(set(a) - set(b)))}"
            for folder, a, b in (
                (folders[0], train.classes, valid.classes),
                (folders[1], valid.classes, train.classes),
            )
            if set(a) - set(b)
        ]
        raise DatasetError(
            f"the classes to train on and those held out differ: {'; '.join(only)}; "
            "expected the same class folders in both"
        )
    return SplitFolders(
        LabelledFiles(train.paths, train.labels),
        LabelledFiles(valid.paths, valid.labels),
        train.classes,
        (*train.skipped, *valid.skipped),
        f"held out are the images of {folders[1]}",
    )


def _split(found: ClassFolders, fraction: float, seed: int) -> SplitFolders:
    rng = np.random.default_rng(seed)
    held_out: set[int] = set()
    for label, name in enumerate(found.classes):
        places = [i for i, other in enumerate(found.labels) if other == label]
        if len(places) < 2:
            raise DatasetError(
                f"the class {name!r} has one image, which cannot be both trained on and held out; "
                "add images"
            )
        count = min(max(round(len(places) * fraction), 1), len(places) - 1)
        held_out.update(rng.permutation(places)[:count].tolist())
    return SplitFolders(
        _at(found, [i for i in range(len(found.paths)) if i not in held_out]),
        _at(found, sorted(held_out)),
        found.classes,
        found.skipped,
        f"held out are {fraction:.0%} of every class, drawn with seed {seed}",
    )


def _at(found: ClassFolders, places: Sequence[int]) -> LabelledFiles:
    return LabelledFiles(
        tuple(found.paths[i] for i in places), tuple(found.labels[i] for i in places)
    )
