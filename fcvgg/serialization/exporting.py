"""Handing a converted network on to where it will run: ONNX and torch.export.

The exported graph takes preprocessed images ``(N, C, H, W)`` with batch, height and width free, at
any size from the window up; padding smaller images is left to the caller.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shape_config
from torch.overrides import TorchFunctionMode

from fcvgg.errors import FcvggError, MissingExtraError, one_line
from fcvgg.files import EXPORT_ENDINGS, checked_file, written_whole
from fcvgg.placement import device_of, dtype_of

_LARGEST_PROTOBUF = 2 * 1024**3
"""Bytes that one ONNX file can hold; beyond, its weights lie in a file beside it."""


def export_network(
    path: Path, network: nn.Module, images: tuple[int, int, int, int], metadata: Mapping[str, Any]
) -> Path:
    """Write a network as ``.onnx`` or ``.pt2``, by the name's ending.

    Args:
        path: where to.
        network: takes images and returns one map or a tuple of maps.
        images: shape ``(N, C, H, W)`` to trace with: more than one image and more than one cell.
        metadata: kept in the file under ``fcvgg.NAME``, as JSON.

    Raises:
        FcvggError: if the ending is unknown or the file cannot be written.
        MissingExtraError: if ONNX's packages are not installed.
    """
    checked_file(path, "path", EXPORT_ENDINGS)
    onnx = path.suffix.lower() == ".onnx"
    with _OnnxOperators() if onnx else nullcontext():
        program = exported(network, images)
    entries = {f"fcvgg.{name}": json.dumps(value) for name, value in metadata.items()}
    with written_whole(path) as temporary:
        if onnx:
            _write_onnx(temporary, program, network, entries)
        else:
            torch.export.save(program, temporary, extra_files=entries)
    return path


def exported(network: nn.Module, images: tuple[int, int, int, int]) -> ExportedProgram:
    """The network as an `ExportedProgram` with free batch, height and width.

    torch.export takes a traced size for larger than one and guards against the map of one cell,
    which the native size gives; backed sizes that are oblivious to 0 and 1 lift that guard.
    """
    example = torch.zeros(images, device=device_of(network), dtype=dtype_of(network))
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        patched = shape_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with patched, torch.no_grad():
            return torch.export.export(network, (example,), dynamic_shapes=(free,), strict=False)
    except Exception as error:
        raise FcvggError(f"torch.export cannot take the network: {one_line(error)}") from error
    finally:
        for module, mode in modes:
            module.training = mode


class _OnnxOperators(TorchFunctionMode):
    """Functions as the ONNX operators that they are, where torch would write out their arithmetic.

    Local response normalisation would become a pool over a third dimension, which other programs
    run slowly and `fcvgg.load` does not read.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.local_response_norm and hasattr(torch.onnx, "ops"):  # since torch 2.8
            func = _response_norm
        return func(*args, **(kwargs or {}))


def _response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    if size % 2 == 0:  # ONNX has the further channel of an even size on the other side
        return F.local_response_norm(input, size, alpha, beta, k)
    attributes: dict[str, Any] = {"size": size, "alpha": alpha, "beta": beta, "bias": float(k)}
    return torch.onnx.ops.symbolic(
        "LRN", [input], attributes, dtype=input.dtype, shape=input.shape, version=None
    )


def _write_onnx(
    path: Path, program: ExportedProgram, network: nn.Module, entries: dict[str, str]
) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx needs it and says so less clearly)
    except ImportError as error:
        raise MissingExtraError(
            f"exporting to ONNX needs {error.name}; install it with pip install 'fcvgg[onnx]'"
        ) from error
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    with warnings.catch_warnings():  # the exporter warns of its own internals
        warnings.simplefilter("ignore")
        result = torch.onnx.export(
            program,
            (),
            input_names=["images"],
            output_names=_output_names(program),
            dynamo=True,
            verbose=False,
        )
    assert result is not None
    result.model.metadata_props.update(entries)
    _name_dimensions(result.model.graph)
    if size < _LARGEST_PROTOBUF:
        onnx.save_model(result.model_proto, str(path))
    else:
        result.save(str(path), external_data=True)


def _name_dimensions(graph: Any) -> None:
    """Call the free dimensions what they are, where torch numbers its symbols."""
    shape = graph.inputs[0].shape
    names = {str(shape[i]): name for i, name in ((0, "batch"), (2, "height"), (3, "width"))}
    values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for i, dimension in enumerate(value.shape):
            if not isinstance(dimension, int):
                text = str(dimension)
                for symbol, name in names.items():
                    text = re.sub(rf"\b{symbol}\b", name, text)
                value.shape[i] = text


def _output_names(program: ExportedProgram) -> list[str]:
    count = len(program.graph_signature.user_outputs)
    return ["scores"] if count == 1 else [f"scores_{i}" for i in range(count)]
