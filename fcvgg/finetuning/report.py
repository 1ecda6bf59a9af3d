"""The report of a fine-tuned network: figures, tables, and where it looked when it was wrong."""

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
from fcvgg.results.figures import save_figure
from fcvgg.results.heatmap import colour_bar
from fcvgg.support.atomic import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fcvgg.finetuning.result import FineTuned

SHOWN = 6
"""Mistakes with heatmaps."""

_FINER = 4
"""How much finer than the network's own stride the heatmaps are."""

_LEAST, _MOST = 1.5, 3.0
"""The smaller side at which images are seen for heatmaps, in windows: a window is one cell."""

_LEFT_OUT = 1000
"""Files that are listed by name."""

_LABELLED = 20
"""Classes up to which a confusion matrix has numbers."""


def write_report(result: FineTuned) -> Path:
    """Write ``report.md`` and its figures into the run's folder.

    Raises:
        FcvggError: if it cannot be written.
    """
    folder = result.report_path.parent
    folder.mkdir(exist_ok=True)
    figures = []
    if result.training is not None and result.training.history:
        save_figure(_curves(result), folder / "curves.png")
        figures.append(("Learning curves", "curves.png"))
    save_figure(_confusion(result), folder / "confusion.png")
    figures.append(("Confusion matrix", "confusion.png"))
    places, wrong = _worst(result)
    save_figure(_mistakes(result, places), folder / "mistakes.png")
    figures.append(
        (
            "The worst mistakes" if wrong else "No mistake; the least certain of the right ones",
            "mistakes.png",
        )
    )
    with written_whole(result.report_path) as temporary:
        temporary.write_text(_markdown(result, figures, places), encoding="utf-8")
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


def _curves(result: FineTuned) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    assert result.training is not None
    history = result.training.history
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    for ax, what in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        for part, label in (("train", "training, as it went"), ("valid", "held out")):
            values = [row[f"{part}_{what}"] for row in history]
            ax.plot(epochs, values, marker="o", markersize=3, label=label)
        best = result.training.best_epoch
        ax.axvline(best, color="grey", linestyle="--", label=f"best loss, epoch {best}")
        ax.set_xlabel("epoch")
        ax.set_ylabel(what)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        most = max(row[f"{part}_loss"] for row in history for part in ("train", "valid"))
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
    figure.colorbar(shown, ax=ax, fraction=0.046, pad=0.03).set_label("share of the class")
    ax.set_title(f"{result.accuracy:.1%} of {len(result.valid)} held-out images right")
    return figure


def _mistakes(result: FineTuned, places: list[int]) -> Figure:
    """Every image, and where the network sees the class that it named and the true one."""
    from matplotlib.figure import Figure

    net = _dense(result)
    figure = Figure(figsize=(9.4, 2.9 * len(places)), dpi=110, layout="constrained")
    grid = figure.subplots(len(places), 3, squeeze=False)
    for axes, place in zip(grid, places):
        assert net.preprocess is not None
        picture = read_picture(result.valid.paths[place], net.preprocess)
        given = result.probabilities[place]
        truth, named = result.valid.labels[place], int(given.argmax())
        other = truth if named != truth else int(given.argsort()[-2])
        score_map = net.score_map(_seen(picture, net))
        axes[0].imshow(picture.image, cmap="gray")
        axes[0].set_title(readable(result.valid.paths[place].name), fontsize=9, parse_math=False)
        for ax, index in zip(axes[1:], (named, other)):
            ax.imshow(score_map.heatmap(index).overlay())
            verb = "is" if index == truth else "called" if index == named else "next"
            said = f"{verb} {result.classes[index]}: {given[index]:.2f}"
            ax.set_title(said, fontsize=9, parse_math=False)
        for ax in axes:
            ax.set_axis_off()
    colour_bar(figure, grid[:, 2].tolist())
    return figure


