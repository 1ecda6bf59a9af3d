"""Which image classifiers convert: of torchvision, timm, transformers, ultralytics, Keras, ONNX.

Each architecture gets random weights and is converted. It is *exact* if, in float64, the network
gives the model's scores at the native size and a shifted crop gives the shifted cell, both to
1e-10 of the largest score. It is *refused* if `fcvgg.convert` says which layer keeps it from being
exact. Anything else (*wrong*, *crash*, *timeout*) is a fault of fcvgg.

The rows are kept in zoo.json, next to this script, and a table by family in zoo.md. A row that is
there is not computed again, unless ``--again`` asks for it.

Usage: python examples/benchmarks/zoo.py [--library timm] [--only 'resnet*'] [--again]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fcvgg
from fcvgg.loading import read_source
from zoo_models import (
    KERAS,
    ONNX_LEFT_OUT,
    TIMM,
    TRANSFORMERS_CHANGES,
    TRANSFORMERS_LEFT_OUT,
    ULTRALYTICS,
)

LIMIT = 60
"""Seconds of processor time for one model."""

TOLERANCE = 1e-10
KERAS_TOLERANCE = 1e-5
"""Of the scores that Keras itself gives, in float32."""

CLASSES = 10
SMALL_SIZES = (64, 128)
"""Native sizes tried for a model that takes any, which save time."""

LARGE_MODEL = 75_000_000
"""Parameters from which on half of the smallest of these sizes is tried first."""

GUIDE = Path(__file__).parents[1] / "guides" / "architectures.md"
MARK = "<!-- The rest of this page is written by examples/benchmarks/zoo.py. -->"

RESULTS = ("exact", "refused", "wrong", "crash", "timeout")


@dataclass(frozen=True)
class Row:
    """What became of one architecture; `error` is relative to the largest score."""

    library: str
    family: str
    name: str
    result: str
    message: str
    seconds: float
    input_size: int | None = None
    parameters: int | None = None
    error: float | None = None


@dataclass(frozen=True)
class Entry:
    """One architecture: how it is built, and the size that its authors trained it at."""

    library: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    size: int = 224


# -- the architectures ----------------------------------------------------------------------------


def torchvision_entries() -> Iterator[Entry]:
    """All classifiers of torchvision; its modules are the families."""
    models = torchvision.models
    for name in models.list_models(module=models):
        family = models.get_model_builder(name).__module__.rpartition(".")[2]
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = 299 if name == "inception_v3" else 256 if name.startswith("swin_v2") else 224

        def build(name: str = name, options: dict[str, bool] = options) -> nn.Module:
            return models.get_model(name, weights=None, num_classes=CLASSES, **options)

        yield Entry("torchvision", family, name, build, size)


def timm_entries() -> Iterator[Entry]:
    """Small members of every family of timm's; its modules are the families."""
    import timm

    for family, names in TIMM.items():
        for name in names.split():

            def build(name: str = name) -> nn.Module:
                return timm.create_model(name, num_classes=CLASSES)

            trained = timm.get_pretrained_cfg(name)
            size = trained.test_input_size or trained.input_size if trained else (3, 224, 224)
            yield Entry("timm", family, name, build, size[-1])


def transformers_entries() -> Iterator[Entry]:
    """Every image classifier of transformers, from its default configuration."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASS_NAMES,
    )

    for family, class_names in CLASS_NAMES.items():
        if family in TRANSFORMERS_LEFT_OUT:
            continue
        name = class_names if isinstance(class_names, str) else class_names[0]

        changes = TRANSFORMERS_CHANGES.get(family, {})
        config = transformers.AutoConfig.for_model(family, num_labels=CLASSES, **changes)

        def build(name: str = name, config: Any = config) -> nn.Module:
            return getattr(transformers, name)(config)

        size = getattr(getattr(config, "vision_config", config), "image_size", 224)
        yield Entry("transformers", family, family, build, size if isinstance(size, int) else 224)


def ultralytics_entries() -> Iterator[Entry]:
    """Its classifiers of version 8 and later, from their configurations."""
    for family, names in ULTRALYTICS.items():
        for name in names.split():

            def build(name: str = name) -> nn.Module:
                from ultralytics.nn.tasks import ClassificationModel

                return ClassificationModel(f"{name}.yaml", nc=CLASSES, verbose=False)

            yield Entry("ultralytics", family, name, build)


def keras_entries() -> Iterator[Entry]:
    """Small members of every family of keras.applications, from files that Keras writes."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    for family, names in KERAS.items():
        for name in names.split():
            yield Entry("keras", family, name, partial(from_keras, name))


