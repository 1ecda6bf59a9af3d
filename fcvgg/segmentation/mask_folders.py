"""Folders of images and masks: read once, checked whole, and split."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from fcvgg.categories import distinct_names
from fcvgg.errors import ArgumentError, DatasetError, ImageError, one_line
from fcvgg.geometry import Pair
from fcvgg.images.datasets import parts_of
from fcvgg.images.files import Unreadable, contents, image_files, left_out
from fcvgg.images.lazy.source import pages_warned_of_once
from fcvgg.images.pipelines import given_preprocess
from fcvgg.images.preprocessing import Preprocess, PreprocessLike
from fcvgg.images.reading import check_usable, image_size, prepare, read_image
from fcvgg.results.label_map import IGNORE_INDEX
from fcvgg.segmentation.network import FCN
from fcvgg.support.module_state import dtype_of

IMAGES, MASKS = "images", "masks"

_SUFFIX = re.compile("[-_.](mask|labels?|seg|segmentation|gt)$", re.IGNORECASE)
"""What may follow the image's name in the name of a mask."""

_COLOUR_TABLES = ("labelmap.txt", "class_dict.csv")
"""Files beside masks, as CVAT and CamVid have them, with lines of a class and its colour."""

_COLOUR = re.compile(r"\s*([^,:;#]+)[,:;]\s*(\d{1,3})[,; ]\s*(\d{1,3})[,; ]\s*(\d{1,3})\b")

_BINARY = frozenset({0, 255})

_LOSSY = frozenset({"JPEG", "MPO", "JPEG2000", "WEBP", "AVIF"})
"""Formats whose compression may change labels."""

_EXPECTED = "expected class indices, grey or with a palette, as PNG, TIFF or BMP"


