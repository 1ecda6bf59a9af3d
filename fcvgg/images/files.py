"""Listing the image files of folders: every file is found, or left out with its reason.

An image is a file with an ending of a format that Pillow decodes, in upper or lower case, or else
with the first bytes of an image. What operating systems and file managers leave in folders
(``Thumbs.db``, ``.DS_Store``, ``desktop.ini``, ``__MACOSX``, ``._photo.jpg``) is ignored. Other
files and folders whose names begin with a dot are hidden: left out, and listed.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from PIL import Image

from fcvgg.errors import DatasetError
from fcvgg.names import readable

NO_IMAGE = "not a readable image"
SPECIAL = "a pipe, socket or device"

_UNREAD = "could not be read"
_LISTED = 5

_LEFTOVERS = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *(".ds_store", "__macosx", ".appledouble", ".localized", ".trashes", ".fseventsd"),
        *(".spotlight-v100", ".temporaryitems", "icon\r", "@eadir", ".directory", "lost+found"),
    }
)
"""What operating systems, file managers and file servers leave in folders, in lower case."""

_NOT_DECODED = frozenset({"EPS", "WMF", "HDF5", "GRIB", "BUFR", "MPEG", "IPTC"})
"""Formats that Pillow knows by name and leaves to other programs."""

_BY_CONTENT = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "HEIF")
"""Formats that the first bytes identify reliably."""


@dataclass(frozen=True)
class Unreadable:
    """A file of a folder, or an image of a dataset, that was not used, and why.

    Attributes:
        name: its path.
        reason: why it was left out.
        passed_over: whether it was never opened, since neither name nor content is an image's.
    """

    name: str
    reason: str
    passed_over: bool = False

    def __str__(self) -> str:
        name, reason = readable(self.name), readable(self.reason)
        return reason if name in reason else f"{name}: {reason}"


@dataclass(frozen=True)
class Contents:
    """What lies directly in a folder.

    Attributes:
        folder: the folder itself.
        folders: the folders that are not hidden, sorted.
        images: the image files, sorted.
        skipped: everything else but leftovers of the system.
    """

    folder: Path
    folders: tuple[Path, ...]
    images: tuple[Path, ...]
    skipped: tuple[Unreadable, ...]


@dataclass(frozen=True)
class Listing:
    """The image files of a folder and of the folders in it, and what was left out."""

    images: tuple[Path, ...]
    skipped: tuple[Unreadable, ...]


def image_files(folder: Path) -> Listing:
    """The image files under a folder, by folder and name.

    A folder that several links lead to is read once, and links that lead back are not followed.

    Raises:
        DatasetError: if the folder cannot be listed; a folder in it that cannot be is left out.
    """
    seen: set[tuple[int, int]] = set()
    found: list[Contents] = []
    skipped: list[Unreadable] = []
    direct, linked = [folder], list[Path]()
    while direct or linked:
        # links come last, so that a folder is listed under its own name where it has one
        place = (direct or linked).pop(0)
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:
                skipped.append(_passed(place, "a link to a folder that is listed already"))
                continue
            found.append(contents(place))
        except (OSError, DatasetError) as error:
            if place == folder:
                raise
            skipped.append(_passed(place, str(error)))
            continue
        seen.add((status.st_dev, status.st_ino))
        skipped += found[-1].skipped
        for inner in found[-1].folders:
            (linked if inner.is_symlink() else direct).append(inner)
    found.sort(key=lambda one: str(one.folder))
    return Listing(
        tuple(path for one in found for path in one.images),
        tuple(sorted(skipped, key=lambda one: one.name)),
    )


def contents(folder: Path) -> Contents:
    """What lies directly in a folder, or `DatasetError` if it cannot be listed."""
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"{folder} cannot be listed: {error.strerror or error}") from error
    folders: list[Path] = []
    images: list[Path] = []
    skipped: list[Unreadable] = []
    endings = image_endings()
    around = {folder.resolve(), *folder.resolve().parents}
    for entry in entries:
        if is_leftover(entry.name):
            continue
        path = folder / entry.name
        is_folder, is_file = _kind(entry)
        if not (is_folder or is_file):
            skipped.append(_passed(path, _why_neither(path)))
        elif entry.name.startswith("."):
            skipped.append(_passed(path, f"a hidden {'folder' if is_folder else 'file'}"))
        elif is_folder and entry.is_symlink() and path.resolve() in around:
            skipped.append(_passed(path, "a link to a folder that it lies in"))
        elif is_folder:
            folders.append(path)
        elif os.path.splitext(entry.name)[1].lower() in endings or _is_image_by_content(path):
            images.append(path)
        else:
            skipped.append(_passed(path, NO_IMAGE))
    return Contents(folder, tuple(folders), tuple(images), tuple(skipped))


def image_endings() -> frozenset[str]:
    """The endings of image files in lower case: those of Pillow's formats, plugins included."""
    known = Image.registered_extensions()
    usable = {
        ending.lower()
        for ending, kind in known.items()
        if kind in Image.OPEN and kind not in _NOT_DECODED
    }
    return frozenset({*usable, ".tif", ".tiff"})


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name was left by the system rather than the user."""
    return name.startswith("._") or name.lower() in _LEFTOVERS


def left_out(skipped: Sequence[Unreadable], used: int) -> str:
    """One line on the files that were left out, by ending and reason; empty if there are none.

    >>> left_out([Unreadable("a/1.xyz", NO_IMAGE, True)], 4)
    '1 of 5 files left out: 1 .xyz (not a readable image)'
    """
    if not skipped:
        return ""
    kinds = Counter(
        (_ending(one.name), one.reason if one.passed_over else _UNREAD) for one in skipped
    ).most_common()
    shown = [f"{count} {ending} ({reason})" for (ending, reason), count in kinds[:_LISTED]]
    rest = sum(count for _, count in kinds[_LISTED:])
    shown += [f"{rest} others"] * (rest > 0)
    files = f"{len(skipped)} of {used + len(skipped)} files left out"
    return readable(f"{files}: {', '.join(shown)}")


def among(skipped: Iterable[Unreadable], folder: Path) -> tuple[Unreadable, ...]:
    """Those that lie under a folder."""
    return tuple(one for one in skipped if folder in Path(one.name).parents)


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether it is a folder, and whether a file; neither where a link leads nowhere."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:
        return False, False


def _why_neither(path: Path) -> str:
    """Why a path is neither a folder nor a file."""
    try:
        path.stat()
    except OSError as error:
        return "a link to nothing" if path.is_symlink() else error.strerror or str(error)
    return SPECIAL


def _passed(path: Path, reason: str) -> Unreadable:
    return Unreadable(str(path), reason, passed_over=True)


def _ending(name: str) -> str:
    return PurePath(name).suffix.lower() or "without an ending"


def _is_image_by_content(path: Path) -> bool:
    formats = [kind for kind in _BY_CONTENT if kind in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes and metadata
            with Image.open(path, formats=formats):
                return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow's parsers raise whatever other contents lead to
        return False
