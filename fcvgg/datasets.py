"""Labelled images: folders of classes, torchvision datasets, sequences of (image, label)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from fcvgg.categories import class_index
from fcvgg.errors import CategoryError, DatasetError, ImageError, one_line

_LISTED = 3


@dataclass(frozen=True)
class Unreadable:
    """An image of a dataset that could not be used, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return self.reason if self.name in self.reason else f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Labelled:
    """An image of a dataset, or where to read it, and its class's index."""

    name: str
    image: Any
    label: int


class LabelledImages:
    """A dataset's images with labels that are indices of a network's classes.

    Args:
        dataset: the path of a folder with one folder of images per class; a torchvision
            `ImageFolder`; or any sequence or iterable of ``(image, label)``. A label is an index,
            or a category's name.
        categories: the network's class names, or None.
        classes: how many classes the network has.

    Class folders, and the names that a dataset gives as ``dataset.classes``, are matched to
    categories by name (case, ``_`` and ``-`` do not matter). Where none matches, as many folders as
    classes are taken in sorted order, as torchvision does.

    Raises:
        DatasetError: if there is no such folder, there are no images, or it is no dataset.
        CategoryError: if the classes do not fit the network's.
    """

    def __init__(self, dataset: Any, categories: Sequence[str] | None, classes: int):
        self.categories = categories
        self.classes = classes
        self.by_order: tuple[str, ...] = ()
        self._samples: Sequence[tuple[str, int]] | None = None
        self._dataset = dataset
        self._indices: list[int] | None = None
        if isinstance(dataset, (str, os.PathLike)):
            names, self._samples = samples_in(Path(dataset))
            self._indices = self._matched(names)
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
        if len(names) != self.classes:
            wanted = "" if self.categories is None else f", which are {_some(self.categories)}"
            raise CategoryError(
                f"the dataset has {len(names)} classes ({_some(names)}) that do not fit the "
                f"network's {self.classes}{wanted}; name the folders like the categories, or have "
                "one folder for each class"
            )
        self.by_order = tuple(names)
        return list(range(len(names)))


def samples_in(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """The class folders' names, sorted, and every image file with the place of its class."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DatasetError(f"{folder} {what}; expected a folder with one folder per class")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    samples = [
        (str(Path(place) / file), i)
        for i, name in enumerate(names)
        for place, folders, files in sorted(os.walk(folder / name, followlinks=True))
        for file in sorted(files)
        if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith(".")
    ]
    if not names:
        raise DatasetError(
            f"{folder} has no class folders; expected images in {folder.name}/CLASS/"
        )
    if not samples:
        raise DatasetError(
            f"there are no images under {folder}; expected files such as "
            f"{folder.name}/{names[0]}/photo.jpg"
        )
    return names, samples


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_LISTED])
    return shown + (f", ... ({len(names)})" if len(names) > _LISTED else "")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow can read"
    return one_line(error)