@dataclass(frozen=True)
class MaskFolder:
    """Images with masks of the same name, which hold a class index for every pixel.

    Attributes:
        images: the files that can be read.
        masks: the mask of each.
        categories: the names of the classes.
        counts: the number of pixels of each class in all masks.
        skipped: the files that were left out, and why.
        binary: whether 255 means class 1 in the masks.
        sizes: ``(H, W)`` of each image.
        colours: the classes of the colours ``r << 16 | g << 8 | b`` that masks may have.
    """

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    categories: tuple[str, ...]
    counts: tuple[int, ...]
    skipped: tuple[Unreadable, ...] = ()
    binary: bool = False
    sizes: tuple[Pair, ...] = ()
    colours: Mapping[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def labels(self, index: int) -> NDArray[np.int64]:
        """The class index of every pixel of an image, int64 ``(H, W)``; 255 is ignored."""
        labels = read_mask(self.masks[index], self.colours)
        return np.where(labels == IGNORE_INDEX, 1, labels) if self.binary else labels

    def part(self, indices: Sequence[int]) -> MaskFolder:
        """Some of the images, with their masks."""
        some = replace(
            self,
            images=tuple(self.images[i] for i in indices),
            masks=tuple(self.masks[i] for i in indices),
            sizes=tuple(self.sizes[i] for i in indices) if self.sizes else (),
        )
        total = np.zeros(len(self.categories), np.int64)
        for index in range(len(some)):
            labels = some.labels(index)
            known = labels[labels != IGNORE_INDEX].ravel()
            total += np.bincount(known, minlength=len(total))
        return replace(some, counts=tuple(total.tolist()))


def mask_folder(
    folder: str | Path, categories: int | Sequence[str], preprocess: PreprocessLike | None = None
) -> MaskFolder:
    """The images and masks of a folder; every file is opened once and checked.

    Args:
        folder: with ``images/NAME.jpg`` (or another kind) and ``masks/NAME.png``. A mask holds
            class indices, as grey values, as three equal channels or as a palette image's indices,
            and 255 for pixels that are neither trained on nor counted. It may also be a TIFF, a BMP
            or a grey GIF, or be called ``NAME_mask``, ``NAME_label``, ``NAME_seg`` or ``NAME_gt``.
            Where there are two classes and the masks of a data set hold only 0 and 255, 255 is
            class 1.
            Masks of colours need a table of them, ``labelmap.txt`` (``name:r,g,b``) or
            ``class_dict.csv`` (``name,r,g,b``), in the folder or with the masks; colours of other
            names than the categories' are ignored like 255.
            Images are turned as their EXIF entry says, so masks label the upright image.
        categories: the names of the classes in the order of their indices, or how many there are.
        preprocess: the network's, which decides what images can be used; one for RGB of 8 bits if
            None.

    Raises:
        DatasetError: if there are no images, a mask is missing, has another size or kind, or has a
            label that is not a class; the message names the file.
    """
    names = _checked_categories(categories)
    (found,) = _read_parts([_place(Path(folder))], names, preprocess)
    return found


def train_and_valid(
    folder: str | Path,
    categories: int | Sequence[str],
    share: float = 0.2,
    seed: int = 0,
    preprocess: PreprocessLike | None = None,
) -> tuple[MaskFolder, MaskFolder]:
    """Images to train on, and images that decide the best epoch.

    Args:
        folder: with parts to train on and to validate on, such as ``train/`` and ``val/``, each as
            for `mask_folder`, or ``images/train/`` with ``masks/train/`` and so on; or with a part
            to train on alone, or as for `mask_folder` itself, which are split at random. A part to
            test on is not used. See `fcvgg.images.datasets` for the names of parts.
        categories: as for `mask_folder`.
        share: the share of validation images where the folder is split, between 0 and 1.
        seed: the seed of the split.
        preprocess: as for `mask_folder`.

    Raises:
        DatasetError: as `mask_folder`, and if there are too few images to split.
        ArgumentError: if `share` is out of range.
    """
    folder = Path(folder)
    if not 0 < share < 1:
        raise ArgumentError(f"valid_fraction must be between 0 and 1, got {share}")
    names = _checked_categories(categories)
    places, skipped = _places(folder)
    found = _read_parts(places, names, preprocess)
    found[0] = replace(found[0], skipped=(*skipped, *found[0].skipped))
    if len(found) == 2:
        return found[0], found[1]
    (whole,) = found
    if len(whole) < 2:
        raise DatasetError(
            f"{folder} must have two images or more, to train and to validate on, got {len(whole)}"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(max(round(share * len(whole)), 1), len(whole) - 1)
    valid = replace(whole.part(sorted(order[:held_out])), skipped=())
    return whole.part(sorted(order[held_out:])), valid


def read_mask(path: Path, colours: Mapping[int, int] | None = None) -> NDArray[np.int64]:
    """The stored value of every pixel, int64 ``(H, W)``, turned as an EXIF entry says.

    Args:
        path: of the mask.
        colours: the classes of colours ``r << 16 | g << 8 | b``, where it may have some.

    Raises:
        ImageError: if the file cannot be read.
        DatasetError: if it holds colours or fractions instead of indices, or several pictures, or
            its compression may have changed them.
    """
    kind = _checked_kind(path)
    image = read_image(path)
    values = np.asarray(image)
    if kind == "GIF" and image.mode == "P":
        return _grey_values(image, path).astype(np.int64)
    if image.mode in ("RGBA", "LA", "PA"):
        if (values[..., -1] != 255).any():
            raise DatasetError(f"the mask {path} has transparent pixels; {_EXPECTED}")
        values = values[..., :-1]
    if values.ndim == 3 and colours:
        return _classes_of_colours(values, colours, path)
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            held = np.unique(values.reshape(-1, values.shape[2]), axis=0)
            coloured = next(c for c in held.tolist() if len(set(c)) > 1)
            raise DatasetError(
                f"the mask {path} has mode {image.mode} and {len(held)} colours such as "
                f"{tuple(coloured)}; {_EXPECTED}, or {_COLOUR_TABLES[0]} beside them with a line "
                "name:r,g,b for each class"
            )
        values = values[..., 0]
    if values.dtype.kind == "f" and not np.array_equal(values, np.round(values)):
        raise DatasetError(f"the mask {path} holds fractions; {_EXPECTED}")
    return values.astype(np.int64)


def _classes_of_colours(
    pixels: NDArray[Any], colours: Mapping[int, int], path: Path
) -> NDArray[np.int64]:
    """The classes of a mask of colours ``(H, W, 3)``, or `DatasetError` if one is not listed."""
    numbers = pixels.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])  # (H, W)
    held, places = np.unique(numbers, return_inverse=True)
    unknown = [number for number in held.tolist() if number not in colours]
    if unknown:
        red, green, blue = unknown[0].to_bytes(3, "big")
        raise DatasetError(
            f"the mask {path} has the colour ({red}, {green}, {blue}), which the table of colours "
            "does not list; add it"
        )
    return np.array([colours[number] for number in held.tolist()])[places].reshape(numbers.shape)


