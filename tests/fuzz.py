"""Mutants of small valid files of every format that fcvgg reads: each is read, or refused well.

``python tests/fuzz.py --seed 0 --mutants 300 [--format onnx] [--index 17]`` changes bits, bytes and
lengths of files, and types and numbers of descriptions in JSON, and reads each mutant in a process
of its own. Anything but success or a `FcvggError` of one line within seconds and some memory is
printed with what reproduces it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import tifffile
import torch
import zarr
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fcvgg
from fcvgg.images.reading import read_image
from fcvgg.names import readable
from fcvgg.sources import checkpoints
from fcvgg.streaming.score_store import open_store

SECONDS = 10
"""Of the processor, for a mutant."""

PATIENCE = 100
"""Seconds after which a mutant hangs that takes none of the processor."""

GROWTH = 1 << 30
"""Bytes that reading a mutant may add to the memory of the process."""

LONGEST = 4_000


@dataclass(frozen=True)
class Format:
    """A kind of file: how a small valid one is made in a folder, and how it is read."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]


@dataclass(frozen=True)
class Fault:
    """What a mutant led to, and the arguments that make it again."""

    format: str
    seed: int
    index: int
    what: str

    def __str__(self) -> str:
        remake = f"--format {self.format} --seed {self.seed} --index {self.index}"
        return f"{self.what}\n    python tests/fuzz.py {remake}"


# -- valid files ----------------------------------------------------------------------------------


def tiny_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1)).eval()


def tiny_net() -> fcvgg.FullyConvolutional:
    preprocess = fcvgg.Preprocess.imagenet()
    return fcvgg.convert(
        tiny_model(), input_size=8, preprocess=preprocess, categories=("cat", "dog", "bird")
    )


def pixels(height: int = 40, width: int = 52) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def make_bundle(folder: Path) -> Path:
    return tiny_net().save(folder / "bundle")


