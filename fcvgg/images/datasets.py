"""Labelled images: class folders, the parts of data sets, and splits into training and held out."""

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
from fcvgg.images.files import NO_IMAGE, Contents, Listing, among, contents, image_files, left_out
from fcvgg.images.files import Unreadable as Unreadable  # its earlier place, still imported from
from fcvgg.images.lazy.source import pages_warned_of_once
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
    categories by name (case, ``_`` and ``-`` do not matter). Where none matches, they are taken in
    sorted order, as torchvision does, if there are as many as classes. Of a data set in parts, the
    part to test on is taken, or else the one to validate on.

    Attributes:
        skipped: the files of a folder that are not used, and why.
        part: the part of a data set that is used; None if it has no parts.
        by_order: the class names that were matched in sorted order.

    Raises:
        DatasetError: if there is no such folder, it holds no images, or the type is not supported.
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
            self.part = None if parts is None else parts.evaluation_part()
            found = class_files(self.part or Path(dataset))
            self.skipped = (*(parts.skipped if parts is not None else ()), *found.skipped)
            self._samples = [(str(path), label) for path, label in zip(found.paths, found.labels)]
            self._indices = self._match(found.classes)
        else:
            self._adopt(dataset)

    def _adopt(self, dataset: Any) -> None:
        iterable = isinstance(dataset, Iterable) or hasattr(dataset, "__getitem__")
        if isinstance(dataset, Tensor) or not iterable:
            raise DatasetError(
                "dataset must be a folder, an ImageFolder or pairs (image, label), got "
                f"{type(dataset).__name__}"
            )
        names = getattr(dataset, "classes", None)
        if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
            self._indices = self._match(list(names))
        transforms = ("transforms", "target_transform")
        if isinstance(dataset, ImageFolder) and not any(getattr(dataset, t) for t in transforms):
            self._samples = dataset.samples  # whose files are then read as those of a folder are
        if self.count == 0:
            raise DatasetError("dataset must hold at least one (image, label), got none")

    @property
    def count(self) -> int | None:
        """The number of images, if it is known beforehand."""
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
                    unidentified = isinstance(error, UnidentifiedImageError)
                    yield Unreadable(f"item {i}", NO_IMAGE if unidentified else one_line(error))
                else:
                    yield self._item(f"item {i}", pair)
        else:
            for i, pair in enumerate(self._dataset):
                yield self._item(f"item {i}", pair)

    def _item(self, name: str, pair: Any) -> Labelled:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DatasetError(
                f"{name} of the dataset must be a pair (image, label), got {type(pair).__name__}"
            )
        image, label = pair
        if isinstance(image, (str, os.PathLike)):
            name = str(image)
        return Labelled(name, image, self._label(label, name))

    def _label(self, label: Any, name: str) -> int:
        if isinstance(label, Tensor):
            if label.numel() != 1:
                raise DatasetError(
                    f"{name} must have one label, got {label.numel()}; pass the dataset itself, "
                    "not a DataLoader"
                )
            label = label.item()
        if isinstance(label, str):
            return class_index(label, self.categories, self.classes)
        if not isinstance(label, Integral):
            raise DatasetError(
                f"the label of {name} must be a class index or a category's name, got {label!r}"
            )
        index = int(label)
        known = self.classes if self._indices is None else len(self._indices)
        if not 0 <= index < known:
            raise CategoryError(f"the label of {name} must be from 0 to {known - 1}, got {index}")
        return index if self._indices is None else self._indices[index]

    def _match(self, names: Sequence[str]) -> list[int]:
        """The network's class index of every name of the dataset's classes."""
        places: dict[str, list[int]] = {}
        for i, category in enumerate(self.categories or ()):
            places.setdefault(_folded(category), []).append(i)
        found = [places.get(_folded(name), []) for name in names]
        if not any(found):
            return self._match_by_order(names)
        for name, indices in zip(names, found):
            if len(indices) != 1:
                raise CategoryError(
                    f"the class {name!r} must match one category of the network, got "
                    f"{len(indices) or 'none'}; name the folders like its categories: "
                    f"{_some(self.categories or ())}"
                )
        return [indices[0] for indices in found]

    def _match_by_order(self, names: Sequence[str]) -> list[int]:
        roles = list(map(_role_of, names))
        if len(set(roles)) > 1 and all(roles):
            raise DatasetError(
                f"the folders of the dataset must be classes, got the parts {_some(names)}; pass "
                "one of them"
            )
        if len(names) != self.classes:
            wanted = "" if self.categories is None else f", {_some(self.categories)}"
            raise CategoryError(
                f"the dataset must have the network's {self.classes} classes{wanted}, got "
                f"{len(names)} ({_some(names)}); name the folders like the categories, or have one "
                "folder per class"
            )
        self.by_order = tuple(names)
        return list(range(len(names)))