def _colour_table(place: _Place, several: bool, names: Sequence[str]) -> dict[int, int]:
    """The classes of colours by the table beside the masks; empty if there is none.

    Classes are matched by name without case, or in order where the categories are numbers.

    Args:
        several: whether the place is one of several parts, which may share a table.
    """
    folders = [place.masks, place.masks.parent, place.folder.parent if several else place.folder]
    files = (folder / name for folder in folders for name in _COLOUR_TABLES)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return {}
    lines = filter(None, map(_COLOUR.match, file.read_text("utf-8", "replace").splitlines()))
    listed = [
        (name.strip().lower(), tuple(map(int, colour)))
        for name, *colour in (line.groups() for line in lines)
    ]
    numbered = list(names) == [str(i) for i in range(len(names))]
    known = [name for name, _ in listed] if numbered else [name.lower() for name in names]
    if not numbered and not {name for name, _ in listed} & set(known):
        raise DatasetError(
            f"{file} must list the colours of {', '.join(names)}, got those of "
            f"{', '.join(name for name, _ in listed[:5]) or 'no class'}"
        )
    table = {}
    for name, (red, green, blue) in listed:
        table[red << 16 | green << 8 | blue] = known.index(name) if name in known else IGNORE_INDEX
    return table


def _checked_kind(path: Path) -> str:
    """The format of a mask's file, or an empty string if it cannot be opened.

    Raises:
        DatasetError: if its compression may change labels, or it holds several masks.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes and metadata
            with Image.open(path) as image:
                kind = str(image.format)
                inner = str(image.info.get("compression", "")).upper()
                size, several = image.size, getattr(image, "n_frames", 1) > 1
                if several:
                    image.seek(1)
                    several = image.size == size  # smaller ones are overviews
    except Exception:  # Pillow raises anything for a broken file, which reading then reports
        return ""
    if kind in _LOSSY or (kind == "TIFF" and any(name in inner for name in _LOSSY)):
        what = kind if kind in _LOSSY else f"TIFF compressed as {inner}"
        raise DatasetError(f"the mask {path} is a {what}, which may change labels; {_EXPECTED}")
    if several:
        raise DatasetError(f"the mask {path} must hold one picture, got several")
    return kind


def _grey_values(image: Image.Image, path: Path) -> NDArray[Any]:
    """The grey values of a GIF: its indices are of no use, since writers renumber the palette."""
    indices = np.asarray(image)
    palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
    used = palette[np.unique(indices)]
    if (used != used[:, :1]).any():
        raise DatasetError(
            f"the mask {path} is a GIF of colours, whose order writers change; {_EXPECTED}"
        )
    return palette[indices][..., 0]


# -- finding and checking -------------------------------------------------------------------------


class _Place(NamedTuple):
    """A folder for messages, and its folders of images and of their masks."""

    folder: Path
    images: Path
    masks: Path


def _place(folder: Path) -> _Place:
    """The place of a folder; the names of its inner folders may be in any case."""
    inner = contents(folder).folders if folder.is_dir() else ()
    by_name = {place.name.lower(): place for place in inner}
    return _Place(folder, *(by_name.get(name, folder / name) for name in (IMAGES, MASKS)))


def _places(folder: Path) -> tuple[list[_Place], tuple[Unreadable, ...]]:
    """The places of the training images, and of the validation images if they are apart."""
    whole = _place(folder)
    inner = whole.images.is_dir()
    above = whole.images if inner else folder
    parts = parts_of(above, "images" if inner else "folders") if above.is_dir() else None
    if parts is None:
        return [whole], ()
    found = [part for part in (parts.training_part(), parts.valid) if part is not None]
    if inner:
        return [_Place(folder, part, whole.masks / part.name) for part in found], parts.skipped
    return [_place(part) for part in found], parts.skipped


def _read(
    place: _Place, preprocess: Preprocess, colours: Mapping[int, int]
) -> tuple[MaskFolder, Counter[int]]:
    """A place's pairs, without classes yet, and the pixels of each value in all masks."""
    pairs, skipped = _paired(place)
    read: list[tuple[Path, Path, Pair]] = []
    values: Counter[int] = Counter()
    for image, mask in pairs:
        try:
            check_usable(image, preprocess)  # as training will
            size = image_size(image)
            labels = read_mask(mask, colours)
        except ImageError as error:
            skipped.append(Unreadable(str(image), one_line(error)))
            continue
        if labels.shape != size:
            turned = " of the upright image" if labels.shape == size[::-1] else ""
            raise DatasetError(
                f"the mask {mask} must have a label for each pixel{turned}, {size[0]}x{size[1]} "
                f"for {image}, got {labels.shape[0]}x{labels.shape[1]}"
            )
        values.update(dict(zip(*(x.tolist() for x in np.unique(labels, return_counts=True)))))
        read.append((image, mask, size))
    if not read:
        raise DatasetError(
            f"none of the {len(pairs)} images in {place.images} can be read with its mask; the "
            f"first: {next((one for one in skipped if not one.passed_over), skipped[0])}"
        )
    images, masks, sizes = zip(*read)
    found = MaskFolder(images, masks, (), (), tuple(skipped), sizes=sizes, colours=colours)
    return found, values


