"""The report of a fine-tuned network: figures, tables, and heatmaps of the worst mistakes."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvgg.conversion import convert
from fcvgg.errors import ConversionError
from fcvgg.images.files import left_out
from fcvgg.images.pictures import Picture
from fcvgg.images.preprocessing import size_of_side
from fcvgg.images.reading import read_picture
from fcvgg.names import readable
from fcvgg.network import FullyConvolutional
from fcvgg.results.drawing import BAR, colour_bar, panels
from fcvgg.results.figures import draw_heatmap, save_figure
from fcvgg.support.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fcvgg.finetuning.result import FineTuned
    from fcvgg.training.loop import TrainingRun

SHOWN = 6
"""The number of mistakes with heatmaps."""

_FINER = 4
"""How much finer than the network's own stride the heatmaps are."""

_LEAST, _MOST = 2.5, 3.0
"""Limits of an image's smaller side for heatmaps, in windows; one window gives one cell."""

_LEFT_OUT = 1000
"""The most skipped files that are listed by name."""

_PANEL = 2.6
"""Inches of the width of a mistake's pictures."""

_LABELLED = 20
"""The most classes for which a confusion matrix has numbers."""


def write_report(result: FineTuned) -> Path:
    """Write ``report.md`` and its figures into the run's folder.

    Raises:
        FcvggError: if it cannot be written.
    """
    folder = result.report_path.parent
    folder.mkdir(exist_ok=True)
    places, wrong = _worst(result)
    title = "The worst mistakes" if wrong else "No mistake; the least certain of the right ones"
    figures = {"Confusion matrix": _confusion(result), title: _mistakes(result, places)}
    names = {"Confusion matrix": "confusion.png", title: "mistakes.png"}
    if result.training is not None and result.training.history:
        figures["Learning curves"] = _curves(result.training)
        names = {"Learning curves": "curves.png", **names}
    for title, figure in figures.items():
        save_figure(figure, folder / names[title])
    with atomic_file(result.report_path) as temporary:
        temporary.write_text(_markdown(result, names, places), encoding="utf-8")
    return result.report_path


def _worst(result: FineTuned) -> tuple[list[int], bool]:
    """The held-out images with the least probability of their class, and whether any is wrong."""
    truth = np.array(result.valid.labels)
    own = result.probabilities[np.arange(len(truth)), truth]
    wrong = result.probabilities.argmax(1) != truth
    places = np.argsort(own, kind="stable")
    places = places[wrong[places]] if wrong.any() else places
    return [int(i) for i in places[:SHOWN]], bool(wrong.any())


# -- figures ----------------------------------------------------------------------------------


def _curves(run: TrainingRun) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in run.history]
    most = max(row[f"{part}_loss"] for row in run.history for part in ("train", "valid"))
    figure = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    for ax, what in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        for part, label in (("train", "training"), ("valid", "held out")):
            values = [row[f"{part}_{what}"] for row in run.history]
            ax.plot(epochs, values, marker="o", markersize=3, label=label)
        label = f"best loss, epoch {run.best_epoch}"
        ax.axvline(run.best_epoch, color="grey", linestyle="--", label=label)
        ax.set_xlabel("epoch")
        ax.set_ylabel(what)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylim(0, 1.02 if what == "accuracy" else most * 1.05)
        ax.grid(alpha=0.3)
        ax.legend()
    return figure