# -- class folders --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassFolders:
    """Image files in class folders.

    Attributes:
        paths: the files, class by class.
        labels: the index into `classes` of each.
        classes: the names of the class folders, sorted. Control characters and bytes that are not
            UTF-8 stand there as escapes.
        skipped: the files that were left out, and why.
        folder: holds the class folders.
        places: the class folders themselves.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    skipped: tuple[Unreadable, ...] = ()
    folder: Path | None = None
    places: tuple[Path, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many images each class has."""
        count = Counter(self.labels)
        return {name: count[i] for i, name in enumerate(self.classes)}


@pages_warned_of_once()
def class_folders(folder: str | Path) -> ClassFolders:
    """The images of a folder with one folder per class; each is opened once.

    Args:
        folder: holds the class folders, or the parts of a data set, of which the one to train on is
            taken.

    Raises:
        DatasetError: if there is no such folder, it has fewer than two class folders, one of them
            has no readable image, or its folders are not classes.
    """
    parts = parts_of(Path(folder))
    found = class_files(Path(folder) if parts is None else parts.training_part())
    if len(found.classes) < 2:
        raise DatasetError(_one_class(found))
    read: list[tuple[Path, int]] = []
    unread: list[tuple[Unreadable, int]] = []
    for path, label in zip(found.paths, found.labels):
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
            why = _why_unused(failed, among(found.skipped, place))
            raise DatasetError(f"the class folder {place} must hold readable images, got {why}")
    return replace(
        found,
        paths=tuple(path for path, _ in read),
        labels=labels,
        skipped=(
            *(() if parts is None else parts.skipped),
            *found.skipped,
            *(one for one, _ in unread),
        ),
    )


def class_files(folder: Path) -> ClassFolders:
    """The class folders of a folder and their image files, by name; none is opened.

    Raises:
        DatasetError: if there is no such folder, it has no class folders, there are no images, or
            its folders look like the parts of a data set.
    """
    found = _contents(folder, "a folder with one folder per class")
    if not found.folders:
        raise DatasetError(f"{folder} must hold images in {folder.name}/CLASS/, got no folders")
    listed = [image_files(place) for place in found.folders]
    if len(found.folders) > 1:
        _check_classes(folder, found.folders, listed)
    samples = [(path, i) for i, one in enumerate(listed) for path in one.images]
    skipped = (*_outside(found), *(x for one in listed for x in one.skipped))
    if not samples:
        passed = left_out(skipped, 0)
        raise DatasetError(
            f"{folder} must hold images such as {folder.name}/{found.folders[0].name}/photo.jpg, "
            "got none" + (f" ({passed})" if passed else "")
        )
    return ClassFolders(
        tuple(path for path, _ in samples),
        tuple(label for _, label in samples),
        tuple(readable(place.name) for place in found.folders),
        skipped,
        folder,
        found.folders,
    )


def _contents(folder: Path, expected: str) -> Contents:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing of that name"
        raise DatasetError(f"{folder} must be {expected}, got {what}")
    return contents(folder)


def _outside(found: Contents) -> list[Unreadable]:
    """What a folder holds apart from class folders."""
    images = (Unreadable(str(p), "an image outside the class folders", True) for p in found.images)
    return [*images, *found.skipped]


def _one_class(found: ClassFolders) -> str:
    (place,) = found.places
    inner = {path.relative_to(place).parts[:-1][:1] for path in found.paths}
    message = f"{found.folder} must have two or more class folders, got one, {place.name}"
    return message + (f"; to use the folders in it, pass {place}" if len(inner) > 1 else "")


def _why_unused(failed: Sequence[Unreadable], passed: Sequence[Unreadable]) -> str:
    """Why a class folder gives no image, by the first of its files."""
    if failed:
        path, name = readable(failed[0].name), readable(Path(failed[0].name).name)
        first = Unreadable(name, readable(failed[0].reason).replace(path, name))
        why = f"{len(failed)} that cannot be read: {first}"
    else:
        why = "other files" if passed else "an empty folder"
    return f"{why}: {left_out(passed, len(failed))}" if passed else why