def _dense(result: FineTuned) -> FullyConvolutional:
    """The network with a finer stride, where it has one."""
    stride = max(result.net.geometry.stride[0] // _FINER, 1)
    options: dict[str, Any] = {
        "input_size": result.size,
        "preprocess": result.net.preprocess,
        "categories": result.classes,
        "verify": False,
    }
    try:
        return convert(result.model, output_stride=stride, **options)
    except ConversionError:
        return convert(result.model, **options)


def _seen(picture: Picture, net: FullyConvolutional) -> Picture:
    """The picture at a size that gives several cells."""
    window = max(net.geometry.window)
    side = min(picture.size)
    wanted = min(max(side, round(_LEAST * window)), round(_MOST * window))
    return picture.resized(size_of_side(picture.size, wanted), "bilinear")


# -- text -------------------------------------------------------------------------------------


def _markdown(result: FineTuned, figures: list[tuple[str, str]], places: list[int]) -> str:
    parts = [
        _escaped(f"# {result.source} for {_listed(result.classes)}"),
        "",
        *(f"- {_escaped(line)}" for line in str(result).splitlines()),
        "",
        f"The network lies in `{readable(result.model_path)}`; "
        f"`{readable(result.heatmap_command)}` shows where it sees a class.",
        "",
        "## Images",
        "",
        _escaped(f"{result.origin[0].upper()}{result.origin[1:]}."),
        "",
        _table(
            ("class", "to train on", "held out", "right"),
            [
                (name, *result.counts[name], f"{share:.1%}")
                for name, share in result.class_accuracy.items()
            ],
        ),
        *(
            line
            for title, name in figures
            for line in ("", f"## {title}", "", f"![{title}]({name})")
        ),
        "",
        f"The classifier saw every image at {result.size[0]}x{result.size[1]} pixels, and the "
        "probabilities above the heatmaps are what it gave. The heatmaps are the converted "
        "network's on the image at its own or an enlarged size: they show the classes of its "
        "parts, and need not agree with the whole.",
        "",
        _table(
            ("image", "class", "predicted", "probability of its class"),
            [_mistake(result, place) for place in places],
        ),
        "",
        "## Settings",
        "",
        _table(("setting", "value"), list(_settings(result).items())),
        *_skipped(result),
        "",
    ]
    return "\n".join(parts)


def _settings(result: FineTuned) -> dict[str, Any]:
    recipe = {**asdict(result.recipe), "strategy": result.choice.strategy, "size": result.size}
    recipe["augment"] = result.recipe.augmented(result.choice.strategy)
    settings = asdict(result.settings) if result.training is not None else {}
    return {**recipe, **settings}


def _skipped(result: FineTuned) -> list[str]:
    if not result.skipped:
        return []
    used = sum(map(sum, result.counts.values()))
    lines = [f"- {_escaped(one)}" for one in result.skipped[:_LEFT_OUT]]
    more = len(result.skipped) - len(lines)
    return [
        *("", "## Files left out", ""),
        f"{_escaped(left_out(result.skipped, used))}.",
        "",
        *lines,
        *[f"- and {more:,} more"] * (more > 0),
    ]


def _mistake(result: FineTuned, place: int) -> tuple[Any, ...]:
    given = result.probabilities[place]
    truth = result.valid.labels[place]
    return (
        result.valid.paths[place],
        result.classes[truth],
        result.classes[int(given.argmax())],
        f"{given[truth]:.3f}",
    )


def _table(heading: tuple[str, ...], rows: list[Any]) -> str:
    lines = [heading, ("---",) * len(heading), *(map(_escaped, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(text: object) -> str:
    """Text on one line that Markdown shows as it is, in a table's cell too."""
    return re.sub(r"([\\|`*<>\[\]])", r"\\\1", readable(text))


def _listed(classes: tuple[str, ...]) -> str:
    few = 6
    return ", ".join(classes[:few]) + (f", ... ({len(classes)})" if len(classes) > few else "")
