"""Handing a converted network on to where it will run: ONNX and torch.export.

The exported graph takes preprocessed images ``(N, C, H, W)``, or pixels ``(N, H, W, C)``, with
batch, height and width free, at any size from the window up; padding smaller images is left to the
caller.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shape_config
from torch.overrides import TorchFunctionMode

from fcvgg.errors import EquivalenceError, FcvggError, MissingExtraError, one_line
from fcvgg.geometry import KernelPair, Pair
from fcvgg.rewriting.sliding import windows_of
from fcvgg.rewriting.tracing import operation_name
from fcvgg.serialization.deployment import Deployed
from fcvgg.serialization.runtime import onnx_runner
from fcvgg.support.atomic import EXPORT_ENDINGS, atomic_file, checked_file
from fcvgg.support.module_state import device_of, dtype_of, evaluating

_LARGEST_PROTOBUF = 2 * 1024**3
"""Bytes that one ONNX file can hold; beyond, its weights lie in a second file."""

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""Largest difference between the scores of the file and the network's, relative to the largest."""


class ExportedFile(type(Path())):  # type: ignore[misc]
    """The path of an exported file that knows whether the file was run.

    Attributes:
        check: one line: the largest difference from the network and the sizes that were run, or
            ``"not checked: "`` with the reason.
    """

    check = "not checked"


def export_network(
    path: Path,
    network: nn.Module,
    images: tuple[int, int, int, int],
    metadata: Mapping[str, Any],
    sizes: Sequence[Pair] = (),
) -> ExportedFile:
    """Write a network as ``.onnx`` or ``.pt2``, by the name's ending, and run what was written.

    Args:
        path: where to.
        network: takes images and returns one map or a tuple of maps; a `Deployed` one may take
            pixels.
        images: shape ``(N, C, H, W)`` to trace with: more than one image and more than one cell.
        metadata: kept in the file under ``fcvgg.NAME``, as JSON.
        sizes: ``(H, W)`` at which the file is compared with the network, besides the traced one.

    Raises:
        FcvggError: if the ending is unknown, or the file cannot be written or run.
        EquivalenceError: if the file gives other scores than the network; it is not kept.
        MissingExtraError: if ONNX's packages are not installed.
    """
    checked_file(path, "path", EXPORT_ENDINGS)
    as_onnx = path.suffix.lower() == ".onnx"
    with _Replaced(_FOR_ONNX if as_onnx else _FOR_TORCH_EXPORT):
        program = export_program(network, images)
    entries = {f"fcvgg.{name}": json.dumps(value) for name, value in metadata.items()}
    written = ExportedFile(path)
    with atomic_file(path) as temporary:
        if as_onnx:
            _write_onnx(temporary, program, network, entries)
        else:
            torch.export.save(program, temporary, extra_files=entries)
        opened = _in_onnxruntime(temporary) if as_onnx else _in_torch(temporary)
        if isinstance(opened, str):
            written.check = f"not checked: {opened}"
        else:
            shapes = [images, *((1, images[1], *size) for size in sizes)]
            written.check = _compare(path.name, opened, network, shapes)
    return written


def export_program(network: nn.Module, images: tuple[int, int, int, int]) -> ExportedProgram:
    """The network as an `ExportedProgram` with free batch, height and width.

    torch.export takes a traced size for larger than one and guards against the map of one cell,
    which the native size gives; backed sizes that are oblivious to 0 and 1 lift that guard.
    """

    def traced(module: nn.Module) -> ExportedProgram:
        free = {0: Dim.DYNAMIC, **dict.fromkeys(_sides(module), Dim.DYNAMIC)}
        patched = shape_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with patched, torch.no_grad():
            example = _noise(module, images)
            return torch.export.export(module, (example,), dynamic_shapes=(free,), strict=False)

    with evaluating(network):
        try:
            return traced(network)
        except Exception as error:
            place = "the network"
            graph = network.network if isinstance(network, Deployed) else network
            if isinstance(graph, fx.GraphModule):
                followed = _Followed(graph)
                with suppress(Exception):
                    traced(followed)
                place = followed.place
            raise FcvggError(f"torch.export cannot take {place}: {one_line(error)}") from error