def _check_classes(folder: Path, places: Sequence[Path], listed: Sequence[Listing]) -> None:
    """Refuse folders that are not classes: images and masks, or the parts of a data set.

    Parts may have any names, such as fold1 and fold2. What gives them away is that none holds
    images directly, and that they hold the same folders, or have names like seg_train and seg_test.
    """
    names = _some([place.name for place in places])
    kinds = {place.name.casefold() for place in places}
    if "images" in kinds and kinds <= _WITH_MASKS:
        raise DatasetError(
            f"{folder} must have one folder per class, got {names}; pass images with masks to "
            "fcvgg.train_fcn"
        )
    if any(one.images and one.images[0].parent == p for p, one in zip(places, listed)):
        return  # the images that lie directly in a folder are listed first
    inner = [{f.relative_to(p).parts[0] for f in one.images} for p, one in zip(places, listed)]
    held = [one for one in inner if one]
    shared = sorted(set.intersection(*held)) if len(held) > 1 else []
    if len(shared) > 1 and all(map(_role_of, shared)):
        raise DatasetError(
            f"{folder} must hold its parts above the classes, such as "
            f"{folder.name}/{shared[0]}/{places[0].name}/photo.jpg, got {_some(shared)} in every "
            "class folder"
        )
    words = [word for place in places for word in re.findall("[a-z]+", place.name.casefold())]
    if len(shared) > 1 or len({_role_of(word) for word in words} - {None}) > 1:
        which = f"all hold the folders {_some(shared)}" if len(shared) > 1 else "hold folders only"
        raise DatasetError(
            f"{folder} must hold {_CLASSES_OR_PARTS}, got {names}, which {which}; rename them, or "
            "pass one of them"
        )


# -- parts of a data set --------------------------------------------------------------------------