@pages_warned_of_once()
def _read_parts(
    places: Sequence[_Place], names: tuple[str, ...], preprocess: PreprocessLike | None
) -> list[MaskFolder]:
    """The parts of a data set with valid labels; 255 has the same meaning in all."""
    classes = len(names)
    known = given_preprocess(preprocess, 3) or Preprocess.preset("unit")
    several = len(places) > 1
    parts = [_read(place, known, _colour_table(place, several, names)) for place in places]
    held = set().union(*(values for _, values in parts))
    binary = held == _BINARY and classes == 2
    if held == _BINARY and not binary:
        raise DatasetError(
            f"the masks of {places[0].folder} hold only 0 and {IGNORE_INDEX}, which is "
            f"ignored; save the {classes} classes as 0 to {classes - 1}"
        )
    found = []
    for place, (part, values) in zip(places, parts):
        wrong = sorted(v for v in values if v != IGNORE_INDEX and not 0 <= v < classes)
        if wrong:
            raise DatasetError(_wrong_label(part, wrong, classes))
        counts = tuple(values[IGNORE_INDEX if binary and i == 1 else i] for i in range(classes))
        if np.count_nonzero(counts) < 2:
            only = [name for name, n in zip(names, counts) if n]
            ignored = (
                f"; {IGNORE_INDEX} is ignored" if IGNORE_INDEX in values and not binary else ""
            )
            raise DatasetError(
                f"all labelled pixels of {place.folder} are of one class "
                f"({only[0] if only else f'{IGNORE_INDEX}, to be ignored'}); expected two or more"
                f"{ignored}"
            )
        found.append(replace(part, categories=names, counts=counts, binary=binary))
    return found