def from_keras(name: str) -> nn.Module:
    """One of keras.applications as it is read from a file, whose scores are Keras's own."""
    from keras import applications

    with torch.device("cpu"), tempfile.TemporaryDirectory() as folder:
        theirs = getattr(applications, name)(weights=None, classes=CLASSES)
        path = Path(folder) / f"{name}.keras"
        theirs.save(path)
        model = read_source(str(path))[0].eval()
        height, width = theirs.input_shape[1:3]
        images = 255 * torch.rand(1, 3, height, width)
        expected = torch.as_tensor(theirs.predict(images.permute(0, 2, 3, 1).numpy(), verbose=0))
        with torch.no_grad():
            error = (model(images).flatten(1) - expected).abs().max() / expected.abs().max()
    assert error <= KERAS_TOLERANCE, f"{error:.2g} off Keras's scores"
    return model


def onnx_entries() -> Iterator[Entry]:
    """The light models that the package onnx ships, files of 2015 to 2017 without weights."""
    import onnx

    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    for path in sorted(folder.glob("light_*.onnx")):
        name = path.stem.removeprefix("light_")
        if name in ONNX_LEFT_OUT:
            continue

        def build(path: Path = path) -> nn.Module:
            with torch.device("cpu"):
                return read_source(str(path), verify=False)[0].eval()

        yield Entry("onnx", "light models", name, build)


LIBRARIES = {
    "torchvision": torchvision_entries,
    "timm": timm_entries,
    "transformers": transformers_entries,
    "ultralytics": ultralytics_entries,
    "keras": keras_entries,
    "onnx": onnx_entries,
}


# -- one model ------------------------------------------------------------------------------------


def examine(entry: Entry) -> Row:
    """Convert one architecture and compare the two, with the seconds that it takes."""
    began = time.process_time()
    known: dict[str, Any] = {}
    try:
        result, message, known = outcome(entry)
    except Exception as fault:
        place = traceback.extract_tb(fault.__traceback__)[-1].name
        result, message = "crash", f"{type(fault).__name__}: {fault} ({place})".replace("\n", " ")
    seconds = round(time.process_time() - began, 1)
    return Row(entry.library, entry.family, entry.name, result, message, seconds, **known)


def outcome(entry: Entry) -> tuple[str, str, dict[str, Any]]:
    """What becomes of an architecture: the result, its message, and the last fields of `Row`."""
    try:
        size = converting_size(entry)
    except fcvgg.FcvggError as refusal:
        return "refused", re.sub(r"/\S*/(?=\S+: )", "", str(refusal)), {}  # without a file's folder
    model = with_weights(entry, size)
    net = fcvgg.convert(model, input_size=size, verify=False)
    report = fcvgg.verify(model, net, tolerance=TOLERANCE)
    error = max(report.max_rel_error, report.translation_error)
    parameters = sum(p.numel() for p in model.parameters())
    known = {"input_size": size, "parameters": parameters, "error": error}
    return ("exact", "", known) if error <= TOLERANCE else ("wrong", str(report), known)