_ROLES = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""What the parts of a data set are for, and what they are called, the more usual names first."""

_WITH_MASKS = frozenset({"images", "masks", "labels", "annotations"})
"""Folders of images with a label for every pixel, or with boxes."""

_CLASSES_OR_PARTS = "classes, or parts called train, valid and test"


@dataclass(frozen=True)
class Parts:
    """A data set in parts.

    Attributes:
        folder: holds them.
        train: the part to train on, or None.
        valid: the part to validate on, or None.
        test: the part to test on, or None.
        skipped: what else the folder holds.
    """

    folder: Path
    train: Path | None
    valid: Path | None
    test: Path | None
    skipped: tuple[Unreadable, ...] = ()

    @property
    def names(self) -> str:
        """The parts that there are, for a message."""
        found = (self.train, self.valid, self.test)
        return " and ".join(part.name for part in found if part is not None)

    def training_part(self) -> Path:
        """The part to train on, or `DatasetError`."""
        if self.train is None:
            raise DatasetError(
                f"{self.folder} must have a part to train on, got {self.names}; pass "
                f"{self.valid or self.test} to train on it"
            )
        return self.train

    def evaluation_part(self) -> Path:
        """The part to test on, or else the one to validate on, or `DatasetError`.

        A part without class folders, since its labels are kept back, does not count.
        """
        for part in (self.test, self.valid):
            if part is not None and contents(part).folders:
                return part
        raise DatasetError(
            f"{self.folder} must have a part test or valid with class folders, got {self.names}; "
            f"pass {self.train} to evaluate on it"
        )


def parts_of(folder: Path, holding: str = "folders") -> Parts | None:
    """The parts of a data set that a folder holds; None if it holds none.

    A folder that is called like a part is one if it holds folders and no images. So a class may be
    called ``train``, whose images lie directly in it, next to other classes.

    Args:
        folder: the data set.
        holding: what a part holds, ``"folders"`` or ``"images"``.

    Raises:
        DatasetError: if the folder does not exist, or its folders are neither parts nor classes.
    """
    found = _contents(folder, "a folder with one folder per class")
    called = [place for place in found.folders if _role_of(place.name)]
    if not called:
        return None
    others = [p for p in found.folders if p not in called and image_files(p).images]
    if holding == "folders":
        held = [contents(place) for place in called]
        parts = [bool(one.folders) and not (one.images and others) for one in held]
        if not any(parts):
            if len(called) > 1 and not others and any(one.images for one in held):
                raise DatasetError(
                    f"{folder} must hold images such as {called[0].name}/CLASS/photo.jpg, got "
                    f"parts without class folders, {_some([p.name for p in called])}"
                )
            return None
        called = [p for p, is_part in zip(called, parts) if is_part or not others]
    if others and len({_role_of(place.name) for place in called}) == 1:
        raise DatasetError(
            f"{folder} must hold {_CLASSES_OR_PARTS}, got the part {called[0].name} next to "
            f"{_some([p.name for p in others])}; rename it, or move them"
        )
    chosen = {role: _part_of_role(folder, called, role) for role in _ROLES}
    unused = [place for place in found.folders if place not in chosen.values()]
    skipped = (Unreadable(str(place), "a folder that is not a part", True) for place in unused)
    return Parts(folder, **chosen, skipped=(*skipped, *_outside(found)))


def _part_of_role(folder: Path, called: Sequence[Path], role: str) -> Path | None:
    """The part of a role: of several the one of the more usual name."""
    names = _ROLES[role]
    parts = [place for place in called if _role_of(place.name) == role]
    parts.sort(key=lambda place: names.index(place.name.casefold()))
    if role == "train" and len(parts) > 1:
        got = _some([p.name for p in parts])
        raise DatasetError(f"{folder} must have one part to train on, got {got}")
    return parts[0] if parts else None


def _role_of(name: str) -> str | None:
    """What a part of this name is for; None if parts are not called so."""
    return next((role for role, names in _ROLES.items() if name.casefold() in names), None)


def _folded(name: str) -> str:
    """A name for comparing: case, ``_`` and ``-`` do not matter."""
    composed = unicodedata.normalize("NFC", readable(name))  # macOS writes accents apart
    return composed.casefold().replace("_", " ").replace("-", " ").strip()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{readable(name)}'" for name in names[:_LISTED])
    return shown + (f", ... ({len(names)})" if len(names) > _LISTED else "")


# -- images to train on and held out --------------------------------------------------------------


@dataclass(frozen=True)
class LabelledFiles:
    """Image files and the index of their class."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class SplitFolders:
    """Images to train on and images that are held out.

    Attributes:
        train: the images to train on.
        valid: the images that are held out.
        classes: the class names, sorted.
        skipped: the files that were left out, and why.
        origin: how the images were divided, for a report.
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


@pages_warned_of_once()
def split_folders(folder: str | Path, fraction: float = 0.2, seed: int = 0) -> SplitFolders:
    """The images of a folder, to train on and held out.

    Args:
        folder: holds parts to train on and to validate on, each with one folder per class; or a
            part to train on alone, or the class folders themselves, which are then split. A part to
            test on is not looked at.
        fraction: the share of every class that is held out where the folder is split; at least one
            image.
        seed: of the split.

    Raises:
        DatasetError: if there are fewer than two classes, one is empty or too small to be split,
            the two parts have different classes, or the folders are neither parts nor classes.
        ArgumentError: if `fraction` is not between 0 and 1.
    """
    folder = Path(folder)
    if not 0 < fraction < 1:
        raise ArgumentError(f"valid_fraction must be between 0 and 1, got {fraction}")
    parts = parts_of(folder)
    if parts is None:
        return _split(class_folders(folder), fraction, seed)
    train = class_folders(parts.training_part())
    found = (
        _split(train, fraction, seed)
        if parts.valid is None
        else _given(train, class_folders(parts.valid))
    )
    kept = "" if parts.test is None else f"; {parts.test} is kept for testing"
    return replace(found, skipped=(*parts.skipped, *found.skipped), origin=f"{found.origin}{kept}")


def _given(train: ClassFolders, valid: ClassFolders) -> SplitFolders:
    if train.classes != valid.classes:
        only = [
            f"{', '.join(sorted(set(one.classes) - set(other.classes)))} only in {one.folder}"
            for one, other in ((train, valid), (valid, train))
            if set(one.classes) - set(other.classes)
        ]
        raise DatasetError(
            "the parts to train on and to validate on must have the same class folders, got "
            f"{' and '.join(only)}"
        )
    return SplitFolders(
        LabelledFiles(train.paths, train.labels),
        LabelledFiles(valid.paths, valid.labels),
        train.classes,
        (*train.skipped, *valid.skipped),
        f"held out are the images of {valid.folder}",
    )


def _split(found: ClassFolders, fraction: float, seed: int) -> SplitFolders:
    rng = np.random.default_rng(seed)
    held_out: set[int] = set()
    for label, name in enumerate(found.classes):
        places = [i for i, other in enumerate(found.labels) if other == label]
        if len(places) < 2:
            raise DatasetError(
                f"the class {name!r} must have two or more images, of which some are held out, got "
                "one; add images"
            )
        count = min(max(round(len(places) * fraction), 1), len(places) - 1)
        held_out.update(rng.permutation(places)[:count].tolist())
    samples = list(zip(found.paths, found.labels))
    train, valid = (
        LabelledFiles(*zip(*(one for i, one in enumerate(samples) if (i in held_out) is held)))
        for held in (False, True)
    )
    origin = f"held out are {fraction:.0%} of every class, drawn with seed {seed}"
    return SplitFolders(train, valid, found.classes, found.skipped, origin)
