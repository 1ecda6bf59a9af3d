"""How well a network does on labelled images, by the protocols of the VGG paper.

Dense evaluation, crops, and both combined (sections 3.2 and 4, tables 3 to 5 of
https://arxiv.org/abs/1409.1556). Crops go through the same converted network at its native size,
where it equals its source; metrics are torchmetrics'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fcvgg.categories import class_name
from fcvgg.choices import Average, Protocol, current_spelling
from fcvgg.errors import ArgumentError, DatasetError, ImageError, check_choice
from fcvgg.evaluation.cropping import centre_crop, grid_crops, ten_crops
from fcvgg.images.batching import run_in_batches
from fcvgg.images.datasets import LabelledImages
from fcvgg.images.files import Unreadable, left_out
from fcvgg.images.lazy.source import pages_warned_of_once
from fcvgg.images.preprocessing import NativeView
from fcvgg.images.reading import (
    PreparedImage,
    checked_flip,
    prepare,
    smaller_sides,
    with_size,
    with_smallest_side,
)
from fcvgg.names import counted, readable
from fcvgg.network import FullyConvolutional
from fcvgg.probability import MeanOfViews, to_probabilities
from fcvgg.rewriting.outputs import flattened
from fcvgg.support.atomic import JSON_ENDINGS, atomic_file, checked_file
from fcvgg.support.extras import imported
from fcvgg.support.module_state import device_of, dtype_of, evaluating
from fcvgg.support.progress import progress_bar
from fcvgg.support.tables import text_table

PROTOCOLS: dict[str, str] = {
    "center-crop": "center crop",
    "resize": "resize",
    "ten-crop": "10 crops",
    "dense": "whole image",
    "multi-crop": "50 crops",
    "dense+multi-crop": "both",
}
"""The protocols and what each feeds to the network from an image at one scale."""

DEFAULT_PROTOCOLS: tuple[Protocol, ...] = ("center-crop", "resize", "dense")

_COMBINED = {"dense+multi-crop": ("dense", "multi-crop")}

_TOP = 5
_CHUNK = 256
"""Images between two updates of the metrics."""

_LISTED = 20

_Views = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class ClassResult:
    """One class, by one protocol.

    Attributes:
        index: the class.
        name: its category.
        images: how many of the dataset have it as their label.
        precision: of the images given this class, the share that has it.
        recall: of the images that have it, the share given it: the class's accuracy.
        f1: the harmonic mean of both.
    """

    index: int
    name: str
    images: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, eq=False)
class ProtocolResult:
    """What one protocol gave.

    Attributes:
        protocol: its name, one of `fcvgg.evaluation.protocols.PROTOCOLS`.
        input: what it feeds to the network.
        scales: the smaller sides in pixels; for ``resize`` the native size ``(h, w)``.
        flip: whether mirror images were averaged in.
        views: the inputs that were run for an image.
        top1: share of the images whose label is the most probable class.
        top5: share whose label is among the five most probable; None for five classes or fewer.
        confusion: int64 ``(K, K)``: images by label (row) and most probable class (column).
        classes: a row per class that occurs as a label.
    """

    protocol: str
    input: str
    scales: tuple[int, ...]
    flip: bool
    views: int
    top1: float
    top5: float | None
    confusion: Tensor
    classes: tuple[ClassResult, ...]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well a network did on a dataset; printing it shows a table.

    Attributes:
        results: a `ProtocolResult` for each protocol; ``evaluation["dense"]`` finds one.
        images: how many images were used.
        categories: the class names, or None.
        average: what was averaged over the cells of dense maps.
        unreadable: the images that could not be used, and why.
        by_order: class names of the dataset that were matched to the network's classes by their
            order, since none is the name of a category.
        skipped: all files of a folder that were left out, and why: those in `unreadable`, and those
            that are not images.
        part: of a folder that holds parts of a data set, the one that was used; else None.
    """

    results: tuple[ProtocolResult, ...]
    images: int
    categories: tuple[str, ...] | None
    average: str
    unreadable: tuple[Unreadable, ...] = ()
    by_order: tuple[str, ...] = ()
    skipped: tuple[Unreadable, ...] = ()
    part: Path | None = None

    def __getitem__(self, protocol: str) -> ProtocolResult:
        results = {result.protocol: result for result in self.results}
        name = current_spelling(protocol)
        if name not in results:
            raise KeyError(f"protocol must be one of {', '.join(results)}, got {protocol!r}")
        return results[name]

    def __iter__(self) -> Iterator[ProtocolResult]:
        return iter(self.results)

    @property
    def headings(self) -> tuple[str, ...]:
        """Of `cells`; without top-5 where the network has fewer than six classes."""
        columns = ("protocol", "input", "scales", "flip", "views", "top-1", "top-5")
        return columns if self._has_top5 else columns[:-1]

    @property
    def _has_top5(self) -> bool:
        return any(r.top5 is not None for r in self.results)

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, a row per protocol, under `headings`."""
        return [
            (
                r.protocol,
                r.input,
                ("x" if r.protocol == "resize" else ", ").join(map(str, r.scales)),
                "yes" if r.flip else "no",
                str(r.views),
                f"{r.top1:.2%}",
                *(() if not self._has_top5 else ("" if r.top5 is None else f"{r.top5:.2%}",)),
            )
            for r in self.results
        ]

    @property
    def class_headings(self) -> tuple[str, ...]:
        """Of `class_cells`."""
        return ("class", "images", "precision", "recall", "F1")

    def class_cells(self, protocol: str | None = None) -> list[tuple[str, ...]]:
        """The classes as text, a row per class, under `class_headings`."""
        result = self.results[-1] if protocol is None else self[protocol]
        return [
            (c.name, str(c.images), f"{c.precision:.2%}", f"{c.recall:.2%}", f"{c.f1:.2%}")
            for c in result.classes
        ]

    def class_table(self, protocol: str | None = None) -> str:
        """A row per class that occurs: by one protocol, the last one if None."""
        return text_table([self.class_headings, *self.class_cells(protocol)])

    def remarks(self) -> list[str]:
        """Lines that belong under the table: what was evaluated, and what was left out."""
        return [*self.about(), *self._left_out()]

    def about(self) -> list[str]:
        """Lines on what was evaluated: how many images, and how classes were matched."""
        lines = [counted(self.images, "image")]
        if self.part is not None:
            lines.append(f"those of the part {readable(self.part)}")
        if self.by_order:
            pairs = [
                f"{name} = {class_name(i, self.categories)}" for i, name in enumerate(self.by_order)
            ]
            more = f", ... ({len(pairs)})" if len(pairs) > _TOP else ""
            lines.append(f"classes matched by their order: {', '.join(pairs[:_TOP])}{more}")
        return lines

    def _left_out(self) -> list[str]:
        lines = []
        count = counted(len(self.unreadable), "image")
        verb = "was" if len(self.unreadable) == 1 else "were"
        title = f"{count} could not be read and {verb} left out:"
        if len(self.skipped) > len(self.unreadable):
            lines.append(left_out(self.skipped, self.images))
            title = f"of these, {count} could not be read:"
        if self.unreadable:
            lines.append(title)
            lines += [f"  {one}" for one in self.unreadable[:_LISTED]]
            if len(self.unreadable) > _LISTED:
                lines.append(f"  and {len(self.unreadable) - _LISTED} more")
        return lines

    def __str__(self) -> str:
        return "\n".join([text_table([self.headings, *self.cells()], left=4), *self.remarks()])

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON, also written to `path` if given.

        Confusion matrices are lists of ``[label, prediction, images]`` for what occurs.

        Raises:
            FcvggError: if the name does not end in ``.json`` or ``.txt``, or the file cannot be
                written.
        """
        if path is not None:
            checked_file(path, "path", JSON_ENDINGS)
        text = json.dumps(self._plain(), indent=2, ensure_ascii=False)
        # a byte of a name that is not UTF-8 is a lone surrogate, which JSON holds as an escape
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        if path is not None:
            with atomic_file(Path(path)) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        return text

    def _plain(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "average": self.average,
            "categories": self.categories,
            "classes_by_order": self.by_order,
            "part": None if self.part is None else str(self.part),
            "unreadable": [{"name": u.name, "reason": u.reason} for u in self.unreadable],
            "skipped": [{"name": u.name, "reason": u.reason} for u in self.skipped],
            "protocols": [
                {
                    **vars(r),
                    "classes": [vars(c) for c in r.classes],
                    "confusion": [
                        [i, j, int(r.confusion[i, j])] for i, j in r.confusion.nonzero().tolist()
                    ],
                }
                for r in self.results
            ],
        }