def converting_size(entry: Entry) -> int:
    """The size to convert at: what a fixed head asks for, or one as small as the layers allow.

    The model is on the meta device, so that one which is refused needs no memory.

    Raises:
        FcvggError: if the model does not convert at the size that it was trained at.
    """
    model = built(entry, "meta")
    fcvgg.convert(model, input_size=entry.size, verify=False)
    large = sum(p.numel() for p in model.parameters()) >= LARGE_MODEL
    for size in (None, *([SMALL_SIZES[0] // 2] if large else []), *SMALL_SIZES):
        with contextlib.suppress(fcvgg.FcvggError):
            return fcvgg.convert(model, input_size=size, verify=False).input_size[0]
    return entry.size


def built(entry: Entry, device: str) -> nn.Module:
    """The model without data, or with data where its code computes with it."""
    try:
        with torch.device(device):
            return entry.build().eval()
    except (RuntimeError, NotImplementedError):  # `.item()` of a tensor without data
        return entry.build().eval()


@torch.no_grad()
def with_weights(entry: Entry, size: int) -> nn.Module:
    """The model with random weights of which every one matters, in float64.

    Layers that start as the identity, or as zero, would hide what becomes of their input. Batch
    norms take the statistics of a batch of noise, so that signals neither vanish nor explode.
    """
    torch.manual_seed(0)
    model = entry.build().double().eval()
    for parameter in model.parameters():
        if parameter.numel() == 1 or parameter.ndim < 2 or parameter.std() == 0:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if norms:
        for norm in norms:
            norm.train().momentum = 1.0
        model(torch.randn(4, 3, size, size, dtype=torch.float64))
    return model.eval()


# -- each in a process of its own -----------------------------------------------------------------


def examine_apart(entry: Entry) -> Row:
    """Examine a model in a child process, whose time is limited and whose memory is given back."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=_examine_and_send, args=(entry, sender)
    )
    began = time.monotonic()
    child.start()
    sender.close()
    row = None
    with contextlib.suppress(EOFError):  # the child ended without a word
        if receiver.poll(10 * LIMIT):  # processor time is what counts: the machine may be shared
            row = receiver.recv()
    child.kill()
    child.join()
    if row is not None:
        return row
    late = child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
    message = f"more than {LIMIT} s" if late else f"the process ended with {child.exitcode}"
    result = "timeout" if late else "crash"
    seconds = round(time.monotonic() - began, 1)
    return Row(entry.library, entry.family, entry.name, result, message, seconds)


def _examine_and_send(entry: Entry, sender: Connection) -> None:
    used = int(time.process_time())  # a forked process starts at zero, others do not
    resource.setrlimit(resource.RLIMIT_CPU, (used + LIMIT, used + LIMIT + 5))
    warnings.simplefilter("ignore")
    sender.send(examine(entry))


# -- what is kept ---------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def write(rows: Iterable[Row], path: Path) -> None:
    """zoo.json, one line for each row, and zoo.md; a run that is stopped leaves whole files."""
    rows = sorted(rows, key=lambda r: (list(LIBRARIES).index(r.library), r.family, r.name))
    libraries = sorted({row.library for row in rows})
    versions = {name: importlib.metadata.version(name) for name in ("torch", *libraries)}
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    text = f'{{\n "versions": {json.dumps(versions)},\n "rows": [\n{lines}\n ]\n}}\n'
    for target, content in ((path, text), (path.with_suffix(".md"), table(rows))):
        unfinished = target.with_suffix(".partial")
        unfinished.write_text(content)
        os.replace(unfinished, target)


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows have each result."""
    results = [row.result for row in rows]
    return {result: results.count(result) for result in RESULTS if result in results}


REASONS = {
    "recurrent": "recurrent layers",
    "attention": "attention",
    "squeeze-and-excitation": "a pool over the whole map (squeeze-and-excitation and the like)",
    "statistics": "statistics of the whole map",
    "resizing": "resizing",
    "mixes positions": "layers that mix positions",
    "without counting the padding": "an average pool that does not count its uneven padding",
}
"""From a word of a refusal to what the table says; the first that is found counts."""


def reason(row: Row) -> str:
    """Why a model is refused, in a few words."""
    return next((short for word, short in REASONS.items() if word in row.message), row.message)


def table(rows: Iterable[Row]) -> str:
    """One line for each library with its counts, and one for each family, as markdown."""
    by_library: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        by_library.setdefault(row.library, {}).setdefault(row.family, []).append(row)
    lines = ["| library | architectures | exact | refused |", "| --- | ---: | ---: | ---: |"]
    for library, families in by_library.items():
        found = counts(row for members in families.values() for row in members)
        numbers = sum(found.values()), found.get("exact", 0), found.get("refused", 0)
        lines.append(f"| {library} | {' | '.join(map(str, numbers))} |")
    for library, families in by_library.items():
        lines += ["", f"**{library}**", "", "| family | exact | refused | because of |"]
        lines.append("| --- | --- | --- | --- |")
        for family, members in families.items():
            exact = ", ".join(row.name for row in members if row.result == "exact")
            others = [row for row in members if row.result != "exact"]
            because = "; ".join(dict.fromkeys(reason(row) for row in others))
            names = ", ".join(row.name for row in others)
            lines.append(f"| {family} | {exact} | {names} | {because} |")
    return "\n".join(lines) + "\n"


def update_guide(rows: Iterable[Row]) -> None:
    """Put the table into the guide, after the line that says where it begins."""
    text, mark, _ = GUIDE.read_text().partition(MARK)
    GUIDE.write_text(f"{text}{mark}\n\n{table(rows)}")


def main() -> None:
    """Examine what the options ask for, one model after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", choices=LIBRARIES, help="One library instead of all.")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="Names to run, as 'resnet*'."
    )
    parser.add_argument("--again", action="store_true", help="Replace the rows that are there.")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_suffix(".json"), help="File of the rows."
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = {(row.library, row.name): row for row in read(options.output)}
    for library in [options.library] if options.library else LIBRARIES:
        for entry in LIBRARIES[library]():
            known = (library, entry.name) in rows and not options.again
            if known or not fnmatch(entry.name, options.only):
                continue
            row = rows[library, entry.name] = examine_apart(entry)
            print(f"{row.name:32} {row.result:8} {row.seconds:5.1f} s  {row.message}", flush=True)
            write(rows.values(), options.output)
    if options.output == Path(__file__).with_suffix(".json"):
        update_guide(read(options.output))
    print(", ".join(f"{number} {result}" for result, number in counts(rows.values()).items()))


if __name__ == "__main__":
    main()