def make_onnx(folder: Path) -> Path:
    helper, numbers = onnx.helper, np.random.default_rng(0)
    weights = {
        "conv.weight": numbers.normal(size=(4, 3, 3, 3)),
        "conv.bias": numbers.normal(size=4),
        "fc.weight": numbers.normal(size=(3, 64)),
        "fc.bias": numbers.normal(size=3),
    }
    nodes = [
        helper.make_node("Conv", ["images", "conv.weight", "conv.bias"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Shape", ["c"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["batch"]),
        helper.make_node("Concat", ["batch", "rest"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["c", "sizes"], ["d"]),
        helper.make_node("Gemm", ["d", "fc.weight", "fc.bias"], ["scores"], transB=1),
    ]
    stored = [
        onnx.numpy_helper.from_array(value.astype(np.float32), name)
        for name, value in weights.items()
    ]
    stored.append(onnx.numpy_helper.from_array(np.array([0]), "first"))
    stored.append(onnx.numpy_helper.from_array(np.array([-1]), "rest"))
    images = helper.make_tensor_value_info("images", 1, ["N", 3, 8, 8])
    scores = helper.make_tensor_value_info("scores", 1, ["N", 3])
    graph = helper.make_graph(nodes, "graph", [images], [scores], stored)
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    for key, value in (("fcvgg.categories", ["a", "b", "c"]), ("fcvgg.input_size", [8, 8])):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def keras_config() -> dict[str, Any]:
    layers = [
        ("InputLayer", {"name": "images", "batch_shape": [None, 8, 8, 3]}),
        ("Conv2D", {"name": "conv", "filters": 4, "kernel_size": [3, 3], "padding": "same"}),
        ("MaxPooling2D", {"name": "pool", "pool_size": [2, 2]}),
        ("BatchNormalization", {"name": "norm", "axis": -1}),
        ("Flatten", {"name": "flat"}),
        ("Dense", {"name": "dense", "units": 3, "activation": "softmax"}),
    ]
    described = [{"class_name": kind, "config": config} for kind, config in layers]
    return {"class_name": "Sequential", "config": {"name": "net", "layers": described}}


def keras_weights() -> dict[str, list[np.ndarray]]:
    numbers = np.random.default_rng(0)
    return {
        "conv": [numbers.normal(size=(3, 3, 3, 4)), numbers.normal(size=4)],
        "norm": [np.ones(4), np.zeros(4), np.zeros(4), np.ones(4)],
        "dense": [numbers.normal(size=(64, 3)), numbers.normal(size=3)],
    }


def make_hdf5(folder: Path) -> Path:
    path = folder / "model.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(keras_config())
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in keras_weights()]
        for name, arrays in keras_weights().items():
            names = [f"{name}/weight_{i}:0" for i in range(len(arrays))]
            layer = group.create_group(name)
            layer.attrs["weight_names"] = [n.encode() for n in names]
            for key, array in zip(names, arrays):
                layer.create_dataset(key, data=array.astype(np.float32))
    return path


def make_keras(folder: Path) -> Path:
    held = io.BytesIO()
    kinds = {"conv": "conv2d", "norm": "batch_normalization", "dense": "dense"}
    with h5py.File(held, "w") as file:
        for name, arrays in keras_weights().items():
            for i, array in enumerate(arrays):
                file[f"layers/{kinds[name]}/vars/{i}"] = array.astype(np.float32)
    path = folder / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.0.0"}))
        archive.writestr("config.json", json.dumps(keras_config()))
        archive.writestr("model.weights.h5", held.getvalue())
    return path


def make_pth(folder: Path) -> Path:
    torch.save({"state_dict": tiny_model().state_dict(), "epoch": 3}, folder / "model.pth")
    return folder / "model.pth"


def make_legacy(folder: Path) -> Path:
    state = tiny_model().state_dict()
    torch.save(state, folder / "model.pt", _use_new_zipfile_serialization=False)
    return folder / "model.pt"


def make_safetensors(folder: Path) -> Path:
    save_file(tiny_model().state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def make_tiff(folder: Path) -> Path:
    path = folder / "image.tif"
    with tifffile.TiffWriter(path) as file:
        options = {"photometric": "rgb", "tile": (16, 16), "compression": "zlib"}
        file.write(pixels(), subifds=1, **options)
        file.write(pixels()[::2, ::2], subfiletype=1, **options)
    return path


def make_zarr(folder: Path) -> Path:
    path = folder / "image.zarr"
    group = zarr.open_group(str(path), mode="w")
    for level in (0, 1):
        data = np.moveaxis(pixels()[:: 1 + level, :: 1 + level], -1, 0)
        group.create_array(str(level), data=data, chunks=(3, 16, 16))
    scales = [{"type": "scale", "scale": [1, 0.5 * n, 0.5 * n]} for n in (1, 2)]
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": n, "type": "space", "unit": "micrometer"} for n in "yx"]
    datasets = [
        {"path": str(level), "coordinateTransformations": [scale]}
        for level, scale in enumerate(scales)
    ]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes, "datasets": datasets, "name": "image"}],
    }
    return path


def make_store(folder: Path) -> Path:
    path = folder / "scores.zarr"
    fcvgg.stream(tiny_net(), pixels(), out=path)
    return path


