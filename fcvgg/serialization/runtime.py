"""ONNX files run in onnxruntime, where it is installed (extra ``onnx``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fcvgg.support.extras import imported

Run = Callable[[Any], "list[Any]"]
"""Takes images as an array and gives the arrays of all outputs."""

_ERRORS_ALONE = 4
"""The severity from which onnxruntime writes to stderr: fatal errors, the others are raised."""


def onnx_runner(model: str | Path | bytes) -> Run:
    """What runs an ONNX file, or the bytes of one, on the CPU.

    Raises:
        MissingExtraError: if onnxruntime is not installed.
        Exception: of onnxruntime, which has no class for its own, if it cannot run the file.
    """
    runtime = imported("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ALONE
    options.intra_op_num_threads = torch.get_num_threads()
    model = model if isinstance(model, bytes) else str(model)
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Any) -> list[Any]:
        outputs = session.run(None, {name: np.ascontiguousarray(images)})
        return list(map(np.asarray, outputs))

    return run
