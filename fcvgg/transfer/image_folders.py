"""Folders of class folders as lists of images that can be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fcvgg.datasets import Unreadable, samples_in
from fcvgg.errors import DatasetError, ImageError
from fcvgg.images import image_size


@dataclass(frozen=True)
class ClassFolders:
    """Image files and their classes.

    Attributes:
        paths: the files that can be read, class by class.
        labels: the index into `classes` of each.
        classes: the names of the class folders, sorted.
        skipped: the files that cannot be read, and why.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    skipped: tuple[Unreadable, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many images each class has."""
        return {name: self.labels.count(i) for i, name in enumerate(self.classes)}


def class_folders(folder: str | Path) -> ClassFolders:
    """The images of a folder with one folder per class; each is opened once.

    Raises:
        DatasetError: if there is no such folder, it has fewer than two class folders, or one has no
            image that can be read.
    """
    folder = Path(folder)
    classes, samples = samples_in(folder)
    if len(classes) < 2:
        raise DatasetError(
            f"{folder} has one class folder, {classes[0]}; expected two or more, one per class"
        )
    read: list[tuple[Path, int]] = []
    skipped: list[Unreadable] = []
    for name, label in samples:
        try:
            image_size(name)
        except ImageError as error:
            skipped.append(Unreadable(name, str(error)))
        else:
            read.append((Path(name), label))
    for label, name in enumerate(classes):
        if not any(found == label for _, found in read):
            unread = sum(found == label for _, found in samples)
            why = f"none of its {unread} can be read" if unread else "it is empty"
            raise DatasetError(f"the class folder {folder / name} gives no image: {why}")
    return ClassFolders(
        tuple(path for path, _ in read),
        tuple(label for _, label in read),
        tuple(classes),
        tuple(skipped),
    )