def image_maker(ending: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        Image.fromarray(pixels()).save(folder / f"image.{ending}")
        return folder / f"image.{ending}"

    return make


# -- readers --------------------------------------------------------------------------------------


def load_model(path: Path) -> None:
    net = fcvgg.load(path)
    if net.preprocess is not None and net.preprocess.channels == 3:
        net.score_map(pixels())


def load_checkpoint(path: Path) -> None:
    checkpoints.load_into(tiny_model(), checkpoints.read_state(path), str(path))


def read_strips(path: Path) -> None:
    for level in (0, 1):
        source = fcvgg.open_image(path, level)
        source.read((0, min(source.size[0], 64)), (0, min(source.size[1], 4096)))


def read_picture(path: Path) -> None:
    read_image(path)
    read_strips_of_level_0(path)


def read_strips_of_level_0(path: Path) -> None:
    source = fcvgg.open_image(path)
    source.read((0, min(source.size[0], 64)), (0, min(source.size[1], 4096)))


def read_store(path: Path) -> None:
    with suppress(fcvgg.FcvggError):
        open_store(path).heatmap("cat")
    fcvgg.stream(tiny_net(), pixels(), out=path).heatmap()


FORMATS = {
    "bundle": Format(make_bundle, load_model),
    "onnx": Format(make_onnx, load_model),
    "hdf5": Format(make_hdf5, load_model),
    "keras": Format(make_keras, load_model),
    "pth": Format(make_pth, load_checkpoint),
    "legacy": Format(make_legacy, load_checkpoint),
    "safetensors": Format(make_safetensors, load_checkpoint),
    "tiff": Format(make_tiff, read_strips),
    "zarr": Format(make_zarr, read_strips),
    "store": Format(make_store, read_store),
    "png": Format(image_maker("png"), read_picture),
    "jpeg": Format(image_maker("jpg"), read_picture),
    "webp": Format(image_maker("webp"), read_picture),
    "gif": Format(image_maker("gif"), read_picture),
    "bmp": Format(image_maker("bmp"), read_picture),
    "avif": Format(image_maker("avif"), read_picture),
}


# -- mutants --------------------------------------------------------------------------------------

_STRANGE = (
    *(None, True, False, 0, -1, 1, 2**31, -(2**63), 2**64, 10**30, 0.5, 1e308, float("inf")),
    *("", "x", "images", "\x1b[31m", "\u202e", "../../etc", "/dev/zero", "9" * 500),
    *([], [[]], {}, [0] * 50, {"a": 1}, [None], [-1, -1], ["y", "x"]),
)


def mutate(path: Path, numbers: np.random.Generator) -> None:
    """Change a file, or one of those in a folder, in place."""
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    described = [f for f in files if f.suffix == ".json"]
    file = files[numbers.integers(len(files))]
    if described and numbers.random() < 0.7:
        file = described[numbers.integers(len(described))]
    if file.suffix == ".keras" and numbers.random() < 0.6:
        _mutate_member(file, numbers)
    else:
        file.write_bytes(_mutated(file.read_bytes(), file.suffix == ".json", numbers))


def _mutate_member(path: Path, numbers: np.random.Generator) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = ("config.json", "model.weights.h5")[numbers.integers(2)]
    members[name] = _mutated(members[name], name.endswith(".json"), numbers)
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)


def _mutated(data: bytes, described: bool, numbers: np.random.Generator) -> bytes:
    if described and numbers.random() < 0.9:
        return _changed_json(data, numbers)
    return _changed_bytes(data, numbers)


def _changed_bytes(data: bytes, numbers: np.random.Generator) -> bytes:
    held = bytearray(data)
    # headers lead furthest: half of the changes are among the first bytes
    size = max(len(held), 1)
    reach = min(size, 512) if numbers.random() < 0.5 else size
    start = int(numbers.integers(reach))
    length = int(numbers.integers(1, 17))
    kind = numbers.integers(6)
    if kind == 0:
        for place in numbers.integers(0, reach, 1 + int(numbers.integers(4))):
            held[int(place) % size : int(place) % size + 1] = bytes(
                [held[int(place) % size] ^ (1 << int(numbers.integers(8)))]
            )
    elif kind == 1:
        held[start : start + length] = numbers.bytes(length)
    elif kind == 2:
        held[start : start + length] = (b"\0", b"\xff", b"\x7f")[numbers.integers(3)] * length
    elif kind == 3:
        del held[start:]
    elif kind == 4:
        held[start:start] = numbers.bytes(length)
    else:
        other = int(numbers.integers(size))
        part = bytes(held[other : other + 4 * length])
        held[start : start + len(part)] = part
    return bytes(held)


