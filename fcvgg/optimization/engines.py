"""Run a converted network in another runtime: ONNX Runtime or OpenVINO."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from fcvgg.errors import FcvggError
from fcvgg.serialization.runtime import Run, onnx_runner
from fcvgg.support.extras import imported

if TYPE_CHECKING:
    from fcvgg.network import FullyConvolutional

_EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}


class EngineNetwork(nn.Module):
    """Calls an engine with float32 images on the CPU, from any thread. Copies share the engine."""

    def __init__(self, run: Run, outputs: int):
        super().__init__()
        self._run = run
        self._outputs = outputs

    def forward(self, images: Tensor) -> Any:
        scores = [torch.from_numpy(s) for s in self._run(np.ascontiguousarray(images.cpu()))]
        return scores[0] if self._outputs == 1 else tuple(scores)

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineNetwork:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __reduce__(self) -> NoReturn:
        raise FcvggError(
            "a network that runs in another engine cannot be pickled, got one compiled in this "
            "process; pickle or save the plain network (net.plain), and call fcvgg.optimize again "
            "where it is loaded"
        )


def engine_network(net: FullyConvolutional, engine: str, dtype: torch.dtype) -> EngineNetwork:
    """A network that runs the file of `net.export` in another engine.

    Raises:
        MissingExtraError: if the engine is not installed.
    """
    open_engine = ENGINES[engine]
    imported(engine, _EXTRAS[engine])
    with tempfile.TemporaryDirectory(prefix="fcvgg-") as folder:
        path = net.export(Path(folder) / "network.onnx")
        return EngineNetwork(open_engine(path, dtype), len(net.program.classes))


def openvino_runner(model: Any, dtype: torch.dtype) -> Run:
    """What runs an ONNX file, or a model of OpenVINO, on the CPU, computing floats in `dtype`.

    Threads that call it take turns: they would share a compiled model's one request, which refuses
    a call while it is busy, or gives one thread the other's scores.

    Raises:
        MissingExtraError: if OpenVINO is not installed.
    """
    runtime = imported("openvino", _EXTRAS["openvino"])
    precision = {torch.bfloat16: "bf16"}.get(dtype, "f32")
    compiled = runtime.Core().compile_model(
        str(model) if isinstance(model, Path) else model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    outputs = compiled.outputs
    turn = Lock()

    def run(images: Any) -> list[Any]:
        with turn:
            results = compiled(images)
            return [np.array(results[output]) for output in outputs]

    return run


ENGINES: dict[str, Callable[[Path, torch.dtype], Run]] = {
    "onnxruntime": lambda path, dtype: onnx_runner(path),
    "openvino": openvino_runner,
}