@pages_warned_of_once()
def evaluate(
    net: FullyConvolutional,
    dataset: Any,
    *,
    protocols: Iterable[str] | str = DEFAULT_PROTOCOLS,
    scales: Sequence[int] | int | None = None,
    flip: bool = False,
    average: Average = "scores",
    model: nn.Module | None = None,
    nodata: float | str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Accuracy on labelled images, by dense evaluation and by crops.

    Args:
        net: the converted network.
        dataset: a folder with one folder of images per class, a torchvision `ImageFolder`, or any
            dataset of ``(image, label)``, with images as for ``net.score_map``. Class folders are
            matched to the categories by name, else in sorted order. Of a folder with parts that
            hold class folders, the part to test on is taken, or else the one to validate on; see
            `fcvgg.images.datasets`. Files that are not images, or that cannot be read, are left
            out and listed.
        protocols: one or more of ``"center-crop"``, ``"resize"`` (the whole image, squeezed to the
            native size), ``"ten-crop"``, ``"dense"`` (as ``net.classify``), ``"multi-crop"`` (a 5x5
            grid and its mirror images, 50 crops per scale), ``"dense+multi-crop"`` (the average of
            both, as in the paper's table 5); or ``"all"``.
        scales: lengths of the smaller side to which an image is rescaled before it is evaluated or
            cropped; probabilities are averaged over them. ``net.usual_scale`` if None, which is 256
            for a native size of 224; the center crop is then that of ``net.preprocess.view``, if it
            has one. Below the window, or the native size for crops, zeros are padded.
        flip: average in the mirror image; ten-crop and multi-crop always do.
        average: what is averaged over the cells of a dense map, as for ``net.classify``.
        model: the source model to run crops with, in place of the network at its native size.
        nodata: pixels of this value enter no score, as for `fcvgg.open_image`; an image where a
            protocol has no cell or no crop with data is left out and listed.
        progress: show a progress bar on stderr.

    Raises:
        DatasetError: if there are no images, or none can be read.
        CategoryError: if a label is not a class of the network.
        MissingExtraError: if torchmetrics is not installed.
    """
    names = _checked_protocols(protocols)
    check_choice("average", average, get_args(Average))
    data = LabelledImages(dataset, net.categories, net.num_classes)
    sides = smaller_sides(net.usual_scale if scales is None else scales)
    plan = _Plan(names, sides, checked_flip(flip), _own_view(net) if scales is None else None)
    tallies = {name: _Tally(net.num_classes) for name in names}
    run = _Run(net, model, data, plan, average, nodata)
    with progress_bar("images", data.count, progress) as advance:
        for label, predictions in run.predictions(advance):
            for name, tally in tallies.items():
                tally.add(predictions[name], label)
    if not run.used:
        first = f": {run.unreadable[0]}" if run.unreadable else ""
        if data.skipped:
            first += f"; {left_out((*data.skipped, *run.unreadable), 0)}"
        raise DatasetError(f"none of the dataset's {len(run.unreadable)} images can be used{first}")
    results = (_result(name, plan, tallies[name], net) for name in names)
    return Evaluation(
        results=tuple(results),
        images=run.used,
        categories=net.categories,
        average=average,
        unreadable=tuple(run.unreadable),
        by_order=data.by_order,
        skipped=(*data.skipped, *run.unreadable),
        part=data.part,
    )


# -- views ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Which protocols are run, and how."""

    names: tuple[str, ...]
    scales: tuple[int, ...]
    flip: bool
    view: NativeView | None = None
    """The resize and center crop of the source's own pipeline."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The protocols that have views of their own."""
        parts = (part for name in self.names for part in _COMBINED.get(name, (name,)))
        return tuple(dict.fromkeys(parts))

    def views(self, part: str) -> int:
        if part in _COMBINED:
            return sum(map(self.views, _COMBINED[part]))
        scales = 1 if part == "resize" else len(self.scales)  # one too where there is a view
        crops = {"ten-crop": 10, "multi-crop": 50}
        return scales * crops.get(part, 1 + self.flip)

    def sides(self, name: str) -> tuple[int, ...]:
        """The smaller sides to which images are rescaled."""
        resize = self.view.resize if name == "center-crop" and self.view is not None else None
        if resize is None:
            return self.scales
        return (resize if isinstance(resize, int) else min(resize),)

    def flips(self, name: str) -> bool:
        return self.flip or name not in ("center-crop", "resize", "dense")


def _own_view(net: FullyConvolutional) -> NativeView | None:
    """The view of the source's own pipeline, if it gives the native size."""
    view = None if net.preprocess is None else net.preprocess.view
    return view if view is not None and net.input_size == (view.crop or view.resize) else None


@dataclass
class _Pending:
    """The means of an image's probabilities so far, and how many views are still to come."""

    name: str
    label: int
    missing: int
    means: dict[str, MeanOfViews]


@dataclass
class _Run:
    """One pass over the dataset."""

    net: FullyConvolutional
    model: nn.Module | None
    data: LabelledImages
    plan: _Plan
    average: Average
    nodata: float | str | None = None
    used: int = 0
    unreadable: list[Unreadable] = field(default_factory=list)
    _pending: dict[int, _Pending] = field(default_factory=dict)

    def predictions(
        self, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Every image's label and its probabilities ``(K,)`` by every protocol."""
        # Views of one size run in batches across images, so they come back out of order: an image
        # is complete when its last view is, and only means are kept until then.
        parts = self.plan.parts
        for (number, part), row in run_in_batches(self._inputs(advance), self._probabilities):
            pending = self._pending[number]
            pending.means[part].add(row)
            pending.missing -= 1
            if pending.missing:
                continue
            del self._pending[number]
            means = {p: pending.means[p].value() for p in parts}
            if not all(mean.isfinite().all() for mean in means.values()):
                self._leave_out(Unreadable(pending.name, "no cell or no crop has data"), advance)
                continue
            self.used += 1
            for name, both in _COMBINED.items():
                if name in self.plan.names:
                    means[name] = torch.stack([means[p] for p in both]).mean(0)  # (K,)
            advance(1)
            yield pending.label, means

    def _inputs(
        self, advance: Callable[[int], None]
    ) -> Iterator[tuple[tuple[int, str], bool, Tensor]]:
        """All views of all images, each with whether it is a crop."""
        parts = self.plan.parts
        for number, item in enumerate(self.data):
            if isinstance(item, Unreadable):
                self._leave_out(item, advance)
                continue
            try:
                image = prepare(item.image, self.net.preprocess, self.net.in_channels, self.nodata)
            except ImageError as error:
                self._leave_out(Unreadable(item.name, str(error)), advance)
                continue
            views = sum(map(self.plan.views, parts))
            means = {part: MeanOfViews() for part in parts}
            self._pending[number] = _Pending(item.name, item.label, views, means)
            for part, pixels in self._views(image, parts):
                yield (number, part), part != "dense", pixels

    def _leave_out(self, image: Unreadable, advance: Callable[[int], None]) -> None:
        self.unreadable.append(image)
        advance(1)

    def _views(self, image: PreparedImage, parts: Sequence[str]) -> _Views:
        if "resize" in parts:
            squeezed = with_size(image, self.net.input_size)
            yield from _flipped("resize", squeezed.tensor(self.net.preprocess), self.plan.flip)
        if "center-crop" in parts and self.plan.view is not None and image.values is not None:
            assert self.net.preprocess is not None
            crop = self.net.preprocess.native_input(image.values.pixels)
            yield from _flipped("center-crop", crop, self.plan.flip)
            parts = [part for part in parts if part != "center-crop"]
        if not set(parts) - {"resize"}:
            return
        for scale in self.plan.scales:
            pixels = with_smallest_side(image, scale).tensor(self.net.preprocess)
            yield from self._views_at_scale(pixels, parts)

    def _views_at_scale(self, pixels: Tensor, parts: Sequence[str]) -> _Views:
        size = self.net.input_size
        if "dense" in parts:
            yield from _flipped("dense", pixels, self.plan.flip)
        if "center-crop" in parts:
            yield from _flipped("center-crop", centre_crop(pixels, size), self.plan.flip)
        if "ten-crop" in parts:
            yield from (("ten-crop", crop) for crop in ten_crops(pixels, size))
        if "multi-crop" in parts:
            yield from (("multi-crop", crop) for crop in grid_crops(pixels, size))

    def _probabilities(self, crops: bool, batch: Tensor) -> Tensor:
        """The class probabilities ``(N, K)`` of a batch of crops, or of whole images."""
        if not crops:
            return self.net.classify(batch, average=self.average)
        return to_probabilities(self._crop_scores(batch), self.net.activation, 1)

    def _crop_scores(self, batch: Tensor) -> Tensor:
        """The source's scores ``(N, K)`` of images of the native size."""
        reference = self.net if self.model is None else self.model
        batch = batch.to(device_of(reference), dtype_of(reference))
        with torch.no_grad(), evaluating(reference):
            scores = reference(batch)
        if self.model is None:
            return self.net.native_scores(scores)[0]  # (N, K)
        return flattened(scores)[0][0].reshape(len(batch), -1)


def _flipped(part: str, pixels: Tensor, flip: bool) -> _Views:
    yield part, pixels
    if flip:
        yield part, pixels.flip(-1)


def _checked_protocols(protocols: Iterable[str] | str) -> tuple[str, ...]:
    given = (protocols,) if isinstance(protocols, str) else protocols
    names = tuple(dict.fromkeys(map(current_spelling, given)))
    if names == ("all",):
        return tuple(PROTOCOLS)
    wrong = [name for name in names if name not in PROTOCOLS]
    if wrong or not names:
        raise ArgumentError(
            f"protocols must be all, or some of {', '.join(PROTOCOLS)}, got "
            f"{wrong[0] if wrong else 'none'}"
        )
    return names


# -- counting -------------------------------------------------------------------------------------


class _Tally:
    """torchmetrics' counts of one protocol.

    A network of one class is judged as two: absent and present.
    """

    def __init__(self, classes: int):
        torchmetrics = imported("torchmetrics", "eval")
        metrics = torchmetrics.classification
        self.judged = count = max(classes, 2)
        self.metrics = torchmetrics.MetricCollection(
            {
                "top1": metrics.MulticlassAccuracy(count, average="micro"),
                "top5": metrics.MulticlassAccuracy(count, average="micro", top_k=min(_TOP, count)),
                "confusion": metrics.MulticlassConfusionMatrix(count),
                "precision": metrics.MulticlassPrecision(count, average=None),
                "recall": metrics.MulticlassRecall(count, average=None),
                "f1": metrics.MulticlassF1Score(count, average=None),
            },
            compute_groups=False,
        )
        self.waiting: list[tuple[Tensor, int]] = []

    def add(self, probabilities: Tensor, label: int) -> None:
        if len(probabilities) == 1:
            probabilities = torch.cat([1 - probabilities, probabilities])  # absent, present
        self.waiting.append((probabilities, label))
        if len(self.waiting) >= _CHUNK:
            self._update()

    def _update(self) -> None:
        if self.waiting:
            rows, labels = zip(*self.waiting)
            self.metrics.update(torch.stack(rows), torch.tensor(labels))
            self.waiting.clear()

    def compute(self) -> dict[str, Tensor]:
        self._update()
        return self.metrics.compute()  # type: ignore[no-any-return]


def _result(name: str, plan: _Plan, tally: _Tally, net: FullyConvolutional) -> ProtocolResult:
    values = tally.compute()
    labels = values["confusion"].sum(1).tolist()
    names = net.categories if net.num_classes > 1 else ("absent", class_name(0, net.categories))
    classes = [
        ClassResult(i, class_name(i, names), images, *(float(values[m][i]) for m in _PER_CLASS))
        for i, images in enumerate(labels)
        if images
    ]
    return ProtocolResult(
        protocol=name,
        input=PROTOCOLS[name],
        scales=net.input_size if name == "resize" else plan.sides(name),
        flip=plan.flips(name),
        views=plan.views(name),
        top1=float(values["top1"]),
        top5=float(values["top5"]) if tally.judged > _TOP else None,
        confusion=values["confusion"].long(),
        classes=tuple(classes),
    )


_PER_CLASS = ("precision", "recall", "f1")