def _changed_json(data: bytes, numbers: np.random.Generator) -> bytes:
    content = json.loads(data)
    places = list(_places(content))
    for _ in range(1 + int(numbers.integers(2))):
        holder, key = places[numbers.integers(len(places))]
        kind = numbers.integers(4)
        with suppress(LookupError, TypeError):
            if kind == 0:
                del holder[key]
            elif kind == 1 and isinstance(holder[key], list):
                holder[key] = holder[key] * int(numbers.integers(2, 40))
            elif kind == 2 and type(holder[key]) in (int, float):
                holder[key] = holder[key] * 10 ** int(numbers.integers(1, 12)) - 1
            else:
                holder[key] = _STRANGE[numbers.integers(len(_STRANGE))]
    return json.dumps(content).encode()


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder in a description with one of its keys or indices."""
    keys = content if isinstance(content, dict) else range(len(content))
    for key in list(keys):
        yield content, key
        if isinstance(content[key], (dict, list)):
            yield from _places(content[key])


# -- the run --------------------------------------------------------------------------------------


def fuzz(
    names: Sequence[str],
    seed: int = 0,
    indices: Sequence[int] = range(300),
    report: Callable[[str], None] = lambda line: None,
) -> list[Fault]:
    """The faults that mutants of these formats lead to."""
    torch.set_num_threads(1)  # processes are forked
    faults = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in names:
            (folder / kind).mkdir()
            # in a process of its own too, since zarr's threads do not survive a fork
            made = Path(_outcome(FORMATS[kind].make, folder / kind)[1])
            started, counts = time.monotonic(), {"read": 0, "refused": 0, "fault": 0}
            problem = _outcome(FORMATS[kind].read, _copied(made, folder / "valid"))
            if problem != ("read", ""):
                faults.append(Fault(kind, seed, -1, f"the valid file gives {problem}"))
            for index in indices:
                numbers = np.random.default_rng([seed, index, zlib.crc32(kind.encode())])
                mutant = _copied(made, folder / "mutant")
                mutate(mutant, numbers)
                outcome, what = _outcome(FORMATS[kind].read, mutant)
                counts[outcome] += 1
                if outcome == "fault":
                    faults.append(Fault(kind, seed, index, what))
                    report(f"{kind} {index}: {what}")
            took = time.monotonic() - started
            report(f"{kind}: {', '.join(f'{n} {k}' for k, n in counts.items())}; {took:.0f} s")
    return faults


def _copied(path: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy = folder / path.name
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
    return copy


def _outcome(read: Callable[[Path], Any], path: Path) -> tuple[str, str]:
    """What reading gives, in a process of its own: ``"read"``, ``"refused"`` or ``"fault"``."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_read_and_tell, args=(read, path, sender))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv() if receiver.poll(PATIENCE) else None
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        ended = f"the process ended with status {process.exitcode}"
        outcome = ("fault", f"it took more than {SECONDS} s" if late else ended)
    if outcome is None:
        process.kill()
        outcome = ("fault", f"it hung for {PATIENCE} s")
    process.join()
    return outcome  # type: ignore[no-any-return]


def _read_and_tell(read: Callable[[Path], Any], path: Path, sender: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(time.process_time()) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (used, used))
    warnings.simplefilter("ignore")
    logging.disable()
    try:
        result = read(path)
        outcome = ("read", str(result) if isinstance(result, Path) else "")
    except fcvgg.FcvggError as error:
        outcome = ("refused", str(error))
        if readable(error) != str(error) or len(str(error)) > LONGEST:
            outcome = ("fault", f"a message of {len(str(error))} characters: {str(error)[:200]!r}")
    except BaseException as error:
        outcome = ("fault", f"{type(error).__name__}: {str(error)[:300]!r}")
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if growth > GROWTH:
        outcome = ("fault", f"it took {growth >> 20} MiB, and then: {outcome}")
    sender.send(outcome)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--format", choices=list(FORMATS), action="append")
    parser.add_argument("--index", type=int, help="This mutant alone.")
    options = parser.parse_args()
    indices = range(options.mutants) if options.index is None else [options.index]
    faults = fuzz(options.format or list(FORMATS), options.seed, indices, print)
    for fault in faults:
        print(fault)
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