def _takes_pixels(network: nn.Module) -> bool:
    return isinstance(network, Deployed) and network.preprocess is not None


def _sides(network: nn.Module) -> Pair:
    """The dimensions of height and width in what the network takes."""
    return (1, 2) if _takes_pixels(network) else (2, 3)


def _noise(network: nn.Module, shape: Sequence[int]) -> Tensor:
    """Noise for the network: images ``(N, C, H, W)`` of this shape, or pixels ``(N, H, W, C)``."""
    generator = torch.Generator().manual_seed(0)
    if not _takes_pixels(network):
        noise = torch.randn(*shape, generator=generator)
        return noise.to(device_of(network), dtype_of(network))
    n, channels, height, width = shape
    pixels = torch.randint(
        256, (n, height, width, channels), generator=generator, dtype=torch.uint8
    )
    return pixels.to(device_of(network))


class _Followed(nn.Module):
    """A network that remembers which of its layers it runs, to name the one that fails."""

    place = "the network"

    def __init__(self, network: fx.GraphModule):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        followed = self

        class Interpreter(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                followed.place = _described(node, followed.network)
                return super().run_node(node)

        return Interpreter(self.network).run(images)


def _described(node: fx.Node, network: nn.Module) -> str:
    """A node of a converted graph, for messages: ``features.0 (Conv2d)``."""
    if node.op == "call_module":
        kind = type(network.get_submodule(str(node.target))).__name__
        return f"{node.target} ({kind})"
    return f"{node.name} ({operation_name(node)})"


# -- running what was written ---------------------------------------------------------------------

_Run = Callable[[Tensor], "list[Tensor]"]


def _compare(name: str, run: _Run, network: nn.Module, shapes: Sequence[tuple[int, ...]]) -> str:
    """Run the file and the network on noise of several shapes; say how far apart they are."""
    tolerance = _TOLERANCES.get(dtype_of(network), 1e-4)
    worst = 0.0
    for shape in shapes:
        images = _noise(network, shape)
        pixels = f"{shape[2]}x{shape[3]}"
        with torch.no_grad(), evaluating(network):
            expected = network(images)
        try:
            found = run(images)
        except Exception as error:
            raise FcvggError(
                f"{name} does not run at {pixels} pixels: {one_line(error)}; nothing was "
                "written, choose the other format (.onnx, .pt2)"
            ) from error
        for wanted, got in zip(_maps(expected), found, strict=True):
            difference = _relative_error(wanted.double().cpu(), got.double().cpu())
            if not difference <= tolerance:
                raise EquivalenceError(
                    f"{name} gives other scores than the network at {pixels} pixels, by "
                    f"{difference:.1e} of the largest, more than {tolerance:.0e}; nothing was "
                    "written, please report the model"
                )
            worst = max(worst, difference)
    sizes = ", ".join(f"{shape[2]}x{shape[3]}" for shape in shapes)
    return f"checked at {sizes}: max error {worst:.1e} of the largest score"


def _maps(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _relative_error(wanted: Tensor, got: Tensor) -> float:
    """The largest difference relative to the largest score; infinite for another shape."""
    if wanted.shape != got.shape:
        return float("inf")
    differs = ~((wanted == got) | (wanted.isnan() & got.isnan()))
    if not differs.any():
        return 0.0
    scale = (
        wanted[wanted.isfinite()].abs().amax() if wanted.isfinite().any() else wanted.new_ones(())
    )
    return float((wanted - got)[differs].abs().amax() / scale.clamp(min=1e-30))


def _in_onnxruntime(path: Path) -> _Run | str:
    """What runs an ONNX file, or why nothing does."""
    try:
        run = onnx_runner(path)
    except MissingExtraError:
        return "onnxruntime is not installed; pip install 'fcvgg[onnx]'"
    except Exception as error:
        if type(error).__name__ != "NotImplemented":
            reason = one_line(error).replace(str(path), "it")
            raise FcvggError(
                f"onnxruntime cannot read the file: {reason}; nothing was written, export to .pt2, "
                "or cast the network with net.float()"
            ) from error
        return f"onnxruntime cannot run it ({one_line(error)})"
    return lambda images: list(map(torch.from_numpy, run(images.cpu().numpy())))


def _in_torch(path: Path) -> _Run:
    module = torch.export.load(path).module()

    @torch.no_grad()
    def run(images: Tensor) -> list[Tensor]:
        return _maps(module(images))

    return run


# -- functions that a format cannot say ------------------------------------------------------------


class _Replaced(TorchFunctionMode):
    """Puts functions that a format can hold in place of those that it cannot, or not well."""

    def __init__(self, replacements: Mapping[Any, Callable[..., Any]]):
        super().__init__()
        self._replacements = replacements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._replacements.get(func, func)(*args, **(kwargs or {}))


def _response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """ONNX's operator, where torch would write out a pool over a third dimension.

    Other programs run that slowly and `fcvgg.load` does not read it.
    """
    if size % 2 == 0 or not hasattr(torch.onnx, "ops"):  # torch before 2.8
        # ONNX has the further channel of an even size on the other side
        return F.local_response_norm(input, size, alpha, beta, k)
    attributes: dict[str, Any] = {"size": size, "alpha": alpha, "beta": beta, "bias": float(k)}
    return torch.onnx.ops.symbolic(
        "LRN", [input], attributes, dtype=input.dtype, shape=input.shape, version=None
    )


def _leaky_relu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """RReLU in evaluation mode: its random slope is the mean of the limits."""
    return F.leaky_relu(input, (lower + upper) / 2)


def _log_sigmoid(input: Tensor) -> Tensor:
    return -F.softplus(-input)


def _average(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """ONNX's pool has no divisor: the average, times what the kernel has more than the divisor."""
    if divisor_override is None:
        return F.avg_pool2d(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad=count_include_pad
        )
    windows = windows_of(kernel_size, stride, padding)
    height, width = windows
    if ceil_mode:  # windows beyond the end are divided like all others, so the zeros count
        input, padding = _ends_padded(input, windows, 0.0), 0
    average = F.avg_pool2d(input, kernel_size, stride, padding, count_include_pad=True)
    return average * (height.kernel * width.kernel / divisor_override)


def _average_over_padded(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """A ceil-mode average without torch's branch on the size, which would fix it in the file."""
    windows = windows_of(kernel_size, stride, padding)
    if not ceil_mode or not _branches(windows):
        return F.avg_pool2d(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )

    def total(x: Tensor, padded: bool = False) -> Tensor:
        x = _ends_padded(x, windows, 0.0, padded)
        return F.avg_pool2d(x, kernel_size, stride, divisor_override=1)

    if divisor_override is not None:
        return total(input) / divisor_override
    ones = torch.ones_like(input[:1, :1])
    if not count_include_pad:
        return total(input) / total(ones)
    height, width = windows
    edges = (width.before, width.after, height.before, height.after)
    return total(input) / total(F.pad(ones, edges, value=1.0), padded=True)


def _maximum_over_padded(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """A ceil-mode maximum without torch's branch on the size, which would fix it in the file."""
    windows = windows_of(kernel_size, stride, padding, dilation)
    if not ceil_mode or not _branches(windows):
        return torch.max_pool2d(input, kernel_size, stride or (), padding, dilation, ceil_mode)
    padded = _ends_padded(input, windows, -torch.inf)
    return torch.max_pool2d(padded, kernel_size, stride or (), 0, dilation)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The arithmetic, without torch's branch on the order in memory, which the size decides."""
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    normed = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    scaled = normed if weight is None else normed * weight
    return scaled if bias is None else scaled + bias


def _branches(windows: KernelPair) -> bool:
    """Whether torch may drop a last window that would start beyond the input."""
    return any(window.before or window.stride > window.span for window in windows)


def _ends_padded(x: Tensor, windows: KernelPair, value: float, padded: bool = False) -> Tensor:
    """A map padded so that its windows, rounded down, are those of the bare map rounded up.

    `padded` says that the map has the windows' padding at both ends already.
    """
    pads: list[Any] = []
    for axis in (1, 0):
        # torch's rule for rounding up, in arithmetic that is traced: a branch would fix the size
        window = windows[axis]
        had = window.before if padded else 0
        size = x.shape[2 + axis] - 2 * had  # without padding
        free = size + 2 * window.before - window.span
        cells = (free + window.stride - 1) // window.stride + 1
        starts = (size + window.before - 1) // window.stride + 1  # windows that start in the input
        last = (torch.sym_min(cells, starts) - 1) * window.stride
        end = last + window.span - size - window.before
        pads += [window.before - had, torch.sym_max(end - had, 0)]
    return F.pad(x, pads, value=value)


_FOR_ONNX: dict[Any, Callable[..., Any]] = {
    F.local_response_norm: _response_norm,
    F.avg_pool2d: _average,
    **dict.fromkeys((F.rrelu, torch.rrelu), _leaky_relu),
    F.logsigmoid: _log_sigmoid,
}
_FOR_TORCH_EXPORT: dict[Any, Callable[..., Any]] = {
    F.avg_pool2d: _average_over_padded,
    F.layer_norm: _layer_norm,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _maximum_over_padded),
}


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
        try:
            result = torch.onnx.export(
                program,
                (),
                input_names=["pixels" if _takes_pixels(network) else "images"],
                output_names=_output_names(program, network),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            raise FcvggError(
                f"torch.onnx cannot write {_untranslated(error, program)}; "
                "export to .pt2, or replace the layer"
            ) from error
    assert result is not None
    result.model.metadata_props.update(entries)
    _name_dimensions(result.model.graph, _sides(network))
    if size < _LARGEST_PROTOBUF:
        onnx.save_model(result.model_proto, str(path))
    else:
        result.save(str(path), external_data=True)


def _untranslated(error: BaseException, program: ExportedProgram) -> str:
    """The layer at which torch's exporter gave up, from the chain of its errors."""
    # torch wraps the error of a node several times, and only an outer one names the node
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    found = [re.search(r"translating node %(\w+)", str(cause)) for cause in causes]
    name = next((match[1] for match in found if match), None)
    reason = one_line(causes[-1]).partition(". Failure message")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nodes = program.run_decompositions().graph.nodes
    for node in nodes:
        if node.name == name and node.meta.get("nn_module_stack"):
            path, kind = list(node.meta["nn_module_stack"].values())[-1]
            kind = str(kind).rpartition(".")[2]
            return f"{path} ({kind}): {reason}" if path else f"{name}: {reason}"
    return f"{name or 'the network'}: {reason}"


def _name_dimensions(graph: Any, sides: Pair) -> None:
    """Call the free dimensions what they are, where torch numbers its symbols."""
    shape = graph.inputs[0].shape
    names = {str(shape[i]): name for i, name in zip((0, *sides), ("batch", "height", "width"))}
    values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        dimensions: list[Any] = []
        for dimension in value.shape:
            text = str(dimension)
            for symbol, name in names.items():
                text = re.sub(rf"\b{symbol}\b", name, text)
            dimensions.append(dimension if isinstance(dimension, int) else text)
        value.shape = type(value.shape)(dimensions)  # the shape of a shared value is frozen


def _output_names(program: ExportedProgram, network: nn.Module) -> list[str]:
    count = len(program.graph_signature.user_outputs)
    probable = isinstance(network, Deployed) and network.activations is not None
    name = "probabilities" if probable else "scores"
    return [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