def _confusion(result: FineTuned) -> Figure:
    from matplotlib.figure import Figure

    table = result.confusion
    shares = table / table.sum(1, keepdims=True)
    classes = result.classes
    side = min(max(2.6 + 0.55 * len(classes), 4.2), 14)
    figure = Figure(figsize=(side + 0.8, side), dpi=110, layout="constrained")
    ax = figure.subplots()
    shown = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    ax.set_xticks(ticks, classes, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    ax.set_yticks(ticks, classes, parse_math=False)
    ax.set_xlabel("predicted")
    ax.set_ylabel("class")
    if len(classes) <= _LABELLED:
        for row, col in np.ndindex(*table.shape):
            dark = shares[row, col] > 0.5
            ax.text(col, row, table[row, col], ha="center", va="center", color="wk"[not dark])
    colour_bar(shown, ax).set_label("share of the class")
    ax.set_title(f"{result.accuracy:.1%} of {len(result.valid)} held-out images right")
    return figure


def _mistakes(result: FineTuned, places: list[int]) -> Figure:
    """Every image, with heatmaps of the predicted class and of the true one."""
    net = _dense(result)
    assert net.preprocess is not None
    pictures = [read_picture(result.valid.paths[place], net.preprocess) for place in places]
    heights = [_PANEL * min(h / w, 2) for h, w in (picture.size for picture in pictures)]
    made = panels([_PANEL] * 3, heights, titles=["one line"], points=9, right=(BAR,))
    for axes, place, picture in zip(made.axes, places, pictures):
        probabilities = result.probabilities[place]
        truth, predicted = result.valid.labels[place], int(probabilities.argmax())
        other = truth if predicted != truth else int(probabilities.argsort()[-2])
        score_map = net.score_map(_scaled(picture, net))
        axes[0].imshow(picture.image, cmap="gray")
        axes[0].set_title(readable(result.valid.paths[place].name), fontsize=9, parse_math=False)
        for ax, index in zip(axes[1:], (predicted, other)):
            heatmap = draw_heatmap(ax, score_map, index, contours=())
            role = "true" if index == truth else "predicted" if index == predicted else "second"
            title = f"{role}: {result.classes[index]}, {probabilities[index]:.2f}"
            ax.set_title(title, fontsize=9, parse_math=False)
    heatmap.draw_bar(made.axes, (), cax=made.bar())
    return made.figure


def _dense(result: FineTuned) -> FullyConvolutional:
    """The network with a finer stride, if it can have one."""
    stride = max(result.net.geometry.stride[0] // _FINER, 1)
    try:
        net = convert(result.model, input_size=result.size, output_stride=stride, verify=False)
    except ConversionError:
        return result.net
    net.preprocess, net.categories = result.net.preprocess, result.classes
    return net


def _scaled(picture: Picture, net: FullyConvolutional) -> Picture:
    """The picture at a size that gives several cells."""
    window = max(net.geometry.window)
    side = min(picture.size)
    side = min(max(side, round(_LEAST * window)), round(_MOST * window))
    return picture.resized(size_of_side(picture.size, side), "bilinear")


# -- text -------------------------------------------------------------------------------------


def _markdown(result: FineTuned, figures: dict[str, str], places: list[int]) -> str:
    """The report; `figures` are the names of files by title."""
    classes = [
        (name, *result.counts[name], f"{share:.1%}")
        for name, share in result.class_accuracy.items()
    ]
    sections = [
        _escaped(f"# {result.source} for {_listed(result.classes)}"),
        "\n".join(f"- {_escaped(line)}" for line in str(result).splitlines()),
        f"The network is in `{readable(result.model_path)}`; "
        f"`{readable(result.heatmap_command)}` shows where it sees a class.",
        "## Images",
        _escaped(f"{result.origin[0].upper()}{result.origin[1:]}."),
        _table(("class", "training images", "held out", "right"), classes),
        *(f"## {title}\n\n![{title}]({name})" for title, name in figures.items()),
        f"The classifier saw every image at {result.size[0]}x{result.size[1]} pixels, and the "
        "probabilities above the heatmaps are its own. The heatmaps are those of the converted "
        "network on the image at its own or an enlarged size: they show the classes of parts, and "
        "may differ from the class of the whole image.",
        _table(
            ("image", "class", "predicted", "probability of its class"),
            [_mistake(result, place) for place in places],
        ),
        "## Settings",
        _table(("setting", "value"), list(_settings(result).items())),
    ]
    if result.skipped:
        used = sum(map(sum, result.counts.values()))
        lines = [f"- {_escaped(one)}" for one in result.skipped[:_LEFT_OUT]]
        more = len(result.skipped) - len(lines)
        lines += [f"- and {more:,} more"] * (more > 0)
        summary = f"{_escaped(left_out(result.skipped, used))}."
        sections += ["## Files left out", summary, "\n".join(lines)]
    return "\n\n".join(sections) + "\n"


def _mistake(result: FineTuned, place: int) -> tuple[Any, ...]:
    probabilities = result.probabilities[place]
    truth = result.valid.labels[place]
    predicted = result.classes[int(probabilities.argmax())]
    path = result.valid.paths[place]
    return path, result.classes[truth], predicted, f"{probabilities[truth]:.3f}"


def _settings(result: FineTuned) -> dict[str, Any]:
    return {
        **asdict(result.recipe),
        "strategy": result.choice.strategy,
        "size": result.size,
        **(asdict(result.settings) if result.training is not None else {}),
    }


def _table(heading: tuple[str, ...], rows: list[Any]) -> str:
    lines = [heading, ("---",) * len(heading), *(map(_escaped, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(text: object) -> str:
    """Text on one line that Markdown shows as it is, in a table's cell too."""
    return re.sub(r"([\\|`*<>\[\]])", r"\\\1", readable(text))


def _listed(classes: tuple[str, ...]) -> str:
    few = 6
    return ", ".join(classes[:few]) + (f", ... ({len(classes)})" if len(classes) > few else "")