def _checked_categories(categories: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(categories, int) and not isinstance(categories, bool):
        names = tuple(map(str, range(categories)))
    elif isinstance(categories, Sequence) and not isinstance(categories, str):
        names = tuple(map(str, categories))
    else:
        raise ArgumentError(
            f"categories must be the names of the classes or a number, got {categories!r}"
        )
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise ArgumentError(f"categories must be 2 to {IGNORE_INDEX} classes, got {len(names)}")
    return distinct_names(names)


def _paired(place: _Place) -> tuple[list[tuple[Path, Path]], list[Unreadable]]:
    """Every image with its mask, and the files that are left out."""
    for folder in (place.images, place.masks):
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            name = place.folder.name
            raise DatasetError(
                f"{folder} {what}; expected {name}/{IMAGES}/NAME.jpg and {name}/{MASKS}/NAME.png, "
                f"or such folders in {name}/train and {name}/valid"
            )
    listed, masks = image_files(place.images), image_files(place.masks)
    if not listed.images:
        passed = left_out(listed.skipped, 0)
        raise DatasetError(
            f"there are no images in {place.images}" + (f" ({passed})" if passed else "")
        )
    images: dict[str, Path] = {}
    for image in listed.images:
        name = _stem(image, place.images)
        if name in images:
            raise DatasetError(
                f"{images[name]} and {image} would have the same mask, {image.stem}.png; rename one"
            )
        images[name] = image
    # a mask is called like its image, with its ending or without, before a suffix or not
    owners = {**{str(image.relative_to(place.images)): image for image in listed.images}, **images}
    found: dict[Path, list[Path]] = {image: [] for image in listed.images}
    skipped = [*listed.skipped, *masks.skipped]
    for mask in masks.images:
        name = _stem(mask, place.masks)
        owner = owners.get(name) or owners.get(_SUFFIX.sub("", name))
        if owner is None:
            skipped.append(Unreadable(str(mask), "a mask of no image", passed_over=True))
        else:
            found[owner].append(mask)
    pairs = []
    for image, own in found.items():
        expected = place.masks / image.relative_to(place.images).with_suffix(".png")
        if not own and not expected.parent.is_dir():
            skipped.append(Unreadable(str(image), f"there is no folder {expected.parent}", True))
        elif len(own) != 1:
            raise DatasetError(
                f"{image} has {len(own)} masks, {own[0]} and {own[1]}; expected one"
                if own
                else f"there is no mask for {image}; expected {expected}"
            )
        else:
            pairs.append((image, own[0]))
    return pairs, skipped


def _stem(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))


def _wrong_label(part: MaskFolder, wrong: Sequence[int], classes: int) -> str:
    for mask in part.masks:
        labels = read_mask(mask, part.colours)
        places = np.argwhere(np.isin(labels, wrong))
        if len(places):
            break
    y, x = places[0]
    return (
        f"the mask {mask} holds the label {labels[y, x]} at (y, x) = ({y}, {x}); expected 0 to "
        f"{classes - 1}, or {IGNORE_INDEX} for pixels to ignore"
    )


# -- images and masks as tensors ------------------------------------------------------------------


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """Preprocessed images ``(C, H, W)`` and their masks, int64 ``(H, W)``.

    Args:
        data: the files.
        fcn: for its dtype and its preprocessing, except for resizing.
        crop: the size of a random part; None for whole images.
        flip: mirror each image with probability 1/2.
    """

    def __init__(
        self, data: MaskFolder, fcn: FCN, crop: Pair | None = None, flip: bool = False
    ) -> None:
        assert fcn.preprocess is not None
        self.data = data
        self.crop = crop
        self.flip = flip
        self.channels = fcn.backbone.in_channels
        self.dtype = dtype_of(fcn)
        self.preprocess: Preprocess = replace(fcn.preprocess, resize=None)
        steps: list[v2.Transform] = []
        if crop is not None:
            fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE_INDEX}
            steps.append(v2.RandomCrop(crop, pad_if_needed=True, fill=fill))
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        self.transform = v2.Compose(steps) if steps else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels = self._pixels(index)
        labels = torch.from_numpy(self.data.labels(index))
        if self.transform is None:
            return pixels, labels
        image, mask = self.transform(tv_tensors.Image(pixels), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)

    def middles(self, count: int) -> Tensor:
        """The middles of the first images, never random, ``(N, C, H, W)``.

        They have the size of the crop, or of the smallest image along each axis.
        """
        images = [self._pixels(i) for i in range(min(count, len(self)))]
        least = [min(image.shape[dim] for image in images) for dim in (1, 2)]
        size = least if self.crop is None else [min(pair) for pair in zip(least, self.crop)]
        return torch.stack([v2.functional.center_crop(image, size) for image in images])

    def _pixels(self, index: int) -> Tensor:
        prepared = prepare(self.data.images[index], self.preprocess, self.channels)
        return prepared.tensor(self.preprocess)[0].to(self.dtype)


def collate_by_size(items: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Batches of equal size: one, or several where the images differ."""
    by_size: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for image, mask in items:
        by_size.setdefault(tuple(mask.shape), []).append((image, mask))
    return [
        (torch.stack([image for image, _ in same]), torch.stack([mask for _, mask in same]))
        for same in by_size.values()
    ]
